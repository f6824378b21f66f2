"""Judges: what counts as an answer, what counts as right, and what is neither."""

import math
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from entroray.errors import ConfigError
from entroray.reward import build_judge, extract, gym
from entroray.types import Prompt, Status, Verdict


def prompt(reference: str = "", **entry: object) -> Prompt:
    return Prompt("0" * 16, "?", (1,), reference, entry)


@pytest.fixture
def user_file(tmp_path: Path):
    def write(body: str) -> str:
        (tmp_path / "mine.py").write_text(textwrap.dedent(body))
        return f"{tmp_path / 'mine.py'}:judge"

    return write


@pytest.mark.parametrize(
    ("rule", "marker", "text", "answer"),
    [
        ("response", "", "  3+5 \n", "3+5"),
        ("response", "", " \n ", None),
        ("last_line", "", "think\n\n 42 \n\n", "42"),
        ("last_line", "", "", None),
        ("answer_tag", "", "<think>7 <answer> </think><answer>\n 42 </answer>\nDone.", "42"),
        ("answer_tag", "", "<answer>7</answer> no, <answer>42</answer>", "42"),
        ("answer_tag", "", "so <answer>42", None),
        ("answer_tag", "", "42</answer>", None),
        ("after", "=", "12+34=46,46-5=41", "41"),
        ("after", "=", "41", None),
        ("after", "=", "12+34=", None),
        ("after", "####", "#### 17\n#### 18", "18"),
        ("after", "####", "#### 18\nor 19", "18\nor 19"),
        ("boxed", "", r"\boxed{1} so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("boxed", "", r"\boxed{\left\{1,2\right.}", r"\left\{1,2\right."),
        ("boxed", "", r"\boxed{1} and \boxed{\frac{1}{2}", None),
        ("boxed", "", "42", None),
    ],
)
def test_extraction(rule, marker, text, answer):
    assert extract.rule(rule, marker)(text) == answer


@pytest.mark.parametrize(
    ("reference", "answer", "right"),
    [
        ("18", "18", True),
        ("18", "19", False),
        ("1,000", "1000", True),
        ("1000", "1,000", True),
        ("0.5", r"\frac{1}{2}", True),
        ("18", r"\$18", True),
        ("18", "x=18", True),
        ("x+1", "1+x", True),
        ("18", "hello", False),
        ("18", "18$ and $19", False),
        ("-3", "3", False),
    ],
)
def test_math_compares_values(reference, answer, right):
    verdict = build_judge({"fn": "math"})(rf"so \boxed{{{answer}}}", prompt(reference))
    assert (verdict.reward, verdict.correct, verdict.status) == (right, right, Status.OK)
    assert verdict.answer == answer


def test_math_without_an_answer_is_wrong_and_without_a_reference_is_a_failure():
    judge = build_judge({"fn": "math"})
    assert judge("18", prompt("18")).correct == 0
    for reference in ("", "  "):
        verdict = judge(r"\boxed{18}", prompt(reference))
        assert verdict.status is Status.DATA_FAILED and math.isnan(verdict.reward)


def test_math_works_off_the_main_thread_where_its_timers_raise():
    judge = build_judge({"fn": "math", "extract": "after"})
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(judge, "#### 18", prompt("18")).result().correct == 1


CHAIN = {"question": "?", "answer": "17", "metadata": {"expression": "12 + 5"}}
COUNT = {"question": "?", "answer": "3*5 - 7", "metadata": {"numbers": [3, 5, 7], "target": 8}}


@pytest.mark.parametrize("response", ["The answer is 17", "18", "", "1717"])
def test_partial_scores_of_the_gym_are_not_rewards(response):
    task = {"fn": "gym", "task": "chain_sum"}
    assert build_judge(task)(response, prompt(**CHAIN)).reward == 0
    assert build_judge({**task, "partial": True})(response, prompt(**CHAIN)).correct == 0


def test_partial_scores_on_request():
    shaped = build_judge({"fn": "gym", "task": "chain_sum", "partial": True})
    verdict = shaped("The answer is 17", prompt(**CHAIN))
    assert (verdict.reward, verdict.correct) == (0.125, 0)
    assert shaped("17", prompt(**CHAIN)).reward == 1


def test_written_steps_are_read_by_their_last_number():
    judge = build_judge({"fn": "gym", "task": "chain_sum", "extract": "after", "marker": "="})
    assert judge("12+5=17", prompt(**CHAIN)).correct == 1
    assert judge("12+5=17,17+1=18", prompt(**CHAIN)).correct == 0


def test_countdown_is_scored(tmp_path):
    judge = build_judge({"fn": "gym", "task": "countdown"})
    assert judge("3*5-7", prompt(**COUNT)).correct == 1
    assert judge("(5*3) - 7", prompt(**COUNT)).correct == 1
    assert judge("3+5", prompt(**COUNT)).correct == 0


def test_no_answer_is_evaluated_as_python(tmp_path):
    proof = tmp_path / "evaluated"
    hostile = [
        "0x8+(x-x)*(3+5+7)",  # full marks from the scorer itself
        f"open('{proof}', 'w') and 3*5-7",
        "9**9**9**9",  # never ends
        "3.5*(7-7)+8",
        "3*5-7\n",
    ]
    judge = build_judge({"fn": "gym", "task": "countdown", "extract": "after", "marker": "@"})
    assert [judge(f"@{answer}", prompt(**COUNT)).correct for answer in hostile[:4]] == [0] * 4
    assert gym.scorer("countdown")(hostile[4], COUNT) == 0
    assert not proof.exists()


@pytest.mark.parametrize("task", sorted(gym.SAFE_ANSWERS))
@pytest.mark.parametrize(
    "answer", ["open('x')", "[open('x')]", "().__class__", "x.n(exec('y'))", "getattr(x,'y')"]
)
def test_no_call_of_python_is_a_safe_answer(task, answer):
    assert not gym.SAFE_ANSWERS[task].fullmatch(answer)


def test_one_task_is_loaded_without_the_rest_of_the_gym():
    gym.classes.cache_clear()
    loaded = {name.partition(".")[0] for name in sys.modules}
    assert gym.dataset("chain_sum", size=1, seed=1, settings={})[0]["answer"] == "-4"
    assert "reasoning_gym" not in sys.modules
    assert "matplotlib" in loaded or "matplotlib" not in sys.modules


@pytest.mark.parametrize(
    ("returned", "reward", "correct"),
    [
        ("1", 1, 1),
        ("0.4", 0.4, 0),
        ("-2.5", -2.5, 0),
        ("True", 1, 1),
        ("False", 0, 0),
        ("np.float32(0.5)", 0.5, 0),
        ("np.bool_(True)", 1, 1),
        ("0.99", 0.99, 1),
        ("0.98", 0.98, 0),
        ("Verdict(0.2, True)", 0.2, 1),
        ("Verdict(0.2, 1.0)", 0.2, 1),
        ("Verdict(0.2, np.bool_(False))", 0.2, 0),
    ],
)
def test_custom_judges_may_return(user_file, returned, reward, correct):
    path = user_file(f"""
        import numpy as np
        from entroray.types import Verdict
        def judge(response, prompt):
            return {returned}
    """)
    verdict = build_judge({"fn": "custom", "path": path})("x", prompt())
    assert (verdict.reward, verdict.correct, verdict.status) == (reward, correct, Status.OK)
    assert type(verdict.correct) is bool


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ("None", "None (NoneType)"),
        ("float('nan')", "nan (float)"),
        ("float('inf')", "inf (float)"),
        ("'1.0'", "'1.0' (str)"),
        ("[1.0]", "[1.0] (list)"),
        ("1j", "1j (complex)"),
        ("Verdict(float('nan'), False)", "Verdict(reward=nan"),
        ("Verdict('high', False)", "could not convert string to float"),
        ("Verdict(0.5, 0.5)", "reward.path"),
        ("Verdict(1.0, float('nan'))", "reward.path"),
        ("Verdict(1.0, 'yes')", "reward.path"),
        ("Verdict(1.0, None)", "reward.path"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("exit(3)", "SystemExit: 3"),
        ("(_ for _ in ()).throw(KeyboardInterrupt)", "KeyboardInterrupt"),
        ("(_ for _ in ()).throw(ValueError('one\\nother'))", "ValueError: one other"),
    ],
)
def test_a_failing_custom_judge_is_never_a_zero(user_file, returned, says):
    path = user_file(f"""
        from entroray.types import Verdict
        def judge(response, prompt):
            return {returned}
    """)
    verdict = build_judge({"fn": "custom", "path": path})("x", prompt())
    assert verdict.status is Status.DATA_FAILED
    assert math.isnan(verdict.reward) and verdict.correct is False
    assert says in verdict.detail and "mine.py" in verdict.detail


def test_a_failed_verdict_of_the_users_own_keeps_its_status(user_file):
    path = user_file("""
        from entroray.types import Status, Verdict
        def judge(response, prompt):
            return Verdict(float("nan"), True, status=Status.DATA_FAILED, detail="no tests for it")
    """)
    verdict = build_judge({"fn": "custom", "path": path})("x", prompt())
    assert (verdict.status, verdict.detail) == (Status.DATA_FAILED, "no tests for it")
    assert verdict.correct is False, "what was not judged is not right"


def test_an_answer_that_a_judge_of_ours_fails_at_is_wrong_and_no_failure():
    (row,) = gym.dataset("prime_factorization", size=1, seed=1, settings={})
    judge = build_judge({"fn": "gym", "task": "prime_factorization"})
    verdict = judge("9" * 5000, prompt(**row))  # more digits than Python reads
    assert (verdict.status, verdict.correct, verdict.reward) == (Status.OK, False, 0)
    verdict = build_judge({"fn": "math"})(r"\boxed{\sqrt{2}^{\sqrt{2}^{\sqrt{2}^{99999}}}}", prompt("5"))
    assert (verdict.status, verdict.correct) == (Status.OK, False) and "OverflowError" in verdict.detail


def test_a_broken_row_is_a_failure_of_the_data():
    verdict = build_judge({"fn": "gym", "task": "chain_sum"})("17", prompt("17"))
    assert verdict.status is Status.DATA_FAILED and "KeyError: 'answer'" in verdict.detail


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"fn": "maths"}, r"reward\.judge .*`maths`.*`math`"),
        ({}, r"reward\.judge .*\{fn: name, setting: value, .* \{\}$"),
        ({"fn": "math", "extrakt": "boxed"}, "`math` .*`extrakt`.*`extract`"),
        ({"fn": "math", "extract": "box"}, r"`math\.extract` .*boxed.*'box'"),
        ({"fn": "math", "extract": "after", "marker": ""}, "extract: after .*marker"),
        ({"fn": "gym"}, r"reward\.judge: `gym` .*`task`"),
        ({"fn": "gym", "task": "chain_sum", "partial": "false"}, r"`gym\.partial` .* 'false'$"),
        ({"fn": "math", "marker": 3}, r"`math\.marker` .* 3$"),
        ({"fn": "custom", "path": "mine.py"}, r"reward\.path='mine\.py' .*my_file\.py:my_function"),
        ({"fn": "custom", "path": "nowhere.py:judge"}, r"reward\.path='nowhere\.py:judge': .*/nowhere\.py$"),
    ],
)
def test_a_wrong_spec_is_refused_by_name(spec, says):
    with pytest.raises(ConfigError, match=says):
        build_judge(spec)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("x = 1", r"reward\.path=.*: .*mine\.py .*'judge'$"),
        ("async def judge(r, p): return 1", r"reward\.path=.*: judge .*async"),
        ("def judge(r): return 1", r"reward\.path=.*: judge .*\(text, prompt\)"),
        ("def judge(r, p) return", r"reward\.path: .*mine\.py .*SyntaxError"),
        ("import sys; sys.exit(1)", r"reward\.path: .*mine\.py .*SystemExit\(1\)"),
    ],
)
def test_a_wrong_file_is_refused_before_it_is_used(user_file, body, says):
    with pytest.raises(ConfigError, match=says):
        build_judge({"fn": "custom", "path": user_file(body)})


def test_settings_of_a_task_are_checked():
    with pytest.raises(ConfigError, match=r"'chain_sum' .*'max_term'.*`max_terms`"):
        gym.dataset("chain_sum", size=1, seed=1, settings={"max_term": 3})
    with pytest.raises(ConfigError, match=r"'chain_sum' .*'min_terms': 5, 'max_terms': 3"):
        gym.dataset("chain_sum", size=1, seed=1, settings={"min_terms": 5, "max_terms": 3})


def test_scores_of_numpy_are_plain_floats(user_file):
    path = user_file("import numpy as np\ndef judge(r, p):\n    return np.float64(1)\n")
    verdict = build_judge({"fn": "custom", "path": path})("x", prompt())
    assert type(verdict.reward) is float and not isinstance(verdict.reward, np.floating)
    assert isinstance(verdict, Verdict)
