"""A Chromium and a page in it that asks nobody but its dashboard; the module's fixture `shown` says which."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

WAIT_MS = 20_000
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        yield browser
        browser.close()


@pytest.fixture
def page(browser, shown):
    """A page of its own, which must ask nobody but the dashboard and have nothing to complain about."""
    context = browser.new_context(viewport={"width": 1180, "height": 820})
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.complaints = complaints
    page.goto(shown.url)
    yield page
    assert {url.split("/")[2] for url in asked if not url.startswith("blob:")} == {shown.url.split("/")[2]}
    assert complaints == []
    context.close()


@pytest.fixture(scope="session")
def axe():
    """npm's axe-core, installed once into a folder that git ignores."""
    script = HERE / "node_modules/axe-core/axe.min.js"
    if not script.exists():
        options = ["--silent", "--no-save", "--no-package-lock", "--no-audit", "--no-fund", "--prefix", str(HERE)]
        done = subprocess.run(
            ["npm", "install", *options, "axe-core@4"], capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
    return script.read_text()
