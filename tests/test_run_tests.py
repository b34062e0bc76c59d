"""The table of minutes: which test counts where, and when a chapter is over its share."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import run_tests as tool

CHAPTER = "book/ddpm/posterior.ipynb"


@pytest.mark.parametrize(
    ("nodeid", "group"),
    [
        (f"{CHAPTER}::Cell 3", "chapters"),
        (f"tests/test_sweep.py::test_no_slip[{CHAPTER}]", "checks and mutants"),
        (f"tests/test_chapters.py::test_form[{CHAPTER}]", "unit tests"),
        ("tests/site/test_pages.py::test_page[posterior]", "site"),
        ("ddpm_core/losses.py::ddpm_core.losses.elbo", "unit tests"),
    ],
)
def test_where_a_test_counts(nodeid: str, group: str) -> None:
    assert tool.group_of(nodeid) == group


@pytest.mark.parametrize(
    ("factor", "lines", "over"), [(0.9, 0, 0), (2, 1, 0), (4, 1, 1)]
)
def test_only_chapters_have_a_share(factor: float, lines: int, over: int) -> None:
    minutes = tool.Minutes({})
    share = 15
    for nodeid, seconds in (
        (f"{CHAPTER}::Cell 1", factor * share / 2),
        (f"{CHAPTER}::Cell 2", factor * share / 2),
        (f"tests/test_sweep.py::test_no_slip[{CHAPTER}]", 1000),
    ):
        minutes.pytest_runtest_logreport(
            SimpleNamespace(nodeid=nodeid, duration=seconds)
        )
    assert len(minutes.budget()) == lines
    assert minutes.over == [CHAPTER][:over]
    assert minutes.seconds["checks and mutants"] == 1000
