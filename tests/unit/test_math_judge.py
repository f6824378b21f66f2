r"""What the judge `math` takes for right: literal references and answers, each kind on both of its sides."""

import time

import pytest

from entroray.reward import build_judge, extract
from entroray.reward.math_answers import is_equal, read_reference
from entroray.reward.quantities import read_quantity
from entroray.reward.texts import choice, is_text, same_moment
from entroray.reward.writing import clean
from entroray.types import Prompt, Status

RIGHT = {
    "numbers": [
        *(
            ("5", "5"),
            ("1000", "1,000"),
            ("1,000", "1000"),
            ("1000000", "1 000 000"),
            ("007", "7"),
            ("0", "-0"),
        ),
        *(("0.5", ".5"), ("5", "+5"), ("1234.5", "1,234.50"), ("5", "x=5"), ("x=5", "5"), ("42", "(42)")),
    ],
    "fractions, roots and mixed numbers": [
        *((r"\frac{1}{2}", "1/2"), ("1/2", r"\frac12"), ("0.5", r"\frac{1}{2}"), (r"\frac13", "0.333333")),
        *(
            ("1 1/2", "1.5"),
            ("3/2", "1 1/2"),
            (r"1\frac12", "3/2"),
            ("-1 1/2", "-1.5"),
            ("2 3/4", r"\frac{11}{4}"),
        ),
        *(
            (r"\sqrt2", r"\sqrt{2}"),
            ("sqrt(2)", r"\sqrt{2}"),
            (r"\frac{\pi}{2}", "pi/2"),
            (r"\sin x", "sin x"),
        ),
    ],
    "e-notation, tiny and huge": [
        *(("1500", "1.5e3"), ("1.5e3", "1500"), ("1e-7", "10^{-7}"), ("0.0000001", r"1 \times 10^{-7}")),
        *(("1e+16", "10000000000000000"), ("6.02e23", r"6.02 \times 10^{23}"), ("2.5e-05", "0.000025")),
        *((r"\frac{1}{2^{99}}", "2^{-99}"), (r"e^{-100}", r"e^{-100}"), (r"\frac{1}{40000}", "0.000025")),
    ],
    "percent": [
        *((r"50\%", "0.5"), ("0.5", r"50\%"), (r"25\%", r"\frac14"), ("50%", "50"), ("50", r"50\%")),
        *(("12.5%", r"\frac18"), ("-50%", "-0.5"), ("50%", "50 percent"), ("24", r"60\% * 40\% = 24\%")),
    ],
    "Unicode": [
        *(("0.5", "½"), ("1.5", "1½"), (r"\sqrt{2}", "√2"), (r"2\sqrt{3}", "2√3"), (r"\sqrt{x+1}", "√(x+1)")),
        *(
            ("12", "１２"),
            ("42", "٤٢"),
            ("42", "४२"),
            ("-3", "−3"),
            ("-3", "–3"),
            ("x^2", "x²"),
            ("2^{-1}", "2⁻¹"),
        ),
        *(
            (r"2\pi", "2π"),
            (r"\infty", "∞"),
            (r"x \le 3", "x ≤ 3"),
            ("6", "2×3"),
            ("2", "6÷3"),
            (r"\pm 2", "±2"),
        ),
        *((r"(-\infty,1)\cup(2,\infty)", "(-∞,1)∪(2,∞)"), ("90", "90°"), ("5", "5\u200b"), ("101_2", "101₂")),
    ],
    "Markdown and delimiters": [
        *(("42", "**42**"), ("42", "*42*"), ("42", "`42`"), ("42", "**42.**"), ("42", "**Answer:** 42")),
        *(("42", "$42$"), ("42", "$$42$$"), ("42", r"\(42\)"), ("42", r"\[ x = 42 \]"), ("24", "2*3*4")),
    ],
    "units, currency and words around a number": [
        *(
            ("42", "42 dollars"),
            ("18 dollars", "18"),
            ("42 dollars", "42 dollars"),
            ("42", "$42"),
            ("42", "€42"),
        ),
        *(("42", "42€"), ("42", "US$42"), ("-42", "-$42"), ("42", "42 km/h"), ("42", r"42 \text{ cm}^2")),
        *(("5 \\text{ cm}", "5"), ("90^\\circ", "90"), ("42", "$42 per day"), ("42", "a total of 42 apples")),
        *(
            ("42", "The answer is $42$."),
            ("15", "She pays 5 * $3 = $15."),
            ("4", "2 girls + 2 boys = 4 pupils"),
        ),
        *(
            ("5", "答案是5"),
            ("答案是5", "5"),
            ("40,000", "And 45,000-5,000=40,000."),
            ("20", "20 of them are left"),
        ),
    ],
    "equations whose sides hold": [
        *(("42", "6*7=42"), ("42", "x=6*7=42"), ("42", "f(41)=42"), ("42", "x+y=42"), ("x>5", "5<x")),
        *(("x=1, y=2", "x=1, y=2"), (r"x \neq 2", r"x \ne 2"), ("0.333333", r"x=\frac13=0.333333")),
    ],
    "words": [
        *(
            ("Yes", "yes"),
            ("Yes", r"\text{Yes}"),
            ("no solution", "No solution."),
            ("Paris", "The answer is Paris."),
        ),
        *(("cat, dog", "dog, cat"), ("2024-01-31", "2024-01-31"), ("北京", "北京"), ("A", r"\text{(A)}")),
        *(("(C)", "C"), ("B, C", "C, B"), ("Room 101", "101"), ("3 PM", "3 PM"), ("True", "true")),
    ],
    "sets, tuples, intervals, matrices, bases": [
        *(
            ("0,1", "1,0"),
            (r"\{1,2\}", "2,1"),
            ("(1,2,3)", "(1, 2, 3)"),
            ("[1,2)", "[1,2)"),
            ("1,2,3", "1, 2, and 3"),
        ),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        *(("101_2", "101_{2}"), ("101_2", "(101)_2"), ("101_2", "101"), ("1A_{16}", "1a_{16}")),
    ],
    "symbols": [
        *(("2x+3", "3+2x"), ("2xy", "2yx"), ("xy", "yx"), ("x^2-1", "(x-1)(x+1)"), ("1+\\mathrm{i}", "1+i")),
        *(
            ("\\mathrm{e}", "e"),
            ("3+4i", "4i+3"),
            (r"\emptyset", "∅"),
            (r"\mathbf{3}", "3"),
            ("2\\text{i}", "2i"),
        ),
    ],
}
WRONG = {
    "numbers": [
        ("5", "6"),
        ("42", "42!"),
        ("3,5,7", "357"),
        ("0.5", "50"),
        ("50", r"0.5\%"),
        (r"\frac13", "0.3333"),
    ],
    "tiny and huge": [
        *((r"\frac{1}{2004!}", r"\frac{1}{2006!}"), (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}")),
        *(("10^{-20}", "10^{-30}"), ("0.0000001", "0.0000002"), ("0.000025", "0.0000252"), ("0", "10^{-20}")),
        *(("e^{-100}", "e^{-101}"), ("10^{-20}x", "10^{-30}x"), ("(10^{-20},1)", "(10^{-30},1)")),
        *(
            (r"\{10^{-20},1\}", r"\{10^{-21},1\}"),
            ("x=10^{-20}", "x=10^{-30}"),
            ("[0,10^{-20}]", "[0,10^{-30}]"),
        ),
        (r"\begin{pmatrix}10^{-20}\\1\end{pmatrix}", r"\begin{pmatrix}10^{-30}\\1\end{pmatrix}"),
        *(("1.6e-19", r"1.7\times 10^{-19}"), ("100000000000000000000", "100000000000000000001")),
    ],
    "words": [
        *(("ABCD", "DCBA"), ("cat", "act"), ("Dog", "God"), ("listen", "silent"), ("cat, dog", "act, god")),
        *(
            ("(cat, dog)", "(dog, cat)"),
            ("no", "on"),
            ("北京", "京北"),
            ("Paris", "not Paris"),
            ("May 4", "yam 4"),
        ),
        *(("2024-01-31", "1992"), ("Room 101", "Room 102"), ("3 PM", "3 AM"), ("True", "False"), ("A", "B")),
        *(("E", "2.718281828459045"), ("42 dollars", "43 dollars"), ("18 dollars", "18 dollras")),
    ],
    "chains, arrows, negations": [
        *(("42", "41=42"), ("42", "1=2=42"), ("42", "x=41=42"), ("42", "41=43=42"), ("x=42", "x=41=42")),
        *(("x=1,y=2", "x=5=1, y=2"), ("42", "So 41 = 42 dollars."), ("42", r"41 \to 42"), ("42", "41→42")),
        *(("42", r"41 \Rightarrow 42"), ("42", "41 => 42"), ("42", "41 -> 42"), ("42", r"\therefore 42")),
        *(("42", r"\neg 42"), ("42", "¬42"), ("42", r"\neq 42"), ("42", "not 42"), ("42", "It is not 42.")),
        *(("42", "isn't equal to 42"), ("42", "42 is not the answer"), ("42", r"41 \equiv 42")),
    ],
    "lists of guesses": [
        *(
            ("42", "41 42"),
            ("42", "41, 42"),
            ("42", "41 or 42"),
            ("42", r"41 \text{ or } 42"),
            ("42", "41; 42"),
        ),
        *(("42", r"\{41,42\}"), ("42", "x=41, x=42"), ("42", "x = 41 and x = 42"), ("42", "$41$ $42$")),
        *(("42", r"\pm 42"), ("42", "41? 42"), ("42", r"41 \quad 42"), ("42", "41 apples, 42 pears")),
        *(
            ("42", "4 2"),
            ("5 million", "5"),
            ("5", "5 million"),
            ("42", r"42_{41}"),
            ("3", "There are 3 of 5 apples."),
            ("42", "41, no wait, 42"),
            ("42", "x < 42"),
        ),
    ],
    "signs, order, ends": [
        *((r"1 - \mathrm{e}", r"1 + \mathrm{e}"), (r"1 - \frac{1}{\mathrm{e}}", r"1 + \frac{1}{\mathrm{e}}")),
        *((r"1+\mathrm{i}", r"1-\mathrm{i}"), ("(1,2)", "(2,1)"), ("[1,2)", "[1,2]"), (r"\pm 2021", "2021")),
        *(
            ("x=1, y=2", "x=2, y=1"),
            ("x=42", "y=42"),
            (r"x \neq 2", "2"),
            ("12:00", "1:00"),
            ("2x+3", "3+2y"),
        ),
    ],
    "bases": [
        ("101_2", "101_3"),
        ("101_2", "110_2"),
        ("101_2", "101₃"),
        ("1A_{16}", "1B_{16}"),
        ("101_2", "5"),
    ],
    "no number": [
        ("nan", "nan"),
        ("NaN", "nan"),
        ("inf", "inf"),
        ("42", "?"),
        ("42", r"\frac{}{}"),
        ("1/0", "2/0"),
    ],
}
each = lambda table: [(*pair, kind) for kind, pairs in table.items() for pair in pairs]
IN_BOX, ALONE = build_judge({"fn": "math"}), build_judge({"fn": "math", "extract": "response"})


def judged(reference: str, answer: str) -> set[bool]:
    """By the judge that reads a box, and by the one that reads the whole response."""
    prompt = Prompt("0" * 16, "?", (1,), reference)
    verdicts = [IN_BOX(rf"so \boxed{{{answer}}}.", prompt), ALONE(answer, prompt)]
    assert all(v.status.usable for v in verdicts), verdicts[0].detail
    return {v.correct for v in verdicts}


@pytest.mark.parametrize(("reference", "answer", "kind"), each(RIGHT))
def test_a_right_answer_is_right_however_it_is_written(reference: str, answer: str, kind: str) -> None:
    assert judged(reference, answer) == {True}, kind


@pytest.mark.parametrize(("reference", "answer", "kind"), each(WRONG))
def test_a_wrong_answer_is_wrong_whatever_is_beside_it(reference: str, answer: str, kind: str) -> None:
    assert judged(reference, answer) == {False}, kind


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        (r"So the answer is $\boxed{7}$.", "7", "8"),
        ("We have $x=3$ so the answer is $\\boxed{7}$.", "7", "3"),
        ("First, 2+2=4.\nThen 4+3=7.\nThe answer is 7", "7", "4"),
        (r"\(5\)", "5", "6"),
        ("$18.00", "18", "19"),
        ("#### 5", "5", "6"),
        ("5 apples and 7 pears", "5 apples and 7 pears", "5"),
        (r"x\in\{1,2\}", r"\{1,2\}", r"\{1,3\}"),
    ],
)
def test_a_reference_may_stand_in_a_sentence_or_a_solution(reference: str, right: str, wrong: str) -> None:
    assert judged(reference, right) == {True} and judged(reference, wrong) == {False}


