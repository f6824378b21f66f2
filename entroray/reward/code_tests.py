"""The tests of a code task, read from its row's columns, and when what a program gave is right."""

import ast
import base64
import binascii
import io
import json
import math
import pickle
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal

COLUMNS = (
    *("test_list", "input_output", "private_test_cases", "public_test_cases", "reward_model.ground_truth"),
    *("ground_truth", "tests"),
)
"""Where tests stand: of MBPP, APPS, LiveCodeBench (both of its columns), verl's code sets and DeepCoder."""
_LARGEST = 1 << 28
"""Bytes of a row's tests, unpacked."""


@dataclass(frozen=True)
class Test:
    """One test. "stdin": `given` is read and the output compared; "value": `given` is evaluated and compared;
    "hold": `given` is executed where the program is, which may lie; "do": executed, and no test."""

    kind: Literal["stdin", "value", "hold", "do"]
    given: str
    expected: Any = None
    """A text for "stdin", else plain Python; of an `Unread` it has to be evaluated yet."""
    compare: Literal["python", "json"] = "python"
    tolerance: tuple[float, float] | None = None
    """Relative and absolute, where the test says its own."""


@dataclass(frozen=True)
class Unread:
    """What is right, as an expression that is no literal: `set([1, 2])`."""

    text: str


@dataclass
class Tests:
    """Of one row: tests in order, and how the program is begun."""

    tests: list[Test] = field(default_factory=list)
    prelude: bool = False
    method: str | None = None
    """The function of contest tasks, which may be a method of `class Solution`."""


# Where they stand.


def read_tests(row: Mapping[str, Any], column: str | None = None) -> Tests:
    """The tests at `column`, a path, else at the first of `COLUMNS` that the row has.

    ValueError says what is wrong with a row that has none, or none that can be read.
    """
    there = [name for name in ([column] if column else COLUMNS) if _filled(_lookup(row, name))]
    if not there:
        raise ValueError(
            f"there are no tests at {column or ', '.join(COLUMNS)} (columns: {', '.join(map(str, row))})"
        )
    found = Tests()
    try:
        names = [n for n in there if n.endswith("_test_cases")] if not column else []
        for place in names[::-1] or there[:1]:
            _read(_lookup(row, place), row, found)
    except (SyntaxError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{there[0]} cannot be read as tests: {error!r}") from error
    if not any(test.kind != "do" for test in found.tests):
        raise ValueError(f"{there[0]} holds no test")
    return found


def _lookup(row: Any, path: str) -> Any:
    """What is at a path, through texts that hold JSON; None where nothing is."""
    if path in row:
        return row[path]
    for key in path.split("."):
        row = _json(row)
        row = row.get(key) if isinstance(row, Mapping) else None
    return row


def _filled(value: Any) -> bool:
    return value is not None and not (hasattr(value, "__len__") and len(value) == 0)


def _json(text: Any) -> Any:
    """What a text holds as JSON; anything else as it is."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text


def _read(value: Any, row: Mapping[str, Any], into: Tests) -> None:
    if isinstance(value, str):
        value = _json(value) if (read := _unpacked(value)) is None else read
    if hasattr(value, "tolist"):
        value = value.tolist()
    asserts = [value.get(key) for key in ("assert_case", "functional")] if isinstance(value, Mapping) else []
    if any(asserts):
        for texts in asserts:
            _read_asserts(texts or [], into)
    elif isinstance(value, Mapping):
        pairs = list(zip(value["inputs"], value["outputs"], strict=True))
        _read_pairs(pairs, value.get("fn_name"), into)
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        name = _name(row, value[0])
        _read_pairs([(test["input"], test["output"]) for test in value], name, into)
    else:
        for setup in (row.get("test_imports"), row.get("test_setup_code")):
            _read_asserts([*setup] if isinstance(setup, list) else setup or [], into)
        _read_asserts(value, into)


def _name(row: Mapping[str, Any], test: Mapping[str, Any]) -> str | None:
    """The function that tests call; None where they are of stdin and stdout."""
    if str(test.get("testtype") or test.get("type") or "").startswith("stdin"):
        return None
    places = [(test, "fn_name"), (test, "metadata.func_name"), (row, "metadata.func_name"), (row, "fn_name")]
    return next((name for of, path in places if (name := _lookup(of, path))), None)


class _NoGlobals(pickle.Unpickler):
    """Of texts and lists alone: whatever else a pickle asks for is refused."""

    def find_class(self, *_: str) -> Any:
        raise pickle.UnpicklingError("it is no text")


def _unpacked(text: str) -> Any:
    """LiveCodeBench's private tests: JSON, pickled, deflated, in base64; None for any other text."""
    if not re.fullmatch(r"[A-Za-z0-9+/\s]{16,}={0,2}\s*", text):
        return None
    try:
        data = zlib.decompressobj().decompress(base64.b64decode(text), _LARGEST)
        return json.loads(_NoGlobals(io.BytesIO(data)).load())
    except binascii.Error:
        return None
    except (zlib.error, pickle.UnpicklingError, EOFError, IndexError, TypeError) as error:
        raise ValueError(f"packed tests cannot be unpacked: {error}") from error


def _read_pairs(pairs: Sequence[tuple[Any, Any]], name: str | None, into: Tests) -> None:
    """Inputs and outputs: of a function that is named, else of stdin and stdout."""
    into.prelude, into.method = True, name or into.method
    for given, expected in pairs:
        if not name:
            read, right = (
                "\n".join(map(str, x)) if isinstance(x, list) else str(x) for x in (given, expected)
            )
            into.tests.append(Test("stdin", read, right))
            continue
        if isinstance(given, str):  # LiveCodeBench and verl: a line of JSON for each argument
            given, expected = [json.loads(line) for line in given.split("\n")], _json(expected)
        elif isinstance(expected, list) and len(expected) == 1:
            expected = AnyOf((expected, expected[0]))  # APPS wraps most outputs in a list of one
        into.tests.append(Test("value", f"(*{given!r},)", expected, "json"))


@dataclass(frozen=True)
class AnyOf:
    """Each of these is right."""

    values: tuple[Any, ...]


def _read_asserts(texts: str | Sequence[str], into: Tests) -> None:
    for text in [texts] if isinstance(texts, str) else texts:
        for statement in ast.parse(text).body:
            kind: Literal["hold", "do"] = "hold" if isinstance(statement, ast.Assert) else "do"
            test = Test(kind, ast.unparse(statement))
            into.tests.append(
                _compared(statement.test) or test if isinstance(statement, ast.Assert) else test
            )


def _compared(claim: ast.expr) -> Test | None:
    """`f(x) == y`, or f(x) close to y, as what to evaluate and what to expect; None for other claims."""
    tolerance = None
    match claim:
        case ast.Compare(left, [ast.Eq()], [right]):
            pass
        case ast.Compare(left, [ast.Is()], [ast.Constant() as right]):
            pass
        case ast.Call(ast.Name("isclose") | ast.Attribute(_, "isclose"), [left, right], keywords):
            given = {each.arg: _literal(each.value) for each in keywords}
            if not all(isinstance(value, int | float) for value in given.values()):
                return None
            tolerance = float(given.get("rel_tol", 1e-9)), float(given.get("abs_tol", 0.0))
        case _:
            return None
    if not isinstance(_literal(left), Unread):
        left, right = right, left
    return Test("value", ast.unparse(left), _literal(right), tolerance=tolerance)


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, MemoryError, RecursionError):
        return Unread(ast.unparse(node))


