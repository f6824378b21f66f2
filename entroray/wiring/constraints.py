"""What single numbers and names of the settings may be; rules between several stand in `settings.check`."""

import os
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from entroray.config import PATHS, Config, GeneratorConfig, LearnerConfig, Lora
from entroray.engine.adapter import ADAPTER, RANKS
from entroray.errors import ConfigError
from entroray.redaction import IN_URL, secrets


class Bound(NamedTuple):
    """What a number must be, in words and as a test that NaN fails."""

    words: str
    holds: Callable[[Any], bool]


BOUNDS = {
    "count": Bound("at least 1", lambda x: x >= 1),
    "natural": Bound("at least 0", lambda x: x >= 0),
    "positive": Bound("above 0", lambda x: x > 0),
    "positive_or_null": Bound("above 0, or null", lambda x: x is None or x > 0),
    "share": Bound("between 0 and 1", lambda x: 0 <= x <= 1),
    "positive_share": Bound("above 0 and at most 1", lambda x: 0 < x <= 1),
    "count_or_null": Bound("at least 1, or null", lambda x: x is None or x >= 1),
    "natural_or_null": Bound("at least 0, or null", lambda x: x is None or x >= 0),
    "positive_share_or_null": Bound("above 0 and at most 1, or null", lambda x: x is None or 0 < x <= 1),
    "repeats": Bound("0 (off) or at least 2", lambda x: x == 0 or x >= 2),
    "seed": Bound("from 0 to 2^32 - 1, as NumPy's", lambda x: 0 <= x < 2**32),
    "top_k": Bound("at least 1, or 0 for all tokens", lambda x: x >= 0),
    "band": Bound(
        "two shares, the lower first, both in [0, 1]", lambda x: len(x) == 2 and 0 <= x[0] <= x[1] <= 1
    ),
    "betas": Bound(
        "two numbers from 0 to below 1", lambda x: len(x) == 2 and all(0 <= beta < 1 for beta in x)
    ),
}
NUMBERS = {
    path: BOUNDS[name]
    for path, name in map(str.split, Path(__file__).with_name("bounds.tsv").read_text().splitlines())
}
"""What each number must be; rules between several settings are in `check_config`."""
OF_SETS = {
    "prompts": BOUNDS["count_or_null"],
    "samples": BOUNDS["count_or_null"],
    "temperature": BOUNDS["natural_or_null"],
    "top_p": BOUNDS["positive_share_or_null"],
    "max_tokens": BOUNDS["count_or_null"],
}
"""What each number of an evaluation set must be."""

NAMES: dict[str, tuple[object, ...]] = {
    path: tuple(int(choice) if choice.isdecimal() else choice for choice in choices)
    for path, *choices in map(str.split, Path(__file__).with_name("choices.tsv").read_text().splitlines())
}
"""What may be chosen. A schedule is one that transformers makes of two numbers, warm-up and all updates."""


LONG = 12
"""Characters of a secret that stands in a setting by no chance."""


def check_bounds(config: Config) -> None:
    """ConfigError for a number out of its bounds, or a name that is no choice or no folder."""
    for path, bound in NUMBERS.items():
        value = attrgetter(path)(config)
        if not bound.holds(value):
            raise ConfigError(f"{path}={value} must be {bound.words}")
    for field, bound in OF_SETS.items():
        for of, each in config.evaluate.sets.items():
            if not bound.holds(value := getattr(each, field)):
                raise ConfigError(f"evaluate.sets.{of}.{field}={value} must be {bound.words}")
    for path, choices in NAMES.items():
        value = attrgetter(path)(config)
        if value not in choices:
            *most, last = map(str, choices)
            raise ConfigError(f"{path}={value}: choose {', '.join(most)} or {last}")
    if half := config.observe.tokens.half:
        from entroray.observe.token_records import MEASURED  # pyarrow takes a while

        if wrong := [name for name in half if name not in MEASURED]:
            raise ConfigError(f"observe.tokens.half={wrong}: choose among {', '.join(MEASURED)}")
    for path in PATHS:
        refuse_nobody(path, attrgetter(path)(config))
    name = Path(config.run.name)
    if name.is_absolute() or not name.parts or ".." in name.parts or name.parts[0] == "latest":
        raise ConfigError(
            f"run.name={config.run.name!r} must name a folder below runs/ other than latest; where a run is "
            "written is run.dir"
        )


