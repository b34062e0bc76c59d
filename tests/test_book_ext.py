"""The Sphinx extension: docstrings, the address, nothing from outside."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from sphinx.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import book_ext


def test_a_docstring_looks_as_it_was_typed_and_links_its_equations():
    typed = "The mean (`eq-posterior-mean`), *args, x_ and |x|\nwith `beta`."
    assert book_ext.escaped(typed) == (
        "The mean (:eq:`eq-posterior-mean`), \\*args, x\\_ and \\|x\\|\nwith ``beta``."
    )


def test_doctests_stay_as_they_are():
    example = ">>> 2 * 3\n6"
    lines = ["One line.", "", *example.split("\n")]
    book_ext.plain_docstring(None, "function", "f", None, None, lines)
    assert "\n".join(lines) == f"One line.\n\n{example}\n"


def configured(monkeypatch, address):
    monkeypatch.setenv("BOOK_REPOSITORY", address)
    theme = {"repository_url": "", "launch_buttons": {"colab_url": "x"}}
    config = SimpleNamespace(html_theme_options=theme)
    book_ext.set_address(None, config)
    return config.html_theme_options


def test_without_an_address_there_is_no_dead_button(monkeypatch):
    options = configured(monkeypatch, "")
    assert options == {"launch_buttons": {}}


def test_an_address_makes_the_buttons(monkeypatch):
    options = configured(monkeypatch, "https://github.com/owner/name")
    assert options["repository_url"] == "https://github.com/owner/name"
    assert options["launch_buttons"] == {"colab_url": "x"}


def test_another_address_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="must be https"):
        configured(monkeypatch, "https://example.org/owner/name")


def test_no_style_sheet_from_outside():
    link = '<link rel="stylesheet" href="https://cdn.example/font-awesome/4.4.0/x.css">'
    context = {"body": f"<p>a</p>{link}<p>b</p>"}
    book_ext.drop_outside(None, "page", "page.html", context, None)
    assert context["body"] == "<p>a</p><p>b</p>"


def test_checks_are_folded_on_the_page_and_nothing_else_is():
    cells = [
        {"cell_type": "code", "metadata": {"tags": list(tags)}, "source": "1"}
        for tags in (["check"], ["export"], [])
    ]
    source = [json.dumps({"cells": cells})]
    app = SimpleNamespace(env=SimpleNamespace(doc2path=lambda page: f"{page}.ipynb"))
    book_ext.fold_checks(app, "book/ddpm/forward", source)
    folded = [c["metadata"] for c in json.loads(source[0])["cells"]]
    assert [m["tags"] for m in folded] == [["check", "hide-input"], ["export"], []]
    assert folded[0]["mystnb"]["code_prompt_show"] == "Show the check"

    text = ["# A page, not a notebook"]
    app.env.doc2path = lambda page: f"{page}.md"
    book_ext.fold_checks(app, "book/intro", text)
    assert text == ["# A page, not a notebook"]
