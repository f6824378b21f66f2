"""prompt -> rollout -> verdict -> advantage -> batch -> update -> weight sync, in that order."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entroray.control import Control
from entroray.errors import InfrastructureError
from entroray.metrics.by_domain import domain_metrics, judged_metrics
from entroray.metrics.step import step_metrics
from entroray.objective import Objective, active_tokens, gradient_weight
from entroray.objective.activity import counted_functions
from entroray.roles import Generator, Journal, Learner, Prompts, Sync, Verifier, racing, tunable
from entroray.rollout.branch_points import Attempt, sort_members
from entroray.rollout.heat import Heat
from entroray.rollout.plans import Plan, independent
from entroray.rollout.selection import GroupObserver, Selection
from entroray.rollout.stream import Dropped, Stream
from entroray.seeds import seeds
from entroray.train.batching import assemble, group_index, tokens_of
from entroray.train.diagnostics import NO_DIAGNOSTICS, Diagnostics, DiagnosticsSchedule
from entroray.train.failure_limits import IdleFunctions, Limit, SkippedUpdates, VerdictFailures
from entroray.types import Group, Prompt, Rollout, Status, Tokens, Verdict, Version

UNTOUCHED = 20
"""Steps without a token touched by a rule after which the journal says so."""


@dataclass(frozen=True)
class LoopSettings:
    """How the loop runs: sizes, staleness, patience."""

    group_size: int
    groups_per_step: int
    max_lag: int
    wait: bool
    """True: the learner waits for groups about to grow too old; False: they are refused and re-issued."""
    refill_limit: int
    """Most groups a step may drop, in steps' worth, before the run ends for want of signal."""
    max_failed: float
    """Share of recent responses that may lack a verdict."""
    stall: float
    """Seconds without a finished step after which the run ends, naming the phase it stood in."""
    resamples: int = 2
    """Times that the failed members of a group are sampled anew before the group is dropped."""
    max_skipped: int = 3
    """Steps in a row that may leave an update out."""
    extra: int = 0
    """Rollouts of a prompt drawn beyond `group_size`; the first to finish are taken, the others given up."""
    tokens: int | None = None
    """Response tokens drawn after which no further step is begun."""
    surplus: str = "by_lag"
    """`keep` | `drop` groups finished beyond a step's; `by_lag` keeps them where `max_lag` is above 0."""

    @property
    def keeps_surplus(self) -> bool:
        return self.max_lag > 0 if self.surplus == "by_lag" else self.surplus == "keep"


async def no_evaluation(step: int) -> dict[str, float]:
    """No evaluation."""
    return {}


@dataclass(frozen=True)
class Roles:
    """The machines, as the driver sees them."""

    generator: Generator
    verifier: Verifier
    learner: Learner
    sync: Sync
    journal: Journal
    evaluate: Callable[[int], Awaitable[dict[str, float]]] = no_evaluation
    """Metrics of the weights served after a step, 0 being the first; empty when none are due."""
    waits: Callable[[], list[str]] = list
    """What is being waited for and since when, for a run that stalls."""


Tune = Callable[[Mapping[str, float], Roles], tuple[Objective, Roles]]
"""Values of settings by path, roles -> the objective and the roles with those values in effect."""
After = Callable[[int, Mapping[str, float]], Awaitable[None]]


