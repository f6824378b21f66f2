"""What a row cannot do is said before a run: refused, inert or to beware of; and how often a rule acted."""

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from entroray.binding import declare
from entroray.cli import objectives
from entroray.errors import ConfigError
from entroray.objective import active_tokens, activity_inside, build_objective, penalties, ratio
from entroray.objective.activity import counted_functions
from entroray.objective.compatibility import Schedule, check_combinations, remarks
from entroray.train.failure_limits import IdleFunctions
from entroray.types import Group, Tokens
from entroray.wiring.compose import load_config
from entroray.wiring.objective import check_objective
from entroray.wiring.parts import build_parts
from tests.cases import ROWS, tokens
from tests.composed import configured

PLAIN = Schedule(updates=2, max_lag=0)
BONUS = ("pi", "objective.penalties.0.coef")
SEQUENCE = ROWS["gspo"]
RAW, FILTERED = ROWS["reinforce"], {"keep": {"fn": "informative"}}
BY_TOKEN = SEQUENCE | {"shapes": [{"fn": "add_entropy"}]}
CLIPPED = ROWS["kl_cov"] | {"surrogate": {"fn": "clip"}}
MASKED = {"correction": {"fn": "sequence_mask"}}


def informative(group: Group) -> bool:
    """A rule of a user's own, called as one of ours."""
    return True


def reinforce(t: Tokens, ratio: Tensor) -> Tensor:
    """A surrogate of a user's own, called as one of ours."""
    return -ratio.clamp(max=1.0) * t.advantages


@declare(per_rollout=True, shares_gradient=True)
def own_sequence(t: Tokens) -> Tensor:
    """A rollout-level ratio of a user's own."""
    return ratio.sequence(t)


@declare(anchor="sampler")
def own_anchor(t: Tokens) -> Tensor:
    return ratio.sampler(t)


@declare(restrains=True, reads_selected=True)
def own_restraint(t: Tokens) -> Tensor:
    return penalties.kl_cov(t)


@declare(by_token=lambda share: share > 0, steers_entropy=lambda share: share > 0)
def own_shape(t: Tokens, *, share: float = 0.5) -> Tensor:
    return t.advantages


@declare(drops_uniform_groups=True)
def own_keep(group: Group) -> bool:
    return True


def own(name: str, **settings: float) -> dict:
    return {"fn": f"{__name__}.{name}", **settings}


@pytest.mark.parametrize(
    ("ours", "change", "remedy"),
    [
        (BY_TOKEN, {"ratio": own("own_sequence")}, "shape .*: .*ratio `sequence_token`"),
        (BY_TOKEN, {"shapes": [own("own_shape")]}, "shape .*: .*ratio `sequence_token`"),
        (SEQUENCE | {"aggregate": {"fn": "token"}}, {"ratio": own("own_sequence")}, "`rollout_mean`"),
        (CLIPPED, {"surrogate": own("reinforce")}, "penalty .*: .*surrogate `reinforce`"),
        (CLIPPED, {"penalties": [own("own_restraint")]}, "penalty .*: .*surrogate `reinforce`"),
        (ROWS["dppo"] | {"correction": {"fn": "icepop"}}, {"ratio": own("own_anchor")}, "correction `none`"),
        (ROWS["nsr"] | {"keep": {"fn": "informative"}}, {"keep": own("own_keep")}, "keep `always`"),
        (ROWS["entropic_pi"], {"shapes": [own("own_shape")]}, r"shape .*control\.pi .*: .*control\.pi"),
    ],
)
def test_a_function_of_ones_own_is_guarded_as_ours_is(ours, change, remedy):
    """By what it declares; each `ours` is refused, and with the user's function in its place too."""
    for row in (ours, ours | change):
        with pytest.raises(ConfigError, match=remedy):
            check_combinations(build_objective(row, [__name__]), replace(PLAIN, by_entropy=(BONUS,)))


def test_a_trait_may_depend_on_the_settings():
    row = SEQUENCE | {"shapes": [own("own_shape", share=0.0)]}
    check_combinations(build_objective(row, [__name__]), replace(PLAIN, by_entropy=(BONUS,)))


def said(row, kind, **schedule) -> str:
    return " / ".join(
        r.text for r in remarks(build_objective(row), replace(PLAIN, **schedule)) if r.kind == kind
    )


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_allowed_as_it_is_shipped(name):
    check_combinations(build_objective(ROWS[name]), PLAIN)


