"""Write the package ddpm_core from the chapters' cells tagged `export`.

python tools/extract.py           write the package, linted and imported first
python tools/extract.py --check   change nothing; fail if the package differs
python tools/extract.py --back    carry edits of the package back into the cells
"""

import argparse
import ast
import difflib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import chapters as book
from chapters import ROOT, BookError, Cell

PACKAGE = "ddpm_core"
MARK = re.compile(r"^# --- (\S+) · (\S+) ·.*$", re.M)
LONGEST = 40
RUNS = (
    "an export cell holds imports, functions, classes and constants, nothing that runs"
)


@dataclass
class Block:
    """What one export cell gives to its module."""

    cell: Cell
    module: str
    imports: list[str]
    body: str
    names: list[str]

    @property
    def mark(self) -> str:
        place = f"# --- {self.cell.chapter} · {self.cell.id} ·"
        room = 88 - len(place) - 1
        heading = textwrap.shorten(self.cell.heading, room, placeholder="...")
        return f"{place} {heading}".rstrip()


@dataclass
class Module:
    """One module of the package, built up cell by cell."""

    name: str
    blocks: list[Block] = field(default_factory=list)

    def add(self, block: Block) -> None:
        known = {name: b.cell for b in self.blocks for name in b.names}
        for name in block.names:
            if name in known:
                raise BookError(
                    f"{block.cell}: {name} is already defined in {known[name]}"
                )
        self.blocks.append(block)

    def text(self) -> str:
        sources = dict.fromkeys(b.cell.chapter for b in self.blocks)
        listed = "".join(f"\n- {chapter}" for chapter in sources)
        doc = f'"""Written by tools/extract.py; edit the chapters:\n{listed}\n"""\n'
        names = [n for b in self.blocks for n in b.names if not n.startswith("_")]
        exported = f"__all__ = {json.dumps(sorted(set(names)))}"
        imports = dict.fromkeys(i for b in self.blocks for i in b.imports)
        header = tidy("\n".join([doc, *imports, "", exported, ""]))
        bodies = [f"{b.mark}\n{b.body}" for b in self.blocks if b.body]
        if "main" in names:
            bodies.append('if __name__ == "__main__":\n    main()')
        return header.rstrip() + "\n\n\n" + "\n\n\n".join(bodies) + "\n"


def ruff(*arguments: str, text: str) -> str:
    """Pass `text` through one ruff command."""
    command = [
        sys.executable,
        "-m",
        "ruff",
        *arguments,
        "--stdin-filename",
        "header.py",
        "-",
    ]
    done = subprocess.run(
        command,
        input=text,
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
        check=False,
    )
    if done.returncode:
        raise BookError(done.stdout + done.stderr)
    return done.stdout


def tidy(header: str) -> str:
    """Merge and sort the imports and `__all__` of a module."""
    rules = "I001,RUF022"
    fixed = ruff("check", "--quiet", "--fix", "--select", rules, text=header)
    return ruff("format", text=fixed)


