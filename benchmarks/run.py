"""Measure our U-Net beside its peers, each at its best flags, and the sampler's overhead.

python benchmarks/run.py              all of it; writes book/results/bench.json
python benchmarks/run.py --quick      few repeats, the small network only; writes nothing

Every figure is the median of runs in processes of their own, the libraries by turns, so
that a machine that slows down slows them all.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure import seconds
from networks import (
    BATCHES,
    CONFIGS,
    LIBRARIES,
    assert_same_function,
    at_side,
    build,
    flops,
    inputs,
)
from torch import nn

from ddpm_core.samplers import ancestral, last
from ddpm_core.schedules import linear, respace

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import results

ROOT = Path(__file__).parents[1]
LAYOUTS = ("contiguous", "channels_last")
MODES = ("train", "forward")
LIMIT = 300  # seconds that one process may take, compiling included
SIDES, BATCH_SIZES, STEP_COUNTS = (8, 16, 32, 64), (1, 4, 16, 64), (5, 10, 20, 40)
# our figure over a peer's that we want to reach: network, mode, precision, peer
AIMS: dict[tuple[str, str, str | None, str], float] = {
    ("cifar10", "train", None, "diffusers"): 1.3,
    ("cifar10", "forward", None, "diffusers"): 1.3,
    ("small", "train", None, "diffusers"): 2.5,
    ("small", "forward", None, "diffusers"): 2.5,
    ("cifar10", "train", "fp32", "diffusers"): 1.1,
    ("cifar10", "forward", "fp32", "diffusers"): 1.1,
    ("small", "train", "fp32", "diffusers"): 1.1,
    ("small", "forward", "fp32", "diffusers"): 1.1,
    ("cifar10", "train", None, "denoising-diffusion-pytorch"): 1.3,
    ("cifar10", "forward", None, "denoising-diffusion-pytorch"): 1.3,
}
MINUTES = 25  # that all of it may take on two cores


def measure(library: str, config: str, **how: Any) -> dict[str, Any]:
    """One process of measure.py: figures by mode; {} if it took too long or failed."""
    command = [sys.executable, str(ROOT / "benchmarks" / "measure.py")]
    command += ["--library", library, "--config", config]
    for key, value in how.items():
        if isinstance(value, bool):
            command.append(f"--{key}" if value else f"--no-{key}")
        else:
            words = value if isinstance(value, tuple) else (value,)
            command += [f"--{key}", *map(str, words)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT, check=True
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        print(f"  {' '.join(command[2:])}: {type(error).__name__}", flush=True)
        return {}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def convolution_peak(repeats: int = 5) -> dict[str, list[float]]:
    """GFLOP/s of a 3x3 convolution, forward, of some sizes: medians."""
    found: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    for precision, (channels, side, batch) in itertools.product(
        (torch.float32, torch.bfloat16), ((128, 32, 16), (256, 16, 32), (64, 32, 32))
    ):
        layer = nn.Conv2d(channels, channels, 3, padding=1).to(precision)
        layer = layer.to(memory_format=torch.channels_last)
        x = torch.randn(batch, channels, side, side, dtype=precision)
        x = x.to(memory_format=torch.channels_last)
        with torch.no_grad():
            taken = seconds(lambda layer=layer, x=x: layer(x), repeats + 2)[2:]
        work = 2 * 9 * channels**2 * side**2 * batch / 1e9
        name = str(precision).removeprefix("torch.")
        found[name].append(work / statistics.median(taken))
    return found


def eager_flags(precisions: Sequence[str]) -> list[dict[str, Any]]:
    """Every combination of precision and memory format."""
    pairs = itertools.product(precisions, LAYOUTS)
    return [{"precision": p, "layout": m, "compile": False} for p, m in pairs]


def run_once(config: str, rows: list[dict[str, Any]]) -> None:
    """Measure every row once more, one after the other."""
    for row in rows:
        found = measure(row["library"], config, warm=0, repeats=2, **row["flags"])
        row["runs"].append(found)


def race(
    config: str, precisions: Sequence[str], rounds: int, compiled: bool
) -> list[dict[str, Any]]:
    """Every library at all flags once, then at its best ones by turns.

    Best are the fastest memory format of each precision, and, if `compiled`, the
    fastest of all with `torch.compile` too.
    """
    rows = [
        {"library": library, "flags": f, "runs": []}
        for f, library in itertools.product(eager_flags(precisions), LIBRARIES)
    ]
    run_once(config, rows)
    kept = []
    for library in LIBRARIES:
        best = [fastest(rows, library, "train", p) for p in precisions]
        kept += best
        if compiled:
            flags = fastest(best, library, "train")["flags"] | {"compile": True}
            kept.append({"library": library, "flags": flags, "runs": []})
    run_once(config, [row for row in kept if not row["runs"]])
    rows += [row for row in kept if row["flags"]["compile"]]
    for number in range(2, rounds + 1):
        run_once(config, kept)
        print(f"{config}: round {number} of {rounds}", flush=True)
    return rows


def median(row: dict[str, Any], mode: str, what: str = "images_per_second") -> float:
    """The median of a figure over the runs that ended; 0 if none did."""
    figures = [run[mode][what] for run in row["runs"] if run]
    return statistics.median(figures) if figures else 0.0


def fastest(
    rows: list[dict[str, Any]], library: str, mode: str, precision: str | None = None
) -> dict[str, Any]:
    """A library's row at its best flags, among those that were measured most often."""
    own = [
        row
        for row in rows
        if row["library"] == library and precision in (None, row["flags"]["precision"])
    ]
    most = max(len(row["runs"]) for row in own)
    often = [row for row in own if len(row["runs"]) == most]
    return max(often, key=lambda row: median(row, mode))


