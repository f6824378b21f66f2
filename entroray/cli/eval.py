"""`entroray eval`: what a model folder does on held-out prompts, in this process: one engine, no Ray."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from entroray.cli import flags
from entroray.cli.flags import CONFIG_DIR, Flag
from entroray.config import Config
from entroray.engine.adapter import ADAPTER
from entroray.engine.generator import Generator
from entroray.errors import ConfigError
from entroray.evaluation.cot_decoding import TWO, Decoding, words
from entroray.evaluation.evaluate import CountingVerifier, evaluate_policy, heldout_prompts, plan_evaluation
from entroray.evaluation.sets import examine_sets
from entroray.observe import evaluation, evaluation_page
from entroray.observe.console import Console
from entroray.policy.lora import base_of
from entroray.wiring import actors, compose, dataset, run_directory, sampler, tool, warm_start
from entroray.workers import cluster
from entroray.workers.verifier import Verifier

FILES = (Flag("config", "FILE"), Flag("out", "FILE"), Flag("html", "FILE"))
FLAGS = (*FILES, Flag("heldout"), CONFIG_DIR, Flag("compare"))


def main(arguments: list[str]) -> int:
    """Prints a table; `--out` keeps everything as JSON, a page beside it, which `--html` puts elsewhere.

    With `--heldout` the evaluation sets are left out.
    """
    given, others = flags.parse_flags("eval", arguments, FLAGS)
    if "compare" in given:
        return _compare(others)
    source, config_dir = given.get("config"), given.get("config-dir")
    if source and config_dir:
        raise ConfigError("eval --config is a whole run's settings: leave out --config-dir")
    config = (
        of_run(Path(source), others) if source else compose.load_config(others, config_dir, training=False)[0]
    )
    if "heldout" in given:
        config = replace(config, evaluate=replace(config.evaluate, sets={}))
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
    settings = run_directory.read_settings(path)
    if settings is None:
        raise ConfigError(f"eval --config={path} holds no settings: give config.yaml of a run, whole")
    return compose.override_config(OmegaConf.create(settings), values, training=False)


async def evaluate(config: Config) -> dict[str, Any]:
    """Everything found on the held-out prompts, as JSON holds it."""
    os.environ.update(cluster.environment() | (cluster.CPU_ONLY if actors.cpu_only(config.cluster) else {}))
    model, e, s, v = warm_start.resolve_model(config), config.evaluate, config.sampler, config.verifier
    base = base_of(model)
    own = Path(model, "tokenizer_config.json").is_file()  # of an adapter that others made it is the base's
    read = dataset.load_dataset(config, model if own else base)
    heldout = read.split.heldout or not read.sets  # else the sets alone are asked for
    prompts = heldout_prompts(read.split.heldout, e.prompts, "entroray eval") if heldout else ()
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
    known = words(read.tokenizer, base)
    role = actors.generator_role(engine, config)
    generator = tool.with_tool(config.rollout, read.tokenizer, role, verifier)
    draw = sampler.evaluation_draw(s, config.rollout, config.generator.engine)
    plan = plan_evaluation(draw, e.samples, e.k)

    def ends(token: int) -> bool:
        return token in known.ends or any(stop in known.text([token]) for stop in s.stop)

    decoding = Decoding(e.cot, plan.draw.greedy(TWO), ends) if e.cot else None
    console = Console()
    passes = 1 + (plan.draw.temperature > 0) + bool(decoding)
    judged = passes * len(prompts) + sum(len(one.prompts) for one in read.sets.values())
    try:
        with console.progress("model load"):
            await asyncio.gather(engine.start(), verifier.warm_up())
        with console.progress("evaluation", judged) as move:
            counted = CountingVerifier(verifier, lambda: move(advance=1))
            roles = generator, counted
            found = await evaluate_policy(*roles, prompts, plan, known, decoding) if prompts else {}
            sets = await examine_sets(read.sets, *roles, known)
    finally:
        verifier.close()
    of_sets = {"sets": sets} if sets else {}
    if not prompts:
        return {"model": model, **of_sets}
    return {
        "model": model,
        "prompts": len(prompts),
        "samples": plan.samples,
        "temperature": s.temperature,
        "top_p": s.top_p,
        "top_k": s.top_k,
        "max_tokens": config.rollout.max_tokens,
        **found,
        **of_sets,
    }


def _options(config: Config) -> dict[str, Any]:
    """vLLM's options for an engine that notes entropies and may report many likeliest tokens."""
    g = config.generator
    plain = replace(config, generator=replace(g, transfer="plasma" if g.transfer == ADAPTER else g.transfer))
    options = actors.engine_options(plain)
    if not options.get("speculative_config"):
        options |= actors.noting(config.generator.engine)
    return {"max_logprobs": max(20, config.evaluate.cot)} | options
