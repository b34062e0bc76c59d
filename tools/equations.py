"""Run the checks of all labelled equations, and the mutants that must make them fail.

python tools/equations.py            run every check; fail on a label without a check
python tools/equations.py --report   the same, with a table a chapter
python tools/equations.py --chapter book/ddpm/posterior.ipynb   only that chapter
"""

import argparse
import ast
import builtins
import contextlib
import io
import re
import sys
import tomllib
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from antlr4.atn.PredictionMode import PredictionMode
from IPython.core.inputtransformer2 import TransformerManager
from sympy.parsing.latex import LaTeXParsingError
from sympy.parsing.latex import _parse_latex_antlr as grammar

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import chapters as book
from chapters import ROOT, BookError, Cell

from ddpm_core import equations as reader

CHECKS = re.compile(r"# checks: (.+)")
MUTANTS = ROOT / "tests" / "mutants.toml"


class QuickParser(grammar.LaTeXParser):  # type: ignore[misc]
    """SymPy's grammar by ANTLR's SLL prediction: four times quicker, but not complete."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._interp.predictionMode = PredictionMode.SLL


def quick_first(text: str, strict: bool = False) -> Any:
    """What SymPy's parser gives; it is asked in full only where the quick one fails.

    Where SLL prediction finds no error, its tree is that of full LL prediction.
    """
    full, grammar.LaTeXParser = grammar.LaTeXParser, QuickParser
    try:
        return full_parse(text, strict)
    except LaTeXParsingError:
        grammar.LaTeXParser = full
        return full_parse(text, strict)
    finally:
        grammar.LaTeXParser = full


full_parse = grammar.parse_latex
grammar.parse_latex = quick_first


class Page(dict[str, str]):
    """The equations as the checks see them; remembers which were read."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.read: set[str] = set()

    def __getitem__(self, label: str) -> str:
        self.read.add(label)
        return super().__getitem__(label)


@contextlib.contextmanager
def reading(page: Page) -> Iterator[None]:
    """The reader reads from this page."""
    original = reader.equations
    vars(reader)["equations"] = lambda: page
    try:
        yield
    finally:
        vars(reader)["equations"] = original


@dataclass(frozen=True)
class Mutant:
    """A slip: in `chapter`, `old` becomes `new`; the check of `label` must fail."""

    chapter: str
    label: str
    old: str
    new: str
    slip: str = ""


@dataclass
class Chapter:
    """A chapter's cells that checks need, and its counted labels."""

    path: Path
    cells: list[Cell]
    labels: list[str]
    parsed: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def checks(self) -> list[Cell]:
        return [c for c in self.cells if "check" in c.tags]


def checked_by(cell: Cell) -> list[str]:
    """The labels that a check cell names in its first line."""
    match = CHECKS.fullmatch(cell.source.partition("\n")[0])
    if match is None:
        raise BookError(f"{cell}: the first line must be `# checks: eq-...`")
    return [label.strip() for label in match[1].split(",")]


def load(path: Path) -> Chapter:
    """Read one chapter."""
    labels = [label for label, _ in book.labelled(book.prose(path))]
    counted = [label for label in labels if label.startswith("eq-")]
    return Chapter(path, book.code(path, "setup", "export", "check"), counted)


def load_all() -> list[Chapter]:
    """Read all chapters; a page in Markdown may hold no counted equation."""
    for page in book.pages():
        if page.suffix == ".md":
            for label, _ in book.labelled(book.prose(page)):
                if label.startswith("eq-"):
                    raise BookError(f"{page.name}: {label} stands where no check can")
    return [load(path) for path in book.chapters()]


def problems(all_chapters: Iterable[Chapter]) -> Iterator[str]:
    """Labels without a check, and checks of labels that do not exist."""
    for chapter in all_chapters:
        named = {label for cell in chapter.checks for label in checked_by(cell)}
        for label in chapter.labels:
            if label not in named:
                yield f"{chapter.name}: {label} has no check"
        for label in sorted(named - set(chapter.labels)):
            yield f"{chapter.name}: a check names {label}, which is no equation there"


def names_in(source: str) -> tuple[set[str], set[str]]:
    """The names that a cell binds at its top level, and all names that it reads."""
    tree = ast.parse(source)
    bound: set[str] = set()
    for node in tree.body:
        for inner in ast.walk(node):
            if isinstance(inner, ast.FunctionDef | ast.ClassDef):
                bound.add(inner.name)
            elif isinstance(inner, ast.alias):
                bound.add((inner.asname or inner.name).split(".")[0])
            elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                bound.add(inner.id)
    read = {
        n.id
        for n in ast.walk(tree)
        if isinstance(n, ast.Name) and not hasattr(builtins, n.id)
    }
    return bound, read


def plain(cell: Cell) -> str:
    """The cell as Python, its magics turned into calls."""
    return str(TransformerManager().transform_cell(cell.source))


def needed(cells: list[Cell], label: str) -> list[Cell]:
    """Set-up and export cells, the checks of `label`, and the checks they build on."""
    chosen: list[Cell] = []
    wanted: set[str] = set()
    for cell in reversed(cells):
        is_check = "check" in cell.tags
        bound, read = names_in(plain(cell))
        if is_check and label not in checked_by(cell) and not bound & wanted:
            continue
        if is_check:
            wanted |= read - bound
        chosen.append(cell)
    return chosen[::-1]


