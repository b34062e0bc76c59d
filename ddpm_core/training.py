"""Written by tools/extract.py; edit the chapters:

- book/ddpm/training.ipynb
"""

import functools
import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddpm_core import checks
from ddpm_core.ema import EMA, ema_decay
from ddpm_core.files import (
    load_tensors,
    remove_leftovers,
    save_tensors,
    schedule_on,
    tensor_bytes,
)
from ddpm_core.losses import simple_loss
from ddpm_core.process import PREDICTIONS
from ddpm_core.schedules import Schedule
from ddpm_core.switching import mode

__all__ = [
    "DECAYS",
    "PRECISIONS",
    "SMALL",
    "Draws",
    "Processes",
    "Progress",
    "TrainConfig",
    "Trainer",
    "batch_indices",
    "check_checkpoint",
    "check_shares",
    "checkpoint_facts",
    "checkpoint_tensors",
    "choose_precision",
    "draws",
    "image_digest",
    "load_checkpoint",
    "loss_per_bin",
    "save_checkpoint",
    "stream",
    "stream_seed",
    "with_prefix",
]


# --- book/ddpm/training.ipynb · training-export-config · The optimiser
DECAYS = ("constant", "linear")
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class TrainConfig:
    r"""Everything that decides a training run, apart from model, schedule and data.

    `steps` optimiser steps on batches of `batch_size`, each split into `accumulate`
    parts; Adam with peak learning rate `lr`, reached after `warmup` steps, then
    `decay` "constant" or "linear" (to 0 at the end); gradients clipped to norm
    `clip_norm`; `ema_decay` None: from the run's length; `flip`: mirror half of the
    images; `precision` None: by `choose_precision`. Raises TypeError or ValueError.

    >>> TrainConfig(steps=100).learning_rate(50)
    0.0002
    """

    steps: int
    batch_size: int = 128
    lr: float = 2e-4
    warmup: int = 0
    decay: str = "constant"
    clip_norm: float = 1.0
    ema_decay: float | None = None
    accumulate: int = 1
    flip: bool = False
    prediction: str = "eps"
    precision: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate"):
            checks.integer(name, getattr(self, name), low=1)
        checks.integer("seed", self.seed)
        checks.integer("warmup", self.warmup, low=0, high=self.steps)
        checks.number("lr", self.lr, low=0.0)
        checks.number("clip_norm", self.clip_norm, low=0.0)
        checks.one_of("decay", self.decay, DECAYS)
        checks.one_of("prediction", self.prediction, PREDICTIONS)
        if self.precision is not None:
            checks.one_of("precision", self.precision, PRECISIONS)
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate = {self.accumulate} must divide "
                f"batch_size = {self.batch_size}"
            )

    def learning_rate(self, k: int) -> float:
        """The learning rate of step k = 1...steps, `eq-training-warmup`, `-decay`."""
        if k <= self.warmup:
            return self.lr * k / self.warmup
        if self.decay == "constant":
            return self.lr
        return self.lr * (self.steps - k + 1) / (self.steps - self.warmup)


# --- book/ddpm/training.ipynb · training-export-draws · Randomness as a function
def stream(seed: int, name: str, number: int) -> torch.Generator:
    r"""A CPU generator that depends on these three alone: seed, stream, number.

    The three are hashed, since generators seeded by neighbouring integers are no
    guarantee of unrelated numbers, and 0 + 1 must not be 1 + 0.

    >>> a, b = (torch.rand(1, generator=stream(0, "noise", k)).item() for k in (1, 2))
    >>> a == torch.rand(1, generator=stream(0, "noise", 1)).item(), a == b
    (True, False)
    """
    return torch.Generator().manual_seed(stream_seed(seed, name, number))


