"""Ancestral sampling against closed forms, a second implementation and diffusers."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ddpm_core import checks, oracles, process, samplers, schedules

BOTH = [schedules.linear(1000), schedules.cosine(1000)]
by_name = pytest.mark.parametrize("schedule", BOTH, ids=lambda s: s.name)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def zero(x, t):
    return 0 * x


class Net(nn.Module):
    """A model that notes what it is given and how it is set."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        self.steps, self.modes = [], []

    def forward(self, x, t):
        self.steps.append(t.tolist())
        self.modes.append((self.inner[1].training, torch.is_grad_enabled()))
        return self.inner(x)


# p_mean_variance


@by_name
def test_mean_is_algorithm_2_at_every_step(schedule):
    steps = torch.arange(1, schedule.T + 1)
    x, eps = noise(schedule.T, 3), noise(schedule.T, 3, seed=1)
    law = process.p_mean_variance(schedule, x, steps, eps, clip=False)
    beta, bar = schedule.beta[1:, None], schedule.alpha_bar[1:, None]
    line = (x - beta / (1 - bar).sqrt() * eps) / (1 - beta).sqrt()
    # cosine: at t = T x_0 is near 2e4, so its rounding shows in the mean
    torch.testing.assert_close(law.mean, line, rtol=1e-9, atol=1e-9)
    assert law.variance.shape == (schedule.T, 1)


def test_mean_is_algorithm_2_to_1e_12_on_the_linear_schedule():
    schedule = BOTH[0]
    steps = torch.arange(1, 1001)
    x, eps = noise(1000, 3), noise(1000, 3, seed=1)
    law = process.p_mean_variance(schedule, x, steps, eps, clip=False)
    line = process.posterior_mean_from_eps(schedule, x, eps, steps)
    assert (law.mean - line).abs().max() <= 1e-12


@by_name
@pytest.mark.parametrize("prediction", process.PREDICTIONS)
def test_all_predictions_give_one_law(schedule, prediction):
    steps = torch.tensor([1, 2, 500, 990])
    x, x_0 = noise(4, 3), noise(4, 3, seed=1).clamp(-1, 1)
    output = process.from_x_0(schedule, x, steps, x_0, prediction)
    law = process.p_mean_variance(schedule, x, steps, output, prediction=prediction)
    right = process.posterior_mean(schedule, x_0, x, steps)
    torch.testing.assert_close(law.mean, right, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(law.x_0, x_0, rtol=1e-7, atol=1e-7)


@settings(max_examples=50)
@given(t=st.integers(1, 1000), x=st.floats(-5, 5), eps=st.floats(-5, 5))
def test_clipped_law_follows_from_the_clipped_x_0(t, x, eps):
    schedule = BOTH[0]
    steps, x = torch.tensor([t]), torch.tensor([[x]], dtype=torch.float64)
    law = process.p_mean_variance(schedule, x, steps, torch.full_like(x, eps))
    assert law.x_0.abs().max() <= 1
    again = process.from_x_0(schedule, x, steps, law.x_0, "eps")
    line = process.posterior_mean_from_eps(schedule, x, again, steps)
    torch.testing.assert_close(law.mean, line, rtol=1e-10, atol=1e-10)


def test_variance_follows_the_rule():
    steps, x = torch.tensor([1, 7]), torch.zeros(2, 1, 4, 4)
    for rule in process.VARIANCES:
        law = process.p_mean_variance(BOTH[0], x, steps, x, variance=rule)
        table = process.reverse_variance(BOTH[0], rule)
        assert torch.equal(law.variance.flatten(), table[steps].float())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"output": torch.full((2, 3), math.nan)}, "output must be finite"),
        ({"output": torch.zeros(2, 4)}, "output"),
        ({"t": torch.tensor([0, 1])}, "t must lie in"),
        ({"prediction": "noise"}, "prediction"),
        ({"variance": "large"}, "rule"),
    ],
)
def test_p_mean_variance_refuses(change, error):
    given_ = {"x_t": torch.zeros(2, 3), "t": torch.tensor([1, 2])}
    given_ |= {"output": torch.zeros(2, 3), **change}
    with pytest.raises(ValueError, match=error):
        process.p_mean_variance(BOTH[0], **given_)


# against diffusers, with its float32 tables and with ours


