"""Written by tools/extract.py; edit the chapters:

- book/workshop/command_line.ipynb
"""

import argparse
import ctypes
import errno
import json
import platform
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields
from difflib import get_close_matches
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from ddpm_core import data
from ddpm_core.files import remove_leftovers, save_model, write_atomically
from ddpm_core.parallel import anywhere, join
from ddpm_core.process import PREDICTIONS
from ddpm_core.schedules import SCHEDULES
from ddpm_core.training import (
    DECAYS,
    PRECISIONS,
    Progress,
    TrainConfig,
    Trainer,
    load_checkpoint,
    save_checkpoint,
    stream,
)
from ddpm_core.unet import UNET_CONFIGS, UNet

__all__ = [
    "CHECKPOINT",
    "DATA",
    "M_MMAP_MAX",
    "M_TRIM_THRESHOLD",
    "Log",
    "add_model",
    "add_number",
    "add_optimiser",
    "add_running",
    "asked_to_stop",
    "build",
    "facts",
    "file_words",
    "finish",
    "keep_memory",
    "known_names",
    "lines_up_to",
    "main",
    "parser",
    "read_data",
    "read_options",
    "save",
    "tell",
    "tensorboard",
    "unknown",
    "watch",
]


# --- book/workshop/command_line.ipynb · command-line-export-data · Options
DATA = ("digits", "fashion_mnist", "mnist", "cifar10", "folder")


def read_data(name: str, config: str, folder: str | None) -> Tensor:
    r"""The training images that the command's options name, of the network's size.

    >>> read_data("digits", "digits", None).shape
    torch.Size([1297, 1, 8, 8])
    """
    shape = UNET_CONFIGS[config]
    side, channels = shape.image_size, shape.in_channels
    if name == "digits":
        images = data.digits("train").images
    elif name == "folder":
        if folder is None:
            raise ValueError("data folder needs --folder PATH")
        images = data.image_folder(folder, side, channels).images
    elif name == "cifar10":
        images = data.cifar10("train").images
    else:
        images = getattr(data, name)("train", side).images
    if images.shape[1:] != (channels, side, side):
        raise ValueError(
            f"{name} has images of shape {tuple(images.shape[1:])}, network {config!r} "
            f"is for {(channels, side, side)}"
        )
    return images


# --- book/workshop/command_line.ipynb · command-line-export-parser · Options
def add_number(
    to: argparse._ActionsContainer,
    name: str,
    default: float | None,
    text: str,
    kind: type[int] | type[float] = int,
) -> None:
    r"""An option whose value is a number; the help shows the default.

    >>> add_number.__name__
    'add_number'
    """
    shown = "" if default is None else f" [{default}]"
    letter = "N" if kind is int else "X"
    to.add_argument(name, type=kind, default=default, metavar=letter, help=text + shown)


def add_running(options: argparse.ArgumentParser) -> None:
    r"""The options that every command has.

    >>> add_running.__name__
    'add_running'
    """
    here = "cuda" if torch.cuda.is_available() else "cpu"
    add = options.add_argument
    add("--config", type=Path, metavar="FILE", help="YAML file with these options")
    add("--device", default=here, help="cpu, cuda, mps [here: %(default)s]")
    add_number(options, "--seed", 0, "of all that is random")
    add_number(options, "--expect-processes", None, "stop unless so many are running")


def parser() -> argparse.ArgumentParser:
    r"""The options of `python -m ddpm_core.train`.

    >>> parser().parse_args(["out"]).data
    'digits'
    """
    options = argparse.ArgumentParser(
        prog="python -m ddpm_core.train",
        usage="%(prog)s OUT [--config FILE] [--data NAME] [--steps N] ...",
        description="Train a diffusion model. The folder OUT gets checkpoint."
        "safetensors and metrics.jsonl on the way, and at the end the averaged weights "
        "in model.safetensors with their card model.json. Run the same command again "
        "after a break: it goes on, and ends at the same weights.",
        epilog="Several processes: torchrun --standalone --nproc-per-node 2 "
        "-m ddpm_core.train OUT ...  Several machines: see the book, From one laptop "
        "to many GPUs.",
        allow_abbrev=False,
    )
    options.add_argument(
        "out", nargs="?", type=Path, metavar="OUT", help="run's folder"
    )
    add_running(options)
    add_number(options, "--save-every", 1000, "steps from one checkpoint to the next")
    add_number(options, "--log-every", 10, "steps from one line of metrics to the next")
    add_model(options.add_argument_group("data and model"))
    add_optimiser(options.add_argument_group("optimisation"))
    return options


