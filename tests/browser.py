"""A real browser for the tests of pages: Debian's Chromium, which Playwright drives."""

import os
import shutil

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def launched():
    """Yield a browser; without one the tests are skipped, but fail where CI says that there is one."""
    if CHROMIUM is None and "CI" not in os.environ:
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def assert_accessible(tab) -> None:
    """No finding of axe-core that it calls serious or critical."""
    found = [issue for issue in Axe().run(tab).response["violations"] if issue["impact"] in ("serious", "critical")]
    told = [(issue["id"], [node["html"] for node in issue["nodes"]]) for issue in found]
    assert not told, told
