"""The snippets of README.md under `<!-- tested -->`, in order, in one folder, as a reader would run them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
MARKED = re.compile(r"<!-- tested -->\n+```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def snippets(text: str) -> list[tuple[str, str]]:
    """(language, content) of every marked fence."""
    return MARKED.findall(text)


def test_the_snippets_of_the_readme_run(tmp_path: Path, model: str) -> None:
    """Python is run from the file that its first line names, shell as it stands; `my_model` is small."""
    found = snippets(README.read_text())
    assert {language for language, _ in found} == {"sh", "python"}, "README.md lost its marks"
    shutil.copytree(model, tmp_path / "my_model")
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    (tools / "entroray").write_text(f'#!/bin/sh\nexec {sys.executable} -m entroray "$@"\n')
    (tools / "entroray").chmod(0o755)
    for language, content in found:
        command = ["bash", "-euo", "pipefail", "-c", content]
        if language == "python":
            file = tmp_path / content.splitlines()[0].removeprefix("# ")
            file.write_text(content)
            command = [sys.executable, str(file)]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(README.parent)},
            capture_output=True,
            text=True,
            timeout=580,
            check=False,
        )
        assert done.returncode == 0, f"{content}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
