"""Command line -> one checked Config; composed here, not by Hydra's wrapper, to keep our exit codes."""

import difflib
import itertools
import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from entroray.config import Config
from entroray.errors import ConfigError
from entroray.evaluation.evaluate import plan_evaluation
from entroray.rows import conf_folder
from entroray.wiring import constraints, controllers, dataset, rollout_plan, sampler, selection, tool
from entroray.wiring.parts import Parts, build_parts

TAKEN = {
    "model": "model.path says it",
    "dtype": "model.dtype says it",
    "seed": "seed says it",
    "max_model_len": "it is data.max_prompt + rollout.max_tokens",
    "async_scheduling": "it is off: a token in flight across a sync would carry the wrong version",
}


RENAMED = {
    "model.bootstrap": "model.warm_start",
    "data.bad_rows": "data.settings.bad_rows",
    "objective_packages": "packages",
    "model.path=bootstrap": "model.path=tiny",
}
"""Settings that older pages showed, and their names now."""


def load_config(
    overrides: list[str], config_dir: str | None = None, *, training: bool = True
) -> tuple[Config, DictConfig]:
    """The composed settings, typed and checked, and as the tree they were composed from.

    An evaluation (`training` False) may be greedy, or cut the tail. Raises ConfigError naming the key and
    the nearest right one.
    """
    _refuse_renamed(overrides)
    if config_dir and not Path(config_dir).is_dir():
        raise ConfigError(f"--config-dir={config_dir} is no folder: give one with conf/'s groups in it")
    extra = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    schema = OmegaConf.structured(Config)  # conf/train.yaml begins with it
    OmegaConf.set_struct(schema.model.template_args, False)  # its keys are the template's
    ConfigStore.instance().store(name="schema", node=schema)
    try:
        with initialize_config_dir(config_dir=str(conf_folder()), version_base="1.3"):
            tree = compose("train", overrides=overrides + extra)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error
    return _typed(tree, training=training), tree


def _refuse_renamed(overrides: list[str]) -> None:
    """ConfigError for a setting by the name that older pages gave it."""
    for override in overrides:
        path = override.lstrip("+~")
        for old, new in RENAMED.items():
            if path == old or path.startswith((f"{old}.", f"{old}=")):
                raise ConfigError(f"{path}: `{old}` is called `{new}` now: {path.replace(old, new, 1)}")


def override_config(tree: DictConfig, values: list[str], *, training: bool = True) -> Config:
    """Composed settings with `path=value` said beside them; no group can be chosen anew."""
    try:
        typed = OmegaConf.get_type(tree) is Config
        schema = tree if typed else OmegaConf.merge(OmegaConf.structured(Config), tree)
        merged = OmegaConf.merge(schema, OmegaConf.from_dotlist(values))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from error
    assert isinstance(merged, DictConfig)
    return _typed(merged, training=training)


def _typed(tree: DictConfig, *, training: bool) -> Config:
    try:
        config: Config = OmegaConf.to_object(tree)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from error
    parts = check_config(config)
    if training:
        sampler.check_training_sampler(config.sampler, config.generator.engine, parts)
        selection.check_training_selection(config.rollout, config.generator.engine, parts.objective)
    return config


def _explain(error: Exception) -> str:
    cause = " ".join(str(error.__cause__ or error).split())
    known = list(_keys(Config))
    unknown = next((w.strip("'\".,:") for w in str(error).split() if "=" in w or "." in w), "")
    key = unknown.lstrip("+~").partition("=")[0]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    hint = f" Did you mean `{near[0]}`?" if near and near[0] != key else ""
    return f"{str(error).splitlines()[0]} ({cause}).{hint}"


def _keys(schema: Any, prefix: str = "") -> Any:
    for f in fields(schema):
        yield prefix + f.name
        inner = f.default_factory if is_dataclass(f.default_factory) else None
        if inner:
            yield from _keys(inner, f"{prefix}{f.name}.")


