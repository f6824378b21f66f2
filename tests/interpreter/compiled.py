"""Compiles the head's kernels for cards that are not here, and prints what came of it, in JSON.

Triton's own assembler goes as far as the card's binary, which only a card can load.
"""

import json
import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from entroray.policy import head_kernels

CARDS = {"A100": 80, "H100": 90}
SIXTEEN = [["tt.divisibility", 16]]
"""What Triton sees of a torch tensor's address, and of a row's length that is a multiple of 16."""


def compiled(kernel: Any, slopes: str, architecture: int, **constants: Any) -> Any:
    """For FP32 logits, and slopes of type `slopes`, a pointer."""
    types = dict.fromkeys(kernel.arg_names, "*fp32") | dict.fromkeys(constants, "constexpr")
    types |= {"ids": "*i64", "pitch": "i32", "columns": "i32"}
    if kernel is head_kernels._slopes_kernel:
        types["out"] = slopes
    types = {name: types[name] for name in kernel.arg_names}
    even = types.keys() - constants.keys() - {"columns"}
    place = kernel.arg_names.index
    source = ASTSource(
        kernel,
        types,
        constexprs={(place(name),): value for name, value in constants.items()},
        attrs={(place(name),): SIXTEEN for name in sorted(even)},
    )
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options=head_kernels.OPTIONS)


def main() -> None:
    found = []
    for card, architecture in CARDS.items():
        for slopes in ("*bf16", "*fp32"):
            ways = [(head_kernels._moments_kernel, {})]
            ways += [(head_kernels._slopes_kernel, {"CAPPED": capped}) for capped in (False, True)]
            for kernel, constants in ways:
                done = compiled(kernel, slopes, architecture, BLOCK=head_kernels.BLOCK, **constants)
                loads = len(re.findall(r"ld\.global\S*\.v4", done.asm["ptx"]))
                row = {"card": card, "kernel": kernel.__name__, "slopes": slopes}
                found.append(row | {"bytes": len(done.asm["cubin"]), "loads of 16 bytes": loads})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
