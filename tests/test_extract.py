"""The extraction: what it writes, what it refuses, and the way back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import chapters as book
import extract

SHAPES = '''# file: ddpm_core/shapes.py
import math
from collections.abc import Sequence


def area(radius: float) -> float:
    """The area of a disc."""
    return math.pi * radius**2


def total(radii: Sequence[float]) -> float:
    """The area of several discs."""
    return sum(area(r) for r in radii)'''
MORE = '''# file: ddpm_core/shapes.py
from collections.abc import Iterable

from ddpm_core.names import LABEL


def longest(radii: Iterable[float]) -> str:
    """The largest radius, labelled."""
    return f"{LABEL} {max(radii)}"'''
NAMES = '# file: ddpm_core/names.py\nLABEL = "r ="'


def notebook(*sources):
    cells = [
        {"cell_type": "markdown", "id": "title", "metadata": {}, "source": "# Discs"}
    ]
    for i, source in enumerate(sources):
        cell = {"cell_type": "code", "id": f"cell-{i}", "source": source, "outputs": []}
        cells.append(cell | {"metadata": {"tags": ["export"]}, "execution_count": None})
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


@pytest.fixture
def gated(tmp_path):
    """A book of two chapters and a package that nothing was written to yet."""
    (tmp_path / "_toc.yml").write_text("root: a\nchapters:\n- file: b\n")
    book.write_notebook(tmp_path / "a.ipynb", notebook(SHAPES, NAMES))
    book.write_notebook(tmp_path / "b.ipynb", notebook(MORE))
    (tmp_path / "ddpm_core").mkdir()
    (tmp_path / "ddpm_core" / "__init__.py").write_text('"""Small."""\n')
    return tmp_path


@pytest.fixture
def small(gated, monkeypatch):
    """The same without ruff, mypy and imports, which take seconds."""
    monkeypatch.setattr(extract, "gate", lambda aside, texts: None)
    return gated


def change(root, name, old, new):
    path = root / "ddpm_core" / name
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_the_committed_package_is_what_the_chapters_say():
    assert extract.differences() == []


def test_writes_modules_with_merged_imports_and_marks(gated):
    small = gated
    assert sorted(extract.write(small)) == ["equations.json", "names.py", "shapes.py"]
    text = (small / "ddpm_core" / "shapes.py").read_text()
    assert "from collections.abc import Iterable, Sequence" in text
    assert '__all__ = ["area", "longest", "total"]' in text
    assert text.count("\nimport math\n") == 1
    assert "# --- b.ipynb · cell-0 · Discs" in text
    assert extract.write(small) == []
    assert extract.differences(small) == []


def test_a_module_with_main_gets_the_guard(small):
    source = '# file: ddpm_core/run.py\ndef main() -> None:\n    """Do nothing."""'
    book.write_notebook(small / "b.ipynb", notebook(source))
    extract.write(small)
    text = (small / "ddpm_core" / "run.py").read_text()
    assert text.endswith('\n\n\nif __name__ == "__main__":\n    main()\n')
    change(small, "run.py", "Do nothing", "Do very little")
    assert extract.back(small) == ["b.ipynb, cell cell-0"]
    assert extract.differences(small) == []


def test_check_names_the_cell(small):
    extract.write(small)
    change(small, "shapes.py", "radius**2", "radius**3")
    found = extract.differences(small)
    assert found[0] == "ddpm_core/shapes.py: differs from a.ipynb, cell cell-0"


def test_check_sees_a_module_that_no_chapter_writes(small):
    extract.write(small)
    (small / "ddpm_core" / "stray.py").write_text("")
    assert extract.differences(small) == ["ddpm_core/stray.py comes from no chapter"]
    assert extract.write(small) == ["stray.py"]
    assert extract.differences(small) == []


def test_back_carries_an_edit_and_an_import_into_the_cell(small):
    extract.write(small)
    change(small, "shapes.py", "    return math.pi", "    return abs(cmath.pi)")
    change(small, "shapes.py", "import math\n", "import cmath\nimport math\n")
    assert extract.back(small) == ["a.ipynb, cell cell-0"]
    cell = book.cells(small / "a.ipynb", small)[1].source
    assert "import cmath" in cell
    assert "abs(cmath.pi)" in cell
    assert cell.startswith("# file: ddpm_core/shapes.py\n")


def test_back_changes_nothing_without_an_edit(small):
    extract.write(small)
    before = (small / "a.ipynb").read_bytes()
    assert extract.back(small) == []
    assert (small / "a.ipynb").read_bytes() == before


def test_back_refuses_a_lost_mark(small):
    extract.write(small)
    change(small, "shapes.py", "# --- b.ipynb · cell-0 · Discs\n", "")
    with pytest.raises(
        book.BookError, match=r"the mark of b\.ipynb, cell cell-0 is gone"
    ):
        extract.back(small)


REFUSED = {
    "a magic": ("%matplotlib inline", "magic or shell"),
    "a shell line": ("!ls", "magic or shell"),
    "a syntax error": ("def f(:", "line 1"),
    "a call": ("print(1)", "nothing that runs"),
    "a loop": ("for i in range(3):\n    pass", "nothing that runs"),
    "an attribute set": ("import math\nmath.e = 3", "nothing that runs"),
    "a long function": (
        "def f() -> int:\n" + "    x = 1\n" * 41 + "    return x",
        "f has 42 lines",
    ),
}


@pytest.mark.parametrize(("source", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_naming_chapter_and_cell(small, source, message):
    whole = f"# file: ddpm_core/shapes.py\n{source}"
    book.write_notebook(small / "b.ipynb", notebook(whole))
    with pytest.raises(book.BookError, match=message) as caught:
        extract.write(small)
    assert str(caught.value).startswith("b.ipynb, cell cell-0")


def test_refuses_a_cell_without_its_module(small):
    book.write_notebook(small / "b.ipynb", notebook("x = 1"))
    with pytest.raises(book.BookError, match="the first line must be"):
        extract.write(small)


def test_refuses_a_name_defined_twice(small):
    twice = '# file: ddpm_core/shapes.py\ndef area() -> None:\n    """Again."""'
    book.write_notebook(small / "b.ipynb", notebook(twice))
    with pytest.raises(book.BookError, match=r"area is already defined in a\.ipynb"):
        extract.write(small)


def test_refuses_an_unknown_name_and_leaves_the_package_alone(gated):
    small = gated
    extract.write(small)
    before = (small / "ddpm_core" / "shapes.py").read_bytes()
    body = 'def g() -> int:\n    """One."""\n    return nowhere'
    unknown = f"# file: ddpm_core/shapes.py\n{body}"
    book.write_notebook(small / "b.ipynb", notebook(unknown))
    with pytest.raises(book.BookError, match=r"F821.*nowhere") as caught:
        extract.write(small)
    assert "b.ipynb, cell cell-0" in str(caught.value)
    assert (small / "ddpm_core" / "shapes.py").read_bytes() == before


def test_a_label_may_stand_only_once(small):
    twice = notebook(NAMES)
    twice["cells"][0]["source"] = "$$\na = b\n$$ (eq-a-b)\n\n$$\na = c\n$$ (eq-a-b)"
    book.write_notebook(small / "b.ipynb", twice)
    with pytest.raises(book.BookError, match="eq-a-b stands twice"):
        extract.equations(small)


def test_equations_are_collected(small):
    page = notebook(NAMES)
    page["cells"][0]["source"] = "Text.\n\n$$\na = b\n$$ (eq-a-b)\n"
    book.write_notebook(small / "a.ipynb", page)
    book.write_notebook(small / "b.ipynb", notebook())
    extract.write(small)
    found = json.loads((small / "ddpm_core" / "equations.json").read_text())
    assert found == {"eq-a-b": "a = b"}


@pytest.mark.parametrize("tool", ["extract", "equations", "refresh", "quick", "build"])
def test_every_tool_explains_itself(tool):
    command = [sys.executable, f"tools/{tool}.py", "--help"]
    done = subprocess.run(
        command, cwd=book.ROOT, capture_output=True, text=True, check=True
    )
    assert f"python tools/{tool}.py" in done.stdout
