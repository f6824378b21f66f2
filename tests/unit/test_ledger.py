"""issued = trained + dropped(reason) + pending: by hand, by chance beside a list of samples, in true runs."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from entroray.errors import LedgerError
from entroray.rollout.branch_points import Attempt
from entroray.rollout.ledger import Evaluated, Ledger
from entroray.types import Draw, Group, Prompt, Rollout, Status, Verdict
from tests.toy import ToyWorld

OK = Verdict(0.0, False)


def sample(prompt_id: str, tokens: int, **changes: Any) -> Rollout:
    ids = np.zeros(tokens, np.int32)
    return Rollout(prompt_id, ids, ids.astype(np.float32), ids, "", 1.0, 99, **changes)


def group(prompt_id: str, members: list[Rollout], **changes: Any) -> Group:
    prompt = Prompt(prompt_id, "", (0,), "")
    return Group(prompt, tuple(members), tuple(OK for _ in members), **changes)


def issued(positions: int, tokens: int = 5) -> tuple[Ledger, list[Group]]:
    """Groups of two samples in flight, serials from 1 and positions from 0 on."""
    ledger, groups = Ledger(), list[Group]()
    for place in range(positions):
        members = [sample(f"p{place}", tokens), sample(f"p{place}", tokens)]
        ledger.issue(place + 1, place, f"p{place}")
        ledger.ask(place + 1, 2)
        ledger.receive(place + 1, Attempt(tuple((m, OK) for m in members)))
        groups.append(group(f"p{place}", members))
    return ledger, groups


def lines(ledger: Ledger) -> dict[str, list[int]]:
    return {name: list(line.values()) for name, line in ledger.table().items()}


# By hand.


def test_each_group_is_counted_by_what_became_of_it() -> None:
    ledger, groups = issued(5)
    ledger.take(1)
    ledger.take(2)
    ledger.drop(3, "no signal", groups[2])
    ledger.drop(4, "refused", groups[3])
    ledger.issue(6, 3, "p3")
    ledger.check([5, 6])
    ledger.commit(groups[:2])
    ledger.check([5, 6])
    assert lines(ledger) == {
        "issued": [5, 6, 10, 50],
        "trained": [2, 2, 4, 20],
        "dropped: no signal": [1, 1, 2, 10],
        "dropped: refused": [0, 1, 2, 10],
        "pending": [2, 2, 2, 10],
    }
    assert ledger.spent == 40
    assert "ledger     dropped: refused: 1 groups, 2 samples, 10 tokens" in ledger.report()


def test_members_are_dropped_by_their_own_reason_and_the_others_by_their_groups() -> None:
    ledger = Ledger()
    ledger.issue(1, 0, "q")
    ledger.ask(1, 4)
    late = Verdict(0.0, False, status=Status.TIMEOUT)
    dead, good = sample("q", 1, status=Status.INFRA_FAILED), sample("q", 4)
    gone = sample("q", 2, status=Status.ABANDONED)
    ledger.receive(1, Attempt(((good, OK),), (gone,), ((dead, OK), (sample("q", 3), late))))
    ledger.check([1])
    ledger.drop(1, "timeout: of 8 s")
    ledger.check([])
    assert lines(ledger) == {
        "issued": [1, 1, 4, 10],
        "trained": [0, 0, 0, 0],
        "dropped: infra_failed": [0, 0, 1, 1],
        "dropped: timeout": [1, 1, 3, 9],
        "pending": [0, 0, 0, 0],
    }


def test_second_draws_replays_and_evaluations_have_lines_of_their_own() -> None:
    ledger = Ledger()
    ledger.issue(1, 0, "q")
    first, again = [sample("q", 2), sample("q", 2)], [sample("q", 3), sample("q", 3)]
    for members, line in ((first, ""), (again, "second_draw")):
        ledger.ask(1, 2)
        ledger.receive(1, Attempt(tuple((m, OK) for m in members)), line)
    old = sample("q", 7, replayed=True)
    made = group("q", [again[0], old], earlier=(group("q", first),), replaced=(again[1],))
    ledger.take(1)
    ledger.commit([made])
    asyncio.run(Evaluated(ToyWorld(None), ledger).sample(Prompt("e", "", (0,), ""), (1, 2), Draw(1.0, 2)))  # type: ignore[arg-type]
    ledger.check([])
    assert lines(ledger) == {
        "issued": [1, 1, 4, 10],
        "second_draw": [0, 0, 2, 6],
        "trained": [1, 1, 1, 3],
        "dropped: first_draw": [0, 0, 2, 4],
        "dropped: replaced": [0, 0, 1, 3],
        "replay": [0, 1, 1, 7],
        "evaluation": [0, 0, 2, 4],
        "pending": [0, 0, 0, 0],
    }


def test_an_update_that_was_left_out_trained_on_nothing() -> None:
    ledger, groups = issued(2)
    ledger.take(1)
    ledger.take(2)
    ledger.commit(groups, reason="skipped")
    ledger.check([])
    assert lines(ledger)["dropped: skipped"] == [2, 2, 4, 20] and not any(lines(ledger)["trained"])


def test_what_is_drawn_beyond_the_checkpoint_that_a_run_goes_on_from_is_rolled_back() -> None:
    ledger, groups = issued(3)
    ledger.take(1)
    ledger.commit(groups[:1])
    kept = json.loads(json.dumps(ledger.state()))  # groups 2 and 3 are in flight
    ledger.issue(4, 3, "p3")
    ledger.ask(4, 2)
    fresh = Ledger()
    for each in (ledger, fresh):
        each.restore(kept)
        with pytest.raises(LedgerError, match=r"positions \[1, 2\] were not issued again"):
            each.check([])
        for serial in (2, 3):
            each.issue(serial, serial - 1, f"p{serial - 1}")
        each.check([2, 3])
    here = {"issued": [3, 5, 6, 30], "trained": [1, 1, 2, 10], "pending": [2, 2, 0, 0]}
    assert lines(fresh) == {**here, "dropped: rolled_back": [0, 2, 4, 20]}
    here["issued"] = [3, 6, 8, 30]
    assert lines(ledger) == {**here, "dropped: rolled_back": [0, 3, 6, 20]}, "the fourth group, too"
    assert ledger.spent == fresh.spent == 10
    ledger.restore(Ledger().state())  # there was no checkpoint
    ledger.issue(9, 0, "p0")
    ledger.check([9])
    assert lines(ledger)["dropped: rolled_back"] == [0, 6, 8, 30] and lines(ledger)["issued"] == [1, 7, 8, 30]


# What goes wrong is found.


def lose_a_group(ledger: Ledger, groups: list[Group]) -> list[int]:
    return [2]


def train_on_a_group_twice(ledger: Ledger, groups: list[Group]) -> list[int]:
    ledger.take(1)
    ledger.commit([groups[0], groups[0]])
    return [2, 3]


def train_on_another_group(ledger: Ledger, groups: list[Group]) -> list[int]:
    ledger.take(1)
    ledger.commit([groups[1]])
    return [2, 3]


def take_and_forget(ledger: Ledger, groups: list[Group]) -> list[int]:
    ledger.take(1)
    ledger.commit([])
    return [2, 3]


def lose_a_sample(ledger: Ledger, groups: list[Group]) -> list[int]:
    ledger.drop(1, "no signal", replace(groups[0], rollouts=groups[0].rollouts[:1], verdicts=(OK,)))
    return [2, 3]


def lose_tokens(ledger: Ledger, groups: list[Group]) -> list[int]:
    cut = tuple(replace(r, token_ids=r.token_ids[:-1]) for r in groups[0].rollouts)
    ledger.drop(1, "surplus", replace(groups[0], rollouts=cut))
    return [2, 3]


def issue_a_prompt_twice(ledger: Ledger, groups: list[Group]) -> list[int]:
    ledger.issue(4, 1, "p1")
    return [1, 2, 3, 4]


def refuse_and_forget(ledger: Ledger, groups: list[Group]) -> list[int]:
    ledger.drop(1, "refused", groups[0])
    return [2, 3]


def draw_for_a_group_that_is_gone(ledger: Ledger, groups: list[Group]) -> list[int]:
    ledger.drop(1, "no signal", groups[0])
    ledger.ask(1, 2)
    return [2, 3]


def count_wrong(ledger: Ledger, groups: list[Group]) -> list[int]:
    ledger.lines["issued"] = ledger.lines["issued"] + (0, 0, 0, 1)
    return [1, 2, 3]


FAULTS = {
    lose_a_group: r"groups \[1, 3\] are in flight and were not issued, or",
    train_on_a_group_twice: r"-1 groups are nowhere",
    train_on_another_group: r"the group of p1 was trained on for p0",
    take_and_forget: r"of p0, trained, does .*: \+2 samples, \+10 tokens",
    lose_a_sample: r"of p0, no signal, does .*: \+1 samples, \+5 tokens",
    lose_tokens: r"of p0, surplus, does .*: \+0 samples, \+2 tokens",
    issue_a_prompt_twice: r"position 1 \(p1\) was issued twice",
    refuse_and_forget: r"positions \[0\] were not issued again",
    draw_for_a_group_that_is_gone: r"groups \[1\] are in flight and were not issued",
    count_wrong: r"\+1 tokens are nowhere",
}


@pytest.mark.parametrize(("fault", "found"), FAULTS.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_a_fault_is_found_and_the_whole_ledger_printed(
    fault: Callable[[Ledger, list[Group]], list[int]], found: str
) -> None:
    ledger, groups = issued(3)
    ledger.check([1, 2, 3])
    with pytest.raises(LedgerError, match=found) as error:
        ledger.check(fault(ledger, groups))
    assert error.value.exit_code == 1 and "\nledger     issued: " in str(error.value)


def test_a_run_goes_on_from_a_checkpoint_whose_ledger_did_not_balance() -> None:
    for fault in FAULTS:
        ledger, groups = issued(3)
        fault(ledger, groups)
        rest = Ledger()
        rest.restore(json.loads(json.dumps(ledger.state())))
        in_flight = list(range(9, 9 + len(rest.again)))
        for serial, position in zip(in_flight, sorted(rest.again), strict=True):
            rest.issue(serial, position, f"p{position}")
        rest.check(in_flight)


# By chance.


class Book(RuleBasedStateMachine):
    """A ledger beside a list of every sample that was ever asked for, and what became of each."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger, self.samples, self.serial, self.position = Ledger(), list[dict](), 0, 0
        self.groups: dict[int, str] = {}
        self.fates = Counter[str]()
        self.kept: Any = None

    def own(self, serial: int) -> list[dict]:
        return [s for s in self.samples if s["serial"] == serial and s["fate"] == "pending"]

    def name(self, serial: int) -> str:
        return self.groups[serial]

    @rule()
    def begin(self) -> None:
        self.serial += 1
        self.groups[self.serial] = f"p{self.position}"
        self.ledger.issue(self.serial, self.position, f"p{self.position}")
        self.position += 1

    @precondition(lambda self: self.groups)
    @rule(
        pick=st.integers(0, 99), members=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=4)
    )
    def draw(self, pick: int, members: list[tuple[int, int]]) -> None:
        """Members of some tokens each; of kind 0 and 1 they are good, 2 abandoned, 3 late."""
        serial = sorted(self.groups)[pick % len(self.groups)]
        made = Attempt()
        self.ledger.ask(serial, len(members))
        for tokens, kind in members:
            drawn = sample(self.name(serial), tokens)
            late = ((drawn, replace(OK, status=Status.TIMEOUT)),)
            made = made.then(Attempt(*(((drawn, OK),), (), ()) if kind < 2 else ((), (), late)))
            held = {"serial": serial, "drawn": drawn, "fate": "pending", "late": kind >= 2}
            self.samples.append(held)
        self.ledger.receive(serial, made)

    def close(self, serial: int, fate: str) -> Group:
        own = self.own(serial)
        for each in own:
            each["fate"] = "timeout" if each["late"] else fate
        name = self.groups.pop(serial)
        self.fates[fate] += 1
        return group(name, [s["drawn"] for s in own if not s["late"]])

    @precondition(lambda self: self.groups)
    @rule(pick=st.integers(0, 99), fate=st.sampled_from(["trained", "no signal", "surplus", "skipped"]))
    def end(self, pick: int, fate: str) -> None:
        serial = sorted(self.groups)[pick % len(self.groups)]
        made = self.close(serial, fate)
        if fate in ("trained", "skipped"):
            self.ledger.take(serial)
            self.ledger.commit([made], reason=fate)
        else:
            self.ledger.drop(serial, fate, made)

    @precondition(lambda self: self.groups)
    @rule(pick=st.integers(0, 99))
    def refuse(self, pick: int) -> None:
        serial = sorted(self.groups)[pick % len(self.groups)]
        name = self.name(serial)
        self.ledger.drop(serial, "refused", self.close(serial, "refused"))
        self.serial += 1
        self.groups[self.serial] = name
        self.ledger.issue(self.serial, int(name[1:]), name)

    @rule()
    def save(self) -> None:
        fates = {id(s): s["fate"] for s in self.samples}
        state = json.loads(json.dumps(self.ledger.state()))
        self.kept = state, fates, dict(self.groups), self.serial, self.position, Counter(self.fates)

    @precondition(lambda self: self.kept)
    @rule()
    def go_back(self) -> None:
        """In the same process, as after a rank's death."""
        state, fates, groups, _, position, ended = self.kept
        began = self.begun
        for each in self.samples:
            kept = fates.get(id(each), "pending")
            each["fate"] = "rolled_back" if kept == "pending" else kept
        self.ledger.restore(state)
        self.fates = Counter(ended)
        self.fates["rolled_back"] = began - sum(n for fate, n in ended.items() if fate != "rolled_back")
        self.position, self.groups = position, {}
        for name in groups.values():
            self.serial += 1
            self.groups[self.serial] = name
            self.ledger.issue(self.serial, int(name[1:]), name)

    @property
    def begun(self) -> int:
        return self.fates.total() + len(self.groups)

    @invariant()
    def it_balances_and_says_what_became_of_each(self) -> None:
        self.ledger.check(list(self.groups))
        told = {name.removeprefix("dropped: "): n for name, n in lines(self.ledger).items()}
        for fate in {
            "trained",
            "timeout",
            "no signal",
            "surplus",
            "refused",
            "skipped",
            "rolled_back",
            "pending",
        }:
            own = [s["drawn"].length for s in self.samples if s["fate"] == fate]
            groups = len(self.groups) if fate == "pending" else self.fates[fate]
            assert told.get(fate, [0] * 4)[1:] == [groups, len(own), sum(own)], fate
        whole = [self.begun, len(self.samples), sum(s["drawn"].length for s in self.samples)]
        assert told.get("issued", [0] * 4) == [self.position, *whole]


TestBook = Book.TestCase
TestBook.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)
