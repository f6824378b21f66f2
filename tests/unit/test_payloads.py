"""Files from strangers that would run code where they are read naively: each fires so, and not here."""

import errno
import fcntl
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from entroray.cli import lab
from entroray.config import Run
from entroray.data.tables import open_table, read_rows
from entroray.errors import ConfigError, EntrorayError, PreflightError
from entroray.policy.model import load_policy
from entroray.policy.tiny_model import build_tiny_model
from entroray.policy.tokenizer import chat, load_tokenizer, with_template
from entroray.wiring import compose, run_directory
from entroray.workers import cluster
from tests.composed import configured

SIZE = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
}


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that is there as soon as a payload has fired."""
    return tmp_path / "fired"


def fires(mark: Path, naively: Callable[[], object]) -> None:
    """That what is to be refused is no dud."""
    naively()
    assert mark.exists(), "the payload is a dud"
    mark.rmdir() if mark.is_dir() else mark.unlink()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    build_tiny_model(tmp_path / "model", SIZE, 0)
    return tmp_path / "model"


# Pickles.


def test_weights_that_are_a_pickle_are_not_unpickled(model: Path, mark: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload(mark)}, model / "pytorch_model.bin")
    fires(mark, lambda: torch.load(model / "pytorch_model.bin", weights_only=False))
    with pytest.raises(PreflightError, match=r"^model\.path="):
        load_policy(str(model), torch.float32)
    assert not mark.exists()


def test_no_actor_unpickles_what_torch_or_deepspeed_loads(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed says `weights_only=False`, which this variable of torch's overrules."""
    torch.save({"module": {}, "state": Payload(mark)}, tmp_path / "states.pt")
    fires(mark, lambda: torch.load(tmp_path / "states.pt", weights_only=False))
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    monkeypatch.setenv(name, cluster.environment()[name])
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "states.pt", weights_only=False)
    assert not mark.exists()


# YAML.


def test_a_tag_in_a_yaml_file_makes_no_object(tmp_path: Path, mark: Path) -> None:
    text = f"run: {{name: !!python/object/apply:os.mkdir [{mark}]}}\n"
    fires(mark, lambda: yaml.load(text, Loader=yaml.UnsafeLoader))
    for name in ("experiment", "reward"):
        (tmp_path / "conf" / name).mkdir(parents=True)
        (tmp_path / "conf" / name / "evil.yaml").write_text("# @package _global_\n" + text)
        with pytest.raises(ConfigError, match="evil"):
            compose.load_config([f"{name}=evil"], str(tmp_path / "conf"))
    (tmp_path / "config.yaml").write_text(text)
    assert run_directory.read_settings(tmp_path / "config.yaml") is None
    with pytest.raises(EntrorayError):
        lab.main([str(tmp_path / "config.yaml")])
    assert not mark.exists()


@pytest.mark.parametrize(
    "override",
    [
        "+run._target_=os.system",
        "objective.surrogate={fn: os.system}",
        "objective.surrogate={_target_: os.system, _args_: ['touch %s']}",
        "reward.judge={fn: os.system, command: 'touch %s'}",
        "reward.judge={_target_: os.system, _args_: ['touch %s']}",
        "observe.trackers=[{fn: subprocess.call, args: 'touch %s'}]",
        "rollout.tool={fn: os.system}",
        "reward.judge={fn: entroray.reward.judges.os.system}",
        "generator.engine.trust_remote_code=true",
    ],
)
def test_a_setting_calls_no_function_outside_of_what_packages_names(override: str, mark: Path) -> None:
    with pytest.raises(ConfigError):
        configured(override % mark if "%s" in override else override)
    assert not mark.exists()


# Models.


def planted(model: Path, mark: Path, file: str, auto_map: dict[str, Any], **more: Any) -> None:
    """Code beside a model that its configuration asks to be run."""
    (model / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
        "from transformers import PretrainedConfig, PreTrainedTokenizerFast\n"
        "class Evil(PretrainedConfig):\n    model_type = 'evil'\n"
        "class Words(PreTrainedTokenizerFast):\n    pass\n"
    )
    held = json.loads((model / file).read_text()) | {"auto_map": auto_map} | more
    (model / file).write_text(json.dumps(held))


@pytest.fixture
def _own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies a model's code into a cache folder."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # as somebody answers its question


@pytest.mark.usefixtures("_own_modules")
def test_the_code_of_a_model_is_not_run(model: Path, mark: Path) -> None:
    from transformers import AutoConfig

    planted(model, mark, "config.json", {"AutoConfig": "evil.Evil"}, model_type="evil")
    twin = shutil.copytree(model, model.with_name("twin"))  # a module is imported once
    fires(mark, lambda: AutoConfig.from_pretrained(twin, trust_remote_code=True))
    with pytest.raises(PreflightError, match=r"^model\.path="):
        load_policy(str(model), torch.float32)
    assert not mark.exists()


@pytest.mark.usefixtures("_own_modules")
def test_the_code_of_a_tokenizer_is_not_run(model: Path, mark: Path) -> None:
    from transformers import AutoTokenizer

    code = {"AutoTokenizer": [None, "evil.Words"]}
    planted(model, mark, "tokenizer_config.json", code, tokenizer_class="Words")
    twin = shutil.copytree(model, model.with_name("twin"))  # a module is imported once
    fires(mark, lambda: AutoTokenizer.from_pretrained(twin, trust_remote_code=True))
    assert type(load_tokenizer(str(model))).__name__ != "Words"
    assert not mark.exists()


