"""The lab's arithmetic, what it keeps on disk, and what it says of it."""

import asyncio
import contextlib
import csv
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from entroray import rows
from entroray.cli import lab
from entroray.errors import ConfigError, PreflightError
from entroray.evaluation.heldout_metrics import DRAWN, heldout_metrics
from entroray.metrics.catalogue import family_metrics
from entroray.metrics.confidence_interval import bootstrap_interval, bootstrap_intervals
from entroray.objective import build_objective
from entroray.observe import comparison_page, lab_cells
from entroray.observe.comparison import (
    LEGEND,
    OLDER,
    PARTS,
    code_lines,
    compare_means,
    markdown,
    missing_lines,
)
from entroray.observe.lab_cells import Cell, moving_means, summarise_run, variant_name
from entroray.observe.svg import Line, chart, frame, ticks
from entroray.types import Draw
from entroray.wiring import run_directory
from entroray.wiring.parts import build_parts
from entroray.wiring.reused_actors import lasting
from tests.composed import configured
from tests.toy import ToyPrompts, ToyWorld

HIGH, LOW = (0.70, 0.72, 0.74), (0.50, 0.52, 0.54)


def test_an_interval_of_three_values_is_their_range() -> None:
    """Of 27 equally likely draws the lowest mean is 1 in 27, more than the 2.5 % that are cut off."""
    assert bootstrap_interval((0.1, 0.2, 0.6)) == (pytest.approx(0.1), pytest.approx(0.6))


def test_an_interval_is_the_quantiles_of_all_possible_draws() -> None:
    values = (1.0, 2.0, 4.0, 8.0, 16.0)
    means = [np.mean(drawn) for drawn in itertools.product(values, repeat=5)]
    low, high = np.quantile(means, [0.1, 0.9])
    assert bootstrap_interval(values, level=0.8) == (
        pytest.approx(low, abs=0.5),
        pytest.approx(high, abs=0.5),
    )
    assert bootstrap_interval(values) == bootstrap_interval(values)


@pytest.mark.parametrize(("seeds", "held"), [(3, 75), (5, 84), (10, 90)])
def test_the_legend_says_how_often_such_an_interval_holds_the_mean(seeds: int, held: int) -> None:
    found = bootstrap_intervals(np.random.default_rng(seeds).normal(size=(seeds, 4000)), draws=600)
    covered = float(np.mean((found[:, 0] <= 0) & (found[:, 1] >= 0)))
    assert covered == pytest.approx(held / 100, abs=0.02)
    assert f"{held} times in 100 with 3 seeds" in LEGEND or f"{held} with {seeds}" in LEGEND
    assert LEGEND in markdown(CELLS, "grpo")


@pytest.mark.parametrize(
    ("values", "baseline", "sign"),
    [
        (HIGH, LOW, "+"),
        (LOW, HIGH, "-"),
        (HIGH, HIGH, "="),
        ((0.53, 0.6, 0.7), LOW, "="),
        (HIGH[:2], LOW, "?"),
        (HIGH, LOW[:2], "?"),
        ((), LOW, "?"),
    ],
)
def test_overlap_is_a_tie_and_two_seeds_claim_nothing(
    values: tuple[float, ...], baseline: tuple[float, ...], sign: str
) -> None:
    assert compare_means(values, baseline) == sign


def cell(objective: str, seed: int, *more: str, status: str = "done", greedy: float = 0.5) -> Cell:
    told = ("experiment=quickstart", f"objective={objective}", f"seed={seed}", "run.steps=3", *more)
    measured = {"after/greedy": greedy, "before/greedy": 0.25, "after/pass@8": 0.9, "after/pass@1": 0.4}
    return Cell(told, seed, "hash", status, code="0.1.0", measured=measured if status == "done" else {})


CELLS = [
    *(cell("grpo", seed, greedy=value) for seed, value in enumerate(LOW, start=1)),
    *(cell("dapo", seed, greedy=value) for seed, value in enumerate(HIGH, start=1)),
    cell("grpo", 1, "learner.updates_per_rollout=1"),
    cell("cispo", 1),
    cell("cispo", 2, status="missing"),
    replace(cell("cispo", 3, status="failed"), reason="NumericsError: loss is nan"),
]


def test_a_variant_is_named_by_what_sets_it_apart() -> None:
    names = [variant_name(c, CELLS) for c in CELLS]
    assert names[0] == "grpo" and names[6] == "grpo learner.updates_per_rollout=1"


