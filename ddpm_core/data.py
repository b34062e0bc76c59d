"""Written by tools/extract.py; edit the chapters:

- book/workshop/data.ipynb
"""

import gzip
import math
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_core import checks

__all__ = [
    "CIFAR_FILES",
    "DATA_SETS",
    "DEBIAN",
    "IDX_FILES",
    "PICTURES",
    "SPLITS",
    "DataSet",
    "Images",
    "cifar10",
    "data_root",
    "digits",
    "fashion_mnist",
    "from_uint8",
    "gaussian_ring",
    "held_out",
    "image_folder",
    "mnist",
    "ring_means",
    "swiss_roll",
    "two_moons",
    "user_cache",
]


# --- book/workshop/data.ipynb · data-images · One form for all
class Images(NamedTuple):
    r"""A data set in memory: what every function of this module for images returns.

    `images` float32 [N, C, H, W] in [-1, 1]; `labels` int64 [N].

    >>> digits("test").labels.dtype
    torch.int64
    """

    images: Tensor
    labels: Tensor


def from_uint8(pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> Images:
    r"""8-bit pixels [N, H, W, C] as `Images`: 0 becomes -1 and 255 becomes 1.

    Divides by 127.5 and subtracts 1 in float32, one pass, nothing clipped.

    >>> from_uint8(np.array([[[[255]]]], np.uint8), np.zeros(1, np.int64)).images
    tensor([[[[1.]]]])
    """
    images = torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2).contiguous()
    return Images(images.div_(127.5).sub_(1), torch.tensor(labels, dtype=torch.int64))


# --- book/workshop/data.ipynb · data-digits · The embedded digits
SPLITS = ("train", "test", "all")


def held_out(labels: NDArray[np.int64], n: int) -> NDArray[np.bool_]:
    r"""Which `n` images to hold out: evenly spaced through the images sorted by class.

    The sort is stable, so within a class the order of the files stays. No random
    generator decides, hence the split is the same everywhere, for ever, and each
    class gives its share to within one image. Returns a mask [N].

    >>> held_out(np.array([0, 1, 0, 1]), 2)
    array([False, False,  True,  True])
    """
    total = len(labels)
    n = checks.integer("n", n, low=0, high=total)
    place = np.arange(total)
    chosen = (place + 1) * n // total > place * n // total
    mask = np.zeros(total, dtype=np.bool_)
    mask[np.argsort(labels, kind="stable")[chosen]] = True
    return mask


def digits(split: str = "train") -> Images:
    r"""scikit-learn's handwritten digits, 8x8 grey with the 17 levels k/8 - 1.

    `split` is "train" (1,297 images), "test" (500, held out by `held_out`) or "all"
    (1,797). The order within a split is the order of the file. No download: the
    file is part of scikit-learn. Raises ValueError for another split.

    >>> digits("train").images.shape, len(digits("test").labels)
    (torch.Size([1297, 1, 8, 8]), 500)
    """
    from sklearn.datasets import load_digits

    checks.one_of("split", split, SPLITS)
    raw = load_digits()
    images = torch.from_numpy(raw.images / 8 - 1).float().unsqueeze(1)
    labels = torch.from_numpy(raw.target.astype(np.int64))
    if images.shape != (1797, 1, 8, 8):
        raise ValueError(f"scikit-learn's digits are not 1797x8x8: {images.shape}")
    if split == "all":
        return Images(images, labels)
    test = torch.from_numpy(held_out(raw.target, 500))
    keep = test if split == "test" else ~test
    return Images(images[keep], labels[keep])


# --- book/workshop/data.ipynb · data-swiss-roll · Points in the plane
def swiss_roll(n: int, generator: torch.Generator, noise: float = 0.05) -> Tensor:
    r"""`n` points [n, 2] on a spiral of one and a half turns, from 1.5 pi to 4.5 pi.

    Centred exactly and scaled with one fixed number to variance 1 on average over
    the two coordinates; `noise` is the standard deviation added afterwards. float32,
    drawn on the generator's device. Raises ValueError for n < 1 or noise < 0.

    >>> swiss_roll(4, torch.Generator().manual_seed(0)).shape
    torch.Size([4, 2])
    """
    n = checks.integer("n", n, low=1)
    noise = checks.number("noise", noise, low=0)
    device = generator.device
    u = torch.rand(n, generator=generator, device=device)
    angle = math.pi * (1.5 + 3 * u)
    points = torch.stack([angle * angle.cos(), angle * angle.sin()], 1)
    centre = torch.tensor([2.0, 2 / (3 * math.pi)], device=device)
    z = torch.randn(n, 2, generator=generator, device=device)
    return (points - centre) / 6.789 + noise * z


