"""What a process imports before it is asked for anything: a heavy library is seconds of its start."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDLESS = {
    "entroray.workers.verifier": {"torch", "transformers", "vllm", "ray"},
    "entroray.workers.judge_forkserver": {"torch", "transformers", "vllm", "ray"},
    "entroray.reward": {"torch", "transformers", "vllm", "ray"},
    "entroray.workers.learner_rank": {"vllm", "deepspeed"},
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
