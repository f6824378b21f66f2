"""Names and settings are checked at the start; a run's header tells the numbers in effect."""

from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import yaml

from entroray.binding import Traits, bind, declare, keyword_settings, slot_functions, traits
from entroray.cli import objectives
from entroray.errors import ConfigError
from entroray.formula import describe_formula
from entroray.objective import __file__ as objective_file
from entroray.objective import build_objective, surrogate
from entroray.objective.objective import SLOTS
from tests.cases import ROWS

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf/objective"
GRPO = ROWS["grpo"]


def flat(t, ratio, *, steepness: float, ceiling=3, **_rest):
    """A user's own surrogate, with no formula to show."""
    return ratio * 0


def of_tokens_alone(t):
    return t.entropy


MINE = __name__.partition(".")[0]
HERE = f"{__name__}.flat"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"surogate": {"fn": "clip"}}, "^objective .*`surogate`: .*`surrogate`"),
        (
            {"surrogate": {"fn": "clipp"}},
            r"objective\.surrogate .*`clipp`: .*`clip`.*cispo, clip, clip_by",
        ),
        ({"surrogate": {"fn": "torch"}}, r"objective\.surrogate .*`torch`: .*cispo"),
        ({"surrogate": {"fn": "AboveOne"}}, r"objective\.surrogate .*`AboveOne`: .*cispo"),
        (
            {"surrogate": {"fn": "clip", "hihg": 0.3}},
            r"objective\.surrogate: `clip` .*`hihg`: .*`high`",
        ),
        ({"surrogate": {"fn": "reinforce", "low": 0.3}}, r"objective\.surrogate: `reinforce` .*`low`: "),
        ({"surrogate": {"fn": "clip", "high": "0.3"}}, r"`clip\.high` .*'0\.3'$"),
        ({"surrogate": {"fn": "clip", "high": True}}, r"`clip\.high` .*True$"),
        ({"surrogate": {"fn": "clip", "low": 20}}, r"`clip\.low` .*\(0, 1\].*20$"),
        ({"surrogate": {"fn": "clip", "low": None}}, r"`clip\.low` .*None$"),
        ({"surrogate": {"fn": "clip", "dual": 0.5}}, r"`clip\.dual` .*1 .*null.*0\.5$"),
        (
            {"surrogate": {"fn": "cispo", "cap_mode": "eps"}},
            r"`cispo\.cap_mode` .*absolute, one_plus_eps.*'eps'$",
        ),
        ({"surrogate": {"fn": "cispo", "cap": float("nan")}}, r"`cispo\.cap` .*nan$"),
        ({"surrogate": "clip"}, r"objective\.surrogate .*\{fn: name.*'clip'$"),
        ({"surrogate": {"low": 0.2}}, r"objective\.surrogate .*\{fn: name.*\{'low': 0\.2\}$"),
        ({"surrogate": None}, r"^objective\.surrogate [^`{]*: .*balanced_clip"),
        ({"denominator": {"fn": "constant"}}, r"objective\.denominator: `constant` .*`length`,"),
        ({"penalties": {"fn": "kl"}}, r"objective\.penalties .*\{fn: \.\.\.\}.*\{'fn': 'kl'\}$"),
        ({"penalties": [{"fn": "entropy"}]}, r"objective\.penalties .*`entropy`: .*`entropy_bonus`"),
        ({"correction": [{"fn": "none"}]}, r"objective\.correction .*\{fn: name.*\[\{'fn': 'none'\}\]$"),
        ({"surrogate": {"fn": "os.system"}}, r"`os\.system` .* entroray: .*packages=\[os\]"),
        ({"surrogate": {"fn": "entroray_evil.f"}}, r"`entroray_evil\.f` .*packages=\[entroray_evil\]"),
        (
            {"surrogate": {"fn": "entroray.objective.shutil.rmtree"}},
            r"`entroray\.objective\.shutil\.rmtree` .*PYTHONPATH",
        ),
        ({"surrogate": {"fn": "entroray.binding.partial"}}, r"`entroray\.binding` .*`partial`: "),
        (
            {"surrogate": {"fn": "entroray.objective.surrogate.clap"}},
            r"`entroray\.objective\.surrogate` .*`clap`: .*clip",
        ),
        (
            {"surrogate": {"fn": "entroray.objective.ratio.token"}},
            r"`entroray\.objective\.ratio\.token` .*\(t, ratio\).*`clip`",
        ),
        ({"surrogate": {"fn": HERE, "steepness": 1.0}}, rf"`{HERE}` .*packages=\[{MINE}\]"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        build_objective(GRPO | change)


def test_missing_slots_and_defaults():
    least = {slot: GRPO[slot] for slot in ("estimator", "surrogate", "aggregate", "denominator")}
    assert build_objective(least).describe() == build_objective(GRPO).describe()
    assert (
        build_objective(GRPO | {"keep": None, "rewards": None}).describe() == build_objective(GRPO).describe()
    )
    for slot in least:
        with pytest.raises(ConfigError, match=rf"^objective\.{slot} [^`{{]*: "):
            build_objective({k: v for k, v in least.items() if k != slot})


def test_a_dotted_path_reaches_an_allowed_package():
    spec = {"fn": HERE, "steepness": 1}
    assert bind(surrogate, spec, packages=[MINE]).keywords == {"steepness": 1}
    assert (
        "flat(steepness=1, ceiling=3)"
        in build_objective(GRPO | {"surrogate": spec}, packages=[MINE]).describe()
    )
    own = bind(surrogate, {"fn": "entroray.objective.surrogate.reinforce"})
    assert own.func is surrogate.reinforce
    with pytest.raises(ConfigError, match=r"objective\.surrogate: `flat` .*`steepness`,"):
        bind(surrogate, {"fn": HERE}, packages=[MINE])
    with pytest.raises(ConfigError, match=r"of_tokens_alone` .*\(t, ratio\).*`clip`"):
        bind(surrogate, {"fn": f"{__name__}.of_tokens_alone"}, packages=[MINE])


@pytest.mark.parametrize(
    "name, said",
    {
        "grpo": ["(R - mean(R)) / (std(R) + 1e-06) over the group, Bessel", "rollouts of the update",
                 "-min(r A, clip(r, 0.8, 1.2) A)\n", "1 / (response tokens of the rollout)", "every group"],
        "dr_grpo": ["R - mean(R) over the group\n", "3000 tokens × rollouts of the update, on all ranks"],
        "rloo": ["(R - mean(R)) G / (G - 1)", "-r A"],
        "reinforce": ["R - 0.5, R in 0..1"],
        "dapo": ["clip(r, 0.8, 1.28)", "where A < 0 at most 10 |A|", "0 < #correct < G",
                 "0.5 clip((limit - 0.2 limit - length) / (0.2 limit), -1, 0)", "response tokens of"],
        "cispo": ["-sg[min(r, 5)] A log π; bounds read as absolute"],
        "supervised": ["1, whatever the reward", "-A log π"],
    }.items(),
)  # fmt: skip
def test_describe_tells_the_equation_in_effect(name, said):
    text = build_objective(ROWS[name]).describe()
    assert [part for part in said if part not in text] == []
    assert len(text.splitlines()) <= 12 and all(len(line) <= 120 for line in text.splitlines())


def test_describe_tells_every_added_term():
    text = build_objective(
        GRPO
        | {
            "correction": {"fn": "truncated_importance", "cap": 3.0},
            "penalties": [{"fn": "kl", "coef": 0.01}, {"fn": "entropy_bonus", "coef": 0.002}],
            "shapes": [{"fn": "by_sign", "positive": 0.3}],
            "scales": [{"fn": "selected", "outside": 0.25}],
        }
    ).describe()
    for part in ("min(π_old / π_sampler, 3)", "0.01 (exp(-x) + x - 1)", "-0.002 H, H in nats",
                 "A (0.3 where A > 0, 1 where A < 0)", "1 where selected, 0.25 elsewhere"):  # fmt: skip
        assert part in text


def test_the_two_files_of_the_readme_work(tmp_path, monkeypatch):
    text = (Path(objective_file).parent / "README.md").read_text()
    source, row = (text.split(f"```{kind}\n")[1].split("```")[0] for kind in ("python", "yaml"))
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab/gates.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    shown = build_objective(yaml.safe_load(row), packages=["my_lab"]).describe()
    assert "-r A where |r - 1| <= 0.2, else 0" in shown
    with pytest.raises(ConfigError, match=r"hard_window` .*packages=\[my_lab\]"):
        build_objective(yaml.safe_load(row))


def test_the_readme_lists_every_function_and_row():
    text = (Path(objective_file).parent / "README.md").read_text()
    for slot, module in SLOTS.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| `{slot}`"))
        listed = line.split("|")[-2].replace(" ", "").split(",")
        assert sorted(listed) == sorted(slot_functions(module)), slot
    assert text.split("<!-- rows -->\n")[1].split("\n<!-- /rows -->")[0] == objectives.table()


FUNCTIONS = [(slot, fn) for slot, module in SLOTS.items() for fn in slot_functions(module)]


@pytest.mark.parametrize("slot, fn", FUNCTIONS)
def test_every_formula_shows_every_setting(slot, fn):
    function = slot_functions(SLOTS[slot])[fn]
    floats = {
        name: 0.123 + i / 1000
        for i, name in enumerate(keyword_settings(function))
        if name not in ("cap_mode", "span")
    }
    text = describe_formula(partial(function, **floats))
    assert not text.startswith(f"{fn}("), "its docstring has a line in backticks with the formula"
    for value in floats.values():
        assert any(f"{x:g}" in text for x in (value, 1 - value, 1 + value))


def test_every_trait_is_explained():
    page = (ROOT / "entroray/objective/README.md").read_text()
    assert [f.name for f in fields(Traits) if f"\n| `{f.name}` |" not in page] == []


def test_a_function_says_what_it_is_and_one_that_says_nothing_has_the_defaults():
    def plain(t, *, low=0.2):
        return t

    @declare(needs=["ref_logprobs"], live=True)
    def declared(t):
        return t

    assert traits(plain) == traits(partial(plain, low=0.1)) == Traits()
    assert traits(declared) == traits(partial(declared)) == Traits(frozenset({"ref_logprobs"}), live=True)
    with pytest.raises(TypeError, match="idle_at_on"):
        declare(idle_at_on=True)
    with pytest.raises(AttributeError, match="lives"):
        _ = traits(plain).lives
