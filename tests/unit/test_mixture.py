"""Mixtures: whose turn it is, what two parts may not share, and metrics of each part."""

import asyncio
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from entroray.cli import train
from entroray.config import Config, Part
from entroray.data.mixture import (
    BLOCK,
    Mixture,
    interleave,
    positions_by_domain,
    prompt_stream,
    without_shared,
)
from entroray.data.prompts import PromptStream
from entroray.errors import ConfigError, PreflightError
from entroray.evaluation.cot_decoding import Words
from entroray.evaluation.evaluate import accuracy_by_domain, evaluate_policy, plan_evaluation
from entroray.metrics.by_domain import domain_metrics
from entroray.metrics.catalogue import family_metrics
from entroray.observe.evaluation import lines
from entroray.policy.tokenizer import byte_tokenizer, load_tokenizer
from entroray.reward import build_verification
from entroray.train.batching import tokens_of
from entroray.types import Draw, Group, Prompt, Rollout, Verdict
from entroray.wiring import dataset, warm_start
from entroray.wiring.parts import build_parts
from tests.composed import configured
from tests.documented import matches
from tests.toy import ToyWorld


def prompts(domain: str, count: int) -> list[Prompt]:
    return [Prompt(f"{domain}{i:03d}", f"{domain} {i}", (1,), "", domain=domain) for i in range(count)]


BOTH = [*prompts("a", 7), *prompts("b", 5)]
WEIGHTS = {"a": 3.0, "b": 1.0}
WHOLE = {"a": 6, "b": 3}


def test_domains_come_by_weight_and_each_has_every_prompt_once_an_epoch() -> None:
    drawn = list(islice(Mixture(BOTH, WEIGHTS, seed=1), 3 * BLOCK))
    share = Counter(p.domain for p in drawn)["a"] / len(drawn)
    assert share == pytest.approx(0.75, abs=0.03)
    for name, count in (("a", 7), ("b", 5)):
        own = [p.id for p in drawn if p.domain == name]
        assert own == [p.id for p in islice(PromptStream(prompts(name, count), seed=1), len(own))]


def test_a_mixture_resumes_exactly_wherever_it_stood() -> None:
    whole = [p.id for p in islice(Mixture(BOTH, WEIGHTS, seed=3), 2 * BLOCK + 50)]
    for position in (0, 1, 40, BLOCK - 1, BLOCK, 2 * BLOCK + 7):
        resumed = Mixture(BOTH[::-1], WEIGHTS, seed=3, position=position)
        assert [p.id for p in islice(resumed, 20)] == whole[position : position + 20]
        assert resumed.at(5).id == whole[5] and resumed.position == position + 20


def test_the_order_of_domains_is_that_of_every_machine() -> None:
    """Pinned, as that of a single task is."""
    assert "".join(p.domain for p in islice(Mixture(BOTH, WEIGHTS, seed=1), 24)) == "aabaaababaaaaaaabaabaabb"
    two = "".join(p.domain for p in islice(Mixture(BOTH, WEIGHTS, seed=2), 24))
    assert two != "aabaaababaaaaaaabaabaabb"


def test_one_task_has_no_mixture_and_a_part_without_prompts_is_refused() -> None:
    assert isinstance(prompt_stream(prompts("", 3), {}, seed=0), PromptStream)
    assert isinstance(prompt_stream(BOTH, WEIGHTS, seed=0), Mixture)
    with pytest.raises(PreflightError, match=r"data\.parts: .* c .*data\.heldout"):
        Mixture(BOTH, WEIGHTS | {"c": 1.0}, seed=0)


def test_what_two_parts_share_stays_in_the_first() -> None:
    a, b, c = prompts("a", 3), prompts("b", 3), prompts("c", 2)
    b[0], b[1], c[1] = replace(b[0], id="a001"), replace(b[1], text="a 2"), replace(c[1], text="b 2")
    kept, shared = without_shared([a, b, c])
    assert [[p.id for p in part] for part in kept] == [["a000", "a001", "a002"], ["b002"], ["c000"]]
    assert shared == 3


def test_parts_come_by_turns() -> None:
    mixed = interleave([prompts("a", 2), prompts("b", 4)])
    assert [p.id for p in mixed] == ["a000", "b000", "a001", "b001", "b002", "b003"]
    assert (
        positions_by_domain(mixed) == {"a": [0, 2], "b": [1, 3, 4, 5]}
        and positions_by_domain(prompts("", 3)) == {}
    )


