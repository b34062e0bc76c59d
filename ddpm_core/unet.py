"""Written by tools/extract.py; edit the chapters:

- book/ddpm/unet.ipynb
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_core import checks

__all__ = [
    "CLOSING",
    "EPS",
    "FEW_PLACES",
    "UNET_CONFIGS",
    "Downsample",
    "Dropout",
    "GroupNorm",
    "LeanNormSiLU",
    "ResidualBlock",
    "SelfAttention",
    "Stage",
    "UNet",
    "UNetConfig",
    "Upsample",
    "attend",
    "check_channels",
    "check_numbers",
    "check_sides",
    "contracting_path",
    "expanding_path",
    "initialise",
    "norm_silu",
    "sent_kernel",
    "skip_widths",
    "timestep_embedding",
]


# --- book/ddpm/unet.ipynb · unet-export-embedding · Telling the network which step...
def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    r"""Sinusoidal embedding of a position: sines, then cosines.

    Implements `eq-unet-embedding` (Vaswani et al. 2017, 3.5, as used by Ho et al.
    2020) with the frequencies of `eq-unet-frequency`. `t`: [B], any number
    (the paper's network counts from 0); `dim`: even, at least 4. Returns [B, dim],
    float64 for a float64 `t`, else float32. Raises ValueError for an odd `dim`.

    >>> timestep_embedding(torch.tensor([0]), 4)
    tensor([[0., 0., 1., 1.]])
    """
    checks.tensor("t", t, ndim=1, kind="any")
    checks.integer("dim", dim, low=4)
    checks.number("max_period", max_period, low=1.0)
    if dim % 2:
        raise ValueError(f"dim = {dim} must be even: half sines, half cosines")
    dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
    index = torch.arange(dim // 2, dtype=dtype, device=t.device)
    frequency = torch.exp(-math.log(max_period) * index / (dim // 2 - 1))
    angle = t.to(dtype)[:, None] * frequency[None, :]
    return torch.cat([angle.sin(), angle.cos()], dim=1)


# --- book/ddpm/unet.ipynb · unet-export-initialise · How the weights start
EPS = 1e-6  # of every GroupNorm, as in DDPM; PyTorch's default is 1e-5
CLOSING = ("conv_2", "out", "conv_out")  # the layers that close a branch: start at 0


def initialise(module: nn.Module, generator: torch.Generator | None = None) -> None:
    r"""Draw every weight anew: uniform `eq-unet-xavier`, biases 0, closing layers 0.

    Ho et al. 2020, reference code (which has 1e-10 for our 0). GroupNorms are left at
    scale 1, shift 0. `generator`: on the weights' device; None: torch's global one.

    >>> layer = nn.Linear(2, 3)
    >>> initialise(layer)
    >>> bool((layer.weight.abs() <= (6 / 5) ** 0.5).all())
    True
    """
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        nn.init.xavier_uniform_(layer.weight, generator=generator)
        if name.split(".")[-1] in CLOSING:
            nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


# --- book/ddpm/unet.ipynb · unet-export-norm · SiLU
class GroupNorm(nn.GroupNorm):
    r"""Group normalisation, computed in float32 or wider, in x's dtype at the end.

    `eq-unet-group-norm`; Wu and He 2018, eqs. 1 to 3. x: [B, channels, side, side].

    >>> y = GroupNorm(2, 4)(torch.ones(1, 4, 2, 2, dtype=torch.bfloat16))
    >>> y.dtype, y.abs().max().item()
    (torch.bfloat16, 0.0)
    """

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        y = F.group_norm(x.to(wide), self.num_groups, weight, bias, self.eps)
        return y.to(x.dtype)


def norm_silu(norm: GroupNorm, x: Tensor) -> Tensor:
    r"""SiLU of GroupNorm, `eq-unet-silu` of `eq-unet-group-norm`. x: [B, C, H, W].

    On a CPU, 16-bit maps that need a gradient take `LeanNormSiLU`: the same numbers,
    with less kept for the gradient.

    >>> norm_silu(GroupNorm(2, 4), torch.zeros(1, 4, 2, 2)).abs().max().item()
    0.0
    """
    sixteen = x.dtype in (torch.bfloat16, torch.float16)
    if sixteen and x.device.type == "cpu" and torch.is_grad_enabled():
        y: Tensor = LeanNormSiLU.apply(x, norm.weight, norm.bias, norm)
        return y
    return F.silu(norm(x))


# --- book/ddpm/unet.ipynb · unet-export-residual-block · The block
class Dropout(nn.Module):
    r"""In training, each number is 0 with probability p, else scaled by 1 / (1 - p).

    Srivastava et al. (2014). On a CPU each number takes 16 random bits, so that p is a
    multiple of 2^-16; `F.dropout` elsewhere. Draws from torch's global generator.

    >>> layer, x = Dropout(0.5), torch.ones(2, 3)
    >>> set(layer(x).flatten().tolist()) <= {0.0, 2.0}, torch.equal(layer.eval()(x), x)
    (True, True)
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = checks.number("p", p, low=0.0, high=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """The map with some numbers dropped; outside of training, the map itself."""
        dropped = round(self.p * 2**16)
        if x.device.type != "cpu" or dropped == 2**16 or torch.compiler.is_compiling():
            return F.dropout(x, self.p, self.training)
        if not self.training or dropped == 0:
            return x
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64)  # four numbers each
        lanes = words.random_(-(2**63), None).view(torch.int16)
        lanes = lanes.as_strided(x.shape, torch.empty_like(x).stride())
        keep = (lanes >= dropped - 2**15).to(x.dtype)
        return x * (keep * (2**16 / (2**16 - dropped)))


class ResidualBlock(nn.Module):
    r"""GroupNorm, SiLU, conv; + time; GroupNorm, SiLU, dropout, conv; + shortcut.

    Implements `eq-unet-residual` (He et al. 2016; Ho et al. 2020, B). The shortcut is
    a 1x1 convolution where the width changes. `x`: [B, in_channels, H, W];
    `embedding`: [B, time_channels]. Returns [B, out_channels, H, W].

    >>> block = ResidualBlock(8, 16, time_channels=32, groups=4)
    >>> block(torch.zeros(2, 8, 5, 5), torch.zeros(2, 32)).shape
    torch.Size([2, 16, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_channels: int,
        dropout: float = 0.0,
        groups: int = 32,
    ) -> None:
        super().__init__()
        self.norm_1 = GroupNorm(groups, in_channels, eps=EPS)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_channels, out_channels)
        self.norm_2 = GroupNorm(groups, out_channels, eps=EPS)
        self.dropout = Dropout(dropout)
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1)
        initialise(self)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The block's output, as wide as out_channels."""
        h = self.conv_1(norm_silu(self.norm_1, x))
        h = h + self.time(F.silu(embedding))[:, :, None, None]
        h = self.conv_2(self.dropout(norm_silu(self.norm_2, h)))
        y: Tensor = self.shortcut(x) + h
        return y


# --- book/ddpm/unet.ipynb · unet-export-attention · Why divide by $\sqrt d$?
FEW_PLACES = 1024  # up to so many, a CPU is faster with the weights stored


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    r"""What each place gathers, `eq-unet-attention` (Vaswani et al. 2017, equation 1).

    Fused, or, where a CPU needs the gradient for few places, step by step: the same
    numbers. q, k, v: [B, heads, N, d]; returns [B, heads, N, d].

    >>> attend(*torch.zeros(3, 1, 2, 4, 8)).shape
    torch.Size([1, 2, 4, 8])
    """
    trains = q.device.type == "cpu" and q.requires_grad
    if trains and q.shape[-2] <= FEW_PLACES:
        score = (q / math.sqrt(q.shape[-1])) @ k.mT
        return score.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class SelfAttention(nn.Module):
    r"""Every place of a feature map looks at every place: x + out(attention(norm(x))).

    Implements `eq-unet-attention` (Vaswani et al. 2017, equation 1) over the H W places
    of an image, with `heads` heads of `channels / heads` channels each (DDPM: one).
    `x`: [B, channels, H, W]; returns the same shape.

    >>> SelfAttention(8, groups=4)(torch.zeros(2, 8, 3, 5)).shape
    torch.Size([2, 8, 3, 5])
    """

    def __init__(self, channels: int, heads: int = 1, groups: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(groups, channels, eps=EPS)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)
        initialise(self)

    def split(self, tokens: Tensor) -> Tensor:
        """[B, N, C] to [B, heads, N, C / heads]."""
        batch, places, channels = tokens.shape
        parts = tokens.reshape(batch, places, self.heads, channels // self.heads)
        return parts.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """The map with what each place has gathered added to it."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q = self.split(self.query(tokens))
        k = self.split(self.key(tokens))
        v = self.split(self.value(tokens))
        gathered = attend(q, k, v)
        y: Tensor = self.out(gathered.transpose(1, 2).flatten(2))
        return x + y.transpose(1, 2).reshape(x.shape)


# --- book/ddpm/unet.ipynb · unet-export-resample · Down and up
class Downsample(nn.Module):
    r"""Halve the side: pad right and bottom by one, 3x3 convolution of stride 2.

    The side follows `eq-unet-conv-size`; the one-sided padding is that of the paper's
    code (TensorFlow's SAME). `x`: [B, channels, H, W], H and W even.

    >>> Downsample(8)(torch.zeros(2, 8, 6, 4)).shape
    torch.Size([2, 8, 3, 2])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """The map at half the side."""
        y: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return y


def sent_kernel(weight: Tensor) -> Tensor:
    r"""The 4x4 kernel that sends a pixel where repeating and convolving bring it.

    `eq-unet-up-even` and `eq-unet-up-odd`, along both axes. `weight`: [out, in, 3, 3],
    of a convolution behind a doubling; returns [in, out, 4, 4], for
    `F.conv_transpose2d` of stride 2.

    >>> sent_kernel(torch.ones(1, 1, 3, 3))[0, 0, 0].tolist()
    [1.0, 2.0, 2.0, 1.0]
    """
    kernel = F.pad(weight, (1, 1, 1, 1)).flip(2, 3)
    kernel = kernel[..., 1:, :] + kernel[..., :-1, :]
    kernel = kernel[..., 1:] + kernel[..., :-1]
    return kernel.transpose(0, 1).contiguous(memory_format=torch.channels_last)


class Upsample(nn.Module):
    r"""Double the side: repeat every pixel 2x2 times, then a 3x3 convolution.

    Nearest neighbour first, as in Ho et al. 2020's code; in float32 on a CPU both at
    once, by `sent_kernel`. `x`: [B, channels, H, W].

    >>> Upsample(8)(torch.zeros(2, 8, 3, 2)).shape
    torch.Size([2, 8, 6, 4])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """The map at twice the side."""
        on_cpu = x.device.type == "cpu" and x.dtype.itemsize >= 4
        if on_cpu and not torch.is_autocast_enabled("cpu"):
            kernel = sent_kernel(self.conv.weight)
            return F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)
        y: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return y


# --- book/ddpm/unet.ipynb · unet-export-config · Its numbers
@dataclass(frozen=True)
class UNetConfig:
    r"""The shape of a U-Net; the defaults are DDPM's for CIFAR-10 (Ho et al. 2020, B).

    `image_size`: side of the square images; `patch`: side of the pixel squares that
    enter as one place. Level i works at the side `image_size / patch / 2**i` with
    `channels * channel_mult[i]` channels and `blocks` residual blocks (one more on
    the way up). `attention`: the sides that attend. `groups`: of every GroupNorm.
    Raises ValueError where a side cannot be halved or groups or heads do not fit.

    >>> UNetConfig(image_size=28, in_channels=1, out_channels=1, attention=(7,),
    ...            channels=32, channel_mult=(1, 2, 2)).sides
    (28, 14, 7)
    """

    image_size: int
    in_channels: int
    out_channels: int
    channels: int = 128
    channel_mult: Sequence[int] = (1, 2, 2, 2)
    blocks: int = 2
    attention: Sequence[int] = (16,)
    heads: int = 1
    dropout: float = 0.0
    groups: int = 32
    patch: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        object.__setattr__(self, "attention", tuple(self.attention))
        check_numbers(self)
        check_sides(self)
        check_channels(self)

    @property
    def sides(self) -> tuple[int, ...]:
        """The side of the feature maps, level by level."""
        first = self.image_size // self.patch
        return tuple(first >> i for i in range(len(self.channel_mult)))

    @property
    def widths(self) -> tuple[int, ...]:
        """The number of channels, level by level."""
        return tuple(self.channels * m for m in self.channel_mult)


# --- book/ddpm/unet.ipynb · unet-export-config-checks · Its numbers
def check_numbers(config: UNetConfig) -> None:
    r"""Raise TypeError or ValueError where a number of the config is impossible.

    >>> check_numbers(UNET_CONFIGS["cifar10"])
    """
    for name in ("image_size", "in_channels", "out_channels", "blocks", "heads"):
        checks.integer(name, getattr(config, name), low=1)
    checks.integer("patch", config.patch, low=1)
    checks.integer("channels", config.channels, low=4)
    checks.integer("groups", config.groups, low=1)
    checks.number("dropout", config.dropout, low=0.0, high=1.0)
    if not config.channel_mult:
        raise ValueError("channel_mult is empty: it needs one integer a level")
    for multiple in config.channel_mult:
        checks.integer("channel_mult", multiple, low=1)
    for side in config.attention:
        checks.integer("attention", side, low=1)


def check_sides(config: UNetConfig) -> None:
    r"""Raise ValueError if a side cannot be halved, or attention has no such side.

    >>> check_sides(UNET_CONFIGS["cifar10"])
    """
    halvings = len(config.channel_mult) - 1
    factor = config.patch * 2**halvings
    if config.image_size % factor:
        cut = f"cut into patches of side {config.patch} and " * (config.patch > 1)
        raise ValueError(
            f"image_size = {config.image_size} cannot be {cut}halved {halvings} "
            f"times: it must be a multiple of {factor}"
        )
    unknown = [side for side in config.attention if side not in config.sides]
    if unknown:
        raise ValueError(
            f"attention = {config.attention} names {unknown}, but the levels have "
            f"sides {config.sides}"
        )


def check_channels(config: UNetConfig) -> None:
    r"""Raise ValueError if groups, heads or the embedding do not fit the channels.

    >>> check_channels(UNET_CONFIGS["cifar10"])
    """
    if config.channels % 2:
        raise ValueError(
            f"channels = {config.channels} must be even: half of the timestep "
            "embedding are sines, half cosines"
        )
    if config.channels % config.groups:
        raise ValueError(
            f"groups = {config.groups} must divide channels = {config.channels}"
        )
    attending = zip(config.sides, config.widths, strict=True)
    widths = [width for side, width in attending if side in config.attention]
    for width in (*widths, config.widths[-1]):
        if width % config.heads:
            raise ValueError(
                f"heads = {config.heads} must divide the {width} channels that attend"
            )


# --- book/ddpm/unet.ipynb · unet-export-stage · Down, middle, up
class Stage(nn.Module):
    r"""A residual block, followed by self-attention where the level attends.

    `x`: [B, in_channels, H, W]; `embedding`: [B, 4 * config.channels].

    >>> stage = Stage(UNET_CONFIGS["cifar10"], 128, 256, attend=True)
    >>> stage(torch.zeros(1, 128, 4, 4), torch.zeros(1, 512)).shape
    torch.Size([1, 256, 4, 4])
    """

    def __init__(
        self, config: UNetConfig, in_channels: int, out_channels: int, attend: bool
    ) -> None:
        super().__init__()
        self.block = ResidualBlock(
            in_channels,
            out_channels,
            4 * config.channels,
            dropout=config.dropout,
            groups=config.groups,
        )
        self.attention: nn.Module = nn.Identity()
        if attend:
            self.attention = SelfAttention(out_channels, config.heads, config.groups)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The block's output, with attention where the level attends."""
        y: Tensor = self.attention(self.block(x, embedding))
        return y


# --- book/ddpm/unet.ipynb · unet-export-paths · Down, middle, up
def skip_widths(config: UNetConfig) -> list[int]:
    r"""Channels of the maps that the contracting path leaves behind, in order.

    >>> skip_widths(UNET_CONFIGS["cifar10"])
    [128, 128, 128, 128, 256, 256, 256, 256, 256, 256, 256, 256]
    """
    widths = [config.channels]  # the first convolution
    for width in config.widths:
        widths += [width] * (config.blocks + 1)  # the blocks and the downsampling
    return widths[:-1]  # the last level is not followed by one


def contracting_path(config: UNetConfig) -> nn.ModuleList:
    r"""The levels on the way down: each a list of `blocks` stages.

    >>> [len(level) for level in contracting_path(UNET_CONFIGS["digits"])]
    [1, 1]
    """
    levels, width = nn.ModuleList(), config.channels
    for side, out in zip(config.sides, config.widths, strict=True):
        level = nn.ModuleList()
        for _ in range(config.blocks):
            level.append(Stage(config, width, out, attend=side in config.attention))
            width = out
        levels.append(level)
    return levels


def expanding_path(config: UNetConfig) -> nn.ModuleList:
    r"""The levels on the way up: `blocks + 1` stages each, one a skip.

    >>> [len(level) for level in expanding_path(UNET_CONFIGS["digits"])]
    [2, 2]
    """
    levels, width, skips = nn.ModuleList(), config.widths[-1], skip_widths(config)
    for side, out in zip(config.sides[::-1], config.widths[::-1], strict=True):
        level = nn.ModuleList()
        for _ in range(config.blocks + 1):
            attend = side in config.attention
            level.append(Stage(config, width + skips.pop(), out, attend=attend))
            width = out
        levels.append(level)
    return levels


# --- book/ddpm/unet.ipynb · unet-export-unet · Down, middle, up
class UNet(nn.Module):
    r"""DDPM's network (Ho et al. 2020, B): noisy images and t to an output like them.

    `x`: [B, in_channels, image_size, image_size], floating; `t`: int64 [B], 1...T.
    `generator`: draws the first weights (None: torch's global one). The paper's
    network counts steps from 0; the conversion t - 1 is made here and nowhere else.
    Raises ValueError for another size, for t < 1 or a t of another length.

    >>> model = UNet(UNET_CONFIGS["digits"])
    >>> model(torch.zeros(2, 1, 8, 8), torch.tensor([1, 1000])).abs().max().item()
    0.0
    """

    def __init__(
        self, config: UNetConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.config = config
        first, last, time = config.channels, config.widths[-1], 4 * config.channels
        self.time = nn.Sequential(
            nn.Linear(first, time), nn.SiLU(), nn.Linear(time, time)
        )
        pixels = config.patch**2
        self.conv_in = nn.Conv2d(config.in_channels * pixels, first, 3, padding=1)
        self.down = contracting_path(config)
        self.downsample = nn.ModuleList(map(Downsample, config.widths[:-1]))
        self.middle_1 = Stage(config, last, last, attend=True)
        self.middle_2 = Stage(config, last, last, attend=False)
        self.up = expanding_path(config)
        self.upsample = nn.ModuleList(map(Upsample, config.widths[:0:-1]))
        self.norm_out = GroupNorm(config.groups, first, eps=EPS)
        self.conv_out = nn.Conv2d(first, config.out_channels * pixels, 3, padding=1)
        initialise(self, generator)

    def contract(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        """Every map that the way down produces; the last one is the smallest."""
        if self.config.patch > 1:
            x = F.pixel_unshuffle(x, self.config.patch)
        maps: list[Tensor] = [self.conv_in(x)]
        for i, level in enumerate(self.down):
            if i > 0:
                maps.append(self.downsample[i - 1](maps[-1]))
            for stage in level.children():
                maps.append(stage(maps[-1], embedding))
        return maps

    def expand(self, h: Tensor, skips: list[Tensor], embedding: Tensor) -> Tensor:
        """Back to the full side; every stage takes the last skip still there."""
        for i, level in enumerate(self.up):
            if i > 0:
                h = self.upsample[i - 1](h)
            for stage in level.children():
                h = stage(torch.cat([h, skips.pop()], dim=1), embedding)
        return h

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The output for noisy images x at steps t: [B, out_channels, side, side]."""
        side = self.config.image_size
        checks.tensor("x", x, shape=(None, self.config.in_channels, side, side))
        checks.tensor("t", t, shape=(x.shape[0],), kind="integer")
        checks.between("t", t, 1, math.inf)
        checks.same_device("x", x, "t", t)
        position = timestep_embedding(t - 1, self.config.channels)
        embedding = self.time(position.to(x.dtype))
        skips = self.contract(x, embedding)
        h = self.middle_2(self.middle_1(skips[-1], embedding), embedding)
        h = self.expand(h, skips, embedding)
        y: Tensor = self.conv_out(norm_silu(self.norm_out, h))
        return F.pixel_shuffle(y, self.config.patch) if self.config.patch > 1 else y


# --- book/ddpm/unet.ipynb · unet-export-configs · Down, middle, up
UNET_CONFIGS = {
    # 8x8 digits: fast enough to train inside a chapter
    "digits": UNetConfig(
        image_size=8,
        in_channels=1,
        out_channels=1,
        channels=16,
        channel_mult=(1, 2),
        blocks=1,
        attention=(4,),
        groups=8,
    ),
    # 28x28 as 14x14 patches: four million parameters, a quarter of the places
    "fashion28": UNetConfig(
        image_size=28,
        in_channels=1,
        out_channels=1,
        channels=64,
        channel_mult=(1, 2),
        attention=(7,),
        groups=16,
        patch=2,
    ),
    # 28x28 padded to 32x32: four levels, as for CIFAR-10 but half as wide
    "fashion32": UNetConfig(
        image_size=32,
        in_channels=1,
        out_channels=1,
        channels=64,
        channel_mult=(1, 2, 2, 2),
    ),
    # the paper's two
    "cifar10": UNetConfig(image_size=32, in_channels=3, out_channels=3, dropout=0.1),
    "lsun256": UNetConfig(
        image_size=256,
        in_channels=3,
        out_channels=3,
        channel_mult=(1, 1, 2, 2, 4, 4),
    ),
}


# --- book/ddpm/unet.ipynb · unet-export-lean · Making it fast
class LeanNormSiLU(torch.autograd.Function):
    r"""`norm_silu` of 16-bit maps: keeps only x for the gradient, computes the rest anew.

    `apply(x, weight, bias, norm)`, with the norm's own weight and bias. Inside, all is
    float32 (`eq-unet-group-norm`). It cannot be differentiated twice.

    >>> x = torch.ones(1, 4, 2, 2, dtype=torch.bfloat16)
    >>> norm = GroupNorm(2, 4)
    >>> LeanNormSiLU.apply(x, norm.weight, norm.bias, norm).dtype
    torch.bfloat16
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: GroupNorm
    ) -> Tensor:
        sizes = (x.shape[0], x.shape[1], x[0, 0].numel(), norm.num_groups)
        weight, bias = weight.float(), bias.float()
        y, mean, rstd = torch.native_group_norm(
            x.float(), weight, bias, *sizes, norm.eps
        )
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.sizes, ctx.kind = sizes, norm.weight.dtype
        return F.silu(y, inplace=True).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, push: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        each = x.shape[1] // rstd.shape[1]
        scale = weight * rstd.repeat_interleave(each, 1)
        shift = bias - scale * mean.repeat_interleave(each, 1)
        wide = x.float()
        y = torch.addcmul(shift[:, :, None, None], wide, scale[:, :, None, None])
        push = torch.ops.aten.silu_backward(push.float(), y)
        to_x, *others = torch.ops.aten.native_group_norm_backward(
            push, wide, mean, rstd, weight, *ctx.sizes, [True, True, True]
        )
        to_weight, to_bias = (g.to(ctx.kind) for g in others)
        return to_x.to(x.dtype), to_weight, to_bias, None
