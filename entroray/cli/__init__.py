"""The `entroray` command: one folder, one module per subcommand."""

import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from entroray import installation
from entroray.errors import EntrorayError, first_line, nearest
from entroray.home import ensure_home, shorten_temporary
from entroray.redaction import HidingStream

USAGE = Path(__file__).with_name("usage.txt").read_text()
_, _ABOUT, OPTIONS = USAGE.strip("\n").split("\n\n")
BLOCKS = {block.split()[0]: block for block in re.split(r"\n  (?=[a-z])", _ABOUT)}
"""The lines of the usage about each command."""
COMMANDS = {name: f"entroray.cli.{name.replace('-', '_')}" for name in BLOCKS}
STARTS = {"train", "warm-start", "eval", "lab", "doctor", "verify-resume"}
"""Commands that need the whole stack."""

EXIT = 30.0
"""Seconds that libraries may take to leave, as a tracker that uploads; then the process ends all the same."""


def main() -> None:
    """Run one command; exit codes as DESIGN 7 lists them."""
    for name in ("stdout", "stderr"):  # None if it was closed: then the next file would get its number
        stream = getattr(sys, name) or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        stream.reconfigure(errors="replace")  # not every terminal takes the curves' characters
        setattr(sys, name, HidingStream(stream))
    code = run(sys.argv[1:])
    with suppress(OSError):  # `entroray ... | head`
        sys.stdout.flush()
    leave = threading.Timer(EXIT, os._exit, (code,))
    leave.daemon = True
    leave.start()
    sys.exit(code)


def run(argv: list[str]) -> int:
    """The exit code of `entroray <argv>`; a typed error is one sentence on stderr."""
    if not argv or {"-h", "--help", "help"} & set(argv):
        print(next((_usage(BLOCKS[name]) for name in argv if name in BLOCKS), USAGE))
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(installation.describe_versions())
        return 0
    ensure_home()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job starts deaf to it
    os.environ.setdefault(
        "RAY_AUTH_MODE", "token"
    )  # Ray's default, which it announces unless it is asked for
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: its threads spin between two sums
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        return _dispatch(argv[0], argv[1:])
    except EntrorayError as error:
        print(f"entroray {argv[0]}: {type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"entroray {argv[0]}: interrupted", file=sys.stderr)
        return 130


def _usage(block: str) -> str:
    """The lines about one command, and about those of its flags that others take too."""
    shared = [line for line in OPTIONS.splitlines() if line.split()[0].rstrip(",") in block]
    return "\n".join([f"usage: entroray {re.sub(' {3,}', '  ', block).strip()}", *shared])


def _dispatch(command: str, arguments: list[str]) -> int:
    """Import the one module that is asked for: some take seconds to import."""
    if command not in COMMANDS:
        print(f"entroray: unknown command `{command}`: {nearest(command, COMMANDS)}", file=sys.stderr)
        return 2
    if command in STARTS:
        shorten_temporary()
        installation.check_environment()
    try:
        if not any("cluster.address=" in argument for argument in arguments):
            # before Ray is imported, which reads its switch then and never again
            import_module("entroray.engine.interfaces").stay_on_loopback()
        asked: Callable[[list[str]], int] = import_module(COMMANDS[command]).main
    except (ImportError, OSError, RuntimeError) as error:  # of libraries that do not fit each other
        installation.check_environment(first_line(error))
        raise
    return asked(arguments)
