"""entroray: distributed RL for language models that measures, predicts and steers entropy."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
"""The one place of it: pyproject.toml reads it here."""
PUBLIC = {
    "Answer": "entroray.types",
    "Batch": "entroray.types",
    "ConfigError": "entroray.errors",
    "Counts": "entroray.types",
    "EntrorayError": "entroray.errors",
    "Group": "entroray.types",
    "Objective": "entroray.objective",
    "Prompt": "entroray.types",
    "Rollout": "entroray.types",
    "Run": "entroray.observe.run_files",
    "Status": "entroray.types",
    "Tokens": "entroray.types",
    "Verdict": "entroray.types",
    "build_judge": "entroray.reward",
    "build_objective": "entroray.objective",
    "declare": "entroray.binding",
    "read_run": "entroray.observe.run_files",
    "step_details": "entroray.metrics",
    "step_metrics": "entroray.metrics",
    "token_entropy": "entroray.metrics",
}
"""Every public name and the module it is of, which is imported when the name is first asked for."""


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'entroray' has no attribute '{name}'")
    return getattr(import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
