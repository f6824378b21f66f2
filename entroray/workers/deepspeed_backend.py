"""All of DeepSpeed that a learner rank uses; a second training engine would be one file beside this one."""

import inspect
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from entroray.config import LearnerConfig
from entroray.engine.interfaces import check_interface, stay_on_loopback
from entroray.errors import PreflightError
from entroray.planning.memory import LORA_BUCKET
from entroray.policy.model import Layout, Policy
from entroray.workers.rank_checkpoint import WEIGHT

_LINEAR = nn.functional.linear  # torch's own, which ZeRO 3 replaces as it divides a model


def deepspeed_config(s: LearnerConfig, dtype: str) -> dict[str, Any]:
    """DeepSpeed's configuration, with the user's merged in key by key, at any depth; null is none.

    Gradient clipping is written even when off (absent means 1.0).
    """
    bf16 = dtype == "bfloat16"
    # A sum kept in bf16 loses what is below 1/256 of it: over micro-batches (stage 0 takes no such mix), and
    # over ranks, which DeepSpeed sends in bf16 unless told otherwise.
    over_ranks = {"communication_data_type": "fp32"} if bf16 else {}
    sums = {"data_types": {"grad_accum_dtype": "fp32"}} if bf16 and s.zero_stage > 0 else {}
    bucket = {"reduce_bucket_size": LORA_BUCKET} if s.lora.rank else {}  # it is allocated whole
    ours = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # `backward` sets the boundary: updates differ in micro-batches
        "gradient_clipping": s.max_grad_norm,
        "optimizer": {"type": "AdamW", "params": _optimizer_params(s)},
        "zero_optimization": {"stage": s.zero_stage, **bucket},
        "bf16": {"enabled": bf16},
        "steps_per_print": 10**9,
        **sums,
        **over_ranks,
    }
    return _merged(ours, s.deepspeed)


def _store(rank: int, ranks: int, within: timedelta) -> torch.distributed.TCPStore:
    """Where ranks meet, as the environment names it; ranks of one machine listen on loopback alone.

    Torch's own store listens on every address of the machine, whatever its host.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if not host.startswith("127."):
        return torch.distributed.TCPStore(host, port, ranks, rank == 0, within)
    stay_on_loopback()
    listening = socket.create_server((host, port)).detach() if rank == 0 else None
    return torch.distributed.TCPStore(host, port, ranks, rank == 0, within, master_listen_fd=listening)


def _optimizer_params(s: LearnerConfig) -> dict[str, Any]:
    """Those of torch's AdamW; where moments are offloaded or another optimizer is asked for, fit for it."""
    params: dict[str, Any] = {"lr": s.lr, "weight_decay": s.weight_decay}
    optimizer = s.deepspeed.get("optimizer") or {}
    if optimizer.get("type", "AdamW") not in ("Adam", "AdamW"):
        return params
    params["betas"] = list(s.betas)
    offload = (s.deepspeed.get("zero_optimization") or {}).get("offload_optimizer") or {}
    if offload.get("device", "none") == "none":  # else DeepSpeed's CPUAdam, many times as fast there
        params["torch_adam"] = True
        own = optimizer.get("params") or {}
        if torch.cuda.is_available() and own.get("torch_adam", True) and not own.get("foreach"):
            params["fused"] = True  # else a root of all its moments is held; only torch's knows it
    return params


def _merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(ours[key], value or {}) if isinstance(ours.get(key), Mapping) else value
        for key, value in theirs.items()
    }
    return {**ours, **both}


@contextmanager
def _dividing(config: dict[str, Any]) -> Iterator[None]:
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    kept = HfDeepSpeedConfig(config)  # transformers looks at it through a weak reference
    try:
        yield
    finally:
        del kept
        unset_hf_deepspeed_config()  # an error's traceback would keep it alive


