"""Tokens of the whole step -> a factor on each token's surrogate, before the update; all are multiplied."""

import torch
from jaxtyping import Float
from torch import Tensor

from entroray.types import Tokens


def selected(t: Tokens, *, inside: float = 1.0, outside: float = 0.0) -> Float[Tensor, " N"]:
    """Keep the selected tokens and drop the rest, or the other way round (80/20, arXiv 2506.01939).

    `inside where selected, outside elsewhere`
    """
    number = t.advantages.new_tensor  # torch.where of two plain numbers would round them to float32
    return torch.where(t.selected, number(inside), number(outside))
