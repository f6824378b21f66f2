"""Runs put into words, tested on recorded runs of each kind.

tests/unit/data/run_*.jsonl are columns of metrics.jsonl of real runs of the quickstart model, four digits:
healthy and collapsing are plain runs, exploding had an entropy bonus of 0.3, no_signal sums of six two-digit
numbers, gone a learning rate that destroyed the policy, saturated a trained model on sums of two numbers,
diagnosed is the quickstart as README.md shows it, with what a diagnosis adds every few steps.
"""

import json
import math
from pathlib import Path

import pytest

from entroray.control import build_controllers
from entroray.metrics.health import MINIMUM_STEPS, fit_slope, read_health
from entroray.observe.health_tracker import STEADY, HealthTracker, health_lines, moved_settings
from entroray.wiring.objective import advised_settings
from entroray.wiring.parts import build_parts
from tests.composed import configured

DATA = Path(__file__).parent / "data"


def last_words(history, settings=None):
    return "\n".join(health_lines(history, settings))


def run(name):
    return [json.loads(line) for line in (DATA / f"run_{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("healthy", "healthy"),
        ("collapsing", "collapsing"),
        ("exploding", "exploding"),
        ("no_signal", "no signal"),
        ("gone", "no signal"),
        ("saturated", "saturated"),
        ("diagnosed", "collapsing"),
    ],
)
def test_a_recorded_run_of_each_kind(name, kind):
    found = read_health(run(name))
    assert found.kind == kind
    assert (kind == "healthy") == (found.remedy == "")


def test_collapse_is_dated_from_its_own_rate():
    steps = [
        {"step": i, "entropy/mean": 0.8 * math.exp(-i / 50), "correct/mean": 0.3 + i / 400} for i in range(60)
    ]
    found = read_health(steps)
    start = sum(s["entropy/mean"] for s in steps[:5]) / 5
    now = sum(s["entropy/mean"] for s in steps[-10:]) / 10
    left = round(50 * math.log(now / (0.1 * start)))
    assert found.kind == "collapsing" and f"reaches {0.1 * start:.3f} in {left} steps" in found.words
    assert (
        found.cause == "no single sign"
        and found.line().count("; try ") == 1
        and found.remedy == "half of learner.lr"
    )


def test_tokens_alone_in_their_sets_explain_a_run_without_gain():
    flat = [{"entropy/mean": 0.1, "correct/mean": 0.2, "kept/alone": 0.97}] * 40
    found = read_health(flat)
    assert found.cause.startswith("97% of tokens were alone") and found.remedy == "sampler.top_p=1"


def test_the_strongest_sign_is_the_cause():
    """Each by how far it is from where it counts to its most: 0.1 nats, all groups."""
    signs = {"update/kl": 0.02, "mismatch/kl": 0.0001, "groups/all_right": 0.41}
    decay = [{"entropy/mean": math.exp(-i / 50), "correct/mean": 0.3} for i in range(60)]
    found = read_health([s | signs for s in decay])
    assert found.remedy == "learner.updates_per_rollout=1" and "0.020" in found.cause
    found = read_health([s | signs | {"groups/all_right": 0.6} for s in decay])
    assert found.cause.startswith("60% of groups")
    wrong = {"update/kl": 0.011, "groups/all_wrong": 1.0}
    found = read_health([{"entropy/mean": math.exp(i / 20), "correct/mean": 0.0} | wrong for i in range(60)])
    assert found.kind == "exploding" and found.cause.startswith("100% of groups are all wrong")


def test_the_cause_of_a_recorded_collapse_is_what_its_updates_do_to_entropy():
    """56 % of its groups are all right too, which is less far from where that counts."""
    found = read_health(run("diagnosed"), {"learner.lr": 3e-4})
    assert (
        found.cause.startswith("85% of the update's effect on entropy")
        and found.remedy == "learner.lr=0.00015"
    )
    assert read_health(run("diagnosed")[:30]).kind == "healthy"


def test_levels_are_relative_to_the_run_itself():
    for scale in (0.1, 10.0):
        scaled = [s | {"entropy/mean": s["entropy/mean"] * scale} for s in run("collapsing")]
        assert read_health(scaled).kind == "collapsing"


def test_a_reward_that_never_rose_is_no_gain_and_one_that_stopped_is_saturated():
    flat = [{"entropy/mean": 1.0, "correct/mean": 0.2 - i / 1000} for i in range(60)]
    assert read_health(flat).kind == "no gain" and read_health(flat[:30]).kind == "healthy"
    spent = [
        {"entropy/mean": max(0.3, 1 - i / 20), "correct/mean": min(0.6, 0.2 + i / 50)} for i in range(60)
    ]
    assert read_health(spent).kind == "saturated"


