"""Execute chapters top to bottom in a fresh kernel and store their outputs.

python tools/refresh.py             all chapters
python tools/refresh.py CHAPTER...  the named ones
python tools/refresh.py --stale     those whose code, modules or weights changed
python tools/refresh.py --check     list the stale ones and old results; change nothing
python tools/refresh.py --address   write the book's address into the set-up cells
"""

import argparse
import ast
import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import chapters as book
import extract
import results
from chapters import ROOT, BookError

PACKAGE = ROOT / "ddpm_core"
KEY = "ddpm_core_digest"
ADDRESS_LINE = re.compile(r'^repository = ".*?"', re.M)
ADDRESS = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+")


def imported(source: str) -> set[str]:
    """The modules of ddpm_core that Python source imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "ddpm_core":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "ddpm_core."
        ):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            names = [a.name.split(".") for a in node.names]
            found |= {n[1] for n in names if n[0] == "ddpm_core" and len(n) > 1}
    return {name for name in found if (PACKAGE / f"{name}.py").exists()}


def modules_behind(sources: list[str]) -> list[str]:
    """The modules that the sources import, and all that those import in turn."""
    found: set[str] = set()
    queue = set().union(*(imported(s) for s in sources)) if sources else set()
    while queue:
        found |= queue
        texts = [(PACKAGE / f"{m}.py").read_text(encoding="utf-8") for m in queue]
        queue = set().union(*(imported(t) for t in texts)) - found
    return sorted(found)


def digest(path: Path) -> str:
    """What the outputs depend on: code, modules, equations, weights and their cards."""
    cells = book.code(path)
    sources = [ADDRESS_LINE.sub('repository = ""', c.source) for c in cells]
    python = [re.sub(r"^(\s*)[%!].*$", r"\1pass", s, flags=re.M) for s in sources]
    together = "\n".join(sources)
    loaders = r'load_(pretrained|features|reference)\(\s*"([\w-]+)"'
    weights = set[str]()
    for kind, name in re.findall(loaders, together):
        own = name if kind == "pretrained" else f"features/{name}"
        weights |= {own, f"{own}-reference"}
    equations = sorted(book.labelled(book.prose(path)))
    parts = [together.encode(), *results.bytes_behind(modules_behind(python), weights)]
    parts += [f"{label}={tex}".encode() for label, tex in equations]
    shown = sorted(set(re.findall(r'read_result\(\s*"([\w-]+)"', together)))
    stored = [results.FOLDER / f"{name}.json" for name in shown]
    stored += [PACKAGE / "weights" / f"{name}.json" for name in sorted(weights)]
    return results.digest([*parts, *(p.read_bytes() for p in stored if p.exists())])


def is_stale(path: Path) -> bool:
    """Whether the stored outputs were made from something else."""
    return bool(book.read_notebook(path)["metadata"].get(KEY) != digest(path))


def stale() -> list[Path]:
    """The chapters whose stored outputs are out of date."""
    return [path for path in book.chapters() if is_stale(path)]


def cleaned(output: dict[str, Any]) -> dict[str, Any]:
    """An output without what differs from run to run."""
    if "metadata" in output:
        output["metadata"] = {}
    return output


def execute(path: Path) -> None:
    """Run one chapter and store its outputs, whole or not at all."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [cleaned(o) for o in cell.outputs]
            cell.metadata.pop("execution", None)
    notebook.metadata = {
        "kernelspec": {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
        KEY: digest(path),
    }
    book.write_notebook(path, notebook)


def refresh(paths: list[Path]) -> None:
    """Execute chapters in order; refuses when the package is not what they say."""
    different = extract.differences()
    if different:
        raise BookError("\n".join(["extract first: the package differs", *different]))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), before]))
    for path in paths:
        old = path.read_text(encoding="utf-8")
        execute(path)
        same = old == path.read_text(encoding="utf-8")
        print(
            f"{path.relative_to(ROOT)}: {'unchanged' if same else 'refreshed'}",
            flush=True,
        )


def address() -> str:
    """The book's address: BOOK_REPOSITORY, else pyproject.toml; empty if not set."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    found = os.environ.get("BOOK_REPOSITORY") or project["urls"].get("Repository", "")
    if found and not ADDRESS.fullmatch(found):
        raise BookError(
            f"the address must be https://github.com/OWNER/NAME, not {found!r}"
        )
    return str(found)


def write_address() -> list[str]:
    """Put the address into the set-up cells; returns the chapters that changed."""
    line, changed = f'repository = "{address()}"', []
    for path in book.chapters():
        notebook = book.read_notebook(path)
        for cell in notebook["cells"]:
            if "setup" in cell["metadata"].get("tags", []):
                cell["source"] = ADDRESS_LINE.sub(line, book.source_of(cell))
        if notebook != book.read_notebook(path):
            book.write_notebook(path, notebook)
            changed.append(path.relative_to(ROOT).as_posix())
    return changed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "chapters", nargs="*", type=Path, help="notebooks (default: all)"
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--stale", action="store_true", help="only the stale ones")
    group.add_argument("--check", action="store_true", help="list the stale ones")
    group.add_argument(
        "--address", action="store_true", help="write the book's address"
    )
    options = parser.parse_args()
    try:
        if options.address:
            print("\n".join(write_address()) or "nothing changed")
            return 0
        if options.check:
            found = [p.relative_to(ROOT).as_posix() for p in stale()]
            print("\n".join(f"stale: {p}" for p in found) or "all outputs are fresh")
            print(*results.old(), sep="\n", end="\n" if results.old() else "")
            return 1 if found else 0
        named = [p.resolve() for p in options.chapters]
        refresh(stale() if options.stale else named or book.chapters())
    except BookError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
