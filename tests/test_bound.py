"""The variational bound: every term exact on Gaussian data, in two ways at least."""

import math
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ddpm_core.losses import (
    bound_chunks,
    bound_term,
    discretised_log_likelihood,
    fixed_variance,
    kl_multivariate_normal,
    last_term,
    prior_kl,
    step_kl,
    variational_bound,
)
from ddpm_core.oracles import denoiser, gaussian
from ddpm_core.process import (
    at,
    posterior_mean,
    posterior_mean_coefficients,
    posterior_variance,
    reverse_variance,
)
from ddpm_core.schedules import Schedule, cosine, from_beta, linear, scaled_linear

LINEAR = linear(1000)
relaxed = settings(max_examples=40)
BLOG = from_beta(torch.linspace(1e-4, 0.02, 200, dtype=torch.float64), "unscaled")
ALL = [LINEAR, cosine(1000), scaled_linear(1000), linear(30), cosine(2), BLOG]


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
    steps = step_kl(schedule, error[2:], t, none, at(variance, t, none))
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
    assert gap(BLOG, 0.25, exact_variance(BLOG, 0.25)) == pytest.approx(
        2.63255e-3, abs=5e-9
    )
    prior, steps, last = terms(BLOG, 0.25, exact_variance(BLOG, 0.25))
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
    ours = step_kl(schedule, x_0, t, x_0_hat, at(variance, t, x_0))
    torch.testing.assert_close(ours, kl_divergence(q, p).sum(1), rtol=1e-6, atol=1e-12)


def test_step_with_equal_variances_is_a_drop_of_the_snr() -> None:
    t = torch.tensor([2, 100, 500, 1000])
    generator = torch.Generator().manual_seed(0)
    x_0, x_0_hat = torch.randn(2, 4, 5, dtype=torch.float64, generator=generator)
    drop = 0.5 * (LINEAR.snr[t - 1] - LINEAR.snr[t])
    expected = drop * ((x_0 - x_0_hat) ** 2).sum(1)
    width = at(posterior_variance(LINEAR), t, x_0)
    found = step_kl(LINEAR, x_0, t, x_0_hat, width)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_step_keeps_its_digits_in_float32() -> None:
    t = torch.arange(2, 1001)
    generator = torch.Generator().manual_seed(1)
    x_0, noise = torch.randn(2, 999, 4, generator=generator)
    x_0_hat = x_0 + 0.01 * noise
    for rule in ("fixed_large", "fixed_small"):
        variance = reverse_variance(LINEAR, rule)
        single = step_kl(LINEAR, x_0, t, x_0_hat, at(variance, t, x_0))
        clean, guess = x_0.double(), x_0_hat.double()
        wide = step_kl(LINEAR, clean, t, guess, at(variance, t, clean))
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), wide, rtol=2e-3, atol=1e-11)


def test_step_has_gradients() -> None:
    t = torch.tensor([2, 1000])
    x_0 = torch.zeros(2, 1, dtype=torch.float64)
    x_0_hat = torch.full((2, 1), 0.5, dtype=torch.float64, requires_grad=True)
    step_kl(LINEAR, x_0, t, x_0_hat, at(LINEAR.beta, t, x_0)).sum().backward()
    assert bool(torch.isfinite(x_0_hat.grad).all())
    assert bool((x_0_hat.grad > 0).all())


def test_step_takes_a_variance_for_each_coordinate() -> None:
    t = torch.tensor([2, 700])
    generator = torch.Generator().manual_seed(3)
    x_0, x_0_hat, z = torch.randn(3, 2, 5, dtype=torch.float64, generator=generator)
    learned = (at(LINEAR.beta.log(), t, x_0) + 0.3 * z).exp().requires_grad_()
    whole = step_kl(LINEAR, x_0, t, x_0_hat, learned)
    each = [
        step_kl(
            LINEAR, x_0[:, i : i + 1], t, x_0_hat[:, i : i + 1], learned[:, i : i + 1]
        )
        for i in range(5)
    ]
    torch.testing.assert_close(whole, torch.stack(each).sum(0))
    whole.sum().backward()
    assert bool(torch.isfinite(learned.grad).all())


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
        step_kl(LINEAR, x, torch.tensor([bad]), x, x + 1)


