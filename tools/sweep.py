"""Sweep the equations that are algebra: each small slip in the TeX must fail its check.

python tools/sweep.py                  all chapters, in two processes
python tools/sweep.py CHAPTER...       the named ones
python tools/sweep.py --processes 1    everything in this process
"""

import argparse
import ast
import contextlib
import functools
import io
import re
import sys
import tomllib
import types
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import sympy

sys.path.insert(0, str(Path(__file__).parent))
import equations as tool
from chapters import ROOT, BookError, Cell

from ddpm_core import equations as reader

LISTED = ROOT / "tests" / "sweep.toml"
ROOTED = re.compile(r"\\sqrt\s*\{")
OPENING = re.compile(r"(?:\\left\s*)?\((?=[^()]*[-+])")
UNREAL = re.compile("complex|math domain")  # the check asked for a real number
STRANGER = "0.6173"  # stands for a symbol that a slip brought in


@dataclass(frozen=True)
class Slip:
    """In the TeX of `label`, the characters from `start` to `end` become `new`."""

    label: str
    start: int
    end: int
    new: str
    kind: str
    symbol: bool = False

    def put(self, text: str, new: str | None = None) -> str:
        """The TeX with the slip in it."""
        return (
            text[: self.start] + (self.new if new is None else new) + text[self.end :]
        )

    def pair(self, text: str) -> tuple[str, str]:
        """The words around the slip, enough of them to stand once, before and after."""
        gaps = [m.start() for m in re.finditer(r"\s+", text)]
        left = max((g + 1 for g in gaps if g < self.start), default=0)
        right = min((g for g in gaps if g >= self.end), default=len(text))
        while text.count(text[left:right]) > 1:
            if left == 0:
                right = min((g for g in gaps if g > right), default=len(text))
            left = max((g + 1 for g in gaps if g + 1 < left), default=0)
        changed = self.put(text)
        return text[left:right], changed[left : len(changed) - len(text) + right]


@dataclass
class Swept:
    """What the sweep found in one chapter."""

    chapter: str
    slips: int = 0
    swept: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    survivors: list[tuple[str, str, str]] = field(default_factory=list)
    errors: list[tuple[str, str, str, str]] = field(default_factory=list)


@dataclass
class Statement:
    """One statement of a check, the names before it, and the equations it read."""

    code: types.CodeType
    before: dict[str, Any]
    read: set[str]


def forgets(value: Any) -> bool:
    """Whether a chapter's own cache could hide a slip; the package's may stay."""
    home = sys.modules.get(getattr(value, "__module__", None) or "")
    own = getattr(home, getattr(value, "__name__", ""), None) is not value
    return hasattr(value, "cache_clear") and own


def fresh(space: dict[str, Any]) -> dict[str, Any]:
    """A copy of a namespace in which functions see the copy and no list is shared."""
    copy: dict[str, Any] = {}

    def rebound(value: Any) -> Any:
        if isinstance(value, types.FunctionType) and "__sweep__" in value.__globals__:
            made = types.FunctionType(
                value.__code__,
                copy,
                value.__name__,
                value.__defaults__,
                value.__closure__,
            )
            made.__kwdefaults__ = value.__kwdefaults__
            made.__module__ = value.__module__
            return made
        if forgets(value):
            return functools.cache(rebound(value.__wrapped__))
        if type(value) in (list, dict, set):
            return value.copy()
        return value.clone_state() if type(value).__name__ == "Generator" else value

    copy.update({name: rebound(value) for name, value in space.items()})
    return copy


