"""Check one chapter in under a minute: python tools/quick.py book/ddpm/posterior.ipynb

Extraction, lint, the chapter's equation checks, the unit tests of what it exports, the
chapter itself under nbval, and its page; two steps at a time.
"""

import argparse
import ast
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import chapters as book
from chapters import ROOT


def exported(chapter: Path) -> set[str]:
    """What the chapter writes into the package, as `module.name`."""
    found = set()
    for cell in book.code(chapter, "export"):
        module = Path(cell.source.partition("\n")[0].removeprefix("# file: ")).stem
        for node in ast.parse(cell.source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(f"{module}.{node.name}")
    return found


def used(source: str) -> set[str]:
    """The functions and classes of ddpm_core that Python source uses, likewise."""
    tree, found = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "ddpm_core."
        ):
            module = (node.module or "").split(".")[1]
            found |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(f"{node.value.id}.{node.attr}")
    return found


def tests_of(chapter: Path) -> list[str]:
    """The unit tests of a chapter: named like it or its module, or using its exports.

    A test file belongs to the chapters that fit best: first by name, then by the part
    of a chapter's exports that it uses.
    """
    exports = {other: exported(other) for other in book.chapters()}
    found = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        names = used(path.read_text(encoding="utf-8"))
        fits = {}
        for other, own in exports.items():
            stems = {other.stem, *(name.partition(".")[0] for name in own)}
            named = any(f"test_{stem}" == path.stem for stem in stems)
            fits[other] = (named, len(names & own) / max(len(own), 1))
        if fits[chapter] > (False, 0) and fits[chapter] == max(fits.values()):
            found.append(str(path.relative_to(ROOT)))
    return found


def run(step: list[str]) -> bool:
    """Run one step, then print all it said at once; whether it went well."""
    done = subprocess.run(
        [sys.executable, *step],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(f"$ python {' '.join(step)}\n{done.stdout}", flush=True)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chapter", type=Path)
    chapter = parser.parse_args().chapter.resolve()
    if chapter not in book.chapters():
        parser.error(f"{chapter} is no chapter of _toc.yml")
    name = str(chapter.relative_to(ROOT))
    if not run(["tools/extract.py", "--check"]):
        return 1
    steps = [  # the longest first
        ["-m", "pytest", "-q", "--nbval", name],
        ["tools/build.py", "--keep"],
        ["tools/equations.py", "--chapter", name],
        ["-m", "mypy", "ddpm_core", "tools"],
        ["-m", "ruff", "check", "--quiet", "ddpm_core", "tools", "tests", "benchmarks"],
    ]
    if units := tests_of(chapter):
        steps.insert(1, ["-m", "pytest", "-q", *units])
    with ThreadPoolExecutor(2) as two:
        return 0 if all(list(two.map(run, steps))) else 1


if __name__ == "__main__":
    sys.exit(main())
