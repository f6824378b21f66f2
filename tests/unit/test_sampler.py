"""Samplers without an engine: rules by hand, weights exactly, what is refused, what the records say."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from entroray import rows
from entroray.config import Config
from entroray.errors import ConfigError, PreflightError
from entroray.metrics import step_metrics, token_entropy
from entroray.metrics.catalogue import family_metrics
from entroray.observe import token_records
from entroray.policy.tokenizer import byte_tokenizer
from entroray.rollout import reshape, temperature_rules
from entroray.train.batching import assemble, tokens_of
from entroray.types import Group, Prompt, Rollout, SamplerNotes, Verdict
from entroray.wiring import preflight, sampler
from entroray.wiring.parts import build_parts
from tests.composed import configured
from tests.documented import matches

NAMES = sorted(path.stem for path in (rows.conf_folder() / "sampler").glob("*.yaml"))


def logits(rows: int = 40, words: int = 300) -> torch.Tensor:
    """From nearly uniform to nearly certain."""
    noise = torch.randn(rows, words, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return noise * torch.linspace(0.01, 12, rows, dtype=torch.float64)[:, None]


def test_entropy_and_varentropy_in_few_passes_are_the_exact_ones() -> None:
    z = logits()
    z[3, :200], z[4, 1:] = -math.inf, -math.inf
    for exact, quick in zip(token_entropy(z, 1.0), reshape.measure_entropy(z.float()), strict=True):
        assert torch.allclose(quick.double(), exact, atol=2e-5)


def test_temperature_by_entropy_is_a_bounded_ramp() -> None:
    h = torch.tensor([0.0, 0.5, 1.0, 1.5, 9.0])
    factor = temperature_rules.by_entropy(h, h, minimum=0.8, maximum=1.4, start=0.5, full=1.5).factor
    assert factor.tolist() == pytest.approx([0.8, 0.8, 1.1, 1.4, 1.4])
    cooling = temperature_rules.by_entropy(h, h, minimum=1.4, maximum=0.8, start=0.5, full=1.5).factor
    assert cooling.tolist() == pytest.approx([1.4, 1.4, 1.1, 0.8, 0.8])


def test_quadrants_have_four_corners_and_a_middle() -> None:
    h = torch.tensor([0.1, 3.0, 1.0, 3.0, 1.0, 0.1, 3.0])
    v = torch.tensor([0.1, 0.1, 3.0, 3.0, 2.0, 2.0, 2.0])
    choice = temperature_rules.quadrants(h, v)
    assert choice.factor.tolist() == pytest.approx([0.0, 1.3, 1.2, 2.0, 1.0, 1.0, 1.0])
    assert choice.unsure is not None and choice.unsure.tolist() == [False, True] + [False] * 5
    warm = temperature_rules.quadrants(
        h, v, certain=1.2, torn=1.2
    )  # two corners of one value are still two corners
    assert warm.factor.tolist() == pytest.approx([1.2, 1.3, 1.2, 2.0, 1.0, 1.0, 1.0])


def test_shaping_divides_and_takes_the_likeliest_where_the_factor_is_0() -> None:
    z = logits()
    factor = torch.linspace(0.5, 2, len(z), dtype=torch.float64)
    factor[[2, 7]] = 0
    shaped = reshape.reshape_logits(z.clone(), factor).log_softmax(-1)
    drawn = factor > 0
    assert torch.allclose(shaped[drawn], (z / factor[:, None]).log_softmax(-1)[drawn])
    assert shaped[[2, 7]].argmax(-1).tolist() == z[[2, 7]].argmax(-1).tolist()
    assert shaped[[2, 7]].exp().amax(-1).tolist() == [1.0, 1.0] and shaped.exp().sum(-1).allclose(factor**0)


@pytest.mark.parametrize("name", NAMES)
def test_the_weighted_estimate_is_the_plain_one_but_for_what_cannot_be_drawn(name: str) -> None:
    z, f = logits(), torch.randn(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    factor = reshape.build_rule(configured(f"sampler={name}").sampler.rule)(*token_entropy(z, 1.0)).factor
    pi, b = z.softmax(-1), reshape.reshape_logits(z.clone(), factor).softmax(-1)
    weighted = torch.where(b > 0, b * (pi / b) * f, 0.0).sum(-1)
    missing = torch.where(factor == 0, 1 - pi.amax(-1), 0.0)  # all but the likeliest
    assert ((weighted - (pi * f).sum(-1)).abs() <= missing * f.abs().max() + 1e-12).all()
    assert (bool((missing > 0).any())) == (name == "quadrants")
    assert missing.max() < 0.1  # nats: with H below 0.3 the likeliest has more than nine tenths


def reshapes(config: Config) -> bool:
    return sampler.reshapes(build_parts(config), config.generator.engine, config.rollout.second)


@pytest.mark.parametrize("name", NAMES)
def test_every_sampler_says_what_it_does(name: str) -> None:
    config = configured(f"sampler={name}", "objective=dapo")
    said = sampler.describe_sampler(build_parts(config).rule, config.sampler.insert)
    assert config.sampler.rule["fn"] in said
    assert reshapes(config) == (name != "fixed")
    assert config.objective["correction"]["fn"] == ("none" if name == "fixed" else "truncated_importance")
    drawn = sampler.training_draw(config.sampler, config.rollout, build_parts(config), byte_tokenizer())
    assert drawn.notes == bool(drawn.rule) == (name != "fixed") and not drawn.greedy().notes


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["sampler.temperature=0"], r"^sampler\.temperature \D*0\b"),
        (
            ["sampler.top_k=5", "+generator.engine.speculative_config={a: b}"],
            r"^sampler\.top_p=1 .*sampler\.top_k=5 .*engine\.speculative_config.*sampler\.top_k=0$",
        ),
        (
            ["+generator.engine.logprobs_mode=raw_logprobs"],
            r"generator\.engine\.logprobs_mode=raw_logprobs: .*processed_logprobs",
        ),
        (
            ["sampler=by_entropy", "objective.correction.fn=none"],
            r"objective\.correction .*`none`: .*truncated_importance.*sampler=fixed",
        ),
        (
            ["sampler=by_entropy", "+generator.engine.speculative_config={a: b}"],
            r": .*generator\.engine\.speculative_config.*sampler=fixed",
        ),
        (
            ["+generator.engine.logits_processors=['mine:Own']"],
            r"generator\.engine\.logits_processors=.*mine:Own.*objective\.correction .*`none`: ",
        ),
    ],
)
def test_what_training_refuses_evaluation_may_do(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        configured(*overrides)
    configured(*overrides, training=False)


def test_a_row_that_weighs_by_the_sampler_needs_no_correction() -> None:
    configured("objective=dppo", "sampler=by_entropy", "objective.correction.fn=none")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["sampler.rule.fn=quadrant"], r"sampler\.rule .*`quadrant`: .*`quadrants`"),
        (["sampler=by_entropy", "sampler.rule.maximum=-1"], r"sampler\.rule: `by_entropy\.maximum` .*0.*-1"),
        (["sampler=by_entropy", "sampler.rule.full=0.2"], r"sampler\.rule: full=0\.2 .*start=0\.3"),
        (
            ["sampler=quadrants", "sampler.rule.low_entropy=4.0"],
            r"sampler\.rule: .*low_entropy=4 .*high_entropy=",
        ),
        (
            ["sampler=by_entropy", "sampler.insert='?'"],
            r"sampler\.insert='\?' .*sampler=quadrants.*sampler\.insert=null",
        ),
        (["sampler.temperature=-1"], r"^sampler\.temperature=-1.* 0$"),
        (["sampler.temperature=0.009"], r"^sampler\.temperature=0\.009: .*0\.01\b"),
    ],
)
def test_a_sampler_that_makes_no_sense_is_refused_everywhere(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        configured(*overrides, training=False)


def test_a_processor_of_ones_own_is_weighed_and_must_be_reported() -> None:
    own = ["+generator.engine.logits_processors=['mine:Own']"]
    corrected = [*own, "objective.correction={fn: truncated_importance}"]
    assert reshapes(configured(*corrected))
    for option in ("logprobs_mode=raw_logprobs", "speculative_config={a: b}"):
        with pytest.raises(ConfigError, match=rf"generator\.engine\.{option.partition('=')[0]}\b"):
            configured(*corrected, f"+generator.engine.{option}")
    assert not reshapes(configured("+generator.engine.logits_processors=[]"))


def test_a_temperature_above_0_is_at_least_the_engines() -> None:
    configured("sampler.temperature=0.01")
    with pytest.raises(ConfigError, match=r"control\.temperature .*sampler\.temperature .*0\.005 .*0\.01"):
        configured("control=temperature_band", "control.temperature.low=0.005")


@pytest.mark.parametrize("text", ["Wait", "é", "<|end|>", ""])
def test_an_inserted_text_must_be_one_token(text: str, tmp_path: Path) -> None:
    where = f"model.warm_start.cache={tmp_path}"
    config = configured("sampler=quadrants", where, "sampler.insert='?'")
    assert preflight.sampler(config) == f"inserts '?', token {byte_tokenizer().encode('?')[0]}"
    config.sampler.insert = text
    with pytest.raises(PreflightError, match=r"^sampler\.insert='.*'\?'$"):
        preflight.sampler(config)


def drawn(correct: list[float]) -> Group:
    """A group whose first rollout was reshaped, with its second token inserted."""
    ids, logp = np.array([5, 6, 7], np.int32), np.array([-1.0, 0.0, -0.5], np.float32)
    column = lambda *x: np.array(x, np.float32)
    notes = SamplerNotes(column(0.5, 2.75, 0.25), column(1, 0.5, 2), column(1.25, np.nan, 0.0))
    zero = np.zeros(3, np.int32)
    plain = Rollout("q", ids, logp, zero, "", 1.0, 3)
    rollouts = (replace(plain, notes=notes), plain)
    return Group(Prompt("q", "", (1,), ""), rollouts, tuple(Verdict(c, bool(c)) for c in correct))


def test_an_inserted_token_is_an_observation_and_the_records_say_how_each_was_drawn() -> None:
    group = drawn([1.0, 0.0])
    n = len(assemble([group]).response_ids)
    scores = {k: np.full(n, 0.5, np.float32) for k in ("logprobs", "entropy", "varentropy")}
    tokens = tokens_of([group], [torch.ones(2)], scores, 0)
    assert tokens.mask.tolist() == [True, False, True, True, True, True] and tokens.counts.tokens == 5
    assert tokens.temperature.tolist() == [1.0] * 6
    rows = token_records.record_table(1, [group], tokens).to_pylist()
    assert [r["mask_reason"] for r in rows] == [None, "inserted", None, None, None, None]
    assert [r["sampler_temperature"] for r in rows] == [1.25, None, 0.0, 1.0, 1.0, 1.0]
    assert [r["sampler_entropy"] for r in rows] == [0.5, 2.75, 0.25, None, None, None]
    found = step_metrics([group], tokens)
    said = {name: value for name, value in found.items() if name.startswith("sampler/")}
    assert said == pytest.approx(
        {
            "sampler/inserted": 1 / 3,
            "sampler/gap": 2.25,
            "sampler/temperature": 0.625,
            "sampler/likeliest": 0.5,
        }
    )
    assert all(matches(name, family_metrics("sampler")) for name in said) and len(said) == 4
