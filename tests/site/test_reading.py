"""What a reader does on the pages: search, change colours, open the menu."""

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pages
import pytest
from playwright.sync_api import Browser, expect

LOOKED_AT = ["book/intro.html", "book/ddpm/posterior.html"]


class Quiet(SimpleHTTPRequestHandler):
    """A file server that does not write a log."""

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The book, served over HTTP on this machine."""
    handler = functools.partial(Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_first_page_is_the_introduction(browser: Browser, address: str) -> None:
    """The address of the book alone leads to its first page."""
    page = browser.new_page()
    page.set_default_timeout(pages.PATIENCE_MS)
    page.goto(address)
    page.wait_for_url("**/book/intro.html")
    expect(page.locator("article h1")).to_contain_text(
        "Diffusion Models, Derived and Run"
    )
    page.close()


def test_search_finds_a_term(browser: Browser, address: str) -> None:
    """Searching from the keyboard lists the chapter, and the result opens it."""
    visit = pages.Visit("search")
    page = pages.open_page(browser, f"{address}/book/intro.html", visit)
    page.keyboard.press("Control+K")
    box = page.locator("input[name=q]").locator("visible=true").first
    box.fill("completing the square")
    box.press("Enter")
    page.wait_for_url("**/search.html?q=*")
    result = page.locator("#search-results a[href*='ddpm/posterior.html']").first
    result.click()
    page.wait_for_url("**/book/ddpm/posterior.html*")
    expect(page.locator("article h1")).to_be_visible()
    assert [url for url in visit.requests if not url.startswith(address)] == []
    assert visit.complaints == []
    page.close()


def test_search_works_from_the_disk(browser: Browser, site: Path) -> None:
    """Search results are listed over file:// as well, without complaint."""
    visit = pages.Visit("search")
    url = (site / "search.html").as_uri() + "?q=posterior"
    page = pages.open_page(browser, url, visit)
    expect(page.locator("#search-results li").first).to_be_visible()
    assert visit.complaints == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", LOOKED_AT)
def test_contrast(browser: Browser, site: Path, name: str, scheme: Any) -> None:
    """Text stands out from its ground, by day and by night."""
    visit = pages.Visit(name)
    url = (site / name).as_uri()
    page = pages.open_page(browser, url, visit, color_scheme=scheme)
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    found = pages.accessibility(page, name, contrast=True)
    page.close()
    assert found == []


def test_menu_on_a_phone(browser: Browser, site: Path) -> None:
    """On a narrow screen the menu opens and leads to a chapter."""
    visit = pages.Visit("menu")
    url = (site / "book" / "intro.html").as_uri()
    page = pages.open_page(browser, url, visit, viewport=pages.NARROW)
    page.locator("button.primary-toggle").first.click()
    page.locator("nav a[href$='ddpm/forward.html']").first.click()
    page.wait_for_url("**/ddpm/forward.html")
    page.close()


def test_descriptions_link_to_equations(site: Path) -> None:
    """On the API page, labels of equations are links to the derivations."""
    text = (site / "book" / "api.html").read_text(encoding="utf-8")
    assert text.count("#equation-eq-") > 20
    assert "`eq-" not in text


def test_a_page_without_description_is_found(browser: Browser, tmp_path: Path) -> None:
    """The tests above can fail: a bad page trips each of them."""
    (tmp_path / "bad.html").write_text(
        '<html><body><article><h1>Bad</h1><h1>Worse</h1><img src="none.png">'
        '<p>$$x$$</p><span class="math">y</span><a href="gone.html">link</a>'
        '<a href="#nowhere">link</a><p style="width: 999px">wide</p></article>'
        '<script src="http://example.invalid/x.js"></script></body></html>',
        encoding="utf-8",
    )
    visit = pages.take(browser, tmp_path, "bad.html")
    assert any("example.invalid" in url for url in visit.requests)
    assert visit.complaints
    assert visit.seen["headings"] == 2
    assert [i["loaded"] for i in visit.seen["images"]] == [False]
    assert visit.seen["images"][0]["alt"] is None
    assert visit.seen["raw"] == ["$$x$$"]
    assert visit.seen["typeset"] != pages.contents(tmp_path / "bad.html").formulas
    assert len(pages.broken_links(tmp_path, visit)) == 2
    assert visit.wider
    assert any(v.startswith("image-alt") for v in visit.violations)
