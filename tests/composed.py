"""Settings for tests: Hydra takes a tenth of a second, so it composes a choice of groups once."""

from functools import cache

from omegaconf import DictConfig, OmegaConf

from entroray.cli import settings
from entroray.config import Config

GROUPS = {p.name for p in settings.CONF.iterdir() if p.is_dir()}


@cache
def composed(*choices: str) -> DictConfig:
    """The tree of `group=name` choices."""
    tree = settings.load(list(choices), training=False)[1]
    OmegaConf.set_struct(tree, None)  # Hydra closes it, free dictionaries too
    return tree


def configured(*overrides: str, training: bool = True) -> Config:
    """As `settings.load` of the same overrides, the groups before the values."""
    choices = [o for o in overrides if o.partition("=")[0] in GROUPS]
    values = [o.removeprefix("+") for o in overrides if o not in choices]
    return settings.changed(composed(*choices), values, training=training)
