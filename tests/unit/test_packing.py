"""Rows laid end to end: layout, attention, gradients, plans, and which models are padded instead."""

import inspect
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import varlen

from entroray.config import LearnerConfig, Model
from entroray.errors import PreflightError
from entroray.objective import build_objective
from entroray.policy import packing, proof
from entroray.policy.microbatches import plan_packed
from entroray.policy.model import EMPTY, Policy, pad
from entroray.policy.packing import pack
from entroray.types import Batch
from entroray.wiring import actors, compose, reused_actors
from entroray.wiring.parts import build_parts
from entroray.workers import learner_rank
from entroray.workers.learner_rank import LearnerRank, LearnerSettings
from entroray.workers.roles import LearnerRole
from tests.families import models
from tests.unit.test_families import batch

CPU = torch.device("cpu")
ints = lambda *xs: np.array(xs, dtype=np.int32)


# --- layout ---


def test_rows_lie_end_to_end_with_positions_of_their_own():
    """Prompts 7 and 8 9, responses 1 2 and 3, at temperatures 0.5 and 2."""
    b = Batch(ints(7, 8, 9), ints(1, 2), ints(1, 2, 3), ints(2, 1), np.array([0.5, 2.0], np.float32))
    layout = pack(b, CPU)
    assert layout.ids.tolist() == [[7, 1, 2, 8, 9, 3]]
    assert layout.source.tolist() == [0, 1, 4] and layout.targets.tolist() == [1, 2, 3]
    assert layout.temperature.tolist() == [0.5, 0.5, 2.0]
    assert layout.further["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]]
    for side in "qk":
        bounds = layout.further[f"cu_seq_lens_{side}"]
        assert bounds.tolist() == [0, 3, 6] and bounds.dtype == torch.int32
        assert layout.further[f"max_length_{side}"] == 3


def test_the_empty_micro_batch_of_a_rank_is_packed_too():
    assert pack(EMPTY, CPU).ids.shape == (1, 2)


# --- models ---

PADDED = {"gemma2": "softcap", "stablelm": "keep rows apart", "nemotron": "keep rows apart"}
"""Families that cannot be packed, and what their reason says."""
PACKED = [name for name in models.FAMILIES if name not in PADDED]


def statistics_and_gradients(model, b: Batch, lay) -> dict[str, torch.Tensor]:
    policy = Policy(model).train()
    if lay is pack:
        packing.enable_packing(policy.model)
    stats = policy(lay(b, CPU))
    (stats["logprobs"].sum() + stats["entropy"].square().sum()).backward()
    return {k: v.detach() for k, v in stats.items()} | {n: p.grad for n, p in policy.model.named_parameters()}


@pytest.mark.parametrize("name", PACKED)
def test_packed_rows_have_the_values_and_gradients_of_padded_ones(name):
    """In float64, longer than the window, one row of which nothing but its last token is the response."""
    b = batch(models.PROMPT_TOKENS, 4, 21)
    padded, packed = (statistics_and_gradients(models.build(name).double(), b, lay) for lay in (pad, pack))
    for key, wanted in padded.items():
        torch.testing.assert_close(
            packed[key], wanted, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_checkpointed_layers_are_told_where_rows_begin():
    b = batch(20, 12)
    model = models.build("qwen3").double()
    model.gradient_checkpointing_enable(every_n_layers=2)
    again, once = (statistics_and_gradients(m, b, pack) for m in (model, models.build("qwen3").double()))
    for key, wanted in once.items():
        torch.testing.assert_close(again[key], wanted, rtol=0, atol=0)


def saved(config, tmp_path) -> str:
    config.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("name", [*PADDED, "qwen3", "exaone4"])
def test_a_model_whose_attention_no_kernel_has_is_padded(name, tmp_path):
    why = proof.why_not_packed(saved(models.configuration(name), tmp_path), "sdpa", torch.float32, CPU)
    assert PADDED.get(name, "") in why and bool(why) == (name in PADDED)


@pytest.mark.parametrize("name", ["JambaConfig", "MambaConfig"])
def test_a_model_with_states_that_pass_from_row_to_row_is_padded(name, tmp_path):
    import transformers

    path = saved(getattr(transformers, name)(), tmp_path)
    assert "keep rows apart" in proof.why_not_packed(path, "sdpa", torch.float32, CPU)


@pytest.mark.parametrize(
    ("attention", "dtype", "said"),
    [("eager", torch.bfloat16, "model.attention=eager"), ("sdpa", torch.float32, "model.dtype=float32")],
)
def test_a_card_packs_in_16_bits_with_torchs_own_attention(attention, dtype, said):
    assert said in proof.why_not_packed("none", attention, dtype, torch.device("cuda"))


def test_a_packed_model_reads_one_row_that_has_no_bounds_and_refuses_two_side_by_side():
    model, ids = models.build("llama"), models.text()[None]
    wanted = model(input_ids=ids).logits
    packing.enable_packing(model)
    torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="side by side"):
        model(input_ids=ids.expand(2, -1))


@pytest.mark.parametrize(
    ("bounds", "window", "batched"),
    [
        ((0, 6), None, True),
        ((0, 3, 6), None, True),
        ((0, 3, 6), 3, True),
        ((0, 3, 6), 2, False),
        ((0, 2, 6), None, False),
    ],
)
def test_rows_of_one_length_are_a_batch_of_torchs_causal_kernel(monkeypatch, bounds, window, batched):
    taken = []
    plain = packing._side_by_side
    monkeypatch.setattr(packing, "_side_by_side", lambda *given: taken.append(1) or plain(*given))
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 6, 8, generator=draw) for n in (4, 2, 2))
    longest = max(b - a for a, b in pairwise(bounds))
    at = torch.tensor(bounds, dtype=torch.int32)
    asked = {"cu_seq_lens_q": at, "max_length_q": longest, "sliding_window": window}
    found, _ = packing.attend(nn.Module(), q, k, v, None, **asked)
    rows = [x[0].transpose(0, 1) for x in (q, k, v)]
    wanted = packing._row_by_row(rows, at, longest, None, window - 1 if window else -1)
    torch.testing.assert_close(found[0], wanted, rtol=0, atol=1e-6)
    assert bool(taken) == batched


