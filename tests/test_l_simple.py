"""Predictions, conversions, weights and the simple loss: exact oracles and errors."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ddpm_core import losses
from ddpm_core.losses import eps_weight, min_snr_weight, simple_loss
from ddpm_core.oracles import denoiser, gaussian
from ddpm_core.process import (
    PREDICTIONS,
    VARIANCES,
    convert,
    from_x_0,
    posterior_mean,
    posterior_mean_coefficients,
    posterior_variance,
    q_sample,
    reverse_variance,
    to_x_0,
)
from ddpm_core.schedules import Schedule, cosine, from_beta, linear, respace

TO_ZERO = from_beta(torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64))


def rotated(
    schedule: Schedule, x_0: Tensor, eps: Tensor, t: Tensor
) -> dict[str, Tensor]:
    """x_t and all targets by turning the complex number x_0 + i eps; no product code."""
    angle = torch.acos(schedule.alpha_bar[t].sqrt()).reshape(-1, *[1] * (x_0.ndim - 1))
    turned = torch.complex(x_0, eps) * torch.polar(torch.ones_like(angle), -angle)
    mean = posterior_mean(schedule, x_0, turned.real, t)
    return {"x_t": turned.real, "v": turned.imag, "x_0": x_0, "eps": eps, "mean": mean}


betas = st.lists(st.floats(1e-4, 0.9), min_size=1, max_size=8)


@settings(max_examples=60)
@given(
    beta=betas,
    size=st.lists(st.integers(1, 3), max_size=3),
    seed=st.integers(0, 2**32 - 1),
    pair=st.sampled_from(list(itertools.product(PREDICTIONS, repeat=2))),
)
def test_conversions(
    beta: list[float], size: list[int], seed: int, pair: tuple[str, str]
) -> None:
    schedule = from_beta(torch.tensor(beta, dtype=torch.float64))
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(1, schedule.T + 1)
    x_0, eps = torch.randn(
        2, schedule.T, *size, generator=generator, dtype=torch.float64
    )
    right = rotated(schedule, x_0, eps, t)
    source, wanted = pair
    given_ = convert(schedule, right["x_t"], t, right[source], source, wanted)
    back = convert(schedule, right["x_t"], t, given_, wanted, source)
    c_0, _ = posterior_mean_coefficients(schedule)
    worst = 1 / min(schedule.alpha_bar[-1].item() ** 0.5, c_0[1:].min().item(), 0.01)
    atol = 1e-13 * worst**2
    torch.testing.assert_close(given_, right[wanted], rtol=0, atol=atol)
    torch.testing.assert_close(back, right[source], rtol=0, atol=atol)
    asked = losses.target(schedule, x_0, t, eps, wanted)
    torch.testing.assert_close(asked, right[wanted], rtol=0, atol=1e-10)


def test_converting_to_itself_changes_nothing() -> None:
    output, t = (
        torch.randn(2, 3, generator=torch.Generator().manual_seed(0)),
        torch.tensor([5, 900]),
    )
    for prediction in PREDICTIONS:
        assert convert(linear(), output, t, output, prediction, prediction) is output


@pytest.mark.parametrize("make", [linear, cosine])
def test_float32_round_trips_keep_three_digits(make) -> None:  # type: ignore[no-untyped-def]
    schedule, t = make(), torch.tensor([1, 2, 10, 500, 900])
    x_0, eps = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    x_t = q_sample(schedule, x_0, t, eps)
    for source, wanted in itertools.product(("eps", "x_0", "v"), repeat=2):
        output = losses.target(schedule, x_0, t, eps, source)
        there = convert(schedule, x_t, t, output, source, wanted)
        back = convert(schedule, x_t, t, there, wanted, source)
        torch.testing.assert_close(back, output, rtol=0, atol=1e-3)


def test_no_eps_without_signal() -> None:
    x, t = torch.ones(1, 2), torch.tensor([3])
    zero = 0 * x
    calls = [
        lambda: to_x_0(TO_ZERO, x, t, x, "eps"),
        lambda: from_x_0(TO_ZERO, x, t, x, "eps"),
        lambda: convert(TO_ZERO, x, t, x, "v", "eps"),
        lambda: losses.target(TO_ZERO, x, t, x, "eps"),
        lambda: simple_loss(lambda x_t, t: x_t, TO_ZERO, x, t, x),
        lambda: eps_weight(TO_ZERO, reverse_variance(TO_ZERO, "fixed_large")),
        lambda: min_snr_weight(TO_ZERO, 5.0, "eps"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"beta_T = 1.*predict 'v' or 'x_0'"):
            call()
    assert torch.equal(to_x_0(TO_ZERO, x, t, -x, "v"), x)
    assert torch.equal(convert(TO_ZERO, x, t, zero, "x_0", "v"), zero)
    loss = simple_loss(lambda x_t, t: x_t, TO_ZERO, x, t, x, prediction="v")
    assert loss.item() == 4
    assert min_snr_weight(TO_ZERO, 5.0, "v")[3] == 0


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_simple_loss_against_numpy(prediction: str) -> None:
    schedule = linear()
    generator = torch.Generator().manual_seed(2)
    x_0, eps = torch.randn(2, 5, 1, 3, 2, generator=generator, dtype=torch.float64)
    t = torch.tensor([1, 2, 30, 500, 1000])

    def model(x: Tensor, t: Tensor) -> Tensor:
        return x.cos() * t.to(x.dtype).reshape(-1, 1, 1, 1).sqrt()

    got = simple_loss(model, schedule, x_0, t, eps, prediction=prediction)
    assert got.shape == (5,)
    c_0, c_t = (c.numpy() for c in posterior_mean_coefficients(schedule))
    for i, step in enumerate(t.tolist()):
        a = schedule.alpha_bar[step].item()
        start, noise = x_0[i].numpy(), eps[i].numpy()
        x_t = math.sqrt(a) * start + math.sqrt(1 - a) * noise
        wanted = {
            "eps": noise,
            "x_0": start,
            "v": math.sqrt(a) * noise - math.sqrt(1 - a) * start,
            "mean": c_0[step] * start + c_t[step] * x_t,
        }[prediction]
        right = np.mean((np.cos(x_t) * math.sqrt(step) - wanted) ** 2)
        assert abs(got[i].item() - right) < 1e-9 * max(1, right)


def test_the_weight_multiplies_each_sample() -> None:
    schedule, t = linear(), torch.tensor([1, 1000, 7])
    x, table = torch.ones(3, 4), torch.arange(1001.0)

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        return 0 * x_t

    plain = simple_loss(model, schedule, x, t, x)
    weighted = simple_loss(model, schedule, x, t, x, weight=table)
    assert torch.equal(weighted, plain * t)


def test_a_perfect_network_has_no_loss_on_one_point() -> None:
    x_0, t = (
        torch.full((4, 2), 0.3, dtype=torch.float64),
        torch.tensor([1, 10, 500, 1000]),
    )
    eps = torch.randn(
        4, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    for prediction in PREDICTIONS:
        point = denoiser(gaussian(x_0[0], 0.0), linear(), prediction)
        loss = simple_loss(point, linear(), x_0, t, eps, prediction=prediction)
        assert loss.abs().max() < 1e-12


def test_the_model_is_called_with_training_steps() -> None:
    short, seen = respace(linear(), [10, 400, 990]), []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return x

    x = torch.zeros(3, 2)
    simple_loss(model, short, x, torch.tensor([3, 1, 2]), x)
    assert seen[0].tolist() == [990, 10, 400]
    assert seen[0].dtype == torch.int64


@pytest.mark.parametrize(("make", "mean"), [(linear, 0.2755), (cosine, 0.4956)])
def test_floor_of_the_loss(make, mean: float) -> None:  # type: ignore[no-untyped-def]
    schedule = make()
    assert round(schedule.alpha_bar[1:].mean().item(), 4) == mean
    model = denoiser(gaussian(torch.zeros(1, dtype=torch.float64), 1.0), schedule)
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    grid = torch.tensor(list(itertools.product(nodes, nodes)), dtype=torch.float64)
    share = torch.tensor([a * b for a, b in itertools.product(weights, weights)])
    share = share / share.sum()
    for t in (1, 100, 700, 1000):
        steps = torch.full((len(grid),), t)
        loss = simple_loss(model, schedule, grid[:, :1], steps, grid[:, 1:])
        assert abs((share * loss).sum() - schedule.alpha_bar[t]) < 1e-10


def test_weights_of_the_paper() -> None:
    schedule = linear()
    weight = eps_weight(schedule, reverse_variance(schedule, "fixed_large"))
    shown = [f"{weight[t]:.2g}" for t in (1, 100, 500, 1000)]
    assert shown == ["0.5", "0.01", "0.0055", "0.01"]
    assert [round(weight[t].item(), 4) for t in (100, 500, 1000)] == [
        0.0101,
        0.0055,
        0.0102,
    ]
    assert weight[0].isnan()


@pytest.mark.parametrize(
    "make", [linear, cosine, lambda: respace(linear(), [1, 9, 800])]
)
def test_small_variance_weight_is_the_fall_of_snr(make) -> None:  # type: ignore[no-untyped-def]
    schedule = make()
    snr = schedule.snr
    right = 0.5 * (snr[1:-1] / snr[2:] - 1)
    for table in (
        posterior_variance(schedule),
        reverse_variance(schedule, "fixed_small"),
    ):
        torch.testing.assert_close(
            eps_weight(schedule, table)[2:], right, rtol=1e-9, atol=0
        )


@pytest.mark.parametrize("rule", VARIANCES)
def test_weight_is_the_distance_of_the_means(rule: str) -> None:
    schedule = cosine()
    variance = reverse_variance(schedule, rule)
    t = torch.arange(1, 1001)
    one = torch.ones(1000, 1, dtype=torch.float64)
    guess = to_x_0(schedule, one, t, one, "eps")
    other = to_x_0(schedule, one, t, 3 * one, "eps")
    apart = posterior_mean(schedule, guess, one, t) - posterior_mean(
        schedule, other, one, t
    )
    right = apart[:, 0] ** 2 / (2 * variance[1:]) / 4
    torch.testing.assert_close(
        eps_weight(schedule, variance)[1:], right, rtol=1e-6, atol=0
    )


@settings(max_examples=40)
@given(beta=betas, gamma=st.floats(0.01, 100))
def test_min_snr(beta: list[float], gamma: float) -> None:
    schedule = from_beta(torch.tensor(beta, dtype=torch.float64))
    by = {p: min_snr_weight(schedule, gamma, p) for p in ("eps", "x_0", "v")}
    for t in range(1, schedule.T + 1):
        a = math.prod(1 - b for b in beta[:t])
        snr = a / (1 - a)
        capped = min(snr, gamma)
        assert math.isclose(by["eps"][t].item(), capped / snr, rel_tol=1e-7)
        assert math.isclose(by["x_0"][t].item(), capped, rel_tol=1e-7)
        assert math.isclose(by["v"][t].item(), capped / (snr + 1), rel_tol=1e-7)
    assert all(table[0].isnan() for table in by.values())


def test_bad_names_and_numbers() -> None:
    x, t, schedule = torch.zeros(2, 3), torch.tensor([1, 2]), linear()
    with pytest.raises(ValueError, match="prediction must be one of 'eps', 'x_0', 'v'"):
        to_x_0(schedule, x, t, x, "epsilon")
    with pytest.raises(ValueError, match="prediction must be one of"):
        from_x_0(schedule, x, t, x, "score")
    with pytest.raises(ValueError, match="source must be one of"):
        convert(schedule, x, t, x, "noise", "v")
    with pytest.raises(ValueError, match="target must be one of"):
        convert(schedule, x, t, x, "v", "noise")
    with pytest.raises(ValueError, match="prediction must be one of"):
        losses.target(schedule, x, t, x, "score")
    with pytest.raises(ValueError, match="prediction must be one of"):
        min_snr_weight(schedule, 5.0, "mean")
    for gamma in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="gamma must be"):
            min_snr_weight(schedule, gamma, "v")
    with pytest.raises(TypeError, match="gamma must be"):
        min_snr_weight(schedule, "5", "v")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="variance must have shape"):
        eps_weight(schedule, torch.ones(1000))
    with pytest.raises(TypeError, match="variance must be"):
        eps_weight(schedule, "fixed_large")  # type: ignore[arg-type]


def test_bad_tensors() -> None:
    x, t, schedule = torch.zeros(2, 3), torch.tensor([1, 2]), linear()

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        return x_t

    with pytest.raises(ValueError, match="must have the shape of"):
        simple_loss(model, schedule, x, t, torch.zeros(2, 1))
    with pytest.raises(
        ValueError, match="the model's output must have the shape of x_0"
    ):
        simple_loss(lambda x_t, t: x_t[:, :1], schedule, x, t, x)
    with pytest.raises(ValueError, match="output must have the shape of x_t"):
        to_x_0(schedule, x, t, torch.zeros(2, 1), "v")
    with pytest.raises(ValueError, match="x_0 must have the shape of x_t"):
        from_x_0(schedule, x, t, torch.zeros(2, 1), "v")
    for steps in (torch.tensor([0, 1]), torch.tensor([1, 1001])):
        for call in (
            lambda s=steps: simple_loss(model, schedule, x, s, x),
            lambda s=steps: to_x_0(schedule, x, s, x, "v"),
            lambda s=steps: from_x_0(schedule, x, s, x, "x_0"),
        ):
            with pytest.raises(ValueError, match=r"t must lie in \[1, 1000\]"):
                call()
    with pytest.raises(TypeError, match="int64"):
        simple_loss(model, schedule, x, t.int(), x)
    with pytest.raises(TypeError, match="floating"):
        simple_loss(model, schedule, x.long(), t, x.long())
    with pytest.raises(ValueError, match="weight must have shape"):
        simple_loss(model, schedule, x, t, x, weight=torch.ones(2))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_meta_with_backward(prediction: str) -> None:
    schedule = linear().to("meta", torch.float32)
    with torch.device("meta"):
        layer = torch.nn.Conv2d(1, 1, 3, padding=1)
        x, t = torch.zeros(2, 1, 8, 8), torch.ones(2, dtype=torch.int64)
    weight = eps_weight(schedule, reverse_variance(schedule, "fixed_small"))
    loss = simple_loss(
        lambda x, t: layer(x), schedule, x, t, x, prediction=prediction, weight=weight
    )
    loss.mean().backward()
    assert layer.weight.grad is not None
    for other in PREDICTIONS:
        assert convert(schedule, x, t, x, prediction, other).shape == x.shape
    assert min_snr_weight(schedule, 5.0, "v").device.type == "meta"


def test_fake_cuda() -> None:
    with FakeTensorMode():
        schedule = linear(50).to("cuda", torch.float32)
        x, t = (
            torch.zeros(2, 3, device="cuda"),
            torch.ones(2, dtype=torch.int64, device="cuda"),
        )
        for prediction in PREDICTIONS:
            loss = simple_loss(lambda x, t: x, schedule, x, t, x, prediction=prediction)
            assert loss.device.type == "cuda"


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gradient_reaches_the_output(prediction: str) -> None:
    x_t, t = (
        torch.randn(2, 3, generator=torch.Generator().manual_seed(5)),
        torch.tensor([5, 500]),
    )
    output = torch.zeros(2, 3, requires_grad=True)
    to_x_0(linear(), x_t, t, output, prediction).sum().backward()
    assert output.grad is not None
    assert output.grad.isfinite().all()
    assert (output.grad != 0).all()
