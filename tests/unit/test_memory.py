"""What a run needs of memory: counted from files that hold no weights, against arithmetic by hand."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from entroray.cli import train
from entroray.planning import memory as planning
from entroray.policy.tiny_model import build_tiny_model, count_parameters
from entroray.wiring import memory
from entroray.wiring.parts import build_parts
from tests.composed import configured

BILLION = 1_000_000_000


def on_a_rank(*told: str, held: bool = False) -> dict[str, float]:
    """GB of each part for a model of a billion parameters."""
    objective: Any = SimpleNamespace(needs={"ref_logprobs"} if held else ())
    found = planning.learner_states(BILLION, memory.layout(configured(*told), objective))
    return {name: size / BILLION for name, size in found.items()}


@pytest.mark.parametrize(
    ("dtype", "stage", "parts"),
    [  # on two ranks: weights, gradients, float32 copy, moments
        ("bfloat16", 1, (2, 6, 2, 4)),
        ("bfloat16", 2, (2, 2, 2, 4)),
        ("bfloat16", 3, (1, 2, 2, 4)),
        ("float32", 0, (4, 4, 8)),
        ("float32", 1, (4, 4, 2, 4)),
        ("float32", 3, (2, 2, 4)),
    ],
)
def test_what_each_stage_divides_by_two_ranks(dtype: str, stage: int, parts: tuple[float, ...]) -> None:
    found = on_a_rank(f"model.dtype={dtype}", f"learner.zero_stage={stage}", "learner.ranks=2")
    assert tuple(found.values()) == parts


def test_one_rank_in_bfloat16_needs_14_bytes_a_parameter_besides_gradients() -> None:
    found = on_a_rank("model.dtype=bfloat16")
    assert sum(found.values()) - found["gradients"] == 14 and found["gradients"] == 2 + 4


def test_a_reference_is_divided_as_weights_are_whoever_asks_for_it() -> None:
    told = ("model.dtype=bfloat16", "learner.ranks=4")
    for stage, size in ((2, 2), (3, 0.5)):
        there = (*told, f"learner.zero_stage={stage}")
        assert on_a_rank(*there, held=True)["reference"] == size
        assert on_a_rank(*there, "learner.reference=true")["reference"] == size
        assert "reference" not in on_a_rank(*there)


def safetensors(file: Path, shapes: dict[str, list[int]]) -> None:
    """A header alone, as the format has it."""
    header = {n: {"dtype": "BF16", "shape": s, "data_offsets": [0, 0]} for n, s in shapes.items()}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)


def test_a_folder_in_shards_is_counted_from_its_headers(tmp_path: Path) -> None:
    shards = {"a.safetensors": {"e": [1000, 64]}, "b.safetensors": {"w": [64, 128], "s": []}}
    for name, shapes in shards.items():
        safetensors(tmp_path / name, shapes)
    where = {tensor: name for name, shapes in shards.items() for tensor in shapes}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    config = configured(
        f"model.path={tmp_path}", "learner.lr=1e-6", "model.dtype=bfloat16", "learner.reference=true"
    )
    assert memory.parameter_count(config) == 64_000 + 8_192 + 1
    said = train._dry(config, build_parts(config))
    assert "72,193 parameters, bfloat16" in said and "verifier: 2 processes, at most 2,048 MiB" in said
    assert "reference 0.1 MiB" in said and "float32 copy 0.3 MiB" in said


def test_a_model_is_counted_before_it_is_built_and_without_its_weights(tmp_path: Path) -> None:
    size = {
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
    }
    written = build_tiny_model(tmp_path, size, seed=0)
    config = configured(f"model.path={tmp_path}", "learner.lr=1e-6")
    assert count_parameters(size) == written == memory.parameter_count(config) == memory._declared(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert memory.parameter_count(config) == written
    sizes = ",".join(f"{n}: {v}" for n, v in size.items())
    told = f"model.warm_start.cache={tmp_path}", f"model.warm_start.size={{{sizes}}}"
    assert memory.parameter_count(configured(*told)) == written


def test_only_a_model_that_is_not_here_is_unknown() -> None:
    config = configured("model.path=nobody/has-this-one", "learner.lr=1e-6")
    assert memory.parameter_count(config) is None
    said = memory.memory_lines(config, build_parts(config).objective)
    assert said == ["memory: unknown until nobody/has-this-one is in the cache of the hub or a folder here"]
