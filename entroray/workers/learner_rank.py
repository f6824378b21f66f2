"""One rank of the learner, a Ray actor: scores, updates, sends and saves the policy, on any backend."""

import gc
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from entroray.config import LearnerConfig, Model
from entroray.engine.interfaces import hold_port
from entroray.errors import PreflightError
from entroray.installation import prepare_ops
from entroray.metrics.update import SUMS, add_sums
from entroray.objective import Objective, activity_inside, corrected
from entroray.policy import families, lora
from entroray.policy.first_calls import settle
from entroray.policy.kept_head import MASS
from entroray.policy.model import Layout, Policy, load_policy, or_empty, pad
from entroray.policy.packing import compile_layers, enable_packing, pack, use_liger
from entroray.policy.proof import check_loaded, why_not_packed
from entroray.roles import Scores
from entroray.train.batching import tokens_on, with_live_statistics, with_scores
from entroray.train.pulse import TURNS
from entroray.types import Batch, Tokens
from entroray.workers import checkpoint, rank_checkpoint
from entroray.workers.checkpoint import Fingerprint

if TYPE_CHECKING:  # it imports Ray, which a rank that sends nothing does without
    from entroray.workers.weight_sender import Delivery, GeneratorClient

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
REFERENCE = "reference"
"""Folder of a checkpoint: the reference policy as a model, if it is not the one the run started from."""


@dataclass(frozen=True)
class LearnerSettings:
    """What a rank starts from."""

    learner: LearnerConfig
    model: Model
    """`path` is a folder or hub id."""
    transfer: str
    """Name of vLLM's weight-transfer engine."""
    seed: int
    total_updates: int
    """Length of the learning-rate schedule."""


