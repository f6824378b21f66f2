"""`entroray watch RUN`: the run page in a browser, following the run."""

from pathlib import Path

from entroray.cli import flags
from entroray.cli.flags import Flag
from entroray.errors import ConfigError
from entroray.observe.page_server import LOOK, PageServer

FLAGS = (Flag("port", "N"),)


def main(arguments: list[str]) -> int:
    """Serves until Ctrl-C; ConfigError unless one run directory is given, which may be yet to come."""
    given, folders = flags.parse_flags("watch", arguments, FLAGS)
    port = given.get("port", "0")
    if not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"--port={port} must be a whole number from 0, any free port, to 65535")
    if len(folders) != 1 or (Path(folders[0]).exists() and not Path(folders[0]).is_dir()):
        raise ConfigError(f"watch takes one run directory, got {folders}: entroray watch runs/latest")
    folder = Path(folders[0]).absolute()
    with PageServer(folder, int(port)) as server:
        waits = "" if folder.is_dir() else ", which is not there yet"
        print(f"watching {folder}{waits}\nopen     {server.address}\nCtrl-C ends it", flush=True)
        try:
            server.serve_forever(LOOK)
        except KeyboardInterrupt:
            print("\nno longer watched; the run goes on as it was", flush=True)
    return 0
