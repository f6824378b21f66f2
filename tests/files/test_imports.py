"""What a process imports before it is asked for anything: a heavy library is seconds of its start."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDLESS = {
    "entroray.workers.verifier": {"torch", "transformers", "vllm", "ray"},
    "entroray.workers.judge_forkserver": {"torch", "transformers", "vllm", "ray"},
    "entroray.reward": {"torch", "transformers", "vllm", "ray"},
    "entroray.workers.learner_rank": {"vllm", "deepspeed", "ray", "omegaconf", "hydra"},
    "entroray.workers.deepspeed_backend": {"vllm", "deepspeed", "ray", "omegaconf", "hydra"},
    "entroray.workers.transfer": {"vllm", "deepspeed"},
    "entroray.cli": {"torch", "transformers", "vllm", "ray", "omegaconf", "hydra"},
    "entroray.cli.train": {"vllm", "deepspeed", "transformers"},
}
"""Module -> libraries that importing it does not import."""


def imported(name: str, seen: set[str]) -> set[str]:
    """`seen` and every module that importing `name` imports, as far as our own files say."""
    if name in seen:
        return seen
    seen.add(name)
    path = ROOT / name.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not name.startswith("entroray") or not file.exists():
        return seen
    for statement in ast.parse(file.read_text()).body:
        for each in _named(statement):
            for parent in (each.rsplit(".", n)[0] for n in range(each.count("."), -1, -1)):
                imported(parent, seen)
    return seen


def _named(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    if isinstance(statement, ast.ImportFrom) and statement.module:
        return [statement.module, *(f"{statement.module}.{alias.name}" for alias in statement.names)]
    return []


@pytest.mark.parametrize("module", NEEDLESS)
def test_a_process_does_not_import_what_it_does_not_need(module: str) -> None:
    assert not imported(module, set()) & NEEDLESS[module]


def test_what_is_imported_is_seen_through_other_modules():
    assert {"torch", "entroray.ops", "ray"} <= imported("entroray.cli.train", set())


BARE = ("ray", "vllm", "hydra", "omegaconf", "pydantic", "deepspeed", "antlr4", "msgspec", "zmq")
"""What a machine with a card and torch may not have; only a rank that begins to train wants DeepSpeed."""
PROVED = ("policy.head", "policy.model", "policy.microbatches", "planning", "train.batching")
ON_A_CARD = """
import sys
from importlib import import_module

class Blocked:
    def find_spec(name, *_):
        if name.partition(".")[0] in {bare}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked)
for part in "abcdefgh":
    import_module(f"tests.gpu.part_{{part}}").STEPS
for name in {proved}:
    import_module(f"entroray.{{name}}")
from entroray.workers.deepspeed_backend import DeepSpeedBackend
from entroray.workers.learner_rank import LearnerRank
from tests.gpu.part_d import objective
assert objective().slot("surrogate")
"""


def test_what_is_proved_on_a_card_imports_without_ray_vllm_hydra_omegaconf_pydantic():
    code = ON_A_CARD.format(bare=set(BARE), proved=PROVED)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
