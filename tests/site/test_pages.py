"""Every page of the built book, opened once from the disk in a real browser."""

import re
from pathlib import Path

import pages
import pytest
from playwright.sync_api import Browser


def names() -> list[str]:
    """Every page of the book, and what else Sphinx wrote."""
    wanted = [source.with_suffix(".html") for source in pages.sources()]
    written = sorted(
        path.relative_to(pages.HTML) for path in pages.HTML.rglob("*.html")
    )
    every = dict.fromkeys(path.as_posix() for path in [*wanted, *written])
    # index.html sends the reader on at once; _static holds the theme's own pieces.
    return [n for n in every if n != "index.html" and not n.startswith("_static/")]


@pytest.fixture(scope="module", params=names())
def visit(request: pytest.FixtureRequest, site: Path, browser: Browser) -> pages.Visit:
    """What the browser saw on one page."""
    return pages.take(browser, site, request.param)


def test_asks_for_nothing_outside(visit: pages.Visit) -> None:
    """The page works without a network and tells nobody that it is read."""
    local = ("file:", "data:", "blob:", "about:")
    assert visit.requests
    assert [url for url in visit.requests if not url.startswith(local)] == []


def test_no_error_in_the_console(visit: pages.Visit) -> None:
    """No script fails and no file is missing."""
    assert visit.complaints == []


def test_has_one_heading(visit: pages.Visit) -> None:
    """A page has one main heading, and a title."""
    assert visit.seen["headings"] == 1
    assert visit.seen["title"]


def test_images_are_there(visit: pages.Visit) -> None:
    """Every image loads."""
    assert [i["src"] for i in visit.seen["images"] if not i["loaded"]] == []


def test_images_are_described(visit: pages.Visit) -> None:
    """Every image of the text is put in words, which are not a file name."""
    poor = [
        image
        for image in visit.seen["images"]
        if image["wanted"]
        and (
            len((image["alt"] or "").split()) < 3
            or re.search(r"\.(png|gif|webp|jpe?g|svg)$|_images/", image["alt"])
        )
    ]
    assert poor == []


def test_links_lead_somewhere(visit: pages.Visit, site: Path) -> None:
    """Every link into the book has its page, and its place on that page."""
    assert pages.broken_links(site, visit) == []


def test_every_formula_is_typeset(visit: pages.Visit, site: Path) -> None:
    """As many formulas stand on the page as in its source, none faulty, none raw."""
    assert visit.seen["typeset"] == pages.contents(site / visit.name).formulas
    assert visit.seen["faulty"] == []
    assert visit.seen["raw"] == []


def test_fits_a_phone(visit: pages.Visit) -> None:
    """At a width of 390 pixels the page does not scroll sideways."""
    assert visit.wider == []


def test_is_accessible(visit: pages.Visit) -> None:
    """WCAG 2.2 A and AA, as far as a program can tell (contrast is tested apart)."""
    assert visit.violations == []
