"""wandb and mlflow themselves, offline and in a store of their own; skipped by name where missing."""

import os
import signal
import struct
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from entroray.binding import effective_settings, traits
from entroray.config import Config
from entroray.errors import PreflightError, Stopped
from entroray.observe import trackers
from entroray.observe.run_summary import RunSummary, summarize
from entroray.observe.tracker_thread import LostError, TrackerThread
from entroray.observe.trackers import TrackedRun

pytestmark = pytest.mark.slow
MISSING = "NOT TESTED: the package is not installed: ENTRORAY_EXTRAS=wandb,mlflow launch/setup.sh"
HISTORY = [{"step": step, "entropy/mean": 1 / step, "loss": None} for step in (1, 2, 3, 4)]
STOPPED = Stopped(15, "stopped by SIGTERM after step 5")


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    found = pytest.importorskip(
        "wandb", reason="NOT TESTED: wandb is missing (pip install 'entroray[wandb]')"
    )
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield found
    found.teardown()


@pytest.fixture
def mlflow(monkeypatch):
    found = pytest.importorskip(
        "mlflow", reason="NOT TESTED: mlflow is missing (pip install 'entroray[mlflow]')"
    )
    for name in [n for n in os.environ if n.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    return found


def run_of(folder: Path, first_step: int = 1, **settings) -> TrackedRun:
    folder.mkdir(exist_ok=True)
    history = HISTORY if first_step > 1 else []
    return TrackedRun(folder, "train/abc", asdict(Config()) | settings, first_step, history)


def summary(error=None) -> RunSummary:
    return summarize(error, [*HISTORY, {"step": 5, "eval/greedy": 0.5}], "steady")


def wandb_records(file: Path):
    """What a `.wandb` file holds: records of protobuf in LevelDB's log format, blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # the whole of one, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def ended(file: Path):
    """The records of a run, of which its process writes the last a moment after the run is finished."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        found = list(wandb_records(file))
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        time.sleep(0.1)
    raise TimeoutError(f"{file} has no end")


def wandb_runs(folder: Path):
    """(run, steps, summary, exit code) of every offline run in `folder`, oldest first."""
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        found = ended(file)
        (run,) = (r.run for r in found if r.WhichOneof("record_type") == "run")
        history = [r.history for r in found if r.WhichOneof("record_type") == "history"]
        updates = [u for r in found if r.WhichOneof("record_type") == "summary" for u in r.summary.update]
        told = {"/".join(u.nested_key) or u.key: u.value_json for u in updates}
        (code,) = (r.exit.exit_code for r in found if r.WhichOneof("record_type") == "exit")
        yield run, [h.step.num for h in history], told, code


def test_wandb_offline_has_name_settings_steps_and_summary_and_a_resumed_run_is_the_same(
    wandb, tmp_path, capfd, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    options = {"mode": "offline", "project": "p", "group": "g", "tags": ["a", "b"], "notes": "n"}
    tracker = trackers.wandb(run_of(tmp_path / "run"), **options)
    tracker.log(0, {"eval/greedy": 0.25})
    for step in (1, 2, 3):
        tracker.log(step, {"entropy/mean": 1 / step, "eval/pass@8:my part": 0.5})
    tracker.finish(summary(STOPPED))
    tracker.close()
    time.sleep(1.1)  # its folders are named by the second
    tracker = trackers.wandb(run_of(tmp_path / "run", first_step=3), **options)
    tracker.log(3, {"entropy/mean": 9.0})
    tracker.finish(summary())
    (first, steps, told, code), (second, again, after, ended) = wandb_runs(tmp_path / "run")
    assert first.run_id == second.run_id == (tmp_path / "run/wandb/run-id").read_text()
    assert (first.display_name, first.project, first.run_group) == ("train/abc", "p", "g")
    assert list(first.tags) == ["a", "b"]
    config = {each.key: each.value_json for each in first.config.update}
    assert config["seed"] == "0" and '"steps":100' in config["run"]
    assert (steps, again, code, ended) == ([0, 1, 2, 3], [1, 2, 3], 143, 0)
    assert told["run/status"] == '"stopped"' and after["run/status"] == '"finished"'
    assert after["best/eval/greedy"] == "0.5" and after["entropy/mean"] == "9"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert capfd.readouterr() == ("", "") and sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_two_wandb_runs_of_one_process_are_two(wandb, tmp_path):
    for name in ("a", "b"):
        tracker = trackers.wandb(run_of(tmp_path / name), mode="offline")
        tracker.log(1, {"x": 1.0})
        tracker.finish(summary())
    ids = [run.run_id for name in ("a", "b") for run, *_ in wandb_runs(tmp_path / name)]
    assert len(set(ids)) == 2


def test_wandb_online_without_a_key_is_refused_and_asks_nobody(wandb, monkeypatch):
    check = lambda **given: traits(trackers.wandb).ready(**given)
    with pytest.raises(PreflightError, match=r"^observe\.trackers: wandb .*WANDB_API_KEY.*mode: offline"):
        check()
    check(mode="offline")
    check(mode="disabled")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    wandb.teardown()
    check()


def test_a_wandb_server_that_cannot_be_reached_is_let_go_within_its_deadline(wandb, tmp_path):
    start = lambda: trackers.wandb(
        run_of(tmp_path / "run"),
        settings={"base_url": "http://127.0.0.1:9", "api_key": "k" * 40, "init_timeout": 3},
    )
    began = time.monotonic()
    thread = TrackerThread("wandb", start, end=20)
    thread.log(1, {"x": 1.0})
    thread.finish(summary())
    with pytest.raises(LostError):
        thread.close()
    assert time.monotonic() - began < 20


def mlflow_run(mlflow, folder: Path):
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'entroray'")
    (run,) = client.search_runs([experiment.experiment_id])
    steps = lambda name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
    return run, steps


def test_mlflow_has_name_settings_metrics_and_status_and_a_resumed_run_is_the_same(
    mlflow, tmp_path, capfd, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    own = {"data": asdict(Config())["data"] | {"template": "x" * 9000, "settings": {"a=b@c": [1, {"d": 2}]}}}
    tracker = trackers.mlflow(run_of(tmp_path / "run", **own), tags={"team": "t"})
    tracker.log(0, {"eval/greedy": 0.25})
    for step in (1, 2):
        tracker.log(step, {"eval/pass@8:my part": float(step), **{f"m/{n}": 1.0 for n in range(1200)}})
    tracker.finish(summary(STOPPED))
    run, _ = mlflow_run(mlflow, tmp_path / "run")
    assert (run.info.run_name, run.info.status) == ("train/abc", "KILLED")
    assert run.data.params["run.steps"] == "100" and len(run.data.params["data.template"]) == 6000
    assert run.data.params["data.settings.a_b_at_c"] == "[1, {'d': 2}]"
    assert run.data.tags["run/reason"] == str(STOPPED) and run.data.tags["team"] == "t"
    changed = {"seed": 7, "run": asdict(Config())["run"] | {"steps": 200}}
    tracker = trackers.mlflow(run_of(tmp_path / "run", first_step=4, **changed))
    tracker.log(4, {"entropy/mean": 9.0})
    tracker.finish(summary(ZeroDivisionError("x")))
    run, steps = mlflow_run(mlflow, tmp_path / "run")
    assert run.info.status == "FAILED" and run.data.params["run.steps"] == "100"
    assert steps("eval/pass_at_8:my part") == [(1, 1.0), (2, 2.0)]
    assert steps("entropy/mean") == [(3, 1 / 3), (4, 9.0)], "the third was not written before it was killed"
    assert [step for step, _ in steps("best/eval/greedy")] == [5, 5] and run.data.metrics[
        "run/exit_code"
    ] == 1
    assert capfd.readouterr() == ("", "") and sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_mlflow_needs_nothing_more_than_its_extra(mlflow):
    from functools import partial

    bound = partial(trackers.mlflow, experiment="e")
    traits(bound).ready(**effective_settings(bound))


def test_an_mlflow_server_that_is_down_holds_no_run(mlflow, tmp_path):
    thread = TrackerThread(
        "mlflow", lambda: trackers.mlflow(run_of(tmp_path), uri="http://127.0.0.1:9"), end=1
    )
    thread.finish(summary())
    with pytest.raises(LostError, match="1 s"):
        thread.close()