@pytest.mark.parametrize(
    "row, schedule, message",
    [
        (ROWS["nsr"] | {"keep": {"fn": "informative"}}, {}, r"keep `informative` .*\bwrong\b.*keep `always`"),
        (
            ROWS["entrocraft_band"] | {"keep": {"fn": "informative"}},
            {},
            r"keep `informative` .*\bwrong\b.*keep `always`",
        ),
        (ROWS["psr"] | {"keep": {"fn": "informative"}}, {}, r"keep `informative` .*\bright\b.*keep `always`"),
        (ROWS["nsr"], {"second": True}, r"rollout\.second .*rollout\.second\.factor=1"),
        (ROWS["w_reinforce"], {"second": True}, r"rollout\.second .*rollout\.second\.factor=1"),
        (ROWS["nsr"], {"replay": True}, r"rollout\.replay .*rollout\.replay\.tokens=0"),
        (
            RAW | {"shapes": [{"fn": "by_sign", "positive": 0.0}]},
            {"second": True},
            r"rollout\.second\.factor=1",
        ),  # NSR
        (
            RAW | {"shapes": [{"fn": "by_sign", "positive": 0.0}]},
            {"replay": True},
            r"rollout\.replay\.tokens=0",
        ),
        (RAW | {"shapes": [{"fn": "by_sign", "positive": 0.1}]} | FILTERED, {}, "keep `always`"),
        (RAW | {"estimator": {"fn": "raw", "baseline": 1.0}} | FILTERED, {}, "keep `always`"),
        (
            ROWS["dppo"] | {"correction": {"fn": "icepop"}},
            {},
            "ratio `sampler` .*correction `icepop` .*correction `none`",
        ),
        (ROWS["kl_cov"] | {"surrogate": {"fn": "clip"}}, {}, "surrogate `clip` .*surrogate `reinforce`"),
        (SEQUENCE | {"shapes": [{"fn": "add_entropy"}]}, {}, "shape `add_entropy` .*ratio `sequence_token`"),
        (
            SEQUENCE | {"shapes": [{"fn": "lean", "above": 0.5}]},
            {},
            "shape `lean` .*ratio `sequence_token`",
        ),
        (
            ROWS["entrocraft_band"],
            {"by_entropy": (BONUS,)},
            r"shape `entropy_band` .*control\.pi .*objective\.penalties\.0\.coef",
        ),
        (ROWS["entropic_pi"], {"by_entropy": (BONUS,)}, r"shape `lean` .*control\.pi\b"),
        (SEQUENCE | {"aggregate": {"fn": "token"}}, {}, "aggregate `token` .*aggregate `rollout_mean`"),
        (ROWS["grpo"] | {"select": {"fn": "top_entropy"}}, {}, "select `top_entropy` .*scale `selected`"),
    ],
)
def test_what_is_wrong_is_refused_with_a_way_out(row, schedule, message):
    with pytest.raises(ConfigError, match=message):
        check_combinations(build_objective(row), replace(PLAIN, **schedule))


@pytest.mark.parametrize("row", ["entrocraft_band", "entropic_pi"])
def test_a_controller_of_the_entropy_may_move_the_law_of_the_row_itself(row):
    inside = ("outer", "objective.shapes.0.low")
    assert "control." not in said(ROWS[row], "refused", by_entropy=(inside,))
    assert "control.pi" in said(ROWS[row], "refused", by_entropy=(inside, BONUS))


@pytest.mark.parametrize("control", ["entropy_pi", "temperature_band"])
def test_two_laws_of_entropy_are_refused_before_the_run(control):
    config = configured("objective=entrocraft_band", f"control={control}")
    with pytest.raises(ConfigError, match=r"shape `entropy_band` .*control\.(entropy|temperature)\b"):
        check_objective(config, build_parts(config))
    config = configured("objective=entrocraft_band")
    check_objective(config, build_parts(config))


def test_two_faults_are_told_at_once():
    with pytest.raises(ConfigError, match=r"keep `always`.*select `top_entropy`.*scale `selected`"):
        check_combinations(
            build_objective(ROWS["nsr"] | {"keep": {"fn": "informative"}, "select": {"fn": "top_entropy"}}),
            PLAIN,
        )


