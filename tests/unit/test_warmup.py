"""When a warm start stops, what it says of the accuracy it stopped at, and what is missing before one."""

import asyncio
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

from entroray import rows
from entroray.config import WarmStartConfig
from entroray.errors import PreflightError
from entroray.objective import build_objective
from entroray.policy.tokenizer import byte_tokenizer
from entroray.reward.verdicts import failed
from entroray.train import warm_start as loop
from entroray.train.warm_start import demonstration_group, overshoot_remedy, sampled_accuracy
from entroray.types import Draw, Prompt, Rollout, Status, Verdict
from entroray.wiring import dataset, sampler, warm_start
from tests.composed import configured

PLAN = WarmStartConfig(band=[0.3, 0.4], max_steps=8, rows_per_step=2, check_every=2)


class Taught:
    """A learner and a sync that count."""

    updates = 0

    async def update(self, batch: object, tokens: object, objective: object) -> dict[str, float]:
        self.updates += 1
        return {"update/loss": 1.0}

    async def __call__(self, version: int) -> dict[str, float]:
        return {}


def reached(*accuracies: float) -> tuple[float, int]:
    """(the accuracy it ended at, updates it made), where looks find these."""
    looks, world = iter(accuracies), Taught()

    async def check() -> float:
        return next(looks)

    answer = demonstration_group(Prompt("p", "1+0=", (1,), "1"), [2, 3])
    row: Any = build_objective(rows.objective_row("supervised"))
    said = loop.warm_start(repeat(answer), world, world, row, check, PLAN, lambda *told: None)  # type: ignore[arg-type]
    return asyncio.run(said), world.updates


def test_a_warm_start_ends_at_its_first_look_at_or_above_the_lower_end() -> None:
    assert reached(0.1, 0.3) == (0.3, 4) and reached(0.2, 0.29, 0.9) == (0.9, 6)
    with pytest.raises(
        PreflightError, match=r" 0\.20 .*model\.warm_start\.band=\[0\.3, 0\.4\].*model\.warm_start\.max_steps"
    ):
        reached(0.1, 0.1, 0.1, 0.2)


def test_failed_samples_and_verdicts_count_as_wrong() -> None:
    answer = demonstration_group(Prompt("p", "1+0=", (1,), "1"), [2, 3])

    class Judge:
        async def sample(self, *asked: object) -> list[Rollout]:
            return list(answer.rollouts)

        async def judge(self, prompt: Prompt, rollouts: object) -> list[Verdict]:
            slow = failed("too slow", Status.TIMEOUT)
            return [{"right": Verdict(1.0, True), "wrong": Verdict(0.5, False)}.get(prompt.id, slow)]

    world: Any = Judge()
    prompts = [Prompt(name, "", (1,), "") for name in ("right", "wrong", "failed", "right")]
    assert asyncio.run(sampled_accuracy(world, world, prompts, 0, Draw(1.0, 8))) == 0.5


def test_one_that_ended_above_the_band_says_what_to_do() -> None:
    assert overshoot_remedy(0.3, PLAN) == overshoot_remedy(0.4, PLAN) == ""
    said = r"above model.warm_start.band=[0.3, 0.4]: a model.warm_start.check_every below 2 looks before"
    assert overshoot_remedy(0.41, PLAN).startswith(said)
    plan = configured("experiment=quickstart").model.warm_start
    assert warm_start._ended(0.34, 43.2, 23.1, plan) == "sampled accuracy 0.34 after 43 s (23 s of steps)"
    assert "(23 s of steps), above model.warm_start.band=[0.31, 0.38]" in warm_start._ended(0.5, 43, 23, plan)


def test_the_embedded_model_is_missing_until_its_folder_is_there(tmp_path: Path) -> None:
    config = configured(f"model.warm_start.cache={tmp_path}")
    assert warm_start.is_missing(config) and not warm_start.is_missing(
        configured("model.path=/nowhere", "learner.lr=1e-6")
    )
    warm_start.cached_folder(config).mkdir(parents=True)
    assert not warm_start.is_missing(config)


def test_an_evaluation_draws_from_the_policy_as_it_is() -> None:
    config = configured("sampler=by_entropy", "sampler.temperature=0.7")
    draw = sampler.plain_draw(config.sampler, config.rollout)
    assert draw.temperature == 0.7 and not draw.notes
    assert draw.greedy(3).temperature == 0.0 and draw.greedy(3).top_tokens == 3


def test_the_probe_is_its_text_without_special_tokens() -> None:
    tokenizer = byte_tokenizer()
    ids = dataset.probe_ids(tokenizer)
    assert tokenizer.decode(ids) == dataset.PROBE


def test_a_model_made_under_another_chat_template_is_another_model(tmp_path: Path) -> None:
    place = lambda *told: warm_start.cached_folder(configured(f"model.warm_start.cache={tmp_path}", *told))
    mine, plain = tmp_path / "my.jinja", place()
    made = set[Path]()
    for text in ("{{ messages[0].content }}", "{{ messages[0].content }}!", "caf\xe9"):
        mine.write_text(text, encoding="latin-1")
        made.add(place(f"model.template={mine}"))
    assert len(made) == 3 and plain not in made
    assert place("model.template_args={a: 1}") not in {plain, place("model.template_args={a: 2}")}
    assert place("model.template=null") == plain and place(f"model.template={'x' * 5000}") != plain
