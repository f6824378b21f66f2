"""Judges on servers, against a local server that is slow, wrong, busy, gone, hostile, and comes back."""

import asyncio
import json
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from aiohttp import web

from entroray.errors import ConfigError
from entroray.reward.http_client import retry_after, shown
from entroray.reward.served import ServedJudges, bind_judge
from entroray.reward.verdicts import Response
from entroray.types import Status, Verdict
from tests.served import PROMPT, answering, asked, served

SECRET = "sk-very-secret"
LLM = {"fn": "llm", "base_url": "http://h", "model": "m", "rubric": "{response}", "scale": [0, 10]}

# What a server may answer.


@pytest.mark.parametrize(
    ("answer", "reward", "correct", "parts"),
    [
        (1, 1.0, True, {}),
        (0.25, 0.25, False, {}),
        (True, 1.0, True, {}),
        (False, 0.0, False, {}),
        ({"reward": 0.5}, 0.5, False, {}),
        ({"reward": True}, 1.0, True, {}),
        ({"score": 1.0, "correct": False}, 1.0, False, {}),
        (
            {"reward": -3, "correct": True, "parts": {"form": 1, "brief": 0.5}},
            -3.0,
            True,
            {"form": 1.0, "brief": 0.5},
        ),
        ({"reward": 1, "correct": None, "parts": None}, 1.0, True, {}),
        ({"rewards": [0.75]}, 0.75, False, {}),
        ([1.0], 1.0, True, {}),
        ([{"reward": 0.5, "correct": 1}], 0.5, True, {}),
    ],
)
def test_a_server_answers_with_a_number_a_bool_or_a_verdict(
    answer: Any, reward: float, correct: bool, parts: dict[str, float]
) -> None:
    (verdict,) = served(answering(answer), "42")
    assert (verdict.status, verdict.reward, verdict.correct) == (Status.OK, reward, correct)
    assert dict(verdict.parts) == parts and type(verdict.correct) is bool


@pytest.mark.parametrize(
    "answer",
    [
        *("", "<html>no</html>", "NaN", "Infinity", '{"reward": NaN}', "null", '"1.0"', "[]", "[1, 2]", "{}"),
        *('{"reward": "high"}', '{"reward": null}', '{"reward": 1, "correct": 0.5}', '{"error": "no model"}'),
        *(
            '{"reward": 1, "correct": "yes"}',
            '{"reward": 1, "parts": [1]}',
            '{"reward": 1, "parts": {"a": "x"}}',
        ),
        *("[" * 100_000, "9" * 5000, "1e999", '{"reward": 1' + "0" * 400 + "}", "\udcff"[:0] + "ÿ"),
    ],
    ids=lambda text: text[:24],
)
def test_what_is_no_verdict_is_a_failure_of_the_data_and_never_a_zero(answer: str) -> None:
    (verdict,) = served(answering(answer), "42")
    assert verdict.status is Status.DATA_FAILED and verdict.reward != verdict.reward and not verdict.correct
    assert "\n" not in verdict.detail and len(verdict.detail) <= 2000 and verdict.detail


def test_a_verdict_that_is_a_text_is_named() -> None:
    (verdict,) = served(answering({"reward": 1, "correct": "false"}), "42")
    assert verdict.status is Status.DATA_FAILED
    assert verdict.detail.endswith('/judge answers with `correct`: "false": send true or false')


def test_a_server_is_told_all_that_a_judge_knows_as_json() -> None:
    seen: list[Any] = []
    served(answering(1, seen=seen), 'a "quoted"\n\ud800 text')
    ((headers, body),) = seen
    assert headers["Content-Type"] == "application/json" and "Authorization" not in headers
    assert body == {
        "prompt": "What is 6 x 7?",
        "response": 'a "quoted"\n\ud800 text',
        "reference": "42",
        "label": "42",
        "alternatives": ["forty-two"],
        "entry": {"id": 3, "odd": None},
        "domain": "",
        "tokens": 17,
    }


