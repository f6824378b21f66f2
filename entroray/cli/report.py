"""`entroray report RUN`: write report.html of a run directory; of several runs, a page of all of them."""

from pathlib import Path

from entroray.cli.flags import Flag, parse_flags
from entroray.errors import ConfigError
from entroray.observe.comparison_page import write_comparison
from entroray.observe.report import write_report

OUT = Flag("out", "FILE")
FLAGS = (OUT,)


def main(arguments: list[str]) -> int:
    """Prints where the page is; ConfigError unless folders are given, several of them not the same."""
    named, given = parse_flags("report", arguments, FLAGS)
    folders = [*dict.fromkeys(Path(name).resolve() for name in given)]
    if wrong := [name for name in given if not Path(name).is_dir()] or ([] if given else ["nothing"]):
        there = "" if Path(wrong[0]).exists() or not given else ", which does not exist"
        raise ConfigError(f"report takes run directories, got {wrong[0]}{there}: entroray report runs/latest")
    if len(folders) == 1 and (len(given) > 1 or OUT.name in named):
        raise ConfigError(f"report --out and a comparison take several runs, got {folders[0]} alone")
    if len(given) == 1:
        print(write_report(folders[0]))
        return 0
    out = Path(named.get(OUT.name, "comparison.html")).resolve()
    twice = len(given) - len(folders)
    lines = [f"given more than once: {twice} of {len(given)} folders"] if twice else []
    print("\n".join([*write_comparison(folders, out), *lines, str(out)]))
    return 0
