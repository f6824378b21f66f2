"""How the token records lie on the disk."""

import asyncio
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch

from entroray.errors import ConfigError
from entroray.observe import report, token_records
from entroray.types import Draw
from entroray.workers.roles import GeneratorRole
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


def test_rollout_records_lie_beside_the_token_records_and_are_cut_with_them(tmp_path):
    groups, tokens = a_step(version=1)
    book = journal(tmp_path, tokens_every=1)
    for step in (1, 2):
        book.step(step, {}, groups, tokens)
    rows = pq.read_table(tmp_path / "rollouts" / "step-000001.parquet").to_pylist()
    assert [(r["group"], r["rollout"], r["siblings"]) for r in rows] == [
        *((0, 0, [1]), (0, 1, [0])),
        *((1, 2, [3]), (1, 3, [2])),
    ]
    assert [(r["status"], r["length"], r["correct"]) for r in rows][:2] == [
        ("ok", 3, True),
        ("truncated", 1, False),
    ]
    assert rows[0]["parts"] == '{"form": 0.5, "odd": null}' and rows[1]["parts"] is None
    assert (rows[0]["version_first"], rows[0]["seed"]) == (1, None)
    book.cut(1)
    assert [f.name for f in token_records.files(tmp_path, "rollouts")] == ["step-000001.parquet"]
    journal(tmp_path / "off", tokens_every=0).step(1, {}, groups, tokens)
    assert not (tmp_path / "off" / "rollouts").exists() and not (tmp_path / "off" / "tokens").exists()


def test_a_role_says_with_which_seed_each_rollout_was_drawn():
    groups, _ = a_step()

    class Engine:
        async def sample(self, request):
            return list(groups[0].rollouts)

    drawn = asyncio.run(GeneratorRole(Engine(), 1.0).sample(groups[0].prompt, [5, 7], Draw(1.0, 3)))
    assert [r.seed for r in drawn] == [5, 7]
