"""The oracles against quadrature, autograd, Monte Carlo and a second implementation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddpm_core import oracles, process, schedules
from ddpm_core.oracles import Empirical, Mixture, denoiser, gaussian

F64 = torch.float64
LEVELS = (0.999, 0.7, 0.2, 1e-3)


def make(K: int = 3, D: int = 2, seed: int = 0) -> Mixture:
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(K, generator=g, dtype=F64) + 0.2
    means = torch.randn(K, D, generator=g, dtype=F64)
    variances = torch.rand(K, generator=g, dtype=F64) * 0.3 + 0.02
    return Mixture(weights / weights.sum(), means, variances)


def points(n: int, D: int, seed: int = 1) -> Tensor:
    return 1.5 * torch.randn(
        n, D, generator=torch.Generator().manual_seed(seed), dtype=F64
    )


def slow_density(data: oracles.Oracle, x: Tensor, alpha_bar: float) -> Tensor:
    """Plain loops over components with torch.distributions."""
    total = torch.zeros(len(x), dtype=F64)
    for w, m, s in zip(data.weights, data.means, data.variances, strict=True):
        scale = (alpha_bar * s + 1 - alpha_bar).sqrt()
        normal = torch.distributions.Normal(math.sqrt(alpha_bar) * m, scale)
        total = total + w * normal.log_prob(x).flatten(1).sum(1).exp()
    return total


def by_quadrature(data: Mixture, x_t: float, alpha_bar: float) -> tuple[float, ...]:
    """Mean and variance of x_0 given x_t in 1-D, from Bayes on a fine grid."""
    x_0 = torch.linspace(-8, 8, 40001, dtype=F64)
    log_w = data.log_prob(x_0[:, None], 1.0)
    log_w = log_w - (x_t - math.sqrt(alpha_bar) * x_0) ** 2 / (2 * (1 - alpha_bar))
    w = log_w.softmax(0)
    mean = (w * x_0).sum()
    return mean.item(), (w * (x_0 - mean) ** 2).sum().item()


@pytest.mark.parametrize("alpha_bar", [*LEVELS, 1.0, 0.0])
def test_log_prob_is_the_density_and_integrates_to_one(alpha_bar: float) -> None:
    data, x = make(), points(20, 2)
    torch.testing.assert_close(
        data.log_prob(x, alpha_bar).exp(), slow_density(data, x, alpha_bar)
    )
    line = torch.linspace(-12, 12, 20001, dtype=F64)
    density = make(D=1).log_prob(line[:, None], alpha_bar).exp()
    assert torch.trapezoid(density, line).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("alpha_bar", [*LEVELS, 1.0, 0.0])
@pytest.mark.parametrize("D", [1, 3])
def test_score_is_the_gradient_of_log_prob(alpha_bar: float, D: int) -> None:
    data, x = make(D=D), points(20, D).requires_grad_()
    (gradient,) = torch.autograd.grad(data.log_prob(x, alpha_bar).sum(), x)
    torch.testing.assert_close(data.score(x, alpha_bar), gradient)


@pytest.mark.parametrize("alpha_bar", LEVELS)
def test_x_0_and_its_variance_by_quadrature(alpha_bar: float) -> None:
    data = make(D=1)
    for x_t in (-2.0, 0.3, 1.0):
        mean, variance = by_quadrature(data, x_t, alpha_bar)
        x = torch.tensor([[x_t]], dtype=F64)
        assert data.x_0(x, alpha_bar).item() == pytest.approx(mean, rel=1e-9)
        found = data.x_0_variance(x, alpha_bar).item()
        assert found == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("alpha_bar", LEVELS)
def test_tweedie_of_both_orders_and_the_three_predictions(alpha_bar: float) -> None:
    data, x = make(D=3), points(10, 3).requires_grad_()
    noise = 1 - alpha_bar
    x_0, score = data.x_0(x, alpha_bar), data.score(x, alpha_bar)
    torch.testing.assert_close((x + noise * score) / math.sqrt(alpha_bar), x_0)
    eps, v = data.eps(x, alpha_bar), data.v(x, alpha_bar)
    torch.testing.assert_close(eps, -math.sqrt(noise) * score)
    torch.testing.assert_close(math.sqrt(alpha_bar) * x_0 + math.sqrt(noise) * eps, x)
    torch.testing.assert_close(math.sqrt(alpha_bar) * eps - math.sqrt(noise) * x_0, v)
    slope = torch.stack(
        [
            torch.autograd.grad(x_0[:, i].sum(), x, retain_graph=True)[0][:, i]
            for i in range(3)
        ],
        1,
    )
    torch.testing.assert_close(
        noise / math.sqrt(alpha_bar) * slope, data.x_0_variance(x, alpha_bar)
    )


def test_monte_carlo_agrees_with_the_conditional_mean() -> None:
    """E[(x_0 - E[x_0|x_t]) f(x_t)] = 0 and E Var is the mean squared error."""
    data, alpha_bar, n = make(), 0.4, 200_000
    g = torch.Generator().manual_seed(3)
    x_0 = data.sample(n, g)
    eps = torch.randn(n, 2, generator=g, dtype=F64)
    x_t = math.sqrt(alpha_bar) * x_0 + math.sqrt(1 - alpha_bar) * eps
    for truth, guess in ((x_0, data.x_0), (eps, data.eps)):
        miss = truth - guess(x_t, alpha_bar)
        for f in (torch.ones_like(x_t), x_t, x_t.sin(), x_t**2):
            product = miss * f
            assert (product.mean(0).abs() < 5 * product.std(0) / math.sqrt(n)).all()
    squared = (x_0 - data.x_0(x_t, alpha_bar)) ** 2 - data.x_0_variance(x_t, alpha_bar)
    assert (squared.mean(0).abs() < 5 * squared.std(0) / math.sqrt(n)).all()


def test_sample_has_the_moments_and_is_reproducible() -> None:
    data = make()
    a, b = (data.sample(100_000, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)
    assert a.dtype == F64
    mean = data.weights @ data.means
    second = data.weights @ (data.means**2 + data.variances[:, None])
    assert (a.mean(0) - mean).abs().max() < 0.02
    assert ((a**2).mean(0) - second).abs().max() < 0.05


def test_gaussian_closed_forms() -> None:
    m, s2, alpha_bar = 0.7, 0.25, 0.3
    data, x = gaussian(torch.full((2,), m, dtype=F64), s2), points(9, 2)
    v = alpha_bar * s2 + 1 - alpha_bar
    score = -(x - math.sqrt(alpha_bar) * m) / v
    torch.testing.assert_close(data.score(x, alpha_bar), score)
    expected = torch.full_like(x, s2 * (1 - alpha_bar) / v)
    torch.testing.assert_close(data.x_0_variance(x, alpha_bar), expected)


def test_empirical_is_the_limit_of_narrow_mixtures_and_copies() -> None:
    rows = points(7, 3, seed=2)
    few = Empirical(rows)
    narrow = Mixture(few.weights, rows, torch.full((7,), 1e-9, dtype=F64))
    x = points(11, 3)
    for name in ("log_prob", "score", "x_0", "eps", "v", "x_0_variance"):
        a, b = getattr(few, name)(x, 0.5), getattr(narrow, name)(x, 0.5)
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    near = rows[[4]] * math.sqrt(1 - 1e-6) + 1e-4
    torch.testing.assert_close(few.x_0(near, 1 - 1e-6), rows[[4]])
    sample = few.sample(50, torch.Generator().manual_seed(0))
    assert (torch.cdist(sample, rows).min(1).values == 0).all()


def test_empirical_on_images_is_a_softmax_mean_and_chunks_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    g = torch.Generator().manual_seed(0)
    images = torch.rand(30, 1, 4, 4, generator=g, dtype=F64) * 2 - 1
    x = torch.randn(13, 1, 4, 4, generator=g, dtype=F64)
    alpha_bar = torch.linspace(0.1, 0.99, 13, dtype=F64)
    data = Empirical(images)
    a = alpha_bar.reshape(-1, 1, 1, 1, 1)
    distance = ((x[:, None] - a.sqrt() * images) ** 2).sum((2, 3, 4))
    weights = (-distance / (2 * (1 - alpha_bar[:, None]))).softmax(1)
    torch.testing.assert_close(
        data.x_0(x, alpha_bar), torch.einsum("bn,nchw->bchw", weights, images)
    )
    names = ("log_prob", "score", "x_0", "eps", "v", "x_0_variance")
    whole = [getattr(data, name)(x, alpha_bar) for name in names]
    monkeypatch.setattr(oracles, "CHUNK", 70)
    for name, before in zip(names, whole, strict=True):
        torch.testing.assert_close(getattr(data, name)(x, alpha_bar), before)


def test_alpha_bar_per_sample_equals_one_at_a_time() -> None:
    data, x = make(), points(5, 2)
    alpha_bar = torch.tensor([1.0, 0.9, 0.5, 1e-4, 0.0], dtype=F64)
    for name in ("log_prob", "score", "x_0", "eps", "v", "x_0_variance"):
        together = getattr(data, name)(x, alpha_bar)
        alone = [
            getattr(data, name)(x[[i]], level)
            for i, level in enumerate([*alpha_bar[:3].tolist(), *alpha_bar[3:]])
        ]
        torch.testing.assert_close(together, torch.cat(alone))


def test_ends_of_the_noise() -> None:
    data, x = make(), points(5, 2)
    torch.testing.assert_close(data.x_0(x, 1.0), x)
    assert data.x_0_variance(x, 1.0).abs().max() < 1e-20
    torch.testing.assert_close(data.score(x, 0.0), -x)
    torch.testing.assert_close(data.eps(x, 0.0), x)
    mean = (data.weights @ data.means).expand(5, 2)
    torch.testing.assert_close(data.x_0(x, 0.0), mean)
    second = data.weights @ (data.means**2 + data.variances[:, None])
    torch.testing.assert_close(data.x_0_variance(x, 0.0), second - mean**2)


def test_float32_points_keep_their_digits_near_the_data() -> None:
    """At alpha_bar = 1 - 1e-6, 1 - alpha_bar must come from the float64 number."""
    data, alpha_bar = make(), torch.tensor(1 - 1e-6, dtype=F64)
    x = points(20, 2).float()
    exact = data.eps(x.double(), alpha_bar)
    assert data.eps(x, alpha_bar).dtype == torch.float32
    torch.testing.assert_close(
        data.eps(x, alpha_bar).double(), exact, rtol=1e-5, atol=1e-8
    )
    single = Mixture(data.weights.float(), data.means.float(), data.variances.float())
    torch.testing.assert_close(
        single.eps(x, alpha_bar).double(), exact, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("beta", [0.02, 0.4, 0.99])
@pytest.mark.parametrize("before", [1.0, 0.6])
def test_reverse_kernel_by_bayes(beta: float, before: float) -> None:
    data, alpha = make(D=1), 1 - beta
    grid = torch.linspace(-8, 8, 8001, dtype=F64)
    for x_t in (-1.2, 0.4):
        log_p = data.log_prob(grid[:, None], before)
        log_p = log_p - (x_t - math.sqrt(alpha) * grid) ** 2 / (2 * beta)
        p = log_p.softmax(0) / (grid[1] - grid[0])
        x = torch.tensor([x_t], dtype=F64)
        kernel = data.reverse_kernel(x, alpha, before * alpha)
        q = kernel.log_prob(grid[:, None], 1.0).exp()
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


def test_reverse_kernel_in_two_dimensions_obeys_bayes_pointwise() -> None:
    data, alpha, alpha_bar = make(), 0.7, 0.5
    x, before = points(30, 2), alpha_bar / alpha
    x_t = torch.tensor([0.4, -0.8], dtype=F64)
    step = torch.distributions.Normal(math.sqrt(alpha) * x, math.sqrt(1 - alpha))
    right = step.log_prob(x_t).sum(1) + data.log_prob(x, before)
    right = right - data.log_prob(x_t[None], alpha_bar)
    left = data.reverse_kernel(x_t, alpha, alpha_bar).log_prob(x, 1.0)
    torch.testing.assert_close(left, right)


@pytest.mark.parametrize("prediction", process.PREDICTIONS)
def test_denoiser_predicts_what_it_says(prediction: str) -> None:
    schedule, data = schedules.cosine(50), make()
    x, t = points(4, 2), torch.tensor([1, 7, 30, 50])
    model = denoiser(data, schedule, prediction)
    x_0 = data.x_0(x, schedule.alpha_bar[t])
    expected = process.from_x_0(schedule, x, t, x_0, prediction)
    torch.testing.assert_close(model(x, t), expected, rtol=1e-6, atol=1e-8)
    low = model(x.float(), t)
    assert low.dtype == torch.float32


@settings(max_examples=60)
@given(
    K=st.integers(1, 5),
    D=st.integers(1, 4),
    seed=st.integers(0, 999),
    alpha_bar=st.floats(0, 1),
    scale=st.floats(0.01, 30),
    single=st.booleans(),
)
def test_answers_are_finite_and_consistent_anywhere(
    K: int, D: int, seed: int, alpha_bar: float, scale: float, single: bool
) -> None:
    data, x = make(K, D, seed), scale * points(6, D, seed)
    x = x.float() if single else x
    x_0, eps = data.x_0(x, alpha_bar), data.eps(x, alpha_bar)
    assert x_0.dtype == x.dtype
    again = math.sqrt(alpha_bar) * x_0 + math.sqrt(1 - alpha_bar) * eps
    tolerance = (1e-5 if single else 1e-9) * (1 + scale)
    torch.testing.assert_close(again, x, rtol=0, atol=tolerance)
    assert torch.isfinite(data.log_prob(x, alpha_bar)).all()
    assert (data.x_0_variance(x, alpha_bar) >= 0).all()


def test_meta_tensors_pass_through() -> None:
    data = Empirical(torch.zeros(5, 1, 8, 8, device="meta"))
    x = torch.zeros(3, 1, 8, 8, device="meta")
    alpha_bar = torch.zeros(3, device="meta")
    for name in ("score", "x_0", "eps", "v", "x_0_variance"):
        assert getattr(data, name)(x, alpha_bar).shape == x.shape
    assert data.log_prob(x, 0.5).shape == (3,)


one = torch.ones(1)


@pytest.mark.parametrize(
    ("error", "name", "call"),
    [
        (ValueError, "weights", lambda: Mixture(one / 2, torch.zeros(1, 2), one)),
        (ValueError, "weights", lambda: Mixture(-one, torch.zeros(1, 2), one)),
        (ValueError, "weights", lambda: Mixture(torch.ones(2), torch.zeros(1, 2), one)),
        (ValueError, "variances", lambda: Mixture(one, torch.zeros(1, 2), -one)),
        (ValueError, "means", lambda: Mixture(one, torch.zeros(1), one)),
        (ValueError, "means", lambda: Mixture(one, torch.full((1, 1), math.nan), one)),
        (TypeError, "means", lambda: Mixture(one, [[0.0]], one)),
        (ValueError, "variance", lambda: gaussian(torch.zeros(2), -1.0)),
        (TypeError, "data", lambda: Empirical(torch.zeros(3, 2, dtype=torch.int64))),
        (ValueError, "data", lambda: Empirical(torch.zeros(0, 2))),
        (ValueError, "n must", lambda: make().sample(0)),
        (ValueError, "x_t", lambda: make().x_0(torch.zeros(3, 5), 0.5)),
        (ValueError, "x_t", lambda: make().x_0(torch.full((1, 2), math.inf), 0.5)),
        (ValueError, "alpha_bar", lambda: make().x_0(torch.zeros(3, 2), 1.1)),
        (ValueError, "alpha_bar", lambda: make().x_0(torch.zeros(3, 2), torch.ones(2))),
        (TypeError, "alpha_bar", lambda: make().x_0(torch.zeros(3, 2), "0.5")),
        (
            ValueError,
            "alpha_bar",
            lambda: Empirical(torch.zeros(2, 2)).x_0(torch.zeros(1, 2), 1.0),
        ),
        (
            ValueError,
            "alpha_t",
            lambda: make().reverse_kernel(torch.zeros(2), 1.0, 0.5),
        ),
        (
            ValueError,
            "alpha_bar_t",
            lambda: make().reverse_kernel(torch.zeros(2), 0.5, 0.6),
        ),
        (
            ValueError,
            "prediction",
            lambda: denoiser(make(), schedules.cosine(5), "score"),
        ),
        (
            ValueError,
            "t must",
            lambda: denoiser(make(), schedules.cosine(5))(
                torch.zeros(1, 2), torch.tensor([6])
            ),
        ),
    ],
)
def test_impossible_arguments_are_named(error, name, call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=name):
        call()
