"""What counts as a checkpoint on disk, and which one a run goes on from."""

import asyncio
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from entroray.config import Config, Run
from entroray.errors import InfrastructureError, PreflightError
from entroray.wiring import run_directory
from entroray.workers import checkpoint
from entroray.workers.checkpoint import MARKER, Checkpoints, commit, committed, expired, newest


def opened(run, tree):
    """The folder of a run as `entroray train` opens it."""
    return run_directory.resume_run(run, tree) or run_directory.new_run(run)


def written(folder: Path, step: int, accuracy: float | None = None, **state: object) -> Path:
    partial = folder / f".step-{step:06d}.part"
    (partial / "learner").mkdir(parents=True)
    (partial / "learner" / "weights.pt").write_bytes(bytes([step % 256] * 100))
    (partial / "driver.json").write_text(json.dumps({"version": step, "accuracy": accuracy, **state}))
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
    (first / MARKER).unlink()
    found, why = newest(tmp_path)
    assert found is None and len(why) == 2 and all(MARKER in sentence for sentence in why)


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


@pytest.mark.parametrize("harm", ["gone", "empty", "zeros", "cut", "folder", "dangling", "{}", "[]", "bytes"])
@pytest.mark.parametrize("name", ["manifest.json", "driver.json", "learner/weights.pt"])
def test_whatever_became_of_a_file_the_one_before_is_taken(tmp_path: Path, name: str, harm: str) -> None:
    first, second = written(tmp_path, 1, 0.5), written(tmp_path, 2)
    file = second / name
    whole = file.read_bytes()
    file.unlink()
    harms = {"empty": b"", "zeros": b"\0" * len(whole), "cut": whole[:-9], "bytes": b"\xff\xfe"}
    if harm == "folder":
        file.mkdir()
    elif harm == "dangling":
        file.symlink_to("nowhere")
    elif harm != "gone":
        file.write_bytes(harms.get(harm, harm.encode()))
    found, why = newest(tmp_path)
    assert found == first and len(why) == 1 and "step-000002" in why[0]
    assert expired([second, first], keep=1) == [second], "the best is kept, a damaged one is not the best"


def test_a_link_to_the_file_that_was_written_is_that_file(tmp_path: Path) -> None:
    done = written(tmp_path, 1)
    (done / "learner" / "weights.pt").rename(tmp_path / "elsewhere")
    (done / "learner" / "weights.pt").symlink_to(tmp_path / "elsewhere")
    assert newest(tmp_path) == (done, [])


def test_a_checkpoint_by_another_name_is_named_and_never_deleted(tmp_path: Path) -> None:
    written(tmp_path, 9).rename(tmp_path / "step-best")
    found, why = newest(tmp_path)
    assert found is None and len(why) == 1 and "step-best" in why[0]
    done = [written(tmp_path, step) for step in (2, 1000000)]
    assert committed(tmp_path) == done and newest(tmp_path) == (done[1], [])


def test_latest_that_is_no_link_is_left_and_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first = written(tmp_path, 1)
    (tmp_path / "latest").unlink()
    shutil.copytree(first, tmp_path / "latest")
    written(tmp_path, 2)
    assert (tmp_path / "latest" / "driver.json").is_file() and not (tmp_path / "latest").is_symlink()
    assert str(tmp_path / "latest") in capsys.readouterr().out
    assert newest(tmp_path) == (tmp_path / "step-000002", [])
    shutil.rmtree(tmp_path / "latest")
    (tmp_path / "latest").write_text("a note")
    written(tmp_path, 2)
    assert (tmp_path / "latest").read_text() == "a note"
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("gone")
    assert (tmp_path / "latest").resolve() == tmp_path / "gone"
    assert written(tmp_path, 3) == (tmp_path / "latest").resolve()


class FullDisk:
    """Ranks that write half of their part and then fail as torch does."""

    async def all(self, method: Callable[[int, object], object], *, deadline: float) -> list[object]:
        return [method(0, self)]

    @property
    def save(self) -> "FullDisk":
        return self

    def remote(self, folder: str) -> None:
        Path(folder, "half.pt").write_bytes(b"x")
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 128 vs 0")


