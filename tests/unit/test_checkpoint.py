"""What counts as a checkpoint on disk, and which one a run goes on from."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from entroray.config import Config, Run
from entroray.errors import PreflightError
from entroray.wiring import run_directory
from entroray.workers.checkpoint import MARKER, commit, committed, expired, newest


def written(folder: Path, step: int, accuracy: float | None = None) -> Path:
    partial = folder / f".step-{step:06d}.part"
    (partial / "learner").mkdir(parents=True)
    (partial / "learner" / "weights.pt").write_bytes(bytes([step] * 100))
    (partial / "driver.json").write_text(json.dumps({"version": step, "accuracy": accuracy}))
    return commit(partial, folder / f"step-{step:06d}")


def test_the_newest_committed_one_is_found(tmp_path: Path) -> None:
    done = [written(tmp_path, step) for step in (2, 10)]
    (tmp_path / ".step-000012.part").mkdir()
    assert committed(tmp_path) == done and newest(tmp_path) == (done[1], [])
    assert (tmp_path / "latest").resolve() == done[1]


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    done = [written(tmp_path, step, accuracy) for step, accuracy in ((1, 0.2), (2, 0.9), (3, None), (4, 0.5))]
    assert expired(done, keep=1) == [done[0], done[2]]
    assert expired(done[2:3], keep=1) == []


def test_without_its_marker_it_is_none(tmp_path: Path) -> None:
    first, second = written(tmp_path, 1), written(tmp_path, 2)
    (second / MARKER).unlink()
    assert newest(tmp_path) == (first, [])


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_one_is_passed_over_with_its_reason(tmp_path: Path, damage: str) -> None:
    first, second = written(tmp_path, 1), written(tmp_path, 2)
    weights = second / "learner" / "weights.pt"
    if damage == "gone":
        weights.unlink()
    else:
        weights.write_bytes(bytes([3] * (50 if damage == "cut" else 100)))
    found, why = newest(tmp_path)
    assert found == first
    assert len(why) == 1 and "step-000002" in why[0] and "weights.pt" in why[0]


def settings(folder: Path, **run: object) -> tuple[Run, object]:
    config = Config()
    config.run.dir, config.run.steps = str(folder), 5
    for name, value in run.items():
        setattr(config.run, name, value)
    return config.run, OmegaConf.structured(config)


def test_a_folder_that_holds_a_run_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(PreflightError, match=r"run\.dir=.*run\.resume=auto"):
        run_directory.open_run(*settings(tmp_path))


def test_resume_goes_on_from_the_newest_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    found = written(tmp_path / "checkpoints", 3)
    assert run_directory.open_run(*settings(tmp_path, resume="auto")).resume == (found, 3)


def test_resume_of_a_finished_run_says_so(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    written(tmp_path / "checkpoints", 5)
    with pytest.raises(PreflightError, match=r"run\.steps=5"):
        run_directory.open_run(*settings(tmp_path, resume="auto"))


def test_resume_without_a_checkpoint_starts_over(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert run_directory.open_run(*settings(tmp_path, resume="auto")).resume is None
    assert "starting it over" in capsys.readouterr().out


def test_without_a_folder_the_newest_unfinished_run_of_the_same_settings_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run, tree = settings(tmp_path, dir=None, resume="auto")
    for name, steps, finished in (("1", 5, False), ("2", 5, True), ("3", 9, False)):
        folder = tmp_path / "runs" / "train" / name
        (folder / ("model" if finished else "tokens")).mkdir(parents=True)
        (folder / "metrics.jsonl").touch()
        written(folder / "checkpoints", 2)
        _, other = settings(tmp_path, dir="elsewhere", steps=steps)
        OmegaConf.save(other, folder / "config.yaml")
    assert run_directory.open_run(run, tree).folder.name == "1"  # type: ignore[arg-type]
