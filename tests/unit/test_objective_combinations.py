"""What is refused, inert or doubtful about a row, and how many tokens its rules touch."""

from typing import Any

import pytest

from entroray.cli import objectives
from entroray.errors import ConfigError
from entroray.objective import build, combinations
from entroray.objective.touched import Untouched, touched
from tests.cases import ROWS, tokens


def notes(name: str, updates: int = 2, **change: Any) -> str:
    return "\n".join(objectives.notes(build(ROWS[name] | change), updates))


@pytest.mark.parametrize("name", sorted(set(ROWS) - {"forking_tokens", "clip_b"}))
def test_shipped_rows_have_nothing_to_say_with_two_updates(name: str) -> None:
    assert notes(name) == ""
    combinations.refuse(build(ROWS[name]))


DROP = [{"fn": "selected", "inside": 0.0, "outside": 1.0}]
SAID = [
    ("nsr", {"keep": {"fn": "informative"}}, "refused:  keep `informative` sends all-wrong groups back"),
    ("dapo", {"scales": DROP}, "refused:  scale `selected` with inside 0 drops"),
    (
        "psr",
        {"rewards": [{"fn": "soft_overlong"}]},
        "inert:    estimator `sign` reads `correct`: soft_overlong",
    ),
    ("clip_cov", {"scales": []}, "inert:    nothing reads what select `covariance_band` selects"),
    ("grpo", {"penalties": [{"fn": "kl", "coef": 0}]}, "inert:    `kl` with coef 0 changes nothing"),
    ("clip_cov", {"estimator": {"fn": "center"}}, "doubtful: the bounds of select `covariance_band`"),
    ("forking_tokens", {}, "doubtful: denominator `kept_tokens`"),
]


@pytest.mark.parametrize(("name", "change", "said"), SAID)
def test_what_a_combination_does_is_said(name: str, change: dict[str, Any], said: str) -> None:
    assert said in notes(name, **change)


ONE = [("grpo", 1), ("cispo", 1), ("kl_cov", 1), ("rloo", 0), ("psr", 1)]


@pytest.mark.parametrize(("name", "count"), ONE)
def test_what_needs_a_second_update_is_inert_with_one(name: str, count: int) -> None:
    assert notes(name, updates=1).count("so the ratio is 1") == count


def test_a_refused_row_never_starts() -> None:
    with pytest.raises(ConfigError, match="choose keep `always`"):
        combinations.refuse(build(ROWS["w_reinforce"] | {"keep": {"fn": "informative"}}))


def test_a_function_of_ones_own_may_read_the_selection() -> None:
    own = {"scales": [{"fn": "tests.cases.half"}], "select": {"fn": "top_entropy"}}
    row = build(ROWS["grpo"] | own, packages=["tests"])
    assert not list(combinations.inert(row, updates=2))


def test_rules_are_counted() -> None:
    row = ROWS["rare_and_confident"] | {"correction": {"fn": "truncated_importance"}}
    t = tokens()
    counts = touched(build(row), t)
    positive = int((t.mask & (t.advantages > 0)).sum())
    assert counts == {"by_sign": positive, "covariance_band": 1, "selected": 1, "truncated_importance": 24}
    assert touched(build(ROWS["grpo"]), t) == {}


def test_a_rule_that_touches_nothing_is_named_once_a_spell() -> None:
    rule = Untouched(patience=2)
    said = [rule.note({"a": a, "b": 1}) for a in (0, 0, 0, 5, 0, 0)]
    assert said == [[], ["a"], [], [], [], ["a"]]


def test_the_command_lists_rows_and_shows_an_equation(capsys: pytest.CaptureFixture[str]) -> None:
    assert objectives.main([]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in ROWS) and "covariance_band" in listed
    assert objectives.main(["show", "objective=kl_cov", "learner.updates_per_rollout=1"]) == 0
    shown = capsys.readouterr().out
    assert "penalties P" in shown and "inert:    penalty `kl_cov`" in shown