def sampler_overhead(rounds: int = 3, steps: int = 6) -> dict[str, float]:
    """Seconds of a sampling step outside the network, as a share of the network's."""
    config = CONFIGS["cifar10"]
    model = build("ddpm_core", config).eval()
    schedule = linear(1000)
    inside: list[float] = []

    def timed(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        y: torch.Tensor = model(x, t)
        inside.append(time.perf_counter() - start)
        return y

    x, _ = inputs(config, BATCHES["cifar10"])
    shares = []
    for _ in range(rounds):
        inside.clear()
        walk = ancestral(timed, schedule, x)
        next(walk)
        inside.clear()
        taken = seconds(lambda walk=walk: next(walk), steps)
        shares.append((sum(taken) - sum(inside)) / sum(inside))
    return {"share": statistics.median(shares), "worst": max(shares)}


def cost_of_steps() -> dict[int, float]:
    """Seconds to draw one image by so many steps, with the small network."""
    config, found = CONFIGS["small"], {}
    model = build("ddpm_core", config).to(memory_format=torch.channels_last).eval()
    x, _ = inputs(config, BATCHES["small"])
    for count in STEP_COUNTS:
        short = respace(linear(1000), range(1000 // count, 1001, 1000 // count))
        (taken,) = seconds(lambda short=short: last(ancestral(model, short, x)), 1)
        found[count] = taken / len(x)
    return found


def run(configs: list[str], rounds: int, whole: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"same_function": {}, "races": {}}
    for config in configs:
        found["same_function"][config] = assert_same_function(config)
    found["flops"] = {
        f"{library} {config}": flops(library, CONFIGS[config])
        for library in LIBRARIES
        for config in configs
    }
    peak = found["convolution_peak"] = convolution_peak()
    print(f"GFLOP/s of a convolution: {peak}", flush=True)
    bf16 = whole or max(peak["bfloat16"]) > max(peak["float32"])
    precisions = ("fp32", "bf16") if bf16 else ("fp32",)
    for config in configs:
        compiled = whole or config == "small"  # minutes a process for the large one
        found["races"][config] = race(config, precisions, rounds, compiled)
        print(table(found), flush=True)
    found |= curves(fastest(found["races"]["small"], "ddpm_core", "forward")["flags"])
    found["memory_kept"] = memory_kept(configs, precisions[-1], rounds)
    found["steps"] = cost_of_steps()
    found["sampler_overhead"] = sampler_overhead()
    return found


def memory_kept(configs: list[str], precision: str, rounds: int) -> dict[str, Any]:
    """Our training step with and without `keep_memory`, by turns."""
    how = {"precision": precision, "modes": ("train",), "warm": 0, "repeats": 2}
    runs = {f"{c} {k}": list[Any]() for c in configs for k in (True, False)}
    for _, config, keep in itertools.product(range(rounds), configs, (True, False)):
        runs[f"{config} {keep}"].append(measure("ddpm_core", config, keep=keep, **how))
    return runs


def curves(flags: dict[str, Any]) -> dict[str, Any]:
    """Our small network's forward pass against the side of the images and the batch."""
    config, forward = CONFIGS["small"], {**flags, "modes": ("forward",)}
    sides = {s: measure("ddpm_core", "small", side=s, **forward) for s in SIDES}
    batches = {
        b: measure("ddpm_core", "small", batch=b, **forward) for b in BATCH_SIZES
    }
    work = {s: flops("ddpm_core", at_side(config, s))[0] for s in SIDES}
    return {"sides": sides, "batches": batches, "flops_of_sides": work}


def table(found: dict[str, Any]) -> str:
    """The races as Markdown: images/s, useful GFLOP/s, memory, and the ratio to ours."""
    lines = [
        "| network | library | flags | mode | images/s | GFLOP/s | of the peak "
        "| MiB | first step, s | ours/it |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for (config, rows), mode in itertools.product(found["races"].items(), MODES):
        ours = median(fastest(rows, "ddpm_core", mode), mode)
        for library in LIBRARIES:
            row = fastest(rows, library, mode)
            here, first = (
                median(row, mode, w) for w in ("images_per_second", "first_step")
            )
            work = found["flops"][f"{library} {config}"][mode == "train"] / 1e9
            flags = f"{row['flags']['precision']}, {row['flags']['layout']}"
            flags += ", compiled" if row["flags"]["compile"] else ""
            peak = f"{median(row, mode, 'peak_mib'):.0f}" if mode == "train" else ""
            lines.append(
                f"| {config} | {library} | {flags} | {mode} | {here:.1f} | "
                f"{here * work:.0f} | {here * work / best_peak(found, row):.0%} | {peak} "
                f"| {first:.1f} | {ours / here:.2f} |"
            )
    return "\n".join(lines)


def best_peak(found: dict[str, Any], row: dict[str, Any]) -> float:
    """GFLOP/s of the fastest convolution in the precision of a row."""
    kinds = {"fp32": "float32", "bf16": "bfloat16"}
    best: float = max(found["convolution_peak"][kinds[row["flags"]["precision"]]])
    return best


def rate(
    found: dict[str, Any], library: str, config: str, mode: str, p: str | None
) -> float:
    """Useful GFLOP/s of a library at its best flags, of one precision if it is given."""
    row = fastest(found["races"][config], library, mode, p)
    return (
        median(row, mode) * found["flops"][f"{library} {config}"][mode == "train"] / 1e9
    )


def marks(found: dict[str, Any]) -> list[str]:
    """Which aims are reached."""
    lines = []
    for (config, mode, precision, peer), aim in AIMS.items():
        if config not in found["races"]:
            continue
        ratio = rate(found, "ddpm_core", config, mode, precision) / rate(
            found, peer, config, mode, precision
        )
        words = f"{config} {mode}{f' in {precision}' if precision else ''}"
        lines.append(
            verdict(f"{words}: {ratio:.2f} of {peer}, aim {aim}", ratio >= aim)
        )
    for config, rows in found["races"].items():
        ours, theirs = (
            median(fastest(rows, library, "train"), "train", "peak_mib")
            for library in LIBRARIES[:2]
        )
        words = f"{config} memory: {ours:.0f} MiB, diffusers {theirs:.0f}"
        lines.append(verdict(words, ours <= theirs))
    return lines


def verdict(words: str, reached: bool) -> str:
    return f"{words}: {'reached' if reached else 'not reached'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small network, no file")
    words = "compile the large network too, and bf16 without hardware for it: hours"
    parser.add_argument("--whole", action="store_true", help=words)
    parser.add_argument("--rounds", type=int, default=3)
    o = parser.parse_args()
    start = time.perf_counter()
    found = run(["small"] if o.quick else list(CONFIGS), o.rounds, o.whole)
    found["marks"] = marks(found)
    minutes = (time.perf_counter() - start) / 60
    within = verdict(f"{minutes:.0f} minutes, at most {MINUTES}", minutes <= MINUTES)
    found["marks"].append(within)
    print(table(found), *found["marks"], sep="\n")
    if not o.quick:
        behind = ("unet", "samplers", "process", "schedules")
        peers = ("diffusers", "denoising-diffusion-pytorch")
        results.write("bench", found, start, modules=behind, libraries=peers)


if __name__ == "__main__":
    main()