def check_overlap(config: Config) -> None:
    """ConfigError for steps scheduled ahead on a CPU, where vLLM's platform switches that off."""
    if config.generator.overlap and not config.cluster.gpus_per_generator:
        raise ConfigError(
            "generator.overlap=true: vLLM schedules ahead on GPUs alone, and cluster.gpus_per_generator=0: "
            "set generator.overlap=false, or take cluster=gpu"
        )


def check_deepspeed(given: Mapping[str, Any]) -> None:
    """ConfigError for what of `learner.deepspeed` is no section, or cannot be chosen there."""
    for name in ("bf16", "data_types", "optimizer", "zero_optimization"):
        if not isinstance(given.get(name), Mapping | None):
            raise ConfigError(f"learner.deepspeed sets {name}={given[name]}: give a dictionary, such as {{}}")
    remedies = {
        "stage": "set learner.zero_stage in its place",
        "zero_hpz_partition_size": "drop it, DeepSpeed has it for one model of a process, not for a second",
    }
    for name in remedies.keys() & (given.get("zero_optimization") or {}):
        raise ConfigError(f"learner.deepspeed sets zero_optimization.{name}: {remedies[name]}")
    if "lr" in ((given.get("optimizer") or {}).get("params") or {}):
        raise ConfigError("learner.deepspeed sets optimizer.params.lr: set learner.lr in its place")


def check_lora(n: LearnerConfig, g: GeneratorConfig) -> None:
    """ConfigError for an adapter that is not trained, that engines cannot serve, or that is anchored."""
    rank, alone = n.lora.rank, g.transfer == ADAPTER
    if not rank and (alone or n.lora != Lora()):
        asked = "generator.transfer=adapter" if alone else "learner.lora"
        raise ConfigError(
            f"{asked} is of adapters, and learner.lora.rank=0 trains none: set learner.lora.rank, as "
            "learner=lora does, or leave it out"
        )
    if rank and not n.lora.targets:
        raise ConfigError(
            f"learner.lora.targets=[] gives no matrix an adapter of learner.lora.rank={rank}: name some, or "
            "take [all-linear]"
        )
    remedies = {"generator.transfer=plasma": alone, "learner.lora.export=merged": n.lora.export == "adapter"}
    if rank > RANKS[-1] and any(remedies.values()):
        asked = " and ".join(name for name, needed in remedies.items() if needed)
        raise ConfigError(
            f"learner.lora.rank={rank}: vLLM serves adapters of rank {RANKS[-1]} at most: lower it, or set "
            f"{asked}, for merged weights"
        )
    if alone and g.sleep:
        raise ConfigError(
            "generator.transfer=adapter sends no base, and generator.sleep=true gives its memory away: set "
            "generator.transfer=ipc, which sends merged weights, or generator.sleep=false"
        )
    if rank and n.reset_after:
        raise ConfigError(
            f"learner.reset_after={n.reset_after} makes present weights the reference, and with "
            f"learner.lora.rank={rank} that is the model itself: set learner.reset_after=0, or "
            "learner.lora.rank=0"
        )


def check_secrets(settings: Iterable[tuple[str, Any]]) -> None:
    """ConfigError for a setting with a password in a URL, or a secret of this shell: settings are written."""
    known = {value: name for value, name in secrets().items() if len(value) >= LONG}
    for path, text in ((path, f"{path}={value}") for path, value in settings):
        name = next((name for value, name in known.items() if value in text), "")
        if name or IN_URL.search(text):
            what = f"the value of {name}" if name else "a password or key in a URL"
            raise ConfigError(
                f"{path} holds {what}, which would be written with the run: leave it to a variable of the "
                "environment, by its name where a setting takes one (key_env=NAME)"
            )


def refuse_nobody(setting: str, path: str | None) -> None:
    """ConfigError for the home of a user that there is not."""
    if path and path.startswith("~") and os.path.expanduser(path) == path:
        user = path.partition("/")[0].removeprefix("~")
        raise ConfigError(f"{setting}={path}: this machine has no user `{user}`: write the folder out")
