"""The page of `entroray report RUN RUN ...` and of a lab in a browser: bands, many runs, what differs."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from entroray.metrics.confidence_interval import bootstrap_interval
from entroray.observe import comparison_page, lab_cells
from entroray.observe.comparison_page import write_comparison
from entroray.observe.lab_cells import Cell
from tests.pages.conftest import SCHEMES, WIDTHS, Open
from tests.pages.folders import write_curves
from tests.pages.test_run_page import MISSED

GRPO = [[0.1, 0.2, 0.3], [0.2, 0.3, 0.7], [0.3, 0.4, 0.5]]
DAPO = [[0.40, 0.5], [0.44, 0.6], [0.50, 0.7], [0.60, 0.8], [0.71, 0.9], [0.90, 1.0]]
PAGE, READY = "comparison.html", ".plot text"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds of a row, six of another, one with another rate that is longer, one copy, one broken."""
    root = tmp_path_factory.mktemp("compared")
    grpo = [write_curves(root / "grpo" / f"s{i}", i, right=r) for i, r in enumerate(GRPO)]
    dapo = [write_curves(root / "dapo" / f"s{i}", i, right=r, row="dapo") for i, r in enumerate(DAPO)]
    odd = write_curves(root / "lr" / "<b>s0", 0, right=[0.3] * 30, lr=1e-3)
    copy = root / "copies" / "s1"
    shutil.copytree(grpo[1], copy)
    broken = write_curves(root / "broken" / "s0", 0, right=[0.3])
    (broken / "metrics.jsonl").write_text("[1]\n")
    left_out = write_comparison([*grpo, *dapo, odd, copy, broken], root / PAGE)
    assert [line.split(": ")[1] for line in left_out] == ["broken/s0"]
    return root


def chart(page: Any, title: str) -> Any:
    return page.locator(".card", has=page.locator("h3", has_text=title))


def said(page: Any, title: str = "Share right", key: str = "Home") -> str:
    """What a chart says at the step that `key` moves the marker to."""
    chart(page, title).locator("svg").focus()
    page.keyboard.press(key)
    return chart(page, title).locator("svg").get_attribute("aria-valuetext")


@pytest.mark.parametrize(("scheme", "width"), zip(SCHEMES, WIDTHS, strict=True))
def test_seeds_are_bands_and_what_is_left_out_is_named(
    runs: Path, show: Open, scheme: str, width: int
) -> None:
    page = show(runs, scheme, width, name=PAGE, ready=READY)
    head = page.inner_text("#top")
    assert "11 runs compared" in head and "2 bands and 2 lines" in head
    assert "left out: broken/s0: " in head and "left out: lr" not in head
    names = page.locator(".names button.key").all_inner_texts()
    assert [" ".join(name.split()) for name in names] == [
        "grpo learner.lr=0.0003 (grpo/s0 and 2 more) 3 runs",
        "dapo learner.lr=0.0003 6 runs",
        "grpo learner.lr=0.001 1 run",
        "grpo learner.lr=0.0003 (copies/s1) 1 run",
    ]
    assert "<b>s0" in page.inner_text("#words") and page.locator("#words b").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    policy = page.get_attribute("meta[http-equiv]", "content")
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found = axe.Axe().run(page).response["violations"]
    serious = [v for v in found if v["impact"] in ("serious", "critical")]
    assert [(v["id"], [n["html"][:90] for n in v["nodes"]][:3]) for v in serious] == []


def test_a_band_is_the_mean_and_the_bootstrap_interval_of_its_runs(runs: Path, show: Open) -> None:
    page = show(runs, name=PAGE, ready=READY)
    first = said(page)
    assert "3 more" not in first and "grpo/s0 and 2 more) 0.2 [0.1, 0.3]" in first, "the range of three"
    six = tuple(r[0] for r in DAPO)
    low, high = map(float, first.split("dapo learner.lr=0.0003 0.5917 [")[1].split("]")[0].split(", "))
    assert (low, high) == pytest.approx(bootstrap_interval(six), abs=0.015)
    assert sum(six) / 6 == pytest.approx(0.5917, abs=1e-4)
    assert "0.5 [0.3, 0.7]" in said(page, key="ArrowRight") + said(page, key="ArrowRight")
    assert page.locator(".plot path.area").count() > 10


def test_bands_open_into_their_runs_and_lines_are_smoothed(runs: Path, show: Open) -> None:
    page = show(runs, name=PAGE, ready=READY)
    page.get_by_label("seeds as one band").uncheck()
    assert page.locator(".names button.key").count() == 11 and page.locator(".plot path.area").count() == 0
    page.get_by_label("seeds as one band").check()
    said(page)
    page.keyboard.press("ArrowRight")
    page.get_by_label("Mean of").select_option("5")
    at = chart(page, "Share right").locator("svg").get_attribute("aria-valuetext")
    assert at.startswith("step 2:") and "0.25 [0.15, 0.35]" in at, "the mean of steps 1 and 2 of each run"
    page.get_by_label("Add a curve").fill("reward/part_<form>")
    page.get_by_label("Add a curve").press("Enter")
    assert "0.5" in said(page, "reward/part_<form>")