@pytest.mark.parametrize("asked", [{"softcap": 50.0}, {"s_aux": torch.zeros(2)}, {"is_causal": False}])
def test_attention_that_asks_for_more_is_an_error(asked):
    q = torch.zeros(1, 2, 3, 8)
    bounds = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="no kernel"):
        packing.attend(nn.Module(), q, q, q, None, cu_seq_lens_q=bounds, max_length_q=3, **asked)


def test_no_mask_stands_between_right_padded_rows_and_torchs_causal_kernel(monkeypatch):
    """A mask would repeat keys for each head, and torch would not take its flash kernel."""
    model = models.build("qwen3")
    model.set_attn_implementation("sdpa")
    real, seen = nn.functional.scaled_dot_product_attention, []

    def spy(*tensors, attn_mask=None, is_causal=False, enable_gqa=False, **rest):
        seen.append((attn_mask, is_causal, enable_gqa, tensors[1].shape[1]))
        return real(*tensors, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa, **rest)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    Policy(model)(pad(batch(20, 9), CPU))
    assert seen == [(None, True, True, 1)] * 2


# --- the kernel, which no CPU has: its call ---


def by_rows(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """What varlen_attn computes, whose parameters these are."""
    assert cu_seq_q is cu_seq_k and max_q == max_k and cu_seq_q.dtype == torch.int32
    assert window_size[1] == 0 and enable_gqa == (query.shape[1] != key.shape[1])
    return packing._row_by_row((query, key, value), cu_seq_q, max_q, scale, window_size[0])


def test_the_kernel_is_called_as_torch_declares_it(monkeypatch):
    calls, declared = [], inspect.signature(varlen.varlen_attn)

    def stub(*args, **kwargs):
        declared.bind(*args, **kwargs)
        calls.append(kwargs | {"tensors": [tuple(x.shape) for x in args[:3]], "longest": args[5:]})
        return by_rows(*args, **kwargs)

    stub.__signature__ = declared
    monkeypatch.setattr(varlen, "varlen_attn", stub)
    draw = lambda n: torch.randn(200, n, 16)
    bounds = torch.tensor([0, 70, 71, 200], dtype=torch.int32)
    packing._varlen((draw(4), draw(2), draw(2)), bounds, 129, 0.25, -1)
    packing._varlen((draw(4), draw(4), draw(4)), bounds, 129, None, 7)
    shapes = [(200, 4, 16), (200, 2, 16), (200, 2, 16)]
    first = {"scale": 0.25, "window_size": (-1, 0), "enable_gqa": True}
    assert calls[0] == first | {"tensors": shapes, "longest": (129, 129)}
    assert calls[1]["window_size"] == (7, 0) and not calls[1]["enable_gqa"] and calls[1]["scale"] is None


def test_a_torch_without_the_word_for_shared_heads_is_not_told_it(monkeypatch):
    """As torch 2.11."""

    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        return query

    monkeypatch.setattr(varlen, "varlen_attn", older)
    q = torch.randn(3, 4, 8)
    assert packing._varlen((q, q[:, :2], q[:, :2]), ints(0, 3), 3, None, -1) is q


TEXT = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, hidden_size=64)


