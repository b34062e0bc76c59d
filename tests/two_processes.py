"""What each process does that tests/test_distributed.py starts with torchrun."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ddpm_core import evaluate, sample, train
from ddpm_core.files import save_tensors
from ddpm_core.parallel import join
from ddpm_core.schedules import cosine
from ddpm_core.training import Processes, TrainConfig, Trainer
from ddpm_core.unet import UNet, UNetConfig

OPTIONS = ["--T", "20", "--batch-size", "8", "--steps", "5", "--warmup", "1"]
OPTIONS += ["--lr", "1e-3", "--save-every", "2", "--log-every", "1", "--device", "cpu"]
SAMPLES = ["--weights", "digits", "--samples", "5", "--batch", "2", "--steps", "3"]
SAMPLES += ["--device", "cpu", "--out"]
MEASURED = ["--weights", "digits", "--samples", "40", "--batch", "8", "--steps", "3"]
MEASURED += ["--bits", "4", "--strata", "3", "--device", "cpu", "--out"]
WRITERS = [(train, "save_checkpoint"), (train, "save_model")]
WRITERS += [(train, "write_atomically"), (sample, "write")]
WRITERS += [(evaluate, "write_atomically")]
SMALL = UNetConfig(4, 1, 1, 4, (1, 2), 1, (2,), groups=2)
CONFIG = TrainConfig(steps=8, batch_size=8, seed=3, accumulate=2)
IMAGES = torch.linspace(-1, 1, 64).reshape(64, 1, 1, 1).expand(64, 1, 4, 4).clone()


def small(config: TrainConfig, processes: Processes | None = None) -> Trainer:
    """A trainer whose network is not zero anywhere, on 64 images, each of one grey."""
    generator = torch.Generator().manual_seed(0)
    model = UNet(SMALL, generator)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return Trainer(model, cosine(20), IMAGES, config, processes=processes)


def gradient(run: Trainer) -> torch.Tensor:
    """The gradient of the first step, in one row."""
    run.accumulate(1)
    return torch.cat([p.grad.flatten() for p in run.model.parameters()])


def seen(run: Trainer) -> torch.Tensor:
    """The greys of the images that this process uses in one epoch."""
    found, losses = [], run.losses
    run.losses = lambda x_0, t, eps: (
        found.append(x_0[:, 0, 0, 0]) or losses(x_0, t, eps)
    )
    for _ in run.steps():
        pass
    return torch.cat(found)


@contextmanager
def stopped_after(step: int) -> Iterator[None]:
    """Send this process a SIGTERM in the middle of one step."""
    real = Trainer.one_step

    def one_step(self: Trainer) -> object:
        if self.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self)

    Trainer.one_step = one_step
    try:
        yield
    finally:
        Trainer.one_step = real


def note_writes(written: list[str]) -> None:
    """From now on, note each file that this process writes; a checkpoint's step, too."""

    def noting(real: Any) -> Any:
        def noted(path: Path, *rest: Any) -> Any:
            written.append(f"{path.name} {getattr(rest[0], 'step', '')}".strip())
            return real(path, *rest)

        return noted

    for module, name in WRITERS:
        setattr(module, name, noting(getattr(module, name)))


def main(folder: Path) -> None:
    processes, _ = join("cpu", 2)
    me = processes.rank
    mine = {"gradient": gradient(small(CONFIG, processes))}
    run = small(CONFIG, processes)
    mine["seen"] = seen(run)
    mine |= {f"ema.{k}": v for k, v in run.ema.state_dict().items()}
    save_tensors(folder / f"process-{me}.safetensors", mine)

    written: list[str] = []
    note_writes(written)
    train.main([str(folder / "whole"), *OPTIONS])
    sample.main([*SAMPLES, str(folder / "samples.npy")])
    evaluate.main([*MEASURED, str(folder / "measured.json")])
    (folder / f"written-{me}").write_text("\n".join(written))
    train.main([str(folder / "from_one"), *OPTIONS])
    with suppress(SystemExit), stopped_after(3 if me else 99):
        train.main([str(folder / "stopped"), *OPTIONS])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
