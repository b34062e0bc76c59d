"""The averaged weights: the recursion, the window, and giving weights back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ddpm_core.ema import EMA, ema_decay


def linear(seed: int = 0) -> nn.Linear:
    layer = nn.Linear(3, 2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return layer


@given(decay=st.floats(0, 0.999), steps=st.integers(1, 30))
def test_average_is_the_weighted_sum_of_all_weights(decay, steps):
    layer = linear()
    ema, history = EMA(layer, decay), [layer.weight.detach().clone()]
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        with torch.no_grad():
            step = torch.randn(2, 3, generator=generator, dtype=torch.float64)
            layer.weight.add_(step)
        ema.update(layer)
        history.append(layer.weight.detach().clone())
    weights = [decay**steps]
    weights += [(1 - decay) * decay ** (steps - j) for j in range(1, steps + 1)]
    assert sum(weights) == pytest.approx(1)
    expected = sum(w * x for w, x in zip(weights, history, strict=True))
    torch.testing.assert_close(ema.average["weight"], expected)


@pytest.mark.parametrize(
    ("steps", "decay"),
    [(1, 0.0), (10, 0.0), (20, 0.5), (1000, 0.99), (100_000, 0.9999), (10**6, 0.9999)],
)
def test_decay_follows_the_length_of_the_run(steps, decay):
    assert ema_decay(steps) == pytest.approx(decay)


def test_swapped_lends_and_gives_back():
    layer = linear()
    ema = EMA(layer, 0.5)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1)
    ema.update(layer)
    own = layer.weight.detach().clone()
    with ema.swapped(layer):
        torch.testing.assert_close(layer.weight.detach(), before + 0.5)
    assert torch.equal(layer.weight, own)


def test_swapped_gives_back_after_an_exception():
    layer = linear()
    ema = EMA(layer, 0.5)
    with torch.no_grad():
        layer.weight.add_(1)
    own = layer.weight.detach().clone()
    with pytest.raises(KeyboardInterrupt), ema.swapped(layer):
        raise KeyboardInterrupt
    assert torch.equal(layer.weight, own)


def test_swapped_keeps_the_parameters_an_optimiser_holds():
    layer = linear()
    parameters = [id(p) for p in layer.parameters()]
    with EMA(layer, 0.5).swapped(layer):
        assert [id(p) for p in layer.parameters()] == parameters


def test_integer_buffers_are_copied_and_float_buffers_averaged():
    layer = nn.BatchNorm1d(2)
    ema = EMA(layer, 0.75)
    layer.num_batches_tracked.fill_(4)
    layer.running_mean.fill_(1.0)
    ema.update(layer)
    assert ema.average["num_batches_tracked"].item() == 4
    assert ema.average["running_mean"].tolist() == [0.25, 0.25]


def test_average_is_a_copy_of_its_own():
    layer = linear()
    ema = EMA(layer, 0.9)
    with torch.no_grad():
        layer.weight.zero_()
    assert ema.average["weight"].abs().min() > 0


def test_state_goes_round():
    first, second = EMA(linear(0), 0.9), EMA(linear(1), 0.9)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.average["weight"], first.average["weight"])
    second.average["weight"].zero_()
    assert first.average["weight"].abs().min() > 0


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, float("nan"), "0.9", True])
def test_impossible_decays_are_refused(decay):
    with pytest.raises((ValueError, TypeError), match="decay"):
        EMA(linear(), decay)


@pytest.mark.parametrize("steps", [0, -1, 1.5])
def test_impossible_lengths_are_refused(steps):
    with pytest.raises((ValueError, TypeError), match="steps"):
        ema_decay(steps)


def test_foreign_state_is_refused():
    ema = EMA(linear(), 0.9)
    with pytest.raises(ValueError, match="names of the model"):
        ema.load_state_dict({"weight": torch.zeros(2, 3)})
    wrong = {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}
    with pytest.raises(ValueError, match="shape"):
        ema.load_state_dict(wrong)
