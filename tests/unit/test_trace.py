"""The time of a step by phase and role, and the trace of a run as Perfetto reads it."""

import asyncio
import gzip
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from entroray.objective import build_objective
from entroray.train import clock
from entroray.train.clock import BusyTime, Clock
from entroray.train.trace import Trace, trace_path
from entroray.workers.cluster import OpenWaits
from tests.toy import ToyWorld, driver
from tests.traces import events, overlaps, spans


def test_an_actor_is_at_work_while_any_call_to_it_is_open() -> None:
    busy = BusyTime()
    for act, now in ((busy.began, 1.0), (busy.began, 2.0), (busy.ended, 3.0), (busy.ended, 5.0)):
        act("generator 0", now)
    busy.began("generator 0", 10.0)
    assert busy.seconds("generator 0", 10.5) == 4.5 and busy.seconds("generator 1", 10.5) == 0.0


def test_idle_shares_are_the_mean_and_the_idlest_of_a_role(monkeypatch: pytest.MonkeyPatch) -> None:
    now, worked = [100.0], {"generator 0": 7.0, "generator 1": 0.0, "learner rank 0": 3.0}
    ticking = SimpleNamespace(monotonic=lambda: now[0], thread_time=lambda: now[0] / 10)
    monkeypatch.setattr(clock, "time", ticking)
    timed = Clock(lambda: dict(worked))
    with timed("sample"):
        now[0] += 4.0
    worked |= {"generator 0": 11.0, "generator 1": 2.0, "generator 2": 50.0}  # the last joined meanwhile
    now[0] += 4.0
    found = timed.lap(tokens=80, step=1)
    assert found["seconds/sample"] == 4.0 and found["seconds/step"] == 8.0
    assert found["idle/generator"] == pytest.approx((0.5 + 0.75) / 2) and found["idle/generator_max"] == 0.75
    assert found["idle/learner"] == found["idle/learner_max"] == 1.0
    assert found["idle/driver"] == pytest.approx(0.9) and found["tokens/per_second"] == 10.0
    now[0] += 2.0
    again = timed.lap(tokens=0, step=2)
    assert again["seconds/step"] == 2.0 and again["idle/generator"] == 1.0 and "seconds/sample" not in again


def test_a_track_has_a_lane_for_each_span_at_once(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    with Trace(path) as trace:
        begin = trace.origin
        for began, ended in ((0.0, 2.0), (1.0, 3.0), (2.0, 4.0), (0.5, 4.5)):
            trace.span("generator 0", "q", begin + began, begin + ended, tokens=5)
    (track,) = spans(path).values()
    assert [e["tid"] for e in track] == [0, 1, 0, 2] and overlaps(track) == 0
    assert [e["dur"] for e in track] == [2_000_000, 2_000_000, 2_000_000, 4_000_000]
    rates = [e["args"]["tokens/s"] for e in events(path) if e["ph"] == "C"]
    assert rates == [2, 5, 5], "5 tokens in 2 s, then 5 in 1 s, and again"
    assert gzip.decompress(path.read_bytes()).rstrip().endswith(b"]")


def test_the_trace_of_a_killed_process_opens(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    trace = Trace(path)
    trace.span("driver", "sample", trace.origin, trace.origin + 1)
    trace.flush()
    trace.span("driver", "score", trace.origin, trace.origin + 1)  # in memory as it is killed
    assert [e["name"] for e in spans(path)["driver"]] == ["sample"]


def test_a_trace_is_bounded_in_memory_and_on_disk(tmp_path: Path) -> None:
    heard: list[str] = []
    trace = Trace(tmp_path / "trace.json.gz", lambda kind, **fields: heard.append(kind), limit=5_000)
    for i in range(6_000):
        trace.span("driver", "x", trace.origin + i, trace.origin + i + 1)
        assert len(trace.events) <= 2_000
    trace.close()
    assert len(events(tmp_path / "trace.json.gz")) == 5_001 and heard == ["trace_full"]


def test_a_disk_that_refuses_ends_the_trace_and_not_the_run(tmp_path: Path) -> None:
    heard: list[str] = []
    trace = Trace(tmp_path / "nowhere" / "trace.json.gz", lambda kind, **fields: heard.append(kind))
    trace.span("driver", "sample", 0.0, 1.0)
    trace.close()
    assert heard == ["trace_lost"]


def test_a_resumed_run_keeps_the_trace_it_had(tmp_path: Path) -> None:
    assert trace_path(tmp_path, 1).name == "trace.json.gz"
    assert trace_path(tmp_path, 13).name == "trace-000013.json.gz"


def test_calls_are_spans_of_their_actor_called_as_the_phase_is(tmp_path: Path) -> None:
    waits, path = OpenWaits(), tmp_path / "trace.json.gz"
    with Trace(path) as waits.trace:
        waits.trace.phase = "update"
        for what in ("learner rank 1", "verifier 0", "generator 0, starting", "generator 0, sampling"):
            with waits.record(what):
                pass
    names = {track: [e["name"] for e in found] for track, found in spans(path).items()}
    assert names == {"learner rank 1": ["update"], "verifier 0": ["judge"], "generator 0": ["starting"]}


@pytest.mark.parametrize("lag", [0, 1])
def test_the_spans_of_a_run_are_its_metrics(tmp_path: Path, lag: int) -> None:
    path, world = tmp_path / "trace.json.gz", ToyWorld(build_objective("grpo"))
    run = driver(world, max_lag=lag)
    with Trace(path) as trace:
        run.roles = replace(run.roles, trace=trace)
        steps = asyncio.run(run.train(3))
    found = spans(path)
    assert [e["name"] for e in found["steps"]] == ["step 1", "step 2", "step 3"]
    for step, metrics in zip(found["steps"], steps, strict=True):
        assert step["dur"] == pytest.approx(1e6 * metrics["seconds/step"], abs=2)
        assert step["args"]["idle/driver"] == metrics["idle/driver"]
        until = step["ts"] + step["dur"]
        within = [e for e in found["driver"] + found["sync"] if step["ts"] <= e["ts"] < until]
        assert all(e["ts"] + e["dur"] <= until + 1 for e in within)
        for phase in ("sample", "score", "update", "sync"):
            lasted = sum(e["dur"] for e in within if e["name"] == phase)
            assert lasted == pytest.approx(1e6 * metrics[f"seconds/{phase}"], abs=2)
    assert all(overlaps(track) == 0 for track in found.values())
