"""How long is waited: by lengths and floor rates where nothing is set; and learning rates that have to be."""

from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from entroray.engine.vllm_request import QUEUE, Request
from entroray.engine.waiting import Waiting
from entroray.errors import ConfigError
from entroray.planning.deadlines import Deadlines, floor_deadlines
from entroray.types import Draw
from entroray.wiring import actors, compose, preflight
from entroray.wiring.driver import loop_settings
from tests.composed import configured


def test_deadlines_follow_from_lengths_at_the_floor_rates() -> None:
    found = floor_deadlines(32_768, 512, 256, 100, engines=4, ranks=4, weights=65e9)
    assert found.response == 3276.8, "10 tokens/s"
    assert found.start == 1800 + 650, "100 MB/s"
    trained = 2 * 256 * 33_280 / 4000
    assert found.call == found.start + trained
    assert found.step == 1800 + 612 * 32_768 / 4000 + trained + 4550 + 3276.8
    assert found.checkpoint == 1800 + 7 * 650, "moments and a float32 copy besides"


def test_deadlines_that_are_set_hold() -> None:
    told = "rollout.deadline=20", "driver.call_deadline=30", "driver.stall=40", "rollout.max_tokens=32768"
    assert actors.run_deadlines(configured(*told)) == Deadlines(20.0, 30.0, 30.0, 40.0, 30.0)


def test_a_checkpoint_is_waited_for_as_long_as_it_is_large(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(10**9)
    config = configured(f"model.path={tmp_path}", "learner.lr=1e-6")
    m = actors.Actors(config, None, None, None, None, {})  # type: ignore[arg-type]
    assert m.within == 1810 and m.checkpoints(tmp_path).deadline == 1870
    assert replace(m, facts={"trained": 5}).checkpoints(tmp_path).size == 60, "a weight, two moments"


def test_a_short_response_is_waited_for_as_long_as_ever() -> None:
    found = actors.run_deadlines(configured())
    assert found.response == 300 and found.start == 1800 and found.call >= 1800 and found.step >= 1800


def test_a_response_of_32k_tokens_at_25_tokens_a_second_is_in_time() -> None:
    config = configured("rollout.max_tokens=32768")
    assert actors.run_deadlines(config).response > 32_768 / 25
    assert loop_settings(config, {}).stall == actors.run_deadlines(config).step > 1800
    of_set = configured("evaluate=aime24", "evaluate.sets.aime24.max_tokens=32768")
    assert actors.run_deadlines(of_set).response == 3276.8


def test_every_row_that_was_read_of_an_evaluation_set_counts() -> None:
    config = configured("evaluate=aime24", "evaluate.sets.aime24.prompts=null")
    read: Any = SimpleNamespace(prompts=range(3000), plan=SimpleNamespace(samples=4))
    more = loop_settings(config, {"aime24": read}).stall - loop_settings(config, {}).stall
    assert more == pytest.approx(12_000 * actors.longest_response(config)[0] / 1000)


def test_the_rate_that_a_deadline_implies_is_said() -> None:
    said = preflight.deadlines(configured("rollout.max_tokens=32768", "rollout.deadline=300"))
    assert "rollout.deadline 300 s, 109 tokens/s" in said and preflight.deadlines in preflight.FAST


def test_a_queued_sample_has_a_bound_of_its_own_and_a_begun_one_the_whole_deadline() -> None:
    request = Request("p", (1,), (0, 1), Draw(1.0, 32_768), 3276.8)
    assert request.patience == QUEUE and Request("p", (1,), (0,), Draw(1.0, 9), 2.0).patience == 2.0
    role = lambda *told: actors.generator_role(None, configured(*told))  # type: ignore[arg-type]
    for seconds, queue in ((3600.0, 3600.0), (20.0, 20.0)):
        assert role(f"rollout.deadline={seconds}").queue == queue, (
            "a user who waits longer waits for all of it"
        )
        assert Request("p", (1,), (0,), Draw(1.0, 9), seconds, queue=queue).patience == seconds
    assert role("rollout.max_tokens=32768").queue == QUEUE
    waiting = Waiting(request, Future(), admitted=1000.0, left={"a", "b"}, begun={"a": 1100.0})
    assert waiting.late(1000.0 + QUEUE, idle_since=0.0) == set()
    assert waiting.late(1001.0 + QUEUE, idle_since=0.0) == {"b"}, "the engine was at work on nothing"
    assert waiting.late(2000.0, idle_since=1990.0) == set(), "it was at work on others"
    assert waiting.late(1101.0 + 3276.8, idle_since=4300.0) == {"a"}


def test_a_learning_rate_has_a_default_for_the_tiny_model_alone() -> None:
    config, tree = compose.load_config([])
    assert config.learner.lr == tree.learner.lr == 1e-3, "it is stored with the run's settings"
    with pytest.raises(ConfigError, match=r"^learner\.lr has no default for model\.path=/m: .*learner\.lr="):
        configured("model.path=/m")
    assert configured("model.path=/m", training=False).learner.lr is None, "an evaluation needs none"


def test_a_tiny_run_with_a_schedule_can_be_evaluated_by_what_it_stored() -> None:
    tree = compose.load_config(["control=lr_cosine"])[1]
    again = compose.override_config(
        OmegaConf.create(OmegaConf.to_yaml(tree)), ["model.path=/m"], training=False
    )
    assert again.learner.lr == 1e-3
    assert configured("control=lr_cosine", "model.path=/m", training=False).learner.lr is None
    with pytest.raises(ConfigError, match=r"^learner\.lr has no default"):
        configured("control=lr_cosine", "model.path=/m")


def test_what_a_schedule_and_deepspeed_set_is_a_learning_rate_too() -> None:
    told = "model.path=/m", "learner.lr=1e-6"
    with pytest.raises(
        ConfigError, match=r"^control\.lr \(its first value\): learner\.lr=0\.0005 is above 0\.0001"
    ):
        configured("control=lr_cosine", *told)
    configured("control=lr_cosine", *told, "control.lr.start=1e-6", "control.lr.end=1e-7")
    configured("control=lr_cosine", *told, "learner.lr_high=true")
    with pytest.raises(ConfigError, match=r"optimizer\.params\.lr: set learner\.lr"):
        configured("learner.deepspeed={optimizer: {params: {lr: 1e-3}}}")


def test_a_learning_rate_that_destroys_a_trained_model_is_refused_unless_it_is_meant() -> None:
    told = "model.path=/m", "learner.lr=2e-4"
    with pytest.raises(ConfigError, match=r"^learner\.lr=0\.0002 is above 0\.0001.*learner\.lr_high=true"):
        configured(*told)
    assert configured(*told, "learner.lr_high=true").learner.lr == 2e-4
    assert configured("model.path=/m", "learner.lr=1e-4").learner.lr == 1e-4
    assert configured("learner.lr=0.1").learner.lr == 0.1, "the tiny model's own affair"


def test_the_most_depends_on_what_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compose.MOST_LR, "adapters", 2e-3)
    config = configured("model.path=/m", "learner.lr=1e-3", training=False)
    compose.check_lr(config, "adapters")
    config.learner.lr = 3e-3
    with pytest.raises(ConfigError, match=r"above 0\.002, more than adapters"):
        compose.check_lr(config, "adapters")
