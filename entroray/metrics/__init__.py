"""Everything measured: pure functions of logits, tokens, verdicts and finished steps."""

from entroray.metrics.step import step_metrics
from entroray.metrics.step_detail import step_details
from entroray.metrics.token_entropy import token_entropy

__all__ = ["step_details", "step_metrics", "token_entropy"]
