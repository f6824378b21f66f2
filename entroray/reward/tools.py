"""Tools by name: settings -> a function (call, prompt) -> the answer; built and run where judges are.

One of your own is a function in one of your `packages`: settings by keyword, and it returns the tool.
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from entroray.reward.user_file import load_function
from entroray.types import Prompt

SETTING = "rollout.tool"
Tool = Callable[[str, Prompt], Any]
"""(what stands between the marks of a call, prompt) -> the answer; plain, synchronous, free to raise."""

ERROR = "error"
"""What the policy reads where a tool has failed."""
LONGEST = 4000
"""Characters of an answer; the rest is cut off."""


class Call(str):
    """What is asked of a tool, where a judge is given a response."""


def calculator(*, digits: int = 6) -> Tool:
    """Sums, differences, products and quotients of decimal numbers, exactly; shown with `digits` digits.

    Anything else is a ValueError, as are calls of more than 100 characters.
    """

    def calculate(call: str, _: Prompt) -> str:
        value = _value(_parsed(call))
        return str(value.numerator) if value.denominator == 1 else f"{float(value):.{digits}g}"

    return calculate


def custom(*, path: str) -> Tool:
    """`my_file.py:my_function`, called with (call, prompt); what it returns is the answer, as text."""
    return load_function(path, "rollout.tool.path")


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