def add_model(group: argparse._ArgumentGroup) -> None:
    r"""The options that say what is learned from what.

    >>> add_model.__name__
    'add_model'
    """
    add, networks, schedules = (
        group.add_argument,
        sorted(UNET_CONFIGS),
        sorted(SCHEDULES),
    )
    add("--data", choices=DATA, default="digits", help="training images [%(default)s]")
    add("--folder", metavar="PATH", help="your images, for --data folder")
    add("--network", choices=networks, default="digits", help="U-Net [%(default)s]")
    add(
        "--schedule", choices=schedules, default="cosine", help="of noise [%(default)s]"
    )
    add_number(group, "--T", 1000, "steps of the forward process")
    add("--prediction", choices=PREDICTIONS, default="eps", help="target [%(default)s]")
    switch = argparse.BooleanOptionalAction
    add("--flip", action=switch, default=False, help="mirror half of the images")


def add_optimiser(group: argparse._ArgumentGroup) -> None:
    r"""The options that say how it is learned.

    >>> add_optimiser.__name__
    'add_optimiser'
    """
    add_number(group, "--steps", 10_000, "optimiser steps of the whole run")
    add_number(group, "--batch-size", 128, "images a step, over all processes")
    add_number(group, "--accumulate", 1, "cut each process's share into N parts")
    add_number(group, "--lr", 2e-4, "learning rate", float)
    words = "steps until the rate is reached [500, at most a tenth of the steps]"
    add_number(group, "--warmup", None, words)
    add, kinds = group.add_argument, DECAYS
    add("--decay", choices=kinds, default="constant", help="of the rate [%(default)s]")
    add_number(group, "--clip-norm", 1.0, "longest gradient", float)
    add_number(
        group, "--ema-decay", None, "of the average [by the run's length]", float
    )
    add("--precision", choices=PRECISIONS, help="arithmetic [by the device]")


