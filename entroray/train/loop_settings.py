"""How the driver's loop runs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LoopSettings:
    """How the loop runs; what a field does not say is with the setting of its name in `config`."""

    group_size: int
    groups_per_step: int
    max_lag: int
    wait: bool
    """For groups about to grow too old; False refuses and re-issues them."""
    refill_limit: int
    max_failed: float
    stall: float
    resamples: int = 2
    """Times that the failed members of a group are sampled anew before the group is dropped."""
    max_skipped: int = 3
    """Steps in a row that may leave an update out."""
    extra: int = 0
    tokens: int | None = None
    """Response tokens drawn after which no further step is begun."""
    surplus: str = "by_lag"
    score: str = "auto"

    @property
    def keeps_surplus(self) -> bool:
        return self.max_lag > 0 if self.surplus == "by_lag" else self.surplus == "keep"
