"""`entroray lab`: objectives x seeds x tasks on one cluster, compared over seeds, resumable."""

import asyncio
import hashlib
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from entroray.cli import flags, signals, train
from entroray.cli.flags import CONFIG_DIR, Flag
from entroray.config import Config
from entroray.errors import ConfigError, EntrorayError, Stopped
from entroray.observe import comparison_page, lab_cells
from entroray.observe.comparison import (
    LEGEND,
    OLDER,
    code_lines,
    grid,
    markdown,
    missing_lines,
    name_run,
    tables,
    tasks,
)
from entroray.observe.console import Console, plain_table, wide_terminal
from entroray.observe.journal import read_metrics, replace_text
from entroray.observe.lab_cells import Cell, variant_name
from entroray.redaction import hide_secrets
from entroray.wiring import compose, run_directory
from entroray.wiring.actors import cpu_only
from entroray.wiring.objective import check_objective
from entroray.wiring.parts import Parts, build_parts
from entroray.wiring.reused_actors import ReusedActors, lasting
from entroray.workers import cluster


@dataclass(frozen=True)
class Job:
    """A cell and the settings it runs with."""

    cell: Cell
    config: Config
    tree: DictConfig
    parts: Parts
    move: Callable[..., None] = lambda **moved: None
    """Moves the bar of the lab."""


FLAGS = (Flag("dir", "FOLDER"), Flag("baseline", "VARIANT"), CONFIG_DIR)


def main(arguments: list[str]) -> int:
    """`lab [--dir FOLDER] [--baseline VARIANT] [--config-dir FOLDER] overrides`; without those: the tables.

    Exit code 0 when every cell asked for is done, else that of the first that failed.
    """
    given, overrides = flags.parse_flags("lab", arguments, FLAGS)
    config_dir = given.get("config-dir")
    folder = run_directory.place(given.get("dir", "runs/lab"), "--dir")
    jobs = plan(folder, overrides, config_dir) if overrides else []
    run_directory.make_folder(folder, "--dir")
    lock = run_directory.lock_folder(folder)
    for file in lab_cells.cell_files(folder):
        if lab_cells.load_cell(file) is None:
            print(f"{file} is damaged: the cell counts as never run", flush=True)
    known = {cell.name: cell for cell in lab_cells.load_cells(folder)}
    todo = [job for job in jobs if not _done(job.cell, known.get(job.cell.name))]
    for job in jobs:
        lab_cells.save_cell(folder, _kept(job.cell, known.get(job.cell.name)))
    write_report = lambda: _report(folder, given.get("baseline"))
    write_report()
    print(f"{len(jobs)} cells asked for, {len(jobs) - len(todo)} done before, in {folder}", flush=True)
    if todo:
        _run(folder, todo, write_report, ReusedActors(config_dir))
    _print(folder, write_report())
    lock.close()
    wanted = {job.cell.name for job in jobs}
    return next((c.exit_code for c in lab_cells.load_cells(folder) if c.exit_code and c.name in wanted), 0)


def plan(folder: Path, overrides: Sequence[str], config_dir: str | None = None) -> list[Job]:
    """A job for every combination that the overrides sweep, in the order they are run.

    Those that share a machine follow each other, and of them every objective's first seed comes first,
    so that a lab cut short has compared something.
    """
    jobs = [_job(folder, each, config_dir) for each in compose.expand_sweep(list(overrides), config_dir)]
    if len({(j.config.cluster.address, cpu_only(j.config.cluster)) for j in jobs}) > 1:
        raise ConfigError("a lab has one Ray cluster: sweep neither cluster nor cluster.address")
    machines = list(dict.fromkeys(_machine(job) for job in jobs))
    seeds = list(dict.fromkeys(job.cell.seed for job in jobs))
    return sorted(jobs, key=lambda job: (machines.index(_machine(job)), seeds.index(job.cell.seed)))


def _machine(job: Job) -> str:
    return compose.fingerprint(lasting(job.config, job.parts))