def test_a_reward_that_fell_from_its_best_is_declining_and_one_that_shakes_is_not():
    shake = [0.02 * (-1) ** i for i in range(100)]
    rise = lambda i: 0.3 + 0.01 * min(i, 50) - 0.008 * max(0, i - 50)
    risen = [{"entropy/mean": 1.0, "correct/mean": rise(i) + shake[i]} for i in range(100)]
    assert read_health(risen[:50]).kind == "healthy"
    found = read_health(risen, {"learner.lr": 0.01})
    assert found.kind == "declining" and "best 0.7" in found.words and found.remedy == "learner.lr=0.005"
    level = [s | {"correct/mean": 0.3 + 0.01 * min(i, 50) + shake[i]} for i, s in enumerate(risen)]
    assert all(read_health(level[:n]).kind == "healthy" for n in range(40, 101))


def test_entropy_that_went_in_one_jump_is_not_healthy():
    spent = [{"entropy/mean": 1.0 if i < 6 else 0.02, "correct/mean": 0.2 + i / 200} for i in range(60)]
    found = read_health(spent)
    assert found.kind == "collapsing" and "nearly exhausted" in found.words and found.remedy


def test_a_policy_without_entropy_from_its_first_step_is_collapsing():
    """As after a warm start gone too far, or at temperature 0.01."""
    frozen = [{"step": i, "entropy/mean": 0.0, "correct/mean": 0.3} for i in range(60)]
    assert read_health(frozen).kind == "collapsing" and read_health(frozen).remedy
    thawed = [s | {"entropy/mean": max(0, i - 30) / 10} for i, s in enumerate(frozen)]
    assert all(read_health(thawed[:n]).kind == "collapsing" for n in range(15, 61))


@pytest.mark.parametrize("start", [0.0, 5e-324, 1e-310, 1e-9])
@pytest.mark.parametrize("later", [0.0, 5e-324, 0.5])
def test_no_entropy_however_small_keeps_a_run_from_being_read(start, later):
    steps = [{"step": i, "entropy/mean": start if i < 30 else later, "correct/mean": 0.3} for i in range(60)]
    assert all(read_health(steps[:n]).line() for n in range(15, 61))
    assert last_words(steps)


def test_a_flat_reward_is_told_from_a_rising_one_by_its_noise_and_called_no_more_than_flat():
    shake = [0.03 * (-1) ** i for i in range(60)]
    flat = [{"entropy/mean": 1.0, "correct/mean": 0.70 + shake[i]} for i in range(60)]
    flat[0]["correct/mean"] = 0.65  # a low first step is no gain of what follows
    found = read_health(flat)
    assert found.kind == "no gain" and found.cause == "no single sign" and not found.remedy
    assert "too hard" not in found.line() and "try" not in found.line()
    rising = [s | {"correct/mean": s["correct/mean"] + i / 500} for i, s in enumerate(flat)]
    assert read_health(rising).kind == "healthy"


def test_a_learning_rate_that_destroyed_the_policy_is_not_told_to_write_longer_responses():
    found = read_health(run("gone"), {"learner.lr": 0.01, "rollout.max_tokens": 24})
    assert found.remedy == "learner.lr=0.001"
    assert found.cause.startswith("step 1 moved the policy by 0.879 nats (update/kl)")
    calm = [s | {"update/kl": 0.01} for s in run("gone")]
    assert read_health(calm, {"rollout.max_tokens": 24}).remedy == "rollout.max_tokens=48"


@pytest.mark.parametrize("name", ["collapsing", "exploding", "no_signal", "gone", "saturated"])
def test_every_recorded_run_is_told_one_setting(name):
    remedy = read_health(run(name)).remedy
    assert remedy and " or " not in remedy and " and " not in remedy


CLIP = {"fn": "clip", "low": 0.2, "high": 0.2}
TWO = {"learner.updates_per_rollout": 2, "learner.lr": 0.002}


