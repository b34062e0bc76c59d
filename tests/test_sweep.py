"""Every small slip in the TeX of an equation that is algebra makes its check fail."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import equations
import sweep as tool

CHAPTERS = [chapter.name for chapter in equations.load_all() if chapter.labels]


@pytest.fixture(scope="module")
def swept():
    """All chapters, in two processes."""
    return {result.chapter: result for result in tool.sweep_all()}


@pytest.mark.parametrize("name", CHAPTERS)
def test_no_slip_survives_unless_it_is_listed(swept, name):
    assert tool.complaints(swept[name]) == []


def test_every_listed_entry_stands_in_the_book_and_has_a_reason():
    labels = {label for c in equations.load_all() for label in c.labels}
    for kind in ("survivor", "not_algebra"):
        for entry in tool.listed().get(kind, []):
            assert entry["label"] in labels
            assert len(entry["reason"]) > 20


def made(text):
    """The TeX after each slip."""
    label = "eq-posterior-variance"
    with tool.swapped(label, text):
        return {slip.put(text) for slip in tool.slips(label, text)}


def test_each_kind_of_slip_is_made():
    found = made(r"x_t = \sqrt{\alpha_t} x_{t-1} + (1 - \tilde\beta_t) \cdot z")
    assert found >= {
        r"x_t = \sqrt{\alpha_t} x_{t-1} - (1 - \tilde\beta_t) \cdot z",
        r"x_t = \sqrt{\alpha_t} x_{t-1} + (1 + \tilde\beta_t) \cdot z",
        r"x_t = (\alpha_t) x_{t-1} + (1 - \tilde\beta_t) \cdot z",
        r"x_t = \sqrt{\alpha_t} x_{t-1} + \sqrt{1 - \tilde\beta_t} \cdot z",
        r"x_t = \sqrt{\alpha_{t-1}} x_{t-1} + (1 - \tilde\beta_t) \cdot z",
        r"x_t = \sqrt{\alpha_t} x_t + (1 - \tilde\beta_t) \cdot z",
        r"x_t = \sqrt{\bar\alpha_t} x_{t-1} + (1 - \tilde\beta_t) \cdot z",
        r"x_t = \sqrt{\alpha_t} x_{t-1} + (1 - \beta_t) \cdot z",
    }


def test_a_change_that_changes_nothing_is_no_slip():
    assert not any("+ 0" in text for text in made(r"a = 0 \cdot b - 0"))
    assert made(r"a = (b - c)^2") == {r"a = (b + c)^2"}
    assert r"a = (c + b)^2 - 0" not in made(r"a = (c + b)^2 + 0")


def test_a_slip_is_named_by_words_that_stand_once():
    text = r"a = \beta_t + \beta_t"
    slips = tool.slips("eq-posterior-variance", text)
    pairs = [slip.pair(text) for slip in slips]
    assert len(pairs) == len(set(pairs)) > 4
    for old, new in pairs:
        assert text.count(old) == 1
        assert old != new


def bench(*cells):
    """A bench for one invented chapter whose equation is that of the posterior."""
    made = [
        equations.Cell("a.ipynb", str(i), "code", source, frozenset({tag}), "")
        for i, (tag, source) in enumerate(cells)
    ]
    path = tool.ROOT / "book" / "ddpm" / "posterior.ipynb"
    return tool.Bench(equations.Chapter(path, made, ["eq-posterior-variance"]))


IMPORTS = ("setup", "from ddpm_core.equations import evaluate, tex\nimport functools")
KNOWN = "beta_t=0.5, alpha_bar_t=0.3, alpha_bar_t_minus_1=0.6"
FIRST = "# checks: eq-posterior-variance\n"


def test_a_weak_check_lets_a_slip_survive_and_a_strong_one_does_not():
    weak = bench(IMPORTS, ("check", FIRST + 'assert tex("eq-posterior-variance") != 0'))
    line = (
        f'x = evaluate("eq-posterior-variance", {KNOWN})\nassert abs(x - 2 / 7) < 1e-9'
    )
    strong = bench(IMPORTS, ("check", FIRST + line))
    text = strong.page["eq-posterior-variance"]
    slips = tool.slips("eq-posterior-variance", text)
    assert {weak.outcome(slip) for slip in slips} == {"survived"}
    caught = [slip for slip in slips if strong.outcome(slip) == ""]
    assert len(caught) > 5


def test_a_cache_in_a_chapter_does_not_hide_a_slip():
    line = (
        f'read = functools.cache(evaluate)\nx = read("eq-posterior-variance", {KNOWN})'
    )
    late = f'y = read("eq-posterior-variance", {KNOWN})\nassert abs(y - 2 / 7) < 1e-9'
    cached = bench(IMPORTS, ("check", FIRST + line), ("check", FIRST + late))
    assert len(cached.checks("eq-posterior-variance")) == 2
    text = cached.page["eq-posterior-variance"]
    sign = next(
        s for s in tool.slips("eq-posterior-variance", text) if s.kind == "sign"
    )
    assert cached.outcome(sign) == ""


def test_a_state_that_is_used_up_makes_the_check_run_from_its_start():
    lines = [
        "count = iter([1, 2])",
        f'x = evaluate("eq-posterior-variance", {KNOWN}) + next(count)',
        "assert abs(x - 9 / 7) < 1e-9",
    ]
    used = bench(IMPORTS, ("check", FIRST + "\n".join(lines)))
    used.control("eq-posterior-variance")
    assert used.whole == {"eq-posterior-variance"}
