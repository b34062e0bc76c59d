"""Jensen-Shannon and the losses of a GAN against exact sums, SciPy and autograd."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from torch import nn
from torch.distributions import Normal

from ddpm_core.losses import (
    Estimate,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    js_categorical,
    kl_categorical,
    monte_carlo_js,
)

mpmath.mp.dps = 50
relaxed = settings(max_examples=60)
LOG_2 = math.log(2)
F64 = torch.float64


def lists(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(2, *shape, dtype=F64, generator=generator) ** 3
    p, q = draws / draws.sum(-1, keepdim=True)
    return p, q


def exact_js(p: list[float], q: list[float]) -> mpmath.mpf:
    total = mpmath.mpf(0)
    for a, b in zip(p, q, strict=True):
        a, b = mpmath.mpf(a), mpmath.mpf(b)
        for own in (a, b):
            if own:
                total += own / 2 * mpmath.log(2 * own / (a + b))
    return total


# ---- js_categorical


def test_against_scipy() -> None:
    p, q = lists(0, 50, 7)
    theirs = torch.tensor(jensenshannon(p.numpy(), q.numpy(), axis=1) ** 2)
    torch.testing.assert_close(js_categorical(p, q), theirs, atol=1e-13, rtol=0)


@relaxed
@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=2, max_size=8)
)
def test_against_fifty_digits(pairs: list[tuple[int, int]]) -> None:
    total_p, total_q = (sum(column) for column in zip(*pairs, strict=True))
    if not total_p or not total_q:
        return
    p, q = [a / total_p for a, _ in pairs], [b / total_q for _, b in pairs]
    ours = js_categorical(torch.tensor(p, dtype=F64), torch.tensor(q, dtype=F64)).item()
    assert 0 <= ours <= LOG_2 * (1 + 1e-15)
    # lists that sum to 1 only to rounding: the additions of the terms do not cancel
    assert abs(ours - exact_js(p, q)) < 1e-15


def test_symmetric_zero_and_log_2() -> None:
    p, q = lists(1, 20, 5)
    assert torch.equal(js_categorical(p, q), js_categorical(q, p))
    assert bool((js_categorical(p, p) == 0).all())
    assert bool((js_categorical(p, q) > 0).all())
    first = torch.tensor([0.7, 0.3, 0.0, 0.0], dtype=F64)
    last = torch.tensor([0.0, 0.0, 0.1, 0.9], dtype=F64)
    assert js_categorical(first, last).item() == pytest.approx(LOG_2, abs=1e-15)


def test_nearly_equal_lists_keep_their_digits() -> None:
    gap = 1e-9
    p = torch.tensor([0.5 + gap, 0.5 - gap], dtype=F64)
    q = torch.tensor([0.5 - gap, 0.5 + gap], dtype=F64)
    exact = exact_js(p.tolist(), q.tolist())
    assert abs(js_categorical(p, q).item() / exact - 1) < 1e-7


def test_the_least_probability_does_not_give_infinity() -> None:
    p = torch.tensor([5e-324, 1.0], dtype=F64)
    q = torch.tensor([0.0, 1.0], dtype=F64)
    assert js_categorical(p, q).item() < 1e-300


def test_any_dimension_and_its_gradient() -> None:
    p, q = lists(2, 3, 4)
    torch.testing.assert_close(js_categorical(p.mT, q.mT, 0), js_categorical(p, q))
    weights = torch.randn(4, dtype=F64, generator=torch.Generator().manual_seed(3))
    assert torch.autograd.gradcheck(
        lambda w: js_categorical(p[0], w.softmax(0)), weights.requires_grad_()
    )


def test_root_obeys_the_triangle_inequality() -> None:
    p, q = lists(4, 200, 4)
    r = q.roll(1, 0)
    ways = js_categorical(p, r).sqrt() + js_categorical(r, q).sqrt()
    assert bool((js_categorical(p, q).sqrt() <= ways + 1e-12).all())


@pytest.mark.parametrize(
    ("p", "q", "error"),
    [
        (torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.4]), ValueError),
        (torch.tensor([0.5, 0.5]), torch.tensor([1.5, -0.5]), ValueError),
        (torch.tensor([0.5, 0.5]), torch.tensor([0.2, 0.3, 0.5]), ValueError),
        (torch.tensor([0.5, math.nan]), torch.tensor([0.5, 0.5]), ValueError),
        (torch.tensor([1, 0]), torch.tensor([0.5, 0.5]), TypeError),
        ([0.5, 0.5], torch.tensor([0.5, 0.5]), TypeError),
    ],
)
def test_bad_lists(p: object, q: torch.Tensor, error: type[Exception]) -> None:
    with pytest.raises(error):
        js_categorical(p, q)  # type: ignore[arg-type]


def test_meta_tensors_pass() -> None:
    p = torch.empty(3, 4, device="meta")
    assert js_categorical(p, p).shape == (3,)


# ---- monte_carlo_js


def test_against_a_quadrature() -> None:
    p, q = Normal(0.0, 1.0), Normal(1.5, 0.5)
    line = torch.linspace(-12, 12, 40_001, dtype=F64)
    at_p, at_q = p.log_prob(line), q.log_prob(line)
    log_m = torch.logaddexp(at_p, at_q) - LOG_2
    each = at_p.exp() * (at_p - log_m) + at_q.exp() * (at_q - log_m)
    exact = torch.trapezoid(each, line).item() / 2
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(2, 60_000, dtype=F64, generator=generator)
    x_q = 1.5 + 0.5 * z[1, :20_000]
    found = monte_carlo_js(p.log_prob, q.log_prob, z[0], x_q)
    assert isinstance(found, Estimate)
    assert abs(found.value.item() - exact) < 4 * found.standard_error.item() < 0.02


def test_the_error_bar_is_honest_with_unequal_samples() -> None:
    p, q = Normal(0.0, 1.0), Normal(2.0, 2.0)
    generator = torch.Generator().manual_seed(6)
    found = []
    for _ in range(400):
        x_p = torch.randn(50, dtype=F64, generator=generator)
        x_q = 2 + 2 * torch.randn(200, dtype=F64, generator=generator)
        found.append(monte_carlo_js(p.log_prob, q.log_prob, x_p, x_q))
    values = torch.stack([f.value for f in found])
    bars = torch.stack([f.standard_error for f in found])
    assert 0.85 < (bars.mean() / values.std()).item() < 1.15


def uniform_at(low: float):  # type: ignore[no-untyped-def]
    def log_density(x: torch.Tensor) -> torch.Tensor:
        return torch.where((x >= low) & (x <= low + 1), 0.0, -math.inf).to(x.dtype)

    return log_density


def test_disjoint_laws_give_log_2_without_error() -> None:
    x = torch.linspace(0, 1, 9, dtype=F64)
    value, error = monte_carlo_js(uniform_at(0.0), uniform_at(5.0), x, x + 5)
    assert value.item() == pytest.approx(LOG_2, abs=1e-15)
    assert error.item() == 0


def test_bad_samples() -> None:
    x, density = torch.zeros(3), Normal(0.0, 1.0).log_prob
    with pytest.raises(ValueError, match="number of x_q"):
        monte_carlo_js(density, density, x, x[:1])
    with pytest.raises(ValueError, match="own samples"):
        monte_carlo_js(uniform_at(5.0), density, x, x)
    with pytest.raises(ValueError, match="shape"):
        monte_carlo_js(lambda x: x.sum(), density, x, x)
    with pytest.raises(ValueError, match="finite"):
        monte_carlo_js(density, density, x + math.inf, x)
    with pytest.raises(TypeError):
        monte_carlo_js(density, density, [0.0, 1.0], x)  # type: ignore[arg-type]


# ---- the losses of a GAN


def test_discriminator_loss_is_twice_the_library_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(2, 40, dtype=F64, generator=generator) * 3
    labels = torch.tensor([1.0, 0.0], dtype=F64)[:, None].expand(2, 40)
    library = nn.functional.binary_cross_entropy_with_logits(logits, labels)
    assert torch.isclose(discriminator_loss(logits[0], logits[1]), 2 * library)


def test_best_logits_leave_js() -> None:
    p, q = lists(8, 6)
    best = (p / q).log()
    real = best[torch.multinomial(p, 200_000, True, generator=torch.manual_seed(0))]
    fake = best[torch.multinomial(q, 200_000, True, generator=torch.manual_seed(1))]
    value = -discriminator_loss(real, fake).item()
    assert value == pytest.approx(2 * js_categorical(p, q).item() - 2 * LOG_2, abs=0.01)


def test_losses_stay_finite_for_huge_logits() -> None:
    huge = torch.tensor([-1e4, 1e4])
    assert bool(discriminator_loss(huge, huge).isfinite())
    for kind in ("saturating", "non_saturating"):
        assert bool(generator_loss(huge, kind).isfinite())


def test_slopes_of_the_generator_losses() -> None:
    logit = torch.tensor([-9.0], dtype=F64, requires_grad=True)
    answer = logit.detach().sigmoid()
    (flat,) = torch.autograd.grad(generator_loss(logit, "saturating"), logit)
    (steep,) = torch.autograd.grad(generator_loss(logit), logit)
    torch.testing.assert_close(flat, -answer)
    torch.testing.assert_close(steep, answer - 1)


def test_generator_losses_add_up_to_minus_the_logit() -> None:
    logits = torch.linspace(-5, 5, 11, dtype=F64)
    total = generator_loss(logits) + generator_loss(logits, "saturating")
    assert torch.isclose(total, -logits.mean(), atol=1e-15)


def test_gradient_penalty_of_a_quadratic_and_its_own_gradient() -> None:
    weight = torch.tensor([2.0, 3.0], dtype=F64, requires_grad=True)
    x = torch.tensor([[1.0, 1.0], [0.5, -1.0]], dtype=F64)
    found = gradient_penalty(lambda x: (weight * x**2).sum(1), x)
    torch.testing.assert_close(
        found.detach(), (2 * weight * x).square().sum(1).detach()
    )
    (by_weight,) = torch.autograd.grad(found.sum(), weight)
    torch.testing.assert_close(by_weight, (8 * weight * x**2).sum(0))
    assert x.grad is None
    assert not x.requires_grad


def test_gradient_penalty_of_images_sums_over_pixels() -> None:
    images = torch.zeros(4, 1, 3, 3)
    assert (
        gradient_penalty(lambda x: 2 * x.flatten(1).sum(1), images).tolist()
        == [36.0] * 4
    )


def test_bad_logits() -> None:
    with pytest.raises(ValueError, match="number of logits"):
        discriminator_loss(torch.zeros(0), torch.zeros(1))
    with pytest.raises(TypeError):
        generator_loss(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="kind"):
        generator_loss(torch.zeros(3), "wasserstein")
    with pytest.raises(ValueError, match="finite"):
        gradient_penalty(lambda x: x.sum(1), torch.full((1, 2), math.nan))


def test_js_is_the_mean_of_two_kl() -> None:
    p, q = lists(9, 5, 6)
    m = (p + q) / 2
    both = (kl_categorical(p, m) + kl_categorical(q, m)) / 2
    torch.testing.assert_close(js_categorical(p, q), both, atol=1e-14, rtol=0)
