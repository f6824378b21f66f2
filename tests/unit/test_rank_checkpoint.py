"""One rank's part of a checkpoint on real files, beside a backend that is a stand-in."""

import asyncio
import errno
import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from entroray.config import LearnerConfig
from entroray.errors import InfrastructureError, LearnerLostError, PreflightError
from entroray.workers import deepspeed_backend, rank_checkpoint
from entroray.workers.checkpoint import Checkpoints, newest

NOTHING: Callable[[], None] = lambda: None


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """A group of this process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Backend:
    """Weights and moments by name, each made whole on demand; it counts those that are alive meanwhile."""

    def __init__(self, *shapes: tuple[int, ...], optimizer: str = "AdamW"):
        self.trained = {f"layer{i}": SimpleNamespace(shape=shape) for i, shape in enumerate(shapes)}
        self.optimizer, self.made, self.most, self.restored = optimizer, [], 0, {}

    @staticmethod
    def full_shape(parameter: Any) -> tuple[int, ...]:
        return parameter.shape

    def state_of(self, parameter: Any) -> dict[str, Callable[[], torch.Tensor]]:
        def whole() -> torch.Tensor:
            self.most = max(self.most, sum(each() is not None for each in self.made))
            self.made.append(weakref.ref(tensor := torch.full(parameter.shape, float(len(self.made)))))
            return tensor

        return {"weight": whole, "exp_avg": whole, "step": lambda: torch.tensor(7.0, dtype=torch.float64)}

    def schedule(self) -> dict[str, Any]:
        return {"last_epoch": 7}

    def restore(self, kinds: Any, tensors: Any, schedule: Any) -> None:
        self.restored = {f"{kind}/{name}": value.clone() for name, kind, value in tensors}
        self.kinds, self.at = kinds, schedule["last_epoch"]


def save(folder: Path, backend: Backend, rank: int = 0) -> dict[str, Any]:
    return rank_checkpoint.save_part(folder, rank, LearnerConfig(), backend, NOTHING)


def test_a_parameter_of_one_number_is_no_number_of_the_optimizers(tmp_path: Path) -> None:
    save(tmp_path, backend := Backend((), (2,)))
    rank_checkpoint.load_part(tmp_path, 0, 1, backend)
    assert backend.kinds == {name: ["exp_avg", "weight"] for name in ("layer0", "layer1")}


def at_stage_0(scale: float) -> Any:
    """The true backend, without DeepSpeed's engine, after some updates of a number and a vector."""
    weights = {"scale": torch.nn.Parameter(torch.tensor(scale)), "bias": torch.nn.Parameter(torch.ones(2))}
    moments = lambda p: {"step": int(4 * scale), "exp_avg": p.detach() * 2, "exp_avg_sq": p.detach() * 3}
    inner = SimpleNamespace(state={p: moments(p) for p in weights.values()}, param_groups=[])
    made: Any = object.__new__(deepspeed_backend.DeepSpeedBackend)
    made.engine = SimpleNamespace(
        optimizer=inner,
        module=SimpleNamespace(named_parameters=weights.items),
        lr_scheduler=SimpleNamespace(state_dict=lambda: {"last_epoch": 2}, load_state_dict=lambda _: None),
    )
    made.zero_stage, made.optimizer, made.inner, made.lr = 0, "AdamW", inner, 0.1
    made.stepped, made.set_base_lr = {p: p for p in weights.values()}, lambda _: None
    return made


def test_a_weight_of_one_number_its_moments_and_its_step_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = SimpleNamespace(safe_get_full_fp32_param=None, safe_get_full_optimizer_state=None)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(utils=other))  # which takes seconds
    monkeypatch.setitem(sys.modules, "deepspeed.utils", other)
    saved, here = at_stage_0(0.5), at_stage_0(3.0)
    save(tmp_path, saved)
    rank_checkpoint.load_part(tmp_path, 0, 1, here)
    for was, now in zip(saved.trained.values(), here.trained.values(), strict=True):
        assert torch.equal(was, now)
        assert here.inner.state[now].keys() == {"step", "exp_avg", "exp_avg_sq"}
        state, of = here.inner.state[now], saved.inner.state[was]
        assert state["step"] == of["step"] == 2
        assert all(torch.equal(state[kind], of[kind]) for kind in ("exp_avg", "exp_avg_sq"))