# --- book/workshop/command_line.ipynb · command-line-export-options · Options
def read_options(
    options: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    r"""Flags, and below them the YAML file that `--config` names: flags win.

    Leaves with a message (SystemExit) for a name that does not exist.

    >>> read_options(parser(), ["out", "--lr", "1e-3"]).lr
    0.001
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    path = finder.parse_known_args(words)[0].config
    if path is not None:
        words = file_words(options, path) + words
    found, rest = options.parse_known_args(words)
    if rest:
        options.error(unknown(rest[0], known_names(options)))
    return found


def known_names(options: argparse.ArgumentParser) -> list[str]:
    r"""The names of the options, as a YAML file would write them.

    >>> "batch_size" in known_names(parser())
    True
    """
    return [name for name in vars(options.parse_args([])) if name != "config"]


def unknown(name: str, known: Sequence[str]) -> str:
    r"""What to say of an option that does not exist: the nearest that does.

    >>> unknown("batchsize", ["steps", "batch_size"])
    "there is no option 'batchsize'; the nearest is 'batch_size'"
    """
    plain = name.lstrip("-").split("=")[0].replace("-", "_")
    near = get_close_matches(plain, known, 1, 0.0)
    return f"there is no option {name!r}; the nearest is {near[0]!r}"


def file_words(options: argparse.ArgumentParser, path: Path) -> list[str]:
    r"""The options in a YAML file as words of a command line.

    Each line is `name: value`, the names with "-" or "_"; true and false for switches.
    Leaves with a message (SystemExit) if the file cannot be read or has another key.

    >>> file_words.__name__
    'file_words'
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        options.error(f"{path}: {error}")
    if not isinstance(content, dict):
        options.error(f"{path} must hold lines `name: value`")
    known, words = known_names(options), []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            options.error(f"{path}: {unknown(str(key), known)}")
        flag = name.replace("_", "-")
        if name == "out" and options.prog.endswith("train"):
            options.set_defaults(out=Path(value))
        elif isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            words += [f"--{flag}", *map(str, value)]
        elif value is not None:
            words.append(f"--{flag}={value}")
    return words


# --- book/workshop/command_line.ipynb · command-line-export-signals · Stopping
@contextmanager
def asked_to_stop(alone: bool = True) -> Iterator[list[int]]:
    r"""A list that fills with the signals SIGINT (Ctrl-C) and SIGTERM as they come.

    So that a step is finished before the run ends. `alone`: a second Ctrl-C interrupts
    at once. Outside the main thread signals cannot be had; the list stays empty.

    >>> with asked_to_stop() as signals:
    ...     signal.raise_signal(signal.SIGTERM)
    >>> signals == [signal.SIGTERM]
    True
    """
    found: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if found and alone and number == signal.SIGINT:
            raise KeyboardInterrupt
        found.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    before = {s: signal.signal(s, remember) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- book/workshop/command_line.ipynb · command-line-export-log · Metrics
def lines_up_to(path: Path, step: int) -> str:
    r"""The whole lines of a metrics file that belong to steps up to `step`.

    >>> lines_up_to(Path("no/such/file"), 10)
    ''
    """
    if not path.exists():
        return ""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:  # cut off by a crash
            break
    return "".join(kept)


def tensorboard(folder: Path, step: int) -> Any:
    r"""A writer for TensorBoard that forgets what came after `step`; None without it.

    >>> tensorboard.__name__
    'tensorboard'
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=step + 1)


class Log:
    r"""What is told of a run: lines of JSON, TensorBoard if installed, a bar.

    Every `every` steps a line goes to `folder`/metrics.jsonl; those of an earlier try
    that lie past the trainer's step are dropped. The bar shows only on a terminal. To
    be used in a `with`. Raises OSError.

    >>> Log.__name__
    'Log'
    """

    def __init__(self, folder: Path, trainer: Trainer, every: int) -> None:
        self.every, self.size = every, trainer.config.batch_size
        path, step = folder / "metrics.jsonl", trainer.step
        remove_leftovers(path)
        write_atomically(path, lines_up_to(path, step).encode())
        self.file = path.open("a", encoding="utf-8", buffering=1)
        self.board = tensorboard(folder / "tensorboard", step)
        self.bar = tqdm(total=trainer.config.steps, initial=step, disable=None)
        self.smooth: float | None = None

    def write(self, progress: Progress) -> None:
        """Step, loss, lr, length of the gradient and number of images seen so far."""
        step, loss = progress.step, progress.loss
        self.smooth = 0.99 * (self.smooth or loss) + 0.01 * loss
        self.bar.set_postfix(loss=f"{self.smooth:.3f}", refresh=False)
        self.bar.update()
        if step % self.every:
            return
        values = {"loss": loss, "lr": progress.lr, "grad_norm": progress.grad_norm}
        line = {"step": step, **values, "samples": step * self.size}
        self.file.write(json.dumps(line) + "\n")
        for name, value in values.items() if self.board else ():
            self.board.add_scalar(name, value, step)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.file.close()
        if self.board:
            self.board.close()


# --- book/workshop/command_line.ipynb · command-line-export-watch · When something...
CHECKPOINT = "checkpoint.safetensors"


def save(folder: Path, trainer: Trainer) -> None:
    r"""Process 0 writes the checkpoint, and all of them learn whether it could.

    Raises OSError in every process if it could not; the file before it is whole then.

    >>> save.__name__
    'save'
    """
    problem: OSError | None = None
    if trainer.processes.rank == 0:
        try:
            save_checkpoint(folder / CHECKPOINT, trainer)
        except OSError as error:
            problem = error
    if anywhere(trainer.processes, problem is not None, trainer.device):
        reason = problem or OSError(errno.EIO, "process 0 could not write it")
        text = f"no checkpoint of step {trainer.step}: {reason.strerror}"
        raise OSError(reason.errno, text, str(folder / CHECKPOINT)) from problem


def watch(trainer: Trainer, folder: Path, save_every: int, log_every: int) -> None:
    r"""Train to the end, with metrics, and with a checkpoint now and then.

    Ctrl-C and SIGTERM save after the step that is under way, then leave (SystemExit).
    Raises OSError, and FloatingPointError, which saves nothing.

    >>> watch.__name__
    'watch'
    """
    processes = trainer.processes
    log = Log(folder, trainer, log_every) if processes.rank == 0 else None
    with asked_to_stop(processes.count == 1) as signals, log or nullcontext():
        for progress in trainer.steps():
            if log is not None:
                log.write(progress)
            stop = anywhere(processes, bool(signals), trainer.device)
            done = progress.step == trainer.config.steps
            if stop or done or progress.step % save_every == 0:
                save(folder, trainer)
            if stop and not done:
                tell(trainer, f"stopped and saved after step {progress.step}")
                raise SystemExit(128 + (signals or [signal.SIGTERM])[0])


def tell(trainer: Trainer, text: str) -> None:
    r"""Print a line, in process 0 alone.

    >>> tell.__name__
    'tell'
    """
    if trainer.processes.rank == 0:
        print(text, flush=True)


# --- book/workshop/command_line.ipynb · command-line-export-memory · Memory that is...
M_TRIM_THRESHOLD = -1  # names and numbers of glibc's malloc.h
M_MMAP_MAX = -4


def keep_memory() -> bool:
    r"""Let this process keep the memory that it frees; False where that is not known.

    For training on a CPU under glibc: never trim, never take a piece of its own from
    the system.

    >>> isinstance(keep_memory(), bool)
    True
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(M_MMAP_MAX, 0))


# --- book/workshop/command_line.ipynb · command-line-export-main · Memory that is kept
def build(options: argparse.Namespace) -> Trainer:
    r"""The trainer that the options describe, where its checkpoint left off.

    Raises TypeError, ValueError or OSError.

    >>> build(parser().parse_args(["no/such/folder", "--device", "cpu"])).step
    0
    """
    processes, device = join(options.device, options.expect_processes)
    if options.warmup is None:
        options.warmup = min(500, options.steps // 10)
    settings = {f.name for f in fields(TrainConfig)} & vars(options).keys()
    config = TrainConfig(**{name: getattr(options, name) for name in settings})
    with processes.first():
        images = read_data(options.data, options.network, options.folder)
    start = stream(config.seed, "weights", 0)
    model = UNet(UNET_CONFIGS[options.network], start)
    schedule = SCHEDULES[options.schedule](options.T)
    trainer = Trainer(model, schedule, images, config, device, processes)
    if (options.out / CHECKPOINT).exists():
        load_checkpoint(options.out / CHECKPOINT, trainer)
    ahead = anywhere(processes, trainer.step > 0, device)
    if ahead and trainer.step == 0:
        raise ValueError(
            f"this process finds no checkpoint in {options.out}, another one does: the "
            "folder must be one that all machines share"
        )
    return trainer


def main(arguments: Sequence[str] | None = None) -> None:
    r"""The command `python -m ddpm_core.train`: train, or go on, and save.

    Leaves with a message (SystemExit) when something is wrong.

    >>> main(["--help"])
    Traceback (most recent call last):
    SystemExit: 0
    """
    options = read_options(parser(), arguments)
    if options.out is None:
        parser().error("the folder OUT is missing")
    try:
        keep_memory()
        trainer = build(options)
        options.out.mkdir(parents=True, exist_ok=True)
        count = trainer.processes.count
        several = "1 process" if count == 1 else f"{count} processes"
        there = f"{trainer.precision} on {trainer.device}, {several}"
        tell(trainer, f"{there}, from step {trainer.step}")
        watch(trainer, options.out, options.save_every, options.log_every)
        if trainer.processes.rank == 0:
            finish(trainer, options.out)
    except FloatingPointError as error:
        raise SystemExit(f"{error}. The last checkpoint in OUT is good.") from error
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error


def finish(trainer: Trainer, folder: Path) -> None:
    r"""Write the averaged weights and their card.

    >>> finish.__name__
    'finish'
    """
    model = cast(UNet, trainer.model)
    with trainer.ema.swapped(model):
        card = save_model(folder / "model.safetensors", model, facts(trainer))
    tell(trainer, f"saved {card['parameters']} averaged weights of step {trainer.step}")


def facts(trainer: Trainer) -> dict[str, Any]:
    r"""What a card says about a run, without the figures that are measured later.

    >>> facts.__name__
    'facts'
    """
    schedule, config = trainer.schedule, trainer.config
    return {
        "schedule": {"name": schedule.name, "T": schedule.T},
        "prediction": config.prediction,
        "training": {
            **asdict(config),
            "precision": trainer.precision,
            "ema_decay": trainer.ema.decay,
            "steps_done": trainer.step,
            "images": list(trainer.images.shape),
        },
    }


if __name__ == "__main__":
    main()