def _job(folder: Path, overrides: Sequence[str], config_dir: str | None) -> Job:
    config, tree = compose.load_config(list(overrides), config_dir)
    if config.run.dir or config.run.resume != "never" or config.checkpoint.every:
        raise ConfigError(
            "a lab places its runs itself and starts a killed one over: leave out run.dir, run.resume and "
            "checkpoint.every"
        )
    plain = compose.fingerprint(OmegaConf.to_container(tree, resolve=True))
    digest = hashlib.blake2b(plain.encode(), digest_size=16).hexdigest()
    cell = Cell(tuple(overrides), config.seed, digest)
    config.run.dir = tree.run.dir = str(lab_cells.cell_path(folder, cell))
    config.checkpoint.every_minutes = tree.checkpoint.every_minutes = 0.0  # a killed one starts over
    return Job(cell, config, tree, build_parts(config))


def _done(wanted: Cell, known: Cell | None) -> bool:
    """Whether a cell was finished with the settings it has now; one that failed is tried again."""
    if known and known.status == "done" and known.settings != wanted.settings:
        print(f"{known.name}: its settings are others now, it is run again", flush=True)
    return bool(known and known.status == "done" and known.settings == wanted.settings)


def _kept(wanted: Cell, known: Cell | None) -> Cell:
    """What is on disk of a cell until its own run begins: what is known of it, whatever is asked now."""
    if known is None or known.status != "done":
        return known or wanted
    return replace(known, reason="" if known.settings == wanted.settings else OLDER)


def _run(folder: Path, jobs: Sequence[Job], write_report: Callable[[], Any], bench: ReusedActors) -> None:
    signals.take_sigterm()
    try:
        asyncio.run(_work(folder, jobs, write_report, bench))
    except asyncio.CancelledError as error:
        say = "ended by SIGTERM: the same command goes on, cells that are done are left alone"
        raise Stopped(signal.SIGTERM, say) from error
    finally:
        cluster.stop()


async def _work(
    folder: Path, jobs: Sequence[Job], write_report: Callable[[], Any], bench: ReusedActors
) -> None:
    signals.cancel_on_sigterm()
    code = run_directory.code_version()
    of_task = tasks([job.cell for job in jobs])
    with Console().progress("lab", len(jobs)) as move:
        for number, job in enumerate(jobs, start=1):
            print(f"[{number}/{len(jobs)}] {name_run(job.cell, of_task)}", flush=True)
            lab_cells.save_cell(folder, job.cell)  # its files are about to go, and what they came to too
            cell = replace(await _attempt(bench, replace(job, move=move)), code=code)
            lab_cells.save_cell(folder, cell)
            print(f"    {_line(cell)}", flush=True)
            write_report()
            move(completed=number)
    await bench.clear()


async def _attempt(bench: ReusedActors, job: Job) -> Cell:
    """The cell with what came of it; after a failure the next one gets a machine of its own."""
    try:
        measured = await _measure(bench, job)
    except Stopped as stopped:
        say = f"stopped in {job.cell.name}: the same command goes on, cells that are done are left alone"
        raise Stopped(stopped.exit_code - 128, say) from stopped
    except Exception as error:  # boundary: one cell's fault, whatever it is, is not the others'
        if not isinstance(error, ConfigError):  # which comes before any machine is touched
            await bench.clear(broken=True)
        Path(str(job.config.run.dir), "error.txt").write_text(hide_secrets(traceback.format_exc()))
        code = error.exit_code if isinstance(error, EntrorayError) else 1
        said = hide_secrets(f"{type(error).__name__}: {' '.join(str(error).split())}")
        return _ended(replace(job.cell, status="failed", reason=said[:300], exit_code=code))
    return _ended(replace(job.cell, status="done", measured=measured))


def _ended(cell: Cell) -> Cell:
    return replace(cell, finished=datetime.now(UTC).isoformat(timespec="seconds"))