@pytest.mark.parametrize(
    ("has", "remedy"),
    [
        (TWO | {"objective": {"surrogate": CLIP}}, "objective.surrogate.high=0.28"),
        (TWO | {"objective": {"surrogate": CLIP | {"high": 0.28}}}, "learner.lr=0.001"),  # dapo
        (TWO | {"objective": {"surrogate": {"fn": "cispo", "cap": 5.0}}}, "learner.lr=0.001"),
        (TWO | {"objective": {"surrogate": {"fn": "reinforce"}}}, "learner.lr=0.001"),  # kl_cov
        (
            TWO | {"objective": {"surrogate": CLIP | {"high": 4e-4}, "ratio": {"fn": "sequence"}}},
            "learner.lr=0.001",
        ),
        (
            {"learner.updates_per_rollout": 1, "objective": {"surrogate": CLIP}},
            "half of learner.lr",
        ),  # never acts
        ({}, "half of learner.lr"),
    ],
)
def test_a_bound_is_advised_only_where_there_is_one_that_acts_and_is_tighter(has, remedy):
    decay = [{"entropy/mean": math.exp(-i / 50), "correct/mean": 0.3} for i in range(60)]
    assert read_health([s | {"quadrants/lowering": 0.7} for s in decay], has).remedy == remedy


@pytest.mark.parametrize(
    ("sign", "has", "remedy"),
    [
        ({"update/kl": 0.02}, {"learner.updates_per_rollout": 2}, "learner.updates_per_rollout=1"),
        ({"update/kl": 0.02}, {"learner.updates_per_rollout": 1, "learner.lr": 0.004}, "learner.lr=0.002"),
        ({"mismatch/kl": 0.02}, {}, "objective.correction={fn: truncated_importance}"),
        (
            {"mismatch/kl": 0.02},
            {"driver.max_lag": 2, "objective": {"correction": {"fn": "m"}}},
            "driver.max_lag=0",
        ),
        (
            {"mismatch/kl": 0.02},
            {"model.dtype": "bfloat16", "objective": {"correction": {"fn": "m"}}},
            "model.dtype=float32",
        ),
    ],
)
def test_the_next_setting_is_advised_where_a_run_has_the_first(sign, has, remedy):
    decay = [{"entropy/mean": math.exp(-i / 50), "correct/mean": 0.3} for i in range(60)]
    assert read_health([s | sign for s in decay], has).remedy == remedy


def test_no_setting_is_advised_that_a_controller_moves():
    decay = [{"entropy/mean": math.exp(-i / 50), "correct/mean": 0.3, "update/kl": 0.02} for i in range(60)]
    has = {"learner.updates_per_rollout": 1, "learner.lr": 0.004}
    assert read_health(decay, has).remedy == "learner.lr=0.002"
    assert read_health(decay, has | {"control": ["learner.lr"]}).remedy == ""
    both = has | {"learner.updates_per_rollout": 2, "control": ["learner.updates_per_rollout"]}
    assert read_health(decay, both).remedy == "learner.lr=0.002"


def test_half_an_entropy_bonus_is_advised_where_there_is_one():
    paid = {"objective": {"penalties": [{"fn": "kl"}, {"fn": "entropy_bonus", "coef": 0.3}]}}
    found = read_health(run("exploding"), paid)
    assert found.remedy == "half of the coef of entropy_bonus in objective.penalties"
    assert (
        read_health(run("exploding"), {"objective": {"penalties": [{"fn": "kl"}]}}).remedy
        == "half of learner.lr"
    )


def test_what_a_run_has_is_told_by_the_names_that_are_asked_for():
    config = configured("objective=dapo", "learner.lr=2.0e-3", "control=lr_cosine")
    has = advised_settings(config, build_parts(config).controllers)
    assert has["control"] == ["learner.lr"]
    assert has["objective"]["surrogate"]["high"] == 0.28 and has["learner.lr"] == 2e-3
    assert {"driver.max_lag", "model.dtype", "sampler.temperature", "rollout.max_tokens"} < has.keys()


def test_too_short_a_run_gets_no_verdict_and_gaps_do_no_harm():
    steps = run("healthy")
    assert read_health(steps[: MINIMUM_STEPS - 1]) is None and read_health([]) is None
    assert "none before" in last_words(steps[:3]) and last_words(steps).startswith("health: healthy")
    gaps = [s | {"correct/mean": None} if i % 3 else s for i, s in enumerate(steps)]
    assert read_health([*gaps, {"step": 61, "entropy/mean": None}]).kind == "healthy"


def test_trend_of_a_line_and_of_nothing():
    assert fit_slope([1.0, 3.0, 5.0]) == (2.0, 0.0)
    assert fit_slope([1.0, 2.0]) == (0.0, math.inf)


