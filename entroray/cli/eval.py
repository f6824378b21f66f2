"""`entroray eval`: what a model folder does on held-out prompts, in this process: one engine, no Ray."""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from entroray.cli import flags
from entroray.cli.flags import CONFIG_DIR, Flag
from entroray.config import Config
from entroray.errors import ConfigError, PreflightError
from entroray.evaluation.cot_decoding import TWO, Decoding, words
from entroray.evaluation.evaluate import evaluate_policy, plan_evaluation
from entroray.observe import evaluation, evaluation_page
from entroray.roles import Generator as Role
from entroray.rollout.splice import openings
from entroray.types import Prompt, Rollout
from entroray.wiring import actors, compose, dataset, sampler, tool, warm_start
from entroray.workers import cluster
from entroray.workers.generator import Generator, Request, Sampling
from entroray.workers.verifier import Verifier
from entroray.workers.vllm_request import first_token_request

FLAGS = (Flag("config", "FILE"), Flag("out", "FILE"), Flag("html", "FILE"), CONFIG_DIR, Flag("compare"))


@dataclass(frozen=True)
class OneEngine:
    """A generator in this process, as a role."""

    engine: Generator
    sampling: Sampling
    deadline: float

    async def sample(self, prompt: Prompt, seeds: Sequence[int], after: Sequence[int] = ()) -> list[Rollout]:
        request = Request(
            prompt.id, prompt.token_ids, tuple(seeds), self.sampling, self.deadline, tuple(after)
        )
        return await self.engine.sample(request)

    async def first_tokens(self, prompt: Prompt, count: int) -> list[Rollout]:
        (drawn,) = await self.engine.sample(first_token_request(prompt, count, self.sampling, self.deadline))
        return openings(drawn)


def main(arguments: list[str]) -> int:
    """Prints a table; `--out` keeps everything as JSON, a page beside it, which `--html` puts elsewhere."""
    given, others = flags.parse_flags("eval", arguments, FLAGS)
    if "compare" in given:
        return _compare(others)
    source, config_dir = given.get("config"), given.get("config-dir")
    if source and config_dir:
        raise ConfigError("eval --config is a whole run's settings: leave out --config-dir")
    config = (
        of_run(Path(source), others) if source else compose.load_config(others, config_dir, training=False)[0]
    )
    result = asyncio.run(evaluate(config))
    evaluation.show_evaluation(result)
    if "out" in given:
        Path(given["out"]).write_text(evaluation.evaluation_json(result), encoding="utf-8")
    if "html" in given or "out" in given:
        page = Path(given.get("html") or Path(given["out"]).with_suffix(".html"))
        print(f"page       {evaluation_page.write_evaluation_page(page, result)}")
    return 0


def _compare(arguments: list[str]) -> int:
    """`--compare first.json second.json`: the second against the first on the prompts both answered."""
    if len(arguments) != 2:
        raise ConfigError(f"eval --compare takes two files that eval --out wrote, got {arguments}")
    evaluation.show_comparison(*map(evaluation.load_evaluation, map(Path, arguments)))
    return 0


def of_run(path: Path, values: list[str]) -> Config:
    """The settings a run was made with, and what is said beside them."""
    tree = OmegaConf.load(path)
    assert isinstance(tree, DictConfig)
    return compose.override_config(tree, values, training=False)


async def evaluate(config: Config) -> dict[str, Any]:
    """Everything found on the held-out prompts, as JSON holds it."""
    os.environ.update(cluster.environment() | (cluster.CPU_ONLY if actors.cpu_only(config) else {}))
    model, e, s, v = warm_start.resolve_model(config), config.evaluate, config.sampler, config.verifier
    read = dataset.load_dataset(config, model)
    prompts = read.split.heldout[: e.prompts]
    if not prompts:
        raise PreflightError(f"no held-out prompt with data.heldout={config.data.heldout:g}: raise it")
    if e.cot > len(read.tokenizer):
        raise ConfigError(
            f"evaluate.cot={e.cot}: the tokenizer knows {len(read.tokenizer)} tokens, so lower it"
        )
    engine = Generator(
        model,
        dtype=config.model.dtype,
        max_length=actors.sequence_length(config),
        seed=0,
        engine=_options(config),
    )
    verifier = Verifier(read.judge, slots=v.slots, deadline=config.reward.deadline, memory_mb=v.memory_mb)
    known = words(read.tokenizer)

    def role(temperature: float, top_tokens: int = 0) -> Role:
        drawn = sampler.measuring_sampling(config, temperature, read.tokenizer)
        one = OneEngine(engine, replace(drawn, top_tokens=top_tokens), config.rollout.deadline)
        return tool.with_tool(config, read.tokenizer, one, verifier)

    def at(temperature: float) -> Role:
        return role(temperature, max(e.cot, TWO) if e.cot and temperature == 0 else 0)

    def ends(token: int) -> bool:
        return token in known.special or any(stop in known.text([token]) for stop in s.stop)

    decoding = Decoding(e.cot, role(0.0, TWO), ends) if e.cot else None
    drawn = plan_evaluation(s.temperature, e.samples, e.k)
    try:
        await asyncio.gather(engine.start(), verifier.warm_up())
        found = await evaluate_policy(at, verifier, prompts, drawn, known, decoding)
    finally:
        verifier.close()
    return {
        "model": model,
        "prompts": len(prompts),
        "samples": drawn.samples,
        "temperature": s.temperature,
        "sampler": sampler.measures_entropy(config),
        "top_p": s.top_p,
        "top_k": s.top_k,
        "max_tokens": config.rollout.max_tokens,
        **found,
    }


def _options(config: Config) -> dict[str, Any]:
    """vLLM's options for an engine that notes entropies and may report many likeliest tokens."""
    options = actors.engine_options(config)
    if not options.get("speculative_config"):
        options |= actors.logits_processors(config)
    return {"max_logprobs": max(20, config.evaluate.cot)} | options
