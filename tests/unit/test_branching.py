"""Groups that branch, over the toy world: where, how often, who trains what, what becomes of failures."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from entroray.errors import ConfigError
from entroray.metrics import step_metrics
from entroray.metrics.catalogue import family_metrics
from entroray.objective.aggregate import rollout_mean
from entroray.objective.masking import masked_in
from entroray.rollout.branch_points import Attempt, branch_off, choose_positions, failure, sort_members
from entroray.rollout.plans import branching, first_token_forks, independent, tree
from entroray.rollout.splice import cut
from entroray.train.batching import tokens_of
from entroray.types import Draw, Group, MaskReason, Prompt, Rollout, SamplerNotes, Span, Status, Verdict
from tests.documented import matches
from tests.toy import VOCABULARY, ToyWorld, driver
from tests.unit.test_driver import row

LONG = 12
DRAW = Draw(1.0, LONG)
PROMPT = Prompt("q0", "q0", (0,), "3")


class Garden(ToyWorld):
    """Responses of twelve tokens drawn by their seeds, with a sampler's notes; entropy goes by position."""

    def __init__(self, **kwargs) -> None:
        super().__init__(row("grpo"), **kwargs)
        self.asked: list[tuple[int, tuple[int, ...]]] = []
        self.late: set[int] = set()

    async def sample(
        self, prompt: Prompt, seeds: Sequence[int], draw: Draw, after: Sequence[int] = ()
    ) -> list[Rollout]:
        if draw.top_tokens:
            assert draw == Draw(1.0, 1, top_tokens=draw.top_tokens, min_tokens=1)
            return await super().sample(prompt, seeds, draw, after)
        await asyncio.sleep(0)
        self.asked.append((len(seeds), tuple(after)))
        return [self._grown(prompt, seed, tuple(after)) for seed in seeds]

    def _grown(self, prompt: Prompt, seed: int, after: tuple[int, ...]) -> Rollout:
        rng = np.random.default_rng(seed)
        n = 0 if seed in self.late else LONG - len(after)
        ids = rng.integers(0, VOCABULARY, n).astype(np.int32)
        entropy = np.array([noted(len(after) + i) for i in range(n)], np.float32)
        notes = SamplerNotes(entropy, entropy, np.ones(n, np.float32))
        versions = np.full(n, self.version, np.int32)
        logprobs = np.full(n, -np.log(VOCABULARY), np.float32)
        text = " ".join(map(str, [*after, *ids.tolist()]))
        status = Status.OK if n else Status.TIMEOUT
        return Rollout(prompt.id, ids, logprobs, versions, text, 1.0, LONG, status, notes)

    async def judge(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> list[Verdict]:
        right = [float(r.token_ids.sum() % 2) for r in rollouts]
        return [
            Verdict(x, bool(x), answer=str(r.token_ids[-1])) for x, r in zip(right, rollouts, strict=True)
        ]


def noted(position: int) -> float:
    """Entropy at a position: highest at 5, then 8, then 2; 0 at 7."""
    return {5: 2.0, 8: 1.5, 2: 1.0, 7: 0.0}.get(position, 0.1)


def drawn(plan, world: Garden | None = None, count: int = 8) -> list[Rollout]:
    return asyncio.run(plan(world or Garden(), PROMPT, list(range(100, 100 + count)), DRAW))


def one(**changes) -> Rollout:
    return replace(Garden()._grown(PROMPT, 1, ()), **changes)


def uniform_advantage(a: Rollout, b: Rollout) -> bool:
    return a.token_ids.tolist() == b.token_ids.tolist() and (a.spans, a.parent) == (b.spans, b.parent)


# Where


def test_places_are_among_the_highest_entropies_and_each_as_likely() -> None:
    response = one()
    found = Counter(choose_positions(response, 1, seed, top=3, weight="equal")[0] for seed in range(900))
    assert found.keys() == {2, 5, 8}
    assert all(count == pytest.approx(300, abs=4 * np.sqrt(900 * 2 / 9)) for count in found.values())


def test_places_in_proportion_to_entropy() -> None:
    response = one()
    found = Counter(
        choose_positions(response, 1, seed, top=None, weight="entropy")[0] for seed in range(1500)
    )
    total = 2.0 + 1.5 + 1.0 + 6 * 0.1  # positions 1 to 10 but 7
    assert found.keys() == {1, 2, 3, 4, 5, 6, 8, 9, 10}
    for position, entropy in {5: 2.0, 8: 1.5, 2: 1.0, 1: 0.1}.items():
        share = entropy / total
        assert found[position] / 1500 == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 1500))


