"""Data sets: the split, the moments, the search order, hostile folders."""

import gzip
import math
import struct
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ddpm_core import checks, data


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# digits


def test_split_sizes_and_range():
    train, test, every = (data.digits(s) for s in data.SPLITS)
    assert train.images.shape == (1297, 1, 8, 8)
    assert test.images.shape == (500, 1, 8, 8)
    assert every.images.shape == (1797, 1, 8, 8)
    for part in (train, test, every):
        checks.images("images", part.images)
        assert part.images.dtype == torch.float32
        assert part.labels.dtype == torch.int64
        assert part.labels.shape == part.images.shape[:1]
    assert (every.images.unique() * 8 + 8).tolist() == list(range(17))


def test_split_parts_make_up_the_whole():
    train, test, every = (data.digits(s).images.flatten(1) for s in data.SPLITS)
    both = torch.cat([train, test])
    order = [tuple(row) for row in both.tolist()]
    assert sorted(order) == sorted(tuple(row) for row in every.tolist())


def test_split_is_the_one_that_stands_in_the_book():
    """Pinned: a change of the split would make every stored figure wrong."""
    labels = data.digits("all").labels.numpy()
    held = np.flatnonzero(data.held_out(labels, 500))
    assert held[:8].tolist() == [9, 11, 15, 17, 18, 22, 23, 24]
    assert held.sum() == 449703
    assert data.digits("test").labels.bincount().tolist() == [
        49, 51, 49, 51, 50, 51, 50, 50, 48, 51,
    ]  # fmt: skip


@settings(max_examples=100)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), share=st.floats(0, 1)
)
def test_held_out_is_stratified(labels, share):
    labels = np.array(labels)
    n = int(share * len(labels))
    mask = data.held_out(labels, n)
    assert mask.sum() == n
    for label in set(labels.tolist()):
        of_class = labels == label
        expected = n * of_class.sum() / len(labels)
        assert abs((mask & of_class).sum() - expected) < 1


@pytest.mark.parametrize("n", [-1, 3])
def test_held_out_refuses(n):
    with pytest.raises(ValueError, match="n must be"):
        data.held_out(np.zeros(2, int), n)


@pytest.mark.parametrize("load", [data.digits, data.mnist, data.cifar10])
def test_unknown_split(load):
    with pytest.raises(ValueError, match="split must be one of"):
        load("validation")


# points


@pytest.mark.parametrize("draw", [data.swiss_roll, data.gaussian_ring, data.two_moons])
def test_moments_of_the_points(draw):
    n = 100_000
    x = draw(n, seeded())
    assert x.shape == (n, 2)
    assert x.dtype == torch.float32
    deviation = x.std(0)
    assert (x.mean(0).abs() < 5 * deviation / math.sqrt(n)).all()
    assert x.var(0).mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(draw(50, seeded(3)), draw(50, seeded(3)))
    assert not torch.equal(draw(50, seeded(3)), draw(50, seeded(4)))
    with pytest.raises(ValueError, match="n must be"):
        draw(0, seeded())


@pytest.mark.parametrize("components", [3, 5, 8])
def test_ring_has_variance_one_exactly(components):
    means = data.ring_means(components, 0.2)
    second = (means.T @ means) / components + 0.04 * torch.eye(2, dtype=means.dtype)
    torch.testing.assert_close(second, torch.eye(2, dtype=means.dtype))
    assert means.sum(0).abs().max() < 1e-12


def test_swiss_roll_is_on_the_spiral_without_noise():
    x = data.swiss_roll(1000, seeded(), noise=0.0).double() * 6.789
    x = x + torch.tensor([2.0, 2 / (3 * math.pi)])
    radius, angle = x.norm(dim=1), torch.atan2(x[:, 1], x[:, 0])
    turns = (radius - angle) / (2 * math.pi)
    assert (turns - turns.round()).abs().max() < 1e-4
    assert radius.min() >= 1.5 * math.pi - 1e-3
    assert radius.max() <= 4.5 * math.pi + 1e-3


@pytest.mark.parametrize("draw", [data.swiss_roll, data.two_moons])
def test_negative_noise(draw):
    with pytest.raises(ValueError, match="noise"):
        draw(3, seeded(), noise=-0.1)


# where data sets are looked for


