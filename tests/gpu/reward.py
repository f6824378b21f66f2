"""A judge that a random model can please: half of its answers are right, whatever was asked."""


def parity(text: str, prompt: object) -> float:
    """1 for an even number of characters."""
    return float(len(text) % 2 == 0)