def defined(node: ast.stmt, cell: Cell) -> list[str]:
    """The names that a top-level statement defines; refuses statements that run."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        check_length(node, cell)
        return [node.name]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    if isinstance(node, ast.Assign) and all(
        isinstance(t, ast.Name) for t in node.targets
    ):
        return [t.id for t in node.targets if isinstance(t, ast.Name)]
    raise BookError(f"{cell}: line {node.lineno}: {RUNS}")


def check_length(
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, cell: Cell
) -> None:
    """Refuse a function, method or class body that no reader takes in at once."""
    functions = [n for n in ast.walk(node) if isinstance(n, ast.FunctionDef)]
    for f in functions:
        first = f.body[1] if ast.get_docstring(f) and len(f.body) > 1 else f.body[0]
        lines = (f.end_lineno or 0) - first.lineno + 1
        if lines > LONGEST:
            raise BookError(f"{cell}: {f.name} has {lines} lines; at most {LONGEST}")


def block_of(cell: Cell) -> Block:
    """Split an export cell into its module, its imports and its body."""
    first, _, rest = cell.source.partition("\n")
    match = re.fullmatch(r"# file: ddpm_core/([a-z_]+)\.py", first)
    if match is None:
        raise BookError(f"{cell}: the first line must be `{book.FILE_LINE}MODULE.py`")
    if re.search(r"^\s*[%!]", rest, re.M):
        raise BookError(f"{cell}: a magic or shell line cannot go into the package")
    try:
        tree = ast.parse(rest)
    except SyntaxError as error:
        raise BookError(f"{cell}: line {error.lineno}: {error.msg}") from error
    lines = rest.split("\n")
    imports, names = [], []
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports.append(ast.unparse(node))
            for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[number] = ""
        else:
            names += defined(node, cell)
    body = re.sub(r"\n{3,}", "\n\n\n", "\n".join(lines)).strip("\n")
    return Block(cell, match[1], imports, body, names)


def modules(root: Path = ROOT) -> dict[str, Module]:
    """The package that the chapters describe: module name -> module."""
    found: dict[str, Module] = {}
    for path in book.chapters(root):
        for cell in book.code(path, "export", root=root):
            block = block_of(cell)
            found.setdefault(block.module, Module(block.module)).add(block)
    return found


def equations(root: Path = ROOT) -> dict[str, str]:
    """The labelled equations of all pages: label -> TeX."""
    found: dict[str, str] = {}
    for page in book.pages(root):
        for label, text in book.labelled(book.prose(page, root)):
            if label in found:
                raise BookError(
                    f"{page.relative_to(root)}: the label {label} stands twice"
                )
            found[label] = text
    return found


def package(root: Path = ROOT) -> dict[str, str]:
    """Every extracted file: name in the package -> text."""
    texts = {f"{m.name}.py": m.text() for m in modules(root).values()}
    texts["equations.json"] = (
        json.dumps(equations(root), indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    )
    return texts


def cell_at(text: str, line: int) -> str:
    """The chapter and cell that line `line` (from 1) of a module comes from."""
    above = "\n".join(text.split("\n")[:line])
    marks = MARK.findall(above)
    return f"{marks[-1][0]}, cell {marks[-1][1]}" if marks else "the module's header"


def differences(root: Path = ROOT) -> list[str]:
    """How the committed package differs from the chapters, each with its cell."""
    wanted, found = package(root), []
    folder = root / PACKAGE
    have = {p.name for p in folder.glob("*.py")} - {"__init__.py"}
    found += [
        f"{PACKAGE}/{name} comes from no chapter" for name in sorted(have - set(wanted))
    ]
    for name, text in wanted.items():
        path = folder / name
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        if old == text:
            continue
        a, b = old.split("\n"), text.split("\n")
        for op, _, _, low, high in difflib.SequenceMatcher(None, a, b).get_opcodes():
            if op != "equal":
                found.append(f"{PACKAGE}/{name}: differs from {cell_at(text, low + 1)}")
                found += [f"    + {line}" for line in b[low : min(high, low + 3)]]
    return list(dict.fromkeys(found))


def run_python(cwd: Path, *arguments: str) -> None:
    """Run one command of the gate; on failure raise with what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        raise BookError((done.stdout + done.stderr).strip())


def located(message: str, texts: dict[str, str]) -> str:
    """Name the cell behind each `module.py:line` in a linter's message."""

    def name(match: re.Match[str]) -> str:
        return f"{match[0]} [{cell_at(texts.get(match[1], ''), int(match[2]))}]"

    return re.sub(r"([a-z_]+\.py):(\d+)", name, message)


def gate(aside: Path, texts: dict[str, str]) -> None:
    """Lint and import a package that was written aside; raise if it fails."""
    config = str(ROOT / "pyproject.toml")
    cache = str(ROOT / ".mypy_cache")
    names = sorted(n.removesuffix(".py") for n in texts if n.endswith(".py"))
    imports = "; ".join(f"import {PACKAGE}.{n}" for n in names)
    ruff_check = ["ruff", "check", "--quiet", "--output-format=concise"]
    try:
        run_python(aside, "-m", *ruff_check, "--config", config, PACKAGE)
        run_python(
            aside, "-m", "ruff", "format", "--check", "--config", config, PACKAGE
        )
        mypy = ["mypy", "--config-file", config, "--cache-dir", cache]
        run_python(aside, "-m", *mypy, PACKAGE)
        run_python(aside, "-W", "error::SyntaxWarning", "-c", imports)
    except BookError as error:
        raise BookError(located(str(error), texts)) from error


