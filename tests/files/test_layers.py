"""The rules a reviewer should not have to check: layers, imports, caps, waits, pins. DESIGN.md says why."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = [  # each may import from those before it
    *("ground", "objective", "roles", "metrics", "control", "planning", "reward", "policy", "data"),
    *("rollout", "train", "evaluation", "observe", "engine", "workers", "wiring", "cli", "top"),
]
GROUND = {"types", "kept_sets", "ops", "config", "errors", "rows", "seeds", "binding", "formula", "home"}
GROUND |= {"installation", "redaction"}
TOP, BROAD = {"__init__", "__main__"}, {"Exception", "BaseException"}
HOMES = {  # heavy library -> the only folders that may import it
    "ray": {"workers", "wiring", "cli"},
    "vllm": {"engine", "workers", "wiring", "cli"},
    **{name: {"policy", "engine", "workers", "wiring", "cli"} for name in ("transformers", "tokenizers")},
    "hydra": {"wiring", "cli"},
    **{name: {"observe"} for name in ("wandb", "mlflow")},
}
ONLY = {"deepspeed": "entroray/workers/deepspeed_backend.py", "peft": "entroray/policy/lora.py"}  # files
PURE = {"objective", "metrics", "control", "planning"}
LIGHT = set(sys.stdlib_module_names) | {"torch", "numpy", "jaxtyping", "entroray"}
LINES, FUNCTION, NESTING = 400, 60, 4
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
LOOPS = (ast.For, ast.AsyncFor, ast.While)
BRANCHES = (ast.If, ast.Match, ast.Try, ast.TryStar, ast.With, ast.AsyncWith)
BY_NAME = {"importlib.import_module", "__import__"}


@dataclass(frozen=True)
class Source:
    """One file, read once. `path` is relative to the checkout."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @cached_property
    def known(self) -> dict[str, str]:
        """What the file's own imports call things: {"r": "ray"} after `import ray as r`."""
        names = {}
        for node in self.nodes:
            if isinstance(node, ast.Import):
                names |= {alias.asname: alias.name for alias in node.names if alias.asname}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        return names

    def spell(self, node: ast.AST) -> str:
        """A name or attribute spelt out in full: `r.get` is "ray.get"."""
        if isinstance(node, ast.Attribute):
            return f"{self.spell(node.value)}.{node.attr}"
        return self.known.get(node.id, node.id) if isinstance(node, ast.Name) else "?"

    def calls(self) -> Iterator[tuple[ast.Call, str]]:
        return ((node, self.spell(node.func)) for node in self.nodes if isinstance(node, ast.Call))

    def excused(self, node: ast.AST, word: str) -> bool:
        """Does the line end in `# word: a reason`?"""
        return re.search(rf"# {word}: \S", self.text.splitlines()[node.lineno - 1]) is not None


def floor(path: str) -> str:
    """The floor that a file of the package belongs to."""
    top = Path(path).with_suffix("").parts[1]
    return "ground" if top in GROUND else "top" if top in TOP else top


