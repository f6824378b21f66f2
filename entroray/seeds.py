"""Seeds of the draws: the same in every run that is started alike."""

import hashlib


def seeds(run: int, serial: int, attempt: int, count: int) -> list[int]:
    """`count` sampling seeds (31 bits), the same for the same draw in every run with this seed."""
    tag = f"{run}:{serial}:{attempt}".encode()
    stream = hashlib.shake_128(tag).digest(4 * count)
    return [int.from_bytes(stream[i : i + 4], "little") >> 1 for i in range(0, 4 * count, 4)]
