"""The flow against autograd, SciPy and sums; the energy distance against closed forms."""

import math

import pytest
import torch
from scipy.stats import energy_distance as scipy_energy

from ddpm_core.flows import AffineCoupling, AffineFlow
from ddpm_core.losses import Estimate
from ddpm_core.metrics import energy_distance, energy_estimate

F64 = torch.float64


def random_flow(dim: int, layers: int, seed: int = 0) -> AffineFlow:
    flow = AffineFlow(dim, layers=layers, width=8).double()
    generator = torch.Generator().manual_seed(seed)
    for weight in flow.parameters():
        draw = torch.randn(weight.shape, dtype=F64, generator=generator)
        weight.data = 0.3 * draw
    return flow


def points(n: int, dim: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, dtype=F64, generator=generator)


@pytest.mark.parametrize("dim", [2, 3, 4, 7])
def test_inverse_is_exact(dim: int) -> None:
    flow, z = random_flow(dim, 5), points(50, dim)
    x, log_det = flow(z)
    back, log_det_back = flow.inverse(x)
    torch.testing.assert_close(back, z, atol=1e-12, rtol=0)
    torch.testing.assert_close(log_det_back, -log_det, atol=1e-12, rtol=0)
    assert (x - z).abs().amax(0).min() > 0.01  # every coordinate is moved


@pytest.mark.parametrize("dim", [2, 3, 5])
def test_log_determinant_against_autograd(dim: int) -> None:
    flow, z = random_flow(dim, 4), points(6, dim)
    _, log_det = flow(z)
    for i in range(len(z)):
        jacobian = torch.autograd.functional.jacobian(
            lambda row: flow(row[None])[0][0], z[i]
        )
        assert abs(torch.linalg.slogdet(jacobian)[1] - log_det[i]) < 1e-12


def test_density_integrates_to_one() -> None:
    flow = random_flow(2, 4)
    side = torch.linspace(-9, 9, 361, dtype=F64)
    plane = torch.cartesian_prod(side, side)
    with torch.no_grad():
        density = flow.log_prob(plane).exp().reshape(361, 361)
    total = torch.trapezoid(torch.trapezoid(density, side), side)
    assert total.item() == pytest.approx(1, abs=1e-6)


def test_a_new_flow_is_the_normal_law() -> None:
    flow, x = AffineFlow(3).double(), points(20, 3)
    normal = -0.5 * (x.square() + math.log(2 * math.pi)).sum(1)
    torch.testing.assert_close(flow.log_prob(x).detach(), normal)


def test_each_layer_keeps_its_half() -> None:
    x = points(10, 5)
    for swap, kept in ((False, slice(0, 3)), (True, slice(3, 5))):
        layer = AffineCoupling(5, 8, swap=swap).double()
        for weight in layer.parameters():
            weight.data = weight.data + 0.1
        y, _ = layer(x)
        assert torch.equal(y[:, kept], x[:, kept])
        assert int((y != x).any(0).sum()) == 5 - x[:, kept].shape[1]


def test_scales_are_limited() -> None:
    layer = AffineCoupling(2, 8).double()
    for weight in layer.parameters():
        weight.data = weight.data + 100.0
    _, log_det = layer(points(10, 2))
    assert log_det.abs().max() <= 2


def test_samples_follow_the_generator() -> None:
    flow = random_flow(2, 3)
    first, second = (flow.sample(5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.dtype == F64


def test_maximum_likelihood_finds_a_shift_and_a_scale() -> None:
    data = points(4000, 2) * 0.5 + 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = AffineFlow(2, layers=2, width=4).double()
    optimiser = torch.optim.Adam(flow.parameters(), 0.05)
    for _ in range(150):
        loss = -flow.log_prob(data).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    exact = math.log(2 * math.pi * 0.25) + 1  # the entropy of N(2, 1/4) in the plane
    assert loss.item() == pytest.approx(exact, abs=0.05)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="dim"):
        AffineFlow(1)
    with pytest.raises(ValueError, match="layers"):
        AffineFlow(2, layers=0)
    with pytest.raises(ValueError, match="shape"):
        AffineFlow(2).log_prob(torch.zeros(4, 3))
    with pytest.raises(TypeError):
        AffineCoupling(2)(torch.zeros(4, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="n must"):
        AffineFlow(2).sample(0)


# ---- energy distance


def test_energy_against_scipy() -> None:
    x, y = points(40, 1), points(60, 1, seed=2) + 0.7
    own = torch.cdist(x, x).sum() / (40 * 39) + torch.cdist(y, y).sum() / (60 * 59)
    biased = torch.cdist(x, x).mean() + torch.cdist(y, y).mean()
    theirs = scipy_energy(x[:, 0], y[:, 0]) ** 2 + (biased - own).item()
    whole = energy_distance(x, y)
    assert whole == pytest.approx(theirs, abs=1e-12)
    twice = energy_estimate(torch.cat([x, x]), torch.cat([y, y]), blocks=2)
    assert twice.value.item() == pytest.approx(whole, abs=1e-12)
    assert twice.standard_error.item() == pytest.approx(0, abs=1e-12)


def test_energy_is_unbiased_and_its_error_honest() -> None:
    found = [
        energy_estimate(points(60, 2, seed=2 * k), points(40, 2, seed=2 * k + 1), 5)
        for k in range(300)
    ]
    assert isinstance(found[0], Estimate)
    values = torch.stack([f.value for f in found])
    bars = torch.stack([f.standard_error for f in found])
    assert abs(values.mean()) < 4 * values.std() / 300**0.5
    assert bool((values < 0).any())
    assert 0.8 < (bars.square().mean().sqrt() / values.std()).item() < 1.2


def test_energy_of_two_shifted_normals() -> None:
    def mean_distance(gap: float) -> float:
        spread = 2 / math.sqrt(math.pi) * math.exp(-(gap**2) / 4)
        return spread + gap * math.erf(gap / 2)

    value, error = energy_estimate(points(6000, 1), points(6000, 1, seed=2) + 1)
    exact = 2 * mean_distance(1.0) - 2 * mean_distance(0.0)
    assert abs(value - exact) < 4 * error < 0.1


def test_energy_refuses() -> None:
    x = torch.zeros(20, 2)
    with pytest.raises(ValueError, match="number of samples y"):
        energy_estimate(x, x[:10])
    with pytest.raises(ValueError, match="blocks"):
        energy_estimate(x, x, blocks=1)
    with pytest.raises(ValueError, match="number of samples y"):
        energy_distance(x, x[:1])
    for measure in (energy_distance, energy_estimate):
        with pytest.raises(ValueError, match="shape"):
            measure(x, torch.zeros(20, 3))
        with pytest.raises(ValueError, match="finite"):
            measure(x, x + math.inf)
