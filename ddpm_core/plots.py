"""Written by tools/extract.py; edit the chapters:

- book/workshop/plots.ipynb
"""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image as PillowImage
from torch import Tensor

from ddpm_core import checks

__all__ = [
    "COLOURS",
    "LARGEST_GIF",
    "Frame",
    "animation",
    "figure_frame",
    "frame_pixels",
    "grid",
    "show_images",
    "style",
    "with_palette",
]


# --- book/workshop/plots.ipynb · plots-style · One style
COLOURS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "red": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "yellow": "#F0E442",
    "black": "#000000",
}


def style() -> None:
    r"""Set the look of every figure of the book, for the rest of the session.

    White figures with a margin, so that they are readable on a dark page too;
    labels of 11 points; the colours of `COLOURS` in their order, which people
    with any of the common kinds of colour blindness can tell apart.

    >>> style()
    >>> float(mpl.rcParams["axes.labelsize"])
    11.0
    """
    mpl.rcParams.update(
        {
            "figure.figsize": (7.0, 3.8),
            "figure.dpi": 110,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "savefig.facecolor": "white",
            "savefig.pad_inches": 0.15,
            "font.size": 11.0,
            "axes.labelsize": 11.0,
            "axes.titlesize": 11.0,
            "axes.facecolor": "white",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.prop_cycle": cycler(color=list(COLOURS.values())),
            "grid.color": "#DDDDDD",
            "grid.linewidth": 0.8,
            "legend.frameon": False,
            "legend.fontsize": 10.0,
            "lines.linewidth": 2.0,
            "image.cmap": "gray",
            "image.interpolation": "nearest",
        }
    )