def test_no_branch_at_the_first_token_the_end_or_what_nobody_drew() -> None:
    everywhere = partial(choose_positions, count=99, seed=3, top=None, weight="equal")
    assert sorted(everywhere(one())) == [1, 2, 3, 4, 5, 6, 8, 9, 10]
    assert 11 in everywhere(one(status=Status.TRUNCATED)), "nothing ended it: its last token is like others"
    tool = one(spans=(Span(2, 4, MaskReason.TOOL),))
    assert not {2, 3} & set(everywhere(tool))
    assert min(everywhere(one(spans=(Span(0, 4, MaskReason.PREFIX),)))) == 5
    holes = one()
    assert holes.notes
    holes.notes.entropy[5] = np.nan
    assert 5 not in everywhere(holes), "a piece that no sampler noted"
    assert len(set(everywhere(one()))) == len(everywhere(one())) and choose_positions(
        one(), 2, 3, top=9, weight="equal"
    )
    with pytest.raises(ConfigError, match=r"rollout\.plan .*`notes`.*rollout=plain"):
        everywhere(one(notes=None))


def test_the_same_seed_chooses_the_same_places() -> None:
    chosen = [choose_positions(one(), 3, seed, top=8, weight="entropy") for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]
    again = [drawn(partial(tree, roots=2, depth=2, width=1)) for _ in range(2)]
    assert all(uniform_advantage(a, b) for a, b in zip(*again, strict=True))


# What they weigh


def weights(*rollouts: Rollout) -> list[list[float]]:
    """Of each token that is trained on, by rollout."""
    group = Group(PROMPT, rollouts, (Verdict(1.0, True),) * len(rollouts))
    n = sum(r.length for r in rollouts)
    columns = {name: np.zeros(n, np.float32) for name in ("logprobs", "entropy", "varentropy")}
    seen = masked_in(tokens_of([group], [torch.zeros(len(rollouts))], columns, 1))
    share = rollout_mean(seen)
    return [share[seen.row == row].tolist() for row in range(len(rollouts))]


def test_a_branch_is_as_long_as_all_that_was_drawn_for_it() -> None:
    """Twelve tokens each: a root, a branch that drew its last three, and one of that which drew one."""
    root = one()
    child = branch_off(root, 0, 9, cut(one(), 3))
    grandchild = branch_off(child, 1, 11, cut(one(), 1))
    assert [len(w) for w in weights(root, child, grandchild)] == [12, 3, 1]
    for each in weights(root, child, grandchild):
        assert each == pytest.approx([1 / 12] * len(each))


def test_what_nobody_drew_is_no_part_of_a_length_not_in_a_prefix_either() -> None:
    root = one(spans=(Span(2, 4, MaskReason.TOOL),))
    root.notes.temperature[5] = np.nan  # type: ignore[union-attr]
    child = branch_off(root, 0, 9, cut(one(), 3))
    assert child.drawn_before == 6 and child.inherited == 9
    alone, grown = weights(root, child)
    assert alone == pytest.approx([1 / 9] * 9) and grown == pytest.approx([1 / 9] * 3)


def test_without_branches_nothing_is_said_of_what_is_inherited() -> None:
    group = Group(PROMPT, (one(), one()), (Verdict(1.0, True),) * 2)
    columns = {name: np.zeros(24, np.float32) for name in ("logprobs", "entropy", "varentropy")}
    assert tokens_of([group], [torch.zeros(2)], columns, 1).drawn_before is None


def test_what_is_inherited_goes_with_its_row() -> None:
    group = Group(PROMPT, (one(), branch_off(one(), 0, 9, cut(one(), 3))), (Verdict(1.0, True),) * 2)
    columns = {name: np.zeros(24, np.float32) for name in ("logprobs", "entropy", "varentropy")}
    taken = tokens_of([group], [torch.zeros(2)], columns, 1).take(torch.tensor([1]))
    assert taken.drawn_before is not None and taken.drawn_before.tolist() == [9]


# Plans


def test_branching_asks_for_roots_and_then_for_what_follows_their_forks() -> None:
    world = Garden()
    members = drawn(partial(branching, roots=3, places=1, top=3), world)
    assert world.asked[0] == (3, ()) and sum(n for n, _ in world.asked) == 8
    assert [r.parent for r in members] == [None] * 3 + [0, 0, 1, 1, 2]
    for r in members[3:]:
        assert r.parent is not None and r.inherited in (2, 5, 8)
        assert r.token_ids[: r.inherited].tolist() == members[r.parent].token_ids[: r.inherited].tolist()
        assert r.length == LONG and r.text.split() == [str(i) for i in r.token_ids]
    assert members[3].inherited == members[4].inherited, "one place for each response, as in CURE"


