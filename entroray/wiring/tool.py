"""`rollout.tool` of the configuration -> what runs where judges run, and a generator that talks with it."""

from collections.abc import Callable, Sequence
from typing import Any

from entroray.config import Evaluate, RolloutConfig, Sampler, ToolConfig
from entroray.data.demonstrations import WorkedAnswer
from entroray.errors import ConfigError
from entroray.policy.tokenizer import encode_frame, response_text
from entroray.reward import build_tool
from entroray.reward.user_file import absolute
from entroray.roles import Generator, Tool
from entroray.rollout.tool_turns import Syntax, ToolTurns, encode_demonstration
from entroray.types import Span


def uses_tool(t: ToolConfig) -> bool:
    """Whether responses may call a tool."""
    return bool(t.fn or t.path)


def stop_strings(stop: Sequence[str], t: ToolConfig) -> tuple[str, ...]:
    """Strings that end a turn: `stop`, which end a response, and the end of a call."""
    return (*stop, *((t.close,) if uses_tool(t) else ()))


def tool_spec(t: ToolConfig) -> dict[str, Any]:
    """What `entroray.reward.build_tool` takes."""
    if t.path:
        return {"fn": "custom", "path": absolute(t.path)}
    return {**t.settings, "fn": t.fn}


def syntax(t: ToolConfig) -> Syntax:
    """How calls are written."""
    return Syntax(t.open, t.close, t.answer)


def check_tool(r: RolloutConfig, s: Sampler, e: Evaluate, packages: Sequence[str]) -> None:
    """ConfigError for a tool that there is not, or whose calls and answers could not be told apart."""
    t = r.tool
    if not uses_tool(t):
        return
    if t.fn and t.path:
        raise ConfigError(f"rollout.tool.fn={t.fn} and rollout.tool.path={t.path}: a response has one tool")
    if t.fn:
        build_tool(tool_spec(t), packages)
    if not t.open or not t.close or "{answer}" not in t.answer:
        raise ConfigError(
            f"rollout.tool: open={t.open!r} and close={t.close!r} must not be empty, and answer={t.answer!r} "
            "must have {answer} in it"
        )
    if r.turns < 1:
        raise ConfigError(f"rollout.turns={r.turns}: a response with a tool needs at least 1")
    if e.cot:
        raise ConfigError(
            "evaluate.cot reads probabilities of every token, and a tool's have none: set it to 0"
        )
    if r.early.extra:
        raise ConfigError(
            f"rollout.early.extra={r.early.extra} gives up requests, and with rollout.tool a "
            "response is a request for each turn: set it to 0"
        )
    if s.insert is not None:
        raise ConfigError(
            "sampler.insert puts a token into each turn and cannot be combined with rollout.tool: drop one"
        )


def with_tool(
    r: RolloutConfig,
    tokenizer: Any,
    generator: Generator,
    tool: Tool,
    report: Callable[..., None] = lambda kind, **fields: None,
) -> Generator:
    """`generator`, with the tool of these settings between its turns if there is one."""
    if not uses_tool(r.tool):
        return generator
    encode, decode = encode_frame(tokenizer), response_text(tokenizer, ())
    return ToolTurns(generator, tool, syntax(r.tool), r.turns, encode, decode, report)


def encode_answer(
    t: ToolConfig, tokenizer: Any, answer: str | WorkedAnswer
) -> tuple[list[int], tuple[Span, ...]]:
    """The ids of a demonstration, and which of them are the tool's; ConfigError for calls without a tool."""
    if isinstance(answer, str):
        return tokenizer.encode(answer, add_special_tokens=False), ()
    if not uses_tool(t):
        raise ConfigError("demonstrations with calls need a tool: rollout.tool.fn=calculator")
    return encode_demonstration(answer, syntax(t), encode_frame(tokenizer))


def describe_tool(r: RolloutConfig) -> str:
    """The tool in words."""
    t = r.tool
    if not uses_tool(t):
        return "none"
    return (
        f"{t.path or t.fn}, called as {t.open}...{t.close}, answers {t.answer}, masked; at most "
        f"{r.turns} calls"
    )