# What a program gave.


@dataclass(frozen=True, eq=False)
class Other:
    """A value that is no plain one: nothing is equal to it."""

    kind: str


_NUMBERS: Mapping[str, Any] = {
    "int": lambda x: int(x, 16),
    "float": float.fromhex,
    "complex": lambda x: complex(*map(float.fromhex, x)),
}
_MANY: Mapping[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def decode(coded: Any) -> Any:
    """The value that `program_server.plain` wrote; ValueError for what it cannot have written."""
    try:
        kind, inside = coded
        if kind in _NUMBERS:
            return _NUMBERS[kind](inside)
        if kind in _MANY:
            return _MANY[kind](map(decode, inside))
        if kind == "dict":
            return {decode(key): decode(value) for key, value in inside}
        if kind == "bytes":
            return bytes.fromhex(inside)
        known = {"none": type(None), "bool": bool, "str": str}.get(kind)
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        raise ValueError(f"no value of a program: {error}") from error
    return inside if known and type(inside) is known else Other(str(inside))


def same(value: Any, expected: Any, relative: float, absolute: float) -> bool:
    """Whether plain values are equal, types included: True is not 1, a tuple no list; but 2.0 is 2."""
    if isinstance(expected, AnyOf):
        return any(same(value, each, relative, absolute) for each in expected.values)
    numbers = [type(each) in (int, float, complex) for each in (value, expected)]
    if all(numbers):
        return bool(value == expected) or _close(value, expected, relative, absolute)
    kinds = [set if type(each) is frozenset else type(each) for each in (value, expected)]
    if kinds[0] is not kinds[1]:
        return False
    if kinds[0] in (list, tuple):
        pairs = zip(value, expected, strict=False)
        return len(value) == len(expected) and all(same(a, b, relative, absolute) for a, b in pairs)
    if kinds[0] is dict:
        return len(value) == len(expected) and all(
            key in value and same(value[key], each, relative, absolute) for key, each in expected.items()
        )
    return bool(value == expected)


def _close(value: Any, expected: Any, relative: float, absolute: float) -> bool:
    if float not in (type(value), type(expected)) or complex in (type(value), type(expected)):
        return False
    try:
        return math.isclose(value, expected, rel_tol=relative, abs_tol=absolute)
    except OverflowError:
        return False


def as_json(value: Any) -> Any:
    """A value as it would have come through JSON: tuples as lists, keys as texts."""
    if isinstance(value, list | tuple):
        return [as_json(each) for each in value]
    if isinstance(value, dict):
        return {str(key): as_json(each) for key, each in value.items()}
    return value


_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,4})?", re.ASCII)


def same_output(said: str, expected: str, relative: float, absolute: float) -> bool:
    """Whether two outputs agree line by line, but for white space at ends, and numbers written otherwise."""
    lines = [[line.strip() for line in text.strip().split("\n")] for text in (said, expected)]
    return len(lines[0]) == len(lines[1]) and all(
        a == b or _same_numbers(a.split(), b.split(), relative, absolute) for a, b in zip(*lines, strict=True)
    )


def _same_numbers(said: list[str], expected: list[str], relative: float, absolute: float) -> bool:
    if len(said) != len(expected) or not all(map(_NUMBER.fullmatch, (*said, *expected))):
        return False
    for a, b in zip(said, expected, strict=True):
        whole = not set(a + b) & set(".eE")
        if Decimal(a) != Decimal(b) and (whole or not _close(float(a), float(b), relative, absolute)):
            return False
    return True


# Where an answer's code is.

_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*\1|\Z)", re.M | re.S)


def find_code(response: str) -> str | None:
    """The last block fenced as Python, else the last fenced one, else all of a response; None for nothing."""
    blocks = [(label.lower(), inside) for _, label, inside in _FENCE.findall(response)]
    python = [inside for label, inside in blocks if label in ("python", "python3", "py")]
    code = (python or [inside for _, inside in blocks] or [response])[-1]
    return code if code.strip() else None
