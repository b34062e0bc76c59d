"""The benchmarks: networks that compute the same, one measurement, the table."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import measure
import networks
import run


def test_ours_and_diffusers_compute_the_same_with_the_same_work() -> None:
    assert networks.assert_same_function("small") <= 1e-4
    config = networks.CONFIGS["small"]
    forward, both = networks.flops("ddpm_core", config)
    assert (forward, both) == networks.flops("diffusers", config)
    assert 2.9 < both / forward <= 3


def test_networks_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(config: Any) -> torch.nn.Module:
        model = networks_unet(config)
        model.config = config
        model.norm_out.eps = 0.1
        return model

    networks_unet = networks.UNet
    monkeypatch.setattr(networks, "UNet", other)
    with pytest.raises(AssertionError, match="small: the outputs differ"):
        networks.assert_same_function("small")


@pytest.mark.parametrize("mode", ["train", "forward"])
def test_one_measurement(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--batch",
        "2",
        "--side",
        "8",
        "--warm",
        "0",
        "--repeats",
        "2",
        "--layout",
        "contiguous",
    ]
    measure.main([*words, "--layout", "contiguous", "--modes", mode])
    (found,) = json.loads(capsys.readouterr().out).values()
    assert len(found["seconds"]) == 2
    assert found["images_per_second"] == pytest.approx(2 / (sum(found["seconds"]) / 2))


def made_up(ours: float, theirs: float) -> dict[str, Any]:
    """A result in which every run has the same rate, and compiling halves it."""
    rates = dict(zip(run.LIBRARIES, (ours, theirs, theirs), strict=True))
    rows = []
    for flags, library in itertools.product(
        run.grid("small", ("fp32",), False), run.LIBRARIES
    ):
        rate = rates[library] / (1 + flags["compile"])
        figures = {"images_per_second": rate, "peak_mib": 100}
        runs = [dict.fromkeys(run.MODES, figures), {}]
        rows.append({"library": library, "flags": flags, "runs": runs})
    work = {f"{k} small": (2 * 10**9, 6 * 10**9) for k in rates}
    return {"races": {"small": rows}, "flops": work}


def test_table_and_marks() -> None:
    found = made_up(30.0, 10.0)
    lines = run.table(found).splitlines()
    assert len(lines) == 2 + 6
    assert lines[3].split(" | ")[1:] == [
        "diffusers", "fp32, contiguous", "train", "10.0", "60", "100", "3.00 |",
    ]  # fmt: skip
    assert [m.split(": ")[-1] for m in run.marks(found)] == ["reached"] * 2
    assert [m.split(": ")[-1] for m in run.marks(made_up(20.0, 10.0))] == [
        "not reached"
    ] * 2
