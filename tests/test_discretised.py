"""The likelihood of grey levels against 60-digit arithmetic, and its gradients."""

import math

import mpmath
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddpm_core.losses import bits_per_dim, discretised_log_likelihood

relaxed = settings(max_examples=150)
LEVELS = (2, 3, 17, 256, 65536)


def double(*values: float) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(v, dtype=torch.float64) for v in values)


def level(k: int, levels: int) -> float:
    return (2 * k - (levels - 1)) / (levels - 1)


def exact(k: int, mean: float, variance: float, levels: int) -> mpmath.mpf:
    """The log-mass of level k; bins of half-width 1/(levels - 1), open at the edges."""
    with mpmath.workdps(120):
        half = mpmath.mpf(1) / (levels - 1)
        sigma = mpmath.sqrt(mpmath.mpf(variance))
        x = 2 * k * half - 1
        low = (x - half - mpmath.mpf(mean)) / sigma if k > 0 else -mpmath.inf
        high = (x + half - mpmath.mpf(mean)) / sigma if k < levels - 1 else mpmath.inf

        def tail(u: mpmath.mpf) -> mpmath.mpf:
            return mpmath.erfc(u / mpmath.sqrt(2)) / 2

        outside = tail(-low) + tail(high)
        if outside < mpmath.mpf("0.1"):
            return mpmath.log1p(-outside)
        if low + high < 0 or math.isinf(low):
            low, high = -high, -low
        return mpmath.log(tail(low) - tail(high))


def close(ours: float, right: mpmath.mpf, rel: float = 1e-8) -> bool:
    return abs(mpmath.mpf(ours) - right) <= rel * abs(right) + mpmath.mpf("1e-300")


@st.composite
def places(draw: st.DrawFn) -> tuple[int, float, float, int]:
    """A level, and a mean up to 1e4 deviations away or near the edges of its bin."""
    levels = draw(st.sampled_from(LEVELS))
    k = draw(st.one_of(st.sampled_from([0, levels - 1]), st.integers(0, levels - 1)))
    sigma = 10 ** draw(st.floats(-6, 2))
    far = draw(st.sampled_from([-1, 1])) * 10 ** draw(st.floats(-4, 4))
    near = draw(st.floats(-1.2, 1.2)) / (levels - 1)
    offset = draw(st.sampled_from([far * sigma, near, near + 3 * sigma, 0.0]))
    if abs(offset) > 1e4 * sigma:
        offset = 1e4 * sigma
    return k, level(k, levels) + offset, sigma**2, levels


