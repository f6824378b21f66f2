"""Measuring entropy: exact values for anyone's logits, and what a step looked like."""

from entroray.entropy.statistics import describe, token_entropy

__all__ = ["describe", "token_entropy"]