# --- book/workshop/data.ipynb · data-ring · Points in the plane
def ring_means(components: int = 8, spread: float = 0.1) -> Tensor:
    r"""Centres [components, 2] of `gaussian_ring`, float64, the first on the x-axis.

    The radius sqrt(2 (1 - spread^2)) makes the variance of the mixture exactly 1 in
    each coordinate (for 3 or more components). With `oracles.Mixture` and equal
    weights they give the exact density of the data.

    >>> ring_means(4, 0.0)[0]
    tensor([1.4142, 0.0000], dtype=torch.float64)
    """
    components = checks.integer("components", components, low=1)
    spread = checks.number("spread", spread, low=0, high=1)
    angle = 2 * math.pi * torch.arange(components, dtype=torch.float64) / components
    radius = math.sqrt(2 * (1 - spread**2))
    return radius * torch.stack([angle.cos(), angle.sin()], 1)


def gaussian_ring(
    n: int, generator: torch.Generator, components: int = 8, spread: float = 0.1
) -> Tensor:
    r"""`n` points [n, 2] of equally likely Gaussians of deviation `spread` on a ring.

    Mean 0 and variance 1 in each coordinate; the centres are `ring_means`. float32,
    drawn on the generator's device. Raises ValueError for n < 1.

    >>> gaussian_ring(4, torch.Generator().manual_seed(0)).dtype
    torch.float32
    """
    n = checks.integer("n", n, low=1)
    device = generator.device
    means = ring_means(components, spread).float().to(device)
    which = torch.randint(components, (n,), generator=generator, device=device)
    z = torch.randn(n, 2, generator=generator, device=device)
    return means[which] + spread * z


# --- book/workshop/data.ipynb · data-moons · Points in the plane
def two_moons(n: int, generator: torch.Generator, noise: float = 0.05) -> Tensor:
    r"""`n` points [n, 2] on two interleaved half circles, each equally likely.

    Centred exactly and scaled with one fixed number to variance 1 on average over
    the two coordinates; `noise` is the standard deviation added afterwards.
    float32, drawn on the generator's device. Raises ValueError for n < 1.

    >>> two_moons(4, torch.Generator().manual_seed(0)).shape
    torch.Size([4, 2])
    """
    n = checks.integer("n", n, low=1)
    noise = checks.number("noise", noise, low=0)
    device = generator.device
    angle = math.pi * torch.rand(n, generator=generator, device=device)
    lower = torch.randint(2, (n,), generator=generator, device=device)
    sign = 1.0 - 2.0 * lower
    x = lower + sign * angle.cos() - 0.5
    y = 0.5 * lower + sign * angle.sin() - 0.25
    z = torch.randn(n, 2, generator=generator, device=device)
    return torch.stack([x, y], 1) / 0.705 + noise * z


