"""Bars on a terminal: what they say, and that pipes, logs and dumb terminals get none."""

import io
import json
import os
import re
import time
from pathlib import Path

import pytest

from entroray.observe.console import Console
from entroray.observe.journal import Journal


class Screen:
    """A terminal of its own; `text` is all that was drawn, without colours."""

    def __init__(self) -> None:
        self.ours, theirs = os.openpty()
        self.file = os.fdopen(theirs, "w")

    def text(self) -> str:
        self.file.flush()
        os.set_blocking(self.ours, False)
        found = b""
        try:
            while part := os.read(self.ours, 65536):
                found += part
        except BlockingIOError:
            return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", found.decode())


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    for name, value in {"TERM": "xterm", "COLUMNS": "160", "LINES": "40"}.items():
        monkeypatch.setenv(name, value)
    return Screen()


def test_the_bar_of_a_run_has_steps_time_left_controllers_and_the_last_event(
    screen: Screen, tmp_path: Path
) -> None:
    console = Console(file=screen.file)
    journal = Journal(tmp_path, tokens_every=0, trackers=[console])
    with console.progress("training", 4, 1) as console.training:
        for step in (2, 3):
            console.log(step, {"correct/mean": 0.5, "control/bonus": step / 100})
            time.sleep(0.02)
        journal.event("checkpoint", step=3)
        journal.event("control", controllers=[])
        console.bars.refresh()
    text = screen.text()
    assert re.search(r"3/4 .* \d:\d\d:\d\d left +bonus 0.03, last event: checkpoint at step 3", text)
    assert "    2   0.500" in text, "the line of each step stays"
    journal.event("trained")
    assert "trained" not in screen.text(), "after its end"


def test_a_bar_without_a_total_says_what_is_waited_for_and_an_evaluation_has_its_own(screen: Screen) -> None:
    console = Console(file=screen.file)
    with console.progress("model load", said=lambda: "engine 0: 3.0 s"):
        console.bars.refresh()
    with console.progress("training", 9), console.progress("evaluation", 8) as move:
        move(advance=3)
        console.bars.refresh()
    text = screen.text()
    assert re.search(r"model load \S+ +0:00:00 +engine 0: 3\.0 s", text)
    assert re.search(r"training .* 0/9 ", text) and re.search(r"evaluation .* 3/8 ", text)
    assert not console.bars.live.is_started


@pytest.mark.parametrize("term", ["pipe", "dumb"])
def test_where_nobody_looks_there_is_no_bar_and_no_line_more(
    screen: Screen, term: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb" if term == "dumb" else "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1" if term == "pipe" else "")
    out = screen.file if term == "dumb" else io.StringIO()
    console = Console(file=out)
    with console.progress("training", 4) as console.training:
        console.log(1, {"correct/mean": 0.5})
    text = screen.text() if term == "dumb" else out.getvalue()
    assert "training" not in text and len(text.splitlines()) == 3


def test_a_terminal_that_fails_ends_no_run(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    journal = Journal(tmp_path, tokens_every=0, trackers=[console])
    console.training = lambda **moved: 1 / 0  # type: ignore[assignment, return-value]
    journal.event("checkpoint", step=1)
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert kinds == ["checkpoint", "tracker_lost"] and journal.trackers == []