def write(root: Path = ROOT) -> list[str]:
    """Write the package; returns the names of the files that changed."""
    texts, folder = package(root), root / PACKAGE
    with tempfile.TemporaryDirectory() as temporary:
        aside = Path(temporary) / PACKAGE
        kept = shutil.ignore_patterns("*.pyc", "__pycache__", *(f for f in texts))
        shutil.copytree(folder, aside, ignore=kept)
        for path in aside.glob("*.py"):
            if path.name != "__init__.py":
                path.unlink()
        for name, text in texts.items():
            (aside / name).write_text(text, encoding="utf-8", newline="\n")
        gate(aside.parent, texts)
    changed = [n for n, t in texts.items() if not same_text(folder / n, t)]
    for name in changed:
        book.write_whole(folder / name, texts[name])
    for path in folder.glob("*.py"):
        if path.name not in texts and path.name != "__init__.py":
            path.unlink()
            changed.append(path.name)
    return changed


def same_text(path: Path, text: str) -> bool:
    """Whether the file holds exactly `text`."""
    return path.exists() and path.read_text(encoding="utf-8") == text


def split_module(text: str) -> tuple[list[str], dict[tuple[str, str], str]]:
    """A module file as its header's imports and its bodies by (chapter, cell id)."""
    marks = list(MARK.finditer(text))
    header = text[: marks[0].start()] if marks else text
    tree = ast.parse(header)
    imports = [
        ast.unparse(n) for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    bodies = {}
    for mark, after in zip(marks, [*marks[1:], None], strict=True):
        body = text[mark.end() : after.start() if after else len(text)].strip("\n")
        guard = '\n\n\nif __name__ == "__main__":\n    main()'
        bodies[mark[1], mark[2]] = body.removesuffix(guard)
    return imports, bodies


def new_source(cell: Cell, imports: list[str], body: str) -> str:
    """The source of an export cell with these imports and this body."""
    first = cell.source.partition("\n")[0]
    head = [first, *imports]
    return "\n".join([*head, *(["", body] if imports else [body])])


def back(root: Path = ROOT) -> list[str]:
    """Carry edits of the package into the cells; returns the cells that changed."""
    edits: dict[str, dict[str, str]] = {}
    for module in modules(root).values():
        path = root / PACKAGE / f"{module.name}.py"
        imports, bodies = split_module(path.read_text(encoding="utf-8"))
        wanted, _ = split_module(module.text())
        fresh = [i for i in imports if i not in wanted]
        for block in module.blocks:
            body = bodies.pop((block.cell.chapter, block.cell.id), None)
            if body is None:
                raise BookError(f"{path.name}: the mark of {block.cell} is gone")
            if body == block.body:
                continue
            source = new_source(block.cell, [*block.imports, *fresh], body)
            edits.setdefault(block.cell.chapter, {})[block.cell.id] = source
            fresh = []
        if bodies:
            raise BookError(f"{path.name}: marks of no cell: {sorted(bodies)}")
        if fresh:
            raise BookError(f"{path.name}: new imports {fresh}, but no block changed")
    for chapter, sources in edits.items():
        notebook = book.read_notebook(root / chapter)
        for cell in notebook["cells"]:
            cell["source"] = sources.get(cell["id"], book.source_of(cell))
        book.write_notebook(root / chapter, notebook)
    return [f"{chapter}, cell {i}" for chapter, s in edits.items() for i in s]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--check", action="store_true", help="change nothing; report")
    group.add_argument("--back", action="store_true", help="package edits -> cells")
    options = parser.parse_args()
    try:
        if options.check:
            found = differences()
            print(
                "\n".join(found)
                if found
                else "in sync: ddpm_core is what the chapters say"
            )
            return 1 if found else 0
        changed = back() if options.back else write()
    except BookError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(f"changed: {c}" for c in changed) if changed else "nothing changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
