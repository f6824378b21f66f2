"""Names that other files see without their module's say of what they are."""

import ast

import pytest

from tests.files.test_layers import Source, read, tracked

LISTS = {"__all__", "PUBLIC"}
BARE = {"check", "load", "build", "describe", "of", "told"}
ANYWHERE = "entroray/rollout/stream.py"


def shared_names_say_of_what(source: Source) -> list[str]:
    """Lines that import or export a name of `BARE`; `plans.check()` says of what, `check()` does not."""
    shared = []
    for node in source.nodes:
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("entroray")):
            shared += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.Assign) and {source.spell(target) for target in node.targets} & LISTS:
            names = node.value.keys if isinstance(node.value, ast.Dict) else getattr(node.value, "elts", [])
            shared += [(name.lineno, name.value) for name in names if isinstance(name, ast.Constant)]
    return [f"{line}: `{name}` does not say of what" for line, name in shared if name in BARE]


def test_the_rule_holds():
    package = [path for path in tracked() if path.startswith("entroray/") and path.endswith(".py")]
    wrong = [f"{path}:{one}" for path in package for one in shared_names_say_of_what(read(path))]
    assert not wrong, "\n".join(wrong)


REFUSED = [  # (path, text) of the smallest offences
    (ANYWHERE, "from entroray.rollout.plans import check"),
    (ANYWHERE, "def f():\n    from .plans import load as read_plan"),
    ("entroray/objective/__init__.py", "__all__ = ['Objective', 'build']"),
    ("entroray/__init__.py", "PUBLIC = {'describe': 'entroray.objective'}"),
]
ALLOWED = [  # the nearest things that are right
    (ANYWHERE, "from entroray.rollout import plans\nplans.check()\nfrom yaml import load"),
    ("entroray/__init__.py", "PUBLIC = {'build_objective': 'entroray.objective'}\nCHOICES = {'load': 1}"),
]


@pytest.mark.parametrize(("path", "text"), REFUSED)
def test_the_rule_refuses(path, text):
    assert shared_names_say_of_what(Source(path, text))


@pytest.mark.parametrize(("path", "text"), ALLOWED)
def test_the_rule_allows(path, text):
    assert shared_names_say_of_what(Source(path, text)) == []
