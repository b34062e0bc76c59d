"""The rules of a chapter, read from the notebooks and their syntax trees."""

import ast
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import chapters as book
import extract

ROOT = book.ROOT
CHAPTERS = book.chapters()
BASE_LAYER = {"checks", "data", "oracles", "plots", "equations", "files"}
BASE_LAYER |= {"interchange"}
DIRECTIVES = {"note", "warning", "exercise", "admonition", "solution", "solution-start"}
DIRECTIVES |= {"solution-end", "figure"}
SECTIONS = ("What you will be able to do", "What you need", "Where people go wrong")
SECTIONS += ("Exercises", "What to remember", "Where it lives", "Further reading")


def raw(path):
    return book.read_notebook(path)["cells"]


def name(path):
    return path.relative_to(ROOT).as_posix()


def tags(cell):
    return cell["metadata"].get("tags", [])


def plain(source):
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.M)


def trees(path):
    return [(c, ast.parse(plain(c.source))) for c in book.code(path)]


def exported():
    """Public and private names: (module, name) -> position of its chapter."""
    position = {name(p): i for i, p in enumerate(CHAPTERS)}
    return {
        (module.name, defined): position[block.cell.chapter]
        for module in extract.modules().values()
        for block in module.blocks
        for defined in block.names
    }


EXPORTED = exported()
MODULES = {module for module, _ in EXPORTED}
each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=name)
# A page to look things up in: it derives nothing and sets no exercises, so it has
# neither the sections nor the exercises of a chapter. All other rules hold for it.
LOOK_UP = {"book/errata.ipynb"}
each_derivation = pytest.mark.parametrize(
    "path", [path for path in CHAPTERS if name(path) not in LOOK_UP], ids=name
)


@each_chapter
def test_first_cell_is_target_and_title(path):
    first = book.source_of(raw(path)[0])
    stem = path.stem.replace("_", "-")
    assert first.startswith(f"(ch-{stem})=\n"), first[:60]
    assert re.search(r"^# \S", first, re.M), "no title"


@each_derivation
def test_sections_are_there(path):
    text = book.prose(path)
    missing = [s for s in SECTIONS if not re.search(rf"^##+ .*{s}", text, re.M | re.I)]
    assert not missing


@each_derivation
def test_five_exercises_with_hint_and_running_solution(path):
    text = book.prose(path)
    labels = re.findall(r"```\{exercise\}[^\n]*\n:label: (\S+)", text)
    starts = re.findall(r"```\{solution-start\} (\S+)", text)
    assert len(labels) >= 5
    assert labels == starts, "every exercise has its solution after it"
    assert len(re.findall(r"```\{solution-end\}", text)) == len(starts)
    assert len(re.findall(r"```\{admonition\} Hint\n:class: dropdown", text)) >= len(
        labels
    )
    hidden = [c for c in raw(path) if c["metadata"].get("cellView") == "form"]
    assert len(hidden) >= len(labels)
    for cell in hidden:
        assert cell["metadata"]["jupyter"]["source_hidden"], cell["id"]


def test_a_page_to_look_things_up_in_derives_nothing():
    for path in CHAPTERS:
        if name(path) in LOOK_UP:
            assert not [label for label, _ in book.labelled(book.prose(path))]
            assert not book.code(path, "export")


def test_the_setup_cell_is_the_same_everywhere():
    cells = {
        "".join(next(c for c in raw(p) if "setup" in tags(c))["source"])
        for p in CHAPTERS
    }
    assert len(cells) == 1


@each_chapter
def test_directives_are_those_that_read_well_raw(path):
    used = set(re.findall(r"^\s*[`:]{3,}\{([\w:-]+)\}", book.prose(path), re.M))
    assert {d for d in used if not d.startswith("prf:")} <= DIRECTIVES


@each_chapter
def test_executed_in_order_and_stored_without_errors(path):
    cells = [c for c in raw(path) if c["cell_type"] == "code"]
    counts = [c["execution_count"] for c in cells]
    assert counts == list(range(1, len(cells) + 1))
    for cell in cells:
        errors = [o for o in cell["outputs"] if o["output_type"] == "error"]
        assert not errors or "raises-exception" in tags(cell), cell["id"]
        streams = [o for o in cell["outputs"] if o.get("name") == "stderr"]
        assert not streams, f"{cell['id']} stores a warning"


@each_chapter
def test_size_and_ids(path):
    assert path.stat().st_size < 1_000_000
    ids = [c["id"] for c in raw(path)]
    assert len(ids) == len(set(ids))
    assert 20 <= len(ids) <= 90, len(ids)


def draws(cell):
    return any(
        kind.startswith("image/") for o in cell["outputs"] for kind in o.get("data", {})
    )


def prints(cell):
    if "nbval-ignore-output" in tags(cell):
        return False
    return any(
        o["output_type"] == "stream" or "text/plain" in o.get("data", {})
        for o in cell["outputs"]
        if not any(k.startswith("image/") for k in o.get("data", {}))
    )