@pytest.mark.parametrize(
    ("rule", "response", "right"),
    [
        ("after", "... #### 42 dollars", True),
        ("after", "... #### **42**", True),
        ("after", "... **#### 42**", True),
        ("after", "... #### 42.", True),
        ("after", "... #### 42\nI hope this helps!", False),
        ("after", "... #### 42\nhope this helps", False),
        ("after", "... #### 41\n#### 42", True),
        ("last_line", "thinking\n**42**", True),
        ("last_line", "thinking\n\\[ x = 42 \\]", True),
        ("last_line", "thinking\n$\\boxed{42}$", True),
        ("last_line", "41\nSo 6 * 7 = 42 apples in all.", True),
        ("last_line", "42\nSo 6 * 7 = 43 apples in all.", False),
        ("boxed", r"\boxed {42}", True),
        ("boxed", r"\boxed 42", True),
        ("boxed", r"\\boxed{42}", True),
        ("boxed", r"\fbox{42}", True),
        ("boxed", r"\boxed{41} and then \boxed{42}", True),
        ("boxed", r"\boxed{42}, not \boxed{41}", False),
        ("boxed", r"\boxed{\boxed{42}}", True),
        ("boxed", r"\boxed{41 \boxed{42}}", False),
        ("boxed", r"\boxed{42}. Check: \boxed{}", False),
        ("boxed", r"Write \boxed{ first; \boxed{42}", True),
        ("boxed", r"\boxed{42}, as I was told to use \boxed.", True),
    ],
)
def test_the_answer_is_found_where_the_rule_says(rule: str, response: str, right: bool) -> None:
    verdict = build_judge({"fn": "math", "extract": rule})(response, Prompt("0" * 16, "?", (1,), "42"))
    assert verdict.status.usable and verdict.correct is right


