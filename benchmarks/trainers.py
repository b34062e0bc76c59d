"""Three trainers, each at its own documented defaults, all stopped by the same clock.

Ours is `python -m ddpm_core.train` without a flag on how to learn. The settings of its
peers stand below, each beside the line of their documentation that it comes from; where
we had to depart from it, beside the reason. Sources:

- denoising-diffusion-pytorch 2.3: its README and the signatures of its classes, read at
  https://github.com/lucidrains/denoising-diffusion-pytorch
- diffusers: the tutorial "Train a diffusion model", read at
  https://huggingface.co/docs/diffusers/tutorials/basic_training
"""

import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from networks import CONFIGS, at_side
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ddpm_core import train
from ddpm_core.evaluate import as_bytes
from ddpm_core.interchange import unet_fields
from ddpm_core.schedules import SCHEDULES, Schedule, from_beta
from ddpm_core.training import stream
from ddpm_core.unet import UNET_CONFIGS, UNet

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import results

OURS, THEIRS, TUTORIAL = "ddpm_core", "denoising-diffusion-pytorch", "diffusers"
DATA, NETWORK, SIDE, SEED = "fashion_mnist", "fashion28", 28, 0
NEVER = 10**9  # a number of steps that no run comes to

# denoising-diffusion-pytorch. The defaults of its classes, as ours are those of the
# command. The example in its README, made for 700,000 steps, takes 64 images a step
# ("train_batch_size = 32", "gradient_accumulate_every = 2") at "train_lr = 8e-5": a
# quarter of the steps in the same time, and each of them smaller.
UNET: dict[str, Any] = {
    "dim": 32,  # README: "dim = 64"; halved, for 2.6 million parameters
    "dim_mults": (1, 2, 4),  # README: "(1, 2, 4, 8)"; a side of 28 halves twice only
    "channels": 1,  # class Unet: "channels = 3"; the images are grey
}
DIFFUSION: dict[str, Any] = {
    "image_size": SIDE,  # README: "image_size = 128"; the side of our images
    "timesteps": 1000,  # README: "timesteps = 1000    # number of steps"
    "objective": "pred_v",  # class GaussianDiffusion: "objective = 'pred_v'"
    "beta_schedule": "sigmoid",  # class GaussianDiffusion: "beta_schedule = 'sigmoid'"
}
TRAINER: dict[str, Any] = {
    "train_batch_size": 16,  # class Trainer: "train_batch_size = 16"
    "gradient_accumulate_every": 1,  # class Trainer: "gradient_accumulate_every = 1"
    "augment_horizontal_flip": True,  # class Trainer: "augment_horizontal_flip = True"
    "train_lr": 1e-4,  # class Trainer: "train_lr = 1e-4"
    "ema_update_every": 10,  # class Trainer: "ema_update_every = 10"
    "ema_decay": 0.995,  # class Trainer: "ema_decay = 0.995"
    "adam_betas": (0.9, 0.99),  # class Trainer: "adam_betas = (0.9, 0.99)"
    "amp": False,  # class Trainer: "amp = False" (README: True, by fp16: for a GPU)
    "max_grad_norm": 1.0,  # class Trainer: "max_grad_norm = 1."
    "calculate_fid": False,  # class Trainer: "calculate_fid = True"; we judge at the end
    # class Trainer: "save_and_sample_every = 1000"; samples would cost it its time
    "save_and_sample_every": NEVER,
    # class Trainer: "train_num_steps = 100000"; by the rule of planned_steps
}

# diffusers' tutorial.
# "block_out_channels=(128, 128, 256, 256, 512, 512)" at "image_size = 128"; for a side
# of 28 and 3.7 million parameters, the network that `make bench` times. As there:
# "layers_per_block=2"
CONFIG = at_side(CONFIGS["small"], SIDE)
LOOP: dict[str, Any] = {
    "train_batch_size": 16,  # "train_batch_size = 16"
    "gradient_accumulation_steps": 1,  # "gradient_accumulation_steps = 1"
    "learning_rate": 1e-4,  # "learning_rate = 1e-4"
    "lr_warmup_steps": 500,  # "lr_warmup_steps = 500"
    "num_train_timesteps": 1000,  # "DDPMScheduler(num_train_timesteps=1000)"
    "max_grad_norm": 1.0,  # "accelerator.clip_grad_norm_(model.parameters(), 1.0)"
    # 'mixed_precision = "fp16"  # `no` for float32, `fp16` for automatic mixed precision';
    # CPUs train in bf16 at best, and without instructions for it that is the slower way
    "mixed_precision": "bf16" if "bf16" in results.processor() else "no",
    # "num_training_steps=(len(train_dataloader) * config.num_epochs)"; by the rule of
    # planned_steps. No tracker, no samples, nothing pushed: that would cost it its time
}