def test_a_kernel_that_agrees_with_sdpa_is_taken(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", by_rows)
    packing.check_kernel(TEXT, torch.bfloat16, CPU)


def across_rows(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    whole = torch.tensor([0, len(query)], dtype=torch.int32)
    return packing._row_by_row((query, key, value), whole, max_q, scale, window_size[0])


def wider(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    window = window_size[0] + 1 if window_size[0] >= 0 else -1
    return packing._row_by_row((query, key, value), cu_seq_q, max_q, scale, window)


def without_gradient(*args, **kwargs):
    out = by_rows(*args, **kwargs)
    return out.detach() + 0.5 * (out - out.detach())


@pytest.mark.parametrize("kernel", [across_rows, wider, without_gradient])
def test_a_kernel_that_sees_other_tokens_or_has_other_gradients_is_not(monkeypatch, kernel):
    if kernel is without_gradient:
        kernel.__signature__ = inspect.signature(by_rows)
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    with pytest.raises(ValueError, match="from SDPA"):
        packing.check_kernel(TEXT, torch.bfloat16, CPU)


# --- plans ---


@given(st.lists(st.integers(1, 60), max_size=50), st.integers(1, 4), st.integers(1, 200))
def test_a_packed_plan_holds_every_row_once_with_equal_counts_within_the_budget(lengths, ranks, budget):
    lengths = np.array(lengths, dtype=np.int64)
    plan = plan_packed(lengths, ranks=ranks, token_budget=budget)
    assert sorted(np.concatenate([[], *(rows for rank in plan for rows in rank)])) == [*range(len(lengths))]
    assert len(plan) == ranks and len({len(rank) for rank in plan}) == 1
    for rows in (rows for rank in plan for rows in rank):
        assert len(rows) == 1 or lengths[rows].sum() <= budget
    micros = sum(map(len, plan))
    for one, other in pairwise([rows for rank in plan for rows in rank if len(rows)]):
        assert micros <= ranks or lengths[one].sum() + lengths[other].sum() > budget / 2


def test_rows_of_all_lengths_fill_a_budget_that_padding_would_leave_half_empty():
    lengths = np.array([100, 60, 50, 40, 30, 20])
    (micros,) = plan_packed(lengths, ranks=1, token_budget=100)
    assert [sorted(lengths[rows].tolist()) for rows in micros] == [[100], [40, 60], [20, 30, 50]]
    split = plan_packed(lengths, ranks=2, token_budget=160)
    assert [sum(lengths[rows].sum() for rows in rank) for rank in split] == [160, 140]


def test_where_an_even_spread_does_not_fit_rows_stay_as_first_fit_has_them():
    lengths = np.array([6, 5, 5, 4, 4, 3, 3])  # spread to 3: 6+4, 5+4+..., one of them above 10
    (micros,) = plan_packed(lengths, ranks=1, token_budget=10)
    assert [int(lengths[rows].sum()) for rows in micros] == [10, 10, 10]


def test_many_rows_are_packed_nearly_full():
    lengths = np.random.default_rng(0).integers(200, 4000, 2048)
    plan = plan_packed(lengths, ranks=8, token_budget=16384)
    assert sum(map(len, plan)) * 16384 <= 1.05 * lengths.sum() + 8 * 16384
    loads = [sum(int(lengths[rows].sum()) for rows in rank) for rank in plan]
    assert max(loads) <= 1.02 * min(loads)


def test_the_learner_plans_as_its_ranks_lay_rows_out(monkeypatch):
    """Rows of 5, 3, 3 and 5 tokens and a budget of 8: 5 and 3 lie end to end, and pad to 10."""
    monkeypatch.setattr(actors.cluster, "on_one_node", lambda: False)
    m = actors.Actors(compose.load_config([])[0], None, SimpleNamespace(handles=[0]), None, None, {})  # type: ignore[arg-type]
    lengths = np.array([4, 2, 2, 4], dtype=np.int32)
    b = Batch(np.zeros(4, np.int32), np.ones(4, np.int32), np.zeros(12, np.int32), lengths, np.ones(4))
    sums = {}
    for packed in (False, True):
        role = replace(m, facts={"packed": packed}).learner_role()
        assert isinstance(role, LearnerRole)
        ((micros,),) = replace(role, token_budget=8)._plans(b, np.zeros(4, np.int64), 1)
        sums[packed] = [int((1 + lengths[rows]).sum()) for rows in micros]
    assert sums == {False: [5, 5, 6], True: [8, 8]}


# --- what a rank chooses ---


def rank(pack: str, path: str, **learner) -> LearnerRank:
    settings = LearnerSettings(LearnerConfig(pack=pack, **learner), Model(path=path), "plasma", 0, 1)
    made = LearnerRank(0, settings, build_objective("grpo"), None)
    made.device = CPU
    return made


@pytest.mark.parametrize(("how", "packed"), [("auto", False), ("never", False), ("always", True)])
def test_a_cpu_pads_unless_it_is_told_to_pack(how, packed, tmp_path):
    one = rank(how, saved(models.configuration("qwen3"), tmp_path))
    said = one._choose_layout()
    assert one.packed == packed and said == ("end to end" if packed else "padded")
    assert one._lay_out(batch(9, 5)).ids.shape == ((1, 14) if packed else (2, 9))


def test_a_rank_that_must_pack_and_cannot_is_refused(tmp_path):
    one = rank("always", saved(models.configuration("gemma2"), tmp_path))
    with pytest.raises(PreflightError, match=r"learner\.pack=always: .*softcap.*learner\.pack=auto"):
        one._choose_layout()
    assert not one.packed


def test_a_card_falls_back_to_padding_and_says_why(monkeypatch):
    one = rank("auto", "none")
    one.device = torch.device("cuda")
    assert one._choose_layout() == "padded, for model.dtype=float32, and the kernel computes in 16 bits"
    monkeypatch.setattr(learner_rank, "why_not_packed", lambda *_: "")
    assert one._choose_layout() == "end to end" and one.packed


def test_a_rank_decides_anew_only_for_what_may_decide_otherwise(monkeypatch):
    """The driver plans by what it heard at the start."""
    chosen, read = [], []
    one = rank("auto", "first")
    monkeypatch.setattr(one, "_choose_layout", lambda: chosen.append(one.settings.learner.pack))
    monkeypatch.setattr(one, "_load_model", read.append)
    one.reset(replace(one.settings, seed=7), one.objective)
    one.anchor("kept")
    assert not chosen and one.anchored and read == ["first", "kept"]
    one.reset(replace(one.settings, learner=LearnerConfig(pack="always")), one.objective)
    assert chosen == ["always"] and not one.anchored and read[-1] == "first"
    one.reset(replace(one.settings, model=Model(path="other")), one.objective)
    assert chosen == ["always", "always"]


def test_a_rank_keeps_its_layout_and_its_kernels_for_life():
    """A lab starts other actors for a cell that asks for others."""
    config, _ = compose.load_config([])
    parts = build_parts(config)
    before = reused_actors.lasting(config, parts)
    for name, value in (("pack", "always"), ("liger", True)):
        other = replace(config, learner=replace(config.learner, **{name: value}))
        assert reused_actors.lasting(other, parts) != before