async def _measure(bench: ReusedActors, job: Job) -> dict[str, float]:
    """One run from first weights to last, as `entroray train` makes it, and what it came to."""
    config, folder = job.config, Path(str(job.config.run.dir))
    _fresh(folder)
    check_objective(config, job.parts)
    m, read_in, before = await bench.ready(config, list(job.cell.overrides), job.parts)
    settings = OmegaConf.to_yaml(job.tree, resolve=True)
    run_directory.write_manifest(folder, settings, {**m.facts, "seed": config.seed, "model": bench.model})
    began = time.monotonic()
    try:
        with (folder / "console.log").open("w", encoding="utf-8") as file:
            journal, console, health = train.open_journal(config, job.parts, folder, read_in.tokenizer, file)
            part = 1 / config.run.steps  # of a cell
            console.training = lambda **moved: job.move(advance=part) if "completed" in moved else None
            run = run_directory.RunDirectory(folder)
            with journal:
                await train.drive(config, job.parts, read_in, m, journal, health, run)
    finally:
        signals.cancel_on_sigterm()
    seconds = time.monotonic() - began
    await train.export_model(m, read_in.tokenizer, folder)
    after = await bench.measure_heldout(config)
    found = lab_cells.summarise_run(read_metrics(folder / "metrics.jsonl")) | {"seconds/train": seconds}
    named = {"before": before, "after": after}
    return found | {f"{when}/{name}": x for when, each in named.items() for name, x in each.items()}


def _fresh(folder: Path) -> None:
    """What a killed run left is gone; that the cell was asked for stays known throughout."""
    for each in folder.iterdir():
        if each.name != "cell.json":
            shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()


def _line(cell: Cell) -> str:
    """A finished cell in one line."""
    if cell.status == "failed":
        return f"failed: {cell.reason}"
    shown = {
        "correct": ("correct/first", "correct/final", ".3f"),
        "entropy": ("entropy/first", "entropy/final", ".4f"),
        "greedy": ("before/greedy", "after/greedy", ".3f"),
    }
    said = [
        f"{name} {cell.measured[a]:{form}} to {cell.measured[b]:{form}}"
        for name, (a, b, form) in shown.items()
        if a in cell.measured and b in cell.measured
    ]
    return ", ".join([*said, f"{cell.measured['seconds/train']:.0f} s"])


def _report(folder: Path, baseline: str | None) -> tuple[list[Cell], str]:
    """Write CSV, Markdown and page of every cell ever asked of this lab; (cells, the baseline's name)."""
    cells = sorted(
        lab_cells.load_cells(folder), key=lambda c: (c.task, c.objective, sorted(c.extras), c.seed)
    )
    named = {c.name: variant_name(c, of_task) for of_task in tasks(cells).values() for c in of_task}
    names = list(dict.fromkeys(named.values()))
    chosen = baseline or ("grpo" if "grpo" in names else next(iter(names), ""))
    if chosen not in names:
        raise ConfigError(f"--baseline={chosen}: the lab in {folder} has {', '.join(names) or 'no cell yet'}")
    cells.sort(key=lambda c: (c.task, named[c.name] != chosen))
    lab_cells.write_cells_csv(folder, cells)
    replace_text(folder / "lab.md", markdown(cells, chosen))
    comparison_page.write_lab_page(folder, cells, chosen)
    return cells, chosen


def _print(folder: Path, reported: tuple[list[Cell], str]) -> None:
    cells, baseline = reported
    terminal = wide_terminal()
    for table in tables(cells, baseline):
        terminal.print(plain_table(grid(table), table.title))
    print("\n".join([*missing_lines(cells), *code_lines(cells), "", f"baseline {baseline}. {LEGEND}", ""]))
    print("\n".join(f"{name:10} {folder / file}" for name, file in FILES.items()), flush=True)


FILES = {"cells": "cells.csv", "markdown": "lab.md", "page": "lab.html"}
