"""The head's Triton kernels in Triton's interpreter: values and gradients beside float64, products asked for.

Triton reads TRITON_INTERPRET as it is imported, so these tests run in a process of their own.
"""

import json
import os
import subprocess
import sys

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("NOT TESTED: needs TRITON_INTERPRET=1 set before pytest starts", allow_module_level=True)

import torch

from entroray.policy import head, head_kernels
from tests.cublas import products_with_fp32_sums

# numpy, which interprets, warns of what lies between rows and of what is not a number
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-6}
READ_OUTS = [
    head.PLAIN,
    head.Readout(hidden=0.25),
    head.Readout(scale=1.7),
    head.Readout(softcap=1.3),
    head.Readout(hidden=3.0, scale=-0.6, softcap=0.9),
]


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    return products_with_fp32_sums(monkeypatch)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 16, two in a tile: 101 columns are four tiles, the last of one block that is not full."""
    monkeypatch.setattr(head_kernels, "BLOCK", 16)
    monkeypatch.setattr(head, "CARD_COLUMNS", 32)


def stats(hidden, weight, ids, temperature, **options):
    return head.TokenStats(**head.token_stats(hidden, weight, ids, temperature, kernels=True, **options))


def exact(hidden, weight, ids, temperature, bias=None, readout=head.PLAIN):
    """By the books, in float64; logits of -inf are outcomes of probability 0."""
    z = (hidden * readout.hidden) @ weight.T
    z = (z if bias is None else z + bias) * readout.scale
    z = z if readout.softcap is None else readout.softcap * torch.tanh(z / readout.softcap)
    logp = (z / temperature[:, None]).log_softmax(-1)
    safe = logp.masked_fill(logp.exp() == 0, 0.0)
    entropy = -(logp.exp() * safe).sum(-1)
    varentropy = (logp.exp() * (safe + entropy[:, None]) ** 2).sum(-1)
    return head.TokenStats(logp.gather(-1, ids[:, None])[:, 0], entropy, varentropy)


def case(dtype=torch.float64, n=9, d=8, v=101, seed=0):
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    hidden, weight = normal(n, d), normal(v, d)
    ids = torch.randint(0, v, (n,), generator=g)
    temperature = torch.rand(n, generator=g, dtype=torch.float64) * 2.5 + 0.05
    return hidden, weight, ids, temperature.to(torch.promote_types(dtype, torch.float32))


def wide(inputs):
    return [x.double() if x.is_floating_point() else x for x in inputs]


def close(ours, theirs, tolerance):
    for name, a, b in zip(head.TokenStats._fields, ours, theirs, strict=True):
        scale = max(1.0, float(b.detach().abs().max()) if len(b) else 1.0)
        torch.testing.assert_close(
            a.double(), b, rtol=tolerance, atol=tolerance * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(
    ("v", "dtype"), [*((v, torch.float64) for v in (1, 15, 16, 17, 33)), *((101, x) for x in TOLERANCE)]
)
def test_values_equal_float64_at_every_edge_of_blocks_and_tiles(v, dtype):
    inputs = case(dtype, v=v, n=4)
    for elements in (96, 128, None):  # tiles of three rows by 32 columns, of four, of all of the vocabulary
        got = stats(*inputs, tile_elements=elements)
        assert {x.dtype for x in got} == {torch.promote_types(dtype, torch.float32)}
        close(got, exact(*wide(inputs)), TOLERANCE[dtype])


def test_values_of_64_tokens_over_2000_with_the_blocks_of_a_card(monkeypatch):
    """One block of 4096 is wider than the vocabulary."""
    monkeypatch.undo()
    assert head_kernels.BLOCK == head.CARD_COLUMNS == 4096
    inputs = case(torch.float32, n=64, d=16, v=2000)
    close(stats(*inputs), exact(*wide(inputs)), 3e-6)


def gradients(f, inputs, sent):
    given = [x.detach().clone().requires_grad_() for x in inputs[:2]]
    got = f(*given, *inputs[2:])
    torch.autograd.backward((got.logprobs, got.entropy), sent)
    return given[0].grad, given[1].grad


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("elements", [96, None])
def test_both_gradients_equal_float64(dtype, elements):
    inputs = case(dtype)
    sent = torch.randn(2, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs = gradients(exact, wide(inputs), [*sent])
    sent = sent.to(torch.promote_types(dtype, torch.float32))
    ours = gradients(lambda *a: stats(*a, tile_elements=elements), inputs, [*sent])
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        if dtype == torch.bfloat16:  # slopes and results have 8 bits; sums are FP32
            assert float((a.double() - b).norm() / b.norm()) < 4e-3
        else:
            torch.testing.assert_close(a.double(), b, rtol=10 * TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("readout", READ_OUTS)
def test_bias_scale_and_softcap_have_the_values_and_gradients_of_finite_differences(readout):
    hidden, weight, ids, temperature = case(n=4, d=3, v=37)
    bias = torch.linspace(-1, 1, 37, dtype=torch.float64)
    close(
        stats(hidden, weight, ids, temperature, bias=bias, readout=readout),
        exact(hidden, weight, ids, temperature, bias, readout),
        1e-12,
    )
    sent = torch.randn(2, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = []
    for f in (stats, exact):
        given = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
        got = f(*given[:2], ids, temperature, bias=given[2], readout=readout)
        torch.autograd.backward((got.logprobs, got.entropy), [*sent])
        found.append([x.grad for x in given])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("possible", [[40], [0, 35, 100], [*range(64, 101)]])
def test_logits_of_minus_infinity_are_outcomes_of_probability_zero(dtype, possible):
    """Blocks and whole tiles hold no possible token, the first too."""
    hidden, weight, _, temperature = case(dtype, n=3, d=4)
    bias = torch.full((101,), -torch.inf, dtype=dtype)
    bias[possible] = 0.0
    ids, place = torch.tensor(possible[-1:] * 3), torch.full((3,), len(possible) - 1)
    tiled = lambda *a: stats(*a, bias=bias, tile_elements=96)  # four tiles
    narrow = hidden, weight[possible], place, temperature
    close(tiled(hidden, weight, ids, temperature), exact(*wide(narrow)), TOLERANCE[dtype])
    ours = gradients(tiled, (hidden, weight, ids, temperature), [torch.ones(3).to(dtype)] * 2)
    theirs = gradients(exact, wide(narrow), [torch.ones(3, dtype=torch.float64)] * 2)
    atol = 10 * TOLERANCE[dtype]
    torch.testing.assert_close(ours[0].double(), theirs[0], rtol=atol, atol=atol)
    torch.testing.assert_close(ours[1][possible].double(), theirs[1], rtol=atol, atol=atol)
    impossible = torch.ones(101, dtype=torch.bool)
    impossible[possible] = False
    assert not ours[1][impossible].any()


def test_a_token_that_is_impossible_has_a_log_prob_of_minus_infinity_and_finite_gradients():
    hidden, weight, ids, temperature = case(n=2)
    bias = torch.zeros(101, dtype=torch.float64)
    bias[ids[0]] = -torch.inf
    got = stats(hidden.requires_grad_(), weight, ids, temperature, bias=bias)
    assert got.logprobs[0] == -torch.inf and got.entropy.isfinite().all()
    got.entropy.sum().backward()
    assert hidden.grad.isfinite().all()


def test_what_is_not_a_number_stays_so():
    hidden, weight, ids, temperature = case(n=3)
    hidden[1, 0] = torch.nan
    got = stats(hidden, weight, ids, temperature)
    assert [x.isnan().tolist() for x in got] == [[False, True, False]] * 3


def test_moments_do_not_cancel_where_logits_are_large_and_close():
    """Logits of 10,000 a few nats apart: in FP32 the mean of squares less the squared mean is noise."""
    spread = torch.randn(101, generator=torch.Generator().manual_seed(3))
    weight = torch.stack([torch.full((101,), 1e4), (spread * 64).round() / 64], dim=1)
    hidden = torch.ones(2, 2)
    inputs = hidden, weight, torch.tensor([0, 100]), torch.ones(2)
    close(stats(*inputs), exact(*wide(inputs)), 3e-6)


def test_uniform_and_certain_distributions_have_the_entropies_of_the_textbook():
    hidden = torch.tensor([[0.0], [1.0]])
    weight = torch.zeros(64, 1)
    weight[7] = 200.0
    got = stats(hidden, weight, torch.tensor([7, 7]), torch.ones(2))
    torch.testing.assert_close(got.entropy, torch.tensor([64.0, 1.0]).log(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.varentropy, torch.zeros(2), rtol=0, atol=1e-6)
    assert got.logprobs[1] == 0.0


def test_no_tokens_at_all_and_none_with_a_gradient():
    weight = torch.randn(40, 3, requires_grad=True)
    none = torch.empty(0, 3), weight, torch.empty(0, dtype=torch.long), torch.empty(0)
    got = stats(*none)
    got.logprobs.sum().backward()
    assert [len(x) for x in got] == [0, 0, 0] and not weight.grad.any()
    got = stats(torch.randn(4, 3), weight, torch.arange(4), torch.ones(4))
    (got.logprobs.sum() * 0.0).backward()
    assert not weight.grad.any()


def test_rows_that_nothing_is_sent_back_to_are_skipped(monkeypatch):
    seen = []
    slopes = head_kernels.slopes
    monkeypatch.setattr(head_kernels, "slopes", lambda z, *a, **k: seen.append(len(z)) or slopes(z, *a, **k))
    inputs, sent = case(), torch.zeros(2, 9, dtype=torch.float64)
    sent[0, 2], sent[1, 7] = 1.5, -2.0
    for a, b in zip(gradients(stats, inputs, [*sent]), gradients(exact, inputs, [*sent]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert set(seen) == {2}


def test_bf16_factors_are_multiplied_with_fp32_sums_in_all_products(asked):
    """That of the weight's gradient too: of FP32 factors it would cost more than the other three."""
    inputs = case(torch.bfloat16)
    gradients(lambda *a: stats(*a, tile_elements=320), inputs, [torch.ones(9)] * 2)
    narrow = torch.bfloat16, torch.bfloat16, torch.float32
    assert asked == [("mm", *narrow)] * 4 + [("mm", *narrow), ("addmm", *narrow), ("addmm", *narrow)] * 4
    asked.clear()
    gradients(stats, case(torch.float32), [torch.ones(9)] * 2)
    assert asked == [], "FP32 weights have FP32 products"


