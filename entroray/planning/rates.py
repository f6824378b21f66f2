"""Rates from what was measured: waves of requests, steps of a run; and how they are kept and shown."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from statistics import fmean, median
from typing import Any

import numpy as np

from entroray.planning.simulate import Rates, Shape, simulate

QUANTILES = 256
"""Lengths kept of a distribution."""
LEARNER = ("score", "update", "rescore", "probe")
"""Phases in which the learner works."""


@dataclass(frozen=True)
class Wave:
    """Requests made of an engine at once, and the seconds until the last was answered."""

    seconds: float
    longest: float
    tokens: float
    sequences: float


@dataclass(frozen=True)
class Step:
    """A line of metrics.jsonl, and the shape of its run."""

    shape: Shape
    metrics: Mapping[str, Any]

    @property
    def seconds(self) -> float:
        """Without evaluation and checkpoint."""
        return float(self.metrics["seconds/step"]) - self.phases("evaluate", "checkpoint")

    @property
    def tokens(self) -> float:
        return float(self.metrics["tokens/per_second"]) * float(self.metrics["seconds/step"])

    def phases(self, *names: str) -> float:
        return sum(float(self.metrics.get(f"seconds/{name}") or 0.0) for name in names)

    def at_work(self, role: str) -> float:
        return (1 - float(self.metrics[f"idle/{role}"])) * float(self.metrics["seconds/step"])

    def wave(self, kept: float) -> Wave:
        """What an engine did, of a step that trained on a share of the groups."""
        each = self.tokens, float(self.shape.responses)
        shares = (x / kept / self.shape.engines for x in each)
        return Wave(self.at_work("generator"), float(self.metrics["length/max"]), *shares)


def fit(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Non-negative seconds for each column of `rows` that add up to `seconds`, by least relative squares."""
    a = np.asarray(rows, dtype=float) / np.maximum(np.asarray(seconds, dtype=float), 1e-9)[:, None]
    best, found = float("inf"), np.zeros(a.shape[1])
    subsets = (itertools.combinations(range(a.shape[1]), n) for n in range(1, a.shape[1] + 1))
    for chosen in map(list, itertools.chain.from_iterable(subsets)):
        x = np.linalg.lstsq(a[:, chosen], np.ones(len(a)), rcond=None)[0]
        error = float(((a[:, chosen] @ x - 1) ** 2).sum())
        if (x >= 0).all() and error < best - 1e-12:
            best, found = error, np.zeros(a.shape[1])
            found[chosen] = x
    return [float(x) for x in found]


def rates(waves: Sequence[Wave], steps: Sequence[Step], lengths: Sequence[int], prompt: float) -> Rates:
    """Of waves, and of steps at lag 0; `prompt` tokens are read with every response."""
    kept = _kept(steps)
    waves = [*waves, *(s.wave(kept) for s in steps)]
    decode, sequence, prefill = fit(
        [(w.longest, w.tokens, w.sequences) for w in waves], [w.seconds for w in waves]
    )
    read = [(s.tokens + prompt * s.shape.responses) / s.shape.ranks for s in steps]
    sizes = [(s.shape.updates, tokens) for s, tokens in zip(steps, read, strict=True)]
    update, token = fit(sizes, [s.phases(*LEARNER) for s in steps])
    rest = [max(0.0, s.seconds - s.phases("sample", "sync", *LEARNER)) for s in steps]
    loop = [max(0.0, s.at_work("driver") - x) for s, x in zip(steps, rest, strict=True)]
    judging = [s.at_work("verifier") * s.shape.verifiers for s in steps]
    each = lambda seconds: fmean(x / s.shape.responses for x, s in zip(seconds, steps, strict=True))
    return Rates(
        _quantiles(lengths),
        decode,
        sequence,
        prefill,
        prompt_tokens=prompt,
        learner_update=update,
        learner_token=token,
        sync=median(s.phases("sync") for s in steps),
        verify=each(judging),
        driver=each(loop),
        driver_step=each(rest),
        kept=kept,
    )


