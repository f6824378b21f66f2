"""Run folders: where a run may be, which is finished, and what a resumption compares."""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from entroray.cli import eval as cli_eval
from entroray.cli import lab
from entroray.cli.verify_resume import differences
from entroray.config import Config, Reward, Run
from entroray.data.prompts import Split
from entroray.errors import ConfigError, PreflightError
from entroray.evaluation.evaluate import heldout_prompts
from entroray.policy.tokenizer import byte_tokenizer
from entroray.types import Prompt
from entroray.wiring import run_directory, warm_start
from entroray.wiring.dataset import Dataset, identity
from entroray.wiring.run_directory import RESUME, RunDirectory, place, resume_rule
from entroray.workers.checkpoint import commit
from tests.composed import composed, configured


def resume(folder: Path, **settings: Any) -> RunDirectory | None:
    """What `run.resume=auto` finds in `folder` with seed 1 and 5 steps, but for `settings` by path."""
    tree = OmegaConf.structured(Config)
    given = {"run.dir": str(folder), "run.resume": "auto", "run.steps": 5, "seed": 1, **settings}
    for path, value in given.items():
        OmegaConf.update(tree, path, value, force_add=True)
    return run_directory.resume_run(OmegaConf.to_object(tree).run, tree)


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run of seed 1 and 5 steps that was cut after its third, which has a checkpoint."""
    folder, config = tmp_path / "run", Config(seed=1, run=Run(steps=5))
    part = folder / "checkpoints" / ".step-000003.part"
    part.mkdir(parents=True)
    state = {"version": 3, "accuracy": None, "settings": asdict(config), "identity": {"data.task": "abc"}}
    (part / "driver.json").write_text(json.dumps(state))
    (part / "weights.pt").write_bytes(b"w" * 100)
    commit(part, folder / "checkpoints" / "step-000003")
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": i}) + "\n" for i in (1, 2, 3)))
    (folder / "events.jsonl").touch()
    OmegaConf.save(OmegaConf.structured(config), folder / "config.yaml")
    (folder / "manifest.json").write_text("{}")
    return folder


# What a resumption compares.


def leaves(schema: Any = Config, prefix: str = "") -> list[str]:
    inner = [(f, f.default_factory) for f in fields(schema)]
    found = [leaves(s, f"{prefix}{f.name}.") if is_dataclass(s) else [prefix + f.name] for f, s in inner]
    return [path for each in found for path in each]


def test_every_setting_has_a_rule_and_every_rule_a_setting() -> None:
    known = leaves()
    assert {resume_rule(path)[0] for path in known} == {"fixed", "free", "own"}
    for beginning, (kind, _) in RESUME.items():
        assert kind in ("fixed", "free", "own")
        free = ("reward.parts.", "*.judge.", "learner.deepspeed.")  # what others call their settings
        assert beginning.startswith(free) or any(f"{path}.".startswith(f"{beginning}.") for path in known)
    assert all(path.split(".")[0] in RESUME for path in known), "a new setting has its section's rule"


def test_the_same_command_goes_on(begun: Path) -> None:
    found = resume(begun)
    assert found and found.resume == (begun / "checkpoints" / "step-000003", 3) and not found.changed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(("seed", 2), ("model.path", "/other"), ("model.dtype", "bfloat16"), ("data.task", "countdown")),
        *(("data.settings.size", 5), ("objective.keep.fn", "informative"), ("reward.path", "a.py:f")),
        *(("sampler.temperature", 0.9), ("rollout.group_size", 4), ("driver.max_lag", 1)),
        *(("learner.lora.rank", 2), ("learner.betas", [0.9, 0.9])),
        ("learner.deepspeed.optimizer.type", "Lion"),
        ("control.a", {"knob": "learner.lr", "fn": "constant"}),
    ],
)
def test_what_makes_a_run_another_is_refused_by_name(begun: Path, path: str, value: object) -> None:
    with pytest.raises(PreflightError, match=rf"^run\.dir=/.*\b{path}.*config\.yaml.*run\.dir"):
        resume(begun, **{path: value})


def test_what_may_change_is_said_and_kept(begun: Path, capsys: pytest.CaptureFixture) -> None:
    changes = {"run.steps": 9, "learner.lr": 1e-5, "evaluate.every": 2, "driver.stall": 60.0}
    changes |= {"learner.ranks": 2, "learner.zero_stage": 3, "generator.replicas": 2, "verifier.replicas": 3}
    changes["learner.deepspeed.zero_optimization.offload_optimizer.device"] = "cpu"
    found = resume(begun, **changes, **{"generator.engine.max_num_seqs": 8})
    assert found and {path: new for path, (_, new) in found.changed.items()} == {
        **changes,
        "generator.engine.max_num_seqs": 8,
    }
    said = capsys.readouterr().out
    assert all(f"resume: {path}=" in said for path in changes) and "learner.schedule" in said


def test_a_rate_that_a_controller_moves_is_the_controllers(begun: Path) -> None:
    moves = {"control.a": {"knob": "learner.lr", "fn": "constant", "value": 1.0}}
    state = begun / "checkpoints" / "step-000003" / "driver.json"
    began = json.loads(state.read_text())["settings"] | {"control": {"a": moves["control.a"]}}
    given = json.loads(json.dumps(began)) | {"learner": began["learner"] | {"lr": 0.5}}
    with pytest.raises(PreflightError, match=r"learner\.lr=0\.5"):
        run_directory.compare(begun, began, given)


def test_one_file_by_two_names_is_one_file(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(begun)
    assert not run_directory.compare(begun, {"model": {"path": f"{begun}/m"}}, {"model": {"path": "./m"}})


def test_rows_that_were_replaced_under_their_name_are_refused(begun: Path) -> None:
    found = resume(begun)
    assert found
    run_directory.check_same_data(found, {"data.task": "abc", "model.path": "t"})
    with pytest.raises(PreflightError, match=r"^run\.dir=/.*data\.task"):
        run_directory.check_same_data(found, {"data.task": "xyz", "model.path": "t"})


# What is finished.


def model_of(run: Path, cut: int = 0) -> None:
    """A model folder of one tensor, its file shorter by `cut` bytes."""
    import torch
    from safetensors.torch import save

    (run / "model").mkdir()
    whole = save({"w": torch.zeros(8)})
    (run / "model" / "model.safetensors").write_bytes(whole[: len(whole) - cut])


def test_runs_without_weights_have_not_the_same(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("")
    assert differences(one, other, after=0) == ["the exported weights"]
    model_of(one)
    model_of(other)
    assert differences(one, other, after=0) == []
    (other / "model" / "model.safetensors").rename(other / "model" / "adapter_model.safetensors")
    assert differences(one, other, after=0) == ["the exported weights"]


def test_a_finished_run_is_left_alone(begun: Path) -> None:
    run = Run(dir=str(begun), resume="auto", steps=3)
    assert not run_directory.finished(run), "it has no model"
    model_of(begun)
    assert str(begun / "model") in run_directory.finished(run)
    assert "run.steps" in run_directory.finished(Run(dir=str(begun), resume="auto", steps=2))
    assert not run_directory.finished(Run(dir=str(begun), resume="auto", steps=4)), "a step is asked for"
    assert not run_directory.finished(Run(dir=str(begun), steps=3))
    (begun / "metrics.jsonl").write_text('{"step": 2, "tokens/drawn": 70}\n')
    assert run_directory.finished(Run(dir=str(begun), resume="auto", steps=9, tokens=64)), "by its tokens"


def test_a_run_whose_model_is_damaged_is_not_finished(begun: Path) -> None:
    model_of(begun, cut=4)
    assert not run_directory.finished(Run(dir=str(begun), resume="auto", steps=3))


def test_all_steps_done_and_no_model_is_gone_on_with(begun: Path) -> None:
    found = resume(begun, **{"run.steps": 3})
    assert found and found.resume and found.resume[1] == 3
    found.lock.close()
    with pytest.raises(PreflightError, match=r"run\.steps=2"):
        resume(begun, **{"run.steps": 2})


def test_what_cannot_be_gone_on_with_is_not_started_over(begun: Path) -> None:
    weights = begun / "checkpoints" / "step-000003" / "weights.pt"
    weights.write_bytes(b"")
    with pytest.raises(PreflightError, match=r"run\.dir=/.*step-000003 .*weights\.pt"):
        resume(begun)
    (begun / "checkpoints" / "step-000003").rename(begun / "checkpoints" / "step-best")
    with pytest.raises(PreflightError, match="step-best"):
        resume(begun)
    shutil.rmtree(begun / "checkpoints")
    found = resume(begun)
    assert found and found.resume is None
    found.lock.close()
    model_of(begun)
    with pytest.raises(PreflightError, match=r"checkpoint\.every.*model\.path=/"):
        resume(begun)


# Files of a run as a power cut, a copy or a hand leaves them.

HARM: dict[str, Callable[[Path], object]] = {
    "gone": lambda f: None,
    "empty": lambda f: f.write_bytes(b""),
    "zeros": lambda f: f.write_bytes(b"\0" * 50),
    "cut": lambda f: f.write_bytes(b'{"step": 1, "ent'),
    "folder": lambda f: f.mkdir(),
    "dangling": lambda f: f.symlink_to("nowhere"),
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "config.yaml", "manifest.json"])
def test_a_damaged_file_of_a_run_does_not_keep_its_checkpoint_from_being_used(
    begun: Path, name: str, harm: str
) -> None:
    (begun / name).unlink()
    HARM[harm](begun / name)
    if harm in ("folder", "dangling"):
        with pytest.raises(PreflightError, match=rf"^{begun}/{name} "):
            resume(begun)
    else:
        found = resume(begun)
        assert found and found.resume and found.resume[1] == 3


@pytest.mark.parametrize("harm", [*HARM, "list", "text", "unset", "bytes"])
def test_a_damaged_neighbour_is_no_run_of_the_same_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "runs" / "train" / "20260101-000000" / "config.yaml"
    file.parent.mkdir(parents=True)
    texts = {"list": b"- a\n", "text": b"hi", "unset": b"a: ${oc.env:NOT_SET}\n", "bytes": b"\xff\xfe"}
    HARM.get(harm, lambda f: f.write_bytes(texts[harm]))(file)
    assert resume(tmp_path, **{"run.dir": None}) is None


# Where a run may be.


def test_runs_of_one_second_have_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-000000")
    made = [run_directory.new_run(Run()) for _ in range(3)]
    assert [m.folder.name for m in made] == [f"20260101-000000{end}" for end in ("", "-2", "-3")]
    assert (tmp_path / "runs" / "latest").resolve() == made[-1].folder


def test_where_runs_are_may_be_a_link_and_a_folder_named_latest_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "train").symlink_to(tmp_path / "disk")
    made = run_directory.new_run(Run())
    assert made.folder.parent == tmp_path / "disk" and Path("runs/latest").resolve() == made.folder
    Path("runs/latest").unlink()
    (tmp_path / "runs" / "latest" / "notes").mkdir(parents=True)
    run_directory.new_run(Run())
    assert (tmp_path / "runs" / "latest" / "notes").is_dir() and "runs/latest" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given", ["f", "f/below", "loop", "dangling", "a" * 300, "/proc/x/y", "$HOME/r", "~?/x"]
)
def test_a_place_that_can_be_no_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("not/there")
    with pytest.raises(PreflightError, match=r"^run\.dir=.*run\.dir$"):
        run_directory.check_place(Run(dir=given))


def test_a_place_that_is_a_file_of_another_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").touch()
    with pytest.raises(PreflightError, match=r"run\.dir"):
        run_directory.check_place(Run())
    (tmp_path / "r" / ".lock").mkdir(parents=True)
    with pytest.raises(PreflightError, match=r"run\.dir=/.*\.lock"):
        run_directory.new_run(Run(dir="r"))
    assert place("r") == tmp_path / "r" and not (tmp_path / "r" / "metrics.jsonl").exists()


@pytest.mark.parametrize("left", ["metrics.jsonl", "events.jsonl", "config.yaml", "checkpoints", "model"])
def test_a_folder_with_anything_of_a_run_is_not_written_to(tmp_path: Path, left: str) -> None:
    (tmp_path / left).symlink_to("gone")
    with pytest.raises(PreflightError, match=rf"run\.dir=/.*{left}.*run\.resume=auto"):
        run_directory.new_run(Run(dir=str(tmp_path)))
    assert os.path.lexists(tmp_path / left)


def test_who_needs_held_out_prompts_and_has_none_is_told_the_setting() -> None:
    with pytest.raises(PreflightError, match=r"^evaluate\.every=1 .*data\.heldout"):
        heldout_prompts([], 8, "evaluate.every=1")


def test_settings_of_a_run_that_are_damaged_are_refused_to_an_evaluation(begun: Path) -> None:
    OmegaConf.save(composed(), begun / "config.yaml")
    assert cli_eval.of_run(begun / "config.yaml", ["model.path=/m"]).model.path == "/m"
    for name in ("metrics.jsonl", "gone.yaml", "checkpoints"):
        with pytest.raises(ConfigError, match=rf"--config={begun}/{name} .*config\.yaml"):
            cli_eval.of_run(begun / name, [])


def test_a_text_with_a_slash_is_no_path() -> None:
    assert not run_directory._alike("data.template", "{a}/{b}", "{a}//{b}")
    assert run_directory._alike("model.path", "models/x", "models/./x")


def test_an_unfinished_run_is_found_by_what_cannot_change(
    begun: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(begun.parent)
    (begun.parent / "runs" / "train").mkdir(parents=True)
    begun.rename(begun.parent / "runs" / "train" / "1")
    found = resume(begun, **{"run.dir": None, "run.steps": 9, "learner.lr": 1e-5})
    assert found and found.folder.name == "1" and set(found.changed) == {"run.steps", "learner.lr"}
    assert resume(begun, **{"run.dir": None, "seed": 2}) is None
    assert "runs/train" in capsys.readouterr().out


def test_what_a_setting_names_is_known_by_its_content(tmp_path: Path) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text("def score(response, prompt): return 1.0")
    config = Config(reward=Reward(path=f"{judge}:score"))
    rows = [Prompt("a", "1+1", (1,), answer) for answer in ("2", "3")]
    reads = [Dataset(byte_tokenizer(), Split((), (), (row,)), {}, "") for row in rows]
    first, other = (identity(config, read) for read in reads)
    assert [name for name in first if first[name] != other[name]] == ["data.task"], "another answer"
    judge.write_text("def score(response, prompt): return 0.0")
    assert [n for n, x in identity(config, reads[0]).items() if x != first[n]] == ["reward.path"]
    reads[0].tokenizer.chat_template += " "
    assert identity(config, reads[0])["model.template"] != first["model.template"]


def test_a_setting_that_this_version_has_not_is_said_and_a_checkpoint_is_no_run(begun: Path) -> None:
    state = begun / "checkpoints" / "step-000003" / "driver.json"
    with pytest.raises(PreflightError, match=r"learner\.old_key"):
        run_directory.compare(begun, {"learner": {"old_key": 1}}, {})
    for inside in (state.parent, state.parent.parent):
        with pytest.raises(PreflightError, match=r"^run\.dir=.*checkpoint"):
            resume(inside)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"version": v} for v in (4, "3", 3.0, None, -3)),
        *({name: [1]} for name in ("settings", "identity", "stagnation", "health")),
    ],
)
def test_a_state_that_no_run_can_go_on_from_is_refused_by_its_file(begun: Path, wrong: dict) -> None:
    last = begun / "checkpoints" / "step-000003"
    state = json.loads((last / "driver.json").read_text()) | wrong
    (last / "driver.json").write_text(json.dumps(state))
    for old in ("manifest.json", "COMMITTED"):
        (last / old).unlink()
    shutil.move(last, begun / "part")
    commit(begun / "part", last)
    with pytest.raises(PreflightError, match=rf"step-000003 .*driver\.json .*{next(iter(wrong))}"):
        resume(begun)


@pytest.mark.parametrize(
    "setting",
    ["run.dir", "model.path", "model.template", "model.warm_start.cache", "reward.path", "data.task"],
)
def test_the_home_of_nobody_is_refused_by_its_setting(setting: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{re.escape(setting)}=~no_such_user/x: .*`no_such_user`"):
        configured(f'{setting}="~no_such_user/x"')
    configured('model.path="~/x"', "learner.lr=1e-6")


def test_a_cache_and_a_lab_in_the_home_of_nobody_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTRORAY_CACHE", "~no_such_user/x")
    with pytest.raises(ConfigError, match=r"^ENTRORAY_CACHE=~no_such_user/x"):
        warm_start.cached_folder(configured())
    with pytest.raises(PreflightError, match=r"^--dir=~no_such_user/x"):
        lab.main(["--dir", "~no_such_user/x"])
