"""The judge `math` on labelled pairs of references and answers, and on the solutions of gsm8k."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from entroray.reward import build_judge
from entroray.types import Prompt, Status

IN_BOX, ALONE = build_judge({"fn": "math"}), build_judge({"fn": "math", "extract": "response"})
DATA = Path(__file__).parent / "data"
GSM8K = Path(__file__).parents[2] / "../shared/data/gsm8k/train.jsonl"
PAIRS = [line.split("\t") for line in (DATA / "math_pairs.tsv").read_text(encoding="utf-8").splitlines()[1:]]
KINDS = sorted({kind for kind, *_ in PAIRS})
"""Of the labelled pairs: how answers are written in MATH, AIME, AMC, GSM8K and OlympiadBench."""


def misjudged(pairs: Iterable[list[str]]) -> list[tuple[str, str, bool]]:
    """Pairs whose verdict is not their label, each with the verdict."""
    found = ((reference, answer, right == "1") for _, reference, answer, right in pairs)
    return [(r, a, not right) for r, a, right in found if right_alone(r, a) is not right]


def right_alone(reference: str, answer: str) -> bool:
    verdict = ALONE(answer, Prompt("0" * 16, "?", (1,), reference))
    assert verdict.status.usable, verdict.detail
    return verdict.correct


@pytest.mark.parametrize("kind", KINDS)
def test_some_labelled_pairs_of_each_kind_are_judged_as_labelled(kind: str) -> None:
    assert misjudged([pair for pair in PAIRS if pair[0] == kind][::8]) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_labelled_pair_is_judged_as_labelled(kind: str) -> None:
    assert misjudged(pair for pair in PAIRS if pair[0] == kind) == []


LEFT = {  # of issue 15, each of a kind that math_pairs.tsv has more of
    True: [
        *(("1/3", r"0.\overline{3}"), ("1/3", "0.(3)"), ("1/3", "0.3\u0305"), ("1/3", "0.333...")),
        *(("42", "42 m^2"), ("42", r"42\text{ cm}^2"), ("42", "42 km/h"), ("C", "(C) 42")),
        *(("B", r"\textbf{(B)}\ 12"), (r"\textbf{(B)}\ 12", "B"), ("42", r"\text{Answer: }42")),
        *(("42", "42 = x"), (r"\sqrt2", "2^{0.5}"), ("hello world", "Hello, world!"), ("5 m", "500 cm")),
        *(("5 cm", "5"), ("5", "5 cm"), ("$5", "500 cents"), ("xy", "yx"), ("12", "twelve")),
    ],
    False: [
        *(("x = cat", "x = act"), ("AB", "BA"), ("H2O", "HO2"), ("a b", "b a"), ("P1", "1P"), ("1P", "P1")),
        *(("f'(x)", "f(x)"), ("f(x)", "f'(x)"), ("5", "5+"), ("5 dollars", "5 cents"), ("5 cm", "5 m")),
        *(("3-5", "-2"), ("-2", "3-5"), ("2-1", "1"), ("42", "1. 42"), ("42", "40 2"), ("2t", "2")),
    ],
}


@pytest.mark.parametrize(
    ("reference", "answer", "right"), [(*pair, how) for how in LEFT for pair in LEFT[how]]
)
def test_what_was_judged_the_other_way_round(reference: str, answer: str, right: bool) -> None:
    assert right_alone(reference, answer) is right


def worked(path: Path) -> Iterator[tuple[str, str, str]]:
    """Solution, its answer, and the answer plus 1."""
    for line in path.read_text(encoding="utf-8").splitlines():
        solution = json.loads(line)["answer"]
        answer = solution.rpartition("####")[2].strip()
        yield solution, answer, str(int(answer.replace(",", "")) + 1)


def wrong_solutions(path: Path) -> list[str]:
    """Solutions not right by their answer, as a reference of it, or right by the answer plus 1."""
    after = build_judge({"fn": "math", "extract": "after"})
    right = lambda judge, response, reference: judge(response, Prompt("0" * 16, "?", (1,), reference)).correct
    return [
        solution
        for solution, answer, more in worked(path)
        if not (right(after, solution, answer) and right(IN_BOX, rf"\boxed{{{answer}}}", solution))
        or right(after, solution, more)
        or right(IN_BOX, rf"\boxed{{{more}}}", solution)
    ]


def test_solutions_of_gsm8k_are_right_and_none_is_right_against_one_more() -> None:
    assert wrong_solutions(DATA / "gsm8k_solutions.jsonl") == []


@pytest.mark.slow
def test_every_solution_of_gsm8k_is_right_and_none_is_right_against_one_more() -> None:
    if not GSM8K.is_file():
        pytest.skip(f"NOT TESTED: GSM8K is not at {GSM8K}")
    assert len([*worked(GSM8K)]) == 7473 and wrong_solutions(GSM8K) == []


def test_one_of_several_references_is_enough_and_each_must_be_readable() -> None:
    several = Prompt("0" * 16, "?", (1,), "42", alternatives=("cat", r"\frac{1}{2}"))
    for answer, right in (("42", True), ("Cat.", True), ("0.5", True), ("43", False), ("dog", False)):
        verdict = ALONE(answer, several)
        assert verdict.status.usable and verdict.correct is right, answer
    unread = ALONE("42", Prompt("0" * 16, "?", (1,), "42", alternatives=("%",)))
    assert unread.status is Status.DATA_FAILED and "'%'" in unread.detail
