"""Does training in bf16 end at the loss of float32? Three seeds, paired.

python benchmarks/precision.py        writes book/results/precision.json

Both trainings of a seed start from the same weights and see the same images, steps and
noise (draws are functions of the seed and the step), so the difference of their losses
has only the rounding in it.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

from ddpm_core.data import digits
from ddpm_core.schedules import cosine
from ddpm_core.training import TrainConfig, Trainer
from ddpm_core.unet import UNET_CONFIGS, UNet

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import results

SEEDS = (0, 1, 2)


def last_quarter(seed: int, precision: str, steps: int) -> float:
    """The mean loss over the last quarter of a training on the digits."""
    start = torch.Generator().manual_seed(seed)
    model = UNet(UNET_CONFIGS["digits"], start)
    config = TrainConfig(
        steps, batch_size=64, lr=1e-3, warmup=50, precision=precision, seed=seed
    )
    trainer = Trainer(model, cosine(), digits().images, config)
    losses = [progress.loss for progress in trainer.steps()]
    return statistics.fmean(losses[-(steps // 4) :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800)
    o = parser.parse_args()
    start, rows = time.perf_counter(), []
    for seed in SEEDS:
        row = {p: last_quarter(seed, p, o.steps) for p in ("fp32", "bf16")}
        rows.append({"seed": seed, **row})
        print(rows[-1], flush=True)
    differences = [row["bf16"] - row["fp32"] for row in rows]
    found = {
        "steps": o.steps,
        "losses": rows,
        "difference": statistics.fmean(differences),
        "standard_error": statistics.stdev(differences) / len(differences) ** 0.5,
    }
    print(found["difference"], "+-", found["standard_error"])
    results.write("precision", found, start, modules=["training", "unet", "losses"])


if __name__ == "__main__":
    main()