@each_chapter
def test_figures_have_alt_text_caption_and_numbers(path):
    cells = [c for c in raw(path) if c["cell_type"] == "code"]
    for i, cell in enumerate(cells):
        if not draws(cell):
            continue
        image = cell["metadata"].get("mystnb", {}).get("image", {})
        assert len(image.get("alt", "")) > 20, f"{cell['id']} has no alt text"
        near = cells[i : i + 3]
        assert any(prints(c) for c in near), f"{cell['id']}: no compared numbers near"


@each_chapter
def test_what_is_not_compared(path):
    cells = [c for c in raw(path) if c["cell_type"] == "code"]
    assert not [c["id"] for c in cells if "nbval-skip" in tags(c)]
    ignored = [c for c in cells if "nbval-ignore-output" in tags(c)]
    assert len(ignored) <= len(cells) / 10
    for cell in ignored:
        assert "assert" in book.source_of(cell), cell["id"]


@each_chapter
def test_imports_only_what_stands_before(path):
    position = CHAPTERS.index(path)
    own = {key for key, where in EXPORTED.items() if where == position}
    for cell, tree in trees(path):
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            if node.module.startswith("ddpm_core."):
                module = node.module.split(".")[1]
                for alias in node.names:
                    check_import(cell, module, alias.name, position, own)
            elif node.module == "ddpm_core":
                for alias in node.names:
                    check_module(cell, alias.name, position)


def check_import(cell, module, imported, position, own):
    if "export" in cell.tags:
        return  # the package's own imports; their direction is tested below
    assert (module, imported) not in own, f"{cell} imports its own {imported}"
    where = EXPORTED.get((module, imported))
    assert where is not None, f"{cell}: ddpm_core.{module} has no {imported}"
    early = where < position or module in BASE_LAYER
    assert early, f"{cell}: {imported} comes from a later chapter"


def check_module(cell, module, position):
    if module in BASE_LAYER or "export" in cell.tags:
        return
    latest = max(i for (m, _), i in EXPORTED.items() if m == module)
    assert latest < position, f"{cell}: import names from ddpm_core.{module} one by one"


ORDER = ["checks", "schedules", "equations", "process", "losses", "vae", "oracles"]
ORDER += [
    "switching",
    "samplers",
    "scores",
    "sde",
    "flows",
    "unet",
    "improved",
    "ema",
    "files",
    "interchange",
    "data",
    "metrics",
    "plots",
    "training",
    "features",
    "parallel",
    "train",
    "sample",
    "evaluate",
]
# Started from a shell, not imported: a chapter may well call its images `train`.
COMMANDS = {"train", "sample", "features", "evaluate"}


def test_imports_in_the_package_point_one_way():
    assert set(ORDER) == MODULES
    for module in MODULES:
        text = (ROOT / "ddpm_core" / f"{module}.py").read_text(encoding="utf-8")
        used = set(re.findall(r"^from ddpm_core\.(\w+) import", text, re.M))
        for line in re.findall(r"^from ddpm_core import (.+)$", text, re.M):
            used |= {part.strip().split(" as ")[0] for part in line.split(",")}
        used &= MODULES
        late = {u for u in used if ORDER.index(u) >= ORDER.index(module)}
        assert not late, f"{module} imports {late}"


@each_chapter
def test_no_variable_takes_the_name_of_an_import_or_module(path):
    imported, stored = MODULES - COMMANDS, {}
    for cell, tree in trees(path):
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported |= {(a.asname or a.name).split(".")[0] for a in node.names}
        for node in tree.body:
            if isinstance(
                node, ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom
            ):
                continue
            for inner in ast.walk(node):
                if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                    stored[inner.id] = cell.id
    taken = {n: c for n, c in stored.items() if n in imported}
    assert not taken


def test_the_package_never_asks_for_its_own_classes():
    classes = set()
    for path in (ROOT / "ddpm_core").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        classes |= {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    for path in (ROOT / "ddpm_core").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and getattr(node.func, "id", "") == "isinstance"
            ):
                asked = {
                    n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)
                }
                assert not asked & classes, (
                    f"{path.name}: isinstance of {asked & classes}"
                )


LATER = re.compile(r"\b(later|ahead)\b", re.I)


def targets():
    """Where every label of the book stands: label -> position of its page."""
    found = {}
    for i, page in enumerate(book.pages()):
        text = book.prose(page)
        found |= dict.fromkeys([label for label, _ in book.labelled(text)], i)
        found |= dict.fromkeys(re.findall(r"^\(([\w-]+)\)=", text, re.M), i)
        found |= dict.fromkeys(re.findall(r"^:label: (\S+)", text, re.M), i)
    return found


TARGETS = targets()
BACK = {"ch-glossary", "ch-errata", "ch-api", "ch-references"}


@pytest.mark.parametrize("page", book.pages(), ids=name)
def test_links_forward_are_marked(page):
    position = book.pages().index(page)
    if page.suffix == ".md":
        return  # the front and back matter may point anywhere
    for paragraph in re.split(r"\n\s*\n|\n(?=[-*|] )", book.prose(page)):
        for label in re.findall(r"\{(?:eq|ref)\}`(?:[^`<]*<)?([^`>]+)>?`", paragraph):
            assert label in TARGETS, f"{label} stands nowhere"
            forward = TARGETS[label] > position and label not in BACK
            assert not forward or LATER.search(paragraph), (
                f"unmarked forward link: {label}"
            )
