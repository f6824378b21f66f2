"""A judge or a tool from a file of the user's: what it may import, and under which name it lives."""

import re
import sys
import textwrap
from pathlib import Path

import pytest

from entroray.errors import ConfigError
from entroray.reward.user_file import absolute, load_function


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, body in files.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(body))


def loaded(file: Path, name: str = "score") -> object:
    return load_function(f"{file}:{name}", "reward.path")("a", None)  # type: ignore[arg-type]


DATACLASS = """
    from __future__ import annotations
    import typing
    from dataclasses import dataclass

    @dataclass
    class Parts:
        answer: float
        form: typing.ClassVar[float] = 0.5

    def score(response, prompt):
        return Parts(1.0).answer + len(typing.get_type_hints(Parts))
"""


def test_a_file_may_have_dataclasses_with_postponed_annotations(tmp_path: Path) -> None:
    write(tmp_path, dc=DATACLASS)
    assert loaded(tmp_path / "dc.py") == 3.0


def test_a_file_imports_what_lies_beside_it_at_once_and_later(tmp_path: Path) -> None:
    write(tmp_path, beside_it="value = 4", lazily="value = 5")
    body = (
        "import beside_it\ndef score(r, p):\n    import lazily\n    return beside_it.value + lazily.value\n"
    )
    write(tmp_path, **{"my-judge": body})
    assert loaded(tmp_path / "my-judge.py") == 9


def test_a_file_of_a_package_imports_relatively_and_by_the_names_of_its_package(tmp_path: Path) -> None:
    write(tmp_path / "pkg_a", __init__="own = 1")
    write(tmp_path / "pkg_a" / "inner", __init__="", helpers="value = 2", beside="value = 4")
    rel = """
        import beside
        from . import helpers
        from .. import own
        from pkg_a.inner.helpers import value
        def score(r, p):
            from .helpers import value as later
            return own + helpers.value + value + later + beside.value
    """
    write(tmp_path / "pkg_a" / "inner", rel=rel)
    assert loaded(tmp_path / "pkg_a" / "inner" / "rel.py") == 11


@pytest.mark.parametrize("name", ["json", "math", "datasets", "types", "entroray"])
def test_a_file_or_a_package_may_be_called_as_another_module_is(tmp_path: Path, name: str) -> None:
    write(tmp_path, **{name: "def score(r, p): return 7"})
    assert loaded(tmp_path / f"{name}.py") == 7
    write(
        tmp_path / "inner" / name,
        __init__="",
        helpers="x = 8",
        mine="from .helpers import x\ndef score(r, p): return x",
    )
    assert loaded(tmp_path / "inner" / name / "mine.py") == 8


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    for folder, value in (("one", 1), ("two", 2)):
        write(tmp_path / folder, mine=f"class C: pass\ndef score(r, p): return {value}, C.__module__")
    (first, a), (second, b) = (loaded(tmp_path / folder / "mine.py") for folder in ("one", "two"))  # type: ignore[misc, attr-defined]
    assert (first, second) == (1, 2) and a != b and {a, b} <= set(sys.modules)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("import no_such_module_of_mine", "no_such_module_of_mine"),
        ("from . import helpers", "ImportError"),
        ("raise KeyError('key')", r"KeyError\('key'\)"),
        ("def score(r, p) return", "SyntaxError"),
        ("import sys; sys.exit(3)", r"SystemExit\(3\)"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("class Odd(BaseException): pass\nraise Odd('a\\nb')", "Odd"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_named_and_leaves_nothing(
    tmp_path: Path, body: str, says: str
) -> None:
    write(tmp_path, broken=body)
    before = set(sys.modules)
    with pytest.raises(ConfigError, match=rf"reward\.path: .*broken\.py .*{says}"):
        loaded(tmp_path / "broken.py")
    assert not [name for name in set(sys.modules) - before if "broken" in name]


def test_a_path_is_made_whole_where_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute("mine.py:score") == absolute("~/mine.py:score") == f"{tmp_path}/mine.py:score"
    assert absolute("mine.py") == "mine.py"


@pytest.mark.parametrize(
    ("signature", "lacking"),
    [
        ("response, prompt, *, strict", "'strict'"),
        ("data_source, solution_str, ground_truth, extra_info=None", "'ground_truth'"),
        ("response", "too many positional arguments"),
    ],
)
def test_arguments_that_nobody_gives_are_named_beside_the_functions_own(
    tmp_path: Path, signature: str, lacking: str
) -> None:
    write(tmp_path, mine=f"def score({signature}): return 1.0")
    said = rf"reward\.path=.*\(text, prompt\).*{re.escape(f'score({signature})')}.*{lacking}.*a default"
    with pytest.raises(ConfigError, match=said):
        loaded(tmp_path / "mine.py")


def test_a_callable_is_enough_and_an_unreadable_signature_is_refused(tmp_path: Path) -> None:
    write(tmp_path, mine="class C:\n    def __call__(self, r, p): return 5\nscore = C()\nodd = dict.fromkeys")
    assert loaded(tmp_path / "mine.py") == 5
    write(tmp_path, other="def score(r): return 1")
    with pytest.raises(ConfigError, match=r"reward\.path=.*\(text, prompt\)"):
        loaded(tmp_path / "other.py")
