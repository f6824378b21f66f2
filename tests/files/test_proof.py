"""tests/gpu as read: its page, its findings, prove.sh against a stub."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.files.test_layers import ROOT, read, tracked
from tests.gpu import pieces, table

GPU = ROOT / "tests/gpu"
FINDINGS = [*(f"S1-{n}" for n in range(1, 13)), *(f"S2-{n}" for n in range(21)), "B18"]
ROW = re.compile(r"^\| (S[12]-\d+|B18) \|(.*)\|$", re.MULTILINE)
RESULT = {
    "part": "b",
    "about": "the head",
    "planned": ["one", "two"],
    "card": "NVIDIA H100",
    "driver": "580.1",
    "torch": "2.11.0",
    "commit": "0123456789abcdef",
    "seed": 0,
    "date": "2026-11-27 00:00",
    "dry": False,
    "steps": {
        "one": {
            "seconds": 1.0,
            "checks": [
                {"name": "c|d", "verdict": "WRONG", "numbers": {"train_ms": 12.345678}, "why": "at most 1"}
            ],
        }
    },
}


def test_the_page_is_what_is_kept_prints():
    assert table.README.read_text() == table.shown()


def test_the_table_says_card_driver_versions_verdicts_and_what_has_not_run():
    printed = "\n".join(table.lines([RESULT]))
    assert "NVIDIA H100, driver 580.1, torch 2.11.0; commit 0123456789ab" in printed
    assert "| c\\|d | WRONG | train ms 12.35 | at most 1 |" in printed and "| two | not run yet |" in printed
    assert table.NOTHING in "\n".join(table.lines([]))


def test_every_finding_has_one_row_that_says_what_it_is_and_when():
    rows = ROW.findall(table.README.read_text())
    assert [name for name, _ in rows] == FINDINGS
    for name, cells in rows:
        what, issue, done, checked = (cell.strip() for cell in cells.split(" | "))
        assert what and issue in ("18", "19") and done and checked, name


def test_a_test_that_the_findings_name_exists():
    named = set(
        re.findall(r"`(test_\w+)`", "".join(cells for _, cells in ROW.findall(table.README.read_text())))
    )
    there = {
        name
        for path in tracked()
        if path.startswith("tests/") and path.endswith(".py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", read(path).text, re.MULTILINE)
    }
    assert named and not named - there


@pytest.fixture
def prove(tmp_path):
    """prove.sh beside parts `a` and `b` and a python of two lines; returns its exit code and output."""
    folder = tmp_path / "tests/gpu"
    folder.mkdir(parents=True)
    shutil.copy(GPU / "prove.sh", folder)
    for part in "ab":
        (folder / f"part_{part}.py").touch()

    def run(stub: str, *words: str, limit: str = "60") -> tuple[int, str]:
        script = folder / "prove.sh"
        script.write_text(re.sub(r"^LIMIT=60", f"LIMIT={limit}", script.read_text(), flags=re.MULTILINE))
        python = tmp_path / "python"
        python.write_text(f"#!/usr/bin/env bash\n[[ $1 != -c ]] || exit 0\necho ran $*\n{stub}\n")
        python.chmod(0o755)
        environment = {**os.environ, "PYTHON": str(python)}
        done = subprocess.run([script, *words], env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    return run


def test_a_part_that_takes_too_long_is_ended_and_the_next_one_runs(prove):
    code, said = prove("[[ $2 != tests.gpu.part_a ]] || exec sleep 30", "a", "b", limit="0.3")
    assert code == 3 and "part a ran out of its 0.3 s" in said
    assert "ran -m tests.gpu.part_b --results tests/gpu/results" in said
    assert "ran -m tests.gpu.table --results tests/gpu/results --write" in said


def test_the_worst_exit_code_is_that_of_all_parts(prove):
    code, said = prove("[[ $2 != tests.gpu.part_a ]] || exit 1", "all")
    assert code == 1 and "part_b" in said


def test_a_dry_run_writes_elsewhere_and_nothing_into_the_page(prove):
    code, said = prove("", "--dry", "all")
    assert code == 0 and "--results tests/gpu/results" not in said and "--write" not in said
    assert len(re.findall(r"part_[ab] --results \S+ --dry", said)) == 2


@pytest.mark.parametrize("words", [("e",), (), ("--dri", "a")])
def test_a_part_that_is_not_there_is_refused(prove, words):
    code, said = prove("", *words)
    assert code == 2 and "usage" in said and "ran" not in said.split("usage")[0]


def test_every_package_of_a_piece_has_an_exact_version_and_is_in_it_for_a_reason():
    given = pieces.rows()
    assert given and all(row.how in ("wheel", "built") and row.why for row in given)
    assert all(re.fullmatch(r"[\w.-]+==\d[\w.]*", pieces.requirement(row)) for row in given)
    again = [row.package for row in given if row.version != "pinned" and row.package in pieces.pins()]
    assert not again, "pyproject.toml has them: say `pinned`"
    assert [line for line in Path(ROOT, ".gitignore").read_text().splitlines() if "tests/gpu/" in line] == [
        "tests/gpu/pieces/",
        "tests/gpu/unpacked/",
    ]


@pytest.fixture
def piece(tmp_path, monkeypatch):
    """A piece of two files of one wheel, as it is copied; where it is unpacked."""
    monkeypatch.setattr(pieces, "PIECES", tmp_path / "pieces")
    monkeypatch.setattr(pieces, "SUMS", tmp_path / "pieces/SHA256SUMS")
    monkeypatch.setattr(pieces, "UNPACKED", tmp_path / "unpacked")
    row = pieces.Row("1-small", "ray", "pinned", "wheel", "", "ray/jars/*", "it is needed")
    monkeypatch.setattr(pieces, "rows", lambda: [row])
    with zipfile.ZipFile(
        tmp_path / f"{pieces.requirement(row).replace('==', '-')}-py3-none-any.whl", "w"
    ) as made:
        for name in ("ray/core/src/raylet", "ray/jars/large.jar", "ray-2.data/purelib/ray/__init__.py"):
            made.writestr(name, name)
    pieces.main(tmp_path)
    return tmp_path


def test_a_piece_holds_what_its_row_says_and_is_unpacked_as_it_would_be_installed(piece, capsys):
    pieces.unpack()
    files = sorted(str(path.relative_to(piece / "unpacked")) for path in piece.glob("unpacked/ray/**/*"))
    assert [name for name in files if "." in name or "raylet" in name] == [
        "ray/__init__.py",
        "ray/core/src/raylet",
    ]
    assert os.access(piece / "unpacked/ray/core/src/raylet", os.X_OK)
    assert "unpacked 1-small.zip" in capsys.readouterr().out
    pieces.unpack()
    assert capsys.readouterr().out == "", "it was taken in before"


def test_vllm_finds_the_plugins_of_a_checkout_that_is_not_installed(piece):
    pieces.unpack()
    (said,) = importlib.metadata.distributions(name="entroray", path=[str(piece / "unpacked")])
    (plugin,) = said.entry_points.select(group="vllm.general_plugins")
    assert plugin.value == "entroray.workers.transfer:register"


def test_the_same_wheels_make_the_same_piece(piece):
    first = (piece / "pieces/SHA256SUMS").read_text()
    pieces.main(piece)
    assert (piece / "pieces/SHA256SUMS").read_text() == first


def test_a_damaged_piece_is_refused(piece):
    copied = piece / "pieces/1-small.zip"
    copied.write_bytes(copied.read_bytes() + b"x")
    with pytest.raises(SystemExit, match=r"1-small\.zip is damaged.*copy it again"):
        pieces.unpack()


def test_a_piece_too_large_to_copy_is_refused(piece, monkeypatch):
    monkeypatch.setattr(pieces, "MOST", 100)
    with pytest.raises(SystemExit, match=r"at most 0 can be copied"):
        pieces.main(piece)