def test_a_change_is_announced_once_it_holds():
    events, said = [], []
    tracker = HealthTracker(
        lambda kind, **fields: events.append((kind, fields["step"], fields["health"])), said.append
    )
    steps = run("collapsing")
    for s in steps:
        tracker.log(s["step"], s)
    assert [(kind, name) for kind, _, name in events] == [("health", "healthy"), ("health", "collapsing")]
    fallen = lambda i: read_health(steps[: i + 1]).kind == "collapsing"
    first = next(i for i in range(MINIMUM_STEPS, len(steps)) if fallen(i))
    assert events[0][1] == MINIMUM_STEPS and events[1][1] == steps[first]["step"] + STEADY - 1
    assert len(said) == 2 and said[1].startswith(f"step {events[1][1]}: collapsing")
    resumed = HealthTracker(lambda kind, **fields: None, said.append, steps)
    resumed.log(50, steps[49])
    assert len(resumed.history) == 50


def test_a_resumed_run_does_not_announce_its_verdict_again():
    """Wherever it was cut, what is announced is what an unbroken run announces."""
    steps = run("collapsing")

    def announced(pieces):
        said, state = [], {}
        for piece in pieces:
            tracker = HealthTracker(
                lambda kind, **f: said.append((f["step"], f["health"])), str, steps[: piece[0]]
            )
            if state:
                tracker.restore(json.loads(json.dumps(state)))
            for s in steps[slice(*piece)]:
                tracker.log(s["step"], s)
            state = tracker.state()
        return said

    whole = announced([(0, 90)])
    assert [name for _, name in whole] == ["healthy", "collapsing"]
    change = whole[1][0]
    for cut in (20, change - 2, change, change + 1):
        assert announced([(0, cut), (cut, 90)]) == whole


def test_the_last_word_holds_prediction_and_law_against_what_happened():
    steps = [
        s | {"law/a": 0.3, "law/ceiling": 0.61, "law/low": 0.5, "law/high": 0.7, "law/r2": 0.8}
        for s in run("healthy")
    ]
    assert "none before 4 steps" in last_words(steps) and "early warning" in last_words(steps)
    for i in range(6):  # the last one is foretold wrongly
        foretold = {
            f"entropy/predicted_change_{form}": -float(i + 1) for form in ("exact", "natural", "proxy")
        }
        steps[i] |= foretold | {"entropy/realised_change": -0.01 * (i + 1) if i < 5 else 0.09}
    said = last_words(steps)
    assert "in 5 of 6 rescored steps" in said and "each time: 5)" in said and "by -0.0100 nats a step" in said
    assert "0.00011 times" in said  # 0.01 (1 + 4 + 9 + 16 + 25 - 54) / 91
    assert (
        "exact +0.14" in said
        and "is 0.610 at entropy 0, 95 % interval for independent steps 0.500 to 0.700" in said
    )
    assert "law: off, a controller acts" in last_words([*steps, {"step": 61, "control/c": 0.1}])
    filtered = {"objective": {"keep": {"fn": "informative"}}}
    assert "objective.keep" in last_words([{"step": 1}], filtered)
    assert "not fitted" in last_words([{"step": 1, "groups/dropped": 2.0}], {"objective": {}}), "two failed"
    assert "10 steps whose entropies differ" in last_words([{"step": 1}])
    against = last_words([{"step": 30, "law/ceiling": 1.2, "law/a": -0.2, "law/r2": 0.1}])
    assert "correct rises with entropy (a -0.200" in against and "1.2" not in against
    assert "not fitted" in last_words([]) and "health: none" in last_words([])


def test_the_last_words_tell_where_controllers_stand():
    pi = {"knob": "learner.lr", "fn": "pi", "signal": "entropy/mean"} | {
        "target": 0.5,
        "gain": 1.0,
        "integral": 0.0,
        "low": 0.0,
        "high": 1.0,
    }
    linear = {"knob": "sampler.temperature", "fn": "linear", "start": 1.0, "end": 0.5, "steps": 6}
    steps = [
        {"step": i, "entropy/mean": 0.4, "control/a": min(1.0, i / 4), "control/b": 1 - i / 10}
        for i in range(1, 7)
    ]
    assert moved_settings(build_controllers({"a": pi, "b": linear}), steps) == [
        "control: a left learner.lr at 1, at a limit in 3 of 6 steps; "
        "entropy/mean is 0.4 over the last 5 steps, its target 0.5",
        "control: b left sampler.temperature at 0.4",
    ]
    assert moved_settings(build_controllers({"a": pi}), []) == []
