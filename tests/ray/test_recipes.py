"""Recipes of conf/experiment for models and data of the hub: `doctor` passes each with files of the form."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from entroray.cli import doctor
from entroray.policy.tiny_model import build_tiny_model

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "max_position_embeddings": 32768}
ASKED = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    build_tiny_model(folder, SIZE | {"num_attention_heads": 2, "num_key_value_heads": 1}, seed=0)
    return str(folder)


def dapo_math(folder: Path) -> list[str]:
    """Columns as of BytedTsinghua-SIA/DAPO-Math-17k, where every prompt stands a hundred times, and AIME."""
    rows = [
        {
            "data_source": "math_dapo",
            "prompt": [{"content": ASKED.format(f"What is {n} + {n}?"), "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": str(2 * n), "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"{n}"},
        }
        for n in range(20)
        for _ in range(3)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "dapo-math-17k.parquet")
    problems = [
        {"id": n, "problem": f"Find {n} times 7.", "solution": "", "answer": str(7 * n)} for n in range(5)
    ]
    lines(folder / "aime.jsonl", problems)
    return [f"data.task={folder}/dapo-math-17k.parquet", f"evaluate.sets.aime24.task={folder}/aime.jsonl"]


def gsm8k_1b5(folder: Path) -> list[str]:
    for name, start in (("train", 0), ("test", 50)):
        rows = [
            {
                "question": f"What is {n} + {n}?",
                "answer": f"{n} + {n} = <<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}",
            }
            for n in range(start, start + 40)
        ]
        lines(folder / f"{name}.jsonl", rows)
    return [f"data.task={folder}/train.jsonl", f"evaluate.sets.gsm8k.task={folder}/test.jsonl"]


def rubric(folder: Path) -> list[str]:
    """Columns as of anisha2102/RaR-Medicine."""
    rows = [
        {
            "question": f"What is condition {n} treated with?",
            "reference_answer": f"With remedy {n}.",
            "rubric": [{"description": f"Essential: names remedy {n}.", "title": "Remedy", "weight": 5}],
        }
        for n in range(40)
    ]
    lines(folder / "medicine.jsonl", rows)
    return [f"data.task={folder}/medicine.jsonl"]


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


class Grader(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that gives every answer seven points of ten."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions" and "remedy" in asked["messages"][0]["content"]
        reply = {"choices": [{"message": {"role": "assistant", "content": "It is fair.\nScore: 7"}}]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def grader(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Grader)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (dapo_math, ("20 training", "math gives", "aime24", "Answer: $Answer (without quotes)")),
        (gsm8k_1b5, ("training", "math gives 1 for", "gsm8k")),
        (rubric, ("training", "gives 0.7 for")),
    ],
)
def test_the_doctor_passes_a_recipe_with_files_of_its_form(
    files: Any,
    says: tuple[str, ...],
    model: str,
    grader: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = ["cluster=cpu", f"model.path={model}", f"run.dir={tmp_path}/runs", *files(tmp_path)]
    here += [f"reward.judge.base_url={grader}"] if files is rubric else []
    code = doctor.main([f"experiment={files.__name__}", *here])
    said = capsys.readouterr().out
    assert code == 0, said
    assert all(word in said for word in says), said
