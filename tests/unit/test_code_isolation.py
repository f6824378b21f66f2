"""What a program that is judged can reach, with all layers around it and with fewer."""

import errno
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from entroray.errors import ConfigError
from entroray.reward import build_judge
from entroray.reward.programs import Limits, Program, Programs
from entroray.types import Prompt, Status
from tests.unit.test_code_judge import ONE_SUM, RIGHT, SPREAD, SQUARES, SUMS, judged


def printed(programs: Programs, source: str, stdin: str = "") -> str:
    return programs.run(Program(source, stdin=stdin), Limits(20.0, 256)).printed.strip()


def test_a_program_has_no_environment_and_no_descriptors_but_its_own(programs, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "canary")
    assert printed(programs, "import os\nprint(dict(os.environ))") == "{}"
    there = (
        "import os, fcntl\nfor fd in range(64):\n    try:\n        fcntl.fcntl(fd, 1)\n        print(fd)\n"
    )
    assert len(printed(programs, there + "    except OSError: pass").split()) <= 4


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "/proc/self/environ", "/proc/1/environ", "/proc/{parent}/mem", "/dev/shm", "/tmp"]
)
def test_a_program_reads_nothing_outside(programs, path):
    path = path.format(parent=os.getpid())
    source = f"import os\ntry:\n    os.listdir({path!r}) if os.path.isdir({path!r}) else open({path!r})\n"
    assert printed(programs, source + "except OSError as error: print(type(error).__name__)") in (
        "PermissionError",
        "FileNotFoundError",
    )


WRITES = """
import os
def tried(act):
    try:
        act()
        print("done", act)
    except OSError:
        pass
path = {path!r}
os.symlink(path, "link")
tried(lambda: open(path, "w"))
tried(lambda: open("link", "w"))
tried(lambda: open("link"))
tried(lambda: os.unlink(path))
tried(lambda: os.rename(path, "mine"))
tried(lambda: os.link(path, "hard"))
tried(lambda: os.chmod(path, 0o777))
tried(lambda: os.utime(path))
tried(lambda: os.truncate(path, 0))
tried(lambda: os.mkdir(path + ".d"))
tried(lambda: open("/dev/shm/entroray-test", "w"))
tried(lambda: open(os.path.dirname(os.__file__) + "/entroray.pth", "w"))
tried(lambda: os.fchmod(os.open(os.__file__, 0), 0))
tried(lambda: os.chroot("."))
print("tried")
"""


def test_a_program_changes_nothing_outside(programs, tmp_path: Path):
    kept = tmp_path / "kept"
    kept.write_text("mine")
    before = kept.stat()
    assert printed(programs, WRITES.format(path=str(kept))) == "tried"
    after = kept.stat()
    assert kept.read_text() == "mine" and [*tmp_path.iterdir()] == [kept]
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


CALLS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for name, number, *arguments in {calls}:
    if libc.syscall(number, *arguments) >= 0 or ctypes.get_errno() not in ({refused}):
        print(name, ctypes.get_errno())
print("tried")
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="NOT TESTED: the numbers below are of x86_64")
def test_calls_that_reach_other_processes_or_the_kernel_are_refused(programs):
    me = os.getpid()
    calls = [
        *(("socket", 41, family, 1, 0) for family in (1, 2, 10, 16, 17)),
        *(
            ("connect", 42, 0, 0, 0),
            ("bind", 49, 0, 0, 0),
            ("clone", 56, 0x11, 0),
            ("fork", 57),
            ("vfork", 58),
        ),
        *(("clone3", 435, 0, 0), ("execve", 59, 0, 0, 0), ("execveat", 322, 0, 0, 0, 0, 0)),
        *(("kill", 62, me, 0), ("kill", 62, -1, 0), ("tkill", 200, me, 0), ("tgkill", 234, me, me, 0)),
        *(("pidfd_send_signal", 424, 0, 0, 0, 0), ("pidfd_open", 434, me, 0), ("prlimit", 302, me, 0, 0, 0)),
        *(("ptrace", 101, 16, me, 0, 0), ("process_vm_readv", 310, me, 0, 0, 0, 0, 0), ("kcmp", 312, me, me)),
        *(
            ("mount", 165, 0, 0, 0, 0, 0),
            ("unshare", 272, 0x10000000),
            ("setns", 308, 0, 0),
            ("chroot", 161, 0),
        ),
        *(
            ("io_uring_setup", 425, 1, 0),
            ("bpf", 321, 0, 0, 0),
            ("keyctl", 250, 0, 0),
            ("add_key", 248, 0, 0),
        ),
        *(("perf_event_open", 298, 0, 0, 0, 0, 0), ("userfaultfd", 323, 0), ("memfd_create", 319, 0, 0)),
        *(("shmget", 29, 0, 4096, 0o1600), ("msgget", 68, 0, 0o1600), ("semget", 64, 0, 1, 0o1600)),
        *(("prctl", 157, 1, 0), ("setuid", 105, 0), ("capset", 126, 0, 0), ("seccomp", 317, 1, 0, 0)),
        *(("setpriority", 141, 0, 0, -20), ("sched_setaffinity", 203, me, 0, 0), ("reboot", 169, 0, 0, 0)),
    ]
    refused = f"{errno.EPERM}, {errno.ENOSYS}"
    assert printed(programs, CALLS.format(calls=calls, refused=refused)) == "tried"