class DeepSpeedBackend:
    """A policy with its gradients, optimizer and learning-rate schedule, distributed over the ranks."""

    def __init__(self, policy: Policy, learner: LearnerConfig, dtype: str, total_updates: int):
        import deepspeed
        from transformers import get_scheduler

        s = learner
        schedule = lambda optimizer: get_scheduler(s.schedule, optimizer, s.warmup_updates, total_updates)
        self.world, self.zero_stage, self.lr = s.ranks, s.zero_stage, s.lr or 0.0
        config = deepspeed_config(learner, dtype)
        self.engine, *_ = deepspeed.initialize(
            model=policy,
            model_parameters=[p for p in policy.parameters() if p.requires_grad],
            config=config,
            lr_scheduler=schedule,
        )
        self.optimizer: str = config["optimizer"]["type"]
        self.inner: Any = getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)
        self.stepped = _stepped(self.engine.optimizer, self.inner, config["zero_optimization"])

    @staticmethod
    def dividing(learner: LearnerConfig, dtype: str) -> AbstractContextManager[None] | None:
        """Inside, a model that transformers reads is divided over the ranks as it comes, never whole on one.

        None where every rank holds all of it, at stages 0 to 2.
        """
        return _dividing(deepspeed_config(learner, dtype)) if learner.zero_stage == 3 else None

    @staticmethod
    def freeze(policy: Policy, learner: LearnerConfig, dtype: str) -> "FrozenPolicy":
        """`policy`, only to be scored; it was read inside `dividing`."""
        return FrozenPolicy(policy, deepspeed_config(learner, dtype))

    @staticmethod
    def join(device: str, timeout: float) -> None:
        """Join the process group that the environment names, within `timeout` seconds.

        PreflightError if it also names a network interface that is not there.
        """
        import deepspeed

        within, on_card = timedelta(seconds=timeout), device == "cuda"
        communication = "nccl" if on_card else "gloo"
        check_interface(communication)
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        torch.distributed.init_process_group(
            communication,
            store=_store(rank, ranks, within),
            rank=rank,
            world_size=ranks,
            timeout=within,
            device_id=torch.device("cuda", 0) if on_card and ranks > 1 else None,  # as DeepSpeed has it
        )
        deepspeed.init_distributed(communication, timeout=within)
        groups = torch.distributed.distributed_c10d  # where groups that DeepSpeed makes, without one, find it
        groups.default_pg_timeout = groups.default_pg_nccl_timeout = within

    @property
    def policy(self) -> Policy:
        return self.engine.module

    def train(self, mode: bool) -> None:
        """Whether the next forward passes are to train, or only to score."""
        self.engine.train(mode)

    def forward(self, batch: Layout, statistics: tuple[str, ...]) -> dict[str, Tensor]:
        """What `Policy.forward` returns."""
        return self.engine(batch, statistics)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this rank's part of a loss that ranks sum; `last` of the update's."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world, scale_wrt_gas=False)  # DeepSpeed takes the mean over ranks

    def step(self) -> dict[str, float]:
        """Clip and apply the gradient; its norm before, the learning rate, and whether it was skipped (0, 1).

        A gradient that is not finite on any rank changes nothing on all of them.
        """
        norm = self._norm_at_stage_0()
        if norm is not None and not np.isfinite(norm):
            self.engine.zero_grad()  # stage 0 looks at nothing before it steps
            applied = False
        else:
            self.engine.step()  # the other stages look at the norm themselves
            norm = float(self.engine.get_global_grad_norm()) if norm is None else norm
            applied = self.engine.was_step_applied()
        return {"grad_norm": norm, "lr": self.engine.get_lr()[0], "skipped": float(not applied)}

    def _norm_at_stage_0(self) -> float | None:
        """Global norm where DeepSpeed reports none, from gradients already averaged over ranks."""
        if self.zero_stage > 0:
            return None
        grads = [p.grad for p in self.policy.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))

    def set_base_lr(self, lr: float) -> None:
        """As `rebase_schedule`, of this engine's schedule."""
        rebase_schedule(self.engine.lr_scheduler, lr)

    @staticmethod
    def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
        """Of a parameter that may be partitioned."""
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    @staticmethod
    def gather(parameter: nn.Parameter) -> Tensor:
        """The full parameter on every rank, whatever the ZeRO stage; all ranks must call.

        It is a copy where ranks hold parts, else the parameter itself, which the next update changes.
        """
        if not hasattr(parameter, "ds_id"):
            return parameter.detach()
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """By the names that they have in memory."""
        return {name: p for name, p in self.policy.named_parameters() if p in self.stepped}

    def state_of(self, parameter: nn.Parameter) -> dict[str, Callable[[], Tensor]]:
        """What makes its float32 weight whole, and each thing that the optimizer keeps of it.

        All ranks must call these, in one order. A number that is not one of each element is of shape [] and
        in float64.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        x, whole = self.stepped[parameter], self.zero_stage == 0
        kinds = {WEIGHT: x.detach if whole else partial(safe_get_full_fp32_param, parameter)}
        for kind, value in self.inner.state.get(x, {}).items():
            one_each = isinstance(value, Tensor) and (value.dim() or not (x.dim() or kind == "step"))
            if one_each and whole:
                kinds[kind] = value.detach
            elif one_each:
                kinds[kind] = partial(safe_get_full_optimizer_state, parameter, kind)
            elif value is not None:
                kinds[kind] = partial(torch.tensor, float(value), dtype=torch.float64)
        return kinds

    def schedule(self) -> dict[str, Any]:
        """Where the learning-rate schedule is."""
        return dict(self.engine.lr_scheduler.state_dict())

    @torch.no_grad()
    def restore(
        self, kinds: Mapping[str, Iterable[str]], tensors: Iterable[tuple[str, str, Tensor]], schedule: Any
    ) -> None:
        """Become what `state_of` and `schedule` gave, whatever the ranks and their stage of ZeRO were.

        `kinds` has those of each element by the parameter's name; `tensors` are name, kind, value. The
        learning rate is that of the settings, which may have changed since, not the one that was saved.
        """
        optimizer, trained = self.engine.optimizer, self.trained
        for name, each in kinds.items():
            state = self.inner.state[x := self.stepped[trained[name]]]
            state.update({kind: torch.zeros_like(x) for kind in each if kind not in {WEIGHT, *state}})
        if self.zero_stage in (1, 2) and any(self.inner.state.values()):
            optimizer._lazy_init_hp_params_optimizer_state()  # else it does so after its first step
        if self.zero_stage == 3:
            optimizer.checkpoint_event_prologue()
        for name, kind, value in tensors:
            self._put(trained[name], kind, value)
        if self.zero_stage == 3:
            optimizer.checkpoint_event_epilogue()
        elif self.zero_stage:
            optimizer.update_lp_params()
        self.engine.lr_scheduler.load_state_dict(schedule)
        self.set_base_lr(self.lr)

    def _put(self, parameter: Any, kind: str, value: Tensor) -> None:
        """Take this rank's part of a whole tensor, which may lie in a file."""
        from deepspeed import utils

        x = self.stepped[parameter]
        if not value.dim() and value.dtype == torch.float64:
            self.inner.state[x][kind] = self._counted(x, value.item())
        elif self.zero_stage == 0:
            for own in (x, parameter) if kind == WEIGHT else (self.inner.state[x][kind],):
                own.copy_(value)
        elif self.zero_stage == 3:
            part = _own_part(parameter, value)
            if kind == WEIGHT:
                utils.safe_set_local_fp32_param(parameter, part)
                parameter.ds_tensor.copy_(part)
            else:
                utils.safe_set_local_optimizer_state(parameter, part, kind)
        elif kind == WEIGHT:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, kind)

    def _counted(self, x: Tensor, number: float) -> Tensor | int:
        """As the optimizer counts steps: torch's in float32, on the card if fused; DeepSpeed's an integer."""
        if not type(self.inner).__module__.startswith("torch."):
            return int(number)
        groups = self.inner.param_groups
        there = any(group.get("fused") or group.get("capturable") for group in groups)
        return torch.tensor(number, dtype=torch.float32, device=x.device if there else "cpu")

    def close(self) -> None:
        """Release weights and optimizer."""
        _destroy(self.engine)


