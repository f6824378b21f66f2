"""What is refused before any actor starts, and what it says."""

import json
import os
import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from entroray.cli import doctor, judge_trial, train
from entroray.config import Config
from entroray.data.prompts import Split
from entroray.errors import ConfigError, DataError, NumericsError, PreflightError, free_bytes
from entroray.policy.tiny_model import build_tiny_model
from entroray.policy.tokenizer import byte_tokenizer
from entroray.reward.verdicts import failed
from entroray.train.failure_limits import SkippedUpdates, Stagnation, VerdictFailures
from entroray.types import Verdict
from entroray.wiring import compose, dataset, preflight, run_directory
from entroray.wiring.parts import build_parts
from tests.composed import configured


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    build_tiny_model(
        made,
        {
            "num_hidden_layers": 1,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 16,
            "max_position_embeddings": 64,
        },
        0,
    )
    return made


def opened(run, tree):
    """The folder of a run as `entroray train` opens it."""
    return run_directory.resume_run(run, tree) or run_directory.new_run(run)


def config(*overrides: str) -> Config:
    return configured("data.max_prompt=32", "rollout.max_tokens=32", *overrides)


def changed(folder: Path, to: Path, name: str, **values: Any) -> Path:
    shutil.copytree(folder, to)
    (to / name).write_text(json.dumps(json.loads((to / name).read_text()) | values))
    return to


@pytest.mark.parametrize(
    "told", [["--cfg", "hydra"], ["--cfg"], ["-c", "all"], ["--cfg=defaults"], ["--config-dir"], ["--dry"]]
)
def test_a_flag_that_train_does_not_have_trains_nothing(told: list[str]) -> None:
    flag = told[0].partition("=")[0]
    with pytest.raises(ConfigError, match=rf"^train .* {flag}\b.*: .*--cfg job") as said:
        train.main(
            [*told, "experiment=quickstart"] if told[-1] != told[0] else ["experiment=quickstart", *told]
        )
    assert said.value.exit_code == 2


def test_settings_are_shown_in_either_spelling_and_never_of_many_runs(capsys: pytest.CaptureFixture) -> None:
    for told in (["--cfg", "job"], ["-c", "job"], ["--cfg=job"]):
        assert train.main([*told, "experiment=quickstart", "seed=7"]) == 0
        assert "seed: 7" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"^--cfg job .*: .*--multirun"):
        train.main(["--multirun", "--cfg", "job", "experiment=quickstart"])


def test_a_whole_model_is_described(folder: Path) -> None:
    assert "64 tokens asked of a context of 64" in preflight.model(
        config(f"model.path={folder}", "learner.lr=1e-6")
    )


def test_a_configuration_of_another_type_is_refused_by_the_folder(folder: Path, tmp_path: Path) -> None:
    there = changed(folder, tmp_path / "model", "config.json", hidden_size="64")
    with pytest.raises(PreflightError, match=rf"^model\.path={there} .*hidden_size"):
        preflight.model(config(f"model.path={there}", "learner.lr=1e-6"))


def test_a_checkpoint_of_text_and_images_is_refused_by_its_name(folder: Path, tmp_path: Path) -> None:
    there = changed(folder, tmp_path / "model", "config.json")
    (there / "config.json").write_text('{"model_type": "gemma3", "architectures": ["Gemma3Whatever"]}')
    with pytest.raises(PreflightError, match=rf"^model\.path={there} \(Gemma3Whatever\).*Gemma3ForCausalLM"):
        preflight.model(config(f"model.path={there}", "learner.lr=1e-6"))


def test_a_model_folder_that_is_not_there() -> None:
    with pytest.raises(PreflightError, match=r"^model\.path=/nowhere .*config\.json"):
        preflight.model(config("model.path=/nowhere", "learner.lr=1e-6"))


def test_a_tokenizer_without_a_template(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    described = json.loads((bare / "tokenizer_config.json").read_text())
    described.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(described))
    with pytest.raises(PreflightError, match=rf"model\.path={bare} .*model\.template="):
        preflight.model(config(f"model.path={bare}", "learner.lr=1e-6"))


def with_template(folder: Path, to: Path, template: str) -> str:
    shutil.copytree(folder, to)
    (to / "chat_template.jinja").write_text(template)
    return f"model.path={to}"


NO_SYSTEM = "{{ raise_exception('no system') if messages[0].role == 'system' }}{{ messages[0].content }}"


