"""`entroray plan`: what limits a run of these settings, what lag is worth, what more machines would give."""

import asyncio
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from entroray.cli import flags
from entroray.cli.calibration import open_bench, shape_of
from entroray.cli.flags import CONFIG_DIR, Flag
from entroray.config import Config
from entroray.errors import ConfigError, PreflightError
from entroray.observe.journal import read_metrics
from entroray.planning.memory import table
from entroray.planning.rates import Step, load_rates, rate_lines, run_rates
from entroray.planning.simulate import Rates, Shape, bounds, simulate
from entroray.wiring import actors, compose, dataset, memory, preflight, run_directory, warm_start
from entroray.wiring.objective import check_objective
from entroray.wiring.parts import Parts, build_parts
from entroray.workers import cluster

FLAGS = (
    Flag("rates", "FILE"),
    Flag("engines", "LIST"),
    Flag("json"),
    Flag("card", "GB"),
    Flag("table"),
    CONFIG_DIR,
)
ALIKE = 32
"""Engines that are simulated one by one."""
COLUMNS = ("seconds", "tokens/per_second", "sample", "learn", "sync", "rest")
IDLE = ("idle/generator", "idle/learner", "idle/verifier", "idle/driver")


def main(arguments: list[str]) -> int:
    """`plan [--rates FILE] [--engines LIST] [--json] overrides`: rates are measured here, or read.

    With `--card GB` and no rates it says what cards of that size hold, and ends; 3 if it is too much. With
    `--table` it prints the table of `launch/README.md`.
    """
    given, overrides = flags.parse_flags("plan", arguments, FLAGS)
    if "table" in given:
        print("\n".join(table()))
        return 0
    config, _ = compose.load_config(overrides, given.get("config-dir"))
    parts = build_parts(config)
    check_objective(config, parts)
    counts = _counts(given["engines"]) if "engines" in given else []
    card = memory.named_card(given["card"]) if "card" in given else None
    if card and actors.cpu_only(config.cluster):
        raise ConfigError(f"plan --card={given['card']}: these settings ask for no card: add cluster=gpu")
    if card and "rates" not in given:
        held = [*memory.memory_lines(config, parts.objective, card), *_placed(config)]
        print(json.dumps({"memory": held}) if "json" in given else "\n".join(held))
    if card:
        memory.check_cards(config, parts.objective, card)
    if card and "rates" not in given:
        return 0
    if "rates" in given:
        rates, source = _read(Path(given["rates"]))
    else:
        rates, drift = _measure(config, parts, overrides, given.get("config-dir"))
        source = f"measured here; steps after took {drift:.2f} of those before"
        card = card or (None if config.cluster.address else memory.smallest_card())
    held = [*memory.memory_lines(config, parts.objective, card), *_placed(config)]
    modelled = _model(shape_of(config), rates, counts)
    if "json" in given:
        print(json.dumps({"source": source, "rates": asdict(rates), "memory": held, "modelled": modelled}))
    else:
        print("\n".join([*held, "", *rate_lines(rates, source), "", *_table(modelled)]))
    return 0


def _placed(config: Config) -> list[str]:
    return [f"placed: {line}" for line in actors.placement_lines(config)]


def _counts(text: str) -> list[int]:
    counts = [int(word) if word.isdecimal() else 0 for word in text.split(",")]
    if min(counts) < 1:
        raise ConfigError(f"plan --engines={text}: give numbers of engines from 1 on, such as 1,8,64")
    return counts


def _read(path: Path) -> tuple[Rates, str]:
    """The rates that `plan --json` printed, or those of a finished run; ConfigError for another file."""
    if path.is_dir() or path.suffix == ".jsonl":
        return _of_run(path if path.is_dir() else path.parent), f"of the run {path}"
    try:
        return load_rates(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"plan --rates={path} holds no rates ({error!r}): give what `entroray plan --json` printed, or "
            "metrics.jsonl of a run"
        ) from error


