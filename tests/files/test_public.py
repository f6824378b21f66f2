"""What a user may import, what that costs, and the lines of Python that the pages show."""

import importlib
import json
import subprocess
import sys

import pytest
import torch

import entroray

HEAVY = {"torch", "ray", "vllm", "deepspeed", "transformers", "hydra", "numpy"}


def imported(code: str) -> set[str]:
    """The libraries that a new process holds after `code`."""
    code += "\nimport sys, json; print(json.dumps([m.partition('.')[0] for m in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code], timeout=60, check=True, capture_output=True, text=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import entroray; dir(entroray)",
        "from entroray import ConfigError",
        "from entroray.cli import run; assert run(['--help']) == 0",
        "from entroray.cli import run; assert run(['trian']) == 2",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code):
    assert imported(code) & HEAVY == set()


def test_a_name_of_another_folder_imports_no_ray():
    assert {"ray", "vllm", "deepspeed"} & imported(
        "from entroray import build_objective, token_entropy"
    ) == set()


@pytest.mark.parametrize("name", entroray.PUBLIC)
def test_every_public_name_is_there(name):
    module = importlib.import_module(entroray.PUBLIC[name])
    assert getattr(entroray, name) is getattr(module, name) and name in dir(entroray)
    assert (getattr(entroray, name).__doc__ or "").strip()


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'token_entropi'"):
        _ = entroray.token_entropi


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_lines_of_python_that_the_pages_show_work(dtype):
    logits = torch.randn(5, 11, dtype=dtype)
    old = torch.log_softmax(logits, -1)[:, 3]
    logprobs = (old + 0.1).requires_grad_()

    from entroray import Tokens, build_objective, token_entropy

    entropy, varentropy = token_entropy(logits, temperature=1.0)
    objective = build_objective("dapo")
    tokens = Tokens.from_columns(
        logprobs=logprobs, old_logprobs=old, entropy=entropy, lengths=[3, 2], advantages=[1.0, -1.0]
    )
    loss = objective.loss(objective.credit(tokens)) / objective.denominator(tokens.counts)

    loss.backward()
    assert loss.dtype == entropy.dtype == varentropy.dtype == dtype
    ratio, a = torch.tensor(0.1, dtype=dtype).exp(), torch.tensor([1.0, 1, 1, -1, -1], dtype=dtype)
    assert torch.allclose(logprobs.grad, -ratio * a / 5)


def test_columns_that_are_not_given_are_filled_in_and_those_given_are_kept():
    x = torch.zeros(3, dtype=torch.float64)
    given = {
        "logprobs": x,
        "old_logprobs": x,
        "entropy": x,
        "lengths": [2, 0, 1],
        "advantages": [1.0, 2.0, 3.0],
    }
    t = entroray.Tokens.from_columns(**given, groups=[7, 7, 8], behavior_logprobs=x - 1, step=4)
    assert (
        t.row.tolist() == [0, 0, 2]
        and t.position.tolist() == [0, 1, 0]
        and t.advantages.tolist() == [1, 1, 3]
    )
    assert (t.counts, t.step, t.behavior_logprobs.tolist()) == (entroray.Counts(3, 3, 3, 2), 4, [-1, -1, -1])
    assert t.take(torch.tensor([2])).advantages.tolist() == [3] and t.varentropy.isnan().all()
    assert entroray.build_objective("grpo").credit(t).advantages.dtype == torch.float64


def test_a_row_is_built_by_name_or_refused_with_the_nearest():
    assert entroray.build_objective("dapo").describe().startswith("loss = ")
    with pytest.raises(entroray.ConfigError, match=r"no row `dappo`: did you mean `da?p"):
        entroray.build_objective("dappo")
