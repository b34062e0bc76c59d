"""Check one chapter in under a minute: python tools/quick.py book/ddpm/posterior.ipynb

Extraction, lint, the chapter's equation checks, the unit tests of the modules that it
writes, the chapter itself under nbval, and its page.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import build
import chapters as book
from chapters import ROOT


def modules_of(chapter: Path) -> set[str]:
    """The modules of ddpm_core that the chapter writes to."""
    first_lines = [c.source.partition("\n")[0] for c in book.code(chapter, "export")]
    return {Path(line.removeprefix("# file: ")).stem for line in first_lines}


def tests_of(modules: set[str]) -> list[str]:
    """The unit tests that import one of these modules."""
    found = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        lines = re.findall(r"^\s*from ddpm_core(?:\.(\w+))? import (.+)$", text, re.M)
        names = {m for module, rest in lines for m in (module or rest).split(", ")}
        if names & modules:
            found.append(str(path.relative_to(ROOT)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chapter", type=Path)
    chapter = parser.parse_args().chapter.resolve()
    if chapter not in book.chapters():
        parser.error(f"{chapter} is no chapter of _toc.yml")
    name = str(chapter.relative_to(ROOT))
    python = sys.executable
    steps = [
        [python, "tools/extract.py", "--check"],
        [python, "-m", "ruff", "check", "--quiet", "ddpm_core", "tools", "tests"],
        [python, "-m", "mypy", "ddpm_core", "tools"],
        [python, "tools/equations.py", "--chapter", name],
        [python, "-m", "pytest", "-q", "--nbval", *tests_of(modules_of(chapter)), name],
    ]
    for step in steps:
        print("$", " ".join(["python", *step[1:]]), flush=True)
        if subprocess.run(step, cwd=ROOT, check=False).returncode:
            return 1
    return build.build(keep=True)


if __name__ == "__main__":
    sys.exit(main())
