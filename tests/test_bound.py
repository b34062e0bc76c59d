"""The variational bound: every term exact on Gaussian data, in two ways at least."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ddpm_core.losses import kl_multivariate_normal, prior_kl, step_kl
from ddpm_core.process import (
    posterior_mean,
    posterior_mean_coefficients,
    posterior_variance,
    reverse_variance,
)
from ddpm_core.schedules import Schedule, cosine, from_beta, linear, scaled_linear

LINEAR = linear(1000)
relaxed = settings(deadline=None, max_examples=40)
ALL = [LINEAR, cosine(1000), scaled_linear(1000), linear(30), cosine(2)]


def residual(schedule: Schedule, s2: float) -> Tensor:
    """Var(x_0 | x_t) of data N(0, s2), by precision: 1 / (1/s2 + SNR)."""
    return 1 / (1 / s2 + schedule.alpha_bar / schedule.one_minus_alpha_bar)


def exact_variance(schedule: Schedule, s2: float) -> Tensor:
    """Var(x_{t-1} | x_t) from the two marginals: beta_t v_{t-1} / v_t."""
    v = schedule.alpha_bar * s2 + schedule.one_minus_alpha_bar
    before = torch.cat([v[:1], v[:-1]])
    return schedule.beta * before / v


def terms(
    schedule: Schedule, s2: float, variance: Tensor
) -> tuple[float, Tensor, float]:
    """E L_T, E L_{t-1} for t = 2..T, E L_0 with the best mean, by the package."""
    error = residual(schedule, s2).sqrt()[:, None]
    t = torch.arange(2, schedule.T + 1)
    none = torch.zeros_like(error[2:])
    steps = step_kl(schedule, error[2:], none, t, none, variance)
    prior = prior_kl(schedule, torch.full((1, 1), math.sqrt(s2), dtype=torch.float64))
    last = 0.5 * torch.log(2 * math.pi * variance[1]) + error[1, 0] ** 2 / (
        2 * variance[1]
    )
    return prior.item(), steps, last.item()


def entropy(s2: float) -> float:
    return 0.5 * math.log(2 * math.pi * math.e * s2)


def gap(schedule: Schedule, s2: float, variance: Tensor) -> float:
    prior, steps, last = terms(schedule, s2, variance)
    return prior + math.fsum(steps.tolist()) + last - entropy(s2)


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: f"{s.name}-{s.T}")
@pytest.mark.parametrize("s2", [0.25, 1.0, 4.0])
def test_exact_chain_costs_the_start_and_nothing_else(
    schedule: Schedule, s2: float
) -> None:
    v_T = schedule.alpha_bar[-1].item() * s2 + schedule.one_minus_alpha_bar[-1].item()
    price = 0.5 * (v_T - 1 - math.log(v_T))
    assert gap(schedule, s2, exact_variance(schedule, s2)) == pytest.approx(
        price, abs=5e-12
    )


@pytest.mark.parametrize(
    ("s2", "price"), [(0.25, 2.29054e-10), (1.0, 0.0), (4.0, 3.66449e-9)]
)
def test_price_of_the_start(s2: float, price: float) -> None:
    assert gap(LINEAR, s2, exact_variance(LINEAR, s2)) == pytest.approx(
        price, abs=2e-12
    )


def test_unscaled_schedule_pays() -> None:
    blog = from_beta(torch.linspace(1e-4, 0.02, 200, dtype=torch.float64))
    assert gap(blog, 0.25, exact_variance(blog, 0.25)) == pytest.approx(
        2.63255e-3, abs=5e-9
    )
    prior, steps, last = terms(blog, 0.25, exact_variance(blog, 0.25))
    assert prior == pytest.approx(0.0213, abs=5e-5)
    assert steps.sum().item() == pytest.approx(3.893, abs=5e-4)
    assert last == pytest.approx(-3.186, abs=5e-4)


TABLE = [
    # s2, rule, L_T, sum of the steps, L_0, gap: computed once outside this package
    (1.0, "exact", 2.018e-5, 4.605, -3.186, 0.0),
    (1.0, "fixed_large", 2.018e-5, 4.605, -3.186, 0.0),
    (1.0, "fixed_large_reference", 2.018e-5, 4.605, -3.073, 0.1137),
    (1.0, "fixed_small", 2.018e-5, 5.070, -3.073, 0.5786),
    (0.25, "exact", 5.045e-6, 3.912, -3.186, 0.0),
    (0.25, "fixed_large", 5.045e-6, 3.913, -3.186, 0.00109),
    (0.25, "fixed_large_reference", 5.045e-6, 3.913, -3.073, 0.1147),
    (0.25, "fixed_small", 5.045e-6, 4.369, -3.073, 0.5699),
    (4.0, "exact", 8.072e-5, 5.298, -3.186, 0.0),
    (4.0, "fixed_large", 8.072e-5, 5.299, -3.186, 0.00085),
    (4.0, "fixed_large_reference", 8.072e-5, 5.299, -3.072, 0.1146),
    (4.0, "fixed_small", 8.072e-5, 5.768, -3.072, 0.5839),
]


@pytest.mark.parametrize(("s2", "rule", "L_T", "L_steps", "L_0", "expected"), TABLE)
def test_oracle_table(
    s2: float, rule: str, L_T: float, L_steps: float, L_0: float, expected: float
) -> None:
    variance = (
        exact_variance(LINEAR, s2)
        if rule == "exact"
        else reverse_variance(LINEAR, rule)
    )
    prior, steps, last = terms(LINEAR, s2, variance)
    assert prior == pytest.approx(L_T, rel=3e-4)
    assert steps.sum().item() == pytest.approx(L_steps, abs=6e-4)
    assert last == pytest.approx(L_0, abs=6e-4)
    assert gap(LINEAR, s2, variance) == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize("s2", [0.25, 1.0, 4.0])
def test_terms_are_informations(s2: float) -> None:
    alpha_bar, rest = LINEAR.alpha_bar[1:], LINEAR.one_minus_alpha_bar[1:]
    information = 0.5 * torch.log1p(s2 * alpha_bar / rest)
    prior, steps, last = terms(LINEAR, s2, exact_variance(LINEAR, s2))
    torch.testing.assert_close(
        steps, information[:-1] - information[1:], rtol=1e-7, atol=1e-14
    )
    assert last == pytest.approx(entropy(s2) - information[0].item(), rel=1e-12)
    v_T = alpha_bar[-1].item() * s2 + rest[-1].item()
    price = 0.5 * (v_T - 1 - math.log(v_T))
    assert prior == pytest.approx(information[-1].item() + price, rel=1e-9)


def chain(first: float, gains: Tensor, variances: Tensor) -> Tensor:
    root = torch.zeros(len(gains) + 1, len(gains) + 1, dtype=torch.float64)
    root[0, 0] = math.sqrt(first)
    for k, (gain, variance) in enumerate(zip(gains, variances, strict=True), start=1):
        root[k] = gain * root[k - 1]
        root[k, k] = variance.sqrt()
    return root @ root.mT


@pytest.mark.parametrize("s2", [0.25, 1.0, 4.0])
@pytest.mark.parametrize(
    "rule", ["fixed_large", "fixed_large_reference", "fixed_small"]
)
@pytest.mark.parametrize("schedule", [linear(40), cosine(25)], ids=lambda s: s.name)
def test_gap_is_the_divergence_of_the_joints(
    schedule: Schedule, s2: float, rule: str
) -> None:
    variance = reverse_variance(schedule, rule)
    q_cov = chain(s2, schedule.alpha[1:].sqrt(), schedule.beta[1:])
    c_0, c_t = posterior_mean_coefficients(schedule)
    v = schedule.alpha_bar * s2 + schedule.one_minus_alpha_bar
    back = (c_0 * schedule.alpha_bar.sqrt() * s2 / v + c_t)[1:].flip(0)
    p_cov = chain(1.0, back, variance[1:].flip(0)).flip(0, 1)
    none = torch.zeros(schedule.T + 1, dtype=torch.float64)
    joints = kl_multivariate_normal(none, q_cov, none, p_cov).item()
    assert gap(schedule, s2, variance) == pytest.approx(joints, rel=1e-8)
    assert joints > 0


# ---- the two functions one by one


@relaxed
@given(st.floats(-3, 3), st.sampled_from(ALL))
def test_prior_against_torch(x_0: float, schedule: Schedule) -> None:
    value = torch.tensor([[x_0, 0.5]], dtype=torch.float64)
    q = Normal(
        schedule.alpha_bar[-1].sqrt() * value, schedule.one_minus_alpha_bar[-1].sqrt()
    )
    theirs = kl_divergence(
        q, Normal(torch.zeros_like(value), torch.ones_like(value))
    ).sum(1)
    torch.testing.assert_close(prior_kl(schedule, value), theirs, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_prior_values_by_hand(name: str) -> None:
    ones = torch.ones(2, 3, 4, 4, dtype=getattr(torch, name))
    per_dimension = -0.5 * math.log1p(-LINEAR.alpha_bar[-1].item())
    found = prior_kl(LINEAR, ones)
    assert found.shape == (2,)
    assert found.dtype == ones.dtype
    torch.testing.assert_close(
        found, torch.full_like(found, 48 * per_dimension), rtol=1e-6, atol=0
    )
    assert per_dimension / math.log(2) == pytest.approx(2.9e-5, abs=2e-7)  # bits


def test_prior_is_zero_when_nothing_is_left() -> None:
    full = from_beta(torch.tensor([0.3, 1.0]))
    assert prior_kl(full, torch.full((1, 2), 5.0)).item() == 0


@relaxed
@given(
    st.sampled_from(ALL),
    st.floats(0, 1),
    st.sampled_from(["fixed_large", "fixed_small"]),
    st.integers(0, 2**31),
)
def test_step_against_torch(
    schedule: Schedule, place: float, rule: str, seed: int
) -> None:
    t = torch.tensor([2 + round(place * (schedule.T - 2)), schedule.T])
    generator = torch.Generator().manual_seed(seed)
    x_0, x_t, x_0_hat = torch.randn(3, 2, 3, dtype=torch.float64, generator=generator)
    variance = reverse_variance(schedule, rule)
    q = Normal(
        posterior_mean(schedule, x_0, x_t, t),
        posterior_variance(schedule)[t][:, None].sqrt(),
    )
    p = Normal(posterior_mean(schedule, x_0_hat, x_t, t), variance[t][:, None].sqrt())
    ours = step_kl(schedule, x_0, x_t, t, x_0_hat, variance)
    torch.testing.assert_close(ours, kl_divergence(q, p).sum(1), rtol=1e-6, atol=1e-12)


def test_step_with_equal_variances_is_a_drop_of_the_snr() -> None:
    t = torch.tensor([2, 100, 500, 1000])
    generator = torch.Generator().manual_seed(0)
    x_0, x_t, x_0_hat = torch.randn(3, 4, 5, dtype=torch.float64, generator=generator)
    drop = 0.5 * (LINEAR.snr[t - 1] - LINEAR.snr[t])
    expected = drop * ((x_0 - x_0_hat) ** 2).sum(1)
    found = step_kl(LINEAR, x_0, x_t, t, x_0_hat, posterior_variance(LINEAR))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_step_keeps_its_digits_in_float32() -> None:
    t = torch.arange(2, 1001)
    generator = torch.Generator().manual_seed(1)
    x_0, x_t, noise = torch.randn(3, 999, 4, generator=generator)
    x_0_hat = x_0 + 0.01 * noise
    for rule in ("fixed_large", "fixed_small"):
        variance = reverse_variance(LINEAR, rule)
        single = step_kl(LINEAR, x_0, x_t, t, x_0_hat, variance)
        wide = step_kl(
            LINEAR, x_0.double(), x_t.double(), t, x_0_hat.double(), variance
        )
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), wide, rtol=2e-3, atol=1e-11)


def test_step_does_not_depend_on_x_t_and_has_gradients() -> None:
    t = torch.tensor([2, 1000])
    x_0 = torch.zeros(2, 1, dtype=torch.float64)
    x_0_hat = torch.full((2, 1), 0.5, dtype=torch.float64, requires_grad=True)
    variance = reverse_variance(LINEAR, "fixed_large")
    one = step_kl(LINEAR, x_0, x_0, t, x_0_hat, variance)
    other = step_kl(LINEAR, x_0, x_0 + 7, t, x_0_hat, variance)
    assert torch.equal(one, other)
    one.sum().backward()
    assert bool(torch.isfinite(x_0_hat.grad).all())
    assert bool((x_0_hat.grad > 0).all())


# ---- refusals


def test_prior_refuses() -> None:
    with pytest.raises(TypeError, match="x_0"):
        prior_kl(LINEAR, torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="x_0 must be finite"):
        prior_kl(LINEAR, torch.full((1, 1), math.nan))
    with pytest.raises(ValueError, match=r"x_0\.ndim"):
        prior_kl(LINEAR, torch.ones(()))


@pytest.mark.parametrize("bad", [0, 1, 1001])
def test_step_refuses_steps(bad: int) -> None:
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="t must lie in"):
        step_kl(LINEAR, x, x, torch.tensor([bad]), x, LINEAR.beta)


def test_step_refuses_other_things() -> None:
    x, t, beta = torch.zeros(1, 2), torch.tensor([2]), LINEAR.beta
    with pytest.raises(ValueError, match="x_t must have the shape of x_0"):
        step_kl(LINEAR, x, x[:, :1], t, x, beta)
    with pytest.raises(ValueError, match="x_0_hat must have the shape of x_0"):
        step_kl(LINEAR, x, x, t, x[:, :1], beta)
    with pytest.raises(ValueError, match="variance must have shape"):
        step_kl(LINEAR, x, x, t, x, beta[1:])
    with pytest.raises(ValueError, match="variance_2 must be above 0"):
        step_kl(LINEAR, x, x, t, x, torch.zeros_like(beta))
    with pytest.raises(TypeError, match="t must be an int64"):
        step_kl(LINEAR, x, x, torch.tensor([2.0]), x, beta)
    with pytest.raises(ValueError, match="x_t must be finite"):
        step_kl(LINEAR, x, x + math.inf, t, x, beta)


def test_structure_on_the_meta_device() -> None:
    table = linear(30).to("meta")
    x = torch.zeros(4, 3, 8, 8, device="meta")
    t = torch.zeros(4, dtype=torch.int64, device="meta")
    assert prior_kl(table, x).shape == (4,)
    assert step_kl(table, x, x, t, x, table.beta).shape == (4,)
