"""What a part of tests/gpu records: verdicts, what is kept between calls, what is never written."""

import json
import sys
from pathlib import Path

import pytest

from tests.gpu import record
from tests.gpu.record import at_most, holds, measured, there


def proven(monkeypatch, tmp_path: Path, steps, *words: str) -> tuple[int, dict]:
    """Exit code of a dry part with these steps, and its JSON."""
    monkeypatch.setattr(sys, "argv", ["part_x", "--dry", "--results", str(tmp_path), *words])
    with pytest.raises(SystemExit) as ended:
        record.main("x", "a part of a test", steps)
    return ended.value.code, json.loads((tmp_path / "x-no-card.json").read_text())


def verdicts(found: dict) -> dict[str, list[str]]:
    return {name: [c["verdict"] for c in step["checks"]] for name, step in found["steps"].items()}


def test_a_number_above_its_limit_or_none_at_all_is_wrong(monkeypatch, tmp_path):
    steps = {
        "fine": lambda asked: [at_most("a", 1.0, x=1.0), measured("b", y=2)],
        "above": lambda asked: [at_most("c", 1.0, x=0.5, z=1.1)],
        "none": lambda asked: [at_most("d", 1.0, x=float("nan"))],
    }
    code, found = proven(monkeypatch, tmp_path, steps)
    assert code == 1
    assert verdicts(found) == {"fine": ["right", "measured"], "above": ["WRONG"], "none": ["WRONG"]}


def test_a_step_that_breaks_keeps_what_it_found_and_the_next_one_runs(monkeypatch, tmp_path):
    def breaks(asked):
        yield holds("first", True, "so")
        raise RuntimeError("illegal memory access")

    code, found = proven(
        monkeypatch, tmp_path, {"breaks": breaks, "next": lambda asked: [measured("n", x=1)]}
    )
    assert code == 1 and verdicts(found) == {"breaks": ["right", "BROKE"], "next": ["measured"]}
    assert "illegal memory access" in found["steps"]["breaks"]["checks"][1]["why"]


def test_a_step_that_broke_is_run_again_by_a_later_call(monkeypatch, tmp_path):
    ran = []

    def breaks_once(asked):
        ran.append(1)
        if len(ran) == 1:
            raise RuntimeError("illegal memory access")
        yield measured("n", x=1)

    assert proven(monkeypatch, tmp_path, {"one": breaks_once})[0] == 1
    code, found = proven(monkeypatch, tmp_path, {"one": breaks_once})
    assert code == 0 and verdicts(found) == {"one": ["measured"]}


def test_what_was_not_there_is_looked_for_again_by_a_later_call(monkeypatch, tmp_path):
    proven(monkeypatch, tmp_path, {"one": lambda asked: [measured("n", x=there("no_such_package"))]})
    code, found = proven(monkeypatch, tmp_path, {"one": lambda asked: [measured("n", x=1)]})
    assert code == 0 and verdicts(found) == {"one": ["measured"]}


@pytest.mark.parametrize("missing", [("entroray.no_such_module",), ("entroray.policy.head", "no_such_name")])
def test_what_this_checkout_has_not_is_said_and_is_no_failure(monkeypatch, tmp_path, missing):
    code, found = proven(monkeypatch, tmp_path, {"one": lambda asked: [measured("n", x=there(*missing))]})
    assert code == 0 and verdicts(found) == {"one": ["not there"]}
    assert missing[-1].split(".")[-1] in found["steps"]["one"]["checks"][0]["why"]


def test_a_later_call_runs_only_what_is_missing_unless_the_source_changed_or_it_is_asked_anew(
    monkeypatch, tmp_path
):
    ran = []
    step = lambda name: lambda asked: ran.append(name) or [measured(name, x=1)]
    steps = {name: step(name) for name in ("one", "two")}
    proven(monkeypatch, tmp_path, steps, "--only", "one")
    assert ran == ["one"]
    proven(monkeypatch, tmp_path, steps)
    proven(monkeypatch, tmp_path, steps)
    assert ran == ["one", "two"]
    proven(monkeypatch, tmp_path, steps, "--again")
    assert ran == ["one", "two"] * 2
    monkeypatch.setattr(record, "source_hash", lambda: "another")
    _, found = proven(monkeypatch, tmp_path, steps)
    assert ran == ["one", "two"] * 3 and found["source"] == "another"


def test_the_json_names_card_versions_commit_and_seed(monkeypatch, tmp_path):
    _, found = proven(monkeypatch, tmp_path, {"one": lambda asked: [measured("n", x=1)]})
    keys = ("card", "driver", "torch", "cuda", "triton", "commit", "source", "seed", "planned", "date")
    assert all(key in found for key in keys) and found["dry"] and found["card"] == "no card"


def test_a_dry_run_never_writes_into_the_results(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["part_x", "--dry"])
    with pytest.raises(SystemExit) as ended:
        record.main("x", "a part of a test", {"one": lambda asked: [measured("n", x=1)]})
    assert ended.value.code == 2 and not [*tmp_path.iterdir()]
