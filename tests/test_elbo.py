"""ELBO estimators against exact sums, fractions and autograd."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from ddpm_core.losses import (
    Estimate,
    effective_sample_size,
    elbo,
    importance_weighted_bound,
)

relaxed = settings(max_examples=40)
logs = st.lists(st.floats(-30, 30), min_size=2, max_size=8)


def double(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- the ELBO


@relaxed
@given(log_joint=logs, shift=st.floats(-5, 5))
def test_elbo_is_the_mean_of_the_log_ratio(log_joint: list[float], shift: float):
    log_q = [shift - 0.1 * n for n in range(len(log_joint))]
    each = [a - b for a, b in zip(log_joint, log_q, strict=True)]
    mean = math.fsum(each) / len(each)
    spread = math.sqrt(math.fsum((e - mean) ** 2 for e in each) / (len(each) - 1))
    value, error = elbo(double(log_joint), double(log_q))
    assert value.item() == pytest.approx(mean, abs=1e-12)
    assert error.item() == pytest.approx(spread / math.sqrt(len(each)), abs=1e-9)


def test_elbo_of_a_gaussian_within_its_error():
    generator = torch.Generator().manual_seed(0)
    z = 0.2 + 0.7 * torch.randn(50_000, dtype=torch.float64, generator=generator)
    prior, q = Normal(double(0.0), double(1.0)), Normal(double(0.2), double(0.7))
    log_joint = prior.log_prob(z) + Normal(2 * z, double(1.0)).log_prob(double(1.5))
    value, error = elbo(log_joint, q.log_prob(z))
    rebuilt = -0.5 * math.log(2 * math.pi) - ((1.5 - 0.4) ** 2 + 4 * 0.49) / 2
    exact = rebuilt - torch.distributions.kl_divergence(q, prior).item()
    assert abs(value.item() - exact) < 4 * error.item() < 0.05
    assert value.item() < Normal(0.0, math.sqrt(5)).log_prob(torch.tensor(1.5)).item()


def test_no_spread_where_q_is_the_posterior():
    z = torch.linspace(-1, 2, 50, dtype=torch.float64)
    posterior = Normal(double(0.6), double(0.2**0.5))
    log_joint = Normal(0.0, 1.0).log_prob(z) + Normal(2 * z, 1.0).log_prob(double(1.5))
    value, error = elbo(log_joint, posterior.log_prob(z))
    evidence = Normal(double(0.0), double(5**0.5)).log_prob(double(1.5))
    assert torch.isclose(value, evidence, atol=1e-12)
    assert error.item() < 1e-12
    many = importance_weighted_bound(log_joint[:, None], posterior.log_prob(z)[:, None])
    assert torch.isclose(many.value, evidence, atol=1e-12)


def test_gradients_reach_both_arguments():
    log_joint = torch.tensor([-1.0, -2.0, 0.5], requires_grad=True)
    log_q = torch.tensor([-0.5, -0.2, -1.0], requires_grad=True)
    by_joint, by_q = torch.autograd.grad(
        elbo(log_joint, log_q).value, (log_joint, log_q)
    )
    assert torch.allclose(by_joint, torch.full((3,), 1 / 3))
    assert torch.allclose(by_q, torch.full((3,), -1 / 3))
    rows = [torch.stack([a, a.flip(0)]) for a in (log_joint, log_q)]
    value = importance_weighted_bound(*rows).value
    (by_joint,) = torch.autograd.grad(value, log_joint)
    assert torch.allclose(by_joint, (log_joint - log_q).softmax(0))


def test_trailing_axes_are_kept():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 6, 4, 3, dtype=torch.float64, generator=generator)
    each = elbo(a, b)
    assert isinstance(each, Estimate)
    assert each.value.shape == each.standard_error.shape == (4, 3)
    bound = importance_weighted_bound(a, b)
    assert bound.value.shape == (3,)
    for i in range(3):
        alone = importance_weighted_bound(a[..., i], b[..., i])
        assert torch.isclose(alone.value, bound.value[i])
        assert torch.isclose(alone.standard_error, bound.standard_error[i])
        assert torch.isclose(elbo(a[:, 2, i], b[:, 2, i]).value, each.value[2, i])


# ---- the importance-weighted bound


def all_draws(weights: list[Fraction], K: int) -> float:
    """L_K for q uniform on the weights' places, summed over all sequences."""
    total = 0.0
    for drawn in itertools.product(weights, repeat=K):
        total += math.log(sum(drawn) / K) / len(weights) ** K
    return total


@pytest.mark.parametrize("K", [1, 2, 3, 4])
def test_bound_over_all_sequences_of_draws(K: int):
    weights = [Fraction(1, 10), Fraction(3), Fraction(1, 2)]
    draws = torch.tensor(list(itertools.product(range(3), repeat=K)))
    log_q = torch.full((3,), -math.log(3), dtype=torch.float64)
    log_joint = double([float(w) for w in weights]).log() + log_q
    ours = importance_weighted_bound(log_joint[draws], log_q[draws])
    assert ours.value.item() == pytest.approx(all_draws(weights, K), abs=1e-13)
    assert ours.value.item() < math.log(sum(weights) / 3)