def test_metrics_of_each_domain() -> None:
    def group(domain: str, ids: list[int], correct: list[float]) -> Group:
        row = lambda n: (np.zeros(n, np.int32), np.zeros(n, np.float32), np.zeros(n, np.int32))
        rollouts = tuple(Rollout("p", *row(n), "", 1.0, 9) for n in ids)
        return Group(
            Prompt("p", "", (0,), "", domain=domain), rollouts, tuple(Verdict(c, bool(c)) for c in correct)
        )

    a, b, sent_back = group("a", [1, 2], [1, 0]), group("b", [3, 1], [1, 0]), group("b", [1, 1], [0, 0])
    entropy = np.array([1, 1, 1, 5, 5, 5, 9], np.float32)
    columns = {"logprobs": entropy, "entropy": entropy, "varentropy": entropy}
    tokens = tokens_of([a, b], [torch.zeros(2)] * 2, columns, 0)
    found = domain_metrics([a, b], tokens, [a, b, sent_back])
    assert (found["correct/mean:a"], found["correct/mean:b"]) == (0.5, 0.25)
    assert (found["groups/all_wrong:a"], found["groups/all_wrong:b"]) == (0, 0.5)
    assert found["groups/share:b"] == pytest.approx(2 / 3)
    assert (found["entropy/mean:a"], found["entropy/mean:b"]) == (1, 6)
    assert (found["length/mean:a"], found["length/mean:b"]) == (1.5, 1.5)
    listed = family_metrics("domain")
    assert all(matches(name, listed) for name in found) and len(found) == 2 * len(listed)
    assert domain_metrics([group("", [1, 2, 2, 2], [0] * 4)], tokens, [group("", [1], [0])]) == {}


def test_evaluations_of_each_domain() -> None:
    found = accuracy_by_domain(interleave([prompts("a", 2), prompts("b", 1)]), [1, 0, 1], [2, 0, 1], 2)
    assert found == {
        "greedy:a": 1.0,
        "pass@1:a": 0.75,
        "pass@2:a": 1.0,
        "greedy:b": 0.0,
        "pass@1:b": 0.0,
        "pass@2:b": 0.0,
    }


def test_a_whole_evaluation_has_every_accuracy_of_each_domain() -> None:
    world = ToyWorld(None)  # type: ignore[arg-type]
    both = interleave(
        [[replace(p, reference="3") for p in prompts(name, count)] for name, count in WHOLE.items()]
    )
    words = Words(str, str, frozenset())
    found = asyncio.run(evaluate_policy(world, world, both, plan_evaluation(Draw(1.0, 2), 4), words))
    assert found["domains"].keys() == {"a", "b"} and "id" not in found["domains"]["a"]
    for name in ("greedy", "pass@4", "pass^2", "avg@4"):
        mean = sum(found["domains"][d][name] * n for d, n in WHOLE.items()) / sum(WHOLE.values())
        assert mean == pytest.approx(found[name])
    assert any(line.startswith("b: greedy ") for line in lines(found))
    bare = asyncio.run(
        evaluate_policy(
            world, world, [replace(p, domain="") for p in both], plan_evaluation(Draw(1.0, 2), 2), words
        )
    )
    assert "domains" not in bare


def test_a_judge_for_each_domain() -> None:
    gym = lambda task, extract: {"fn": "gym", "task": task, "extract": extract}
    judge = build_verification(judges={"a": gym("chain_sum", "after"), "b": gym("chain_sum", "response")})
    one = lambda domain: Prompt("p", "", (1,), "5", {"answer": "5"}, domain)
    assert [judge("=5", one(d)).correct for d in "ab"] == [1, 0]
    assert "no judge of domain 'c'" in judge("=5", one("c")).detail


# As it is set up.


@pytest.fixture(scope="module")
def mixed() -> Config:
    return configured(
        "data=mixture", "data.parts.chain_sum.settings.size=400", "data.parts.countdown.settings.size=200"
    )


def test_a_mixture_is_read_part_by_part(mixed: Config) -> None:
    read = dataset.read_dataset(mixed, byte_tokenizer())
    for part in (read.split.heldout, read.split.demonstrations, read.split.training):
        assert {p.domain for p in part} == {"chain_sum", "countdown"}
    assert [p.domain for p in read.split.heldout[:4]] == ["chain_sum", "countdown"] * 2
    every = [
        p.id for part in (read.split.heldout, read.split.demonstrations, read.split.training) for p in part
    ]
    assert len(set(every)) == len(every)
    judge = build_verification(**read.judge)
    for group in islice(warm_start._demonstrations(mixed, read), 20):
        text = byte_tokenizer().decode(group.rollouts[0].token_ids.tolist(), skip_special_tokens=True)
        assert judge(text, group.prompt).correct == 1, group.prompt.domain
    assert dataset.describe_tasks(mixed.data, mixed.model.system, mixed.reward)[1].startswith(
        "countdown: weight 1, countdown, template '{numbers}->{target}'"
    )


