"""The planner: its simulation by cases that can be worked out by hand, its rates, its command."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from omegaconf import OmegaConf

from entroray import cli
from entroray.cli import plan
from entroray.errors import ConfigError, PreflightError
from entroray.planning.rates import Step, fit, lengths_of, load_rates, on_shared_cores, run_rates
from entroray.planning.simulate import Rates, Shape, bounds, simulate
from entroray.wiring import compose

ONE = Rates(lengths=(100,), decode=0.01)
"""Every response takes a second, however many are decoded with it."""
EIGHT = Shape(groups=8, group_size=8)


def seconds(shape: Shape, rates: Rates) -> float:
    return simulate(shape, rates)["seconds"]


def test_with_a_learner_that_takes_no_time_the_engine_is_the_bound() -> None:
    rates = replace(ONE, lengths=(64,), decode_sequence=0.0001)
    found = simulate(EIGHT, rates)
    assert found["seconds"] == pytest.approx(64 * (0.01 + 64 * 0.0001))
    assert found["tokens/per_second"] == pytest.approx(64 * 64 / found["seconds"])
    assert found["idle/generator"] == pytest.approx(0.0) and found["idle/learner"] == pytest.approx(1.0)
    assert next(iter(bounds(EIGHT, rates))) == "engines"


def test_engines_that_take_no_time_are_no_endless_loop_however_late_it_is() -> None:
    rates = replace(ONE, lengths=(8191, 17), prefill=0.01, learner_update=1e5, learner_token=0.1)
    assert bounds(EIGHT, rates)["engines"] == pytest.approx(1e5 + 0.1 * 64 * 4104)


def test_one_group_takes_as_long_as_its_longest_response() -> None:
    assert seconds(Shape(groups=1, group_size=64), replace(ONE, lengths=(10, 50))) == pytest.approx(0.5)


def test_sequences_that_end_leave_the_others_quicker() -> None:
    rates = replace(ONE, lengths=(10, 10, 10, 50), decode=0.0, decode_sequence=0.001)
    found = simulate(Shape(groups=64, group_size=8, seats=1024), rates)
    assert found["seconds"] == pytest.approx(0.001 * 512 * 20, rel=0.1), "tokens alone count, 20 on the mean"


def test_sequences_beyond_the_seats_queue() -> None:
    assert seconds(replace(EIGHT, seats=32), ONE) == pytest.approx(2.0)


def test_two_engines_share_the_sequences() -> None:
    rates = replace(ONE, decode=0.0, decode_sequence=0.001)
    assert seconds(EIGHT, rates) == pytest.approx(6.4)
    assert seconds(replace(EIGHT, engines=2), rates) == pytest.approx(3.2)


@pytest.mark.parametrize(("lag", "expected"), [(0, 2.0), (1, 1.0), (2, 1.0)])
def test_a_lag_hides_the_shorter_of_sampling_and_learning(lag: int, expected: float) -> None:
    rates = replace(ONE, learner_token=1 / 6400)
    assert seconds(replace(EIGHT, max_lag=lag), rates) == pytest.approx(expected)


def test_with_lag_0_engine_and_learner_take_turns() -> None:
    found = simulate(EIGHT, replace(ONE, learner_token=3 / 6400))
    assert (found["idle/generator"], found["idle/learner"]) == pytest.approx((0.75, 0.25))


@pytest.mark.parametrize(("overlap", "expected"), [(1.0, 2.0), (0.5, 4.0)])
def test_on_cores_that_both_keep_busy_a_lag_gains_nothing(overlap: float, expected: float) -> None:
    rates = replace(ONE, learner_token=1 / 6400, cores=2.0, engine_cores=2.0, learner_cores=2.0)
    found = simulate(replace(EIGHT, max_lag=1), replace(rates, overlap=overlap))
    assert found["seconds"] == pytest.approx(expected)
    apart = replace(rates, engine_cores=1.0, learner_cores=1.0)
    assert seconds(replace(EIGHT, max_lag=1), apart) == pytest.approx(1.0)


def test_engines_stand_still_in_a_sync() -> None:
    rates = replace(ONE, decode=0.0, decode_sequence=1 / 3200, sync=0.3, sync_engine=0.1)
    assert seconds(replace(EIGHT, engines=2), rates) == pytest.approx(1.5)
    assert seconds(replace(EIGHT, engines=2, max_lag=1), rates) == pytest.approx(1.5)


def test_steps_that_take_turns_are_counted_alike() -> None:
    rates = replace(ONE, sync=0.5)  # two waves are decoded at once: a step of 1.5 s, then one of 0.5
    assert seconds(replace(EIGHT, max_lag=1), rates) == pytest.approx(1.0)


def test_ranks_divide_tokens_and_no_update_is_divided() -> None:
    rates = replace(ONE, decode=0.0, learner_token=1 / 6400, learner_update=0.25)
    assert seconds(replace(EIGHT, ranks=4, updates=2), rates) == pytest.approx(0.75, abs=1e-5)


def test_the_driver_and_the_verifiers_serve_one_after_the_other() -> None:
    assert seconds(EIGHT, replace(ONE, driver=0.01, driver_step=0.02)) == pytest.approx(1 + 0.64 + 1.28)
    assert seconds(replace(EIGHT, verifiers=2), replace(ONE, verify=0.02)) == pytest.approx(1.64)


def test_groups_without_signal_are_drawn_and_not_trained_on() -> None:
    rates = replace(ONE, decode=0.0, decode_sequence=0.0001, kept=0.5, learner_token=1 / 6400)
    assert seconds(EIGHT, rates) == pytest.approx(2 * 0.64 + 1.0)


def test_what_the_rows_are_made_of_is_found_and_is_never_negative() -> None:
    rows = [(100, 6400, 64), (256, 3000, 64), (50, 50, 1), (200, 900, 8)]
    assert fit(rows, [0.01 * a + 0.0002 * b + 0.003 * c for a, b, c in rows]) == pytest.approx(
        [0.01, 0.0002, 0.003]
    )
    assert fit([(1.0, 1.0), (2.0, 1.0)], [2.0, 1.0])[0] == 0.0


@pytest.mark.parametrize(("mean", "longest"), [(64, 64), (56, 256), (900, 8192)])
def test_lengths_of_a_run_have_its_mean_and_its_longest(mean: int, longest: int) -> None:
    lengths = lengths_of(mean, longest)
    assert fmean(lengths) == pytest.approx(mean, rel=0.03) and max(lengths) == pytest.approx(
        longest, rel=0.02
    )


def line(step: int, shape: Shape, rates: Rates) -> Step:
    """A line of metrics.jsonl as a run with these rates writes it."""
    found = simulate(shape, rates)
    phases = {
        "seconds/sample": found["sample"],
        "seconds/update": found["learn"],
        "seconds/sync": found["sync"],
    }
    lengths = {"length/mean": fmean(rates.lengths), "length/max": max(rates.lengths)}
    told = {k: v for k, v in found.items() if "/" in k} | {
        "seconds/step": found["seconds"],
        "groups/dropped": 0.0,
    }
    return Step(shape, {"step": step, **told, **phases, **lengths})


def test_a_finished_run_gives_the_rates_that_make_its_steps() -> None:
    rates = Rates(
        (64,), 0.01, 0.0001, learner_token=1e-4, sync=0.1, verify=1e-4, driver=1e-4, driver_step=1e-4
    )
    steps = [line(i, EIGHT, rates) for i in range(1, 5)]
    again = run_rates(steps)
    assert again.sync == pytest.approx(0.1) and again.driver_step == pytest.approx(1e-4)
    assert seconds(EIGHT, again) == pytest.approx(steps[0].seconds, rel=0.02)


def test_the_overlap_is_the_one_that_makes_steps_at_lag_1_as_long_as_measured() -> None:
    rates, lagged = replace(ONE, learner_token=1 / 6400), replace(EIGHT, max_lag=1)
    measured = [Step(lagged, {"seconds/step": seconds}) for seconds in (2.0, 3.0)]
    found = on_shared_cores(rates, EIGHT, 2.0, 2.0, 2.0, measured)
    assert found.overlap == pytest.approx(0.8, rel=0.01)
    assert seconds(lagged, found) == pytest.approx(2.5, rel=0.01)


FAST = ["experiment=quickstart", "objective=grpo", "rollout.groups_per_step=2", "generator.replicas=1"]


def kept(folder: Path) -> Path:
    file = folder / "rates.json"
    file.write_text(json.dumps({"source": "worked out", "rates": asdict(replace(ONE, learner_token=1e-4))}))
    return file


def test_rates_are_read_as_they_were_printed(tmp_path: Path) -> None:
    assert load_rates(kept(tmp_path).read_text()) == (replace(ONE, learner_token=1e-4), "worked out")


def test_a_plan_of_rates_from_a_file_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = ["memory of a learner rank"]  # it imports transformers: test_memory.py has it
    monkeypatch.setattr(plan.memory, "memory_lines", lambda config, objective, card: held)
    command = ["plan", f"--rates={kept(tmp_path)}", "--engines=1,2", *FAST, "driver=async", "cluster=gpu"]
    assert cli.run(command) == 0
    told = capsys.readouterr().out
    assert "rates (worked out" in told and "not measured" in told and "memory of a learner rank" in told
    assert [
        word for word in ("lag 0", "lag 1", "another engine", "2 engines", "bound: ") if word not in told
    ] == []
    assert cli.run([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["modelled"]["lag 1"]["seconds"] < found["modelled"]["lag 0"]["seconds"]
    assert set(found["modelled"]["2 engines"]["without"]) >= {"engines", "driver", "sync", "long responses"}


def test_a_plan_of_another_machine_asks_nothing_of_this_ones_cards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[float | None] = []
    lines = lambda config, objective, card: [str(asked.append(card))]
    monkeypatch.setattr(plan.memory, "memory_lines", lines)
    monkeypatch.setattr(plan.memory, "smallest_card", lambda: 1.0)
    assert cli.run(["plan", f"--rates={kept(tmp_path)}", *FAST, "cluster=gpu"]) == 0
    assert asked == [None]
    assert cli.run(["plan", f"--rates={kept(tmp_path)}", "--card=80", *FAST, "cluster=gpu"]) == 0
    assert asked[1] == plan.memory.named_card("80")


def test_what_a_model_weighs_is_asked_once_the_checks_have_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(config: Any) -> None:
        raise PreflightError("model.path is no model")

    monkeypatch.setattr(plan.memory, "memory_lines", lambda *_: pytest.fail("asked before it was checked"))
    monkeypatch.setattr(plan.preflight, "refuse_wrong", wrong)
    with pytest.raises(PreflightError, match="no model"):
        plan.main([*FAST])


@pytest.mark.parametrize(
    "told", ["--engines=0", "--engines=two", "--rates=nowhere.json", "--rates=nowhere.jsonl"]
)
def test_what_plan_cannot_read_is_refused_by_its_flag(told: str, tmp_path: Path) -> None:
    given = [told] if told.startswith("--rates") else [told, f"--rates={kept(tmp_path)}"]
    with pytest.raises(ConfigError, match=told.partition("=")[0]):
        plan.main([*given, *FAST])


def test_many_engines_are_simulated_by_those_that_are_like_them() -> None:
    rates = replace(
        ONE, decode_sequence=1e-4, learner_token=1e-4, driver_step=1e-4, sync=0.1, sync_engine=1e-3
    )
    shape, few, each = plan._grown(Shape(groups=1, group_size=2), rates, 64)
    assert (shape.engines, shape.ranks, shape.groups, each) == (32, 32, 32, 2.0)
    whole = Shape(engines=64, ranks=64, groups=64, group_size=2, verifiers=64)
    found = simulate(shape, few)
    assert found["seconds"] == pytest.approx(seconds(whole, rates))
    assert each * found["tokens/per_second"] == pytest.approx(simulate(whole, rates)["tokens/per_second"])


def test_a_run_whose_phases_overlap_gives_no_rates(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    _, tree = compose.load_config([*FAST, "driver=async"])
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(tree, resolve=True))
    with pytest.raises(ConfigError, match="max_lag"):
        plan.main([f"--rates={tmp_path}/metrics.jsonl", *FAST])


def test_without_gpus_a_cluster_is_planned_from_rates() -> None:
    with pytest.raises(PreflightError, match="--rates"):
        plan.main([*FAST, "cluster=gpu"])


def test_a_setting_that_train_refuses_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.group_size"):
        plan.main([*FAST, "rollout.group_sise=4"])