@pytest.mark.parametrize("reference", ["7" * 5000, "0." + "7" * 5000, rf"\frac{{{'7' * 5000}}}{{2}}"])
def test_a_reference_of_more_digits_than_python_reads_is_a_failure_of_the_data(reference: str) -> None:
    verdict = ALONE("7", Prompt("0" * 16, "?", (1,), reference))
    assert verdict.status is Status.DATA_FAILED and "cannot read the reference" in verdict.detail
    assert "4300" in verdict.detail and len(verdict.detail) < 600
    assert not ALONE("7" * 5000, Prompt("0" * 16, "?", (1,), "7")).correct


def test_boxes_without_end_are_read_in_one_pass() -> None:
    began = time.process_time()
    assert extract.boxed("\\boxed{" * 20_000 + "5" + "}" * 20_000) is not None
    assert extract.boxed("\\boxed{" * 100_000) is None
    assert time.process_time() - began < 1


def test_a_long_answer_is_wrong_unread() -> None:
    began = time.process_time()
    for answer in ("9" * 200_000, "(" * 3000 + "5" + ")" * 3000, "+".join(f"x_{i}" for i in range(3000))):
        assert judged("5", answer) == {False}
    assert time.process_time() - began < 1


def test_cleaning_changes_no_plain_mathematics() -> None:
    for text in (r"\frac{x^2}{3!} + \sqrt[3]{2}", "x_1 < 2*y", r"[0, 1) \cup \{2\}", "2e", "3 - 4/5"):
        assert clean(text) == text


