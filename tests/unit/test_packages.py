"""One package of a user's own with a function for every slot: bound, called, and refused by its setting."""

import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from entroray.binding import bind
from entroray.config import Config, Part
from entroray.control import Control, build_controllers
from entroray.errors import ConfigError
from entroray.objective import build_objective
from entroray.observe import trackers
from entroray.reward import build_verification
from entroray.reward.tools import Call
from entroray.rollout import reshape
from entroray.types import Prompt
from entroray.wiring import compose, dataset, rollout_plan
from entroray.wiring.parts import build_parts
from tests.cases import outcome
from tests.composed import configured

SOURCE = """
from entroray.data.sources import Question
from entroray.rollout.temperature_rules import TemperatureChoice

def reward(group, *, strength: float): return strength * group.rewards
def keep(group, *, strength: float): return True
def estimator(group, *, strength: float): return strength * group.rewards
def shape(t, *, strength: float): return strength * t.advantages
def select(t, *, strength: float): return t.mask
def scale(t, *, strength: float): return strength + 0 * t.advantages
def correction(t, *, strength: float): return strength + 0 * t.advantages
def ratio(t, *, strength: float): return strength * (t.logprobs - t.old_logprobs).exp()
def surrogate(t, ratio, *, strength: float): return -strength * ratio * t.advantages
def penalty(t, *, strength: float): return strength * t.logprobs
def aggregate(t, *, strength: float): return strength + 0 * t.advantages
def denominator(counts, *, strength: float): return strength * counts.tokens
def rule(entropy, varentropy, *, strength: float): return TemperatureChoice(strength + 0 * entropy)
async def plan(generator, prompt, seeds, draw, *, strength: float):
    return await generator.sample(prompt, seeds, draw)
def schedule(step, *, strength: float): return strength * step
def feedback(signal, state, *, strength: float, low: float, high: float):
    return min(high, max(low, state["level"] + strength * signal)), state
def source(task, *, strength: float): return [Question(task, "q", str(strength), {})], 0
def judge(*, strength: float): return lambda response, prompt: strength * (response == prompt.reference)
def tool(*, strength: float): return lambda call, prompt: strength * float(call)

SEEN = []
class Tracker:
    def log(self, step, metrics): SEEN.append((step, metrics))
    def close(self): SEEN.append("closed")
def tracker(run, *, strength: float):
    SEEN.append((run.name, strength))
    return Tracker()

def no_slot(a, b, c, d, e, f, *, strength: float): return a
"""
FEEDBACK = {"knob": "learner.lr", "signal": "entropy/mean", "low": 0.0, "high": 9.0}


def put_objective(slot: str, *, many: bool = False):
    return lambda c, spec: c.objective.update({slot: [spec] if many else spec})


def put_tool(c: Config, spec: dict) -> None:
    c.rollout.tool.fn, c.rollout.tool.settings = spec["fn"], {k: v for k, v in spec.items() if k != "fn"}


def put_source(c: Config, spec: dict) -> None:
    c.data.source, c.data.settings = spec["fn"], {k: v for k, v in spec.items() if k != "fn"}


SLOTS = {  # function of the package: (setting, how it is set)
    "reward": ("objective.rewards", put_objective("rewards", many=True)),
    "keep": ("objective.keep", put_objective("keep")),
    "estimator": ("objective.estimator", put_objective("estimator")),
    "shape": ("objective.shapes", put_objective("shapes", many=True)),
    "select": ("objective.select", put_objective("select")),
    "scale": ("objective.scales", put_objective("scales", many=True)),
    "correction": ("objective.correction", put_objective("correction")),
    "ratio": ("objective.ratio", put_objective("ratio")),
    "surrogate": ("objective.surrogate", put_objective("surrogate")),
    "penalty": ("objective.penalties", put_objective("penalties", many=True)),
    "aggregate": ("objective.aggregate", put_objective("aggregate")),
    "denominator": ("objective.denominator", put_objective("denominator")),
    "rule": ("sampler.rule", lambda c, spec: setattr(c.sampler, "rule", spec)),
    "plan": ("rollout.plan", lambda c, spec: setattr(c.rollout, "plan", spec)),
    "schedule": ("control.c", lambda c, spec: c.control.update(c={"knob": "learner.lr"} | spec)),
    "feedback": ("control.c", lambda c, spec: c.control.update(c=FEEDBACK | spec)),
    "source": ("data.source", put_source),
    "judge": ("reward.judge", lambda c, spec: setattr(c.reward, "judge", spec)),
    "tool": ("rollout.tool", put_tool),
    "tracker": ("observe.trackers", lambda c, spec: setattr(c.observe, "trackers", [spec])),
}
every_slot = pytest.mark.parametrize("fn", SLOTS)


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "slots.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [n for n in sys.modules if n.partition(".")[0] == "my_lab"]:
        del sys.modules[name]


def with_own(slot: str, *, packages=("my_lab",), **spec: object) -> Config:
    """Checked settings with a function of the package in one slot."""
    config = deepcopy(configured("objective=grpo", "learner.lr=0.0"))
    config.packages = list(packages)
    SLOTS[slot][1](config, spec)
    compose.check_config(config)
    return config