def diffusers_scheduler(schedule, variance, exact):
    diffusers = pytest.importorskip("diffusers")
    kind = {"fixed_large": "fixed_large", "fixed_small": "fixed_small"}[variance]
    theirs = diffusers.DDPMScheduler(
        num_train_timesteps=schedule.T,
        trained_betas=schedule.beta[1:].numpy(),
        variance_type=kind,
        clip_sample=False,
    )
    if exact:
        theirs.betas = schedule.beta[1:]
        theirs.alphas = schedule.alpha[1:]
        theirs.alphas_cumprod = schedule.alpha_bar[1:]
        theirs.one = torch.tensor(1.0, dtype=torch.float64)
    return theirs


@by_name
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
@pytest.mark.parametrize(("exact", "bound"), [(True, 1e-10), (False, 1e-3)])
def test_steps_agree_with_diffusers_at_every_t(schedule, variance, exact, bound):
    theirs = diffusers_scheduler(schedule, variance, exact)
    x, eps, z = (noise(1, 8, seed=seed) for seed in (0, 1, 2))
    steps = torch.arange(1, schedule.T + 1)
    rows = schedule.T, 8
    law = process.p_mean_variance(
        schedule, x.expand(rows), steps, eps.expand(rows), variance=variance, clip=False
    )
    ours = law.mean + (law.variance * (steps > 1)[:, None]).sqrt() * z
    other = torch.cat(
        [theirs.step(eps, t - 1, x, generator=seeded(2))[0] for t in steps.tolist()]
    )
    worst = ((ours - other).abs() / law.mean.abs().clamp(min=1)).max()
    assert worst < bound


# the exact chain, by variances


def chain(schedule, s2, start, variance, slip=False):
    table = schedule.alpha_bar * s2 + schedule.one_minus_alpha_bar
    c_0, c_t = process.posterior_mean_coefficients(schedule)
    if slip:
        c_t = c_t / schedule.alpha.sqrt() * schedule.alpha_bar.sqrt()
    gain = c_0 * schedule.alpha_bar.sqrt() * s2 / table + c_t
    w = start
    for t in range(schedule.T, 0, -1):
        w = gain[t] ** 2 * w + variance[t]
    return float(w)


@pytest.mark.parametrize(
    ("s2", "shift", "slipped"),
    [(0.25, 7.6e-11, 0.0356), (1.0, 0.0, 0.0417), (4.0, -7.8e-8, 0.0437)],
)
def test_exact_chain_keeps_the_variance(s2, shift, slipped):
    schedule = BOTH[0]
    v = schedule.alpha_bar * s2 + schedule.one_minus_alpha_bar
    before = torch.cat([v[:1], v[:-1]])
    exact = schedule.beta * before / v
    assert abs(chain(schedule, s2, v[-1], exact) - s2) < 1e-12
    from_one = chain(schedule, s2, 1.0, exact)
    formula = s2 + (1 - v[-1]) * schedule.alpha_bar[-1] * s2**2 / v[-1] ** 2
    assert abs(from_one - formula.item()) < 1e-12
    assert from_one - s2 == pytest.approx(shift, rel=0.01, abs=1e-12)
    assert chain(schedule, s2, 1.0, exact, slip=True) == pytest.approx(
        slipped, abs=1e-4
    )


@pytest.mark.parametrize("variance", process.VARIANCES)
@pytest.mark.parametrize("s2", [0.25, 1.0, 4.0])
def test_sampler_has_the_chain_s_variance(variance, s2):
    """With the exact denoiser the sampler is linear: measured by its own samples."""
    schedule, n = schedules.linear(25), 20_000
    law = oracles.gaussian(torch.zeros(1, dtype=torch.float64), s2)
    x_T = noise(n, 1, seed=3)
    x_T = (x_T - x_T.mean()) / x_T.std()
    options = {"variance": variance, "clip": False, "generator": seeded(4)}
    model = oracles.denoiser(law, schedule)
    out = samplers.last(samplers.ancestral(model, schedule, x_T, **options))
    table = process.reverse_variance(schedule, variance).clone()
    table[1] = 0  # the last step adds no noise
    expected = chain(schedule, s2, 1.0, table)
    assert out.var().item() == pytest.approx(
        expected, abs=5 * expected * (2 / n) ** 0.5
    )


# the loop


