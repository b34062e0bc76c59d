"""Short chains, DDIM, Heun and DPM-Solver++ against closed forms and diffusers."""

import inspect
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ddpm_core import oracles, process, samplers, schedules
from ddpm_core.samplers import ddim, dpm_solver_2m, heun, kept_steps, last
from ddpm_core.schedules import respace

# 1 - alpha_bar is exact here: after a thousand sums it is off by 1e-14, and respacing
# divides that by alpha_bar, which is small at the noisy end.
LINEAR, COSINE = (
    schedules.from_alpha_bar(schedule.alpha_bar, schedule.name)
    for schedule in (schedules.linear(1000), schedules.cosine(1000))
)
DETERMINISTIC = [ddim, heun, dpm_solver_2m]
ALL = [samplers.ancestral, *DETERMINISTIC, samplers.ddim_inversion]
each = pytest.mark.parametrize("sampler", ALL, ids=lambda s: s.__name__)
by_name = pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=lambda s: s.name)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def zero(x, t):
    return 0 * x


def bent(x, t):
    """A model without weights: neither linear nor the same at every step."""
    return 0.6 * x + 0.3 * torch.sin(2 * x + t.reshape(-1, 1) / 90)


def short(schedule, steps, spacing="trailing"):
    return respace(schedule, kept_steps(schedule.T, steps, spacing))


def near(a, b, bound):
    worst = ((a - b).abs() / b.abs().clamp(min=1)).max().item()
    assert worst <= bound, worst


# Which steps


@given(T=st.integers(1, 1200), data=st.data())
def test_kept_steps_are_as_many_as_asked_for_and_end_where_they_should(T, data):
    S = data.draw(st.integers(1, T))
    for spacing in samplers.SPACINGS:
        kept = kept_steps(T, S, spacing)
        assert len(kept) == len(set(kept)) == S
        assert kept == sorted(kept)
        assert 1 <= kept[0] <= kept[-1] <= T
        assert (kept[0] == 1) or spacing == "trailing" or S == 1
        assert (kept[-1] == T) or spacing == "leading"
        gaps = [b - a for a, b in itertools.pairwise(kept)]
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_kept_steps_printed():
    assert kept_steps(1000, 4) == [250, 500, 750, 1000]
    assert kept_steps(1000, 4, "leading") == [1, 251, 501, 751]
    assert kept_steps(1000, 4, "linspace") == [1, 334, 667, 1000]
    assert [kept_steps(50, 1, s) for s in samplers.SPACINGS] == [[1], [50], [50]]
    for spacing, ends in (
        ("leading", (1, 937)),
        ("trailing", (19, 1000)),
        ("linspace", (1, 1000)),
    ):
        kept = kept_steps(1000, 53, spacing)
        assert (kept[0], kept[-1], len(kept)) == (*ends, 53)


@pytest.mark.parametrize("spacing", samplers.SPACINGS)
@pytest.mark.parametrize("S", [2, 5, 7, 10, 20, 50, 53, 250, 999, 1000])
def test_kept_steps_are_those_of_diffusers(spacing, S):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(S)
    found = (theirs.timesteps.flip(0) + 1).tolist()
    ours = kept_steps(1000, S, spacing)
    if (S, spacing) == (53, "linspace"):  # 26 * 999 / 52 is 499.5, theirs a bit less
        assert (ours[26], found[26]) == (501, 500)
        found[26] = 501
    assert found == ours


@pytest.mark.parametrize("S", [2, 7, 20, 53])
def test_multistep_schedulers_drop_the_lowest_of_one_step_more(S):
    """The convention that the chapter's table names."""
    diffusers = pytest.importorskip("diffusers")
    for spacing in ("linspace", "leading"):
        theirs = diffusers.DPMSolverMultistepScheduler(timestep_spacing=spacing)
        theirs.set_timesteps(S)
        found = (theirs.timesteps.flip(0) + 1).tolist()
        assert found == kept_steps(1000, S + 1, spacing)[1:]