class Clock:
    """Stops a training at so many CPU seconds; knows when each of its steps ended.

    CPU seconds are user and system time of all threads of this process, so that other
    processes on the machine do not count. The step under way is finished, and there
    are `at_least` so many of them.
    """

    def __init__(
        self,
        seconds: float,
        at_least: int = 1,
        now: Callable[[], float] = time.process_time,
    ) -> None:
        self.seconds, self.at_least, self.now = seconds, at_least, now
        self.stamps: list[float] = []

    def start(self) -> None:
        self.stamps = [self.now()]

    def tick(self) -> bool:
        """A step is done. Is there time for another one?"""
        self.stamps.append(self.now())
        return self.steps < self.at_least or self.spent < self.seconds

    @property
    def steps(self) -> int:
        return len(self.stamps) - 1

    @property
    def spent(self) -> float:
        return self.stamps[-1] - self.stamps[0]


def step_seconds(stamps: Sequence[float], skip: int) -> float:
    """CPU seconds of a step: the mean over a warm-up, its first `skip` steps left out."""
    return (stamps[-1] - stamps[skip]) / (len(stamps) - 1 - skip)


def planned_steps(cost: float, budget: float) -> int:
    """The rule, the same for all: as many steps as the budget pays for, at least one."""
    return max(1, int(budget / cost))


@dataclass
class Run:
    """A training that is ready to start.

    `train` runs to its number of steps unless the clock stops it; `weights` are those
    that the trainer would hand to its user, by name; `settings` is what is stored.
    """

    train: Callable[[Clock], None]
    weights: Callable[[], dict[str, Tensor]]
    batch_size: int
    settings: dict[str, Any]
    close: Callable[[], None] = lambda: None


def images() -> Tensor:
    """The training images, the same for all three: [60000, 1, 28, 28] in [-1, 1]."""
    return train.read_data(DATA, NETWORK, None)


def our_run(steps: int, scratch: Path) -> Run:
    """The trainer of the command line: data, network and steps are named, no more."""
    words = [str(scratch / "run"), "--data", DATA, "--network", NETWORK]
    words += ["--steps", str(steps), "--device", "cpu", "--seed", str(SEED)]
    trainer = train.build(train.read_options(train.parser(), words))

    def go(clock: Clock) -> None:
        for _ in trainer.steps():
            if not clock.tick():
                return

    settings = train.facts(trainer)
    del settings["training"]["steps_done"]  # none yet
    return Run(go, trainer.ema.state_dict, trainer.config.batch_size, settings)


def write_pictures(folder: Path) -> None:
    """The training images as PNG files; nothing is lost. Does nothing the second time."""
    if folder.exists():
        return
    folder.mkdir()
    for i, image in enumerate(as_bytes(images())[:, 0].numpy()):
        Image.fromarray(image).save(folder / f"{i:05}.png")


def their_diffusion(network: nn.Module | None = None, **more: Any) -> Any:
    """denoising-diffusion-pytorch's diffusion around its network, or around another."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    return GaussianDiffusion(network or Unet(**UNET), **DIFFUSION, **more)


def their_run(steps: int, scratch: Path) -> Run:
    """denoising-diffusion-pytorch's Trainer on a folder of pictures; its EMA's weights."""
    from denoising_diffusion_pytorch import Trainer

    write_pictures(scratch / "pictures")
    torch.manual_seed(SEED)
    trainer = Trainer(
        their_diffusion(),
        str(scratch / "pictures"),
        train_num_steps=steps,
        results_folder=str(scratch / "results"),
        **TRAINER,
    )

    def go(clock: Clock) -> None:
        def stop(*_: Any) -> None:
            if not clock.tick():  # its loop asks for this number before each step
                trainer.train_num_steps = trainer.step + 1

        hook = trainer.opt.optimizer.register_step_post_hook(stop)
        trainer.train()
        hook.remove()

    def close() -> None:  # ends the processes that load its images
        trainer.dl.close()
        gc.collect()

    def weights() -> dict[str, Tensor]:
        found: dict[str, Tensor] = trainer.ema.ema_model.model.state_dict()
        return found

    settings = {"Unet": UNET, "GaussianDiffusion": DIFFUSION, "Trainer": TRAINER}
    return Run(go, weights, TRAINER["train_batch_size"], settings, close)


class Mirrored(Dataset[Tensor]):
    """Images in memory, half of them mirrored: "transforms.RandomHorizontalFlip()"."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> Tensor:
        image = self.images[place]
        return image.flip(-1) if torch.rand(1) < 0.5 else image


