"""What an evaluation finds, from answers whose numbers are known; its JSON, terminal, page and comparison."""

import asyncio
import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from entroray.cli import eval as command
from entroray.errors import ConfigError
from entroray.evaluation.cot_decoding import Decoding, words
from entroray.evaluation.evaluate import evaluate_policy, plan_evaluation
from entroray.metrics.catalogue import family_metrics
from entroray.observe import evaluation, evaluation_page
from entroray.policy.tokenizer import byte_tokenizer
from entroray.rollout.splice import cut, join, observation
from entroray.types import Draw, MaskReason, Prompt, Rollout, SamplerNotes, Status, TopTokens, Verdict
from entroray.wiring import sampler
from tests.composed import composed, configured
from tests.documented import matches

TOKENIZER = byte_tokenizer()
WORDS = words(TOKENIZER)
PROMPTS = [Prompt(f"p{i}", f"{i}+1=", (1,), str(i + 1)) for i in range(3)]
ANSWERS = {  # by prompt: what is sampled; the greedy answer is the first
    "p0": ["1", "1", "1", "1"],
    "p1": ["2", "3", "3", None],
    "p2": ["0", "4", "0", "3"],
}


class World:
    """Answers as told, with an entropy of 0.5 nats at the first token and 0.1 at all others."""

    def __init__(self, failing: str = ""):
        self.failing = failing

    async def sample(
        self, prompt: Prompt, seeds: Sequence[int], draw: Draw, after: Sequence[int] = ()
    ) -> list[Rollout]:
        return [self.respond(prompt, a, draw) for a in ANSWERS[prompt.id][: len(seeds)]]

    def respond(self, prompt: Prompt, answer: str | None, draw: Draw) -> Rollout:
        text = "no" if answer is None else f"so {answer}"
        ids = np.array([*TOKENIZER.encode(text), TOKENIZER.eos_token_id], np.int32)
        n = len(ids)
        entropy = np.where(np.arange(n) == 0, 0.5, 0.1).astype(np.float32)
        ranked = np.tile(np.array([ids[0], TOKENIZER.eos_token_id], np.int32), (n, 1))
        logprobs, versions = np.full(n, -0.25, np.float32), np.zeros(n, np.int32)
        return Rollout(
            prompt.id, ids, logprobs, versions, text, draw.temperature, 9,
            Status.TIMEOUT if prompt.id == self.failing else Status.OK,
            notes=SamplerNotes(entropy, 2 * entropy, np.ones(n, np.float32)) if draw.notes else None,
            top_tokens=TopTokens(ranked, np.tile(np.array([0.8, 0.1], np.float32), (n, 1))),
        )  # fmt: skip

    async def judge(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> list[Verdict]:
        return [self.verdict(prompt, r) for r in rollouts]

    def verdict(self, prompt: Prompt, rollout: Rollout) -> Verdict:
        if not rollout.status.usable:
            return Verdict(float("nan"), False, status=rollout.status)
        answer = rollout.text.removeprefix("so ") if rollout.text.startswith("so ") else None
        right = float(answer == prompt.reference)
        return Verdict(right, bool(right), answer)


def examined(failing: str = "", temperature: float = 1.0, cot: int = 0) -> dict[str, Any]:
    plan = plan_evaluation(Draw(temperature, 9, rule={"fn": "fixed"}), 4)
    how = Decoding(cot, plan.draw.greedy(2), lambda token: token in WORDS.ends) if cot else None
    found = asyncio.run(evaluate_policy(World(failing), World(), PROMPTS, plan, WORDS, how))
    asked = {"model": "runs/<x>/model", "prompts": 3, "samples": plan.samples, "temperature": temperature}
    return asked | found


FOUND = examined(cot=2)


def test_accuracies_are_those_of_the_answers() -> None:
    """Right: 4, 1 and 1 of 4 samples; greedy: p0 and p1."""
    assert FOUND["greedy"] == pytest.approx(2 / 3)
    assert FOUND["pass@1"] == FOUND["pass^1"] == FOUND["avg@4"] == pytest.approx((1 + 0.25 + 0.25) / 3)
    assert FOUND["pass@2"] == pytest.approx((1 + 0.5 + 0.5) / 3) and FOUND["pass@4"] == 1.0
    assert FOUND["pass^2"] == FOUND["pass^4"] == pytest.approx(1 / 3)
    assert FOUND["each"]["maj@4"] == [1.0, 0.0, 0.0]  # two votes for 3 against one for 2; two for 0
    assert FOUND["each"]["id"] == ["p0", "p1", "p2"]
    assert FOUND["intervals"]["greedy"] == [0.0, 1.0] and FOUND["intervals"]["pass@4"] == [1.0, 1.0]


def test_confidences_are_scored_against_correctness() -> None:
    """Agreement: 4/4 right; 1/4 right, 2/4 2/4 wrong, one silent; 2/4 1/4 2/4 wrong and 1/4 right."""
    m = FOUND["metrics"]
    square = 4 * 0 + 0.75**2 + 2 * 0.5**2 + 2 * 0.5**2 + 0.25**2 + 0.75**2
    assert m["calibration/brier_consistency"] == pytest.approx(square / 11)
    wins = 4 * 5 + 2 * 0.5  # the two right ones of 1/4 tie with one 1/4
    assert m["calibration/auroc_consistency"] == pytest.approx(wins / 30)
    assert m["calibration/auroc_logprob"] == 0.5
    bins = FOUND["calibration"]["logprob"]
    assert sum(bins["count"]) == 12 and bins["count"][11] == 12 and bins["accuracy"][11] == pytest.approx(0.5)
    assert bins["confidence"][11] == pytest.approx(np.exp(-0.25)) and bins["accuracy"][0] is None


def test_what_nobody_drew_has_no_say_in_confidence_or_entropy() -> None:
    """Two tokens of a tool, of log-prob 0, among seven: exp(-0.25) as before."""

    class Tool(World):
        async def sample(
            self, prompt: Prompt, seeds: Sequence[int], draw: Draw, after: Sequence[int] = ()
        ) -> list[Rollout]:
            drawn = await super().sample(prompt, seeds, draw)
            return [join(join(r, observation(r, [65, 66], MaskReason.TOOL)), cut(r, 0)) for r in drawn]

    plan = plan_evaluation(Draw(1.0, 9, rule={"fn": "fixed"}), 4)
    found = asyncio.run(evaluate_policy(Tool(), World(), PROMPTS, plan, WORDS))
    assert found["calibration"]["logprob"] == FOUND["calibration"]["logprob"]
    assert found["entropy"] == FOUND["entropy"] and found["positions"] == FOUND["positions"]


def test_entropy_is_the_engines_own_at_every_place() -> None:
    assert FOUND["positions"][0] == {"first": 0, "last": 0, "tokens": 12, "entropy": 0.5}
    assert [p["tokens"] for p in FOUND["positions"]] == [12, 12, 12, 11, 11]
    tokens = 11 * 5 + 3
    assert FOUND["entropy"]["entropy/mean"] == pytest.approx((12 * 0.5 + (tokens - 12) * 0.1) / tokens)
    found = FOUND["uncertain"]  # 12 of 58 tokens are at 0.5 nats: the 46.6th lies between
    assert found["above"] == pytest.approx(0.1 + 0.6 * 0.4)
    assert [(t["text"], t["count"], t["entropy"]) for t in found["tokens"]] == [("s", 11, 0.5), ("n", 1, 0.5)]
    assert "entropy" not in examined(temperature=0.0), "nothing is noted of a greedy draw"


def test_paths_of_cot_decoding_are_counted_by_what_became_of_them() -> None:
    """The second path of each prompt is an end token alone."""
    assert FOUND["cot"]["paths"] == 6 and FOUND["cot"]["located"] == 3
    assert FOUND["cot"]["lost"] == {"no_answer": 3} and FOUND["cot"]["prompts_without"] == 0
    assert FOUND["cot/surest"] == FOUND["cot/supported"] == FOUND["greedy"]
    assert FOUND["cot"]["gap_right"] == FOUND["cot"]["gap_wrong"] == pytest.approx(0.7)
    assert sum(FOUND["calibration"]["gap"]["count"]) == 3


def test_failed_answers_are_wrong_and_said_and_have_no_say_elsewhere() -> None:
    found = examined(failing="p0")
    assert found["failed"] == {"timeout": 5}, "four samples and the greedy answer"
    assert found["pass@1"] == pytest.approx((0 + 0.25 + 0.25) / 3)
    assert sum(found["calibration"]["consistency"]["count"]) == 7, "eight, of which one gave no answer"
    assert "5 timeout" in "\n".join(evaluation.lines(found))


def test_at_temperature_0_the_greedy_answer_is_the_one_sample() -> None:
    found = examined(temperature=0.0)
    assert found["pass@1"] == found["greedy"] == found["maj@1"] == found["avg@1"]
    assert [name for name in found if "@" in name] == ["pass@1", "maj@1", "avg@1"]
    assert list(found["calibration"]) == ["logprob"], "one answer always agrees with itself"


def test_every_name_is_in_the_catalogue() -> None:
    names = {*FOUND["each"], *FOUND["metrics"], *FOUND["entropy"]} - {"id"}
    assert [n for n in names if not matches(n, family_metrics("step", "details", "evaluation"))] == []
    assert [m.name for m in family_metrics("evaluation") if not any(matches(n, [m]) for n in names)] == []


class Texts(HTMLParser):
    """Every text of a page, and that all its tags are closed in order."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "br") and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_holds_the_numbers_and_needs_nothing_else(tmp_path: Path) -> None:
    page = evaluation_page.write_evaluation_page(tmp_path / "x.html", FOUND).read_text()
    read = Texts(page)
    assert read.open == [] and "<x>" not in page and "src=" not in page and "http" not in page
    said = "\n".join(read.texts)
    assert evaluation.number(FOUND, "pass@2") in said and "maj@4 0.333 [0.000 1.000]" in said
    assert "tokens 0 to 0: 0.5000 nats over 12" in said
    assert "12 answers, confidence 0.779, right 0.500" in said
    assert "3 of 6" in said and "1+1=" in said and "<|end|>" in said
    assert page.count('class="area') == 3 and page.count('class="bar') == len(
        [n for b in FOUND["calibration"].values() for n in b["count"] if n]
    )
    quiet = examined(temperature=0.0)
    assert (
        "Entropy by position"
        not in evaluation_page.write_evaluation_page(tmp_path / "y.html", quiet).read_text()
    )


def test_white_space_and_control_characters_can_be_read() -> None:
    assert evaluation_page.visible(" a\n\t\x00") == "␣a⏎⇥U+0000"


def test_what_is_kept_is_read_back_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "x.json"
    kept.write_text(evaluation.evaluation_json(FOUND))
    assert evaluation.load_evaluation(kept) == json.loads(json.dumps(FOUND))
    evaluation.show_evaluation(FOUND)
    said = capsys.readouterr().out
    assert "runs/<x>/model" in said and "k=4" in said and "avg@4 0.500 [0.250 1.000]" in said
    assert "3 of 6 paths have a gap (3 no_answer)" in said


def test_two_evaluations_are_compared_prompt_by_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [f"p{i}" for i in range(200)]
    easy = np.random.default_rng(0).random(200)
    settings = {
        "temperature": 1.0,
        "sampler": "fixed",
        "samples": 1,
        "top_p": 1.0,
        "top_k": 0,
        "max_tokens": 8,
    }
    each = {"id": ids, "pass@1": easy.tolist(), "greedy": [1.0] * 200}
    one = settings | {"model": "one", "each": each}
    more = {"id": ids[:0:-1], "pass@1": (easy[:0:-1] + 0.02).tolist(), "cot/surest": [0.0] * 199}
    other = settings | {"model": "other", "each": more}
    found = evaluation.compare(one, other)
    assert list(found) == ["pass@1"] and found["pass@1"].sign == "+"
    assert found["pass@1"].mean == pytest.approx(0.02) and found["pass@1"].low == pytest.approx(0.02)
    for name, each in (("a", one), ("b", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(each))
    assert command.main(["--compare", f"{tmp_path}/a.json", f"{tmp_path}/b.json"]) == 0
    said = capsys.readouterr().out
    assert "+0.020 [+0.020 +0.020]" in said and "199 prompts" in said
    assert "settings differ" not in said
    with pytest.raises(ConfigError, match=r"data\.task.*data\.settings.*data\.heldout"):
        evaluation.compare(one, {"each": {"id": ["q"]}})
    (tmp_path / "old.json").write_text('{"greedy": 1.0}')
    with pytest.raises(ConfigError, match=r"old\.json .*entroray eval --out="):
        evaluation.load_evaluation(tmp_path / "old.json")


def test_what_two_evaluations_asked_otherwise_is_said_under_their_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    each = {"id": ["p0", "p1"], "greedy": [1.0, 0.0]}
    one = {"model": "m", "temperature": 1.0, "samples": 8, "max_tokens": 64, "each": each}
    one |= {"top_p": 1.0, "top_k": 0}
    other = one | {"temperature": 0.8, "max_tokens": 32}
    assert evaluation.differing_settings(one, other) == ["temperature 1 and 0.8", "max_tokens 64 and 32"]
    assert evaluation.differing_settings(one, one) == []
    for name, found in (("a", one), ("b", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    assert command.main(["--compare", f"{tmp_path}/a.json", f"{tmp_path}/b.json"]) == 0
    assert "settings differ: temperature 1 and 0.8, max_tokens 64 and 32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--hmtl=x"], "^eval .* --hmtl x: .*--config FILE, --out FILE, --html FILE"),
        (["--out"], "^eval .* --out: .*--config FILE, --out FILE"),
        (["--compare", "a.json"], r"^eval --compare .*eval --out .*\['a\.json'\]"),
        (["--config=a.yaml", "--config-dir=mine"], "^eval --config .*: .*--config-dir"),
    ],
)
def test_what_the_command_does_not_know_is_refused(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        command.main(arguments)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["evaluate.k=[1,16]"], r"evaluate\.k=\[1, 16\] .*evaluate\.samples .*16"),
        (["evaluate.samples=0"], r"^evaluate\.samples=0 .*1$"),
        (["evaluate.prompts=0"], r"^evaluate\.prompts=0 .*1$"),
        (
            ["evaluate.cot=5", "+generator.engine.logprobs_mode=raw_logits"],
            r"evaluate\.cot=5 .*generator\.engine\.logprobs_mode=raw_logits .*evaluate\.cot=0",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused(values: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        configured(*values, training=False)


def test_a_runs_settings_are_read_and_checked(tmp_path: Path) -> None:
    kept = tmp_path / "config.yaml"
    OmegaConf.save(composed(), kept)
    assert command.of_run(kept, ["evaluate.cot=3"]).evaluate.cot == 3
    with pytest.raises(ConfigError, match=r"evaluate\.k="):
        command.of_run(kept, ["evaluate.k=[2]", "sampler.temperature=0"])
    with pytest.raises(ConfigError, match=r"evaluate\.cots"):
        command.of_run(kept, ["evaluate.cots=3"])


def test_entropies_are_noted_by_a_rule_that_changes_nothing() -> None:
    config = configured("sampler=by_entropy", "rollout=hotter_next_time", training=False)
    draw = sampler.evaluation_draw(config.sampler, config.rollout, config.generator.engine)
    assert draw.rule == {"fn": "fixed"} and draw.factor == 1.0 and draw.notes
    assert not draw.greedy().notes
    config.generator.engine["speculative_config"] = {"method": "ngram"}
    assert not sampler.evaluation_draw(config.sampler, config.rollout, config.generator.engine).notes