@pytest.mark.parametrize(
    ("given_", "error", "message"),
    [
        ((0, 1), ValueError, "T must"),
        ((10, 0), ValueError, "steps must"),
        ((10, 11), ValueError, "steps must be an integer from 1 to 10"),
        ((10, 2.0), TypeError, "steps must"),
        ((10, 2, "even"), ValueError, "spacing must be one of 'leading'"),
    ],
)
def test_kept_steps_refuses(given_, error, message):
    with pytest.raises(error, match=message):
        kept_steps(*given_)


@by_name
@pytest.mark.parametrize("spacing", samplers.SPACINGS)
def test_beta_of_the_kept_chain(schedule, spacing):
    kept = kept_steps(1000, 53, spacing)
    chain = respace(schedule, kept)
    bar = torch.cat([schedule.alpha_bar[:1], schedule.alpha_bar[kept]])
    torch.testing.assert_close(chain.beta[1:], 1 - bar[1:] / bar[:-1])
    assert (chain.beta[1:] > schedule.beta[kept]).any()


# One way of calling them, and how they behave as generators


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


def test_all_samplers_are_called_alike():
    first = list(inspect.signature(samplers.ancestral).parameters.values())[:6]
    for sampler in DETERMINISTIC:
        own = list(inspect.signature(sampler).parameters.values())[:6]
        assert own == first, sampler.__name__
    inverse = list(inspect.signature(samplers.ddim_inversion).parameters)
    assert inverse == ["model", "schedule", "x_0", "prediction", "clip", "generator"]


KEPT = [3, 40, 41, 500, 1000]
ASKED = {
    "ancestral": KEPT[::-1],
    "ddim": KEPT[::-1],
    "dpm_solver_2m": KEPT[::-1],
    "heun": [1000, 500, 500, 41, 41, 40, 40, 3, 3],
    "ddim_inversion": [3, 3, 40, 41, 500],
}


@each
def test_states_and_the_steps_that_the_model_is_told(sampler):
    net = Net()
    run = list(sampler(net, respace(LINEAR, KEPT), torch.zeros(3, 2)))
    down = [4, 3, 2, 1, 0]
    assert [s.t for s in run] == (
        [1, 2, 3, 4, 5] if "inv" in sampler.__name__ else down
    )
    assert net.steps == [[t] * 3 for t in ASKED[sampler.__name__]]
    assert all(s.x.shape == s.x_0.shape == (3, 2) for s in run)


@each
def test_a_generator_left_halfway_leaves_every_mode_as_it_was(sampler):
    net = Net()
    net.inner[0].eval()
    modes = [part.training for part in net.modules()]
    run = sampler(net, short(LINEAR, 10), torch.zeros(1, 2))
    for _ in range(2):
        state = next(run)
        assert torch.is_grad_enabled()
        assert [part.training for part in net.modules()] == modes
    assert set(net.modes) == {(False, False)}
    assert not state.x.requires_grad
    run.close()
    assert torch.is_grad_enabled()


@each
def test_two_runs_at_once_do_not_disturb_each_other(sampler):
    chain, x = short(LINEAR, 8), noise(2, 3)
    alone = [s.x for s in sampler(bent, chain, x, generator=seeded(1))]
    one = sampler(bent, chain, x, generator=seeded(1))
    other = sampler(bent, chain, 2 * x, generator=seeded(2))
    for (a, _), right in zip(zip(one, other, strict=True), alone, strict=True):
        assert torch.equal(a.x, right)


@pytest.mark.parametrize("sampler", [*DETERMINISTIC, samplers.ddim_inversion])
def test_nothing_is_drawn_where_nothing_is_random(sampler):
    generator, x = seeded(3), noise(2, 3)
    state, kept = generator.get_state(), x.clone()
    first = last(sampler(bent, short(COSINE, 6), x, generator=generator))
    assert torch.equal(generator.get_state(), state)
    assert torch.equal(x, kept)
    assert torch.equal(first, last(sampler(bent, short(COSINE, 6), x)))


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_is_that_of_x_T(sampler, dtype):
    for state in sampler(zero, short(LINEAR, 4), torch.zeros(2, 3, dtype=dtype)):
        assert state.x.dtype == state.x_0.dtype == dtype