class Bench:
    """A chapter's checks, run once, from which each label's check can be resumed."""

    def __init__(self, chapter: tool.Chapter) -> None:
        self.chapter = chapter
        tool.load_page(chapter.cells, chapter.path)
        self.page = tool.Page(reader.equations())
        self.steps: dict[str, list[Statement]] = {}
        self.whole: set[str] = set()  # labels whose checks are run from their start
        space: dict[str, Any] = {"__name__": "__main__", "__sweep__": True}
        with self.in_place():
            for cell in chapter.cells:
                if "check" in cell.tags:
                    self.steps[cell.id] = list(self.stepwise(cell, space))
                else:
                    exec(compile(tool.plain(cell), str(cell), "exec"), space)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The reader reads from this page; nothing is printed."""
        with tool.reading(self.page), contextlib.redirect_stdout(io.StringIO()):
            yield

    def stepwise(self, cell: Cell, space: dict[str, Any]) -> Iterator[Statement]:
        """Run a check statement by statement."""
        for node in ast.parse(tool.plain(cell)).body:
            for value in space.values():
                if forgets(value):
                    value.cache_clear()
            code = compile(ast.Module([node], []), str(cell), "exec")
            self.page.read = set()
            before = fresh(space)
            exec(code, space)
            yield Statement(code, before, self.page.read)

    def checks(self, label: str) -> list[list[Statement]]:
        """For each check that names the label: what follows its first look at it."""
        found = []
        for cell in self.chapter.checks:
            if label in tool.checked_by(cell):
                steps = self.steps[cell.id]
                reads = [i for i, s in enumerate(steps) if label in s.read]
                first = 0 if label in self.whole else min(reads, default=0)
                found += [steps[first:]] if reads else []
        return found

    def control(self, label: str) -> None:
        """Resumed without a slip, the checks must pass.

        Where an earlier statement made something that changes as it is used (an
        optimiser), the checks are run from their start instead.
        """
        try:
            self.run(label, self.page[label])
        except AssertionError:
            self.whole.add(label)
            self.run(label, self.page[label])

    def run(self, label: str, text: str) -> None:
        """Run the checks of the label with another TeX; raises what they raise."""
        original = self.page[label]
        self.page[label] = text
        try:
            with self.in_place():
                for steps in self.checks(label):
                    space = fresh(steps[0].before)
                    for step in steps:
                        exec(step.code, space)
        finally:
            self.page[label] = original

    def outcome(self, slip: Slip) -> str:
        """Empty where an assertion catches the slip; else what happened."""
        text = self.page[slip.label]
        changed = [slip.put(text)]
        # Where the check has no value for a symbol, give it some number instead.
        changed += [slip.put(text, STRANGER)] if slip.symbol else []
        happened = "survived"
        for candidate in changed:
            try:
                self.run(slip.label, candidate)
                return "survived"
            except AssertionError:
                return ""
            except (TypeError, ValueError) as error:
                if UNREAL.search(str(error)):
                    return ""
                happened = f"{type(error).__name__}: {error}"
            except Exception as error:
                happened = f"{type(error).__name__}: {error}"
        return happened


def closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "({[") - (text[i] in ")}]")
        if depth == 0:
            return i
    return -1


def symbols(label: str, text: str) -> Iterator[Slip]:
    """One index, one alpha or one beta taken for its neighbour; one root too many."""
    for match in reader.SYMBOL.finditer(text):
        name, whole = reader.symbol_name(match), match[0]
        letter = (match["base"] or match["inner"] or match["under"]).lstrip("\\")
        index = match["long"] or match["greek"] or match["short"] or ""
        place = match.start(), match.end()
        cut = re.search(r"_(?:\{[^{}]*\}|\\[a-z]+|\w)", whole)
        head, tail = (whole[: cut.start()], whole[cut.end() :]) if cut else (whole, "")
        subscript = cut[0] if cut else ""
        early = re.fullmatch(r"([a-z])-1", index)
        if early:
            yield Slip(label, *place, f"{head}_{early[1]}{tail}", "index", True)
        elif index == "t" or (len(index) == 1 and f"_{{{index}-1}}" in text):
            yield Slip(label, *place, f"{head}_{{{index}-1}}{tail}", "index", True)
        accents = {"alpha": ("bar", ""), "beta": ("tilde", "")}
        if letter in accents and (match["accent"] or "") in accents[letter]:
            accent = "" if match["accent"] else rf"\{accents[letter][0]}"
            new = rf"{accent}\{letter}{subscript}{tail}"
            yield Slip(label, *place, new, letter, True)
        known = name.split("_")[0] in reader.POSITIVE
        if known and not text[: match.start()].endswith(r"\sqrt{"):
            yield Slip(label, *place, rf"\sqrt{{{whole}}}", "root")


def signs_and_roots(label: str, text: str) -> Iterator[Slip]:
    """One sign flipped, one root dropped, one root put over a bracket."""
    inside = [m.span() for m in reader.SYMBOL.finditer(text)]
    for match in re.finditer(r"[-+]", text):
        if not any(a <= match.start() < b for a, b in inside):
            other = "+" if match[0] == "-" else "-"
            yield Slip(label, *match.span(), other, "sign")
    for match in ROOTED.finditer(text):
        end = closing(text, match.end() - 1)
        content = text[match.end() : end]
        yield Slip(label, match.start(), end + 1, f"({content})", "root")
    for match in OPENING.finditer(text):
        end = closing(text, match.end() - 1)
        content = re.sub(r"\\right\s*$", "", text[match.end() : end])
        if end > 0 and is_positive(content):
            new = rf"\sqrt{{{content}}}"
            yield Slip(label, match.start(), end + 1, new, "root")


def values(expression: sympy.Expr, seed: int) -> dict[sympy.Symbol, sympy.Float]:
    """A number between 0 and 1 for each symbol, the same for the same name."""
    return {
        s: sympy.Float((sum(map(ord, str(s))) * 0.618034 * (seed + 1)) % 0.9 + 0.05)
        for s in expression.free_symbols
    }


def is_positive(text: str) -> bool:
    """Whether TeX is a sum that is positive for symbols between 0 and 1, as 1 - beta."""
    try:
        expression = reader.parse(text)
    except ValueError:
        return False
    if not all(s.is_positive for s in expression.free_symbols):
        return False
    return all(
        expression.evalf(subs=values(expression, seed)).is_positive for seed in range(5)
    )


def pieces(label: str, text: str) -> list[Any]:
    """What SymPy reads between the equals signs; None where it is no algebra."""
    plain = re.sub(r"\\begin\{aligned\}|\\end\{aligned\}", "", text)
    found: list[Any] = []
    with swapped(label, text):
        for part in range(len(reader.split_outside(plain, "="))):
            try:
                found.append(reader.tex(label, part))
            except ValueError:
                found.append(None)
    return found


@contextlib.contextmanager
def swapped(label: str, text: str) -> Iterator[None]:
    """The reader sees this TeX under this label."""
    page = reader.equations()
    original = page[label]
    page[label] = text
    try:
        yield
    finally:
        page[label] = original


def is_algebra(found: list[Any]) -> bool:
    """Whether something on the right is an expression of symbols."""
    return any(
        isinstance(piece, tuple) or (piece is not None and piece.free_symbols)
        for piece in found[1:]
    )


def differ(left: Any, right: Any) -> bool:
    """Whether two expressions are different functions of their symbols."""
    if isinstance(left, tuple) and isinstance(right, tuple):
        return any(map(differ, left, right))
    if left is None or right is None or isinstance(left, tuple | None):
        return False
    if isinstance(left, sympy.Rel) or isinstance(right, sympy.Rel):
        return type(left) is not type(right) or any(map(differ, left.args, right.args))
    difference = left - right
    if difference == 0:
        return False
    for seed in range(2):
        number = difference.evalf(30, subs=values(difference, seed))
        if not number.is_number or abs(number) > 1e-15:
            return True
    return bool(sympy.simplify(difference) != 0)


def is_name(text: str) -> bool:
    """Whether the left-hand side only names something, as in J(sigma) or sigma^2."""
    left = reader.split_outside(text.replace(r"\begin{aligned}", ""), "=")[0]
    named = reader.SYMBOL.match(left.strip(" &\n"))
    rest = left.strip(" &\n")[named.end() :] if named else left
    return re.fullmatch(r"(?:\^2)?\s*(?:\([^()]*\))?", rest) is not None


def slips(label: str, text: str) -> list[Slip]:
    """Every slip of the sweep that changes a piece of the equation."""
    original = pieces(label, text)
    if is_name(text):
        original[0] = None  # what is defined may keep its name
    found, seen = [], {text}
    for slip in [*signs_and_roots(label, text), *symbols(label, text)]:
        changed = slip.put(text)
        if changed in seen:
            continue
        seen.add(changed)
        after = pieces(label, changed)
        if len(after) != len(original):
            continue
        if any(map(differ, original, after)):
            found.append(slip)
    return found


def listed(path: Path = LISTED) -> dict[str, Any]:
    """The survivors and the equations that are no algebra, with their reasons."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        return tomllib.load(file)


