"""The ledger of real runs: samples that fail, replays, a miscount, and the run that goes on from it."""

from pathlib import Path
from typing import Any

import pytest

from entroray.errors import LedgerError
from entroray.rollout.branch_points import Attempt
from entroray.rollout.ledger import Ledger
from tests.ray.processes import kinds
from tests.ray.stack import Stack, entroray, lines, metrics
from tests.ray.test_chosen_rows import QUICK

JUDGE = """
def judge(response, prompt):
    if len(response) % 5 == 0 and len(response) > 4 and "word" not in response:  # nor the trial at the start
        raise ValueError("a length that it cannot judge")
    return float(len(response) % 7 == 0)
"""


@pytest.fixture(scope="module")
def settings(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a run of the random model, whose judge fails by what it reads, evaluated after each step."""
    file = tmp_path_factory.mktemp("judge") / "judge.py"
    file.write_text(JUDGE)
    judged = [f"reward.path={file}:judge", "reward.max_failed=1", "driver.refill_limit=20"]
    evaluated = ["evaluate.every=1", "evaluate.prompts=4", "evaluate.samples=2", "evaluate.final=false"]
    quick = ["observe.report=false", "objective.keep.fn=always", f"model.path={stack.model}"]
    return [*QUICK, *judged, *evaluated, *quick]


def ledgers(folder: Path) -> list[dict[str, Any]]:
    """What each process of a run said as it ended."""
    return [e["fields"] for e in lines(folder / "events.jsonl") if e["kind"] == "ledger"]


def test_a_run_whose_samples_fail_and_whose_successes_come_again_balances(
    stack: Stack, settings: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    chosen = ["rollout=hotter_again", "rollout.replay.tokens=4096", "run.steps=3"]
    stack.wait(stack.drive(folder, *settings, *chosen))
    (ledger,) = ledgers(folder)
    ended, last = ledger["lines"], metrics(folder)[-1]
    assert "resample" in kinds(folder) and ended["drawn_anew"]["samples"] > 0, "the witness: some failed"
    assert ended["second_draw"]["samples"] > 0 and ledger["step"] == 3
    assert ended["evaluation"]["samples"] == 4 * 4 * 3, "before the first step, and after each of three"
    whole = [n for name, n in ended.items() if name.startswith(("trained", "pending", "dropped"))]
    for unit, issued in ended["issued"].items():
        assert issued == sum(each[unit] for each in whole) > 0
    assert ended["trained"]["groups"] == 3 * 6 == last["groups/trained"]
    assert last["tokens/evaluated"] < ended["evaluation"]["tokens"], (
        "the last step's comes behind its metrics"
    )


@pytest.mark.slow
def test_a_miscount_ends_the_run_with_1_behind_a_checkpoint_from_which_it_goes_on(
    stack: Stack, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, count = tmp_path / "run", Ledger.receive

    def forget_one(self: Ledger, serial: int, found: Attempt, line: str = "") -> None:
        count(self, serial, found._replace(kept=found.kept[serial == 8 :]), line)

    settings = [*settings, "run.steps=3", "checkpoint.every=0"]
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "receive", forget_one)
        with pytest.raises(LedgerError, match=r"after step 2, .*step-000002.*\nledger     issued: ") as error:
            stack.wait(stack.drive(folder, *settings))
    assert error.value.exit_code == 1 and len(metrics(folder)) == 2
    assert (folder / "checkpoints" / "step-000002" / "COMMITTED").exists()
    printed = entroray("train", *settings, "run.resume=auto", f"run.dir={folder}")
    assert "going on after step 2" in printed and "ledger     dropped: " in printed
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3]
    assert [each["step"] for each in ledgers(folder)] == [2, 3]
    assert ledgers(folder)[1]["lines"]["trained"]["groups"] == 3 * 6
