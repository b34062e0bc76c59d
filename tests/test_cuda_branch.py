"""The training chapter's branch for a GPU, run on a CPU with 3 steps for each count."""

import sys
from pathlib import Path

import matplotlib as mpl
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import chapters as book
from equations import plain

CHAPTER = book.ROOT / "book" / "ddpm" / "training.ipynb"
# (text on the page, what it becomes, how often it stands there at least)
REPLACED = [
    ('device.type == "cpu"', "False", 6),
    ("20_000", "3", 1),
    ("else 1000", "else 3", 1),
    ('data.fashion_mnist("train", 32)', "stand_in(96)", 1),
    ('data.fashion_mnist("test", 32)', "stand_in(96)", 1),
    ("(500, *train.shape[1:])", "(40, *train.shape[1:])", 1),
]


def stand_in(n):
    """Images of the size of Fashion-MNIST at 32 x 32, with every label in turn."""
    from ddpm_core.data import Images

    generator = torch.Generator().manual_seed(n)
    images = torch.rand(n, 1, 32, 32, generator=generator) * 2 - 1
    return Images(images, torch.arange(n) % 10)


def test_the_cells_for_a_gpu_run():
    mpl.use("Agg")
    cells = book.code(CHAPTER)
    whole = "\n".join(c.source for c in cells)
    for old, _, least in REPLACED:
        assert whole.count(old) >= least, f"not on the page: {old}"
    space = {"__name__": "chapter", "stand_in": stand_in}
    for cell in cells:
        source = plain(cell)
        for old, new, _ in REPLACED:
            source = source.replace(old, new)
        exec(compile(source, str(cell), "exec"), space)
    assert space["trainer"].step == 3
    assert space["samples"].shape == (40, 1, 32, 32)
