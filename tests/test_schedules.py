"""ddpm_core.schedules against exact fractions, diffusers and known constants."""

import math
import re
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from ddpm_core import schedules
from ddpm_core.schedules import (
    SCHEDULES,
    Schedule,
    card,
    cosine,
    from_alpha_bar,
    from_beta,
    linear,
    respace,
    scaled_linear,
)

F64 = torch.float64


def says(error: type[Exception], *words: str) -> object:
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, words)))


def exact(beta: list[float]) -> tuple[list[Fraction], list[Fraction]]:
    """alpha_bar and 1 - alpha_bar in exact arithmetic."""
    bars = [Fraction(1)]
    for b in beta:
        bars.append(bars[-1] * (1 - Fraction(b)))
    return bars, [1 - bar for bar in bars]


betas = st.lists(st.floats(1e-8, 0.999), min_size=1, max_size=12)


@given(betas)
def test_from_beta_is_exact(beta: list[float]) -> None:
    schedule = from_beta(torch.tensor(beta, dtype=F64))
    bars, rests = exact(beta)
    assert len(beta) == schedule.T
    for t in range(schedule.T + 1):
        assert math.isclose(schedule.alpha_bar[t], bars[t], rel_tol=1e-13)
        assert math.isclose(schedule.one_minus_alpha_bar[t], rests[t], rel_tol=1e-14)
    assert schedule.beta[1:].tolist() == beta
    assert schedule.timesteps.tolist() == list(range(len(beta) + 1))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("T", [21, 50, 100, 1000, 4000])
def test_shipped_tables_are_sound(name: str, T: int) -> None:
    schedule = SCHEDULES[name](T)
    assert (schedule.name, schedule.T) == (name, T)
    for table in ("beta", "alpha", "alpha_bar", "one_minus_alpha_bar", "snr"):
        values = getattr(schedule, table)
        assert values.shape == (T + 1,)
        assert (values.dtype, values.device.type) == (F64, "cpu")
    at_zero = [getattr(schedule, n)[0].item() for n in ("beta", "alpha", "alpha_bar")]
    assert at_zero == [0, 1, 1]
    assert schedule.one_minus_alpha_bar[0] == 0
    assert schedule.snr[0] == math.inf
    assert (schedule.beta[1:] > 0).all()
    assert (schedule.beta < 1).all()
    assert (schedule.alpha_bar.diff() < 0).all()
    assert (schedule.snr[1:].diff() < 0).all()
    both = schedule.alpha_bar + schedule.one_minus_alpha_bar
    torch.testing.assert_close(both, torch.ones(T + 1, dtype=F64), rtol=0, atol=1e-13)
    assert schedule.one_minus_alpha_bar[1] == schedule.beta[1]


@pytest.mark.parametrize(
    ("schedule", "alpha_bar_T", "bits", "digits"),
    [
        (linear(1000), 4.036e-5, 2.9e-5, 3),
        (linear(4000), 4.247e-5, 3.1e-5, 3),
        (scaled_linear(1000), 4.660e-3, 0.0034, 3),
        (cosine(1000), 2.43e-9, 0.0, 2),
        (from_beta(torch.linspace(1e-4, 0.02, 300, dtype=F64)), 0.0481, 0.036, 2),
        (from_beta(torch.linspace(1e-4, 0.02, 200, dtype=F64)), 0.132, 0.102, 2),
        (from_beta(torch.full((100,), 0.01511, dtype=F64)), 0.218, 0.177, 2),
    ],
)
def test_known_cards(
    schedule: Schedule, alpha_bar_T: float, bits: float, digits: int
) -> None:
    c = card(schedule)
    assert math.isclose(c.alpha_bar_T, alpha_bar_T, rel_tol=0.6 * 10**-digits)
    assert math.isclose(c.prior_bits, bits, rel_tol=0.03, abs_tol=1e-8)
    assert (c.name, c.T) == (schedule.name, schedule.T)
    assert c.snr_T == schedule.snr[-1]
    assert c.snr_1 == schedule.snr[1]