def test_an_answer_of_brackets_within_brackets_is_wrong_at_once() -> None:
    reference = read_reference("42")
    assert reference
    for sign in "([{":
        assert not is_equal(reference, sign * 2000)


@pytest.mark.parametrize(
    ("reference", "answer", "right"),
    [
        (r"\emptyset", r"\varnothing", True),
        ("x^2+2x+1", "x**2 + 2*x + 1", True),
        ("x^{12}", "x**12", True),
        ("42", r"42\,", True),
        ("42", r"\; 42 \;", True),
        ("42", r"42\\", True),
        ("42", "42</answer>", True),
        ("42", "**42**", True),
        ("192.168.0.1", "192.168.0.2", False),
        ("192.168.0.1", "192.168.0.1", True),
        ("1.5", "1.5", True),
    ],
)
def test_what_stands_around_an_answer_and_how_powers_and_versions_are_written(
    reference: str, answer: str, right: bool
) -> None:
    read = read_reference(reference)
    assert read and is_equal(read, answer) is right


def test_the_last_line_is_the_last_that_says_something() -> None:
    for text in ("is\n\\[\n42\n\\]", "```\n42\n```", "$$\n42\n$$\n", "42", "<answer>\n42\n</answer>"):
        assert extract.last_line(text) == "42"
    assert extract.last_line("```") == "```" and extract.last_line(" \n") is None


def test_long_rows_of_digits_units_and_brackets_are_read_at_once() -> None:
    began = time.process_time()
    for piece in ("12", "1.", "cm ", "m/", "123,", "1 ", "twenty ", r"\text{", "x'", "(A)", r"0.\overline{"):
        text = clean(piece * (2000 // len(piece)))
        read_quantity(text), choice(text), same_moment("March 5", text), is_text(text)
    assert time.process_time() - began < 2
