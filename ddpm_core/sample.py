"""Written by tools/extract.py; edit the chapters:

- book/workshop/command_line.ipynb
"""

import argparse
import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import save_image
from tqdm import tqdm

from ddpm_core import checks
from ddpm_core.files import (
    load_model,
    load_pretrained,
    pretrained,
    save_tensors,
    write_atomically,
)
from ddpm_core.parallel import join
from ddpm_core.process import VARIANCES
from ddpm_core.samplers import (
    Model,
    State,
    ancestral,
    ddim,
    dpm_solver_2m,
    heun,
    kept_steps,
    last,
    noise_like,
)
from ddpm_core.schedules import Schedule, respace
from ddpm_core.train import add_number, add_running, read_options
from ddpm_core.training import Processes, stream
from ddpm_core.unet import UNet

__all__ = [
    "OWN",
    "SAMPLERS",
    "SUFFIXES",
    "add_sampler",
    "check_options",
    "draw",
    "load",
    "main",
    "noise",
    "own_options",
    "parser",
    "shortened",
    "steps_of",
    "write",
]


# --- book/workshop/command_line.ipynb · command-line-export-sample-options · Samples
SAMPLERS: dict[str, Callable[..., Iterator[State]]] = {
    "ancestral": ancestral,
    "ddim": ddim,
    "heun": heun,
    "dpm-solver-2m": dpm_solver_2m,
}
OWN = {"variance": "ancestral", "eta": "ddim"}  # options that one sampler has
SUFFIXES = (".png", ".npy", ".safetensors")


def parser() -> argparse.ArgumentParser:
    r"""The options of `python -m ddpm_core.sample`.

    >>> parser().parse_args(["--weights", "digits"]).n
    100
    """
    options = argparse.ArgumentParser(
        prog="python -m ddpm_core.sample",
        usage="%(prog)s --weights NAME|PATH [--n N] [--out FILE ...] ...",
        description="Draw samples with trained weights. Sample number i depends on the "
        "weights, the options and the seed, not on how many processes share the work.",
        allow_abbrev=False,
    )
    add, names = options.add_argument, ", ".join(pretrained())
    add("--weights", metavar="NAME|PATH", help=f"{names}, or a model.safetensors")
    many = "how many samples; under torchrun write --samples [%(default)s]"
    add("--n", "--samples", type=int, default=100, metavar="N", help=many)
    add(
        "--out",
        nargs="+",
        type=Path,
        default=[Path("samples.png")],
        metavar="FILE",
        help="a .png shows them in rows; .npy and .safetensors hold them raw, in "
        "[-1, 1] [samples.png]",
    )
    add_running(options)
    add_sampler(options)
    add_number(options, "--batch", 50, "samples drawn at once by one process")
    add_number(options, "--zoom", 1, "pixels of the picture to a pixel of a sample")
    return options


def add_sampler(options: argparse.ArgumentParser) -> None:
    r"""The options that say how a sample is drawn.

    >>> add_sampler.__name__
    'add_sampler'
    """
    add, switch = options.add_argument, argparse.BooleanOptionalAction
    add("--sampler", choices=[*SAMPLERS], default="ancestral", help="[%(default)s]")
    large = "of a step's noise, for ancestral [fixed_large]"
    add("--variance", choices=VARIANCES, help=large)
    add_number(options, "--eta", None, "share of noise, 0 to 1, for ddim [0]", float)
    add_number(options, "--steps", None, "visit only N steps, evenly spread [all]")
    asked = "ask the network N times a sample at most, in place of --steps"
    add_number(options, "--evaluations", None, asked)
    add("--clip", action=switch, default=True, help="clip the guess of x_0 [yes]")


def steps_of(options: argparse.Namespace) -> int | None:
    r"""How many steps to visit, None for all: heun asks twice a step, once at the last.

    Raises TypeError or ValueError.

    >>> words = ["--sampler", "heun", "--evaluations", "20"]
    >>> steps_of(parser().parse_args(words))
    10
    """
    number: int | None = options.steps
    if options.evaluations is None:
        return number
    if number is not None:
        raise ValueError("give --steps or --evaluations, not both")
    number = checks.integer("evaluations", options.evaluations, low=1)
    return (number + 1) // 2 if options.sampler == "heun" else number


def own_options(options: argparse.Namespace) -> dict[str, Any]:
    r"""The options that the chosen sampler alone has, as far as they are given.

    Raises ValueError for one of another sampler.

    >>> own_options(parser().parse_args(["--sampler", "ddim", "--eta", "0.5"]))
    {'eta': 0.5}
    """
    given = {n: getattr(options, n) for n in OWN if getattr(options, n) is not None}
    for name in given:
        if options.sampler != OWN[name]:
            raise ValueError(
                f"--{name} belongs to --sampler {OWN[name]}; got it with "
                f"--sampler {options.sampler}"
            )
    return given


