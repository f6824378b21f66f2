"""The wheel, unpacked elsewhere: the package with conf/ inside it, and nothing of this checkout."""

import email
import hashlib
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import entroray
from tests.files.test_layers import tracked

ROOT = Path(__file__).parents[2]
UV = Path(sys.executable).parent / "uv"


def build(into: Path, *what: str) -> Path:
    """The wheel. Offline: the build backend is in uv's cache since setup.sh installed this checkout."""
    command = [UV, "build", "--offline", *what, f"--out-dir={into}", ROOT]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    (wheel,) = into.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of this checkout, without an sdist between."""
    return build(tmp_path_factory.mktemp("wheel"), "--wheel")


def contents(wheel: Path) -> dict[str, str]:
    """Hash by name of every file."""
    with zipfile.ZipFile(wheel) as packed:
        return {name: hashlib.sha256(packed.read(name)).hexdigest() for name in packed.namelist()}


def test_the_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    assert contents(wheel) == contents(build(tmp_path))  # uv makes it of the sdist
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert names == {path for path in tracked() if not path.startswith(".ci/")} | {"PKG-INFO"}


def test_the_wheel_has_the_package_the_settings_and_the_license(wheel: Path) -> None:
    package = {path for path in tracked() if path.startswith("entroray/")}
    assert "entroray/py.typed" in package
    package |= {f"entroray/{path}" for path in tracked() if path.startswith("conf/")}
    told = f"entroray-{entroray.__version__}.dist-info"
    own = {
        f"{told}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    }
    assert contents(wheel).keys() == package | own
    with zipfile.ZipFile(wheel) as packed:
        metadata = email.message_from_bytes(packed.read(f"{told}/METADATA"))
    assert (metadata["Name"], metadata["Version"]) == ("entroray", entroray.__version__)
    assert metadata["License-Expression"] == "Apache-2.0" and "Typing :: Typed" in metadata.get_all(
        "Classifier"
    )


def test_the_wheel_runs_from_another_folder_with_its_own_settings(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path / "site")
    package = tmp_path / "site" / "entroray"
    catalogue = package / "metrics" / "catalogue.tsv"
    assert catalogue.read_text() == (ROOT / "entroray/metrics/catalogue.tsv").read_text()
    pages = {file.name for file in (ROOT / "entroray/observe/page").iterdir()}
    assert pages == {file.name for file in (package / "observe/page").iterdir()} and len(pages) >= 8
    away = tmp_path / "elsewhere"
    away.mkdir()
    experiment = package / "conf" / "experiment" / "countdown.yaml"
    experiment.write_text(experiment.read_text().replace("steps: 100", "steps: 123"))
    command = [sys.executable, "-m", "entroray", "train", "--cfg", "job", "experiment=countdown"]
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(command, cwd=away, env=env, check=True, timeout=120, capture_output=True, text=True)
    assert "steps: 123" in done.stdout
    written = [sys.executable, "-m", "entroray", "reference", "--write"]
    refused = subprocess.run(written, cwd=away, env=env, timeout=120, capture_output=True, text=True)
    assert refused.returncode == 2 and "of a checkout" in refused.stderr
