"""The tiled head against a float64 brute force: values, gradients, -inf, peak memory, invariance to tiles."""

import re
from pathlib import Path

import pytest
import torch

from entroray.errors import ConfigError
from entroray.policy import head
from entroray.policy.vocabulary_statistics import named
from tests.cublas import products_with_fp32_sums


def token_stats(*inputs, **options):
    return head.TokenStats(**head.token_stats(*inputs, **options))


def brute(hidden, weight, ids, temperature):
    logp = ((hidden @ weight.T) / temperature[:, None]).log_softmax(-1)
    p = logp.exp()
    safe = logp.masked_fill(p == 0, 0.0)
    entropy = -(p * safe).sum(-1)
    varentropy = (p * (-safe - entropy[:, None]) ** 2).sum(-1)
    return logp.gather(-1, ids[:, None])[:, 0], entropy, varentropy


def case(dtype=torch.float64, n=37, d=16, v=101, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(v, d, generator=g, dtype=torch.float64).to(dtype)
    ids = torch.randint(0, v, (n,), generator=g)
    temperature = torch.rand(n, generator=g, dtype=torch.float64).to(dtype) + 0.5
    return hidden, weight, ids, temperature


@pytest.mark.parametrize("tile_elements", [1, 101 * 5, 1 << 20])
def test_values_equal_the_brute_force_whatever_the_tile(tile_elements):
    inputs = case()
    for ours, theirs in zip(token_stats(*inputs, tile_elements=tile_elements), brute(*inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def narrow(monkeypatch, columns):
    monkeypatch.setattr(head, "COLUMNS", columns)


@pytest.mark.parametrize("elements", [12, 40, 800])
def test_rows_are_put_together_of_tiles_of_columns(monkeypatch, elements):
    """101 columns by 4: the last tile is narrower, and each holds 3, 10 or 200 rows."""
    narrow(monkeypatch, 4)
    inputs = case()
    assert head._tile((37, 16), 101, torch.device("cpu"), False, elements).columns < 101
    for ours, theirs in zip(token_stats(*inputs, tile_elements=elements), brute(*inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradients_are_put_together_of_tiles_of_columns(monkeypatch):
    narrow(monkeypatch, 2)
    hidden, weight, ids, temperature = case(n=5, d=4, v=7)
    bias = torch.linspace(-1, 1, 7, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    for readout in (head.PLAIN, head.Readout(scale=-0.6, softcap=0.9)):

        def f(h, w, b, readout=readout):
            stats = token_stats(h, w, ids, temperature, bias=b, readout=readout, tile_elements=4)
            return stats.logprobs, stats.entropy

        assert torch.autograd.gradcheck(f, inputs, atol=1e-7)


@pytest.mark.parametrize("impossible", [[0, 1, 2, 3], [2, 3], [4, 6, 8], [1, 8]])
def test_tiles_of_minus_infinite_logits_are_outcomes_of_probability_zero(monkeypatch, impossible):
    """A tile of two columns may hold none, one or two possible tokens, the first tile too."""
    narrow(monkeypatch, 2)
    hidden, weight, _, temperature = case(n=4, d=3, v=9)
    possible = [i for i in range(9) if i not in impossible]
    bias = torch.zeros(9, dtype=torch.float64)
    bias[impossible] = -torch.inf
    given = [x.clone().requires_grad_() for x in (hidden, weight)]
    ids = torch.tensor(possible[-1:] * 4)
    ours = token_stats(*given, ids, temperature, bias=bias, tile_elements=4)
    place = torch.full((4,), len(possible) - 1)
    for mine, theirs in zip(ours, brute(hidden, weight[possible], place, temperature), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    (ours.logprobs.sum() + ours.entropy.sum()).backward()
    wide = weight[possible].clone().requires_grad_()
    logprobs, entropy, _ = brute(hidden, wide, place, temperature)
    (logprobs.sum() + entropy.sum()).backward()
    torch.testing.assert_close(given[1].grad[possible], wide.grad, rtol=1e-10, atol=1e-12)
    assert not given[1].grad[impossible].any() and given[0].grad.isfinite().all()


def test_rows_that_nothing_is_sent_back_to_are_skipped(monkeypatch):
    hidden, weight, ids, temperature = case()
    sent = torch.zeros(37, dtype=torch.float64)
    sent[[3, 20]] = torch.tensor([1.5, -2.0], dtype=torch.float64)
    seen = []
    of = head._Slopes.of
    monkeypatch.setattr(head._Slopes, "of", lambda self, z, *rest: seen.append(len(z)) or of(self, z, *rest))
    for name in ("logprobs", "entropy"):
        given = [x.clone().requires_grad_() for x in (hidden, weight)]
        (getattr(token_stats(*given, ids, temperature), name) * sent).sum().backward()
        plain = [x.clone().requires_grad_() for x in (hidden, weight)]
        exact = dict(zip(head.TokenStats._fields, brute(*plain, ids, temperature), strict=True))
        (exact[name] * sent).sum().backward()
        for ours, theirs in zip(given, plain, strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    assert seen == [2, 2]


def test_a_pass_without_gradients_has_the_same_bits(monkeypatch):
    """The first ratio between what was scored and the update is then exactly 1."""
    narrow(monkeypatch, 16)
    hidden, weight, ids, temperature = case(torch.float32)
    with torch.no_grad():
        scored = token_stats(hidden, weight, ids, temperature, tile_elements=160)
    again = token_stats(hidden.requires_grad_(), weight, ids, temperature, tile_elements=160)
    assert all(torch.equal(a, b) for a, b in zip(scored, again, strict=True))


def test_the_weight_may_lie_elsewhere_when_the_gradient_is_made():
    """ZeRO-3 releases the parameter behind the forward pass, and gathers it into another storage."""
    hidden, weight, ids, temperature = case()
    weight.requires_grad_()
    loss = token_stats(hidden, weight, ids, temperature).logprobs.sum()
    kept = weight.detach().clone()
    weight.data.fill_(torch.nan)
    weight.data = kept
    (gradient,) = torch.autograd.grad(loss, weight)
    plain = kept.clone().requires_grad_()
    brute(hidden, plain, ids, temperature)[0].sum().backward()
    torch.testing.assert_close(gradient, plain.grad, rtol=1e-10, atol=1e-12)


def test_float32_agrees_with_float64_to_rounding():
    inputs = case()
    single = token_stats(*(x.float() if x.is_floating_point() else x for x in inputs))
    for ours, theirs in zip(single, brute(*inputs), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-5)


def test_gradients_of_logprob_and_entropy_pass_finite_differences():
    hidden, weight, ids, temperature = case(n=5, d=4, v=7)
    hidden.requires_grad_(), weight.requires_grad_()

    def f(h, w):
        stats = token_stats(h, w, ids, temperature, tile_elements=14)
        return stats.logprobs, stats.entropy

    assert torch.autograd.gradcheck(f, (hidden, weight), atol=1e-7)


READ_OUTS = [
    head.Readout(hidden=0.25),
    head.Readout(scale=1.7),
    head.Readout(softcap=1.3),
    head.Readout(hidden=3.0, scale=-0.6, softcap=0.9),
]


def read_out(hidden, weight, bias, temperature, readout):
    """Logits as the books write them: of Gemma 2, Cohere, MiniCPM3 and Phi at once."""
    logits = ((hidden * readout.hidden) @ weight.T + bias) * readout.scale
    capped = logits if readout.softcap is None else readout.softcap * torch.tanh(logits / readout.softcap)
    return (capped / temperature[:, None]).log_softmax(-1)


@pytest.mark.parametrize("readout", READ_OUTS)
@pytest.mark.parametrize("tile_elements", [1, 14, 1 << 20])
def test_bias_scale_and_softcap_are_computed_tile_by_tile(readout, tile_elements):
    hidden, weight, ids, temperature = case(n=9, d=4, v=7)
    bias = torch.linspace(-1, 1, 7, dtype=torch.float64)
    logp = read_out(hidden, weight, bias, temperature, readout)
    got = token_stats(
        hidden, weight, ids, temperature, bias=bias, readout=readout, tile_elements=tile_elements
    )
    entropy = -(logp.exp() * logp).sum(-1)
    variance = (logp.exp() * (logp + entropy[:, None]) ** 2).sum(-1)
    wanted = logp.gather(-1, ids[:, None])[:, 0], entropy, variance
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("readout", READ_OUTS)
def test_gradients_reach_states_weight_and_bias_through_scale_and_softcap(readout):
    hidden, weight, ids, temperature = case(n=5, d=4, v=7)
    bias = torch.linspace(-1, 1, 7, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]

    def f(h, w, b):
        stats = head.token_stats(
            h, w, ids, temperature, ("top_entropy:3",), bias=b, readout=readout, tile_elements=14
        )
        return stats["logprobs"], stats["entropy"], stats["top_entropy:3"]

    assert torch.autograd.gradcheck(f, inputs, atol=1e-7)


NAMES = ("mean_logprob", "max_logprob", "mean_discriminator", "nucleus_entropy:0.7", "top_entropy:3",
         "plausible_logmass:0.2")  # fmt: skip


def literal(p: torch.Tensor) -> dict[str, float]:
    """The same statistics of one distribution, by the book."""
    h = -(p * p.log()).sum()
    best = p.sort(descending=True).values
    crossing = int((best.cumsum(0) < 0.7).sum()) + 1
    of = lambda q: float(-(q / q.sum() * (q / q.sum()).log()).sum())
    return {
        "mean_logprob": float(p.log().mean()),
        "max_logprob": float(p.max().log()),
        "mean_discriminator": float((p * p * (p.log() + h)).sum()),
        "nucleus_entropy:0.7": of(best[:crossing]),
        "top_entropy:3": of(best[:3]),
        "plausible_logmass:0.2": float(p[p >= 0.2 * p.max()].sum().log()),
    }


def test_further_statistics_equal_their_definitions_whatever_the_tile():
    hidden, weight, ids, temperature = case(n=9, d=4, v=11)
    got = head.token_stats(hidden, weight, ids, temperature, NAMES, tile_elements=22)
    for row, p in enumerate(((hidden @ weight.T) / temperature[:, None]).softmax(-1)):
        for name, value in literal(p).items():
            assert got[name][row].item() == pytest.approx(value, rel=1e-12, abs=1e-14), name


def test_further_statistics_have_their_own_gradients():
    hidden, weight, ids, temperature = case(n=3, d=4, v=7)
    hidden.requires_grad_(), weight.requires_grad_()

    def f(h, w):
        return tuple(head.token_stats(h, w, ids, temperature, NAMES, tile_elements=14).values())

    outputs = lambda h, w: (*f(h, w)[:2], *f(h, w)[3:])  # varentropy carries none
    assert torch.autograd.gradcheck(outputs, (hidden, weight), atol=1e-7)


def test_the_mass_kept_is_the_kl_of_the_renormalised():
    """-log of the mass is KL(q, p), q the kept tokens renormalised; q detached has the same gradient."""
    z = torch.randn(8, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    logp = z.log_softmax(-1)
    kept = logp.exp() >= 0.2 * logp.exp().max()
    q = torch.where(kept, logp.exp(), 0.0).detach()
    q = q / q.sum()
    kl = (q[kept] * (q[kept].log() - logp[kept])).sum()
    mass = named("plausible_logmass:0.2")(logp[None])[0]
    assert kl.item() == pytest.approx(-mass.item(), rel=1e-12)
    for a, b in zip(*(torch.autograd.grad(x, z, retain_graph=True) for x in (kl, -mass)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_impossible_tokens_leave_further_statistics_finite():
    hidden = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.5], [0.1], [-torch.inf]], dtype=torch.float64)
    got = head.token_stats(hidden, weight, torch.tensor([0]), torch.ones(1), NAMES)
    assert all(x.isfinite().all() for x in got.values())


def test_an_unknown_statistic_is_refused_by_name():
    for name in ("entropy_of_love", "nucleus_entropy", "mean_logprob:3", "named", "_entropy"):
        with pytest.raises(ConfigError, match=rf" `{name}`: .*nucleus_entropy:mass"):
            named(name)


@pytest.mark.parametrize(
    "name",
    [
        *("nucleus_entropy:abc", "nucleus_entropy:", "nucleus_entropy:nan", "nucleus_entropy:0"),
        *("nucleus_entropy:1.5", "nucleus_entropy:-1", "nucleus_entropy:0,9", "nucleus_entropy:0.9:1"),
        *("top_entropy:0", "top_entropy:2.5", "top_entropy:inf", "top_entropy:1e99", "top_entropy:-3"),
        *("plausible_logmass:2", "plausible_logmass:", "mean_logprob:", "max_logprob:0"),
    ],
)
def test_an_impossible_argument_of_a_statistic_is_a_config_error(name):
    with pytest.raises(ConfigError, match=re.escape(f"`{name}`")):
        named(name)


def test_varentropy_carries_no_gradient():
    hidden, weight, ids, temperature = case()
    stats = token_stats(hidden.requires_grad_(), weight, ids, temperature)
    assert not stats.varentropy.requires_grad and stats.entropy.requires_grad


def test_impossible_outcomes_leave_value_and_gradient_finite():
    hidden = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1e30, 0.0]], dtype=torch.float64, requires_grad=True)
    stats = token_stats(hidden, weight, torch.tensor([0, 1]), torch.full((2,), 1e-290, dtype=torch.float64))
    assert torch.isfinite(stats.entropy).all() and torch.isfinite(stats.varentropy).all()
    assert stats.logprobs[1] == 0 and stats.entropy[1] == 0  # a one-hot row
    warm = token_stats(hidden, weight, torch.tensor([0, 1]), torch.ones(2, dtype=torch.float64))
    (warm.logprobs.sum() + warm.entropy.sum()).backward()
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad[:2]).all()


def test_minus_infinite_logits_are_outcomes_of_probability_zero():
    weight = torch.tensor([[0.0], [1.0], [-float("inf")]], dtype=torch.float64)
    hidden = torch.ones(1, 1, dtype=torch.float64)
    ids, temperature = torch.tensor([1]), torch.ones(1, dtype=torch.float64)
    stats = token_stats(hidden, weight, ids, temperature)
    two = brute(hidden, weight[:2], ids, temperature)
    for ours, theirs in zip(stats, two, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_uniform_and_certain_distributions_have_the_entropies_of_the_textbook():
    weight = torch.zeros(16, 3, dtype=torch.float64)
    args = (
        torch.randn(4, 3, dtype=torch.float64),
        weight,
        torch.arange(4),
        torch.ones(4, dtype=torch.float64),
    )
    stats = token_stats(*args)
    torch.testing.assert_close(stats.entropy, torch.full((4,), 16.0).double().log())
    torch.testing.assert_close(stats.varentropy, torch.zeros(4).double())


def test_bf16_weights_give_the_log_probs_of_fp32_logits():
    """Logits of about 30 rounded to bf16 would be off by up to 1/16 nat."""
    hidden, weight, ids, temperature = case(torch.bfloat16, d=64)
    hidden, temperature = hidden * 4, torch.ones_like(temperature)
    wide = (hidden.double(), weight.double(), ids, temperature.double())
    for ours, exact in zip(token_stats(hidden, weight, ids, temperature), brute(*wide), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


def test_a_bf16_weight_is_widened_a_tile_at_a_time(monkeypatch):
    """Its gradient is summed in FP32 and rounded once."""
    narrow(monkeypatch, 32)
    widened = []
    columns = head._Logits.columns
    held = lambda w: w.untyped_storage().nbytes() // 4
    note = lambda self: (widened.append(held(w)) or (c, w) for c, w in columns(self))
    monkeypatch.setattr(head._Logits, "columns", note)
    hidden, weight, ids, temperature = case(torch.bfloat16, d=8)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    sum(brute(*exact, ids, temperature.double())[:2]).sum().backward()
    given = [x.requires_grad_() for x in (hidden, weight)]
    stats = token_stats(*given, ids, temperature, tile_elements=320)
    (stats.logprobs + stats.entropy).sum().backward()
    assert set(widened) == {32 * 8, (101 - 96) * 8}
    for ours, theirs in zip(given, exact, strict=True):
        assert ours.grad.dtype == torch.bfloat16
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-2, atol=2e-3)


def test_on_a_card_bf16_factors_of_all_products_are_summed_in_fp32(monkeypatch):
    """Those of the weight's gradient too, where kernels are not taken: statistics need whole rows."""
    monkeypatch.setattr(head, "_on_card", lambda device: True)
    asked = products_with_fp32_sums(monkeypatch)
    hidden, weight, ids, temperature = case(torch.bfloat16, d=8)
    given = [x.clone().requires_grad_() for x in (hidden, weight)]
    got = head.token_stats(*given, ids, temperature, ("mean_logprob",), tile_elements=20 * 101)
    (got["logprobs"] + got["entropy"]).sum().backward()
    narrow = torch.bfloat16, torch.bfloat16, torch.float32
    forward, backward = [("mm", *narrow)], [("mm", *narrow), ("addmm", *narrow), ("addmm", *narrow)]
    assert asked == forward * 2 + backward * 2, "two tiles, of 20 and of 17 rows"
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    sum(brute(*exact, ids, temperature.double())[:2]).sum().backward()
    for ours, theirs in zip(given, exact, strict=True):
        assert float((ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()) < 4e-3


def test_no_tokens_at_all():
    weight = torch.randn(5, 3, requires_grad=True)
    stats = token_stats(torch.empty(0, 3), weight, torch.empty(0, dtype=torch.long), torch.empty(0))
    stats.logprobs.sum().backward()
    assert stats.entropy.shape == (0,) and not weight.grad.any()


def peak_mib() -> float:
    """The most memory this process has had resident since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the high-water mark


def test_peak_memory_stays_far_below_one_logits_matrix():
    """[512, 32000] in FP32 is 62 MiB; tiles of 512 Ki elements need twice 2 MiB."""
    n, d, v = 512, 16, 32000
    h, w = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    ids, t = torch.randint(0, v, (n,)), torch.ones(n)

    def grown() -> float:
        forget_peak()
        before = peak_mib()
        token_stats(h, w, ids, t, tile_elements=1 << 19).entropy.sum().backward()
        return peak_mib() - before

    assert any(grown() < 20 for _ in range(4)), "the allocator may keep or return pages, which adds to some"
    forget_peak()
    before = peak_mib()
    h.detach() @ w.detach().T
    assert peak_mib() - before > 55, "the measure itself would see the matrix"
