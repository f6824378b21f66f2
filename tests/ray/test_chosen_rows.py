"""Every choice of conf/rollout on the real stack, two steps each; what is given up, stopped, drawn hotter."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entroray import rows
from entroray.config import Config
from entroray.data.prompts import PromptStream
from entroray.engine.generator import Request
from entroray.metrics.diversity import Loops
from entroray.objective import build_objective
from entroray.train.driver import Driver, Knobs, Roles
from entroray.types import Draw, Group, Status
from entroray.wiring import compose, dataset, driver, sampler, selection
from entroray.wiring.parts import build_parts
from entroray.workers import cluster
from tests.documented import CHOSEN, matches
from tests.ray.stack import Stack

FILES = sorted((rows.conf_folder() / "rollout").glob("*.yaml"))
ROWS = [file.stem for file in FILES if "plan:" not in file.read_text()]  # test_grown_groups.py has the plans
QUICK = [
    "learner.lr_high=true",
    *("experiment=quickstart", "objective=grpo", "++data.settings.size=300", "data.max_prompt=128"),
    *("generator.replicas=1", "generator.threads=1", "learner.threads=1", "learner.updates_per_rollout=1"),
    *("rollout.groups_per_step=6", "rollout.group_size=4", "rollout.max_tokens=24"),
    "sampler.stop=[e,t,a,o,i,n,s,r,h,l,'1','2','3',' ']",
]
"""A random model: a stop string ends a response after 18 tokens or so, and the judge is easily content."""
JUDGE = "def seventh(response, prompt):\n    return float(len(response) % 7 == 0)\n"


class Book:
    """A journal that remembers metrics and groups."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.groups: list[Group] = []

    def step(self, step: int, metrics: Mapping[str, float], groups: Any, tokens: Any) -> None:
        self.steps.append({"step": step, **metrics})
        self.groups += groups

    def event(self, kind: str, **fields: Any) -> None:
        assert kind != "resample", fields

    def skipped(self, step: int, batch: Any, tokens: Any) -> None:
        raise AssertionError(f"the update of step {step} was left out")


