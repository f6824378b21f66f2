"""What one rank does with files and streams, beside a backend that is a stand-in."""

import json
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from entroray.config import LearnerConfig, Model
from entroray.errors import PreflightError
from entroray.objective import build_objective
from entroray.workers import checkpoint, transfer
from entroray.workers.learner_rank import LearnerRank, LearnerSettings


def alone(rank: int, stage: int = 1) -> LearnerRank:
    learner = LearnerConfig(ranks=2, zero_stage=stage)
    return LearnerRank(rank, LearnerSettings(learner, Model(), "nccl", 0, 1), build_objective("grpo"), None)


class Gathering:
    """A backend that counts how many of the tensors it gathered are alive as it gathers the next."""

    def __init__(self, write):
        self.alive, self.most, self.gathered = [], 0, 0
        weights = [(str(i), torch.nn.Parameter(torch.zeros(2))) for i in range(6)]
        self.policy = SimpleNamespace(named_weights=lambda: weights, write=write, adapter=None)

    def gather(self, parameter):
        self.most = max(self.most, sum(each() is not None for each in self.alive))
        self.alive.append(weakref.ref(tensor := parameter.detach().clone()))
        self.gathered += 1
        return tensor


def test_a_rank_that_does_not_write_an_export_keeps_nothing_of_it(tmp_path):
    rank = alone(1)
    rank.backend = Gathering(None)
    rank.export(str(tmp_path))
    assert rank.backend.gathered == 6 and rank.backend.most <= 1


def test_a_disk_that_refuses_an_export_leaves_no_rank_waiting_for_another(tmp_path):
    def refused(folder, weights):
        next(iter(weights))
        raise OSError(28, "No space left on device")

    rank = alone(0)
    rank.backend = Gathering(refused)
    with pytest.raises(OSError, match="No space"):
        rank.export(str(tmp_path))
    assert rank.backend.gathered == 6


def test_a_large_checkpoint_that_is_damaged_is_refused_by_the_rank_that_hashes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "HASHED_BYTES", 0)
    files = [tmp_path / f"rank-{rank}-00000.safetensors" for rank in (0, 1)]
    for file in files:
        file.write_bytes(b"moments")
    (tmp_path / "manifest.json").write_text(json.dumps(checkpoint.seal(tmp_path, files)))
    files[1].write_bytes(b"momenta")
    for number in (0, 1):
        with pytest.raises(PreflightError) as raised:  # the other: it is no checkpoint
            alone(number).load(str(tmp_path))
        said = files[1].name in str(raised.value) and "run.resume" in str(raised.value)
        assert said is (number == 1)


def test_work_goes_on_the_stream_it_was_on_after_a_transfer_moved_it(monkeypatch):
    """As vLLM 0.32's current_stream(), which sets a new stream for the thread that calls it and leaves it."""
    now = ["the learner's"]

    @contextmanager
    def stream(inside):
        before, now[0] = now[0], inside
        yield
        now[0] = before

    def moves(*_, **__):
        now[0] = "vLLM's"
        return SimpleNamespace(client=SimpleNamespace(deliver=lambda *_: moves()), send_weights=None)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(transfer, "connect", moves)
    rank = alone(0)
    rank.device, rank.backend = torch.device("cuda"), Gathering(None)
    monkeypatch.setattr(rank, "address", lambda: ("", 0))
    rank.connect(None)
    assert now == ["the learner's"]
    rank.sync(1)
    assert now == ["the learner's"]
