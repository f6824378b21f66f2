"""Asks the judges that live on servers: a deadline for each response, a limit of requests for each judge."""

import asyncio
import inspect
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from entroray.binding import bind, effective_settings, slot_functions, traits
from entroray.errors import ConfigError
from entroray.reward import judges, remote_judges
from entroray.reward.http_client import Client, Connections, Unjudged
from entroray.reward.parts import Spec, judge_parts
from entroray.reward.verdicts import Response, as_verdict, failed, last_line
from entroray.types import Prompt, Status, Verdict

SLOT = (judges, remote_judges)
"""Where a judge's name is looked up."""
CONCURRENCY = 32
"""Requests under way at most, of a judge that has no such setting."""


def bind_judge(spec: object, packages: Iterable[str] = (), place: str = judges.SETTING) -> partial:
    """The function of a judge with its settings; ConfigError for what is unknown, or does not fit."""
    bound = bind(SLOT, spec, packages, place)
    misfit = traits(bound).misfit
    if misfit and (wrong := misfit(**effective_settings(bound))):
        raise ConfigError(f"{place}: {wrong}")
    return bound


def is_served(bound: partial) -> bool:
    """Whether a judge is asked by the verifier itself, not run in its judge processes: an `async def`."""
    return inspect.iscoroutinefunction(bound.func)


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
        self._limits: dict[str, asyncio.Semaphore] = {}
        self._limit = {at: self._shared_limit(parts[at], judge) for at, judge in self.judges.items()}

    def _shared_limit(self, spec: Spec, judge: partial) -> asyncio.Semaphore:
        """One for each server, whatever the domains and parts that ask it."""
        settings = effective_settings(judge)
        server = json.dumps([spec["fn"], settings.get("url"), settings.get("base_url")])
        return self._limits.setdefault(server, asyncio.Semaphore(settings.get("concurrency", CONCURRENCY)))

    async def judge(self, at: tuple[str, str], response: Response, prompt: Prompt) -> Verdict:
        """The verdict of the judge of a domain and part, from when it is its turn within its deadline."""
        judge = self.judges[at]
        deadline = effective_settings(judge).get("deadline", self.deadline)
        source = f"{judges.SETTING} {judge.func.__name__}"
        async with self._limit[at]:
            client = Client(self.connections, min(deadline, self.patience), time.monotonic())
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