def test_the_table_says_what_is_above_missing_failed_and_unknown() -> None:
    said = markdown(CELLS, "grpo")
    line = lambda name: next(row for row in said.splitlines() if row.startswith(f"| {name} |"))
    assert "0.720 [0.700 0.740] +" in line("dapo")
    assert "0.520 [0.500 0.540] |" in line("grpo")
    assert "| 1 of 3 |" in line("cispo") and "0.500 ?" in line("cispo")
    assert "| 0.250 |" in line("before training")
    assert "pass@8" in said and "(run.steps=3)" in said
    assert missing_lines(CELLS) == [
        "missing: quickstart, cispo, seed 2",
        "failed: quickstart, cispo, seed 3: NumericsError: loss is nan",
    ]


def test_first_weights_that_answer_differently_have_a_row_each_with_their_variants(tmp_path: Path) -> None:
    hot = [cell(row, 1, "sampler.temperature=2.0") for row in ("grpo", "dapo")]
    hot = [replace(c, measured={**c.measured, "before/greedy": 0.125}) for c in hot]
    cool = [cell(row, 1) for row in ("grpo", "dapo")]
    said = [x for x in markdown([*cool, *hot], "grpo").splitlines() if x.startswith("| before training")]
    heated = "grpo sampler.temperature=2.0, dapo sampler.temperature=2.0"
    assert said[0].startswith("| before training: grpo, dapo |  | - | 0.250 |")
    assert said[1].startswith(f"| before training: {heated} |  | - | 0.125 |")
    for each in [*cool, *hot]:
        lab_cells.save_cell(tmp_path, each)
        (lab_cells.cell_path(tmp_path, each) / "metrics.jsonl").write_text("")
    page = comparison_page.write_lab_page(tmp_path, [*cool, *hot], "grpo").read_text()
    assert page.count('<tr class="quiet">') == 2


def test_what_an_evaluation_draws_at_is_said_to_be_the_configured_temperature() -> None:
    sampled = [m for m in family_metrics("heldout") if m.temperature != "0"]
    assert sampled and all("configured" in m.temperature for m in sampled)
    by_key = {c.key: c.meaning for c in itertools.chain(*PARTS.values())}
    assert "configured temperature" in by_key["after/pass@1"] and "pass@1" in by_key["after/entropy/mean"]


def test_a_mean_over_fewer_seeds_than_are_done_says_of_how_many() -> None:
    lacking = [replace(CELLS[0], measured={"after/pass@1": 0.4}), *CELLS[1:]]
    said = next(row for row in markdown(lacking, "dapo").splitlines() if row.startswith("| grpo |"))
    assert "| 3 |" in said and "| 0.530 n=2 ? |" in said and "0.400 [0.400 0.400] = |" in said


def test_cells_of_two_versions_of_the_code_are_told_under_the_tables(tmp_path: Path) -> None:
    assert code_lines(CELLS) == [] and code_lines([replace(c, code="1950491") for c in CELLS]) == []
    mixed = [replace(CELLS[0], code="1950491"), replace(CELLS[1], code="f783b7f-dirty"), *CELLS[2:]]
    told = "more than one version of the code: 6 of 0.1.0, 1 of 1950491, 1 of f783b7f-dirty (done cells)"
    assert code_lines(mixed) == [told] and f"- {told}" in markdown(mixed, "grpo")
    for each in mixed:
        lab_cells.save_cell(tmp_path, each)
        (lab_cells.cell_path(tmp_path, each) / "metrics.jsonl").write_text(
            '{"step": 1, "correct/mean": 0.5}\n'
        )
    assert told in comparison_page.write_lab_page(tmp_path, mixed, "grpo").read_text()
    assert run_directory.code_version()


def test_cells_outlive_the_process_and_fill_one_csv(tmp_path: Path) -> None:
    for each in CELLS:
        lab_cells.save_cell(tmp_path, each)
    known = lab_cells.load_cells(tmp_path)
    assert {c.name for c in known} == {c.name for c in CELLS} and set(known[0].measured) >= {"after/greedy"}
    done = next(c for c in known if c.name == CELLS[0].name)
    assert done == CELLS[0] and lab._done(replace(done, code="1950491"), done), "other code does not redo it"
    rows = list(csv.DictReader(lab_cells.write_cells_csv(tmp_path, CELLS).open()))
    assert len(rows) == len(CELLS)
    assert [r["after/greedy"] for r in rows][-2:] == ["", ""] and rows[6]["with"].startswith("learner.upd")


