"""The one process that sees the whole loop; it knows roles, never Ray or an engine (rollout/README.md)."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from entroray.control import Control
from entroray.errors import InfrastructureError
from entroray.metrics.by_domain import domain_metrics, judged_metrics
from entroray.metrics.step import step_metrics
from entroray.objective import Objective, active_tokens, corrected, gradient_weight, why_scored
from entroray.objective.activity import counted_functions
from entroray.roles import Generator, Journal, Learner, Prompts, Resumable, Scores, Sync, Verifier
from entroray.rollout.branch_points import Attempt, failure, sort_members
from entroray.rollout.ledger import ANEW, SECOND, SKIPPED, TRAINED, Ledger
from entroray.rollout.plans import Plan, independent
from entroray.rollout.selection import Selection
from entroray.rollout.stream import Dropped, Stream
from entroray.seeds import seeds
from entroray.train.batching import assemble, group_index, tokens_of, unknown_scores, with_scores
from entroray.train.clock import Clock
from entroray.train.diagnostics import NO_DIAGNOSTICS, Diagnostics, DiagnosticsSchedule
from entroray.train.failure_limits import IdleFunctions, SkippedUpdates, VerdictFailures
from entroray.train.loop_settings import LoopSettings
from entroray.train.threads import describe_stack, in_thread
from entroray.train.trace import NO_TRACE, Trace
from entroray.types import Draw, Group, Prompt, Rollout, Tokens, Verdict, Version

UNTOUCHED = 20
"""Steps without a token touched by a rule after which the journal says so."""


async def no_evaluation(step: int, last: bool) -> dict[str, float]:
    return {}


@dataclass(frozen=True)
class Roles:
    """The machines, as the driver sees them."""

    generator: Generator
    verifier: Verifier
    learner: Learner
    sync: Sync
    journal: Journal
    evaluate: Callable[[int, bool], Awaitable[dict[str, float]]] = no_evaluation
    """Metrics of the weights served after a step, 0 being the first, and whether it is the run's last; empty
    when none are due."""
    waits: Callable[[], list[str]] = list
    """What is being waited for and since when, for a run that stalls."""
    busy: Callable[[], Mapping[str, float]] = dict
    """Seconds at work by actor, since any moment, for idle shares."""
    trace: Trace = NO_TRACE
    ledger: Ledger = field(default_factory=Ledger)
    """Of what they draw."""


@dataclass(frozen=True)
class Knobs:
    """What controllers may move; each call carries the values in effect when it began."""

    objective: Objective
    draw: Draw
    updates: int = 1
    """Optimizer updates a step."""
    lr: float | None = None
    """In place of the learning-rate schedule's base; None leaves it."""


Tune = Callable[[Mapping[str, float], Knobs], Knobs]
"""Values of settings by path, knobs -> the knobs with those values in effect."""
After = Callable[[int, Mapping[str, float]], Awaitable[None]]
T = TypeVar("T")


