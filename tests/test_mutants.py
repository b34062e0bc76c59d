"""Every check fails on a slip: each mutant is caught by the check it names."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import equations as tool

MUTANTS = tool.mutants()


def title(mutant):
    return f"{mutant.label}: {mutant.slip}" if mutant.slip else mutant.label


@pytest.mark.parametrize("mutant", MUTANTS, ids=title)
def test_the_check_catches_the_slip(mutant):
    assert tool.caught_by(mutant)


def test_every_equation_has_a_mutant():
    labels = {label for chapter in tool.load_all() for label in chapter.labels}
    assert labels - {m.label for m in MUTANTS} == set()
    assert {m.label for m in MUTANTS} - labels == set()
