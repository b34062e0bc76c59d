"""Stored results of long runs: what they say of themselves, and when they are old."""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ddpm_core.files import read_result

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import refresh
import results

STORED = sorted(path.stem for path in results.FOLDER.glob("*.json"))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package's sources, and an empty folder of results."""
    shutil.copytree(results.PACKAGE, tmp_path / "ddpm_core")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "PACKAGE", tmp_path / "ddpm_core")
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(
        sys, "argv", [str(tmp_path / "benchmarks" / "run.py"), "-n", "2"]
    )
    return tmp_path


def write(found: dict[str, Any], **behind: Any) -> dict[str, Any]:
    path = results.write("made_up", found, time.perf_counter(), **behind)
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def test_there_are_results() -> None:
    assert "improved" in STORED


@pytest.mark.parametrize("name", STORED)
def test_a_stored_result_says_how_it_was_made(name: str) -> None:
    record = read_result(name)
    script = record["command"].split()[1]
    assert (results.ROOT / script).is_file()
    assert record["machine"]["cores"] >= 1
    assert "torch" in record["versions"]
    assert record["seconds"] > 0
    assert record["made_from"]["modules"]
    assert len(record["made_from"]["digest"]) == 64


def test_a_result_is_written_whole_with_its_command(elsewhere: Path) -> None:
    record = write({"rows": [1, 2]}, modules=["unet"], libraries=["diffusers"])
    assert record["command"] == "python benchmarks/run.py -n 2"
    assert record["rows"] == [1, 2]
    assert {"torch", "diffusers"} <= record["versions"].keys()


@pytest.mark.parametrize("change", ["unet.py", "weights/digits.safetensors"])
def test_a_result_is_old_once_what_it_rests_on_changes(
    elsewhere: Path, change: str
) -> None:
    write({}, modules=["unet"], weights=["digits"])
    assert results.old() == []
    for other in ("vae.py", "weights/digits.json"):  # a card has what is measured later
        (elsewhere / "ddpm_core" / other).write_text("changed")
    assert results.old() == []
    (elsewhere / "ddpm_core" / change).write_text("changed")
    assert results.old() == [
        "old: results/made_up.json, by python benchmarks/run.py -n 2"
    ]


def test_an_unknown_result_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"name must be one of .*'improved'.*; got 'x'"
    ):
        read_result("x")


def test_a_chapter_is_stale_once_its_result_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(results.FOLDER, tmp_path / "results")
    chapter = results.ROOT / "book" / "beyond" / "improved.ipynb"
    before = refresh.digest(chapter)
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    assert refresh.digest(chapter) == before
    (tmp_path / "results" / "improved.json").write_text("{}")
    assert refresh.digest(chapter) != before
