"""One real engine, one real learner: after a sync they agree, and a sync that lies is noticed."""

import asyncio
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray
import torch

from entroray import rows
from entroray.config import Config
from entroray.engine.generator import Request
from entroray.errors import InfrastructureError, SyncError
from entroray.objective import build_objective
from entroray.policy.tokenizer import load_tokenizer
from entroray.train.batching import assemble, tokens_of
from entroray.train.warm_start import demonstration_group
from entroray.types import Draw, Prompt, Status
from entroray.wiring import actors, compose, dataset
from entroray.wiring.parts import build_parts
from entroray.workers import cluster, transfer
from entroray.workers.learner_rank import LearnerRank
from entroray.workers.transfer import GatheredSource
from tests.ray.stack import SHARES, drawing

LONG = tuple(int(i) for i in np.random.default_rng(0).integers(0, 250, 300))
"""Longer than two blocks of 128 tokens, so that a prefix cache has something to keep."""


class Saboteur(LearnerRank):
    """A learner that can forget to send a layer, send nothing at all, or stop before it commits, once."""

    def sabotage(self, how: str) -> None:
        self.how = how
        if how == "layer":
            source = self.transfer.source
            whole = type(source).__iter__
            source.__class__ = type(
                "Short", (GatheredSource,), {"__iter__": lambda s: _all_but_one(whole(s))}
            )
        if how == "skip":
            self.transfer.send_weights = lambda: None
        if how == "cut":
            self.transfer.client.replace_weights = self.cut_short

    def cut_short(self, update_info: Any) -> None:
        del self.transfer.client.replace_weights
        self.transfer.client.start_weight_update()
        self.transfer.client.update_weights(update_info)
        raise InfrastructureError("cut short")


def _all_but_one(weights: Any) -> Any:
    return ((n, t) for n, t in weights if "layers.1.mlp.up_proj" not in n)


@pytest.fixture(scope="module")
def config() -> Config:
    overrides = ["data.max_prompt=384", "rollout.max_tokens=64", "learner.lr=0.01", "reward.deadline=30"]
    return compose.load_config([*overrides, *SHARES])[0]


@pytest.fixture(scope="module")
def running(local_ray: None, model: str, config: Config) -> Iterator[tuple[Any, Any]]:
    """(event loop, machine of this module's own): one loop for all, since futures belong to theirs."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
    actors.LearnerRank = Saboteur  # type: ignore[misc]
    loop = asyncio.new_event_loop()
    objective = build_objective(rows.objective_row("supervised"))
    parts = replace(build_parts(config), objective=objective)
    probe = tuple(load_tokenizer(model).encode("a fixed probe text, 123"))
    judge = dataset.judge_spec(config)
    made = actors.start_actors(config, model, parts, judge, probe, total_updates=100)
    m = loop.run_until_complete(made)
    yield loop, m
    actors.LearnerRank = LearnerRank  # type: ignore[misc]
    loop.run_until_complete(m.end())
    loop.close()


def train_a_little(loop: Any, m: Any, seed: int) -> None:
    """A few supervised updates on noise: the weights move by a lot."""
    objective = build_objective(rows.objective_row("supervised"))
    rng = np.random.default_rng(seed)
    groups = [
        demonstration_group(
            Prompt(f"p{i}", "", tuple(rng.integers(0, 250, 8).tolist()), ""), rng.integers(0, 250, 12)
        )
        for i in range(8)
    ]
    batch = assemble(groups)
    zero = np.zeros(len(batch.response_ids), dtype=np.float32)
    scores = {k: zero for k in ("logprobs", "entropy", "varentropy")}
    tokens = objective.credit(tokens_of(groups, [objective.estimate(g) for g in groups], scores, 0))
    for _ in range(3):
        loop.run_until_complete(m.learner_role().update(batch, tokens, objective))


def sample(loop: Any, m: Any, **changes: Any) -> list[Any]:
    request = Request("long", LONG, (1, 2), Draw(1.0, 24), deadline=60.0)

    async def asked() -> list[Any]:
        return await m.engines.sample(replace(request, **changes))

    return loop.run_until_complete(asked())


def learner_logprobs(loop: Any, m: Any, response: np.ndarray) -> np.ndarray:
    """The learner's log-probs of `response` after the long prompt."""
    whole = (*LONG, *response.tolist())
    asked = m.learner.handles[0].prompt_logprobs.remote(whole)
    values = loop.run_until_complete(cluster.settle(asked, deadline=60.0, what="learner"))
    return np.asarray(values)[len(LONG) - 1 :]


def test_a_sync_moves_the_engine_to_the_learner_even_with_a_cached_prompt(running: Any) -> None:
    loop, m = running
    before = sample(loop, m)[0]  # fills the prefix cache under version 0
    np.testing.assert_allclose(before.logprobs, learner_logprobs(loop, m, before.token_ids), atol=1e-4)
    train_a_little(loop, m, seed=1)
    stale = sample(loop, m)[0]
    moved = np.abs(stale.logprobs - learner_logprobs(loop, m, stale.token_ids)).max()
    assert moved > 0.05, "the update must be visible, or this test shows nothing"
    loop.run_until_complete(m.sync(1))
    after = sample(loop, m)[0]
    np.testing.assert_allclose(after.logprobs, learner_logprobs(loop, m, after.token_ids), atol=1e-4)
    assert set(after.versions) == {1} and set(stale.versions) == {0}
    assert loop.run_until_complete(m.sync.compare()) < 1e-4


