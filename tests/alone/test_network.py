"""Two processes of this machine sum a megabyte as ranks do, or say why not."""

import time

import pytest

from entroray.cli import doctor
from entroray.errors import PreflightError
from tests.composed import configured


def test_a_doctor_sums_a_megabyte_between_two_processes() -> None:
    said = doctor.network(configured())
    assert said.startswith("1 MB summed by gloo over 2 processes (rank 0: 127.0.0.1 on lo, ")
    assert said.count(" ms") == 2


def test_a_doctor_that_is_told_a_wrong_interface_names_the_variable_and_does_not_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    began = time.monotonic()
    with pytest.raises(PreflightError, match=r"GLOO_SOCKET_IFNAME=nowhere0 is no interface of .*lo"):
        doctor.network(configured())
    assert time.monotonic() - began < 25
