"""The chapters as the other tools see them: in the order of _toc.yml, cell by cell."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
LABELLED = re.compile(
    r"^\$\$\n((?:(?!\$\$).)*?)\n\$\$ \(((?:eq|def)-[a-z0-9-]+)\)", re.M | re.S
)
FILE_LINE = "# file: ddpm_core/"


class BookError(Exception):
    """A rule of the book is broken; the message names the chapter and the cell."""


@dataclass(frozen=True)
class Cell:
    """One cell of a chapter, with the last heading above it."""

    chapter: str
    id: str
    kind: str
    source: str
    tags: frozenset[str]
    heading: str

    def __str__(self) -> str:
        return f"{self.chapter}, cell {self.id}"


def files_in(node: Any) -> Iterator[str]:
    """Every page that a (part of a) table of contents names, in its order."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("root", "file"):
                yield value
            else:
                yield from files_in(value)
    elif isinstance(node, list):
        for item in node:
            yield from files_in(item)


def pages(root: Path = ROOT) -> list[Path]:
    """The book's pages in reading order."""
    contents = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    found = []
    for name in files_in(contents):
        matches = [
            p for p in (root / f"{name}.ipynb", root / f"{name}.md") if p.exists()
        ]
        if len(matches) != 1:
            raise BookError(
                f"_toc.yml names {name}: there must be one .ipynb or .md of it"
            )
        found.append(matches[0])
    return found


def chapters(root: Path = ROOT) -> list[Path]:
    """The pages that are notebooks."""
    return [page for page in pages(root) if page.suffix == ".ipynb"]


def read_notebook(path: Path) -> dict[str, Any]:
    """The notebook's JSON."""
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def write_whole(path: Path, text: str) -> None:
    """Write a text file with LF endings, whole or not at all."""
    aside = path.with_name(path.name + ".new")
    aside.write_text(text, encoding="utf-8", newline="\n")
    aside.replace(path)


def write_notebook(path: Path, notebook: dict[str, Any]) -> None:
    """Write the notebook in the one form that all tools use."""
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
    write_whole(path, text + "\n")


def source_of(cell: dict[str, Any]) -> str:
    """A cell's source as one string (notebooks may store a list of lines)."""
    return "".join(cell["source"])


def cells(path: Path, root: Path = ROOT) -> list[Cell]:
    """The cells of one chapter."""
    heading, found = "", []
    for raw in read_notebook(path)["cells"]:
        source = source_of(raw)
        if raw["cell_type"] == "markdown":
            titles = [line for line in source.split("\n") if line.startswith("#")]
            heading = titles[-1].lstrip("# ") if titles else heading
        found.append(
            Cell(
                chapter=path.relative_to(root).as_posix(),
                id=raw["id"],
                kind=raw["cell_type"],
                source=source,
                tags=frozenset(raw["metadata"].get("tags", [])),
                heading=heading,
            )
        )
    return found


def code(path: Path, *tags: str, root: Path = ROOT) -> list[Cell]:
    """The chapter's code cells that carry at least one of `tags` (all if none)."""
    wanted = frozenset(tags)
    every = [c for c in cells(path, root) if c.kind == "code"]
    return [c for c in every if not wanted or c.tags & wanted]


def prose(page: Path, root: Path = ROOT) -> str:
    """A page's Markdown, without the code cells of a notebook."""
    if page.suffix != ".ipynb":
        return page.read_text(encoding="utf-8")
    return "\n\n".join(c.source for c in cells(page, root) if c.kind == "markdown")


def labelled(markdown: str) -> list[tuple[str, str]]:
    """The labelled equations of a text, as (label, TeX)."""
    return [(label, tex) for tex, label in LABELLED.findall(markdown)]
