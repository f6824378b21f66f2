"""How large the package may become: one table."""

from collections import Counter
from pathlib import Path

import pytest

from entroray.cli.reference import settings
from entroray.config import Config, Part
from tests.files.test_layers import ROOT, tracked

SIZES = {  # what is counted: the most there may be
    # 17,500 before families of models, tables as people have them, words and folders as people type them,
    # resumptions compared, judges and verifiers that die: tests/public_cases.tsv. 21,000 before tables of
    # millions of rows (985), judges of text, form, length and on servers, several at once, and units, words
    # and choices in mathematics (1,513), csv, wandb and mlflow (564), evaluation sets (195 and wiring).
    # 24,700 before a planner, idle shares and a trace (980), scores from the update (200), cores divided and
    # one copy of weights (270), a linear driver off its loop (180), a tiled head (120), a quick start (170).
    # 26,900 before cards: what they hold and how long their work may take (720), packed rows (350), a model
    # divided as it is read, exports and checkpoints in shards (360), two Triton kernels (140). 28,550
    # before transfers that are left and checked, interfaces and a sum between nodes (660), top-p and top-k
    # exactly (530), adapters (460), places of actors, shared cards (390), runner V2, overlap and sleep (350).
    # 31,000 before programs that are judged: their tests, a server of them, and what shuts them in (1,400),
    # and clusters whose nodes join late and end in order (50). 32,520 before heartbeats (280), a learner that
    # is lost and a run that goes on (350), a ledger (300), checkpoints for other ranks and stages (270),
    # doors that are closed (200), rollouts and tokens of the run page (160). 34,090 before a run that is
    # watched (270), runs over each other and a folder read by Python (190), a package (180), what healing
    # itself had left open (150), stores and heads that are lost (70). 35,000 before one process makes a model
    # and others wait for it, held-out answers on the run page, help on one command (80). 35,080 before ops
    # that a killed rank holds or another user compiled (40), folders whose names or paths mislead (30),
    # values that are swept as they are typed (10)
    "lines of *.py in entroray/": 35_160,
    # model.template, model.template_args; reward.parts, reward.correct, evaluate.sets; learner.score,
    # observe.tokens.half, run.trace; learner.pack, liger, compile, gradient_checkpointing_every_n_layers and
    # _offload, lr_high; learner.lora.rank, alpha, targets, export; generator.overlap;
    # verifier.isolation; learner.restarts, run.grace, checkpoint.every_minutes
    "settings, counted by their leaves": 143,
    "modules in one folder of entroray/": 20,
}


def counted() -> dict[str, int]:
    """Each size as it is now."""
    modules = [Path(path) for path in tracked() if path.startswith("entroray/") and path.endswith(".py")]
    folders = Counter(path.parent for path in modules if path.name != "__init__.py")
    return {
        "lines of *.py in entroray/": sum((ROOT / path).read_text().count("\n") for path in modules),
        "settings, counted by their leaves": len([*settings(Config), *settings(Part)]),
        "modules in one folder of entroray/": max(folders.values()),
    }


@pytest.mark.parametrize("what", SIZES)
def test_the_package_stays_small(what):
    assert counted()[what] <= SIZES[what]