def sweep(chapter: tool.Chapter) -> Swept:
    """Put every slip into the chapter's algebra and run the checks."""
    result = Swept(chapter.name)
    if not chapter.labels:
        return result
    bench = Bench(chapter)
    excused = {entry["label"] for entry in listed().get("not_algebra", [])}
    for label in chapter.labels:
        text = bench.page[label]
        if label in excused or not is_algebra(pieces(label, text)):
            result.other.append(label)
            continue
        if not bench.checks(label):
            result.unread.append(label)
            continue
        result.swept.append(label)
        bench.control(label)
        for slip in slips(label, text):
            result.slips += 1
            happened = bench.outcome(slip)
            if happened == "survived":
                result.survivors.append((label, *slip.pair(text)))
            elif happened:
                result.errors.append((label, *slip.pair(text), happened))
    return result


def by_name(name: str) -> Swept:
    """Sweep one chapter, in a process of its own."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # a slip may give roots below 0
    return sweep(tool.load(ROOT / name))


def sweep_all(names: Iterable[str] | None = None, processes: int = 2) -> list[Swept]:
    """Sweep chapters side by side; the order is that of the book."""
    wanted = [c.name for c in tool.load_all() if c.labels]
    if names is not None:
        chosen = set(names)
        wanted = [n for n in wanted if n in chosen]
    if processes == 1 or len(wanted) == 1:
        return [by_name(name) for name in wanted]
    longest = sorted(wanted, key=lambda n: -len(tool.load(ROOT / n).labels))
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        found = {s.chapter: s for s in pool.map(by_name, longest)}
    return [found[name] for name in wanted]


def complaints(result: Swept) -> list[str]:
    """What is wrong with a chapter: survivors not listed, entries out of date."""
    labels = {*result.swept, *result.other, *result.unread}
    entries = [e for e in listed().get("survivor", []) if e["label"] in labels]
    known = {(e["label"], e["old"], e["new"]) for e in entries}
    found = [
        f"{label} is algebra, but its check does not read it" for label in result.unread
    ]
    found += [
        f"{label}: no check sees {old!r} -> {new!r}"
        for label, old, new in result.survivors
        if (label, old, new) not in known
    ]
    found += [
        f"{label}: {old!r} -> {new!r} ends in {what}, not in an AssertionError"
        for label, old, new, what in result.errors
    ]
    gone = known - set(result.survivors)
    found += [
        f"{label}: listed, but caught or gone: {old!r} -> {new!r}"
        for label, old, new in sorted(gone)
    ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chapters", nargs="*", help="notebooks (default: all)")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    try:
        found = sweep_all(options.chapters or None, options.processes)
    except BookError as error:
        print(error, file=sys.stderr)
        return 1
    wrong = [line for result in found for line in complaints(result)]
    print("\n".join(wrong), end="\n" if wrong else "")
    for result in found:
        print(
            f"{result.chapter}: {result.slips} slips in {len(result.swept)} equations, "
            f"{len(result.survivors)} survive"
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
