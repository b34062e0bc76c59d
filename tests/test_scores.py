"""Scores: walks against recursions, losses against exact integrals and Jacobians."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ddpm_core import scores
from ddpm_core.oracles import Mixture, denoiser
from ddpm_core.schedules import cosine, linear

F64 = torch.float64
LAW = Mixture(
    torch.tensor([0.4, 0.6], dtype=F64),
    torch.tensor([[-0.8, 0.3], [0.9, -0.2]], dtype=F64),
    torch.tensor([0.3, 0.2], dtype=F64),
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=seeded(seed))


def last(walk) -> Tensor:
    *_, state = walk
    return getattr(state, "x", state)


# ---- scores and noise predictions


@pytest.mark.parametrize("schedule", [linear(), cosine(50)], ids=lambda s: s.name)
def test_score_is_that_of_the_oracle(schedule) -> None:
    for t in (1, schedule.T // 2, schedule.T):
        x, steps = noise(5, 2), torch.full((5,), t)
        exact = LAW.score(x, schedule.alpha_bar[t])
        eps = denoiser(LAW, schedule)(x, steps)
        found = scores.score_from_eps(schedule, eps, steps)
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)
        back = scores.eps_from_score(schedule, exact, steps)
        torch.testing.assert_close(back, eps, rtol=1e-9, atol=1e-9)


def test_conversion_takes_a_step_for_each_image_and_keeps_the_dtype() -> None:
    eps, t = torch.ones(2, 1, 8, 8), torch.tensor([1, 1000])
    found = scores.score_from_eps(linear(), eps, t)
    assert found.dtype == torch.float32
    assert found[0, 0, 0, 0].item() == pytest.approx(-100, rel=1e-5)
    assert found[1, 0, 0, 0].item() == pytest.approx(-1, rel=1e-4)


@pytest.mark.parametrize("convert", [scores.score_from_eps, scores.eps_from_score])
def test_conversion_refuses(convert) -> None:
    with pytest.raises(ValueError, match="t must"):
        convert(linear(), torch.ones(1, 2), torch.tensor([0]))
    with pytest.raises(TypeError, match="must be a"):
        convert(linear(), 1.0, torch.tensor([1]))


# ---- Langevin


@given(st.floats(0.2, 3.0), st.floats(0.01, 0.99))
def test_gaussian_walk_follows_the_recursion(sigma: float, share: float) -> None:
    """The same noise, moved by hand; the variance settles at the closed form."""
    delta = share * 4 * sigma**2
    walk = scores.langevin(lambda x: -x / sigma**2, noise(3, 1), delta, 4, seeded(1))
    x, generator, factor = noise(3, 1), seeded(1), 1 - delta / (2 * sigma**2)
    for moved in walk:
        x = factor * x + delta**0.5 * torch.randn(3, 1, dtype=F64, generator=generator)
        torch.testing.assert_close(moved, x, rtol=1e-12, atol=1e-12)
    settled = sigma**2 / (1 - delta / (4 * sigma**2))
    assert factor**2 * settled + delta == pytest.approx(settled, rel=1e-9)


def test_stationary_variance_has_the_error_of_the_step() -> None:
    x = torch.zeros(20_000, 1, dtype=F64)
    x = last(scores.langevin(lambda x: -x, x, 1.0, 30, seeded(2)))
    assert abs(x.var().item() / (4 / 3) - 1) < 4 * (2 / 20_000) ** 0.5


def test_walk_samples_a_mixture_whose_modes_touch() -> None:
    law = Mixture(
        torch.tensor([0.3, 0.7], dtype=F64),
        torch.tensor([[-1.0], [1.0]], dtype=F64),
        torch.tensor([0.5, 0.5], dtype=F64),
    )
    x = torch.zeros(4000, 1, dtype=F64)
    x = last(scores.langevin(lambda x: law.score(x, 1.0), x, 0.02, 1000, seeded(3)))
    span = torch.linspace(-8, 8, 4001, dtype=F64)
    density = law.log_prob(span[:, None], 1.0).exp()
    for f in (torch.sin, torch.cos, lambda x: (x > 0).double()):
        exact = torch.trapezoid(f(span) * density, span)
        found = f(x)
        assert abs(found.mean() - exact) < 4 * found.std() / 4000**0.5 + 0.01


def test_walk_keeps_modes_graph_and_input() -> None:
    layer = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).double()
    x = noise(3, 2)
    before = x.clone()
    walk = scores.langevin(layer, x, 0.1, 5, seeded())
    first = next(walk)
    assert layer.training
    assert layer[1].training
    assert torch.is_grad_enabled()
    assert not first.requires_grad
    assert torch.equal(x, before)
    walk.close()


def test_networks_are_asked_in_evaluation_mode() -> None:
    class Telling(nn.Module):
        def forward(self, x: Tensor, sigma: Tensor | None = None) -> Tensor:
            told.append(self.training)
            return -x

    told: list[bool] = []
    net, x = Telling(), torch.zeros(1, 2)
    last(scores.langevin(net, x, 0.1, 2))
    last(scores.annealed_langevin(net, x, torch.ones(1), 0.1, 2))
    assert told == [False] * 4
    assert net.training


def test_one_generator_a_sample_and_one_for_all() -> None:
    x = torch.zeros(2, 3, dtype=F64)
    many = last(scores.langevin(lambda x: -x, x, 0.1, 3, [seeded(5), seeded(6)]))
    alone = last(scores.langevin(lambda x: -x, x[:1], 0.1, 3, [seeded(5)]))
    assert torch.equal(many[:1], alone)


def test_langevin_refuses_at_the_call() -> None:
    x = torch.zeros(2, 2)
    for wrong, match in (
        ({"step_size": -0.1}, "step_size"),
        ({"step_size": math.nan}, "step_size"),
        ({"steps": 0}, "steps"),
        ({"x": torch.full((1, 1), math.inf)}, "x must"),
    ):
        options = {"x": x, "step_size": 0.1, "steps": 1} | wrong
        with pytest.raises(ValueError, match=match):
            scores.langevin(lambda x: -x, **options)
    with pytest.raises(TypeError, match="x must"):
        scores.langevin(lambda x: -x, torch.zeros(2, 2).long(), 0.1, 1)


def test_langevin_refuses_a_bad_score() -> None:
    x = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="shape"):
        next(scores.langevin(lambda x: x[:, :1], x, 0.1, 1))
    with pytest.raises(ValueError, match="score must be finite"):
        next(scores.langevin(lambda x: x / 0, x, 0.1, 1))
    with pytest.raises(TypeError, match="score"):
        next(scores.langevin(lambda x: 1.0, x, 0.1, 1))
    with pytest.raises(ValueError, match="score must be finite"):  # it runs away
        last(scores.langevin(lambda x: 1e9 * x, x + 1, 1.0, 40))


# ---- annealed Langevin


def test_levels_and_step_sizes() -> None:
    levels = scores.geometric_levels(10.0, 0.01, 7)
    torch.testing.assert_close(levels[1:] / levels[:-1], (levels[1] / 10).expand(6))
    assert levels[[0, -1]].tolist() == pytest.approx([10, 0.01])
    sizes = scores.step_sizes(levels, 2e-5)
    torch.testing.assert_close(sizes / levels.square(), (sizes[-1] / 1e-4).expand(7))
    assert sizes[-1].item() == pytest.approx(2e-5)


def test_annealed_walk_tells_level_and_sigma() -> None:
    levels, told = scores.geometric_levels(4.0, 1.0, 3), []

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        told.append(sigma)
        return -x

    walk = list(scores.annealed_langevin(score, torch.zeros(5, 2), levels, 0.1, 2))
    assert [state.level for state in walk] == [0, 0, 1, 1, 2, 2]
    assert [s[0].item() for s in told] == [4, 4, 2, 2, 1, 1]
    assert {(s.shape, s.dtype) for s in told} == {((5,), torch.float32)}


def test_annealed_walk_is_langevin_level_by_level() -> None:
    levels, x = scores.geometric_levels(3.0, 0.5, 2), noise(4, 2)

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        return -x / (1 + sigma[:, None] ** 2)

    made = last(scores.annealed_langevin(score, x, levels, 0.05, 3, seeded(8)))
    generator = seeded(8)
    for sigma, size in ((3.0, 0.05 * 36), (0.5, 0.05)):
        level = torch.full((4,), sigma, dtype=F64)
        for _ in range(3):
            x = scores.langevin_step(lambda x, s=level: score(x, s), x, size, generator)
    torch.testing.assert_close(made, x)


def test_annealed_walk_finds_the_weights() -> None:
    def score(x: Tensor, sigma: Tensor) -> Tensor:
        spread = variances + sigma[0].item() ** 2
        return Mixture(weights, means, spread).score(x, 1.0)

    weights = torch.tensor([0.8, 0.2], dtype=F64)
    means = torch.tensor([[-3.0], [3.0]], dtype=F64)
    variances = torch.full((2,), 0.25, dtype=F64)
    x = 3 * noise(2000, 1, seed=9).sign()
    levels = scores.geometric_levels(6.0, 0.2, 8)
    made = last(scores.annealed_langevin(score, x, levels, 0.008, 60, seeded(10)))
    assert abs((made > 0).double().mean() - 0.2) < 4 * (0.16 / 2000) ** 0.5 + 0.02


def test_annealed_refuses() -> None:
    x, zero = torch.zeros(2, 2), lambda x, sigma: 0 * x
    levels = scores.geometric_levels(2.0, 1.0, 2)
    with pytest.raises(ValueError, match="rise"):
        scores.annealed_langevin(zero, x, levels.flip(0), 0.1, 1)
    with pytest.raises(ValueError, match="above 0"):
        scores.annealed_langevin(zero, x, levels - 1, 0.1, 1)
    with pytest.raises(ValueError, match="steps"):
        scores.annealed_langevin(zero, x, levels, 0.1, 0)
    with pytest.raises(ValueError, match="one or more"):
        scores.step_sizes(torch.zeros(0), 0.1)
    for wrong in ((1.0, 2.0, 3), (1.0, 0.0, 3), (2.0, 1.0, 1), (2.0, 2.0, 4)):
        with pytest.raises(ValueError, match=r"first|count"):
            scores.geometric_levels(*wrong)


# ---- score matching


class Bent(nn.Module):
    """A made-up score with a Jacobian that is not symmetric."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(noise(dim, dim, seed=11))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.matrix.T).tanh().reshape(x.shape) - 0.3 * x


