"""What a fault test tells of its fault: what was injected, that it fired, and what then happened."""

import time
from dataclasses import dataclass, field


@dataclass
class Fault:
    """One row of the table of README.md. Seconds are counted from `inject`, or from `fired` without it."""

    number: str
    injected: str
    test: str
    witness: str = ""
    detected: str = ""
    healed: str = ""
    lost: str = ""
    began: float = field(default_factory=time.monotonic)
    at: float = 0.0

    def inject(self) -> None:
        """The fault is made now; what shows it comes later."""
        self.at = time.monotonic()

    def fired(self, witness: str) -> None:
        """The fault is there, and `witness` is what shows it."""
        self.at, self.witness = self.at or time.monotonic(), witness

    def saw(self, what: str, after: float | None = None) -> None:
        """It was noticed, by `what`, now or so many seconds after."""
        self.detected = self._after(what, after)

    def goes_on(self, what: str, lost: str = "nothing", after: float | None = None) -> None:
        """All is as before, by `what`, but for what is `lost`."""
        self.healed, self.lost = self._after(what, after), lost

    def refused(self, what: str) -> None:
        """Nothing was begun: the error or the verdict says `what`."""
        self.detected, self.healed, self.lost = self._after(what), "-", "nothing was begun"

    def row(self, *, held: bool, commit: str) -> dict[str, str]:
        """As it is kept."""
        return {
            "fault": self.number,
            "test": self.test,
            "injected": self.injected,
            "witness": self.witness,
            "detected": self.detected,
            "healed": self.healed,
            "lost": self.lost,
            "verdict": "held" if held else "FAILED",
            "seconds": f"{time.monotonic() - self.began:.0f}",
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "commit": commit,
        }

    def _after(self, what: str, after: float | None = None) -> str:
        assert self.witness, f"{self.number}: nothing has shown that the fault fired"
        return f"{time.monotonic() - self.at if after is None else after:.1f} s: {what}"