def imports(source: Source) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import: relative, inside functions, and by a literal name."""
    package = Path(source.path).parts[:-1]
    for node in source.nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*start, node.module) if node.module else start)
            yield node.lineno, module
            if module == "entroray":  # `from entroray import train` imports a folder
                folders = [alias.name for alias in node.names if alias.name in {*FLOORS, *GROUND}]
                yield from ((node.lineno, f"entroray.{name}") for name in folders)
        elif isinstance(node, ast.Call) and source.spell(node.func) in BY_NAME:
            literal = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
            yield from ((node.lineno, str(name)) for name in literal)


# Every rule takes a Source and returns what is wrong with it, as "line: what".


def imports_point_up_the_list(source: Source) -> list[str]:
    here, wrong = floor(source.path), []
    for line, name in imports(source):
        if name.startswith("entroray."):
            there = floor(f"entroray/{name.split('.')[1]}.py")
            if there not in FLOORS or FLOORS.index(there) > FLOORS.index(here):
                wrong.append(f"{line}: {here} imports {name}")
    return wrong


def heavy_libraries_stay_home(source: Source) -> list[str]:
    here = floor(source.path)
    tops = [(line, name.split(".")[0]) for line, name in imports(source)]
    strays = [(line, top) for line, top in tops if here not in HOMES.get(top, {here})]
    strays += [(line, top) for line, top in tops if source.path != ONLY.get(top, source.path)]
    strays += [(line, top) for line, top in tops if here in PURE and top not in LIGHT]
    return [f"{line}: {top} imported in {here}" for line, top in strays]


def depth(node: ast.AST) -> int:
    """The deepest stack of compound statements; `elif` does not deepen, an inner function starts anew."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTIONS):
            continue
        is_elif = isinstance(node, ast.If) and child in node.orelse and child.col_offset == node.col_offset
        deepest = max(deepest, depth(child) + (isinstance(child, LOOPS + BRANCHES) and not is_elif))
    return deepest


def caps_hold(source: Source) -> list[str]:
    found = [(1, "lines in the file", source.text.count("\n"), LINES)]
    for node in source.nodes:
        if isinstance(node, FUNCTIONS):
            length = node.end_lineno - node.lineno + 1
            found.append((node.lineno, f"lines in {node.name}", length, FUNCTION))
            found.append((node.lineno, f"deep in {node.name}", depth(node), NESTING))
    return [f"{line}: {size} {what}, {cap} allowed" for line, what, size, cap in found if size > cap]


def passes(call: ast.Call, keyword: str) -> bool:
    """Is `keyword` given, and not None? `**settings` has the benefit of the doubt."""
    none = ast.dump(ast.Constant(None))
    return any(k.arg is None or (k.arg == keyword and ast.dump(k.value) != none) for k in call.keywords)


def ray_waits_in_one_place_with_a_deadline(source: Source) -> list[str]:
    bounded = {id(n) for c, _ in source.calls() if passes(c, "timeout") for n in (c.func, *c.args)}
    here = source.path == "entroray/workers/cluster.py"
    refused = "without timeout=" if here else "outside workers/cluster.py"
    waits = [n for n in source.nodes if source.spell(n) in {"ray.get", "ray.wait"}]
    return [f"{n.lineno}: {source.spell(n)} {refused}" for n in waits if not (here and id(n) in bounded)]


def no_exception_is_swallowed(source: Source) -> list[str]:
    caught = [(n, n.type) for n in source.nodes if isinstance(n, ast.ExceptHandler)]
    caught += [(c, ast.Tuple(c.args)) for c, name in source.calls() if name == "contextlib.suppress"]
    wrong = [f"{node.lineno}: bare except" for node, kind in caught if kind is None]
    for node, kind in caught:
        kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
        if BROAD & {source.spell(one) for one in kinds} and not source.excused(node, "boundary"):
            wrong.append(f"{node.lineno}: catches everything; name the error, or add `# boundary: why`")
    return wrong


def async_code_does_not_sleep(source: Source) -> list[str]:
    def own(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, (*FUNCTIONS, ast.Lambda)):
                yield child
                yield from own(child)

    bodies = [node for node in source.nodes if isinstance(node, ast.AsyncFunctionDef)]
    sleeps = [node for body in bodies for node in own(body) if source.spell(node) == "time.sleep"]
    return [f"{node.lineno}: time.sleep blocks the loop; asyncio.sleep" for node in sleeps]


