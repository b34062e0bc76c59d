"""The forward part of ddpm_core.process: at, q_step, q_sample."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ddpm_core.process import at, q_sample, q_step
from ddpm_core.schedules import SCHEDULES, Schedule, cosine, from_beta, linear

F64 = torch.float64


def says(error: type[Exception], *words: str) -> object:
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, words)))


def steps(schedule: Schedule, x_0: Tensor, noises: Tensor) -> Tensor:
    """x_T of the chain of single steps with the given noises [T, B, ...]."""
    x = x_0
    for t in range(1, len(noises) + 1):
        x = q_step(schedule, x, torch.full((len(x),), t), noises[t - 1])
    return x


@pytest.mark.parametrize("name", SCHEDULES)
def test_composed_steps_have_the_closed_forms_law(name: str) -> None:
    """The chain is linear in its noises: feed unit vectors, read mean and variance."""
    T = 60
    schedule = SCHEDULES[name](T)
    x_0 = torch.full((1, 1), 1.3, dtype=F64)
    for t in (1, 2, 30, T):
        mean = steps(schedule, x_0, torch.zeros(t, 1, 1, dtype=F64))
        units = torch.eye(t, dtype=F64)[:, :, None]  # noise i is 1 in batch entry i
        slopes = steps(schedule, x_0.expand(t, 1), units) - mean
        at_t = torch.tensor([t])
        closed = q_sample(schedule, x_0, at_t, torch.zeros_like(x_0))
        slope = q_sample(schedule, x_0, at_t, torch.ones_like(x_0)) - closed
        torch.testing.assert_close(mean, closed, rtol=1e-12, atol=0)
        variance = slopes.square().sum().reshape(1, 1)
        torch.testing.assert_close(variance, slope.square(), rtol=1e-12, atol=0)


@settings(max_examples=50)
@given(
    st.sampled_from(sorted(SCHEDULES)),
    st.lists(st.integers(0, 80), min_size=1, max_size=5),
    st.lists(st.integers(1, 3), max_size=3),
    st.sampled_from([torch.float32, F64]),
)
def test_q_sample_by_hand(
    name: str, t: list[int], shape: list[int], dtype: torch.dtype
) -> None:
    schedule = SCHEDULES[name](80)
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, len(t), *shape, generator=generator, dtype=dtype)
    x_t = q_sample(schedule, x_0, torch.tensor(t), eps)
    assert x_t.dtype == dtype
    assert x_t.shape == x_0.shape
    for i, step in enumerate(t):
        bar = float(schedule.alpha_bar[step])
        right = bar**0.5 * x_0[i].double() + (1 - bar) ** 0.5 * eps[i].double()
        torch.testing.assert_close(x_t[i].double(), right, rtol=1e-5, atol=1e-6)


def test_q_sample_at_0_returns_x_0() -> None:
    x_0, eps = torch.randn(2, 4, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        q_sample(cosine(50), x_0, torch.zeros(4, dtype=torch.long), eps), x_0
    )


def test_first_step_is_the_jump() -> None:
    x_0, eps = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(1))
    one = torch.ones(4, dtype=torch.long)
    for build in SCHEDULES.values():
        step = q_step(build(100), x_0, one, eps)
        torch.testing.assert_close(step, q_sample(build(100), x_0, one, eps))


def test_variance_of_the_chain_within_its_standard_error() -> None:
    n, schedule = 40_000, from_beta(torch.linspace(0.001, 0.05, 40, dtype=F64))
    generator = torch.Generator().manual_seed(2)
    noises = torch.randn(40, n, 1, generator=generator, dtype=F64)
    x = steps(schedule, torch.full((n, 1), 1.5, dtype=F64), noises)
    v = schedule.one_minus_alpha_bar[40]
    assert abs(x.var() - v) < 4 * v * (2 / (n - 1)) ** 0.5
    assert abs(x.mean() - 1.5 * schedule.alpha_bar[40].sqrt()) < 4 * (v / n) ** 0.5
    assert abs(v.sqrt() - v) > 20 * v * (2 / (n - 1)) ** 0.5  # the slip would be seen


def test_unit_variance_is_kept_and_others_move_towards_it() -> None:
    for build in SCHEDULES.values():
        schedule = build(200)
        for s2 in (0.25, 1.0, 4.0):
            v = schedule.alpha_bar * s2 + schedule.one_minus_alpha_bar
            distance = (v - 1).abs()
            if s2 == 1:
                assert distance.max() < 1e-14
            else:
                assert (distance.diff() < 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_at_casts_last(dtype: torch.dtype) -> None:
    schedule = linear(1000)
    x = torch.zeros(3, 2, 2, 2, dtype=dtype)
    t = torch.tensor([0, 1, 1000])
    found = at(schedule.one_minus_alpha_bar.sqrt(), t, x)
    assert found.shape == (3, 1, 1, 1)
    assert found.dtype == dtype
    right = schedule.one_minus_alpha_bar.sqrt()[t].to(dtype)
    assert torch.equal(found.flatten(), right)


def test_at_of_flat_samples() -> None:
    table = torch.tensor([0.0, 1.0, 2.0])
    assert at(table, torch.tensor([2, 0]), torch.zeros(2)).tolist() == [2.0, 0.0]
    assert at(table, torch.tensor([2]), torch.zeros(1, 5)).shape == (1, 1)


def test_gradients_flow_to_x_0_and_eps() -> None:
    schedule, t = linear(100), torch.tensor([37])
    x_0 = torch.ones(1, 2, dtype=F64, requires_grad=True)
    eps = torch.ones(1, 2, dtype=F64, requires_grad=True)
    q_sample(schedule, x_0, t, eps).sum().backward()
    assert x_0.grad is not None
    assert eps.grad is not None
    torch.testing.assert_close(x_0.grad[0, 0] ** 2, schedule.alpha_bar[37])
    torch.testing.assert_close(eps.grad[0, 0] ** 2, schedule.one_minus_alpha_bar[37])


def test_on_meta() -> None:
    schedule = linear(100).to("meta", torch.float32)
    x = torch.zeros(4, 1, 8, 8, device="meta")
    t = torch.zeros(4, dtype=torch.int64, device="meta")
    for draw in (q_step, q_sample):
        out = draw(schedule, x, t, x)
        assert out.device.type == "meta"
        assert out.shape == x.shape


def test_on_fake_cuda() -> None:
    with FakeTensorMode():
        schedule = cosine(100).to("cuda")
        x = torch.zeros(4, 1, 8, 8, device="cuda")
        t = torch.ones(4, dtype=torch.int64, device="cuda")
        for draw in (q_step, q_sample):
            out = draw(schedule, x, t, x)
            assert out.device.type == "cuda"
            assert out.dtype == torch.float32


def test_compiles_in_one_graph() -> None:
    schedule = linear(100)
    x, t = torch.ones(3, 2), torch.tensor([1, 50, 100])

    def noised(x: Tensor, t: Tensor) -> Tensor:
        return q_sample(schedule, x, t, x)

    compiled = torch.compile(noised, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t), noised(x, t))


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    schedule = linear(100).to("cuda")
    x, t = torch.ones(3, 2, device="cuda"), torch.tensor([1, 50, 100], device="cuda")
    here = q_sample(linear(100), x.cpu(), t.cpu(), x.cpu())
    torch.testing.assert_close(q_sample(schedule, x, t, x).cpu(), here)
    with says(ValueError, "t must lie on the device of x, cuda"):
        q_sample(schedule, x, t.cpu(), x)


IMAGES, STEP = torch.zeros(2, 1, 4, 4), torch.tensor([1, 5])
NAMES = {q_step: "x_prev", q_sample: "x_0"}


@pytest.mark.parametrize("draw", NAMES)
@pytest.mark.parametrize(
    ("t", "error", "words"),
    [
        (torch.tensor([1, 31]), ValueError, ("t must lie in", "30]; got 31", "[1]")),
        (torch.tensor([-1, 1]), ValueError, ("t must lie in", "30]; got -1", "[0]")),
        (torch.tensor([1.0, 2.0]), TypeError, ("t must be an int64", "torch.float32")),
        (torch.tensor([True, False]), TypeError, ("t must be an int64", "torch.bool")),
        (torch.tensor([1, 2], dtype=torch.uint8), TypeError, ("int64", "torch.uint8")),
        (torch.tensor([1, 2, 3]), ValueError, ("t must have shape [2]", "[3]")),
        (torch.tensor(1), ValueError, ("t must have shape [2]", "[]")),
        (7, TypeError, ("t must be an int64 tensor of shape [2]", "7")),
    ],
)
def test_wrong_t(
    draw: object, t: Tensor, error: type[Exception], words: tuple[str, ...]
) -> None:
    with says(error, *words):
        draw(linear(30), IMAGES, t, IMAGES)  # type: ignore[operator]


def test_step_0_is_no_step() -> None:
    with says(ValueError, "t must lie in [1, 30]; got 0 at index [0]"):
        q_step(linear(30), IMAGES, torch.tensor([0, 1]), IMAGES)


@pytest.mark.parametrize("draw", NAMES)
def test_wrong_images(draw: object) -> None:
    name = NAMES[draw]  # type: ignore[index]
    schedule = linear(30)
    cases = [
        (IMAGES.to(torch.uint8), IMAGES, TypeError, (f"{name} must be", "torch.uint8")),
        (IMAGES, IMAGES.long(), TypeError, ("eps must be a tensor", "torch.int64")),
        (IMAGES.numpy(), IMAGES, TypeError, (f"{name} must be a torch.Tensor",)),
        (
            IMAGES,
            IMAGES[:1],
            ValueError,
            ("eps must have the shape of", "[1, 1, 4, 4]"),
        ),
        (IMAGES, IMAGES[..., :1], ValueError, ("eps must have the shape of", "4, 1]")),
    ]
    for x, eps, error, words in cases:
        with says(error, *words):
            draw(schedule, x, STEP, eps)  # type: ignore[operator]


@pytest.mark.parametrize("draw", NAMES)
def test_devices_must_agree(draw: object) -> None:
    there = IMAGES.to("meta")
    cases = [
        (
            linear(30),
            IMAGES,
            STEP,
            there,
            ("eps must lie on the device of", "got meta"),
        ),
        (linear(30), there, STEP.to("meta"), there, ("schedule.to", "meta; got cpu")),
        (linear(30).to("meta"), there, STEP, there, ("t must lie on", "meta; got cpu")),
    ]
    for schedule, x, t, eps, words in cases:
        with says(ValueError, *words):
            draw(schedule, x, t, eps)  # type: ignore[operator]


def test_at_refuses() -> None:
    with says(ValueError, "table must have 1 dimensions"):
        at(torch.zeros(3, 1), torch.tensor([1]), torch.zeros(1))
    with says(ValueError, "t must lie in [0, 2]; got 3"):
        at(torch.zeros(3), torch.tensor([3]), torch.zeros(1))
    with says(TypeError, "x must be a tensor of floating dtype"):
        at(torch.zeros(3), torch.tensor([1]), torch.zeros(1, dtype=torch.int64))