def test_samples_repeat_for_a_seed_and_differ_without(running: Any) -> None:
    loop, m = running
    first, other = sample(loop, m)
    again, _ = sample(loop, m)
    assert (first.token_ids == again.token_ids).all() and (first.logprobs == again.logprobs).all()
    assert first.token_ids.tolist() != other.token_ids.tolist()


def test_requests_in_flight_go_on_with_the_new_weights_and_say_so(running: Any) -> None:
    loop, m = running
    train_a_little(loop, m, seed=2)

    async def both() -> Any:
        request = Request("flight", LONG[:20], tuple(range(32)), Draw(1.0, 300), deadline=120.0)
        sampling = asyncio.create_task(m.engines.sample(request))
        await drawing(m.engines.handles[0])
        await m.sync(2)
        return await sampling

    rollouts = loop.run_until_complete(both())
    spans = [r.versions.tolist() for r in rollouts]
    assert any(set(s) == {1, 2} for s in spans), "the sync came too late or too early to split a request"
    assert all(s == sorted(s) for s in spans)


def test_greedy_stop_strings_and_truncation(running: Any) -> None:
    loop, m = running
    cut = sample(loop, m, draw=Draw(1.0, 3))
    assert all(r.status is Status.TRUNCATED and r.length == 3 for r in cut)
    greedy = sample(loop, m, draw=Draw(0.0, 8))
    assert greedy[0].token_ids.tolist() == greedy[1].token_ids.tolist()
    tokens = sample(loop, m, draw=Draw(1.0, 40))[0]
    stop = next(c for c in tokens.text[3:] if c.isascii() and c.isprintable())
    stopped = sample(loop, m, draw=Draw(1.0, 40, stop=(stop,)))[0]
    assert stop in stopped.text and stopped.length < tokens.length


def test_a_sample_that_outlives_its_deadline_is_a_timeout_not_a_wait(running: Any) -> None:
    loop, m = running
    late = sample(loop, m, deadline=0.0, draw=Draw(1.0, 60))
    assert {r.status for r in late} == {Status.TIMEOUT}
    assert all(r.status.usable for r in sample(loop, m))


@pytest.mark.parametrize("reached", ["begun", "loaded"])
def test_an_update_that_was_cut_short_is_made_again_from_its_beginning(running: Any, reached: str) -> None:
    """As where another engine dies meanwhile: this one waits, paused, and takes the next whole update."""
    loop, m = running
    train_a_little(loop, m, seed=3)
    engine, rank = m.engines.handles[0], m.learner.handles[0]
    if reached == "begun":
        begin = engine.start_weight_update.remote()
        loop.run_until_complete(cluster.settle(begin, deadline=30.0, what="engine"))
    else:
        loop.run_until_complete(cluster.settle(rank.sabotage.remote("cut"), deadline=30.0, what="learner"))
        with pytest.raises(InfrastructureError, match="cut short"):
            loop.run_until_complete(m.sync(3))
    loop.run_until_complete(m.sync(3))
    assert loop.run_until_complete(m.sync.compare()) < 1e-4 and m.engines.handles == [engine]
    after = sample(loop, m)[0]
    np.testing.assert_allclose(after.logprobs, learner_logprobs(loop, m, after.token_ids), atol=1e-4)
    assert set(after.versions) == {3}


def test_a_dropped_layer_is_noticed_at_the_sync(running: Any) -> None:
    loop, m = running
    handle = m.learner.handles[0]
    loop.run_until_complete(cluster.settle(handle.sabotage.remote("layer"), deadline=30.0, what="learner"))
    with pytest.raises(SyncError, match=r"layers\.1\.mlp\.up_proj"):
        loop.run_until_complete(m.sync(3))


def test_a_skipped_sync_is_noticed_at_the_sync(running: Any) -> None:
    loop, m = running
    handle = m.learner.handles[0]
    loop.run_until_complete(cluster.settle(handle.sabotage.remote("skip"), deadline=30.0, what="learner"))
    with pytest.raises(SyncError, match="0 of 1 generators took version 4"):
        loop.run_until_complete(m.sync(4))


def test_tensors_survive_packing() -> None:
    from entroray.engine.weight_bytes import pack, unpack

    weights = [("a", torch.randn(3, 5)), ("b", torch.randn(7).bfloat16()), ("c", torch.tensor(2.0))]
    manifest, payload = pack(weights)
    for (name, value), (back, copy) in zip(weights, unpack(manifest, payload), strict=True):
        assert name == back and torch.equal(value, copy)
    with pytest.raises(SyncError, match="bytes"):
        list(unpack(manifest, [*payload[:-1], payload[0]]))


@pytest.mark.parametrize(("largest", "size"), [(5, 1 << 30), (5 << 30, 5 << 30)])
def test_ipc_sends_one_buffer_after_another_and_the_largest_parameter_fits_in(
    largest: int, size: int
) -> None:
    info: Any = transfer._init_info("ipc", 0, None, largest, lambda: ("", 0))
    assert info.packed and info.packed_buffer_size_bytes == size