def test_a_system_message_that_a_template_refuses_is_refused_before_anything_starts(
    folder: Path, tmp_path: Path
) -> None:
    gemma, cold = with_template(folder, tmp_path / "gemma", NO_SYSTEM), "model.warm_start.cache=/nowhere"
    (tmp_path / "my.jinja").write_text(NO_SYSTEM)
    for told in (gemma, f"model.template={tmp_path}/my.jinja"):
        asked = config(told, cold, "model.system=Be brief", "learner.lr=1e-6")
        with pytest.raises(PreflightError, match=r"model\.system='Be brief'.*data\.template="):
            preflight.refuse_wrong(asked)
        preflight.refuse_wrong(config(told, cold, "learner.lr=1e-6"))
    with pytest.raises(PreflightError, match=r"^model\.template=/nowhere "):
        preflight.refuse_wrong(config(cold, "model.template=/nowhere"))


def test_a_base_model_runs_with_a_template_of_ones_own(folder: Path, tmp_path: Path) -> None:
    base = with_template(folder, tmp_path / "base", "")
    (tmp_path / "my.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(PreflightError, match=r"model\.template="):
        preflight.refuse_wrong(config(base, "learner.lr=1e-6"))
    own = config(base, f"model.template={tmp_path}/my.jinja", "learner.lr=1e-6")
    preflight.refuse_wrong(own)
    assert preflight.template(own) == f"{tmp_path}/my.jinja"


def test_the_end_of_a_call_may_not_be_the_end_of_every_response(folder: Path) -> None:
    tool = ["rollout.tool.fn=calculator", "rollout.tool.open='<|user|>'"]
    with pytest.raises(PreflightError, match=r"^rollout\.tool\.close='<\|end\|>' "):
        preflight.template(
            config(f"model.path={folder}", "learner.lr=1e-6", *tool, "rollout.tool.close='<|end|>'")
        )
    preflight.template(
        config(f"model.path={folder}", "learner.lr=1e-6", *tool, "rollout.tool.close='<|pad|>'")
    )
    preflight.template(config(f"model.path={folder}", "learner.lr=1e-6", "rollout.tool.close='<|end|>'"))


def test_a_doctor_shows_the_first_prompt_as_it_is_read(tmp_path: Path) -> None:
    few = ["experiment=quickstart", "model.warm_start.cache=/nowhere", "data.max_prompt=64"]
    few += ["++data.settings.size=50"]
    shown = re.fullmatch(r"(\d+) tokens: '<\|user\|>(.*)<\|assistant\|>'", doctor.prompt(configured(*few)))
    assert shown and int(shown[1]) == len(shown[2]) + 2
    (tmp_path / "my.jinja").write_text("You are a calculator.\n{{ messages[0].content }}")
    own = doctor.prompt(configured(*few, f"model.template={tmp_path}/my.jinja"))
    assert ": 'You are a calculator.\\n" in own and own.endswith("itself says 'You are a calculator.'")


def test_the_header_names_every_end_token(folder: Path, tmp_path: Path) -> None:
    several = changed(
        folder, tmp_path / "several", "generation_config.json", eos_token_id=[257, 256, 258, 999]
    )
    read = dataset.Dataset(byte_tokenizer(), Split((), (), ()), {}, "")
    facts = {"parameters": 1, "resources": "", "start_seconds": 0, "sync/probe_error": 0.0}
    told = configured("experiment=quickstart", "sampler.stop=['<|user|>','x']")
    header = train._header(told, build_parts(told), read, tmp_path, facts | {"model": str(several)})
    (line,) = [line for line in header if line.startswith("sampling")]
    assert line.endswith("stop at '<|end|>', '<|pad|>', '<|user|>', '⟨999⟩', 'x'")
    for rows, shown in (("padded", 0), ("padded, for a reason", 1), ("end to end", 1)):
        known = facts | {"model": str(several), "rows": rows}
        header = train._header(told, build_parts(told), read, tmp_path, known)
        assert header.count(f"rows       {rows}") == shown


def test_a_tokenizer_larger_than_the_model(folder: Path, tmp_path: Path) -> None:
    small = changed(folder, tmp_path / "small", "config.json", vocab_size=100)
    with pytest.raises(PreflightError, match=rf"model\.path={small} .*260.*100"):
        preflight.model(config(f"model.path={small}", "learner.lr=1e-6"))


@pytest.mark.parametrize("path", ["tiny", None])
def test_more_tokens_than_the_context(folder: Path, path: str | None) -> None:
    long = config(
        f"model.path={path or folder}",
        "learner.lr=1e-6",
        "rollout.max_tokens=2000",
        "model.warm_start.cache=/nowhere",
    )
    with pytest.raises(PreflightError, match=r"data\.max_prompt \+ rollout\.max_tokens = 2032\b"):
        preflight.model(long)


def test_more_cpus_than_there_are_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(PreflightError, match=r"CPU: .*9000 .* x 0\.4 .*= 3600.*learner\.ranks"):
        preflight.resources(config("learner.ranks=9000"))


def test_gpus_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(PreflightError, match=r"cluster=cpu.*cluster\.address"):
        preflight.resources(config("cluster=gpu"))


def test_a_disk_too_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")(1000)
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage)
    with pytest.raises(PreflightError, match=r"checkpoint\.keep=2 \+ 2 .*checkpoint\.keep.*run\.dir"):
        preflight.disk(config(f"model.path={folder}", "learner.lr=1e-6"))


