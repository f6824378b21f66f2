"""launch/install.sh, against the stubs of `test_launch.py`."""

from tests.files.test_launch import machine

__all__ = ["machine"]  # a fixture


def test_a_copy_goes_into_a_folder_that_is_given_and_is_brought_up_to_date(machine):
    for folder in ("entroray", "conf"):
        (machine.checkout / folder).mkdir()
        (machine.checkout / folder / "file").write_text("first")
    place = machine.checkout.parent / "environment"
    first = machine.run("install.sh", str(place))
    assert first.returncode == 0 and f"{place}/bin/entroray doctor" in first.stdout, first.stderr
    told = machine.told()
    assert "--reinstall-package entroray .[cpu]\n" in told and " -e " not in told and "dev" not in told
    assert not (machine.checkout / ".venv").exists()
    machine.run("install.sh", str(place))
    assert machine.told() == ""
    (machine.checkout / "conf" / "file").write_text("second")
    assert f"bringing {place} up to date" in machine.run("install.sh", str(place)).stdout
    assert "--reinstall-package entroray .[cpu]\n" in machine.told()


def test_an_environment_with_a_space_in_its_path_is_refused_before_anything_is_made(machine):
    """Torch links DeepSpeed's op by a line without quotes; a checkout with one may make it elsewhere."""
    spaced, place = machine.checkout.with_name("my checkout"), machine.checkout.with_name("my environment")
    refused = machine.run("install.sh", str(place))
    machine.checkout = machine.checkout.rename(spaced)
    for each in (refused, machine.setup(), machine.run("test.sh")):
        assert each.returncode == 3 and "launch/install.sh FOLDER" in each.stderr, each.stderr
    assert machine.told() == "" and not place.exists() and not (spaced / ".venv").exists()
    for folder in ("entroray", "conf"):
        (spaced / folder).mkdir()
    assert machine.run("install.sh", str(machine.checkout.parent / "environment")).returncode == 0


def test_a_folder_with_something_else_in_it_is_left_as_it_is(machine):
    place = machine.checkout.parent / "letters"
    place.mkdir()
    (place / "letter").write_text("dear")
    refused = machine.run("install.sh", str(place))
    assert refused.returncode == 2 and "give another folder" in refused.stderr
    assert (place / "letter").read_text() == "dear" and machine.told() == ""
    assert machine.run("install.sh").returncode == machine.run("install.sh", "--help").returncode == 2
