"""report.html in a browser: what it says of a run, its curves, and its tokens as text."""

import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from entroray.observe.report import write_report
from entroray.observe.token_records import record_path
from tests.pages.conftest import SCHEMES, WIDTHS, Open
from tests.pages.folders import SMALL, write_run

MOST_NODES = 5000
MISSED = """() => [...document.querySelectorAll("a, button, input, select, summary, [tabindex='0']")]
    .filter((e) => !e.disabled && e.checkVisibility() && !window.reached.has(e))
    .map((e) => e.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 steps whose recorded responses are hostile, long and many."""
    folder = write_run(tmp_path_factory.mktemp("page") / "<b>run")
    assert write_report(folder).stat().st_size < 3_000_000
    return folder


def tokens(page: Any) -> Any:
    """The page with its tokens open."""
    page.evaluate("document.querySelector('#tokens').scrollIntoView()")
    page.wait_for_selector(".rollout .t")
    return page


def nodes(page: Any) -> int:
    return page.evaluate("document.querySelectorAll('*').length")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_page_says_what_happened_and_fits(run: Path, show: Open, scheme: str, width: int) -> None:
    page = show(run, scheme, width)
    head = page.inner_text("#top")
    assert "<b>run" in head and "40 of 40 steps" in head and "It finished." in head
    assert "tiny, 821,120 parameters, was trained on chain_sum with dapo but for surrogate.high=0.3" in head
    assert "clip(r, 0.8, 1.3)" in head, "the equation with its numbers"
    assert "healthy" in head and "Rule:" in head
    assert page.locator(".plot path.line").count() > 12
    titles = page.locator(".card h3").all_inner_texts()
    assert {"objective.penalties.0.coef, moved by bonus", "Time by phase seconds per step"} <= {*titles}
    tokens(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is wider than the screen"
    assert nodes(page) <= MOST_NODES
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background.strip("rgb()").split(","))) > 382) == (scheme == "light")


def test_one_marker_and_one_zoom_serve_all_curves(run: Path, show: Open) -> None:
    page = show(run)
    entropy = page.locator(".card", has=page.locator("h3", has_text="Entropy nats per token"))
    entropy.locator("svg").focus()
    page.keyboard.press("Home")
    said = page.locator(".plot").evaluate_all("all => all.map((s) => s.getAttribute('aria-valuetext'))")
    assert len(said) > 6 and all(text.startswith("step 1:") for text in said)
    assert "mean 1.685" in entropy.locator("svg").get_attribute("aria-valuetext")
    keys = [" ".join(key.split()) for key in entropy.locator(".key").all_inner_texts()]
    assert keys == ["p20 to p80 0.5617 to 2.022", "median 0.8425", "mean 1.685"]
    box = entropy.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + 80)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 80)
    page.mouse.up()
    first, last = (page.input_value(f"[aria-label='{name} step shown']") for name in ("first", "last"))
    assert 5 < int(first) < int(last) < 30
    page.get_by_role("button", name="All steps").click()
    assert page.input_value("[aria-label='last step shown']") == "40"
    entropy.locator("svg").focus()
    page.keyboard.press("Home")
    page.get_by_role("button", name="Tokens of step 1").click()
    page.wait_for_selector(".rollout .t")
    assert page.get_by_label("Step", exact=True).input_value() == "1"


