"""Tokens of the whole step -> which get special treatment, decided once, before the update."""

from jaxtyping import Bool
from torch import Tensor

from entroray.types import Tokens


def everything(t: Tokens) -> Bool[Tensor, " N"]:
    """No token is special.

    `all tokens`
    """
    return t.mask
