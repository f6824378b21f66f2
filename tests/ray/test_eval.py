"""`entroray eval` on a real engine: exact entropies, CoT-decoding by transformers too, a comparison."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from entroray.cli.eval import of_run
from entroray.evaluation.cot_decoding import words
from entroray.metrics import token_entropy
from entroray.metrics.answer_confidence import answer_span
from entroray.policy.tokenizer import load_tokenizer
from entroray.types import Prompt
from entroray.wiring import dataset
from tests.ray.stack import FinishedRun, entroray

SETTINGS = [
    *("rollout.max_tokens=12", "sampler.temperature=0.8", "evaluate.prompts=6", "evaluate.samples=8"),
    *("generator.threads=1", "reward.judge.extract=response"),
]
"""The whole response is the answer, so that a model that has hardly learnt has answers too."""
PATHS = 4


@pytest.fixture(scope="module")
def trained(finished_run: FinishedRun) -> list[str]:
    """What makes `eval` read the exported model of the run, with the run's own settings."""
    folder = finished_run.folder
    return [f"--config={folder}/config.yaml", f"model.path={folder}/model", *SETTINGS]


@pytest.fixture(scope="module")
def found(trained: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    folder = tmp_path_factory.mktemp("eval")
    said = entroray("eval", f"--out={folder}/found.json", *trained, f"evaluate.cot={PATHS}", "evaluate.k=[3]")
    return json.loads((folder / "found.json").read_text()), folder, said


@pytest.fixture(scope="module")
def read(finished_run: FinishedRun) -> tuple[Any, Any, dataset.Dataset]:
    """(model, tokenizer, data) as transformers and the data's own code read them."""
    folder = str(finished_run.folder / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    config = of_run(finished_run.folder / "config.yaml", SETTINGS)
    return model, tokenizer, dataset.read_dataset(config, tokenizer)


@pytest.fixture(scope="module")
def heldout(read: tuple[Any, Any, dataset.Dataset]) -> tuple[Any, Any, Sequence[Prompt]]:
    """The same with the held-out prompts alone."""
    return read[0], read[1], read[2].split.heldout


def test_an_evaluation_says_all_it_should(found: tuple[dict[str, Any], Path, str]) -> None:
    result, folder, said = found
    assert result["prompts"] == 6 and result["samples"] == 8 and result["failed"] == {}
    assert {"greedy", "pass@1", "pass@3", "pass^3", "maj@2", "avg@8", "cot/surest"} <= result.keys()
    assert 0 <= result["greedy"] <= 1 and result["pass@1"] <= result["pass@2"] <= result["pass@8"]
    assert set(result["calibration"]) == {"consistency", "logprob", "gap"}
    assert len(result["each"]["id"]) == len(set(result["each"]["id"])) == 6
    assert result["cot"]["paths"] == 6 * PATHS and sum(result["cot"]["lost"].values()) < 6 * PATHS
    of_set = result["sets"]["sums"]
    assert (of_set["samples"], of_set["prompts"], of_set["max_tokens"]) == (4, 12, 40)
    assert "sums: chain_sum, 12 prompts x 4 samples" in said and "avg@4" in of_set["intervals"]
    assert "pass^k" in said and "CoT-decoding" in said and "AUROC" in said
    page = (folder / "found.html").read_text()
    assert page.count("<svg") >= 5 and "Most frequent high-entropy tokens" in page and "src=" not in page


def test_entropies_are_those_of_the_whole_distribution_at_the_temperature(
    found: tuple[dict[str, Any], Path, str], read: tuple[Any, Any, dataset.Dataset]
) -> None:
    """Of a set too, whose top-p of 0.9 cuts what is drawn and not what is measured."""
    result, (model, tokenizer, data) = found[0], read
    prompts = {p.text: p for p in (*data.split.heldout, *data.sets["sums"].prompts)}
    names = {words(tokenizer).name(i): i for i in range(len(tokenizer))}
    of_set = result["sets"]["sums"]["responses"]
    assert result["responses"] and of_set
    for response, temperature in [*((r, 0.8) for r in result["responses"]), *((r, 0.7) for r in of_set)]:
        before = prompts[response["prompt"]].token_ids
        ids = [names[name] for name, _ in response["tokens"]]
        exact, _ = token_entropy(logits(model, before, ids), temperature)
        np.testing.assert_allclose([h for _, h in response["tokens"]], exact, atol=1e-3)
        assert 0.01 < float(exact.mean()) < 5


def test_an_adapter_that_peft_saved_is_evaluated_with_its_bases_tokenizer(
    trained: list[str], read: tuple[Any, Any, dataset.Dataset], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    base, tokenizer, data = read
    low = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(base), low)
    adapted.save_pretrained(tmp_path / "adapter")
    assert not list(tmp_path.glob("adapter/tokenizer*"))
    own = [f"model.path={tmp_path}/adapter", "evaluate.prompts=2", "evaluate.samples=2"]
    entroray("eval", "--heldout", f"--out={tmp_path}/found.json", trained[0], *SETTINGS[:2], *own)
    result = json.loads((tmp_path / "found.json").read_text())
    prompts = {p.text: p.token_ids for p in data.split.heldout}
    names, gaps = {words(tokenizer).name(i): i for i in range(len(tokenizer))}, []
    for response in result["responses"]:
        before, ids = prompts[response["prompt"]], [names[name] for name, _ in response["tokens"]]
        noted = [h for _, h in response["tokens"]]
        exact, of_base = (token_entropy(logits(m, before, ids), 0.8)[0].numpy() for m in (adapted, base))
        np.testing.assert_allclose(noted, exact, atol=1e-3)
        gaps.append(np.abs(noted - of_base).max())
    assert max(gaps) > 0.01, "the adapter is there"


def test_gaps_are_those_of_the_model_on_each_greedy_path(
    found: tuple[dict[str, Any], Path, str], heldout: tuple[Any, Any, Sequence[Prompt]]
) -> None:
    """CoT-decoding once more, by transformers: top tokens, greedy, p(1) - p(2) over the answer."""
    result, (model, tokenizer, prompts) = found[0], heldout
    text, expected = words(tokenizer).text, []
    for prompt in prompts[:6]:
        first = logits(model, prompt.token_ids, [0])[0].topk(PATHS).indices.tolist()
        for token in first:
            ids = followed(model, prompt.token_ids, token, words(tokenizer).ends, 12)
            top = logits(model, prompt.token_ids, ids).softmax(-1).topk(2).values.numpy()
            span = answer_span(ids, text(ids).strip() or None, text)
            if isinstance(span, range):
                expected.append(
                    float((top[span.start : span.stop, 0] - top[span.start : span.stop, 1]).mean())
                )
    bins = result["calibration"]["gap"]
    assert sum(bins["count"]) == result["cot"]["located"] == len(expected)
    counted, _ = np.histogram(expected, bins["edges"])
    assert counted.tolist() == bins["count"]
    means = [m * n for m, n in zip(bins["confidence"], bins["count"], strict=True) if n]
    assert sum(means) == pytest.approx(sum(expected), abs=1e-3)


def logits(model: Any, before: tuple[int, ...], ids: list[int]) -> torch.Tensor:
    """[L, V] that each of `ids` was drawn from."""
    with torch.no_grad():
        return model(torch.tensor([[*before, *ids]])).logits[0, len(before) - 1 : -1].double()


def followed(model: Any, before: tuple[int, ...], token: int, ends: frozenset[int], most: int) -> list[int]:
    ids = [token]
    while ids[-1] not in ends and len(ids) < most:
        ids.append(int(logits(model, before, [*ids, 0])[-1].argmax()))
    return ids


@pytest.mark.slow
def test_two_evaluations_of_one_model_tie_and_greedy_alone_is_allowed(
    found: tuple[dict[str, Any], Path, str], trained: list[str]
) -> None:
    result, folder, _ = found
    greedy = [*trained, "sampler.temperature=0"]
    greedy += ["+generator.engine.logprobs_mode=raw_logprobs"]
    entroray("eval", f"--out={folder}/greedy.json", f"--html={folder}/page.html", *greedy)
    other = json.loads((folder / "greedy.json").read_text())
    assert other["samples"] == 1 and other["pass@1"] == other["greedy"] == result["greedy"]
    assert "entropy" not in other and (folder / "page.html").exists()
    said = entroray("eval", "--compare", f"{folder}/found.json", f"{folder}/greedy.json")
    assert "+0.000 [+0.000 +0.000]" in said and "6 prompts" in said