# --- book/workshop/command_line.ipynb · command-line-export-sample · Samples
def load(weights: str, device: torch.device) -> tuple[UNet, Schedule, dict[str, Any]]:
    r"""The network, schedule and card of shipped weights or of a file.

    Raises ValueError if it is neither a known name nor a file.

    >>> load("digits", torch.device("cpu"))[1].T
    200
    """
    if weights in pretrained():
        return load_pretrained(weights, device)
    if Path(weights).is_file():
        return load_model(weights, device)
    raise ValueError(
        f"weights must be one of {pretrained()} or a file; got {weights!r}"
    )


def shortened(schedule: Schedule, steps: int | None) -> Schedule:
    r"""The schedule that visits `steps` of the steps, evenly spread, the last among them.

    >>> from ddpm_core.schedules import linear
    >>> shortened(linear(1000), 3).timesteps.tolist()
    [0, 333, 667, 1000]
    """
    if steps is None:
        return schedule
    return respace(schedule, kept_steps(schedule.T, steps))


def noise(seed: int, places: Sequence[int], shape: Sequence[int]) -> Any:
    r"""x_T of the samples numbered `places`, and for each the generator it came from.

    Both are functions of the seed and the sample's number alone.

    >>> x, generators = noise(0, [3, 4], (1, 8, 8))
    >>> torch.equal(x[1:], noise(0, [4], (1, 8, 8))[0]), len(generators)
    (True, 2)
    """
    generators = [stream(seed, "sample", i) for i in places]
    return noise_like(torch.zeros(len(places), *shape), generators), generators


def draw(
    model: Model,
    schedule: Schedule,
    shape: Sequence[int],
    options: argparse.Namespace,
    prediction: str,
    processes: Processes,
) -> Tensor:
    r"""Samples [n, ...] on the CPU, the whole batches dealt out to the processes.

    >>> draw.__name__
    'draw'
    """
    device = schedule.beta.device
    samples = torch.zeros(options.n, *shape, device=device)
    batches = [
        range(options.n)[i:][: options.batch]
        for i in range(0, options.n, options.batch)
    ]
    mine = batches[processes.rank :: processes.count]
    hidden = None if processes.rank == 0 else True
    for places in mine:
        x_T, generators = noise(options.seed, places, shape)
        states = SAMPLERS[options.sampler](
            model,
            schedule,
            x_T.to(device),
            prediction=prediction,
            clip=options.clip,
            generator=generators,
            **own_options(options),
        )
        bar = tqdm(states, f"from {places[0]}", schedule.T, disable=hidden)
        samples[places.start : places.stop] = last(bar)
    return processes.add_up(samples).cpu()


# --- book/workshop/command_line.ipynb · command-line-export-sample-main · Samples
def write(path: Path, samples: Tensor, zoom: int, facts: dict[str, str]) -> None:
    r"""Samples [n, C, H, W] as a picture (.png) or raw (.npy, .safetensors).

    Raises OSError.

    >>> write.__name__
    'write'
    """
    if path.suffix == ".safetensors":
        save_tensors(path, {"samples": samples}, facts)
        return
    content = io.BytesIO()
    if path.suffix == ".npy":
        np.save(content, samples.numpy(), allow_pickle=False)
    else:
        large = samples.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
        save_image(
            large,
            content,
            "png",
            nrow=math.ceil(len(samples) ** 0.5),
            normalize=True,
            value_range=(-1, 1),
        )
    write_atomically(path, content.getvalue())


def check_options(options: argparse.Namespace) -> None:
    r"""Find what is wrong before hours of sampling. Raises ValueError or TypeError.

    >>> check_options(parser().parse_args(["--weights", "digits", "--out", "a.gif"]))
    Traceback (most recent call last):
    ValueError: out must end in .png, .npy or .safetensors; got 'a.gif'
    """
    if options.weights is None:
        raise ValueError("--weights is missing: a name or a file")
    for name in ("n", "batch", "zoom"):
        checks.integer(name, getattr(options, name), low=1)
    own_options(options)
    steps_of(options)
    for path in options.out:
        if path.suffix not in SUFFIXES:
            raise ValueError(
                f"out must end in .png, .npy or .safetensors; got {str(path)!r}"
            )
        if not path.absolute().parent.is_dir():
            raise ValueError(f"out: there is no folder {path.absolute().parent}")


def main(arguments: Sequence[str] | None = None) -> None:
    r"""The command `python -m ddpm_core.sample`: draw samples and write them.

    Leaves with a message (SystemExit) when something is wrong.

    >>> main(["--help"])
    Traceback (most recent call last):
    SystemExit: 0
    """
    options = read_options(parser(), arguments)
    try:
        check_options(options)
        processes, device = join(options.device, options.expect_processes)
        model, schedule, card = load(options.weights, device)
        schedule = shortened(schedule, steps_of(options))
        shape = model.config.in_channels, *[model.config.image_size] * 2
        samples = draw(model, schedule, shape, options, card["prediction"], processes)
        if processes.rank == 0:
            said = {k: str(v) for k, v in vars(options).items()}
            for path in options.out:
                write(path, samples, options.zoom, said)
            print(f"{options.n} samples in {', '.join(map(str, options.out))}")
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