def test_a_server_of_openrlhf_is_asked_in_its_own_words() -> None:
    seen: list[Any] = []
    (verdict,) = served(answering({"rewards": [0.5]}, seen=seen), "42", layout="openrlhf")
    assert verdict.reward == 0.5
    assert seen[0][1] == {"query": ["What is 6 x 7?42"], "prompts": ["What is 6 x 7?"], "labels": ["42"]}


# What may go wrong on the way.


def busy(status: int, **headers: str) -> web.Response:
    return web.Response(status=status, text="overloaded\nplease wait", headers=headers)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 529])
def test_a_busy_server_is_asked_again_and_its_answer_counts(status: int) -> None:
    seen: list[Any] = []
    (verdict,) = served(answering(busy(status), busy(status), 1, seen=seen), "42")
    assert verdict.correct and len(seen) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 413, 422])
def test_a_refusal_is_not_asked_again_and_says_why(status: int) -> None:
    seen: list[Any] = []
    (verdict,) = served(answering(busy(status), 1, seen=seen), "42")
    assert verdict.status is Status.DATA_FAILED and len(seen) == 1
    assert f"/judge answers {status}: 'overloaded please wait'" in verdict.detail


def test_retry_after_is_waited_for_and_one_beyond_the_deadline_is_not() -> None:
    began = time.monotonic()
    (verdict,) = served(answering(busy(429, **{"Retry-After": "0.4"}), 1), "42")
    assert verdict.correct and time.monotonic() - began >= 0.4
    (verdict,) = served(answering(busy(503, **{"Retry-After": "3600"}), 1), "42")
    assert verdict.status is Status.INFRA_FAILED and "answers 503" in verdict.detail
    assert time.monotonic() - began < 3.0


def test_what_retry_after_may_hold() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 25 < retry_after(soon) <= 30
    past = format_datetime(datetime.now(UTC) - timedelta(seconds=30), usegmt=True)
    assert [retry_after(x) for x in (None, "", "7", "-7", "nan", "soon", past)] == [0, 0, 7, 0, 0, 0, 0]
    assert retry_after("inf") == float("inf")


def test_a_slow_server_is_a_timeout_at_the_deadline_and_a_slow_try_is_tried_again() -> None:
    async def slow(request: web.Request) -> web.Response:
        await asyncio.sleep(5.0)
        return web.Response(text="1")

    began = time.monotonic()
    (verdict,) = served(slow, "42", deadline=0.3)
    assert (
        verdict.status is Status.TIMEOUT and "deadline=0.3" in verdict.detail and "/judge" in verdict.detail
    )
    assert time.monotonic() - began < 2.0
    tries: list[int] = []

    async def slow_at_first(request: web.Request) -> web.Response:
        tries.append(1)
        await asyncio.sleep(5.0 if len(tries) == 1 else 0.0)
        return web.Response(text="1")

    (verdict,) = served(slow_at_first, "42", timeout=0.2)
    assert verdict.correct and len(tries) == 2


