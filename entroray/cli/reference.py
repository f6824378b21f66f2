"""`entroray reference`: conf/README.md, made from the schema and the YAML files, so that it is right."""

import inspect
import io
import itertools
import tokenize
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from entroray.binding import keyword_settings, slot_functions
from entroray.config import Config
from entroray.control import feedback, schedules
from entroray.errors import ConfigError
from entroray.rows import conf_folder

HEAD = """# Settings

`entroray/config.py` declares every setting once: type, default, meaning. The YAML here only chooses. Print
what a command would use with `entroray train --cfg job <overrides>`; a misspelt key, a wrong type or an
unknown choice is refused with the nearest right one. This page is made by `entroray reference >
conf/README.md`, and a test compares it.

- A setting of the objective: `objective=dapo objective.surrogate.high=0.3`. A list is given whole:
  `'objective.scales=[{fn: selected}]'`.
- Functions of your own: `'packages=[my_lab]' objective.surrogate.fn=my_lab.gates.window`. Every slot takes
  them: each `fn` of objective, sampler.rule, rollout.plan, rollout.tool, control, reward.judge and
  observe.trackers, and data.source. The package must be importable on every node.
- vLLM's options pass through `generator.engine`, DeepSpeed's through `learner.deepspeed`, untouched:
  `+generator.engine.max_num_seqs=64`.
- Your own folder with the same groups: `entroray train --config-dir my_conf experiment=mine`.
- `model.warm_start` belongs to the tiny model; with `model.path=<folder or hub id>` it is not read.
- `model.dtype=bfloat16` needs `driver.probe.tolerance` near 0.1: two bf16 implementations differ by that
  much.
- A row that compares the rollouts of a group needs `rollout.group_size` of at least 2.
- `sampler=` other than fixed draws from another distribution than the policy's and sets the row's
  `correction` to truncated importance weights (entroray/rollout/reshape.py says what is and is not made up
  for). The learner's log-probs, ratios and entropies stay at `sampler.temperature`; the `sampler_*` columns
  of the token records say how each token was drawn. Beside ratio `sampler`, which weighs already, say
  `objective.correction.fn=none`.
- `rollout=` chooses prompts and groups; its ideas combine by their settings: `rollout=replay
  rollout.second.factor=1.2 rollout.prompts.retire=0.9`. `hotter_again`, `hotter_next_time` and
  `replay` train on what another distribution drew and set the row's `correction` as samplers do; a row that
  learns from all-wrong groups (nsr, w_reinforce, entrocraft_band) is refused where they would lose them.
- A mixture names its tasks under `data.parts` (conf/data/mixture.yaml), in place of `data`'s one task:
  `data=mixture data.parts.countdown.weight=3`. A part has `weight`, `system`, `judge`, and `source`, `task`,
  `settings`, `size`, `seed`, `template` and `demonstration` as in `data`; one without a judge has
  `reward.judge`. Held-out shares and lengths are `data`'s own and hold for each part. Metrics of one part end
  in its name, as in `correct/mean:countdown`.
- `rollout.tool` answers calls within a response (conf/data/calculator.yaml): generation stops at `close`,
  the tool is given what stands behind the last `open`, `answer` is put into the response and masked, and
  generation goes on. One of your own: `rollout.tool.fn=null rollout.tool.path=my_file.py:my_function`, called
  with (call, prompt); what it raises is read as `error`, and after `reward.deadline` seconds the response
  has failed and is sampled anew.
"""

