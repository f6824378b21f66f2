"""A gang of DeepSpeed ranks that scores and trains the policy; every rank is one Ray actor."""

import gc
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from entroray.errors import PreflightError
from entroray.metrics.update import SUMS, update_sums
from entroray.objective import Objective, active_tokens_inside, flat_tokens
from entroray.policy.head import TokenStats
from entroray.policy.model import Policy, load_policy, pad
from entroray.types import Batch, Tokens

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ONE = np.ones(1, dtype=np.int32)
REFERENCE = "reference.pt"
"""Of a checkpoint: the reference policy, where it is not the one the run started from."""
EMPTY = Batch(_ONE, _ONE, _ONE, _ONE, np.ones(1, dtype=np.float32))
"""One row of one token: what a rank forwards, with weight 0, when it has fewer micro-batches than others."""


@dataclass(frozen=True)
class LearnerSettings:
    """What a rank needs to know; everything else of DeepSpeed passes through `deepspeed`."""

    model: str
    dtype: str
    world: int
    zero_stage: int
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    max_grad_norm: float
    schedule: str
    warmup_updates: int
    total_updates: int
    seed: int
    reference: bool
    gradient_checkpointing: bool
    attention: str
    transfer: str
    deepspeed: Mapping[str, Any] = field(default_factory=dict)


def deepspeed_config(s: LearnerSettings) -> dict[str, Any]:
    """DeepSpeed's own configuration; gradient clipping is written even when off (absent means 1.0)."""
    bf16 = s.dtype == "bfloat16"
    # A sum over micro-batches kept in bf16 loses what is below 1/256 of it; stage 0 takes no such mix.
    sums = {"data_types": {"grad_accum_dtype": "fp32"}} if bf16 and s.zero_stage > 0 else {}
    adam = {"lr": s.lr, "betas": list(s.betas), "weight_decay": s.weight_decay, "torch_adam": True}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # the boundary is set by hand: updates differ in micro-batches
        "gradient_clipping": s.max_grad_norm,
        "optimizer": {"type": "AdamW", "params": adam},
        "zero_optimization": {"stage": s.zero_stage},
        "bf16": {"enabled": bf16},
        "steps_per_print": 10**9,
        **sums,
        **s.deepspeed,
    }


