"""Command line -> one checked Config; composed here, not by Hydra's wrapper, to keep our exit codes."""

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from entroray.binding import complaint
from entroray.config import TINY, Config, LearnerConfig, share_cards
from entroray.control import Controller
from entroray.errors import ConfigError, first_line, nearest
from entroray.evaluation.evaluate import plan_evaluation
from entroray.rows import conf_folder
from entroray.wiring import (
    constraints,
    controllers,
    dataset,
    overrides,
    own_files,
    rollout_plan,
    run_directory,
    sampler,
    selection,
    tool,
)
from entroray.wiring.parts import Parts, build_parts

TAKEN = {
    "model": "model.path says it",
    "dtype": "model.dtype says it",
    "seed": "seed says it",
    "max_model_len": "it is data.max_prompt + rollout.max_tokens",
    "async_scheduling": "generator.overlap says it",
    "trust_remote_code": "a model's own code is not run",
    **dict.fromkeys(("enable_lora", "max_lora_rank"), "learner.lora and generator.transfer=adapter say it"),
    "return_sampling_mask": "sampler.top_p and sampler.top_k ask for it",
}


TINY_LR = 1e-3
"""Of the tiny model, where none is given."""
MOST_LR = {"full training": 1e-4, "LoRA": 2e-3}
"""Largest learner.lr of a model given by path, by what is trained, unless learner.lr_high says so."""
MOST = 10_000
"""Values that one word may sweep over."""
RENAMED = {
    "model.bootstrap": "model.warm_start",
    "data.bad_rows": "data.settings.bad_rows",
    "objective_packages": "packages",
    "model.path=bootstrap": "model.path=tiny",
}
"""Settings that older pages showed, and their names now."""


def load_config(
    words: list[str], config_dir: str | None = None, *, training: bool = True
) -> tuple[Config, DictConfig]:
    """The composed settings, typed and checked, and as the tree they were composed from.

    An evaluation (`training` False) may be greedy, or cut the tail. Raises ConfigError naming the key and
    the nearest right one.
    """
    _refuse_renamed(words)
    words, given = overrides.read_words(words)
    refuse_sweeps(words, given)
    own = _own_folder(config_dir)
    overrides.refuse_unknown(words, given, own)
    for folder in own:
        own_files.check_own_files(given, folder, overrides.setting_type)
    own_files.refuse_overlaps(given, [conf_folder(), *own])
    found = [f"hydra.searchpath=[{overrides.quote(f'file://{folder.resolve()}')}]" for folder in own]
    conf = str(conf_folder())
    schema = OmegaConf.structured(Config)  # conf/train.yaml begins with it
    ConfigStore.instance().store(name="schema", node=schema)
    try:
        with initialize_config_dir(config_dir=conf, version_base="1.3"):
            first, later = _split_whole(words, given)
            tree = compose("train", overrides=first + found)
        for override in later:
            _put(tree, override)
        overrides.read_line_breaks(tree, given)
    except ConfigError:
        raise
    except Exception as error:  # boundary: whatever Hydra and YAML raise is about the words and files given
        raise ConfigError(overrides.explain(error, words, own)) from error
    return _typed(tree, words, training=training), tree


def _own_folder(config_dir: str | None) -> list[Path]:
    """The folder beside conf/, if one is given."""
    if config_dir is None:
        return []
    folder = Path(os.path.expanduser(config_dir))
    if not folder.is_dir():
        raise ConfigError(f"--config-dir={config_dir} is no folder: give one with conf/'s groups in it")
    return [folder]


def _refuse_renamed(words: list[str]) -> None:
    """ConfigError for a setting by the name that older pages gave it."""
    for word in words:
        path = word.lstrip("+~")
        for old, new in RENAMED.items():
            if path == old or path.startswith((f"{old}.", f"{old}=")):
                raise ConfigError(f"{path}: `{old}` is called `{new}` now: {path.replace(old, new, 1)}")