def test_prior_bits_against_torch() -> None:
    for schedule in (scaled_linear(), linear(50), from_beta(torch.tensor([0.3, 0.4]))):
        left = schedule.alpha_bar[-1]
        q = torch.distributions.Normal(left.sqrt(), (1 - left).sqrt())
        p = torch.distributions.Normal(torch.zeros_like(left), torch.ones_like(left))
        kl = torch.distributions.kl_divergence(q, p).item()
        assert math.isclose(card(schedule).prior_bits, kl / math.log(2), rel_tol=1e-10)


def test_exactly_one_beta_is_clipped() -> None:
    for T in (10, 100, 1000):
        schedule = cosine(T)
        assert schedule.clipped == card(schedule).clipped == 1
        assert schedule.beta[-1] == 0.999
        assert (schedule.beta == 0.999).sum() == 1
    assert cosine(4000).clipped == int((cosine(4000).beta == 0.999).sum())
    assert cosine(1000, beta_max=0.5).clipped == (cosine(1000).beta > 0.5).sum()
    assert linear().clipped == scaled_linear().clipped == 0


def test_cosine_follows_its_formula() -> None:
    T, s = 1000, 0.008
    u = torch.arange(T + 1, dtype=F64) / T
    f = torch.cos((u + s) / (1 + s) * torch.pi / 2) ** 2
    torch.testing.assert_close(
        cosine(T).alpha_bar[:T], (f / f[0])[:T], rtol=1e-9, atol=0
    )


def test_linear_sum_does_not_depend_on_T() -> None:
    for build in (linear, scaled_linear):
        sums = [build(T).beta.sum().item() for T in (100, 1000, 8000)]
        assert max(sums) / min(sums) < 1.01
    assert math.isclose(linear(77).beta.sum(), 10.05)


