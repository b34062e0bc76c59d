"""Where a training step's time goes, and what each change to a block brings.

python benchmarks/blocks.py             writes book/results/unet_parts.json

Medians in one process. `run.py` has the races of whole networks.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import seconds, training_step
from networks import BATCHES, CONFIGS, build, inputs
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ddpm_core import unet

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import results

KINDS = {
    "convolution": ("convolution",),
    "attention": ("attention", "bmm", "softmax"),
    "GroupNorm": ("group_norm",),
    "SiLU": ("silu",),
    "dropout": ("bernoulli", "native_dropout", "random_"),
    "dense layers": ("aten::mm", "addmm"),
    "copies": ("copy",),
    "sums, joins": ("aten::add", "cat", "aten::mul", "aten::sum", "div"),
}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# batch, channels, side, groups: widest maps of the small network and of CIFAR-10's
SHAPES = ((64, 32, 32, 8), (64, 64, 16, 8), (16, 128, 32, 32), (16, 256, 16, 32))
PLACES = ((64, 256, 64), (64, 64, 128), (16, 256, 256))  # batch, places, channels
DOUBLED = ((64, 64, 16), (16, 256, 16))  # batch, channels, side


def as_trained(
    config: str, library: str = "ddpm_core"
) -> tuple[nn.Module, Tensor, Tensor]:
    """A network and a batch, channels last."""
    torch.manual_seed(0)
    model = build(library, CONFIGS[config]).train()
    x, t = inputs(CONFIGS[config], BATCHES[config])
    last = torch.channels_last
    return model.to(memory_format=last), x.to(memory_format=last), t


def shares(library: str, config: str, precision: str) -> dict[str, float]:
    """The share of each kind of operation in one training step."""
    model, x, t = as_trained(config, library)
    step = training_step(model, x, t, precision)
    step()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    spent: dict[str, float] = defaultdict(float)
    for row in seen.key_averages():
        kinds = [k for k, words in KINDS.items() if any(w in row.key for w in words)]
        spent[kinds[0] if kinds else "the rest"] += row.self_cpu_time_total
    return {kind: spent[kind] / sum(spent.values()) for kind in (*KINDS, "the rest")}


def passes(layer: Callable[..., Tensor], *inside: Tensor) -> dict[str, float]:
    """Seconds of the forward pass without a gradient, and of both passes: medians."""
    push, fixed = torch.randn_like(layer(*inside)), [x.detach() for x in inside]
    own = layer.parameters() if isinstance(layer, nn.Module) else ()
    leaves = [*inside, *own]

    def forward() -> None:
        with torch.no_grad():
            layer(*fixed)

    def both() -> None:
        for leaf in leaves:  # a gradient that is there already would be added to
            leaf.grad = None
        layer(*inside).backward(push)

    taken = {"forward": seconds(forward, 11), "train": seconds(both, 11)}
    return {name: statistics.median(of[2:]) for name, of in taken.items()}


def whole_step(config: str, precision: str) -> float:
    """Seconds of a training step of the whole network, optimiser included."""
    model, x, t = as_trained(config)
    return statistics.median(seconds(training_step(model, x, t, precision), 7)[2:])


def convolutions(config: str, precision: str) -> dict[str, float]:
    """Seconds of all convolutions of a network alone: no layer around them can beat it."""
    model, x, t = as_trained(config)
    calls: list[tuple[nn.Module, Tensor]] = []

    def remember(layer: nn.Module, inside: tuple[Tensor], _: Tensor) -> None:
        calls.append((layer, inside[0]))

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    hooks = [layer.register_forward_hook(remember) for layer in layers]
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
    ):  # so Upsample calls its own
        model(x, t)
    for hook in hooks:
        hook.remove()
    found = {"forward": 0.0, "train": 0.0}
    for layer, inside in calls:
        whole = inside.to(TYPES[precision]).requires_grad_()
        for mode, taken in passes(layer.to(TYPES[precision]), whole).items():
            found[mode] += taken
    return found


def map_of(kind: torch.dtype, *shape: int) -> Tensor:
    """Noise as a feature map, channels last."""
    x = torch.randn(*shape).to(kind).to(memory_format=torch.channels_last)
    return x.requires_grad_()


def parts(precisions: tuple[str, ...]) -> list[dict[str, Any]]:
    """Every changed part beside its plain form: seconds of both, by shape and precision."""
    rows = []
    for precision in precisions:
        kind = TYPES[precision]
        pairs = [*norms(kind), *attentions(kind), *dropouts(kind), *doublings(kind)]
        for name, plain, ours, inside in pairs:
            shape, taken = (
                list(inside[0].shape),
                (passes(f, *inside) for f in (plain, ours)),
            )
            row = dict(zip(("plain", "ours"), taken, strict=True))
            rows.append({"part": name, "precision": precision, "shape": shape, **row})
    return rows


Pair = tuple[str, Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]


def norms(kind: torch.dtype) -> list[Pair]:
    pairs: list[Pair] = []
    for batch, channels, side, groups in SHAPES:
        own, theirs = unet.GroupNorm(groups, channels), nn.GroupNorm(groups, channels)
        plain = nn.Sequential(theirs.to(kind), nn.SiLU())
        x = map_of(kind, batch, channels, side, side)
        ours = lambda x, own=own: unet.norm_silu(own, x)  # noqa: E731
        pairs.append(("GroupNorm and SiLU", plain, ours, (x,)))
    return pairs


def attentions(kind: torch.dtype) -> list[Pair]:
    fused, pairs = F.scaled_dot_product_attention, list[Pair]()
    for batch, places, width in PLACES:
        qkv = torch.randn(3, batch, 1, places, width).to(kind)
        inside = tuple(x.requires_grad_() for x in qkv)
        pairs.append(("attention", fused, unet.attend, inside))
    return pairs


def dropouts(kind: torch.dtype) -> list[Pair]:
    x = [map_of(kind, b, c, s, s) for b, c, s, _ in SHAPES[2:]]
    return [("dropout", nn.Dropout(0.1), unet.Dropout(0.1), (y,)) for y in x]


def doublings(kind: torch.dtype) -> list[Pair]:
    pairs: list[Pair] = []
    for batch, channels, side in DOUBLED:
        ours = unet.Upsample(channels).to(kind).to(memory_format=torch.channels_last)
        plain = nn.Sequential(nn.UpsamplingNearest2d(scale_factor=2), ours.conv)
        x = map_of(kind, batch, channels, side, side)
        pairs.append(("doubling", plain, ours, (x,)))
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--precisions", nargs="+", choices=TYPES, default=["fp32", "bf16"])
    o = parser.parse_args()
    start, cases = time.perf_counter(), list(itertools.product(CONFIGS, o.precisions))
    found = {
        "profile": {f"{c} {p}": shares("ddpm_core", c, p) for c, p in cases},
        "step": {f"{c} {p}": whole_step(c, p) for c, p in cases},
        "convolutions": {f"{c} {p}": convolutions(c, p) for c, p in cases},
        "parts": parts(tuple(o.precisions)),
    }
    results.write("unet_parts", found, start, modules=["unet"])


if __name__ == "__main__":
    main()
