"""Time one network in this process, and print the figures as one line of JSON.

python benchmarks/measure.py --library diffusers --config small --precision fp32
"""

import argparse
import contextlib
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch
from networks import BATCHES, CONFIGS, LIBRARIES, at_side, build, inputs
from torch import Tensor, nn

from ddpm_core.train import keep_memory


def seconds(action: Callable[[], object], repeats: int) -> list[float]:
    """How long each of some runs took."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return taken


def training_step(
    model: nn.Module, x: Tensor, t: Tensor, precision: str
) -> Callable[[], None]:
    """Loss, gradient and Adam, as a training loop does them."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=True)
    target = torch.randn_like(x)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with low(precision):
            loss = (model(x, t).float() - target).square().mean()
        loss.backward()
        optimizer.step()

    return step


def low(precision: str) -> contextlib.AbstractContextManager[object]:
    """Autocast to bf16, or nothing."""
    if precision == "bf16":
        return torch.autocast("cpu", torch.bfloat16)
    return contextlib.nullcontext()


def forward_step(
    model: nn.Module, x: Tensor, t: Tensor, precision: str
) -> Callable[[], None]:
    """The network's answer, as sampling asks for it."""

    def step() -> None:
        with torch.no_grad(), low(precision):
            model(x, t)

    return step


STEPS = {"train": training_step, "forward": forward_step}


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--library", choices=LIBRARIES, default="ddpm_core")
    add("--config", choices=sorted(CONFIGS), default="small")
    add("--batch", type=int, help="images; the configuration's own by default")
    add("--side", type=int, help="of the images; the configuration's own by default")
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    add("--layout", choices=("contiguous", "channels_last"), default="channels_last")
    switch = argparse.BooleanOptionalAction
    add("--compile", action=switch, default=False)
    add("--keep", action=switch, default=True, help="freed memory, see keep_memory")
    add("--modes", nargs="+", choices=STEPS, default=list(STEPS))
    add("--warm", type=int, default=1, help="steps before the clock starts")
    add("--repeats", type=int, default=3)
    return parser


def main(arguments: list[str] | None = None) -> None:
    o = options().parse_args(arguments)
    if o.keep:  # for each library alike: pages that are zeroed anew are noise here
        keep_memory()
    torch.manual_seed(0)
    config = at_side(CONFIGS[o.config], o.side)
    batch = o.batch or BATCHES[o.config]
    model = build(o.library, config)
    x, t = inputs(config, batch)
    if o.layout == "channels_last":
        model = model.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    run = torch.compile(model) if o.compile else model
    found = {}
    for mode in o.modes:
        step = STEPS[mode](run.train(mode == "train"), x, t, o.precision)
        (first,) = seconds(step, 1)
        seconds(step, o.warm)
        taken = seconds(step, o.repeats)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found[mode] = {
            "seconds": taken,
            "images_per_second": batch / statistics.median(taken),
            "first_step": first,
            "peak_mib": peak / (2**20 if sys.platform == "darwin" else 2**10),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