@each
def test_no_number_of_the_device_is_looked_at(sampler):
    """On the meta device any look, such as .item(), is an error."""
    chain = short(LINEAR, 6).to("meta")
    run = list(sampler(zero, chain, torch.zeros(2, 1, 8, 8, device="meta")))
    assert len(run) == 6
    assert run[-1].x.device.type == "meta"
    assert run[-1].x.shape == (2, 1, 8, 8)


@each
def test_runs_on_fake_cuda_tensors(sampler):
    with FakeTensorMode():
        chain = short(schedules.linear(1000), 6).to("cuda", torch.float32)
        out = last(sampler(zero, chain, torch.zeros(2, 1, 8, 8, device="cuda")))
        assert out.device.type == "cuda"


@each
def test_a_function_may_cut_x_0(sampler):
    chain, x = short(LINEAR, 6), 3 * noise(4, 2)
    runs = [
        last(sampler(bent, chain, x, clip=clip, generator=seeded(1)))
        for clip in (True, lambda x_0: x_0.clamp(-1, 1), False, lambda x_0: x_0)
    ]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[2], runs[3])
    assert not torch.equal(runs[0], runs[2])


@each
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"clip": 1}, TypeError, "clip must be True, False or a function"),
        ({"prediction": "noise"}, ValueError, "prediction must be one of"),
        ({"x": torch.full((1, 2), math.nan)}, ValueError, "x_[T0] must be finite"),
        ({"x": torch.zeros(3)}, ValueError, "x_[T0] must be a batch"),
        ({"x": torch.zeros(1, 2).long()}, TypeError, "x_[T0]"),
        ({"x": torch.zeros(1, 2, device="meta")}, ValueError, "schedule.to"),
    ],
)
def test_bad_input_is_refused_at_the_call(sampler, change, error, message):
    options = {"clip": True, **change}
    x = options.pop("x", torch.zeros(1, 2))
    with pytest.raises(error, match=message):
        sampler(zero, LINEAR, x, **options)


@each
def test_a_cut_of_another_shape_is_refused(sampler):
    with pytest.raises(ValueError, match="what clip returns"):
        next(sampler(zero, LINEAR, torch.zeros(1, 2), clip=lambda x_0: x_0[:, :1]))


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_eta_lies_between_0_and_1(eta):
    with pytest.raises(ValueError, match="eta must be a finite number"):
        ddim(zero, LINEAR, torch.zeros(1, 2), eta=eta)


@pytest.mark.parametrize("sampler", DETERMINISTIC)
@pytest.mark.parametrize("S", [1, 2, 3, 10])
def test_zero_terminal_snr(sampler, S):
    """alpha_bar_T = 0: no eps-prediction, but x_0 and v do, and every state is finite."""
    bar = torch.linspace(1, 0, 11, dtype=torch.float64)
    chain = short(schedules.from_alpha_bar(bar), S)
    x = noise(4, 2)
    with pytest.raises(ValueError, match="eps"):
        next(sampler(bent, chain, x))
    for prediction in ("v", "x_0"):
        for state in sampler(bent, chain, x, prediction=prediction):
            assert state.x.isfinite().all()


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_one_step_is_the_prediction(sampler):
    chain, x = short(LINEAR, 1), noise(4, 2)
    (state,) = sampler(bent, chain, x)
    assert torch.equal(state.x, state.x_0)
    exact = oracles.denoiser(oracles.Empirical(x[:1] / 9), LINEAR)
    assert torch.allclose(last(sampler(exact, chain, x)), x[:1] / 9, atol=1e-12)


# eta = 1 is the ancestral sampler


