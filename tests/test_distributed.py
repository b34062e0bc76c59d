"""Two real processes (gloo): same gradient, same weights, each file written once."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")

import two_processes as both

from ddpm_core import evaluate, parallel, sample, train
from ddpm_core.files import load_tensors

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
TORCHRUN += ["--nproc-per-node", "2"]


def start(*words: str | Path) -> subprocess.Popen[str]:
    """Start a command in the book's folder."""
    environment = {k: v for k, v in os.environ.items() if "RANK" not in k}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [str(w) for w in words],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )


def end(started: subprocess.Popen[str], good: bool = True) -> str:
    """Wait for it; returns all that it printed."""
    said, _ = started.communicate(timeout=300)
    assert (started.returncode == 0) == good, said
    return said


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_tensors(folder / "checkpoint.safetensors")[0]


def step(folder: Path) -> int:
    metadata = load_tensors(folder / "checkpoint.safetensors")[1]
    return json.loads(metadata["checkpoint"])["step"]


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of a single process: a whole one, and one stopped in step 2."""
    folder = tmp_path_factory.mktemp("one")
    train.main([str(folder / "whole"), *both.OPTIONS])
    with pytest.raises(SystemExit) as stop, both.stopped_after(2):
        train.main([str(folder / "from_one"), *both.OPTIONS])
    assert stop.value.code == 143
    sample.main([*both.SAMPLES, str(folder / "samples.npy")])
    evaluate.main([*both.MEASURED, str(folder / "measured.json")])
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, one: Path) -> Path:
    """What two processes made; five launches at once, to save time."""
    folder = tmp_path_factory.mktemp("two")
    assert step(one / "from_one") == 2
    for name in ("from_one", "accelerate"):
        shutil.copytree(one / "from_one", folder / name)
    torchrun = start(*TORCHRUN, ROOT / "tests" / "two_processes.py", folder)
    words = [BIN / "accelerate", "launch", "--num_processes", "2"]
    module = ["-m", "ddpm_core.train"]
    run = [*module, folder / "accelerate", "--expect-processes", "2", *both.OPTIONS]
    real = start(*words, "--multi_gpu", *run)
    sham = start(*words, "--cpu", *module, folder / "no", "--expect-processes", "2")
    command = [*TORCHRUN, "-m", "ddpm_core.sample", *both.SAMPLES]
    drawn = start(*command, folder / "command.npy")
    command = [*TORCHRUN, "-m", "ddpm_core.evaluate", *both.MEASURED]
    measured = start(*command, folder / "command.json")
    (folder / "accelerate.txt").write_text(end(real))
    (folder / "sham.txt").write_text(end(sham, good=False))
    (folder / "sample.txt").write_text(end(drawn))
    (folder / "evaluate.txt").write_text(end(measured))
    end(torchrun)
    return folder


@pytest.fixture(scope="module")
def parts(two: Path) -> list[dict[str, torch.Tensor]]:
    return [load_tensors(two / f"process-{i}.safetensors")[0] for i in (0, 1)]


def test_distributed_gradient_is_that_of_one_process(parts):
    alone = both.gradient(both.small(replace(both.CONFIG, accumulate=1)))
    assert alone.abs().max() > 0.1
    for part in parts:
        torch.testing.assert_close(part["gradient"], alone, atol=1e-5, rtol=0)


def test_distributed_data_are_not_repeated_over_ranks(parts):
    first, second = (set(part["seen"].tolist()) for part in parts)
    assert len(first) == len(second) == 32
    assert not first & second
    assert first | second == set(both.IMAGES[:, 0, 0, 0].tolist())


def test_distributed_weights_average_and_optimiser_are_those_of_one_process(one, two):
    a, b = tensors(one / "whole"), tensors(two / "whole")
    assert {k.split(".")[0] for k in a} == {"model", "ema", "optimizer"}
    assert furthest(a, b) < 1e-5
    models = [load_tensors(f / "whole" / "model.safetensors")[0] for f in (one, two)]
    assert furthest(*models) < 1e-5


def test_distributed_average_is_the_same_in_every_process(parts):
    averages = [{k: v for k, v in p.items() if k.startswith("ema.")} for p in parts]
    assert averages[0].keys()
    assert furthest(*averages) == 0


def test_distributed_files_are_written_by_one_process(two):
    """The weights, the samples and the results too, and each of them once."""
    assert (two / "written-0").read_text().splitlines() == [
        "metrics.jsonl",  # emptied of what an earlier run left
        *[f"checkpoint.safetensors {step}" for step in (2, 4, 5)],
        "model.safetensors",
        "samples.npy",
        "measured.json",
    ]
    assert (two / "written-1").read_text() == ""
    lines = (two / "whole" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]
    names = {f.name for f in (two / "whole").iterdir() if f.is_file()}
    assert names == {
        "checkpoint.safetensors",
        "metrics.jsonl",
        "model.json",
        "model.safetensors",
    }


def test_distributed_metrics_are_those_of_one_process(one, two):
    runs = [
        (f / "whole" / "metrics.jsonl").read_text().splitlines() for f in (one, two)
    ]
    for a, b in zip(*runs, strict=True):
        assert json.loads(a) == pytest.approx(json.loads(b), abs=1e-5)


def test_distributed_resume_from_one_process_with_two(one, two):
    assert step(two / "from_one") == 5
    assert furthest(tensors(one / "whole"), tensors(two / "from_one")) < 1e-5


def test_distributed_resume_from_two_processes_with_one(one, two, tmp_path, capsys):
    """A signal to one of them stops both after the same step."""
    assert step(two / "stopped") == 3
    assert not (two / "stopped" / "model.safetensors").exists()
    shutil.copytree(two / "stopped", tmp_path / "run")
    train.main([str(tmp_path / "run"), *both.OPTIONS])
    assert "1 process, from step 3" in capsys.readouterr().out
    assert furthest(tensors(one / "whole"), tensors(tmp_path / "run")) < 1e-5


def test_distributed_resume_with_accelerate_launch(one, two):
    said = (two / "accelerate.txt").read_text()
    assert said.count("2 processes, from step 2") == 1
    assert furthest(tensors(one / "whole"), tensors(two / "accelerate")) < 1e-5


def test_distributed_samples_are_those_of_one_process(one, two):
    """In a test's process, and by the command as a reader types it."""
    a = np.load(one / "samples.npy")
    assert a.shape == (5, 1, 8, 8)
    for name in ("samples.npy", "command.npy"):
        assert np.abs(a - np.load(two / name)).max() < 1e-5
    assert (two / "sample.txt").read_text().count("5 samples in") == 1


