"""README, CONTRIBUTING, glossary, notation and bibliography say what is true."""

import importlib
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import chapters as book
import extract

from ddpm_core.train import read_options

ROOT = book.ROOT
GUIDES = ["README.md", "CONTRIBUTING.md", "book/intro.md"]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def exists(name):
    return (ROOT / name).exists() or (ROOT / "book" / name).exists()


def glossary_terms():
    body = read("book/glossary.md").split("```{glossary}\n", 1)[1]
    return [line for line in body.split("\n") if re.match(r"\w", line)]


@pytest.mark.parametrize("guide", GUIDES)
def test_make_targets_that_are_named_exist(guide):
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.M))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", read(guide), re.M))
    assert named
    assert named <= targets


@pytest.mark.parametrize("guide", GUIDES)
def test_files_that_are_named_exist(guide):
    first = r"(?:book|tools|tests|ddpm_core|assets)/"
    named = set(re.findall(rf"(?<![\w/.])({first}[\w./-]*\w)", read(guide)))
    assert named
    assert {n for n in named if not exists(n)} <= {"ddpm_core/NAME.py"}


def test_example_of_the_readme_runs(tmp_path, monkeypatch):
    example = re.search(r"```python\n(.*?)```", read("README.md"), re.S)[1]
    assert len(example.strip().split("\n")) <= 12
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    names = {}
    # The names are real; only the number of digits is cut, to save time.
    exec(example.replace("randn(16,", "randn(2,"), names)
    assert names["x_0"].shape == (2, 1, 8, 8)
    assert (tmp_path / "digits.png").stat().st_size > 0


def test_commands_of_the_readme_have_options_that_exist():
    """The lines for a shell, read as the commands read them; nothing is run."""
    found = re.findall(r"-m ddpm_core\.(train|sample|evaluate) (.+)", read("README.md"))
    assert {name for name, _ in found} == {"train", "sample", "evaluate"}
    for name, words in found:
        module = importlib.import_module(f"ddpm_core.{name}")
        options = read_options(module.parser(), words.split())
        if name == "sample":
            assert (options.weights, options.n) == ("digits", 100)
        elif name == "evaluate":
            assert (options.weights, options.n, options.seeds) == ("digits", 500, 3)
        else:
            assert (options.data, options.steps) == ("digits", 6000)


def test_glossary_is_in_alphabetical_order_and_explains_each_term():
    terms = glossary_terms()
    assert len(terms) > 40
    assert terms == sorted(terms, key=lambda term: term.lower().replace("_", " "))
    body = read("book/glossary.md").split("```{glossary}\n", 1)[1]
    for term in terms:
        assert re.search(rf"^{re.escape(term)}\n  \S.{{20,}}", body, re.M), term


def test_every_linked_term_is_in_the_glossary():
    known = {term.lower() for term in glossary_terms()}
    for page in book.pages():
        for link in re.findall(r"\{term\}`(?:[^`<]*<)?([^`>]+)>?`", book.prose(page)):
            assert link.lower() in known, f"{page.name}: {link}"


def test_every_citation_is_in_the_bibliography():
    keys = re.findall(r"^@\w+\{(\S+),$", read("book/references.bib"), re.M)
    assert len(keys) == len(set(keys))
    for page in book.pages():
        for cited in re.findall(r"\{cite(?::[tp])?\}`([^`]+)`", book.prose(page)):
            for key in cited.split(","):
                assert key.strip() in keys, f"{page.name}: {key}"


def test_notation_lists_each_symbol_and_each_name_once():
    rows = re.findall(
        r"^\| \$(.+?)\$ \| `(\w+)` \| (.+) \|$", read("book/notation.md"), re.M
    )
    table = re.findall(r"^\| .*\|$", read("book/notation.md"), re.M)
    assert len(rows) == len(table) - 1, "each row: one symbol, one name"
    symbols = [symbol for symbol, _, _ in rows]
    assert len(symbols) == len(set(symbols))
    names = [name for _, name, _ in rows]
    assert {n for n in names if names.count(n) > 1} <= {"sigma"}


def test_every_module_is_on_the_api_page():
    shown = re.findall(r"automodule:: ddpm_core\.(\w+)", read("book/api.md"))
    assert sorted(shown) == sorted(extract.modules())


def test_version_is_the_same_everywhere():
    version = re.search(r'^version = "(.+)"', read("pyproject.toml"), re.M)[1]
    assert f'version: "{version}"' in read("CITATION.cff")
    assert f"version = {{{version}}}" in read("book/intro.md")
    assert f"## {version}" in read("CHANGELOG.md")


def test_the_cover_is_light_and_stops():
    from PIL import Image

    path = ROOT / "book" / "assets" / "noise_to_digits.webp"
    assert path.stat().st_size < 300_000
    with Image.open(path) as cover:
        assert cover.info["loop"] == 1, "it must not move for ever"
        assert cover.n_frames <= 50