def test_a_program_cannot_raise_its_own_limits(programs):
    source = "import resource as r\nfor k in (r.RLIMIT_AS, r.RLIMIT_CPU, r.RLIMIT_FSIZE, r.RLIMIT_NOFILE):\n"
    source += "    try:\n        r.setrlimit(k, (-1, -1))\n        print('raised', k)\n"
    assert printed(programs, f"{source}    except (ValueError, OSError): pass\nprint('tried')") == "tried"


def test_memory_is_what_a_program_may_have(programs):
    for size, said in ((64, "EOFError"), (1024, "MemoryError")):
        source = f"x = bytearray({size} << 20)\nwhile True: input()"
        assert said in judged(programs, source, ONE_SUM, timeout=20.0).detail


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="NOT TESTED: the number below is of x86_64")
def test_a_program_of_the_superuser_has_no_rights():
    rights = """
import ctypes, struct
held = ctypes.create_string_buffer(24)
failed = ctypes.CDLL(None).syscall(125, struct.pack("=Ii", 0x20080522, 0), held)
print(failed, set(held.raw))
"""
    without_filter = Programs(("Landlock",))
    try:
        assert printed(without_filter, rights) == "0 {0}"
    finally:
        without_filter.close()


def test_nothing_of_a_program_is_left(programs):
    server = psutil.Process(programs._server.pid)
    for source in (SPREAD, "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()"):
        judged(programs, source, SUMS, timeout=0.2)
    assert server.children(recursive=True) == []
    assert printed(programs, "import os\nprint(os.listdir('.'), len(os.getcwd()) > 1)") == "[] True"


def test_the_server_imports_only_the_standard_library(programs):
    modules = {name.partition(".")[0] for name in programs.found["modules"]}
    assert modules - set(sys.stdlib_module_names) == {"__main__"}


def test_what_is_said_to_hold_was_seen_to_hold(programs):
    assert {"Landlock", "seccomp"} <= {*programs.held}
    assert "refused: a socket, a process, a file outside" in programs.describe()


def test_a_server_that_was_killed_is_replaced(programs):
    own = Programs()
    os.kill(own._server.pid, signal.SIGKILL)
    own._server.wait(10)
    assert printed(own, "print(4)") == "4"
    own.close()


def test_a_server_that_does_not_answer_is_a_failure_of_the_infrastructure(monkeypatch):
    own = Programs()
    monkeypatch.setattr("entroray.reward.programs._START_DEADLINE", 0.1)
    os.kill(own._server.pid, signal.SIGSTOP)
    try:
        verdict = judged(own, RIGHT, SQUARES)
        assert verdict.status is Status.INFRA_FAILED and "does not answer" in verdict.detail
    finally:
        os.kill(own._server.pid, signal.SIGCONT)
        own.close()


# With fewer layers.


@pytest.mark.parametrize(
    ("layers", "could"), [(("seccomp",), {"a file outside"}), (("Landlock",), {"a process"})]
)
def test_one_layer_alone_keeps_what_it_can(layers, could, tmp_path: Path):
    one = Programs(layers)
    try:
        assert one.held == [*layers] and could <= {name for name, can in one.tried.items() if can}
        one.require("auto")
        (tmp_path / "kept").write_text("mine")
        source = f"open({str(tmp_path / 'kept')!r}, 'w')"
        assert "PermissionError" in judged(one, source, SUMS, timeout=5.0).detail
        assert (tmp_path / "kept").read_text() == "mine"
    finally:
        one.close()


def test_without_a_layer_code_is_refused_unless_that_is_said_and_strays_are_ended():
    bare = Programs(())
    try:
        assert bare.held == [] and all(bare.tried.values())
        with pytest.raises(ConfigError, match=r"Landlock.*seccomp.*verifier\.isolation=contained"):
            bare.require("auto")
        bare.require("contained")
        away = "import os, time\nfor _ in range(3):\n    if not os.fork():\n        os.setsid()\n"
        judged(bare, f"{away}        time.sleep(99)", SUMS, timeout=5.0)
        assert psutil.wait_procs(psutil.Process(bare._server.pid).children(recursive=True), 10)[1] == []
    finally:
        bare.close()


def test_the_judge_is_built_by_name_with_its_settings():
    judge = build_judge({"fn": "code", "timeout": 5.0, "partial": True})
    assert judge("def f(x): return 4", Prompt("0" * 16, "?", (1,), "", SQUARES)).reward == 0.5
    with pytest.raises(ConfigError, match="timeout"):
        build_judge({"fn": "code", "timeout": 0.0})
