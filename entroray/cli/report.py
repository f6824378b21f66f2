"""`entroray report RUN`: write report.html of a run directory."""

from pathlib import Path

from entroray.errors import ConfigError
from entroray.observe.report import write_report


def main(arguments: list[str]) -> int:
    """Prints where the report is; ConfigError unless exactly one run directory is given."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        raise ConfigError(f"report takes one run directory, got {arguments}: entroray report runs/latest")
    print(write_report(Path(arguments[0]).resolve()))
    return 0
