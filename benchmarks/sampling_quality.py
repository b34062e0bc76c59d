"""How good are samples, and how near to the flow, for how many evaluations?

python benchmarks/sampling_quality.py --weights digits

Writes book/results/fast_sampling.json, which the chapter on fewer steps shows: every
distance of every seed, with the command, the machine, the versions and the duration.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_core import data
from ddpm_core.files import load_pretrained
from ddpm_core.metrics import energy_distance
from ddpm_core.samplers import (
    State,
    ancestral,
    ddim,
    dpm_solver_2m,
    heun,
    kept_steps,
    last,
)
from ddpm_core.schedules import respace

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import results

EVALUATIONS = (5, 10, 20, 50)
DRAWN: dict[str, tuple[Callable[..., Iterator[State]], dict[str, Any]]] = {
    "DPM-Solver++(2M)": (dpm_solver_2m, {}),
    "Heun": (heun, {}),
    "DDIM": (ddim, {}),
    "ancestral, small": (ancestral, {"variance": "fixed_small"}),
    "ancestral, large": (ancestral, {"variance": "fixed_large"}),
}


def flat_energy(x: Tensor, reference: Tensor) -> float:
    """The distance of samples from the reference; any other of this form will do."""
    return energy_distance(x.flatten(1), reference.flatten(1))


def held_out(name: str) -> Tensor:
    """The images that the samples are held against: no network has seen them."""
    return (
        data.digits("test").images
        if name == "digits"
        else data.fashion_mnist("test").images
    )


def drawer(weights: str, batch: int = 256) -> Callable[..., Tensor]:
    """A function (name, evaluations, n, seed) that draws samples with these weights."""
    model, schedule, card = load_pretrained(weights)
    shape = (model.config.in_channels, *[model.config.image_size] * 2)

    def draw(name: str, evaluations: int, n: int, seed: int) -> Tensor:
        sampler, own = DRAWN[name]
        steps = (evaluations + 1) // 2 if sampler is heun else evaluations
        chain = respace(schedule, kept_steps(schedule.T, steps))
        generator = torch.Generator().manual_seed(seed)
        parts = torch.randn(n, *shape, generator=generator).split(batch)
        options = {"prediction": card["prediction"], "generator": generator, **own}
        return torch.cat([last(sampler(model, chain, x, **options)) for x in parts])

    return draw


def add_seed(
    found: dict[str, Any],
    draw: Callable[..., Tensor],
    reference: Tensor,
    n: int,
    seed: int,
) -> None:
    """Append the distances of one seed to the rows of `found["distance"]`."""
    counts = {name: [*EVALUATIONS] for name in DRAWN}
    for rule in ("small", "large"):
        counts[f"ancestral, {rule}"].append(found["T"])
    for name, asked in counts.items():
        for i, evaluations in enumerate(asked):
            start = time.perf_counter()
            made = draw(name, evaluations, n, seed).clamp(-1, 1)
            taken = time.perf_counter() - start
            rows = found["distance"].setdefault(name, [])
            if i == len(rows):
                odd = evaluations - (name == "Heun" and evaluations % 2 == 0)
                rows.append({"evaluations": odd, "distances": [], "seconds": []})
            rows[i]["distances"].append(flat_energy(made, reference))
            rows[i]["seconds"].append(taken)
            print(seed, name, evaluations, rows[i]["distances"][-1], taken, flush=True)


def flow(draw: Callable[..., Tensor], T: int, paths: int, seed: int) -> dict[str, Any]:
    """RMS distance, from the same x_T, to Heun's method on all T steps."""
    converged = draw("Heun", 2 * T, paths, seed)
    rows = {
        name: [
            {
                "evaluations": e - (name == "Heun" and e % 2 == 0),
                "rms": rms(draw(name, e, paths, seed) - converged),
            }
            for e in (*EVALUATIONS, 100)
        ]
        for name in ("DPM-Solver++(2M)", "Heun", "DDIM")
    }
    other = draw("DPM-Solver++(2M)", T, paths, seed)
    return {"flow": rows, "flow_check": rms(other - converged)}


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--weights", default="digits")
    options.add_argument("--n", type=int, default=1024)
    options.add_argument(
        "--paths", type=int, default=256, help="x_T of the second panel"
    )
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = options.parse_args()
    start, draw = time.perf_counter(), drawer(given.weights)
    reference, T = held_out(given.weights), load_pretrained(given.weights)[1].T
    found: dict[str, Any] = {
        "weights": given.weights,
        "n": given.n,
        "reference": len(reference),
        "T": T,
        "seeds": [],
        "distance": {},
        "paths": given.paths,
        **flow(draw, T, given.paths, given.seeds[0]),
    }
    behind = ("samplers", "process", "schedules", "metrics")
    for seed in given.seeds:
        add_seed(found, draw, reference, given.n, seed)
        found["seeds"].append(seed)
        results.write(
            "fast_sampling", found, start, modules=behind, weights=[given.weights]
        )


if __name__ == "__main__":
    main()
