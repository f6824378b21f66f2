"""Hand-made tokens and groups on which every row of conf/objective is tried."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from omegaconf import OmegaConf
from torch import Tensor

from entroray.control import build_controllers
from entroray.objective import Objective, build_objective, count_tokens
from entroray.types import Counts, Group, Prompt, Rollout, Tokens, Verdict
from entroray.wiring.controllers import in_effect

CONF = Path(__file__).parents[1] / "conf/objective"
FILES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(CONF.glob("*.yaml"))}
ROWS = {name: file.get("objective", file) for name, file in FILES.items()}
BUILT = {name: build_objective(row) for name, row in ROWS.items()}
STATISTICS = sorted({name for row in BUILT.values() for name in row.statistics})
"""Every further statistic of the vocabulary that some row asks for; each is a number below 0 here."""
LENGTHS, GROUPS, ADVANTAGES = (5, 1, 7, 3, 4, 8), (0, 0, 1, 1, 2, 2), (1.5, -0.5, 0.3, -2.0, 0.0, 1.0)
N = sum(LENGTHS)


def tokens(
    *, drift: float = 3.0, masked_out=(0, 9, 10, 27), hole: float = torch.nan, step: int = 3
) -> Tokens:
    """Six rows of three prompts; log-ratios spread over [-drift, drift]; `hole` outside the mask."""
    g = torch.Generator().manual_seed(0)
    mask = torch.ones(N, dtype=torch.bool)
    mask[list(masked_out)] = False
    old, entropy, varentropy, noise = torch.rand(4, N, generator=g, dtype=torch.float64)
    old = -0.2 - 2 * old
    moved = drift * torch.linspace(-1, 1, N, dtype=torch.float64)[torch.randperm(N, generator=g)]
    row = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))

    def column(x: Tensor | float) -> Tensor:
        return torch.where(mask, torch.as_tensor(x, dtype=torch.float64), hole)

    t = Tokens(
        row=row,
        position=torch.cat([torch.arange(n) for n in LENGTHS]),
        uid=torch.arange(N),
        mask=mask,
        logprobs=column(old + moved),
        entropy=column(entropy),
        varentropy=column(varentropy),
        old_logprobs=column(old),
        behavior_logprobs=column(old + noise - 0.9),
        ref_logprobs=column(old + noise**2 - 0.3),
        temperature=column(1.0),
        advantages=column(torch.tensor(ADVANTAGES, dtype=torch.float64)[row]),
        scale=column(1.0),
        correction=column(1.0),
        selected=mask,
        group=torch.tensor(GROUPS),
        length=torch.tensor(LENGTHS),
        reward=torch.tensor([1.0, 0, 1, 0, 0, 1]),
        correct=torch.tensor([1.0, 0, 1, 0, 0, 1]),
        version=torch.zeros(len(LENGTHS), dtype=torch.long),
        step=step,
        counts=Counts(0, 0, 0, 0),
        extra={name: column(-0.3 - torch.rand(N, generator=g, dtype=torch.float64)) for name in STATISTICS},
    )
    return replace(t, counts=count_tokens(t))


def row_in_step(name: str, step: int) -> Objective:
    """A row with the settings that its own schedules give it in a step; what reads a signal is as shipped."""
    file: Any = OmegaConf.to_container(OmegaConf.create({"run": {"steps": 100}} | FILES[name]), resolve=True)
    schedules = [c for c in build_controllers(file.get("control", {})) if c.signal is None]
    return build_objective(in_effect(ROWS[name], {c.knob: c.rule(step) for c in schedules}))


def group(rewards=(1, 0, 0, 1), correct=(1, 0, 0, 1), lengths=(50, 85, 90, 100)) -> Group:
    ids, logprobs = np.zeros(100, np.int32), np.zeros(100, np.float32)
    rollouts = tuple(Rollout("q", ids[:n], logprobs[:n], ids[:n], "", 1.0, 100) for n in lengths)
    verdicts = tuple(Verdict(float(r), bool(c)) for r, c in zip(rewards, correct, strict=True))
    return Group(Prompt("q", "", (), ""), rollouts, verdicts)


def live(t: Tokens) -> Tokens:
    """As inside the update: log-probs and entropy are leaves that gather gradient."""
    leaves = {n: getattr(t, n).detach().clone().requires_grad_() for n in ("logprobs", "entropy")}
    extra = {n: x.detach().clone().requires_grad_() for n, x in t.extra.items()}
    return replace(t, **leaves, extra=extra)


def update(objective: Objective, t: Tokens, cuts: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """A learner's loss and gradients: the cuts' numerators summed, over the global denominator."""
    t = live(t)
    loss = sum(objective.loss(t.take(torch.tensor(rows))) for rows in cuts)
    loss = loss / objective.denominator(t.counts)
    loss.backward()
    gradients = (torch.zeros(N) if x.grad is None else x.grad for x in (t.logprobs, t.entropy))
    return loss.detach(), *gradients


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b.to(a.dtype), rtol=1e-12, atol=1e-13, equal_nan=True)


WHOLE = [[0, 1, 2, 3, 4, 5]]
MASK = tokens().mask
SPARE = {"mean_discriminator": torch.where(MASK, 9.0, 0.0).double()} | {
    name: torch.where(MASK, -0.1 - 0.02 * i - 0.01 * torch.arange(N).double(), 0.0)
    for i, name in enumerate(
        ["nucleus_entropy:0.5", "top_entropy:2", "top_entropy:5", "plausible_logmass:0.1"]
    )
}
"""Statistics that no shipped row asks for, and one beyond every threshold."""


def outcome(objective: Objective) -> list[float]:
    """Everything a row decides, on one fixed case: credited where the step begins, updated further on."""
    moved, g = replace(tokens(), entropy=tokens().entropy + 0.3), group()
    uneven = moved.advantages * (1 + 0.1 * torch.sin(torch.arange(N).double()))
    start = replace(moved, logprobs=moved.old_logprobs, extra=moved.extra | SPARE, step=60)
    t = replace(objective.credit(replace(start, advantages=uneven)), logprobs=moved.logprobs)
    numbers = [objective.shape_rewards(g), objective.estimate(g), *update(objective, t, WHOLE)]
    numbers += [t.scale, t.correction, torch.tensor([objective.keep(group(correct=(1, 1, 1, 1)))])]
    flat = torch.cat([x.double().reshape(-1) for x in numbers])
    assert flat.isfinite().all()
    return flat.tolist()