def waits_on_processes_end(source: Source) -> list[str]:
    """subprocess calls carry timeout=, and so do Popen's waits unless awaited; or `# deadline: why not`."""
    starts = {f"subprocess.{name}" for name in ("run", "call", "check_call", "check_output")}
    uses = any(name == "subprocess" for _, name in imports(source))
    awaited = {id(node.value) for node in source.nodes if isinstance(node, ast.Await)}
    wrong = []
    for call, name in source.calls():
        waits = name.endswith(".communicate") or (name.endswith(".wait") and not call.args)
        waits = waits and uses and id(call) not in awaited
        if (name in starts or waits) and not (passes(call, "timeout") or source.excused(call, "deadline")):
            wrong.append(f"{call.lineno}: {name} without timeout=")
    return wrong


def results_of_pools_have_a_deadline(source: Source) -> list[str]:
    """A future of a thread or process waits for ever; `# deadline: why` where something else bounds it."""
    if not {name.split(".")[0] for _, name in imports(source)} & {"concurrent", "pebble"}:
        return []
    asked = [c for c, name in source.calls() if name.endswith(".result") and not c.args]
    bare = [c for c in asked if not (passes(c, "timeout") or source.excused(c, "deadline"))]
    return [f"{call.lineno}: .result without timeout=" for call in bare]


def zips_are_strict(source: Source) -> list[str]:
    loose = [call for call, name in source.calls() if name == "zip" and not passes(call, "strict")]
    return [f"{call.lineno}: zip without strict=" for call in loose]


def no_file_is_called_utils(source: Source) -> list[str]:
    named = [part for part in Path(source.path).parts if part.lower().startswith("utils")]
    return [f"1: {part} says nothing of what is in it" for part in named]


def nothing_of_one_machine(source: Source) -> list[str]:
    """No address of a package index, and no path of the machine this was written on."""
    hosts = r"\bpypi[.]org|[.]pythonhosted[.]org|pytorch[.]org/whl|pypi[.]nvidia[.]com|conda[.]anaconda[.]org"
    paths = r"(?<![\w.$}-])/(work/|root/|tmp/ex[p])"
    found = re.finditer(f"{hosts}|{paths}", source.text)
    return [f"{source.text[: m.start()].count(chr(10)) + 1}: {m.group()}" for m in found]


def requirements_are_exact(source: Source) -> list[str]:
    project = tomllib.loads(source.text)
    asked = project["project"].get("dependencies", []) + project.get("build-system", {}).get("requires", [])
    asked += [one for extra in project["project"].get("optional-dependencies", {}).values() for one in extra]
    exact = re.compile(r"[\w.-]+(\[[\w,-]+\])?==\d[\w.]*( *;.+)?")
    return [f"1: {one} is no exact pin" for one in asked if not exact.fullmatch(one)]


PACKAGE = [
    imports_point_up_the_list,
    heavy_libraries_stay_home,
    ray_waits_in_one_place_with_a_deadline,
    no_exception_is_swallowed,
    async_code_does_not_sleep,
    waits_on_processes_end,
    results_of_pools_have_a_deadline,
    zips_are_strict,
]
PYTHON = [caps_hold]
ANY = [no_file_is_called_utils, nothing_of_one_machine]