def test_a_server_that_is_down_is_named_and_one_that_comes_back_answers() -> None:
    async def down() -> tuple[Verdict, Verdict]:
        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        url = f"http://127.0.0.1:{port}"
        (gone,) = await asked({}, url, ("42",), PROMPT, 0.1)
        waiting = asyncio.create_task(asked({}, url, ("42",), PROMPT, 5.0))
        await asyncio.sleep(0.1)
        app = web.Application()
        app.router.add_post("/judge", answering(1))
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        (back,) = await waiting
        await runner.cleanup()
        return gone, back

    gone, back = asyncio.run(asyncio.wait_for(down(), 20.0))
    assert gone.status is Status.INFRA_FAILED and back.correct
    assert "http://127.0.0.1:" in gone.detail and "/judge cannot be reached" in gone.detail
    assert "word" not in gone.detail, "no credentials"


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\x16\x03\x01 no http",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\n",
    ],
    ids=["closes", "no http", "closes in the body", "broken chunk", "closes in the headers"],
)
def test_what_breaks_off_is_asked_again_and_then_is_no_fault_of_the_response(said: bytes) -> None:
    async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(said)
        writer.close()

    async def use() -> Verdict:
        async with await asyncio.start_server(break_off, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            return (await asked({}, url, ("42",), PROMPT, 0.2))[0]

    verdict = asyncio.run(asyncio.wait_for(use(), 20.0))
    assert verdict.status is Status.INFRA_FAILED and "/judge " in verdict.detail


def test_a_body_without_end_is_let_go_of() -> None:
    sent: list[int] = []

    async def endless(request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse()
        await reply.prepare(request)
        for _ in range(1 << 14):  # a gigabyte
            await reply.write(b" " * (1 << 16))
            sent.append(1)
        return reply

    (verdict,) = served(endless, "42")
    assert verdict.status is Status.DATA_FAILED and "more than 1048576 bytes" in verdict.detail
    assert len(sent) < 1 << 10


def test_a_redirect_is_not_followed_and_names_the_url_to_give() -> None:
    moved = web.Response(status=307, headers={"Location": "https://other.example/judge/?token=x"})
    seen: list[Any] = []
    (verdict,) = served(answering(moved, 1, seen=seen), "42")
    assert verdict.status is Status.DATA_FAILED and len(seen) == 1
    assert "redirects to https://other.example/judge/: " in verdict.detail


def test_no_more_requests_are_under_way_than_the_limit_and_waiting_costs_no_deadline() -> None:
    running, most = [0], [0]

    async def counted(request: web.Request) -> web.Response:
        running[0] += 1
        most[0] = max(most[0], running[0])
        await asyncio.sleep(0.1)
        running[0] -= 1
        return web.Response(text="1")

    verdicts = served(counted, *["42"] * 12, concurrency=3, deadline=0.35)
    assert all(v.correct for v in verdicts) and most[0] == 3


def test_one_limit_holds_for_a_server_whatever_the_parts_that_ask_it() -> None:
    one = {"fn": "remote", "url": "http://h/x", "concurrency": 2}
    parts = {"a": one, "b": {**one, "weight": 2}, "c": {**one, "url": "http://h/y"}}
    judges = {"": {"parts": parts, "correct": "a"}, "d": one}
    servers = ServedJudges({"judges": judges}, 5.0)._server
    assert servers["", "a"] is servers["", "b"] is servers["d", ""] is not servers["", "c"]


# Keys.


def test_a_key_is_read_where_it_is_used_and_is_written_nowhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("MY_KEY", f" {SECRET}\n")
    seen: list[Any] = []
    echo = lambda status: web.Response(status=status, text=f"bad key {SECRET}", headers={"X": SECRET})
    for answers in ((1,), (echo(401),), (echo(500),), (echo(200),)):
        (verdict,) = served(answering(*answers, seen=seen), "42", key_env="MY_KEY", patience=0.05)
        assert SECRET not in repr(verdict)
    assert {headers["Authorization"] for headers, _ in seen} == {f"Bearer {SECRET}"}
    assert all(SECRET not in json.dumps(body) for _, body in seen)
    judges = ServedJudges({"judges": {"": {"fn": "remote", "url": "http://h", "key_env": "MY_KEY"}}}, 5.0)
    assert SECRET not in repr(vars(judges)) + "".join(capsys.readouterr())


@pytest.mark.parametrize("value", [None, "", " \n"])
def test_a_key_that_is_not_there_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_KEY", value)
    one = {"fn": "remote", "url": "http://h", "key_env": "MY_KEY"}
    with pytest.raises(ConfigError, match=r"reward\.judge\.key_env=MY_KEY.*export MY_KEY=.*ray start"):
        ServedJudges({"judges": {"": one}}, 5.0)
    with pytest.raises(ConfigError, match=r"reward\.parts\.style\.key_env=MY_KEY"):
        ServedJudges({"judges": {"": {"parts": {"style": one}, "correct": "style"}}}, 5.0)


def test_a_url_is_shown_without_its_secrets() -> None:
    assert shown("https://me:pw@host:81/a/b?key=1#x") == "https://host:81/a/b"
    assert shown("http://[::1]:8000/x") == "http://[::1]:8000/x"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"fn": "remote"}, "`remote` needs `url`"),
        ({"fn": "remote", "url": "localhost:8000"}, r"url=localhost:8000 .*url=http://HOST"),
        ({"fn": "remote", "url": "http://"}, "url=http://"),
        ({"fn": "remote", "url": "http://me:pw@h"}, "url .*key_env=NAME"),
        ({**LLM, "base_url": "http://me:pw@h/v1"}, "base_url .*key_env=NAME"),
        ({"fn": "remote", "url": "http://h:99999999/x"}, "url=http://h:99999999/x"),
        ({"fn": "remote", "url": "http://h", "concurrency": 0}, r"`remote\.concurrency` .* 0"),
        ({"fn": "remote", "url": "http://h", "deadline": 0}, r"`remote\.deadline` .* 0"),
        ({"fn": "remote", "url": "http://h", "layout": "trl"}, r"`remote\.layout` .*openrlhf"),
        ({"fn": "remot", "url": "http://h"}, "`remot`: .*`remote`"),
        ({**LLM, "base_url": "ftp://h"}, "base_url=ftp://h"),
        ({**LLM, "rubric": "Good?"}, r"rubric='Good\?' .*\{response\}"),
        ({**LLM, "rubric": "{respons}"}, r"rubric='\{respons\}' .*`response`.*written twice"),
        ({**LLM, "rubric": "{answer} {response}"}, r"no field \{answer\}: .*reference"),
        ({**LLM, "rubric": "{{response}}"}, r"does not show the response"),
        ({**LLM, "scale": [1]}, r"scale=\[1\] .*scale: \[0, 10\]"),
        ({**LLM, "scale": [10, 0]}, r"scale=\[10, 0\]"),
        ({**LLM, "score": "("}, r"score='\('"),
        ({**LLM, "score": "(a)(b)"}, r"score='\(a\)\(b\)' .*\(\?:"),
        ({**LLM, "words": {"yes": 11}}, r"words=.*scale=\[0, 10\]"),
        ({**LLM, "words": {"yes": True}}, r"words="),
        ({**LLM, "temperature": -1}, r"`llm\.temperature` .* -1"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(spec: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=rf"^reward\.judge.*{says}"):
        bind_judge(spec)


# Judges of the user's own.


def test_an_async_judge_of_ones_own_has_client_deadline_and_typed_failures(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_async_lab.py").write_text(
        "import asyncio\n"
        "async def judge(response, prompt, client, *, url: str, wait: float = 0.0):\n"
        "    await asyncio.sleep(wait)\n"
        "    return (await client.post(url, {'text': response}))['quality']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = {"fn": "my_async_lab.judge"}

    async def use(answer: Any, spec: dict[str, Any]) -> Verdict:
        app = web.Application()
        app.router.add_post("/judge", answering(answer))
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/judge"
        reward = {"judges": {"": {**spec, "url": url}}, "packages": ["my_async_lab"]}
        judges = ServedJudges(reward, 0.3)
        try:
            return await judges.judge(("", ""), Response("42"), PROMPT)
        finally:
            judges.close()
            await runner.cleanup()

    assert asyncio.run(use({"quality": 0.5}, own)).reward == 0.5
    raised = asyncio.run(use({}, own))
    assert raised.status is Status.DATA_FAILED and "KeyError: 'quality'" in raised.detail
    assert asyncio.run(use({"quality": 1}, {**own, "wait": 2.0})).status is Status.TIMEOUT


def test_judges_that_run_in_processes_are_none_of_these() -> None:
    judges = {
        "": {"fn": "math"},
        "a": {"parts": {"x": {"fn": "text"}, "y": {"fn": "custom", "path": "no.py:f"}}},
    }
    assert ServedJudges({"judges": judges}, 5.0).judges == {}