def test_distributed_measurements_are_those_of_one_process(one, two):
    a = json.loads((one / "measured.json").read_text())
    for name in ("measured.json", "command.json"):
        b = json.loads((two / name).read_text())
        assert a["samples"] == pytest.approx(b["samples"], rel=1e-3, abs=1e-6)
        assert a["bits"] == pytest.approx(b["bits"], rel=1e-4)
        assert a["protocol"] == b["protocol"]
    assert (two / "evaluate.txt").read_text().count("samples 40; reference") == 1


def test_distributed_launcher_that_starts_one_process_is_found_out(two):
    """`accelerate launch --cpu` starts one, whatever it is told."""
    said = (two / "sham.txt").read_text()
    assert "2 processes were expected, 1 is running" in said
    assert not (two / "no").exists()


# Without starting anything


def test_distributed_batch_must_fall_into_equal_shares():
    several = both.Processes()
    several.count = 2
    with pytest.raises(ValueError, match="batch_size = 10 must be a multiple of 2 pro"):
        both.small(replace(both.CONFIG, batch_size=10), several)
    both.small(replace(both.CONFIG, batch_size=12), several)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_distributed_shares_cover_the_batch_once(count, accumulate):
    places, seeds = [], []
    for rank in range(count):
        several = both.Processes()
        several.count, several.rank = count, rank
        run = both.small(replace(both.CONFIG, accumulate=accumulate), several)
        places += [i for part in run.parts().values() for i in part.tolist()]
        seeds += list(run.parts())
    assert places == list(range(8))
    assert seeds == list(range(count * accumulate))


def test_precision_told_to_the_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="--precision"):
        parallel.join("cpu")


def test_missing_accelerate_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ModuleNotFoundError, match="pip install accelerate"):
        parallel.join("cpu")


def test_one_process_needs_no_accelerate(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    processes, device = parallel.join("cpu", 1)
    assert (processes.rank, processes.count, device.type) == (0, 1, "cpu")