def test_the_law_is_drawn_through_the_share_right_over_entropy(run: Path, show: Open) -> None:
    page = show(run)
    card = page.locator(".card", has=page.locator("h3", has_text="The law"))
    dots = card.locator("path.dots:not(.here)").evaluate_all("all => all.map((p) => p.getAttribute('d'))")
    places = [tuple(map(float, p.removesuffix("h0").split())) for d in dots for p in d.split("M")[1:]]
    assert len(places) == 40 and card.locator("path.line").count() == 1
    assert all(a[0] > b[0] and a[1] > b[1] for a, b in itertools.pairwise(places)), (
        "entropy falls, answers rise"
    )
    card.locator("svg").focus()
    page.keyboard.press("Home")
    said = "step 1: entropy 1.685 nats, share right 0.31, by the law 0.0214"  # 1.1 - 0.2 e^1.685
    assert said in card.inner_text()
    box = card.locator("svg").bounding_box()
    page.mouse.move(box["x"] + places[29][0], box["y"] + places[29][1])
    assert "step 30:" in card.inner_text() and page.inner_text("#curves output") == "30"
    assert page.title() == "<i>name</i>/<b>run: dapo but for surrogate.high=0.3 · entroray"


def test_texts_are_shown_and_never_obeyed(run: Path, show: Open) -> None:
    page = tokens(show(run))
    page.get_by_label("Group", exact=True).select_option("0")
    together = page.inner_text(".together")
    assert "<script>window.hacked = 1</script><b>bold</b>" in together
    assert "⟨U+202E⟩" in together and "⟨U+0000⟩" in together and "⟨U+001B⟩[31m" in together
    assert "⟨U+200B⟩" in together and "שלום עולם" in together and "<|end|>" in together and "⇥" in together
    assert page.evaluate("window.hacked") is None and page.locator(".together b:text('bold')").count() == 0
    assert "<img src=x" in page.inner_text("#events") and page.locator("img").count() == 0
    directions = page.locator(".response").evaluate_all(
        "all => all.map((p) => getComputedStyle(p).unicodeBidi)"
    )
    assert set(directions) == {"plaintext"}


def test_the_address_names_what_was_chosen_and_shows_it_again(run: Path, show: Open) -> None:
    page = tokens(show(run))
    assert "#" not in page.url, "nobody chose anything"
    page.locator(".rollout .t").nth(2).click()
    page.wait_for_url("**token=*")
    address, said = page.evaluate("location.hash"), page.inner_text(".detail")
    assert address.startswith("#step=40&group=") and "&rollout=" in address
    again = show(run, fragment=address)
    again.wait_for_selector(".rollout .t.here")
    assert again.inner_text(".detail") == said
    again.get_by_label("Rollout", exact=True).select_option(index=1)
    again.wait_for_timeout(1000)  # the address changes 0.3 s later
    alone = show(run, fragment=again.evaluate("location.hash"))
    alone.wait_for_selector(".single")
    assert alone.locator(".rollout").count() == 1
    for wrong in ("#step=40&rollout=99999&token=1", "#step=7777", "#step=x&token=", "#curves"):
        tokens(show(run, fragment=wrong))


def test_a_character_that_is_cut_across_tokens_is_one_cell(run: Path, show: Open) -> None:
    page = tokens(show(run))
    page.get_by_label("Group", exact=True).select_option("0")
    spans = page.locator(".rollout").nth(3).locator(".t").all_inner_texts()
    assert spans == ["x=", "😀", "é", "€", spans[4], "<|end|>"] and spans[4].startswith("⟨")
    page.locator(".rollout").nth(3).locator(".t").nth(1).hover()
    detail = page.inner_text(".detail")
    assert "3 tokens are one piece of text here" in detail and "masked, truncated" in detail.lower()


def test_a_token_tells_every_column_and_colours_change(run: Path, show: Open) -> None:
    page = tokens(show(run))
    page.get_by_label("Group", exact=True).select_option("0")
    page.locator(".rollout .t").first.focus()
    page.keyboard.press("ArrowRight")
    detail = page.inner_text(".detail")
    columns = (
        "entropy",
        "varentropy",
        "logprob_old",
        "logprob_behavior",
        "advantage",
        "scale",
        "lag",
        "seed",
    )
    assert all(name in detail for name in columns[:-1]) and "window.hacked" in detail
    shades = set()
    for colour in page.get_by_label("Colour", exact=True).locator("option").all_inner_texts():
        page.get_by_label("Colour", exact=True).select_option(label=colour)
        shades.add(tuple(page.locator(".together .t").evaluate_all("all => all.map((s) => s.className)")))
    assert len(shades) >= 6
    assert page.locator(".t.chosen").count() and page.locator(".t.masked").count(), "also without colour"