@by_name
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("S", [2, 7, 53, 1000])
@pytest.mark.parametrize("spacing", samplers.SPACINGS)
def test_eta_1_is_ancestral_sampling_with_the_small_variance(
    schedule, clip, S, spacing
):
    chain, x_T = short(schedule, S, spacing), noise(5, 3)
    runs = {}
    for rule in ("fixed_small", "fixed_large"):
        run = samplers.ancestral(
            bent, chain, x_T, clip=clip, generator=seeded(1), variance=rule
        )
        runs[rule] = list(run)
    ours = [s.x for s in ddim(bent, chain, x_T, clip=clip, generator=seeded(1), eta=1)]
    largest = 1.0  # a large x or x_0 on the way leaves its rounding behind
    for a, b in zip(ours, runs["fixed_small"], strict=True):
        largest = max(largest, b.x.abs().max().item(), b.x_0.abs().max().item())
        assert (a - b.x).abs().max() <= 1e-12 * largest
    if S > 2:
        assert (ours[-1] - runs["fixed_large"][-1].x).abs().max() > 1e-6


@settings(max_examples=60)
@given(
    kept=st.sets(st.integers(1, 1000), min_size=2, max_size=12).map(sorted),
    clip=st.booleans(),
)
def test_eta_1_is_ancestral_sampling_for_any_subset(kept, clip):
    chain, x_T = respace(LINEAR, kept), noise(3, 2, seed=len(kept))
    options = {"clip": clip, "generator": seeded(1)}
    run = samplers.ancestral(bent, chain, x_T, variance="fixed_small", **options)
    theirs = torch.stack([y for state in run for y in (state.x_0, state.x)])
    end = last(ddim(bent, chain, x_T, clip=clip, generator=seeded(1), eta=1))
    largest = theirs.abs().max().clamp(min=1)
    assert (end - theirs[-1]).abs().max() <= 1e-12 * largest


def test_noise_is_recomputed_after_clipping():
    """The number by which forgetting it shows."""
    chain, x = short(LINEAR, 10), 3 * noise(4, 2)
    state = next(ddim(bent, chain, x))
    steps = torch.full((4,), 10)
    own = bent(x, torch.full((4,), 1000))
    signal, direction, _ = (u[10] for u in samplers.ddim_tables(chain, 0.0))
    forgotten = signal * state.x_0 + direction * own
    assert (state.x - forgotten).abs().max() > 0.1
    eps = process.from_x_0(chain, x, steps, state.x_0, "eps")
    near(state.x, signal * state.x_0 + direction * eps, 1e-12)


@by_name
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_variance_is_eta_squared(schedule, eta):
    chain = short(schedule, 20)
    _, direction, sigma = samplers.ddim_tables(chain, eta)
    small = process.posterior_variance(chain)
    torch.testing.assert_close(sigma[1:] ** 2, eta**2 * small[1:])
    whole = direction**2 + sigma**2
    torch.testing.assert_close(whole[1:], chain.one_minus_alpha_bar[:-1])


# Against diffusers: each step from our own state before it


BOUNDS = [(True, 1e-12), (False, 1e-5)]
exactly = pytest.mark.parametrize(
    ("exact", "bound"), BOUNDS, ids=["float64", "shipped"]
)


def theirs_of(kind, schedule, exact, **options):
    diffusers = pytest.importorskip("diffusers")
    theirs = getattr(diffusers, kind)(
        num_train_timesteps=1000, trained_betas=schedule.beta[1:].numpy(), **options
    )
    if exact:
        theirs.alphas_cumprod = schedule.alpha_bar[1:]
    return theirs


@exactly
@by_name
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("S", [10, 50])
def test_ddim_steps_agree_with_diffusers(schedule, exact, bound, eta, clip, S):
    """Trailing, S dividing T: there its step before is the kept step before."""
    theirs = theirs_of(
        "DDIMScheduler",
        schedule,
        exact,
        clip_sample=clip,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )
    if exact:
        theirs.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    theirs.set_timesteps(S)
    x, fresh = noise(3, 4), seeded(2)
    run = ddim(bent, short(schedule, S), x, clip=clip, generator=seeded(2), eta=eta)
    for i, state in enumerate(run):
        t = int(theirs.timesteps[i])
        z = samplers.noise_like(x, fresh) if state.t and eta else torch.zeros_like(x)
        output = bent(x, torch.full((3,), t + 1))
        other = theirs.step(
            output,
            t,
            x,
            eta=eta,
            use_clipped_model_output=True,
            variance_noise=z if eta else None,
            return_dict=False,
        )[0]
        if i == 0 and schedule is COSINE:  # at eta 1 theirs takes 1 - ... - sigma^2
            near(state.x, other, 1e-10 if exact else 2e-4)
        else:
            near(state.x, other, bound)
        x = state.x


