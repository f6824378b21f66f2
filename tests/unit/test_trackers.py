"""Trackers: what each leaves, one that fails or hangs, and what they are told at the end of a run."""

import asyncio
import csv
import io
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

from entroray.binding import declare
from entroray.cli import signals, train
from entroray.config import Config
from entroray.errors import ConfigError, InfrastructureError, PreflightError, Stopped
from entroray.observe import trackers
from entroray.observe.journal import read_metrics
from entroray.observe.run_summary import summarize
from entroray.observe.tracker_thread import LostError, TrackerThread
from entroray.observe.trackers import TrackedRun
from entroray.policy.tokenizer import byte_tokenizer
from entroray.wiring import compose, preflight
from entroray.wiring.parts import build_parts
from tests.composed import configured
from tests.unit.test_observe import journal, write

# One that fails or hangs.


class Recorder:
    """Keeps what it is told; `log` of a step in `bad` raises what stands there, or waits for it."""

    def __init__(self, **bad):
        self.told, self.bad = [], bad

    def _do(self, *what):
        self.told.append(what)
        trouble = self.bad.get(what[0])
        if isinstance(trouble, BaseException):
            raise trouble
        if trouble:
            trouble.wait(5)

    def log(self, step, metrics):
        self._do("log", step, dict(metrics))

    def finish(self, summary):
        self._do("finish", summary.status, summary.exit_code)

    def close(self):
        self._do("close")


def booked(tmp_path, start, **limits):
    """A journal with one copy, and what was said."""
    book, said = journal(tmp_path), []
    book.say = said.append
    book.copies.append(TrackerThread("mine", start, **limits))
    return book, said


def lost(folder):
    return [e["fields"] for e in read_metrics(folder / "events.jsonl") if e["kind"] == "tracker_lost"]


def test_a_tracker_is_told_every_step_the_evaluation_before_them_and_how_the_run_ended(tmp_path):
    told = Recorder()
    book, said = booked(tmp_path, lambda: told)
    book.event("evaluation", step=0, **{"eval/greedy": 0.5, "eval/ece": float("nan")})
    write(book, 1, 2)
    book.close(Stopped(15, "stopped by SIGTERM"))
    steps = [("log", step, {"entropy/mean": step / 10}) for step in (1, 2)]
    assert told.told == [("log", 0, {"eval/greedy": 0.5}), *steps, ("finish", "stopped", 143), ("close",)]
    assert not said and not lost(tmp_path)


@pytest.mark.parametrize("call", ["log", "finish", "close"])
@pytest.mark.parametrize("error", [ConnectionError("no route"), KeyboardInterrupt(), SystemExit(3)])
def test_one_that_fails_in_any_call_is_said_once_and_the_run_goes_on(tmp_path, call, error):
    told = Recorder(**{call: error})
    book, said = booked(tmp_path, lambda: told)
    for step in (1, 2, 3):
        write(book, step)
        time.sleep(0.02)  # its thread has had the step
    book.close()
    (found,) = lost(tmp_path)
    assert (found["tracker"], found["reason"]) == ("mine", repr(error)) and repr(error) in said[0]
    assert said[0].startswith("observe.trackers: mine ") and len(said) == 1
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert call == "log" or told.told[-1] == ("close",), "one whose finish fails is closed"


def test_one_that_cannot_be_opened_is_said_before_the_first_step(tmp_path):
    book, said = booked(tmp_path, lambda: 1 / 0)
    time.sleep(0.02)
    book.check()
    assert "ZeroDivisionError" in said[0] and not book.copies
    write(book, 1)
    book.close()
    assert len(lost(tmp_path)) == len(said) == 1


@pytest.mark.parametrize("call", ["open", "log", "finish", "close"])
def test_one_that_hangs_holds_neither_a_step_nor_the_end(tmp_path, call):
    ever = threading.Event()
    told = Recorder(**{call: ever})
    start = (lambda: ever.wait(5)) if call == "open" else lambda: told
    began = time.monotonic()
    book, said = booked(tmp_path, start, patience=0.1, end=0.1)
    for step in (1, 2, 3):
        write(book, step)
        time.sleep(0.06)
    book.close()
    assert time.monotonic() - began < 0.6, "five seconds, if anybody waited for it"
    assert len(lost(tmp_path)) == len(said) == 1 and "0.1 s" in said[0]
    ever.set()


def test_trackers_that_hang_at_the_end_are_waited_for_together(tmp_path):
    ever = threading.Event()
    book = journal(tmp_path)
    start = lambda: Recorder(close=ever)
    book.copies += [TrackerThread(f"t{n}", start, end=0.15) for n in range(4)]
    began = time.monotonic()
    book.close()
    assert time.monotonic() - began < 0.4 and len(lost(tmp_path)) == 4
    ever.set()