def test_step_refuses_other_things() -> None:
    x, t = torch.zeros(2, 3), torch.tensor([2, 3])
    one = torch.ones(2, 1)
    with pytest.raises(ValueError, match="x_0_hat must have the shape of x_0"):
        step_kl(LINEAR, x, t, x[:, :1], one)
    with pytest.raises(ValueError, match="variance must be like x_0"):
        step_kl(LINEAR, x, t, x, torch.ones(2, 2))
    with pytest.raises(ValueError, match="variance must have 2 dimensions"):
        step_kl(LINEAR, x, t, x, LINEAR.beta)
    with pytest.raises(TypeError, match="variance must be a torch"):
        step_kl(LINEAR, x, t, x, 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="variance_2 must be above 0"):
        step_kl(LINEAR, x, t, x, 0 * one)
    with pytest.raises(TypeError, match="t must be an int64"):
        step_kl(LINEAR, x, t.double(), x, one)
    with pytest.raises(ValueError, match="mean_1 must be finite"):
        step_kl(LINEAR, x, t, x + math.inf, one)


def test_structure_on_the_meta_device() -> None:
    table = linear(30).to("meta")
    x = torch.zeros(4, 3, 8, 8, device="meta")
    t = torch.zeros(4, dtype=torch.int64, device="meta")
    assert prior_kl(table, x).shape == (4,)
    assert step_kl(table, x, t, x, x + 1).shape == (4,)
    reverse = fixed_variance(lambda x_t, t: x_t, table, table.beta)
    assert bound_term(reverse, table, x, t, x, levels=256).shape == (4,)
    found = variational_bound(reverse, table, x, levels=256)
    assert found.total.shape == (4,)
    assert found.by_t.shape == (31,)


# ---- the whole bound, for any reverse chain

LEVELS = torch.linspace(-1, 1, 17, dtype=torch.float64)


def grey(*shape: int, seed: int = 0) -> Tensor:
    """Random grey levels."""
    pick = torch.randint(17, shape, generator=torch.Generator().manual_seed(seed))
    return LEVELS[pick]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shrinking(x_t: Tensor, t: Tensor) -> Tensor:
    """Some guess of x_0 that depends on x_t and on t."""
    return x_t.tanh() * (1 - 0.01 * t.to(x_t.dtype).reshape(-1, *[1] * (x_t.ndim - 1)))


@pytest.mark.parametrize(
    "rule", ["fixed_large", "fixed_large_reference", "fixed_small"]
)
@pytest.mark.parametrize("s2", [0.25, 1.0, 4.0])
def test_sampled_bound_is_the_exact_one_within_its_error(s2: float, rule: str) -> None:
    schedule = linear(100)
    model = denoiser(gaussian(torch.zeros(1, dtype=torch.float64), s2), schedule, "x_0")
    x_0 = math.sqrt(s2) * torch.randn(3000, 1, dtype=torch.float64, generator=seeded(1))
    reverse = fixed_variance(model, schedule, rule)
    found = variational_bound(reverse, schedule, x_0, chunk=25, generator=seeded(2))
    variance = reverse_variance(schedule, rule)
    prior, steps, last = terms(schedule, s2, variance)
    exact = prior + steps.sum().item() + last
    error = found.total.std().item() / math.sqrt(3000)
    assert abs(found.total.mean().item() - exact) < 4 * error
    assert error < 0.05
    errors = (steps * math.sqrt(2 / 3000)).clamp(min=1e-6)
    assert bool(((found.by_t[2:] - steps).abs() < 6 * errors).all())


def by_hand(
    schedule: Schedule, x_0: Tensor, t: int, eps: Tensor, variance: float
) -> Tensor:
    """One term with torch.distributions, for the guess `shrinking`, grey levels."""
    steps = torch.full(x_0.shape[:1], t)
    x_t = (
        schedule.alpha_bar[t].sqrt() * x_0
        + schedule.one_minus_alpha_bar[t].sqrt() * eps
    )
    guess = shrinking(x_t, steps)
    if t == 1:
        law = Normal(guess, math.sqrt(variance))
        high = torch.where(x_0 > 0.99, 1.0, law.cdf(x_0 + 1 / 16))
        low = torch.where(x_0 < -0.99, 0.0, law.cdf(x_0 - 1 / 16))
        return -(high - low).log().flatten(1).sum(1)
    q = Normal(
        posterior_mean(schedule, x_0, x_t, steps),
        posterior_variance(schedule)[t].sqrt().expand_as(x_0),
    )
    p_mean = posterior_mean(schedule, guess, x_t, steps)
    p = Normal(p_mean, torch.full_like(x_0, math.sqrt(variance)))
    return kl_divergence(q, p).flatten(1).sum(1)


