"""The fixture `fault`, and a table that is gone on with where it was interrupted."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults import table
from tests.faults.record import Fault

HERE = Path(__file__).parent
PASSED = pytest.StashKey[bool]()
DONE = "faults/done"
"""Of pytest's cache: [hash of the source, the tests of the table under way that passed]."""


def in_lane(config: pytest.Config) -> bool:
    """Whether this is the table, or some rows of it: launch/test.sh faults."""
    return str(config.option.markexpr).startswith("faults")


def done(config: pytest.Config) -> set[str]:
    """The tests of a table that was interrupted, of the same source, if pytest may remember them."""
    kept = getattr(config, "cache", None)
    source, tests = kept.get(DONE, ["", []]) if kept else ["", []]
    return set(tests) if source == table.source() else set()


def remember(config: pytest.Config, tests: set[str]) -> None:
    """Let these be the tests that `done` gives."""
    if kept := getattr(config, "cache", None):
        kept.set(DONE, [table.source(), sorted(tests)])


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> Iterator[None]:
    """Every row is in the lane, those of the default lane too; where all are done, or by -k, all are run."""
    for item in items:
        if {"model", "local_ray"} & {*getattr(item, "fixturenames", ())} and item.path.parent == HERE:
            item.add_marker(pytest.mark.ray)
    if not in_lane(config):
        return (yield)
    rows = [i for i in items if i.path.parent == HERE and i.get_closest_marker("fault")]
    for item in rows:
        item.add_marker(pytest.mark.faults)
    yield  # takes out of `items` what is not in the lane
    rows, before = [item for item in rows if item in items], done(config)
    if config.option.keyword or {item.name for item in rows} <= before:
        return remember(config, before - {item.name for item in rows})
    for item in rows:
        if item.name in before:
            item.add_marker(pytest.mark.skip(reason="done in the table that was interrupted"))
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    return report


@pytest.fixture(scope="session", autouse=True)
def one_cache(cache: Path) -> None:
    """`cache`, for every test here."""


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Iterator[Fault]:
    """The row that the marker `fault(number, injected)` names; it is kept when the lane is run."""
    marker = request.node.get_closest_marker("fault")
    given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    row = Fault(marker.args[0], marker.args[1].format(**given), request.node.name)
    yield row
    passed = request.node.stash.get(PASSED, False)
    if in_lane(request.config) and PASSED in request.node.stash:  # else it was interrupted
        table.keep(row.row(held=passed, commit=table.commit()))
    if passed:
        assert row.witness and row.detected and row.lost, f"{row.number}: the row is not told whole: {row}"
        if in_lane(request.config):
            remember(request.config, done(request.config) | {row.test})
