"""Sphinx extension: MathJax from the disk, the book's address, no outside request."""

import importlib
import json
import os
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
ADDRESS = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+")
MATHJAX = "tex-chtml-full.js"
OUTSIDE = re.compile(r'<link[^>]+href="https?://[^"]*font-awesome[^"]*"[^>]*>')
LABEL = re.compile(r"``((?:eq|def)-[a-z0-9-]+)``")


def set_address(app: Sphinx, config: Any) -> None:
    """Fill in the address for the Colab button, or leave the button out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    address = os.environ.get("BOOK_REPOSITORY") or project["urls"].get("Repository")
    options = config.html_theme_options
    if not address:
        options.pop("repository_url", None)
        options["launch_buttons"] = {}
        return
    if not ADDRESS.fullmatch(address):
        raise ConfigError(
            f"the address must be https://github.com/OWNER/NAME, not {address!r}"
        )
    options["repository_url"] = address
    options["use_repository_button"] = True
    options["use_issues_button"] = True


def copy_mathjax(app: Sphinx, error: Exception | None) -> None:
    """Put MathJax and its fonts beside the pages."""
    if error is not None or app.builder.name != "html":
        return
    # The name of that package has hyphens, so it is imported by its name as a string.
    installed = importlib.import_module("sphinx-mathjax-offline").__file__ or ""
    source = Path(installed).parent / "static" / "mathjax"
    target = Path(app.outdir) / "_static" / "mathjax"
    fonts = Path("output") / "chtml" / "fonts" / "woff-v2"
    (target / fonts).mkdir(parents=True, exist_ok=True)
    shutil.copy(source / MATHJAX, target / MATHJAX)
    for font in (source / fonts).glob("*.woff"):
        shutil.copy(font, target / fonts / font.name)


def drop_outside(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doc: Any
) -> None:
    """Remove style sheets that a stored output would fetch from elsewhere."""
    if "body" in context:
        context["body"] = OUTSIDE.sub("", context["body"])


def fold_checks(app: Sphinx, page: str, source: list[str]) -> None:
    """Fold the check cells on the page, so that the derivation reads in one go."""
    if not str(app.env.doc2path(page)).endswith(".ipynb"):
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        if "check" in cell["metadata"].get("tags", []):
            cell["metadata"]["tags"].append("hide-input")
            shown = {
                "code_prompt_show": "Show the check",
                "code_prompt_hide": "Hide the check",
            }
            cell["metadata"].setdefault("mystnb", {}).update(shown)
    source[0] = json.dumps(notebook)


def plain_docstring(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Docstrings are plain text: escape them for Sphinx and link equation labels."""
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines).strip("\n"))
    lines[:] = [*"\n\n".join(escaped(p) for p in paragraphs).split("\n"), ""]


def escaped(paragraph: str) -> str:
    """One paragraph as reStructuredText that looks as it was typed."""
    if paragraph.lstrip().startswith(">>>"):
        return paragraph
    text = "\n".join(line.strip() for line in paragraph.split("\n"))
    pieces = re.split(r"(`[^`]+`)", text)
    for i, piece in enumerate(pieces):
        if piece.startswith("`"):
            pieces[i] = f"`{piece}`"
        else:
            pieces[i] = re.sub(r"([\\*|])|(_)(?=\W|$)", r"\\\1\2", piece)
    return LABEL.sub(r":eq:`\1`", "".join(pieces))


def setup(app: Sphinx) -> dict[str, bool]:
    app.config.mathjax_path = f"mathjax/{MATHJAX}"
    app.connect("config-inited", set_address, priority=900)
    app.connect("build-finished", copy_mathjax)
    app.connect("html-page-context", drop_outside)
    app.connect("source-read", fold_checks)
    app.connect("autodoc-process-docstring", plain_docstring)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