def reference(model, schedule, x, generator, small):
    """Algorithm 2 once more, with nothing of the package but the tables."""
    for t in range(schedule.T, 0, -1):
        bar, before = schedule.alpha_bar[t], schedule.alpha_bar[t - 1]
        eps = model(x, torch.full((len(x),), t))
        beta = schedule.beta[t]
        sigma = (beta * (1 - before) / (1 - bar) if small else beta).sqrt()
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype) if t > 1 else 0
        x = (x - beta / (1 - bar).sqrt() * eps) / schedule.alpha[t].sqrt() + sigma * z
    return x


@pytest.mark.parametrize("small", [False, True])
def test_unclipped_equals_algorithm_2(small):
    schedule = schedules.linear(100)
    model = oracles.denoiser(
        oracles.gaussian(torch.zeros(2, dtype=torch.float64), 0.5), schedule
    )
    x_T = noise(20, 2)
    rule = "fixed_small" if small else "fixed_large"
    run = samplers.ancestral(
        model, schedule, x_T, variance=rule, clip=False, generator=seeded(9)
    )
    right = reference(model, schedule, x_T, seeded(9), small)
    assert (samplers.last(run) - right).abs().max() <= 1e-12


def test_states_go_from_T_minus_1_to_0_and_the_model_sees_T_to_1():
    net, x_T = Net(), torch.zeros(3, 2)
    run = samplers.ancestral(net, schedules.linear(30), x_T, generator=seeded())
    states = list(run)
    assert [s.t for s in states] == list(range(29, -1, -1))
    assert net.steps == [[t] * 3 for t in range(30, 0, -1)]
    assert all(s.x.shape == s.x_0.shape == (3, 2) for s in states)
    assert torch.equal(states[-1].x, states[-1].x_0)


def test_respaced_schedule_tells_the_model_its_own_steps():
    kept = [1, 34, 67, 100, 533, 1000]
    net, short = Net(), schedules.respace(BOTH[0], kept)
    samplers.last(samplers.ancestral(net, short, torch.zeros(1, 2)))
    assert net.steps == [[t] for t in reversed(kept)]


def test_no_noise_at_the_last_step():
    short = schedules.from_beta(torch.tensor([0.3]))
    ends = [
        samplers.last(
            samplers.ancestral(zero, short, noise(2, 3), generator=seeded(seed))
        )
        for seed in (1, 2)
    ]
    assert torch.equal(*ends)


def test_a_generator_left_halfway_leaves_every_mode_as_it_was():
    net = Net()
    net.inner[0].eval()
    before = [part.training for part in net.modules()]
    run = samplers.ancestral(net, schedules.linear(), torch.zeros(1, 2))
    for _ in range(2):
        state = next(run)
        assert torch.is_grad_enabled()
        assert [part.training for part in net.modules()] == before
    assert net.modes == [(False, False)] * 2
    assert not state.x.requires_grad
    run.close()
    assert torch.is_grad_enabled()
    with torch.no_grad():
        next(samplers.ancestral(net, schedules.linear(), torch.zeros(1, 2)))
        assert not torch.is_grad_enabled()


def test_modes_come_back_after_an_error_in_the_model():
    class Broken(Net):
        def forward(self, x, t):
            raise RuntimeError("broken")

    net = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        next(samplers.ancestral(net, schedules.linear(), torch.zeros(1, 2)))
    assert net.training
    assert net.inner[1].training
    assert torch.is_grad_enabled()