def override_config(tree: DictConfig, words: list[str], *, training: bool = True) -> Config:
    """Composed settings with `path=value` said beside them; no group can be chosen anew."""
    words, given = overrides.read_words(words)
    refuse_sweeps(words, given)
    try:
        base = [] if OmegaConf.get_type(tree) is Config else [OmegaConf.structured(Config)]
        merged = OmegaConf.merge(*base, tree)
        assert isinstance(merged, DictConfig)
        for each in given:
            _put(merged, each)
        overrides.read_line_breaks(merged, given)
    except OmegaConfBaseException as error:
        raise ConfigError(overrides.explain(error, words)) from error
    return _typed(merged, words, training=training)


def _typed(tree: DictConfig, words: list[str], *, training: bool) -> Config:
    try:
        if tree.learner.lr is None and tree.model.path == TINY:
            tree.learner.lr = TINY_LR  # in the tree, so that it is stored and compared as the run had it
        config: Config = OmegaConf.to_object(tree)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(overrides.explain(error, words)) from error
    parts = check_config(config)
    if training:
        check_lr(config, "LoRA" if config.learner.lora.rank else "full training", parts.controllers)
        sampler.check_training_sampler(config, parts)
        selection.check_training_selection(config.rollout, config.generator.engine, parts.objective)
    return config


def check_config(config: Config) -> Parts:
    """What each setting may be and rules between them; ConfigError says what is wrong and what to do."""
    constraints.check_bounds(config)
    parts, engine = build_parts(config), config.generator.engine
    sampler.check_sampler(config.sampler, parts.rule)
    tool.check_tool(config.rollout, config.sampler, config.evaluate, config.packages)
    dataset.check_mixture(config.data)
    dataset.check_tasks(config)
    dataset.check_sets(config)
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
            "learner.zero_stage=0 sums the gradients of micro-batches in bf16, which loses what is "
            "below 1/256 of a sum: with model.dtype=bfloat16 set learner.zero_stage=1"
        )
    constraints.check_deepspeed(config.learner.deepspeed)
    constraints.check_overlap(config)
    constraints.check_lora(config.learner, config.generator)
    if config.generator.sleep and (config.driver.max_lag or config.cluster.gpus_per_generator == 0):
        raise ConfigError(
            "generator.sleep shares a GPU by turns: it needs driver.max_lag=0 and cluster.gpus_per_generator "
            "above 0 (cluster=one_gpu)"
        )
    check_cards(config)
    check_recomputation(config.learner)
    controllers.check_controllers(config, parts)
    constraints.check_secrets(run_directory.flatten(asdict(config)))
    return parts


def check_recomputation(n: LearnerConfig) -> None:
    """ConfigError for what gradient checkpointing is to do where there is none."""
    asked = {
        "gradient_checkpointing_every_n_layers": n.gradient_checkpointing_every_n_layers > 1,
        "gradient_checkpointing_offload": n.gradient_checkpointing_offload,
    }
    for name in (name for name, is_set in asked.items() if is_set and not n.gradient_checkpointing):
        raise ConfigError(
            f"learner.{name}={getattr(n, name)} does nothing without gradient checkpointing: set "
            "learner.gradient_checkpointing=true"
        )


def check_lr(config: Config, trains: str, moved: Sequence[Controller] = ()) -> None:
    """ConfigError without a learning rate, and where it, or a controller, destroys a trained model."""
    n, most, path = config.learner, MOST_LR[trains], config.model.path
    if n.lr is None:
        raise ConfigError(
            f"learner.lr has no default for model.path={path}: give one, such as learner.lr=1e-6 for a model "
            "of billions of parameters"
        )
    reached = {"learner.lr": n.lr, **controllers.reached(controllers.LR, n.lr, moved)}
    for name, rate in reached.items() if path != TINY and not n.lr_high else ():
        if rate > most:
            raise ConfigError(
                f"{name}={rate:g} is above {most:g}, more than {trains} of model.path={path} is likely to "
                "survive: lower it, or set learner.lr_high=true"
            )


