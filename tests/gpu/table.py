"""The results kept, as tables of README.md: python -m tests.gpu.table [--results DIR] [--write]"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

README = Path(__file__).with_name("README.md")
RESULTS = Path(__file__).with_name("results")
OPEN, CLOSE = "<!-- proof -->\n", "<!-- end of proof -->\n"
NOTHING = "No card was at hand: none of it has run on a GPU."
HEAD = ("card", "driver", "torch", "cuda", "triton", "transformers", "vllm", "ray", "deepspeed", "python")


def kept(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Every JSON there, by card and part."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda one: (one["card"], one["part"]))


def lines(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Of a table for each part and card."""
    if not found:
        yield NOTHING
    for one in found:
        said = ", ".join(f"{name} {one[name]}" for name in HEAD[1:] if one.get(name))
        dry = " (dry: tiny shapes, which say nothing of a card)" if one["dry"] else ""
        yield f"**Part {one['part']}: {one['about']}.** {one['card']}{dry}, {said}; {place(one)}."
        yield ""
        yield "| check | verdict | seen | asked |"
        yield "|---|---|---|---|"
        for step in one["planned"]:
            checks = one["steps"].get(step, {}).get("checks")
            if checks is None:
                yield f"| {step} | not run yet | | |"
            for check in checks or []:
                yield row(check)
        yield ""


def place(one: Mapping[str, Any]) -> str:
    """When, of which commit."""
    seconds = sum(step["seconds"] for step in one["steps"].values())
    return f"commit {one['commit'][:12]}, seed {one['seed']}, {one['date']} UTC, {seconds:.0f} s"


def row(check: Mapping[str, Any]) -> str:
    """One check."""
    seen = ", ".join(f"{name.replace('_', ' ')} {short(value)}" for name, value in check["numbers"].items())
    why = check["why"].replace("|", "\\|").replace("\n", " ")
    name = check["name"].replace("|", "\\|")
    return f"| {name} | {check['verdict']} | {seen} | {why[:200]} |"


def short(value: Any) -> str:
    """Four digits of a number."""
    if isinstance(value, list):
        return "[" + ", ".join(short(each) for each in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def summary(found: Sequence[Mapping[str, Any]]) -> str:
    """How many checks have each verdict."""
    verdicts = [
        check["verdict"] for one in found for step in one["steps"].values() for check in step["checks"]
    ]
    return ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))


def shown() -> str:
    """README.md with the tables of what is kept."""
    before, rest = README.read_text().split(OPEN)
    return before + OPEN + "\n" + "\n".join(lines(kept())).rstrip() + "\n\n" + CLOSE + rest.split(CLOSE)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="into README.md too")
    given = parser.parse_args()
    found = kept(given.results)
    print("\n".join(lines(found)))
    print(summary(found))
    if given.write:
        README.write_text(shown())


if __name__ == "__main__":
    main()