def test_one_that_falls_behind_is_lost_and_one_that_catches_up_is_not():
    slow = TrackerThread("slow", lambda: SimpleNamespace(log=lambda *_: time.sleep(0.05)), patience=0.12)
    with pytest.raises(LostError):
        for step in range(100):
            slow.log(step, {})
            time.sleep(0.01)
    late = TrackerThread("late", lambda: SimpleNamespace(log=lambda step, _: time.sleep(0.08 * (step == 0))))
    late.patience = 0.12
    for step in range(20):
        late.log(step, {})
        time.sleep(0.01)
    time.sleep(0.15)  # with nothing to do
    late.check()


def test_a_tracker_of_two_methods_is_closed_and_the_run_is_named_by_its_folder(tmp_path):
    seen = []
    old = SimpleNamespace(log=lambda step, metrics: seen.append(step), close=lambda: seen.append("closed"))
    config = configured("run.name=mine")
    parts = replace(build_parts(config), trackers=(partial(lambda run: seen.append(run.name) or old),))
    for cell in ("grpo-0", "grpo-1"):
        book, *_ = train.open_journal(config, parts, tmp_path / cell, byte_tokenizer(), io.StringIO())
        with book:
            write(book, 1)
    assert seen == ["mine/grpo-0", 1, "closed", "mine/grpo-1", 1, "closed"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_the_first_step_is_told_as_the_process_ends(number: int, code: int) -> None:
    told: list[int] = []

    async def begin() -> None:
        signals.cancel_on_sigterm()
        asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), number)
        try:
            async with asyncio.timeout(20.0):
                await asyncio.gather(asyncio.sleep(10.0), asyncio.sleep(10.0))
        except BaseException as error:
            told.append(summarize(error).exit_code)
            raise

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    with pytest.raises((KeyboardInterrupt, asyncio.CancelledError)):
        asyncio.run(begin())
    signal.signal(signal.SIGINT, before)
    assert told == [code]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (None, "finished", 0),
        (Stopped(2, "stopped by SIGINT"), "stopped", 130),
        (KeyboardInterrupt(), "stopped", 130),
        (asyncio.CancelledError(signals.OUTSIDE), "stopped", 143),
        (asyncio.CancelledError(), "stopped", 130),
        (InfrastructureError("a node is lost\nhere"), "failed", 4),
        (ZeroDivisionError("x"), "failed", 1),
    ],
)
def test_a_summary_says_how_the_run_ended_and_what_it_came_to(error, status, code):
    lines = [{"step": 1, "a": 1.0, "eval/greedy": 0.5}, {"step": 2, "a": None, "eval/greedy": 0.25}]
    found = summarize(error, lines, "steady")
    assert (found.status, found.exit_code, found.step) == (status, code, 2)
    assert found.metrics == {"a": 1.0, "eval/greedy": 0.25} and found.best == (1, 0.5)
    assert found.flat()["best/eval/greedy"] == 0.5 and found.flat()["run/health"] == "steady"
    assert "\n" not in found.reason and bool(found.reason) == (error is not None)
    assert summarize(None).best is None


HUNG = """
import sys, threading
from entroray import cli
cli.EXIT = 0.5
threading.Thread(target=threading.Event().wait).start()  # as a library that uploads would
cli.run = lambda words: 4
cli.main()
"""


def test_what_hangs_at_exit_keeps_neither_the_process_nor_its_code():
    done = subprocess.run([sys.executable, "-c", HUNG], timeout=30, check=False)
    assert done.returncode == 4


# tensorboard and csv


def test_tensorboard_holds_the_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    tracker = trackers.tensorboard(TrackedRun(tmp_path, "train", {"seed": 3}, first_step=1))
    tracker.log(7, {"entropy/mean": 1.5})
    tracker.finish(summarize(ZeroDivisionError()))
    tracker.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    found = [(e.step, v.tag, v.tensor) for e in EventFileLoader(str(file)).Load() for v in e.summary.value]
    values = [(step, tag, tensor.float_val[0]) for step, tag, tensor in found if tensor.float_val]
    texts = {tag: tensor.string_val[0].decode() for _, tag, tensor in found if tensor.string_val}
    assert values == [(7, "entropy/mean", 1.5)]
    assert (
        '"seed": 3' in texts["run/settings/text_summary"]
        and texts["run/settings/text_summary"][:6] == "train\n"
    )
    assert "run/status: failed" in texts["run/summary/text_summary"]


def table(folder, name="metrics.csv"):
    with (folder / name).open(newline="") as file:
        return list(csv.reader(file))


