"""`entroray watch`: a real server on loopback, whom it answers, what it tells of a folder that changes."""

import fcntl
import http.client
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from entroray.cli import watch
from entroray.errors import ConfigError, PreflightError
from entroray.observe import page_server, token_blocks
from entroray.observe.page_server import PageServer
from entroray.observe.token_records import record_path
from tests.pages.folders import Response, write_run

TWO = [[Response(["a", "b"], "ab"), Response(["c"], "c", correct=False)]]
DEADLINE = 60.0
Serve = Callable[[Path], PageServer]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Servers of folders, each in a thread, looking every 10 ms."""
    monkeypatch.setattr(page_server, "LOOK", 0.01)
    started: list[PageServer] = []

    def serve(folder: Path) -> PageServer:
        server = PageServer(folder)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        started.append(server)
        return server

    yield serve
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", TWO, steps=3, recorded=[1])


def ask(server: PageServer, path: str, method: str = "GET", **headers: str) -> http.client.HTTPResponse:
    """The answer, with the body in `body`; the cookie is sent unless another is given."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=DEADLINE)
    connection.request(method, path, headers={"Cookie": server.cookie} | headers)
    answer = connection.getresponse()
    answer.body = answer.read()  # type: ignore[attr-defined]
    return answer


def data(server: PageServer) -> dict[str, Any]:
    return json.loads(ask(server, "/run").body)  # type: ignore[attr-defined]


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def test_the_token_of_the_address_is_given_for_a_cookie_that_no_script_reads(serve: Serve, run: Path) -> None:
    server = serve(run)
    answer = ask(server, server.address.partition(str(server.server_address[1]))[2], Cookie="")
    assert (answer.status, answer.headers["Location"]) == (303, "/")
    cookie, *flags = answer.headers["Set-Cookie"].split("; ")
    assert flags == ["HttpOnly", "SameSite=Strict", "Path=/"] and server.token not in cookie
    page = ask(server, "/", Cookie=f"other=1; {cookie}")
    assert page.status == 200 and page.headers["Cache-Control"] == "no-store"
    assert server.token.encode() not in page.body  # type: ignore[attr-defined]
    assert ask(server, "/", Cookie="").status == 403, "the address alone opens nothing"


def test_the_page_may_ask_its_own_server_and_nobody_else_and_may_not_be_framed(
    serve: Serve, run: Path
) -> None:
    page = ask(serve(run), "/")
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none';") and "connect-src 'self';" in policy
    assert "frame-ancestors 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert page.headers["X-Content-Type-Options"] == "nosniff"
    assert page.headers["Referrer-Policy"] == "no-referrer"
    title = re.search("<title>(.*)</title>", page.body.decode())  # type: ignore[attr-defined]
    assert title and "name&lt;/i&gt;/run: dapo but for surrogate.high=0.3" in title[1]


def test_without_the_cookie_nothing_is_read(serve: Serve, run: Path) -> None:
    server = serve(run)
    name = server.cookie.partition("=")[0]
    for path in ("/", "/run", "/step/1", "/events", "/?open=", "/?open=wrong", "/none"):
        for cookie in (
            "",
            "entroray=1",
            f"{name}=",
            f"{name}=\xe9",
            f"{server.cookie}x",
            f"x{server.cookie}",
        ):
            answer = ask(server, path, Cookie=cookie)
            assert answer.status == 403 and b"entroray watch" in answer.body, (path, cookie)  # type: ignore[attr-defined]


HOSTS = {
    200: ("127.0.0.1", "localhost:8642", "[::1]:1", "127.0.0.1:65535"),
    403: (
        *("evil.com", "127.0.0.1.evil.com", "localhost.evil.com:80", "", "10.0.0.1", "localhost:80:80"),
        *("evil.com#localhost", "0.0.0.0", "2130706433", "evil.com@localhost", "localhost, evil.com"),
    ),
}


def test_a_host_that_is_not_this_machine_is_dns_rebinding(serve: Serve, run: Path) -> None:
    server = serve(run)
    for status, hosts in HOSTS.items():
        for host in hosts:
            assert ask(server, "/run", Host=host).status == status, host
    for several in ([], ["127.0.0.1", "evil.com"], ["evil.com", "127.0.0.1"]):
        with socket.create_connection(server.server_address, timeout=DEADLINE) as line:
            lines = ["GET /run HTTP/1.0", f"Cookie: {server.cookie}", *(f"Host: {host}" for host in several)]
            line.sendall("\r\n".join([*lines, "", ""]).encode())
            assert b" 403 " in line.makefile("rb").readline(), several


