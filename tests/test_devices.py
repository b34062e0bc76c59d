"""Without a GPU: what would run on one, on tensors that have a device and no numbers."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import matplotlib.pyplot as plt
import pytest
import torch
import torchmetrics.image.fid
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm_core import data, losses, samplers
from ddpm_core.interchange import save_diffusers
from ddpm_core.process import PREDICTIONS, VARIANCES
from ddpm_core.schedules import cosine, linear
from ddpm_core.unet import UNET_CONFIGS, UNet, UNetConfig

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


# Nothing in a sampling loop may make the program wait for the card: no copy between the
# two that blocks, no look at a value, no result whose size depends on values.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"}
COPIES = {"_to_copy", "copy_"}


class Watch(TorchDispatchMode):
    """Notes the operations that wait for the card, and counts the copies to it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.copies = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        leaves = tree_leaves((args, kwargs, result))
        devices = {x.device.type for x in leaves if isinstance(x, Tensor)}
        if name in WAITING and "cuda" in devices:
            self.waits.append(name)
        if name in COPIES and len(devices) > 1:
            self.copies += 1
            free = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            if not free:
                self.waits.append(f"{name} that blocks")
        return result


SLIPS: dict[str, Callable[[Tensor], object]] = {
    "copy_ that blocks": lambda x: x.__setitem__(0, float("nan")),
    "_to_copy that blocks": lambda x: torch.zeros(3).to(x.device),
    "_to_copy that blocks ": lambda x: x.cpu(),
    "_local_scalar_dense": lambda x: bool(x[0] > 0),
    "nonzero": lambda x: x.nonzero(),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_watch_sees_what_waits(slip: str) -> None:
    """Fake tensors refuse some of these; then the refusal tells."""
    name = slip.strip()
    with FakeTensorMode():
        x = torch.zeros(3, device="cuda")
        with Watch() as watch:
            try:
                SLIPS[slip](x)
            except RuntimeError as error:
                watch.waits.append(str(error))
    (found,) = watch.waits
    assert name in found


LOOPS: dict[str, dict[str, Any]] = {
    "ancestral": {},
    "ddim": {"eta": 1.0},
    "heun": {},
    "dpm_solver_2m": {},
}
NOISY = {"ancestral", "ddim"}
TINY = UNetConfig(4, 1, 1, 4, (1, 2), 1, (2,), groups=2)


def looped(name: str, listed: bool, model: UNet) -> Iterator[samplers.State]:
    """Four steps on a card, with one generator or one for each sample."""
    x_T = torch.zeros(4, 1, 4, 4, device="cuda")
    several = [torch.Generator().manual_seed(i) for i in range(len(x_T))]
    generator = several if listed else several[0]
    options = {"generator": generator, **LOOPS[name]}
    run, table = getattr(samplers, name), cosine(4).to("cuda", torch.float32)
    states: Iterator[samplers.State] = run(model, table, x_T, **options)
    return states


@pytest.mark.parametrize("listed", [False, True], ids=["one", "list"])
@pytest.mark.parametrize("name", LOOPS)
def test_sampling_loop_never_waits(name: str, listed: bool) -> None:
    """The first step may set up; after it one copy a step, of the noise, on its way."""
    with FakeTensorMode():
        with torch.device("cuda"):
            model = UNet(TINY)
        states = looped(name, listed, model)
        next(states)
        with Watch() as watch:
            later = list(states)
    assert len(later) == 3
    assert {s.x.device.type for s in later} == {"cuda"}
    assert watch.waits == []
    assert watch.copies == (2 if name in NOISY else 0)  # none in the last step


@pytest.mark.gpu
@pytest.mark.parametrize("listed", [False, True], ids=["one", "list"])
@pytest.mark.parametrize("name", LOOPS)
def test_sampling_loop_never_waits_on_a_gpu(name: str, listed: bool) -> None:
    """PyTorch itself raises at an operation that waits; the noise arrives whole."""
    states = looped(name, listed, UNet(TINY).to("cuda"))
    next(states)
    torch.cuda.set_sync_debug_mode("error")
    try:
        x = samplers.last(states)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(x.isfinite().all())
    z = torch.zeros(4, 3, 64, 64, device="cuda")
    here, there = (
        samplers.noise_like(like, torch.Generator().manual_seed(0))
        for like in (z, z.cpu())
    )
    assert torch.equal(here.cpu(), there)


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


# The cells for published weights are switched off in the book. Here they run, short, with
# a tiny folder, a few noise images and a distance that only counts.
PUBLISHED = {
    "published = False": "published = True",
    'device = "cuda"': 'device = "cpu"',
    "count = 50_000": "count = 6",
    "250": "3",
    " 16, device": " 2, device",
}


class Counted:
    """A distance that notes how many images it is shown, and what they are like."""

    shown: ClassVar[dict[bool, list[Tensor]]] = {}

    def __init__(self, feature: int) -> None:
        assert feature == 2048
        Counted.shown = {True: [], False: []}

    def to(self, device: str) -> "Counted":
        assert device == "cpu"
        return self

    def update(self, images: Tensor, real: bool) -> None:
        assert (images.dtype, images.shape[1:]) == (torch.uint8, (3, 4, 4))
        self.shown[real].append(images)

    def compute(self) -> Tensor:
        return torch.tensor(3.17)


def test_cells_for_published_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They load, draw and measure to the end; every batch of samples is another one."""
    config = UNetConfig(4, 3, 3, 4, (1, 2), 1, (2,), groups=2)
    save_diffusers(tmp_path / "net", UNet(config), linear(25))

    def download(name: str, allow_patterns: list[str]) -> str:
        assert name == "google/ddpm-cifar10-32"
        assert allow_patterns == ["*.json", "*.safetensors"]
        return str(tmp_path / "net")

    def few(split: str) -> data.Images:
        assert split == "train"
        return data.Images(torch.rand(7, 3, 4, 4) * 2 - 1, torch.arange(7))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    fid = torchmetrics.image.fid
    monkeypatch.setattr(fid, "FrechetInceptionDistance", Counted)
    monkeypatch.setattr(data, "cifar10", few)
    monkeypatch.setattr(plt, "show", plt.close)
    cells = book.code(ROOT / "book" / "scale" / "many_gpus.ipynb")
    switched = [c for c in cells if c.id.startswith("many-gpus-published")]
    assert len(switched) == 3
    text = "\n".join(c.source for c in switched)
    for old in PUBLISHED:
        assert old in text, f"{old!r} no longer stands in the chapter"
    space: dict[str, Any] = {"__name__": "__main__"}
    for cell in [c for c in cells if c.id == "many-gpus-imports"] + switched:
        source = plain(cell)
        if cell in switched:
            for old, new in PUBLISHED.items():
                source = source.replace(old, new)
        exec(compile(source, cell.id, "exec"), space)
    said = capsys.readouterr().out
    assert "'prediction': 'eps', 'variance': 'fixed_large', 'clip': True" in said
    assert "distance to the training set, 6 images: 3.17" in said
    assert space["sixteen"].shape == (2, 3, 4, 4)
    shown = Counted.shown
    assert [len(torch.cat(shown[real])) for real in (True, False)] == [7, 6]
    first, second = shown[False]
    assert not torch.equal(first, second)
