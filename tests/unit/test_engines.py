"""Which of several engines is asked: the one that knows the prompt, unless it owes much more."""

from entroray.workers.engine_pool import Engine, PrefixAffinity


def engines(*owed: int) -> list[Engine]:
    return [Engine(f"generator {i}", None, owes) for i, owes in enumerate(owed)]


def ask(homes: PrefixAffinity, live: list[Engine], prompt: str, samples: int = 1) -> int:
    """The place of the engine asked, which owes the samples from then on."""
    engine = homes.choose(prompt, live)
    engine.owes += samples
    return live.index(engine)


def test_a_wave_of_new_prompts_is_dealt_evenly() -> None:
    homes, live = PrefixAffinity(), engines(0, 0)
    assert [ask(homes, live, f"q{i}", 8) for i in range(6)] == [0, 1, 0, 1, 0, 1]


def test_later_turns_and_branches_go_where_their_prompt_was_read() -> None:
    homes, live = PrefixAffinity(), engines(0, 0)
    first = [ask(homes, live, f"q{i}", 4) for i in range(4)]
    for engine in live:
        engine.owes = 0
    later = [ask(homes, live, f"q{i}") for i in (3, 3, 1, 0, 2, 1)]
    assert first == [0, 1, 0, 1] and later == [1, 1, 1, 0, 0, 1]


def test_an_engine_that_owes_more_than_so_many_gives_its_prompt_away_for_good() -> None:
    homes, live = PrefixAffinity(ahead=16), engines(0, 0)
    assert ask(homes, live, "q", 16) == 0
    assert ask(homes, live, "q") == 0, "16 more than the other"
    assert ask(homes, live, "q") == 1, "17 more"
    live[0].owes = 0
    assert ask(homes, live, "q") == 1, "which knows it from now on"


def test_an_engine_that_was_lost_is_no_home() -> None:
    homes, live = PrefixAffinity(), engines(0, 5)
    assert ask(homes, live, "q") == 0
    assert ask(homes, live[1:], "q") == 0


def test_the_prompts_remembered_are_the_last_few() -> None:
    homes, live = PrefixAffinity(most=2), engines(0, 0)
    for prompt in ("a", "b", "a", "c"):
        ask(homes, live, prompt)
    assert list(homes.known) == ["a", "c"]
