"""Draw the picture on the book's first page: noise turning into digits.

python tools/cover.py          write book/assets/noise_to_digits.webp

The samples come from the weights that the package ships. The picture plays once and
stops at the digits, in less than five seconds, so nothing moves while one reads.
"""

import argparse
import sys
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ddpm_core.files import load_pretrained  # noqa: E402
from ddpm_core.samplers import ancestral  # noqa: E402

COLUMNS, ROWS, SCALE = 12, 4, 7
FRAMES, FRAME_MS = 45, 100
LEVELS = 17


def frame_steps(T: int) -> list[int]:
    """The steps to show, closer together near t = 0, where digits take shape."""
    parts = [(1 - frame / (FRAMES - 1)) ** 1.5 for frame in range(FRAMES)]
    return [round(T * part) for part in parts]


def trajectory(seed: int, device: str = "cpu") -> list[torch.Tensor]:
    """The samples x_t at each step that the picture shows."""
    model, schedule, _ = load_pretrained("digits", device)
    generator = torch.Generator(device).manual_seed(seed)
    shape = (COLUMNS * ROWS, 1, 8, 8)
    x_T = torch.randn(shape, generator=generator, device=device)
    kept = {schedule.T: x_T}
    wanted = frame_steps(schedule.T)
    for state in ancestral(model, schedule, x_T, generator=generator):
        if state.t in wanted:
            kept[state.t] = state.x
    return [kept[t] for t in wanted]


def picture(images: torch.Tensor) -> Image.Image:
    """One frame: the images in rows, dark ink on white, in 17 grey levels."""
    framed = functional.pad(images.cpu().clamp(-1, 1), (1, 1, 1, 1), value=-1.0)
    sheet = rearrange(framed, "(r c) 1 h w -> (r h) (c w)", c=COLUMNS)
    steps = ((1 - sheet) / 2 * (LEVELS - 1)).round() / (LEVELS - 1)
    frame = Image.fromarray((steps * 255).to(torch.uint8).numpy())
    return frame.resize(
        (frame.width * SCALE, frame.height * SCALE), Image.Resampling.NEAREST
    )


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=2020)
    arguments = parser.parse_args()
    frames = [picture(x) for x in trajectory(arguments.seed)]
    path = ROOT / "book" / "assets" / "noise_to_digits.webp"
    path.parent.mkdir(exist_ok=True)
    # loop=1 plays it once.
    frames[0].save(
        path,
        save_all=True,
        append_images=frames[1:],
        duration=[FRAME_MS] * FRAMES,
        loop=1,
        lossless=True,
        method=6,
    )
    print(f"wrote {path}, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
