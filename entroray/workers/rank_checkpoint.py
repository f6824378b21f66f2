"""One rank's part of a checkpoint, which any number of ranks at any stage of ZeRO can read.

`learner/rank-*.safetensors` hold what is trained, whole: `weight/<name>` in float32 and what the optimizer
keeps of it, of Adam `exp_avg/<name>`, `exp_avg_sq/<name>` and `step/<name>`. Ranks make one tensor after
another whole together, and each writes about as many bytes. A rank holds what goes into one file, and reads
of a file what it needs.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entroray.config import LearnerConfig
from entroray.errors import LearnerLostError, PreflightError, first_line
from entroray.policy.model_files import split_files
from entroray.seeds import seeds
from entroray.workers import checkpoint
from entroray.workers.checkpoint import Fingerprint

LAYOUT, LEARNER, WEIGHT = "layout.json", "learner", "weight"
FILE_BYTES = 1 << 30
"""Of tensors in one file: as much is held while it is written, and other ranks wait meanwhile."""
REMEDY = "set it as it was, or begin in another run.dir"


def save_part(
    folder: Path, rank: int, learner: LearnerConfig, backend: Any, also: Callable[[], None]
) -> dict[str, Fingerprint]:
    """Write what of weights, optimizer and random state falls to `rank`, and what `also` writes.

    Size and hash of every file of this rank, which is on the disk then. All ranks must call; RuntimeError on
    every rank where the disk refuses one, once none of them writes any more. LearnerLostError at once where
    this rank could not make a tensor whole: the others are in that call, and will not leave it.
    """
    written: dict[str, Fingerprint] = {}
    seal = lambda: written.update(checkpoint.seal(folder, checkpoint.written_by(rank, folder)))
    said, failed = [""] * learner.ranks, ""
    for work in (lambda: _write(folder, rank, learner, backend), also, seal):
        try:
            work()
        except LearnerLostError:
            raise
        except Exception as error:  # boundary: every rank raises it, after what they do together
            failed = failed or f"{type(error).__name__}: {first_line(error)}"
    torch.distributed.all_gather_object(said, failed)
    if any(said):
        raise RuntimeError("; ".join(f"rank {i}: {why}" for i, why in enumerate(said) if why))
    return written


def _write(folder: Path, rank: int, learner: LearnerConfig, backend: Any) -> None:
    from safetensors.torch import save_file

    whole = _own_share(rank, learner.ranks, backend)
    try:
        (folder / LEARNER).mkdir(parents=True, exist_ok=True)
        torch.save([torch.get_rng_state(), *torch.cuda.get_rng_state_all()], _random(folder, rank))
        if rank == 0:
            ways = {"learner.ranks": learner.ranks, "learner.zero_stage": learner.zero_stage}
            layout = {**ways, "optimizer": backend.optimizer, "schedule": backend.schedule()}
            (folder / LAYOUT).write_text(json.dumps(layout))
        for number, part in enumerate(split_files(whole, FILE_BYTES)):
            save_file(part, file := folder / LEARNER / f"rank-{rank}-{number:05d}.safetensors")
            shutil.copymode(_random(folder, rank), file)  # safetensors gives 0600
            part.clear()  # before the next is gathered
    finally:
        for _ in whole:  # other ranks gather, also where the disk refuses what was gathered before
            pass


def _own_share(rank: int, ranks: int, backend: Any) -> Iterator[tuple[str, Tensor]]:
    trained = backend.trained
    sizes = [math.prod(backend.full_shape(p)) for p in trained.values()]
    for (name, parameter), owner in zip(trained.items(), divide_sizes(sizes, ranks), strict=True):
        for kind, whole in backend.state_of(parameter).items():
            try:
                tensor = whole()
            except Exception as error:  # boundary: whatever it is, ranks no longer move together
                raise LearnerLostError(f"{kind}/{name} of a checkpoint: {first_line(error)}") from error
            if owner == rank:
                yield f"{kind}/{name}", tensor
            del tensor


def divide_sizes(sizes: Iterable[int], ranks: int) -> list[int]:
    """Which rank writes each: the one that has least so far."""
    owners, written = list[int](), [0] * ranks
    for size in sizes:
        owners.append(written.index(min(written)))
        written[owners[-1]] += size
    return owners


def load_part(folder: Path, rank: int, seed: int, backend: Any) -> None:
    """Go on from what `save_part` wrote, whatever ranks and stage of ZeRO wrote it; all ranks must call.

    A rank that was not there draws its random state from (`seed`, rank, update). PreflightError with the
    difference where the checkpoint is of another model, optimizer or version.
    """
    layout = _read_layout(folder)
    if layout["optimizer"] != backend.optimizer:
        raise PreflightError(
            f"{folder} was written by the optimizer {layout['optimizer']}, and this run has "
            f"{backend.optimizer} (learner.deepspeed): {REMEDY}"
        )
    files = sorted((folder / LEARNER).glob("rank-*.safetensors"))
    listed = [each for file in files for each in _shapes(file)]
    found = {key: shape for key, shape, _ in listed}
    _check_same(folder, found, {n: list(backend.full_shape(p)) for n, p in backend.trained.items()})
    kinds: dict[str, list[str]] = {}
    for kind, _, name in (key.partition("/") for key, shape, dtype in listed if shape or dtype != "F64"):
        kinds.setdefault(name, []).append(kind)
    backend.restore(kinds, _tensors(files), layout["schedule"])
    _restore_random(folder, rank, seed, layout["schedule"]["last_epoch"])


def _read_layout(folder: Path) -> Mapping[str, Any]:
    try:
        layout = json.loads((folder / LAYOUT).read_text())
        return {name: layout[name] for name in ("optimizer", "schedule")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PreflightError(
            f"{folder} has no {LAYOUT} of this version of entroray: go on with the version that wrote it, "
            "resume from another, or begin in another run.dir"
        ) from error


def _check_same(folder: Path, found: Mapping[str, list[int]], here: Mapping[str, list[int]]) -> None:
    mark = f"{WEIGHT}/"
    there = {key.removeprefix(mark): shape for key, shape in found.items() if key.startswith(mark)}
    wrong = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if wrong:
        was, now = (x.get(wrong[0], "not there") for x in (there, here))
        raise PreflightError(
            f"{folder} is of another model or adapter: {len(wrong)} of {len(there)} parameters differ, first "
            f"{wrong[0]}, which was {was} and is {now} in this run (model.path, learner.lora): {REMEDY}"
        )


def _shapes(file: Path) -> list[tuple[str, list[int], str]]:
    """Name, shape and type of each; a number that the optimizer keeps is of shape [] and F64."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        slices = [(key, opened.get_slice(key)) for key in sorted(opened.keys())]
        return [(key, each.get_shape(), each.get_dtype()) for key, each in slices]


def _tensors(files: Iterable[Path]) -> Iterator[tuple[str, str, Tensor]]:
    """Name, kind and value of each; a value is in memory only where it is looked at."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in sorted(opened.keys()):
                kind, _, name = key.partition("/")
                yield name, kind, opened.get_tensor(key)


def _random(folder: Path, rank: int) -> Path:
    return folder / f"rng-{rank}.pt"


def _restore_random(folder: Path, rank: int, seed: int, update: int) -> None:
    file = _random(folder, rank)
    cpu, *cards = torch.load(file) if file.is_file() else (None,)
    if cpu is None or len(cards) != torch.cuda.device_count():
        torch.manual_seed(seeds(seed, update, rank, 1)[0])
    else:
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(cards)
