"""Build the book strictly and print the path of its first page: python tools/build.py

--keep   reuse the pages of the last build where they did not change
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "_build" / "html" / "index.html"


def build(keep: bool = False) -> int:
    """Run Jupyter Book with warnings as errors; returns its exit code."""
    if not keep:
        shutil.rmtree(ROOT / "_build", ignore_errors=True)
    program = Path(sys.executable).parent / "jupyter-book"
    command = [str(program), "build", ".", "-W", "-n", "--keep-going"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False
    )
    if done.returncode or not PAGE.exists():
        print(done.stdout + done.stderr)
        return done.returncode or 1
    print(PAGE)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", action="store_true", help="reuse unchanged pages")
    sys.exit(build(parser.parse_args().keep))
