"""Tokenizer, padding, micro-batch plans."""

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from entroray.errors import PreflightError
from entroray.policy import microbatches
from entroray.policy.microbatches import cut_by_groups, plan_microbatches, plan_on_card
from entroray.policy.model import load_policy, pad
from entroray.policy.tiny_model import build_tiny_model
from entroray.policy.tokenizer import byte_tokenizer, chat, fingerprint, load_tokenizer
from entroray.types import Batch

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build_tiny_model(path, TINY, seed=0)
    return path


@given(st.text(max_size=60))
def test_decode_of_encode_is_the_text(text):
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_question_is_rendered_for_an_answer(folder):
    tokenizer = load_tokenizer(str(folder))
    ids = chat(tokenizer, None)("1+2=")
    assert tokenizer.decode(ids) == "<|user|>1+2=<|assistant|>"
    assert tokenizer.decode(chat(tokenizer, "Add.")("1+2=")) == "<|system|>Add.<|user|>1+2=<|assistant|>"
    assert len(ids) == 6 and fingerprint(tokenizer) == fingerprint(byte_tokenizer())


def test_a_tokenizer_without_template_is_refused(folder, tmp_path):
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(PreflightError, match=rf"model\.path={tmp_path} .*model\.template="):
        load_tokenizer(str(tmp_path))


def test_a_folder_without_model_is_refused(tmp_path):
    with pytest.raises(PreflightError, match=rf"model\.path={tmp_path} .*config\.json"):
        load_policy(str(tmp_path), torch.float32)


def test_a_model_whose_files_have_other_names_is_refused(folder, tmp_path):
    """As those of a mixture of experts, which transformers joins into one tensor."""
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    renamed = {name.replace("mlp.up_proj", "mlp.experts.0.up_proj"): t for name, t in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    with pytest.raises(PreflightError, match=r"model\.path=.* 2 .*safetensors.*layers\.0\.mlp\.up_proj"):
        load_policy(str(tmp_path / "model"), torch.float32)
    file.unlink()
    save_file(load_file(folder / "model.safetensors"), file, metadata={"format": "pt"})
    load_policy(str(tmp_path / "model"), torch.float32)


def batch(rows: int, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    prompts, responses = rng.integers(1, 9, rows), rng.integers(0, 20, rows)
    ids = lambda n: rng.integers(0, 256, n).astype(np.int32)
    lengths = [x.astype(np.int32) for x in (prompts, responses)]
    temperatures = rng.uniform(0.5, 1.5, rows).astype(np.float32)
    return Batch(ids(prompts.sum()), lengths[0], ids(responses.sum()), lengths[1], temperatures)


def test_policy_statistics_equal_the_plain_model_row_by_row(folder):
    from transformers import AutoModelForCausalLM

    policy, plain = load_policy(str(folder), torch.float32), AutoModelForCausalLM.from_pretrained(folder)
    b = batch(6)
    with torch.no_grad():
        stats = policy(pad(b, torch.device("cpu")))
    at = 0
    for i in range(6):
        one = b.cut([np.array([i])])[0]
        ids = torch.from_numpy(np.concatenate([one.prompt_ids, one.response_ids])).long()
        with torch.no_grad():
            logits = plain(ids[None]).logits[0] / float(one.temperatures[0])
        logp = logits.log_softmax(-1)[len(one.prompt_ids) - 1 : -1]
        picked = logp.gather(-1, ids[len(one.prompt_ids) :, None])[:, 0]
        n = len(one.response_ids)
        torch.testing.assert_close(stats["logprobs"][at : at + n], picked, atol=2e-5, rtol=1e-5)
        entropy = -(logp.exp() * logp).sum(-1)
        torch.testing.assert_close(stats["entropy"][at : at + n], entropy, atol=2e-5, rtol=1e-5)
        at += n
    assert at == len(stats["logprobs"])


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 200))
def test_a_plan_holds_every_row_once_with_equal_counts_within_the_budget(lengths, ranks, budget):
    sizes = np.array(lengths)
    cut = plan_microbatches(sizes, ranks=ranks, token_budget=budget)
    assert sorted(int(r) for rank in cut for micro in rank for r in micro) == list(range(len(lengths)))
    assert len({len(rank) for rank in cut}) == 1
    for micro in (m for rank in cut for m in rank if len(m) > 1):
        assert sizes[micro].max() * len(micro) <= budget


def cost(lengths, cut):
    """Of one rank's micro-batches, in tokens."""
    return sum(microbatches.OVERHEAD + lengths[rows].max() * len(rows) for rows in cut)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=9), st.integers(200, 3000))
def test_no_other_cut_of_rows_by_length_costs_less(lengths, budget):
    sizes = np.sort(np.array(lengths))[::-1]
    (cut,) = plan_microbatches(sizes, ranks=1, token_budget=budget)
    fits = lambda rows: len(rows) == 1 or sizes[rows].max() * len(rows) <= budget
    every = [
        np.split(np.arange(len(sizes)), [i + 1 for i in range(len(sizes) - 1) if places >> i & 1])
        for places in range(2 ** (len(sizes) - 1))
    ]
    assert cost(sizes, cut) == min(cost(sizes, other) for other in every if all(map(fits, other)))


def test_a_gpu_pads_rather_than_launch_its_layers_thrice() -> None:
    lengths = np.array([1000, 500, 500, 100])
    (on_cpu,) = plan_microbatches(lengths, ranks=1, token_budget=4096)
    (on_card,) = plan_on_card(lengths, ranks=1, token_budget=4096)
    assert [rows.tolist() for rows in on_cpu] == [[0], [1, 2], [3]]
    assert [rows.tolist() for rows in on_card] == [[0, 1, 2, 3]]


@pytest.mark.parametrize("rows", [256, 1024, 8192])
@pytest.mark.parametrize("ranks", [1, 2])
def test_padding_is_at_most_a_tenth_of_lengths_by_chance(rows, ranks):
    rng = np.random.default_rng(rows)
    lengths = rng.integers(12, 20, rows) + np.minimum(256, 1 + rng.exponential(56, rows).astype(int))
    cut = plan_microbatches(lengths, ranks=ranks, token_budget=8192)
    padded = sum(lengths[m].max() * len(m) for rank in cut for m in rank if len(m))
    assert padded <= 1.1 * lengths.sum()
    assert padded + microbatches.OVERHEAD * sum(map(len, cut)) <= 1.25 * lengths.sum(), "few micro-batches"
    again = plan_microbatches(lengths, ranks=ranks, token_budget=8192)
    assert [[rows.tolist() for rows in r] for r in again] == [[rows.tolist() for rows in r] for r in cut]


def test_rows_of_one_length_fill_their_micro_batches():
    cut = plan_microbatches(np.full(8192, 80), ranks=2, token_budget=8192)
    assert [len(rank) for rank in cut] == [41, 41]  # 40.2 full ones


def test_updates_are_cut_by_whole_groups():
    group = np.repeat([7, 3, 9, 1, 4], 2)
    cut = cut_by_groups(group, 2)
    assert [sorted(set(group[rows])) for rows in cut] == [[3, 7, 9], [1, 4]]
    with pytest.raises(ValueError, match=r"learner\.updates_per_rollout"):
        cut_by_groups(np.array([0, 0, 1, 1]), 3)
