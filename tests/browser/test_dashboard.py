"""The dashboard in a real Chromium, beside a real daemon: what an operator sees and does.

Debian's `chromium` is driven by Playwright, which fetches no browser of its own. In CI nothing here is skipped.
"""

from __future__ import annotations

import os
import re
import shutil

import pytest

from daemon.record.recorder import recorded_as
from tests.browser.pages import findings, go
from tests.bundles import bad_pixels, install_bundle
from tests.daemons import make_site
from tests.dashboards import Shown, events, log_in, set_up
from tests.lines import pump_until, send, settle, wait_for

if shutil.which("chromium") is None and not os.environ.get("CI"):
    pytest.skip("Debian's chromium is not installed", allow_module_level=True)

from playwright.sync_api import expect

VIEWS = ("Line", "History", "Review", "Scores", "Engines", "Permits and books")


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A daemon with two cameras and two engines, and its dashboard."""
    site = make_site(tmp_path_factory.mktemp("site"))
    install_bundle(site.folder / "engines", site.folder / "keys", version="2", seed=5)
    site.config["cameras"]["cam2"] = site.config["cameras"]["cam1"]
    site.config["results"]["heatmap"] = True
    shown = Shown(site, set_up(site))
    site.start()
    shown.start()
    yield shown
    assert shown.stop() == 0
    site.stop()


def drawn(page, selector):
    """Whether a canvas shows more than one colour."""
    script = """canvas => {
      if (!canvas.width || !canvas.dataset) return 0
      const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data
      const colours = new Set()
      for (let at = 0; at < data.length; at += 4) colours.add(data[at] << 16 | data[at + 1] << 8 | data[at + 2])
      return colours.size
    }"""
    return page.locator(selector).evaluate(script)


@pytest.fixture(scope="module")
def rejects(shown):
    """Rejects of both cameras in the books, frames recorded: cam1 two defects and a missing part, cam2 one defect."""
    for camera, seqs in (("cam1", (0, 1, 3)), ("cam2", (0,))):
        with shown.site.line(camera) as line:
            for seq in seqs:
                send(line, seq, bad_pixels(seq))
            settle(line, lost={2} if camera == "cam1" else set())
            headers = [part.results[0] for part in line.parts.values()]
            stems = [recorded_as(h["camera"], h["epoch"], h["seq"], h["decidedNs"]) for h in headers]
            files = [shown.site.folder / f"run/rejects/{stem}.json" for stem in stems]
            wait_for(line, lambda files=files: all(path.exists() for path in files))
    return shown


def test_a_wrong_password_stays_outside(page):
    log_in(page, password="four words in a raw")
    expect(page.get_by_role("alert")).to_have_text("name or password is wrong")
    expect(page).to_have_title("inspectd: log in")
    assert [text for text in page.complaints if "401" not in text] == []
    page.complaints.clear()  # the browser itself notes each answer that refuses
    log_in(page)
    expect(page.locator("#state")).to_contain_text("RUNNING")


def test_the_line_view_tells_each_cameras_state_in_words(page, rejects):
    log_in(page)
    expect(page.locator("#state")).to_contain_text("RUNNING")
    expect(page.locator("[data-camera]")).to_have_count(2)
    camera = page.locator("[data-camera=cam1]")
    expect(camera.locator(".state")).to_have_text("NO FRAMES")
    expect(camera.locator(".verdict")).to_have_text("REJECTDEFECT")
    expect(camera.locator(".verdict svg")).to_be_visible()
    with rejects.site.line("cam1") as line:
        # The simulator's camera is the stream's owner: the same key, a new epoch.
        assert pump_until(line, lambda: send_one(line) and camera.locator(".state").inner_text() == "INSPECTING", 20)
        expect(camera.locator(".verdict")).to_have_text("PASS")
        settle(line)


def send_one(line):
    send(line, len(line.parts))
    return True


def test_a_reject_is_on_the_screen_within_a_second_of_its_verdict(page, shown):
    """By the page's own clock, which is the daemon's here; the best of five, for others use this machine too."""
    log_in(page)
    expect(page.locator("#state")).to_contain_text("RUNNING")
    page.evaluate("""() => {
      window.seen = {}
      new MutationObserver(() => {
        for (const canvas of document.querySelectorAll("canvas[data-part]")) window.seen[canvas.dataset.part] ??= Date.now()
      }).observe(document.getElementById("main"), {subtree: true, attributes: true, childList: true})
    }""")
    delays_ms = []
    with shown.site.line("cam1") as line:
        for seq in range(5):
            part = send(line, seq, bad_pixels(seq))
            wait_for(line, lambda part=part: part.results)
            expect(page.locator(f"[data-camera=cam1] canvas[data-part=part-{seq}]")).to_be_visible()
            expect(page.locator(".rejects button").first).to_contain_text("DEFECT")
            seen_ms = page.evaluate(f"window.seen['part-{seq}']")
            delays_ms.append(seen_ms - part.results[0]["decidedNs"] / 1e6)
        settle(line)
    assert min(delays_ms) < 1000, delays_ms
    assert drawn(page, "[data-camera=cam1] canvas") > 10


def test_history_is_filtered_and_opens_the_full_frame(page, rejects):
    log_in(page)
    go(page, "History")
    rows = page.locator("tbody tr")
    page.get_by_label("Camera").select_option("cam2")
    page.get_by_role("button", name="Show").click()
    expect(rows).to_have_count(1)
    page.get_by_label("Camera").select_option("")
    page.get_by_label("Reason").select_option("MISSING")
    page.get_by_role("button", name="Show").click()
    expect(rows).to_have_count(1)
    expect(rows.first).to_contain_text("cam1")
    page.get_by_label("Until").fill("2001-01-01T00:00")
    page.get_by_role("button", name="Show").click()
    expect(page.locator("#rows")).to_have_text("No reject.")
    page.get_by_label("Until").fill("")
    page.get_by_label("Reason").select_option("DEFECT")
    page.get_by_label("Camera").select_option("cam2")
    page.get_by_role("button", name="Show").click()
    expect(rows).to_have_count(1)
    rows.first.get_by_role("button").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.locator(".verdict")).to_have_text("REJECTDEFECT")
    expect(dialog.locator("canvas")).to_have_attribute("aria-label", "frame 0 of cam2, 1 marked regions")
    with_overlay = drawn(page, "dialog canvas")
    slider = dialog.get_by_label("Overlay")
    slider.fill("0")
    assert drawn(page, "dialog canvas") < with_overlay
    slider.fill("100")
    assert drawn(page, "dialog canvas") > 10
    dialog.get_by_role("button", name="Close").click()
    expect(dialog).to_have_count(0)


def test_scores_lie_before_the_calibration_and_the_limit(page, rejects):
    log_in(page)
    go(page, "Scores")
    expect(page.get_by_role("img", name="Scores of cam1")).to_be_visible()
    chart = page.locator(".scores").first
    expect(chart.locator(".limit")).to_have_count(1)
    assert chart.locator(".bar-calibration").count() >= 1
    assert chart.locator(".bar-line").count() >= 1
    expect(chart).to_contain_text("Calibration: 20")
    expect(chart).to_contain_text("No alarm. part: scores")


def test_a_viewer_is_offered_no_change(page, shown):
    log_in(page, "vic")
    go(page, "Engines")
    expect(page.locator("[data-engine='part/1']")).to_contain_text("AT WORK")
    expect(page.get_by_role("button", name="Activate")).to_have_count(0)
    expect(page.get_by_role("button", name="Roll back")).to_have_count(0)


def test_an_operator_activates_an_engine_and_rolls_back_by_name(page, shown):
    log_in(page)
    go(page, "Engines")
    expect(page.locator("[data-engine='part/1']")).to_contain_text("AT WORK")
    page.locator("[data-engine='part/2']").get_by_role("button", name="Activate").click()
    page.get_by_role("dialog").get_by_role("button", name="No").click()
    assert events(shown.site) == []
    page.locator("[data-engine='part/2']").get_by_role("button", name="Activate").click()
    page.get_by_role("dialog").get_by_role("button", name="Yes").click()
    expect(page.locator("[data-engine='part/2']")).to_contain_text("AT WORK")
    expect(page.get_by_role("alert")).to_have_text("part/2 is at work.")
    page.locator("[data-engine='part/2']").get_by_role("button", name="Roll back").click()
    page.get_by_role("dialog").get_by_role("button", name="Yes").click()
    expect(page.locator("[data-engine='part/1']")).to_contain_text("AT WORK")
    assert [(e["user"], e["command"], e["ok"]) for e in events(shown.site)] == [
        ("olga", "activate", True), ("olga", "rollback", True)
    ]  # fmt: skip
    go(page, "Permits and books")
    changes = page.get_by_role("region", name="Table of changes")
    expect(changes.locator("tbody tr")).to_have_count(2)
    expect(changes.locator("tbody tr").first).to_contain_text("olga")


def test_permits_and_figures_are_told(page, rejects):
    log_in(page)
    go(page, "Permits and books")
    lease = page.locator("section", has_text="Permits and lease").locator(".state")
    with rejects.site.line("cam2") as line:
        assert pump_until(line, lambda: "LEASE FRESH" in lease.inner_text(), 20)
    expect(page.get_by_role("region", name="Table of verdicts").locator("tbody tr").first).to_be_visible()
    expect(page.get_by_role("region", name="Table of verdicts")).to_contain_text("MISSING")


def test_it_says_no_daemon_and_comes_back_by_itself(page, shown):
    log_in(page)
    expect(page.locator("#state")).to_contain_text("RUNNING")
    shown.site.kill()
    expect(page.locator("#state")).to_contain_text("NO DAEMON")
    expect(page.locator("[data-camera=cam1] .state")).to_have_text("NO DAEMON")
    expect(page.locator("[data-camera=cam1] .verdict")).to_have_text("NO VERDICT")
    shown.site.start()
    expect(page.locator("#state")).to_contain_text("RUNNING")
    with shown.site.line("cam1") as line:
        send(line, 0, bad_pixels())
        settle(line)
    expect(page.locator("[data-camera=cam1] .verdict")).to_have_text("REJECTDEFECT")


def test_logging_out_ends_in_the_login_page(page):
    log_in(page)
    page.get_by_role("button", name="Log out").click()
    expect(page).to_have_title("inspectd: log in")


def test_axe_finds_nothing_serious_on_any_page(page, rejects, axe):
    assert findings(page, axe) == []
    log_in(page)
    expect(page.locator("#state")).to_contain_text("RUNNING")
    for view in VIEWS:
        go(page, view)
        expect(page.locator("main")).not_to_be_empty()
        page.wait_for_load_state("networkidle")
        assert findings(page, axe) == [], view
    go(page, "History")
    page.locator("tbody").get_by_role("button", name="Frame").first.click()
    expect(page.locator("dialog canvas")).to_have_attribute("aria-label", re.compile("marked regions"))
    assert findings(page, axe) == []


def test_it_fits_a_tablet_held_upright(page, rejects):
    page.set_viewport_size({"width": 768, "height": 1024})
    log_in(page)
    for view in VIEWS:
        go(page, view)
        expect(page.locator("main")).not_to_be_empty()
        assert page.evaluate("document.documentElement.scrollWidth") <= 768, view
    small = page.evaluate("""() => [...document.querySelectorAll("button, select, nav a, input:not([type=range])")]
      .filter(each => each.checkVisibility() && each.getBoundingClientRect().height < 44).map(each => each.outerHTML)""")
    assert small == []