def _stepped(optimizer: Any, inner: Any, zero: Mapping[str, Any]) -> dict[nn.Parameter, Tensor]:
    """What `inner` steps in place of each parameter: the parameter, a copy in float32, or a part of many.

    PreflightError where a checkpoint could not hold what it keeps.
    """
    own = [group["params"] for group in inner.param_groups]
    names = ("bit16_groups", "bf16_groups", "fp16_groups")  # ZeRO 1 and 2; 1 in bf16; 3, and 0 in bf16
    given = next((getattr(optimizer, name) for name in names if hasattr(optimizer, name)), own)
    parts = getattr(optimizer, "fp32_partitioned_groups_flat", None)  # of stage 3
    held = own if parts is None else [[part] for part in parts]
    apart = all(len(p) == len(x) for p, x in zip(given, held, strict=True))
    if any(isinstance(it, Mapping) and it.get("device") == "nvme" for it in zero.values()):
        raise PreflightError(
            "learner.deepspeed.zero_optimization: no checkpoint can hold what lies on nvme: set device=cpu"
        )
    if hasattr(optimizer, "backup_optimizer"):
        raise PreflightError(
            "learner.deepspeed.zero_optimization.offload_optimizer.ratio: no checkpoint can hold what two "
            "optimizers keep: leave ratio out"
        )
    if zero["stage"] == 0 and not apart:
        raise PreflightError(
            f"learner.zero_stage=0: no checkpoint can hold what {type(inner).__name__} keeps of all weights "
            "in one: set learner.zero_stage=1, or leave learner.deepspeed.optimizer out"
        )
    return {
        p: x
        for ps, xs in zip(given, held, strict=True)
        for p, x in zip(ps, xs if zero["stage"] == 0 else xs * len(ps), strict=True)
    }