@pytest.mark.parametrize("rule", ["fixed_large", "fixed_small"])
def test_every_term_against_torch(rule: str) -> None:
    schedule = cosine(12)
    x_0 = grey(3, 1, 2, 2)
    variance = reverse_variance(schedule, rule)
    reverse = fixed_variance(shrinking, schedule, rule)
    parts = bound_chunks(
        reverse, schedule, x_0, levels=17, chunk=5, generator=seeded(4)
    )
    again, seen = seeded(4), 0
    for part in parts:
        for t, found in zip(part.t.tolist(), part.terms, strict=True):
            eps = torch.randn(x_0.shape, dtype=torch.float64, generator=again)
            theirs = by_hand(schedule, x_0, t, eps, variance[t].item())
            torch.testing.assert_close(found, theirs, rtol=1e-7, atol=1e-12)
            seen += 1
    assert seen == 12


def test_sums_are_the_sums_of_the_chunks() -> None:
    schedule, x_0 = cosine(9), grey(4, 3)
    reverse = fixed_variance(shrinking, schedule, "fixed_large")
    whole = variational_bound(
        reverse, schedule, x_0, levels=17, repeats=2, generator=seeded(5)
    )
    steps = [t for t in range(1, 10) for _ in range(2)]
    parts = list(
        bound_chunks(reverse, schedule, x_0, steps, levels=17, generator=seeded(5))
    )
    t, each = torch.cat([p.t for p in parts]), torch.cat([p.terms for p in parts])
    assert t.tolist() == steps
    torch.testing.assert_close(whole.last, each[t == 1].mean(0))
    torch.testing.assert_close(whole.steps, each[t > 1].sum(0) / 2)
    torch.testing.assert_close(whole.prior, prior_kl(schedule, x_0))
    torch.testing.assert_close(whole.total, whole.prior + whole.steps + whole.last)
    table = torch.stack([each[t == k].mean() for k in range(1, 10)])
    torch.testing.assert_close(whole.by_t[1:], table)
    assert math.isnan(whole.by_t[0].item())


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_the_chunk_does_not_change_the_numbers(chunk: int) -> None:
    schedule, x_0 = linear(30), grey(3, 4).float()
    reverse = fixed_variance(shrinking, schedule, "fixed_small")
    one, other = (
        variational_bound(
            reverse, schedule, x_0, levels=17, chunk=size, generator=seeded(6)
        )
        for size in (8, chunk)
    )
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=0, equal_nan=True)
        assert left.dtype == torch.float32


def test_memory_does_not_grow_with_the_number_of_steps() -> None:
    x_0 = grey(16, 1, 8, 8)
    peaks = []
    for T in (40, 160):
        schedule, alive, most = linear(T), weakref.WeakSet(), [0]

        def guess(
            x_t: Tensor, t: Tensor, alive: Any = alive, most: Any = most
        ) -> Tensor:
            found = shrinking(x_t, t)
            alive.update((x_t, found))
            most[0] = max(most[0], sum(kept.numel() for kept in list(alive)))
            return found

        variational_bound(
            fixed_variance(guess, schedule, "fixed_small"), schedule, x_0, chunk=4
        )
        peaks.append(most[0])
    assert peaks[0] == peaks[1]
    assert peaks[0] <= 2 * 2 * 4 * x_0.numel()  # two tensors, of two chunks at most


def test_chunks_are_made_when_asked_for() -> None:
    asked = []

    def guess(x_t: Tensor, t: Tensor) -> Tensor:
        asked.append(len(x_t))
        return x_t

    reverse = fixed_variance(guess, LINEAR, "fixed_small")
    parts = bound_chunks(reverse, LINEAR, torch.zeros(3, 2), chunk=2)
    assert asked == []
    assert torch.is_grad_enabled()
    next(parts), next(parts)
    assert asked == [6, 6]
    assert torch.is_grad_enabled()


