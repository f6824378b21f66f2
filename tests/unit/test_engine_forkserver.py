"""Processes forked from one that has imported what they need."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from entroray.workers import engine_forkserver

SCRIPT = """
import json, os, sys
print(json.dumps([sys.argv, os.getcwd(), os.environ["WHO"], "calendar" in sys.modules, __name__]))
sys.exit(int(sys.argv[1]))
"""
SERVE = "from entroray.workers.engine_forkserver import serve; serve({!r}, ['calendar'])"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "own" / "socket"
    path.parent.mkdir()
    process = subprocess.Popen([sys.executable, "-c", SERVE.format(str(path))], stdin=subprocess.PIPE)
    while not path.exists():
        assert process.poll() is None
    yield str(path)
    process.communicate(timeout=10)
    assert process.returncode == 0 and not path.parent.exists()


def asked(path: str, script: Path) -> list:
    command = [sys.executable, "-I", "-S", engine_forkserver.__file__, path, str(script), "0"]
    variables = os.environ | {"WHO": "me"}
    done = subprocess.run(
        command, cwd=script.parent, env=variables, capture_output=True, text=True, timeout=20, check=True
    )
    return json.loads(done.stdout)


def test_a_worker_is_forked_with_the_arguments_variables_folder_and_streams_of_who_asks(server, script):
    for _ in range(2):
        assert asked(server, script) == [[str(script), "0"], str(script.parent), "me", True, "__main__"]


def test_where_no_server_answers_the_one_that_asks_becomes_the_worker(script):
    found = asked(str(script.parent / "nobody"), script)
    assert found == [[str(script), "0"], str(script.parent), "me", False, "__main__"]
