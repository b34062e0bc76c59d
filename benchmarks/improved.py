"""Bits per dimension with fixed, measured and learned variances: book/results/improved.json

python benchmarks/improved.py               digits, then Fashion-MNIST (DDPM_DATA)
python benchmarks/improved.py --steps 20 20 --seeds 1     a trial: overwrites it too

Two networks a seed, one trained by L_simple and one by the hybrid loss: they start from
the same weights and see the same images, steps and noise. The digits' start from the
weights that ship. The file is written anew after every seed.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_core import data
from ddpm_core.files import load_pretrained
from ddpm_core.improved import (
    best_variance,
    hybrid_loss,
    learned_reverse,
    squared_errors,
    widen,
)
from ddpm_core.losses import (
    Reverse,
    bits_per_dim,
    fixed_variance,
    variational_bound,
    x_0_guess,
)
from ddpm_core.schedules import Schedule, cosine
from ddpm_core.training import TrainConfig, Trainer, stream
from ddpm_core.unet import UNet, UNetConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import results

SMALL = UNetConfig(28, 1, 1, 16, (1, 2), 1, (7,), groups=8, patch=2)  # Fashion-MNIST


class HybridTrainer(Trainer):
    """The book's trainer with the hybrid loss in the place of L_simple."""

    def losses(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        levels = 17 if x_0.shape[-1] == 8 else 256
        args = self.network, self.schedule, x_0, t, eps
        return hybrid_loss(*args, levels=levels, clip=True)


def remembered(model: UNet) -> Callable[[Tensor, Tensor], Tensor]:
    """The model; remembers its answers, for the same x_t again."""
    kept: dict[tuple[float, int], Tensor] = {}

    def ask(x_t: Tensor, t: Tensor) -> Tensor:
        key = x_t.double().sum().item(), int(t.sum())
        if key not in kept:
            kept[key] = model(x_t, t)
        return kept[key]

    return ask


@torch.no_grad()
def judge(
    model: UNet, schedule: Schedule, seen: Tensor, unseen: Tensor
) -> dict[str, float]:
    """Bits per dimension on `unseen` for each variance, all with the same noise."""
    ask, dims, bits = remembered(model), unseen[0].numel(), {}
    guess = x_0_guess(lambda x, t: ask(x, t)[:, : x.shape[1]], schedule)
    some = torch.Generator().manual_seed(3)
    error = squared_errors(guess, schedule, seen, clip=True, generator=some)
    by_step = best_variance(schedule, error.flatten(1).mean(1))
    by_pixel = best_variance(schedule, error).float()
    tables = {"fixed_large": "fixed_large", "fixed_small": "fixed_small"}
    chains: dict[str, Reverse] = {
        name: fixed_variance(guess, schedule, table, clip=True)
        for name, table in {**tables, "closed form, by t": by_step}.items()
    }
    mean = chains["fixed_large"]
    chains["closed form, by t and pixel"] = lambda x, t: (mean(x, t)[0], by_pixel[t])
    if model.config.out_channels > 1:
        chains["learned"] = learned_reverse(ask, schedule, clip=True)
    for name, chain in chains.items():
        levels, some = 17 if dims == 64 else 256, torch.Generator().manual_seed(7)
        bound = variational_bound(
            chain, schedule, unseen, levels=levels, chunk=4, generator=some
        )
        bits[name] = bits_per_dim(bound.total, dims).mean().item()
    return bits


def some_of(images: Tensor, n: int, seed: int) -> Tensor:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order[:n]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs=2, default=[300, 300])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    network, schedule, _ = load_pretrained("digits")
    began, found = time.perf_counter(), dict[str, Any]()
    plan: list[tuple[str, Any, Schedule, int, int, float]] = [
        ("digits", data.digits, schedule, 60, 80, 5e-4),
        ("Fashion-MNIST", data.fashion_mnist, cosine(50), 60, 60, 4e-3),
    ]
    for (name, load, table, n_seen, n, lr), steps in zip(
        plan, options.steps, strict=True
    ):
        images, start = load("train").images, time.process_time()
        seen, unseen = some_of(images, n_seen, 2), some_of(load("test").images, n, 1)
        part: dict[str, Any] = {"images": n, "steps": steps, "batch_size": 64, "lr": lr}
        part |= {"schedule": "cosine", "T": table.T, "from": "random weights"}
        if name == "digits":
            part |= {"from": "the weights that ship"}
            part["before"] = judge(network, table, seen, unseen)
        found[name] = part | {"seeds": {}}
        for seed in range(options.seeds):
            run = TrainConfig(steps, 64, lr, steps // 20, "linear", seed=seed)
            runs = found[name]["seeds"][str(seed)] = {}
            for arm, kind in (("simple", Trainer), ("hybrid", HybridTrainer)):
                model = UNet(SMALL, stream(seed, "weights", 0))
                model = copy.deepcopy(network) if name == "digits" else model
                model = widen(model) if arm == "hybrid" else model
                trainer = kind(model, table, images, run)
                for _ in trainer.steps():
                    pass
                model.load_state_dict(trainer.ema.average)
                bits = judge(model.eval(), table, seen, unseen)
                runs[arm] = {"bits": bits}
                print(name, seed, arm, bits, flush=True)
            seconds = round(time.process_time() - start, 1)
            found[name]["seconds of one thread"] = seconds
            behind = ("improved", "losses", "process", "schedules", "training")
            results.write(
                "improved", {"data": found}, began, modules=behind, weights=["digits"]
            )


if __name__ == "__main__":
    main()