def test_several_places_share_the_branches_of_a_response() -> None:
    members = drawn(partial(branching, roots=1, places=3, top=3), count=7)
    assert Counter(r.inherited for r in members[1:]) == {2: 2, 5: 2, 8: 2}


def test_a_tree_branches_its_branches() -> None:
    members = drawn(partial(tree, roots=2, depth=2, width=1))
    assert [r.parent for r in members] == [None, None, 0, 1, 0, 1, 2, 3]
    for r in members[6:]:
        assert r.parent is not None and r.inherited > members[r.parent].inherited > 0
    assert len(drawn(partial(tree, roots=1, depth=3, width=1))) == 8
    assert len(drawn(partial(tree, roots=2, depth=1, width=3))) == 8


def test_each_token_of_a_family_is_trained_once() -> None:
    for plan in (partial(branching, roots=2), partial(tree, roots=1, depth=3)):
        members = drawn(plan)
        trained: Counter[tuple[int, int]] = Counter()
        for index, member in enumerate(members):
            trained.update((index, int(p)) for p in np.flatnonzero(member.observed < 0))
        held = {owner(members, i, p) for i, r in enumerate(members) for p in range(r.length)}
        assert set(trained) == held and set(trained.values()) == {1}
        group = Group(PROMPT, tuple(members), tuple(Verdict(1.0, True) for _ in members))
        assert batch([group]).counts.tokens == len(held) == sum(r.length - r.inherited for r in members)


def owner(members: list[Rollout], index: int, position: int) -> tuple[int, int]:
    """Who drew the token at a position of a member."""
    while position < members[index].inherited:
        index = members[index].parent or 0
    return index, position


def batch(groups: list[Group]):
    n = sum(r.length for g in groups for r in g.rollouts)
    entropy = np.concatenate([r.notes.entropy if r.notes else [0.5] for g in groups for r in g.rollouts])
    columns = {"logprobs": np.full(n, -1, np.float32), "entropy": entropy.astype(np.float32)[:n]}
    advantages = [torch.ones(len(g.rollouts)) for g in groups]
    return tokens_of(groups, advantages, columns | {"varentropy": columns["entropy"]}, 0)


def test_forks_begin_with_distinct_likeliest_tokens_that_are_masked() -> None:
    members = drawn(first_token_forks, count=5)
    assert [int(r.token_ids[0]) for r in members] == [0, 1, 2, 3, 4]
    assert all(r.length == LONG and r.observed.tolist() == [REASON] + [-1] * 11 for r in members)
    assert all(r.notes is not None and np.isnan(r.notes.entropy[0]) for r in members)


REASON = list(MaskReason).index(MaskReason.FORCED)


def test_first_tokens_that_come_too_late_are_a_group_that_failed() -> None:
    world = Garden()

    async def late(prompt: Prompt, seeds: Sequence[int], draw: Draw) -> list[Rollout]:
        return [replace(cut(one(), 0), status=Status.TIMEOUT)]

    world.sample = late  # type: ignore[method-assign]
    assert [r.status for r in drawn(first_token_forks, world, 3)] == [Status.TIMEOUT] * 3


def test_a_response_with_no_place_to_branch_has_others_drawn_in_place_of_its_branches() -> None:
    world = Garden()
    world.late = {100}  # the first root fails: it grows nothing, the other takes all branches
    members = drawn(partial(branching, roots=2), world, 4)
    assert [r.parent for r in members] == [None, None, 1, 1]
    plain = drawn(partial(branching, roots=2, top=None), Short(), 4)
    assert [(r.parent, r.length) for r in plain] == [(None, 2)] * 4


class Short(Garden):
    """Two tokens: the first cannot be branched at, nor the last."""

    def _grown(self, prompt: Prompt, seed: int, after: tuple[int, ...]) -> Rollout:
        return cut(super()._grown(prompt, seed, after), 2)


# In the driver


def test_the_driver_trains_on_groups_that_branch() -> None:
    for plan in (partial(branching, roots=2), partial(tree, roots=2), first_token_forks):
        world = Garden()
        d = driver(world)
        d.plan = plan
        asyncio.run(d.train(2))
        assert all(np.isfinite(list(s.values())).all() for s in world.steps)
        share = {"branches/share", "branches/forced"} & world.steps[0].keys()
        assert share == ({"branches/forced"} if plan is first_token_forks else {"branches/share"})


