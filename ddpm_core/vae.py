"""Written by tools/extract.py; edit the chapters:

- book/foundations/vae.ipynb
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ddpm_core import checks
from ddpm_core.losses import discretised_log_likelihood, kl_standard_normal

__all__ = [
    "VAE",
    "importance_bound",
    "pathwise_gradient",
    "reparametrise",
    "score_function_gradient",
]


# --- book/foundations/vae.ipynb · vae-export-gradients · Gradients through a random...
def pathwise_gradient(
    f: Callable[[Tensor], Tensor], mean: Tensor, sigma: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Estimates of d/dmean and d/dsigma of E f(z), one for each draw of eps.

    Equation `eq-vae-pathwise`: f is differentiated at z = mean + sigma eps.
    Args: f maps a tensor to one of its shape, elementwise; mean, sigma scalars.
    >>> one = torch.tensor(1.0)
    >>> pathwise_gradient(torch.square, one, one, torch.tensor([0.0, 1.0]))
    (tensor([2., 4.]), tensor([0., 4.]))
    """
    mean, sigma = mean.expand_as(eps).detach(), sigma.expand_as(eps).detach()
    mean, sigma = mean.clone().requires_grad_(), sigma.clone().requires_grad_()
    by_mean, by_sigma = torch.autograd.grad(f(mean + sigma * eps).sum(), (mean, sigma))
    return by_mean, by_sigma


def score_function_gradient(
    f: Callable[[Tensor], Tensor], mean: Tensor, sigma: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor]:
    r"""The same with no derivative of f, equation `eq-vae-score-function`.

    >>> one = torch.tensor(1.0)
    >>> eps = torch.tensor([0.0, 1.0])
    >>> slopes = score_function_gradient(torch.square, one, one, eps)
    >>> [x.tolist() for x in slopes]
    [[0.0, 4.0], [-1.0, 0.0]]
    """
    value = f(mean + sigma * eps)
    return value * eps / sigma, value * (eps**2 - 1) / sigma


# --- book/foundations/vae.ipynb · vae-export-reparametrise · The model
def reparametrise(mean: Tensor, log_variance: Tensor, eps: Tensor) -> Tensor:
    r"""A draw from N(mean, exp(log_variance)) that gradients pass: `eq-vae-sample`.

    Args: float tensors of one shape; eps standard normal noise.
    Raises: TypeError, ValueError for other types and shapes.
    >>> reparametrise(torch.ones(2), torch.zeros(2), torch.tensor([0.5, -1.0]))
    tensor([1.5000, 0.0000])
    """
    for name, x in (("mean", mean), ("log_variance", log_variance), ("eps", eps)):
        checks.tensor(name, x)
        checks.same_shape(name, x, "mean", mean)
    return mean + (0.5 * log_variance).exp() * eps


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Three linear layers with SiLU between them."""
    first, second = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)
    return nn.Sequential(
        first, nn.SiLU(), second, nn.SiLU(), nn.Linear(hidden, outputs)
    )


# --- book/foundations/vae.ipynb · vae-export-class · The model
class VAE(nn.Module):
    r"""A variational autoencoder of flat data x [B, dims] with codes z [..., latent].

    Kingma and Welling (2014). One learned `log_variance` around the decoder's mean;
    `levels` grey levels from -1 to 1, or None for data with a density.
    `terms` gives R and K of `eq-vae-loss`, `log_weights` those of `eq-vae-importance`.
    >>> x, eps = torch.zeros(5, 4), torch.zeros(5, 2)
    >>> R, K = VAE(dims=4, latent=2, levels=17).terms(x, eps)
    >>> R.shape, bool((K >= 0).all())
    (torch.Size([5]), True)
    """

    def __init__(
        self, dims: int, latent: int, hidden: int = 128, levels: int | None = None
    ) -> None:
        super().__init__()
        self.dims = checks.integer("dims", dims, 1)
        self.latent = checks.integer("latent", latent, 1)
        self.levels = None if levels is None else checks.integer("levels", levels, 2)
        hidden = checks.integer("hidden", hidden, 1)
        self.encoder = _mlp(self.dims, hidden, 2 * self.latent)
        self.decoder = _mlp(self.latent, hidden, self.dims)
        self.log_variance = nn.Parameter(torch.tensor(-2.0))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | x), each [B, latent]."""
        checks.tensor("x", x, shape=(None, self.dims))
        mean, log_variance = self.encoder(x).chunk(2, dim=-1)
        return mean, log_variance

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """The log of p(x | z), summed over dims; z is [B, latent] or [K, B, latent]."""
        mean: Tensor = self.decoder(z)
        x, variance = x.expand_as(mean), self.log_variance.exp().expand_as(mean)
        if self.levels is None:
            scale = self.log_variance + math.log(2 * math.pi)
            return -0.5 * ((x - mean).square() / variance + scale).sum(-1)
        return discretised_log_likelihood(x, mean, variance, self.levels).sum(-1)

    def terms(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """One draw of the reconstruction R and the divergence K, nats, each [B]."""
        mean, log_variance = self.encode(x)
        z = reparametrise(mean, log_variance, eps)
        divergence = kl_standard_normal(mean, log_variance).sum(-1)
        return self.log_likelihood(x, z), divergence

    def log_weights(self, x: Tensor, eps: Tensor) -> Tensor:
        """The log of p(x, z)/q(z | x) for noise eps [K, B, latent], nats, [K, B]."""
        mean, log_variance = (v.expand_as(eps) for v in self.encode(x))
        z = reparametrise(mean, log_variance, eps)
        prior_to_q = 0.5 * (eps.square() + log_variance - z.square()).sum(-1)
        return self.log_likelihood(x, z) + prior_to_q


# --- book/foundations/vae.ipynb · vae-export-importance · The model
def importance_bound(log_weights: Tensor) -> Tensor:
    r"""The log of the mean weight over dimension 0, `eq-vae-importance`.

    Args: log_weights [S, ...] as `VAE.log_weights` gives them.
    Returns: [...]; on average a lower bound on log p(x) that rises with S.
    >>> importance_bound(torch.tensor([0.25, 0.75]).log()).exp()
    tensor(0.5000)
    """
    checks.tensor("log_weights", log_weights)
    return log_weights.logsumexp(0) - math.log(len(log_weights))
