"""The variational autoencoder and its parts against closed forms."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ddpm_core.losses import kl_standard_normal
from ddpm_core.vae import (
    VAE,
    importance_bound,
    pathwise_gradient,
    reparametrise,
    score_function_gradient,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_kl_to_the_standard_normal_is_torchs() -> None:
    mean, log_variance = noise(50), 3 * noise(50, seed=1)
    law = Normal(mean, (0.5 * log_variance).exp())
    right = kl_divergence(law, Normal(torch.zeros(50).double(), 1.0))
    assert torch.allclose(kl_standard_normal(mean, log_variance), right, atol=1e-12)
    tiny = torch.tensor(1e-9, dtype=torch.float64)
    assert kl_standard_normal(0 * tiny, tiny).item() >= 0
    with pytest.raises(ValueError, match="log_variance"):
        kl_standard_normal(mean, log_variance[:3])


def test_reparametrised_draws_have_the_law() -> None:
    mean = torch.full((200_000,), 2.0, dtype=torch.float64)
    z = reparametrise(mean, torch.full_like(mean, math.log(0.25)), noise(200_000))
    assert z.mean().item() == pytest.approx(2.0, abs=0.01)
    assert z.std().item() == pytest.approx(0.5, abs=0.005)
    with pytest.raises(ValueError, match="eps"):
        reparametrise(mean, mean, noise(1))


def test_both_gradients_agree_with_the_closed_form() -> None:
    mean, sigma = (torch.tensor(v, dtype=torch.float64) for v in (0.3, 0.8))
    eps = noise(400_000)
    for gradient in (pathwise_gradient, score_function_gradient):
        by_mean, by_sigma = gradient(torch.square, mean, sigma, eps)
        assert by_mean.mean().item() == pytest.approx(0.6, abs=0.02)
        assert by_sigma.mean().item() == pytest.approx(1.6, abs=0.03)


@pytest.mark.parametrize("levels", [None, 17])
def test_log_weights_average_to_the_bound(levels: int | None) -> None:
    torch.manual_seed(0)
    model = VAE(dims=3, latent=2, hidden=8, levels=levels).double()
    x = (noise(4, 3).clamp(-1, 1) * 8).round() / 8
    eps = noise(20_000, 4, 2, seed=2)
    log_w = model.log_weights(x, eps)
    draws = [model.terms(x, e) for e in eps[:2000]]
    R, K = torch.stack([r for r, _ in draws]).mean(0), draws[0][1]
    assert torch.allclose(log_w.mean(0), R - K, atol=0.1)
    one = model.log_weights(x, eps[:1])[0]
    mean, log_variance = model.encode(x)
    z = reparametrise(mean, log_variance, eps[0])
    q = Normal(mean, (0.5 * log_variance).exp()).log_prob(z).sum(-1)
    prior = Normal(0.0, 1.0).log_prob(z).sum(-1)
    assert torch.allclose(one, model.log_likelihood(x, z) + prior - q)
    assert bool((importance_bound(log_w) >= log_w.mean(0)).all())


def test_density_or_levels() -> None:
    torch.manual_seed(0)
    model = VAE(dims=2, latent=1, hidden=4)
    x, z = torch.zeros(3, 2), torch.zeros(3, 1)
    law = Normal(model.decoder(z), (0.5 * model.log_variance).exp())
    assert torch.allclose(model.log_likelihood(x, z), law.log_prob(x).sum(-1))
    off_levels = VAE(dims=2, latent=1, levels=17)
    with pytest.raises(ValueError, match="17 levels"):
        off_levels.log_likelihood(x + 0.03, z)


def test_gradients_reach_every_weight_and_meta_works() -> None:
    model = VAE(dims=4, latent=2, levels=17)
    R, K = model.terms(torch.zeros(5, 4), torch.randn(5, 2))
    (-R + K).mean().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for p in model.parameters()
    )
    there = VAE(dims=4, latent=2, levels=17).to("meta")
    x, eps = torch.empty(5, 4, device="meta"), torch.empty(5, 2, device="meta")
    assert there.terms(x, eps)[0].shape == (5,)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="latent"):
        VAE(dims=4, latent=0)
    with pytest.raises(ValueError, match="levels"):
        VAE(dims=4, latent=1, levels=1)
    with pytest.raises(ValueError, match=r"x must have shape"):
        VAE(dims=4, latent=1).encode(torch.zeros(2, 3))
