"""The scripts of launch/ with a machine made of stubs: nothing is downloaded, installed or compiled here."""

import os
import re
import shutil
import subprocess
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.s[hb]*")), ROOT / ".ci" / "run"]
TOOLS = "apt-cache awk bash cut date df dirname find flock grep mkdir mv rm sed sha256sum sleep tail"

# A Python that tells its version and makes environments, whose pip and uv only write down what they are told.
PYTHON = r"""#!/usr/bin/env bash
case "$*" in
"-c "*"sys._base_executable"*) printf '%s\n' "$0" {version} {fits} {venv} {headers} ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp {uv} "$3/bin/uv" && touch "$3/pyvenv.cfg" ;;
"-m pip config list") echo "global.find-links='/wheels /more'" ;;
*) echo "python $*" >>{log} ;;
esac
"""
UV = r"""#!/usr/bin/env bash
echo "uv links=$UV_FIND_LINKS $*" >>{log}
[[ $* != *--dry-run* ]] || exit {dry}
exit {code}
"""


class Machine:
    """A checkout with launch/ and pyproject.toml, and a PATH that holds stubs and a few plain tools only."""

    def __init__(self, home: Path) -> None:
        self.checkout, self.bin, self.log = home / "checkout", home / "bin", home / "log"
        shutil.copytree(ROOT / "launch", self.checkout / "launch")
        shutil.copy(ROOT / "pyproject.toml", self.checkout)
        self.bin.mkdir()
        for tool in (*TOOLS.split(), "cp", "touch", "cat", "env", "ls", "realpath", "sort"):
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        self.stub("g++", "#!/bin/sh\n")
        self.python()
        self.uv()

    def stub(self, name: str, text: str) -> None:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def python(self, name="python3.11", version="3.11.7", fits=True, venv=True, headers=True) -> None:
        facts = {"version": version, "fits": fits, "venv": venv, "headers": headers}
        self.stub(name, PYTHON.format(log=self.log, uv=self.bin / "fake-uv", **facts))

    def uv(self, code: int = 0, dry: int = 0) -> None:
        self.stub("fake-uv", UV.format(log=self.log, code=code, dry=dry))

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        command = [self.checkout / "launch" / script, *arguments]
        home = {"PATH": str(self.bin), "HOME": str(self.bin.parent)}
        return subprocess.run(command, env=home | variables, capture_output=True, text=True, timeout=60)

    def setup(self, **variables: str) -> subprocess.CompletedProcess:
        return self.run("setup.sh", **variables)

    def tools(self, **codes: int) -> None:
        """Set up, with programs in .venv that write down their call and exit with the given codes."""
        assert self.setup().returncode == 0
        for name, code in codes.items():
            text = f'#!/bin/sh\necho {name} "$@" "$TORCH_EXTENSIONS_DIR" >>{self.log}\nexit {code}\n'
            self.stub(self.checkout / ".venv" / "bin" / name, text)
        self.told()

    def told(self) -> str:
        """What pip and uv were asked for since the last call."""
        text = self.log.read_text() if self.log.exists() else ""
        self.log.unlink(missing_ok=True)
        return text


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_sound(script):
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and os.access(script, os.X_OK)
    assert "set -euo pipefail" in text or script.name == "run"
    subprocess.run(["bash", "-n", script], check=True, timeout=30)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    done = subprocess.run(
        ["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout


def test_ci_is_one_call_of_the_tests():
    lines = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and line[0] != "#"]
    assert len(lines) == 1 and re.search(r"/launch/test\.sh", lines[0])


def test_the_first_call_installs_and_the_second_does_nothing(machine):
    first = machine.setup()
    assert first.returncode == 0, first.stderr
    told = machine.told()
    assert re.search(r"python -m pip install .*uv==\d+\.\d+\.\d+\n", told)
    assert "-e .[cpu,dev]" in told and "links=/wheels,/more" in told and "ShareMemCommBuilder" in told

    start = time.perf_counter()
    second = machine.setup()
    assert (second.returncode, second.stdout, second.stderr, machine.told()) == (0, "", "", "")
    assert time.perf_counter() - start < 1


def test_changed_pins_are_installed_into_the_environment_that_is_there(machine):
    machine.setup()
    machine.told()
    with (machine.checkout / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert "bringing .venv up to date" in machine.setup().stdout
    assert "-e .[cpu,dev]" in machine.told()


def test_an_interrupted_set_up_is_begun_again(machine):
    machine.uv(code=9)
    broken = machine.setup()
    assert broken.returncode == 3 and "run this again" in broken.stderr
    leftover = machine.checkout / ".venv" / "half-made"
    leftover.touch()
    machine.uv()
    again = machine.setup()
    assert again.returncode == 0 and "interrupted" in again.stdout and not leftover.exists()


def test_an_update_that_fails_leaves_what_is_there_and_is_made_whole_by_the_next(machine):
    """As on a node without a network, whose checkout has other pins now: twice, and nothing is wiped."""
    machine.setup()
    kept = machine.checkout / ".venv" / "package"
    kept.touch()
    with (machine.checkout / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    uv = str(machine.checkout / ".venv" / "bin" / "uv")
    machine.stub(uv, UV.format(log=machine.log, code=9, dry=0))
    for _ in range(2):
        assert machine.setup().returncode == 3 and kept.exists()
    machine.stub(uv, UV.format(log=machine.log, code=0, dry=0))
    machine.told()
    assert machine.setup().returncode == 0 and kept.exists()
    assert " --reinstall -e .[cpu,dev]" in machine.told()
    assert machine.setup().returncode == 0 and machine.told() == ""


def test_a_copied_checkout_makes_its_own_environment(machine):
    machine.setup()
    copy = machine.checkout.with_name("copy")
    shutil.copytree(machine.checkout, copy)
    machine.checkout = copy
    machine.told()
    assert "-e .[cpu,dev]" in (machine.setup().returncode == 0 and machine.told())


def test_an_environment_of_someone_else_is_left_alone(machine):
    (machine.checkout / ".venv").mkdir()
    theirs = machine.checkout / ".venv" / "pyvenv.cfg"
    theirs.touch()
    done = machine.setup()
    assert done.returncode == 3 and "move it away" in done.stderr and theirs.exists()


def test_everything_missing_is_named_at_once(machine):
    machine.python(venv=False, headers=False)
    (machine.bin / "g++").unlink()
    done = machine.setup()
    assert done.returncode == 3 and machine.told() == "" and not (machine.checkout / ".venv").exists()
    for package in ("python3.11-venv", "python3.11-dev", "g++"):
        assert re.search(rf"apt-get install -y {re.escape(package)}$", done.stderr, re.MULTILINE)


def test_a_python_that_does_not_run_is_passed_over(machine):
    machine.stub("python3.11", "#!/bin/sh\nexit 127\n")
    machine.python("python3.12", version="3.12.4")
    assert "Python 3.12.4" in machine.setup().stdout


def test_no_python_that_fits_is_refused(machine):
    machine.stub("python3.11", "#!/bin/sh\nexit 127\n")
    machine.python("python3", version="3.10.2", fits=False)
    done = machine.setup()
    assert done.returncode == 3 and "CPython 3.11, 3.12 or 3.13 (python3 is 3.10.2)" in done.stderr


def test_the_chosen_python_is_the_only_one_tried(machine):
    machine.python("other", version="3.13.1")
    assert "Python 3.13.1" in machine.setup(ENTRORAY_PYTHON="other").stdout
    assert machine.setup(ENTRORAY_PYTHON="absent").returncode == 3


def test_a_full_disk_is_refused(machine):
    machine.stub("df", "#!/bin/sh\necho head\necho / 9 9 2000000 9 /\n")
    done = machine.setup()
    assert done.returncode == 3 and "2 GB free" in done.stderr and machine.told() == ""


def test_an_index_out_of_reach_is_one_clear_sentence(machine):
    stub = (machine.bin / "python3.11").read_text()
    machine.stub("python3.11", stub.replace("*) echo", '"-m pip install"*) exit 1 ;;\n*) echo'))
    done = machine.setup()
    assert done.returncode == 3 and "package index cannot be reached" in done.stderr


def test_a_gpu_chooses_the_cuda_build_and_a_word_overrules_it(machine):
    machine.stub("nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: x)'\n")
    assert "cuda build" in machine.setup().stdout
    told = machine.told()
    assert "--no-config" in told and "-e .[cuda,dev]" in told
    assert "links= " in told, "a folder of wheels may hold a CPU torch, which the CUDA build must not take"
    assert "ShareMemCommBuilder" not in told
    assert "cpu build" in machine.setup(ENTRORAY_BUILD="cpu").stdout
    assert machine.setup(ENTRORAY_BUILD="tpu").returncode == 3


def test_a_driver_too_old_for_cuda_13_is_refused_before_anything_is_downloaded(machine):
    smi = "#!/bin/sh\n[ \"$1\" = -L ] && echo 'GPU 0: NVIDIA H100 (UUID: x)' || echo {}\n"
    machine.stub("nvidia-smi", smi.format("570.86.15"))
    done = machine.setup()
    assert done.returncode == 3 and "570.86.15" in done.stderr and "580" in done.stderr
    assert machine.told() == "" and machine.setup(ENTRORAY_BUILD="cpu").returncode == 0
    machine.stub("nvidia-smi", smi.format("580.65.06"))
    assert "cuda build" in machine.setup(ENTRORAY_BUILD="cuda").stdout


def test_extras_that_are_asked_for_once_stay_and_the_slow_lane_asks_for_both(machine):
    assert machine.setup().returncode == 0 and "-e .[cpu,dev]" in machine.told()
    assert (
        machine.setup(ENTRORAY_EXTRAS="mlflow").returncode == 0 and "-e .[cpu,dev,mlflow]" in machine.told()
    )
    assert machine.setup().returncode == 0 and not machine.told(), "nothing more is asked for"
    machine.stub(machine.checkout / ".venv" / "bin" / "pytest", "#!/bin/sh\n")
    machine.run("test.sh", "slow")
    assert "-e .[cpu,dev,mlflow,wandb,pages,docs]" in machine.told()
    machine.run("test.sh", "slow", ENTRORAY_EXTRAS="")
    assert not machine.told()
    assert machine.setup(ENTRORAY_EXTRAS="liger").returncode == 0
    assert "-e .[cpu,dev,mlflow,wandb,pages,docs,liger]" in machine.told()
    refused = machine.setup(ENTRORAY_EXTRAS="wandb,swanlab")
    assert refused.returncode == 3 and "`swanlab`" in refused.stderr and "wandb" in refused.stderr


def test_without_a_cpu_torch_the_size_of_the_other_is_told_first(machine):
    machine.uv(dry=1)
    done = machine.setup()
    assert done.returncode == 0 and "2.6 GB" in done.stdout
    assert "--override" in machine.told()


def test_quickstart_trains_with_its_arguments_and_the_compiled_op(machine):
    machine.tools(entroray=7)
    assert machine.run("quickstart.sh", "run.steps=2").returncode == 7
    ops = machine.checkout / ".venv" / "torch_extensions"
    assert machine.told() == f"entroray train experiment=quickstart run.steps=2 {ops}\n"


def test_the_page_is_tested_where_there_is_a_browser_and_else_not_tested_is_said(machine):
    machine.tools(ruff=0, mypy=0, pytest=0)
    done = machine.run("test.sh", "-x", ENTRORAY_EXTRAS="")
    assert (
        "NOT TESTED: report.html and the site in a browser" in done.stdout
        and "pytest tests/pages/test_site.py" in machine.told()
    )
    machine.stub("chromium", "#!/bin/sh\n")
    done = machine.run("test.sh", "-x")
    told = machine.told()
    assert (
        "-e .[cpu,dev,pages,docs]" in told
        and "pytest tests/pages --numprocesses 2 --dist worksteal -x" in told
    )
    assert "NOT TESTED" not in done.stdout


def test_root_in_ci_installs_a_browser_and_an_emoji_font(machine):
    machine.tools(ruff=0, mypy=0, pytest=0)
    machine.stub("apt-get", f'#!/bin/sh\necho apt-get "$@" >>{machine.log}\n')
    for variables, asked in (({}, False), ({"CI": "true"}, os.geteuid() == 0)):
        machine.run("test.sh", "-x", ENTRORAY_EXTRAS="", **variables)
        told = machine.told()
        assert ("chromium fonts-noto-color-emoji" in told) == asked == ("pytest tests/pages --" in told)


def test_the_tests_run_cheapest_first(machine):
    machine.tools(ruff=0, mypy=0, pytest=0)
    done = machine.run("test.sh", "-x", ENTRORAY_EXTRAS="")
    assert done.returncode == 0 and re.search(r"took: ruff check \d+ s, .*unit tests \d+ s", done.stdout)
    calls = [line.split(" /")[0] for line in machine.told().splitlines()]
    assert calls == [
        "ruff check .",
        "ruff format --check .",
        "pytest tests/files --numprocesses 2 --dist worksteal -x",
        "pytest tests/unit --numprocesses 2 --dist worksteal -x",
        "pytest tests/pages/test_site.py --numprocesses 2 --dist worksteal -x",
        "pytest tests/interpreter --numprocesses 2 --dist worksteal -x",
        "mypy",
        "pytest tests/ray --numprocesses 2 --dist loadfile --durations=15 -x",
        "pytest tests/alone tests/faults --durations=15 -x",
    ]


LANES = ("slow", "families", "faults", "bench", "cluster")


@pytest.mark.parametrize("lane", LANES)
def test_a_lane_runs_its_own_tests_alone(machine, lane):
    machine.tools(ruff=0, mypy=0, pytest=1)
    assert machine.run("test.sh", lane, "-x", "tests/ray", ENTRORAY_EXTRAS="").returncode == 1
    marked = "faults and not long" if lane == "faults" else lane
    assert machine.told().split(" /")[0] == f"pytest tests -m {marked} --durations=0 -x tests/ray"


def test_long_faults_are_run_where_they_are_asked_for_and_the_table_is_printed(machine):
    machine.tools(pytest=0)
    assert machine.run("test.sh", "faults", "long", "-x").returncode == 0
    asked, printed = machine.told().splitlines()
    assert asked.split(" /")[0] == "pytest tests -m faults --durations=0 -x"
    assert printed.split(" /")[0] == "python -m tests.faults.table"


def test_a_row_of_the_bench_lane_runs_alone_and_takes_pytest_s_arguments(machine):
    machine.tools(pytest=0)
    for given, asked in (
        (["fixed_64", "-x"], "tests/bench/test_rows.py::test_row[fixed_64] -m bench --durations=0 -x"),
        (["-x", "fixed_64"], "tests -m bench --durations=0 -x fixed_64"),
        (["tests/bench/test_large_table.py"], "tests -m bench --durations=0 tests/bench/test_large_table.py"),
    ):
        assert machine.run("test.sh", "bench", *given).returncode == 0
        assert machine.told().split(" /")[0] == f"pytest {asked}"


def test_a_lane_without_tests_says_so(machine):
    machine.tools(pytest=5)
    done = machine.run("test.sh", "families")
    assert done.returncode == 0 and "lane families: no such test yet" in done.stdout


def test_help_lists_every_lane_and_sets_nothing_up(machine):
    done = machine.run("test.sh", "--help")
    listed = re.findall(r"^  (\w+)  +\w", done.stdout, re.MULTILINE)
    assert (done.returncode, tuple(listed), machine.told()) == (0, LANES, "")


def test_every_lane_is_a_marker_that_the_default_run_leaves_out_and_the_readme_explains():
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert set(LANES) <= {line.partition(":")[0] for line in asked["markers"]}
    assert f"not ({' or '.join(LANES)})" in asked["addopts"]
    section = (ROOT / "tests" / "README.md").read_text().partition("## Lanes\n")[2].partition("\n## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == LANES


@pytest.mark.parametrize(
    ("codes", "arguments", "code", "calls"),
    [
        ({"ruff": 0, "mypy": 2, "pytest": 0}, [], 2, 7),
        ({"ruff": 0, "mypy": 0, "pytest": 1}, [], 1, 3),
        ({"ruff": 0, "mypy": 0, "pytest": 5}, [], 5, 3),  # an empty folder of tests is a mistake
        ({"ruff": 0, "mypy": 0, "pytest": 5}, ["-k", "sync"], 0, 9),  # arguments that choose nothing are not
    ],
)
def test_a_failing_stage_ends_the_tests_with_its_code(machine, codes, arguments, code, calls):
    machine.tools(**codes)
    assert machine.run("test.sh", *arguments, ENTRORAY_EXTRAS="").returncode == code
    assert len(machine.told().splitlines()) == calls
