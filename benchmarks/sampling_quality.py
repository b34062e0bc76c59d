"""How good are samples, and how near to the flow, for how many evaluations?

python benchmarks/sampling_quality.py --weights digits

Writes book/results/fast_sampling.json, which the chapter on fewer steps shows: every
distance of every seed, with the command, the machine, the versions and the duration.
"""

import argparse
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_core import data, samplers
from ddpm_core.files import load_pretrained
from ddpm_core.metrics import energy_distance
from ddpm_core.samplers import State, ancestral, ddim, dpm_solver_2m, heun, kept_steps
from ddpm_core.schedules import respace

RESULT = Path(__file__).parents[1] / "book" / "results" / "fast_sampling.json"
EVALUATIONS = (5, 10, 20, 50, 100)
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


def measure(weights: str, n: int, seeds: list[int], batch: int = 256) -> dict[str, Any]:
    """Distances and RMS for every sampler and number of evaluations."""
    model, schedule, card = load_pretrained(weights)
    reference, shape = held_out(weights), (1, *[model.config.image_size] * 2)
    said = {"prediction": card["prediction"]}

    def draw(name: str, evaluations: int, n: int, seed: int) -> Tensor:
        sampler, options = DRAWN[name]
        steps = (evaluations + 1) // 2 if sampler is heun else evaluations
        chain = respace(schedule, kept_steps(schedule.T, steps))
        generator = torch.Generator().manual_seed(seed)
        parts = torch.randn(n, *shape, generator=generator).split(batch)
        options = {**said, **options, "generator": generator}
        return torch.cat(
            [samplers.last(sampler(model, chain, x, **options)) for x in parts]
        )

    def row(name: str, evaluations: int) -> dict[str, Any]:
        start = time.perf_counter()
        made = [draw(name, evaluations, n, seed).clamp(-1, 1) for seed in seeds]
        taken = (time.perf_counter() - start) / len(seeds)
        print(f"{name:18} {evaluations:4} {taken:6.1f} s", flush=True)
        asked = evaluations - (name == "Heun" and evaluations % 2 == 0)
        distances = [flat_energy(x, reference) for x in made]
        return {"evaluations": asked, "distances": distances, "seconds": taken}

    distance = {name: [row(name, e) for e in EVALUATIONS] for name in DRAWN}
    every = {
        f"ancestral, {v}": row(f"ancestral, {v}", schedule.T)
        for v in ("small", "large")
    }
    converged = draw("Heun", 2 * schedule.T, 256, seeds[0])
    other = draw("DPM-Solver++(2M)", schedule.T, 256, seeds[0])
    flow = {
        name: [
            {
                "evaluations": e - (name == "Heun" and e % 2 == 0),
                "rms": rms(draw(name, e, 256, seeds[0]) - converged),
            }
            for e in EVALUATIONS
        ]
        for name in ("DPM-Solver++(2M)", "Heun", "DDIM")
    }
    return {
        "T": schedule.T,
        "reference": len(reference),
        "distance": distance,
        "all_steps": every,
        "flow": flow,
        "flow_check": rms(other - converged),
    }


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--weights", default="digits")
    options.add_argument("--n", type=int, default=1024)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--out", type=Path, default=RESULT)
    given = options.parse_args()
    start = time.perf_counter()
    found = measure(given.weights, given.n, given.seeds)
    modules = [
        Path(samplers.__file__),
        *sorted(
            (Path(samplers.__file__).parent / "weights").glob(f"{given.weights}.*")
        ),
    ]
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in modules)).hexdigest()
    facts = {
        "command": f"python benchmarks/sampling_quality.py --weights {given.weights}",
        "weights": given.weights,
        "n": given.n,
        "seeds": given.seeds,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
        },
        "minutes": (time.perf_counter() - start) / 60,
        "digest": digest,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(
        json.dumps({**facts, **found}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