class Driver:
    """Both loops, and what is remembered between two steps."""

    def __init__(
        self,
        prompts: Prompts,
        roles: Roles,
        knobs: Knobs,
        pace: LoopSettings,
        *,
        seed: int,
        plan: Plan = independent,
        diagnostics: DiagnosticsSchedule = NO_DIAGNOSTICS,
        selection: Selection | None = None,
        control: Control | None = None,
        tune: Tune | None = None,
    ):
        self.roles, self.knobs, self.pace, self.seed, self.plan = roles, knobs, pace, seed, plan
        size = {"per_step": pace.groups_per_step, "max_lag": pace.max_lag}
        self.ledger = roles.ledger
        self.stream = Stream(prompts, self.group, **size, keeps=pace.keeps_surplus, ledger=self.ledger)
        self.failures = VerdictFailures(pace.max_failed)
        self.skipped = SkippedUpdates(pace.max_skipped)
        self.idle = IdleFunctions(UNTOUCHED)
        self.limits: Mapping[str, Resumable] = {
            "failures": self.failures,
            "skipped": self.skipped,
            "idle": self.idle,
        }
        self.diagnostics, self.selection = Diagnostics(diagnostics), selection or Selection()
        self.control, self.tune = control or Control(), tune
        self.version: Version = 0
        self.steps = 0  # of the run, once it is told
        self.turn: asyncio.Future[Any] | None = None
        self.evaluation: asyncio.Future[dict[str, float]] | None = None
        self.owed = True  # the evaluation of `version`, where a signal came before it was through
        self.stopping = self.over = False
        self.clock = Clock(roles.busy, roles.trace)
        self.marked = self._of_loop()

    # The run.

    async def train(self, steps: int, after: After | None = None) -> list[dict[str, float]]:
        """Run until `steps` are committed, `pace.tokens` drawn, or `stop`; `after` comes between steps.

        LedgerError after a step in which something got lost; `committed` is then of that step.
        """
        self.steps, self.clock = steps, Clock(self.roles.busy, self.roles.trace)
        history = []
        try:
            self.over = self._is_over()
            if self.owed:
                first = await self.within_stall(self.evaluate())
                self.marked = self._of_loop()
                if first:
                    self.roles.journal.event("evaluation", step=self.version, **first)
                    if after and self.version:
                        await self.within_stall(after(self.version, first))
            while not self.over and not self.stopping:
                self._turn_knobs()  # before anything is sampled for this step
                self.stream.advance(self.version)
                history.append(await self.within_stall(self.step()))
                self.marked = self._of_loop()
                self.ledger.check(self.stream.slots)
                with self.clock("checkpoint"):
                    if after:
                        await self.within_stall(after(self.version, history[-1]))
        except asyncio.CancelledError:
            if not self.stopping:
                raise
        finally:
            await self.stream.close()
        return history

    def _is_over(self) -> bool:
        """Whether no further step is begun: the run has made its steps, or drawn its tokens."""
        spent = self.pace.tokens is not None and self.ledger.spent >= self.pace.tokens
        return spent or self.version >= self.steps

    def _turn_knobs(self) -> None:
        values = self.control.turn(self.version + 1)
        if self.tune and values:
            self.knobs = self.tune(values, self.knobs)

    async def within_stall(self, work: Awaitable[T]) -> T:
        """What `work` gives, a part of the run; InfrastructureError if `driver.stall` seconds pass."""
        turn = self.turn = asyncio.ensure_future(work)
        done, _ = await asyncio.wait({turn}, timeout=self.pace.stall)
        if done:
            return turn.result()
        phase, waits = self.clock.phase, self.roles.waits()
        stacks = [describe_stack(task) for task in asyncio.all_tasks()]
        self.roles.journal.event("stalled", phase=phase, waits=waits, stacks=stacks)
        turn.cancel()
        await asyncio.wait({turn}, timeout=1.0)
        unfinished = [s.prompt.id for s in self.stream.slots.values() if s.group is None]
        raise InfrastructureError(
            f"no step finished within {self.pace.stall:.0f} s (driver.stall): the phase is `{phase}` "
            f"after version {self.version}, {len(unfinished)} groups unfinished, first prompts "
            f"{unfinished[:3]}; waiting for: {'; '.join(waits) or 'nothing over Ray'}. "
            "Stacks are in the event `stalled`"
        )

    def stop(self) -> None:
        """End `train` soon: a step that has not touched the weights is given up, another is finished."""
        self.stopping = True
        if self.turn and self.clock.phase in ("sample", "score"):
            self.turn.cancel()
        if self.evaluation:
            self.evaluation.cancel()

    async def evaluate(self) -> dict[str, float]:
        """Metrics of the weights served; none once the run is to stop, whose next start then owes them."""
        self.owed = self.stopping
        if self.stopping:
            return {}
        self.evaluation = asyncio.ensure_future(self.roles.evaluate(self.version, self.over))
        try:
            with self.clock("evaluate"):
                return await self.evaluation
        except asyncio.CancelledError:
            if not self.stopping:
                raise
            self.owed = True
            return {}
        finally:
            self.evaluation = None

    # A group in flight.

    async def group(self, prompt: Prompt, serial: int) -> Group | Dropped:
        """Draw a group; if none is right, redraw it hotter (rollout.second) or insert a replayed success
        (rollout.replay).
        """
        second = self.selection.second_draw
        draw = second.first(prompt, self.knobs.draw)
        again = lambda hotter: self.rollout(prompt, serial, hotter, first=1 + self.pace.resamples)
        return await second(await self.rollout(prompt, serial, draw), draw, again)

    async def rollout(self, prompt: Prompt, serial: int, draw: Draw, first: int = 0) -> Group | Dropped:
        """A whole group, or why there is none; members that failed are drawn anew, alone, a few times.

        Attempts are counted from `first`, so that a second draw has seeds of its own.
        """
        members, reason = Attempt(), ""
        for attempt in range(first, first + 1 + self.pace.resamples):
            missing = self.pace.group_size - len(members.kept)
            drawn = seeds(self.seed, serial, attempt, missing + self.pace.extra)
            how = replace(draw, enough=missing) if self.pace.extra else draw
            plan = self.plan if attempt == first else independent
            self.ledger.ask(serial, len(drawn))
            found = sort_members(await self._sample_and_judge(plan, prompt, drawn, how))
            self.ledger.receive(serial, found, ANEW if attempt > first else SECOND if first else "")
            members = members.then(found)
            if len(members.kept) == self.pace.group_size:
                rollouts, verdicts = zip(*members.kept, strict=True)
                return Group(prompt, rollouts, verdicts, abandoned=members.abandoned)
            reason = _failure(*found.failed[0])
            self.roles.journal.event("resample", prompt=prompt.id, attempt=attempt, reason=reason)
        return Dropped(reason)

    async def _sample_and_judge(
        self, plan: Plan, prompt: Prompt, drawn: list[int], draw: Draw
    ) -> list[tuple[Rollout, Verdict]]:
        rollouts = await plan(self.roles.generator, prompt, drawn, draw)
        usable = [r for r in rollouts if r.status.usable]
        judged = await self.roles.verifier.judge(prompt, usable) if usable else []
        self.failures.observe(judged, len(usable))
        verdicts = iter(judged)
        blank = lambda r: Verdict(float("nan"), False, status=r.status, detail="not sampled")
        return [(r, next(verdicts) if r.status.usable else blank(r)) for r in rollouts]

    async def step(self) -> dict[str, float]:
        """One committed step; returns its metrics."""
        clock = self.clock
        knobs, objective, learner = self.knobs, self.knobs.objective, self.roles.learner
        with clock("sample"):
            limit = self.pace.refill_limit * self.pace.groups_per_step
            groups = await self.stream.take(objective.keep, wait=self.pace.wait, limit=limit)
        with clock("score"):
            batch, index = assemble(groups), group_index(groups)
            wants = self.diagnostics.wants(self.version + 1)
            scored = self.pace.score == "always" or bool(why_scored(objective, knobs.updates, wants))
            scores = unknown_scores(batch, objective)
            if scored:
                scores = await learner.score(batch, index, knobs.updates, wants)
        given, tokens = await in_thread(lambda: self._credit(groups, scores, objective))
        with clock("update"):
            if scored:
                updated = await learner.update(batch, tokens, objective, knobs.updates, knobs.lr)
            else:
                updated, scores = await learner.score_and_update(batch, tokens, objective, knobs.lr)
                given, tokens = with_scores(given, scores), corrected(objective, with_scores(tokens, scores))
        active = await in_thread(lambda: active_tokens(objective, given))
        if skipped := bool(updated.get("update/skipped")):
            with clock("journal"):
                skip = self.roles.journal.skipped
                await in_thread(lambda: skip(self.version + 1, batch, tokens))
        self.skipped.observe(skipped)
        if wants and not skipped:
            with clock("rescore"):
                after = await learner.score(batch, index, knobs.updates)
            changed = self.diagnostics.changed
            updated |= await in_thread(lambda: changed(tokens, gradient_weight(objective, tokens), after))
        with clock("probe"):
            updated |= await self.diagnostics.read(self.version + 1, learner)
        with clock("sync"):
            synced = await self.roles.sync(self.version + 1)
        self.version += 1
        self.ledger.commit(groups, SKIPPED if updated.get("update/skipped", 0) >= knobs.updates else TRAINED)
        metrics = updated | synced | await self._measure(groups, tokens, active)
        self._report_idle(metrics)
        self.over = self._is_over()  # before the evaluation, in which groups may be lost
        metrics |= await self.evaluate()
        metrics |= clock.lap(len(tokens.row), self.version)
        metrics |= self.control.observe(metrics)
        with clock("journal"):
            await in_thread(lambda: self.roles.journal.step(self.version, metrics, groups, tokens))
        return metrics

    def _credit(self, groups: list[Group], scores: Scores, o: Objective) -> tuple[Tokens, Tokens]:
        """The step's tokens as they were drawn, and as the update reads them."""
        given = tokens_of(groups, [o.estimate(g) for g in groups], scores, self.version, self.seed)
        return given, o.credit(given)

    async def _measure(
        self, groups: Sequence[Group], tokens: Tokens, active: Mapping[str, int]
    ) -> dict[str, float]:
        """Metrics of the groups trained on and of all judged since the last step, which observers take in."""
        rewards = [r for g in groups for r in self.knobs.objective.shape_rewards(g).tolist()]
        correct = [v.correct for g in groups for v in g.verdicts]
        finished = self.stream.judged_since()
        for group in finished:  # here, not as they finish: in order of issue, the same in every run
            for observer in self.selection.observers.values():
                observer.observe(group)
        judged = [draw for group in finished for draw in group.draws]
        counts = {f"objective/{name}_tokens": float(n) for name, n in active.items()}
        counts |= self.ledger.metrics() | {
            "correct/trained_mean": sum(correct) / len(correct),
            "reward/shaped_mean": sum(rewards) / len(rewards),
            "verdicts/failed": self.failures.share,
            "groups/held": float(self.stream.held),
        }
        metrics = await in_thread(
            lambda: (
                step_metrics(groups, tokens)
                | self.diagnostics.diagnosed(self.version, groups, tokens, judged)
                | judged_metrics(judged)
                | domain_metrics(groups, tokens, judged)
                | counts
            )
        )
        for measure in self.selection.metrics:
            metrics |= measure(groups, judged, self.version)
        return metrics | self.diagnostics.fitted(metrics)

    def _report_idle(self, metrics: Mapping[str, float]) -> None:
        counts = [f"objective/{name}_tokens" for name in counted_functions(self.knobs.objective)]
        for rule in self.idle.observe({name: metrics[name] for name in counts if name in metrics}):
            self.roles.journal.event("rule_untouched", rule=rule, steps=self.idle.patience)

    # What a checkpoint holds.

    def state(self) -> dict[str, Any]:
        """Everything the driver remembers between two steps, as plain JSON."""
        return self._of_loop() | self._of_prompts()

    @property
    def committed(self) -> dict[str, Any]:
        """The state after the last step; what is of prompts is long, and moves at a step's end alone."""
        stream = self.marked["stream"]
        ledger = self.ledger.roll_back(stream["ledger"])
        return self.marked | {"stream": stream | {"ledger": ledger}} | self._of_prompts()

    def _of_loop(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "owed": self.owed,
            "stream": self.stream.state(),
            "diagnostics": self.diagnostics.state(),
            "control": self.control.state(),
            "limits": {name: limit.state() for name, limit in self.limits.items()},
        }

    def _of_prompts(self) -> dict[str, Any]:
        return {"observers": {name: each.state() for name, each in self.selection.observers.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on after the step that `state` was taken at; call inside the running loop, before `train`.

        ConfigError for a run that remembers of its prompts what that one did not.
        """
        self.version, self.owed = state["version"], state["owed"]
        self.stream.restore(state["stream"], self.version)
        self.diagnostics.restore(state["diagnostics"])
        self.control.restore(state["control"])
        for name, limit in self.limits.items():
            limit.restore(state["limits"][name])
        self.selection.restore(state["observers"])
        self.marked = self._of_loop()


def _failure(rollout: Rollout, verdict: Verdict) -> str:
    """Status, and detail if there is one, of a member that failed."""
    status = failure(rollout, verdict)
    return f"{status}: {verdict.detail}" if verdict.detail else status