@relaxed
@given(place=places())
def test_log_mass_to_eight_digits(place: tuple[int, float, float, int]) -> None:
    k, mean, variance, levels = place
    x, m, v = double(level(k, levels), mean, variance)
    ours = discretised_log_likelihood(x, m, v, levels).item()
    assert close(ours, exact(k, mean, variance, levels))


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("sigma", [1e-6, 1e-3, 0.05, 1.0, 100.0])
@pytest.mark.parametrize("gap", [0.0, 1e-3, 0.7, 3.0, 40.0, 1e3, 1e4])
def test_log_mass_on_a_grid(levels: int, sigma: float, gap: float) -> None:
    for k in {0, levels // 2, levels - 1}:
        for sign in (-1, 1):
            mean = level(k, levels) + sign * gap * sigma
            x, m, v = double(level(k, levels), mean, sigma**2)
            ours = discretised_log_likelihood(x, m, v, levels).item()
            assert close(ours, exact(k, mean, sigma**2, levels))


@pytest.mark.parametrize("where", [0.499, 0.5, 0.501])
def test_where_one_way_takes_over_from_another(where: float) -> None:
    # outside = 1/2 at half-width .6745 sigma; width = .1; width * centre = .1
    half = 1 / 16
    for sigma in (half / 0.6745 * 2 * where, 2 * half / 0.1 * 2 * where):
        for gap in (0.0, 0.1 * sigma * 2 * where, 1.25 * 2 * where * sigma):
            x, m, v = double(0.0, gap, sigma**2)
            ours = discretised_log_likelihood(x, m, v, 17).item()
            assert close(ours, exact(8, gap, sigma**2, 17), rel=1e-11)


@relaxed
@given(
    mean=st.floats(-3, 3), log_sigma=st.floats(-6, 2), levels=st.sampled_from(LEVELS)
)
def test_masses_sum_to_one(mean: float, log_sigma: float, levels: int) -> None:
    x = torch.arange(-(levels - 1), levels, 2, dtype=torch.float64) / (levels - 1)
    m, v = torch.full_like(x, mean), torch.full_like(x, 10 ** (2 * log_sigma))
    mass = discretised_log_likelihood(x, m, v, levels).exp()
    assert mass.sum().item() == pytest.approx(1, abs=1e-9)
    if levels <= 256:
        single = discretised_log_likelihood(x.float(), m.float(), v.float(), levels)
        assert single.exp().sum().item() == pytest.approx(1, abs=2e-5)


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sure_model_pays_nothing(levels: int, dtype: torch.dtype) -> None:
    x = torch.arange(-(levels - 1), levels, 2, dtype=dtype) / (levels - 1)
    for sigma in (1e-5, 1e-9, 1e-15):
        v = torch.full_like(x, sigma**2)
        ours = discretised_log_likelihood(x, x.clone(), v, levels)
        assert bool((ours == 0).all())


@relaxed
@given(place=places())
@example(place=(249, 243 / 255, 1e-4, 256))
def test_mirror(place: tuple[int, float, float, int]) -> None:
    k, mean, variance, levels = place
    x, m, v = double(level(k, levels), mean, variance)
    there = discretised_log_likelihood(x, m, v, levels)
    assert torch.equal(there, discretised_log_likelihood(-x, -m, v, levels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", LEVELS)
def test_gradients_are_finite(levels: int, dtype: torch.dtype) -> None:
    ks = torch.tensor(sorted({0, 1, levels // 2, levels - 2, levels - 1}), dtype=dtype)
    x = (2 * ks - (levels - 1)) / (levels - 1)
    for sigma in (1e-9, 1e-6, 1e-3, 0.1, 1.0, 1e2, 1e6):
        for gap in (0.0, 1e-4, 0.5, 3.0, 30.0, 1e3, 1e4):
            for offset in (0.0, 1 / (levels - 1), -1 / (levels - 1)):
                m = (x + gap * sigma + offset).requires_grad_()
                v = torch.full_like(x, sigma**2).requires_grad_()
                value = discretised_log_likelihood(x, m, v, levels)
                slopes = torch.autograd.grad(value.sum(), (m, v))
                assert bool(torch.isfinite(value).all())
                assert bool((value <= 0).all())
                assert all(bool(torch.isfinite(s).all()) for s in slopes)


def test_gradients_where_the_mass_underflows_point_to_the_level() -> None:
    x = torch.zeros(1)
    m, v = torch.tensor([0.5]).requires_grad_(), torch.tensor([1e-6]).requires_grad_()
    value = discretised_log_likelihood(x, m, v, 17)
    assert value.exp().item() == 0
    slope, spread = torch.autograd.grad(value.sum(), (m, v))
    edge = (0.5 - 1 / 16) / 1e-3
    assert slope.item() == pytest.approx(-edge / 1e-3, rel=1e-3)
    assert spread.item() == pytest.approx(edge**2 / 2e-6, rel=1e-3)


@relaxed
@given(k=st.integers(0, 16), mean=st.floats(-1.5, 1.5), log_sigma=st.floats(-1.5, 0.5))
def test_gradients_by_high_precision(k: int, mean: float, log_sigma: float) -> None:
    variance = 10 ** (2 * log_sigma)
    x, m, v = double(level(k, 17), mean, variance)
    m.requires_grad_(), v.requires_grad_()
    value = discretised_log_likelihood(x, m, v, 17)
    slopes = torch.autograd.grad(value, (m, v))
    step = mpmath.mpf("1e-20")
    with mpmath.workdps(60):
        big = mpmath.mpf(variance)
        by_mean = (
            exact(k, mpmath.mpf(mean) + step, big, 17)
            - exact(k, mpmath.mpf(mean) - step, big, 17)
        ) / (2 * step)
        by_variance = (
            exact(k, mpmath.mpf(mean), big + step, 17)
            - exact(k, mpmath.mpf(mean), big - step, 17)
        ) / (2 * step)
    for ours, right in zip(slopes, (by_mean, by_variance), strict=True):
        assert abs(ours.item() - right) <= 1e-9 * abs(right) + mpmath.mpf("1e-9")


def test_float32_agrees_with_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    for levels in (17, 256):
        k = torch.randint(levels, (4000,), generator=generator)
        x = (2 * k - (levels - 1)).double() / (levels - 1)
        m = x + torch.randn(4000, generator=generator).double()
        v = torch.exp(torch.randn(4000, generator=generator).double() * 2)
        exactly = discretised_log_likelihood(x, m, v, levels)
        single = discretised_log_likelihood(x.float(), m.float(), v.float(), levels)
        assert torch.allclose(single.double(), exactly, rtol=1e-4, atol=2e-5)


def test_functional_transforms_and_meta() -> None:
    x = torch.tensor([-1.0, 0.0, 0.5, 1.0])
    m, v = torch.tensor([-0.9, 0.3, 0.4, 0.2]), torch.tensor([0.1, 0.02, 1.0, 3.0])

    def one(x: Tensor, m: Tensor, v: Tensor) -> Tensor:
        return discretised_log_likelihood(x, m, v, 17)

    expected = one(x, m, v)
    assert torch.allclose(torch.func.vmap(one)(x, m, v), expected)
    slopes = torch.func.vmap(torch.func.grad(one, argnums=1))(x, m, v)
    m_leaf = m.clone().requires_grad_()
    (right,) = torch.autograd.grad(one(x, m_leaf, v).sum(), m_leaf)
    assert torch.allclose(slopes, right)
    _, forward = torch.func.jvp(lambda y: one(x, y, v), (m,), (torch.ones(4),))
    assert torch.allclose(forward, right, rtol=1e-4)
    flat = [torch.empty(2, 3, device="meta") for _ in range(3)]
    assert discretised_log_likelihood(*flat, 256).shape == (2, 3)


def test_second_derivatives() -> None:
    x, m, v = double(0.25, 0.1, 0.3)
    m.requires_grad_(), v.requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda a, b: discretised_log_likelihood(x, a, b, 17), (m, v)
    )


def test_bad_input() -> None:
    x, one = torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match=r"17 levels.*0\.3"):
        discretised_log_likelihood(x + 0.3, x, one, 17)
    with pytest.raises(ValueError, match=r"x must lie in \[-1"):
        discretised_log_likelihood(x + 2, x, one, 17)
    with pytest.raises(ValueError, match="256 levels"):  # 0 is none of 256 levels
        discretised_log_likelihood(x, x, one, 256)
    with pytest.raises(ValueError, match="levels must be an integer of at least 2"):
        discretised_log_likelihood(x, x, one, 1)
    with pytest.raises(TypeError, match="levels"):
        discretised_log_likelihood(x, x, one, 17.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="variance must be above 0"):
        discretised_log_likelihood(x, x, x, 17)
    with pytest.raises(ValueError, match="mean must be finite"):
        discretised_log_likelihood(x, x * math.nan, one, 17)
    with pytest.raises(ValueError, match="variance must be finite"):
        discretised_log_likelihood(x, x, one * math.inf, 17)
    with pytest.raises(ValueError, match="shape"):
        discretised_log_likelihood(x, x[:1], one, 17)
    with pytest.raises(TypeError, match="float32 or both"):
        discretised_log_likelihood(x, x.double(), one, 17)
    with pytest.raises(TypeError, match="float32 or both"):
        discretised_log_likelihood(*(t.bfloat16() for t in (x, x, one)), 17)
    with pytest.raises(TypeError, match="floating"):
        discretised_log_likelihood(x.long(), x, one, 17)


def test_bits_per_dim() -> None:
    nats = torch.tensor(64 * math.log(17))
    assert bits_per_dim(nats, 64).item() == pytest.approx(math.log2(17))
    with pytest.raises(ValueError, match="dims"):
        bits_per_dim(nats, 0)
    with pytest.raises(TypeError, match="nats"):
        bits_per_dim(1.0, 64)  # type: ignore[arg-type]