def test_a_checkpoint_that_the_disk_refuses_is_typed_and_leaves_nothing(tmp_path: Path) -> None:
    saves = Checkpoints(tmp_path / "checkpoints", FullDisk(), keep=2, deadline=1.0)  # type: ignore[arg-type]
    with pytest.raises(InfrastructureError, match=r"step-000007 .*unexpected pos.* MiB .*checkpoint\.keep=2"):
        asyncio.run(saves.save(7, {"version": 7}))
    assert list((tmp_path / "checkpoints").iterdir()) == []


class Slow:
    """Ranks that are still writing when the deadline comes."""

    async def all(self, method: Callable[[int, object], object], *, deadline: float) -> list[object]:
        method(0, SimpleNamespace(save=SimpleNamespace(remote=lambda f: Path(f, "half").touch())))
        raise InfrastructureError(f"learner rank 0 gave no answer within {deadline} s") from TimeoutError()


def test_a_disk_that_is_too_slow_is_typed_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    done = written(tmp_path, 1)
    saves = Checkpoints(tmp_path, Slow(), keep=2, deadline=1.0, size=12)  # type: ignore[arg-type]
    said = r"step-000002 .*within 1\.0 s.* MiB needed.*driver\.call_deadline"
    with pytest.raises(InfrastructureError, match=said):
        asyncio.run(saves.save(2, {"version": 2}))
    assert newest(tmp_path) == (done, []) and not list(tmp_path.glob(".step-*"))


def test_a_save_that_was_killed_is_swept_away_by_the_next_run(tmp_path: Path) -> None:
    done = written(tmp_path, 1)
    for left in (".step-000002.part", ".step-000001.old"):
        (tmp_path / left / "learner").mkdir(parents=True)
    Checkpoints(tmp_path, Slow(), keep=2, deadline=1.0)  # type: ignore[arg-type]
    assert not list(tmp_path.glob(".step-*")) and newest(tmp_path) == (done, [])


