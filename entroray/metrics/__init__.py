"""Entropy measured, predicted and put into words."""

from entroray.metrics.step import step_metrics, token_entropy
from entroray.metrics.step_detail import step_details

__all__ = ["step_details", "step_metrics", "token_entropy"]
