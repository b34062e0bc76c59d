"""Every labelled equation has a check, and every check passes."""

import contextlib
import sys
from pathlib import Path

import pytest
import sympy

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import equations as tool
from chapters import BookError, Cell

CHAPTERS = tool.load_all()


def test_no_label_without_a_check():
    assert list(tool.problems(CHAPTERS)) == []


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda c: c.name)
def test_checks_pass(chapter):
    assert tool.run_checks(chapter) == []


def test_definitions_are_those_of_the_notation_page():
    """A label `def-...` needs no check, so it must not become a way around one."""
    notation = (tool.ROOT / "book" / "notation.md").read_text(encoding="utf-8")
    for page in tool.book.pages():
        for label, _ in tool.book.labelled(tool.book.prose(page)):
            if label.startswith("def-"):
                assert f"`{label}`" in notation, f"{label} is not on the notation page"


def cell(id, source, *tags):
    return Cell("a.ipynb", id, "code", source, frozenset(tags), "")


def test_needed_takes_only_the_checks_a_check_builds_on():
    cells = [
        cell("1", "import math", "setup"),
        cell("2", "# checks: eq-a-one\nbase = 1\nassert base", "check"),
        cell("3", "# checks: eq-a-two\nassert 2", "check"),
        cell("4", "# checks: eq-a-three\nassert base == 1", "check"),
    ]
    assert [c.id for c in tool.needed(cells, "eq-a-three")] == ["1", "2", "4"]


def test_another_check_may_fail_on_the_way_to_a_mutant():
    cells = [
        cell("1", "# checks: eq-a-one\nbase = 1\nassert False", "check"),
        cell("2", "# checks: eq-a-two\nassert base == 2", "check"),
    ]
    with pytest.raises(AssertionError):
        tool.execute(cells, "eq-a-two")
    tool.execute(cells[:1], "eq-a-two")
    with pytest.raises(AssertionError):
        tool.execute(cells[:1])


def test_a_check_must_name_its_equation():
    with pytest.raises(BookError, match="the first line must be"):
        tool.checked_by(cell("1", "assert True", "check"))


def test_a_mutant_must_stand_exactly_once():
    slip = tool.Mutant("book/workshop/equations.ipynb", "eq-a-b", "import", "export")
    with pytest.raises(BookError, match="not once"):
        tool.mutated(slip)


def test_quick_parsing_reads_every_equation_as_full_parsing_does(monkeypatch):
    """Of the pieces that the checks parse, every eighth, and those with an integral."""
    texts, shape = [], tool.reader.shape
    monkeypatch.setattr(
        tool.reader, "shape", lambda text: texts.append(text) or shape(text)
    )
    tool.reader.parse.cache_clear()
    for chapter in CHAPTERS:
        for label in chapter.labels:
            with contextlib.suppress(ValueError):  # not algebra
                tool.reader.tex(label)
    assert len(texts) > 100
    for text in [*texts[::8], *(t for t in texts if "int" in t)]:
        found = []
        for parse in (tool.quick_first, tool.full_parse):
            try:
                found.append(sympy.srepr(parse(text, strict=True)))
            except tool.LaTeXParsingError as error:
                found.append(str(error))
        assert found[0] == found[1], text


def test_what_quick_parsing_cannot_read_is_parsed_in_full(monkeypatch):
    text = r"\frac{1}{2} \int_{Z_{0}}^{Z_{1}} \frac{Z_{2}}{Z_{3}} \, du"
    assert tool.quick_first(text, strict=True).has(sympy.Integral)
    assert tool.grammar.LaTeXParser is not tool.QuickParser
    monkeypatch.setattr(tool.grammar, "LaTeXParser", tool.QuickParser)
    with pytest.raises(tool.LaTeXParsingError):
        tool.full_parse(text)