def execute(cells: Iterable[Cell], label: str | None = None) -> None:
    """Run cells in one namespace; other checks than that of `label` may fail."""
    space: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        compiled = compile(plain(cell), str(cell), "exec")
        other = (
            label is not None and "check" in cell.tags and label not in checked_by(cell)
        )
        try:
            exec(compiled, space)
        except AssertionError:
            if not other:
                raise


def run_checks(chapter: Chapter) -> list[str]:
    """Run a chapter's checks; returns what failed, notes what was parsed."""
    load_page(chapter.cells, chapter.path)
    page = Page(reader.equations())
    try:
        with reading(page), contextlib.redirect_stdout(io.StringIO()):
            execute(chapter.cells)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = [f.filename for f in frames if f.filename.startswith(chapter.name)]
        place = where[0] if where else chapter.name
        return [f"{place}: {type(error).__name__}: {error}"]
    finally:
        chapter.parsed = page.read & set(chapter.labels)
    return []


def load_page(cells: Iterable[Cell], path: Path, text: str | None = None) -> None:
    """Give the reader the equations as they stand on the page now."""
    prose = book.prose(path) if text is None else text
    reader.equations().update(dict(book.labelled(prose)))


def mutants(path: Path = MUTANTS) -> list[Mutant]:
    """The recorded slips."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        return [Mutant(**entry) for entry in tomllib.load(file)["mutant"]]


def mutated(mutant: Mutant) -> tuple[list[Cell], str]:
    """The chapter's cells and prose with the slip put in."""
    path = ROOT / mutant.chapter
    every = book.cells(path)
    count = sum(cell.source.count(mutant.old) for cell in every)
    if count != 1:
        raise BookError(
            f"{mutant.label}: {mutant.old!r} stands {count} times, not once"
        )
    changed = [
        Cell(
            c.chapter,
            c.id,
            c.kind,
            c.source.replace(mutant.old, mutant.new),
            c.tags,
            c.heading,
        )
        for c in every
    ]
    touched = [c for c in every if mutant.old in c.source]
    if "check" in touched[0].tags:
        raise BookError(f"{mutant.label}: a mutant must not change the check itself")
    prose = "\n\n".join(c.source for c in changed if c.kind == "markdown")
    wanted = {"setup", "export", "check"}
    return [c for c in changed if c.kind == "code" and c.tags & wanted], prose


def caught_by(mutant: Mutant) -> str:
    """The message with which the check catches the slip; raises BookError if none."""
    cells, prose = mutated(mutant)
    path = ROOT / mutant.chapter
    load_page(cells, path, prose)
    try:
        execute(needed(cells, mutant.label), mutant.label)
    except AssertionError as error:
        return str(error) or "AssertionError"
    finally:
        load_page(cells, path)
    raise BookError(f"{mutant.label}: no check sees {mutant.old!r} -> {mutant.new!r}")


def report(all_chapters: list[Chapter]) -> str:
    """Per chapter: equations, checks, those read from the page, mutants, the sweep."""
    import sweep

    found = {s.chapter: s for s in sweep.sweep_all(c.name for c in all_chapters)}
    planted = [mutant.chapter for mutant in mutants()]
    titles = ("equations", "checks", "read", "share", "algebra", "mutants", "slips")
    rows = [f"{'chapter':30}" + "".join(f"{t:>10}" for t in (*titles, "survive"))]
    counts = []
    for c in all_chapters:
        if c.labels:
            swept = found[c.name]
            numbers = [len(c.labels), len(c.checks), len(c.parsed)]
            numbers += [len(swept.swept) + len(swept.unread), planted.count(c.name)]
            numbers += [swept.slips, len(swept.survivors)]
            counts.append((c.name, numbers))
    counts.append(
        ("all", [sum(column) for column in zip(*(n for _, n in counts), strict=True)])
    )
    for name, (equations, checks, read, *rest) in counts:
        shown = [str(equations), str(checks), str(read), f"{read / equations:.0%}"]
        cells = "".join(f"{text:>10}" for text in [*shown, *map(str, rest)])
        rows.append(f"{name:30}{cells}")
    rows.append(
        "\nno algebra (means, sums, integrals, products of densities, matrices):"
    )
    for c in all_chapters:
        for label in found[c.name].other if c.labels else []:
            how = (
                "read from the page" if label in c.parsed else "checked by its meaning"
            )
            rows.append(f"  {label}: {how}")
    rows += [line for swept in found.values() for line in sweep.complaints(swept)]
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", action="store_true", help="a table a chapter")
    parser.add_argument("--chapter", help="only this chapter")
    options = parser.parse_args()
    try:
        all_chapters = load_all()
        if options.chapter:
            all_chapters = [c for c in all_chapters if c.name == options.chapter]
        found = list(problems(all_chapters))
    except BookError as error:
        print(error, file=sys.stderr)
        return 1
    failed = [message for chapter in all_chapters for message in run_checks(chapter)]
    total = sum(len(c.labels) for c in all_chapters)
    unchecked = sum("has no check" in message for message in found)
    if options.report:
        print(report(all_chapters))
    print("\n".join([*found, *failed]), end="\n" if found or failed else "")
    if failed:
        print(f"{len(failed)} chapters have a failing check")
    print(f"checked {total - unchecked} of {total}")
    return 1 if found or failed else 0


if __name__ == "__main__":
    sys.exit(main())