def test_each_part_has_a_system_message_of_its_own(mixed: Config) -> None:
    parts = {"one": Part(system="Add."), "two": Part(system=None, settings={"seed": 10_000})}
    parts = {
        n: replace(p, settings={"size": 20, **p.settings}, template=n + " {question}", judge={"fn": "math"})
        for n, p in parts.items()
    }
    config = replace(mixed, data=replace(mixed.data, parts=parts, max_prompt=200))
    config = replace(config, model=replace(config.model, system="Think."))
    tokenizer = byte_tokenizer()
    read = dataset.read_dataset(config, tokenizer)
    begins = {p.domain: tokenizer.decode(p.token_ids)[:26] for p in read.split.training}
    assert begins == {"one": "<|system|>Add.<|user|>one ", "two": "<|system|>Think.<|user|>tw"}


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_system_message_and_template_in_a_model_folder_with_its_own_chat_template(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path)
    config = configured(
        "data=chain_sum", "model.system=Add up.", "++data.settings.size=3", "data.max_prompt=200"
    )
    config = replace(config, data=replace(config.data, heldout=0.0, demonstrations=0.0))
    first = dataset.read_dataset(config, load_tokenizer(str(tmp_path))).split.training[0]
    rendered = (
        f"<|im_start|>system\nAdd up.<|im_end|>\n<|im_start|>user\n{first.text}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.decode(first.token_ids) == rendered and first.text.endswith("=")
    said = train._dry(config, build_parts(config))
    assert "prompts: chain_sum, template '{expression:compact}=', system 'Add up.', judged by gym" in said


def test_a_warm_start_is_cached_by_what_shapes_it(mixed: Config) -> None:
    folder = lambda *told: warm_start.cached_folder(configured("data=chain_sum", *told)).name
    assert folder() == folder("rollout.group_size=4", "learner.lr=1") != folder("data.settings.min_terms=1")
    assert folder().startswith("chain_sum-")
    assert warm_start.cached_folder(mixed).name.startswith("chain_sum-countdown-")
    heavier = replace(mixed.data.parts["countdown"], weight=2.0)
    other = replace(mixed, data=replace(mixed.data, parts=mixed.data.parts | {"countdown": heavier}))
    assert warm_start.cached_folder(other) != warm_start.cached_folder(mixed)
    asked = replace(mixed, model=replace(mixed.model, system="Think."))
    assert warm_start.cached_folder(asked) != warm_start.cached_folder(mixed)


def test_whatever_makes_a_warm_start_another_gives_it_another_name(tmp_path: Path) -> None:
    """Else a float32 model in the cache would be taken for the bfloat16 one that was asked for."""
    judge = tmp_path / "judge.py"
    judge.write_text("def half(text, prompt):\n    return 0.5\n")
    shared = (
        "model.dtype=bfloat16",
        "sampler.stop=[x]",
        "learner.betas=[0.9,0.99]",
        "learner.weight_decay=0.1",
        "learner.deepspeed={gradient_clipping: 0.5}",
        f"reward.path={judge}:half",
    )
    one = [warm_start.cached_folder(configured("data=chain_sum", each)).name for each in shared]
    judge.write_text("def half(text, prompt):\n    return 0.4\n")
    one.append(warm_start.cached_folder(configured("data=chain_sum", shared[-1])).name)
    one.append(warm_start.cached_folder(configured("data=chain_sum")).name)
    assert len(set(one)) == len(shared) + 2


def test_wrong_parts_are_refused_by_name(mixed: Config) -> None:
    with pytest.raises(ConfigError, match=r"data\.parts\.countdown\.weight=0"):
        configured("data=mixture", "data.parts.countdown.weight=0")
    with pytest.raises(ConfigError, match="weigt"):
        configured("data=mixture", "data.parts.countdown.weigt=2")
    bare = replace(
        mixed, data=replace(mixed.data, parts={"one": Part()}), reward=replace(mixed.reward, judge={})
    )
    with pytest.raises(ConfigError, match=r"data\.parts\.one\.judge.*reward\.path="):
        dataset.judge_spec(bare)
    with pytest.raises(ConfigError, match=r"data\.parts: 'a:b' "):
        dataset.check_mixture(replace(mixed.data, parts={"a:b": Part()}))
