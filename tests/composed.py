"""Settings for tests, in milliseconds: rows merged as Hydra merges them, which takes a tenth of a second."""

from functools import cache

from omegaconf import DictConfig, ListConfig, OmegaConf

from entroray.config import Config
from entroray.rows import conf_folder
from entroray.wiring import compose

GROUPS = {p.name for p in conf_folder().iterdir() if p.is_dir()}


@cache
def rows() -> dict[str, str | None]:
    """Group -> the row of it that `conf/train.yaml` takes, in the order they are merged in."""
    listed = OmegaConf.load(conf_folder() / "train.yaml").defaults
    return {str(group): name for one in listed if not isinstance(one, str) for group, name in one.items()}


@cache
def schema() -> DictConfig:
    return OmegaConf.structured(Config)


@cache
def row(group: str, name: str) -> DictConfig | ListConfig:
    file = conf_folder() / group / f"{name}.yaml"
    values = OmegaConf.load(file)
    return values if "@package _global_" in file.read_text() else OmegaConf.create({group: values})


@cache
def composed(*choices: str) -> DictConfig:
    """The tree of `group=name` choices; a row with defaults of its own is composed by Hydra.

    `tests/files/test_config.py` shows for every row that this is Hydra's tree, learning rate aside.
    """
    chosen = rows() | dict(choice.split("=") for choice in choices)
    if any("defaults" in row(group, name) for group, name in chosen.items() if name):
        tree = compose.load_config(list(choices), training=False)[1]
        OmegaConf.set_struct(tree, None)  # Hydra closes it, free dictionaries too
        if tree.learner.lr == compose.TINY_LR:  # no row says so: filled in, and a test may give a path
            tree.learner.lr = None
        return tree
    told = [row(group, name) for group, name in chosen.items() if name]
    tree = OmegaConf.merge(schema(), *told)
    assert isinstance(tree, DictConfig)
    return tree


def configured(*overrides: str, training: bool = True) -> Config:
    """As `settings.load` of the same overrides, the groups before the values."""
    choices = [o for o in overrides if o.partition("=")[0] in GROUPS]
    values = [o.lstrip("+") for o in overrides if o not in choices]
    return compose.override_config(composed(*choices), values, training=training)
