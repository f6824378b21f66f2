"""The verifier as a real Ray actor, against answers and judges that hang, crash, fork and lie."""

import asyncio
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from entroray.errors import ConfigError, InfrastructureError
from entroray.types import Answer, Prompt, Rollout, Status, Verdict
from entroray.workers.verifier import Verifier, _cpu_seconds

DEADLINE, BUSY = 1.0, 1.9
"""Seconds an item has, and those that a busy machine may add to all: less than one slot in place of two."""
PROMPT = Prompt("0" * 16, "?", (1,), "8", {"answer": "8", "metadata": {"numbers": [3, 5], "target": 8}})


def custom(path: str) -> dict[str, object]:
    """What a verifier is given for a judge of the user's own file."""
    return {"judges": {"": {"fn": "custom", "path": path}}}


JUDGE = """
import os, re, signal, subprocess, sys, time
from entroray.types import Verdict

def judge(response, prompt):
    return BEHAVIOUR.get(response, lambda: float(response == prompt.reference))()

def python_loop():
    while True:
        pass

def c_loop():
    return re.match(r"(a|aa)+$", "a" * 60 + "b") is None

def deaf():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    note(os.getpid())
    return len(str(7 ** (7 ** 9)))

def crowd():
    note(subprocess.Popen(["sleep", "600"]).pid)
    time.sleep(600)

def note(pid):
    with open(os.path.join(HERE, "writing"), "w") as file:
        file.write(str(pid))
    os.replace(file.name, os.path.join(HERE, "pid"))

def dies_once():
    mark = os.path.join(HERE, "died")
    if os.path.exists(mark):
        return 1.0
    open(mark, "w").close()
    os.kill(os.getpid(), signal.SIGKILL)

def forges():
    import socket
    for number in range(3, 64):
        try:
            socket.socket(fileno=os.dup(number)).sendall((9).to_bytes(8, "big") + b"{'x': 1}!")
        except OSError:
            pass
    return 1.0

HERE = os.path.dirname(os.path.abspath(__file__))
BEHAVIOUR = {
    "python loop": python_loop,
    "c loop": c_loop,
    "deaf": deaf,
    "crowd": crowd,
    "dies": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "dies once": dies_once,
    "forges": forges,
    "hoards": lambda: len(bytearray(400 * 2**20)),
    "none": lambda: None,
    "raises": lambda: 1 / 0,
    "exits": lambda: sys.exit(0),
    "half": lambda: Verdict(0.5, False, "an answer", {"form": 0.5}, detail="half of it"),
}
"""


def rollout(text: str, status: Status = Status.OK) -> Rollout:
    empty = np.zeros(0)
    return Rollout(
        PROMPT.id,
        empty.astype(np.int32),
        empty.astype(np.float32),
        empty.astype(np.int32),
        text,
        1.0,
        8,
        status,
    )


@pytest.fixture(scope="module")
def judge_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("judge") / "mine.py"
    file.write_text(JUDGE)
    return f"{file}:judge"


@pytest.fixture(scope="module")
def verdicts(local_ray: None, judge_file: str) -> Iterator[Callable[..., list[Verdict]]]:
    actor = ray.remote(num_cpus=0.1)(Verifier).remote(
        custom(judge_file), slots=2, deadline=DEADLINE, memory_mb=256
    )
    ray.get(actor.warm_up.remote(), timeout=60)

    def judge(*texts: str | Rollout) -> list[Verdict]:
        rollouts = [t if isinstance(t, Rollout) else rollout(t) for t in texts]
        return ray.get(actor.judge.remote(PROMPT, rollouts), timeout=60)

    yield judge
    ray.get(actor.close.remote(), timeout=30)
    ray.kill(actor)


def test_verdicts_come_in_order(verdicts):
    graded = verdicts("8", "9", "half", "8")
    assert [v.reward for v in graded] == [1, 0, 0.5, 1]
    assert [v.correct for v in graded] == [1, 0, 0, 1]
    assert graded[2] == Verdict(0.5, False, "an answer", {"form": 0.5}, detail="half of it")


@pytest.mark.parametrize("slow", ["python loop", "c loop", "deaf", "crowd"])
def test_a_slow_item_times_out_alone(verdicts, slow):
    began = time.monotonic()
    graded = verdicts(slow, *["8"] * 20, slow)
    seconds = time.monotonic() - began
    assert [v.status for v in graded] == [Status.TIMEOUT, *[Status.OK] * 20, Status.TIMEOUT]
    assert math.isnan(graded[0].reward) and graded[0].detail == "no verdict within 1 s"
    assert seconds < 2 * DEADLINE + BUSY