@pytest.mark.parametrize(
    "row, schedule, kind, text",
    [
        (ROWS["w_reinforce"], {"replay": True}, "beware", r"rollout\.replay "),
        (RAW | FILTERED, {}, "beware", r"keep `informative` .*\bwrong\b"),
        (RAW, {"second": True}, "beware", r"rollout\.second "),
        (RAW, {"replay": True}, "beware", r"rollout\.replay "),
        (ROWS["reinforce_pp"], {"second": True}, "beware", r"rollout\.second "),
        (ROWS["self_certainty"], {"second": True}, "beware", r"rollout\.second "),
        (ROWS["psr"], {"retire": 0.9}, "beware", r"rollout\.prompts\.retire .*0\.9\b.*\bright\b"),
        (ROWS["psr"], {"highest": 0.8}, "beware", r"rollout\.prompts\.band .*0\.8\b.*\bright\b"),
        (ROWS["nsr"], {"lowest": 0.2}, "beware", r"rollout\.prompts\.band .*0\.2\b.*\bwrong\b"),
        (ROWS["dapo"], {"updates": 1}, "inert", r"`clip` .*\bone\b.*r is 1"),
        (ROWS["kl_cov"], {"updates": 1}, "inert", r"`kl_cov` .*\bone\b.*r is 1"),
        (ROWS["kl_cov"], {}, "inert", r"`kl_cov` .*\bfirst\b.*r is 1"),
        (ROWS["gmpo"], {"updates": 1}, "inert", r"`clipped_geometric` .*\bone\b.*r is 1"),
        (ROWS["adaptive_entropy"], {}, "inert", r"penalty .*\bcoef\b.*\b0\b"),
        (
            ROWS["w_reinforce"] | {"shapes": [{"fn": "by_sign", "positive": 1.0}]},
            {},
            "inert",
            r"`by_sign` .*positive=1\.0, negative=1\.0",
        ),
        (ROWS["clip_cov"] | {"estimator": {"fn": "center"}}, {}, "beware", "band` .*estimator `center`"),
        (ROWS["forking_tokens"], {}, "beware", "kept_tokens"),
        (ROWS["grpo"], {"max_lag": 1}, "beware", r"driver\.max_lag=1 .*correction `none`"),
        (ROWS["grpo"] | MASKED, {"shaped": True}, "beware", "`sequence_mask` .*`truncated_importance`"),
        (ROWS["grpo"] | MASKED, {"second": True}, "beware", "`sequence_mask` .*`truncated_importance`"),
        (ROWS["grpo"] | MASKED, {"replay": True}, "beware", "`sequence_mask` .*`truncated_importance`"),
        (ROWS["grpo"], {"siblings": True}, "beware", r"'objective\.estimator=\{fn: subtree\}' [^~]*$"),
        (ROWS["qae"], {"siblings": True}, "beware", r"subtree\}' ~objective\.estimator\.k "),
        (ROWS["aspo"] | {"select": {"fn": "everything"}}, {}, "beware", "select `everything`"),
    ],
)
def test_what_has_no_effect_is_told(row, schedule, kind, text):
    assert re.search(text, said(row, kind, **schedule))


@pytest.mark.parametrize("name", ["nsr", "reinforce", "reinforce_pp"])
def test_rows_that_compare_no_responses_may_have_siblings(name):
    assert "subtree" not in said(ROWS[name], "beware", siblings=True)
    row = ROWS["grpo"] | {"estimator": {"fn": "subtree"}}
    assert said(row, "beware", siblings=True) == "" == said(ROWS["grpo"], "beware")


@pytest.mark.parametrize(
    "name, kinds", [("nsr", "retire"), ("psr", "second lowest"), ("grpo", "second retire")]
)
def test_what_a_row_learns_nothing_from_may_be_taken_away(name, kinds):
    assert said(ROWS[name], "beware", **{kind: 0.9 for kind in kinds.split()}) == ""


def test_a_mask_of_whole_responses_is_fit_for_what_the_policy_drew_itself():
    assert said(ROWS["grpo"] | MASKED, "beware") == ""
    wide = {"correction": {"fn": "sequence_mask", "low": 0.5, "high": 2.0}}
    assert said(ROWS["grpo"] | wide, "beware", shaped=True) == ""