def test_a_chat_template_reaches_no_python(model: Path, mark: Path, tmp_path: Path) -> None:
    import jinja2

    said = f"{{{{ cycler.__init__.__globals__.os.system('touch {mark}') }}}}"
    fires(mark, lambda: jinja2.Environment().from_string(said).render())
    (tmp_path / "evil.jinja").write_text(said)
    tokenizer = with_template(load_tokenizer(str(model)), str(tmp_path / "evil.jinja"))
    with pytest.raises(PreflightError, match=r"SecurityError.*model\.template"):
        chat(tokenizer, None)
    assert not mark.exists()


# Data.


def test_the_script_of_a_data_set_is_not_run(tmp_path: Path, mark: Path) -> None:
    (tmp_path / "rows").mkdir()
    script = tmp_path / "rows" / "rows.py"
    script.write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    fires(mark, lambda: subprocess.run([sys.executable, str(script)], timeout=30, check=True))
    with pytest.raises(PreflightError):
        open_table(str(tmp_path / "rows"), None, "train")
    assert not mark.exists()


def test_a_pickle_in_a_parquet_column_stays_bytes(tmp_path: Path, mark: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    held = pickle.dumps(Payload(mark))
    fires(mark, lambda: pickle.loads(held))
    kind = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": held}
    column = pa.field("question", pa.binary(), metadata=kind)
    pq.write_table(pa.table([pa.array([held])], schema=pa.schema([column])), tmp_path / "rows.parquet")
    ((_, row),) = read_rows(open_table(str(tmp_path / "rows.parquet"), None, "train"), None)
    assert row == {"question": held} and not mark.exists()


@pytest.mark.parametrize(
    ("name", "begin", "said"),
    [
        ("a.jsonl", b'{"a": 1}\n{"question": "', "a.jsonl line 2 is longer than 64 MiB"),
        ("a.csv", b"a,b\n1,", "a.csv line 2 is longer than 64 MiB"),
        ("a.json", b"[", "a.json is one document of more than 512 MiB"),
    ],
)
def test_a_line_of_a_gigabyte_is_refused_by_its_number_and_never_held(
    tmp_path: Path, name: str, begin: bytes, said: str
) -> None:
    with (tmp_path / name).open("wb") as file:
        file.write(begin + b"a" * 2000)
        file.truncate(1 << 30)  # a hole, which is read as zeros
    rows = read_rows(open_table(str(tmp_path / name), None, "train"), None)
    tracemalloc.start()
    with pytest.raises(PreflightError, match=said):
        list(rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (600 << 20 if name == "a.json" else 300 << 20)


# A run's folder.


def test_a_link_in_a_run_leads_no_write_out_of_it(tmp_path: Path) -> None:
    """A lock, metrics or a part that is a link would be cut or written over where it leads."""
    folder, victim = tmp_path / "run", tmp_path / "victim"
    victim.write_text("mine\n")
    for name in (".lock", "metrics.jsonl", "metrics.jsonl.part", "events.jsonl", ".model.part"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "config.yaml").write_text("seed: 0\n")
        (folder / name).symlink_to(victim)
        config, tree = compose.load_config([f"run.dir={folder}", "run.resume=auto"])
        with pytest.raises(PreflightError, match=rf"{folder}.*( is a link to |symbolic link)"):
            run_directory.resume_run(config.run, tree)
        assert victim.read_text() == "mine\n", name


@pytest.mark.parametrize("missing", ["", "flock"])
def test_a_second_run_is_refused_by_any_name_of_the_folder_until_the_first_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """Some network file systems know no `flock`, and `lockf` over all their hosts."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if missing:
        monkeypatch.setattr(fcntl, missing, refuse)
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    monkeypatch.chdir(tmp_path)
    ready, tell = os.pipe()
    if not (first := os.fork()):
        held = run_directory.new_run(Run(dir=str(tmp_path / "run")))
        os.write(tell, b"1")
        time.sleep(60)
        del held
        os._exit(1)
    assert os.read(ready, 1) == b"1"
    for name in (str(tmp_path / "run"), "run", "./link/../run", "link"):
        with pytest.raises(PreflightError, match=rf"is being written by another run \(process {first} on "):
            run_directory.new_run(Run(dir=name))
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    assert run_directory.new_run(Run(dir="link")).folder == tmp_path / "run"


# Whoever reads other formats.


def test_nothing_of_ours_unpacks_or_unpickles_what_strangers_wrote() -> None:
    """Whoever adds such a call says here whose bytes it reads."""
    own = {
        "entroray/data/large_questions.py": "rows that this process wrote into a file without a name",
        "entroray/workers/judge_forkserver.py": "questions from the verifier, over a socket pair",
        "entroray/reward/code_tests.py": "texts and lists alone: an Unpickler that finds no class",
    }
    words = (
        "pickle.load",
        "pickle.Unpickler",
        "zipfile",
        "tarfile",
        "unpack_archive",
        "yaml.load(",
        "marshal",
    )
    words += (
        "weights_only=False)\n",
        "allow_pickle=True",
        "trust_remote_code=True",
        "instantiate(",
        "shelve",
    )
    root = Path(run_directory.__file__).parents[1]
    found = {
        f"entroray/{file.relative_to(root)}"
        for file in root.rglob("*.py")
        if any(word in file.read_text() for word in words)
    }
    assert found == own.keys()
