"""The head as a module of the model: statistics of tokens in the place of logits."""

from collections.abc import Sequence

from torch import Tensor, nn

from entroray.kept_sets import KeptSets
from entroray.policy.head import PLAIN, Readout, token_stats
from entroray.policy.kept_head import kept_stats


class StreamedHead(nn.Module):
    """Stands where the head stood and keeps its parameters, so that ZeRO-3 gathers them as any module's."""

    bias: nn.Parameter | None

    def __init__(self, head: nn.Linear, readout: Readout = PLAIN):
        super().__init__()
        self.weight, self.readout = head.weight, readout
        self.register_parameter("bias", head.bias)

    def forward(
        self,
        hidden: Tensor,
        token_ids: Tensor,
        temperature: Tensor,
        more: Sequence[str] = (),
        kept: KeptSets | None = None,
    ) -> dict[str, Tensor]:
        """Over the vocabulary, or over the sets of `kept`."""
        given, bias, readout = (hidden, self.weight, token_ids, temperature), self.bias, self.readout
        if kept is None:
            return token_stats(*given, tuple(more), bias=bias, readout=readout)
        return kept_stats(*given, kept, more, bias=bias, readout=readout)
