"""The pages of docs/: complete, of one source, and with code that runs. test_site.py builds them."""

import doctest
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from docs import generated, messages, sources
from docs.equations import markdown_formula
from entroray import config
from entroray.binding import slot_functions
from entroray.cli import reference
from entroray.metrics import catalogue
from entroray.objective.objective import SLOTS
from entroray.rows import objective_names
from entroray.wiring import compose
from entroray.wiring.parts import build_parts

DOCS = sources.DOCS
TERMS = """GRPO, DAPO, Dr. GRPO, GSPO, CISPO, RLOO, REINFORCE, entropy collapse, clip-higher, KL-Cov,
Clip-Cov, staleness, importance sampling, truncated importance sampling, TIS, varentropy, forking tokens,
dynamic sampling, off-policy, asynchronous RL, pass@k, RLVR, LoRA, refit, entropy bonus, exploration,
IcePop, 80/20"""
"""What people search for."""


def fences(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", sources.page_text(page), re.MULTILINE | re.DOTALL)


@cache
def headings(page: str) -> set[str]:
    """What can be linked to on a page."""
    text = sources.FENCE.sub("", sources.page_text(page))
    named = re.findall(r"\{#([^\s}]+)|^\((\S+)\)=", text, re.MULTILINE)
    return {sources.slug(title) for _, title in sources.HEADING.findall(text)} | set().union(*named)


def run_examples(page: str) -> int:
    """How many examples of a page ran and gave what stands there."""
    test = doctest.DocTestParser().get_doctest("\n".join(fences(page, "pycon")), {}, page, f"{page}.md", 0)
    told: list[str] = []
    result = doctest.DocTestRunner().run(test, out=told.append)
    assert not result.failed, "".join(told)
    return result.attempted


def test_every_page_is_in_one_toctree():
    trees = re.findall(
        r"^```{toctree}\n(.*?)^```$", (DOCS / "index.md").read_text(), re.MULTILINE | re.DOTALL
    )
    listed = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    assert sorted(listed) == [name for name in sources.pages() if name != "index"]


@pytest.mark.parametrize("page", sources.pages())
def test_a_page_has_one_title_no_comment_left_and_links_that_lead_somewhere(page):
    text = sources.FENCE.sub("", sources.page_text(page))
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1 and text.lstrip().startswith("# ")
    assert not sources.COMMENT.search(text)
    places = {name: headings(name) for name in sources.pages()}
    for path, place in re.findall(r"\]\((?!https?:)([^()\s#]*)#?([^()\s]*)\)", text):
        if path.endswith(".md"):  # of the site: sphinx knows no other
            assert place in {"", *places[path.removesuffix(".md")]}, f"{path}#{place}"
        else:
            assert (DOCS / path).exists() if path else place in set().union(*places.values()), path or place


def test_every_objective_has_its_equation_its_numbers_and_its_source():
    text = sources.page_text("objectives")
    parts = dict(re.findall(r"^\(objective-\S+\)=\n## (\w+)\n(.*?)(?=^\(objective|\Z)", text, re.M | re.S))
    assert list(parts) == objective_names()
    for name, part in parts.items():
        assert "\\text{loss} = " in part and "| surrogate $S$ | " in part and "| denominator $D$ | " in part
        assert (
            f"```yaml\n{(Path(generated.conf_folder()) / 'objective' / f'{name}.yaml').read_text()}```"
            in part
        )
    assert "$- \\operatorname{min} (r\\,A , \\operatorname{clip} (r , 0.8 , 1.28)\\,A)$" in parts["dapo"]
    assert (
        "| `objective.surrogate.high` | `0.28` | a distance of the ratio from 1, above 0 |" in parts["dapo"]
    )
    assert "https://arxiv.org/abs/2503.14476" in parts["dapo"]


def test_every_function_setting_metric_column_and_error_is_explained():
    text = {page: sources.page_text(page) for page in sources.pages()}
    assert all(f"### `{fn}`\n" in text["parts"] for module in SLOTS.values() for fn in slot_functions(module))
    for path, _, _ in reference.settings(config.Config):
        assert f"| `{path}`{{#{generated.anchor('setting', path)}}} |" in text["settings"]
    for metric in catalogue.read_catalogue():
        assert f"| `{metric.name}`{{#{generated.anchor('metric', metric.name)}}} |" in text["metrics"]
    for columns in generated.record_columns().values():
        assert all(f"| `{column}` |" in text["records"] for column in columns)
    for kind in messages.typed():
        assert f"`{kind.__name__}`" in text["troubleshooting"]
        assert re.search(rf"\*\*[^*]*\b{messages.first_code(kind)}\b", text["troubleshooting"])
    assert len(messages.messages()) > 350 and "learner.lr has no default" in text["messages"]


def test_settings_that_the_pages_name_exist():
    paths = [path for path, _, _ in reference.settings(config.Config)]
    groups = {path.partition(".")[0] for path in paths if "." in path}
    for page in set(sources.pages()) - {"changes"}:
        prose = sources.FENCE.sub("", sources.page_text(page))
        for name in re.findall(r"`\+?([a-z]+(?:\.[a-z_]+)+)(?=[`=. ])", prose):
            if name.partition(".")[0] in groups and not name.endswith((".py", ".safetensors")):
                assert any(f"{p}.".startswith(f"{name}.") or name.startswith(f"{p}.") for p in paths), (
                    page,
                    name,
                )


def test_an_anchor_is_of_one_thing():
    settings = [generated.anchor("setting", path) for path, _, _ in reference.settings(config.Config)]
    metrics = [generated.anchor("metric", metric.name) for metric in catalogue.read_catalogue()]
    assert len({*settings, *metrics}) == len(settings) + len(metrics)
    assert len({*settings, *metrics} - set(generated.targets().values())) < 5, "words that may mean anything"


def test_quoted_messages_are_those_of_the_source():
    """A quoted message is one of the source, with its holes filled, or the beginning of one."""
    known = {said for _, said in messages.messages()}
    quoted = [quote.rstrip("\n") for quote in fences("troubleshooting", "text")]
    assert len(quoted) > 12
    for quote in quoted:
        assert any(said.startswith(quote) or as_pattern(said).fullmatch(quote) for said in known), quote


def as_pattern(said: str) -> re.Pattern:
    words = messages.HOLE.split(said)
    return re.compile(".+".join(map(re.escape, words)) if sum(map(len, words)) > 15 else r"(?!)")


def test_the_words_that_people_search_for_are_explained():
    glossary = sources.page_text("glossary")
    missing = [
        t for t in TERMS.replace("\n", " ").split(", ") if not re.search(rf"^{re.escape(t)}$", glossary, re.M)
    ]
    assert not missing


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        ("-min(r A, cap) where A > 0", r"$- \operatorname{min} (r\,A , \text{cap})$ where $A > 0$"),
        ("π / π_old per token", r"$\frac{\pi}{\pi_{\text{old}}}$ per token"),
        ("(R - mean(R)) / (std(R) + 1e-06) over the group", None),
        ("coef |log π / π_old| on the selected", None),
        ("response tokens of the update", "response tokens of the update"),
        ("0 where PPO's clip by ε is", r"$0$ where PPO's clip by $\epsilon$ is"),
        ("A (2 where A > 0, 3 elsewhere)", "$A$ ($2$ where $A > 0$, $3$ elsewhere)"),
    ],
)
def test_a_formula_is_words_and_mathematics(text, drawn):
    given = markdown_formula(text, frozenset({"cap", "coef"}))
    expected = {
        "(R": r"$\frac{R - \operatorname{mean} (R)}{\operatorname{std} (R) + 10^{-6}}$ over the group",
        "coef": r"$\text{coef}\,\left| \log\,\frac{\pi}{\pi_{\text{old}}} \right|$ on the selected",
    }
    assert given == (drawn or expected[text.split()[0]])