def _of_run(folder: Path) -> Rates:
    settings = run_directory.read_settings(folder / "config.yaml")
    lines = read_metrics(folder / "metrics.jsonl")
    if not settings or not lines:
        raise ConfigError(f"plan --rates: {folder} is no run: give metrics.jsonl, with config.yaml beside it")
    config = compose.override_config(OmegaConf.create(settings), [], training=False)
    if config.driver.max_lag:
        raise ConfigError(
            f"plan --rates: {folder} is a run of driver.max_lag={config.driver.max_lag}, in which phases "
            "overlap: give one of driver.max_lag=0"
        )
    try:
        return run_rates([Step(shape_of(config), line) for line in lines])
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"plan --rates: the metrics of {folder} are not enough ({error}): give a run of this version, "
            "with steps that no evaluation follows (evaluate.every=0)"
        ) from error


def _measure(
    config: Config, parts: Parts, overrides: list[str], config_dir: str | None
) -> tuple[Rates, float]:
    try:
        actors.check_gpus(config.cluster)
    except PreflightError as error:
        raise PreflightError(f"{error}, or give --rates=FILE, measured elsewhere") from error
    preflight.refuse_wrong(config)
    warm_start.ensure_model(config, overrides, config_dir)
    read_in = dataset.read_dataset(config, warm_start.run_tokenizer(config))
    print("measuring engines, learner, verifiers and driver: a minute or more", file=sys.stderr, flush=True)
    actors.join_cluster(config)

    async def measured() -> tuple[Rates, float]:
        bench = await open_bench(config, parts, read_in, warm_start.resolve_model(config))
        found = await bench.calibrate()
        await bench.machine.stop()
        return found

    try:
        return asyncio.run(measured())
    finally:
        cluster.stop()


def _model(shape: Shape, rates: Rates, counts: list[int]) -> dict[str, Any]:
    """Everything that is computed, by what it is computed of."""
    lags = {f"lag {lag}": replace(shape, max_lag=lag) for lag in sorted({0, 1, 2, shape.max_lag})}
    more = {
        "another engine": replace(shape, engines=shape.engines + 1),
        "another rank": replace(shape, ranks=shape.ranks + 1),
    }
    rows: dict[str, Any] = {name: simulate(each, rates) for name, each in (lags | more).items()}
    rows[f"lag {shape.max_lag}"]["without"] = bounds(shape, rates)
    for count in counts:
        of, scaled, alike = _grown(shape, rates, count)
        row: dict[str, Any] = {**simulate(of, scaled), "without": bounds(of, scaled)}
        rows[f"{count} engines"] = row | {"tokens/per_second": alike * row["tokens/per_second"]}
    return rows


def _grown(shape: Shape, rates: Rates, engines: int) -> tuple[Shape, Rates, float]:
    """So many engines, and ranks, verifiers, cores and groups a step in proportion; how many each stands for.

    Beyond `ALIKE` engines one stands for several, and what there is one of works as much more for it.
    """
    each = max(1.0, engines / ALIKE)
    by = engines / each / shape.engines
    names = ("engines", "ranks", "verifiers", "groups")
    grown = replace(shape, **{name: max(1, round(getattr(shape, name) * by)) for name in names})
    single = {name: each * getattr(rates, name) for name in ("driver", "driver_step", "sync_engine")}
    return grown, replace(rates, **single, cores=rates.cores * by), each


def _table(modelled: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield "modelled from these rates, not measured (seconds of a step; sample: the learner waits):"
    yield f"{'':16}" + "".join(f"{name:>{len(name) + 3}}" for name in (*COLUMNS, *IDLE))
    first = modelled["lag 0"]["seconds"]
    for name, row in modelled.items():
        shown = [f"{row[c]:,.{0 if 'tokens' in c else 3}f}" for c in COLUMNS] + [
            f"{row[c]:.0%}" for c in IDLE
        ]
        yield f"{name:16}" + "".join(
            f"{cell:>{len(c) + 3}}" for cell, c in zip(shown, (*COLUMNS, *IDLE), strict=True)
        )
        if "without" in row:
            yield _bound(row["seconds"], row["without"])
    worth = (f"{name} {first / row['seconds']:.2f}" for name, row in modelled.items() if name[:3] == "lag")
    yield f"speed over lag 0: {', '.join(worth)}"


def _bound(seconds: float, without: Mapping[str, float]) -> str:
    saved = {name: seconds - left for name, left in without.items() if left < 0.995 * seconds}
    told = ", ".join(f"{name} {gain:.3f}" for name, gain in saved.items())
    return f"{'':16}   bound: {next(iter(saved), 'nothing')}; what each costs a step: {told or 'nothing'} s"
