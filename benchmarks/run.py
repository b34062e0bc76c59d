"""Measure our U-Net beside its peers, each at its best flags, and the sampler's overhead.

python benchmarks/run.py              all of it; writes book/results/bench.json
python benchmarks/run.py --quick      few repeats, the small network only; writes nothing

Every figure is the median of runs in processes of their own, the libraries by turns, so
that a machine that slows down slows them all.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

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

from ddpm_core.samplers import ancestral
from ddpm_core.schedules import linear

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "book" / "results" / "bench.json"
FLAGS = tuple(
    itertools.product(("fp32", "bf16"), ("contiguous", "channels_last"), (False, True))
)
LIMIT = 240  # seconds that a trial of flags may take, compiling included
SIDES, BATCH_SIZES = (8, 16, 32, 64), (1, 4, 16, 64)
# network, mode: our images/s over those of diffusers that we want to reach
AIMS = {("cifar10", "train"): 1.3, ("cifar10", "forward"): 1.3}
AIMS |= {("small", "train"): 2.5, ("small", "forward"): 2.5}


def measure(library: str, config: str, **how: Any) -> dict[str, Any]:
    """One process of measure.py; {} if it took too long or failed."""
    command = [sys.executable, str(ROOT / "benchmarks" / "measure.py")]
    command += ["--library", library, "--config", config]
    for key, value in how.items():
        command += [f"--{key}"] if value is True else []
        command += [f"--{key}", str(value)] if not isinstance(value, bool) else []
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


def best_flags(library: str, config: str) -> dict[str, Any]:
    """Try every combination of flags once; the fastest, with all that was tried."""
    tried = []
    for precision, layout, compiled in FLAGS:
        how = {"precision": precision, "layout": layout, "compile": compiled}
        found = measure(library, config, warm=0, repeats=2, **how)
        tried.append({**how, **found})
        print(f"  {library} {config} {how}: {rate(found)}", flush=True)
    best = max(tried, key=lambda row: row.get("images_per_second", 0.0))
    flags = {name: best[name] for name in ("precision", "layout", "compile")}
    return {"tried": tried, "best": flags}


def rate(found: dict[str, Any]) -> str:
    return f"{found['images_per_second']:.1f} images/s" if found else "none"


def race(
    config: str, best: dict[str, dict[str, Any]], mode: str, rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Each library at its best flags, by turns."""
    runs: dict[str, list[dict[str, Any]]] = {library: [] for library in best}
    for _ in range(rounds):
        for library, flags in best.items():
            runs[library].append(measure(library, config, mode=mode, **flags))
    return runs


def median_rate(runs: list[dict[str, Any]]) -> float:
    return statistics.median(r["images_per_second"] for r in runs if r)


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


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    names = ("torch", "torchvision", "diffusers", "denoising-diffusion-pytorch")
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
    }


def processor() -> str:
    """The processor's name, and those of its instruction sets that matter here."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    text = info.read_text()
    model = next(line for line in text.splitlines() if line.startswith("model name"))
    sets = [s for s in ("avx512f", "avx512_bf16", "amx_bf16") if f" {s}" in text]
    return f"{model.split(': ')[1]} ({', '.join(sets)})"


def run(configs: list[str], rounds: int, whole: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"machine": machine(), "same_function": {}, "races": {}}
    for config in configs:
        found["same_function"][config] = assert_same_function(config)
    found["flops"] = {
        f"{library} {config}": flops(library, CONFIGS[config])
        for library in LIBRARIES
        for config in configs
    }
    found["convolution_peak"] = convolution_peak()
    found["sampler_overhead"] = sampler_overhead() if whole else {}
    for config in configs:
        flags = {library: best_flags(library, config) for library in LIBRARIES}
        best = {library: flags[library]["best"] for library in LIBRARIES}
        races = {
            mode: race(config, best, mode, rounds) for mode in ("train", "forward")
        }
        found["races"][config] = {"flags": flags, **races}
    if whole:
        found["sides"] = {
            s: measure("ddpm_core", "small", side=s, mode="forward") for s in SIDES
        }
        found["batches"] = {
            b: measure("ddpm_core", "small", batch=b, mode="forward")
            for b in BATCH_SIZES
        }
    return found


def table(found: dict[str, Any]) -> str:
    """The races as Markdown: images/s, useful GFLOP/s, memory, and the ratio to ours."""
    lines = [
        "| network | library | flags | mode | images/s | GFLOP/s | MiB | ours/it |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for config, races in found["races"].items():
        for mode in ("train", "forward"):
            ours = median_rate(races[mode]["ddpm_core"])
            for library, runs in races[mode].items():
                here = median_rate(runs)
                work = found["flops"][f"{library} {config}"][mode == "train"] / 1e9
                best = races["flags"][library]["best"]
                flags = f"{best['precision']}, {best['layout']}"
                flags += ", compiled" if best["compile"] else ""
                peak = statistics.median(r["peak_mib"] for r in runs if r)
                lines.append(
                    f"| {config} | {library} | {flags} | {mode} | {here:.1f} | "
                    f"{here * work:.0f} | {peak:.0f} | {ours / here:.2f} |"
                )
    return "\n".join(lines)


def marks(found: dict[str, Any]) -> list[str]:
    """Which aims are reached."""
    lines = []
    for config, races in found["races"].items():
        for mode in ("train", "forward"):
            ratio = median_rate(races[mode]["ddpm_core"]) / median_rate(
                races[mode]["diffusers"]
            )
            aim = AIMS[config, mode]
            verdict = "reached" if ratio >= aim else "not reached"
            lines.append(
                f"{config} {mode}: {ratio:.2f} of diffusers, aim {aim}: {verdict}"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small network, no file")
    parser.add_argument("--rounds", type=int, default=3)
    o = parser.parse_args()
    start = time.perf_counter()
    found = run(["small"] if o.quick else list(CONFIGS), o.rounds, not o.quick)
    found["seconds"] = time.perf_counter() - start
    print(table(found), *marks(found), sep="\n")
    if not o.quick:
        from ddpm_core.files import write_atomically

        RESULT.parent.mkdir(exist_ok=True)
        write_atomically(RESULT, (json.dumps(found, indent=1) + "\n").encode())
        print(f"written: {RESULT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