@exactly
@by_name
@pytest.mark.parametrize("spacing", samplers.SPACINGS)
@pytest.mark.parametrize("S", [2, 7, 20])
def test_dpm_solver_steps_agree_with_diffusers(schedule, exact, bound, spacing, S):
    theirs = theirs_of("DPMSolverMultistepScheduler", schedule, exact)
    kept = kept_steps(1000, S, spacing)
    theirs.set_timesteps(timesteps=[k - 1 for k in reversed(kept)])
    chain, x, guesses = respace(schedule, kept), noise(3, 4), []
    if exact:
        theirs.sigmas = samplers.sigma_bar(chain).flip(0)
    for i, state in enumerate(dpm_solver_2m(bent, chain, x, clip=False)):
        if exact:  # its step() casts to float32, the updates behind it do not
            theirs._step_index = i
            guesses.append(state.x_0)
            if i in (0, S - 1):
                other = theirs.dpm_solver_first_order_update(guesses[-1], sample=x)
            else:
                other = theirs.multistep_dpm_solver_second_order_update(
                    guesses[-2:], sample=x
                )
        else:
            output = bent(x, torch.full((3,), kept[-1 - i]))
            t = theirs.timesteps[i]
            other = theirs.step(output.float(), t, x.float()).prev_sample.double()
            guesses.append(theirs.model_outputs[-1])
        if not exact and schedule is COSINE and i < 2:
            bound = 2e-4
        elif not exact and kept[0] == 1:
            bound = 5e-5  # its float32 holds four digits of 1 - alpha_bar_1
        near(state.x, other, bound)
        x = state.x


@exactly
@by_name
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("S", [2, 7, 20])
def test_heun_steps_agree_with_diffusers(schedule, exact, bound, clip, S):
    """Its x is ours over the root of alpha_bar."""
    theirs = theirs_of("HeunDiscreteScheduler", schedule, exact, clip_sample=clip)
    kept = kept_steps(1000, S)
    chain, x = respace(schedule, kept), noise(3, 4)
    theirs.set_timesteps(timesteps=[k - 1 for k in reversed(kept)])
    if exact:
        levels = samplers.sigma_bar(chain).flip(0)
        twice = levels[1:-1].repeat_interleave(2)
        theirs.sigmas = torch.cat([levels[:1], twice, levels[-1:]])
    run = iter(heun(bent, chain, x, clip=clip))
    for state, k in zip(run, reversed(kept), strict=True):
        root = chain.alpha_bar[state.t].sqrt()
        steps = [k] if state.t == 0 else [k, kept[state.t - 1]]
        x_bar, reached = x / chain.alpha_bar[state.t + 1].sqrt(), []
        for k_asked in steps:
            i = theirs.step_index or 0
            scaled = x_bar / (theirs.sigmas[i].double() ** 2 + 1).sqrt()
            output = bent(scaled, torch.full((3,), k_asked))
            x_bar = theirs.step(output, theirs.timesteps[i], x_bar).prev_sample
            reached.append(x_bar)
        high, low = samplers.sigma_bar(chain)[[state.t + 1, state.t]]
        x_bar = reached[0 if high > samplers.STEEP * low else -1]  # ours stays Euler's
        if clip:  # x_bar is as large as sigma_bar, and the slopes' difference small
            lost = chain.alpha_bar[state.t + 1].rsqrt().item()
            near(state.x, root * x_bar, bound * max(1, lost**2))
        else:
            first_of_cosine = state.t == S - 1 and schedule is COSINE and not exact
            near(state.x, root * x_bar, 2e-4 if first_of_cosine else bound)
        x = state.x


