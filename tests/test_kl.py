"""KL divergences against exact rational sums, 50-digit arithmetic and SciPy."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from ddpm_core.losses import (
    Estimate,
    kl_bernoulli,
    kl_categorical,
    kl_multivariate_normal,
    kl_normal,
    kl_term,
    monte_carlo_kl,
)

mpmath.mp.dps = 60
relaxed = settings(max_examples=60)
probability = st.floats(0.0, 1.0)
variance = st.floats(1e-12, 1e12)
mean = st.floats(-1e3, 1e3)


def double(*values: float) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(v, dtype=torch.float64) for v in values)


def exact_term(p: float, q: float) -> mpmath.mpf:
    p, q = mpmath.mpf(p), mpmath.mpf(q)
    return q if p == 0 else mpmath.inf if q == 0 else p * mpmath.log(p / q) - p + q


def exact_normal(m_1: float, v_1: float, m_2: float, v_2: float) -> mpmath.mpf:
    m_1, v_1, m_2, v_2 = (mpmath.mpf(x) for x in (m_1, v_1, m_2, v_2))
    return (v_1 / v_2 - 1 - mpmath.log(v_1 / v_2) + (m_1 - m_2) ** 2 / v_2) / 2


def agree(
    ours: float, exact: mpmath.mpf, rel: float = 1e-12, tiny: float = 1e-300
) -> bool:
    if mpmath.isinf(exact):
        return math.isinf(ours)
    return abs(mpmath.mpf(ours) - exact) <= rel * abs(exact) + tiny


# ---- discrete


def test_coin_example() -> None:
    assert kl_bernoulli(*double(0.6, 0.7)).item() == pytest.approx(0.0225824, abs=5e-8)
    assert kl_bernoulli(*double(0.7, 0.6)).item() == pytest.approx(0.0216009, abs=5e-8)


@relaxed
@given(p=st.floats(0, 1e6), q=st.floats(0, 1e6))
def test_term_to_the_last_digits(p: float, q: float) -> None:
    ours = kl_term(*double(p, q)).item()
    assert ours >= 0
    assert agree(ours, exact_term(p, q), rel=1e-11, tiny=1e-305)


@relaxed
@given(p=st.floats(1e-6, 1), gap=st.floats(-0.3, 0.3))
def test_term_where_both_nearly_agree(p: float, gap: float) -> None:
    q = p * (1 + gap)
    assert agree(kl_term(*double(p, q)).item(), exact_term(p, q), rel=5e-14)


@pytest.mark.parametrize(
    "s", [0.0499, 0.04999999, 0.05000001, 0.0501, -0.0499, -0.0501]
)
def test_term_is_continuous_where_the_series_takes_over(s: float) -> None:
    p, q = 1.0, (1 + s) / (1 - s)
    assert agree(kl_term(*double(p, q)).item(), exact_term(p, q), rel=2e-14)


@relaxed
@given(p=probability, q=probability)
def test_bernoulli(p: float, q: float) -> None:
    ours = kl_bernoulli(*double(p, q)).item()
    exact = exact_term(p, q) + exact_term(1 - p, 1 - q)
    assert ours >= 0
    assert agree(ours, exact, rel=1e-11, tiny=1e-300)


@pytest.mark.parametrize(
    ("p", "q", "expected"),
    [
        (0.0, 0.0, 0.0),
        (1.0, 1.0, 0.0),
        (0.0, 1.0, math.inf),
        (1.0, 0.0, math.inf),
        (0.5, 0.0, math.inf),
        (0.5, 1.0, math.inf),
        (0.0, 0.5, math.log(2)),
        (1.0, 0.5, math.log(2)),
        (5e-324, 0.0, math.inf),
    ],
)
def test_bernoulli_at_the_ends(p: float, q: float, expected: float) -> None:
    assert kl_bernoulli(*double(p, q)).item() == pytest.approx(expected, abs=1e-15)


@relaxed
@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=2, max_size=8)
)
def test_categorical_against_a_plain_sum(pairs: list[tuple[int, int]]) -> None:
    total_p, total_q = (sum(column) for column in zip(*pairs, strict=True))
    if not total_p or not total_q:
        return
    p = torch.tensor([a / total_p for a, _ in pairs], dtype=torch.float64)
    q = torch.tensor([b / total_q for _, b in pairs], dtype=torch.float64)
    exact = mpmath.mpf(0)
    for a, b in pairs:
        if a:
            ratio = (
                mpmath.mpf(a) * total_q / (mpmath.mpf(b) * total_p) if b else mpmath.inf
            )
            exact += mpmath.mpf(a) / total_p * mpmath.log(ratio)
    assert agree(kl_categorical(p, q).item(), exact, rel=1e-10, tiny=1e-15)


def test_categorical_takes_any_dimension() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.rand(2, 3, 4, 5, dtype=torch.float64, generator=generator)
    for dim in (0, 1, 2, -1):
        a, b = p / p.sum(dim, keepdim=True), q / q.sum(dim, keepdim=True)
        plain = (a * (a / b).log()).sum(dim)
        torch.testing.assert_close(kl_categorical(a, b, dim), plain)


def test_categorical_accepts_a_float32_softmax() -> None:
    generator = torch.Generator().manual_seed(1)
    p, q = torch.randn(2, 8, 1000, generator=generator).softmax(-1)
    assert kl_categorical(p, q).shape == (8,)
    assert bool((kl_categorical(p, p) == 0).all())


# ---- Gaussians


@relaxed
@given(mean, variance, mean, variance)
def test_normal_against_fifty_digits(
    m_1: float, v_1: float, m_2: float, v_2: float
) -> None:
    ours = kl_normal(*double(m_1, v_1, m_2, v_2)).item()
    assert ours >= 0
    assert agree(ours, exact_normal(m_1, v_1, m_2, v_2), rel=1e-12)


@relaxed
@given(st.floats(-300, 300), st.floats(-300, 300))
def test_normal_extreme_ratios(power_1: float, power_2: float) -> None:
    v_1, v_2 = 10.0**power_1, 10.0**power_2
    exact = exact_normal(0, v_1, 0, v_2)
    ours = kl_normal(*double(0.0, v_1, 0.0, v_2)).item()
    assert (
        ours == math.inf
        if exact > 1.7e308
        else agree(ours, exact, rel=1e-12, tiny=1e-14)
    )


@relaxed
@given(st.floats(1e-15, 0.5), st.sampled_from([-1, 1]))
def test_normal_nearly_equal_variances(gap: float, sign: int) -> None:
    v_1 = 1 + sign * gap
    ours = kl_normal(*double(0.0, v_1, 0.0, 1.0)).item()
    assert agree(ours, exact_normal(0, v_1, 0, 1), rel=1e-13)


@pytest.mark.parametrize("gap", [2.0**-k for k in range(2, 23)])
def test_normal_keeps_float32_digits(gap: float) -> None:
    v_1, one, zero = torch.tensor(1 + gap), torch.ones(()), torch.zeros(())
    ours = kl_normal(zero, v_1, zero, one).item()
    assert agree(ours, exact_normal(0, 1 + gap, 0, 1), rel=1e-6)


@relaxed
@given(mean, st.floats(1e-3, 1e3), mean, st.floats(1e-3, 1e3))
def test_normal_against_torch(m_1: float, s_1: float, m_2: float, s_2: float) -> None:
    a, b, c, d = double(m_1, s_1, m_2, s_2)
    theirs = kl_divergence(Normal(a, b), Normal(c, d))
    torch.testing.assert_close(
        kl_normal(a, b**2, c, d**2), theirs, rtol=1e-9, atol=1e-9
    )


def test_multivariate_against_torch_and_the_scalar_form() -> None:
    generator = torch.Generator().manual_seed(2)
    root = torch.randn(2, 7, 5, 5, dtype=torch.float64, generator=generator)
    cov_1, cov_2 = root @ root.mT + 0.05 * torch.eye(5)
    mean_1, mean_2 = torch.randn(2, 7, 5, dtype=torch.float64, generator=generator)
    ours = kl_multivariate_normal(mean_1, cov_1, mean_2, cov_2)
    theirs = kl_divergence(
        torch.distributions.MultivariateNormal(mean_1, cov_1),
        torch.distributions.MultivariateNormal(mean_2, cov_2),
    )
    torch.testing.assert_close(ours, theirs)
    v_1, v_2 = cov_1.diagonal(dim1=-2, dim2=-1), cov_2.diagonal(dim1=-2, dim2=-1)
    apart = kl_multivariate_normal(mean_1, v_1.diag_embed(), mean_2, v_2.diag_embed())
    torch.testing.assert_close(apart, kl_normal(mean_1, v_1, mean_2, v_2).sum(-1))


def test_multivariate_does_not_change_under_an_invertible_map() -> None:
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(3, 4, 4, dtype=torch.float64, generator=generator)
    cov_1, cov_2, turn = root[0] @ root[0].mT, root[1] @ root[1].mT, root[2]
    mean_1, mean_2 = torch.randn(2, 4, dtype=torch.float64, generator=generator)
    before = kl_multivariate_normal(mean_1, cov_1, mean_2, cov_2)
    moved = [turn @ c @ turn.mT for c in (cov_1, cov_2)]
    moved = [(c + c.mT) / 2 for c in moved]
    after = kl_multivariate_normal(turn @ mean_1, moved[0], turn @ mean_2, moved[1])
    torch.testing.assert_close(after, before, rtol=1e-7, atol=0)


def test_multivariate_nearly_equal_keeps_its_digits() -> None:
    eye, none = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    ours = kl_multivariate_normal(none, (1 + 1e-9) * eye, none, eye).item()
    assert agree(ours, 3 * exact_normal(0, 1 + 1e-9, 0, 1), rel=1e-6)
    assert kl_multivariate_normal(none, eye, none, eye).item() == 0


# ---- gradients


@pytest.mark.parametrize(
    ("p", "q"), [(0.5, 0.5), (0.3, 0.9), (0.0, 0.4), (1.0, 0.4), (1e-30, 0.5)]
)
def test_bernoulli_gradients_are_finite(p: float, q: float) -> None:
    pair = [x.requires_grad_() for x in double(p, q)]
    kl_bernoulli(*pair).backward()
    assert all(torch.isfinite(x.grad) for x in pair)
    slope = (q - p) / (q * (1 - q))
    assert pair[1].grad.item() == pytest.approx(slope, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    "ratio", [1e-30, 1e-8, 0.9, 0.9049, 1.0, 1 + 1e-9, 1.1, 1e8, 1e30]
)
def test_normal_gradients(ratio: float) -> None:
    four = [x.requires_grad_() for x in double(0.5, ratio, 0.25, 1.0)]
    kl_normal(*four).backward()
    expected = [0.25, 0.5 * (1 - 1 / ratio), -0.25, 0.5 * (1 - ratio - 0.0625)]
    for x, value in zip(four, expected, strict=True):
        assert x.grad.item() == pytest.approx(value, rel=1e-9, abs=1e-15)


def test_gradcheck_on_both_sides_of_the_series() -> None:
    generator = torch.Generator().manual_seed(4)
    numbers = torch.rand(4, 6, dtype=torch.float64, generator=generator) + 0.5
    numbers[1, :3] = numbers[3, :3] * 1.01
    assert torch.autograd.gradcheck(
        kl_normal, tuple(n.requires_grad_() for n in numbers)
    )


# ---- Monte Carlo


def log_normal(x: torch.Tensor, mean: float, variance: float) -> torch.Tensor:
    return -0.5 * ((x - mean) ** 2 / variance + math.log(2 * math.pi * variance))


@pytest.mark.parametrize("estimator", ["naive", "low_variance"])
@pytest.mark.parametrize(("shift", "spread"), [(0.05, 1.0), (1.0, 1.0), (0.3, 0.5)])
def test_estimates_lie_within_their_errors(
    estimator: str, shift: float, spread: float
) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(50_000, dtype=torch.float64, generator=generator)
    found = monte_carlo_kl(
        lambda x: log_normal(x, 0.0, 1.0),
        lambda x: log_normal(x, shift, spread),
        x,
        estimator,
    )
    assert isinstance(found, Estimate)
    exact = kl_normal(*double(0.0, 1.0, shift, spread))
    assert abs(found.value - exact) < 4 * found.standard_error
    assert found.standard_error > 0


def test_naive_error_is_the_known_one() -> None:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(100_000, dtype=torch.float64, generator=generator)
    found = monte_carlo_kl(
        lambda x: log_normal(x, 0, 1), lambda x: log_normal(x, 0.2, 1), x
    )
    assert found.standard_error.item() == pytest.approx(
        0.2 / math.sqrt(100_000), rel=0.02
    )


def test_low_variance_is_never_negative_and_better_close_by() -> None:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2000, dtype=torch.float64, generator=generator)
    pair = (lambda x: log_normal(x, 0, 1), lambda x: log_normal(x, 0.01, 1))
    naive, better = monte_carlo_kl(*pair, x), monte_carlo_kl(*pair, x, "low_variance")
    assert better.value > 0
    assert better.standard_error < naive.standard_error / 50


def test_monte_carlo_says_infinity_where_q_is_zero() -> None:
    x = torch.tensor([0.5, 1.5])
    never = lambda x: torch.where(x < 1, 0.0, -math.inf)  # noqa: E731
    assert monte_carlo_kl(torch.zeros_like, never, x).value == math.inf


# ---- refusals


@pytest.mark.parametrize(
    ("p", "q", "word"),
    [
        (-0.1, 0.5, "p"),
        (1.1, 0.5, "p"),
        (0.5, 1.5, "q"),
        (math.nan, 0.5, "p"),
        (0.5, math.nan, "q"),
    ],
)
def test_bernoulli_refuses_what_is_no_probability(
    p: float, q: float, word: str
) -> None:
    with pytest.raises(ValueError, match=f"^{word} must"):
        kl_bernoulli(*double(p, q))


@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan])
def test_term_refuses(bad: float) -> None:
    with pytest.raises(ValueError, match="p must"):
        kl_term(*double(bad, 1.0))
    with pytest.raises(ValueError, match="q must"):
        kl_term(*double(1.0, bad))


def test_categorical_refuses_sums_other_than_one() -> None:
    good = torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match="p must sum to 1"):
        kl_categorical(torch.tensor([0.5, 0.6]), good)
    with pytest.raises(ValueError, match="q must sum to 1"):
        kl_categorical(good, torch.tensor([0.5, 0.4]))
    with pytest.raises(ValueError, match="dim"):
        kl_categorical(good, good, dim=1)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("place", [1, 3])
def test_normal_refuses_variances(bad: float, place: int) -> None:
    four = [0.0, 1.0, 0.0, 1.0]
    four[place] = bad
    with pytest.raises(ValueError, match=f"variance_{1 if place == 1 else 2} must"):
        kl_normal(*double(*four))


def test_normal_refuses_shapes_types_and_infinite_means() -> None:
    one = torch.ones(2)
    with pytest.raises(ValueError, match="shape"):
        kl_normal(one, one, one, torch.ones(1))
    with pytest.raises(TypeError, match="variance_2"):
        kl_normal(one, one, one, 1.0)
    with pytest.raises(TypeError, match="mean_1"):
        kl_normal(torch.ones(2, dtype=torch.int64), one, one, one)
    with pytest.raises(ValueError, match="mean_2 must be finite"):
        kl_normal(one, one, one * math.inf, one)
    with pytest.raises(ValueError, match="device"):
        kl_normal(one, one, one, one.to("meta"))


def test_multivariate_refuses() -> None:
    mean, cov = torch.zeros(2), torch.eye(2)
    with pytest.raises(ValueError, match="cov_1 must be positive definite"):
        kl_multivariate_normal(mean, torch.tensor([[1.0, 2.0], [2.0, 1.0]]), mean, cov)
    with pytest.raises(ValueError, match="cov_2 must be positive definite"):
        kl_multivariate_normal(mean, cov, mean, torch.diag(torch.tensor([1.0, 0.0])))
    with pytest.raises(ValueError, match="cov_1 must be symmetric"):
        kl_multivariate_normal(mean, torch.tensor([[1.0, 0.5], [0.0, 1.0]]), mean, cov)
    with pytest.raises(ValueError, match="cov_1 must have shape"):
        kl_multivariate_normal(torch.zeros(3), cov, torch.zeros(3), cov)
    with pytest.raises(ValueError, match="ndim"):
        kl_multivariate_normal(torch.zeros(()), cov, torch.zeros(()), cov)


def test_monte_carlo_refuses() -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="estimator must be one of"):
        monte_carlo_kl(torch.zeros_like, torch.zeros_like, x, "k2")
    with pytest.raises(ValueError, match="number of samples"):
        monte_carlo_kl(torch.zeros_like, torch.zeros_like, x[:1])
    with pytest.raises(ValueError, match=r"log_q\(x\) must have shape"):
        monte_carlo_kl(torch.zeros_like, torch.mean, x)
    with pytest.raises(ValueError, match="log_p"):
        monte_carlo_kl(lambda x: x - math.inf, torch.zeros_like, x)


def test_structure_on_the_meta_device() -> None:
    x = torch.zeros(4, 3, device="meta")
    assert kl_bernoulli(x, x).device.type == "meta"
    assert kl_categorical(x, x).shape == (4,)
    assert kl_normal(x, x, x, x).shape == (4, 3)
    cov = torch.zeros(4, 3, 3, device="meta")
    assert kl_multivariate_normal(x, cov, x, cov).shape == (4,)