def test_the_deadline_runs_from_an_items_own_start_and_others_keep_their_slot(verdicts):
    began = time.monotonic()
    graded = verdicts(*["python loop"] * 4)
    assert {v.status for v in graded} == {Status.TIMEOUT}
    assert 2 * DEADLINE <= time.monotonic() - began < 2 * DEADLINE + BUSY
    began = time.monotonic()
    graded = verdicts("python loop", *["8"] * 200)
    assert sum(v.correct == 1 for v in graded) == 200
    assert time.monotonic() - began < DEADLINE + BUSY


@pytest.mark.parametrize("slow", ["crowd", "deaf"])
def test_nothing_of_a_late_item_lives_on(verdicts, judge_file, slow):
    """A child that `crowd` started, or `deaf` itself, which ignores every signal that can be ignored."""
    (graded,) = verdicts(slow)
    assert graded.status is Status.TIMEOUT
    assert until(lambda: not alive(int((Path(judge_file).parent / "pid").read_text())))


def test_what_a_judge_does_wrong_is_a_failure_of_the_data(verdicts):
    graded = verdicts("none", "raises", "exits", "hoards", "8")
    assert [v.status for v in graded] == [*[Status.DATA_FAILED] * 4, Status.OK]
    for verdict, says in zip(
        graded, ["None", "ZeroDivisionError", "SystemExit", "MemoryError"], strict=False
    ):
        assert says in verdict.detail and "mine.py" in verdict.detail and math.isnan(verdict.reward)


def test_a_dead_process_is_replaced_and_its_item_tried_once_more(verdicts):
    graded = verdicts("dies once", "dies", "8")
    assert [v.status for v in graded] == [Status.OK, Status.INFRA_FAILED, Status.OK]
    assert math.isnan(graded[1].reward)


def test_a_forged_answer_harms_nobody_else(verdicts):
    graded = verdicts("forges", "8", "8", "8")
    assert graded[0].status is not Status.OK
    assert [v.correct for v in graded[1:]] == [1, 1, 1]


def test_truncated_responses_are_judged_and_failed_ones_are_not(verdicts):
    cut, late, failed = verdicts(
        rollout("8", Status.TRUNCATED),
        rollout("python loop", Status.TRUNCATED),
        rollout("8", Status.INFRA_FAILED),
    )
    assert (cut.status, cut.correct) == (Status.TRUNCATED, 1)
    assert late.status is Status.TIMEOUT
    assert failed.status is Status.INFRA_FAILED and math.isnan(failed.reward)


def test_a_judge_that_cannot_be_built_is_a_config_error_of_the_warm_up(local_ray):
    actor = ray.remote(num_cpus=0.1)(Verifier).remote({"judges": {"": {"fn": "maths"}}})
    with pytest.raises(ConfigError, match="did you mean `math`"):
        ray.get(actor.warm_up.remote(), timeout=60)
    ray.kill(actor)


def test_a_killed_actor_leaves_no_process(local_ray, tmp_path):
    spec = custom(f"{tmp_path / 'mine.py'}:judge")
    (tmp_path / "mine.py").write_text(JUDGE)
    actor = ray.remote(num_cpus=0.1)(Verifier).remote(spec, slots=2)
    ray.get(actor.warm_up.remote(), timeout=60)
    actor.judge.remote(PROMPT, [rollout("python loop"), rollout("crowd")])
    assert until(lambda: (tmp_path / "pid").exists())
    mine = processes(str(tmp_path))
    assert len(mine) == 3  # the fork server and two workers
    ray.kill(actor)
    child = int((tmp_path / "pid").read_text())
    assert until(lambda: not any(map(alive, {*mine, child})))


def test_closing_ends_every_process_and_what_is_still_judged(tmp_path):
    (tmp_path / "mine.py").write_text(JUDGE)

    async def use() -> set[int]:
        verifier = Verifier(custom(f"{tmp_path / 'mine.py'}:judge"), slots=2, deadline=30)
        await verifier.warm_up()
        judging = asyncio.create_task(verifier.judge(PROMPT, [rollout("crowd")]))
        while not (tmp_path / "pid").exists():
            await asyncio.sleep(0.05)
        mine = processes(str(tmp_path))
        verifier.close()
        with pytest.raises(InfrastructureError, match="closed"):
            await judging
        return mine

    mine = asyncio.run(use())
    assert len(mine) == 3
    child = int((tmp_path / "pid").read_text())
    assert until(lambda: not any(map(alive, {*mine, child})), seconds=1)


