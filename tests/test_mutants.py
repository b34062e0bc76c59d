"""Every check fails on a slip: each mutant is caught by the check it names."""

import functools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import equations as tool
import sweep

MUTANTS = tool.mutants()


def title(mutant):
    return f"{mutant.label}: {mutant.slip}" if mutant.slip else mutant.label


@functools.cache
def bench(chapter):
    """The chapter's checks, run once; a slip in the TeX resumes them where it is read."""
    return sweep.Bench(tool.load(tool.ROOT / chapter))


def resumed(mutant):
    """Whether a slip in the TeX of its own label is caught by the resumed check.

    None where the slip is elsewhere, or its check does not read the TeX: those are
    run from the chapter's start.
    """
    prose = tool.book.prose(tool.ROOT / mutant.chapter)
    if mutant.old not in prose:
        return None
    _, changed = tool.mutated(mutant)
    before, after = dict(tool.book.labelled(prose)), dict(tool.book.labelled(changed))
    if [k for k in after if after[k] != before.get(k)] != [mutant.label]:
        return None
    checks = bench(mutant.chapter)
    if before.keys() != after.keys() or not checks.checks(mutant.label):
        return None
    checks.control(mutant.label)
    try:
        checks.run(mutant.label, after[mutant.label])
    except AssertionError:
        return True
    except Exception:
        return None
    return False


@pytest.mark.parametrize("mutant", MUTANTS, ids=title)
def test_the_check_catches_the_slip(mutant):
    assert resumed(mutant) or tool.caught_by(mutant)


def test_every_equation_has_a_mutant():
    labels = {label for chapter in tool.load_all() for label in chapter.labels}
    assert labels - {m.label for m in MUTANTS} == set()
    assert {m.label for m in MUTANTS} - labels == set()