def check_cards(config: Config) -> None:
    """ConfigError where engines and ranks cannot hold the cards as `cluster` deals them out."""
    g, c, n, ranks = config.generator, config.cluster, config.learner, config.learner.ranks
    cards = (
        f"cluster.gpus_per_generator={c.gpus_per_generator:g} and cluster.gpus_per_learner="
        f"{c.gpus_per_learner:g}"
    )
    for name in ("liger", "compile", "gradient_checkpointing_offload"):
        if getattr(n, name) and not c.gpus_per_learner:
            raise ConfigError(
                f"learner.{name}=true is for a learner on GPUs, and cluster.gpus_per_learner=0: set "
                f"learner.{name}=false, or take cluster=gpu"
            )
    if n.compile and n.zero_stage == 3:
        raise ConfigError(
            "learner.compile=true: under learner.zero_stage=3 weights are gathered inside every layer, where "
            "torch's compiler stops: set learner.compile=false, or learner.zero_stage=2"
        )
    whole = all(gpus >= 1 and gpus % 1 == 0 for gpus in (c.gpus_per_generator, c.gpus_per_learner))
    shared = "transfer=ipc" if g.transfer == "ipc" else "sleep=true" if g.sleep else None
    pairs = share_cards(c) and c.gpus_per_generator + c.gpus_per_learner <= 1 and g.replicas == ranks
    if (shared or share_cards(c)) and not (pairs and g.tensor_parallel == 1):
        raise ConfigError(
            f"{f'generator.{shared}' if shared else cards} puts one engine and one rank on each card, and "
            f"generator.replicas={g.replicas}, learner.ranks={ranks}, generator.tensor_parallel="
            f"{g.tensor_parallel}, {cards}: set as many replicas as ranks, tensor_parallel to 1 and both "
            "shares of a card to 0.5, or take cluster=gpu"
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


def _is_inner(key: str) -> bool:
    """Whether a setting is of a part or set, which must be there."""
    return key.startswith(overrides.NAMED) and key.count(".") > 2


def _split_whole(words: Sequence[str], given: Sequence[Override]) -> tuple[list[str], list[Override]]:
    """The words that Hydra composes, and those for afterwards: free dictionaries, and what goes into them.

    Hydra would merge `reward.judge={fn: mine.judge}` into the judge of conf/data, settings and all.
    """
    first, later, whole = list[str](), list[Override](), list[str]()
    for word, override in zip(words, given, strict=True):
        key, kind = override.key_or_group, overrides.setting_type(override.key_or_group)
        free = bool(overrides.mapping_type(kind)) or (is_dataclass(kind) and key.startswith(overrides.NAMED))
        if isinstance(override.value(), dict) and free:
            whole.append(key)
        within = any(f"{key}.".startswith(f"{each}.") for each in whole)
        plain = word.removeprefix("++").startswith(key)  # the last word holds, with or without
        bare = plain and ((kind is Any and key.startswith(overrides.TAKEN)) or _is_inner(key))
        if (within or bare) and not override.is_delete():
            later.append(override)
        else:
            first.append(word)
    return first, later


def _put(tree: DictConfig, override: Override) -> None:
    """Have a setting be what a word gives; a dictionary in place of the one there was."""
    kind = overrides.setting_type(override.key_or_group)
    _refuse_unnamed(tree, override.key_or_group)
    value = _structured(override.key_or_group, kind, override.value())
    whole = isinstance(value, dict | DictConfig)
    OmegaConf.update(tree, override.key_or_group, value, merge=not whole, force_add=whole or kind is Any)


def _refuse_unnamed(tree: DictConfig, key: str) -> None:
    """ConfigError for a setting of a part or set that there is not: a typing error would make one."""
    section = ".".join(key.split(".")[:3])
    place, _, name = section.rpartition(".")
    there = OmegaConf.select(tree, place) or {}
    if key.startswith(overrides.NAMED) and section != key and name not in there:
        choices = f"{nearest(name, there)}, or " if there else ""
        raise ConfigError(f"there is no `{section}`: {choices}give it whole first, '{section}={{task: ...}}'")


def _structured(path: str, kind: Any, value: Any) -> Any:
    """A dictionary as the schema wants it, which for parts and evaluation sets has fields of its own."""
    if isinstance(value, dict) and is_dataclass(kind):
        kinds = {f.name: f.type for f in fields(kind)}
        if wrong := [name for name in value if name not in kinds]:
            raise ConfigError(f"there is no setting `{path}.{wrong[0]}`: {nearest(wrong[0], kinds)}")
        held = {name: _structured(f"{path}.{name}", kinds[name], x) for name, x in value.items()}
        return OmegaConf.merge(OmegaConf.structured(kind), held)
    if kind in overrides.NUMBERS and isinstance(value, int | float):
        return [value]
    wanted = "a mapping" if is_dataclass(kind) else complaint(value, kind)
    if wanted and value == value and "${" not in str(value):  # NaN has bounds
        raise ConfigError(f"{path} must be {wanted}, got {value!r}")
    if isinstance(value, dict) and (mapping := overrides.mapping_type(kind)):
        return {n: _structured(f"{path}.{n}", get_args(mapping)[1], inner) for n, inner in value.items()}
    return value


def refuse_sweeps(words: Sequence[str], given: Sequence[Override]) -> None:
    """ConfigError for a word that names several values, where there is one run."""
    for word, override in zip(words, given, strict=True):
        if override.is_sweep_override():
            key, _, value = word.partition("=")
            spelt = overrides.spell(key, value)
            alone = f"; as one value with commas in it write {spelt}" if spelt else ""
            raise ConfigError(
                f"{word} sweeps over several values: train them one by one with --multirun, or compare them "
                f"with entroray lab{alone}"
            )


def expand_sweep(words: list[str], config_dir: str | None = None) -> list[list[str]]:
    """Every combination of the words that sweep (`seed=1,2,3`); ConfigError for a word that cannot."""
    folders = [conf_folder(), *_own_folder(config_dir)]
    parsed = zip(*overrides.read_words(words), strict=True)
    return [list(each) for each in itertools.product(*(_sweep(*one, folders) for one in parsed))]


def _sweep(word: str, override: Override, folders: Sequence[Path]) -> list[str]:
    """A word for each value that a word sweeps over, or itself; ConfigError where they cannot be listed."""
    if not override.is_sweep_override():
        return [word]
    key = word.partition("=")[0]
    if override.value_type is ValueType.INTERVAL_SWEEP:
        raise ConfigError(
            f"{word} has no list of values: give some, as in {key}=1e-5,1e-4 or '{key}=range(1,4)'"
        )
    try:
        if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
            found: list[str] = _globbed(override, folders)
        else:
            found = list(itertools.islice(override.sweep_string_iterator(), MOST + 1))
    except (HydraException, ArithmeticError, ValueError) as error:
        why = first_line(error)
        raise ConfigError(f"{word} cannot be swept over ({why}): give the values, {key}=1,2") from error
    if not 0 < len(found) <= MOST:
        number = f"more than {MOST}" if found else "no"
        raise ConfigError(f"{word} sweeps over {number} values: give the values, {key}=1,2")
    return [f"{key}={each}" for each in overrides.values_as_typed(word, override, found)]


def _globbed(override: Override, folders: Sequence[Path]) -> list[str]:
    """The choices of a group that a glob fits."""
    group = override.key_or_group
    choices = sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})
    if not choices:
        raise ValueError(f"glob chooses among the files of a folder of conf/, and there is no conf/{group}")
    glob: Any = override.value()
    if not (found := glob.filter(choices)):
        raise ValueError(nearest(override.input_line, choices))
    return found


def fingerprint(tree: Any) -> str:
    """Canonical text of a settings tree, for content hashes."""
    plain = OmegaConf.to_container(tree) if isinstance(tree, DictConfig) else tree
    return json.dumps(plain, sort_keys=True, default=str)
