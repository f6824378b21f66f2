"""The journal on a full disk, after a power cut, and with trackers that raise anything."""

import asyncio
import io
import os
import signal
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from entroray.cli import signals, train
from entroray.errors import DataError, InfrastructureError, LearnerLostError, Stopped
from entroray.observe import report
from entroray.observe.journal import read_metrics, replace_text
from entroray.policy.tokenizer import byte_tokenizer
from entroray.wiring.parts import build_parts
from entroray.wiring.run_directory import RunDirectory
from tests.composed import configured
from tests.unit.test_observe import Shelf, journal, write


def test_a_tracker_may_raise_anything_but_what_a_signal_raises(tmp_path):
    class Panic(BaseException):
        """As extensions written in Rust raise it."""

    book = journal(tmp_path, trackers=[Shelf(0, Panic)])
    write(book, 1)
    (event,) = read_metrics(tmp_path / "events.jsonl")
    assert event["kind"] == "tracker_lost" and "Panic" in event["fields"]["reason"] and not book.trackers
    for raised in (KeyboardInterrupt, asyncio.CancelledError, lambda said: Stopped(15, said)):
        with pytest.raises((KeyboardInterrupt, asyncio.CancelledError, Stopped)):
            write(journal(tmp_path, trackers=[Shelf(0, raised)]), book.last_step + 1)
        book.last_step += 1


class Full(io.StringIO):
    """A file on a full disk, named as the one that it stands for."""

    def __init__(self, name):
        super().__init__()
        self.name = str(name)

    def flush(self):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("file", ["_metrics", "_events"])
def test_a_journal_that_the_disk_refuses_ends_the_run_with_the_space_and_the_remedy(tmp_path, file):
    book = journal(tmp_path)
    setattr(book, file, Full(tmp_path / "it.jsonl"))
    with pytest.raises(InfrastructureError, match=r"it\.jsonl .*No space.* MiB free.*run\.resume=auto"):
        write(book, 1) if file == "_metrics" else book.event("start")
    book.close()


def test_what_is_reported_of_an_actor_on_a_full_disk_interrupts_nobody_and_ends_the_run_at_its_next_step(
    tmp_path,
):
    book = journal(tmp_path)
    book._events = Full(tmp_path / "events.jsonl")
    book.report("engine_lost", engine="generator 0")
    with pytest.raises(InfrastructureError, match=r"events\.jsonl .*No space"):
        write(book, 1)
    assert not read_metrics(tmp_path / "metrics.jsonl")
    book.close()


def test_a_text_that_the_disk_refuses_leaves_the_old_one_and_nothing_aside(tmp_path, monkeypatch):
    replace_text(tmp_path / "report.html", "old")

    def refuse(self, *_, **__):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(InfrastructureError, match=r"report\.html .*No space.* MiB free"):
        replace_text(tmp_path / "report.html", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


def test_a_journal_closes_once_and_drops_what_is_reported_after(tmp_path):
    shelf = Shelf(9)
    with closing(journal(tmp_path, trackers=[shelf])) as book:
        write(book, 1)
        book.close()
    book.event("engine_lost")
    assert shelf.seen[1:] == ["closed"] and not (tmp_path / "events.jsonl").read_text()


def test_damaged_lines_are_named_to_a_reader_and_set_aside_by_the_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\0\n[2]\n{"step": 3}\n{"st')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2 .*run\.resume=auto"):
        read_metrics(path)
    write(journal(tmp_path), 4)
    assert [m["step"] for m in read_metrics(path)] == [1, 3, 4]
    (event,) = read_metrics(tmp_path / "events.jsonl")
    assert event["fields"] == {"file": "metrics.jsonl", "lines": 2, "kept": "metrics.jsonl.damaged"}
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes().startswith(b'{"step": 1}\n\0')
    assert read_metrics(tmp_path / "gone.jsonl") == []
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match=r"folder\.jsonl"):
        read_metrics(tmp_path / "folder.jsonl")


def test_a_vocabulary_that_cannot_be_written_is_lost_and_the_run_goes_on(tmp_path):
    (tmp_path / "tokens").write_text("in the way")
    write(journal(tmp_path, tokens_every=1, vocabulary={1: "a"}), 1)
    assert [e["kind"] for e in read_metrics(tmp_path / "events.jsonl")] == ["tokens_lost", "tokens_lost"]


def test_a_report_names_token_records_that_are_damaged(tmp_path):
    (tmp_path / "tokens").mkdir()
    for name in ("step-000001.parquet", "step-000001 (copy).parquet"):
        (tmp_path / "tokens" / name).write_bytes(b"PAR1")
    assert "step-000001.parquet: it is damaged" in report.write_report(tmp_path).read_text()


def ended(error):
    async def start(*_, **__):
        if error is signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(5)
        raise error

    return start


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (InfrastructureError("lost"), InfrastructureError),
        (ZeroDivisionError(), ZeroDivisionError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (signal.SIGTERM, asyncio.CancelledError),
    ],
)
def test_journal_and_trackers_are_closed_however_a_run_ends(tmp_path, monkeypatch, error, raised):
    closed = []
    tracker = SimpleNamespace(log=lambda step, metrics: None, close=lambda: closed.append(True))
    parts = replace(build_parts(configured()), trackers=(partial(lambda run: tracker),))
    monkeypatch.setattr(train.actors, "join_cluster", lambda config: "")
    monkeypatch.setattr(train.actors, "start_actors", ended(error))
    monkeypatch.setattr(train.cluster, "stop", lambda: None)
    read_in = SimpleNamespace(tokenizer=byte_tokenizer(), judge={})
    run = RunDirectory(tmp_path)
    with pytest.raises(raised):
        asyncio.run(train._train(configured(), parts, read_in, run, {"model": "tiny"}, ""))
    assert closed == [True]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("saved", ["step-000004", ""])
def test_a_signal_as_a_run_goes_back_ends_it_with_the_line_of_its_last_checkpoint(
    tmp_path, monkeypatch, number, code, saved
):
    if saved:
        (tmp_path / "checkpoints" / saved).mkdir(parents=True)
        (tmp_path / "checkpoints" / saved / "COMMITTED").touch()

    async def drive(*_):
        signals.stop_on_signals(SimpleNamespace(stop=lambda: None))
        raise LearnerLostError("learner rank 0: its process died")

    async def go_back(*_):
        os.kill(os.getpid(), number)
        await asyncio.sleep(5)

    async def run():
        book = SimpleNamespace(event=lambda *_, **__: None)
        of = RunDirectory(tmp_path)
        return await train._drive_through(configured(), None, None, None, book, None, None, of)

    monkeypatch.setattr(train, "drive", drive)
    monkeypatch.setattr(train, "_go_back", go_back)
    with pytest.raises(Stopped, match=rf"{saved or 'its beginning'}\. .*run\.resume=auto") as raised:
        asyncio.run(run())
    assert raised.value.exit_code == code
