"""Folders that every program uses: a home, which a container may lack, and one for temporary files."""

import getpass
import os
import sys
import tempfile
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from entroray.errors import PreflightError

LONGEST = 38
"""Bytes of a folder for temporary files: with what Ray adds, the address of a socket has at most 107."""


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


def shorten_temporary() -> None:
    """Let TMPDIR be a link to itself where its path is longer than sockets of Ray and vLLM allow.

    PreflightError where there can be none.
    """
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) <= LONGEST:
        return
    link = Path("/tmp", f"entroray-{os.getuid()}-{sha256(os.fsencode(folder)).hexdigest()[:8]}")
    try:
        with suppress(FileExistsError):
            link.symlink_to(folder)
        if link.lstat().st_uid != os.getuid() or str(link.readlink()) != folder:
            raise PermissionError("it is another user's")
    except OSError as error:
        raise PreflightError(
            f"TMPDIR={folder} is longer than {LONGEST} bytes, so sockets there have no address, and {link} "
            f"cannot be a link to it ({error}): set TMPDIR to a shorter path"
        ) from error
    os.environ["TMPDIR"] = tempfile.tempdir = str(link)
    print(f"entroray: TMPDIR is too long for sockets, so TMPDIR={link}, a link to it", file=sys.stderr)
