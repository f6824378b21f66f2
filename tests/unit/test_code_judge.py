"""Programs that are judged, each in a process of its own: right ones, wrong ones, and those that attack."""

import time

import pytest

from entroray.reward.code_judge import CodeJudge
from entroray.reward.programs import Programs
from entroray.types import Prompt, Status, Verdict

SQUARES = {"test_list": ["assert f(2) == 4", "assert f(3) == 9"]}
SUMS = {"input_output": {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}}
ONE_SUM = {"input_output": {"inputs": ["1 2\n"], "outputs": ["3\n"]}}
RIGHT = "def f(x):\n    return x * x\n"


def judged(programs: Programs, source: str, row: dict, partial: bool = False, **of: float) -> Verdict:
    limits = {"timeout": 0.4, "deadline": 30.0, "memory_mb": 256, "tolerance": 1e-6} | of
    judge = CodeJudge(programs, None, partial=partial, **limits)
    return judge(source, Prompt("0" * 16, "?", (1,), "", row))


@pytest.mark.parametrize(
    ("source", "row"),
    [
        (RIGHT, SQUARES),
        (f"Thus:\n```python\n{RIGHT}```\nDone.", SQUARES),
        ("import numbers\nclass N(int): pass\ndef f(x): return N(x * x)", SQUARES),
        (RIGHT + "print('x' * 10**6)", SQUARES),
        ("print(sum(map(int, input().split())))", SUMS),
        ("import sys\nfor line in sys.stdin: print(sum(map(int, line.split())))\nsys.exit(0)", SUMS),
        ("import os\nprint(sum(map(int, os.read(0, 99).split())), flush=True)\nos._exit(0)", SUMS),
        ("import atexit\nx = sum(map(int, input().split()))\natexit.register(lambda: print(x))", SUMS),
        (
            "import threading\nthreading.stack_size(1 << 26)\n"
            "threading.Thread(target=lambda: print(sum(map(int, input().split())))).start()",
            SUMS,
        ),
        ("import asyncio\nasync def go(): print(sum(map(int, input().split())))\nasyncio.run(go())", SUMS),
        ("open('kept', 'w').write(input())\nprint(sum(map(int, open('kept').read().split())))", SUMS),
        ("if __name__ == '__main__':\n    print(sum(int(x) for x in input().split()))", SUMS),
        (
            "class Solution:\n    def add(self, xs: List[int]) -> int:\n        return sum(xs)",
            {"input_output": {"fn_name": "add", "inputs": [[[1, 2]]], "outputs": [[3]]}},
        ),
        (
            "def pairs(n): return [(i, i) for i in range(n)]",
            {"input_output": {"fn_name": "pairs", "inputs": ["2"], "outputs": ["[[0, 0], [1, 1]]"]}},
        ),
        ("def f(x): return x", {"test_list": ["assert set(f([2, 1])) == set([1, 2])"]}),
        (
            "class P: v = 3\ndef f(p): return p.v",
            {"test_list": ["assert f(p) == 3"], "test_setup_code": "p = P()"},
        ),
        ("def f(x): return 1 / 3", {"test_list": ["assert abs(f(1) - 0.33) < 0.01"]}),
    ],
)
def test_a_right_program_is_right(programs, source, row):
    verdict = judged(programs, source, row)
    assert (verdict.reward, verdict.correct, verdict.parts) == (1.0, True, {"tests": 1.0}), verdict.detail