def test_a_lost_fork_server_is_replaced(tmp_path):
    (tmp_path / "mine.py").write_text(JUDGE)

    async def use() -> list[Verdict]:
        verifier = Verifier(custom(f"{tmp_path / 'mine.py'}:judge"), slots=1)
        await verifier.warm_up()
        for pid in processes(str(tmp_path)):
            os.kill(pid, signal.SIGKILL)
        assert until(lambda: not any(map(alive, processes(str(tmp_path)))))
        try:
            return await verifier.judge(PROMPT, [rollout("8")])
        finally:
            verifier.close()

    (verdict,) = asyncio.run(use())
    assert verdict.correct == 1


def until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether it comes true in time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def processes(word: str) -> set[int]:
    """Processes with `word` on their command line."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes():
                found.add(int(path.parent.name))
        except OSError:
            continue
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_answer_that_the_built_in_judge_cannot_finish_with_is_wrong_and_no_timeout(
    judge_file, monkeypatch
):
    """Processor time is that of a machine of its own here, however busy the real one is."""
    monkeypatch.setattr("entroray.workers.verifier._cpu_seconds", lambda pid: time.monotonic())
    prompt = Prompt("0" * 16, "?", (1,), "5")
    own = Prompt("0" * 16, "?", (1,), "5", domain="own")
    judges = {"": {"fn": "math"}, "own": custom(judge_file)["judges"][""]}

    async def use() -> list[Verdict]:
        verifier = Verifier({"judges": judges}, slots=2, deadline=DEADLINE)
        await verifier.warm_up()
        try:
            texts = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{\sum_{k=1}^{10^{9}} \frac{1}{k}}", r"\boxed{5}"]
            answers = await verifier.judge(prompt, [rollout(text) for text in texts])
            return answers + await verifier.judge(own, [rollout("python loop")])
        finally:
            verifier.close()

    *endless, right, custom_judge = asyncio.run(use())
    assert all(v.status is Status.OK and v.correct is False and v.reward == 0 for v in endless)
    assert right.correct is True and "no verdict within 1 s" in endless[0].detail
    assert custom_judge.status is Status.TIMEOUT, "a judge of the user's has failed, not the answer"


def test_an_answer_that_waits_instead_of_working_has_failed(monkeypatch):
    """A machine that keeps a judge from working makes no answer wrong."""
    assert _cpu_seconds(os.getpid()) > 0 and _cpu_seconds(2**22 + 1) == 0
    monkeypatch.setattr("entroray.workers.verifier._cpu_seconds", lambda pid: 0.0)

    async def use() -> Verdict:
        verifier = Verifier({"judges": {"": {"fn": "math"}}}, slots=1, deadline=DEADLINE)
        await verifier.warm_up()
        try:
            prompt = Prompt("0" * 16, "?", (1,), "5")
            return (await verifier.judge(prompt, [rollout(r"\boxed{9^{9^{9^{9}}}}")]))[0]
        finally:
            verifier.close()

    assert asyncio.run(use()).status is Status.TIMEOUT


TOOL = """
import time
def slow(call, prompt):
    if call == "sleep":
        time.sleep(60)
    if call == "raise":
        raise KeyError(call)
    return call.upper() + prompt.reference
"""


def test_a_slow_tool_times_out_alone_and_one_that_raises_says_so(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TOOL)
    tool = {"fn": "custom", "path": f"{tmp_path}/mine.py:slow"}
    spec = {"judges": {"": {"fn": "gym", "task": "chain_sum"}}, "tool": tool}

    async def answered() -> list[Answer]:
        verifier = Verifier(spec, slots=2, deadline=1.0)
        try:
            await verifier.warm_up()
            return await verifier.answer(Prompt("p", "", (1,), "!"), ["a", "sleep", "raise", "b"])
        finally:
            verifier.close()

    a, late, raised, b = asyncio.run(answered())
    assert (a, b) == (Answer("A!"), Answer("B!"))
    assert late.status is Status.TIMEOUT and not late.text
    assert (raised.text, raised.failed, raised.status) == ("error", True, Status.OK)
    assert "KeyError" in raised.detail and "mine.py" in raised.detail
