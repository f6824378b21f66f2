"""The end of `entroray train`: what the run came to, in words and pictures."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from entroray.cli import signals
from entroray.config import Config
from entroray.errors import EntrorayError, InfrastructureError
from entroray.observe.console import Console, summary
from entroray.observe.health_tracker import health_lines, moved_settings
from entroray.observe.journal import read_metrics
from entroray.wiring.objective import advised_settings
from entroray.wiring.overrides import quote
from entroray.wiring.parts import Parts


def finish_run(config: Config, parts: Parts, folder: Path, model: str, seconds: float) -> None:
    """Print what a run came to, write its report, and compare its first and last weights."""
    signals.take_sigterm()  # the event loop took its own with it
    metrics = read_metrics(folder / "metrics.jsonl")
    advised = advised_settings(config, parts.controllers)
    words = lambda: [*health_lines(metrics, advised), *moved_settings(parts.controllers, metrics)]
    print(_comment("summary", lambda: summary(metrics)) + "\n")
    print(_comment("health", lambda: "\n".join(words())))
    print(f"\n{metrics[-1]['step'] if metrics else 0} steps in {seconds:.0f} s")
    print(f"model      {folder / 'model'}\nrun        {folder}", flush=True)
    if config.observe.report:
        print(_comment("report", lambda: _report(folder)), flush=True)
    if config.evaluate.final:
        _compare(folder, model)
    if config.observe.report and config.evaluate.final:
        _comment("report", lambda: _report(folder))  # again, with both evaluations


def _report(folder: Path) -> str:
    from entroray.observe.report import write_report

    return f"report     {write_report(folder)}"


def _comment(name: str, make: Callable[[], str]) -> str:
    """What `make` says of a run that is done, or why it says nothing."""
    try:
        return make()
    except EntrorayError:
        raise
    except Exception as error:  # boundary: the model is trained and exported, whatever is said about it
        return f"{name}: cannot be made: {error!r}"


def _compare(folder: Path, model: str) -> None:
    """Held-out accuracy of the first and the last weights, each read from its folder by a new process."""
    print("evaluating the first and the last weights, each in a process of its own ...", flush=True)
    for name, path in (("before", model), ("after", str(folder / "model"))):
        out = folder / f"eval-{name}.json"
        command = [sys.executable, "-m", "entroray", "eval", f"--config={folder}/config.yaml"]
        command += [f"--out={out}", f"model.path={quote(path)}", "--heldout"]
        try:
            with Console().progress(f"evaluation {name}"):
                done = subprocess.run(command, check=False, timeout=1800, capture_output=True, text=True)
        except subprocess.TimeoutExpired as error:
            raise InfrastructureError(
                f"the evaluation of {path} took more than 1800 s: lower evaluate.prompts or evaluate.samples"
            ) from error
        if done.returncode:
            raise InfrastructureError(f"the evaluation of {path} ended with {done.stderr[-800:]}")
        e = json.loads(out.read_text())
        best = f"pass@{e['samples']}"
        print(
            f"{name:10s} held-out greedy accuracy {e['greedy']:.3f}, sampled {e['pass@1']:.3f}, "
            f"{best} {e[best]:.3f} ({e['prompts']} prompts)"
        )
