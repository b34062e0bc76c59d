"""What a browser sees on one page: gathered in one visit, judged by the tests."""

import functools
import json
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from playwright.sync_api import Browser, Page, ViewportSize

ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "_build" / "html"
PATIENCE_MS = 120_000  # a busy machine is no fault of the page
WIDE: ViewportSize = {"width": 1280, "height": 900}
NARROW: ViewportSize = {"width": 390, "height": 844}
WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22a", "wcag22aa"]

# Accessibility rules that are left out, each with its reason and where it comes from.
# Nothing else is left out anywhere. (page, rule) with page "*" for every page.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("book/references.html", "aria-required-children"): (
        "docutils writes a list of citations as role=list with children of role=doc-"
        "biblioentry; the roles come from its HTML writer and no setting changes them"
    ),
    ("book/references.html", "aria-deprecated-role"): (
        "docutils' HTML writer gives each citation the role doc-biblioentry"
    ),
}

LOOK = r"""
() => {
  const outside = 'pre, code, script, style, textarea, mjx-container, .math, noscript';
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const raw = [];
  while (walker.nextNode()) {
    const node = walker.currentNode;
    if (node.parentElement.closest(outside)) continue;
    const text = node.data.trim();
    if (/\$\$|\\\(|\\\[|\\[a-zA-Z]{2,}/.test(text)) raw.push(text);
  }
  return {
    title: document.title,
    // The theme keeps a second heading for print.
    headings: [...document.querySelectorAll('h1')].filter(h => h.checkVisibility()).length,
    typeset: document.querySelectorAll('mjx-container').length,
    faulty: [...document.querySelectorAll('mjx-merror, [data-mml-node="merror"]')]
      .map(e => e.textContent),
    raw: raw,
    images: [...document.images].map(i => ({
      src: i.getAttribute('src'), alt: i.getAttribute('alt'),
      loaded: i.complete && i.naturalWidth > 0, wanted: !!i.closest('article'),
    })),
    links: [...document.querySelectorAll('a[href]')].map(a => a.href),
  };
}
"""

WIDER = """
() => {
  const limit = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth <= limit + 1) return [];  // 1: rounding
  const scrolls = e => e && e !== document.body &&
    (['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX) ||
     scrolls(e.parentElement));
  return [...document.querySelectorAll('body *')]
    .filter(e => e.getBoundingClientRect().right > limit + 1)
    .filter(e => !scrolls(e.parentElement))
    .map(e => e.outerHTML.slice(0, 120)).slice(0, 5).concat(['(the page scrolls)']);
}
"""


sys.path.insert(0, str(ROOT / "tools"))
import chapters  # noqa: E402


def sources() -> list[Path]:
    """The pages of the table of contents, as paths from the book's root."""
    return [page.relative_to(ROOT) for page in chapters.pages(ROOT)]


def stale() -> list[str]:
    """The pages whose built copy is missing or was built from another text."""
    found = []
    for name in sources():
        copy = HTML / "_sources" / name
        built = (HTML / name).with_suffix(".html").exists() and copy.exists()
        if not built or copy.read_bytes() != (ROOT / name).read_bytes():
            found.append(name.as_posix())
    return found


FLATTEN = """
(alsoCode) => {
  for (const formula of document.querySelectorAll('mjx-container'))
    formula.replaceChildren('formula');
  if (alsoCode)
    for (const code of document.querySelectorAll('.highlight pre'))
      code.textContent = code.textContent;
}
"""


@dataclass
class Visit:
    """One page as the browser found it."""

    name: str
    seen: dict[str, Any] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    wider: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)


class Contents(HTMLParser):
    """The ids and the number of formulas in a page's source."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.formulas = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note one element."""
        values = dict(attrs)
        self.ids |= {v for k in ("id", "name") if (v := values.get(k))}
        self.formulas += "math" in (values.get("class") or "").split()


@functools.cache
def contents(path: Path) -> Contents:
    """What the source of a built page holds."""
    parser = Contents()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser


@functools.cache
def axe_source() -> str:
    """The accessibility checker, from the installed package."""
    return (files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")


def accessibility(page: Page, name: str, contrast: bool = False) -> list[str]:
    """The checker's violations on an open page, without the listed exceptions.

    It judges contrast alone, or all else of WCAG 2.2 A and AA. The checker walks every
    element; the thousands inside formulas and coloured code hold nothing that it could
    judge (but for the colours), so only their boxes and words are left to it.
    """
    page.evaluate(FLATTEN, not contrast)
    page.evaluate(axe_source())
    only = ["color-contrast"] if contrast else WCAG
    kind = "rule" if contrast else "tag"
    options: dict[str, Any] = {"preload": False, "resultTypes": ["violations"]}
    options |= {"runOnly": {"type": kind, "values": only}}
    if not contrast:
        options |= {"rules": {"color-contrast": {"enabled": False}}}
    result = page.evaluate(f"axe.run(document, {json.dumps(options)})")
    found = []
    for violation in result["violations"]:
        rule = violation["id"]
        if (name, rule) in EXCEPTIONS or ("*", rule) in EXCEPTIONS:
            continue
        places = [str(node["target"]) for node in violation["nodes"][:3]]
        found.append(f"{rule} ({violation['help']}): {', '.join(places)}")
    return found


def typeset(page: Page) -> None:
    """Wait until MathJax, where the page has it, is done."""
    page.evaluate(
        """async () => {
          if (!document.querySelector('.math')) return;
          for (let i = 0; i < 600 && !window.MathJax?.startup?.promise; i++)
            await new Promise(done => setTimeout(done, 50));
          await window.MathJax?.startup?.promise;
        }"""
    )


def open_page(browser: Browser, url: str, visit: Visit, **context: Any) -> Page:
    """A new tab on `url` that writes requests and complaints into `visit`."""
    page = browser.new_page(viewport=context.pop("viewport", WIDE), **context)
    page.set_default_timeout(PATIENCE_MS)
    page.on("request", lambda request: visit.requests.append(request.url))
    page.on(
        "requestfailed",
        lambda request: visit.complaints.append(f"failed: {request.url}"),
    )
    page.on("pageerror", lambda error: visit.complaints.append(str(error)))
    page.on(
        "console",
        lambda message: (
            visit.complaints.append(message.text) if message.type == "error" else None
        ),
    )
    page.goto(url)
    typeset(page)
    return page


def take(browser: Browser, site: Path, name: str) -> Visit:
    """Visit one page of the built book over file://, wide, then on a narrow screen."""
    visit = Visit(name)
    page = open_page(browser, (site / name).as_uri(), visit)
    visit.seen = page.evaluate(LOOK)
    page.set_viewport_size(NARROW)
    visit.wider = page.evaluate(WIDER)
    page.set_viewport_size(WIDE)
    visit.violations = accessibility(page, name)
    page.close()
    return visit


def broken_links(site: Path, visit: Visit) -> list[str]:
    """The links into the book whose page or place on the page does not exist."""
    here = (site / visit.name).as_uri()
    broken = []
    for link in dict.fromkeys(visit.seen["links"]):
        parts = urlsplit(link)
        if parts.scheme in ("http", "https", "mailto", "javascript"):
            continue
        target = Path(unquote(parts.path))
        fragment = unquote(parts.fragment)
        if parts.scheme != "file" or site not in target.parents or not target.is_file():
            broken.append(link)
        elif fragment and target.suffix == ".html":
            top = link.startswith(here) and fragment == "top"
            if not top and fragment not in contents(target).ids:
                broken.append(link)
    return broken