@pytest.mark.parametrize("harm", ["empty", "zeros", "cut", "list", "other", "folder"])
def test_a_cell_whose_file_is_damaged_counts_as_never_run(
    tmp_path: Path, harm: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for each in CELLS[:2]:
        lab_cells.save_cell(tmp_path, each)
    file = lab_cells.cell_path(tmp_path, CELLS[0]) / "cell.json"
    texts = {"empty": b"", "zeros": bytes(90), "cut": file.read_bytes()[:40], "list": b"[1]", "other": b"{}"}
    file.unlink()
    file.mkdir() if harm == "folder" else file.write_bytes(texts[harm])
    assert [c.name for c in lab_cells.load_cells(tmp_path)] == [CELLS[1].name]
    lab.main([f"--dir={tmp_path}"])
    assert str(file) in capsys.readouterr().out


def test_a_lab_where_a_file_is_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lab").touch()
    with pytest.raises(PreflightError, match=r"--dir=/.*/lab"):
        lab.main([f"--dir={tmp_path}/lab"])


def test_a_run_in_numbers() -> None:
    metrics = [{"step": s, "correct/mean": s / 10, "tokens/per_second": float(s)} for s in range(1, 8)]
    found = summarise_run(metrics)
    assert found["correct/first"] == pytest.approx(0.3) and found["correct/final"] == pytest.approx(0.5)
    assert found["correct/best"] == pytest.approx(0.5) and found["tokens/per_second"] == 4.0
    assert "entropy/first" not in found
    assert moving_means([1.0, 2.0, 3.0], 2) == [1.5, 2.5] and moving_means([1.0, 3.0], 5) == [2.0]


def test_every_combination_is_planned_seeds_first_on_a_machine(tmp_path: Path) -> None:
    swept = ["seed=1,2", "experiment=quickstart,countdown", "objective=dapo", "run.steps=3"]
    jobs = lab.plan(tmp_path, swept)
    told = [(j.cell.task, j.cell.seed, j.cell.objective) for j in jobs]
    assert told == [(task, seed, "dapo") for task in ("quickstart", "countdown") for seed in (1, 2)]
    assert len({j.cell.name for j in jobs}) == 4
    assert jobs[0].config.run.dir == str(tmp_path / "cells" / jobs[0].cell.name)


def test_a_lab_keeps_runs_for_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.dir, run\.resume .*checkpoint\.every"):
        lab.plan(tmp_path, ["experiment=quickstart", "run.dir=mine"])
    with pytest.raises(ConfigError, match=r" cluster .*cluster\.address"):
        lab.plan(tmp_path, ["experiment=quickstart", "cluster=cpu,gpu"])
    with pytest.raises(ConfigError, match=r"^lab .*--dri mine: .*--dir FOLDER, --baseline"):
        lab.main(["--dri=mine", "experiment=quickstart"])


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("seed=3", True),
        ("objective=dapo", True),
        ("learner.lr=0.1", True),
        ("driver.max_lag=1", False),
        ("rollout.group_size=4", True),
        ("run.steps=3", True),
        ("rollout.max_tokens=16", False),
        ("learner.ranks=2", False),
        ("generator.replicas=1", False),
        ("++data.settings.seed=1", False),
        ("evaluate.prompts=8", False),
    ],
)
def test_a_machine_is_shared_where_a_reset_can_change_it(override: str, same: bool) -> None:
    configs = [configured("experiment=quickstart", *more) for more in ([], [override])]
    made = [lasting(c, build_parts(c)) for c in configs]
    assert (made[0] == made[1]) is same


def test_a_finished_cell_is_left_alone_unless_its_settings_changed(tmp_path: Path) -> None:
    asked = lab.plan(tmp_path, ["experiment=quickstart", "seed=1"])[0].cell
    assert not lab._done(asked, None) and not lab._done(asked, asked)
    assert lab._done(asked, replace(asked, status="done"))
    assert not lab._done(asked, replace(asked, status="failed"))
    assert not lab._done(asked, replace(asked, status="done", settings="others"))


def ran(monkeypatch: pytest.MonkeyPatch, folder: Path, runs: int) -> dict[int, Cell]:
    """Cells by seed after the lab's own command over mine/experiment/quick, killed in a run past `runs`."""
    begun = []

    async def measure(bench: object, job: lab.Job) -> dict[str, float]:
        begun.append(job.cell.seed)
        if len(begun) > runs:
            raise KeyboardInterrupt
        Path(str(job.config.run.dir), "metrics.jsonl").write_text("")
        return {"after/greedy": job.cell.seed / 10, "seconds/train": 0.0}

    monkeypatch.setattr(lab, "_measure", measure)
    monkeypatch.setattr(lab, "_run", lambda *given: asyncio.run(lab._work(*given)))
    asked = [f"--dir={folder}", f"--config-dir={folder / 'mine'}", "experiment=quick", "seed=1,2"]
    with contextlib.suppress(KeyboardInterrupt):
        lab.main(asked)
    return {c.seed: c for c in lab_cells.load_cells(folder)}