def write_idx(path, array, packed=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    content = head + array.tobytes()
    path.write_bytes(gzip.compress(content, 1) if packed else content)


def fake_set(folder, images, suffix=""):
    """Four IDX files whose test split has the published number of images."""
    for name, count in (("train", 3), ("t10k", images)):
        pixels = np.zeros((count, 28, 28), np.uint8)
        pixels[:, 0, 0], pixels[:, 14, 14] = 255, np.arange(count) % 256
        labels = (np.arange(count) % 10).astype(np.uint8)
        packed = bool(suffix)
        write_idx(folder / f"{name}-images-idx3-ubyte{suffix}", pixels, packed)
        write_idx(folder / f"{name}-labels-idx1-ubyte{suffix}", labels, packed)


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """No data set anywhere, no network; returns the folders to put one into."""
    monkeypatch.delenv("DDPM_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "debian")
    real = data._torchvision

    def offline(name, root, train, download):
        if download:
            raise RuntimeError("no network here")
        return real(name, root, train, download)

    monkeypatch.setattr(data, "_torchvision", offline)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "kind"), [("fashion_mnist", "FashionMNIST"), ("mnist", "MNIST")]
)
def test_read_from_ddpm_data(alone, monkeypatch, name, kind):
    fake_set(alone / "own" / kind / "raw", 10_000)
    monkeypatch.setenv("DDPM_DATA", str(alone / "own"))
    found = getattr(data, name)("test")
    assert found.images.shape == (10_000, 1, 28, 28)
    assert (found.images[:, 0, 0, 0] == 1).all()
    level = (found.images[:, 0, 14, 14] + 1) * 127.5
    assert torch.equal(level.round().long(), torch.arange(10_000) % 256)
    assert torch.equal(found.labels, torch.arange(10_000) % 10)
    wide = getattr(data, name)("test", size=32).images
    assert torch.equal(wide[:, :, 2:-2, 2:-2], found.images)
    assert (wide[:, :, :2] == -1).all()
    assert (wide[:, :, :, -2:] == -1).all()
    assert not (alone / "cache").exists(), "reading writes nothing"


def test_cache_comes_second(alone, monkeypatch):
    fake_set(alone / "cache" / "ddpm_core" / "FashionMNIST" / "raw", 10_000)
    assert data.data_root("fashion_mnist") == alone / "cache" / "ddpm_core"
    fake_set(alone / "own" / "FashionMNIST" / "raw", 10_000)
    monkeypatch.setenv("DDPM_DATA", str(alone / "own"))
    assert data.data_root("fashion_mnist") == alone / "own"


def test_an_own_folder_without_the_set_falls_through(alone, monkeypatch):
    (alone / "own").mkdir()
    monkeypatch.setenv("DDPM_DATA", str(alone / "own"))
    fake_set(alone / "cache" / "ddpm_core" / "FashionMNIST" / "raw", 10_000)
    assert data.data_root("fashion_mnist") == alone / "cache" / "ddpm_core"


def test_debian_is_unpacked_once(alone):
    fake_set(alone / "debian", 10_000, suffix=".gz")
    found = data.fashion_mnist("test")
    assert found.images.shape == (10_000, 1, 28, 28)
    raw = alone / "cache" / "ddpm_core" / "FashionMNIST" / "raw"
    assert len(list(raw.iterdir())) == 4, "no part is left behind"
    for file in (alone / "debian").iterdir():
        file.unlink()
    assert torch.equal(data.fashion_mnist("test").images, found.images)


def test_a_torn_debian_file_is_said(alone):
    fake_set(alone / "debian", 10, suffix=".gz")
    file = alone / "debian" / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(FileNotFoundError, match=r"(?s)Debian.*Compressed file ended"):
        data.data_root("fashion_mnist")


def test_download_comes_last(alone, monkeypatch):
    asked = []
    monkeypatch.setattr(data, "_torchvision", lambda *a, **k: asked.append((a, k)))
    root = data.data_root("cifar10")
    assert root == alone / "cache" / "ddpm_core"
    assert asked == [(("cifar10", root), {"train": True, "download": True})]


@pytest.mark.parametrize("name", list(data.DATA_SETS))
def test_one_error_says_it_all(alone, name):
    with pytest.raises(FileNotFoundError) as caught:
        data.data_root(name)
    text = str(caught.value)
    for part in ("DDPM_DATA: not set", "user's cache", "no network here", "Ways out"):
        assert part in text
    assert ("apt install dataset-fashion-mnist" in text) == (name == "fashion_mnist")
    assert not (alone / "cache").exists()


def test_a_ddpm_data_that_is_no_folder_stops_at_once(alone, monkeypatch):
    monkeypatch.setenv("DDPM_DATA", str(alone / "typo"))
    with pytest.raises(NotADirectoryError, match="typo"):
        data.data_root("mnist")