@every_slot
def test_a_function_of_ones_own_is_bound_in_every_slot(fn):
    with_own(fn, fn=f"my_lab.slots.{fn}", strength=0.5)


@every_slot
@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"packages": ()}, r"packages=\[my_lab\]"),
        ({"fn": "my_lab.slots.trackre"}, "`my_lab.slots` .*`trackre`: .*`tracker`"),
        ({"fn": "my_lab.slot.keep"}, "`my_lab.slot.keep` .*PYTHONPATH"),
        ({"fn": "my_lab.slots.no_slot"}, r"`my_lab.slots.no_slot` .*\(a, b, c, d, e, f\).*\(.*`\w+`"),
        ({"strenght": 1.0}, "`{fn}` .*`strenght`: .*`strength`"),
        ({"strength": "much"}, "`{fn}.strength` .*'much'$"),
        ({"strength": None}, "`{fn}.strength` .*None$|`{fn}` .*`strength`,"),
    ],
    ids=lambda x: str(next(iter(x))) if isinstance(x, dict) else "",
)
def test_what_cannot_be_bound_is_refused_by_its_setting(fn, change, remedy):
    given = {"fn": f"my_lab.slots.{fn}", "strength": 0.5} | change
    with pytest.raises(ConfigError, match=f"^{SLOTS[fn][0]}: .*(?:{remedy.replace('{fn}', fn)})"):
        with_own(fn, **given)


@every_slot
def test_a_setting_that_is_lacking_is_named(fn):
    with pytest.raises(ConfigError, match=f"^{SLOTS[fn][0]}: `{fn}` .*`strength`,"):
        with_own(fn, fn=f"my_lab.slots.{fn}")


def test_a_package_that_raises_when_it_is_imported_is_a_config_error(tmp_path):
    (tmp_path / "my_lab" / "broken.py").write_text("1 / 0")
    said = r"^observe\.trackers: `my_lab\.broken\.tracker` .*ZeroDivisionError.*PYTHONPATH"
    with pytest.raises(ConfigError, match=said):
        with_own("tracker", fn="my_lab.broken.tracker")


def test_a_plan_that_is_not_async_and_a_rule_without_bounds_are_refused(tmp_path):
    (tmp_path / "my_lab" / "wrong.py").write_text(
        "def plan(generator, prompt, seeds, draw): return []\n"
        "def feedback(signal, state): return 0.0, state\n"
    )
    with pytest.raises(ConfigError, match=r"^rollout\.plan: `my_lab\.wrong\.plan` .*async def"):
        with_own("plan", fn="my_lab.wrong.plan")
    with pytest.raises(ConfigError, match=r"^control\.c: `feedback` .*`(low|high)`: "):
        with_own("feedback", fn="my_lab.wrong.feedback")


def test_a_judge_of_a_part_is_named_by_its_part():
    config = deepcopy(configured())
    config.data.parts = {"a": Part(judge={"fn": "gim", "task": "x"})}
    with pytest.raises(ConfigError, match=r"^data\.parts\.a\.judge .*`gim`: .*`gym`"):
        compose.check_config(config)


def test_what_is_bound_is_what_runs():
    own = lambda fn, **more: {"fn": f"my_lab.slots.{fn}", "strength": 0.5} | more
    row = configured("objective=grpo").objective | {"shapes": [own("shape")]}
    assert outcome(build_objective(row, ["my_lab"])) != outcome(build_objective("grpo"))
    assert float(reshape.build_rule(own("rule"), ["my_lab"])(*torch.zeros(2, 1)).factor) == 0.5
    config = with_own("plan", **own("plan"))
    assert rollout_plan.describe_plan(build_parts(config).plan).startswith("plan: ")
    specs = {"a": own("schedule", knob="x"), "b": own("feedback", knob="y", signal="m", low=0.0, high=9.0)}
    control = Control(build_controllers(specs, ["my_lab"]), {"x": 0.0, "y": 1.0})
    assert control.turn(1) == {"x": 0.5, "y": 1.0}
    control.observe({"m": 4.0})
    assert control.turn(2) == {"x": 1.0, "y": 3.0}
    part = Part(source="my_lab.slots.source", settings={"strength": 2.0})
    (question,), bad = dataset.read_questions(part, ["my_lab"])
    assert (question.answer, bad) == ("2.0", 0)


def test_judge_and_tool_of_ones_own_are_what_a_verifier_runs():
    spec = {"fn": "my_lab.slots.judge", "strength": 0.5}
    tool = {"fn": "my_lab.slots.tool", "strength": 2.0}
    verify = build_verification(judges={"": spec}, tool=tool, packages=["my_lab"])
    prompt = Prompt("p", "", (1,), "8")
    assert (verify("8", prompt).reward, verify(Call("4"), prompt).answer) == (0.5, "8.0")


def test_a_tracker_is_told_of_its_run(tmp_path):
    run = trackers.TrackedRun(tmp_path, "mine", {"seed": 1}, first_step=3)
    tracker = bind(trackers, {"fn": "my_lab.slots.tracker", "strength": 0.5}, ["my_lab"])(run)
    tracker.log(3, {"x": 1.0})
    assert isinstance(tracker, trackers.Tracker) and sys.modules["my_lab.slots"].SEEN == [
        ("mine", 0.5),
        (3, {"x": 1.0}),
    ]
