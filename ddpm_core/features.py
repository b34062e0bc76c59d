"""Written by tools/extract.py; edit the chapters:

- book/ddpm/evaluation.ipynb
"""

import argparse
import json
from collections.abc import Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddpm_core import checks, data
from ddpm_core.files import DIGEST, read_tensors, save_tensors, write_atomically
from ddpm_core.metrics import Moments, moments, nearest_neighbours
from ddpm_core.training import stream
from ddpm_core.unet import initialise

__all__ = [
    "KEPT",
    "LICENCES",
    "RECIPES",
    "FeatureNetwork",
    "Recipe",
    "Reference",
    "accuracy",
    "build_reference",
    "features_of",
    "images_of",
    "jittered",
    "learn",
    "load_features",
    "load_reference",
    "main",
    "one_cycle",
    "save_features",
    "shipped",
]


# --- book/ddpm/evaluation.ipynb · evaluation-export-network · A space to compare in
class FeatureNetwork(nn.Module):
    r"""A small classifier of grey images whose last hidden layer serves as features.

    Called with images [N, 1, side, side] in [-1, 1] it returns features [N, 64];
    `num_features` is what torchmetrics asks a network for. `head` turns features into
    logits of ten classes. With `mirror`, features in `eval()` mode are means over an
    image and its mirror image. Raises TypeError or ValueError for other images.

    >>> FeatureNetwork(8)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 64])
    """

    num_features = 64
    widths = (1, 16, 32, 64, 64)

    def __init__(
        self,
        side: int,
        mirror: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.side, self.mirror = checks.integer("side", side, low=4), mirror
        layers: list[nn.Module] = []
        for i, (narrow, wide) in enumerate(pairwise(self.widths)):
            layers.append(nn.Conv2d(narrow, wide, 3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(wide), nn.ReLU()]
            if i < 2:
                layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(self.num_features, 10)
        initialise(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        """The features [N, 64] of images [N, 1, side, side]."""
        checks.tensor("x", x, shape=(None, 1, self.side, self.side))
        features: Tensor = self.body(x).mean((2, 3))
        if self.mirror and not self.training:
            features = (features + self.body(x.flip(3)).mean((2, 3))) / 2
        return features


@torch.no_grad()
def features_of(network: nn.Module, images: Tensor, batch: int = 500) -> Tensor:
    r"""The features [N, D] of images [N, ...], float32 on the CPU, in batches.

    >>> features_of(nn.Flatten(), torch.ones(3, 1, 2, 2)).shape
    torch.Size([3, 4])
    """
    device = next((p.device for p in network.parameters()), images.device)
    parts = [network(x.to(device)).float().cpu() for x in torch.split(images, batch)]
    return torch.cat(parts)


# --- book/ddpm/evaluation.ipynb · evaluation-export-learn · A space to compare in
class Recipe(NamedTuple):
    r"""A data set to be judged, and how its feature network is trained.

    `cycles`: epochs and peak learning rate of one cycle after the other.

    >>> RECIPES["digits"].levels
    17
    """

    side: int
    levels: int
    cycles: tuple[tuple[int, float], ...]
    mirror: bool
    shift: int


RECIPES = {
    "digits": Recipe(8, 17, ((40, 5e-3),), mirror=False, shift=0),
    "fashion-mnist": Recipe(28, 256, ((8, 5e-3), (4, 2e-3)), mirror=True, shift=0),
}
KEPT = 10_000  # training images whose features are shipped


def images_of(name: str, split: str) -> data.Images:
    r"""Images and labels of a data set in RECIPES, at its own size; no download.

    >>> images_of("digits", "test").images.shape
    torch.Size([500, 1, 8, 8])
    """
    checks.one_of("name", name, RECIPES)
    if name == "digits":
        return data.digits(split)
    data.data_root("fashion_mnist", download=False)
    return data.fashion_mnist(split)


def jittered(x: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    r"""A batch with some images mirrored, and all of it moved by a few pixels.

    >>> x = torch.zeros(2, 1, 8, 8)
    >>> torch.equal(jittered(x, RECIPES["digits"], torch.Generator()), x)
    True
    """
    if recipe.mirror:
        flip = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
        x = torch.where(flip, x.flip(3), x)
    side, edge = x.shape[-1], recipe.shift
    down, right = torch.randint(2 * edge + 1, (2,), generator=generator).tolist()
    x = nn.functional.pad(x, [edge] * 4, value=-1.0)
    return x[..., down : down + side, right : right + side]


def one_cycle(
    network: FeatureNetwork,
    images: data.Images,
    recipe: Recipe,
    epochs: range,
    peak: float,
    seed: int = 0,
) -> None:
    r"""Train over some epochs, the learning rate rising to `peak` and falling to 0.

    >>> one_cycle.__name__
    'one_cycle'
    """
    size = min(128, len(images.labels))
    steps = len(images.labels) // size
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    plan = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, peak, total_steps=max(2, len(epochs) * steps)
    )
    network.train()
    for epoch in epochs:
        generator = stream(seed, "order", epoch)
        order = torch.randperm(len(images.labels), generator=generator)
        for some in torch.split(order[: steps * size], size):
            x = jittered(images.images[some], recipe, generator)
            logits = network.head(network(x))
            loss = nn.functional.cross_entropy(logits, images.labels[some])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            plan.step()


def learn(images: data.Images, recipe: Recipe, seed: int = 0) -> FeatureNetwork:
    r"""Train a feature network to name images; returns it in `eval()` mode.

    Everything random follows from `seed`. Raises TypeError or ValueError.

    >>> few = data.Images(torch.zeros(4, 1, 8, 8), torch.arange(4))
    >>> learn(few, RECIPES["digits"]._replace(cycles=())).training
    False
    """
    checks.images("images", images.images)
    start = stream(seed, "weights", 0)
    network = FeatureNetwork(recipe.side, recipe.mirror, start)
    network = network.to(memory_format=torch.channels_last)  # twice as fast on a CPU
    done = 0
    for epochs, peak in recipe.cycles:
        one_cycle(network, images, recipe, range(done, done + epochs), peak, seed)
        done += epochs
    return network.eval()


def accuracy(network: FeatureNetwork, images: data.Images) -> float:
    r"""The share of images that the network names rightly.

    >>> few = data.Images(torch.zeros(4, 1, 8, 8), torch.zeros(4).long())
    >>> accuracy(FeatureNetwork(8).eval(), few) in (0.0, 1.0)
    True
    """
    features = features_of(network, images.images).to(network.head.weight.device)
    named = network.head(features).argmax(1).cpu()
    return float((named == images.labels).double().mean())


# --- book/ddpm/evaluation.ipynb · evaluation-export-reference · The yardstick that...
class Reference(NamedTuple):
    r"""What samples are compared with: a network, and features of real images.

    `test` [N, 64] of all test images, `train` [M, 64] of some training images in random
    order, `train_moments` of all of them. `radius`: the nearest 1 % of the test images are
    nearer than this to a training image, in pixels. `levels`: grey levels of the data.

    >>> Reference._fields[:2]
    ('name', 'network')
    """

    name: str
    network: FeatureNetwork
    levels: int
    test: Tensor
    train: Tensor
    train_moments: Moments
    radius: float


def build_reference(name: str, network: FeatureNetwork) -> Reference:
    r"""The reference of a data set in RECIPES, computed from its images.

    Raises ValueError, or FileNotFoundError where the data set is not to be found.

    >>> build_reference("digits", FeatureNetwork(8).eval()).test.shape
    torch.Size([500, 64])
    """
    test, train = images_of(name, "test").images, images_of(name, "train").images
    near = nearest_neighbours(test, train).distance
    features = features_of(network, train)
    order = torch.randperm(len(train), generator=stream(0, "reference", 0))
    return Reference(
        name,
        network,
        RECIPES[name].levels,
        features_of(network, test),
        features[order[:KEPT]],
        moments(features),
        near.quantile(0.01).item(),
    )


def shipped(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    r"""Tensors and metadata of a file in `weights/features`, its digest checked.

    >>> shipped("digits")[1]["side"]
    '8'
    """
    path = resources.files("ddpm_core") / "weights" / "features"
    return read_tensors((path / f"{name}.safetensors").read_bytes(), name)


def load_features(name: str, device: torch.device | str = "cpu") -> FeatureNetwork:
    r"""The feature network that ships for a data set in RECIPES, in `eval()` mode.

    Raises ValueError for an unknown name or a damaged file.

    >>> load_features("fashion-mnist").side
    28
    """
    checks.one_of("name", name, RECIPES)
    tensors, metadata = shipped(name)
    network = FeatureNetwork(int(metadata["side"]), metadata["mirror"] == "True")
    network.load_state_dict(tensors)
    return network.to(device).eval().requires_grad_(False)


def load_reference(name: str) -> Reference:
    r"""The reference for a data set in RECIPES; needs no data set on the disk.

    Raises ValueError for an unknown name or a damaged file.

    >>> reference = load_reference("fashion-mnist")
    >>> reference.test.shape, reference.train_moments.size
    (torch.Size([10000, 64]), 60000)
    """
    network = load_features(name)
    if name == "digits":
        return build_reference(name, network)
    tensors, facts = shipped(f"{name}-reference")
    mean, covariance = tensors["train_mean"], tensors["train_covariance"]
    return Reference(
        name,
        network,
        RECIPES[name].levels,
        tensors["test"].float(),
        tensors["train"].float(),
        Moments(mean, covariance, int(facts["train_count"])),
        float(facts["radius"]),
    )


# --- book/ddpm/evaluation.ipynb · evaluation-export-features-main · The yardstick...
def save_features(folder: Path, reference: Reference, card: dict[str, Any]) -> None:
    r"""Write NAME.safetensors with its card NAME.json, and NAME-reference.safetensors.

    Raises OSError.

    >>> save_features.__name__
    'save_features'
    """
    name, network = reference.name, reference.network
    path = folder / f"{name}.safetensors"
    told = {"side": str(network.side), "mirror": str(network.mirror)}
    card = {**card, DIGEST: save_tensors(path, network.state_dict(), told)}
    if name != "digits":
        tensors = {
            "test": reference.test.half(),
            "train": reference.train.half(),
            "train_mean": reference.train_moments.mean,
            "train_covariance": reference.train_moments.covariance,
        }
        count = str(reference.train_moments.size)
        facts = {"radius": str(reference.radius), "train_count": count}
        path = folder / f"{name}-reference.safetensors"
        card["reference sha256"] = save_tensors(path, tensors, facts)
    text = json.dumps(card, indent=1, ensure_ascii=False) + "\n"
    write_atomically(folder / f"{name}.json", text.encode())


LICENCES = {
    "digits": "MIT for the weights; data CC BY 4.0 (Alpaydin and Kaynak 1998)",
    "fashion-mnist": "MIT for weights and features; data MIT, (c) 2017 Zalando SE",
}


def main(arguments: Sequence[str] | None = None) -> None:
    r"""The command `python -m ddpm_core.features`: train a feature network, and save.

    Leaves with a message (SystemExit) when something is wrong.

    >>> main(["--help"])
    Traceback (most recent call last):
    SystemExit: 0
    """
    options = argparse.ArgumentParser(
        prog="python -m ddpm_core.features",
        description="Train the network in whose feature space samples are compared, and "
        "write it into OUT with its card and the features of the real images.",
        allow_abbrev=False,
    )
    options.add_argument("name", choices=RECIPES, metavar="NAME", help=str([*RECIPES]))
    options.add_argument("out", type=Path, metavar="OUT", help="a folder")
    options.add_argument("--seed", type=int, default=0, metavar="N", help="[0]")
    least = "at most so many epochs a cycle, for a trial [the recipe's]"
    options.add_argument("--epochs", type=int, metavar="N", help=least)
    found = options.parse_args(arguments)
    recipe = RECIPES[found.name]
    if found.epochs is not None:
        cut = tuple((min(n, found.epochs), peak) for n, peak in recipe.cycles)
        recipe = recipe._replace(cycles=cut)
    try:
        train, test = images_of(found.name, "train"), images_of(found.name, "test")
        found.out.mkdir(parents=True, exist_ok=True)
        network = learn(train, recipe, found.seed)
        named = accuracy(network, test)
        card = {
            "name": found.name,
            "command": f"python -m ddpm_core.features {found.name} OUT",
            "seed": found.seed,
            "recipe": recipe._asdict(),
            "parameters": sum(p.numel() for p in network.parameters()),
            "figures": {"accuracy on the test images": named},
            "licence": LICENCES[found.name],
        }
        save_features(found.out, build_reference(found.name, network), card)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{named:.2%} of the test images named rightly; saved in {found.out}")


if __name__ == "__main__":
    main()