def test_a_mount_that_tells_nothing_of_its_room_is_not_taken_for_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage(0, 0, 0))
    assert free_bytes(tmp_path / "run") > 1 << 60
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage(10, 10, 0))
    assert free_bytes(tmp_path / "run") == 0


def test_a_disk_too_small_for_a_model_in_shards_or_not_made_yet(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: namedtuple("usage", "free")(1000))
    sharded = tmp_path / "sharded"
    shutil.copytree(folder, sharded)
    (sharded / "model.safetensors").rename(sharded / "one.safetensors")
    index = {"weight_map": {"any": "one.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    for told in (f"model.path={sharded}", "model.warm_start.cache=/nowhere"):
        with pytest.raises(PreflightError, match=r"checkpoint\.keep=2 \+ 2 .*checkpoint\.keep.*run\.dir"):
            preflight.disk(config(told, "learner.lr=1e-6"))


def test_what_a_run_writes_is_counted_from_parameters_and_dtype(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight.memory, "parameter_count", lambda config: 2**30)
    monkeypatch.setattr("shutil.disk_usage", lambda place: namedtuple("usage", "free")(1 << 40))
    assert preflight.disk(config("checkpoint.keep=1")).endswith(f"at most {12 * 3 + 4:.2f} needed")
    told = config("checkpoint.keep=1", "model.dtype=bfloat16")
    assert preflight.disk(told).endswith(f"at most {12 * 3 + 2:.2f} needed"), "float32, whatever the model's"


def test_a_folder_that_is_no_model_has_no_size_and_a_damaged_file_is_named(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    told = config(f"model.path={tmp_path}", "learner.lr=1e-6")
    assert "size is unknown" in preflight.disk(told)
    for text in ("version https://git-lfs.github.com/spec/v1\n", "", "\0" * 8):
        (tmp_path / "model.safetensors").write_text(text)
        with pytest.raises(PreflightError, match=rf"^{tmp_path}/model\.safetensors "):
            preflight.disk(told)


def test_kernels_that_are_not_here_are_said_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr(preflight, "find_spec", lambda name: None if name == "liger_kernel" else name)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert preflight.resources(config("cluster=gpu"))
    with pytest.raises(PreflightError, match=r"learner\.liger=true .*ENTRORAY_EXTRAS=liger"):
        preflight.resources(config("cluster=gpu", "learner.liger=true"))


def test_a_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(PreflightError, match=r"run\.dir=/.*run\.resume=auto"):
        preflight.directory(config(f"run.dir={tmp_path}"))
    assert str(tmp_path) in preflight.directory(config(f"run.dir={tmp_path}", "run.resume=auto"))


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    both = config("model.path=/nowhere", "learner.lr=1e-6", f"run.dir={tmp_path}")
    with pytest.raises(PreflightError, match=r"(?s)^2 .*model\.path=/nowhere.*run\.dir=/.*run\.resume=auto"):
        preflight.refuse_wrong(both)
    preflight.refuse_wrong(config("model.warm_start.cache=/nowhere"))


def test_other_versions_than_the_tested_ones_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "at the tested versions" in doctor.packages(Config())
    monkeypatch.setattr(doctor.installation, "installed", lambda name: "0.1" if name == "ray" else "2.13.0")
    with pytest.raises(PreflightError, match=r"ray 0\.1 [^;]*2\.60\.0.*launch/setup\.sh"):
        doctor.packages(Config())


def test_a_doctor_says_what_is_wrong_and_exits_with_3(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "try_network", lambda *asked: "tried")  # tests/alone/test_network.py
    found = doctor.main(
        ["++data.settings.size=50", "model.path=/nowhere", "learner.lr=1e-6", "learner.ranks=9000"]
    )
    said = capsys.readouterr().out
    assert found == 3 and "wrong  model" in said and "wrong  resources" in said and "ok     ports" in said


@pytest.mark.parametrize("fails", [False, True])
def test_a_doctor_reads_the_data_once_for_every_check_of_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: bool
) -> None:
    read, asked = judge_trial.read_few, list[Config]()

    def counted(config: Config) -> dataset.Dataset:
        asked.append(config)
        if fails:
            raise PreflightError("data.task=x: no rows")
        return read(config)

    monkeypatch.setattr(judge_trial, "read_few", counted)
    monkeypatch.setattr(judge_trial, "try_judges", lambda config, read: ["tried"])
    monkeypatch.setattr(doctor, "try_network", lambda *asked: "tried")
    doctor.main(["++data.settings.size=50"])
    said = capsys.readouterr().out
    assert len(asked) == 1
    for check in ("data", "prompt", "judge"):
        assert re.search(rf"^{'wrong ' if fails else 'ok '} *{check} ", said, re.MULTILINE), said


def test_failed_verdicts_end_the_run_above_their_share() -> None:
    failures, good, bad = VerdictFailures(most=0.2), Verdict(1.0, True), failed("reward.custom raised")
    failures.observe([good] * 79 + [bad] * 20, 99)
    with pytest.raises(DataError, match=r"21%.* 100 .*reward\.max_failed.*21 x data_failed: reward"):
        failures.observe([bad], 1)


def test_the_window_forgets() -> None:
    failures = VerdictFailures(most=0.2, window=100)
    failures.observe([Verdict(1.0, True)] * 90 + [failed("x")] * 10, 100)
    failures.observe([Verdict(1.0, True)] * 100, 100)
    assert failures.share == 0


def test_evaluations_without_a_better_one_are_counted() -> None:
    stagnation = Stagnation(patience=2)
    accuracies = [0.3, None, 0.2, 0.4, 0.4, 0.1, 0.0, 0.3, 0.5]
    assert [stagnation.observe(a) for a in accuracies] == [False] * 5 + [True, False, True, False]
    assert (stagnation.best, stagnation.since) == (0.5, 0)
    assert not any(Stagnation(patience=0).observe(0.0) for _ in range(9))


def test_skipped_updates_end_the_run_in_a_row_only() -> None:
    skipped = SkippedUpdates(most=2)
    for left_out in (True, False, True):
        skipped.observe(left_out)
    with pytest.raises(NumericsError, match=r" 2 .*learner\.lr.*learner\.max_grad_norm.*skipped/"):
        skipped.observe(True)


def test_an_unfinished_run_may_be_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(PreflightError):
        run_directory.check_free(tmp_path)


def test_missing_verdicts_end_the_run() -> None:
    with pytest.raises(DataError, match=r"\b7\b.*\b8\b"):
        VerdictFailures(most=0.2).observe([Verdict(1.0, True)] * 7, 8)


def test_a_folder_that_another_run_writes_is_refused(tmp_path: Path) -> None:
    mine = config(f"run.dir={tmp_path}", "run.resume=auto")
    tree = compose.load_config([f"run.dir={tmp_path}"])[1]
    first = opened(mine.run, tree)
    for attempt in (preflight.directory, lambda c: opened(c.run, tree)):
        with pytest.raises(PreflightError, match=rf"run\.dir=/.*\b{os.getpid()}\b.*: .*run\.dir"):
            attempt(mine)
    first.lock.close()
    assert preflight.directory(mine) == str(tmp_path) and opened(mine.run, tree).folder == tmp_path


def test_a_container_with_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: namedtuple("usage", "free")(64 << 20))
    with pytest.raises(PreflightError, match=r"/dev/shm .*\b64 MiB.* --shm-size=2g"):
        preflight.shared_memory(Config())


def test_a_cluster_that_cannot_be_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    with pytest.raises(PreflightError, match=rf"127\.0\.0\.1:9: .*{tmp_path}/token .*RAY_AUTH_TOKEN"):
        doctor.ray_clusters(config("cluster.address=127.0.0.1:9"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)
    with pytest.raises(PreflightError, match=r"cluster\.address=127\.0\.0\.1:9 .*Errno.*launch/ray-head\.sh"):
        doctor.ray_clusters(config("cluster.address=127.0.0.1:9"))