def test_a_step_saved_again_stands_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a resumption from an older checkpoint."""
    done, seen = written(tmp_path, 1), []
    rename = Path.rename

    def noted(self: Path, target: Path) -> Path:
        seen.append((self.name, (self / MARKER).is_file(), committed(tmp_path) == [done]))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", noted)
    assert written(tmp_path, 1) == done and newest(tmp_path) == (done, [])
    assert seen == [("step-000001", True, True), (".step-000001.part", True, False)]
    assert not list(tmp_path.glob(".step-*"))


def test_a_step_saved_again_that_was_ended_between_its_two_renames_is_put_back(tmp_path: Path) -> None:
    done = written(tmp_path, 1)
    done.rename(tmp_path / ".step-000001.old")
    (tmp_path / ".step-000001.part").mkdir()
    assert newest(tmp_path) == (done, []) and not list(tmp_path.glob(".*.old"))


def test_a_checkpoint_without_a_ledger_is_refused_in_words(tmp_path: Path) -> None:
    state = {"stream": {"position": 4, "serial": 4, "in_flight": [], "kept_share": 1.0}}
    written(tmp_path / "checkpoints", 1, **state)
    with pytest.raises(PreflightError, match=r"step-000001.*no ledger.*older version"):
        opened(*settings(tmp_path, resume="auto"))


NAMES = (
    "learner/rank-0-00000.safetensors",
    "learner/rank-0-00001.safetensors",
    "learner/rank-1-00000.safetensors",
    "learner/rank-12-00000.safetensors",
    "reference/model-00001-of-00002.safetensors",
    "rng-1.pt",
    "layout.json",
)
"""What ranks write, as `LearnerRank.save` names it."""


def of_ranks(partial: Path) -> None:
    """Files of thirteen ranks, each of its own content."""
    for name in NAMES:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(name.encode())


def test_every_file_is_hashed_by_the_one_rank_that_wrote_it(tmp_path: Path) -> None:
    of_ranks(tmp_path)
    own = [checkpoint.seal(tmp_path, checkpoint.written_by(rank, tmp_path)) for rank in range(13)]
    assert [sorted(part) for part in own] == [
        sorted([NAMES[0], NAMES[1], NAMES[4], NAMES[6]]),
        sorted([NAMES[2], NAMES[5]]),
        *[[]] * 10,
        [NAMES[3]],
    ]


class Ranks:
    """Thirteen ranks that write their files, seal them and say so."""

    async def all(self, method: Callable[[int, object], object], *, deadline: float) -> list[object]:
        return [method(rank, SimpleNamespace(save=self.saver(rank))) for rank in range(13)]

    @staticmethod
    def saver(rank: int) -> SimpleNamespace:
        def remote(folder: str) -> dict[str, list]:
            if rank == 0:
                of_ranks(Path(folder))
            return checkpoint.seal(Path(folder), checkpoint.written_by(rank, Path(folder)))

        return SimpleNamespace(remote=remote)


def test_the_driver_hashes_its_own_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[tuple[str, str]] = []
    whole = checkpoint._fingerprint

    def noted(file: Path) -> list:
        hashed.append((threading.current_thread().name, file.name))
        return whole(file)

    monkeypatch.setattr(checkpoint, "_fingerprint", noted)
    saves = Checkpoints(tmp_path, Ranks(), keep=2, deadline=9.0)  # type: ignore[arg-type]
    done = asyncio.run(saves.save(7, {"version": 7}))
    elsewhere = [name for thread, name in hashed if thread != "MainThread"]
    assert elsewhere == ["driver.json"] and len(hashed) == len(NAMES) + 1
    assert newest(tmp_path) == (done, [])


@pytest.mark.parametrize("harm", ["gone", "cut"])
def test_a_file_that_the_driver_does_not_see_as_a_rank_wrote_it_is_said(tmp_path: Path, harm: str) -> None:
    of_ranks(partial := tmp_path / ".part")
    listed = {name: [len(name), "0" * 32] for name in NAMES}
    (partial / NAMES[2]).unlink() if harm == "gone" else (partial / NAMES[2]).write_bytes(b"")
    with pytest.raises(InfrastructureError, match=rf"{NAMES[2]} .*run\.dir"):
        commit(partial, tmp_path / "step-000001", listed)


def test_of_a_large_checkpoint_sizes_are_compared_and_its_ranks_hash_what_they_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = written(tmp_path, 1), tmp_path / "step-000002"
    of_ranks(partial := tmp_path / ".part")
    (partial / "driver.json").write_text('{"version": 2}')
    commit(partial, second)
    other = second / NAMES[2]
    other.write_bytes(b"x" * len(other.read_bytes()))
    assert newest(tmp_path)[0] == first, "a small one is hashed"
    monkeypatch.setattr(checkpoint, "HASHED_BYTES", 10)
    assert newest(tmp_path) == (second, [])
    for ranks in (13, 1, 2):  # any number of ranks reads it, and hashes all of it
        wrong = [found for rank in range(ranks) if (found := checkpoint.damage(second, rank, ranks))]
        assert len(wrong) == 1 and NAMES[2] in wrong[0]
    other.write_bytes(b"x")
    found, why = newest(tmp_path)
    assert found == first and NAMES[2] in why[0]


def settings(folder: Path, **run: object) -> tuple[Run, object]:
    config = Config()
    config.run.dir, config.run.steps = str(folder), 5
    for name, value in run.items():
        setattr(config.run, name, value)
    return config.run, OmegaConf.structured(config)


def test_a_folder_that_holds_a_run_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(PreflightError, match=r"run\.dir=.*run\.resume=auto"):
        opened(*settings(tmp_path))


def test_resume_goes_on_from_the_newest_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    found = written(tmp_path / "checkpoints", 3)
    assert opened(*settings(tmp_path, resume="auto")).resume == (found, 3)


def test_resume_of_a_run_with_more_steps_than_asked_for_says_so(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    written(tmp_path / "checkpoints", 6)
    with pytest.raises(PreflightError, match=r"run\.steps=5"):
        opened(*settings(tmp_path, resume="auto"))


def test_resume_without_a_checkpoint_starts_over(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert opened(*settings(tmp_path, resume="auto")).resume is None
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
    assert opened(run, tree).folder.name == "1"  # type: ignore[arg-type]
