"""JSON posted to a URL and JSON read from it, again and again while there is hope: for judges on servers."""

import asyncio
import json
import math
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from entroray.types import Status

LARGEST = 1 << 20
"""Bytes of an answer; one that goes on behind them is none."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a second try, doubled before each further one, and the most there are between two."""
BUSY = (408, 425, 429)
"""Statuses below 500 that ask for another try."""
_SHOWN = 200


class Unjudged(Exception):
    """Why a server gave no verdict: what becomes of the response, and a sentence with the URL."""

    def __init__(self, status: Status, detail: str):
        super().__init__(detail)
        self.status, self.detail = status, detail


class _Again(Exception):
    """What may go better at another try, `after` seconds at the earliest."""

    def __init__(self, detail: str, after: float = 0.0):
        super().__init__(detail)
        self.detail, self.after = detail, after


class Connections:
    """The open connections of one verifier, of all its judges; opened in the event loop that first asks."""

    def __init__(self) -> None:
        self._session: Any = None
        self._end = asyncio.Event()
        self._holder: asyncio.Task[None] | None = None

    @property
    def closed(self) -> bool:
        return self._end.is_set()

    def session(self) -> Any:
        """aiohttp's session, without cookies, and without a limit, for each judge has its own."""
        import aiohttp  # 0.2 s, which judge processes do not need

        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
            self._holder = asyncio.create_task(self._hold())
        return self._session

    async def _hold(self) -> None:
        async with self._session:
            await self._end.wait()

    def close(self) -> None:
        """Close every connection; what is under way fails."""
        self._end.set()


@dataclass
class Client:
    """What a judge on a server is given to ask it about one response."""

    connections: Connections
    patience: float
    """Seconds from `began` after which nothing is tried again."""
    began: float
    """By `time.monotonic`."""
    is_down: Callable[[], bool] = lambda: False
    """Whether others have found that nothing is to be hoped for."""
    trouble: str = ""
    """What went wrong last, or what is waited for."""

    async def post(self, url: str, body: Any, *, key_env: str | None = None, timeout: float = 60.0) -> Any:
        """What `url` answers to `body`, both JSON; each try has `timeout` seconds.

        No connection, no answer in time, status 429 or 5xx: tried again, after `Retry-After` or twice as
        long as before. Unjudged when patience ends, for another status, and for an answer that is no JSON
        or longer than `LARGEST`. Redirects are not followed. The key in the environment variable `key_env`
        goes along as a bearer token.
        """
        data, headers = json.dumps(_plain(body)).encode(), {"Content-Type": "application/json"}
        if key := _key(key_env):
            headers["Authorization"] = f"Bearer {key}"
        pause = FIRST_PAUSE
        while True:
            self.trouble = self.trouble or f"{shown(url)} has not answered yet"
            try:
                status, answer, location, after = await self._try(url, data, headers, timeout)
                return _read(url, status, answer, location, after)
            except _Again as again:
                self.trouble = _without(key, again.detail)
                wait = max(again.after, pause * random.uniform(0.5, 1.0))  # not all at once
                if self.connections.closed or time.monotonic() - self.began + wait >= self.patience:
                    raise Unjudged(Status.INFRA_FAILED, self.trouble) from None
            except Unjudged as error:
                raise Unjudged(error.status, _without(key, error.detail)) from None
            await asyncio.sleep(wait)
            if self.is_down():
                raise Unjudged(Status.INFRA_FAILED, self.trouble)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _try(
        self, url: str, data: bytes, headers: Mapping[str, str], timeout: float
    ) -> tuple[int, bytes, str, float]:
        """(status, at most `LARGEST` + 1 bytes, where it redirects to, seconds to wait) of one answer."""
        import aiohttp

        try:
            async with self.connections.session().post(
                url,
                data=data,
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=timeout),
                allow_redirects=False,
                proxy=_proxy(url),
            ) as reply:
                answer = bytearray()
                while len(answer) <= LARGEST and (piece := await reply.content.read(1 << 16)):
                    answer += piece
                if len(answer) > LARGEST:
                    reply.close()
                given = reply.headers
                after = retry_after(given.get("Retry-After"))
                return reply.status, bytes(answer[: LARGEST + 1]), given.get("Location", ""), after
        except TimeoutError as error:
            raise _Again(f"{shown(url)} gave no answer within timeout={timeout:g} s") from error
        except aiohttp.ClientResponseError as error:  # its text has the URL, its repr the headers
            raise _Again(f"{shown(url)} does not speak HTTP: {_excerpt(error.message)}") from None
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            raise _Again(
                f"{shown(url)} cannot be reached: {_excerpt(str(error) or type(error).__name__)}"
            ) from error


def _read(url: str, status: int, answer: bytes, location: str, after: float) -> Any:
    """The JSON of an answer; Unjudged where it is none, _Again where the server is not well."""
    place, said = shown(url), _excerpt(answer.decode(errors="replace"))
    if status in BUSY or status >= 500:
        raise _Again(f"{place} answers {status}: {said}", after)
    if 300 <= status < 400:
        raise Unjudged(Status.DATA_FAILED, f"{place} redirects to {shown(location)}: give that URL")
    if status >= 400:
        raise Unjudged(Status.DATA_FAILED, f"{place} answers {status}: {said}")
    if len(answer) > LARGEST:
        raise Unjudged(Status.DATA_FAILED, f"{place} answers with more than {LARGEST} bytes")
    try:
        return json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise Unjudged(Status.DATA_FAILED, f"{place} answers with no JSON: {said}") from error


def shown(url: str) -> str:
    """A URL without what may be secret in it: no credentials, no query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}" if parts.netloc else parts.path


def url_misfit(name: str, url: str) -> str:
    """What is wrong with a URL that is set as `name`; empty if nothing is."""
    try:
        parts = urlsplit(url)
        if "@" in parts.netloc:
            return f"{name} holds a password, which would be written with the run: use key_env=NAME"
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        right = False
    return "" if right else f"{name}={url} is no URL of a server: write {name}=http://HOST:PORT/PATH"


def retry_after(value: str | None) -> float:
    """Seconds that a `Retry-After` asks for, as a number or as a date; 0 without one that can be read."""
    try:
        return max(0.0, float(value or 0))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(str(value)) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return 0.0


def _key(name: str | None) -> str:
    """The key in an environment variable, which is nowhere else; Unjudged if it is not set."""
    if name is None:
        return ""
    if key := os.environ.get(name, "").strip():
        return key
    raise Unjudged(Status.DATA_FAILED, f"key_env={name} is not set in the environment of this verifier")


def _without(key: str, text: str) -> str:
    """A server may send a key back."""
    return text.replace(key, "***") if key else text


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for a URL (http_proxy, https_proxy, no_proxy)."""
    parts = urlsplit(url)
    found = None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)
    return f"http://{found}" if found and "://" not in found else found


def _excerpt(text: str) -> str:
    """The beginning of a text, in one line."""
    line = " ".join(text.split())
    return repr(line if len(line) <= _SHOWN else line[:_SHOWN] + "...")


def _plain(value: Any) -> Any:
    """As JSON holds it: NaN and infinity are null, arrays lists, whatever else is not of JSON its text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each) for each in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)
