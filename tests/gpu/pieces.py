"""Puts wheels into the pieces that a bare machine is sent: python -m tests.gpu.pieces WHEELS

`--unpack` takes in those that lie in tests/gpu/pieces.

`pieces.tsv` says which package is in which piece and which of its files stay away. A piece is a zip of
what would be in site-packages; the same wheels make the same bytes.
"""

import fnmatch
import hashlib
import re
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from entroray import __version__

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PIECES = HERE / "pieces"
UNPACKED = HERE / "unpacked"
SUMS = PIECES / "SHA256SUMS"
MOST = 61 * 2**20
"""Bytes of a piece that can be copied."""
EARLY = (1980, 1, 1, 0, 0, 0)


class Row(NamedTuple):
    """One package of one piece; one that is in two pieces has two rows."""

    piece: str
    package: str
    version: str
    """`pinned` where pyproject.toml has it."""
    how: str
    """`wheel`, or `built` where there is only a source."""
    only: str
    """Files that go along, as patterns between spaces; all if empty."""
    without: str
    why: str


def rows() -> list[Row]:
    """Of pieces.tsv."""
    lines = (HERE / "pieces.tsv").read_text().splitlines()
    return [Row(*(cell.strip() for cell in line.split("\t"))) for line in lines[1:]]


def requirement(row: Row) -> str:
    """As pip takes it."""
    version = pins()[row.package] if row.version == "pinned" else row.version
    return f"{row.package}=={version}"


def pins() -> Mapping[str, str]:
    """Versions by package, of pyproject.toml and its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = [
        *project["dependencies"],
        *(one for each in project["optional-dependencies"].values() for one in each),
    ]
    found = (re.match(r"([\w.-]+)(?:\[[\w,]+\])?==([\w.]+)", one) for one in stated)
    return {match[1]: match[2] for match in found if match}


def wheel_of(row: Row, wheels: Path) -> Path:
    """The file that pip put there."""
    plain = lambda name: re.sub(r"[-_.]+", "-", name).lower()
    name, version = requirement(row).split("==")
    for path in sorted(wheels.glob("*.whl")):
        found = path.name.split("-")
        if plain(found[0]) == plain(name) and found[1] == version:
            return path
    raise SystemExit(f"pieces: {wheels} has no wheel of {name} {version}")


def taken(row: Row, names: Sequence[str]) -> Iterator[str]:
    """Files of a wheel that go along."""
    any_of = lambda name, patterns: any(fnmatch.fnmatchcase(name, each) for each in patterns.split())
    for name in names:
        if (
            not name.endswith("/")
            and (not row.only or any_of(name, row.only))
            and not any_of(name, row.without)
        ):
            yield name


def write(piece: str, of: Sequence[Row], wheels: Path) -> str:
    """One zip; a line on it."""
    path = PIECES / f"{piece}.zip"
    held: list[str] = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as out:
        for row in of:
            before = path.stat().st_size
            with zipfile.ZipFile(wheel_of(row, wheels)) as wheel:
                for name in taken(row, sorted(wheel.namelist())):
                    moved = re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", name)
                    info = zipfile.ZipInfo(moved, EARLY)
                    info.external_attr = (0o755 if moved.startswith("ray/core/src") else 0o644) << 16
                    out.writestr(info, wheel.read(name), zipfile.ZIP_DEFLATED, 6)
            held.append(f"{requirement(row)} {(path.stat().st_size - before) / 2**20:.1f}")
        for file in sorted(PIECES.glob("cache/**/*")) if piece.startswith("2") else ():
            if file.is_file():
                info = zipfile.ZipInfo(str(file.relative_to(PIECES)), EARLY)
                info.external_attr = 0o644 << 16
                out.writestr(info, file.read_bytes(), zipfile.ZIP_DEFLATED, 6)
    size = path.stat().st_size
    if size > MOST:
        raise SystemExit(
            f"pieces: {path.name} has {size / 2**20:.1f} MiB, at most {MOST >> 20} can be copied"
        )
    return f"{path.name}: {size / 2**20:.1f} MiB ({', '.join(held)})"


def unpack() -> None:
    """What lies there and was not taken in before; a piece whose sum is another's is refused."""
    announce()
    known = SUMS.read_text() if SUMS.is_file() else ""
    for path in sorted(PIECES.glob("*.zip")):
        mark, found = UNPACKED / f".{path.stem}", hashlib.sha256(path.read_bytes()).hexdigest()
        if mark.is_file() and mark.read_text() == found:
            continue
        if path.name in known and found not in known:
            raise SystemExit(
                f"pieces: {path} is damaged: {found} is not what {SUMS.name} says: copy it again"
            )
        with zipfile.ZipFile(path) as piece:
            for info in piece.infolist():
                Path(piece.extract(info, UNPACKED)).chmod(info.external_attr >> 16)
        mark.write_text(found)
        print(f"unpacked {path.name}, {found}", flush=True)


def announce() -> None:
    """Say there what an installed entroray would say of itself: vLLM looks for its plugins."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    place = UNPACKED / f"entroray-{__version__}.dist-info"
    place.mkdir(parents=True, exist_ok=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: entroray\nVersion: {__version__}\n")
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    lines = [f"[{name}]\n" + "".join(f"{k} = {v}\n" for k, v in own.items()) for name, own in groups.items()]
    (place / "entry_points.txt").write_text("\n".join(lines))


def main(wheels: Path) -> None:
    PIECES.mkdir(exist_ok=True)
    given = rows()
    for piece in dict.fromkeys(row.piece for row in given):
        print(write(piece, [row for row in given if row.piece == piece], wheels), flush=True)
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(PIECES.glob("*.zip"))
    ]
    SUMS.write_text("".join(lines))
    print("".join(lines), end="")


if __name__ == "__main__":
    if sys.argv[1] == "--unpack":
        unpack()
    elif sys.argv[1] == "--requirements":
        print("\n".join(dict.fromkeys(requirement(row) for row in rows() if row.how == sys.argv[2])))
    else:
        main(Path(sys.argv[1]))
