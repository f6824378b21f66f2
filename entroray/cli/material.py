"""Configuration -> tokenizer, prompts in three disjoint parts, and the judge's spec."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entroray.config import Config, Data
from entroray.errors import ConfigError, PreflightError
from entroray.loop import prompts
from entroray.policy.tokenizer import chat, load_tokenizer


@dataclass(frozen=True)
class Material:
    """What a run reads: the tokenizer of its model, prompts by part, how answers are judged."""

    tokenizer: Any
    split: prompts.Split
    judge: Mapping[str, Any]
    dropped: str
    """What was left out, in words."""


def questions(data: Data) -> tuple[list[prompts.Question], int]:
    """All rows of the configured source, and how many bad ones were left out."""
    if data.source == "reasoning_gym":
        drawn = prompts.reasoning_gym_rows(data.task, size=data.size, seed=data.seed, settings=data.settings)
        return drawn, 0
    if data.source == "table":
        return prompts.table_rows(data.task, bad_rows=data.bad_rows, **data.settings)
    raise ConfigError(f"data.source={data.source}: choose reasoning_gym or table")


def load(config: Config, model: str) -> Material:
    """The material of a run with the tokenizer of `model`."""
    return read(config, load_tokenizer(model))


def read(config: Config, tokenizer: Any) -> Material:
    """Read, render, tokenise and split; PreflightError when nothing is left to train on."""
    data = config.data
    rows, bad = questions(data)
    made = prompts.make_prompts(
        rows,
        tokenize=chat(tokenizer, config.model.system),
        template=data.template,
        max_tokens=data.max_prompt,
    )
    split = prompts.split(made.prompts, heldout=data.heldout, demonstrations=data.demonstrations)
    if not split.training:
        raise PreflightError(f"no training prompt is left of {len(made.prompts)}: lower data.heldout")
    dropped = f"{made.duplicates} duplicates, {made.too_long} too long, {bad} bad rows"
    return Material(tokenizer, split, judge(config), dropped)


def judge(config: Config) -> Mapping[str, Any]:
    """The reward spec: a user's own function when `reward.path` is set, else the task's judge."""
    if config.reward.path:
        file, _, function = config.reward.path.rpartition(":")
        return {"fn": "custom", "path": f"{Path(file).resolve()}:{function}"}
    if not config.reward.judge:
        raise ConfigError(
            "no judge: set reward.judge (as conf/data does), or reward.path=my_file.py:my_function"
        )
    return config.reward.judge
