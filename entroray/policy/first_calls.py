"""MKL's functions of vectors, each called once before two threads may call it together."""

import torch

FUNCTIONS = (
    *(torch.cos, torch.sin, torch.tan, torch.tanh, torch.exp, torch.expm1, torch.log, torch.log1p),
    *(torch.log2, torch.log10, torch.sqrt, torch.erf, torch.erfc, torch.acos, torch.asin, torch.atan),
)
"""What torch leaves to MKL on an x86 CPU."""


def settle() -> None:
    """Call them in this thread alone, before a process computes with several.

    A first call from two threads at once may leave one of them with results good to 1e-4 only (MKL 2024.2:
    seen in 1 of 3,000 processes, and as an engine whose rotary table was off from its 256th position on).
    """
    few = torch.full((16,), 0.5)  # too few for a second thread
    for function in FUNCTIONS:
        function(few)
