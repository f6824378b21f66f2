"""How the token records lie on the disk."""

from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch

from entroray.errors import ConfigError
from entroray.observe import report, token_records
from tests.composed import configured
from tests.records import query
from tests.unit.test_observe import a_step, journal


def test_columns_that_may_have_16_bits_get_them_and_readers_read_them(tmp_path):
    groups, tokens = a_step(version=1)
    journal(tmp_path, tokens_every=1, tokens_half=["entropy", "logprob_old"]).step(1, {}, groups, tokens)
    file = tmp_path / "tokens" / "step-000001.parquet"
    kinds = {f.name: (str(f.type), f.metadata[b"unit"]) for f in pq.read_schema(file)}
    assert kinds["entropy"] == ("halffloat", b"nats") and kinds["varentropy"] == ("float", b"nats^2")
    (row,) = query(f"select avg(entropy::double) as h from '{file}' where mask_reason is null")
    assert row["h"] == pytest.approx((0.1 + 0.2 + 0.7 + 0.3 + 0.4 + 0.6) / 6, rel=1e-3)
    assert pq.read_table(file)["entropy"].null_count == 1
    assert report.write_report(tmp_path).is_file()


def test_the_halves_that_may_be_asked_for_are_the_measured_columns():
    with pytest.raises(ConfigError, match=r"observe\.tokens\.half=\['step'\]: choose among logprob_behavior"):
        configured("observe.tokens.half=[entropy,step]")
    assert configured("observe.tokens.half=[entropy]").observe.tokens.half == ["entropy"]


def test_every_bit_of_the_records_is_read_back(tmp_path):
    groups, tokens = a_step()
    odd = torch.tensor([0.1, -0.0, 1e-38, 3.4e38, 7.0, 1 / 3, 2.0])
    table = token_records.record_table(1, groups, replace(tokens, entropy=odd))
    token_records.write_records(tmp_path / "x.parquet", table)
    assert pq.read_table(tmp_path / "x.parquet").equals(table)
    assert str(pq.read_table(tmp_path / "x.parquet")["entropy"].to_pylist()) == str(
        table["entropy"].to_pylist()
    )