DIFFUSERS = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "scaled-linear": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    },
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_against_diffusers_as_shipped(name: str) -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(num_train_timesteps=1000, **DIFFUSERS[name])
    ours = SCHEDULES[name](1000)
    for table, other in (
        (ours.beta, theirs.betas),
        (ours.alpha, theirs.alphas),
        (ours.alpha_bar, theirs.alphas_cumprod),
    ):
        assert other.dtype == torch.float32
        torch.testing.assert_close(table[1:], other.double(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_against_diffusers_recipe_in_float64(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.schedulers import scheduling_ddpm

    class Double:
        """torch, with float32 standing for float64."""

        float32 = torch.float64

        def __getattr__(self, attribute: str) -> object:
            return getattr(torch, attribute)

    monkeypatch.setattr(scheduling_ddpm, "torch", Double())
    theirs = scheduling_ddpm.DDPMScheduler(num_train_timesteps=1000, **DIFFUSERS[name])
    ours = SCHEDULES[name](1000)
    assert theirs.betas.dtype == F64
    for table, other in (
        (ours.beta, theirs.betas),
        (ours.alpha_bar, theirs.alphas_cumprod),
        (ours.one_minus_alpha_bar, 1 - theirs.alphas_cumprod),
    ):
        torch.testing.assert_close(table[1:], other, rtol=1e-10, atol=0)


def test_float32_loses_digits_unless_kept() -> None:
    schedule = linear(1000)
    small = schedule.to(dtype=torch.float32)
    assert small.one_minus_alpha_bar.dtype == torch.float32
    kept = small.one_minus_alpha_bar[1:].double() / schedule.one_minus_alpha_bar[1:] - 1
    lost = (1 - small.alpha_bar[1:]).double() / schedule.one_minus_alpha_bar[1:] - 1
    assert kept.abs().max() < 6e-8
    torch.testing.assert_close(small.snr.double(), schedule.snr, rtol=3e-7, atol=0)
    assert lost.abs().max() > 1e-4


def test_to() -> None:
    schedule = cosine(50)
    moved = schedule.to("meta", torch.float32)
    for name in ("beta", "alpha", "alpha_bar", "one_minus_alpha_bar"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).dtype == torch.float32
    assert moved.timesteps.device.type == "meta"
    assert moved.timesteps.dtype == torch.int64
    assert (moved.name, moved.T, moved.clipped) == ("cosine", 50, 1)
    same = schedule.to()
    assert torch.equal(same.beta, schedule.beta)
    with says(TypeError, "beta must be a tensor of floating dtype", "torch.int64"):
        schedule.to(dtype=torch.int64)


def test_a_schedule_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        linear().name = "other"  # type: ignore[misc]
    assert linear() != linear()  # compared by identity: tables have no truth value
    assert len({linear(), linear()}) == 2


def test_tables_are_on_the_cpu_whatever_the_default() -> None:
    with torch.device("meta"):
        schedule = cosine(30)
        assert respace(linear(30), [3, 9]).T == 2
    assert schedule.beta.device.type == "cpu"


def test_built_inside_fake_mode() -> None:
    with FakeTensorMode():
        for build in SCHEDULES.values():
            schedule = build(100).to("cuda")
            assert schedule.beta.device.type == "cuda"
            assert respace(schedule, [1, 50]).alpha_bar.device.type == "cuda"


@given(betas)
def test_alpha_bar_round_trip(beta: list[float]) -> None:
    schedule = from_beta(torch.tensor(beta, dtype=F64))
    back = from_alpha_bar(schedule.alpha_bar, "back")
    assert back.name == "back"
    torch.testing.assert_close(back.alpha_bar, schedule.alpha_bar, rtol=0, atol=0)
    torch.testing.assert_close(back.beta, schedule.beta, rtol=1e-7, atol=1e-15)
    torch.testing.assert_close(back.alpha, schedule.alpha, rtol=1e-13, atol=0)


def test_last_beta_may_be_one() -> None:
    schedule = from_beta(torch.tensor([0.5, 1.0]))
    assert schedule.alpha_bar.tolist() == [1, 0.5, 0]
    assert schedule.one_minus_alpha_bar.tolist() == [0, 0.5, 1]
    assert schedule.snr[-1] == 0
    assert card(schedule).prior_bits == 0
    assert from_alpha_bar(torch.tensor([1.0, 0.5, 0.0])).beta.tolist() == [0, 0.5, 1]
    assert from_beta(torch.tensor([1.0])).T == 1


def compose(schedule: Schedule, start: int, stop: int) -> float:
    """Variance that the steps start+1 ... stop add, one by one."""
    v = 0.0
    for t in range(start + 1, stop + 1):
        v = float(schedule.alpha[t]) * v + float(schedule.beta[t])
    return v


@settings(max_examples=40)
@given(st.sampled_from(sorted(SCHEDULES)), st.sets(st.integers(1, 60), min_size=1))
def test_respace(name: str, chosen: set[int]) -> None:
    schedule, kept = SCHEDULES[name](60), sorted(chosen)
    short = respace(schedule, kept)
    index = [0, *kept]
    assert len(kept) == short.T
    assert short.timesteps.tolist() == index
    assert torch.equal(short.alpha_bar, schedule.alpha_bar[index])
    assert torch.equal(short.one_minus_alpha_bar, schedule.one_minus_alpha_bar[index])
    assert (short.beta[0], short.alpha[0]) == (0, 1)
    for i, (start, stop) in enumerate(zip(index, kept, strict=False), start=1):
        assert math.isclose(short.beta[i], compose(schedule, start, stop), rel_tol=1e-9)
    again = from_beta(short.beta[1:])
    torch.testing.assert_close(again.alpha_bar, short.alpha_bar, rtol=1e-6, atol=1e-18)


def test_respace_of_all_steps_changes_nothing() -> None:
    for build in SCHEDULES.values():
        schedule = build(1000)
        same = respace(schedule, range(1, 1001))
        torch.testing.assert_close(same.beta, schedule.beta, rtol=1e-9, atol=0)
        assert torch.equal(same.alpha_bar, schedule.alpha_bar)


def test_respace_twice_remembers_the_training_steps() -> None:
    short = respace(respace(linear(1000), [10, 200, 500, 900]), [2, 4])
    assert short.timesteps.tolist() == [0, 200, 900]


@pytest.mark.parametrize("T", [0, -3])
def test_T_too_small(T: int) -> None:
    for build in SCHEDULES.values():
        with says(ValueError, "T", "must be an integer of at least", f"got {T}"):
            build(T)


@pytest.mark.parametrize("T", [10.0, "10", None, True])
def test_T_is_no_integer(T: object) -> None:
    for build in SCHEDULES.values():
        with says(TypeError, "T", "must be an integer", type(T).__name__):
            build(T)


def test_too_few_steps_are_refused() -> None:
    with says(ValueError, "T of the linear schedule", "at least 21", "got 20"):
        linear(20)
    assert linear(21).beta[-1] < 1
    with says(ValueError, "T of the scaled-linear schedule", "at least 13", "got 12"):
        scaled_linear(12)
    assert scaled_linear(13).beta[-1] < 1
    assert cosine(1).beta.tolist() == [0, 0.999]


@pytest.mark.parametrize("bad", [0.0, -0.1, 1.5, math.nan])
def test_beta_out_of_range(bad: float) -> None:
    with says(ValueError, "beta must lie in (0, 1]", f"got {bad} at t = 2"):
        from_beta(torch.tensor([0.1, bad, 0.2], dtype=F64))


def test_beta_one_too_early() -> None:
    with says(
        ValueError, "beta may be 1 at the last step, t = 3, only; got 1 at t = 1"
    ):
        from_beta(torch.tensor([1.0, 0.1, 0.2]))


def test_beta_of_another_form() -> None:
    with says(TypeError, "beta must be a torch.Tensor", "list"):
        from_beta([0.1, 0.2])  # type: ignore[arg-type]
    with says(TypeError, "beta must be a tensor of floating dtype", "torch.int64"):
        from_beta(torch.tensor([1, 1]))
    with says(ValueError, "beta must have 1 dimensions", "[1, 1]"):
        from_beta(torch.tensor([[0.1]]))
    with says(ValueError, "the length of beta", "at least 1", "got 0"):
        from_beta(torch.zeros(0))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.9, 0.5], ("alpha_bar[0] must be 1", "0.9")),
        ([1.0, 0.5, 0.5], ("must fall at every step", "0.5 at t = 1 and 0.5 at t = 2")),
        ([1.0, 0.5, 0.7], ("must fall at every step", "t = 2")),
        ([1.0, 0.0, 0.0], ("must fall at every step", "0.0 at t = 2")),
        ([1.0, -0.1], ("alpha_bar must lie in [0, 1]", "-0.1")),
        ([1.0, math.nan], ("alpha_bar must lie in [0, 1]", "nan")),
        ([1.0], ("the length of alpha_bar minus 1", "at least 1", "got 0")),
    ],
)
def test_alpha_bar_refused(values: list[float], words: tuple[str, ...]) -> None:
    with says(ValueError, *words):
        from_alpha_bar(torch.tensor(values, dtype=F64))