def test_a_pass_without_gradients_has_the_same_bits():
    hidden, weight, ids, temperature = case(torch.float32)
    with torch.no_grad():
        scored = stats(hidden, weight, ids, temperature)
    again = stats(hidden.requires_grad_(), weight, ids, temperature)
    assert all(torch.equal(a, b) for a, b in zip(scored, again, strict=True))


@pytest.mark.parametrize("block", [16, 64])
def test_kernels_neither_mind_nor_touch_what_lies_behind_rows(monkeypatch, block):
    """Rows begin at multiples of 16: between them there may be anything, and behind the last is no room."""
    monkeypatch.setattr(head_kernels, "BLOCK", block)
    room, out = torch.full((4, 32), torch.nan), torch.full((4, 32), 7.0)
    z = room[:3, :21]
    z.copy_(torch.randn(3, 21, generator=torch.Generator().manual_seed(4)))
    one = torch.ones(3, 1)
    got = head_kernels.moments(z, one)
    assert got.shape == (4, -(-21 // block), 3) and got.isfinite().all()
    ids = torch.tensor([0, 20, 25])  # the last lies in other columns
    head_kernels.slopes(z, one, out[:3, :21], ids, one, one, one, one, capped=False)
    assert room[3].isnan().all() and (out[3] == 7.0).all()
    expected = -(z - 1).exp() * (1 + z)
    expected[[0, 1], [0, 20]] += 1.0
    torch.testing.assert_close(out[:3, :21], expected)


def test_further_statistics_take_the_path_of_whole_rows(monkeypatch):
    monkeypatch.setattr(head_kernels, "moments", None)
    got = head.token_stats(*case(), ("top_entropy:3",), kernels=True)
    assert got["top_entropy:3"].isfinite().all()


def test_kernels_compile_for_cards_that_are_not_here(tmp_path):
    """Of A100 and H100, as far as their assembler; four loads of 16 bytes, though rows end anywhere."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.interpreter.compiled"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == 12 and all(row["bytes"] for row in rows)
    assert {row["loads of 16 bytes"] for row in rows} == {4}
