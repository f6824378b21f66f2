"""Entropy measured, predicted and put into words."""

from entroray.entropy.diagnosis import diagnose
from entroray.entropy.statistics import describe, token_entropy

__all__ = ["describe", "diagnose", "token_entropy"]
