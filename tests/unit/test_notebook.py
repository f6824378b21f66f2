"""docs/notebooks: every cell is run, in order and in one namespace, on a run of the toy world."""

import ast
import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entroray.objective import build_objective
from entroray.observe.journal import Journal
from entroray.observe.token_records import record_path
from entroray.rows import objective_row
from tests.toy import ToyWorld, driver

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "run.ipynb"


def run_cells(notebook: Path) -> tuple[dict[str, Any], list[Any]]:
    """What its cells define, and what the last line of each is, as Jupyter shows it."""
    defined, shown = dict[str, Any](), []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        lines = ast.parse("".join(cell["source"]))
        last = lines.body.pop() if isinstance(lines.body[-1], ast.Expr) else None
        exec(compile(lines, str(notebook), "exec"), defined)
        shown.append(last and eval(compile(ast.Expression(last.value), str(notebook), "eval"), defined))
    return defined, shown


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three steps of the true driver, tokens of each recorded by the true journal."""
    vocabulary = {token: text for token, text in enumerate("0<&\n4567")}
    book = Journal(tmp_path, tokens_every=1, vocabulary=vocabulary)

    class Kept(ToyWorld):
        def step(self, step: int, metrics: Any, groups: Any, tokens: Any) -> None:
            book.step(step, metrics, groups, tokens)

    asyncio.run(driver(Kept(build_objective(objective_row("grpo")), lr=0.5), groups_per_step=4).train(3))
    book.close()
    monkeypatch.setenv("RUN", str(tmp_path))
    return tmp_path


def test_the_notebook_derives_both_curves_and_draws_a_response(run: Path) -> None:
    defined, shown = run_cells(NOTEBOOK)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert defined["mean"] == [line["entropy/mean"] for line in lines] and len(set(defined["mean"])) == 3
    assert defined["fork"] == [line["entropy/p80"] for line in lines]
    curves, response = [each._repr_html_() for each in shown if each is not None]
    assert curves.count("<circle") == 6 and "share in forks" in curves
    assert response.count('title="') == 2 and "nats, probability 0." in response
    assert "<&" not in response.replace("&lt;", "").replace("&amp;", "")


def test_the_notebook_fails_where_a_record_is_not_what_was_measured(run: Path) -> None:
    file = record_path(run, 2)
    table = pq.read_table(file)
    entropy = table["entropy"].to_numpy().copy()
    entropy[0] = np.nextafter(entropy[0], np.float32(9))
    place = table.schema.get_field_index("entropy")
    pq.write_table(table.set_column(place, "entropy", pa.array(entropy)), file)
    with pytest.raises(AssertionError):
        run_cells(NOTEBOOK)


def test_the_notebook_is_one_that_jupyter_opens() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) > 6
    for cell in notebook["cells"]:
        code = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert cell.keys() == {"cell_type", "id", "metadata", "source"} | code
