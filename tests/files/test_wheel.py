"""The wheel, unpacked elsewhere: the package with conf/ inside it, and nothing of this checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
UV = Path(sys.executable).parent / "uv"


def test_the_wheel_runs_from_another_folder_with_its_own_settings(tmp_path: Path) -> None:
    # Offline: the build backend is in uv's cache since setup.sh installed this checkout.
    build = [UV, "build", "--offline", "--wheel", f"--out-dir={tmp_path}", ROOT]
    subprocess.run(build, check=True, timeout=120, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
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