def _kept(steps: Sequence[Step]) -> float:
    """Share of the groups that were trained on, by the running total of those dropped."""
    pairs = [(a, b) for a, b in itertools.pairwise(steps) if b.metrics["step"] == a.metrics["step"] + 1]
    dropped = sum(b.metrics["groups/dropped"] - a.metrics["groups/dropped"] for a, b in pairs)
    taken = sum(b.shape.groups for _, b in pairs)
    return taken / (taken + dropped) if pairs else 1.0


def _quantiles(lengths: Sequence[int]) -> tuple[int, ...]:
    ordered = np.sort(np.asarray(lengths))
    picked = np.linspace(0, len(ordered) - 1, min(QUANTILES, len(ordered))).round().astype(int)
    return tuple(int(x) for x in ordered[picked])


def lengths_of(mean: float, longest: float) -> tuple[int, ...]:
    """A distribution of this mean and maximum: quantile u is longest x u^(longest/mean - 1)."""
    power = max(0.0, longest / mean - 1)
    return tuple(max(1, round(longest * ((i + 0.5) / QUANTILES) ** power)) for i in range(QUANTILES))


def run_rates(steps: Sequence[Step]) -> Rates:
    """Of a finished run at lag 0; lengths by their mean and longest alone.

    Its first step is left out, and those that an evaluation followed, which idle shares are of too. Prompts
    are not in its metrics: what they cost is counted with the responses. ValueError if no step is left.
    """
    kept = [s for s in steps if s.metrics["step"] > 1 and s.phases("evaluate") < 0.01 * s.seconds]
    if not kept:
        raise ValueError("no step after the first was without an evaluation")
    mean, longest = (fmean(s.metrics[f"length/{name}"] for s in kept) for name in ("mean", "max"))
    return rates([], kept, lengths_of(mean, longest), 0.0)


def on_shared_cores(
    alone: Rates, shape: Shape, cores: float, engine: float, learner: float, lagged: Sequence[Step]
) -> Rates:
    """`alone`, measured on `shape`, where engines and learner share cores and keep so many busy.

    The overlap is the one with which steps take as long as those of `lagged` did on the geometric mean.
    """
    crowd = max(1.0, shape.engines * engine / cores)
    r = replace(alone, cores=cores, engine_cores=engine, learner_cores=learner)
    r = replace(r, **{name: getattr(r, name) / crowd for name in ("decode", "decode_sequence", "prefill")})
    took = {of: fmean(s.seconds for s in lagged if s.shape == of) for of in {s.shape for s in lagged}}
    low, high = 0.2, 2.0
    for _ in range(20):
        middle = replace(r, overlap=(low + high) / 2)
        ratio = prod(simulate(of, middle)["seconds"] / seconds for of, seconds in took.items())
        low, high = (middle.overlap, high) if ratio > 1 else (low, middle.overlap)
    return replace(r, overlap=(low + high) / 2)


def load_rates(text: str) -> tuple[Rates, str]:
    """What `entroray plan --json` printed: rates, and where they are from.

    KeyError, TypeError or ValueError for anything else.
    """
    held = json.loads(text)
    return Rates(**{**held["rates"], "lengths": tuple(held["rates"]["lengths"])}), held["source"]


def rate_lines(r: Rates, source: str) -> Iterator[str]:
    """Every rate, and what an engine and a rank make of it."""
    speeds = (f"{n / (r.decode + r.decode_sequence * n):,.0f} at {n}" for n in (1, 16, 64, 256))
    yield f"rates ({source}; seconds of work, entroray/planning/README.md):"
    yield f"  an engine's tokens/s by sequences in flight: {', '.join(speeds)}"
    yield f"  lengths: mean {fmean(r.lengths):.0f}, longest {max(r.lengths)}"
    yield from (f"  {name:16} {value:.3g}" for name, value in vars(r).items() if name != "lengths")
