"""Evaluation sets over a run and in `entroray eval`: what is measured, kept, shown and compared."""

import asyncio
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entroray.cli import eval as command
from entroray.cli import train
from entroray.errors import ConfigError
from entroray.evaluation.evaluate import plan_evaluation
from entroray.evaluation.sets import EvaluatedSet, measure_sets
from entroray.evaluation.summary import followed
from entroray.metrics.catalogue import family_metrics
from entroray.objective import build_objective
from entroray.observe import evaluation, evaluation_page, report
from entroray.observe.run_data import run_data
from entroray.policy.tokenizer import byte_tokenizer
from entroray.types import Draw, Group, Prompt, Rollout, SamplerNotes, Status, Verdict
from entroray.wiring import dataset, measured_metrics
from entroray.wiring.parts import build_parts
from tests.composed import configured
from tests.documented import matches
from tests.toy import TARGET, ToyWorld, driver

TOKENIZER = byte_tokenizer()
TABLE = ("data=table", "data.task=chain_sum", "data.source=reasoning_gym", "data.settings={size: 40}")


# Answered.


RIGHT = {"p0": [1, 1, 0, 1], "p1": [0, 1, 0, 0], "p2": [0, 0, 0, 0]}


class World:
    """Answers as told: per prompt the correctness of each; the second prompt's last one never comes."""

    async def sample(
        self, prompt: Prompt, seeds: Sequence[int], draw: Draw, after: Sequence[int] = ()
    ) -> list[Rollout]:
        return [self.respond(prompt, i, draw) for i in range(len(seeds))]

    def respond(self, prompt: Prompt, index: int, draw: Draw) -> Rollout:
        length, entropy = 2 + index, np.full(2 + index, 0.5 if index else 0.1, np.float32)
        status = Status.TIMEOUT if (prompt.id, index) == ("p1", 3) else Status.OK
        status = Status.TRUNCATED if (prompt.id, index) == ("p0", 0) else status
        ids, nothing = np.arange(length, dtype=np.int32), np.zeros(length, np.int32)
        notes = SamplerNotes(entropy, entropy, np.ones(length, np.float32)) if draw.notes else None
        columns = ids, np.zeros(length, np.float32), nothing
        return Rollout(prompt.id, *columns, f"{index}", draw.temperature, 9, status, notes=notes)

    async def judge(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> list[Verdict]:
        right = RIGHT[prompt.id]
        given = lambda r: Verdict(right[int(r.text)], bool(right[int(r.text)]), str(right[int(r.text)]))
        lost = lambda r: Verdict(float("nan"), False, status=r.status)
        return [given(r) if r.status.usable else lost(r) for r in rollouts]


def a_set(label: str = "mine", draw: Draw | None = None, samples: int = 4) -> EvaluatedSet:
    prompts = tuple(Prompt(f"p{i}", f"q{i}", (1,), "1") for i in range(3))
    plan = plan_evaluation(draw or Draw(0.7, 9, top_p=0.9, rule={"fn": "fixed"}), samples, [3])
    return EvaluatedSet("mine.csv", prompts, plan, label, (1, 2, 3), "")


def test_a_set_is_measured_by_literal_numbers() -> None:
    said: list[str] = []
    found = asyncio.run(measure_sets({"mine": a_set("sets.mine")}, World(), World(), said.append))
    own = {name.removesuffix(":sets.mine"): value for name, value in found.items()}
    assert all(name.endswith(":sets.mine") for name in found)
    assert own["avg@4"] == pytest.approx((3 / 4 + 1 / 4 + 0) / 3) and own["avg@4_low"] == 0.0
    assert own["avg@4_high"] == pytest.approx(0.75)  # three times the first of three prompts
    assert own["pass@1"] == own["avg@4"] and own["pass@4"] == pytest.approx(2 / 3)
    assert own["pass@2"] == pytest.approx((1 + 0.5 + 0) / 3) and own["maj@4"] == pytest.approx(1 / 3)
    assert own["failed"] == 1 and own["length/truncated"] == pytest.approx(1 / 11)
    assert own["length/mean"] == pytest.approx((3 * (2 + 3 + 4) + 2 * 5) / 11)
    tokens = 3 * (2 * 0.1 + (3 + 4) * 0.5) + 2 * 5 * 0.5
    assert own["entropy/mean"] == pytest.approx(tokens / (3 * 9 + 10))
    assert not any(name.startswith("pass^") for name in own)
    (line,) = said
    assert "avg@4 0.333 [0.000 0.750], pass@4 0.667, maj@4 0.333" in line and "1 FAILED" in line
    names = [f"eval/{name}" for name in found]
    assert [n for n in names if not matches(n, family_metrics("sets"))] == []
    assert [m.name for m in family_metrics("sets") if not any(matches(n, [m]) for n in names)] == []


def test_answers_that_all_failed_are_counted_as_wrong_and_have_no_length() -> None:
    groups = [
        Group(p, (replace(World().respond(p, 0, Draw(1.0, 9)), status=Status.TIMEOUT),), (lost,))
        for p in a_set().prompts
        for lost in [Verdict(float("nan"), False, status=Status.TIMEOUT)]
    ]
    found = followed(groups, (1,))
    assert found["failed"] == 3 and found["avg@1"] == 0 and found["avg@1_high"] == 0
    assert not found.keys() & {"length/mean", "length/truncated", "entropy/mean"}


def evaluating(world: ToyWorld, read: dataset.Dataset, *told: str, said: list[str]) -> Any:
    config = configured(*TABLE, *told)
    return train._evaluation(config, read, world, world, said.append)  # type: ignore[arg-type]


def test_every_prompt_that_is_judged_moves_the_bar_of_an_evaluation() -> None:
    world = ToyWorld(build_objective("grpo"))
    heldout = tuple(Prompt(f"h{i}", f"h{i}", (0,), str(TARGET)) for i in range(5))
    one = EvaluatedSet("toy", heldout[:3], plan_evaluation(Draw(1.0, 2), 4), "toy", (), "")
    read = dataset.Dataset(
        TOKENIZER,
        dataset.prompts.Split(training=(), demonstrations=(), heldout=heldout),
        {},
        "",
        {"toy": one},
    )
    config, moved = configured(*TABLE, "evaluate.every=2", "evaluate.prompts=4"), list[tuple[Any, ...]]()

    @contextmanager
    def progress(*of: Any) -> Iterator[Any]:
        moved.append(of)
        yield lambda advance: moved.append((advance,))

    evaluate = train._evaluation(config, read, world, world, lambda line: None, progress)  # type: ignore[arg-type]
    for step, last, judged in ((0, False, 2 * 4 + 3), (1, False, 0), (2, False, 11), (3, True, 3)):
        moved.clear()
        asyncio.run(evaluate(step, last))
        assert moved == ([("evaluation", judged)] + [(1,)] * judged if judged else []), step


def a_run(*told: str, steps: int = 5, **pace: Any) -> tuple[ToyWorld, list[str], list[dict[str, float]]]:
    """The true driver over the toy world, with a set of three prompts and no held-out ones."""
    world = ToyWorld(build_objective("grpo"))
    prompts = tuple(Prompt(f"e{i}", f"e{i}", (0,), str(TARGET)) for i in range(3))
    one = EvaluatedSet("toy", prompts, plan_evaluation(Draw(1.0, 2), 4), "toy", (), "")
    read = dataset.Dataset(TOKENIZER, dataset.prompts.Split((), (), ()), {}, "", {"toy": one})
    said: list[str] = []
    d = driver(world, **pace)
    first: list[dict[str, float]] = []
    world.event = lambda kind, **fields: first.append(fields) if kind == "evaluation" else None  # type: ignore
    d.roles = replace(d.roles, evaluate=evaluating(world, read, *told, said=said))
    asyncio.run(d.train(steps))
    return world, said, first


def test_sets_are_evaluated_before_the_first_step_every_few_and_after_the_last() -> None:
    world, said, first = a_run("evaluate.every=2")
    assert [s["step"] for s in world.steps if "eval/avg@4:toy" in s] == [2, 4, 5]
    assert [f["step"] for f in first] == [0] and 0 <= first[0]["eval/avg@4:toy"] <= 1
    assert [line.partition(": ")[0] for line in said] == [f"step {n}" for n in (0, 2, 4, 5)]
    assert not any(name in s for s in world.steps for name in ("eval/greedy", "eval/pass@1"))


def test_without_a_number_of_steps_sets_are_evaluated_first_and_last() -> None:
    world, _, first = a_run()
    assert [s["step"] for s in world.steps if "eval/avg@4:toy" in s] == [5] and len(first) == 1


def test_a_run_that_ends_by_its_tokens_evaluates_its_last_step() -> None:
    world, _, _ = a_run(tokens=150)
    assert [s["step"] for s in world.steps if "eval/avg@4:toy" in s] == [len(world.steps)] != [5]


def test_a_controller_may_read_what_is_measured_of_a_set() -> None:
    mine = "evaluate.sets.mine={task: mine.csv, judge: {fn: math}}"
    signal = lambda name, *more: measured_metrics.check_signal(
        (config := configured(mine, *more)), build_parts(config), "control.x.signal", name
    )
    signal("eval/avg@8:mine", "evaluate.every=2")
    signal("eval/entropy/mean:mine", "evaluate.every=2")
    for name, more in (
        ("eval/avg@8:mine", []),
        ("eval/avg@4:mine", ["evaluate.every=2"]),
        ("eval/pass@8:other", ["evaluate.every=2"]),
    ):
        with pytest.raises(ConfigError, match=re.escape(f"`{name}`")):
            signal(name, *more)


# Shown.


def test_the_page_of_a_run_has_a_curve_for_each_set_from_before_the_first_step_on(tmp_path: Path) -> None:
    row = lambda x: {
        **{"eval/avg@4:a<b": x, "eval/avg@4_low:a<b": x - 0.1, "eval/avg@4_high:a<b": x + 0.1},
        **{"eval/pass@4:a<b": 0.9, "eval/failed:a<b": 0.0, "eval/length/truncated:a<b": 0.25},
    }
    steps = [{"step": n, "correct/mean": 0.5} | (row(0.3 + n / 10) if n == 2 else {}) for n in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    events = [
        {"time": "t", "kind": kind, "fields": fields}
        for kind, fields in (("evaluation", {"step": 0, **row(0.2)}), ("x", {}))
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    drawn = run_data(tmp_path)["metrics"]
    assert drawn["steps"] == [0, 1, 2]
    assert drawn["values"]["eval/avg@4:a<b"] == [0.2, None, 0.5]
    assert drawn["values"]["eval/avg@4_low:a<b"] == [0.1, None, 0.4]
    assert "a<b" not in report.write_report(tmp_path).read_text()
    (tmp_path / "events.jsonl").unlink()
    assert run_data(tmp_path)["metrics"]["steps"] == [1, 2]


def examined(**kwargs: Any) -> dict[str, Any]:
    """What `entroray eval` keeps of two sets, without any held-out prompt."""
    from entroray.evaluation.cot_decoding import words
    from entroray.evaluation.sets import examine_sets

    sets = {"one": a_set(**kwargs), "two": a_set()}
    return {"model": "m", "sets": asyncio.run(examine_sets(sets, World(), World(), words(TOKENIZER)))}


def test_an_evaluation_of_sets_alone_is_kept_shown_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = examined()
    kept = tmp_path / "found.json"
    kept.write_text(evaluation.evaluation_json(found))
    assert evaluation.load_evaluation(kept) == json.loads(json.dumps(found))
    evaluation.show_evaluation(found)
    said = capsys.readouterr().out
    assert "one: mine.csv, 3 prompts x 4 samples, temperature 0.7" in said and "greedy" not in said
    assert "1 timeout" in said and said.index("one: ") < said.index("two: ")
    page = evaluation_page.write_evaluation_page(tmp_path / "x.html", found).read_text()
    assert page.count("Accuracy over k") == 2 and "<h1>two</h1>" in page


def test_sets_are_compared_by_name_on_the_prompts_that_both_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = examined(), examined(draw=Draw(0.3, 9))
    second["sets"]["two"]["each"]["id"] = ["x", "y", "z"]
    for name, found in (("a", first), ("b", second)):
        (tmp_path / f"{name}.json").write_text(evaluation.evaluation_json(found))
    assert command.main(["--compare", f"{tmp_path}/a.json", f"{tmp_path}/b.json"]) == 0
    said = capsys.readouterr().out
    assert "+0.000 [+0.000 +0.000]" in said and "3 prompts" in said and "temperature 0.7 and 0.3" in said
    assert "evaluate.sets.two: not compared" in said
    del second["sets"]["one"]
    second["sets"]["three"] = first["sets"]["one"]
    with pytest.raises(ConfigError, match=r"evaluate\.sets"):
        evaluation.show_comparison(first, second)
