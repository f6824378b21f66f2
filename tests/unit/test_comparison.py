"""`entroray report RUN RUN ...`: which runs are drawn, and what is said of the others."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from entroray.cli import report
from entroray.errors import ConfigError, DataError
from entroray.observe import comparison_page
from entroray.observe.run_data import columns
from tests.pages.folders import write_curves


def run(folder: Path, seed: int = 1) -> Path:
    return write_curves(folder, seed, right=[0.1, 0.2, 0.3])


def data(page: Path) -> dict[str, Any]:
    return json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])


def test_runs_are_named_by_the_shortest_ends_that_tell_them_apart(tmp_path: Path) -> None:
    folders = [run(tmp_path / name / "20261126") for name in ("a", "b")]
    comparison_page.write_comparison(folders, tmp_path / "x.html")
    assert [about["name"] for about in data(tmp_path / "x.html")["about"]] == ["a/20261126", "b/20261126"]
    assert comparison_page._names([Path("/r/a"), Path("/r/b")]) == ["a", "b"]


def test_a_run_that_cannot_be_drawn_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, empty, begun, cut, foreign = (tmp_path / n for n in ("good", "empty", "begun", "cut", "foreign"))
    run(good), run(cut), empty.mkdir()
    for folder, text in ((begun, ""), (foreign, '{"loss": 1.0}\n')):
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(text)
    lines = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text(lines[0] + lines[1][:30])  # a crash within the second line
    page = tmp_path / "x.html"
    folders = [good, empty, begun, cut, foreign, tmp_path / "good" / ".." / "good"]
    assert report.main([*map(str, folders), f"--out={page}"]) == 0
    told = capsys.readouterr().out
    assert "left out: empty: it holds no metrics.jsonl" in told
    assert "left out: begun: it has no step yet" in told
    assert "left out: foreign: " in told and "is no JSON object" in told
    assert "given more than once: 1 of 6" in told and told.endswith(f"{page}\n")
    found = data(page)
    assert [about["name"] for about in found["about"]] == ["good", "cut"] and len(found["left_out"]) == 3
    assert [m["steps"] for m in found["metrics"]] == [[1, 2, 3], [1]]


@pytest.mark.parametrize(
    "told", ["", "run run", "nowhere", "run nowhere", "run --out=x.html", "run other --of=x"]
)
def test_what_is_no_comparison_is_refused_before_a_page_is_written(
    told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "run"), run(tmp_path / "other", 2)
    with pytest.raises(ConfigError, match="report"):
        report.main(told.split())
    assert not [*tmp_path.rglob("*.html")]


def test_no_run_that_can_be_drawn_is_a_data_error_that_names_each(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match=r"left out: a: .*; left out: b: "):
        report.main([str(tmp_path / "a"), str(tmp_path / "b"), f"--out={tmp_path / 'x.html'}"])


def test_a_page_holds_no_texts_of_events_and_ends_no_script(tmp_path: Path) -> None:
    folders = [run(tmp_path / "a"), run(tmp_path / "</script><b>", 2)]
    comparison_page.write_comparison(folders, tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text()
    assert "onerror" not in text and text.count("</script>") == 2
    assert data(tmp_path / "x.html")["about"][1]["name"] == "</script><b>".rpartition("/")[2]


def test_long_runs_are_means_of_the_same_steps_whatever_their_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison_page, "NUMBERS", 2000)
    long, short = (write_curves(tmp_path / str(n), n, right=[i / 100 for i in range(n)]) for n in (90, 41))
    comparison_page.write_comparison([long, short], tmp_path / "x.html")
    first, second = data(tmp_path / "x.html")["metrics"]
    assert first["every"] == second["every"] == 2 and first["steps"][:20] == second["steps"][:20]
    assert first["values"]["correct/mean"][:20] == second["values"]["correct/mean"][:20]
    assert (first["last"], second["last"]) == (90, 41) and first["values"]["correct/mean"][0] == 0.005


def test_bins_are_of_steps_and_not_of_places() -> None:
    found = columns([{"step": s, "x": float(s)} for s in (0, 1, 2, 3, 5, 6, 7)], 2)
    assert found["steps"] == [0, 2, 3, 6, 7] and found["values"]["x"] == [0.0, 1.5, 3.0, 5.5, 7.0]


def test_the_same_folder_by_two_paths_is_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "run"), run(tmp_path / "other", 2)
    (tmp_path / "latest").symlink_to(tmp_path / "run")
    folders = [str(tmp_path / name) for name in ("run", "other", "latest")]
    assert report.main([*folders, f"--out={tmp_path / 'x.html'}"]) == 0
    assert len(data(tmp_path / "x.html")["about"]) == 2
    shutil.rmtree(tmp_path / "other")
    assert report.main([folders[0]]) == 0 and capsys.readouterr().out.endswith("report.html\n")