@pytest.mark.parametrize("shape", [(4,), (2, 3)])
def test_implicit_against_the_jacobian(shape: tuple[int, ...]) -> None:
    x = noise(5, *shape)
    model = Bent(x[0].numel())
    found = scores.implicit_score_matching(model, x)
    for i in range(5):
        jacobian = torch.autograd.functional.jacobian(
            lambda y: model(y[None])[0].flatten(), x[i]
        ).reshape(x[i].numel(), -1)
        exact = 0.5 * model(x[i : i + 1]).square().sum() + jacobian.trace()
        torch.testing.assert_close(found[i], exact)


def test_sliced_is_implicit_in_the_mean_over_all_signs() -> None:
    model, x = Bent(4), noise(3, 4)
    signs = torch.tensor(list(product((-1.0, 1.0), repeat=4)), dtype=F64)
    exact = scores.implicit_score_matching(model, x)
    for i in range(3):
        found = scores.sliced_score_matching(model, x[i].expand(16, 4), signs)
        torch.testing.assert_close(found.mean(), exact[i])
        assert found.std() > 0.1


def test_losses_differ_from_the_explicit_one_by_a_constant() -> None:
    """Over a grid, for two models; denoising against the score of the noised law."""
    side = torch.linspace(-5, 5, 161, dtype=F64)
    plane = torch.cartesian_prod(side, side)
    mass = LAW.log_prob(plane, 1.0).softmax(0)
    gaps = []
    for seed in (1, 2):
        model = Bent(2)
        model.matrix.data = noise(2, 2, seed=seed)
        explicit = 0.5 * (model(plane) - LAW.score(plane, 1.0)).square().sum(1)
        implicit = scores.implicit_score_matching(model, plane)
        gaps.append((mass * (explicit - implicit)).sum().item())
    assert gaps[0] == pytest.approx(gaps[1], abs=1e-6)
    half = 0.5 * (mass * LAW.score(plane, 1.0).square().sum(1)).sum().item()
    assert gaps[0] == pytest.approx(half, abs=1e-6)