@pytest.mark.parametrize(
    ("kept", "error", "words"),
    [
        ([], ValueError, ("number of kept steps", "at least 1", "got 0")),
        ([0, 5], ValueError, ("kept must be an integer from 1 to 50", "got 0")),
        ([5, 51], ValueError, ("kept must be an integer from 1 to 50", "got 51")),
        ([5, 5], ValueError, ("kept must increase", "got 5 after 5")),
        ([9, 5], ValueError, ("kept must increase", "got 5 after 9")),
        ([1.0, 5], TypeError, ("kept must be an integer", "1.0")),
        ([True, 5], TypeError, ("kept must be an integer", "True")),
    ],
)
def test_kept_refused(
    kept: list[int], error: type[Exception], words: tuple[str, ...]
) -> None:
    with says(error, *words):
        respace(linear(50), kept)


@pytest.mark.parametrize("bad", [{"s": 0}, {"s": -1}, {"beta_max": 1}, {"beta_max": 0}])
def test_cosine_parameters_refused(bad: dict[str, float]) -> None:
    ((name, value),) = bad.items()
    with says(ValueError, f"{name} must be a finite number", f"got {value}"):
        cosine(100, **bad)


def test_tables_of_two_lengths_are_refused() -> None:
    good = linear(30)
    with says(ValueError, "alpha_bar must have shape [31]; got shape [30]"):
        Schedule(
            "x", good.beta, good.alpha, good.alpha_bar[1:], good.beta, good.timesteps
        )


def test_names() -> None:
    assert set(SCHEDULES) == {"linear", "cosine", "scaled-linear"}
    assert schedules.SCHEDULES["linear"](30).name == "linear"