class Driver:
    """The one process that sees the whole loop; it knows roles, never Ray, vLLM or DeepSpeed."""

    def __init__(
        self,
        prompts: Prompts,
        roles: Roles,
        objective: Objective,
        pace: LoopSettings,
        *,
        seed: int,
        plan: Plan = independent,
        looks: DiagnosticsSchedule = NO_DIAGNOSTICS,
        heat: Heat | None = None,
        choice: Selection | None = None,
        control: Control | None = None,
        tune: Tune | None = None,
    ):
        self.roles, self.objective, self.pace, self.seed, self.plan = roles, objective, pace, seed, plan
        size = {"per_step": pace.groups_per_step, "max_lag": pace.max_lag}
        self.stream = Stream(prompts, self.group, **size, keeps=pace.keeps_surplus)
        self.failures = VerdictFailures(pace.max_failed)
        self.skipped = SkippedUpdates(pace.max_skipped)
        self.idle = IdleFunctions(UNTOUCHED)
        self.insight = Diagnostics(looks)
        self.heat, self.choice = heat or Heat(), choice or Selection()
        self.memories: Mapping[str, GroupObserver] = {"heat": self.heat, **self.choice.memories}
        self.limits: Mapping[str, Limit] = {
            "failures": self.failures,
            "skipped": self.skipped,
            "idle": self.idle,
        }
        self.control, self.tune = control or Control(), tune
        self.version: Version = 0
        self.drawn = 0  # in groups judged; `stream.lost` are the others
        self.turn: asyncio.Task[dict[str, float]] | None = None
        self.stopping = False
        self.committed = self.state()
        self.phase = "start"

    async def train(self, steps: int, after: After | None = None) -> list[dict[str, float]]:
        """Run until `steps` are committed, `pace.tokens` drawn, or `stop`; `after` comes between steps."""
        history = []
        try:
            if self.version == 0 and (first := await self.roles.evaluate(0)):
                self.roles.journal.event("evaluation", step=0, **first)
            while self.version < steps and not self._spent() and not self.stopping:
                self._turn_knobs()  # before anything is sampled for this step
                self.stream.advance(self.version)
                history.append(await self._within(self._begin()))
                self.committed = self.state()
                if after:
                    await after(self.version, history[-1])
        except asyncio.CancelledError:
            if not self.stopping:
                raise
        finally:
            await self.stream.close()
        return history

    def _spent(self) -> bool:
        return self.pace.tokens is not None and self.drawn + self.stream.lost >= self.pace.tokens

    def _turn_knobs(self) -> None:
        values = self.control.turn(self.version + 1)
        if self.tune and values:
            self.objective, self.roles = self.tune(values, self.roles)

    def _begin(self) -> "asyncio.Task[dict[str, float]]":
        self.turn = asyncio.ensure_future(self.step())
        return self.turn

    def stop(self) -> None:
        """End `train` soon: a step that has not touched the weights is given up, another is finished."""
        self.stopping = True
        if self.turn and self.phase in ("sample", "score"):
            self.turn.cancel()

    def state(self) -> dict[str, Any]:
        """Everything the driver remembers between two steps, as plain JSON."""
        return {
            "version": self.version,
            "drawn": self.drawn,
            "stream": self.stream.state(),
            "insight": self.insight.state(),
            "control": self.control.state(),
            "limits": {name: limit.state() for name, limit in self.limits.items()},
            **{name: memory.state() for name, memory in self.memories.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on after the step that `state` was taken at; call inside the running loop, before `train`."""
        self.version, self.drawn = state["version"], state.get("drawn", 0)
        self.stream.restore(state["stream"], self.version)
        self.insight.restore(state["insight"])
        for name in self.memories.keys() & state.keys():  # a checkpoint of before a choice has none
            self.memories[name].restore(state[name])
        for name, counted in state.get("limits", {}).items():  # one of before they were kept has none
            self.limits[name].restore(counted)
        self.control.restore(state["control"])
        self.committed = self.state()

    async def _within(self, step: "asyncio.Task[dict[str, float]]") -> dict[str, float]:
        done, _ = await asyncio.wait({step}, timeout=self.pace.stall)
        if done:
            return step.result()
        waits, stacks = self.roles.waits(), [_stack(task) for task in asyncio.all_tasks()]
        self.roles.journal.event("stalled", phase=self.phase, waits=waits, stacks=stacks)
        step.cancel()
        await asyncio.wait({step}, timeout=1.0)
        unfinished = [s.prompt.id for s in self.stream.slots.values() if s.group is None]
        raise InfrastructureError(
            f"no step finished within {self.pace.stall:.0f} s (driver.stall): standing in `{self.phase}` "
            f"after version {self.version}, {len(unfinished)} groups unfinished, first prompts "
            f"{unfinished[:3]}; waiting for: {'; '.join(waits) or 'nothing over Ray'}. "
            "Stacks are in the event `stalled`"
        )

    async def group(self, prompt: Prompt, serial: int) -> Group | Dropped:
        """Draw a group; if none is right, redraw it hotter (rollout.second) or swap in a replayed success
        (rollout.replay).
        """
        found = await self.rollout(prompt, serial)
        return await self.choice.rescue(found, lambda factor: self.rollout(prompt, serial, factor))

    async def rollout(self, prompt: Prompt, serial: int, hotter: float = 1.0) -> Group | Dropped:
        """A whole group, or why there is none; members that failed are drawn anew, alone, a few times."""
        members, reason = Attempt(), ""
        first = 0 if hotter == 1.0 else 1 + self.pace.resamples  # other seeds for a second draw
        for attempt in range(first, first + 1 + self.pace.resamples):
            missing = self.pace.group_size - len(members.kept)
            drawn = seeds(self.seed, serial, attempt, missing + self.pace.extra)
            plan = self.plan if attempt == first else independent
            judged = await self._sample_and_judge(self._generator(hotter, missing), prompt, drawn, plan)
            members = members.then(sort_members(judged))
            if len(members.kept) == self.pace.group_size:
                rollouts, verdicts = zip(*members.kept, strict=True)
                lost = _drawn(members.failed)
                return Group(prompt, rollouts, verdicts, abandoned=members.abandoned, lost=lost)
            reason = _why(judged)
            self.roles.journal.event("resample", prompt=prompt.id, attempt=attempt, reason=reason)
        whole = (*(r for r, _ in members.kept), *members.abandoned, *members.failed)
        return Dropped(reason, _drawn(whole))

    def _generator(self, hotter: float, enough: int) -> Generator:
        """The one the run has, asked for what its choices need."""
        generator = self.roles.generator
        if hotter != 1.0:
            generator = tunable(generator).hotter(hotter)
        return racing(generator).first(enough) if self.pace.extra else generator

    async def _sample_and_judge(
        self, generator: Generator, prompt: Prompt, drawn: list[int], plan: Plan
    ) -> list[tuple[Rollout, Verdict]]:
        rollouts = await plan(generator, prompt, drawn)
        usable = [r for r in rollouts if r.status.usable]
        judged = await self.roles.verifier.judge(prompt, usable) if usable else []
        self.failures.note(judged, len(usable))
        verdicts = iter(judged)
        blank = lambda r: Verdict(float("nan"), 0.0, status=r.status, detail="not sampled")
        return [(r, next(verdicts) if r.status.usable else blank(r)) for r in rollouts]

    async def step(self) -> dict[str, float]:
        """One committed step; returns its metrics."""
        clock = Clock()
        with clock("sample", self):
            groups = await self.stream.take(
                self.objective.keep,
                wait=self.pace.wait,
                limit=self.pace.refill_limit * self.pace.groups_per_step,
            )
        with clock("score", self):
            batch = assemble(groups)
            wants = self.insight.wants(self.version + 1)
            scores = await self.roles.learner.score(batch, group_index(groups), wants)
        advantages = [self.objective.estimate(g) for g in groups]
        given = tokens_of(groups, advantages, scores, self.version)
        tokens, rules = self.objective.credit(given), active_tokens(self.objective, given)
        with clock("update", self):
            updated = await self.roles.learner.update(batch, tokens)
        if skipped := bool(updated.get("update/skipped")):
            self.roles.journal.skipped(self.version + 1, batch, tokens)
        self.skipped.note(skipped)
        if wants and not skipped:
            with clock("rescore", self):
                after = await self.roles.learner.score(batch, group_index(groups))
            updated |= self.insight.changed(tokens, gradient_weight(self.objective, tokens), after)
        with clock("probe", self):
            updated |= await self.insight.read(self.version + 1, self.roles.learner)
        with clock("sync", self):
            synced = await self.roles.sync(self.version + 1)
        self.version += 1
        metrics = updated | synced | self._observe(groups, tokens, rules) | clock.metrics(len(tokens.row))
        counts = [f"objective/{name}_tokens" for name in counted_functions(self.objective)]
        for rule in self.idle.note({name: metrics[name] for name in counts if name in metrics}):
            self.roles.journal.event("rule_untouched", rule=rule, steps=self.idle.patience)
        with clock("evaluate", self):
            metrics |= await self.roles.evaluate(self.version)
        metrics |= self.control.observe(metrics)
        self.roles.journal.step(self.version, metrics, groups, tokens)
        return metrics

    def _observe(self, groups: Sequence[Group], tokens: Tokens, rules: Mapping[str, int]) -> dict[str, float]:
        shaped = [float(r) for g in groups for r in self.objective.shape_rewards(g)]
        right = [v.correct for g in groups for v in g.verdicts]
        whole = self.stream.judged_since()
        self.drawn += sum(group.drawn for group in whole)
        for group in whole:  # here, not as they finish: in order of issue, the same in every run
            for memory in self.memories.values():
                memory.note(group)
        judged = [draw for group in whole for draw in group.draws]
        counted = {f"objective/{name}_tokens": float(n) for name, n in rules.items()}
        metrics = (
            step_metrics(groups, tokens)
            | self.insight.diagnosed(self.version, groups, tokens, judged)
            | counted
            | judged_metrics(judged)
            | domain_metrics(groups, tokens, judged)
            | {
                "correct/trained_mean": sum(right) / len(right),
                "reward/shaped_mean": sum(shaped) / len(shaped),
                "groups/dropped": float(self.stream.dropped.total()),
                "groups/refused": float(self.stream.refused),
                "verdicts/failed": self.failures.share,
                "groups/surplus": float(self.stream.surplus),
                "groups/held": float(self.stream.held),
                "tokens/drawn": float(self.drawn + self.stream.lost),
            }
        )
        for tell in self.choice.tell:
            metrics |= tell(groups, judged, self.version)
        return metrics | self.insight.fitted(metrics)


class Clock:
    """Seconds of each phase of a step."""

    def __init__(self) -> None:
        self.began, self.seconds = time.monotonic(), dict[str, float]()

    def __call__(self, phase: str, driver: Driver) -> "Clock":
        self.phase = driver.phase = phase
        return self

    def __enter__(self) -> None:
        self.entered = time.monotonic()

    def __exit__(self, *_: Any) -> None:
        self.seconds[self.phase] = time.monotonic() - self.entered

    def metrics(self, tokens: int) -> dict[str, float]:
        """Seconds by phase and response tokens trained a second."""
        total = time.monotonic() - self.began
        phases = {f"seconds/{phase}": s for phase, s in self.seconds.items()}
        return phases | {"seconds/step": total, "tokens/per_second": tokens / total}


def _drawn(rollouts: Iterable[Rollout]) -> int:
    return sum(r.drawn for r in rollouts)


def _why(judged: list[tuple[Rollout, Verdict]]) -> str:
    members = [(r, v) for r, v in judged if r.status is not Status.ABANDONED]
    failed = [(r, v) for r, v in members if not (r.status.usable and v.status.usable)]
    rollout, verdict = failed[0]
    status = verdict.status if rollout.status.usable else rollout.status
    return f"{status}: {verdict.detail}" if verdict.detail else str(status)


def _stack(task: "asyncio.Task[Any]") -> str:
    """Where a task stands: file, line and function, outermost first."""
    frames = task.get_stack(limit=8)
    at = lambda f: f"{Path(f.f_code.co_filename).name}:{f.f_lineno} {f.f_code.co_name}"
    return f"{task.get_name()}: {' > '.join(map(at, frames))}"