def stream_seed(seed: int, name: str, number: int) -> int:
    r"""63 bits of the SHA-256 of seed, stream and number.

    >>> 0 <= stream_seed(0, "noise", 1) < 2**63
    True
    """
    text = json.dumps([seed, name, number]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


@functools.lru_cache(maxsize=2)  # a batch touches two epochs; the next one, the same
def _epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    return torch.randperm(n, generator=stream(seed, "order", epoch))


def batch_indices(config: TrainConfig, step: int, n: int) -> Tensor:
    r"""Which of `n` images are in the batch of `step` (counted from 1), int64 [B].

    The epochs, each a permutation drawn from (seed, epoch), stand one after another;
    a batch is the next `batch_size` of them and may reach from one into the next.

    >>> first, second = (batch_indices(TrainConfig(9, 2), k, 4) for k in (1, 2))
    >>> sorted(torch.cat([first, second]).tolist())
    [0, 1, 2, 3]
    """
    checks.integer("step", step, low=1)
    checks.integer("n", n, low=1)
    start = (step - 1) * config.batch_size
    stop = start + config.batch_size
    epochs = range(start // n, (stop - 1) // n + 1)
    orders = [_epoch_order(config.seed, epoch, n) for epoch in epochs]
    offset = start // n * n
    return torch.cat(orders)[start - offset : stop - offset]


class Draws(NamedTuple):
    r"""The random numbers of one step: t int64 [B], eps [B, ...], flip bool [B].

    >>> Draws._fields
    ('t', 'eps', 'flip')
    """

    t: Tensor
    eps: Tensor
    flip: Tensor


def draws(
    config: TrainConfig, schedule: Schedule, step: int, shape: tuple[int, ...]
) -> Draws:
    r"""t, noise and flips of the whole batch of `step`, for samples of this shape.

    Functions of (seed, step) and of the place in the batch alone: drawn on the CPU,
    whatever the device and however the batch is split.

    >>> from ddpm_core.schedules import linear
    >>> draws(TrainConfig(9, 2), linear(), 1, (1, 8, 8)).eps.shape
    torch.Size([2, 1, 8, 8])
    """
    checks.integer("step", step, low=1)
    size, seed = config.batch_size, config.seed
    t = torch.randint(1, schedule.T + 1, (size,), generator=stream(seed, "t", step))
    eps = torch.randn(size, *shape, generator=stream(seed, "eps", step))
    flip = torch.rand(size, generator=stream(seed, "flip", step)) < 0.5
    return Draws(t, eps, flip & config.flip)


# --- book/ddpm/training.ipynb · training-export-precision · The trainer
SMALL = 1_000_000  # with fewer weights than this, bf16 gains nothing on a CPU


def choose_precision(device: torch.device | str, weights: int = 0) -> str:
    r"""The arithmetic of the forward pass: a rule, not a measurement.

    "bf16" on CUDA where the GPU has it in hardware (compute capability 8.0), "fp16"
    with loss scaling on older ones. On a CPU "bf16" if it multiplies matrices of it
    (AMX) and the network has a million weights. "fp32" everywhere else.

    >>> choose_precision("cpu", weights=176_849)
    'fp32'
    """
    kind = torch.device(device).type
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if native else "fp16"
    ask = getattr(torch.cpu, "get_capabilities", None)  # new in PyTorch 2.11
    amx = kind == "cpu" and ask is not None and ask().get("amx_bf16", False)
    return "bf16" if amx and weights >= SMALL else "fp32"


class Processes:
    r"""The processes that train together: here one, alone. `rank` counts from 0.

    `ddpm_core.parallel`, ahead in the book, has the answers for several.

    >>> alone = Processes()
    >>> alone.rank, alone.count, alone.add_up(torch.ones(2))
    (0, 1, tensor([1., 1.]))
    """

    rank = 0
    count = 1

    def wrap(self, model: nn.Module) -> nn.Module:
        """The network to call: one whose gradients are averaged over the processes."""
        return model

    def hold(self, network: nn.Module) -> AbstractContextManager[None]:
        """Keep gradients to oneself: more parts of the batch are to come."""
        return nullcontext()

    def add_up(self, x: Tensor) -> Tensor:
        """The sum of x over the processes, in each of them."""
        return x

    def first(self) -> AbstractContextManager[None]:
        """Let one process on each machine go first, as the one that downloads data."""
        return nullcontext()


class Progress(NamedTuple):
    r"""What `Trainer.steps` yields after each step.

    `step` counts from 1; `loss` is the batch's mean; `losses` [B] and `t` [B] belong to
    the samples (on the CPU); `grad_norm` is the gradient's before clipping.

    >>> Progress._fields
    ('step', 'loss', 'lr', 'grad_norm', 't', 'losses')
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    t: Tensor
    losses: Tensor


# --- book/ddpm/training.ipynb · training-export-trainer · The trainer
def check_shares(config: TrainConfig, count: int) -> None:
    r"""Raise ValueError unless a batch falls into equal parts for `count` processes.

    >>> check_shares(TrainConfig(steps=1, batch_size=6, accumulate=2), 2)
    Traceback (most recent call last):
    ValueError: batch_size = 6 must be a multiple of 2 processes times accumulate = 2
    """
    if config.batch_size % (count * config.accumulate):
        raise ValueError(
            f"batch_size = {config.batch_size} must be a multiple of {count} "
            f"processes times accumulate = {config.accumulate}"
        )


class Trainer:
    r"""Algorithm 1 (Ho et al. 2020) with warm-up, clipping and EMA, step by step.

    `images` [N, ...] in [-1, 1] may stay on the CPU; `schedule` and `model` are moved
    to `device`. `for progress in trainer.steps()` trains; the averaged weights are in
    `trainer.ema`, the number of steps done in `trainer.step`. Raises ValueError.

    >>> from ddpm_core.data import digits
    >>> from ddpm_core.schedules import cosine
    >>> from ddpm_core.unet import UNET_CONFIGS, UNet
    >>> config = TrainConfig(steps=2, batch_size=4)
    >>> model = UNet(UNET_CONFIGS["digits"], torch.Generator().manual_seed(0))
    >>> trainer = Trainer(model, cosine(200), digits().images, config)
    >>> [progress.step for progress in trainer.steps()]
    [1, 2]
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        images: Tensor,
        config: TrainConfig,
        device: torch.device | str = "cpu",
        processes: Processes | None = None,
    ) -> None:
        checks.tensor("images", images)
        checks.between("images", images, -1, 1)
        self.processes = processes or Processes()
        check_shares(config, self.processes.count)
        self.device = torch.device(device)
        weights = sum(p.numel() for p in model.parameters())
        chosen = config.precision or choose_precision(self.device, weights)
        # channels last: the same numbers, in the order that convolutions run fastest
        self.model = model.to(self.device)
        self.model.to(memory_format=torch.channels_last)
        self.network = self.processes.wrap(self.model)
        self.schedule = schedule_on(schedule, self.device)
        self.images, self.config, self.step = images, config, 0
        decay = config.ema_decay
        self.ema = EMA(model, ema_decay(config.steps) if decay is None else decay)
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam(model.parameters(), config.lr, fused=fused)
        self.compute_in(chosen)

    def compute_in(self, precision: str) -> None:
        """Set the arithmetic of the forward pass; float16 scales the loss."""
        self.precision = checks.one_of("precision", precision, PRECISIONS)
        scales = precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scales)

    def steps(self) -> Iterator[Progress]:
        """Train up to `config.steps`, yielding after each step; may be broken off."""
        while self.step < self.config.steps:
            yield self.one_step()

    def one_step(self) -> Progress:
        """One optimiser step: the gradient, clipped, the learning rate, Adam, EMA."""
        k = self.step + 1
        self.optimizer.zero_grad(set_to_none=True)
        with mode(self.model, training=True):
            t, losses = self.accumulate(k)
        loss = losses.mean().item()
        self.check_finite("loss", loss)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        length = float(norm)
        if not self.scaler.is_enabled() or self.scaler.get_scale() < 1:
            self.check_finite("length of the gradient", length)
        lr = self.config.learning_rate(k)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.ema.update(self.model)
        self.step = k
        return Progress(k, loss, lr, length, t, losses)

    def check_finite(self, name: str, value: float) -> None:
        """Stop the step under way, before it changes a weight, if `value` is no number."""
        if math.isfinite(value):
            return
        self.optimizer.zero_grad(set_to_none=True)
        raise FloatingPointError(
            f"step {self.step + 1}: the {name} is {value}; the weights are still those "
            f"of step {self.step}. Try a lower learning rate (lr), more warm-up "
            "(warmup), or float32 (precision='fp32')"
        )

    def accumulate(self, k: int) -> tuple[Tensor, Tensor]:
        """Add up the gradient of step k over the parts of its batch; (t, losses)."""
        config, count = self.config, self.processes.count
        which = batch_indices(config, k, len(self.images))
        drawn = draws(config, self.schedule, k, tuple(self.images.shape[1:]))
        x_0 = self.images[which.to(self.images.device)]
        mirror = drawn.flip.reshape(-1, *[1] * (x_0.ndim - 1)).to(x_0.device)
        x_0 = torch.where(mirror, x_0.flip(-1), x_0)
        losses = torch.zeros(config.batch_size, device=self.device)
        share = config.batch_size // count
        mine = self.parts()
        with torch.random.fork_rng(self.cuda_devices()):
            for place, part in mine.items():
                torch.manual_seed(stream_seed(config.seed, f"dropout {place}", k))
                noise = drawn.eps[part].to(x_0.dtype)
                inputs = (x_0[part], drawn.t[part], noise)
                last = place == max(mine)
                with nullcontext() if last else self.processes.hold(self.network):
                    loss = self.losses(*(x.to(self.device) for x in inputs))
                    mean = self.scaler.scale(loss.sum() / share)
                    torch.autograd.backward(mean)
                losses[part.to(self.device)] = loss.detach().float()
        return drawn.t, self.processes.add_up(losses).cpu()

    def parts(self) -> dict[int, Tensor]:
        """The parts of a batch that are this process's: number -> places."""
        each, rank = self.config.accumulate, self.processes.rank
        places = torch.arange(self.config.batch_size)
        parts = places.chunk(each * self.processes.count)
        return {i: parts[i] for i in range(rank * each, (rank + 1) * each)}

    def losses(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The loss of each sample, [B], in the precision that was chosen."""
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        kind = kinds.get(self.precision)
        low = torch.autocast(self.device.type, kind) if kind else nullcontext()
        with low:
            return simple_loss(
                self.network,
                self.schedule,
                x_0,
                t,
                eps,
                prediction=self.config.prediction,
            )

    def cuda_devices(self) -> list[torch.device]:
        """The devices, besides the CPU, whose generator dropout uses."""
        return [self.device] if self.device.type == "cuda" else []


# --- book/ddpm/training.ipynb · training-export-state · Stop and go on
def checkpoint_tensors(trainer: Trainer) -> dict[str, Tensor]:
    r"""Model, averaged weights and optimiser state as one flat dictionary of tensors.

    >>> from ddpm_core.schedules import cosine
    >>> from ddpm_core.unet import UNET_CONFIGS, UNet
    >>> model = UNet(UNET_CONFIGS["digits"])
    >>> trainer = Trainer(model, cosine(200), torch.zeros(1, 1, 8, 8), TrainConfig(1))
    >>> {name.split(".")[0] for name in checkpoint_tensors(trainer)} == {"model", "ema"}
    True
    """
    found = {f"model.{k}": v for k, v in trainer.model.state_dict().items()}
    found |= {f"ema.{k}": v for k, v in trainer.ema.state_dict().items()}
    for place, state in trainer.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{place}.{k}": v for k, v in state.items()}
    return found


def checkpoint_facts(trainer: Trainer) -> dict[str, Any]:
    r"""What must agree when a run is taken up again, and where it stands.

    >>> from ddpm_core.schedules import cosine
    >>> from ddpm_core.unet import UNET_CONFIGS, UNet
    >>> model = UNet(UNET_CONFIGS["digits"])
    >>> trainer = Trainer(model, cosine(200), torch.zeros(1, 1, 8, 8), TrainConfig(1))
    >>> checkpoint_facts(trainer)["step"]
    0
    """
    schedule = trainer.schedule
    return {
        "step": trainer.step,
        "config": asdict(trainer.config),
        "precision": trainer.precision,
        "schedule": {"name": schedule.name, "T": schedule.T},
        "images": image_digest(trainer.images),
        "scaler": trainer.scaler.state_dict(),
    }


def image_digest(images: Tensor) -> str:
    r"""A short digest of a data set, to notice that a run goes on with another one.

    >>> image_digest(torch.zeros(2)) == image_digest(torch.zeros(3))
    False
    """
    return hashlib.sha256(tensor_bytes(images)).hexdigest()[:16]


def save_checkpoint(path: str | Path, trainer: Trainer) -> None:
    r"""Write all that is needed to go on, as one safetensors file, atomically.

    One process alone may write `path`: unfinished files of killed ones are deleted.
    Raises OSError. See `load_checkpoint`.

    >>> save_checkpoint.__name__
    'save_checkpoint'
    """
    remove_leftovers(path)
    facts = json.dumps(checkpoint_facts(trainer))
    save_tensors(path, checkpoint_tensors(trainer), {"checkpoint": facts})


def load_checkpoint(path: str | Path, trainer: Trainer) -> None:
    r"""Put a trainer where another one was when it wrote `path`: bit for bit.

    The trainer must have been built with the same config, schedule and data; where its
    config leaves the precision open, that of the file is kept. Raises FileNotFoundError;
    ValueError if the file is damaged or of another run, and then changes nothing.

    >>> load_checkpoint("no/such/file", None)
    Traceback (most recent call last):
    FileNotFoundError: ...
    """
    tensors, metadata = load_tensors(path)
    if "checkpoint" not in metadata:
        raise ValueError(f"{path} is no checkpoint: save_checkpoint did not write it")
    facts = json.loads(metadata["checkpoint"])
    check_checkpoint(path, tensors, facts, trainer)
    trainer.model.load_state_dict(with_prefix(tensors, "model."))
    trainer.ema.load_state_dict(with_prefix(tensors, "ema."))
    parameters = list(trainer.model.parameters())
    state: dict[int, dict[str, Tensor]] = {}
    for name, x in with_prefix(tensors, "optimizer.").items():
        place, key = name.split(".")
        like = parameters[int(place)]
        # Adam's fused kernel goes through memory: its state must lie as the weights do
        laid_out = torch.empty_like(like).copy_(x) if x.shape == like.shape else x
        state.setdefault(int(place), {})[key] = laid_out.detach()
    groups = trainer.optimizer.state_dict()["param_groups"]
    trainer.optimizer.load_state_dict({"state": state, "param_groups": groups})
    trainer.compute_in(facts["precision"])
    trainer.scaler.load_state_dict(facts["scaler"])
    trainer.step = facts["step"]


def check_checkpoint(
    path: str | Path,
    tensors: dict[str, Tensor],
    facts: dict[str, Any],
    trainer: Trainer,
) -> None:
    r"""Raise ValueError unless everything in a checkpoint fits the trainer.

    All is looked at before anything is loaded, so that nothing is ever half loaded.

    >>> check_checkpoint.__name__
    'check_checkpoint'
    """
    here = checkpoint_facts(trainer)
    if facts.keys() != here.keys():
        raise ValueError(f"{path} holds the facts {[*facts]}; needed are {[*here]}")
    checks.one_of(f"the precision in {path}", facts["precision"], PRECISIONS)
    for name in ("config", "schedule", "images"):
        if facts[name] != here[name]:
            raise ValueError(
                f"{path} is of another run: its {name} is {facts[name]}, "
                f"the trainer's {here[name]}"
            )
    fitting = {f"model.{k}": v for k, v in trainer.model.state_dict().items()}
    fitting |= {f"ema.{k}": v for k, v in trainer.ema.state_dict().items()}
    for place, weight in enumerate(trainer.model.parameters()):
        prefix = f"optimizer.{place}."
        if with_prefix(tensors, prefix):  # none before the first step
            adam = {"exp_avg": weight, "exp_avg_sq": weight, "step": torch.zeros(())}
            fitting |= {prefix + key: x for key, x in adam.items()}
    if odd := sorted(fitting.keys() ^ tensors.keys()):
        raise ValueError(
            f"{path} is of another network: {len(odd)} names differ, first {odd[0]!r}"
        )
    for name, x in fitting.items():
        its, ours = ((y.dtype, tuple(y.shape)) for y in (tensors[name], x))
        if its != ours:
            raise ValueError(
                f"{path} is of another network: its {name!r} is {its}, not {ours}"
            )


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    r"""The entries whose names begin with `prefix`, under their names without it.

    >>> with_prefix({"a.x": torch.ones(1), "b.x": torch.ones(1)}, "a.").keys()
    dict_keys(['x'])
    """
    cut = len(prefix)
    return {k[cut:]: v for k, v in tensors.items() if k.startswith(prefix)}


# --- book/ddpm/training.ipynb · training-export-bins · Training on real digits
@torch.no_grad()
def loss_per_bin(
    model: nn.Module,
    schedule: Schedule,
    x_0: Tensor,
    bins: int = 10,
    *,
    repeats: int = 1,
    prediction: str = "eps",
    seed: int = 0,
) -> Tensor:
    r"""Mean loss in each of `bins` equal ranges of t, float64 [bins] on the CPU.

    Every image of x_0 [N, ...] is used once per bin and repeat, with a t drawn from the
    bin; the draws depend on `seed` alone, so that two models see the same. The model
    is in `eval()` mode meanwhile. Raises ValueError if `bins` does not divide T.

    >>> from ddpm_core.schedules import linear
    >>> from ddpm_core.unet import UNET_CONFIGS, UNet
    >>> model = UNet(UNET_CONFIGS["digits"])
    >>> loss_per_bin(model, linear(), torch.zeros(4, 1, 8, 8), 2).shape
    torch.Size([2])
    """
    checks.integer("bins", bins, low=1)
    if schedule.T % bins:
        raise ValueError(f"bins = {bins} must divide T = {schedule.T}")
    width, means = schedule.T // bins, []
    with mode(model, training=False):
        for place in range(bins):
            generator = stream(seed, "bin", place)
            total = 0.0
            for _ in range(repeats):
                t = torch.randint(1, width + 1, (len(x_0),), generator=generator)
                eps = torch.randn(x_0.shape, generator=generator).to(x_0)
                t = (t + place * width).to(x_0.device)
                losses = simple_loss(
                    model, schedule, x_0, t, eps, prediction=prediction
                )
                total += losses.double().mean().item()
            means.append(total / repeats)
    return torch.tensor(means, dtype=torch.float64)
