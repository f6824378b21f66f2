"""What is asked of an engine, in vLLM's terms, and what it answers, in ours."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from entroray.errors import InfrastructureError
from entroray.metrics.diversity import Loops
from entroray.types import Prompt, Rollout, SamplerNotes, Status, TopTokens

PROCESSOR = "entroray.workers.logits_processor:Shaping"
"""The logits processor that samplers run in, as vLLM loads it."""
CUT = ("length", "repetition")
"""vLLM's reasons for ending a response that was not done."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; top-p and top-k stay off in training (DESIGN 3.3)."""

    temperature: float
    """Of the policy, and so of the learner; what a rule makes of it is drawn at and corrected for."""
    max_tokens: int
    stop: tuple[str, ...] = ()
    top_p: float = 1.0
    top_k: int = 0
    rule: str | None = None
    """JSON of a rule of entroray/rollout/temperature_rules.py; None draws from the policy's "
    "distribution as it is."""
    factor: float = 1.0
    """On the temperature of this prompt, under a rule."""
    insert: int | None = None
    inserts: int = 1
    top_tokens: int = 0
    """How many of the most probable tokens to report at each position."""
    loops: Loops | None = None
    """A response that loops so is stopped."""
    least: int = 0
    """Tokens before which nothing may end the response; there the end has probability 0."""

    def moved(self, rule: Mapping[str, float], max_tokens: float | None) -> "Sampling":
        """The same with numbers of its rule set, and a longest response, rounded; None leaves that."""
        most = self.max_tokens if max_tokens is None else round(max_tokens)
        spec = json.dumps(json.loads(self.rule) | rule, sort_keys=True) if self.rule else None
        return replace(self, rule=spec, max_tokens=most)

    def under(self, rule: Mapping[str, Any], *, insert: int | None = None, inserts: int = 1) -> "Sampling":
        """The same, reshaped by `rule`."""
        return replace(self, rule=json.dumps(rule, sort_keys=True), insert=insert, inserts=inserts)


@dataclass(frozen=True)
class Request:
    """One prompt, `len(seeds)` samples; a seed makes a sample repeatable whatever runs beside it."""

    prompt_id: str
    token_ids: tuple[int, ...]
    seeds: tuple[int, ...]
    sampling: Sampling
    deadline: float
    after: tuple[int, ...] = ()
    """Tokens the response already has; they count against `sampling.max_tokens`."""
    enough: int | None = None
    """When so many samples have finished the engine gives the others up; None waits for all."""

    @property
    def read(self) -> list[int]:
        """What the engine reads before it draws."""
        return [*self.token_ids, *self.after]


def first_token_request(prompt: Prompt, count: int, sampling: Sampling, deadline: float) -> Request:
    """One token, and the `count` likeliest in its place that do not end the response."""
    own = Sampling(sampling.temperature, 1, top_tokens=count, least=1)
    return Request(prompt.id, prompt.token_ids, (0,), own, deadline)


def sampling_params(request: Request, seed: int, name: str) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    s = request.sampling
    asked = {"name": name, "rule": s.rule, "factor": s.factor, "insert": s.insert, "inserts": s.inserts}
    return SamplingParams(
        temperature=s.temperature,
        max_tokens=s.max_tokens - len(request.after),
        min_tokens=s.least,
        stop=list(s.stop),
        top_p=s.top_p,
        top_k=s.top_k,
        extra_args={"entroray": asked} if s.rule else None,
        seed=seed,
        logprobs=s.top_tokens,
        flat_logprobs=True,
        detokenize=bool(s.stop),
        include_stop_str_in_output=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        repetition_detection=_detection(s.loops) if s.loops else None,
    )


def _detection(loops: Loops) -> Any:
    from vllm.sampling_params import RepetitionDetectionParams

    sizes = {"max_pattern_size": loops.longest, "min_pattern_size": loops.shortest}
    return RepetitionDetectionParams(**sizes, min_count=loops.count)


def probe_params() -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )


def as_rollout(
    request: Request, completion: Any, decode: Callable[[list[int]], str], notes: np.ndarray | None
) -> Rollout:
    token_ids = np.asarray(completion.token_ids, dtype=np.int32)
    deep = request.sampling.top_tokens
    reported = np.asarray(completion.logprobs.logprobs, dtype=np.float32)
    logprobs = reported.reshape(len(token_ids), 1 + deep)  # the drawn token's stands before the likeliest
    versions = np.zeros(len(token_ids), dtype=np.int32)
    for span in completion.weight_versions or ():
        versions[span.start : span.end] = int(span.version)
    return Rollout(
        prompt_id=request.prompt_id,
        token_ids=token_ids,
        logprobs=np.ascontiguousarray(logprobs[:, 0]),
        versions=versions,
        text=_text(request, completion, decode),
        temperature=request.sampling.temperature,
        limit=request.sampling.max_tokens,
        status=Status.TRUNCATED if completion.finish_reason in CUT else Status.OK,
        shaped=_shaped(notes, len(token_ids)) if request.sampling.rule else None,
        top_tokens=_likeliest(completion, logprobs) if deep else None,
    )


def _likeliest(completion: Any, logprobs: np.ndarray) -> TopTokens:
    ids = np.asarray(completion.logprobs.token_ids, np.int32).reshape(logprobs.shape)
    return TopTokens(ids[:, 1:].copy(), np.exp(logprobs[:, 1:]))


def _text(request: Request, completion: Any, decode: Callable[[list[int]], str]) -> str:
    if completion.text and not request.after:
        return completion.text
    return decode([*request.after, *completion.token_ids])


def _shaped(notes: np.ndarray | None, length: int) -> SamplerNotes:
    """The first `length` positions of a request's notes; InfrastructureError when one is missing."""
    if notes is None or np.isnan(notes[:length, :2]).any():
        raise InfrastructureError(
            f"the sampler has no notes on some of {length} tokens it was asked to shape: the engine must be "
            "started with the logits processor of entroray/workers/logits_processor.py "
            "(actors.engine_options does)"
        )
    return SamplerNotes(*np.ascontiguousarray(notes[:length].T))


def unfinished_rollout(
    request: Request, status: Status, so_far: Any | None, decode: Callable[[list[int]], str]
) -> Rollout:
    """What there is of a sample that was not waited for, and why; without its sampler's notes."""
    if so_far is not None and len(so_far.token_ids):
        plain = replace(request, sampling=replace(request.sampling, rule=None))
        return replace(as_rollout(plain, so_far, decode, None), status=status)
    none = np.empty(0, dtype=np.int32)
    limit = request.sampling.max_tokens
    temperature = request.sampling.temperature
    return Rollout(request.prompt_id, none, none.astype(np.float32), none, "", temperature, limit, status)


def partial_completion(engine: Any, name: str) -> Any | None:
    """The completion of a request under way, as if it ended here, from vLLM's own books; None without one.

    An abort returns nothing, and these tokens were drawn all the same.
    """
    from vllm.v1.engine import FinishReason

    books = engine.output_processor
    states = [books.request_states[i] for i in books.external_req_ids.get(name, ())]
    told = [state.make_request_output([], None, FinishReason.ABORT, None) for state in states]
    return told[0].outputs[0] if told else None


def prompt_logprobs(output: Any) -> list[float]:
    pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return [step[token].logprob for token, step in pairs]