def test_links_of_readmes_lead_to_pages_and_names_to_where_they_are_explained():
    home = sources.ROOT / "entroray/wiring/README.md"
    links = "[x](../../conf/README.md#code), [r](resume.tsv)"
    text = f"see {links}, `learner.lr=1e-6`, `entropy/p80`, `seed`, `seed=2` and arXiv\n2503.14476"
    assert sources.linked_prose(text, home) == (
        "see [x](rewards.md#code), [r](../entroray/wiring/resume.tsv), "
        "[`learner.lr=1e-6`](#setting-learner-lr), [`entropy/p80`](#metric-entropy-p-20-50-80-95), "
        "`seed`, [`seed=2`](#setting-seed) and "
        "[arXiv 2503.14476](https://arxiv.org/abs/2503.14476)"
    )


def test_examples_of_the_pure_metrics_give_what_stands_there():
    assert run_examples("examples") > 60
    named = {
        name for line in fences("examples", "pycon") for name in re.findall(r"entroray\.metrics\.(\w+)", line)
    }
    public = {
        "token_entropy",
        "step",
        "step_detail",
        "prediction",
    }  # by `from entroray import`, entroray.metrics
    there = {path.stem for path in (sources.ROOT / "entroray/metrics").glob("*.py")} - {
        "__init__",
        "catalogue",
    }
    assert named | public == there


def test_the_code_of_extending_runs(tmp_path, monkeypatch):
    """Files by the name that the page gives them, then its examples, then the settings of its commands."""
    for code in fences("extending", "python"):
        name = re.match(r"# (\S+\.py)\n", code)
        file = tmp_path / (
            name[1] if name else "my_lab/gates.py"
        )  # the README's own example says so above it
        file.parent.mkdir(exist_ok=True)
        file.write_text(code)
    (tmp_path / "my_conf/objective").mkdir(parents=True)
    (tmp_path / "my_conf/objective/window.yaml").write_text(*fences("extending", "yaml"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run_examples("extending") > 15
    commands = [
        line for block in fences("extending", "sh") for line in block.replace("\\\n", "").splitlines()
    ]
    assert len(commands) == 5
    for command in commands:
        words = shlex.split(command)
        assert words[:2] == ["entroray", "train"]
        build_parts(compose.load_config(words[2:])[0])
    own = ["experiment=quickstart", "objective=window", "packages=[my_lab]"]
    parts = build_parts(compose.load_config(own, str(tmp_path / "my_conf"))[0])
    assert "|r - 1| <= 0.2" in parts.objective.describe()
