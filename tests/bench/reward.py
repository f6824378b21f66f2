"""The reward of the benchmarks: right by chance, so that every group has a gradient."""

import zlib
from typing import Any


def parity(response: str, prompt: Any) -> float:
    """0 or 1 by a checksum of the text."""
    return float(zlib.crc32(response.encode(errors="replace")) & 1)