# --- book/workshop/data.ipynb · data-user-cache · Larger sets: where they are looked...
def user_cache() -> Path:
    r"""The user's cache folder of this book, which need not exist.

    `$XDG_CACHE_HOME/ddpm_core` if that is set, else `%LOCALAPPDATA%` on Windows, else
    `~/.cache`, each with `ddpm_core` below it. Safe to delete at any time.

    >>> user_cache().name
    'ddpm_core'
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not base and sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", "")
    return (Path(base) if base else Path.home() / ".cache") / "ddpm_core"


# --- book/workshop/data.ipynb · data-sets · Larger sets: where they are looked for
class DataSet(NamedTuple):
    r"""A downloadable data set: its class in torchvision, its files and its sizes.

    `files` are relative to torchvision's `root`; `counts` are the images in (train,
    test); `pixels` is the shape [H, W, C] of one image.

    >>> DATA_SETS["mnist"].counts
    (60000, 10000)
    """

    torchvision: str
    files: tuple[str, ...]
    counts: tuple[int, int]
    pixels: tuple[int, int, int]


IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
CIFAR_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")

DATA_SETS = {
    "fashion_mnist": DataSet(
        "FashionMNIST",
        tuple(f"FashionMNIST/raw/{file}" for file in IDX_FILES),
        (60_000, 10_000),
        (28, 28, 1),
    ),
    "mnist": DataSet(
        "MNIST",
        tuple(f"MNIST/raw/{file}" for file in IDX_FILES),
        (60_000, 10_000),
        (28, 28, 1),
    ),
    "cifar10": DataSet(
        "CIFAR10",
        tuple(f"cifar-10-batches-py/{file}" for file in CIFAR_FILES),
        (50_000, 10_000),
        (32, 32, 3),
    ),
}

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


# --- book/workshop/data.ipynb · data-root · Larger sets: where they are looked for
def _unpack_debian(root: Path) -> None:
    if not DEBIAN.is_dir():
        raise FileNotFoundError(f"no folder {DEBIAN}")
    for file in DATA_SETS["fashion_mnist"].files:
        target = root / file
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        with gzip.open(DEBIAN / f"{target.name}.gz") as packed, part.open("wb") as out:
            shutil.copyfileobj(packed, out)
        part.replace(target)


def _torchvision(name: str, root: Path, train: bool, download: bool) -> Any:
    import torchvision.datasets

    kind = getattr(torchvision.datasets, DATA_SETS[name].torchvision)
    waited = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        return kind(root=str(root), train=train, download=download)
    finally:
        socket.setdefaulttimeout(waited)


def data_root(name: str, download: bool = True) -> Path:
    r"""The folder to give to torchvision as `root` for a data set of `DATA_SETS`.

    The first that works of: the folder in DDPM_DATA; the user's cache; Debian's package
    (unpacked into the cache); torchvision's download (into the cache, if `download`).
    Raises FileNotFoundError that lists what was tried and the ways out,
    NotADirectoryError if DDPM_DATA is no folder, ValueError for an unknown name.

    >>> data_root("imagenet")
    Traceback (most recent call last):
    ValueError: name must be one of 'fashion_mnist', 'mnist', 'cifar10'; got 'imagenet'
    """
    checks.one_of("name", name, DATA_SETS)
    own, cache = os.environ.get("DDPM_DATA", ""), user_cache()
    if own and not Path(own).is_dir():
        raise NotADirectoryError(f"DDPM_DATA must name a folder; got {own!r}")
    tried = [] if own else ["DDPM_DATA: not set"]
    for what, root in (("DDPM_DATA", Path(own)), ("the user's cache", cache)):
        if what == "DDPM_DATA" and not own:
            continue
        missing = [f for f in DATA_SETS[name].files if not (root / f).is_file()]
        if not missing:
            return root
        tried.append(f"{what}: {root} has no {missing[0]}")
    if name == "fashion_mnist":
        try:
            _unpack_debian(cache)
            return cache
        except (OSError, EOFError) as error:
            tried.append(f"Debian's package dataset-fashion-mnist: {error}")
    if download:
        try:
            _torchvision(name, cache, train=True, download=True)
            return cache
        except (OSError, RuntimeError) as error:
            tried.append(f"torchvision's download into {cache}: {error}")
    raise FileNotFoundError(_ways_out(name, tried))


# --- book/workshop/data.ipynb · data-ways-out · Larger sets: where they are looked for
def _ways_out(name: str, tried: list[str]) -> str:
    first, debian = DATA_SETS[name].files[0], ""
    if name == "fashion_mnist":
        debian = "\n  - on Debian or Ubuntu: apt install dataset-fashion-mnist"
    listed = "".join(f"\n  - {place}" for place in tried)
    return (
        f"data set {name!r} was not found. Tried:{listed}\nWays out:\n"
        "  - run once where there is a network, then it lies in the user's cache\n"
        f"  - set DDPM_DATA to a folder FOLDER that holds FOLDER/{first} and the others"
        f"{debian}\n  - use data.digits(), which needs no file"
    )


# --- book/workshop/data.ipynb · data-read · Larger sets: where they are looked for
def _read(name: str, split: str, size: int) -> Images:
    train = checks.one_of("split", split, ("train", "test")) == "train"
    kind, root = DATA_SETS[name], data_root(name)
    try:
        source = _torchvision(name, root, train, download=False)
    except Exception as error:
        raise ValueError(
            f"{name} in {root} cannot be read: {error} (delete it to fetch it anew)"
        ) from error
    pixels = np.asarray(source.data).reshape(-1, *kind.pixels)
    labels = np.asarray(source.targets, dtype=np.int64)
    right = kind.counts[0 if train else 1]
    if len(pixels) != right or len(labels) != right:
        raise ValueError(
            f"{name}, split {split!r}, must hold {right} images and labels; "
            f"{root} has {len(pixels)} and {len(labels)}"
        )
    edge = (size - kind.pixels[0]) // 2
    pixels = np.pad(pixels, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    return from_uint8(pixels, labels)


def _grey_size(size: int) -> int:
    if checks.integer("size", size) not in (28, 32):
        raise ValueError(f"size must be 28 or 32 (two black pixels a side); got {size}")
    return size


def fashion_mnist(split: str = "train", size: int = 28) -> Images:
    r"""Fashion-MNIST, 28x28 grey, 256 levels, 10 kinds of clothing (Xiao et al. 2017).

    `split` "train" (60,000 images) or "test" (10,000); `size` 28, or 32 for two black
    pixels on each side, which no image statistic should count. Found by `data_root`.
    Raises ValueError for bad arguments and broken files, FileNotFoundError.

    >>> fashion_mnist("train", 30)
    Traceback (most recent call last):
    ValueError: size must be 28 or 32 (two black pixels a side); got 30
    """
    return _read("fashion_mnist", split, _grey_size(size))


def mnist(split: str = "train", size: int = 28) -> Images:
    r"""MNIST, 28x28 grey in 256 levels, the ten digits.

    As `fashion_mnist`: `split` "train" (60,000) or "test" (10,000), `size` 28 or 32.

    >>> mnist("validation")
    Traceback (most recent call last):
    ValueError: split must be one of 'train', 'test'; got 'validation'
    """
    return _read("mnist", split, _grey_size(size))


def cifar10(split: str = "train") -> Images:
    r"""CIFAR-10, 32x32 RGB in 256 levels, 10 kinds of things.

    `split` "train" (50,000 images) or "test" (10,000). Its files are Python pickles,
    which torchvision opens only after comparing their MD5 sums with the published ones.

    >>> cifar10("validation")
    Traceback (most recent call last):
    ValueError: split must be one of 'train', 'test'; got 'validation'
    """
    return _read("cifar10", split, 32)


# --- book/workshop/data.ipynb · data-picture · A folder of your own pictures
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def _picture(path: Path, size: int, channels: int) -> NDArray[np.uint8]:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
    except OSError as error:
        raise ValueError(f"{path} must be an image; Pillow says: {error}") from error
    if picture.mode[0] in "IF":
        raise ValueError(f"{path} must have 8 bits a channel; got mode {picture.mode}")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    picture = picture.convert("L" if channels == 1 else "RGB")
    shorter = min(picture.size)
    wide, high = (max(size, round(side * size / shorter)) for side in picture.size)
    picture = picture.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (wide - size) // 2, (high - size) // 2
    picture = picture.crop((left, top, left + size, top + size))
    return np.asarray(picture, np.uint8).reshape(size, size, channels)


def image_folder(path: str | Path, size: int, channels: int = 3) -> Images:
    r"""All images below a folder, resized, cropped and held in memory.

    The shorter side is resized to `size` (bicubic, antialiased; also if it is smaller),
    then the centre is cut out; turned by the EXIF tag; transparency becomes white;
    `channels` 3 (RGB) or 1 (grey). Sorted by path; labels count the sub-folders of
    `path` in order, 0 without any. Raises NotADirectoryError, and ValueError if there
    is no image or one cannot be read.

    >>> image_folder("/no/such/folder", 32)
    Traceback (most recent call last):
    NotADirectoryError: path must be a folder; got '/no/such/folder'
    """
    folder = Path(path)
    size = checks.integer("size", size, low=1)
    if checks.integer("channels", channels) not in (1, 3):
        raise ValueError(f"channels must be 1 or 3; got {channels}")
    if not folder.is_dir():
        raise NotADirectoryError(f"path must be a folder; got {str(path)!r}")
    found = sorted(f for f in folder.rglob("*") if f.suffix.lower() in PICTURES)
    if not found:
        raise ValueError(f"path must hold images ({', '.join(PICTURES)}); got {path}")
    above = [f.relative_to(folder).parts[:-1] for f in found]
    names = sorted({parts[0] if parts else "" for parts in above})
    labels = [names.index(parts[0] if parts else "") for parts in above]
    pixels = np.stack([_picture(f, size, channels) for f in found])
    return from_uint8(pixels, np.array(labels, np.int64))
