"""1 MB summed over nodes as ranks will sum gradients: a network that does not work is said, not waited for.

python -m entroray.workers.network BACKEND RANK MEMBERS HOST PORT
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial

import torch
from torch import distributed

from entroray.engine.interfaces import VARIABLES, check_interface, interface_to
from entroray.errors import PreflightError, first_line

SIZE = 1 << 20
"""Bytes."""
DEADLINE = 30.0
"""Seconds for all members to meet and to sum."""
DRIVER = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
Ask = Callable[[Sequence[Callable[[], tuple[bool, str]]]], Sequence[tuple[bool, str]]]
"""Has each of these answered by its member, all at once."""


def try_network(host: str, places: Sequence[str], backend: str, ask: Ask) -> str:
    """Time, interface, driver and NCCL of a sum over members in `places`, who meet at `host`, this machine.

    PreflightError that says what is wrong where, and names the variable that `backend` reads.
    """
    within = timedelta(seconds=DEADLINE)
    store = distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=within)
    member = lambda rank: partial(take_part, backend, rank, len(places), host, store.port)
    answers = [*zip(places, ask([*map(member, range(len(places)))]), strict=True)]
    said = "; ".join(f"{place}: {text}" for place, (_, text) in answers)
    if not all(well for _, (well, _) in answers):
        raise PreflightError(
            f"1 MB could not be summed by {backend} over {len(places)} processes ({said}): set "
            f"{VARIABLES[backend]} to the interface between the nodes, or unset it, and open the ports"
        )
    return f"1 MB summed by {backend} over {len(places)} processes ({said})"


def ask_here(questions: Sequence[Callable[[], tuple[bool, str]]]) -> list[tuple[bool, str]]:
    """Answered by processes of this machine."""
    with ThreadPoolExecutor(len(questions)) as pool:
        return list(pool.map(lambda question: question(), questions))


def take_part(backend: str, rank: int, members: int, host: str, port: int) -> tuple[bool, str]:
    """Whether a process of its own has summed in time, and what it says."""
    try:
        check_interface(backend)
    except PreflightError as error:
        return False, str(error)
    arguments = map(str, (backend, rank, members, host, port))
    path = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "entroray.workers.network", *arguments]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=DEADLINE + 30,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, f"stuck for {DEADLINE + 30:.0f} s"
    *_, last = ["no word", *(done.stdout if done.stdout.strip() else done.stderr).strip().splitlines()]
    return done.returncode == 0, last


def main(backend: str, rank: str, members: str, host: str, port: str) -> int:
    """Print what was found; 1 if there is no sum."""
    try:
        seconds = _sum(backend, int(rank), int(members), host, int(port))
    except Exception as error:  # boundary: torch, gloo and NCCL raise what they meet
        print(f"{interface_to(host, int(port))}, {first_line(error)}")
        return 1
    print(", ".join([interface_to(host, int(port)), f"{1e3 * seconds:.1f} ms", *_of_card(backend)]))
    return 0


def _sum(backend: str, rank: int, members: int, host: str, port: int) -> float:
    within = timedelta(seconds=DEADLINE)
    store = distributed.TCPStore(host, port, is_master=False, timeout=within)
    if backend == "nccl":  # which refuses two members on one card
        torch.cuda.set_device(rank % torch.cuda.device_count())
    distributed.init_process_group(backend, store=store, rank=rank, world_size=members, timeout=within)
    mine = torch.full((SIZE // 4,), float(rank + 1), device="cuda" if backend == "nccl" else "cpu")
    distributed.all_reduce(mine.clone())  # it opens the connections
    began = time.perf_counter()
    distributed.all_reduce(mine)
    least, most = mine.aminmax()
    if not least == most == members * (members + 1) / 2:
        raise ArithmeticError(f"the sum is {least:g} to {most:g}")
    return time.perf_counter() - began


def _of_card(backend: str) -> list[str]:
    """Driver and NCCL, where a card has summed."""
    if backend != "nccl":
        return []
    try:
        asked = subprocess.run(DRIVER, capture_output=True, text=True, timeout=30, check=True)
        driver = asked.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):  # a container may have no nvidia-smi
        driver = "unknown"
    return [f"driver {driver}", f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"]


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # a group that was never whole cannot be left in order
