"""The benchmarks: networks that compute the same, one measurement, the table."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import blocks
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
    for flags, library in itertools.product(run.eager_flags(("fp32",)), run.LIBRARIES):
        for compiled in (False, True):
            rate = rates[library] / (1 + compiled)
            figures = {"images_per_second": rate, "peak_mib": rate, "first_step": 7.0}
            rows.append(
                {
                    "library": library,
                    "flags": {**flags, "compile": compiled},
                    "runs": [dict.fromkeys(run.MODES, figures), {}],
                }
            )
    work = {f"{k} small": (2 * 10**9, 6 * 10**9) for k in rates}
    peak = {"float32": [100.0, 120.0], "bfloat16": [1.0]}
    return {"races": {"small": rows}, "flops": work, "convolution_peak": peak}


def test_table_and_marks() -> None:
    found = made_up(30.0, 10.0)
    lines = run.table(found).splitlines()
    assert len(lines) == 2 + 6
    flags = ["diffusers", "fp32, contiguous", "train"]
    figures = ["10.0", "60", "50%", "10", "7.0", "3.00 |"]
    assert lines[3].split(" | ")[1:] == flags + figures
    said = [m.split(": ") for m in run.marks(found)]
    assert [m[-1] for m in said] == ["reached"] * 4 + ["not reached"]  # memory
    assert said[0][1] == "3.00 of diffusers, aim 2.5"
    worse = [m.split(": ")[-1] for m in run.marks(made_up(10.5, 10.0))]
    assert worse == ["not reached"] * 5
    less = made_up(5.0, 10.0)
    assert run.marks(less)[-1] == "small memory: 5 MiB, diffusers 10: reached"


def test_a_race_keeps_the_best_flags_and_compiles_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, str, str, bool]] = []

    def measured(library: str, config: str, **how: Any) -> dict[str, Any]:
        asked.append((library, how["precision"], how["layout"], how["compile"]))
        rate = 2.0 * (how["precision"] == "bf16") + (how["layout"] == "channels_last")
        figures = {"images_per_second": rate, "peak_mib": 1.0, "first_step": 1.0}
        return dict.fromkeys(run.MODES, figures)

    monkeypatch.setattr(run, "measure", measured)
    rows = run.race("small", ("fp32", "bf16"), 3, compiled=True)
    for library in run.LIBRARIES:
        mine = [a[1:] for a in asked if a[0] == library]
        last = "channels_last"
        best = [("fp32", last, False), ("bf16", last, False), ("bf16", last, True)]
        assert mine[:4] == [
            (p, m, False) for p in ("fp32", "bf16") for m in run.LAYOUTS
        ]
        assert mine[4:] == [best[2], *best, *best]
        row = run.fastest(rows, library, "train")
        assert (row["flags"]["precision"], len(row["runs"])) == ("bf16", 3)
        slow = run.fastest(rows, library, "train", "fp32")
        assert (slow["flags"]["layout"], len(slow["runs"])) == (last, 3)


def test_flags_of_a_process() -> None:
    o = measure.options().parse_args(["--no-compile", "--no-keep"])
    assert (o.compile, o.keep) == (False, False)
    assert measure.options().parse_args([]).keep


def test_the_profile_and_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(networks.BATCHES, "small", 1)
    monkeypatch.setattr(blocks, "SHAPES", ((1, 8, 4, 2),) * 3)
    monkeypatch.setattr(blocks, "PLACES", ((1, 4, 8),))
    monkeypatch.setattr(blocks, "DOUBLED", ((1, 4, 4),))
    shares = blocks.shares("ddpm_core", "small", "fp32")
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["convolution"] > 0
    rows = blocks.parts(("fp32", "bf16"))
    assert {row["part"] for row in rows} == {
        "GroupNorm and SiLU", "attention", "dropout", "doubling",
    }  # fmt: skip
    assert all(
        row[k][m] > 0 for row in rows for k in ("plain", "ours") for m in run.MODES
    )
    alone = blocks.convolutions("small", "fp32")
    assert 0 < alone["forward"] < alone["train"]
