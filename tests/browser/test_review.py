"""The page Review in a real Chromium, beside a real daemon: a group is one click and one question, and can be undone."""

from __future__ import annotations

import os
import shutil

import pytest
from click.testing import CliRunner

from adapters.review.command import command
from tests.browser.pages import findings, go
from tests.bundles import bad_pixels, good_pixels
from tests.daemons import make_site
from tests.dashboards import Shown, add_user, events, log_in, set_up
from tests.lines import send, settle, wait_for

if shutil.which("chromium") is None and not os.environ.get("CI"):
    pytest.skip("Debian's chromium is not installed", allow_module_level=True)

from playwright.sync_api import expect

SQUARES, LINES = 9, 5


def lined_pixels(seed):
    """A good frame with a black bar across it."""
    pixels = good_pixels(seed)
    pixels[16:24] = 0
    return pixels


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A daemon that has rejected squares and lines, their groups, and a dashboard."""
    site = make_site(tmp_path_factory.mktemp("site"))
    shown = Shown(site, set_up(site))
    add_user(site, "rita", "reviewer")
    site.start()
    with site.line() as line:
        for seq in range(SQUARES + LINES):
            send(line, seq, bad_pixels(seq) if seq < SQUARES else lined_pixels(seq - SQUARES))
        settle(line)
        rejects = site.folder / "run/rejects"
        wait_for(line, lambda: len(list(rejects.rglob("*.json"))) == SQUARES + LINES)
        wait_for(line, lambda: len(run(site, "list").output.splitlines()) == SQUARES + LINES)
    assert run(site, "groups").exit_code == 0
    shown.start()
    yield shown
    assert shown.stop() == 0
    site.stop()


def run(site, *arguments):
    return CliRunner().invoke(command, [arguments[0], "--config", str(site.folder / "config.yaml"), *arguments[1:]])


def marked(site):
    return [(event["user"], event["detail"]) for event in events(site) if event["command"] == "mark"]


def review(page, name):
    log_in(page, name)
    expect(page.locator("#state")).to_contain_text("RUNNING")
    go(page, "Review")
    expect(page.locator("[data-group='1']")).to_be_visible()


def test_a_viewer_sees_the_groups_and_is_offered_no_mark(page, shown):
    review(page, "vic")
    largest = page.locator("[data-group='1']")
    expect(largest).to_contain_text(f"Group 1: {SQUARES} rejects")
    expect(page.locator("[data-group='2']")).to_contain_text(f"Group 2: {LINES} rejects")
    expect(largest.locator("img")).to_have_count(SQUARES)
    first = largest.locator("img").first
    first.scroll_into_view_if_needed()
    expect(first).to_have_js_property("naturalWidth", 192)
    expect(largest).to_contain_text("Peak, median")
    expect(page.get_by_role("button", name="Good:")).to_have_count(0)
    expect(page.get_by_role("button", name="open: good")).to_have_count(0)
    largest.get_by_role("button", name="Frame of").first.click()
    expect(page.get_by_role("dialog").locator(".verdict")).to_have_text("REJECTDEFECT")


def test_a_click_is_about_what_is_shown_and_not_about_a_filter_that_was_turned_since(page, shown):
    review(page, "rita")
    camera = page.get_by_label("Camera")
    camera.select_option("cam1")
    before = page.locator("[data-group='2']").element_handle()
    page.get_by_role("button", name="Show").click()
    page.wait_for_function("card => !card.isConnected", arg=before)
    camera.select_option("")
    page.locator("[data-group='2']").get_by_role("button", name=f"All {LINES} open: defects").click()
    question = page.get_by_role("dialog")
    expect(question).to_contain_text("of group 2, camera cam1")
    question.get_by_role("button", name="No").click()


def test_a_group_is_marked_with_one_question_and_undone(page, shown):
    review(page, "rita")
    group = page.locator("[data-group='2']")
    group.get_by_role("button", name=f"All {LINES} open: defects").click()
    page.get_by_role("dialog").get_by_role("button", name="No").click()
    assert marked(shown.site) == []
    group.get_by_role("button", name=f"All {LINES} open: defects").click()
    page.get_by_label("Name of the defect").fill("scratch")
    page.get_by_role("dialog").get_by_role("button", name="Yes").click()
    expect(group.locator(".marks")).to_have_text(f"{LINES} defect scratch")
    expect(page.locator("p[role=status].note")).to_have_text(f"{LINES} of group 2: defect scratch.")
    assert marked(shown.site) == [("rita", f"{LINES} parts: defect scratch")]
    decisions = page.get_by_role("region", name="Decisions").locator("tbody tr")
    expect(decisions).to_have_count(1)
    expect(decisions.first).to_contain_text("rita")
    decisions.first.get_by_role("button", name="Undo").click()
    page.get_by_role("dialog").get_by_role("button", name="Yes").click()
    expect(group.locator(".marks")).to_have_text(f"{LINES} open")
    assert marked(shown.site)[1:] == [("rita", f"{LINES} parts: mark taken back")]


def test_a_single_part_is_marked_and_found_by_the_filter(page, shown):
    review(page, "olga")
    tile = page.locator("[data-group='1'] .looks li").first
    tile.get_by_role("button", name="good:").click()
    page.get_by_role("dialog").get_by_role("button", name="Yes").click()
    expect(page.locator("[data-group='1'] .marks")).to_have_text(f"1 good{SQUARES - 1} open")
    page.locator("select[name=mark]").select_option("good")
    page.get_by_role("button", name="Show").click()
    expect(page.locator("[data-group]")).to_have_count(1)
    expect(page.locator("[data-group='1'] .looks li")).to_have_count(1)
    page.locator("[data-group='1'] .looks li").get_by_role("button", name="Undo the mark").click()
    page.get_by_role("dialog").get_by_role("button", name="Yes").click()
    expect(page.locator(".groups")).to_have_text("No reject with a frame.")


def test_a_click_on_groups_of_before_marks_nothing(page, shown):
    review(page, "rita")
    before = marked(shown.site)
    assert run(shown.site, "groups").exit_code == 0
    page.locator("[data-group='1']").get_by_role("button", name="open: good").click()
    page.get_by_role("dialog").get_by_role("button", name="Yes").click()
    expect(page.locator("p[role=status].note")).to_contain_text("made anew")
    assert marked(shown.site) == before
    assert [text for text in page.complaints if "409" not in text] == []
    page.complaints.clear()  # the browser itself notes each answer that refuses


def test_the_page_is_accessible_and_fits_a_tablet(page, shown, axe):
    page.set_viewport_size({"width": 768, "height": 1024})
    review(page, "olga")
    page.wait_for_load_state("networkidle")
    assert findings(page, axe) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 768
    small = page.evaluate("""() => [...document.querySelectorAll("main button")]
      .filter(each => each.checkVisibility() && each.getBoundingClientRect().height < 44).map(each => each.outerHTML)""")
    assert small == []
    page.locator("[data-group='1']").get_by_role("button", name="open: defects").click()
    assert findings(page, axe) == []


def test_the_pages_own_address_leads_to_it(page, shown):
    log_in(page)
    expect(page.locator("#state")).to_contain_text("RUNNING")
    page.goto(f"{shown.url}/review")
    expect(page.get_by_role("heading", name="Rejects, grouped by look")).to_be_visible()
