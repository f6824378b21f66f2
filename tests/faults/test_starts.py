"""F20, F24, F25, F37, F39, F41, F42 and F46: what is wrong before the start is refused before the start."""

import base64
import os
import pickle
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from entroray.cli import doctor
from entroray.cli import eval as cli_eval
from entroray.config import Config
from entroray.data.prompts import make_prompts
from entroray.data.sources import table
from entroray.errors import ConfigError, PreflightError
from entroray.policy.model import load_policy
from entroray.policy.tiny_model import build_tiny_model
from entroray.policy.tokenizer import load_tokenizer
from entroray.reward.code_tests import read_tests
from entroray.wiring import preflight
from tests.composed import composed, configured
from tests.faults.record import Fault
from tests.unit.test_preflight import changed
from tests.unit.test_prompts import characters, jsonl, questions
from tests.unit.test_run_directory import begun

pytestmark = pytest.mark.faults
__all__ = ["begun"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole little model of 260 tokens and a context of 64."""
    made = tmp_path_factory.mktemp("model")
    size = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    build_tiny_model(made, size | {"intermediate_size": 16, "max_position_embeddings": 64}, 0)
    return made


def asked(folder: Path, *overrides: str) -> Config:
    small = ("data.max_prompt=32", "rollout.max_tokens=32", "learner.lr=1e-6")
    return configured(*small, f"model.path={folder}", *overrides)


@pytest.mark.fault("F20", "nine bad rows of eleven: no column, wrong types, no text, no UTF-8, no JSON")
def test_every_bad_row_is_listed_before_anything_starts(fault: Fault, tmp_path: Path) -> None:
    good = {"question": "1+1?", "answer": "2"}
    bad = [{"answer": "2"}, {"question": 7, "answer": "2"}, {"question": " \n", "answer": "2"}]
    bad += [b'{"question": "caf\xe9", "answer": "2"}', {"question": "\ud800", "answer": "2"}, b"{", [1]]
    bad += [{"question": "q", "answer": None}, {"question": "q", "answer": "no end #### "}]
    rows, left_out = table(jsonl(tmp_path / "good.jsonl", good, good))
    assert (len(rows), left_out) == (2, 0)
    fault.fired("two good rows alone are read")
    with pytest.raises(PreflightError) as refused:
        table(jsonl(tmp_path / "rows.jsonl", good, *bad, good))
    said = str(refused.value).splitlines()
    assert [line.split(":")[0].strip() for line in said[1:-1]] == [f"line {n}" for n in range(2, 11)]
    fault.refused(f"nine lines by number and reason, and {said[-1][:60]}")


@pytest.mark.fault("F20", "one bad row of ten, data.settings.bad_rows=0.1")
def test_a_share_of_bad_rows_may_be_left_out_and_is_counted(fault: Fault, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"question": "q", "answer": "1"}\n' * 9 + "{}\n")
    fault.fired("with 0.09 it is refused")
    with pytest.raises(PreflightError, match=r"line 10: "):
        table(str(source), bad_rows=0.09)
    rows, left_out = table(str(source), bad_rows=0.1)
    assert (len(rows), left_out) == (9, 1)
    fault.saw("1 row left out")
    fault.goes_on("nine rows", lost="the row, counted")


@pytest.mark.fault("F24", "two prompts of 4 tokens where data.max_prompt=2")
def test_prompts_that_are_too_long_are_left_out_and_counted(fault: Fault) -> None:
    made = make_prompts(questions("a", "bbbb", "cc", "dddd"), tokenize=characters, max_tokens=2)
    fault.fired("they are in the data")
    assert {p.text for p in made.prompts} == {"a", "cc"} and made.too_long == 2
    fault.saw("2 too long")
    fault.goes_on("the other two are trained on", lost="two prompts, counted")


@pytest.mark.fault("F24", "prompt and response together longer than the model's context")
def test_more_tokens_than_the_context_are_refused(fault: Fault, folder: Path) -> None:
    assert preflight.model(asked(folder))
    fault.fired("32 + 32 of 64 pass")
    with pytest.raises(PreflightError, match=r"data\.max_prompt \+ rollout\.max_tokens = 2032\b"):
        preflight.model(asked(folder, "rollout.max_tokens=2000"))
    fault.refused("2032 tokens of 64, with both settings")


@pytest.mark.fault("F25", "a tokenizer of 260 tokens with a model of 100")
def test_a_tokenizer_larger_than_its_model_is_refused(fault: Fault, folder: Path, tmp_path: Path) -> None:
    small = changed(folder, tmp_path / "small", "config.json", vocab_size=100)
    assert preflight.model(asked(folder))
    fault.fired("with 260 it passes")
    with pytest.raises(PreflightError, match=rf"model\.path={small} .*260.*100"):
        preflight.model(asked(small))
    fault.refused("both numbers")


@pytest.mark.fault("F25", "a tokenizer whose file is cut in the middle")
def test_a_damaged_tokenizer_is_refused(fault: Fault, folder: Path, tmp_path: Path) -> None:
    cut = changed(folder, tmp_path / "cut", "config.json")
    os.truncate(cut / "tokenizer.json", (cut / "tokenizer.json").stat().st_size // 2)
    fault.fired("half of tokenizer.json is left")
    with pytest.raises(PreflightError, match=str(cut)):
        load_tokenizer(str(cut))
    fault.refused("its folder")


@pytest.mark.fault("F37", "9000 ranks on this machine")
def test_more_than_the_machine_has_is_refused_with_the_arithmetic(fault: Fault, folder: Path) -> None:
    assert preflight.resources(asked(folder))
    fault.fired("one rank passes")
    with pytest.raises(PreflightError, match=r"CPU: .*9000 .* x 0\.4 .*= 3600.*learner\.ranks"):
        preflight.resources(asked(folder, "learner.ranks=9000"))
    fault.refused("9000 x 0.4 = 3600 of the CPUs there are, by learner.ranks")


class Payload:
    """A pickle that writes a file when it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return Path.touch, (self.canary,)


def armed(fault: Fault, payload: bytes, canary: Path) -> None:
    """The payload does what it is to do when pickle itself reads it."""
    pickle.loads(payload)
    assert canary.exists()
    canary.unlink()
    fault.fired("read by pickle itself, it writes its file")


@pytest.mark.fault("F39", "pytorch_model.bin is a pickle that runs code")
def test_weights_that_are_a_payload_run_nothing(fault: Fault, folder: Path, tmp_path: Path) -> None:
    canary, evil = tmp_path / "canary", changed(folder, tmp_path / "evil", "config.json")
    armed(fault, payload := pickle.dumps(Payload(canary)), canary)
    (evil / "model.safetensors").unlink()
    (evil / "pytorch_model.bin").write_bytes(payload)
    with pytest.raises(PreflightError, match=rf"model\.path={evil} cannot be loaded"):
        load_policy(str(evil), torch.float32)
    assert not canary.exists()
    fault.refused("weights_only: nothing of it ran")


@pytest.mark.fault("F39", "packed tests of a row are a pickle that runs code")
def test_tests_that_are_a_payload_run_nothing(fault: Fault, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    armed(fault, payload := pickle.dumps(Payload(canary)), canary)
    with pytest.raises(ValueError, match="unpacked"):
        read_tests({"private_test_cases": base64.b64encode(zlib.compress(payload)).decode()})
    assert not canary.exists()
    fault.refused("nothing of it ran")


@pytest.mark.fault("F39", "config.yaml of a run that is evaluated has a tag that runs code")
def test_a_tag_of_yaml_runs_nothing(fault: Fault, begun: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    OmegaConf.save(composed(), begun / "config.yaml")
    assert cli_eval.of_run(begun / "config.yaml", ["model.path=/m"]).model.path == "/m"
    fault.fired("without the tag it is read")
    with (begun / "config.yaml").open("a") as file:
        file.write(f"\nevil: !!python/object/apply:os.system ['touch {canary}']\n")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        cli_eval.of_run(begun / "config.yaml", [])
    assert not canary.exists()
    fault.refused("config.yaml; nothing of it ran")


@pytest.mark.fault("F39", "_target_: os.system in the settings of a judge")
def test_a_target_of_hydra_runs_nothing(fault: Fault, folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    fault.fired("the setting is given")
    with pytest.raises(ConfigError, match="_target_"):
        preflight.refuse_wrong(
            asked(folder, f"reward.judge={{_target_: os.system, command: 'touch {canary}'}}")
        )
    assert not canary.exists()
    fault.refused("_target_ by name; nothing of it ran")


REMOTE = """
import pathlib
pathlib.Path({canary!r}).touch()
from transformers import Qwen3Config
class C(Qwen3Config): pass
"""


@pytest.mark.fault("F42", "a model whose folder brings code of its own (auto_map)")
def test_code_of_a_model_is_not_run(fault: Fault, folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    auto = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}
    evil = changed(folder, tmp_path / "evil", "config.json", auto_map=auto, model_type="mine")
    (evil / "mine.py").write_text(REMOTE.format(canary=str(canary)))
    from transformers import AutoConfig

    AutoConfig.from_pretrained(str(evil), trust_remote_code=True)
    assert canary.exists()
    canary.unlink()
    fault.fired("trusted, it runs")
    with pytest.raises(PreflightError, match=str(evil)):
        preflight.model(asked(evil))
    assert not canary.exists()
    fault.refused("the folder; nothing of it ran")


@pytest.mark.fault("F46", "Ray 9.9.9 is installed where another version was tested")
def test_other_versions_are_named_beside_those_that_were_tested(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "at the tested versions" in doctor.packages(Config())
    info = tmp_path / "ray-9.9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ray\nVersion: 9.9.9\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    fault.fired("without it the doctor passes")
    with pytest.raises(PreflightError, match=r"ray 9\.9\.9 where \S+ was tested: run .*setup\.sh"):
        doctor.packages(Config())
    fault.refused("both versions")


JOINS = "import ray; ray.init(address={address!r}, logging_level='ERROR'); print('joined', len(ray.nodes()))"


@pytest.mark.fault("F41", "a process without the token joins the Ray of a run")
def test_who_has_no_token_does_not_join(fault: Fault, local_ray: None, tmp_path: Path) -> None:
    import ray

    program = [sys.executable, "-c", JOINS.format(address=ray.get_runtime_context().gcs_address)]
    run = lambda **changes: subprocess.run(
        program, env=os.environ | changes, capture_output=True, text=True, timeout=120, check=False
    )
    assert "joined" in run().stdout
    fault.fired("with this user's token it joins")
    (tmp_path / "home").mkdir()
    other = run(HOME=str(tmp_path / "home"), RAY_AUTH_TOKEN="0" * 64, RAY_AUTH_MODE="token")
    assert other.returncode != 0 and "joined" not in other.stdout
    said = [line for line in other.stderr.splitlines() if "uthenticat" in line or "token" in line]
    assert said, other.stderr[-2000:]
    fault.refused(said[-1].strip()[:90])