def test_a_steep_step_stays_eulers():
    """With a network's small errors Heun's mean would multiply them by sigma_bar / 2."""
    x = noise(50, 1)

    def erring(x, t):
        return oracles.denoiser(NARROW, COSINE)(x, t) + 0.01

    for S in (5, 20):
        chain = short(COSINE, S)
        first = next(heun(erring, chain, x)).x
        assert torch.equal(first, next(ddim(erring, chain, x)).x)
        assert last(heun(erring, chain, x)).abs().max() <= 1
    gentle = short(LINEAR, 20)
    first = next(heun(erring, gentle, x)).x
    assert not torch.equal(first, next(ddim(erring, gentle, x)).x)


def test_the_slip_eta_beta_tilde_would_show_at_one_half():
    chain = short(LINEAR, 20)
    _, _, sigma = samplers.ddim_tables(chain, 0.5)
    slip = (0.5 * process.posterior_variance(chain)).sqrt()
    assert (slip[2:] / sigma[2:] > 1.4).all()


# The flow: closed forms on Gaussian data


S2 = 0.25
NARROW = oracles.gaussian(torch.zeros(1, dtype=torch.float64), S2)


def vp_grid(steps):
    """Equal steps in lambda on the continuous schedule; entry 1 is time 1e-3."""
    taus = torch.tensor([1e-3, 1.0], dtype=torch.float64)
    bar = torch.exp(-0.1 * taus - 9.95 * taus**2)
    first, final = (0.5 * (bar / (1 - bar)).log()).tolist()
    times = torch.linspace(first, final, steps + 1, dtype=torch.float64)
    return schedules.from_alpha_bar(
        torch.cat([torch.ones(1).double(), (2 * times).sigmoid()])
    )


def to_entry_1(sampler, chain, x):
    model = oracles.denoiser(NARROW, chain)
    return next(s.x for s in sampler(model, chain, x, clip=False) if s.t == 1)


def spread_of(chain, t):
    return (chain.alpha_bar[t] * S2 + chain.one_minus_alpha_bar[t]).sqrt()


@pytest.mark.parametrize(
    ("sampler", "order"), [(ddim, 1), (heun, 2), (dpm_solver_2m, 2)]
)
def test_order_of_each_sampler(sampler, order):
    counts, errors = (80, 160, 320, 640), []
    for steps in counts:
        chain = vp_grid(steps)
        x = to_entry_1(sampler, chain, torch.ones(1, 1, dtype=torch.float64))
        exact = spread_of(chain, 1) / spread_of(chain, -1)
        errors.append((x - exact).abs().item())
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert sum(slopes) / len(slopes) == pytest.approx(order, abs=0.05)


def test_ddim_on_gaussian_data_has_a_closed_form():
    chain = short(LINEAR, 25)
    levels = samplers.sigma_bar(chain)
    factors = 1 + (levels[:-1] - levels[1:]) * levels[1:] / (S2 + levels[1:] ** 2)
    model = oracles.denoiser(NARROW, LINEAR)
    end = last(ddim(model, chain, torch.ones(1, 1).double(), clip=False))
    right = factors.prod() / chain.alpha_bar[-1].sqrt()
    assert end.item() == pytest.approx(right.item(), rel=1e-12)


def test_inversion_on_gaussian_data_has_a_closed_form():
    chain = short(LINEAR, 25)
    levels = samplers.sigma_bar(chain)
    here = torch.cat([levels[1:2], levels[1:-1]])  # the first is asked at step 1
    bars = 1 / (1 + here**2)
    x_bar = torch.ones((), dtype=torch.float64)
    for i in range(25):
        before = chain.alpha_bar[i].sqrt() * x_bar
        eps = here[i] * bars[i].sqrt() / (1 - bars[i] + bars[i] * S2) * before
        x_bar = x_bar + (levels[i + 1] - levels[i]) * eps
    model = oracles.denoiser(NARROW, LINEAR)
    run = samplers.ddim_inversion(model, chain, torch.ones(1, 1).double())
    right = chain.alpha_bar[-1].sqrt() * x_bar
    assert last(run).item() == pytest.approx(right.item(), rel=1e-9)


