"""The networks that are compared, each built by its own library."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm_core.interchange import their_name, unet_fields
from ddpm_core.unet import UNET_CONFIGS, UNet, UNetConfig

CONFIGS = {
    "cifar10": UNET_CONFIGS["cifar10"],
    "small": UNetConfig(
        image_size=32,
        in_channels=1,
        out_channels=1,
        channels=32,
        channel_mult=(1, 2, 4),
        groups=8,
    ),
}
BATCHES = {"cifar10": 16, "small": 64}
LIBRARIES = ("ddpm_core", "diffusers", "denoising-diffusion-pytorch")


class Diffusers(nn.Module):
    """diffusers' network with our interface: t counts from 1, a tensor comes back."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.model = UNet2DModel(**unet_fields(config))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y: Tensor = self.model(x, t - 1).sample
        return y


def build(library: str, config: UNetConfig) -> nn.Module:
    """The network of a library, as near to the configuration as the library can."""
    if library == "ddpm_core":
        return UNet(config)
    if library == "diffusers":
        return Diffusers(config)
    from denoising_diffusion_pytorch import Unet

    net: nn.Module = Unet(
        dim=config.channels,
        dim_mults=config.channel_mult,
        channels=config.in_channels,
        dropout=config.dropout,
    )
    return net


def at_side(config: UNetConfig, side: int | None) -> UNetConfig:
    """The same network for images of another side: the same levels attend."""
    if side is None:
        return config
    attention = tuple(a * side // config.image_size for a in config.attention)
    return replace(config, image_size=side, attention=attention)


def inputs(
    config: UNetConfig, batch: int, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """A batch of noise, and steps 1...1000."""
    with torch.device(device):
        side = config.image_size
        x = torch.randn(batch, config.in_channels, side, side)
        return x, torch.randint(1, 1001, (batch,))


def flops(library: str, config: UNetConfig) -> tuple[int, int]:
    """Operations on one image, counted by PyTorch: (forward, forward and backward)."""
    with torch.device("meta"):
        model = build(library, config)
    x, t = inputs(config, 1, "meta")
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(x, t)
    with FlopCounterMode(display=False) as both:
        model(x, t).sum().backward()
    return forward.get_total_flops(), both.get_total_flops()


def assert_same_function(name: str) -> float:
    """Load one set of weights into our network and diffusers'; the largest difference.

    The outputs' spread is 1 or so. Raises AssertionError above 1e-4.
    """
    config = CONFIGS[name]
    generator = torch.Generator().manual_seed(0)
    ours, theirs = UNet(config).eval(), Diffusers(config).eval()
    with torch.no_grad():
        for p in ours.parameters():  # also the layers that start at 0
            wide = 1 / max(p[0].numel(), 1) ** 0.5 if p.ndim > 1 else 0.1
            p.normal_(0, wide, generator=generator)
        state = {their_name(k): v for k, v in ours.state_dict().items()}
        theirs.model.load_state_dict(state)
        x, t = inputs(config, 2)
        y, expected = ours(x, t), theirs(x, t)
    difference = float((y - expected).abs().max() / expected.std())
    assert difference <= 1e-4, f"{name}: the outputs differ by {difference:.1e}"
    return difference