CONTROL = """
## Settings that move while a run goes on

`+control.<name>={knob: <path>, fn: <rule>, ...}` moves one number. These can be moved:

- `objective.*`: a number that is written out, as in `objective.penalties.0.coef`;
- `learner.lr`: the base of its schedule, constant or constant with warmup;
- `learner.updates_per_rollout`: rounded, at most `rollout.groups_per_step`, under a schedule that need not
  know how many updates a run has (constant, constant_with_warmup, inverse_sqrt);
- `sampler.temperature`;
- `sampler.rule.*`: a number that is written out, as `sampler.rule.maximum` under `sampler=by_entropy`;
- `rollout.max_tokens`: rounded, and at most what is set, which the engines are built for.

A setting of the objective that takes whole numbers is rounded too; the controller goes on from what it had.
Those travel with each request or each update. With `driver.max_lag` above 0 a new value of `sampler.*` or
`rollout.*` is for groups begun from then on, which are trained on up to that many steps later. The rest
cannot be moved: sizes and precision are built into engines and learner, `weight_decay` and `betas` into
DeepSpeed's optimizer, which keeps `max_grad_norm` in a different place for each `learner.zero_stage`, and
`data`, `rollout` and `driver` into the order of prompts and groups, which a resume must find again.

A schedule reads the step. A controller reads `signal`, any metric that the run measures
(entroray/metrics/README.md; not `law/*`, which is off while anything is moved), as it was `delay` steps
before (default and least 1: a step's metrics are known after it), averaged over `mean` steps (default 1),
and begins at `start` (default: the setting's own value), which lies within `low` and `high`. Where raising
the setting lowers the signal, `gain` or `step` is negative. Two controllers of one knob are refused, and
two that read one signal: they would fight over it. A rule of your own is a function in one of your
`packages`, of the step or of (signal, state); the latter needs settings `low` and `high`. `control/<name>`
in metrics.jsonl is the value in that step, not rounded. State is in
the checkpoint.
"""


def main(arguments: list[str]) -> int:
    """`reference`, to be written over conf/README.md."""
    if arguments:
        raise ConfigError("reference takes no arguments: entroray reference > conf/README.md")
    print(reference_text(), end="")
    return 0


def reference_text() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_groups(), *_rules(), *_settings()]) + "\n"


def _groups() -> Iterator[str]:
    yield "## Choices\n\n| | what it is |\n|---|---|"
    for file in sorted(conf_folder().glob("*/*.yaml")):
        yield f"| `{file.parent.name}={file.stem}` | {title(file)} |"


def _rules() -> Iterator[str]:
    yield CONTROL + "\n| `fn` | its settings | what it does |\n|---|---|---|"
    for name, rule in (slot_functions(schedules) | slot_functions(feedback)).items():
        takes = [
            f"{p.name}={p.default}" if p.default is not p.empty else p.name
            for p in keyword_settings(rule).values()
        ]
        said = " ".join(inspect.getdoc(rule).split("\n\n")[0].split())  # type: ignore[union-attr]
        yield f"| `{name}` | {', '.join(takes)} | {said} |"


def title(file: Path) -> str:
    """What the comment at the head of a YAML says of it."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
    said = " ".join(line.lstrip("# ") for line in lines if "@package" not in line)
    return said.replace("|", "or")


def _settings() -> Iterator[str]:
    yield "\n## Settings\n\n| setting | default | meaning |\n|---|---|---|"
    base = yaml.safe_load((conf_folder() / "train.yaml").read_text())
    for path, default, meaning in settings(Config):
        if path not in base:
            yield f"| `{path}` | `{default}` | {meaning.replace('|', 'or')} |"


def settings(schema: type, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(path, default, meaning) of every setting of a schema; the meaning is the comment behind it."""
    said = _comments(schema)
    for field in fields(schema):
        if is_dataclass(field.default_factory):
            yield from settings(field.default_factory, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{field.name}", _default(field), said.get(field.name, "")


def _default(field: Field[Any]) -> str:
    """As it would be written on the command line."""
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def _comments(schema: type) -> dict[str, str]:
    """The comment behind each field, by name: on its line, or within its parentheses."""
    found, name = dict[str, str](), ""
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(schema)).readline):
        if (
            token.type == tokenize.NAME
            and token.start[1] == 4
            and token.line.lstrip().startswith(token.string)
        ):
            name = token.string
        elif token.type == tokenize.COMMENT and name:
            found[name] = " ".join([found.get(name, ""), token.string[1:].strip()]).strip()
    return found
