"""The journal of a run, its console and its trackers."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from entroray.binding import function_name
from entroray.config import Config
from entroray.errors import LearnerLostError
from entroray.observe.console import Console
from entroray.observe.health_tracker import HealthTracker
from entroray.observe.journal import Journal, read_metrics
from entroray.observe.tracker_thread import TrackerThread
from entroray.observe.trackers import TrackedRun
from entroray.wiring.objective import advised_settings
from entroray.wiring.parts import Parts


def open_journal(
    config: Config,
    parts: Parts,
    folder: Path,
    tokenizer: Any,
    file: TextIO | None = None,
    first_step: int = 1,
) -> tuple[Journal, Console, HealthTracker]:
    """The journal of a run in `folder`, its console (the terminal, or `file`) and what tracks its health.

    What trackers hold of `first_step` and beyond, from before a resumption, is outdated.
    """
    console = Console(file=file)
    words = {i: tokenizer.decode([i]) for i in range(len(tokenizer))}
    o = config.observe.tokens
    journal = Journal(folder, tokens_every=o.every, tokens_half=o.half, vocabulary=words)
    journal.say, journal.progress = console.say, console.progress
    return journal, console, track_run(config, parts, journal, console, first_step)


def track_run(
    config: Config,
    parts: Parts,
    journal: Journal,
    console: Console,
    first_step: int,
    lost: LearnerLostError | None = None,
) -> HealthTracker:
    """What follows the run from `first_step` on; those that did until the learner was `lost` end."""
    folder, history = journal.run_dir, read_metrics(journal.run_dir / "metrics.jsonl")
    run = TrackedRun(folder, f"{config.run.name}/{folder.name}", asdict(config), first_step, history)
    health = HealthTracker(journal.event, console.say, history, advised_settings(config, parts.controllers))
    journal.close_trackers(lost)  # before others of the same names are opened
    copies = [TrackerThread(function_name(each), partial(each, run)) for each in parts.trackers]
    journal.trackers, journal.copies, journal.summarize = [console, health], copies, health.summarize
    return health