def test_denoising_is_least_at_the_score_of_the_noised_law() -> None:
    x_0, eps = LAW.sample(40_000, seeded(12)), noise(40_000, 2, seed=13)
    sigma = torch.tensor([0.3, 1.0], dtype=F64).repeat(20_000)

    def exact(x: Tensor, level: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for s in (0.3, 1.0):
            noised = Mixture(LAW.weights, LAW.means, LAW.variances + s**2)
            out[level == s] = noised.score(x[level == s], 1.0)
        return out

    best = scores.denoising_score_matching(exact, x_0, sigma, eps)
    for other in (
        lambda x, s: 1.1 * exact(x, s),
        lambda x, s: exact(x, s) + 0.1,
        lambda x, s: LAW.score(x, 1.0),
    ):
        worse = scores.denoising_score_matching(other, x_0, sigma, eps)
        assert (worse - best).mean() > 0
    assert best.shape == (40_000,)


def test_denoising_is_half_the_noise_error() -> None:
    x_0, eps, sigma = noise(3, 1, 4, 4), noise(3, 1, 4, 4, seed=1), noise(3).abs()
    guess = noise(3, 1, 4, 4, seed=2)
    loss = scores.denoising_score_matching(
        lambda x, s: -guess / s.reshape(-1, 1, 1, 1), x_0, sigma, eps
    )
    torch.testing.assert_close(loss, 0.5 * (eps - guess).square().flatten(1).sum(1))


def test_denoising_asks_at_the_noised_point() -> None:
    x_0, eps, seen = noise(3, 2), noise(3, 2, seed=1), []

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append((x, sigma))
        return -x

    sigma = torch.tensor([0.1, 1.0, 7.0], dtype=F64)
    scores.denoising_score_matching(model, x_0, sigma, eps)
    ((x, told),) = seen
    torch.testing.assert_close(x, x_0 + sigma[:, None] * eps)
    assert torch.equal(told, sigma)


def test_losses_give_gradients_also_under_no_grad() -> None:
    model, x, v = Bent(2), noise(4, 2), noise(4, 2, seed=1).sign()
    with torch.no_grad():
        quiet = scores.sliced_score_matching(model, x, v)
    loud = scores.sliced_score_matching(model, x, v)
    torch.testing.assert_close(quiet, loud)
    for loss in (loud, scores.implicit_score_matching(model, x)):
        (gradient,) = torch.autograd.grad(loss.mean(), model.matrix)
        assert gradient.abs().min() > 0


def test_losses_refuse() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="v must"):
        scores.sliced_score_matching(lambda x: -x, x, x[:1])
    with pytest.raises(ValueError, match="score must"):
        scores.implicit_score_matching(lambda x: x[:, :1], x)
    with pytest.raises(ValueError, match="finite"):
        scores.implicit_score_matching(lambda x: -x, x / 0)
    with pytest.raises(ValueError, match="above 0"):
        scores.denoising_score_matching(lambda x, s: x, x, torch.zeros(2), x)
    with pytest.raises(ValueError, match="sigma must have shape"):
        scores.denoising_score_matching(lambda x, s: x, x, torch.ones(3), x)
    with pytest.raises(ValueError, match="eps must"):
        scores.denoising_score_matching(lambda x, s: x, x, torch.ones(2), x[:1])


def test_all_stays_on_the_device() -> None:
    x = torch.zeros(2, 3, device="meta")
    walk = scores.annealed_langevin(
        lambda x, s: -x / s[:, None], x, scores.geometric_levels(2.0, 1.0, 2), 0.1, 2
    )
    assert {state.x.device.type for state in walk} == {"meta"}
    loss = scores.sliced_score_matching(lambda x: -x, x, x)
    assert loss.device.type == "meta"
    s = torch.ones(2, device="meta")
    loss = scores.denoising_score_matching(lambda x, s: -x, x, s, x)
    assert loss.device.type == "meta"