SPREAD = "import os\nwhile True:\n    os.fork()\n"
FORGED = r"""
import os
for fd in range(3, 64):
    for line in (b'{"shut in": true}', b'{"held": true}', b'{"value": true}', b'[]', b'\xff', b'{"open": 1}'):
        try:
            os.write(fd, line + b'\n')
        except OSError:
            pass
"""
SEARCH = """
import gc, sys
wanted = "123456789"  # backwards, so that it is not found here
def f(x):
    frame, seen = sys._getframe(), []
    while frame:
        seen += [frame.f_locals, frame.f_globals, frame.f_code.co_consts]
        frame = frame.f_back
    seen += [vars(m) for m in list(sys.modules.values())] + gc.get_objects()
    return int(wanted[::-1]) if any(wanted in repr(each)[::-1] for each in seen) else 0
"""
ATTACKS = {
    "no code": "",
    "prose": "The answer is x squared.",
    "a syntax error": "def f(x: return x",
    "a null byte": "def f(x): return x*x\0",
    "an exception": "raise ValueError(4)",
    "an exception that is no Exception": "class E(BaseException): pass\nraise E",
    "a Python loop": "while True: pass",
    "a loop in C": "import re\nre.match(r'(a|aa)+$', 'a' * 60 + 'b')",
    "a loop that ignores signals": "import signal\nsignal.signal(15, signal.SIG_IGN)\nwhile True: pass",
    "a loop in the call": "def f(x):\n    while True: pass",
    "sleep": "import time\ntime.sleep(60)",
    "memory": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "memory at once": "x = bytearray(1 << 40)",
    "threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()",
    "processes": SPREAD,
    "a shell": "import os\ndef f(x): return os.system('echo 4') or 4 * (x == 9)",
    "subprocess": "import subprocess\ndef f(x): return int(subprocess.check_output(['expr', '2', '*', '2']))",
    "exit": "import sys\nsys.exit(0)",
    "exit at once": "import os\nos._exit(0)",
    "exit as it ends": "import atexit, os\natexit.register(os._exit, 0)",
    "a segmentation fault": "import ctypes\nctypes.string_at(0)",
    "deep recursion in C": "x = ()\nfor _ in range(10**5): x = (x,)\ndef f(y): return x",
    "endless recursion": "def f(x): return f(x)",
    "a huge number": "def f(x): return 7 ** 10**5",
    "lone surrogates": "def f(x): return '\\ud800'",
    "what is equal to all": "class A:\n    def __eq__(s, o): return True\ndef f(x): return A()",
    "a number that lies": "class I(int):\n    def __eq__(s, o): return True\n    def __hash__(s): return 4\n"
    "    def __format__(s, f): return '4'\n    def __index__(s): return 4\ndef f(x): return I(0)",
    "a text that lies": "class S(str):\n    def __eq__(s, o): return True\n    def __hash__(s): return 4\n"
    "def f(x): return S('4')",
    "truth for a number": "def f(x): return True",
    "a generator": "def f(x): yield x * x",
    "patched builtins": "import builtins as b\nb.eval = lambda *a: 4\nb.isinstance = lambda *a: True",
    "patched json": "import json\njson.dumps = lambda x: '{\"held\": true}'",
    "patched comparison": "import operator\noperator.eq = lambda *a: True\nf = lambda x: None",
    "patched stdout": "import sys\nclass W:\n    def flush(s): sys.exit(0)\nsys.stdout = W()",
    "no stdout": "import os, sys\nos.close(1)\nsys.stdout = None",
    "the channel of results": FORGED + "os._exit(0)",
    "the channel of results, closed": "import os\nos.closerange(0, 64)\ndef f(x): return x * x",
    "printed verdicts": "print('{\"reward\": 1.0, \"correct\": true}')\nprint('2 of 2 tests passed')",
    "edited tests": "import sys\nfor step in sys._getframe(2).f_locals['request']['steps']: step[1] = '0'",
    "no tests": "import sys\nsys._getframe(2).f_locals['request']['steps'].clear()",
    "the player": "import sys\nsys._getframe(2).f_globals['plain'] = lambda v: ['int', '0']\n",
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("row", [SQUARES, ONE_SUM], ids=["calls", "output"])
def test_an_attack_is_a_wrong_answer(programs, attack, row):
    verdict = judged(programs, ATTACKS[attack], row, timeout=0.2, memory_mb=64)
    assert (verdict.reward, verdict.correct, verdict.status) == (0.0, False, Status.OK), verdict.detail
    assert verdict.detail


def test_one_gigabyte_of_output_is_wrong_and_is_not_kept(programs):
    for source in ("print('x' * (1 << 27))", "x = 'y' * 65536\nwhile True: print(x)"):
        verdict = judged(programs, source, ONE_SUM, timeout=20.0)
        assert verdict.reward == 0.0 and "4,194,304 bytes" in verdict.detail and len(verdict.detail) < 2000
    verdict = judged(programs, "def f(x): return 'x' * (1 << 24)", SQUARES, timeout=20.0)
    assert verdict.reward == 0.0 and "4,194,304 bytes" in verdict.detail


def test_input_that_is_used_up_is_an_error_of_the_program(programs):
    verdict = judged(programs, "while True: input()", SUMS)
    assert verdict.reward == 0.0 and "EOFError" in verdict.detail


def test_no_program_finds_what_is_expected_of_it_but_in_a_weak_test(programs):
    strong = judged(programs, SEARCH, {"test_list": ["assert f(2) == 987654321"]}, timeout=20.0)
    weak = judged(programs, SEARCH, {"test_list": ["assert f(2) in [987654321]"]}, timeout=20.0)
    assert strong.reward == 0.0, "it found it"
    assert weak.reward == 1.0 and "1 of 1 tests passed, 1 weak" in weak.detail


def test_what_is_expected_and_no_literal_is_evaluated_where_the_program_is_not(programs):
    lies = "def sorted(x): return 0\nimport builtins\nbuiltins.sorted = sorted\ndef f(x): return 0"
    row = {"test_list": ["assert f([2, 1]) == sorted([2, 1])"]}
    assert judged(programs, lies, row).reward == 0.0
    right = judged(programs, "def f(x): return sorted(x)", row)
    assert right.reward == 1.0 and "weak" not in right.detail
    mutual = judged(programs, RIGHT, {"test_list": ["assert f(2) == f(-2)"]})
    assert mutual.reward == 1.0 and "1 weak" in mutual.detail


def test_the_share_of_tests_is_a_part_and_with_partial_the_reward(programs):
    half = "def f(x): return 4"
    whole, partial = judged(programs, half, SQUARES), judged(programs, half, SQUARES, partial=True)
    assert (whole.reward, whole.correct, whole.parts) == (0.0, False, {"tests": 0.5})
    assert (partial.reward, partial.correct, partial.parts) == (0.5, False, {"tests": 0.5})
    assert "test 2: f(3) gave 4, not 9" in whole.detail


def test_what_was_passed_before_a_program_was_killed_counts(programs):
    source = "def f(x):\n    while x == 3: pass\n    return x * x"
    assert judged(programs, source, SQUARES, timeout=0.2).parts == {"tests": 0.5}
    source = "import os\ndef f(x): return x * x if x == 2 else os._exit(0)"
    assert judged(programs, source, SQUARES).parts == {"tests": 0.5}


def test_a_row_without_tests_is_a_failure_of_the_data(programs):
    assert judged(programs, RIGHT, {"question": "?"}).status is Status.DATA_FAILED


def test_tests_that_there_is_no_time_for_are_wrong(programs):
    row = {"input_output": {"inputs": ["1\n"] * 50, "outputs": ["1\n"] * 50}}
    began = time.monotonic()
    verdict = judged(programs, "import time\ntime.sleep(0.3)\nprint(input())", row, timeout=3.0, deadline=1.0)
    assert time.monotonic() - began < 4 and verdict.status is Status.OK
    assert 0 < verdict.parts["tests"] < 1 or verdict.parts == {"tests": 0.0}
    assert (
        "not run within 1.5 s"
        in judged(programs, "import time\ntime.sleep(9)", row, timeout=9.0, deadline=1.5).detail
    )
