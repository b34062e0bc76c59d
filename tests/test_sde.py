"""Continuous time against closed forms, quadrature, and second implementations."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from torch import nn

from ddpm_core import oracles, process, samplers, schedules, sde

F64 = torch.float64
VP = sde.vp_linear()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=F64)


def number(value):
    return torch.tensor(value, dtype=F64)


def line(start, end, n):
    return torch.linspace(start, end, n + 1, dtype=F64)


def mixture():
    return oracles.Mixture(
        number([0.5, 0.3, 0.2]),
        number([[-1.0, 0.4], [0.8, 1.0], [0.5, -1.1]]),
        number([0.09, 0.25, 0.16]),
    )


LAW = mixture()


def score(x, tau):
    return LAW.score(x, VP.alpha_bar(tau))


def curved(x, tau):
    """A velocity whose Jacobian is full and differs from place to place."""
    first = torch.sin(x[:, 0] * x[:, 1])
    second = x[:, 0] * x[:, 1] ** 2 + tau * x[:, 0]
    return torch.stack([first, second], 1)


def curved_divergence(x):
    p, q = x[:, 0], x[:, 1]
    return q * torch.cos(p * q) + 2 * p * q


# The process


@pytest.mark.parametrize(("T", "gap"), [(1000, 0.0677), (2000, 0.0337), (4000, 0.0168)])
def test_the_chain_is_near_its_limit(T, gap):
    log = math.log(schedules.linear(T).alpha_bar[-1].item())
    assert abs(log + VP.spent(number(1.0)).item()) == pytest.approx(gap, abs=5e-5)


@given(st.floats(0.01, 5), st.floats(0, 30), st.floats(0, 1))
def test_what_is_spent_is_the_integral_of_the_rate(low, rise, tau):
    vp = sde.vp_linear(low, low + rise)
    r = line(0, tau, 1)
    area = torch.trapezoid(vp.beta(r), r)  # exact for a straight line
    torch.testing.assert_close(vp.spent(number(tau)), area, rtol=1e-9, atol=1e-12)
    both = vp.alpha_bar(number(tau)) + vp.one_minus_alpha_bar(number(tau))
    assert both.item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("T", [7, 100, 1000])
def test_a_schedule_is_matched_at_every_step(T):
    schedule = schedules.cosine(T)
    vp, t = sde.vp_from_schedule(schedule), torch.arange(T + 1) / T
    alpha_bar = vp.alpha_bar(t.to(F64))
    torch.testing.assert_close(alpha_bar, schedule.alpha_bar, rtol=1e-5, atol=1e-7)
    exact = vp.alpha_bar(torch.arange(T + 1, dtype=F64) / T)
    torch.testing.assert_close(exact, schedule.alpha_bar, rtol=1e-9, atol=0)
    rate = vp.beta((torch.arange(T, dtype=F64) + 0.5) / T)
    torch.testing.assert_close(-(schedule.alpha[1:].log()) * T, rate, rtol=1e-9, atol=0)
    ends = vp.beta(torch.arange(1, T + 1, dtype=F64) / T)
    assert torch.equal(ends, rate)


def test_a_schedule_without_signal_is_refused():
    with pytest.raises(ValueError, match="beta_T = 1"):
        sde.vp_from_schedule(schedules.from_beta(torch.tensor([0.5, 1.0])))


def test_drift_and_diffusion():
    x, tau = noise(3, 2), number(0.25)
    rate = 0.1 + 19.9 * 0.25
    torch.testing.assert_close(sde.drift(VP, x, tau), -rate / 2 * x)
    assert sde.diffusion(VP, tau).item() == pytest.approx(math.sqrt(rate))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: sde.vp_linear(0.0), "above 0"),
        (lambda: sde.vp_linear(2.0, 1.0), "beta_max"),
        (lambda: sde.drift(VP, torch.zeros(1, 1), torch.zeros(1)), "tau"),
        (lambda: sde.diffusion(VP, number(math.nan)), "tau"),
        (lambda: sde.flow(score, torch.zeros(2), line(0, 1, 2)), "batch"),
        (lambda: sde.flow(score, torch.zeros(1, 2), line(0, 0, 2)), "times"),
        (lambda: sde.flow(score, torch.zeros(1, 2), number([0.0])), "number of times"),
        (lambda: sde.flow(score, torch.zeros(1, 2), line(0, 1, 2), "rk5"), "method"),
        (
            lambda: sde.reverse_sde(score, VP, torch.zeros(1, 2), line(0, 1, 2)),
            "must fall",
        ),
        (
            lambda: sde.reverse_sde(score, VP, torch.zeros(1, 2), line(2, 1, 2)),
            "times must lie",
        ),
        (
            lambda: sde.reverse_sde(
                score, VP, torch.zeros(1, 2), line(1, 0, 2), noise=-1.0
            ),
            "noise",
        ),
        (
            lambda: sde.divergence(
                curved, torch.zeros(1, 2), number(0.0), torch.zeros(1, 1, 3)
            ),
            "probes",
        ),
        (lambda: sde.probes_like(torch.zeros(1), kind="cauchy"), "kind"),
        (lambda: sde.probes_like(torch.zeros(1), 0), "n must"),
        (lambda: sde.dequantise(torch.tensor([0.3]), 17), "17 levels"),
        (lambda: sde.dequantise(torch.tensor([1.5]), 17), "x must lie"),
        (lambda: sde.density_bits(torch.zeros(1), 4, 1), "levels"),
    ],
)
def test_bad_input_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_a_field_of_another_shape_is_refused():
    states = sde.flow(lambda x, tau: x[:, :1], torch.zeros(2, 2), line(0, 1, 2))
    with pytest.raises(ValueError, match="velocity"):
        next(states)
    states = sde.reverse_sde(lambda x, tau: x / 0, VP, torch.zeros(2, 2), line(1, 0, 2))
    with pytest.raises(ValueError, match="score must be finite"):
        next(states)


# The reverse SDE


def returned_variance(kappa, n, s2=0.25, u=1.0):
    """Second implementation: the variance recursion of the scheme on N(0, s2)."""
    for k in range(n):
        tau = 1 - k / n
        left = math.exp(-(0.1 * tau + 0.5 * 19.9 * tau**2))
        rate = (0.1 + 19.9 * tau) / n
        v = s2 * left + 1 - left
        u = (1 + rate * (0.5 - (1 + kappa**2) / (2 * v))) ** 2 * u + kappa**2 * rate
    return u


@pytest.mark.parametrize("kappa", [0.0, 0.5, 1.0, 2.0])
def test_variance_is_that_of_the_recursion(kappa):
    law = oracles.gaussian(torch.zeros(1, dtype=F64), 0.25)
    x_1 = noise(20_000, 1)
    x_1 = x_1 / x_1.square().mean().sqrt()
    states = sde.reverse_sde(
        lambda x, tau: law.score(x, VP.alpha_bar(tau)),
        VP,
        x_1,
        line(1, 0, 50),
        noise=kappa,
        generator=seeded(1),
    )
    x = samplers.last(states)
    wanted = returned_variance(kappa, 50)
    error = wanted * math.sqrt(2 / 20_000)
    assert abs(x.square().mean().item() - wanted) < (4 * error if kappa else 1e-9)


@pytest.mark.parametrize("kappa", [0.0, 1.0, 1.5])
def test_recursion_converges_to_the_data_at_first_order(kappa):
    end = 1 - 0.75 * VP.alpha_bar(number(1.0)).item()
    errors = [
        abs(returned_variance(kappa, n, u=end) - 0.25) for n in (2000, 4000, 8000)
    ]
    assert errors[-1] < 3e-3
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2, abs=0.1)


def test_without_noise_it_is_the_flow_by_euler():
    x, times = noise(4, 2), line(1, 0.1, 20)
    generator, before = seeded(4), seeded(4).get_state()
    states = sde.reverse_sde(score, VP, x, times, noise=0.0, generator=generator)
    velocity = sde.flow_velocity(score, VP)
    for state, y in zip(states, sde.flow(velocity, x, times, "euler"), strict=True):
        torch.testing.assert_close(state.x, y, rtol=1e-12, atol=1e-12)
    assert torch.equal(generator.get_state(), before), "nothing is drawn"


def test_states_count_down_and_a_seed_repeats():
    def run():
        return list(
            sde.reverse_sde(score, VP, noise(4, 2), line(1, 0, 5), generator=seeded(3))
        )

    one, two = run(), run()
    assert [s.t for s in one] == [4, 3, 2, 1, 0]
    assert all(torch.equal(a.x, b.x) for a, b in zip(one, two, strict=True))
    tau = number(1.0)
    guess = LAW.x_0(noise(4, 2), VP.alpha_bar(tau))
    torch.testing.assert_close(one[0].x_0, guess, rtol=1e-6, atol=1e-6)


def test_nothing_is_left_changed_when_a_walk_is_broken_off():
    torch.set_grad_enabled(True)
    states = sde.reverse_sde(score, VP, noise(4, 2), line(1, 0, 5))
    next(states)
    assert torch.is_grad_enabled()
    path = sde.flow(sde.flow_velocity(score, VP), noise(4, 2), line(0, 1, 5))
    next(path)
    assert torch.is_grad_enabled()


def test_sde_and_flow_have_the_marginals_of_the_mixture():
    x_1, times = noise(4000, 2), line(1, 0, 400)
    velocity = sde.flow_velocity(score, VP)
    *_, smooth = sde.flow(velocity, x_1, times[::4])
    x = samplers.last(sde.reverse_sde(score, VP, x_1, times, generator=seeded(5)))
    truth = LAW.sample(100_000, seeded(6))
    for ours in (x, smooth):
        for f in (lambda y: y, torch.square, lambda y: (y[:, :1] < 0) * 1.0):
            a, b = f(ours).mean(0), f(truth).mean(0)
            assert ((a - b).abs() < 4.5 * f(truth).std(0) / 4000**0.5).all()


# The flow


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_order_of_the_solver(method, order):
    law = oracles.gaussian(torch.zeros(1, dtype=F64), 0.25)
    velocity = sde.flow_velocity(lambda x, t: law.score(x, VP.alpha_bar(t)), VP)
    v = [VP.alpha_bar(number(t)).item() * -0.75 + 1 for t in (0.0, 1.0)]
    exact = math.sqrt(v[1] / v[0])
    errors = []
    for n in (160, 320):
        *_, x = sde.flow(velocity, torch.ones(1, 1, dtype=F64), line(0, 1, n), method)
        errors.append(abs(x.item() - exact))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def test_flow_agrees_with_scipy():
    x = noise(1, 2)
    velocity = sde.flow_velocity(score, VP)

    def right_side(tau, y):
        return velocity(torch.from_numpy(y.copy())[None], number(tau))[0].numpy()

    answer = solve_ivp(right_side, (0, 1), x[0].numpy(), rtol=1e-10, atol=1e-12)
    *_, ours = sde.flow(velocity, x, line(0, 1, 400))
    wanted = torch.from_numpy(answer.y[:, -1])
    torch.testing.assert_close(ours[0], wanted, rtol=1e-7, atol=1e-7)


def test_flow_there_and_back():
    x = LAW.sample(16, seeded())
    velocity = sde.flow_velocity(score, VP)
    *_, there = sde.flow(velocity, x, line(0, 1, 200))
    *_, back = sde.flow(velocity, there, line(1, 0, 200))
    assert (there - x).abs().max() > 0.1
    torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6)


# Divergence


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.floats(-1, 1))
def test_divergence_of_a_curved_velocity(seed, tau):
    x = noise(5, 2, seed=seed)
    value, exact = sde.divergence(curved, x, number(tau))
    torch.testing.assert_close(exact, curved_divergence(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(value, curved(x, tau))
    assert not value.requires_grad
    signs = number(list(itertools.product((-1.0, 1.0), repeat=2)))
    probes = signs[:, None].expand(4, 5, 2)
    _, mean = sde.divergence(curved, x, number(tau), probes)
    torch.testing.assert_close(mean, exact, rtol=1e-10, atol=1e-10)


def test_divergence_of_images_and_of_parts_that_do_not_depend_on_x():
    x = noise(2, 1, 3, 3)
    _, exact = sde.divergence(lambda x, tau: x**3, x, number(0.0))
    torch.testing.assert_close(exact, (3 * x**2).flatten(1).sum(1))
    _, zero = sde.divergence(lambda x, tau: torch.ones_like(x), x, number(0.0))
    assert torch.equal(zero, torch.zeros(2, dtype=F64))
    layer = nn.Linear(1, 9, dtype=F64)

    def deaf(x, tau):
        return layer(torch.ones(len(x), 1, dtype=F64)).reshape(x.shape)

    assert torch.equal(sde.divergence(deaf, x, number(0.0))[1], zero)
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize("kind", sde.PROBES)
def test_hutchinson_is_unbiased(kind):
    x = noise(1, 2, seed=8).expand(20_000, 2)
    z = sde.probes_like(x, 1, kind, seeded(9))
    each = sde.divergence(curved, x, number(0.3), z)[1]
    exact = curved_divergence(x[:1])
    assert abs(each.mean() - exact) < 4 * each.std() / 20_000**0.5
    p, q = x[0].tolist()
    off = p * math.cos(p * q) + q * q + 0.3
    diagonal = [q * math.cos(p * q), 2 * p * q]
    variance = off**2 + (2 * sum(d * d for d in diagonal) if kind == "gaussian" else 0)
    assert each.var().item() == pytest.approx(variance, rel=0.1)


def test_signs_are_signs_and_normals_are_normal():
    z = sde.probes_like(torch.zeros(100, 50), 3, "rademacher", seeded())
    assert z.shape == (3, 100, 50)
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    assert abs(z.mean()) < 4 / 15_000**0.5
    z = sde.probes_like(torch.zeros(100, 50), 3, "gaussian", seeded())
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / 15_000)
    assert len(z.unique()) > 10_000
    assert sde.probes_like(torch.zeros(2, 2, dtype=F64)).dtype == F64


# Likelihood


def true_end(x):
    return LAW.log_prob(x, VP.alpha_bar(number(1.0)))


def test_likelihood_is_exact_with_the_true_end():
    x, times = LAW.sample(32, seeded(1)), line(0, 1, 130) ** 2
    velocity = sde.flow_velocity(score, VP)
    found = sde.log_likelihood(velocity, x, times, true_end)
    exact = LAW.log_prob(x, 1.0)
    torch.testing.assert_close(found.log_prob, exact, rtol=0, atol=1e-6)


def test_the_end_density_costs_its_own_error():
    x, times = LAW.sample(200, seeded(1)), line(0, 1, 40)
    velocity = sde.flow_velocity(score, VP)
    modelled = sde.log_likelihood(velocity, x, times)
    found = sde.log_likelihood(velocity, x, times, true_end)
    off = sde.standard_normal_log_prob(found.x_end) - true_end(found.x_end)
    wanted = modelled.log_prob - found.log_prob
    torch.testing.assert_close(wanted, off, rtol=0, atol=1e-12)
    assert 1e-3 < off.abs().max() < 1e-2


def test_the_integral_is_the_determinant_of_the_whole_map():
    x, h = LAW.sample(1, seeded(3)), 1e-5
    velocity, times = sde.flow_velocity(score, VP), line(0, 1, 60)
    nothing = sde.log_likelihood(
        velocity, x, times, lambda y: torch.zeros_like(y[:, 0])
    )
    around = x + h * number([[1, 0], [0, 1], [-1, 0], [0, -1]])
    *_, y = sde.flow(velocity, around, times)
    jacobian = (y[:2] - y[2:]) / (2 * h)
    wanted = torch.linalg.slogdet(jacobian)[1]
    assert nothing.log_prob.item() == pytest.approx(wanted.item(), abs=1e-4)


def test_likelihood_with_probes_is_unbiased():
    x = LAW.sample(1, seeded(1)).expand(2000, 2)
    velocity = sde.flow_velocity(score, VP)
    z = sde.probes_like(x, 1, "rademacher", seeded(2))
    times = line(0, 1, 50)
    each = sde.log_likelihood(velocity, x, times, true_end, probes=z).log_prob
    exact = sde.log_likelihood(velocity, x[:1], times, true_end).log_prob
    assert abs(each.mean() - exact) < 4 * each.std() / 2000**0.5
    assert each.std() > 1e-3


def test_standard_normal():
    x = noise(5, 1, 2, 2)
    law = torch.distributions.Normal(0.0, 1.0)
    wanted = law.log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(sde.standard_normal_log_prob(x), wanted)


# The clock of angles


@pytest.mark.parametrize("prediction", process.PREDICTIONS)
def test_a_denoiser_of_any_kind_gives_the_velocity(prediction):
    schedule = schedules.cosine(100)
    model = oracles.denoiser(LAW, schedule, prediction)
    velocity = sde.angle_velocity(model, schedule, prediction)
    nodes, x = sde.angles(schedule), noise(4, 2)
    for t in (1, 40, 99):
        v = LAW.v(x, schedule.alpha_bar[t].item())
        torch.testing.assert_close(velocity(x, nodes[t]), v, rtol=1e-6, atol=1e-6)


def test_angles_and_what_lies_between_them():
    schedule = schedules.linear(100)
    nodes = sde.angles(schedule)
    torch.testing.assert_close(nodes.cos().square(), schedule.alpha_bar)
    assert nodes[0] == 0
    assert (nodes.diff() > 0).all()
    velocity = sde.angle_velocity(lambda x, t: x, schedule, "v")
    for phi in (nodes[0], (nodes[3] + nodes[4]) / 2, nodes[-1] + 0.01):
        with pytest.raises(ValueError, match="phi must be"):
            velocity(torch.zeros(1, 2), phi)


def test_likelihood_on_a_schedules_own_steps():
    schedule = schedules.cosine(150)
    model = oracles.denoiser(LAW, schedule)
    velocity, nodes = sde.angle_velocity(model, schedule), sde.angles(schedule)
    x = LAW.sample(16, seeded(1))
    found = sde.log_likelihood(
        velocity,
        x,
        nodes[1:150],
        lambda x: LAW.log_prob(x, schedule.alpha_bar[149]),
        method="heun",
    )
    exact = LAW.log_prob(x, schedule.alpha_bar[1])
    torch.testing.assert_close(found.log_prob, exact, rtol=0, atol=5e-3)


def test_the_model_is_asked_in_evaluation_mode():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.modes = nn.Dropout(0.5), []

        def forward(self, x, t):
            self.modes.append(self.drop.training)
            return self.drop(x)

    net, schedule = Net(), schedules.linear(100)
    velocity = sde.angle_velocity(net, schedule, "v")
    sde.divergence(velocity, torch.ones(1, 2), sde.angles(schedule)[3])
    assert net.modes == [False]
    assert net.drop.training


# Grey levels


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_dequantised_levels_fill_their_bins(levels):
    x = torch.linspace(-1, 1, levels, dtype=F64).repeat(2000)[:, None]
    y = sde.dequantise(x, levels, seeded())
    place = (y - x) * (levels - 1)
    assert place.abs().max() <= 1
    assert abs(place.mean()) < 4 / math.sqrt(3 * len(x))
    assert place.var().item() == pytest.approx(1 / 3, rel=0.05)


@pytest.mark.parametrize(("levels", "offset"), [(17, 3.0), (256, 6.99435)])
def test_bits_of_a_density(levels, offset):
    zero = torch.zeros(1, dtype=F64)
    assert sde.density_bits(zero, 64, levels).item() == pytest.approx(offset, abs=1e-5)
    width = 2 * levels / (levels - 1)  # all bins side by side
    even = zero - 3 * math.log(width)
    bits = sde.density_bits(even, 3, levels).item()
    assert bits == pytest.approx(math.log2(levels), abs=1e-12)