def tracked() -> list[str]:
    """What git tracks or would track; without git (an image, an archive) what is not hidden or made."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=True)
        listed = done.stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        made = re.compile(r"(^|/)(\.(?!ci$|github$)|__pycache__|(runs|outputs|build|dist)$)")
        tops = [top for top in ROOT.iterdir() if not made.search(top.name)]
        paths = [path.relative_to(ROOT) for top in tops for path in (top, *top.rglob("*"))]
        listed = [str(path) for path in paths if not made.search(str(path))]
    return sorted(name for name in listed if name and (ROOT / name).is_file())


@cache
def read(path: str) -> Source:
    return Source(path, (ROOT / path).read_text(errors="replace"))


def governed(rule: Callable) -> list[str]:
    """The files a rule is about."""
    python = [path for path in tracked() if path.endswith(".py")]
    package = [path for path in python if path.startswith("entroray/")]
    return package if rule in PACKAGE else python if rule in PYTHON else tracked()


@pytest.mark.parametrize("rule", ANY + PYTHON + PACKAGE, ids=lambda rule: rule.__name__)
def test_the_rules_hold(rule):
    wrong = [f"{path}:{one}" for path in governed(rule) for one in rule(read(path))]
    assert not wrong, "\n".join(wrong)


def test_no_two_test_files_have_one_name():
    """pytest imports them by name, and cannot collect two such together."""
    names = [Path(path).name for path in tracked() if Path(path).name.startswith("test_")]
    assert sorted(names) == sorted(set(names))


def test_requirements_are_exact_pins():
    assert requirements_are_exact(read("pyproject.toml")) == []


DEEP = "def f(x):\n" + "".join(f"{'    ' * n}for _ in x:\n" for n in range(1, 6)) + "    " * 6 + "pass\n"
ELIFS = "def f(x):\n    if x:\n        pass\n" + "    elif x:\n        pass\n" * 9
LONG = "def f():\n" + "    pass\n" * 60
CLUSTER, ANYWHERE = "entroray/workers/cluster.py", "entroray/rollout/stream.py"

REFUSED = {  # rule: (path, text) of the smallest offences
    imports_point_up_the_list: [
        ("entroray/types.py", "from entroray.objective import build_objective"),
        ("entroray/train/driver.py", "import entroray.workers.cluster as c"),
        ("entroray/train/driver.py", "def f():\n    from ..observe import journal"),
        ("entroray/objective/keep.py", "from .. import train"),
        ("entroray/objective/__init__.py", "from ..metrics import step"),
        ("entroray/policy/head.py", "from entroray.helpers import x"),
        ("entroray/reward/gym.py", "import importlib as i\ni.import_module('entroray.cli')"),
    ],
    heavy_libraries_stay_home: [
        ("entroray/train/driver.py", "def f():\n    import ray"),
        ("entroray/observe/report.py", "from vllm.outputs import RequestOutput"),
        ("entroray/workers/learner_rank.py", "def f():\n    from deepspeed.comm import comm"),
        ("entroray/reward/math.py", "from transformers import AutoTokenizer"),
        ("entroray/config.py", "import tokenizers"),
        ("entroray/workers/cluster.py", "import hydra"),
        ("entroray/metrics/reward_entropy_law.py", "import scipy.stats"),
    ],
    caps_hold: [("entroray/ops.py", "\n" * 401), ("entroray/ops.py", LONG), ("tests/toy.py", DEEP)],
    ray_waits_in_one_place_with_a_deadline: [
        (ANYWHERE, "import ray\nray.get(x, timeout=1)"),
        (ANYWHERE, "from ray import wait as w\nw(x, timeout=1)"),
        (ANYWHERE, "import ray as r\nto_thread(r.get, x, timeout=1)"),
        (CLUSTER, "import ray\nray.get(x)"),
        (CLUSTER, "import ray\nray.wait(x, timeout=None)"),
    ],
    no_exception_is_swallowed: [
        (ANYWHERE, "try:\n    f()\nexcept:  # boundary: no\n    pass"),
        (ANYWHERE, "try:\n    f()\nexcept Exception:\n    pass"),
        (ANYWHERE, "try:\n    f()\nexcept (OSError, BaseException) as e:\n    pass"),
        (ANYWHERE, "try:\n    f()\nexcept Exception:  # boundary:\n    pass"),
        (ANYWHERE, "from contextlib import suppress\nwith suppress(Exception):\n    f()"),
    ],
    async_code_does_not_sleep: [
        (ANYWHERE, "import time\nasync def f():\n    if x:\n        time.sleep(1)"),
        (ANYWHERE, "from time import sleep\nasync def f():\n    sleep(1)"),
    ],
    waits_on_processes_end: [
        (ANYWHERE, "import subprocess\nsubprocess.run(['ls'])"),
        (ANYWHERE, "from subprocess import check_output as o\no(['ls'], timeout=None)"),
        (ANYWHERE, "import subprocess\np = subprocess.Popen(x)\np.wait()"),
    ],
    results_of_pools_have_a_deadline: [(ANYWHERE, "from pebble import ProcessPool\nfuture.result()")],
    zips_are_strict: [(ANYWHERE, "zip(a, b)")],
    no_file_is_called_utils: [("entroray/rollout/utils.py", ""), ("tests/utils_ray/x.py", "")],
    nothing_of_one_machine: [  # cut in two, so that this file itself passes
        ("docker/Dockerfile", "RUN pip install -i https://pypi" + ".org/simple x"),
        ("README.md", "https://download.pytorch" + ".org/whl/cpu"),
        ("conf/train.yaml", "dir: /" + "work/main"),
        ("conf/train.yaml", "dir: '/" + "root/x'"),
        ("launch/test.sh", "cd /tmp/" + "exp1"),
    ],
    requirements_are_exact: [
        ("pyproject.toml", '[project]\ndependencies = ["torch>=2"]'),
        ("pyproject.toml", '[project.optional-dependencies]\ndev = ["pytest"]'),
        ("pyproject.toml", '[project]\n[build-system]\nrequires = ["hatchling==1.*"]'),
    ],
}

ALLOWED = {  # the nearest things that are right
    imports_point_up_the_list: [
        ("entroray/types.py", "from entroray.errors import DataError\nfrom . import ops"),
        ("entroray/observe/report.py", "from ..train.batching import assemble"),
        ("entroray/__main__.py", "from entroray.cli import main"),
    ],
    heavy_libraries_stay_home: [
        ("entroray/policy/model.py", "import transformers, pyarrow"),
        (ONLY["deepspeed"], "import deepspeed\nfrom deepspeed.comm import comm"),
        ("entroray/metrics/reward_entropy_law.py", "import math, torch, numpy\nfrom ..ops import segment"),
    ],
    caps_hold: [("entroray/ops.py", "\n" * 400), ("entroray/ops.py", ELIFS)],
    ray_waits_in_one_place_with_a_deadline: [(CLUSTER, "import ray\nray.get(x, timeout=left)")],
    no_exception_is_swallowed: [
        (ANYWHERE, "try:\n    f()\nexcept Exception:  # boundary: user code\n    pass")
    ],
    async_code_does_not_sleep: [
        (ANYWHERE, "import time\nasync def f():\n    def g():\n        time.sleep(1)"),
    ],
    waits_on_processes_end: [
        (ANYWHERE, "import subprocess\nasync def f():\n    await event.wait()"),
        (ANYWHERE, "import subprocess\nsubprocess.run(x)  # deadline: the run's own"),
    ],
    results_of_pools_have_a_deadline: [(ANYWHERE, "import asyncio\ntask.result()")],
    zips_are_strict: [(ANYWHERE, "zip(a, b, strict=False)")],
    nothing_of_one_machine: [("README.md", "see docker/" + "work/x, $HOME/" + "root/ and /workers/")],
    requirements_are_exact: [("pyproject.toml", '[project]\ndependencies = ["ray[default]==2.60.0"]')],
}


def each(table: dict) -> list[object]:
    pairs = [(rule, number, case) for rule, cases in table.items() for number, case in enumerate(cases)]
    return [pytest.param(rule, *case, id=f"{rule.__name__}-{number}") for rule, number, case in pairs]


@pytest.mark.parametrize(("rule", "path", "text"), each(REFUSED))
def test_a_rule_refuses(rule, path, text):
    assert rule(Source(path, text))


@pytest.mark.parametrize(("rule", "path", "text"), each(ALLOWED))
def test_a_rule_allows(rule, path, text):
    assert rule(Source(path, text)) == []


def test_every_rule_is_shown_to_fail():
    assert REFUSED.keys() == {*PACKAGE, *PYTHON, *ANY, requirements_are_exact}
