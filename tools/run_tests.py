"""Build the book, then run every test, one file on each core; print the minutes.

python tools/run_tests.py [more pytest arguments]
"""

import os
import sys
import time
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import build
from chapters import ROOT

# minutes of work; the tests share the cores
PLANNED = {
    "install": 3.0,
    "build": 1.0,
    "unit tests": 8.0,
    "checks and mutants": 5.0,
    "chapters": 16.0,
    "site": 6.0,
}
OPTIONAL = ("gpu", "network", "data", "prove")


def file_of(nodeid: str) -> str:
    """The file that a test stands in; a parameter's name may hold another's."""
    return nodeid.split("::")[0]


def group_of(nodeid: str) -> str:
    """The row of the table that a test belongs to."""
    if file_of(nodeid).endswith(".ipynb"):
        return "chapters"
    if nodeid.startswith("tests/site"):
        return "site"
    kinds = ("tests/test_mutants", "tests/test_equation_checks", "tests/test_sweep")
    if nodeid.startswith(kinds):
        return "checks and mutants"
    return "unit tests"


class Minutes:
    """Measures the groups of tests, and the chapters against their shares."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.start = time.perf_counter() - sum(seconds.values())
        self.seconds = defaultdict(float, seconds)
        self.chapters: dict[str, float] = defaultdict(float)
        self.over: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[group_of(report.nodeid)] += report.duration
        if group_of(report.nodeid) == "chapters":
            self.chapters[file_of(report.nodeid)] += report.duration

    def budget(self) -> list[str]:
        """Chapters over their share; three times over is a failure."""
        with (ROOT / "tests" / "budget.toml").open("rb") as file:
            shares = tomllib.load(file)["seconds"]
        lines = []
        for chapter, seconds in self.chapters.items():
            share = shares.get(chapter, shares["default"])
            if seconds > share:
                lines.append(
                    f"over budget: {chapter} took {seconds:.0f} s of {share} s"
                )
            if seconds > 3 * share:
                self.over.append(chapter)
        return lines

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        write = terminalreporter.write_line
        terminalreporter.section("minutes: measured beside planned")
        for name, planned in PLANNED.items():
            write(f"{name:20} {self.seconds[name] / 60:5.1f} {planned:5.1f}")
        total = time.perf_counter() - self.start
        write(f"{'all, by the clock':20} {total / 60:5.1f}")
        for line in self.budget():
            write(line)
        write(
            f"not run here: those marked {', '.join(OPTIONAL)}; run: pytest -m MARKER"
        )


def install_seconds() -> float:
    """How long `make` took to install, as it noted."""
    noted = ROOT / ".venv" / ".install-seconds"
    return float(noted.read_text(encoding="utf-8")) if noted.exists() else 0.0


def main() -> int:
    start = time.perf_counter()
    if build.build():
        return 1
    seconds = {"install": install_seconds(), "build": time.perf_counter() - start}
    minutes = Minutes(seconds)
    units = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob("test_*.py"))
    # The longest files first, so that no core is left with one at the end.
    order = ["tests/site", "book", *units, "ddpm_core"]
    arguments = ["--doctest-modules", "--nbval", "-q", f"--rootdir={ROOT}", *order]
    arguments += ["--numprocesses=logical", "--dist=loadfile"]
    arguments += ["--no-loadscope-reorder", "--maxprocesses=4"]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    code = pytest.main([*arguments, *sys.argv[1:]], plugins=[minutes])
    if minutes.over:
        print(f"three times over budget: {', '.join(minutes.over)}")
        return 1
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
