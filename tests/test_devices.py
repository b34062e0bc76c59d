"""Without a GPU: what would run on one, on tensors that have a device and no numbers."""

import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ddpm_core import data, losses, samplers
from ddpm_core.process import PREDICTIONS, VARIANCES
from ddpm_core.schedules import cosine
from ddpm_core.unet import UNET_CONFIGS, UNet

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import chapters as book
from chapters import ROOT
from equations import plain

SMALL = UNET_CONFIGS["digits"]
SHAPE = (4, 1, 8, 8)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_loss_and_gradient_stay_on_the_device(prediction: str) -> None:
    """The loss never looks at a value and makes no tensor of the CPU."""
    model, table = UNet(SMALL).to("meta"), cosine(50).to("meta", torch.float32)
    x_0, eps = torch.zeros(2, *SHAPE, device="meta")
    t = torch.ones(4, dtype=torch.int64, device="meta")
    loss = losses.simple_loss(model, table, x_0, t, eps, prediction=prediction)
    assert loss.device.type == "meta"
    loss.mean().backward()
    gradients = [p.grad for p in model.parameters()]
    assert {None if g is None else g.device.type for g in gradients} == {"meta"}


@pytest.mark.parametrize("variance", VARIANCES)
def test_sampler_stays_on_the_device(variance: str) -> None:
    """Every state is on the device of x_T."""
    table = cosine(5).to("meta", torch.float32)
    x_T = torch.zeros(SHAPE, device="meta")
    model = UNet(SMALL).to("meta")
    states = list(samplers.ancestral(model, table, x_T, variance=variance))
    assert [s.t for s in states] == [4, 3, 2, 1, 0]
    assert {s.x.device.type for s in states} == {"meta"}
    assert {s.x_0.shape for s in states} == {torch.Size(SHAPE)}


@pytest.mark.parametrize("name", ["digits", "fashion32", "cifar10"])
def test_network_on_a_gpu(name: str) -> None:
    """The forward pass mixes no devices."""
    config = UNET_CONFIGS[name]
    side = config.image_size
    with FakeTensorMode():
        with torch.device("cuda"):
            model = UNet(config)
            x = torch.zeros(2, config.in_channels, side, side)
            t = torch.ones(2, dtype=torch.int64)
        y = model(x, t)
    assert (y.device.type, y.shape) == ("cuda", x.shape)


# What a chapter does on a GPU, made short: every count and size that its CUDA branch
# sets is replaced in its text, and the CPU takes the branch.
ON_CPU = 'device.type == "cpu"'
SHORT = {
    "training": {
        "20_000": "10",
        "else 1000": "else 10",
        "else 128": "else 4",
        "[:4000]": "[:60]",
        "shape = (500, ": "shape = (40, ",
        "train[some[:500]]": "train[some[:40]]",
        "torch.full((500,)": "torch.full((40,)",
        "repeat(50, 1": "repeat(4, 1",
        "independent_pixels(train, 500": "independent_pixels(train, 40",
        ".images[:500]": ".images[:60]",
        "[:300]": "[:20]",
        "[:1297]": "[:60]",
    }
}


def stand_in(split: str, size: int) -> data.Images:
    """Clothes that need no file: noise with labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(80, 1, size, size, generator=generator) * 2 - 1
    return data.Images(images, torch.arange(80) % 10)


def test_list_of_chapters_is_whole() -> None:
    """Every chapter that asks for CUDA in a plain cell is run below."""
    asking = {
        path.stem
        for path in book.chapters()
        for cell in book.code(path)
        if "export" not in cell.tags and "cuda.is_available" in cell.source
    }
    assert asking == set(SHORT)


@pytest.mark.parametrize("name", SHORT)
def test_cuda_branch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells of the CUDA branch run to the end, with few and short steps."""
    monkeypatch.setattr(data, "fashion_mnist", stand_in)
    monkeypatch.setattr(plt, "show", plt.close)
    path = ROOT / "book" / "ddpm" / f"{name}.ipynb"
    cells = [c for c in book.code(path) if "check" not in c.tags and "-ex-" not in c.id]
    text = "\n".join(c.source for c in cells)
    assert ON_CPU in text
    for old in SHORT[name]:
        assert old in text, f"{old!r} no longer stands in {path}"
    space: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        source = plain(cell).replace(ON_CPU, "False")
        if "export" not in cell.tags:
            for old, new in SHORT[name].items():
                source = source.replace(old, new)
        exec(compile(source, cell.id, "exec"), space)
    assert space["name"] == "fashion32"
    assert space["samples"].shape == (40, 1, 32, 32)