class LearnerRank:
    """One rank: a DeepSpeed engine around the policy, and rank 0 the sender of weights."""

    def __init__(self, rank: int, settings: LearnerSettings, objective: Objective):
        self.rank, self.settings, self.objective = rank, settings, objective
        self.version = 0
        self.ahead = False
        """Whether the weights were updated since they were sent."""
        self.anchored = False
        """Whether the reference is no longer what `settings` started from."""
        self.engine: Any = None
        self.reference: Policy | None = None
        self.transfer: Any = None

    def address(self) -> tuple[str, int]:
        """Where the ranks may meet: this node and a port free on it."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return _node_ip(), probe.getsockname()[1]

    def start(self, host: str, port: int, timeout: float) -> dict[str, Any]:
        """Join the gang and build the engine; returns what the manifest wants to know."""
        import deepspeed

        s = self.settings
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port), "RANK": str(self.rank)}
        os.environ |= {"WORLD_SIZE": str(s.world), "LOCAL_RANK": "0"}
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        deepspeed.init_distributed(
            "nccl" if self.device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout)
        )
        return self._build()

    def reset(self, settings: LearnerSettings, objective: Objective) -> None:
        """Become what a rank just started with these is: weights, optimizer, schedule, random state."""
        self.engine.destroy()
        self._disconnect()  # it reads the old weights: the next sync connects anew
        self.engine = self.reference = None
        gc.collect()  # DeepSpeed's hooks are cycles: without this two learners would be on the card
        self._return_memory()
        self.settings, self.objective, self.anchored = settings, objective, False
        self._build()

    def anchor(self, folder: str) -> None:
        """Begin anew with the weights in `folder`, as reference too: moments, schedule and random state."""
        self.reset(replace(self.settings, model=folder), self.objective)
        self.anchored = True

    def _build(self) -> dict[str, Any]:
        import deepspeed

        s = self.settings
        torch.manual_seed(s.seed)
        policy = load_policy(s.model, DTYPES[s.dtype], s.attention)
        if s.gradient_checkpointing:
            policy.model.gradient_checkpointing_enable()
        held = s.reference or "ref_logprobs" in self.objective.needs
        self.reference = load_policy(s.model, DTYPES[s.dtype], s.attention).to(self.device) if held else None
        self.engine, *_ = deepspeed.initialize(
            model=policy,
            model_parameters=[p for p in policy.parameters() if p.requires_grad],
            config=deepspeed_config(s),
            lr_scheduler=self._schedule,
        )
        return {"parameters": policy.model.num_parameters(), "device": str(self.device)}

    def _schedule(self, optimizer: Any) -> Any:
        from transformers import get_scheduler

        s = self.settings
        return get_scheduler(s.schedule, optimizer, s.warmup_updates, s.total_updates)

    def connect(self, client: Any) -> None:
        """Open the weight transfer to the generators that `client` reaches."""
        from entroray.workers import transfer

        self._disconnect()
        self.client = client
        client.rendezvous = self.address()
        self.transfer = transfer.connect(
            self.settings.transfer, rank=self.rank, client=client, module=self.policy.model
        )

    def _disconnect(self) -> None:
        if self.transfer is not None:
            self.transfer.shutdown()
        self.transfer = None

    @property
    def policy(self) -> Policy:
        return self.engine.module

    def adopt(self, objective: Objective) -> None:
        """Train by `objective` from now on; weights, moments and schedule go on."""
        self.objective = objective

    # --- one step ---

    def score(
        self, micros: Sequence[Batch], extra: Sequence[str] = ()
    ) -> list[dict[str, NDArray[np.float32]]]:
        """Log-prob, entropy, varentropy (nats) of each micro-batch's tokens [n], the reference's too.

        `extra` names further statistics (`policy.statistics`), from the same pass.
        """
        self.engine.eval()
        with torch.no_grad():
            return [self._score(micro, extra) for micro in micros]

    def _score(self, micro: Batch, extra: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        padded = pad(micro if micro.num_rows else EMPTY, self.device)
        stats = dict(self.engine(padded, (*self.objective.statistics, *extra)))
        if self.reference is not None:
            stats["ref_logprobs"] = self.reference(padded)["logprobs"]
        return {k: v.float().cpu().numpy()[: len(micro.response_ids)] for k, v in stats.items()}

    def update(
        self,
        micros: Sequence[tuple[Batch, Tokens]],
        objective: Objective | None = None,
        lr: float | None = None,
    ) -> dict[str, float]:
        """One optimizer update over this rank's micro-batches; returns sums over its tokens.

        `objective` and `lr`, the schedule's base, are in effect from this update on; None changes nothing.
        An update whose gradient is not finite on any rank changes nothing on all of them: `skipped` is 1.
        """
        if objective is not None:
            self.adopt(objective)
        if lr is not None:
            rebase_schedule(self.engine.lr_scheduler, lr)
        self.engine.train()
        sums = dict.fromkeys(("loss", "tokens", "ratio_max", "entropy", *SUMS), 0.0)
        for index, (batch, tokens) in enumerate(micros):
            self.engine.set_gradient_accumulation_boundary(index == len(micros) - 1)
            self._backward(batch, tokens, sums)
        norm = self._grad_norm_before_step()
        if norm is not None and not np.isfinite(norm):
            self.engine.zero_grad()  # ZeRO 0 looks at nothing before it steps
            return sums | {"grad_norm": norm, "lr": self.engine.get_lr()[0], "skipped": 1.0}
        self.ahead = True
        self.engine.step()  # the other stages look at the norm themselves
        norm = norm if norm is not None else float(self.engine.get_global_grad_norm())
        skipped = 0.0 if self.engine.was_step_applied() else 1.0
        return sums | {"grad_norm": norm, "lr": self.engine.get_lr()[0], "skipped": skipped}

    def _backward(self, batch: Batch, tokens: Tokens, sums: dict[str, float]) -> None:
        real = batch.num_rows > 0
        stats = self.engine(pad(batch if real else EMPTY, self.device), self.objective.statistics)
        if real:
            live = with_live_statistics(tokens_on(tokens, self.device), stats)
            loss = self.objective.loss(live) / self.objective.denominator(tokens.counts)
            _tally(self.objective, live, loss, sums)
        else:
            loss = stats["logprobs"].sum() * 0.0
        self.engine.backward(loss * self.settings.world, scale_wrt_gas=False)

    def _grad_norm_before_step(self) -> float | None:
        """Global norm where DeepSpeed reports none (ZeRO 0), from gradients already averaged over ranks."""
        if self.settings.zero_stage > 0:
            return None
        grads = [p.grad for p in self.policy.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))

    # --- weights ---

    def sync(self, version: int) -> tuple[str | None, list[tuple[int, str | None]]]:
        """Send the weights as `version`; returns (hash sent, what every engine acknowledged) on rank 0."""
        self.version = self.client.version = version
        self.client.sent, self.client.acknowledged = None, []
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the sender reads on streams that do not wait for the optimizer's
        self._return_memory()
        self.transfer.send_weights()
        self._return_memory()
        self.ahead = False
        return self.client.sent, self.client.acknowledged

    def _return_memory(self) -> None:
        """Give the card what is kept for later: an engine may be about to fill it."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def resend(self, client: Any) -> tuple[str | None, list[tuple[int, str | None]]] | None:
        """The weights last sent, to the engines that `client` reaches; None when they are no longer here."""
        if self.ahead:
            return None
        self.connect(client)
        return self.sync(self.version)

    def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Log-prob (nats, T=1) of every token but the first."""
        ids = np.asarray(token_ids, dtype=np.int32)
        one, rest = np.array([1], dtype=np.int32), np.array([len(ids) - 1], dtype=np.int32)
        return self.score([Batch(ids[:1], one, ids[1:], rest, np.ones(1, np.float32))])[0][
            "logprobs"
        ].tolist()

    def export(self, folder: str) -> None:
        """Write the policy to `folder` in Hugging Face format (rank 0; all ranks gather)."""
        from safetensors.torch import save_file

        from entroray.workers.transfer import GatheredSource

        weights = {name: t.cpu().contiguous() for name, t in GatheredSource(self.policy.model)}
        if self.rank == 0:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_file(weights, Path(folder, "model.safetensors"), metadata={"format": "pt"})
            self.policy.model.config.save_pretrained(folder)
            self.policy.model.generation_config.save_pretrained(folder)

    def save(self, folder: str) -> None:
        """Weights, moments, schedule and random state into `folder`; every rank writes its own part."""
        self.engine.save_checkpoint(folder, tag="learner", save_latest=False)
        torch.save([torch.get_rng_state(), *torch.cuda.get_rng_state_all()], self._rng(folder))
        if self.anchored and self.reference and self.rank == 0:
            torch.save(self.reference.state_dict(), Path(folder, REFERENCE))

    def load(self, folder: str) -> None:
        """Go on from what `save` wrote with as many ranks and the same ZeRO stage."""
        loaded, _ = self.engine.load_checkpoint(folder, tag="learner")
        if loaded is None:
            raise PreflightError(f"{folder} holds no learner that DeepSpeed can read: resume from another")
        self.anchored = self.reference is not None and Path(folder, REFERENCE).exists()
        if self.reference and self.anchored:
            self.reference.load_state_dict(torch.load(Path(folder, REFERENCE), map_location=self.device))
        cpu, *cuda = torch.load(self._rng(folder))
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(cuda)

    def _rng(self, folder: str) -> Path:
        return Path(folder, f"rng-{self.rank}.pt")

    def stop(self) -> None:
        """Leave the gang in order, so that no rank waits for another that is gone."""
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def tokens_on(tokens: Tokens, device: torch.device) -> Tokens:
    """`tokens` with every tensor on `device`."""
    move = lambda v: v.to(device) if isinstance(v, Tensor) else v
    moved: dict[str, Any] = {k: move(v) for k, v in vars(tokens).items()}
    return replace(tokens, **moved | {"extra": {k: move(v) for k, v in tokens.extra.items()}})


def with_live_statistics(tokens: Tokens, stats: Mapping[str, Tensor]) -> Tokens:
    """`tokens` under the current policy: what the head computed in place of what was scored."""
    own = {name: x for name, x in stats.items() if name in TokenStats._fields}
    extra = {name: x for name, x in stats.items() if name not in TokenStats._fields}
    return replace(tokens, **own, extra={**tokens.extra, **extra})  # type: ignore[arg-type]


def rebase_schedule(schedule: Any, lr: float) -> None:
    """Let `schedule` be as if it had begun with `lr`, from the coming update on."""
    if not hasattr(schedule, "lr_lambdas"):
        raise PreflightError(
            f"learner.lr cannot be moved under {type(schedule).__name__}: take learner.schedule=constant, "
            "or constant_with_warmup"
        )
    schedule.base_lrs = [lr] * len(schedule.base_lrs)
    factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    for group, factor in zip(schedule.optimizer.param_groups, factors, strict=True):
        group["lr"] = lr * factor


def _tally(objective: Objective, live: Tokens, loss: Tensor, sums: dict[str, float]) -> None:
    with torch.no_grad():
        ratio = (live.logprobs - live.old_logprobs)[live.mask].exp()
        sums["loss"] += float(loss)
        sums["tokens"] += int(live.mask.sum())
        sums["entropy"] += float(live.entropy[live.mask].sum())
        sums["ratio_max"] = max(sums["ratio_max"], float(ratio.max()) if len(ratio) else 0.0)
    for name, value in update_sums(live, flat_tokens(objective, live)).items():
        sums[name] += value
    for rule, number in active_tokens_inside(objective, live).items():
        sums[f"rule:{rule}"] = sums.get(f"rule:{rule}", 0.0) + number


def _node_ip() -> str:
    import ray

    return ray.util.get_node_ip_address()