def configured(model: str, folder: Path, *overrides: str) -> Config:
    judge = f"reward.path={folder}/judge.py:seventh"
    return compose.load_config([*QUICK, f"model.path={model}", judge, *overrides])[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("judge")
    (made / "judge.py").write_text(JUDGE)
    return made


def steps(stack: Stack, config: Config, count: int) -> Book:
    """`count` steps as `entroray train` takes them, on eight prompts that come again and again."""
    objective, book = build_objective(config.objective), Book()
    read = dataset.load_dataset(config, stack.model)

    async def go() -> None:
        m = await stack.actors(config, objective, read.judge)
        roles = Roles(m.generator_role(), m.verifier_role(), m.learner_role(), m.sync, book)
        draw = sampler.training_draw(config.sampler, config.rollout, build_parts(config), read.tokenizer)
        knobs = Knobs(objective, draw, config.learner.updates_per_rollout)
        few = read.split.training[:8]
        prompts, chosen = selection.build_selection(
            config.rollout, PromptStream(few, seed=0), len(few), config.seed
        )
        pace = driver.loop_settings(config)
        await Driver(prompts, roles, knobs, pace, seed=0, selection=chosen).train(count)

    stack.wait(go())
    return book


@pytest.mark.parametrize("name", ROWS)
def test_every_row_trains(stack: Stack, folder: Path, name: str) -> None:
    config = configured(stack.model, folder, f"rollout={name}", "objective.keep.fn=always")
    told = steps(stack, config, 2).steps
    assert [s["step"] for s in told] == [1, 2]
    chosen = {n for s in told for n in s if n.startswith(("prompts/", "replay/", "second/", "early/"))}
    chosen |= {n for s in told for n in s if n == "repetition/looped"}
    assert all(matches(n, CHOSEN) for n in chosen)
    assert bool(chosen) == (name not in ("plain", "drop_surplus", "hotter_next_time"))
    assert all(np.isfinite(s["update/loss"]) for s in told)


def test_a_second_draw_is_hotter_by_its_factor_and_its_log_probs_say_so(stack: Stack, folder: Path) -> None:
    config = configured(stack.model, folder, "rollout=hotter_again", "rollout.second.factor=1.5")
    book = steps(stack, config, 1)
    second = [g for g in book.groups if g.earlier]
    assert second and book.steps[0]["second/groups"] == len(second) / 6
    for g in second:
        assert g.earlier[0].share_right == 0 and all(r.notes is None for r in g.earlier[0].rollouts)
        heat = np.concatenate([r.notes.temperature for r in g.rollouts if r.notes])
        assert set(np.round(heat, 5)) == {1.5} and {r.temperature for r in g.rollouts} == {1.0}
    assert book.steps[0]["mismatch/max"] > 0.01, "drawn from another distribution, and corrected for"


def test_a_replayed_success_is_weighed_against_the_weights_of_now(stack: Stack, folder: Path) -> None:
    config = configured(stack.model, folder, "rollout=replay", "learner.lr=1e-3")
    book = steps(stack, config, 6)
    used = [s for s in book.steps if s["replay/groups"]]
    assert used and all(s["lag/max"] == 0 and s["replay/age"] >= 1 for s in used)
    assert any(s["mismatch/max"] > 1e-4 for s in used), "the policy has moved since"
    assert all(s["mismatch/max"] < 1e-3 for s in book.steps if not s["replay/groups"])


def ask(engine: Any, request: Request) -> list[Any]:
    return asyncio.run(cluster.settle(engine.sample.remote(request), deadline=60.0, what="engine"))


def test_the_engine_gives_up_the_slow_and_goes_on(stack: Stack) -> None:
    engine = stack.wait(stack.engine())
    plain = Draw(1.0, 24, stop=tuple("etaoinsrhl123 "))
    for drawing in (plain, replace(plain, rule={"fn": "fixed"})):
        whole = ask(engine, Request("q", (5, 6, 7), tuple(range(12)), drawing, 60.0))
        early = ask(engine, Request("q", (5, 6, 7), tuple(range(12)), replace(drawing, enough=4), 60.0))
        taken = [i for i, r in enumerate(early) if r.status.usable]
        assert len(taken) == 4 and {str(r.status) for r in early} <= {"ok", "truncated", "abandoned"}
        assert all(early[i].token_ids.tolist() == whole[i].token_ids.tolist() for i in taken)
        left = [(early[i].token_ids.tolist(), whole[i].token_ids.tolist()) for i in {*range(12)} - {*taken}]
        assert all(a and a == b[: len(a)] for a, b in left), "what a sample given up had drawn is known"
        bound = sorted(r.length for r in whole)[3]
        assert max(early[i].length for i in taken) <= bound < max(r.length for r in whole)
        again = ask(engine, Request("q", (5, 6, 7), (0, 1), drawing, 60.0))
        assert [r.token_ids.tolist() for r in again] == [r.token_ids.tolist() for r in whole[:2]]


def test_a_loop_is_stopped_where_it_closes_and_nowhere_else(stack: Stack) -> None:
    """Twice the same token is rare enough in a random model, and frequent enough."""
    engine = stack.wait(stack.engine())
    loops, seeds = Loops(count=2), tuple(range(64))
    whole = ask(engine, Request("q", (5, 6, 7), seeds, Draw(1.0, 40), 60.0))
    cut = ask(engine, Request("q", (5, 6, 7), seeds, Draw(1.0, 40, repetitions=2), 60.0))
    closes = [next((n for n in range(1, 41) if loops(r.token_ids[:n])), None) for r in whole]
    assert 3 < sum(n is not None and n < 40 for n in closes) < 60
    for r, long, at in zip(cut, whole, closes, strict=True):
        assert r.token_ids.tolist() == long.token_ids[: at or 40].tolist()
        assert (r.status is Status.TRUNCATED) == (at is not None or long.status is Status.TRUNCATED)