def test_a_run_that_does_not_branch_is_what_it_was() -> None:
    seen = []
    for plan in (None, independent):
        world = ToyWorld(row("grpo"))
        d = driver(world)
        if plan:
            d.plan = plan
        asyncio.run(d.train(3))
        seen.append(
            [
                {k: v for k, v in s.items() if not k.startswith(("seconds", "idle", "tokens/"))}
                for s in world.steps
            ]
        )
    assert seen[0] == seen[1] and not [k for k in seen[0][0] if k.startswith("branches")]


def test_the_oldest_token_of_a_branch_says_how_old_it_is() -> None:
    parent = one(versions=np.full(LONG, 3, np.int32))
    tail = replace(Garden()._grown(PROMPT, 2, tuple(parent.token_ids[:5])), versions=np.full(7, 4, np.int32))
    grown = branch_off(parent, 0, 5, tail)
    assert grown.version == 3 and (grown.parent, grown.inherited) == (0, 5)


def test_a_branch_goes_with_its_parent_and_the_rest_are_named_anew() -> None:
    members = drawn(partial(tree, roots=2))  # parents: -, -, 0, 1, 0, 1, 2, 3
    verdicts = [Verdict(1.0, True) for _ in members]
    verdicts[0] = Verdict(0.0, False, status=Status.INFRA_FAILED)
    members[5] = replace(members[5], status=Status.ABANDONED)
    kept, abandoned, failed = sort_members(list(zip(members, verdicts, strict=True)))
    assert [r.parent for r, _ in kept] == [None, 0, 1]
    assert [r.token_ids.tolist() for r, _ in kept] == [members[i].token_ids.tolist() for i in (1, 3, 7)]
    assert abandoned == (members[5],) and [r for r, _ in failed] == [members[i] for i in (0, 2, 4, 6)]
    assert [failure(*pair) for pair in failed] == ["infra_failed", *["parent_failed"] * 3]
    both = Attempt(tuple(kept)).then(Attempt((), abandoned, failed))
    assert both == Attempt(tuple(kept), abandoned, failed), "what is lost is added once"


def test_what_failed_in_a_family_is_replaced_by_responses_drawn_alone() -> None:
    world, judged = Garden(), []

    async def judge(prompt: Prompt, rollouts: Sequence[Rollout]) -> list[Verdict]:
        judged.append(len(rollouts))
        lost = Verdict(0.0, False, status=Status.INFRA_FAILED)
        return [lost if len(judged) == 1 and i == 0 else Verdict(1.0, True) for i, _ in enumerate(rollouts)]

    world.judge = judge  # type: ignore[method-assign]
    d = driver(world)
    d.plan = partial(branching, roots=2)
    group = asyncio.run(d.rollout(PROMPT, 1, DRAW))
    assert isinstance(group, Group) and judged == [8, 4], "a root and its three branches are missing"
    assert [r.parent for r in group.rollouts] == [None, 0, 0, 0, None, None, None, None]


# What is measured


def test_the_metrics_of_a_step_that_branched_are_those_documented() -> None:
    members = drawn(partial(branching, roots=2, places=1, top=1), count=4)  # all at 5, where H is 2
    verdicts = tuple(Verdict(0.0, False, answer=a) for a in ("1", None, "1", "2"))
    forks = drawn(first_token_forks, count=4)
    groups = [Group(PROMPT, tuple(members), verdicts), Group(PROMPT, tuple(forks), verdicts)]
    found = step_metrics(groups, batch(groups))
    ours = {k: v for k, v in found.items() if matches(k, family_metrics("branching"))}
    assert ours == {
        "branches/share": 2 / 8,
        "branches/inherited": pytest.approx(10 / 96),
        "branches/forced": pytest.approx(4 / 96),
        "branches/position": 5.0,
        "branches/entropy": 2.0,
        "branches/changed": 0.0,
        "answers/distinct_roots": 1.5,
        "answers/distinct_branches": 2.0,
    }
    assert ours.keys() == {m.name for m in family_metrics("branching")}
    shaped = family_metrics("sampler")
    assert {k for k in found if matches(k, shaped)} == {m.name for m in shaped}
    assert np.isfinite(list(found.values())).all(), "forced tokens have no notes, and spoil nothing"


def test_what_a_sampler_did_to_inherited_tokens_is_counted_once() -> None:
    parent, tail = one(), Garden()._grown(PROMPT, 2, (0,) * 6)
    assert parent.notes
    parent.notes.temperature[:6] = 2.0
    grown = branch_off(parent, 0, 6, tail)
    groups = [Group(PROMPT, (parent, grown), (Verdict(1.0, True), Verdict(0.0, False)))]
    assert step_metrics(groups, batch(groups))["sampler/temperature"] == pytest.approx((6 * 2 + 12) / 18)
