"""Where a training step's time goes, and what each change to a block brings."""

import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from measure import seconds, training_step
from networks import BATCHES, CONFIGS, build, inputs
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ddpm_core.unet import GroupNorm

KINDS = {
    "convolution": ("convolution",),
    "attention": ("attention",),
    "GroupNorm": ("group_norm",),
    "SiLU": ("silu",),
    "dropout": ("bernoulli", "native_dropout"),
    "dense layers": ("aten::mm", "addmm"),
    "copies, sums, joins": (
        "copy",
        "aten::add",
        "cat",
        "aten::mul",
        "aten::sum",
        "div",
    ),
}
SHAPES = ((64, 32, 32, 8), (64, 64, 16, 8), (16, 128, 32, 32), (16, 256, 16, 32))


def shares(library: str, config: str, layout: str) -> dict[str, float]:
    """The share of each kind of operation in one training step, float32."""
    torch.manual_seed(0)
    model = build(library, CONFIGS[config]).train()
    x, t = inputs(CONFIGS[config], BATCHES[config])
    if layout == "channels_last":
        model = model.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    step = training_step(model, x, t, "fp32")
    step()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    spent: dict[str, float] = defaultdict(float)
    for row in seen.key_averages():
        kinds = [k for k, words in KINDS.items() if any(w in row.key for w in words)]
        spent[kinds[0] if kinds else "the rest"] += row.self_cpu_time_total
    return {kind: spent[kind] / sum(spent.values()) for kind in (*KINDS, "the rest")}


def forward_and_backward(layer: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Seconds of both passes through a layer: the median of some."""
    y = layer(x)
    push = torch.randn_like(y)

    def both() -> None:
        layer(x).backward(push)

    return statistics.median(seconds(both, 11)[2:])


def norms() -> list[dict[str, Any]]:
    """GroupNorm and SiLU on bf16 maps, three ways, beside a 3x3 convolution."""
    rows = []
    for batch, channels, side, groups in SHAPES:
        x = torch.randn(batch, channels, side, side).to(torch.bfloat16)
        last = x.to(memory_format=torch.channels_last).requires_grad_()
        first = x.clone().requires_grad_()
        plain = nn.Sequential(nn.GroupNorm(groups, channels), nn.SiLU())
        wide = nn.Sequential(GroupNorm(groups, channels), nn.SiLU())
        conv = nn.Conv2d(channels, channels, 3, padding=1).to(torch.bfloat16)
        conv = conv.to(memory_format=torch.channels_last)
        taken = {
            "bf16, contiguous": forward_and_backward(plain.to(torch.bfloat16), first),
            "bf16, channels last": forward_and_backward(plain, last),
            "float32 inside": forward_and_backward(wide, last),
            "convolution": forward_and_backward(conv, last),
        }
        rows.append({"shape": list(x.shape), "groups": groups, "seconds": taken})
    return rows


def layouts(config: str) -> dict[str, float]:
    """Seconds of a 3x3 convolution of the widest maps in both memory formats."""
    c = CONFIGS[config]
    x = torch.randn(BATCHES[config], c.channels, c.image_size, c.image_size)
    conv = nn.Conv2d(c.channels, c.channels, 3, padding=1)
    found = {"contiguous": forward_and_backward(conv, x.clone().requires_grad_())}
    conv = conv.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    return found | {"channels_last": forward_and_backward(conv, x)}