def test_a_baseline_at_the_reward_of_wrong_answers_leaves_nothing_of_groups_all_wrong():
    plain = RAW | {"estimator": {"fn": "raw"}}
    assert said(plain, "beware", second=True) == ""
    signed = RAW | {"estimator": {"fn": "raw", "span": "-1..1"}}
    assert "learns from too" in said(signed, "beware", second=True)


def test_what_acts_is_not_called_inert():
    assert said(ROWS["dapo"], "inert") == "" == said(ROWS["dppo"], "inert", updates=1)
    assert said(ROWS["clip_cov"], "inert", updates=1).startswith("`clip`"), "its draw acts on policy"


def test_a_live_shape_stands_last():
    with pytest.raises(ConfigError, match=r"^objective\.shapes: `add_entropy` [^`]*$"):
        build_objective(ROWS["grpo"] | {"shapes": [{"fn": "add_entropy"}, {"fn": "by_sign"}]})


def test_rules_count_the_tokens_they_touched():
    row = build_objective(
        ROWS["forking_tokens"] | {"shapes": [{"fn": "by_sign"}], "correction": {"fn": "truncated_importance"}}
    )
    assert active_tokens(row, tokens()) == {
        "by_sign": int((tokens().advantages > 0).sum()),
        "top_entropy": 4,
        "selected": 20,
        "truncated_importance": 24,
    }
    assert active_tokens(build_objective(ROWS["grpo"]), tokens()) == {}


def test_rules_inside_the_update_count_too():
    o = build_objective(ROWS["kl_cov"])
    t = o.credit(tokens())
    assert activity_inside(o, t)[1] == {"kl_cov": 1}
    still = o.credit(tokens(drift=0.0))
    assert activity_inside(o, still)[1] == {"kl_cov": 0}, "inert at r = 1"
    grpo = build_objective(ROWS["grpo"])
    r = (t.logprobs - t.old_logprobs).exp()
    clipped = t.mask & torch.where(t.advantages > 0, r > 1.2, (r < 0.8) & (t.advantages < 0))
    assert activity_inside(grpo, grpo.credit(tokens()))[1] == {"clip": int(clipped.sum())}


def test_a_rule_that_touches_nothing_is_named_once_until_it_acts():
    idle = IdleFunctions(patience=3)
    step = lambda n: idle.observe({"objective/clip_tokens": n})
    assert [step(n) for n in (0, 0, 0, 0)] == [[], [], ["objective/clip_tokens"], []]
    silent = lambda: idle.observe({"objective/silent_half_tokens": 0})
    assert [silent() for _ in range(3)][-1] == ["objective/silent_half_tokens"], "whatever its name"
    assert [step(n) for n in (5, 0, 0, 0)] == [[], [], [], ["objective/clip_tokens"]]


def test_the_command_shows_the_equation_and_refuses(capsys):
    asked = ["objective=dapo", "objective.surrogate.high=0.3", "learner.updates_per_rollout=1"]
    assert objectives.main(["show", *asked]) == 0
    text = capsys.readouterr().out
    for part in (
        "clip(r, 0.8, 1.3)",
        "clip.high = 0.3 (a distance of the ratio from 1, above 0)",
        "inert        `clip` ",
    ):
        assert part in text
    assert objectives.main(["show", "objective=nsr", "objective.keep.fn=informative"]) == 2
    assert "refused      keep `informative` " in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"^objectives .*`table`.*`show .*\['shwo'\]"):
        objectives.main(["shwo"])


def test_the_command_lists_every_row_and_function(capsys):
    assert objectives.main([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in ROWS) and "covariance_band" in text and "icepop" in text


def test_settings_name_packages_of_ones_own():
    config, _ = load_config(["packages=[my_lab]"])
    assert config.packages == ["my_lab"]


def test_a_function_of_a_user_is_not_taken_for_ours_of_the_same_name():
    own = build_objective(ROWS["nsr"] | {"keep": {"fn": f"{__name__}.informative"}}, packages=[__name__])
    check_combinations(own, PLAIN)
    clipped = build_objective(
        ROWS["grpo"] | {"surrogate": {"fn": f"{__name__}.reinforce"}}, packages=[__name__]
    )
    assert counted_functions(clipped) == ["reinforce"]
    assert activity_inside(clipped, clipped.credit(tokens()))[1]["reinforce"] > 0