def check_config(config: Config) -> Parts:
    """What each setting may be and rules between them; ConfigError says what is wrong and what to do."""
    constraints.check_bounds(config)
    parts, engine = build_parts(config), config.generator.engine
    sampler.check_sampler(config.sampler, parts.rule)
    tool.check_tool(config.rollout, config.sampler, config.evaluate, config.packages)
    dataset.check_mixture(config.data)
    dataset.check_tasks(config)
    rollout_plan.check_plan(parts.plan, config.rollout, config.sampler, engine)
    check_evaluation(config)
    check_engine(engine)
    selection.check_selection(config.rollout, config.driver.max_lag)
    if config.learner.updates_per_rollout > config.rollout.groups_per_step:
        raise ConfigError(
            f"learner.updates_per_rollout={config.learner.updates_per_rollout} needs as many groups, "
            f"rollout.groups_per_step={config.rollout.groups_per_step}"
        )
    if config.learner.reset_after and not config.evaluate.every:
        raise ConfigError(
            f"learner.reset_after={config.learner.reset_after} counts evaluations and there are none: set "
            "evaluate.every"
        )
    if config.model.dtype == "bfloat16" and config.learner.zero_stage == 0:
        raise ConfigError(
            "learner.zero_stage=0 sums the gradients of micro-batches and ranks in bf16, which loses what is "
            "below 1/256 of a sum: with model.dtype=bfloat16 set learner.zero_stage=1"
        )
    if config.generator.sleep and (config.driver.max_lag or config.cluster.gpus_per_generator == 0):
        raise ConfigError(
            "generator.sleep shares a GPU by turns: it needs driver.max_lag=0 and cluster.gpus_per_generator "
            "above 0 (cluster=one_gpu)"
        )
    check_cards(config)
    controllers.check_controllers(config, parts)
    return parts


def check_cards(config: Config) -> None:
    """ConfigError where engines and ranks cannot hold the cards as `cluster` deals them out."""
    g, c, ranks = config.generator, config.cluster, config.learner.ranks
    cards = (
        f"cluster.gpus_per_generator={c.gpus_per_generator:g} and cluster.gpus_per_learner="
        f"{c.gpus_per_learner:g}"
    )
    whole = all(gpus >= 1 and gpus % 1 == 0 for gpus in (c.gpus_per_generator, c.gpus_per_learner))
    shared = "transfer=ipc" if g.transfer == "ipc" else "sleep=true" if g.sleep else None
    if shared and (g.replicas, ranks, g.tensor_parallel) != (1, 1, 1):
        raise ConfigError(
            f"generator.{shared} puts one engine and one rank on one card, and there are generator.replicas="
            f"{g.replicas}, learner.ranks={ranks}, generator.tensor_parallel={g.tensor_parallel}: set all "
            "three to 1, or take cluster=gpu"
        )
    if g.transfer == "nccl" and not whole:
        raise ConfigError(
            f"generator.transfer=nccl needs a whole GPU for each shard and rank, not {cards}: take "
            "cluster=gpu, or generator.transfer=plasma"
        )
    if g.tensor_parallel > 1 and c.gpus_per_generator % 1:
        raise ConfigError(
            f"generator.tensor_parallel={g.tensor_parallel} needs whole GPUs, not cluster."
            f"gpus_per_generator={c.gpus_per_generator:g} for each shard: set it to 1 (cluster=gpu)"
        )


def check_engine(options: dict[str, Any]) -> None:
    """ConfigError for an option of vLLM's that has a setting of its own here, or must not change."""
    for name in sorted(TAKEN.keys() & options.keys()):
        raise ConfigError(f"generator.engine.{name}={options[name]}: drop it, {TAKEN[name]}")


def check_evaluation(config: Config) -> None:
    """ConfigError where `evaluate` asks for what its samples cannot give."""
    e, engine = config.evaluate, config.generator.engine
    plan_evaluation(sampler.plain_draw(config.sampler, config.rollout), e.samples, e.k)
    if e.cot and str(engine.get("logprobs_mode", "")).endswith("logits"):
        raise ConfigError(
            f"evaluate.cot={e.cot} reads probabilities and generator.engine.logprobs_mode="
            f"{engine['logprobs_mode']} reports logits: drop it, or set evaluate.cot=0"
        )


def expand_sweep(overrides: list[str]) -> list[list[str]]:
    """Every combination of sweeping overrides (`seed=1,2,3`), for multirun."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    swept = []
    for text, override in zip(overrides, parsed, strict=True):
        key = text.partition("=")[0]
        values = override.sweep_string_iterator() if override.is_sweep_override() else None
        swept.append([f"{key}={v}" for v in values] if values else [text])
    return [list(c) for c in itertools.product(*swept)]


def fingerprint(tree: Any) -> str:
    """Canonical text of a settings tree, for content hashes."""
    plain = OmegaConf.to_container(tree) if isinstance(tree, DictConfig) else tree
    return json.dumps(plain, sort_keys=True, default=str)
