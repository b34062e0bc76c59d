"""The same data, the same compute time: whose trainer gives the better samples?

python benchmarks/quality.py          all of it; writes book/results/quality.json
python benchmarks/quality.py --minutes 0.1 --n 64      a trial; writes nothing

Our trainer, denoising-diffusion-pytorch's and the loop of diffusers' tutorial, each at its
own documented defaults (trainers.py has them, with the places), train on Fashion-MNIST
for the same CPU time, each in a process of its own. One sampler of ours draws from all
three, and one feature network judges. Everything that decides is fixed below. What is
trained is kept in the user's cache: an interrupted benchmark goes on with it. One
training each: the spread that is shown is that of the samples, not of the trainings.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import trainers
from torch import Tensor
from trainers import OURS, RUNS, THEIRS, TUTORIAL, Clock, Denoiser, denoiser

from ddpm_core.data import user_cache
from ddpm_core.evaluate import quality, spread_over
from ddpm_core.features import Reference, load_reference
from ddpm_core.files import load_tensors, save_tensors
from ddpm_core.interchange import unet_fields
from ddpm_core.sample import shortened
from ddpm_core.samplers import dpm_solver_2m, last
from ddpm_core.training import stream

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import results

MINUTES = 20.0  # of one processor, for each training
# One thread: where several wait for one another, they do so at full speed, and on a
# machine that does anything else the budget goes into waiting, tenfold for some.
THREADS = 1
WARM_SECONDS, SKIP = 30.0, 3  # of a throw-away copy, to time a step; its first steps
EVALUATIONS, CLIP = 20, True  # of DPM-Solver++(2M), x_0 cut to [-1, 1]
N, SEEDS, BATCH = 2048, (0, 1, 2), 256  # samples of each seed; drawn at once
REFERENCE = "fashion-mnist"  # its feature network, and features of 10,000 test images
AIM = 0.8  # our mean distance over that of the better peer, at most
REAL, UNTRAINED = "real training images", "untrained network of ours"

ORDER = (OURS, TUTORIAL, THEIRS)
LIBRARIES = ("accelerate", "diffusers", "denoising-diffusion-pytorch", "torchmetrics")
TRAINING = ("ema", "losses", "process", "schedules", "train", "training", "unet")
JUDGING = ("evaluate", "features", "metrics", "samplers")
YARDSTICK = ("features/fashion-mnist", "features/fashion-mnist-reference")


def train_one(name: str, minutes: float, path: Path) -> None:
    """Train for the budget and write weights and record; in a process of its own."""
    torch.set_num_threads(THREADS)
    budget = 60 * minutes
    with tempfile.TemporaryDirectory() as scratch:
        warm = Clock(min(WARM_SECONDS, budget), at_least=SKIP + 2)
        timed(RUNS[name](trainers.NEVER, Path(scratch)), warm)
        cost = trainers.step_seconds(warm.stamps, SKIP)
        steps = trainers.planned_steps(cost, budget)
        run, clock = RUNS[name](steps, Path(scratch)), Clock(budget)
        wall, others = timed(run, clock)
    weights = run.weights()
    record = {
        "parameters": sum(x.numel() for x in weights.values()),
        "settings": run.settings,
        "warm_up": {"steps": warm.steps, "seconds_per_step": cost},
        "steps_planned": steps,
        "steps": clock.steps,
        "images_seen": clock.steps * run.batch_size,
        "cpu_seconds": clock.spent,
        "wall_seconds": wall,
        "cpu_seconds_of_loaders": others,  # not counted: only one peer has them
    }
    told = {"record": record, "made_with": made_with(name, minutes)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, weights, {k: json.dumps(v) for k, v in told.items()})


def timed(run: trainers.Run, clock: Clock) -> tuple[float, float]:
    """Train until the clock says stop; wall seconds, CPU seconds of other processes."""
    others, start = trainers.children_seconds(), time.perf_counter()
    clock.start()
    run.train(clock)
    wall = time.perf_counter() - start
    run.close()
    return wall, trainers.children_seconds() - others


def made_with(name: str, minutes: float) -> dict[str, Any]:
    """What weights rest on: if it is another, they are trained anew."""
    settings = {
        OURS: [trainers.NETWORK],
        THEIRS: [trainers.UNET, trainers.DIFFUSION, trainers.TRAINER],
        TUTORIAL: [trainers.LOOP, unet_fields(trainers.CONFIG)],
    }
    found = {
        "minutes": minutes,
        "threads": THREADS,
        "settings": settings[name],
        "modules": results.digest(results.bytes_behind(TRAINING, ())),
        "versions": {n: version(n) for n in ("torch", *LIBRARIES)},
        "machine": results.machine(),
    }
    again: dict[str, Any] = json.loads(json.dumps(found))  # tuples as a file has them
    return again


def kept(path: Path, wanted: dict[str, Any]) -> tuple[dict[str, Any], Any] | None:
    """Record and weights of an earlier run; None if it did not end, or was another."""
    try:
        weights, told = load_tensors(path)
    except (FileNotFoundError, ValueError):
        return None
    if json.loads(told.get("made_with", "null")) != wanted:
        return None
    return json.loads(told["record"]), weights


def launch(name: str, minutes: float, path: Path) -> None:
    """`train_one` in a process of its own, on a CPU. Raises RuntimeError if it fails."""
    words = ["--train", name, "--minutes", str(minutes), "--out", str(path)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(THREADS))
    cpu = {"ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(Path(__file__).resolve()), *words]
    env = {**os.environ, **threads, **cpu}
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{name} did not end:\n{done.stderr[-3000:]}")


def trained(name: str, minutes: float) -> tuple[dict[str, Any], Any]:
    """Record and weights of a trainer: of an earlier run, or trained now."""
    path = user_cache() / "quality" / f"{name}-{minutes:g}.safetensors"
    wanted = made_with(name, minutes)
    found = kept(path, wanted)
    if found is not None:
        print(f"{name}: was trained before", flush=True)
        return found
    print(f"{name}: {minutes:g} CPU minutes, after a warm-up", flush=True)
    launch(name, minutes, path)
    found = kept(path, wanted)
    if found is None:
        raise RuntimeError(f"the process that trained {name} left nothing in {path}")
    return found


def draw(one: Denoiser, n: int, seed: int) -> Tensor:
    """Samples [n, 1, 28, 28]; the same x_T for every network."""
    shape = (n, 1, trainers.SIDE, trainers.SIDE)
    x_T = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    model, schedule = one.model, shortened(one.schedule, EVALUATIONS)
    parts = [
        last(dpm_solver_2m(model, schedule, x, prediction=one.prediction, clip=CLIP))
        for x in torch.split(x_T, BATCH)
    ]
    return torch.cat(parts)


def real(images: Tensor, n: int, seed: int) -> Tensor:
    """Training images, drawn at random without repetition."""
    order = torch.randperm(len(images), generator=stream(seed, "real images", 0))
    return images[order[:n]]


def judged(sets: Sequence[Tensor], reference: Reference) -> dict[str, Any]:
    """The distances of several sets of images, and all else that is measured of them."""
    found = [
        quality(x, reference, seed)._asdict()
        for seed, x in zip(SEEDS, sets, strict=True)
    ]
    return {"distances": [q["frechet"] for q in found], "quality": found}


def judge(one: Denoiser, n: int, reference: Reference) -> dict[str, Any]:
    """Draw with a network, with each seed, and measure."""
    start = time.perf_counter()
    sets = [draw(one, n, seed) for seed in SEEDS]
    return judged(sets, reference) | {"seconds_to_draw": time.perf_counter() - start}


def protocol(minutes: float, n: int) -> dict[str, Any]:
    """What was fixed before anything ran."""
    return {
        "data": "Fashion-MNIST, 60,000 training images of 28 x 28",
        "budget": {
            "minutes": minutes,
            "of": "CPU time (user + system) of the training process, all threads",
            "threads": THREADS,
        },
        "steps": f"budget over the mean CPU time of a step in {WARM_SECONDS:g} CPU s of a "
        f"throw-away copy, the first {SKIP} steps left out; stopped at the budget",
        "sampler": {"name": "DPM-Solver++(2M)", "steps": EVALUATIONS, "clip": CLIP},
        "n": n,
        "seeds": list(SEEDS),
        "reference": f"{REFERENCE}: the feature network that ships, 10,000 test images",
    }


def verdict(rows: dict[str, Any]) -> dict[str, Any] | None:
    """Our mean distance over that of the better peer; None before all are there."""
    if not rows.keys() >= set(ORDER):
        return None
    means = {name: statistics.fmean(rows[name]["distances"]) for name in ORDER}
    best = min((THEIRS, TUTORIAL), key=lambda name: means[name])
    ratio = means[OURS] / means[best]
    return {"better_peer": best, "ratio": ratio, "aim": AIM, "reached": ratio <= AIM}


def in_words(found: dict[str, Any] | None) -> str:
    """The verdict in a line."""
    if found is None:
        return "no verdict yet"
    reached = "reached" if found["reached"] else "not reached"
    return f"{found['ratio']:.2f} of {found['better_peer']}, aim {AIM}: {reached}"


def table(rows: dict[str, Any]) -> str:
    """Markdown: Fréchet distances, and what went into them."""
    names = ["samples from", "parameters", "steps", "images seen", "CPU s", "wall s"]
    names += ["Fréchet distance, by seed", "mean", "spread"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for name, row in rows.items():
        each = row["distances"]
        cells = ["–"] * 5
        if "steps" in row:
            keys = ("parameters", "steps", "images_seen", "cpu_seconds", "wall_seconds")
            cells = [f"{row[key]:,.0f}" for key in keys]
        cells.append(", ".join(f"{x:.4g}" for x in each))
        cells += [f"{statistics.fmean(each):.4g}", f"{spread_over(each) or 0:.2g}"]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def run(minutes: float, n: int) -> dict[str, Any]:
    """The whole benchmark; a result is stored anew after each trainer, unless a trial."""
    start, reference = time.perf_counter(), load_reference(REFERENCE)
    images = trainers.images()
    rows: dict[str, Any] = {}
    rows[REAL] = judged([real(images, n, seed) for seed in SEEDS], reference)
    for name in ORDER:
        before = time.perf_counter()
        record, weights = trained(name, minutes)
        if time.perf_counter() - before < record["wall_seconds"]:
            start -= record["wall_seconds"]  # an earlier run's time counts as well
        one = denoiser(name, record["settings"], weights)
        rows[name] = record | judge(one, n, reference)
        if name == OURS:
            blank = denoiser(name, record["settings"], None)
            rows[UNTRAINED] = judge(blank, n, reference)
        found = {**protocol(minutes, n), "rows": rows, "verdict": verdict(rows)}
        print(table(rows), in_words(found["verdict"]), sep="\n", flush=True)
        if (minutes, n) == (MINUTES, N):
            behind = (*TRAINING, *JUDGING)
            results.write(
                "quality",
                found,
                start,
                modules=behind,
                weights=YARDSTICK,
                libraries=LIBRARIES,
            )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words = "CPU minutes of each training; another number is a trial [%(default)g]"
    parser.add_argument("--minutes", type=float, default=MINUTES, help=words)
    words = "samples of each seed; another number is a trial [%(default)s]"
    parser.add_argument("--n", type=int, default=N, help=words)
    parser.add_argument("--train", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    o = parser.parse_args(arguments)
    if o.train:
        train_one(o.train, o.minutes, o.out)
        return
    run(o.minutes, o.n)
    if (o.minutes, o.n) != (MINUTES, N):
        print("a trial: nothing is written")


if __name__ == "__main__":
    main()
