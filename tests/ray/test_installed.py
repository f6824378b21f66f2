"""An environment made by launch/install.sh, used from an empty folder when the checkout is gone."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from entroray import __version__
from entroray.objective import objective
from entroray.rows import objective_names
from tests.conftest import TINY
from tests.files.test_layers import ROOT, tracked

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]

PASSED = ("PIP_", "UV_", "SSL_", "HTTP", "http", "NO_PROXY", "no_proxy")
"""What the variables begin with that tell where packages are on this machine."""
MODEL = f"""
from pathlib import Path
from entroray.policy.tiny_model import build_tiny_model
build_tiny_model(Path("my_model"), {TINY}, seed=3)
"""
REWARD = "def short(response, prompt):\n    return len(response) < 20\n"
EXPERIMENT = (
    "# @package _global_\nrun: {name: own, steps: 2}\nrollout: {groups_per_step: 4, max_tokens: 16}\n"
)
TRAIN = (
    "train --config-dir my_conf experiment=own model.path=my_model learner.lr=1e-4 data.max_prompt=32 "
    "reward.path=mine.py:short run.dir=out/one"
)
Run = Callable[[str], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of an environment; the copy of the checkout that it was made from is deleted."""
    folder = tmp_path_factory.mktemp("installed")
    copy, place = folder / "checkout", folder / "environment"
    for path in tracked():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, copy / path)
    path = [each for each in os.environ["PATH"].split(":") if not each.startswith(sys.prefix)]
    env = {name: value for name, value in os.environ.items() if name.startswith(PASSED)}
    env |= {"PATH": ":".join(path), "HOME": os.environ["HOME"], "ENTRORAY_BUILD": "cpu"}
    command = [copy / "launch" / "install.sh", place]
    done = subprocess.run(command, env=env, timeout=3000, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{place}/bin/entroray doctor" in done.stdout
    shutil.rmtree(copy)
    yield place
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def away(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("empty")


@pytest.fixture(scope="module")
def run(environment: Path, away: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs the installed `entroray` in an empty folder, with a home and a PATH that hold nothing of ours."""
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path_factory.mktemp("home"))}

    def call(words: str) -> subprocess.CompletedProcess[str]:
        command = [environment / "bin" / "entroray", *shlex.split(words)]
        return subprocess.run(command, cwd=away, env=env, timeout=600, capture_output=True, text=True)

    return call


def test_every_command_works_in_an_empty_folder(run: Run, environment: Path, away: Path) -> None:
    assert f"entroray {__version__} in {environment}/" in run("--version").stdout
    assert "experiment=quickstart" in run("train --help").stdout
    assert "steps: 90" in run("train --cfg job experiment=quickstart").stdout
    assert all(name in run("objectives").stdout for name in (*objective_names(), *objective.SLOTS))
    assert "complete -F _entroray entroray" in run("completion bash").stdout
    assert "| `run.dir` |" in run("reference").stdout
    refused = run("reference --write")
    assert refused.returncode == 2 and "of a checkout" in refused.stderr
    assert not list(away.iterdir())
    doctor = run("doctor")
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert re.search(r"^ok +packages .*at the tested versions", doctor.stdout, re.MULTILINE)


def test_a_run_trains_with_files_and_settings_named_from_that_folder(
    run: Run, environment: Path, away: Path
) -> None:
    subprocess.run([environment / "bin" / "python", "-c", MODEL], cwd=away, check=True, timeout=300)
    (away / "mine.py").write_text(REWARD)
    (away / "my_conf" / "experiment").mkdir(parents=True)
    (away / "my_conf" / "experiment" / "own.yaml").write_text(EXPERIMENT)
    subprocess.run(["git", "init", "-q", away], check=True, timeout=60)
    done = run(TRAIN)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = away / "out" / "one"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) >= 2
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["commit"] is None and manifest["packages"]["entroray"] == __version__
    (folder / "report.html").unlink()
    assert run("report out/one").returncode == 0 and (folder / "report.html").stat().st_size > 50_000


def test_what_is_missing_or_wrong_is_a_sentence_that_mends_it(run: Run, environment: Path) -> None:
    uv = [environment / "bin" / "uv", "pip"]
    at = ["-q", "--python", environment / "bin" / "python", "--no-config"]  # the checkout leaves it out
    subprocess.run([*uv, "install", *at, "--no-deps", "torchvision==0.28.0"], check=True, timeout=600)
    broken = [environment / "bin" / "python", "-c", "import torchvision"]
    assert b"operator torchvision" in subprocess.run(broken, timeout=300, capture_output=True).stderr
    wrong = run("doctor")
    assert wrong.returncode == 3 and "Traceback" not in wrong.stderr
    subprocess.run(wrong.stderr.strip().rpartition(": ")[2], shell=True, check=True, timeout=120)
    assert run("eval --no-such").returncode == 2
    subprocess.run([*uv, "uninstall", *at, "deepspeed"], check=True, timeout=120)
    wrong = run("train experiment=quickstart")
    assert wrong.returncode == 3 and "deepspeed not installed: uv pip install" in wrong.stderr
    assert run("--version").returncode == run("objectives").returncode == 0
