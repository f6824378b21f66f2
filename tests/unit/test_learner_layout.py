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


@pytest.mark.parametrize(("ranks", "stage"), [(2, 1), (1, 3), (1, 0)])
def test_a_checkpoint_of_other_ranks_or_another_stage_is_refused_with_what_it_was(ranks, stage, tmp_path):
    learner = LearnerConfig(ranks=ranks, zero_stage=stage)
    rank = LearnerRank(0, LearnerSettings(learner, Model(), "plasma", 0, 1), build_objective("grpo"), None)
    (tmp_path / "layout.json").write_text('{"learner.ranks": 1, "learner.zero_stage": 1}')
    with pytest.raises(PreflightError, match=r"learner\.ranks=1 learner\.zero_stage=1.*run\.dir"):
        rank.load(str(tmp_path))


def test_a_checkpoint_that_does_not_say_who_wrote_it_is_refused(tmp_path):
    rank = LearnerRank(
        0, LearnerSettings(LearnerConfig(), Model(), "plasma", 0, 1), build_objective("grpo"), None
    )
    with pytest.raises(PreflightError, match=r"layout\.json"):
        rank.load(str(tmp_path))


def alone(rank: int, stage: int = 1) -> LearnerRank:
    learner = LearnerConfig(ranks=2, zero_stage=stage)
    return LearnerRank(rank, LearnerSettings(learner, Model(), "nccl", 0, 1), build_objective("grpo"), None)


def test_a_checkpoint_whose_reference_is_written_as_it_once_was_is_refused(tmp_path):
    """It was passed over, and the first model taken for the reference."""
    rank = alone(0)
    (tmp_path / "layout.json").write_text(json.dumps(rank._layout()))
    (tmp_path / "reference.pt").write_bytes(b"weights")
    with pytest.raises(PreflightError, match=r"reference\.pt.*run\.dir"):
        rank.load(str(tmp_path))


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


def test_a_large_checkpoint_that_is_damaged_is_refused_by_the_rank_that_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "HASHED_BYTES", 0)
    names = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)]
    for name in names:
        (tmp_path / name).write_bytes(b"moments")
    (tmp_path / "layout.json").write_text(json.dumps(alone(0)._layout()))
    manifest = checkpoint.seal(tmp_path, [tmp_path / name for name in names])
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / names[1]).write_bytes(b"momenta")
    read = []
    for number in (0, 1):
        rank = alone(number)
        rank.backend = SimpleNamespace(load=read.append)
        with pytest.raises((PreflightError, FileNotFoundError)) as raised:
            rank.load(str(tmp_path))
        assert (names[1] in str(raised.value) and "run.resume" in str(raised.value)) is (number == 1)
    assert len(read) == 1, "and before its backend reads it"


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
