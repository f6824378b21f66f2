"""How the members of a group are drawn: each alone, or some as branches of others."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Literal

from entroray.binding import Count, declare
from entroray.roles import Generator
from entroray.rollout import branch_points
from entroray.rollout.splice import join, openings
from entroray.types import Draw, Prompt, Rollout

SETTING = "rollout.plan"
Plan = Callable[[Generator, Prompt, Sequence[int], Draw], Awaitable[list[Rollout]]]
Choose = Callable[[Rollout, int, int], list[int]]
"""Response, number of places, seed -> positions to branch at."""


def _unused_places(places: int, branches: int) -> str:
    """What is wrong with more places than a response has branches to begin at them."""
    if places <= branches:
        return ""
    return (
        f"rollout.plan.places={places}: a response has {branches} branch{'es' if branches > 1 else ''} here, "
        f"so further places are never used; say {branches}, or ask for more branches"
    )


def _branching_misfit(size: int, *, roots: int, places: int, **_: object) -> str:
    if roots >= size:
        return f"rollout.plan.roots={roots} leaves no branches; fewer roots, a larger group, or rollout=plain"
    return _unused_places(places, -(-(size - roots) // roots))


def _tree_misfit(size: int, *, roots: int, depth: int, width: int, places: int, **_: object) -> str:
    if (total := roots * (1 + width) ** depth) != size:
        return f"roots={roots} (1 + width={width})^depth={depth} makes {total} responses; make them equal"
    return _unused_places(places, width)


@declare(neutral=True)
async def independent(
    generator: Generator, prompt: Prompt, seeds: Sequence[int], draw: Draw
) -> list[Rollout]:
    """Every response on its own.

    `all from the prompt`
    """
    return await generator.sample(prompt, seeds, draw)


@declare(needs=("entropy",), siblings=True, misfit=_branching_misfit)
async def branching(
    generator: Generator,
    prompt: Prompt,
    seeds: Sequence[int],
    draw: Draw,
    *,
    roots: Count = 4,
    places: Count = 1,
    top: Count | None = 20,
    weight: Literal["equal", "entropy"] = "equal",
) -> list[Rollout]:
    """Some responses, then branches of them from where the entropy was high (CURE, arXiv 2508.11016).

    `roots from the prompt; the rest from places position(s) of each, weight odds; among its top of highest H`
    The token at such a position is drawn anew. CURE: 4 roots, 3 branches of each from one position among its
    20 highest, and entropies of the learner; it passes over special tokens and those of one character, here
    only the end is. ETMR (arXiv 2508.11356) takes 3 places. A response too short to branch has a response
    drawn alone in place of each branch.
    """
    choose = partial(branch_points.choose_positions, top=top, weight=weight)
    members = await generator.sample(prompt, seeds[:roots], draw)
    return await _grow(generator, prompt, members, seeds[roots:], draw, choose, places)


@declare(needs=("entropy",), siblings=True, misfit=_tree_misfit)
async def tree(
    generator: Generator,
    prompt: Prompt,
    seeds: Sequence[int],
    draw: Draw,
    *,
    roots: Count = 2,
    depth: Count = 2,
    width: Count = 1,
    places: Count = 1,
    top: Count | None = 20,
    weight: Literal["equal", "entropy"] = "equal",
) -> list[Rollout]:
    """Branches of branches: in each round every response there is grows `width` (after EPTree, 2506.11902).

    `roots from the prompt; depth times: width more of each, from places position(s), weight odds; among its
    top of highest H`
    roots (1 + width)^depth responses in all. TreeRL's own rounds take the highest entropies of the whole
    tree, here each response has its share. A branch branches beyond its own first token.
    """
    choose = partial(branch_points.choose_positions, top=top, weight=weight)
    members = await generator.sample(prompt, seeds[:roots], draw)
    for _ in range(depth):
        there = len(members)
        own = seeds[there : there * (1 + width)]
        members = await _grow(generator, prompt, members, own, draw, choose, places)
    return members


@declare(needs=("top_tokens",))
async def first_token_forks(
    generator: Generator, prompt: Prompt, seeds: Sequence[int], draw: Draw
) -> list[Rollout]:
    """Distinct first tokens, the most probable ones, each continued once (after CoT-decoding, 2402.10200).

    `one from each of the G likeliest first tokens, which nothing is learnt from`
    Nobody drew those tokens, so they are masked. What follows is a draw given its first token, and each has
    the same weight in the group, however likely its first token was. Theirs goes on greedily.
    """
    first = Draw(draw.temperature, max_tokens=1, top_tokens=len(seeds), min_tokens=1)
    (begun,) = await generator.sample(prompt, (0,), first)
    if not begun.status.usable:
        return [begun] * len(seeds)
    heads = openings(begun)
    calls = (
        generator.sample(prompt, [s], draw, h.token_ids.tolist()) for h, s in zip(heads, seeds, strict=True)
    )
    return [join(h, tail) for h, (tail,) in zip(heads, await asyncio.gather(*calls), strict=True)]


async def _grow(
    generator: Generator,
    prompt: Prompt,
    members: list[Rollout],
    seeds: Sequence[int],
    draw: Draw,
    choose: Choose,
    places: int,
) -> list[Rollout]:
    """`members`, and a branch of them, dealt in turn, for each of `seeds`."""
    dealt = _deal_seeds(members, seeds, choose, places)
    after = lambda at: members[at[0]].token_ids[: at[1]].tolist() if at else ()
    calls = [generator.sample(prompt, own, draw, after(at)) for at, own in dealt.items()]
    grown: list[Rollout] = []
    for at, tails in zip(dealt, await asyncio.gather(*calls), strict=True):
        grown += [branch_points.branch_off(members[at[0]], *at, tail) if at else tail for tail in tails]
    return [*members, *grown]


def _deal_seeds(
    members: Sequence[Rollout], seeds: Sequence[int], choose: Choose, places: int
) -> Mapping[tuple[int, int] | None, list[int]]:
    """Seeds by (parent, position); under None those whose parent has no place to branch at."""
    usable = [index for index, member in enumerate(members) if member.status.usable]
    dealt: dict[tuple[int, int] | None, list[int]] = {}
    if not usable:
        return {None: list(seeds)}
    for turn, index in enumerate(usable):
        own = seeds[turn :: len(usable)]
        positions = choose(members[index], places, own[0]) if own else []
        for number, seed in enumerate(own):
            at = (index, positions[number % len(positions)]) if positions else None
            dealt.setdefault(at, []).append(seed)
    return dealt
