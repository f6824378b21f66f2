"""Failures are counted, and too many of them end the run."""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from entroray.errors import DataError, NumericsError
from entroray.types import Verdict


@dataclass
class VerdictFailures:
    """Share of the last `window` responses that got no verdict; above `most` the run ends."""

    most: float
    window: int = 1000
    least: int = 100
    """Verdicts to have seen before the share is judged."""
    recent: deque[str] = field(default_factory=deque)
    """Why each failed; empty where it did not."""
    failed: int = 0
    """How many of these did."""

    def observe(self, verdicts: Sequence[Verdict], asked: int) -> None:
        """Count the verdicts on `asked` responses; DataError when some are missing or too many failed."""
        if len(verdicts) != asked:
            raise DataError(f"the verifier gave {len(verdicts)} verdicts on {asked} responses")
        for v in verdicts:
            self.recent.append("" if v.status.usable else f"{v.status}: {v.detail}")
            self.failed += not v.status.usable
        while len(self.recent) > self.window:
            self.failed -= bool(self.recent.popleft())
        if len(self.recent) >= self.least and self.share > self.most:
            reasons = Counter(filter(None, self.recent)).most_common(3)
            raise DataError(
                f"{self.share:.0%} of the last {len(self.recent)} responses could not be judged, "
                f"{self.most:.0%} may (reward.max_failed): "
                + "; ".join(f"{count} x {reason}" for reason, count in reasons)
            )

    @property
    def share(self) -> float:
        """Of the responses looked back on; 0 of none."""
        return self.failed / max(1, len(self.recent))

    def state(self) -> list[str]:
        return list(self.recent)

    def restore(self, state: Sequence[str]) -> None:
        self.recent, self.failed = deque(state), sum(map(bool, state))


@dataclass
class SkippedUpdates:
    """Steps one after the other in which an update was left out because its gradient was not finite."""

    most: int
    in_a_row: int = 0

    def observe(self, skipped: bool) -> None:
        """Whether this step left an update out; NumericsError at the `most`th in a row that did."""
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row >= self.most:
            raise NumericsError(
                f"the gradient was not finite in {self.in_a_row} steps in a row: lower "
                "learner.lr or learner.max_grad_norm; the batches are in skipped/ of the run directory"
            )

    def state(self) -> int:
        return self.in_a_row

    def restore(self, state: int) -> None:
        self.in_a_row = state


@dataclass
class Stagnation:
    """Evaluations one after the other without a better held-out accuracy (ProRL, arXiv 2505.24864)."""

    patience: int
    """Evaluations; 0 is never."""
    best: float = -1.0
    since: int = 0

    def observe(self, accuracy: float | None) -> bool:
        """Whether the `patience`th in a row has brought nothing better; then the count begins anew."""
        if accuracy is None or not self.patience:
            return False
        better = accuracy > self.best
        self.best, self.since = max(self.best, accuracy), 0 if better else self.since + 1
        stagnates = self.since == self.patience
        self.since = 0 if stagnates else self.since
        return stagnates


@dataclass
class IdleFunctions:
    """Steps one after the other in which a rule of the objective touched no token."""

    patience: int
    """Steps."""
    idle: Counter[str] = field(default_factory=Counter)

    def observe(self, touched: Mapping[str, float]) -> list[str]:
        """The rules, of the tokens `touched` by each, that now touched none for `patience` steps.

        Each is named once until it acts.
        """
        for name, tokens in touched.items():
            self.idle[name] = 0 if tokens else self.idle[name] + 1
        return [name for name in touched if self.idle[name] == self.patience]

    def state(self) -> dict[str, int]:
        return dict(self.idle)

    def restore(self, state: Mapping[str, int]) -> None:
        self.idle = Counter(state)
