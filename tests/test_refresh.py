"""The outputs are fresh, and the digest sees what they depend on."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import chapters as book
import refresh

CHAPTER = book.ROOT / "book" / "ddpm" / "sampling.ipynb"


def test_all_outputs_are_fresh():
    assert [str(p) for p in refresh.stale()] == []


def test_every_module_behind_a_chapter_is_found():
    found = refresh.modules_behind(["from ddpm_core.process import q_sample"])
    assert {"process", "schedules", "checks"} <= set(found)
    assert refresh.modules_behind(["import torch"]) == []
    assert "plots" in refresh.modules_behind(["from ddpm_core import plots"])


def edited(tmp_path, monkeypatch, change):
    """The digest of a copy of a chapter after `change` to its notebook."""
    monkeypatch.setattr(refresh.book, "ROOT", tmp_path)
    path = tmp_path / "chapter.ipynb"
    notebook = book.read_notebook(CHAPTER)
    change(notebook)
    book.write_notebook(path, notebook)
    monkeypatch.setattr(refresh.book, "code", lambda p: code(p, tmp_path))
    monkeypatch.setattr(refresh.book, "prose", lambda p: prose(p, tmp_path))
    return refresh.digest(path)


code_of, prose_of = book.code, book.prose


def code(path, root):
    return code_of(path, root=root)


def prose(path, root):
    return prose_of(path, root)


def code_cells(notebook):
    return [c for c in notebook["cells"] if c["cell_type"] == "code"]


def test_digest_follows_code_and_equations_but_not_prose_or_address(
    tmp_path, monkeypatch
):
    def nothing(notebook):
        pass

    def edit_code(notebook):
        code_cells(notebook)[-1]["source"] = "x = 1"

    def edit_prose(notebook):
        notebook["cells"][0]["source"] = (
            book.source_of(notebook["cells"][0]) + "\n\nMore."
        )

    def edit_equation(notebook):
        notebook["cells"][0]["source"] = "$$\na = b\n$$ (eq-a-b)"

    def edit_address(notebook):
        first = code_cells(notebook)[0]
        old = book.source_of(first)
        new = refresh.ADDRESS_LINE.sub('repository = "https://github.com/a/b"', old)
        assert new != old
        first["source"] = new

    plain = edited(tmp_path, monkeypatch, nothing)
    assert edited(tmp_path, monkeypatch, edit_prose) == plain
    assert edited(tmp_path, monkeypatch, edit_address) == plain
    assert edited(tmp_path, monkeypatch, edit_code) != plain
    assert edited(tmp_path, monkeypatch, edit_equation) != plain


def test_digest_follows_modules_and_weights(tmp_path, monkeypatch):
    before = refresh.digest(CHAPTER)
    package = tmp_path / "ddpm_core"
    (package / "weights").mkdir(parents=True)
    for path in refresh.PACKAGE.glob("*.py"):
        (package / path.name).write_bytes(path.read_bytes())
    for path in (refresh.PACKAGE / "weights").glob("*.*"):
        (package / "weights" / path.name).write_bytes(path.read_bytes())
    for tool in (refresh, refresh.results):
        monkeypatch.setattr(tool, "PACKAGE", package)
    assert refresh.digest(CHAPTER) == before
    with (package / "checks.py").open("a") as file:
        file.write("# changed\n")
    changed = refresh.digest(CHAPTER)
    assert changed != before
    card = package / "weights" / "digits.json"
    card.write_text(card.read_text() + " ")
    assert refresh.digest(CHAPTER) != changed


def test_address_is_checked(monkeypatch):
    monkeypatch.setenv("BOOK_REPOSITORY", "https://github.com/owner/name")
    assert refresh.address() == "https://github.com/owner/name"
    monkeypatch.setenv("BOOK_REPOSITORY", "https://example.org/owner/name")
    with pytest.raises(book.BookError, match="must be https"):
        refresh.address()
    monkeypatch.delenv("BOOK_REPOSITORY")
    assert refresh.address() == ""


def test_refuses_while_the_package_differs(monkeypatch):
    monkeypatch.setattr(
        refresh.extract, "differences", lambda: ["ddpm_core/x.py: differs"]
    )
    with pytest.raises(book.BookError, match="extract first"):
        refresh.refresh([])


def test_execution_stores_clean_outputs_twice_the_same(tmp_path, monkeypatch):
    source = "import torch\nprint(torch.arange(3))"
    cell = {"cell_type": "code", "id": "one", "source": source, "outputs": []}
    cell |= {"metadata": {}, "execution_count": None}
    notebook = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    path = tmp_path / "chapter.ipynb"
    book.write_notebook(path, notebook)
    monkeypatch.setattr(refresh, "digest", lambda p: "digest")
    refresh.execute(path)
    once = path.read_bytes()
    refresh.execute(path)
    assert path.read_bytes() == once
    stored = book.read_notebook(path)["cells"][0]
    assert stored["execution_count"] == 1
    assert "".join(stored["outputs"][0]["text"]) == "tensor([0, 1, 2])\n"