class LearnerRank:
    """One rank: scores and updates the policy; rank 0 sends its weights.

    `backend` is the class that distributes the policy and updates it, such as that of `*_backend.py`.
    """

    def __init__(self, rank: int, settings: LearnerSettings, objective: Objective, backend: Any):
        self.rank, self.settings, self.objective, self.backend_class = rank, settings, objective, backend
        self.version = 0
        self.updated = False
        """Whether the weights were updated since they were sent."""
        self.anchored = False
        """Whether the reference is no longer what `settings` started from."""
        self.backend: Any = None
        self.reference: Any = None
        """What the backend makes of a policy that is only scored, if one is needed."""
        self.transfer: Any = None
        self.threads: int | None = None
        """CPU threads to compute with; None: as many as there are now."""
        self.packed = False
        """Whether rows are laid end to end."""

    def address(self) -> tuple[str, int]:
        """An address and port of this node where others may meet this rank, kept free until the next call."""
        import ray

        self.held = hold_port(host := ray.util.get_node_ip_address())
        return host, self.held.getsockname()[1]

    def start(self, host: str, port: int, timeout: float) -> dict[str, Any]:
        """Join the gang and load the policy; returns its number of parameters, the device, how rows lie."""
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port), "RANK": str(self.rank)}
        os.environ |= {"WORLD_SIZE": str(self.settings.learner.ranks), "LOCAL_RANK": "0"}
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        settle()
        os.environ["TORCH_EXTENSIONS_DIR"] = str(prepare_ops()[0])  # this node's
        rows = self._choose_layout()  # before anything of DeepSpeed may have a say in how models are built
        self.backend_class.join(self.device.type, timeout)
        self._load_model(self.settings.model.path)
        sizes = [(math.prod(self.backend.full_shape(p)), p.requires_grad) for p in self.policy.parameters()]
        counts = {"parameters": sum(n for n, _ in sizes), "trained": sum(n for n, trains in sizes if trains)}
        return counts | {"device": str(self.device), "packed": self.packed, "rows": rows}

    def _choose_layout(self) -> str:
        """Decide whether rows are packed, and say so; PreflightError if they must be and cannot."""
        how, m, self.packed = self.settings.learner.pack, self.settings.model, False
        if how == "never" or (how == "auto" and self.device.type == "cpu"):
            return "padded"
        why = why_not_packed(m.path, m.attention, DTYPES[m.dtype], self.device)
        if why and how == "always":
            raise PreflightError(
                f"learner.pack=always: rows of model.path={m.path} cannot lie end to end ({why}): set "
                "learner.pack=auto"
            )
        self.packed = not why
        return f"padded, for {why}" if why else "end to end"

    def reset(self, settings: LearnerSettings, objective: Objective) -> None:
        """Become what a rank just started with these is: weights, optimizer, schedule, random state."""
        self._clear()
        before, self.settings, self.objective, self.anchored = self.settings, settings, objective, False
        same = (before.learner.pack, before.model) == (settings.learner.pack, settings.model)
        if not (same or settings.learner.liger):  # as the driver was told; Liger's kernels are in classes
            self._choose_layout()
        self._load_model(settings.model.path)

    def _clear(self) -> None:
        for name in ("backend", "reference"):  # in no variable here, which would keep it alive
            if getattr(self, name) is not None:  # no reference, or the model before could not be loaded
                getattr(self, name).close()
            setattr(self, name, None)
        self._disconnect()  # it reads the old weights: the next sync connects anew
        gc.collect()  # the backend's hooks are cycles: without this two learners would be on the card
        self._return_memory()

    def anchor(self, folder: str) -> None:
        """Begin anew as `reset`, with the weights in `folder`, as reference too; rows lie as they did."""
        self._clear()
        self._load_model(folder)
        self.anchored = True

    def _load_model(self, path: str) -> None:
        s = self.settings
        torch.manual_seed(s.seed)
        policy = self._read_policy(path)
        divided = s.learner.zero_stage == 3
        if self.rank == 0 and not divided:
            check_loaded(path, policy)
        families.enable_checkpointing(policy.model, s.learner)
        needed = s.learner.reference or "ref_logprobs" in self.objective.needs
        self.reference = self._freeze(path) if needed and not policy.adapter else None
        self.backend = self.backend_class(policy, s.learner, s.model.dtype, s.total_updates)
        self.reference = lora.BasePolicy(self.backend) if needed and policy.adapter else self.reference
        if divided:  # only now is the model gathered as it computes
            check_loaded(path, policy)

    def _freeze(self, path: str) -> Any:
        s = self.settings
        return self.backend_class.freeze(self._read_policy(path), s.learner, s.model.dtype)

    def _read_policy(self, path: str) -> Policy:
        """On the device, with the kernels and for the layout of these settings."""
        m, learner = self.settings.model, self.settings.learner
        division = self.backend_class.dividing(learner, m.dtype)
        policy = load_policy(path, DTYPES[m.dtype], m.attention, division).to(self.device)
        if learner.liger:
            use_liger(policy.model)
        if self.packed:
            enable_packing(policy.model)
        if learner.lora.rank:
            lora.add_adapter(policy, learner.lora, self.settings.seed)
        if learner.compile:
            compile_layers(policy.model)
        return policy

    def _lay_out(self, batch: Batch) -> Layout:
        """A micro-batch on the device."""
        return (pack if self.packed else pad)(or_empty(batch), self.device)

    def connect(self, client: "GeneratorClient") -> None:
        """Open the weight transfer to the generators that `client` reaches."""
        from entroray.workers import transfer

        self._disconnect()
        base = self.settings.model.path if self.settings.transfer == transfer.ADAPTER else None
        sent = lora.outgoing(self.policy, self.backend, base)
        with self._own_stream():
            self.transfer = transfer.connect(
                self.settings.transfer,
                rank=self.rank,
                client=client,
                source=transfer.GatheredSource(sent.named, sent.backend),
                rendezvous=self.address,
                adapter=sent.adapter,
            )

    def _own_stream(self) -> AbstractContextManager[Any]:
        """After it, work goes to the CUDA stream it went to: vLLM's NCCL leaves its caller on another."""
        on_card = self.device.type == "cuda"
        return torch.cuda.stream(torch.cuda.current_stream()) if on_card else nullcontext()

    def _disconnect(self) -> None:
        if self.transfer is not None:
            self.transfer.shutdown()
        self.transfer = None

    @property
    def policy(self) -> Policy:
        return self.backend.policy

    # --- one step ---

    @TURNS.working()
    def score(self, micros: Sequence[Batch], extra: Sequence[str] = ()) -> list[Scores]:
        """Log-prob, entropy, varentropy (nats) of each micro-batch's tokens [n], the reference's too.

        `extra` names further statistics (`policy.vocabulary_statistics`), from the same pass; where tokens
        have sets, their mass and the entropy over the vocabulary come too.
        """
        self.backend.train(False)
        with torch.no_grad():
            return [self._score(micro, extra) for micro in micros]

    def use_threads(self, number: int) -> None:
        """Compute with `number` CPU threads from the next micro-batch on; called while another runs."""
        self.threads = number

    def _take_threads(self) -> None:
        TURNS.count += 1  # this begins a micro-batch
        if self.threads is not None and self.threads != torch.get_num_threads():
            torch.set_num_threads(self.threads)  # of the thread that calls

    def _score(self, micro: Batch, extra: Sequence[str]) -> Scores:
        self._take_threads()
        layout = self._lay_out(micro)
        mass = (MASS,) if micro.kept else ()
        stats = self.backend.forward(layout, (*self.objective.statistics, *extra, *mass))
        return self._columns(micro, layout, stats)

    @torch.no_grad()
    def _columns(self, micro: Batch, layout: Layout, stats: Mapping[str, Tensor]) -> Scores:
        """`stats` of a forward pass and the reference's log-probs, [n] of the tokens of `micro`."""
        scored = {name: x.detach() for name, x in stats.items()}
        if self.reference is not None:
            scored["ref_logprobs"] = self.reference.forward(layout)["logprobs"]
        return {k: v.float().cpu().numpy()[: len(micro.response_ids)] for k, v in scored.items()}

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
        return self._update(micros, objective, lr, None)

    def score_and_update(
        self, micros: Sequence[tuple[Batch, Tokens]], objective: Objective, lr: float | None = None
    ) -> tuple[dict[str, float], list[Scores]]:
        """`update` of tokens without scores, and the scores of each micro-batch, from its forward pass."""
        scores: list[Scores] = []
        return self._update(micros, objective, lr, scores), scores

    @TURNS.working(proof=True)
    def _update(
        self,
        micros: Sequence[tuple[Batch, Tokens]],
        objective: Objective | None,
        lr: float | None,
        scores: list[Scores] | None,
    ) -> dict[str, float]:
        if objective is not None:
            self.objective = objective
        if lr is not None:
            self.backend.set_base_lr(lr)
        self.backend.train(True)
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        sums = dict.fromkeys(("loss", "tokens", "ratio_max", "entropy", *SUMS), zero)
        for index, (batch, tokens) in enumerate(micros):
            self.backend.backward(self._loss(batch, tokens, sums, scores), last=index == len(micros) - 1)
        done = self.backend.step()
        self.updated |= not done["skipped"]
        return dict(zip(sums, torch.stack([*sums.values()]).tolist(), strict=True)) | done

    def _loss(
        self, batch: Batch, tokens: Tokens, sums: dict[str, Tensor], scores: list[Scores] | None
    ) -> Tensor:
        """This micro-batch's part of the update's loss; what it counts is added to `sums`.

        If it was not scored before, its scores are appended to `scores`.
        """
        self._take_threads()
        empty = batch.num_rows == 0
        layout = self._lay_out(batch)
        mass = (MASS,) if batch.kept and scores is not None else ()
        stats = self.backend.forward(layout, (*self.objective.statistics, *mass))
        if scores is not None:
            scores.append(self._columns(batch, layout, stats))
            tokens = tokens if empty else with_scores(tokens, scores[-1])
        # ZeRO 3 gathers once for each output with a gradient: these must be the same on every rank
        nothing = sum((x[:0].sum() for x in stats.values() if x.requires_grad), start=torch.zeros(()))
        if empty:
            return nothing
        live = corrected(self.objective, with_live_statistics(tokens_on(tokens, self.device), stats))
        loss = self.objective.loss(live) / self.objective.denominator(tokens.counts)
        add_sums(sums, live, loss, *activity_inside(self.objective, live))
        return loss + nothing

    # --- weights ---

    def sync(self, version: int | None = None) -> "Delivery | None":
        """Send the weights as `version`; returns what rank 0 sent and what every engine acknowledged.

        Without `version`, send those last sent once more; None if an update has changed them since.
        """
        if version is None and self.updated:
            return None
        self.version = self.version if version is None else version
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the sender reads on streams that do not wait for the optimizer's
        self._return_memory()
        with self._own_stream():
            delivery = self.transfer.client.deliver(self.version, self.transfer.send_weights)
        self._return_memory()
        self.updated = False
        return delivery

    def _return_memory(self) -> None:
        """Give the card back its cached memory: an engine may be about to fill it."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Log-prob (nats, T=1) of every token but the first."""
        ids = np.asarray(token_ids, dtype=np.int32)
        one, rest = np.array([1], dtype=np.int32), np.array([len(ids) - 1], dtype=np.int32)
        return self.score([Batch(ids[:1], one, ids[1:], rest, np.ones(1, np.float32))])[0][
            "logprobs"
        ].tolist()

    def export(self, folder: str) -> None:
        """Write the policy to `folder` in Hugging Face format, or its adapter (rank 0; all ranks gather)."""
        how, base = self.settings.learner.lora, self.settings.model.path
        self._write(self.policy, Path(folder), base if how.rank and how.export == "adapter" else None)

    def _write(self, policy: Policy, folder: Path, base: str | None = None) -> None:
        """Rank 0 keeps what goes into one file, the others nothing."""
        out = lora.outgoing(policy, self.backend, base)
        gathered = ((name, out.backend.gather(p)) for name, p in out.named)
        try:
            if self.rank == 0:
                out.write(folder, gathered)
        finally:
            for _ in gathered:  # the others take part, also where the disk refuses what was gathered before
                pass

    def save(self, folder: str) -> dict[str, Fingerprint]:
        """Weights, moments, schedule and random state into `folder`; every rank writes its own part.

        Returns size and hash of every file that this rank wrote, which is on the disk then.
        """
        learner, also = self.settings.learner, lambda: self._write_anchor(Path(folder, REFERENCE))
        return rank_checkpoint.save_part(Path(folder), self.rank, learner, self.backend, also)

    def _write_anchor(self, folder: Path) -> None:
        if self.anchored and self.reference:
            self._write(self.reference.policy, folder)

    def load(self, folder: str) -> None:
        """Go on from what `save` wrote, whatever its ranks and their stage of ZeRO were."""
        s = self.settings
        if wrong := checkpoint.damage(Path(folder), self.rank, s.learner.ranks):
            raise PreflightError(
                f"{folder} is damaged ({wrong}): delete its {checkpoint.MARKER}, and run.resume=auto takes "
                "the one before"
            )
        rank_checkpoint.load_part(Path(folder), self.rank, s.seed, self.backend)
        anchored = Path(folder, REFERENCE)
        self.anchored = self.reference is not None and anchored.is_dir()
        if self.anchored:
            self.reference.close()
            self.reference = None  # before another is read
            self.reference = self._freeze(str(anchored))

    def stop(self) -> None:
        """Leave the gang in order, so that no rank waits for another that is gone."""
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
