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

import blocks
import torch
from measure import seconds
from networks import (
    BATCHES,
    CONFIGS,
    LIBRARIES,
    assert_same_function,
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
# network, mode: our images/s over those of diffusers that we want to reach
AIMS = {("cifar10", "train"): 1.3, ("cifar10", "forward"): 1.3}
AIMS |= {("small", "train"): 2.5, ("small", "forward"): 2.5}


def measure(library: str, config: str, **how: Any) -> dict[str, Any]:
    """One process of measure.py: figures by mode; {} if it took too long or failed."""
    command = [sys.executable, str(ROOT / "benchmarks" / "measure.py")]
    command += ["--library", library, "--config", config]
    for key, value in how.items():
        if isinstance(value, bool):
            command += [f"--{key}"] if value else []
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


def convolution_peak(repeats: int = 5) -> dict[str, float]:
    """The best GFLOP/s of a 3x3 convolution, forward, over some sizes."""
    best: dict[str, float] = {}
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
        best[name] = max(best.get(name, 0.0), work / statistics.median(taken))
    return best


def grid(config: str, precisions: Sequence[str], whole: bool) -> list[dict[str, Any]]:
    """The flags to try: all, but compiling the large network takes minutes a process."""
    compiled = (False, True) if whole or config == "small" else (False,)
    names = ("precision", "layout", "compile")
    combinations = itertools.product(precisions, LAYOUTS, compiled)
    return [dict(zip(names, values, strict=True)) for values in combinations]


def race(
    config: str, flags: Sequence[dict[str, Any]], rounds: int
) -> list[dict[str, Any]]:
    """Every library with all flags, by turns, in each of some rounds."""
    rows = [
        {"library": library, "flags": f, "runs": []}
        for f, library in itertools.product(flags, LIBRARIES)
    ]
    for number in range(rounds):
        for row in rows:
            found = measure(row["library"], config, warm=0, repeats=2, **row["flags"])
            row["runs"].append(found)
        print(f"{config}: round {number + 1} of {rounds}", flush=True)
    return rows


def median(row: dict[str, Any], mode: str, what: str = "images_per_second") -> float:
    """The median of a figure over the runs that ended; 0 if none did."""
    figures = [run[mode][what] for run in row["runs"] if run]
    return statistics.median(figures) if figures else 0.0


def fastest(rows: list[dict[str, Any]], library: str, mode: str) -> dict[str, Any]:
    """A library's row at its best flags."""
    own = [row for row in rows if row["library"] == library]
    return max(own, key=lambda row: median(row, mode))


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
    bf16 = whole or peak["bfloat16"] > peak["float32"]
    precisions = ("fp32", "bf16") if bf16 else ("fp32",)
    for config in configs:
        flags = grid(config, precisions, whole)
        found["races"][config] = race(config, flags, rounds)
        print(table(found), flush=True)
    best = fastest(found["races"]["small"], "ddpm_core", "forward")["flags"]
    forward = {**best, "modes": ("forward",)}
    found["sides"] = {
        s: measure("ddpm_core", "small", side=s, **forward) for s in SIDES
    }
    found["batches"] = {
        b: measure("ddpm_core", "small", batch=b, **forward) for b in BATCH_SIZES
    }
    found["profile"] = {
        f"{library} {config}": blocks.shares(library, config, "channels_last")
        for library, config in itertools.product(LIBRARIES[:2], configs)
    }
    found["norms"] = blocks.norms()
    found["layouts"] = {config: blocks.layouts(config) for config in configs}
    found["steps"] = cost_of_steps()
    found["sampler_overhead"] = sampler_overhead()
    return found


def table(found: dict[str, Any]) -> str:
    """The races as Markdown: images/s, useful GFLOP/s, memory, and the ratio to ours."""
    lines = [
        "| network | library | flags | mode | images/s | GFLOP/s | MiB | ours/it |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for (config, rows), mode in itertools.product(found["races"].items(), MODES):
        ours = median(fastest(rows, "ddpm_core", mode), mode)
        for library in LIBRARIES:
            row = fastest(rows, library, mode)
            here, peak = median(row, mode), median(row, mode, "peak_mib")
            work = found["flops"][f"{library} {config}"][mode == "train"] / 1e9
            flags = f"{row['flags']['precision']}, {row['flags']['layout']}"
            flags += ", compiled" if row["flags"]["compile"] else ""
            lines.append(
                f"| {config} | {library} | {flags} | {mode} | {here:.1f} | "
                f"{here * work:.0f} | {peak:.0f} | {ours / here:.2f} |"
            )
    return "\n".join(lines)


def marks(found: dict[str, Any]) -> list[str]:
    """Which aims are reached."""
    lines = []
    for (config, rows), mode in itertools.product(found["races"].items(), MODES):
        ours, theirs = (
            median(fastest(rows, library, mode), mode)
            for library in ("ddpm_core", "diffusers")
        )
        ratio, aim = ours / theirs, AIMS[config, mode]
        verdict = "reached" if ratio >= aim else "not reached"
        lines.append(f"{config} {mode}: {ratio:.2f} of diffusers, aim {aim}: {verdict}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small network, no file")
    words = "also compile the large network, and bf16 where it has no hardware: hours"
    parser.add_argument("--whole", action="store_true", help=words)
    parser.add_argument("--rounds", type=int, default=3)
    o = parser.parse_args()
    start = time.perf_counter()
    found = run(["small"] if o.quick else list(CONFIGS), o.rounds, o.whole)
    print(table(found), *marks(found), sep="\n")
    if not o.quick:
        behind = ("unet", "samplers", "process", "schedules")
        peers = ("diffusers", "denoising-diffusion-pytorch")
        results.write("bench", found, start, modules=behind, libraries=peers)


if __name__ == "__main__":
    main()
