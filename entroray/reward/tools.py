"""Tools: plain functions (call, prompt) -> what is said, chosen by name; they run where judges run."""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from entroray.reward import choice, custom
from entroray.reward.verdicts import Judge, last_line
from entroray.types import Prompt, Verdict

Tool = Callable[[str, Prompt], Any]
"""(what stands between the marks of a call, prompt) -> the answer; plain, synchronous, free to raise."""

ERROR = "error"
"""What the policy reads where a tool has failed."""
LONGEST = 4000
"""Characters of an answer; the rest is cut off."""


class Call(str):
    """What is asked of a tool, where a judge is given a response."""


def build_tool(spec: Mapping[str, Any]) -> Judge:
    """The tool that `spec` ({fn: name, setting: value, ...}) describes, in the shape of a judge.

    Its verdict's `answer` is what it said, `correct` whether it could; what it raises is answered with ERROR.
    """
    tool = choice.build_choice(spec, _CHOICES, "rollout.tool")

    def answered(call: str, prompt: Prompt) -> Verdict:
        try:
            return Verdict(1.0, True, str(tool(str(call), prompt))[:LONGEST])
        except (Exception, SystemExit) as error:  # boundary: user code; the policy is told and goes on
            return Verdict(0.0, False, ERROR, detail=last_line(error))

    return answered


def calculator(*, digits: int = 6) -> Tool:
    """Sums, differences, products and quotients of decimal numbers, exactly; shown with `digits` digits.

    Anything else is a ValueError, as are calls of more than 100 characters.
    """

    def calculate(call: str, _: Prompt) -> str:
        value = _value(_parsed(call))
        return str(value.numerator) if value.denominator == 1 else f"{float(value):.{digits}g}"

    return calculate


def custom_tool(*, path: str) -> Tool:
    """`my_file.py:my_function`, called with (call, prompt); what it returns is said as text."""
    return custom.load_function(path, "rollout.tool.path")


_CHOICES: Mapping[str, Callable[..., Tool]] = {"calculator": calculator, "custom": custom_tool}

_ARITHMETIC = re.compile(r"(?!.*(?:\*\*|//))[0-9.+\-*/() ]{1,100}")
_BINARY: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_UNARY: Mapping[type[ast.unaryop], Callable[[Fraction], Fraction]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def _parsed(call: str) -> ast.expr:
    """The expression as a tree that nothing evaluates but `_value`."""
    if not _ARITHMETIC.fullmatch(call):
        raise ValueError(f"{call[:100]!r} is no arithmetic")
    return ast.parse(call.strip(), mode="eval").body


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number):
            return Fraction(str(number))
        case ast.BinOp(left, op, right):
            return _BINARY[type(op)](_value(left), _value(right))
        case ast.UnaryOp(op, operand):
            return _UNARY[type(op)](_value(operand))
    raise ValueError(f"{ast.unparse(node)!r} is no number")
