"""One machine at a time for many runs: kept while settings allow it, reset in between."""

from dataclasses import asdict, dataclass, field
from typing import Any

from entroray.config import Config
from entroray.errors import InfrastructureError
from entroray.evaluation.evaluate import heldout_prompts
from entroray.evaluation.heldout_metrics import heldout_metrics
from entroray.wiring import actors, compose, dataset, preflight, sampler, tool, warm_start
from entroray.wiring.parts import Parts

LASTING = ("ranks", "threads", "pack", "liger")
"""Settings of the learner that a rank keeps for its life."""


def lasting(config: Config, parts: Parts) -> dict[str, Any]:
    """The settings that `reset` cannot change: what actors are made of, what is read, what is measured."""
    every = asdict(config)
    freed = ("seed", "run", "objective", "control", "driver", "observe", "checkpoint")
    kept = {name: value for name, value in every.items() if name not in freed}
    kept["learner"] = {name: every["learner"][name] for name in LASTING}
    kept["engine"] = actors.engine_options(config)
    kept["cores"] = actors.core_shares(config)
    kept["processors"] = actors.logits_processors(config, parts)
    kept["rollout"] = {name: every["rollout"][name] for name in ("max_tokens", "deadline", "turns", "tool")}
    return kept | {"call_deadline": every["driver"]["call_deadline"]}


@dataclass
class ReusedActors:
    """The machine that stands now, with what it reads and how its first weights answer."""

    config_dir: str | None = None
    """The folder of settings beside conf/ that overrides are read with."""
    stands: actors.Actors | None = None
    made_of: str = ""
    model: str = ""
    read_in: dataset.Dataset | None = None
    before: dict[str, float] = field(default_factory=dict)
    joined: bool = False

    async def ready(
        self, config: Config, overrides: list[str], parts: Parts
    ) -> tuple[actors.Actors, dataset.Dataset, dict[str, float]]:
        """A machine at the first weights with `config` in effect, its data, and what its first weights do."""
        if self.stands is None or self.made_of != compose.fingerprint(lasting(config, parts)):
            await self.clear()
            await self._make(config, overrides, parts)
        assert self.stands and self.read_in
        updates = config.run.steps * config.learner.updates_per_rollout
        self.stands = await self.stands.reset(config, self.model, parts.objective, total_updates=updates)
        return self.stands, self.read_in, self.before

    async def _make(self, config: Config, overrides: list[str], parts: Parts) -> None:
        preflight.refuse_wrong(config)
        _warm_start(config, overrides, self.config_dir)
        self.model = warm_start.resolve_model(config)
        self.read_in = dataset.load_dataset(config, self.model)
        heldout_prompts(self.read_in.split.heldout, 1, "entroray lab")
        if self.joined:
            actors.check_cluster(config)
        else:
            actors.join_cluster(config)
            self.joined = True
        probe = dataset.probe_ids(self.read_in.tokenizer)
        judge = self.read_in.judge
        self.stands = await actors.start_actors(config, self.model, parts, judge, probe, total_updates=1)
        self.made_of = compose.fingerprint(lasting(config, parts))
        self.before = await self.measure_heldout(config)

    async def measure_heldout(self, config: Config) -> dict[str, float]:
        """What the weights served now do on the held-out prompts."""
        assert self.stands and self.read_in
        m, e, verifier = self.stands, config.evaluate, self.stands.verifier_role()
        prompts, draw = (
            self.read_in.split.heldout[: e.prompts],
            sampler.plain_draw(config.sampler, config.rollout),
        )
        generator = tool.with_tool(config.rollout, self.read_in.tokenizer, m.generator_role(), verifier)
        return await heldout_metrics(generator, verifier, m.learner_role(), prompts, draw, e.samples)

    async def clear(self, *, broken: bool = False) -> None:
        """Take the machine down; a broken one without asking it to leave in order."""
        if self.stands is None:
            return
        ended, self.stands = self.stands, None
        if not broken:
            await ended.stop()
        await ended.end()


def _warm_start(config: Config, overrides: list[str], config_dir: str | None) -> None:
    try:
        warm_start.ensure_model(config, overrides, config_dir)
    except SystemExit as left:
        raise InfrastructureError(f"the warm start of the model ended with exit code {left.code}") from left