def test_the_round_trip_closes_as_1_over_S():
    gaps, x = [], noise(20, 1, seed=3) / 2
    for S in (50, 100, 200, 400):
        chain = vp_grid(S)
        model = oracles.denoiser(NARROW, chain)
        up = last(samplers.ddim_inversion(model, chain, x))
        gaps.append((last(ddim(model, chain, up, clip=False)) - x).abs().max().item())
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(gaps)]
    assert all(abs(s - 1) < 0.1 for s in slopes), slopes


def test_tables_of_the_solver():
    chain = short(LINEAR, 5)
    keep, gain, share = samplers.dpm_tables(chain)
    times = samplers.half_log_snr(chain)
    torch.testing.assert_close(times, 0.5 * chain.snr.log())
    h = times[:-1] - times[1:]
    torch.testing.assert_close(gain[1:], chain.alpha_bar[:-1].sqrt() * (1 - (-h).exp()))
    torch.testing.assert_close(
        keep[1:] ** 2, chain.one_minus_alpha_bar[:-1] / chain.one_minus_alpha_bar[1:]
    )
    assert share[[1, 5]].tolist() == [0, 0]
    torch.testing.assert_close(share[2:5], h[1:4] / (2 * h[2:5]))


def test_same_noise_same_image_for_every_number_of_steps():
    points = noise(5, 2, seed=5).clamp(-1, 1)
    model = oracles.denoiser(
        oracles.Mixture(
            torch.full((5,), 0.2).double(), points, torch.full((5,), 0.01).double()
        ),
        LINEAR,
    )
    x_T = noise(50, 2)
    ends = [last(ddim(model, short(LINEAR, S), x_T)) for S in (10, 50, 250, 1000)]
    gaps = [(end - ends[-1]).square().mean().sqrt().item() for end in ends[:-1]]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 0.05


# Slerp


@given(weight=st.floats(0, 1), seed=st.integers(0, 9))
def test_slerp_keeps_the_length_and_divides_the_angle(weight, seed):
    a, b = noise(2, 3, 4, seed=seed)
    a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
    c = samplers.slerp(a, b, weight)
    torch.testing.assert_close(c.norm(dim=1), torch.ones(3).double())
    whole, part = (a * b).sum(1).acos(), (a * c).sum(1).clamp(-1, 1).acos()
    torch.testing.assert_close(part, weight * whole, rtol=1e-5, atol=1e-6)


def test_slerp_of_images_ends_and_parallel_noises():
    a, b = noise(2, 2, 1, 4, 4, dtype=torch.float32)
    assert torch.allclose(samplers.slerp(a, b, 0), a, atol=1e-6)
    assert torch.allclose(samplers.slerp(a, b, 1.0), b, atol=1e-6)
    assert torch.allclose(samplers.slerp(a, a, 0.4), a, atol=1e-6)
    assert torch.allclose(samplers.slerp(a, 3 * a, 0.5), 2 * a, atol=1e-5)
    assert samplers.slerp(a.bfloat16(), b.bfloat16(), 0.5).dtype == torch.bfloat16
    assert samplers.slerp(a.to("meta"), b.to("meta"), 0.5).shape == a.shape


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"b": torch.zeros(2, 4)}, ValueError, "b must have the shape of a"),
        ({"b": torch.zeros(2, 3, device="meta")}, ValueError, "device"),
        ({"a": [1.0]}, TypeError, "a must be a torch.Tensor"),
        ({"weight": 1.5}, ValueError, "weight must be a finite number from 0 to 1"),
    ],
)
def test_slerp_refuses(change, error, message):
    given_ = {"a": torch.ones(2, 3), "b": torch.ones(2, 3), "weight": 0.5, **change}
    with pytest.raises(error, match=message):
        samplers.slerp(**given_)