def test_a_tensor_that_cannot_be_made_whole_is_the_loss_of_the_learner_and_nobody_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other ranks are in that call, and hear nothing of what is agreed after it."""

    class Broken(Backend):
        def state_of(self, parameter: Any) -> dict[str, Callable[[], torch.Tensor]]:
            def whole() -> torch.Tensor:
                raise torch.OutOfMemoryError("CUDA out of memory")

            return super().state_of(parameter) | {"exp_avg_sq": whole}

    agree = lambda *_: pytest.fail("the other ranks are in another call")
    monkeypatch.setattr(torch.distributed, "all_gather_object", agree)
    with pytest.raises(LearnerLostError, match=r"exp_avg_sq/layer0.*out of memory"):
        save(tmp_path, Broken((4,), (2,)))


def test_each_rank_writes_about_as_much() -> None:
    assert rank_checkpoint.divide_sizes([5, 3, 3, 1, 1], 2) == [0, 1, 1, 0, 0]
    assert rank_checkpoint.divide_sizes([2, 2], 3) == [0, 1]


def test_what_was_saved_is_what_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_checkpoint, "FILE_BYTES", 60)
    backend = Backend((4,), (2, 3), (5,))
    written = save(tmp_path, backend)
    names = [f"learner/rank-0-{i:05d}.safetensors" for i in range(3)]
    assert sorted(written) == ["layout.json", *names, "rng-0.pt"]
    rank_checkpoint.load_part(tmp_path, 0, 1, backend)
    assert {k: v.flatten()[0].item() for k, v in backend.restored.items()} == {
        **{"weight/layer0": 0.0, "exp_avg/layer0": 1.0, "weight/layer1": 2.0, "exp_avg/layer1": 3.0},
        **{"weight/layer2": 4.0, "exp_avg/layer2": 5.0},
        **{f"step/layer{i}": 7.0 for i in range(3)},
    }
    assert backend.kinds["layer1"] == ["exp_avg", "weight"] and backend.at == 7


def test_a_rank_holds_no_more_than_goes_into_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_checkpoint, "FILE_BYTES", 64)
    backend = Backend(*[(4,)] * 10)
    save(tmp_path, backend)
    assert len(backend.made) == 20 and backend.most <= 3, "of 16 bytes"


def test_a_disk_that_refuses_a_part_leaves_no_rank_waiting_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    monkeypatch.setattr(rank_checkpoint, "FILE_BYTES", 30)
    backend, also = Backend(*[(4,)] * 10), []
    with pytest.raises(RuntimeError, match=r"rank 0: OSError.*No space"):
        rank_checkpoint.save_part(tmp_path, 0, LearnerConfig(), backend, lambda: also.append(1))
    assert len(backend.made) == 20 and also == [1]


def refusal(folder: Path, backend: Backend) -> str:
    with pytest.raises(PreflightError) as raised:
        rank_checkpoint.load_part(folder, 0, 1, backend)
    assert backend.restored == {}
    return str(raised.value)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (Backend((4,), optimizer="Lion"), ["AdamW", "Lion", "learner.deepspeed", "run.dir"]),
        (Backend((4,), (2, 4)), ["1 of 2", "layer1", "[2, 3]", "[2, 4]", "model.path", "learner.lora"]),
        (Backend((4,)), ["1 of 2", "layer1", "[2, 3]", "not there"]),
        (Backend((4,), (2, 3), (5,)), ["layer2", "not there", "[5]"]),
    ],
)
def test_another_model_or_optimizer_is_refused_with_the_difference(
    tmp_path: Path, other: Backend, said: list[str]
) -> None:
    save(tmp_path, Backend((4,), (2, 3)))
    text = refusal(tmp_path, other)
    assert all(word in text for word in said), text


@pytest.mark.parametrize("layout", [None, {"learner.ranks": 1, "learner.zero_stage": 1}, []])
def test_a_checkpoint_of_an_older_version_is_refused(tmp_path: Path, layout: Any) -> None:
    if layout is not None:
        (tmp_path / "layout.json").write_text(json.dumps(layout))
    text = refusal(tmp_path, Backend((4,)))
    assert "layout.json" in text and "run.dir" in text


def test_a_rank_that_was_not_there_draws_from_seed_update_and_rank(tmp_path: Path) -> None:
    save(tmp_path, backend := Backend((4,)))
    drawn = lambda: torch.rand(1).item()
    kept = drawn()

    def after(rank: int, seed: int) -> float:
        rank_checkpoint.load_part(tmp_path, rank, seed, backend)
        return drawn()

    assert after(0, 1) == kept == after(0, 2), "rank 0 goes on"
    assert len({kept, after(1, 1), after(2, 1), after(1, 2)}) == 4 and after(1, 1) == after(1, 1)


def test_the_last_part_of_a_divided_parameter_is_filled_up() -> None:
    parameter = SimpleNamespace(ds_tensor=torch.zeros(4), ds_process_group=None)
    part = deepspeed_backend._own_part(parameter, torch.tensor([[1.0], [2.0], [3.0]]))
    assert part.tolist() == [1.0, 2.0, 3.0, 0.0]


class OneRank:
    """A learner of one rank, in this process."""

    def __init__(self, backend: Backend):
        self.backend = backend

    async def all(self, call: Callable[[int, Any], Any], *, deadline: float) -> list[Any]:
        return [call(0, SimpleNamespace(save=SimpleNamespace(remote=self.save)))]

    def save(self, folder: str) -> dict[str, Any]:
        return save(Path(folder), self.backend)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, timeout=10, check=False).returncode:
        pytest.skip("NOT TESTED: a full disk needs a tmpfs, which root alone may mount")
    yield place
    subprocess.run(["umount", "-l", str(place)], timeout=10, check=True)


@pytest.mark.parametrize("known", [0, 4_000_000])
def test_a_disk_that_runs_full_keeps_the_last_checkpoint_and_says_what_is_needed(
    small_disk: Path, known: int
) -> None:
    """Seen before the save where its size is `known`, else as a file is written; only the old is left."""
    first = Checkpoints(small_disk, OneRank(Backend((1000,))), 2, 9.0)  # type: ignore[arg-type]
    good = asyncio.run(first.save(1, {"version": 1}))
    backend = Backend((500_000,))
    saves = Checkpoints(small_disk, OneRank(backend), 2, 9.0, known)  # type: ignore[arg-type]
    with pytest.raises(InfrastructureError, match=r"No space left.*MiB free.*checkpoint\.keep=2") as raised:
        asyncio.run(saves.save(2, {"version": 2}))
    assert ("3.8 MiB needed" in str(raised.value)) is bool(known)
    assert len(backend.made) == (0 if known else 2), "witness: it was, or was not, being written"
    assert newest(small_disk) == (good, [])
    assert sorted(p.name for p in small_disk.iterdir()) == ["latest", "step-000001"]


def test_a_disk_that_may_only_be_read_keeps_what_it_has(small_disk: Path) -> None:
    saves = Checkpoints(small_disk, OneRank(Backend((1000,))), 2, 9.0)  # type: ignore[arg-type]
    good = asyncio.run(saves.save(1, {"version": 1}))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], timeout=10, check=True)
    with pytest.raises(InfrastructureError, match=r"step-000002 .*Read-only file system"):
        asyncio.run(saves.save(2, {"version": 2}))
    assert newest(small_disk) == (good, [])