def test_csv_has_a_line_a_step_and_a_new_metric_is_a_last_column(tmp_path):
    tracker = trackers.csv(TrackedRun(tmp_path, "x", {}, 1))
    assert table(tmp_path) == [["step"]]
    tracker.log(1, {"entropy/mean": 0.1})
    tracker.log(2, {"entropy/mean": 1e-7, 'eval/a,"b"': 3.0})
    written = (tmp_path / "metrics.csv").stat().st_ino
    tracker.log(3, {'eval/a,"b"': 4.0})
    assert (tmp_path / "metrics.csv").stat().st_ino == written, "a line was appended"
    assert table(tmp_path) == [
        ["step", "entropy/mean", 'eval/a,"b"'],
        ["1", "0.1", ""],
        ["2", "1e-07", "3.0"],
        ["3", "", "4.0"],
    ]
    tracker.finish(summarize(None, [{"step": 3, "eval/greedy": 0.5}], "steady"))
    assert ["best/eval/greedy", "0.5"] in table(tmp_path, "summary.csv")
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["metrics.csv", "summary.csv"]


def test_csv_of_a_resumed_run_is_what_the_journal_has_before_it(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,eval/greedy,a\n0,0.5,\n1,,1.0\n2,,9.9\n3,")
    history = [{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0, "b": None}, {"step": 3, "a": 3.0}]
    tracker = trackers.csv(TrackedRun(tmp_path, "x", {}, 3, history))
    tracker.log(3, {"a": 33.0})
    assert table(tmp_path) == [
        ["step", "eval/greedy", "a"],
        ["0", "0.5", ""],
        ["1", "", "1.0"],
        ["2", "", "2.0"],
        ["3", "", "33.0"],
    ]
    trackers.csv(TrackedRun(tmp_path, "x", {}, 1, history))
    assert table(tmp_path) == [["step"]], "a run that is started over"


# Before the start.


def test_a_package_that_is_missing_is_refused_with_its_extra(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    for name in ("wandb", "mlflow"):
        config = configured(f"observe.trackers=[{{fn: tensorboard}}, {{fn: {name}}}]")
        with pytest.raises(PreflightError, match=rf"^observe\.trackers: {name} .*ENTRORAY_EXTRAS={name} "):
            preflight.trackers(config)
    assert preflight.trackers in preflight.FAST and preflight.trackers(configured()) == "tensorboard"


def test_a_tracker_of_ones_own_says_what_it_needs(monkeypatch):
    def ready(*, host="here"):
        raise PreflightError(f"no {host}")

    @declare(ready=ready)
    def mine(run, *, host="here"):
        return run

    parts = SimpleNamespace(trackers=(partial(mine, host="there"),))
    monkeypatch.setattr(preflight, "build_parts", lambda config: parts)
    with pytest.raises(PreflightError, match="no there"):
        preflight.trackers(Config())


@pytest.mark.parametrize(
    ("word", "instead"),
    [
        ("observe.trackers=[wandb]", "'observe.trackers=[{fn: wandb}]'"),
        ("observe.trackers=wandb", "'observe.trackers=[{fn: wandb}]'"),
        ("observe.trackers=[csv, wandb]", "'observe.trackers=[{fn: csv}, {fn: wandb}]'"),
        ("observe.trackers={fn: csv}", "'observe.trackers=[{fn: csv}]'"),
        ("observe.trackers=null", "'observe.trackers=[]'"),
        ("observe.trackers=None", "'observe.trackers=[]'"),
        ("observe.trackers=[{fn: wandb, projekt: x}]", "`project`"),
        ("observe.trackers=[{fn: wandb, mode: ofline}]", "offline"),
        ("observe.trackers=[{fn: wandb, tags: a}]", "a list"),
        ("observe.trackers=[csv, {fn: wandb, mode: offline}]", "[{fn: csv}, {fn: wandb, mode: offline}]'"),
        ("observe.trackers=[{fn: tensorbord}]", "`tensorboard`"),
    ],
)
def test_a_tracker_that_is_written_otherwise_is_refused_with_the_form(word, instead):
    with pytest.raises(ConfigError) as refused:
        compose.load_config([word])
    assert str(refused.value).count("observe.trackers") and instead in str(refused.value)


def test_names_are_as_mlflow_takes_them():
    names = {
        "eval/pass@8:my part": "eval/pass_at_8:my part",
        "a/b(c)=d": "a/b_c__d",
        "/a//b/": "a/b",
        "../x": "x",
        "été": "été",
        "@": "_at_",
        "": "_",
        "x" * 300: "x" * 250,
    }
    assert {name: trackers._mlflow_name(name) for name in names} == names


def test_two_trackers_of_one_place_are_refused() -> None:
    for name in ("csv", "wandb", "mlflow", "tensorboard"):
        two = f"observe.trackers=[{{fn: {name}}},{{fn: tensorboard}},{{fn: {name}}}]"
        with pytest.raises(
            ConfigError, match=rf"^observe\.trackers has \{{fn: {name}\}} and \{{fn: {name}\}}"
        ):
            configured(two)
    assert len(build_parts(configured("observe.trackers=[{fn: csv},{fn: tensorboard}]")).trackers) == 2
