"""A real browser on the built pages: what the tests in this folder share."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pages
import pytest
from playwright.sync_api import Browser, Error, expect, sync_playwright

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def site() -> Path:
    """The folder of the built book, which must be there and up to date."""
    if not (pages.HTML / "index.html").exists():
        pytest.fail("The book is not built: run `make book` first.", pytrace=False)
    if old := pages.stale():
        pytest.fail(
            f"Changed after the build: {', '.join(old)}. Run `make book`.",
            pytrace=False,
        )
    return pages.HTML


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium, from $CHROMIUM or from the usual places."""
    usual = (path for name in NAMES if (path := shutil.which(name)))
    program = os.environ.get("CHROMIUM") or next(usual, None)
    if program is None or not Path(program).exists():
        pytest.fail(
            "Chromium is missing. On Debian: apt-get install --no-install-recommends "
            "chromium. Elsewhere: install it and set CHROMIUM to its path.",
            pytrace=False,
        )
    expect.set_options(timeout=pages.PATIENCE_MS)
    with sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(
                executable_path=program, args=ARGUMENTS
            )
        except Error as error:
            pytest.fail(f"{program} does not start: {error}", pytrace=False)
        yield chromium
        chromium.close()