def test_a_learned_variance_is_its_own_table_when_it_equals_one() -> None:
    schedule, x_0 = cosine(15), grey(4, 3)
    table = reverse_variance(schedule, "fixed_large")
    fixed = fixed_variance(shrinking, schedule, "fixed_large")

    def learned(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return shrinking(x_t, t), table[t][:, None].expand_as(x_t)

    one, other, by_table = (
        variational_bound(reverse, schedule, x_0, levels=17, generator=seeded(8)).total
        for reverse in (fixed, learned, fixed_variance(shrinking, schedule, table))
    )
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(one, by_table)


def test_one_term_has_gradients_for_guess_and_variance_at_every_step() -> None:
    schedule = cosine(6)
    x_0, t = grey(6, 2), torch.arange(1, 7)
    guess = torch.zeros(6, 2, dtype=torch.float64, requires_grad=True)
    log_variance = schedule.beta[t].log()[:, None].repeat(1, 2).requires_grad_()
    for levels in (17, None):
        guess.grad = log_variance.grad = None
        found = bound_term(
            lambda x_t, t: (guess, log_variance.exp()),
            schedule,
            x_0,
            t,
            torch.zeros_like(x_0),
            levels,
        )
        found.sum().backward()
        for grad in (guess.grad, log_variance.grad):
            assert bool(torch.isfinite(grad).all())
            assert bool((grad != 0).all(1).any())
        assert bool((log_variance.grad[1:] != 0).all())


def test_the_right_variance_for_a_guess_is_the_measured_one() -> None:
    schedule = linear(50)
    x_0 = 0.5 * torch.randn(2000, 1, dtype=torch.float64, generator=seeded(9))
    seen = variational_bound(
        fixed_variance(shrinking, schedule, "fixed_small"),
        schedule,
        x_0,
        generator=seeded(10),
    )
    small = posterior_variance(schedule)
    best = small * (1 + 2 * seen.by_t)
    best[1] = schedule.beta[1]
    totals = [
        variational_bound(
            fixed_variance(shrinking, schedule, table),
            schedule,
            x_0,
            generator=seeded(10),
        ).steps.mean()
        for table in (best, 1.05 * best, best / 1.05, small.clamp(min=1e-9))
    ]
    assert totals[0] == min(totals)


def test_last_term() -> None:
    x_0, guess = grey(5, 3), 0.9 * grey(5, 3, seed=1)
    wide = torch.full((5, 1), 0.04, dtype=torch.float64)
    theirs = -Normal(guess, 0.2).log_prob(x_0).sum(1)
    torch.testing.assert_close(last_term(x_0, guess, wide), theirs)
    mass = discretised_log_likelihood(x_0, guess, wide.expand(5, 3), 17).sum(1)
    torch.testing.assert_close(last_term(x_0, guess, wide, 17), -mass)
    assert bool((last_term(x_0, guess, wide, 17) >= 0).all())
    total = sum(
        math.exp(-last_term(level.reshape(1, 1), level.reshape(1, 1) * 0, wide[:1], 17))
        for level in LEVELS
    )
    assert total == pytest.approx(1, abs=1e-12)


def test_with_one_step_the_bound_is_prior_and_last_term() -> None:
    schedule = from_beta(torch.tensor([0.9]))
    x_0 = grey(3, 2)
    reverse = fixed_variance(shrinking, schedule, "fixed_large")
    found = variational_bound(reverse, schedule, x_0, levels=17)
    assert bool((found.steps == 0).all())
    assert bool((found.last > 0).all())


def test_clip_cuts_the_guess_alone() -> None:
    reverse = fixed_variance(lambda x_t, t: 5 * x_t, LINEAR, "fixed_small", clip=True)
    x_0_hat, variance = reverse(torch.tensor([[1.0, -1.0, 0.1]]), torch.tensor([3]))
    torch.testing.assert_close(x_0_hat, torch.tensor([[1.0, -1.0, 0.5]]))
    assert variance.item() == pytest.approx(posterior_variance(LINEAR)[3].item())


def test_whole_bound_refuses() -> None:
    reverse = fixed_variance(shrinking, LINEAR, "fixed_small")
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="rule must be one of"):
        fixed_variance(shrinking, LINEAR, "small")
    with pytest.raises(ValueError, match="variance must have shape"):
        fixed_variance(shrinking, LINEAR, LINEAR.beta[1:])
    with pytest.raises(ValueError, match="each of steps must be an integer from 1"):
        bound_chunks(reverse, LINEAR, x, [0])
    with pytest.raises(ValueError, match="chunk must be an integer"):
        bound_chunks(reverse, LINEAR, x, chunk=0)
    with pytest.raises(ValueError, match="repeats must be an integer"):
        variational_bound(reverse, LINEAR, x, repeats=0)
    with pytest.raises(ValueError, match="the number of samples x_0"):
        bound_chunks(reverse, LINEAR, x[:0])
    with pytest.raises(ValueError, match="levels from -1 to 1"):
        variational_bound(reverse, LINEAR, x + 0.3, levels=17)
    with pytest.raises(ValueError, match="x_0 must be finite"):
        variational_bound(reverse, LINEAR, x + math.nan)
    with pytest.raises(ValueError, match="x_0_hat must have the shape of x_0"):
        variational_bound(lambda x_t, t: (x_t[:, :1], x_t), LINEAR, x)