def noise_scheduler() -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(num_train_timesteps=LOOP["num_train_timesteps"])


def tutorial_network() -> nn.Module:
    from diffusers import UNet2DModel

    network: nn.Module = UNet2DModel(**unet_fields(CONFIG))
    return network


def tutorial_run(steps: int, scratch: Path) -> Run:
    """The loop of diffusers' tutorial; the last weights, as it has no average."""
    from accelerate import Accelerator
    from diffusers.optimization import get_cosine_schedule_with_warmup

    torch.manual_seed(SEED)
    model, scheduler = tutorial_network(), noise_scheduler()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LOOP["learning_rate"])
    loader = DataLoader(Mirrored(images()), LOOP["train_batch_size"], shuffle=True)
    lr_scheduler = get_cosine_schedule_with_warmup(
        optimizer=optimizer,
        num_warmup_steps=LOOP["lr_warmup_steps"],
        num_training_steps=steps,
    )
    keys = ("mixed_precision", "gradient_accumulation_steps")
    accelerator = Accelerator(cpu=True, **{key: LOOP[key] for key in keys})
    parts = accelerator.prepare(model, optimizer, loader, lr_scheduler)
    model, optimizer, loader, lr_scheduler = parts

    def step(clean: Tensor) -> None:
        noise = torch.randn(clean.shape)
        t = torch.randint(0, LOOP["num_train_timesteps"], (len(clean),))
        noisy = scheduler.add_noise(clean, noise, t)
        with accelerator.accumulate(model):
            found = model(noisy, t, return_dict=False)[0]
            accelerator.backward(nn.functional.mse_loss(found, noise))
            accelerator.clip_grad_norm_(model.parameters(), LOOP["max_grad_norm"])
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()

    def go(clock: Clock) -> None:
        while True:
            for clean in loader:
                step(clean)
                if not clock.tick() or clock.steps == steps:
                    return

    def weights() -> dict[str, Tensor]:
        found: dict[str, Tensor] = accelerator.unwrap_model(model).state_dict()
        return found

    settings = {**LOOP, "UNet2DModel": unet_fields(CONFIG)}
    return Run(go, weights, LOOP["train_batch_size"], settings)


RUNS: dict[str, Callable[[int, Path], Run]] = {
    OURS: our_run,
    THEIRS: their_run,
    TUTORIAL: tutorial_run,
}


class FromZero(nn.Module):
    """A peer's network with our interface: its t counts from 0, ours from 1."""

    def __init__(self, network: Callable[..., Any]) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.network(x, t - 1)
        found: Tensor = y if isinstance(y, Tensor) else y.sample
        return found


class Denoiser(NamedTuple):
    """What our sampler needs to draw with a trained network."""

    model: nn.Module
    schedule: Schedule
    prediction: str


def our_denoiser(settings: dict[str, Any]) -> tuple[nn.Module, Denoiser]:
    network = UNet(UNET_CONFIGS[NETWORK], stream(SEED, "weights", 0))
    kind = settings["schedule"]
    schedule = SCHEDULES[kind["name"]](kind["T"])
    return network, Denoiser(network, schedule, settings["prediction"])


def their_denoiser(settings: dict[str, Any]) -> tuple[nn.Module, Denoiser]:
    diffusion = their_diffusion()
    schedule = from_beta(diffusion.betas, "sigmoid")
    return diffusion.model, Denoiser(FromZero(diffusion.model), schedule, "v")


def tutorial_denoiser(settings: dict[str, Any]) -> tuple[nn.Module, Denoiser]:
    network, schedule = tutorial_network(), from_beta(noise_scheduler().betas, "linear")
    return network, Denoiser(FromZero(network), schedule, "eps")


DENOISERS = {OURS: our_denoiser, THEIRS: their_denoiser, TUTORIAL: tutorial_denoiser}


def denoiser(
    name: str, settings: dict[str, Any], weights: dict[str, Tensor] | None
) -> Denoiser:
    """The network of a trainer with these weights; untrained for None."""
    network, found = DENOISERS[name](settings)
    if weights is not None:
        network.load_state_dict(weights)
    found.model.to(memory_format=torch.channels_last)
    return found


def children_seconds() -> float:
    """CPU seconds of the processes that this one has started, and that have ended."""
    spent = os.times()
    return spent.children_user + spent.children_system
