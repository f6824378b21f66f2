"""`entroray warm-start`: build the tiny model and train it on solved examples, unless the cache holds it."""

import asyncio

from entroray.cli import flags
from entroray.cli.flags import CONFIG_DIR
from entroray.wiring import compose, warm_start

FLAGS = (CONFIG_DIR,)


def main(arguments: list[str]) -> int:
    """Make the model of these settings unless the cache holds it; prints its folder."""
    given, overrides = flags.parse_flags("warm-start", arguments, FLAGS)
    config, _ = compose.load_config(overrides, given.get("config-dir"))
    folder = warm_start.cached_folder(config)
    if folder.is_dir():
        print(f"warm-started model, from the cache: {folder}")
    else:
        asyncio.run(warm_start.make_model(config, folder))
    return 0
