"""Asks the judges that live on servers: a deadline for each response, a limit of requests for each judge."""

import asyncio
import inspect
import json
import math
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from entroray.binding import bind, effective_settings, slot_functions, traits
from entroray.errors import ConfigError
from entroray.reward import judges, remote_judges
from entroray.reward.http_client import Client, Connections, Unjudged
from entroray.reward.parts import PLACE, Spec, judge_parts
from entroray.reward.verdicts import Response, as_verdict, failed, last_line
from entroray.types import Prompt, Status, Verdict

SLOT = (judges, remote_judges)
"""Where a judge's name is looked up."""
CONCURRENCY = 32
"""Requests under way at most, of a judge that has no such setting."""
IN_A_ROW = 3
"""Responses that a server gave no verdict on, after which it is down; `concurrency` if that is less."""
PROBE = 30.0
"""Seconds between two responses that a server which is down is asked about, once each."""


def bind_judge(spec: object, packages: Iterable[str] = (), place: str = judges.SETTING) -> partial:
    """The function of a judge with its settings; ConfigError for what is unknown, or does not fit."""
    bound = bind(SLOT, spec, packages, place, ("weight",) if place.startswith(PLACE) else ())
    misfit = traits(bound).misfit
    if misfit and (wrong := misfit(**effective_settings(bound))):
        raise ConfigError(f"{place}: {wrong}")
    return bound


def is_served(bound: partial) -> bool:
    """Whether a judge is asked by the verifier itself, not run in its judge processes: an `async def`."""
    return inspect.iscoroutinefunction(bound.func)


@dataclass
class Server:
    """What all judges on one server share: how many ask at once, and whether it is down."""

    concurrency: int
    failures: int = 0
    """In a row."""
    next_probe: float = 0.0
    """By `time.monotonic`."""
    trouble: str = ""

    def __post_init__(self) -> None:
        self.turn, self.probe = asyncio.Semaphore(self.concurrency), asyncio.Lock()

    def is_down(self) -> bool:
        return self.failures >= min(IN_A_ROW, self.concurrency)

    async def ask(self, once: Callable[[bool], Awaitable[Verdict]]) -> Verdict:
        """What `once` gives, told whether to ask once alone; at once that the server is down, while it is."""
        async with self.turn:
            if not self.is_down():
                return self._note(await once(False))
            async with self.probe:
                if self.is_down() and time.monotonic() < self.next_probe:
                    return failed(f"{self.trouble} (down: asked every {PROBE:g} s)", Status.INFRA_FAILED)
                if self.is_down():
                    return self._note(await once(True))
            return self._note(await once(False))

    def _note(self, verdict: Verdict) -> Verdict:
        if verdict.status not in (Status.INFRA_FAILED, Status.TIMEOUT):
            self.failures = 0
            return verdict
        if self.is_down():  # the first probe is at once: it may have been the responses' fault
            self.next_probe = time.monotonic() + PROBE
        self.failures, self.trouble = self.failures + 1, verdict.detail
        return verdict


class ServedJudges:
    """The judges on servers among those of a verifier, by domain and part.

    ConfigError for one that is unknown or does not fit, and where a key is not in the environment.
    `patience` are the seconds after which nothing is tried again.
    """

    def __init__(self, reward: Mapping[str, Any], deadline: float, patience: float = math.inf):
        packages = tuple(reward.get("packages", ()))
        parts = {
            (d, name): s for d, judge in reward["judges"].items() for name, s in judge_parts(judge).items()
        }
        bound = {at: bind_judge(spec, packages) for at, spec in parts.items() if may_be_served(spec)}
        self.judges = {at: judge for at, judge in bound.items() if is_served(judge)}
        for at, judge in self.judges.items():
            _check_key(judge.keywords.get("key_env"), at[1])
        self.deadline, self.patience = deadline, patience
        self.connections = Connections()
        self._servers: dict[str, Server] = {}
        self._server = {at: self._shared_server(parts[at], judge) for at, judge in self.judges.items()}

    def _shared_server(self, spec: Spec, judge: partial) -> Server:
        """One, whatever the domains and parts that ask it."""
        settings = effective_settings(judge)
        server = json.dumps([spec["fn"], settings.get("url"), settings.get("base_url")])
        return self._servers.setdefault(server, Server(settings.get("concurrency", CONCURRENCY)))

    async def judge(self, at: tuple[str, str], response: Response, prompt: Prompt) -> Verdict:
        """The verdict of the judge of a domain and part, from when it is its turn within its deadline."""
        server = self._server[at]
        return await server.ask(lambda once: self._asked(self.judges[at], response, prompt, server, once))

    async def _asked(
        self, judge: partial, response: Response, prompt: Prompt, server: Server, once: bool
    ) -> Verdict:
        deadline = effective_settings(judge).get("deadline", self.deadline)
        source = f"{judges.SETTING} {judge.func.__name__}"
        patience = 0.0 if once else min(deadline, self.patience)
        client = Client(self.connections, patience, time.monotonic(), server.is_down)
        try:
            async with asyncio.timeout(deadline) as limit:
                return as_verdict(await judge(response, prompt, client), source)
        except Unjudged as error:
            return failed(error.detail, error.status)
        except Exception as error:  # boundary: user code, and answers of a server; it fails this alone
            if isinstance(error, TimeoutError) and limit.expired():
                return failed(_late(deadline, client.trouble), Status.TIMEOUT)
            return failed(f"{source} raised {last_line(error)}")

    def close(self) -> None:
        """End every connection; what is under way fails."""
        self.connections.close()


def _late(deadline: float, trouble: str) -> str:
    return f"no verdict within deadline={deadline:g} s" + (f": {trouble}" if trouble else "")


def may_be_served(spec: Spec) -> bool:
    """Whether a judge is on a server, or is a function of the user's packages, which may be."""
    name = str(spec.get("fn"))
    return "." in name or name in slot_functions(remote_judges)


def _check_key(name: str | None, part: str) -> None:
    if name is not None and not os.environ.get(name, "").strip():
        place = f"reward.parts.{part}.key_env" if part else f"{judges.SETTING}.key_env"
        raise ConfigError(
            f"{place}={name}: the environment of the verifier has no {name}: `export {name}=...` before the "
            "run, and on each node of a cluster before `ray start`"
        )