def test_runs_of_another_length_go_on_as_thin_lines(tmp_path: Path, show: Open) -> None:
    lengths = {1: 30, 2: 30, 3: 12}
    folders = [write_curves(tmp_path / f"s{i}", i, right=[0.1 * i] * n) for i, n in lengths.items()]
    write_comparison(folders, tmp_path / PAGE)
    page = show(tmp_path, name=PAGE, ready=READY)
    assert "its runs end at steps 12, 30: the band ends at step 12" in page.inner_text("#top")
    assert chart(page, "Share right").locator("g.thin path.line").count() == 2
    assert "grpo 0.15 (2 of 3)" in said(page, key="End") and "grpo 0.2 [0.1, 0.3]" in said(page, key="Home")


def test_twenty_runs_are_told_apart_and_the_one_pointed_at_stands_out(tmp_path: Path, show: Open) -> None:
    rates = [round(1e-4 * (i + 1), 6) for i in range(20)]
    folders = [write_curves(tmp_path / f"r{i}", 1, right=[i / 20] * 8, lr=x) for i, x in enumerate(rates)]
    write_comparison(folders, tmp_path / PAGE)
    page = show(tmp_path, name=PAGE, ready=READY)
    looks = page.locator(".names .swatch").evaluate_all(
        "all => all.map((e) => getComputedStyle(e).borderTopColor + getComputedStyle(e).borderTopStyle)"
    )
    assert len(set(looks)) == 20
    box = chart(page, "Share right").locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 12)
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 10)
    near = chart(page, "Entropy").locator("g.near path.line, g.near path.dots")
    assert near.count() and chart(page, "Share right").locator(".key.near").inner_text().endswith("0.95")
    assert "learner.lr=0.002" in page.locator(".names .near").inner_text()
    page.locator(".names button", has_text="none").click()
    assert page.locator(".plot path.line, .plot path.dots").count() == 0
    page.locator(".names button.key").nth(3).click()
    assert chart(page, "Share right").locator("path.line").count() == 1
    page.locator(".names button", has_text="all").click()
    assert chart(page, "Share right").locator("path.line").count() == 20


def test_every_control_of_a_comparison_is_reached_by_tab(runs: Path, show: Open) -> None:
    page = show(runs, name=PAGE, ready=READY)
    for _ in range(60):
        page.keyboard.press("Tab")
        page.evaluate("(window.reached ||= new Set()).add(document.activeElement)")
    assert page.evaluate(MISSED) == []


def test_runs_without_settings_or_with_one_step_are_lines_under_their_names(
    tmp_path: Path, show: Open
) -> None:
    folders = [write_curves(tmp_path / name, 1, right=[0.5]) for name in ("a", "b")]
    for folder in folders:
        (folder / "config.yaml").unlink()
        (folder / "manifest.json").write_text("[]")
    write_comparison(folders, tmp_path / PAGE)
    page = show(tmp_path, name=PAGE, ready=READY)
    assert "a: Nothing from config.yaml" in page.inner_text("#top") and "a 0.5, b 0.5" in said(page)


def test_a_lab_is_drawn_by_the_same_parts_a_place_for_each_task(tmp_path: Path, show: Open) -> None:
    cells = []
    for task in ("quickstart", "countdown"):
        for row, seed in (("grpo", 1), ("grpo", 2), ("grpo", 3), ("dapo", 1)):
            told = (f"experiment={task}", f"objective={row}", f"seed={seed}")
            cells.append(Cell(told, seed, "", "done", code="1", measured={"correct/final": seed / 10}))
            write_curves(lab_cells.cell_path(tmp_path, cells[-1]), seed, right=[seed / 10] * 6, row=row)
    (lab_cells.cell_path(tmp_path, cells[3]) / "metrics.jsonl").write_text("[1]\n")
    comparison_page.write_lab_page(tmp_path, cells, "grpo")
    page = show(tmp_path, name="lab.html", ready=READY)
    assert page.locator(".drawn").count() == 2 and "not drawn: quickstart-dapo" in page.inner_text("main")
    titles = page.locator(".names").nth(0).locator("button.key").all_inner_texts()
    assert [" ".join(t.split()) for t in titles] == ["grpo 3 runs", "dapo 0 runs"]
    right = page.locator(".drawn").nth(1).locator(".card").first.locator("svg")
    assert "grpo 0.2 [0.1, 0.3], dapo 0.1" in right.get_attribute("aria-valuetext")
