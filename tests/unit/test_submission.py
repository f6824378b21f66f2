"""What `entroray submit` asks of a head, with stand-ins for Ray's client; the real one is in tests/ray."""

import time

import pytest

from entroray.cli.submit import _accepted, _hint

YOUNG = "Request failed with status code 500: No available agent to submit job, please try again later."


def test_a_head_without_its_agent_yet_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([RuntimeError(YOUNG), RuntimeError(YOUNG), "job-1"])
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)

    def submit() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert _accepted(submit) == "job-1" and len(waits) == 2


@pytest.mark.parametrize("said", [YOUNG, "Request failed with status code 400: no such folder"])
def test_it_is_not_asked_for_ever_and_only_where_ray_says_so(said: str) -> None:
    asked: list[str] = []

    def submit() -> str:
        asked.append(said)
        raise RuntimeError(said)

    with pytest.raises(RuntimeError, match="Request failed"):
        _accepted(submit, within=0.0)
    assert len(asked) == 1
    assert ("--dashboard-agent-listen-port" in _hint(said)) == (said == YOUNG)
