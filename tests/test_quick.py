"""Which unit tests `make quick` runs for a chapter."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import quick
from chapters import ROOT


@pytest.mark.parametrize(
    ("chapter", "tests"),
    [
        ("ddpm/posterior", {"test_posterior"}),
        ("ddpm/bound", {"test_bound"}),
        ("ddpm/sampling", {"test_samplers", "test_devices"}),
        ("ddpm/reverse", set()),  # exports nothing
        ("workshop/interchange", {"test_interchange"}),
        ("workshop/command_line", {"test_train"}),
    ],
)
def test_a_chapter_has_its_own_unit_tests(chapter: str, tests: set[str]) -> None:
    found = {Path(name).stem for name in quick.tests_of(ROOT / f"book/{chapter}.ipynb")}
    assert found >= tests
    assert len(found) <= len(tests) + 1


def test_names_that_a_source_uses() -> None:
    source = "from ddpm_core.ema import EMA\nfrom ddpm_core import files\nfiles.digest"
    assert quick.used(source) >= {"ema.EMA", "files.digest"}
