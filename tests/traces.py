"""A trace as a viewer reads it."""

import gzip
import itertools
import json
from pathlib import Path
from typing import Any


def events(path: Path) -> list[dict[str, Any]]:
    """What a viewer reads, whether or not the array ends."""
    text = gzip.decompress(path.read_bytes()).decode().rstrip()
    return json.loads(text if text.endswith("]") else text + "]")


def spans(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The spans of each track."""
    read = events(path)
    names = {e["pid"]: e["args"]["name"] for e in read if e["ph"] == "M" and e["pid"]}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}
    for event in read:
        if event["ph"] == "X":
            found[names[event["pid"]]].append(event)
    return found


def overlaps(track: list[dict[str, Any]]) -> int:
    """Neighbours in one lane of which one begins before the other ends."""
    lanes = {e["tid"] for e in track}
    ordered = [sorted((e["ts"], e["ts"] + e["dur"]) for e in track if e["tid"] == lane) for lane in lanes]
    return sum(a[1] > b[0] for lane in ordered for a, b in itertools.pairwise(lane))
