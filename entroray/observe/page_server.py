"""The run page from a server on loopback, which tells browsers when files of the run change."""

import json
import re
import secrets
import sys
import threading
import time
from contextlib import suppress
from functools import lru_cache
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any
from urllib.parse import parse_qs

import pyarrow.parquet as pq

from entroray.errors import PreflightError
from entroray.observe import report, token_blocks, token_records
from entroray.observe.journal import plain
from entroray.observe.run_data import is_held, run_data

HERE = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?")
"""The Host of a page of this machine; a tunnel's port is its own. Any other is DNS rebinding."""
POLICY = f"{report.POLICY}; connect-src 'self'"
SCRIPTS = ("live.js", *report.SCRIPTS)
WORDS = "tokens/vocabulary.json"
FILES = ("", "metrics.jsonl", "events.jsonl", "config.yaml", "manifest.json", "eval-after.json", ".lock")
KINDS = ("tokens", "rollouts")
LOOK, SHARE, BEAT = 1.0, 5, 15.0
"""Seconds between two looks at the folder, or so many times what reading it took; seconds after which
a browser that was told nothing is written to, which shows whether it is still there."""


class PageServer(ThreadingTCPServer):
    """Serves the page of `run_dir`, there or not yet, at `address`; PreflightError if it cannot have `port`.

    Port 0 is any free one. Each browser gives the token in the address for a cookie.
    """

    allow_reuse_address, daemon_threads, request_queue_size = True, True, 128

    def __init__(self, run_dir: Path, port: int = 0):
        self.run_dir, self.changed, self.reading = run_dir, threading.Condition(), threading.Lock()
        self.version, self.due = 0, 0.0
        self.state: tuple[tuple[tuple[int, ...], ...], bool] = ((), False)
        self.found: dict[str, Any] = {"version": 0}
        try:
            super().__init__(("127.0.0.1", port), _Request)
        except OSError as error:
            remedy = "give another port, or --port=0 for any that is free"
            raise PreflightError(f"--port={port}: {error.strerror}: {remedy}") from error
        port, self.token = self.server_address[1], secrets.token_urlsafe()
        self.cookie = f"entroray-{port}={secrets.token_urlsafe()}"
        self.address = f"http://127.0.0.1:{port}/?open={self.token}"
        self.service_actions()

    def service_actions(self) -> None:
        """Between two requests, look at the folder if it is time, and wake who waits for a change.

        Its lock is tried only where a run held it or a file changed: a run that starts then is refused it.
        """
        if time.monotonic() < self.due:
            return
        self.due = time.monotonic() + LOOK
        files = [self.run_dir / name for name in (*FILES, WORDS)]
        with suppress(FileNotFoundError):  # a folder that goes as it is read: the next look sees the change
            files += [each for kind in KINDS for each in token_records.files(self.run_dir, kind)]
        stamps, (before, held) = tuple(map(_stamp, files)), self.state
        now = stamps, (held or stamps != before) and is_held(self.run_dir)
        if now != self.state:
            with self.changed:
                self.state, self.version = now, self.version + 1
                self.changed.notify_all()

    def data(self) -> dict[str, Any]:
        """What the page says, read once after a change; `stamps` tell a recorded step from a later one."""
        with self.reading:
            if self.found["version"] == self.version:
                return self.found
            began, version = time.monotonic(), self.version
            found, stamps = run_data(self.run_dir), dict[int, str]()
            for file in token_records.files(self.run_dir):
                step = token_records.step_of(file)
                if fault := _fault(file, _stamp(file)):
                    found["notes"].append(report.DAMAGED_FILE.format(file.name, fault))
                else:
                    stamps[step] = str(self._stamps(step))
            if not self.run_dir.is_dir():
                found["notes"] = [f"There is no folder {self.run_dir} yet: this page waits for it."]
            elif not stamps and not found["starting"]:
                found["notes"].append(report.NO_TOKENS)
            found |= {"recorded": [*stamps], "stamps": stamps, "columns": report.columns()}
            self.found = found | {"version": version}
            self.due = max(self.due, began + SHARE * (time.monotonic() - began))
            return self.found

    def block(self, step: int) -> bytes:
        """The tokens of a recorded step, encoded; an error of `report.DAMAGED` where that cannot be."""
        with self.reading:
            return _block(self.run_dir, step, self._stamps(step))

    def _stamps(self, step: int) -> tuple[tuple[int, ...], ...]:
        files = [token_records.record_path(self.run_dir, step, kind) for kind in KINDS]
        return tuple(map(_stamp, [*files, self.run_dir / WORDS]))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no error."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def _stamp(path: Path) -> tuple[int, ...]:
    """Tells a file from another that took its place; empty where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


@lru_cache(maxsize=100_000)
def _fault(file: Path, stamp: tuple[int, ...]) -> str:
    """Why a record file cannot be read, judged by its end; empty if it can."""
    try:
        token_blocks.check_columns(pq.read_schema(file).names)
    except report.DAMAGED as error:
        return str(error)
    return ""


@lru_cache(maxsize=4)
def _block(run_dir: Path, step: int, stamps: tuple[tuple[int, ...], ...]) -> bytes:
    file = token_records.record_path(run_dir, step)
    return token_blocks.encode_step(token_blocks.load_step(run_dir, file, report.TOKENS))


class _Request(BaseHTTPRequestHandler):
    """The page, its data at /run, a recorded step at /step/1, changes at /events; there is nothing else."""

    server: PageServer
    server_version, sys_version, timeout = "entroray", "", 60.0

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        hosts, cookies = self.headers.get_all("Host", []), self.headers.get("Cookie", "").split(";")
        if len(hosts) != 1 or not HERE.fullmatch(hosts[0]):
            self._send(403, b"This page is at 127.0.0.1 and localhost alone.")
        elif path == "/" and _same(parse_qs(query).get("open", [""])[0], self.server.token):
            cookie = f"{self.server.cookie}; HttpOnly; SameSite=Strict; Path=/"
            self._send(303, b"", Location="/", **{"Set-Cookie": cookie})
        elif not any(_same(each.strip(), self.server.cookie) for each in cookies):
            self._send(403, b"Open the whole address that `entroray watch` printed.")
        elif path == "/events":
            self._tell_changes()
        else:
            self._answer(path)

    do_HEAD = do_GET

    def _refuse(self) -> None:
        self._send(405, b"This page can only be read.", Allow="GET, HEAD")

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = _refuse

    def _answer(self, path: str) -> None:
        if path == "/":
            shell = {name: self.server.data()[name] for name in ("name", "objective")}
            page, policy = report.render_page(shell, POLICY, SCRIPTS)
            self._send(200, page.encode(), "text/html; charset=utf-8", policy)
        elif path == "/run":
            self._send(200, json.dumps(plain(self.server.data())).encode(), "application/json")
        elif step := re.fullmatch(r"/step/(\d{1,9})", path):
            try:
                self._send(200, self.server.block(int(step[1])), "application/octet-stream")
            except report.DAMAGED as error:
                self._send(404, str(error).encode())
        else:
            self._send(404, b"There is nothing at this address.")

    def _send(
        self, status: int, body: bytes | None, kind: str = "text/plain", policy: str = POLICY, **more: str
    ) -> None:
        """A whole answer; the head of one without an end where `body` is None."""
        self.send_response(status)
        more |= {} if body is None else {"Content-Length": str(len(body))}
        more |= {"Content-Type": kind, "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
        more |= {"X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin"}
        more |= {"Content-Security-Policy": f"{policy}; frame-ancestors 'none'"}
        for name, value in more.items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(body)

    def _tell_changes(self) -> None:
        """The number of the present state and of each later one, until the browser goes away."""
        self._send(200, None, "text/event-stream")
        server, told = self.server, 0
        while self.command != "HEAD":
            with server.changed:
                if server.version == told:
                    server.changed.wait(BEAT)
                now = server.version
            self.wfile.write(b":\n\n" if now == told else f"data: {now}\n\n".encode())
            told = now

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a terminal is no access log."""


def _same(given: str, secret: str) -> bool:
    return secrets.compare_digest(given.encode(), secret.encode())