def test_long_responses_and_many_siblings_come_by_windows(run: Path, show: Open) -> None:
    page = tokens(show(run))
    page.get_by_label("Group", exact=True).select_option("1")
    assert "of 20000" in page.inner_text(".rollout >> nth=0") and nodes(page) <= MOST_NODES
    page.get_by_label("later tokens").first.click()
    assert "tokens 1201 to 2400 of 20000" in page.inner_text(".rollout >> nth=0")
    page.get_by_label("Group", exact=True).select_option("2")
    assert "siblings 1 to 12 of 64" in page.inner_text("#tokens") and nodes(page) <= MOST_NODES
    page.get_by_label("later siblings").click()
    assert page.locator(".rollout h4").first.inner_text().startswith("Rollout 18")


def test_rollouts_are_filtered_and_walked_by_key(run: Path, show: Open) -> None:
    page = tokens(show(run))
    page.get_by_label("Verdict", exact=True).select_option("wrong")
    assert "35 of 70 rollouts match" in page.inner_text(".found")
    page.get_by_label("Status", exact=True).select_option("truncated")
    assert "1 of 70 rollouts match, in 1 groups" in page.inner_text(".found")
    page.get_by_label("Status", exact=True).select_option("")
    page.get_by_label("Verdict", exact=True).select_option("")
    page.get_by_label("Text", exact=True).fill("WINDOW.hacked")
    page.get_by_label("Text", exact=True).press("Enter")
    assert "1 of 70 rollouts match" in page.inner_text(".found")
    page.get_by_label("Text", exact=True).fill("")
    page.get_by_label("Text", exact=True).press("Enter")
    page.locator(".rollout .t").first.focus()
    for key, rollout in (("n", 1), ("n", 2), ("p", 1)):
        page.keyboard.press(key)
        assert f"Rollout {rollout}" in page.inner_text(".single h4")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("n")
    assert "Rollout 2" in page.inner_text(".single h4"), "keys need no token in focus"
    page.keyboard.press("u")
    assert page.locator(".t.here").count() == 1


def test_what_the_policy_was_unsure_of_early_and_late_leads_to_its_place(run: Path, show: Open) -> None:
    page = tokens(show(run))
    sure = page.inner_text(".sure")
    assert "least sure of at step 40" in sure and "learnt from" in sure.lower()
    assert (
        page.evaluate("look.sure.filter((a, i) => look.sure.findIndex((b) => samePlace(a, b)) === i).length")
        == 20
    )
    said = page.locator(".sure tbody tr").all_inner_texts()
    assert len(said) == 5 and any("of 64 siblings" in row for row in said), "who begins alike is one place"
    page.get_by_role("button", name="All 20").click()
    assert page.locator(".sure tbody tr").count() == 20
    page.locator(".sure .link").first.click()
    assert page.evaluate("look.token === look.sure[0]")
    page.locator("#forks").scroll_into_view_if_needed()
    page.wait_for_selector("#forks table")
    assert page.locator("#forks h3").all_inner_texts()[0].startswith("Early: step 1, above")
    page.locator("#forks .example").first.click()
    page.wait_for_selector(".t.here")
    assert page.get_by_label("Step", exact=True).input_value() == "1"


