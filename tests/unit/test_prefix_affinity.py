"""Which engine of a pool is asked."""

from entroray.workers.engine_pool import Engine, PrefixAffinity


def engines(*samples: int) -> list[Engine]:
    return [Engine(f"generator {i}", None, in_flight) for i, in_flight in enumerate(samples)]


def ask(affinity: PrefixAffinity, live: list[Engine], prompt: str, samples: int = 1) -> int:
    """The place of the engine asked, which has the samples in flight from then on."""
    engine = affinity.choose(prompt, live)
    engine.in_flight += samples
    return live.index(engine)


def test_a_wave_of_new_prompts_is_dealt_evenly() -> None:
    affinity, live = PrefixAffinity(), engines(0, 0)
    assert [ask(affinity, live, f"q{i}", 8) for i in range(6)] == [0, 1, 0, 1, 0, 1]


def test_later_turns_and_branches_go_where_their_prompt_was_read() -> None:
    affinity, live = PrefixAffinity(), engines(0, 0)
    first = [ask(affinity, live, f"q{i}", 4) for i in range(4)]
    for engine in live:
        engine.in_flight = 0
    later = [ask(affinity, live, f"q{i}") for i in (3, 3, 1, 0, 2, 1)]
    assert first == [0, 1, 0, 1] and later == [1, 1, 1, 0, 0, 1]


def test_an_engine_with_many_more_in_flight_gives_its_prompt_away_for_good() -> None:
    affinity, live = PrefixAffinity(slack=16), engines(0, 0)
    assert ask(affinity, live, "q", 16) == 0
    assert ask(affinity, live, "q") == 0, "16 more than the other"
    assert ask(affinity, live, "q") == 1, "17 more"
    live[0].in_flight = 0
    assert ask(affinity, live, "q") == 1, "which knows it from now on"


def test_an_engine_that_was_lost_is_no_home() -> None:
    affinity, live = PrefixAffinity(), engines(0, 5)
    assert ask(affinity, live, "q") == 0
    assert ask(affinity, live[1:], "q") == 0


def test_the_prompts_remembered_are_the_last_few() -> None:
    affinity, live = PrefixAffinity(capacity=2), engines(0, 0)
    for prompt in ("a", "b", "a", "c"):
        ask(affinity, live, prompt)
    assert list(affinity.engines) == ["a", "c"]