def _own_part(parameter: Any, whole: Tensor) -> Tensor:
    """This rank's part of a parameter that stage 3 divides, with zeros where the last one is filled up."""
    size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank(parameter.ds_process_group)
    part = whole.flatten()[size * rank : size * (rank + 1)]
    return nn.functional.pad(part, (0, size - part.numel()))


class FrozenPolicy:
    """A policy without gradients, whole on every rank, or divided at stage 3 of ZeRO."""

    def __init__(self, policy: Policy, config: Mapping[str, Any]):
        """`config` is that of `deepspeed_config` for what is trained beside it."""
        self.policy, self.engine = policy.requires_grad_(False).eval(), None
        zero = dict(config["zero_optimization"])
        if zero["stage"] == 3:  # at others, in bf16, DeepSpeed would add a copy in float32
            import deepspeed

            zero.pop("offload_optimizer", None)
            kept = {key: config[key] for key in ("train_micro_batch_size_per_gpu", "bf16", "steps_per_print")}
            self.engine, *_ = deepspeed.initialize(model=policy, config={**kept, "zero_optimization": zero})

    def forward(self, batch: Layout) -> dict[str, Tensor]:
        """What `Policy.forward` returns."""
        return self.policy(batch)

    def close(self) -> None:
        """Release weights."""
        if self.engine is not None:
            _destroy(self.engine)


def _destroy(engine: Any) -> None:
    """Destroy `engine`, and undo what DeepSpeed leaves, each of which would keep its weights alive."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    engine.destroy()
    FWD_MODULE_STACK[:] = [m for m in FWD_MODULE_STACK if m not in set(engine.module.modules())]
    nn.functional.linear = _LINEAR  # ZeRO 3 has one of its own
    cached = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(cached).nonlocals["func"].cache_clear()  # of methods: it holds their objects
    for parameter in engine.module.parameters():
        vars(parameter).clear()  # methods bound to itself
        if (held := parameter.untyped_storage()).resizable():  # what was read from a mapped file is not
            held.resize_(0)  # of its whole group at ZeRO 1 and 2


def rebase_schedule(schedule: Any, lr: float) -> None:
    """Continue `schedule` as if it had begun with `lr`; PreflightError for one that has no factors."""
    if not hasattr(schedule, "lr_lambdas"):
        raise PreflightError(
            f"learner.lr cannot be moved under {type(schedule).__name__}: take learner.schedule=constant, "
            "or constant_with_warmup"
        )
    schedule.base_lrs = [lr] * len(schedule.base_lrs)
    factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    for group, factor in zip(schedule.optimizer.param_groups, factors, strict=True):
        group["lr"] = lr * factor