def test_wrong_number_of_images(alone, monkeypatch):
    fake_set(alone / "own" / "MNIST" / "raw", 12)
    monkeypatch.setenv("DDPM_DATA", str(alone / "own"))
    with pytest.raises(ValueError, match=r"must hold 10000 images.* has 12 and 12"):
        data.mnist("test")


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\x08\x03", b"\0\0\x08\x03" + 12 * b"\1", b"hello"]
)
def test_broken_files(alone, monkeypatch, content):
    raw = alone / "own" / "MNIST" / "raw"
    fake_set(raw, 12)
    (raw / "t10k-images-idx3-ubyte").write_bytes(content)
    monkeypatch.setenv("DDPM_DATA", str(alone / "own"))
    with pytest.raises(ValueError, match="cannot be read"):
        data.mnist("test")


@pytest.mark.parametrize("size", [8, 30, 64, 28.0])
def test_size_of_the_grey_sets(size):
    with pytest.raises((TypeError, ValueError), match="size must be"):
        data.mnist("test", size)


def test_user_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data.user_cache() == tmp_path / "ddpm_core"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(data.Path, "home", lambda: tmp_path / "me")
    assert data.user_cache() == tmp_path / "me" / ".cache" / "ddpm_core"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert data.user_cache() == tmp_path / "local" / "ddpm_core"


@pytest.mark.data
@pytest.mark.parametrize(("split", "n"), [("train", 60_000), ("test", 10_000)])
def test_fashion_mnist_itself(split, n):
    found = data.fashion_mnist(split)
    checks.images("images", found.images)
    assert found.labels.bincount().tolist() == [n // 10] * 10
    if split == "train":
        in_0_1 = (found.images.double() + 1) / 2
        assert in_0_1.mean().item() == pytest.approx(0.2860, abs=1e-4)
        assert in_0_1.std().item() == pytest.approx(0.3530, abs=1e-4)


# a folder of pictures


def save(folder, name, array, **options):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path, **options)
    return path


def test_crop_is_central_and_keeps_the_aspect(tmp_path):
    wide = np.zeros((40, 120))
    wide[:, 40:80] = 255
    tall = wide.T
    save(tmp_path, "a.png", wide)
    save(tmp_path, "b.PNG", tall)
    images = data.image_folder(tmp_path, 20, channels=1).images
    assert images.shape == (2, 1, 20, 20)
    assert (images[0, 0, :, 2:-2] == 1).all()
    torch.testing.assert_close(images[0], images[1].mT)


def test_same_size_is_left_alone(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3))
    save(tmp_path, "a.png", pixels)
    images = data.image_folder(tmp_path, 9).images
    back = ((images[0].permute(1, 2, 0) + 1) * 127.5).round().numpy()
    assert (back == pixels).all()


def test_labels_count_sorted_folders(tmp_path):
    for name in ("b/x.png", "a/y.png", "a/deep/z.png", "c/w.jpg"):
        save(tmp_path, name, np.zeros((4, 4)))
    (tmp_path / "a" / "notes.txt").write_text("no image")
    assert data.image_folder(tmp_path, 4).labels.tolist() == [0, 0, 1, 2]
    flat = tmp_path / "c"
    assert data.image_folder(flat, 4).labels.tolist() == [0]


def test_transparency_becomes_white(tmp_path):
    pixels = np.zeros((4, 4, 4))
    pixels[:, 2:, 3] = 255  # left half transparent black, right half opaque black
    save(tmp_path, "a.png", pixels)
    row = data.image_folder(tmp_path, 4, channels=1).images[0, 0, 0]
    assert row.tolist() == [1, 1, -1, -1]


def test_exif_turns(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees
    pixels = np.zeros((6, 6))
    pixels[:3] = 255
    save(tmp_path, "a.png", pixels, exif=exif.tobytes())
    image = data.image_folder(tmp_path, 6, channels=1).images[0, 0]
    assert (image[:, 3:] == 1).all()
    assert (image[:, :3] == -1).all()


@settings(max_examples=25)
@given(width=st.integers(1, 50), height=st.integers(1, 50), size=st.integers(1, 24))
def test_any_picture_gets_the_size(tmp_path_factory, width, height, size):
    folder = tmp_path_factory.mktemp("any")
    save(folder, "a.png", np.full((height, width, 3), 77))
    images = data.image_folder(folder, size).images
    assert images.shape == (1, 3, size, size)
    torch.testing.assert_close(images, torch.full_like(images, 77 / 127.5 - 1))


def test_folder_errors(tmp_path):
    with pytest.raises(NotADirectoryError, match="path must be a folder"):
        data.image_folder(tmp_path / "none", 8)
    with pytest.raises(ValueError, match="path must hold images"):
        data.image_folder(tmp_path, 8)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png must be an image"):
        data.image_folder(tmp_path, 8)
    (tmp_path / "a.png").unlink()
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="8 bits"):
        data.image_folder(tmp_path, 8)
    with pytest.raises(ValueError, match="channels"):
        data.image_folder(tmp_path, 8, channels=4)
    with pytest.raises(ValueError, match="size"):
        data.image_folder(tmp_path, 0)
