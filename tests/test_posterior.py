"""The posterior q(x_{t-1} | x_t, x_0): exact oracles, errors, devices, diffusers."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from ddpm_core.process import (
    VARIANCES,
    posterior_mean,
    posterior_mean_coefficients,
    posterior_mean_from_eps,
    posterior_variance,
    q_sample,
    reverse_variance,
    signal_left,
)
from ddpm_core.schedules import (
    Schedule,
    cosine,
    from_alpha_bar,
    from_beta,
    linear,
    respace,
    scaled_linear,
)

MADE = {
    "linear": linear(),
    "cosine": cosine(),
    "scaled": scaled_linear(),
    "short": linear(50),
    "respaced": respace(linear(), [1, 7, 100, 101, 640, 1000]),
    "to zero": from_beta(torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)),
}


@pytest.fixture(params=sorted(MADE))
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return MADE[request.param]


def by_conditioning(schedule: Schedule) -> list[tuple[float, float, float]]:
    """c_0, c_t and the variance for t = 1..T, with 60 digits, by conditioning."""
    mpmath.mp.dps = 60
    a_bar, out = mpmath.mpf(1), []
    for beta in schedule.beta[1:].tolist():
        before, alpha = a_bar, 1 - mpmath.mpf(beta)
        a_bar = before * alpha
        v_1, v_2 = 1 - before, alpha * (1 - before) + mpmath.mpf(beta)
        c = mpmath.sqrt(alpha) * v_1
        c_t = c / v_2
        c_0 = mpmath.sqrt(before) - c_t * mpmath.sqrt(a_bar)
        out.append((float(c_0), float(c_t), float(v_1 - c * c / v_2)))
    return out


def test_tables_equal_conditioning_to_60_digits(schedule: Schedule) -> None:
    c_0, c_t = posterior_mean_coefficients(schedule)
    variance = posterior_variance(schedule)
    expected = torch.tensor(by_conditioning(schedule), dtype=torch.float64).T
    for got, right in zip((c_0, c_t, variance), expected, strict=True):
        torch.testing.assert_close(got[1:], right, rtol=1e-9, atol=1e-15)


def test_entry_0_is_nan_and_shapes(schedule: Schedule) -> None:
    c_0, c_t = posterior_mean_coefficients(schedule)
    for table in (c_0, c_t, posterior_variance(schedule)):
        assert table.shape == (schedule.T + 1,)
        assert table.dtype == torch.float64
        assert table[0].isnan()
        assert table[1:].isfinite().all()


def test_tables_leave_the_schedule_alone() -> None:
    schedule = linear(50)
    before = [t.clone() for t in (schedule.beta, schedule.one_minus_alpha_bar)]
    posterior_variance(schedule)
    for rule in VARIANCES:
        reverse_variance(schedule, rule)
    assert torch.equal(schedule.beta, before[0])
    assert torch.equal(schedule.one_minus_alpha_bar, before[1])


def test_first_step(schedule: Schedule) -> None:
    c_0, c_t = posterior_mean_coefficients(schedule)
    assert c_0[1] == 1
    assert c_t[1] == 0
    assert posterior_variance(schedule)[1] == 0


def test_variance_lies_below_beta(schedule: Schedule) -> None:
    variance = posterior_variance(schedule)
    assert (variance[2:] > 0).all()
    assert (variance[2:] <= schedule.beta[2:]).all()


def test_the_bridge_keeps_the_marginals(schedule: Schedule) -> None:
    c_0, c_t = posterior_mean_coefficients(schedule)
    mean = c_0 + c_t * schedule.alpha_bar.sqrt()
    spread = c_t**2 * schedule.one_minus_alpha_bar + posterior_variance(schedule)
    torch.testing.assert_close(mean[1:], schedule.alpha_bar[:-1].sqrt())
    torch.testing.assert_close(spread[1:], schedule.one_minus_alpha_bar[:-1])


@pytest.mark.parametrize("name", ["linear", "cosine", "short"])
@pytest.mark.parametrize("s2", [0.25, 1.0, 4.0])
def test_exact_reverse_chain(name: str, s2: float) -> None:
    table = MADE[name]
    a, r = table.alpha_bar.tolist(), table.one_minus_alpha_bar.tolist()
    c_0, c_t = (c.tolist() for c in posterior_mean_coefficients(table))
    small = posterior_variance(table).tolist()
    v = [x * s2 + y for x, y in zip(a, r, strict=True)]

    def run(w: float) -> float:
        for t in range(table.T, 0, -1):
            k = c_0[t] * math.sqrt(a[t]) * s2 / v[t] + c_t[t]
            w = k * k * w + small[t] + c_0[t] ** 2 * s2 * r[t] / v[t]
        return w

    assert abs(run(v[-1]) - s2) < 1e-12
    assert abs(run(1.0) - s2 - (1 - v[-1]) * a[-1] * s2**2 / v[-1] ** 2) < 1e-12
    if name == "linear":  # the slip sqrt(alpha_bar_t) for sqrt(alpha_t) must show
        ratio = (table.alpha_bar / table.alpha).sqrt().tolist()
        c_t = [c * x for c, x in zip(c_t, ratio, strict=True)]
        assert f"{run(1.0):.4f}" == {0.25: "0.0356", 1.0: "0.0417", 4.0: "0.0437"}[s2]


betas = st.lists(st.floats(1e-5, 0.95), min_size=2, max_size=8)
sizes = st.lists(st.integers(1, 4), min_size=0, max_size=3)


@settings(max_examples=60)
@given(beta=betas, size=sizes, seed=st.integers(0, 2**32 - 1))
def test_both_forms_of_the_mean_agree(
    beta: list[float], size: list[int], seed: int
) -> None:
    schedule = from_beta(torch.tensor(beta, dtype=torch.float64))
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(1, schedule.T + 1)
    shape = (schedule.T, *size)
    x_0, eps = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    x_t = q_sample(schedule, x_0, t, eps)
    by_x_0 = posterior_mean(schedule, x_0, x_t, t)
    by_eps = posterior_mean_from_eps(schedule, x_t, eps, t)
    assert by_x_0.shape == shape
    amplified = (1 / schedule.alpha_bar[-1].item()) ** 0.5
    torch.testing.assert_close(by_eps, by_x_0, rtol=0, atol=1e-13 * amplified + 1e-10)


def test_samples_do_not_mix() -> None:
    schedule, t = linear(), torch.tensor([3, 700, 20])
    generator = torch.Generator().manual_seed(0)
    x_0, x_t = torch.randn(2, 3, 2, 4, 4, generator=generator)
    together = posterior_mean(schedule, x_0, x_t, t)
    for i in range(3):
        one = slice(i, i + 1)
        alone = posterior_mean(schedule, x_0[one], x_t[one], t[one])
        assert torch.equal(together[one], alone)


def test_rules() -> None:
    schedule = linear()
    small = posterior_variance(schedule)
    large, fixed_small, reference = (reverse_variance(schedule, r) for r in VARIANCES)
    assert torch.equal(large[1:], schedule.beta[1:])
    assert torch.equal(fixed_small[2:], small[2:])
    assert torch.equal(reference[2:], schedule.beta[2:])
    assert fixed_small[1] == reference[1] == small[2]
    assert large[0].isnan()
    assert fixed_small[0].isnan()
    assert reference[0].isnan()


def test_rules_of_one_step() -> None:
    schedule = from_beta(torch.tensor([0.5], dtype=torch.float64))
    assert reverse_variance(schedule, "fixed_large")[1] == 0.5
    for rule in VARIANCES[1:]:
        with pytest.raises(ValueError, match=r"T >= 2, got T = 1"):
            reverse_variance(schedule, rule)


@pytest.mark.parametrize("rule", ["fixedlarge", "", None, 1])
def test_unknown_rule(rule: object) -> None:
    with pytest.raises(ValueError, match="rule must be one of 'fixed_large'"):
        reverse_variance(linear(), rule)  # type: ignore[arg-type]


def test_no_noise_form_without_signal() -> None:
    ends = MADE["to zero"]
    x, t = torch.ones(1, 2), torch.tensor([3])
    assert posterior_mean(ends, x, x, t).isfinite().all()
    with pytest.raises(ValueError, match=r"beta_T = 1.*no eps-prediction"):
        posterior_mean_from_eps(ends, x, x, t)
    with pytest.raises(ValueError, match="alpha_bar_T = 0"):
        signal_left(from_alpha_bar(torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)))
    signal_left(cosine())


@pytest.mark.parametrize("function", [posterior_mean, posterior_mean_from_eps])
def test_bad_input(function) -> None:  # type: ignore[no-untyped-def]
    schedule = linear()
    x, t = torch.zeros(2, 3), torch.tensor([1, 1000])
    one = torch.zeros(2, 1)
    mixed = (one, x) if function is posterior_mean else (x, one)
    with pytest.raises(ValueError, match="must have the shape of x_t"):
        function(schedule, *mixed, t)
    for steps in (torch.tensor([0, 1]), torch.tensor([1, 1001])):
        with pytest.raises(ValueError, match=r"t must lie in \[1, 1000\]"):
            function(schedule, x, x, steps)
    with pytest.raises(ValueError, match="t must have shape"):
        function(schedule, x, x, torch.tensor([1]))
    with pytest.raises(TypeError, match="int64"):
        function(schedule, x, x, t.float())
    with pytest.raises(TypeError, match="floating"):
        function(schedule, x.long(), x.long(), t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype_follows_x(dtype: torch.dtype) -> None:
    x, t = torch.ones(2, 3, dtype=dtype), torch.tensor([1, 1000])
    assert posterior_mean(linear(), x, x, t).dtype == dtype
    assert posterior_mean_from_eps(linear(), x, x, t).dtype == dtype


def test_a_float32_schedule_keeps_its_digits() -> None:
    right, got = (
        posterior_variance(linear()),
        posterior_variance(linear().to(dtype=torch.float32)),
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got[1:].double(), right[1:], rtol=5e-7, atol=0)


def test_meta_with_backward() -> None:
    schedule = linear().to("meta")
    x = torch.zeros(2, 1, 4, 4, device="meta", requires_grad=True)
    t = torch.ones(2, dtype=torch.int64, device="meta")
    mean = posterior_mean(schedule, x, x, t) + posterior_mean_from_eps(
        schedule, x, x, t
    )
    mean.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    for rule in VARIANCES:
        assert reverse_variance(schedule, rule).device.type == "meta"


def test_fake_cuda() -> None:
    with FakeTensorMode():
        schedule = linear(50).to("cuda", torch.float32)
        x, t = (
            torch.zeros(2, 3, device="cuda"),
            torch.ones(2, dtype=torch.int64, device="cuda"),
        )
        assert posterior_mean(schedule, x, x, t).device.type == "cuda"
        assert posterior_mean_from_eps(schedule, x, x, t).device.type == "cuda"


BETAS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


@pytest.mark.parametrize("as_shipped", [False, True])
@pytest.mark.parametrize("rule", ["fixed_large", "fixed_small"])
@pytest.mark.parametrize("name", sorted(BETAS))
def test_steps_agree_with_diffusers(name: str, rule: str, as_shipped: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    ours = MADE[name]
    theirs = diffusers.DDPMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule=BETAS[name],
        variance_type=rule,
        clip_sample=False,
    )
    tolerance = 1e-3
    if not as_shipped:
        tolerance = 1e-10
        theirs.betas, theirs.alphas = ours.beta[1:], ours.alpha[1:]
        theirs.alphas_cumprod = ours.alpha_bar[1:]
        theirs.one = torch.ones((), dtype=torch.float64)
    theirs.set_timesteps(1000)
    generator = torch.Generator().manual_seed(0)
    x_t, eps = torch.randn(2, 1000, 2, generator=generator, dtype=torch.float64)
    steps = torch.arange(1, 1001)
    z = torch.cat([_noise(t) for t in range(1, 1001)])
    z[0] = 0
    spread = reverse_variance(ours, rule)[1:, None].sqrt()
    got = posterior_mean_from_eps(ours, x_t, eps, steps) + spread * z
    rows = []
    for t in range(1, 1001):
        drawn = torch.Generator().manual_seed(t)
        now = slice(t - 1, t)
        rows.append(theirs.step(eps[now], t - 1, x_t[now], drawn).prev_sample)
    right = torch.cat(rows)
    assert (got - right).abs().max() < tolerance
    if as_shipped:  # the float32 tables must be what makes the difference
        assert (got - right).abs().max() > 1e-6


def _noise(t: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(t)
    return torch.randn(1, 2, generator=generator, dtype=torch.float64)
