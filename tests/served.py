"""A local server for judges on servers, and the verdicts that come of what it answers."""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from typing import Any
from unittest.mock import patch

from aiohttp import web

from entroray.reward import http_client
from entroray.reward.served import ServedJudges
from entroray.reward.verdicts import Response
from entroray.types import Prompt, Verdict

PROMPT = Prompt(
    "p", "What is 6 x 7?", (1,), "42", {"id": 3, "odd": float("nan")}, alternatives=("forty-two",)
)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
DIRECT = {name: "" for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")}


def served(
    handler: Handler, *responses: str, patience: float = 5.0, prompt: Prompt = PROMPT, **spec: Any
) -> list[Verdict]:
    """Verdicts of `spec` on all `responses` at once, by a server that answers with `handler`."""

    async def use() -> list[Verdict]:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/{path:.*}", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            return await asked(spec, url, responses, prompt, patience)
        finally:
            await runner.cleanup()

    return asyncio.run(asyncio.wait_for(use(), 20.0))


async def asked(
    spec: dict[str, Any], url: str, responses: tuple[str, ...], prompt: Prompt, patience: float
) -> list[Verdict]:
    where = {"base_url": f"{url}/v1"} if spec.get("fn") == "llm" else {"url": f"{url}/judge"}
    judges = ServedJudges({"judges": {"": {"fn": "remote", **where, **spec}}}, 5.0, patience)
    one = lambda text: judges.judge(("", ""), Response(text, len(text)), prompt)
    try:
        with patch.object(http_client, "FIRST_PAUSE", 0.01), patch.dict(os.environ, DIRECT):
            return await asyncio.gather(*map(one, responses))
    finally:
        judges.close()


def answering(*answers: Any, seen: list[Any] | None = None) -> Handler:
    """A server that gives these answers in turn, the last one for ever: JSON, or a status, or a response."""
    left = list(answers)

    async def handler(request: web.Request) -> web.StreamResponse:
        if seen is not None:
            seen.append((request.headers.copy(), await request.json()))
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, web.Response):
            return web.Response(
                status=answer.status, body=answer.body, headers=dict(answer.headers), content_type=None
            )
        return web.Response(text=answer if isinstance(answer, str) else json.dumps(answer))

    return handler
