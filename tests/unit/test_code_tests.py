"""Where tests of code stand in a row, and when what a program gave is right; nothing is run here."""

import base64
import json
import math
import pickle
import struct
import zlib

import numpy as np
import pytest

from entroray.reward.code_tests import Other, as_json, decode, find_code, read_tests, same, same_output
from entroray.reward.isolation import CALLS, compile_filter
from entroray.reward.program_server import plain


def packed(tests: object) -> str:
    """As LiveCodeBench packs its private tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def kinds(row: dict, column: str | None = None) -> list[tuple]:
    return [(test.kind, test.given, test.expected) for test in read_tests(row, column).tests]


STDIN = {"input": "1 2\n", "output": "3\n", "testtype": "stdin"}
CALLED = {"input": "[1, 2]\n3", "output": "[3, 6]", "testtype": "functional"}
PAIRS = {"inputs": ["1 2\n"], "outputs": ["3\n"]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"test_list": ["assert f(1) == 2"], "test_setup_code": ""}, [("value", "f(1)", 2)]),
        (
            {"test_list": np.array(["assert f(1) == 2", "assert f(2) == 3"])},
            [("value", "f(1)", 2), ("value", "f(2)", 3)],
        ),
        ({"test_list": '["assert f(1) == 2"]'}, [("value", "f(1)", 2)]),
        ({"test_list": ["assert 2 == f(1)"]}, [("value", "f(1)", 2)]),
        ({"test_list": ["assert f(1) is None"]}, [("value", "f(1)", None)]),
        ({"test_list": ["assert math.isclose(f(1), 0.5, rel_tol=0.1)"]}, [("value", "f(1)", 0.5)]),
        ({"test_list": ["assert f(1) > 2"]}, [("hold", "assert f(1) > 2", None)]),
        ({"test_list": ["assert f(1) is g(1)"]}, [("hold", "assert f(1) is g(1)", None)]),
        (
            {"test_imports": ["import math"], "test_setup_code": "a = 1", "test_list": ["assert f(a) == 2"]},
            [("do", "import math", None), ("do", "a = 1", None), ("value", "f(a)", 2)],
        ),
        ({"input_output": json.dumps(PAIRS)}, [("stdin", "1 2\n", "3\n")]),
        ({"input_output": {"inputs": [["1", "2"]], "outputs": [["3"]]}}, [("stdin", "1\n2", "3")]),
        ({"public_test_cases": json.dumps([STDIN])}, [("stdin", "1 2\n", "3\n")]),
        (
            {
                "public_test_cases": json.dumps([STDIN]),
                "private_test_cases": packed([{**STDIN, "input": "9"}]),
            },
            [("stdin", "1 2\n", "3\n"), ("stdin", "9", "3\n")],
        ),
        (
            {"public_test_cases": json.dumps([CALLED]), "metadata": '{"func_name": "scale"}'},
            [("value", "(*[[1, 2], 3],)", [3, 6])],
        ),
        ({"reward_model": {"ground_truth": json.dumps(PAIRS)}}, [("stdin", "1 2\n", "3\n")]),
        ({"reward_model": json.dumps({"ground_truth": json.dumps(PAIRS)})}, [("stdin", "1 2\n", "3\n")]),
        ({"ground_truth": json.dumps([{"type": "stdin_stdout", **PAIRS}])}, None),
        (
            {"ground_truth": {"assert_case": ["assert f(1) == 2"], "inputs": [""], "outputs": [None]}},
            [("value", "f(1)", 2)],
        ),
        (
            {"ground_truth": {"functional": "x = 1\nassert f(x) == 2"}},
            [("do", "x = 1", None), ("value", "f(x)", 2)],
        ),
        ({"tests": [{"input": "1", "output": "2", "type": "stdin_stdout"}]}, [("stdin", "1", "2")]),
    ],
)
def test_the_columns_of_the_common_sets_are_read(row, expected):
    if expected is None:
        with pytest.raises(ValueError, match="ground_truth"):
            read_tests(row)
    else:
        assert kinds(row) == expected


def test_a_named_function_has_the_imports_of_contests_before_it_and_an_assert_has_not():
    called = read_tests({"input_output": {"fn_name": "add", "inputs": [[1, 2]], "outputs": [[3]]}})
    assert (called.method, called.prelude) == ("add", True)
    assert not read_tests({"test_list": ["assert f(1) == 2"]}).prelude


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        (([1, 2], 3), 3),
        (([1, 2], "12"), "12"),
        (("1\n2", "12"), 12),
        (("1\n2", '"12"'), "12"),
        (("1\n2", "[3]"), [3]),
    ],
)
def test_arguments_given_as_json_have_results_given_as_json(pair, expected):
    row = {"input_output": {"fn_name": "add", "inputs": [pair[0]], "outputs": [pair[1]]}}
    assert kinds(row) == [("value", "(*[1, 2],)", expected)]


def test_a_result_that_stands_in_a_list_of_one_may_be_either():
    row = {"input_output": {"fn_name": "add", "inputs": [[1, 2]], "outputs": [[3]]}}
    ((_, _, either),) = kinds(row)
    assert [same(value, either, 0, 0) for value in (3, [3], [[3]], 4)] == [True, True, False, False]


def test_a_column_of_another_name_is_found_by_its_path():
    assert kinds({"extra": {"checks": ["assert f(1) == 2"]}}, "extra.checks") == [("value", "f(1)", 2)]


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"question": "?"},
        {"test_list": []},
        {"test_list": ["import math"]},
        {"test_list": ["assert f(1) =="]},
        {"input_output": "{"},
        {"input_output": json.dumps({"inputs": ["1"], "outputs": []})},
        {"public_test_cases": [{"input": "1"}]},
        {"private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(print))).decode()},
        {"private_test_cases": base64.b64encode(b"no zlib at all, but long").decode()},
    ],
)
def test_a_row_without_tests_says_so(row):
    with pytest.raises(ValueError):
        read_tests(row)


def test_a_pickle_in_packed_tests_runs_nothing():
    class Payload:
        def __reduce__(self):
            return exec, ("raise SystemExit('ran')",)

    text = base64.b64encode(zlib.compress(pickle.dumps(Payload()))).decode()
    with pytest.raises(ValueError, match="unpacked"):
        read_tests({"private_test_cases": text})


class Liar(int):
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 4

    def __index__(self) -> int:
        return 4

    def __format__(self, form: str) -> str:
        return "4"


class Text(str):
    def __str__(self) -> str:
        return "right"


class Pairs(dict):
    def items(self):  # type: ignore[override]
        return [(1, 2)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Liar(0), 0),
        (Text("wrong"), "wrong"),
        (Pairs({3: 4}), {3: 4}),
        (True, True),
        (None, None),
        pytest.param(10**6000, 10**6000, id="huge"),
        (-5, -5),
        (float("inf"), float("inf")),
        (1 + 2j, 1 + 2j),
        ("\ud800\0", "\ud800\0"),
        (b"a", b"a"),
        ([1, (2, {3}), {"a": frozenset([4])}], [1, (2, {3}), {"a": frozenset([4])}]),
    ],
)
def test_a_value_comes_back_as_what_the_builtin_type_in_it_holds(value, expected):
    found = decode(json.loads(json.dumps(plain(value))))
    assert type(found) is type(expected) and found == expected


@pytest.mark.parametrize(
    "coded", [None, 4, [], ["int"], ["int", "zz"], ["bool", 1], ["str", 4], ["set", [["list", []]]], ["x", 1]]
)
def test_what_no_value_is_written_as_is_refused_or_equal_to_nothing(coded):
    try:
        value = decode(coded)
    except ValueError:
        return
    assert isinstance(value, Other) and not same(value, value.kind, 0, 0)


@pytest.mark.parametrize(
    ("value", "expected", "right"),
    [
        (4, 4, True),
        (4.0, 4, True),
        (True, 1, False),
        (1, True, False),
        (0, None, False),
        ("4", 4, False),
        ([1, 2], (1, 2), False),
        ((1, 2), (1, 2), True),
        ([1], [True], False),
        ([1, 2], [1, 2, 3], False),
        ({1, 2}, frozenset([2, 1]), True),
        ({"a": 1.0}, {"a": 1 + 1e-9}, True),
        ({"a": 1}, {"b": 1}, False),
        (0.1 + 0.2, 0.3, True),
        (0.31, 0.3, False),
        (10**18 + 1, 10**18, False),
        (math.nan, math.nan, False),
        (10**400, 1.0, False),
        (Other("A"), 4, False),
    ],
)
def test_values_are_compared_with_their_types(value, expected, right):
    assert same(value, expected, 1e-6, 1e-9) is right


def test_what_would_have_come_through_json_has_lists_and_keys_of_text():
    assert as_json(((1, 2), {3: (4,)})) == [[1, 2], {"3": [4]}]


@pytest.mark.parametrize(
    ("said", "expected", "right"),
    [
        ("3\n", "3", True),
        ("  3  \n\n", "3\n", True),
        ("3\r\n4\r\n", "3\n4", True),
        ("3 4", "3\n4", False),
        ("3\n4", "3", False),
        ("0.3333333", "0.33333333", True),
        ("0.34", "0.33", False),
        ("1e3", "1000.0", True),
        ("50000000000000001", "50000000000000000", False),
        ("1  2", "1 2", True),
        ("a  b", "a b", False),
        ("nan", "0", False),
        ("", "3", False),
        ("YES", "Yes", False),
    ],
)
def test_outputs_are_compared_line_by_line(said, expected, right):
    assert same_output(said, expected, 1e-6, 1e-9) is right


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("print(1)", "print(1)"),
        ("so\n```python\nprint(1)\n```\nand\n```python\nprint(2)\n```\ndone", "print(2)\n"),
        ("```python\nprint(1)\n```\n```\nits output\n```", "print(1)\n"),
        ("```\nprint(1)\n```", "print(1)\n"),
        ("```Python3\nprint(1)", "print(1)"),
        ("~~~py\nprint('```')\n~~~", "print('```')\n"),
        ("", None),
        ("```python\n```", None),
        (" \n", None),
    ],
)
def test_the_last_block_of_python_is_the_answer(response, code):
    assert find_code(response) == code


NUMBERS = {  # of calls that no program may make
    "x86_64": [
        41,
        42,
        56,
        57,
        58,
        59,
        62,
        101,
        105,
        155,
        157,
        165,
        200,
        234,
        248,
        250,
        272,
        298,
        319,
        321,
        322,
    ],
    "aarch64": [198, 203, 220, 221, 117, 129, 130, 131, 39, 40, 97, 167, 217, 219, 241, 279, 280, 281],
}


def decided(program: bytes, machine: int, number: int, arguments: tuple[int, ...] = ()) -> int:
    """What the kernel would answer: the few instructions that a filter is made of."""
    data = struct.pack("=IIQ6Q", number, machine, 0, *(*arguments, *[0] * 6)[:6])
    lines, at, held = list(struct.iter_unpack("=HBBI", program)), 0, 0
    while True:
        code, yes, no, value = lines[at]
        at += 1
        if code == 0x06:
            return value
        if code == 0x20:
            held = struct.unpack_from("=I", data, value)[0]
        elif code == 0x54:
            held &= value
        else:
            at += yes if (held >= value if code == 0x35 else held == value) else no


ALLOWED, REFUSED, UNKNOWN = 0x7FFF0000, 0x50001, 0x50026
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


@pytest.mark.parametrize("machine", NUMBERS)
def test_the_filter_allows_what_is_listed_and_no_more(machine):
    program, architecture = compile_filter(writes=True, machine=machine), ARCHITECTURES[machine]
    column = {"x86_64": 1, "aarch64": 2}[machine]
    rows = [line.split("\t") for line in CALLS.read_text().splitlines()[1:]]
    listed = {row[0]: int(row[column]) for row in rows if row[column]}
    assert len(program) < 8 * 4096 and len(set(listed.values())) == len(listed)
    guarded = {"clone", "prlimit64", "socketpair", "fcntl", "ioctl"}
    for name, number in listed.items():
        assert name in guarded or decided(program, architecture, number) == ALLOWED
    assert {decided(program, architecture, number) for number in NUMBERS[machine]} == {REFUSED}
    assert {decided(program, architecture, number) for number in (425, 435, 440, 452)} == {UNKNOWN}
    assert decided(program, 0x40000003, listed["read"]) == REFUSED  # another machine's calls: 32 bits
    assert decided(program, architecture, 0x40000000 + listed["read"]) == REFUSED  # x32


@pytest.mark.parametrize(
    ("name", "arguments", "allowed"),
    [
        ("clone", (0x3D0F00,), True),
        ("clone", (0x1200011,), False),
        ("prlimit64", (0, 7), True),
        ("prlimit64", (1, 7), False),
        ("socketpair", (1, 0x80001), True),
        ("socketpair", (1, 2), False),
        ("socketpair", (2, 1), False),
        ("fcntl", (1, 4), True),
        ("fcntl", (1, 8), False),
        ("ioctl", (0, 0x5401), True),
        ("ioctl", (0, 0x5412), False),
    ],
)
def test_some_calls_are_allowed_with_some_arguments(name, arguments, allowed):
    rows = (line.split("\t") for line in CALLS.read_text().splitlines())
    number = next(int(row[1]) for row in rows if row[0] == name)
    program = compile_filter(writes=True, machine="x86_64")
    assert decided(program, ARCHITECTURES["x86_64"], number, arguments) == (ALLOWED if allowed else REFUSED)


def test_without_landlock_files_are_opened_to_read_only():
    program, call = compile_filter(writes=False, machine="x86_64"), 257
    assert decided(program, ARCHITECTURES["x86_64"], call, (0, 0, 0o2000000)) == ALLOWED
    for flags in (0o1, 0o2, 0o100, 0o1000):
        assert decided(program, ARCHITECTURES["x86_64"], call, (0, 0, flags)) == REFUSED
    assert decided(program, ARCHITECTURES["x86_64"], 87) == REFUSED  # unlink


def test_a_machine_without_numbers_has_no_filter():
    assert compile_filter(writes=True, machine="riscv64") == b""