def test_x_T_is_not_changed_and_a_seed_repeats():
    x_T = noise(2, 3)
    kept = x_T.clone()
    schedule = schedules.linear(30)
    runs = [
        samplers.last(samplers.ancestral(zero, schedule, x_T, generator=seeded(seed)))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(x_T, kept)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_is_that_of_x_T(dtype):
    x_T = torch.zeros(2, 3, dtype=dtype)
    run = samplers.ancestral(zero, schedules.linear(30), x_T, generator=seeded())
    for state in run:
        assert state.x.dtype == state.x_0.dtype == dtype


def test_noise_is_the_same_for_half_and_single_precision():
    single = samplers.noise_like(torch.zeros(50), seeded())
    half = samplers.noise_like(torch.zeros(50, dtype=torch.bfloat16), seeded())
    assert torch.equal(half, single.bfloat16())


def test_runs_on_the_meta_device():
    schedule = schedules.linear(30).to("meta")
    x_T = torch.zeros(2, 1, 8, 8, device="meta")
    states = list(samplers.ancestral(zero, schedule, x_T, generator=seeded()))
    assert len(states) == 30
    assert states[-1].x.device.type == "meta"
    assert states[-1].x.shape == x_T.shape


def test_runs_on_fake_cuda_tensors():
    with FakeTensorMode():
        schedule = schedules.linear(30).to("cuda", torch.float32)
        x_T = torch.zeros(2, 1, 8, 8, device="cuda")
        out = samplers.last(samplers.ancestral(zero, schedule, x_T))
        assert out.device.type == "cuda"
        assert out.shape == x_T.shape


@pytest.mark.parametrize(
    ("x_T", "error"),
    [
        (torch.full((1, 2), math.nan), "x_T must be finite"),
        (torch.full((1, 2), math.inf), "x_T must be finite"),
        (torch.zeros(3), "x_T must be a batch"),
        (torch.zeros(0, 3), "x_T must be a batch"),
        (torch.zeros(1, 2, device="meta"), "schedule.to"),
    ],
)
def test_start_is_checked_at_the_call(x_T, error):
    with pytest.raises(ValueError, match=re.escape(error)):
        samplers.ancestral(zero, schedules.linear(), x_T)


def test_types_are_checked_at_the_call():
    with pytest.raises(TypeError, match="x_T"):
        samplers.ancestral(zero, schedules.linear(), [[0.0]])
    with pytest.raises(TypeError, match="x_T"):
        samplers.ancestral(zero, schedules.linear(), torch.zeros(1, 2).long())
    for option in ({"prediction": "noise"}, {"variance": "large"}):
        with pytest.raises(ValueError, match=next(iter(option))):
            samplers.ancestral(zero, schedules.linear(), torch.zeros(1, 2), **option)


@pytest.mark.parametrize(
    ("model", "error"),
    [
        (lambda x, t: x[:, :1], "the model's output must have the shape of x_t"),
        (lambda x, t: x.to("meta"), "the model's output must lie on the device"),
        (lambda x, t: x / 0, "the model's output must be finite"),
    ],
)
def test_the_model_s_output_is_checked(model, error):
    with pytest.raises(ValueError, match=error):
        next(samplers.ancestral(model, schedules.linear(), torch.zeros(1, 2)))


def test_an_output_that_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match="the model's output"):
        next(samplers.ancestral(lambda x, t: (x,), BOTH[0], torch.zeros(1, 2)))


def test_generator_of_another_device_is_refused():
    class Elsewhere:
        device = torch.device("cuda")

    with pytest.raises(ValueError, match="CPU"):
        samplers.noise_like(torch.zeros(2), Elsewhere())


def test_last_refuses_a_used_up_sampler():
    run = samplers.ancestral(zero, schedules.linear(30), torch.zeros(1, 2))
    samplers.last(run)
    with pytest.raises(ValueError, match="states"):
        samplers.last(run)


def test_zero_terminal_snr_needs_another_prediction():
    bar = torch.linspace(1, 0, 11)
    schedule = schedules.from_alpha_bar(bar)
    x_T = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="eps"):
        next(samplers.ancestral(zero, schedule, x_T))
    out = samplers.last(samplers.ancestral(zero, schedule, x_T, prediction="v"))
    checks.finite("out", out)


def test_exact_denoiser_of_points_ends_in_the_points():
    points = noise(5, 2, seed=5).clamp(-1, 1)
    schedule = schedules.linear(100)
    model = oracles.denoiser(oracles.Empirical(points), schedule)
    run = samplers.ancestral(model, schedule, noise(50, 2), generator=seeded(6))
    distance = torch.cdist(samplers.last(run), points).min(dim=1)
    assert distance.values.max() < 1e-6
    assert len(set(distance.indices.tolist())) == 5


def test_noise_of_a_sample_depends_on_its_own_generator():
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = samplers.noise_like(torch.zeros(2, 3), generators(5, 6))
    for i, seed in enumerate((5, 6)):
        alone = samplers.noise_like(torch.zeros(1, 3), generators(seed))
        assert torch.equal(both[i], alone[0])
    with pytest.raises(ValueError, match="one for each of the 3 samples; got 2"):
        samplers.noise_like(torch.zeros(3, 3), generators(5, 6))
