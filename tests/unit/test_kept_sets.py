"""Sets that tokens are drawn from: how they are written, the head over them in float64, their travels."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from entroray.errors import InfrastructureError
from entroray.kept_sets import KeptSets, encode
from entroray.metrics.step import step_metrics
from entroray.observe.token_records import record_table
from entroray.policy import head, kept_head
from entroray.policy.head import Readout
from entroray.policy.kept_head import kept_stats
from entroray.policy.model import or_empty
from entroray.policy.vocabulary_statistics import named
from entroray.rollout.branch_points import branch_off
from entroray.rollout.replay import _plain, _rollout
from entroray.rollout.splice import cut, join, observation, openings
from entroray.train.batching import assemble, tokens_of
from entroray.types import Group, MaskReason, Prompt, Rollout, SamplerNotes, TopTokens, Verdict

V = 23
SETS = [[0, 5, 22], [7], [], list(range(V)), [3, 4], [1, 2, 3, 9, 11, 20], [2, 6]]
"""Of seven tokens: of one token, of none, of all."""


def written(sets, vocabulary=V):
    return KeptSets.of([*map(len, sets)], [encode(np.array(s, np.int64), vocabulary) for s in sets])


def read(kept):
    token, ids = kept.members()
    return [ids[token == t].tolist() for t in range(len(kept.sizes))]


def test_a_set_is_written_as_ids_or_as_bits_whichever_is_shorter():
    ids = np.arange(0, 64, 2)
    assert encode(ids[:4], 64).tolist() == [0, 2, 4, 6] and encode(ids[:4], 64).dtype == np.uint16
    assert encode(ids, 64).tolist() == [0x5555] * 4 and encode(ids, 65_536).tolist() == ids.tolist()
    assert encode(ids, 65_537).dtype == np.int32
    most = encode(np.arange(152_000), 152_000)
    assert most.nbytes == 19_000 and len(encode(np.arange(4750), 152_000)) == 4750
    kept = written([range(40), [1, 69_999], [], range(0, 70_000, 3)], 70_000)
    assert kept.data.nbytes == 42 * 4 + 8752
    assert read(kept) == [[*range(40)], [1, 69_999], [], [*range(0, 70_000, 3)]]


def test_sets_are_cut_put_together_and_kept_as_json():
    kept = written(SETS)
    assert read(kept) == SETS and kept.words.tolist() == [2, 1, 0, 2, 2, 2, 2]
    chosen = kept.take(np.array([3, 2, 0]))
    assert read(KeptSets.joined([chosen, KeptSets.none(2), kept.take(np.array([5]))])) == [
        SETS[3], [], SETS[0], [], [], SETS[5],
    ]  # fmt: skip
    again = KeptSets.from_plain(json.loads(json.dumps(kept.plain())))
    assert read(again) == SETS and again.data.dtype == kept.data.dtype
    assert all(np.array_equal(getattr(again, n), getattr(kept, n)) for n in ("sizes", "words", "data"))
    large = written([range(0, 150_000, 3)], 150_000)
    assert len(json.dumps(large.plain())) < 26_000, "a bit for each token of the vocabulary, in base 64"
    assert kept.hold(np.array([5, 7, 9, 0, 4, 20, 6])) and not kept.hold(np.array([4, 7, 9, 0, 4, 20, 6]))


def case(dtype=torch.float64, d=4):
    g = torch.Generator().manual_seed(2)
    noise = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)
    ids = torch.tensor([22, 7, 9, 17, 3, 11, 2])
    temperature = (noise(7).abs() + 0.5).to(dtype)
    return noise(7, d), noise(V, d), noise(V), ids, temperature


def brute(hidden, weight, bias, ids, temperature, readout, names=()):
    """Token by token, over a mask of the vocabulary; zeros where there is no set."""
    z = (hidden * readout.hidden) @ weight.T + bias
    z = z * readout.scale if readout.softcap is None else readout.softcap * torch.tanh(
        z * readout.scale / readout.softcap
    )  # fmt: skip
    rows = []
    for t, members in enumerate(SETS):
        logp = (z[t, members] / temperature[t]).log_softmax(-1) if members else z[t, :0]
        safe = logp.clamp(min=-1e4)
        entropy = -(logp.exp() * safe).sum()
        varentropy = (logp.exp() * (safe + entropy) ** 2).sum()
        own = logp[members.index(int(ids[t]))] if members else logp.sum()
        further = [named(name)(logp[None])[0] if members else logp.sum() for name in names]
        rows.append(torch.stack([own, entropy, varentropy, *further]))
    return torch.stack(rows, 1)


READOUTS = [Readout(), Readout(hidden=0.5, scale=-0.6, softcap=0.9)]
NAMES = ("mean_logprob", "max_logprob", "mean_discriminator", "nucleus_entropy:0.7", "top_entropy:2")
NAMES += ("plausible_logmass:0.3",)
DRAWN = torch.tensor([bool(s) for s in SETS])


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize(("members", "gathered"), [(1 << 22, 1 << 20), (5, 8), (1, 1)])
def test_values_and_gradients_are_those_of_the_renormalised_set(monkeypatch, readout, members, gathered):
    monkeypatch.setattr(kept_head, "MEMBERS", members)
    monkeypatch.setattr(kept_head, "GATHERED", gathered)
    hidden, weight, bias, ids, temperature = case()
    given, plain = ([x.clone().requires_grad_() for x in (hidden, weight, bias)] for _ in range(2))
    ours = kept_stats(*given[:2], ids, temperature, written(SETS), NAMES, bias=given[2], readout=readout)
    columns = torch.stack([*ours.values()])
    theirs = brute(*plain, ids, temperature, readout, NAMES)
    assert [*ours] == [*head.TokenStats._fields, *NAMES] and columns[:, ~DRAWN].isnan().all()
    torch.testing.assert_close(columns[:, DRAWN], theirs[:, DRAWN], rtol=1e-10, atol=1e-12)
    sent = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    sent[2], sent[:, ~DRAWN] = 0.0, 0.0  # varentropy has no gradient
    assert not ours["varentropy"].requires_grad
    torch.where(sent != 0, columns * sent, 0.0).sum().backward()
    (theirs * sent).sum().backward()
    for mine, other in zip(given, plain, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-12)


def test_gradients_over_sets_pass_finite_differences():
    hidden, weight, bias, ids, temperature = case(d=3)
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]

    def f(h, w, b):
        stats = kept_stats(h, w, ids, temperature, written(SETS), ("top_entropy:2",), bias=b)
        return tuple(stats[n][DRAWN] for n in ("logprobs", "entropy", "top_entropy:2"))

    assert torch.autograd.gradcheck(f, inputs, atol=1e-7)


def test_a_set_of_one_token_says_0_and_moves_nothing():
    hidden, weight, _, _, temperature = (x[1:2] if len(x) == 7 else x for x in case())
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    stats = kept_stats(hidden, weight, torch.tensor([7]), temperature, written([[7]]), NAMES)
    assert all(x.tolist() == [0.0] for x in stats.values())
    (stats["logprobs"] + stats["entropy"]).sum().backward()
    assert hidden.grad.tolist() == [[0.0] * 4] and not weight.grad.any()


def test_a_logit_of_minus_infinity_is_an_outcome_of_probability_0():
    hidden, weight, bias, ids, temperature = case()
    bias[[5, 20]] = -torch.inf
    given = [x.clone().requires_grad_() for x in (hidden, weight)]
    ours = kept_stats(*given, ids, temperature, written(SETS), bias=bias)
    theirs = brute(hidden, weight, bias, ids, temperature, READOUTS[0])
    columns = torch.stack([*ours.values()])
    torch.testing.assert_close(columns[:, DRAWN], theirs[:, DRAWN], rtol=1e-10, atol=1e-12)
    (ours["logprobs"] + ours["entropy"])[DRAWN].sum().backward()
    assert given[0].grad.isfinite().all() and not given[1].grad[[5, 20]].any()


def test_over_the_whole_vocabulary_it_is_the_head_itself_and_both_are_measured():
    hidden, weight, bias, ids, temperature = case()
    whole = head.token_stats(hidden, weight, ids, temperature, bias=bias)
    full = written([range(V)] * 7)
    ours = kept_stats(hidden, weight, ids, temperature, full, ("kept_mass",), bias=bias)
    for name in head.TokenStats._fields:
        torch.testing.assert_close(ours[name], whole[name], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours["kept_mass"], torch.ones(7, dtype=torch.float64))
    cut = kept_stats(hidden, weight, ids, temperature, written(SETS), ("kept_mass",), bias=bias)
    torch.testing.assert_close(cut["vocabulary_entropy"], whole["entropy"])
    p = ((hidden @ weight.T + bias) / temperature[:, None]).softmax(-1)
    mass = torch.stack([p[t, s].sum() for t, s in enumerate(SETS)])
    torch.testing.assert_close(cut["kept_mass"][DRAWN], mass[DRAWN])
    names = ("vocabulary_entropy", "kept_mass")  # an objective may ask for them where nothing is cut
    uncut = head.token_stats(hidden, weight, ids, temperature, names, bias=bias)
    torch.testing.assert_close(uncut["vocabulary_entropy"], whole["entropy"])
    torch.testing.assert_close(uncut["kept_mass"], torch.ones(7, dtype=torch.float64))


def test_the_entropy_over_the_vocabulary_has_its_gradient_where_it_is_asked_for():
    hidden, weight, bias, ids, temperature = case()
    found = []
    for kept in (written(SETS), written([range(V)] * 7)):
        h = hidden.clone().requires_grad_()
        stats = kept_stats(h, weight, ids, temperature, kept, ("vocabulary_entropy",), bias=bias)
        found += torch.autograd.grad(stats["vocabulary_entropy"].sum(), h)
    torch.testing.assert_close(*found)
    assert found[0].any() and not stats["kept_mass"].requires_grad


def test_tokens_that_nothing_is_sent_back_to_are_skipped(monkeypatch):
    hidden, weight, bias, ids, temperature = case()
    seen = []
    of = kept_head._slope
    note = lambda ctx, z, part, *rest: seen.append(part.tokens.tolist()) or of(ctx, z, part, *rest)
    monkeypatch.setattr(kept_head, "_slope", note)
    stats = kept_stats(hidden.requires_grad_(), weight, ids, temperature, written(SETS), bias=bias)
    (stats["logprobs"][[1, 4, 6]] * torch.tensor([1.0, 0.0, 2.0])).sum().backward()
    assert seen == [[6]] and hidden.grad.any(1).tolist() == [False] * 6 + [True]


def test_a_pass_over_sets_without_gradients_has_the_same_bits_wherever_the_weight_lies():
    hidden, weight, bias, ids, temperature = case(torch.float32)
    with torch.no_grad():
        scored = kept_stats(hidden, weight, ids, temperature, written(SETS), bias=bias)
    weight.requires_grad_()
    again = kept_stats(hidden.requires_grad_(), weight, ids, temperature, written(SETS), bias=bias)
    assert all(torch.equal(scored[n][DRAWN], again[n][DRAWN]) for n in scored)
    kept = weight.detach().clone()
    weight.data.fill_(torch.nan)
    weight.data = kept  # as ZeRO-3 does
    again["logprobs"][DRAWN].sum().backward()
    assert weight.grad.isfinite().all() and weight.grad.any()


def test_bf16_weights_have_fp32_logits_and_gradients_summed_in_fp32():
    n = 4000
    hidden = torch.full((n, 2), 0.03125, dtype=torch.bfloat16)
    weight = torch.tensor([[0.0, 0.0], [1.0, 1.0078125]], dtype=torch.bfloat16).requires_grad_()
    kept = written([[0, 1]] * n, 2)
    stats = kept_stats(hidden, weight, torch.ones(n, dtype=torch.long), torch.ones(n), kept)
    z = 0.03125 * 2.0078125
    assert stats["logprobs"].dtype == torch.float32
    assert stats["logprobs"][0].item() == pytest.approx(-np.log1p(np.exp(-z)), abs=1e-7)
    stats["logprobs"].sum().backward()
    one = 0.03125 * (1 - 1 / (1 + np.exp(-z)))
    assert weight.grad[1, 0].item() == pytest.approx(n * one, rel=1 / 256)  # in bf16 it would stop at 4


def rollout(sets, ids, notes=None, **fields):
    n = len(sets)
    own = {"kept": written(sets), "notes": notes} | fields
    zero, logp = np.zeros(n, np.int32), np.full(n, -0.5, np.float32)
    return Rollout("q", np.array(ids, np.int32), logp, zero, "", 1.0, 99, **own)


def test_pieces_of_a_response_keep_their_sets_and_what_nobody_drew_has_none():
    r = rollout(SETS[3:6], [0, 4, 9])
    assert read(cut(r, 2).kept) == SETS[3:5]
    told = observation(r, [8, 8], MaskReason.TOOL)
    assert told.kept is None and read(join(r, told).kept) == [*SETS[3:6], [], []]
    assert read(join(told, r).kept) == [[], [], *SETS[3:6]]
    assert join(told, told).kept is None
    branch = branch_off(r, 0, 1, rollout([[7]], [7]))
    assert read(branch.kept) == [SETS[3], [7]] and branch.observed.tolist() == [1, -1]
    top = TopTokens(np.array([[5, 6]], np.int32), np.array([[0.5, 0.4]], np.float32))
    assert [o.kept for o in openings(replace(cut(r, 1), top_tokens=top))] == [None, None]


def test_a_replayed_rollout_keeps_its_sets_in_a_checkpoint():
    r = rollout(SETS[3:6], [0, 4, 9])
    again = _rollout(json.loads(json.dumps(_plain(r))))
    assert read(again.kept) == SETS[3:6] and again.replayed
    older = _plain(replace(r, kept=None))
    del older["kept"]
    assert _rollout(older).kept is None


def grouped(*rollouts):
    return Group(Prompt("q", "", (1, 2), ""), rollouts, tuple(Verdict(1.0, True) for _ in rollouts))


def test_a_batch_and_its_pieces_carry_the_sets_of_their_rows():
    group = grouped(rollout(SETS[:2], [0, 7]), rollout(SETS[3:6], [0, 4, 9]), rollout(SETS[6:], [2]))
    batch = assemble([group])
    assert read(batch.kept) == [*SETS[:2], *SETS[3:]]
    first, empty = batch.cut([np.array([2, 0]), np.array([], np.int64)])
    assert read(first.kept) == [SETS[6], *SETS[:2]] and len(empty.kept.sizes) == 0
    assert read(or_empty(empty).kept) == [[1]] and or_empty(first) is first
    plain = assemble([grouped(replace(rollout([[1]], [1]), kept=None))])
    assert plain.kept is None and or_empty(plain.cut([np.array([], np.int64)])[0]).kept is None


def test_a_token_drawn_without_its_set_stops_the_run_and_an_inserted_one_does_not():
    column = lambda *x: np.array(x, np.float32)
    inserted = SamplerNotes(column(1, 1), column(1, 1), column(1, np.nan))
    assert read(assemble([grouped(rollout([[1, 2], []], [1, 5], inserted))]).kept) == [[1, 2], []]
    with pytest.raises(InfrastructureError, match=r"sampler\.top_p and sampler\.top_k"):
        assemble([grouped(rollout([[1, 2]], [1]), replace(rollout([[1]], [1]), kept=None))])


def test_records_and_metrics_say_size_and_mass_and_the_entropy_before_the_cut():
    column = lambda *x: np.array(x, np.float32)
    notes = SamplerNotes(column(2.25, 9, 2.5), column(1, 1, 1), column(1, np.nan, 1))
    group = grouped(rollout([[1, 2, 3], [], [4]], [1, 5, 4], notes))
    scores = {n: column(0.5, np.nan, 0.0) for n in ("logprobs", "entropy", "varentropy")}
    whole = {"vocabulary_entropy": column(2.0, 9.0, 3.0), "kept_mass": column(0.5, np.nan, 0.75)}
    tokens = tokens_of([group], [torch.ones(1)], scores | whole, 0)
    rows = record_table(1, [group], tokens).to_pylist()
    assert [r["kept_size"] for r in rows] == [3, None, 1]
    assert [r["kept_mass"] for r in rows] == [0.5, None, 0.75]
    for name in ("logprob_old", "entropy", "varentropy"):
        assert [r[name] for r in rows] == [0.5, None, 0.0]
    assert [r["vocabulary_entropy"] for r in rows] == [2.0, None, 3.0]
    found = step_metrics([group], tokens)
    assert (found["kept/size"], found["kept/alone"], found["kept/mass"]) == (2.0, 0.5, 0.625)
    assert (found["entropy/mean"], found["entropy/vocabulary"]) == (0.25, 2.5)
    assert found["sampler/gap"] == 0.5, "the sampler's own entropy is over the vocabulary"
    bare = grouped(replace(group.rollouts[0], kept=None))
    tokens = tokens_of([bare], [torch.ones(1)], scores, 0)
    assert not any(name.startswith("kept/") for name in step_metrics([bare], tokens))
    assert record_table(1, [bare], tokens)["kept_size"].null_count == 3
