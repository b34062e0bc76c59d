"""Learned variances, the hybrid loss and importance sampling of t: exact oracles."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ddpm_core import improved
from ddpm_core.improved import (
    ImportanceSteps,
    best_variance,
    hybrid_loss,
    hybrid_parts,
    interpolated_variance,
    learned_reverse,
    log_variance_range,
    reverse_chain,
    split_output,
    squared_errors,
    widen,
)
from ddpm_core.losses import (
    bits_per_dim,
    bound_term,
    fixed_variance,
    simple_loss,
    variational_bound,
    x_0_guess,
)
from ddpm_core.oracles import denoiser, gaussian
from ddpm_core.process import (
    VARIANCES,
    at,
    posterior_variance,
    reverse_variance,
)
from ddpm_core.samplers import ancestral, last
from ddpm_core.schedules import Schedule, cosine, from_beta, linear, respace
from ddpm_core.unet import UNET_CONFIGS, UNet

betas = st.lists(st.floats(1e-4, 0.9), min_size=2, max_size=8)


def schedule_of(beta: list[float]) -> Schedule:
    return from_beta(torch.tensor(beta, dtype=torch.float64))


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def answer(x_t: Tensor, t: Tensor) -> Tensor:
    """Some function as a network with a learned variance."""
    return torch.cat([0.8 * x_t, x_t.cos()], dim=1)


@given(beta=betas, raw=st.floats(-3, 3))
def test_the_variance_is_a_weighted_geometric_mean(
    beta: list[float], raw: float
) -> None:
    schedule = schedule_of(beta)
    t = torch.arange(1, schedule.T + 1)
    found = interpolated_variance(
        schedule, t, torch.full((schedule.T,), raw, dtype=torch.float64)
    )
    small, large = posterior_variance(schedule)[1:], schedule.beta[1:]
    small = torch.cat([small[1:2], small[1:]])  # beta_tilde_2 stands at t = 1
    nu = (raw + 1) / 2
    assert torch.allclose(found, large**nu * small ** (1 - nu), rtol=1e-9)


def test_the_ends_are_the_fixed_rules_and_the_middle_is_between() -> None:
    schedule = cosine(50)
    t = torch.arange(1, 51)
    ends = [
        interpolated_variance(schedule, t, torch.full((50,), r).double())
        for r in (-1.0, 0.0, 1.0)
    ]
    assert torch.allclose(ends[0], reverse_variance(schedule, "fixed_small")[1:])
    assert torch.allclose(ends[2], reverse_variance(schedule, "fixed_large")[1:])
    assert bool(((ends[0] < ends[1]) & (ends[1] < ends[2])).all())
    assert torch.allclose(ends[1].square(), ends[0] * ends[2])


def test_the_range_of_a_respaced_chain_is_that_of_its_kept_steps() -> None:
    schedule = cosine(200)
    short = respace(schedule, range(20, 201, 20))
    low, high = log_variance_range(short)
    rest = 1 - schedule.alpha_bar[20:201:20]
    beta = 1 - schedule.alpha_bar[40:201:20] / schedule.alpha_bar[20:181:20]
    assert torch.allclose(high[2:], beta.log(), atol=1e-9)
    assert torch.allclose(low[2:], (beta * rest[:-1] / rest[1:]).log(), atol=1e-9)


def test_float32_is_near_float64() -> None:
    schedule, t = linear(), torch.arange(1, 1001)
    raw = normal(1000)
    right = interpolated_variance(schedule, t, raw)
    found = interpolated_variance(schedule, t, raw.float())
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), right, rtol=1e-5)


def test_one_step_has_no_range() -> None:
    with pytest.raises(ValueError, match="T >= 2"):
        log_variance_range(from_beta(torch.tensor([0.5])))


@pytest.mark.parametrize("t", [0, 51])
def test_steps_outside_are_refused(t: int) -> None:
    with pytest.raises(ValueError, match="t must lie in"):
        interpolated_variance(linear(50), torch.tensor([t]), torch.zeros(1, 2))


def test_an_output_of_another_shape_is_refused() -> None:
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"\[2, 6, 4, 4\]"):
        split_output(torch.zeros(2, 3, 4, 4), x)
    with pytest.raises(ValueError, match="the model's output"):
        hybrid_loss(lambda x, t: x, linear(), x, torch.tensor([1, 2]), x)


def test_channels_are_split_in_halves() -> None:
    output = torch.arange(12.0).reshape(1, 4, 3)
    prediction, raw = split_output(output, torch.zeros(1, 2, 3))
    assert prediction.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert raw.flatten().tolist() == [6, 7, 8, 9, 10, 11]


@settings(max_examples=30)
@given(
    beta=betas,
    seed=st.integers(0, 2**31),
    prediction=st.sampled_from(["eps", "x_0", "v", "mean"]),
    clip=st.booleans(),
)
def test_parts_are_the_simple_loss_and_the_term_of_the_bound(
    beta: list[float], seed: int, prediction: str, clip: bool
) -> None:
    schedule = schedule_of(beta)
    t = torch.arange(1, schedule.T + 1)
    x_0, eps = normal(2, schedule.T, 2, 3, seed=seed).clamp(-1, 1)
    how = {"prediction": prediction}
    parts = hybrid_parts(answer, schedule, x_0, t, eps, clip=clip, **how)
    simple = simple_loss(lambda x, t: answer(x, t)[:, :2], schedule, x_0, t, eps, **how)
    chain = learned_reverse(answer, schedule, clip=clip, **how)
    bits = bits_per_dim(bound_term(chain, schedule, x_0, t, eps), 6)
    assert torch.allclose(parts.simple, simple)
    assert torch.allclose(parts.bits, bits)
    total = hybrid_loss(answer, schedule, x_0, t, eps, clip=clip, weight=0.5, **how)
    assert torch.allclose(total, simple + 0.5 * schedule.T * bits)


@pytest.mark.parametrize("levels", [None, 17])
@pytest.mark.parametrize("clip", [False, True])
def test_two_of_the_four_gradients_of_the_hybrid_loss_are_exactly_zero(
    levels: int | None, clip: bool
) -> None:
    schedule, t = cosine(20), torch.tensor([1, 2, 10, 20])
    x_0 = torch.randint(0, 17, (4, 1, 3), generator=torch.Generator().manual_seed(0))
    x_0, eps = x_0.double() / 8 - 1, normal(4, 1, 3)
    output = normal(4, 2, 3, seed=1).requires_grad_()
    parts = hybrid_parts(
        lambda x, t: output, schedule, x_0, t, eps, levels=levels, clip=clip
    )
    (of_simple,) = torch.autograd.grad(parts.simple.sum(), output, retain_graph=True)
    (of_bits,) = torch.autograd.grad(parts.bits.sum(), output)
    assert bool((of_simple[:, 1:] == 0).all())
    assert bool((of_simple[:, :1] != 0).all())
    assert bool((of_bits[:, :1] == 0).all())
    assert bool((of_bits[:, 1:].abs().sum((1, 2)) > 0).all())


def test_without_detaching_the_mean_feels_the_bound() -> None:
    schedule, t = cosine(20), torch.tensor([2, 10])
    x_0, eps = normal(2, 2, 1, 3)
    output = normal(2, 2, 3, seed=1).requires_grad_()
    parts = hybrid_parts(lambda x, t: output, schedule, x_0, t, eps, detach=False)
    (gradient,) = torch.autograd.grad(parts.bits.sum(), output)
    assert bool((gradient[:, :1] != 0).all())


def test_the_model_is_told_the_steps_of_the_training_schedule() -> None:
    told: list[list[int]] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        told.append(t.tolist())
        return torch.cat([x, x], dim=1)

    short, x = respace(linear(), [10, 500, 1000]), torch.zeros(2, 1, 2)
    hybrid_loss(model, short, x, torch.tensor([1, 3]), x)
    learned_reverse(model, short)(x, torch.tensor([2, 3]))
    last(reverse_chain(learned_reverse(model, short), short, x))
    assert told[:2] == [[10, 1000], [500, 1000]]
    assert told[2:] == [[1000, 1000], [500, 500], [10, 10]]


@pytest.mark.parametrize("rule", VARIANCES)
@pytest.mark.parametrize("clip", [False, True])
def test_a_chain_with_a_fixed_variance_is_ancestral_sampling(
    rule: str, clip: bool
) -> None:
    schedule, x_T = cosine(30), normal(3, 1, 2)
    guess = x_0_guess(
        denoiser(gaussian(torch.zeros(1, 2).double(), 0.5), schedule), schedule
    )

    def model(x: Tensor, t: Tensor) -> Tensor:
        return denoiser(gaussian(torch.zeros(1, 2).double(), 0.5), schedule)(x, t)

    chain = fixed_variance(guess, schedule, rule, clip=clip)
    ours = reverse_chain(
        chain, schedule, x_T, generator=torch.Generator().manual_seed(1)
    )
    theirs = ancestral(
        model,
        schedule,
        x_T,
        variance=rule,
        clip=clip,
        generator=torch.Generator().manual_seed(1),
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a.t == b.t
        assert torch.allclose(a.x, b.x, atol=1e-12)
        assert torch.allclose(a.x_0, b.x_0, atol=1e-12)


def test_a_chain_broken_off_leaves_gradients_on() -> None:
    chain = reverse_chain(
        learned_reverse(answer, linear(50)), linear(50), normal(2, 1, 3)
    )
    next(chain), next(chain)
    assert torch.is_grad_enabled()


def test_the_last_step_adds_no_noise() -> None:
    schedule, x_1 = linear(50), normal(2, 1, 3)
    short = respace(schedule, [1])
    reverse = fixed_variance(lambda x, t: 0.5 * x, short, "fixed_large")
    ends = [
        last(
            reverse_chain(
                reverse, short, x_1, generator=torch.Generator().manual_seed(s)
            )
        )
        for s in (1, 2)
    ]
    assert torch.equal(ends[0], ends[1])
    assert torch.allclose(ends[0], 0.5 * x_1)


@pytest.mark.parametrize("variance", [0.01, 0.25, 1.0])
def test_errors_of_a_perfect_guess_give_the_exact_reverse_variance(
    variance: float,
) -> None:
    """On Gaussian data the exact reverse step has variance beta_t v_{t-1} / v_t."""
    schedule = linear(50)
    law = gaussian(torch.zeros(1, dtype=torch.float64), variance)
    guess = x_0_guess(denoiser(law, schedule, "x_0"), schedule, "x_0")
    some = torch.Generator().manual_seed(0)
    x_0 = law.sample(20_000, some)
    error = squared_errors(guess, schedule, x_0, repeats=2, generator=some)
    assert error.shape == (51, 1)
    assert bool(error[0].isnan().all())
    v = schedule.alpha_bar * variance + schedule.one_minus_alpha_bar
    right = schedule.one_minus_alpha_bar * variance / v
    assert torch.allclose(error[1:, 0], right[1:], rtol=0.05)
    best = best_variance(schedule, right)
    exact = schedule.beta[1:] * v[:-1] / v[1:]
    assert torch.allclose(best[2:], exact[1:], rtol=1e-9)
    assert best[1] >= posterior_variance(schedule)[2]


@given(beta=betas, seed=st.integers(0, 2**31))
def test_no_variance_has_a_lower_bound_than_the_best(
    beta: list[float], seed: int
) -> None:
    schedule, (x_0, eps) = schedule_of(beta), normal(2, 64, 1, seed=seed)

    def cost(table: Tensor, t: int) -> float:
        chain = fixed_variance(lambda x, t: 0.7 * x, schedule, table)
        steps = torch.full((64,), t)
        return bound_term(chain, schedule, x_0, steps, eps).mean().item()

    for t in range(2, schedule.T + 1):
        x_t = (
            at(schedule.alpha_bar.sqrt(), torch.full((64,), t), x_0) * x_0
            + at(schedule.one_minus_alpha_bar.sqrt(), torch.full((64,), t), x_0) * eps
        )
        error = torch.full((schedule.T + 1,), math.nan, dtype=torch.float64)
        error[1:] = (x_0 - 0.7 * x_t).square().mean()
        best = best_variance(schedule, error)
        lowest = cost(best, t)
        assert all(
            lowest <= cost(best * factor, t) for factor in (0.8, 0.98, 1.02, 1.3)
        )


def test_tables_by_coordinate() -> None:
    schedule = cosine(20)
    error = normal(21, 2, 3).abs()
    whole = best_variance(schedule, error)
    for i, j in ((0, 0), (1, 2)):
        assert torch.equal(whole[1:, i, j], best_variance(schedule, error[:, i, j])[1:])
    with pytest.raises(ValueError, match=r"\[21\]"):
        best_variance(schedule, error[:20, 0, 0])


def test_errors_do_not_depend_on_the_order_of_sums_and_are_cut() -> None:
    schedule, x_0 = linear(50), torch.ones(8, 1, 2)
    error = squared_errors(lambda x, t: 0 * x + 3, schedule, x_0, clip=True)
    assert bool((error[1:] == 0).all())
    error = squared_errors(lambda x, t: 0 * x + 3, schedule, x_0)
    assert bool((error[1:] == 4).all())


def test_the_bound_of_gaussian_data_with_the_best_variance_is_exact() -> None:
    """The gap of the exact reverse chain is KL(q(x_T) || p(x_T)), nearly 0."""
    schedule = linear()
    law = gaussian(torch.zeros(1, dtype=torch.float64), 0.25)
    v = schedule.alpha_bar * 0.25 + schedule.one_minus_alpha_bar
    table = best_variance(schedule, schedule.one_minus_alpha_bar * 0.25 / v)
    table[1] = schedule.beta[1] * v[0] / v[1]
    guess = x_0_guess(denoiser(law, schedule, "x_0"), schedule, "x_0")
    some = torch.Generator().manual_seed(0)
    x_0 = law.sample(400, some)
    bound = variational_bound(
        fixed_variance(guess, schedule, table), schedule, x_0, generator=some
    )
    gap = bound.total + law.log_prob(x_0, 1.0)
    error = gap.std() / 20
    assert abs(gap.mean()) < 4 * error


# --- importance-sampled t


@given(
    T=st.integers(1, 20),
    history=st.integers(1, 5),
    uniform=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_chances_are_chances_and_the_weights_undo_them(
    T: int, history: int, uniform: float, seed: int
) -> None:
    sampler = ImportanceSteps(T, history, uniform)
    losses = normal(T * history, seed=seed)
    sampler.update(torch.arange(1, T + 1).repeat(history), losses)
    assert sampler.ready
    p = sampler.probabilities()
    assert p.shape == (T + 1,)
    assert p[0] == 0
    assert math.isclose(p.sum().item(), 1, abs_tol=1e-12)
    assert bool((p[1:] >= uniform / T - 1e-15).all())
    draw = sampler.draw(50, torch.Generator().manual_seed(seed))
    assert draw.t.dtype == torch.int64
    assert draw.t.min() >= 1
    assert draw.t.max() <= T
    assert torch.allclose(draw.weight * T * p[draw.t], torch.ones(50).double())


def test_uniform_until_every_step_has_its_history() -> None:
    sampler = ImportanceSteps(3, history=2)
    flat = [0.0, 1 / 3, 1 / 3, 1 / 3]
    for t in (1, 1, 1, 2, 2, 3):
        assert sampler.probabilities().tolist() == pytest.approx(flat)
        assert not sampler.ready
        sampler.update(torch.tensor([t]), torch.tensor([float(t)]))
    sampler.update(torch.tensor([3]), torch.tensor([3.0]))
    assert sampler.ready
    expected = [0.0, *(0.999 * k / 6 + 0.001 / 3 for k in (1, 2, 3))]
    assert sampler.probabilities().tolist() == pytest.approx(expected)


def test_the_history_forgets_the_oldest() -> None:
    sampler = ImportanceSteps(1, history=3)
    for value in (100.0, 1.0, 2.0, 2.0):
        sampler.update(torch.tensor([1]), torch.tensor([value]))
    assert sorted(sampler.losses[1].tolist()) == [1, 2, 2]


def test_the_root_mean_square_counts_not_the_mean() -> None:
    sampler = ImportanceSteps(2, history=2, uniform=0.0)
    sampler.update(torch.tensor([1, 1, 2, 2]), torch.tensor([3.0, 4.0, 0.0, 7.0]))
    p = sampler.probabilities()
    assert (p[1] / p[2]).item() == pytest.approx((25 / 49) ** 0.5)


def test_the_weighted_mean_is_unbiased_while_the_history_moves() -> None:
    T, sampler, some = 20, ImportanceSteps(20), torch.Generator().manual_seed(0)
    size = 8.0 ** -torch.arange(T, dtype=torch.float64).div(3)
    wanted, found = size.mean(), []
    for _ in range(4000):
        t, weight = sampler.draw(16, some)
        noise = torch.rand(16, generator=some, dtype=torch.float64) + 0.5
        loss = size[t - 1] * noise
        sampler.update(t, loss)
        found.append(weight * loss)
    late = torch.cat(found[1000:])
    error = late.std() / len(late) ** 0.5
    assert abs(late.mean() - wanted) < 4 * error
    uniform = (size.square() * (1 + 1 / 12)).mean() - wanted**2
    assert late.var() < uniform / 10


def test_losses_of_zero_are_drawn_uniformly() -> None:
    sampler = ImportanceSteps(4, history=1)
    sampler.update(torch.arange(1, 5), torch.zeros(4))
    assert sampler.probabilities()[1:].tolist() == pytest.approx([0.25] * 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"T": 0}, "T must be"),
        ({"history": 0}, "history must be"),
        ({"uniform": 1.5}, "uniform must be"),
    ],
)
def test_numbers_that_are_impossible(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImportanceSteps(**{"T": 5, **change})  # type: ignore[arg-type]


def test_losses_that_do_not_fit_are_refused() -> None:
    sampler = ImportanceSteps(5)
    with pytest.raises(ValueError, match="losses must be finite"):
        sampler.update(torch.tensor([1]), torch.tensor([math.nan]))
    with pytest.raises(ValueError, match="t must"):
        sampler.update(torch.tensor([6]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match="n must be"):
        sampler.draw(0)
    assert sampler.seen.sum() == 0


# --- a wide network from a trained one


@pytest.mark.parametrize("name", ["digits", "fashion28"])
def test_a_widened_network_keeps_its_answers(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    network = UNet(UNET_CONFIGS[name], generator)
    with torch.no_grad():  # a new network answers 0 everywhere
        network.conv_out.weight.normal_(generator=generator)
        network.conv_out.bias.normal_(generator=generator)
    network.eval()
    random_state = torch.get_rng_state()
    wide = widen(network)
    assert torch.equal(random_state, torch.get_rng_state())
    side = network.config.image_size
    x, t = torch.randn(2, 1, side, side, generator=generator), torch.tensor([3, 70])
    with torch.no_grad():
        output, raw = split_output(wide(x, t), x)
        assert torch.allclose(output, network(x, t), atol=1e-5)
    assert bool((raw == 0).all())
    assert not wide.training
    with torch.no_grad():
        wide.conv_in.weight.add_(1.0)
        again = widen(network)
    assert not torch.equal(wide.conv_in.weight, again.conv_in.weight)


def test_the_widened_output_can_be_trained() -> None:
    network = widen(UNet(UNET_CONFIGS["digits"], torch.Generator().manual_seed(0)))
    assert all(p.requires_grad for p in network.parameters())
    x, t = normal(4, 1, 8, 8).float().clamp(-1, 1), torch.tensor([1, 2, 50, 200])
    loss = hybrid_loss(network, cosine(200), x, t, torch.randn_like(x), clip=True)
    loss.mean().backward()  # type: ignore[no-untyped-call]
    for half in network.conv_out.weight.grad.split(1):
        assert half.isfinite().all()
        assert half.abs().sum() > 0


def test_meta_tensors_go_through() -> None:
    schedule = linear(50).to("meta")
    x, t = (
        torch.zeros(2, 1, 4, device="meta"),
        torch.ones(2, dtype=torch.int64, device="meta"),
    )
    layer = nn.Linear(4, 4, device="meta")
    loss = hybrid_loss(
        lambda x, t: torch.cat([layer(x), layer(x)], 1), schedule, x, t, x
    )
    assert loss.shape == (2,)
    assert loss.device.type == "meta"
    loss.mean().backward()  # type: ignore[no-untyped-call]


def test_public_names() -> None:
    assert set(improved.__all__) == {
        "HybridParts",
        "ImportanceSteps",
        "StepDraw",
        "best_variance",
        "hybrid_loss",
        "hybrid_parts",
        "interpolated_variance",
        "learned_reverse",
        "log_variance_range",
        "reverse_chain",
        "split_output",
        "squared_errors",
        "widen",
    }