def test_finished_results_stay_until_their_own_run_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = tmp_path / "mine" / "experiment" / "quick.yaml"
    row.parent.mkdir(parents=True)
    row.write_text(told := (rows.conf_folder() / "experiment" / "quickstart.yaml").read_text())
    first = ran(monkeypatch, tmp_path, runs=2)
    assert [c.status for c in first.values()] == ["done", "done"]

    row.write_text(told.replace("lr: 3.0e-4", "lr: 1.0e-4"))
    killed = ran(monkeypatch, tmp_path, runs=0)
    assert killed[1].status == "missing", "its own run had begun"
    assert killed[2] == replace(first[2], reason=OLDER)
    kept = list(csv.DictReader((tmp_path / "cells.csv").open()))
    assert [r["after/greedy"] for r in kept] == ["0.1", "0.2"], "as told before that run began"
    assert f"{OLDER}: quick, default, seed 2" in (tmp_path / "lab.md").read_text()

    whole = ran(monkeypatch, tmp_path, runs=2)
    assert [(c.status, c.reason) for c in whole.values()] == [("done", "")] * 2
    assert whole[2].settings != first[2].settings and OLDER not in (tmp_path / "lab.md").read_text()


def test_settings_taken_back_make_an_older_cell_a_finished_one_again() -> None:
    done = cell("grpo", 1)
    older = lab._kept(replace(done, settings="other", status="missing"), done)
    assert older == replace(done, reason=OLDER) and lab._kept(replace(done, status="missing"), older) == done
    failed = replace(done, status="failed", reason="NumericsError: loss is nan")
    assert lab._kept(done, failed) == failed and lab._kept(done, None) == done


def test_heldout_metrics_measure_answers_without_a_training_step() -> None:
    world = ToyWorld(build_objective(rows.objective_row("grpo")))
    prompts = [next(prompt) for prompt in [ToyPrompts()] for _ in range(16)]
    found = asyncio.run(heldout_metrics(world, world, world, prompts, Draw(1.0, 2), 4))
    assert found["entropy/mean"] == pytest.approx(np.log(8), abs=1e-5)
    assert 0 <= found["greedy"] <= 1 and found["pass@1"] <= found["pass@4"]
    assert found.keys() - {"greedy", "pass@1", "pass@2", "pass@4"} <= set(DRAWN)
    assert {"distinct/2", "calibration/ece_logprob", "varentropy/mean"} <= found.keys()


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0, 0.183, [0, 0.05, 0.1, 0.15]),
        (1, 60, [10, 20, 30, 40, 50, 60]),
        (1, 3, [1, 1.5, 2, 2.5, 3]),
    ],
)
def test_ticks_are_round_and_within(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_a_chart_stays_in_its_frame() -> None:
    line = Line([1, 2, 3], [0.0, 1.0, 0.5], "c0", "a <b>")
    drawn = chart([line], frame([line]), label="curve", width=100, height=60)
    assert "a &lt;b&gt;" in drawn and 'points="46.0,36.0 68.0,8.0 90.0,22.0"' in drawn


def test_the_page_is_one_file_that_asks_nobody(tmp_path: Path) -> None:
    for each in CELLS:
        lab_cells.save_cell(tmp_path, each)
        rows = [f'{{"step": {s}, "correct/mean": 0.{s}, "entropy/mean": 0.2}}\n' for s in (1, 2)]
        (lab_cells.cell_path(tmp_path, each) / "metrics.jsonl").write_text("".join(rows))
    page = comparison_page.write_lab_page(tmp_path, CELLS, "grpo").read_text()
    assert "prefers-color-scheme:dark" in page and "default-src 'none'" in page and "src=" not in page
    bands = json.loads(page.split('id="data">')[1].split("</script>")[0])["bands"]
    assert bands[0][0] == {"name": "grpo", "runs": [0, 1, 2]} and bands[0][3]["name"] == "cispo"
    assert [b["runs"] for b in bands[0][1:]] == [[3, 4, 5], [6], [7]]
    assert "missing: quickstart, cispo, seed 2" in page and '<b class="above">+</b>' in page