# --- book/workshop/plots.ipynb · plots-grid · Images in rows
def grid(images: Tensor, columns: int = 10) -> NDArray[np.float32]:
    r"""One picture in [0, 1] of a batch of images, row by row, white lines between.

    `images` [N, C, H, W] with C = 1 or 3; values in [-1, 1] become [0, 1], values
    outside (a noisy x_t has them) are shown as black or white. Returns an array
    [h, w] for C = 1 and [h, w, 3] for C = 3, which `imshow` takes as it is.
    Raises ValueError for another shape and for values that are not finite.

    >>> import torch
    >>> grid(torch.zeros(3, 1, 8, 8), columns=2).shape
    (19, 19)
    """
    checks.tensor("images", images, ndim=4)
    checks.finite("images", images)
    columns = checks.integer("columns", columns, low=1)
    n, channels, height, width = images.shape
    if n == 0 or channels not in (1, 3):
        raise ValueError(
            "images must be [N, C, H, W] with N >= 1 and C = 1 or 3, "
            f"got {tuple(images.shape)}"
        )
    columns = min(columns, n)
    rows = -(-n // columns)
    pixels = ((images.detach().cpu().float() + 1) / 2).clamp(0, 1)
    sheet = np.ones(
        (rows * (height + 1) + 1, columns * (width + 1) + 1, channels), np.float32
    )
    for i, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        top, left = i // columns * (height + 1) + 1, i % columns * (width + 1) + 1
        sheet[top : top + height, left : left + width] = image
    return sheet[:, :, 0] if channels == 1 else sheet


# --- book/workshop/plots.ipynb · plots-show-images · Images in rows
def show_images(
    images: Tensor, ax: Axes | None = None, columns: int = 10, title: str = ""
) -> Axes:
    r"""Draw `grid(images, columns)` on `ax` (a new figure if None); returns the axes.

    The grey scale is fixed: -1 is black and 1 is white in every figure.

    >>> import torch
    >>> ax = show_images(torch.zeros(3, 1, 8, 8), columns=3)
    >>> len(ax.get_images())
    1
    >>> plt.close()
    """
    sheet = grid(images, columns)
    if ax is None:
        wide = 7.0 * min(1.0, sheet.shape[1] / 90)
        _, ax = plt.subplots(figsize=(wide, wide * sheet.shape[0] / sheet.shape[1]))
    ax.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_axis_off()
    if title:
        ax.set_title(title)
    return ax


# --- book/workshop/plots.ipynb · plots-frames · Animations
Frame = Tensor | NDArray[np.float32] | NDArray[np.uint8]


def figure_frame(figure: Figure) -> NDArray[np.uint8]:
    r"""The pixels of a Matplotlib figure, [h, w, 3] uint8, as a frame for `animation`.

    Draws with the Agg backend whatever backend is in use. The size in pixels is
    `figsize` times `dpi`. Close the figure afterwards with `plt.close(figure)`.

    >>> figure_frame(Figure(figsize=(2, 1), dpi=50)).shape
    (50, 100, 3)
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def frame_pixels(frame: Frame) -> NDArray[np.uint8]:
    r"""A frame as uint8 [h, w] or [h, w, 3]: what `animation` accepts, made one thing.

    A tensor [N, C, H, W] in [-1, 1] is drawn with `grid`; an array [h, w] or
    [h, w, 3] is either uint8 or float in [0, 1]. Raises ValueError otherwise.

    >>> frame_pixels(np.ones((2, 2), np.float32)).max()
    np.uint8(255)
    """
    array: Any = grid(frame) if isinstance(frame, Tensor) else np.asarray(frame)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ValueError(f"a frame must be [h, w] or [h, w, 3], got {array.shape}")
    if array.dtype == np.uint8:
        return np.asarray(array, np.uint8)
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"a frame must be float or uint8, got {array.dtype}")
    if not (array.min() >= 0 and array.max() <= 1):
        raise ValueError("a float frame must lie in [0, 1]")
    return np.asarray(np.round(array * 255), np.uint8)


# --- book/workshop/plots.ipynb · plots-animation · Animations
LARGEST_GIF = 400_000


def with_palette(
    pixels: list[NDArray[np.uint8]], levels: int
) -> list[PillowImage.Image]:
    r"""The frames as palette images that share one palette of `levels` colours.

    Grey frames get evenly spaced grey levels; colour frames get the palette of the
    first, middle and last frame together. No dithering: its dots would flicker.

    >>> with_palette([np.zeros((2, 2), np.uint8)], 4)[0].mode
    'P'
    """
    if all(p.ndim == 2 for p in pixels):
        steps = np.round(np.linspace(0, 255, levels)).astype(np.uint8)
        palette = PillowImage.new("P", (1, 1))
        palette.putpalette(np.repeat(steps, 3).tobytes())
    else:
        pixels = [p if p.ndim == 3 else np.stack([p] * 3, 2) for p in pixels]
        chosen = [pixels[0], pixels[len(pixels) // 2], pixels[-1]]
        palette = PillowImage.fromarray(np.concatenate(chosen)).quantize(
            levels, dither=PillowImage.Dither.NONE
        )
    return [
        PillowImage.fromarray(p)
        .convert("RGB")
        .quantize(palette=palette, dither=PillowImage.Dither.NONE)
        for p in pixels
    ]


def animation(
    frames: Iterable[Frame],
    path: str | Path | None = None,
    ms: int = 80,
    scale: int = 8,
    levels: int = 16,
    hold: int = 2000,
) -> Image:
    r"""An animated GIF, for the last line of a cell; also written to `path` if given.

    `frames` see `frame_pixels`, all of one size; each pixel becomes `scale` x `scale`;
    `ms` a frame, `hold` ms on the last; `levels` colours (2 to 256). The same frames
    give the same bytes. Raises ValueError above `LARGEST_GIF` bytes.

    >>> import torch
    >>> x = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    >>> animation([x, -x]).format
    'gif'
    """
    ms, hold = checks.integer("ms", ms, low=20), checks.integer("hold", hold, low=20)
    scale = checks.integer("scale", scale, low=1)
    levels = checks.integer("levels", levels, low=2, high=256)
    pixels = [frame_pixels(frame) for frame in frames]
    if not pixels or len({p.shape[:2] for p in pixels}) != 1:
        raise ValueError("frames must be one or more, all of one size")
    height, width = pixels[0].shape[:2]
    first, *rest = [
        image.resize((width * scale, height * scale), PillowImage.Resampling.NEAREST)
        for image in with_palette(pixels, levels)
    ]
    times = [ms] * len(rest) + [hold]
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=rest, duration=times, loop=0)
    data = file.getvalue()
    if len(data) > LARGEST_GIF:
        raise ValueError(
            f"the animation has {len(data)} bytes, more than {LARGEST_GIF}: "
            "take fewer frames, a smaller scale or fewer levels"
        )
    if path is not None:
        Path(path).write_bytes(data)
    return Image(data=data, format="gif")