def test_one_sample_is_the_elbo():
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, 9, dtype=torch.float64, generator=generator)
    one, plain = importance_weighted_bound(a[:, None], b[:, None]), elbo(a, b)
    assert torch.equal(one.value, plain.value)
    assert torch.equal(one.standard_error, plain.standard_error)


@relaxed
@given(rows=st.lists(st.tuples(*[st.floats(-20, 20)] * 4), min_size=2, max_size=6))
def test_more_samples_never_lower_the_same_draws(rows: list[tuple[float, ...]]):
    log_joint = double(rows)
    zero = torch.zeros_like(log_joint)
    four = importance_weighted_bound(log_joint, zero).value
    pairs = importance_weighted_bound(log_joint.reshape(-1, 2), zero.reshape(-1, 2))
    one = elbo(log_joint.flatten(), zero.flatten()).value
    assert one <= pairs.value + 1e-12
    assert pairs.value <= four + 1e-12


def test_no_overflow_far_from_zero():
    log_joint = torch.tensor([[-9000.0, -9001.0], [-9001.0, -9000.0]]).double()
    value = importance_weighted_bound(log_joint, torch.zeros(2, 2).double()).value
    exact = -9000 + math.log((1 + math.exp(-1)) / 2)
    assert value.item() == pytest.approx(exact, abs=1e-11)


def test_a_sample_of_no_probability_costs_one_of_k():
    log_joint = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]])
    zero = torch.zeros(2, 2)
    value = importance_weighted_bound(log_joint, zero).value
    assert value.item() == pytest.approx(-math.log(2), abs=1e-6)
    assert elbo(log_joint.flatten(), zero.flatten()).value == -math.inf


# ---- effective sample size


@relaxed
@given(weights=st.lists(st.integers(0, 1000), min_size=1, max_size=9))
def test_effective_sample_size_against_fractions(weights: list[int]):
    squares = sum(w * w for w in weights)
    exact = Fraction(sum(weights) ** 2, squares) if squares else Fraction(0)
    ours = effective_sample_size(double(weights).log())
    assert ours.item() == pytest.approx(float(exact), rel=1e-12)
    assert ours.item() <= len(weights) + 1e-9


def test_effective_sample_size_along_any_axis_and_scale():
    generator = torch.Generator().manual_seed(3)
    log_weight = 3 * torch.randn(5, 7, dtype=torch.float64, generator=generator)
    ours = effective_sample_size(log_weight, dim=0)
    assert ours.shape == (7,)
    assert torch.allclose(ours, effective_sample_size(log_weight.mT))
    assert torch.allclose(ours, effective_sample_size(log_weight + 1e4, dim=0))
    assert bool((ours >= 1).all())
    assert bool((ours <= 5).all())


# ---- what is refused


two = torch.zeros(2)


@pytest.mark.parametrize("bound", [elbo, importance_weighted_bound])
def test_bad_input_is_named(bound):
    pair = torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"log_joint must be a torch\.Tensor"):
        bound([0.0, 1.0], two)
    with pytest.raises(TypeError, match="log_q must be a tensor of floating"):
        bound(pair, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="log_joint must have the shape of log_q"):
        bound(pair, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="number of repetitions in log_joint"):
        bound(pair[:1], pair[:1])
    with pytest.raises(ValueError, match="number of repetitions in log_joint"):
        bound(torch.tensor(0.0), torch.tensor(0.0))
    with pytest.raises(ValueError, match="log_joint must lie in"):
        bound(pair + math.nan, pair)
    with pytest.raises(ValueError, match="log_joint must lie in"):
        bound(pair + math.inf, pair)
    with pytest.raises(ValueError, match="log_q, z drawn from q, must be finite"):
        bound(pair, pair - math.inf)


def test_bound_needs_an_axis_of_samples():
    with pytest.raises(ValueError, match="number of samples in log_joint"):
        importance_weighted_bound(two, two)
    with pytest.raises(ValueError, match="number of samples in log_joint"):
        importance_weighted_bound(torch.zeros(2, 0), torch.zeros(2, 0))


def test_effective_sample_size_refuses():
    with pytest.raises(ValueError, match="log_weight must lie in"):
        effective_sample_size(two + math.nan)
    with pytest.raises(ValueError, match="dim must be an integer"):
        effective_sample_size(two, dim=1)
    with pytest.raises(ValueError, match=r"log_weight\.ndim"):
        effective_sample_size(torch.tensor(0.0))
    with pytest.raises(ValueError, match="number of weights"):
        effective_sample_size(torch.zeros(3, 0))


@pytest.mark.parametrize("device", ["meta"])
def test_runs_without_values(device: str):
    x = torch.zeros(3, 4, 5, device=device)
    assert elbo(x, x).value.shape == (4, 5)
    assert importance_weighted_bound(x, x).value.shape == (5,)
    assert effective_sample_size(x, dim=1).shape == (3, 5)