def test_held_out_answers_before_and_after_are_on_top(tmp_path: Path, show: Open) -> None:
    folder = write_run(tmp_path / "run", SMALL)
    write_report(folder)
    assert "held-out" not in show(folder).inner_text("#top")
    shares = {"greedy": 0.345, "pass@1": 0.281, "pass@8": 0.728, "prompts": 206, "model": "x", "each": {}}
    for name, gain in (("before", 0.0), ("after", 0.1)):
        told = {k: v + gain if isinstance(v, float) else v for k, v in shares.items()}
        (folder / f"eval-{name}.json").write_text(json.dumps(told))
    write_report(folder)
    top = show(folder).inner_text("#top")
    assert "0.345 → 0.445\nheld-out greedy, before → after, 206 prompts" in top
    assert "0.728 → 0.828\nheld-out pass@8" in top and "0.281 → 0.381\nheld-out sampled" in top
    assert show(folder).locator("nav a[href='eval-after.html']").count() == 1
    for odd in ("[1", "[" * 100_000, '{"greedy": NaN, "pass@1": true, "prompts": 3}', '{"greedy": 0.5}'):
        (folder / "eval-after.json").write_text(odd)
        write_report(folder)
        assert "held-out" not in show(folder).inner_text("#top")
    (folder / "eval-after.json").write_text(json.dumps(shares))
    with (folder / "events.jsonl").open(
        "a"
    ) as events:  # it goes on: what stood at its first end is no longer its own
        events.write('{"time": "2026-11-27T07:00:00.000+00:00", "kind": "start", "fields": {}}\n')
    write_report(folder)
    assert "held-out" not in show(folder).inner_text("#top")


def test_settings_are_searched_and_show_what_differs(run: Path, show: Open) -> None:
    page = show(run)
    table = lambda: page.inner_text("#settings table")
    assert "objective.surrogate.high" in table() and "objective.estimator.fn" not in table()
    page.get_by_label("only what differs from the defaults").uncheck()
    page.get_by_label("Search").fill("estimator")
    assert "objective.estimator.fn" in table() and "learner.lr" not in table()


def test_a_folder_that_is_empty_damaged_or_lacks_columns_is_a_page_without_script_errors(
    tmp_path: Path, show: Open
) -> None:
    (tmp_path / "empty").mkdir()
    said = {"empty": "Nothing from metrics.jsonl"}
    for name, note in (("config.yaml", "settings are unknown"), ("metrics.jsonl", "there are no curves")):
        folder = write_run(tmp_path / name, SMALL)
        (folder / name).write_text("[1]\n")
        said[name] = note
    for column in ("entropy", "version", "mask_reason", "logprob_old", "advantage", "status", "correct"):
        folder = write_run(tmp_path / column, SMALL, recorded=[1], ends=False)
        file = record_path(folder, 1)
        pq.write_table(pq.read_table(file).drop_columns([column]), file)
        record_path(folder, 1, "rollouts").unlink()
        said[column] = "No end was recorded"
    for name, note in said.items():
        write_report(tmp_path / name)
        page = show(tmp_path / name)
        assert note in page.inner_text("#top"), name
        if name != "empty":
            assert "Rollout 0" in tokens(page).inner_text("#tokens"), name
            page.locator("#forks").scroll_into_view_if_needed()


def test_no_network_is_allowed(run: Path, show: Open) -> None:
    page = show(run)
    policy = page.get_attribute("meta[http-equiv]", "content")
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "http" not in policy


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_axe_finds_nothing_serious(run: Path, show: Open, scheme: str, width: int) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = tokens(show(run, scheme, width))
    page.locator(".rollout .t").first.hover()
    page.locator("#forks").scroll_into_view_if_needed()
    page.wait_for_selector("#forks table")
    found = axe.Axe().run(page).response["violations"]
    serious = [v for v in found if v["impact"] in ("serious", "critical")]
    assert [(v["id"], [n["html"][:90] for n in v["nodes"]][:3]) for v in serious] == []


def test_every_control_is_reached_by_tab(run: Path, show: Open) -> None:
    page = tokens(show(run))
    page.get_by_label("Group", exact=True).select_option("0")
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    for _ in range(300):
        page.keyboard.press("Tab")
        page.evaluate("(window.reached ||= new Set()).add(document.activeElement)")
    missed = page.evaluate(MISSED)
    assert missed == []