PATHS = (
    *("/config.yaml", "/../run/config.yaml", "/step/../config.yaml", "/%2e%2e/config.yaml", "/step/1/"),
    *(
        "/step/..%2f..%2fconfig.yaml",
        "/tokens/step-000001.parquet",
        "/step/-1",
        "/step/x",
        "/run/",
        "/step/%31",
    ),
    *("/step/1234567890", "/favicon.ico", "/report.html", "//run", "/run/../config.yaml", "/step/1%00"),
)


def test_no_path_leads_to_another_file(serve: Serve, run: Path) -> None:
    server = serve(run)
    for path in PATHS:
        answer = ask(server, path)
        found = answer.body == ask(server, "/run").body  # type: ignore[attr-defined]
        assert answer.status == 404 or (path == "//run" and found), path


def test_the_page_is_only_read(serve: Serve, run: Path) -> None:
    server = serve(run)
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT"):
        answer = ask(server, "/run", method)
        assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD"), method
    named = lambda answer: {n: v for n, v in answer.headers.items() if n != "Date"}
    for path in ("/", "/run", "/step/1"):
        head, got = ask(server, path, "HEAD"), ask(server, path)
        assert head.status == 200 and named(head) == named(got), path
        assert head.body == b"" and len(got.body) == int(got.headers["Content-Length"])  # type: ignore[attr-defined]
    assert ask(server, "/events", "HEAD").status == 200


def test_the_data_are_those_of_the_report_and_a_step_is_its_block(serve: Serve, run: Path) -> None:
    server = serve(run)
    found = data(server)
    assert found["metrics"]["steps"] == [0, 1, 2, 3] or found["metrics"]["last"] == 3
    assert (found["recorded"], found["running"]) == ([1], False) and found["columns"][0][0] == "step"
    block = token_blocks.encode_step(token_blocks.load_step(run, record_path(run, 1), 10**6))
    assert ask(server, "/step/1").body == block  # type: ignore[attr-defined]
    assert ask(server, "/step/2").status == 404


def events(server: PageServer) -> Iterator[int]:
    """The numbers that a browser is told, until it is closed."""
    with socket.create_connection(server.server_address, timeout=DEADLINE) as line:
        line.sendall(f"GET /events HTTP/1.1\r\nHost: localhost\r\nCookie: {server.cookie}\r\n\r\n".encode())
        for text in line.makefile("rb"):
            if text.startswith(b"data: "):
                yield int(text[6:])


def test_every_browser_is_told_of_a_change_and_one_that_leaves_is_let_go(
    serve: Serve, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_server, "BEAT", 600.0)
    server, before = serve(run), threading.active_count()
    browsers = [events(server) for _ in range(12)]
    assert {next(each) for each in browsers} == {1} and threading.active_count() >= before + 12
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "entropy/mean": 0.5}\n')
    assert {next(each) for each in browsers} == {2}
    assert data(server)["metrics"]["last"] == 4 and data(server)["version"] == 2
    monkeypatch.setattr(page_server, "BEAT", 0.01)
    (run / "metrics.jsonl").touch()
    assert {next(each) for each in browsers} == {3}
    for each in browsers:
        each.close()
    until(lambda: threading.active_count() <= before)


