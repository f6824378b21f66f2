"""One machine at a time for many runs: kept while settings allow it, reset in between."""

from dataclasses import dataclass, field

from entroray.cli import bootstrap, calls, machine, material, preflight, sampling, settings
from entroray.config import Config
from entroray.errors import InfrastructureError
from entroray.loop.portrait import portrait
from entroray.objective import Objective
from entroray.workers import cluster


@dataclass
class Bench:
    """The machine that stands now, with what it reads and how its first weights answer."""

    stands: machine.Machine | None = None
    made_of: str = ""
    model: str = ""
    read_in: material.Material | None = None
    before: dict[str, float] = field(default_factory=dict)
    joined: bool = False

    async def ready(
        self, config: Config, overrides: list[str], objective: Objective
    ) -> tuple[machine.Machine, material.Material, dict[str, float]]:
        """A machine at the first weights with `config` in effect, its material, and its first portrait."""
        if self.stands is None or self.made_of != settings.fingerprint(machine.lasting(config)):
            await self.clear()
            await self._make(config, overrides, objective)
        assert self.stands and self.read_in
        updates = config.run.steps * config.learner.updates_per_rollout
        self.stands = await self.stands.reset(config, self.model, objective, total_updates=updates)
        return self.stands, self.read_in, self.before

    async def _make(self, config: Config, overrides: list[str], objective: Objective) -> None:
        preflight.refuse(config)
        _warm_start(config, overrides)
        self.model = bootstrap.resolve(config)
        self.read_in = material.load(config, self.model)
        if self.joined:
            cluster.check_resources(machine.shares(config))
        else:
            machine.join(config)
            self.joined = True
        probe = tuple(self.read_in.tokenizer.encode(config.driver.probe.text, add_special_tokens=False))
        judge = self.read_in.judge
        self.stands = await machine.build(config, self.model, objective, judge, probe, total_updates=1)
        self.made_of = settings.fingerprint(machine.lasting(config))
        self.before = await self.portrait(config, objective)

    async def portrait(self, config: Config, objective: Objective) -> dict[str, float]:
        """What the weights served now do on the held-out prompts."""
        assert self.stands and self.read_in
        m, s, e = self.stands, config.sampler, config.evaluate
        tokenizer, verifier = self.read_in.tokenizer, m.verifier_role()
        drawn = lambda t: m.generator_role(sampling.plain(config, t))
        at = lambda t: calls.conversing(config, tokenizer, drawn(t), verifier)
        prompts = self.read_in.split.heldout[: e.prompts]
        roles = at, verifier, m.learner_role(objective)
        return await portrait(*roles, prompts, temperature=s.temperature, samples=e.samples)

    async def clear(self, *, broken: bool = False) -> None:
        """Take the machine down; a broken one without asking it to leave in order."""
        if self.stands is None:
            return
        ended, self.stands = self.stands, None
        if not broken:
            await ended.stop()
        await ended.end()


def _warm_start(config: Config, overrides: list[str]) -> None:
    try:
        bootstrap.ensure(config, overrides)
    except SystemExit as left:
        raise InfrastructureError(f"the warm start of the model ended with exit code {left.code}") from left
