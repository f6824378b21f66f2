"""The home folder, where programs keep their caches: a container under a uid of its own may have none."""

import getpass
import os
import sys
import tempfile
from pathlib import Path


def home_folder() -> Path:
    """The user's home if caches can be kept there, else a folder of this uid's own under $TMPDIR."""
    return _users_home() or Path(tempfile.gettempdir(), f"entroray-home-{os.getuid()}")


def _users_home() -> Path | None:
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an entry in passwd
        return None
    usable = os.path.isdir(home / ".cache") or os.access(home, os.W_OK | os.X_OK)
    return home if usable else None


def ensure_home() -> None:
    """Set HOME and USER, which Ray, vLLM and torch ask for, if nobody else does; processes inherit them."""
    if not _users_home():
        home = home_folder()
        home.mkdir(mode=0o700, exist_ok=True)
        os.environ["HOME"] = str(home)
        print(f"entroray: there is no home folder that can be written, so HOME={home}", file=sys.stderr)
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13 on
        os.environ["USER"] = f"uid-{os.getuid()}"
