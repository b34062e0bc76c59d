"""Written by tools/extract.py; edit the chapters:

- book/ddpm/families.ipynb
"""

import math

import torch
from torch import Tensor, nn

from ddpm_core import checks

__all__ = ["AffineCoupling", "AffineFlow"]


# --- book/ddpm/families.ipynb · families-export-coupling · A coupling layer
def _perceptron(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Two hidden layers; it returns zeros at first."""
    final = nn.Linear(width, outputs)
    nn.init.zeros_(final.weight)
    nn.init.zeros_(final.bias)
    middle = nn.Linear(width, width)
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), middle, nn.SiLU(), final)


class AffineCoupling(nn.Module):
    r"""An invertible layer: one half of x is scaled and shifted by functions of the other.

    Equations `eq-families-coupling` and `-inverse`; Dinh et al. 2017, (7) and (8).
    Args: dim: coordinates, at least 2. width: of the network. swap: change the first
        half of the coordinates in the place of the second.
    Raises: TypeError, ValueError for anything else.
    >>> layer = AffineCoupling(3)
    >>> x, log_det = layer(torch.ones(2, 3))
    >>> x.shape, log_det
    (torch.Size([2, 3]), tensor([0., 0.], grad_fn=<SumBackward1>))
    """

    def __init__(self, dim: int, width: int = 32, swap: bool = False) -> None:
        super().__init__()
        self.dim = checks.integer("dim", dim, 2)
        width = checks.integer("width", width, 1)
        self.swap = bool(swap)
        kept = dim - dim // 2 if not swap else dim // 2
        self.network = _perceptron(kept, width, 2 * (dim - kept))

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Kept part, changed part, and the log-scale and shift for it."""
        checks.tensor("x", x, shape=(None, self.dim))
        first, second = x.tensor_split([self.dim - self.dim // 2], dim=1)
        kept, changed = (second, first) if self.swap else (first, second)
        raw, shift = self.network(kept).chunk(2, dim=1)
        return kept, changed, 2 * torch.tanh(raw / 2), shift

    def _joined(self, kept: Tensor, changed: Tensor) -> Tensor:
        return torch.cat([changed, kept] if self.swap else [kept, changed], dim=1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """From z [B, dim] to x [B, dim] and log |det dx/dz| [B]."""
        kept, changed, log_scale, shift = self._halves(z)
        x = self._joined(kept, changed * log_scale.exp() + shift)
        return x, log_scale.sum(1)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """From x [B, dim] back to z [B, dim] and log |det dz/dx| [B]."""
        kept, changed, log_scale, shift = self._halves(x)
        z = self._joined(kept, (changed - shift) * (-log_scale).exp())
        return z, -log_scale.sum(1)


# --- book/ddpm/families.ipynb · families-export-flow · A coupling layer
class AffineFlow(nn.Module):
    r"""A normalising flow: affine coupling layers in a row, from N(0, I) to data.

    Its density is exact: `eq-families-change` with `eq-families-composition`.
    Args: dim: coordinates, at least 2. layers: at least 1; they change the second and
        the first half in turn. width: of each layer's network.
    Raises: TypeError, ValueError for anything else.
    >>> AffineFlow(2, layers=2).log_prob(torch.zeros(1, 2)).exp()
    tensor([0.1592], grad_fn=<ExpBackward0>)
    """

    def __init__(self, dim: int, layers: int = 6, width: int = 32) -> None:
        super().__init__()
        layers = checks.integer("layers", layers, 1)
        self.dim = checks.integer("dim", dim, 2)
        self.layers = nn.ModuleList(
            AffineCoupling(dim, width, swap=k % 2 == 1) for k in range(layers)
        )

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """From z [B, dim] to x [B, dim] and log |det dx/dz| [B]."""
        total = z.new_zeros(len(z))
        for layer in self.layers:
            z, log_det = layer(z)
            total = total + log_det
        return z, total

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """From x [B, dim] back to z [B, dim] and log |det dz/dx| [B]."""
        total = x.new_zeros(len(x))
        for layer in reversed(list(self.layers)):
            x, log_det = layer.inverse(x)  # type: ignore[operator]
            total = total + log_det
        return x, total

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density in nats of each x [B, dim], exactly: [B]."""
        z, log_det = self.inverse(x)
        normal = -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)
        return normal + log_det

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n samples [n, dim] with the flow's dtype and device."""
        n = checks.integer("n", n, 1)
        some = next(self.parameters())
        z = torch.randn(
            n, self.dim, generator=generator, dtype=some.dtype, device=some.device
        )
        return self.forward(z)[0]
