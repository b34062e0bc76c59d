"""Grids pixel by pixel, animations byte by byte."""

import io
import itertools
import math

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from ddpm_core import plots


@settings(max_examples=60)
@given(
    n=st.integers(1, 12),
    c=st.sampled_from([1, 3]),
    h=st.integers(1, 5),
    w=st.integers(1, 5),
    columns=st.integers(1, 15),
)
def test_grid_holds_every_pixel_in_its_place(n, c, h, w, columns):
    images = torch.rand(n, c, h, w, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sheet = plots.grid(images, columns)
    sheet = sheet[:, :, None] if c == 1 else sheet
    used = np.zeros(sheet.shape[:2], bool)
    columns = min(columns, n)
    assert sheet.shape[1] == columns * (w + 1) + 1
    for i, y, x in itertools.product(range(n), range(h), range(w)):
        row, column = i // columns * (h + 1) + 1 + y, i % columns * (w + 1) + 1 + x
        pixel = (images[i, :, y, x].numpy() + 1) / 2
        assert np.allclose(sheet[row, column], pixel)
        used[row, column] = True
    assert (sheet[~used] == 1).all()


def test_grid_cuts_what_lies_outside_and_leaves_the_tensor_alone():
    images = torch.tensor([-3.0, 3.0]).reshape(2, 1, 1, 1).requires_grad_()
    sheet = plots.grid(images)
    assert sheet[1, 1] == 0
    assert sheet[1, 3] == 1
    assert images.detach().flatten().tolist() == [-3, 3]


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(8, 8),
        torch.zeros(1, 2, 8, 8),
        torch.zeros(0, 1, 8, 8),
        math.nan * torch.ones(1, 1, 2, 2),
    ],
)
def test_grid_refuses(images):
    with pytest.raises(ValueError, match="images"):
        plots.grid(images)


def test_show_images_fixes_the_grey_scale():
    _, ax = plt.subplots()
    assert plots.show_images(torch.zeros(4, 1, 8, 8), ax, 2, "title") is ax
    (picture,) = ax.get_images()
    assert picture.get_clim() == (0, 1)
    assert ax.get_title() == "title"
    assert (
        ax.get_figure() is not plots.show_images(torch.zeros(1, 3, 8, 8)).get_figure()
    )
    plt.close("all")


def test_style_is_white_and_uses_the_colours():
    with mpl.rc_context():
        plots.style()
        assert mpl.rcParams["figure.facecolor"] == "white"
        cycle = [entry["color"] for entry in mpl.rcParams["axes.prop_cycle"]]
        assert cycle == list(plots.COLOURS.values())
        assert len(set(cycle)) == 8


def film(images):
    return [torch.full((2, 1, 4, 4), value) for value in images]


def opened(image):
    return Image.open(io.BytesIO(image.data))


def test_animation_frames_times_and_pixels():
    values = [-1.0, -0.2, 0.2, 1.0]
    gif = opened(plots.animation(film(values), ms=100, scale=3, hold=900))
    assert gif.n_frames == 4
    assert gif.info["loop"] == 0
    assert gif.size == (11 * 3, 6 * 3)
    for i, value in enumerate(values):
        gif.seek(i)
        assert gif.info["duration"] == (900 if i == 3 else 100)
        grey = np.asarray(gif.convert("L"))
        assert abs(int(grey[5, 5]) - (value + 1) * 127.5) <= 255 / 15 / 2 + 1
        assert grey[0, 0] == 255
        blocks = grey.reshape(6, 3, 11, 3)
        assert (blocks == blocks[:, :1, :, :1]).all(), "pixels stay whole"


def test_same_frames_same_bytes_and_the_file_is_written(tmp_path):
    path = tmp_path / "film.gif"
    first = plots.animation(film([-1.0, 0.0, 1.0]), path)
    second = plots.animation(iter(film([-1.0, 0.0, 1.0])))
    assert first.data == second.data == path.read_bytes()
    assert first.format == "gif"
    assert set(
        first._repr_mimebundle_()[0]
        if isinstance(first._repr_mimebundle_(), tuple)
        else first._repr_mimebundle_()
    ) == {"image/gif"}


def test_colour_frames_keep_their_colours():
    red, blue = torch.tensor([1.0, -1, -1]), torch.tensor([-1.0, -1, 1])
    frames = [c.reshape(1, 3, 1, 1).expand(1, 3, 4, 4) for c in (red, blue)]
    gif = opened(plots.animation(frames, scale=2))
    for i, colour in enumerate(((255, 0, 0), (0, 0, 255))):
        gif.seek(i)
        assert gif.convert("RGB").getpixel((4, 4)) == colour


def test_figure_becomes_a_frame():
    fig = Figure(figsize=(2, 1), dpi=60, facecolor="#0072B2")
    frame = plots.figure_frame(fig)
    assert frame.shape == (60, 120, 3)
    assert frame.dtype == np.uint8
    assert tuple(frame[30, 60]) == (0, 0x72, 0xB2)
    assert opened(plots.animation([frame, frame[::-1]], scale=1)).size == (120, 60)


def test_too_large_a_film_is_refused():
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(40, 1, 16, 16, generator=generator) for _ in range(60)]
    with pytest.raises(ValueError, match="fewer frames"):
        plots.animation(noise, scale=4, levels=64)


def test_a_usual_film_is_small_enough():
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(20, 1, 8, 8, generator=generator) for _ in range(42)]
    assert len(plots.animation(noise, scale=5).data) < plots.LARGEST_GIF


@pytest.mark.parametrize(
    ("frames", "error"),
    [
        ([], "one or more"),
        ([np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8)], "all of one size"),
        ([np.zeros((2, 2, 4), np.uint8)], "a frame must be"),
        ([np.full((2, 2), 1.5)], r"lie in \[0, 1\]"),
        ([np.full((2, 2), np.nan)], r"lie in \[0, 1\]"),
    ],
)
def test_bad_frames(frames, error):
    with pytest.raises(ValueError, match=error):
        plots.animation(frames)


def test_integer_frames_other_than_uint8_are_refused():
    with pytest.raises(TypeError, match="float or uint8"):
        plots.animation([np.zeros((2, 2), np.int64)])


@pytest.mark.parametrize(
    "option", [{"ms": 0}, {"scale": 0}, {"levels": 1}, {"levels": 257}, {"hold": 1}]
)
def test_bad_options(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        plots.animation(film([0.0]), **option)