def test_a_run_is_followed_from_before_it_is_there_to_its_end(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "late"
    server = serve(folder)
    assert data(server)["notes"] == [f"There is no folder {folder} yet: this page waits for it."]
    write_run(folder, TWO, steps=3, recorded=[1, 2], ends=False)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        until(lambda: data(server)["running"] and data(server)["recorded"] == [1, 2])
        first = data(server)["stamps"]["1"]
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        (folder / "metrics.jsonl").write_text(lines[0])  # resumed from step 1: what came later is cut
        record_path(folder, 2).unlink()
        write_run(tmp_path / "again", TWO, steps=1, recorded=[1])
        shutil.copy(record_path(tmp_path / "again", 1), folder / "tokens" / ".new")
        os.replace(folder / "tokens" / ".new", record_path(folder, 1))
        until(lambda: data(server)["recorded"] == [1] and data(server)["metrics"]["last"] == 1)
        until(lambda: data(server)["stamps"]["1"] != first)
        assert data(server)["running"]
    until(lambda: not data(server)["running"])
    shutil.rmtree(folder)
    until(lambda: data(server)["notes"][:1] == [f"There is no folder {folder} yet: this page waits for it."])


def test_the_lock_is_let_alone_while_nothing_changes(
    serve: Serve, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To try it is to have it for a moment, in which a run that starts would be refused."""
    tried: list[Path] = []
    real = page_server.is_held
    monkeypatch.setattr(page_server, "is_held", lambda folder: tried.append(folder) or real(folder))
    server = serve(run)
    looks: list[float] = []
    token_files = page_server.token_records.files
    monkeypatch.setattr(page_server.token_records, "files", lambda *of: looks.append(0) or token_files(*of))
    until(lambda: len(looks) > 20)
    assert len(tried) == 1
    (run / ".lock").touch()
    until(lambda: server.version == 2)
    assert len(tried) == 2


BROKEN = {
    "metrics.jsonl": [
        '{"step": 1}\n{"st',
        "[1]\n",
        "\x00\xff\n",
        '{"step": 1, "x": ' + "9" * 400 + "}\n",
        "",
    ],
    "events.jsonl": ["{}\n", '{"kind": 3, "fields": 4}\n', "no json\n"],
    "config.yaml": ["a: [", "1", "run: 3\nobjective: 4\ncontrol: 5\n", "run: {name: 3}\n"],
    "manifest.json": ["{", "[]"],
    "tokens/vocabulary.json": ["{", "[1]", '{"1": 2}'],
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_or_foreign_file_is_a_page_nevertheless(serve: Serve, run: Path, name: str) -> None:
    server = serve(run)
    for text in BROKEN[name]:
        version = data(server)["version"]
        (run / name).write_text(text, encoding="latin-1")
        until(lambda: server.version > version)  # noqa: B023
        assert data(server)["recorded"] == [1] and ask(server, "/").status == 200, text
        assert ask(server, "/step/1").status == 200, text


def test_half_a_record_file_is_said_and_the_whole_one_is_shown_when_it_is_there(
    serve: Serve, run: Path
) -> None:
    file = record_path(run, 1)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    server = serve(run)
    assert data(server)["recorded"] == []
    assert any("step-000001.parquet: it is damaged" in note for note in data(server)["notes"])
    assert ask(server, "/step/1").status == 404
    file.write_bytes(whole)
    until(lambda: data(server)["recorded"] == [1])
    file.write_bytes(whole[:100] + bytes(len(whole) - 300) + whole[-200:])
    assert ask(server, "/step/1").status == 404, "its end is whole, and its middle is not"
    pq.write_table(
        pq.read_table(record_path(write_run(run.parent / "b", TWO, recorded=[1]), 1)).select(["step"]), file
    )
    until(lambda: any("no columns rollout" in note for note in data(server)["notes"]))


def test_a_file_that_is_replaced_while_it_is_read_is_not_mixed(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, real = record_path(run, 1), token_blocks._rollout_records
    other = write_run(run.parent / "other", [[Response(["x"] * 9, "x")]], steps=1, recorded=[1])
    expected = token_blocks.load_step(run, file, 10**6).columns

    def replaced(run_dir: Path, step: int) -> list[dict[str, Any]]:
        found = real(run_dir, step)
        os.replace(record_path(other, 1), file)
        return found

    monkeypatch.setattr(token_blocks, "_rollout_records", replaced)
    found = token_blocks.load_step(run, file, 10**6)
    assert found.recorded == 3
    assert {n: len(c) for n, c in found.columns.items()} == {n: 3 for n in expected}


def test_a_port_that_is_taken_is_refused_with_the_remedy(serve: Serve, run: Path) -> None:
    port = serve(run).server_address[1]
    with pytest.raises(PreflightError, match=rf"--port={port}: .*in use.*--port=0") as refused:
        watch.main([str(run), f"--port={port}"])
    assert refused.value.exit_code == 3


@pytest.mark.parametrize(
    "told",
    [
        ["{run}", "--port=x"],
        ["{run}", "--port=65536"],
        ["{run}", "--port", "-1"],
        [],
        ["{run}", "{run}"],
        ["{file}"],
    ],
)
def test_what_is_no_port_or_no_folder_is_refused(run: Path, told: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"--port|entroray watch runs/latest"):
        watch.main([word.format(run=run, file=run / "config.yaml") for word in told])


def test_ctrl_c_ends_it_with_a_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PageServer, "serve_forever", interrupted)
    assert watch.main([str(run / "not" / "there")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"http://127\.0\.0\.1:\d+/\?open=[\w-]{40,}\n", said) and "not there yet" in said
    assert said.endswith("no longer watched; the run goes on as it was\n")
