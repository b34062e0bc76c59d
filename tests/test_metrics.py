"""Distances and shares against definitions, libraries and known laws; the judge."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch_fidelity import metric_prc as prc

from ddpm_core import data, metrics


def brute_force(real, generated, k):
    """The definition, point by point."""

    def radius(i, points):
        rest = [(points[i] - p).norm().item() for j, p in enumerate(points) if j != i]
        return sorted(rest)[k - 1]

    def covered(x, points, radii):
        return any(
            (x - p).norm().item() <= r for p, r in zip(points, radii, strict=True)
        )

    of_real = [radius(i, real) for i in range(len(real))]
    of_generated = [radius(i, generated) for i in range(len(generated))]
    precision = sum(covered(x, real, of_real) for x in generated) / len(generated)
    recall = sum(covered(x, generated, of_generated) for x in real) / len(real)
    return precision, recall


@given(
    n=st.integers(5, 12),
    m=st.integers(5, 12),
    k=st.integers(1, 4),
    shift=st.floats(0, 4),
    seed=st.integers(0, 10**6),
)
def test_precision_and_recall_by_the_definition(n, m, k, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    real = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    generated = torch.randn(m, 2, generator=generator, dtype=torch.float64) + shift
    found = metrics.precision_recall(real, generated, k)
    assert found == pytest.approx(brute_force(real, generated, k))


def test_extremes():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=generator)
    assert metrics.precision_recall(x, x) == (1, 1)
    assert metrics.precision_recall(x, x + 100) == (0, 0)
    one_place = x[:1] + 1e-6 * torch.randn(50, 3, generator=generator)
    collapsed = metrics.precision_recall(x, one_place)
    assert collapsed.precision == 1
    assert collapsed.recall <= 1 / 50


@pytest.mark.parametrize("k", [0, 4, 1.0])
def test_impossible_k(k):
    with pytest.raises((ValueError, TypeError), match="k"):
        metrics.knn_radii(torch.zeros(4, 2), k)


def test_impossible_features():
    with pytest.raises(ValueError, match="generated"):
        metrics.precision_recall(torch.zeros(5, 2), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="real"):
        metrics.precision_recall(torch.zeros(5), torch.zeros(5, 3))


def test_nearest_is_exact_for_copies():
    x = data.digits("test").images
    assert metrics.nearest(x[:5], x).tolist() == [0] * 5


def test_non_digits():
    generator = torch.Generator().manual_seed(0)
    x = data.digits("train").images
    shuffled = metrics.shuffled_pixels(x[:50], generator)
    assert torch.equal(
        shuffled.flatten(1).sort().values, x[:50].flatten(1).sort().values
    )
    assert not torch.equal(shuffled, x[:50])
    single = metrics.independent_pixels(x, 2000, generator)
    assert (single.mean(0) - x.mean(0)).abs().max() < 5 / 2000**0.5
    upper, lower = single[:, 0, 3, 3], single[:, 0, 4, 3]
    assert torch.corrcoef(torch.stack([upper, lower]))[0, 1].abs() < 5 / 2000**0.5
    two = torch.stack([torch.full((1, 8, 8), float(y)) for y in (0, 1)]).repeat(
        9, 1, 1, 1
    )
    mixed = metrics.blends(two, torch.tensor([0, 1] * 9), 500, generator)
    assert mixed.min() >= 0.35 - 1e-6
    assert mixed.max() <= 0.65 + 1e-6


@pytest.fixture(scope="module")
def judge():
    x, labels = data.digits("train")
    return metrics.Judge(x, labels, data.digits("test").images)


def test_the_judge_knows_digits(judge):
    test = data.digits("test")
    right = judge.probabilities(test.images).argmax(1) == test.labels
    assert right.double().mean() > 0.93
    assert judge.share > 0.85
    assert min(judge.real) > 0.85
    verdict = judge.verdict(test.images)
    assert verdict.good
    assert verdict.copies <= 0.011


def test_features_are_the_hidden_layer(judge):
    x = data.digits("test").images[:20]
    weight, bias = (
        torch.from_numpy(a[1])
        for a in (judge.network.coefs_, judge.network.intercepts_)
    )
    logits = judge.features(x) @ weight + bias
    torch.testing.assert_close(logits.softmax(1), judge.probabilities(x))


def controls(judge):
    generator = torch.Generator().manual_seed(1)
    x, labels = data.digits("train")
    noise = torch.randn(500, 1, 8, 8, generator=generator)
    some = x[torch.randperm(len(x), generator=generator)[:500]]
    means = torch.stack([x[labels == c].mean(0) for c in range(10)])
    return {
        "noise": (noise.clamp(-1, 1), "ab"),
        "half noised": ((0.5**0.5 * (some + noise)).clamp(-1, 1), "ab"),
        "means": ((means.repeat(50, 1, 1, 1) + 0.1 * noise).clamp(-1, 1), "b"),
        "pixels": (metrics.independent_pixels(x, 500, generator), "ab"),
        "copies": (some, "d"),
        "one digit": (x[labels == 3].repeat(4, 1, 1, 1)[:500], "bcd"),
    }


def test_each_control_fails_where_it_should(judge):
    for name, (x, fails) in controls(judge).items():
        passed = judge.verdict(x).passed
        assert not set(fails) & set(passed), (name, passed)


def test_the_judge_is_reproducible(judge):
    x, labels = data.digits("train")
    test = data.digits("test").images
    again = metrics.Judge(x, labels, test)
    assert torch.equal(judge.probabilities(test), again.probabilities(test))


def test_bad_images(judge):
    with pytest.raises(ValueError, match="x"):
        judge.verdict(torch.full((500, 1, 8, 8), 1.5))


def random_features(n, dims, seed, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(dims, dims, generator=generator, dtype=torch.float64)
    x = torch.randn(n, dims, generator=generator, dtype=torch.float64)
    return scale * x @ mixed / dims**0.5 + shift


def frechet_by_scipy(x, y):
    """The formula with SciPy's root of a matrix that is not symmetric."""
    from scipy.linalg import sqrtm

    a, b = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    cross = np.trace(sqrtm(np.atleast_2d(a @ b))).real
    gap = ((x.mean(0) - y.mean(0)) ** 2).sum().item()
    return gap + np.trace(np.atleast_2d(a)) + np.trace(np.atleast_2d(b)) - 2 * cross


@pytest.mark.parametrize("dims", [2, 5, 20])
@pytest.mark.parametrize("seed", [0, 1])
def test_frechet_distance_against_scipy_and_torchmetrics(dims, seed):
    x = random_features(300, dims, seed)
    y = random_features(200, dims, seed + 50, scale=1.4, shift=0.3)
    found = metrics.frechet_distance(metrics.moments(x), metrics.moments(y))
    assert found == pytest.approx(frechet_by_scipy(x, y), rel=1e-9)
    scores = metrics.library_scores(x, y, torch.zeros(200, 3))
    assert scores.frechet == pytest.approx(found, rel=1e-9)


def test_frechet_distance_where_it_is_known():
    def law(mean, variance):
        return metrics.Moments(torch.tensor(mean), torch.tensor(variance).diag(), 9)

    a, b = law([0.0, 0.0], [1.0, 4.0]), law([1.0, 2.0], [4.0, 4.0])
    assert metrics.frechet_distance(a, b) == pytest.approx(1 + 4 + 1)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    point = law([3.0, 0.0], [0.0, 0.0])
    assert metrics.frechet_distance(a, point) == pytest.approx(9 + 5, abs=1e-5)


@given(seed=st.integers(0, 10**6), dims=st.integers(1, 6))
def test_frechet_distance_is_symmetric_and_does_not_care_for_rotations(seed, dims):
    x, y = random_features(40, dims, seed), random_features(30, dims, seed + 1, 2, 1)
    a, b = metrics.moments(x), metrics.moments(y)
    found = metrics.frechet_distance(a, b)
    assert found >= -1e-9
    assert metrics.frechet_distance(b, a) == pytest.approx(found, rel=1e-6, abs=1e-9)
    turn = torch.linalg.qr(random_features(dims, dims, seed + 2))[0]
    turned = [metrics.moments(z @ turn) for z in (x, y)]
    assert metrics.frechet_distance(*turned) == pytest.approx(found, rel=1e-6, abs=1e-9)


def test_moments_are_those_of_numpy():
    x = random_features(50, 4, 0)
    mean, covariance, size = metrics.moments(x)
    assert size == 50
    np.testing.assert_allclose(mean, x.numpy().mean(0))
    np.testing.assert_allclose(covariance, np.cov(x.numpy(), rowvar=False))


def test_extrapolation_takes_most_of_the_bias_away():
    exact = metrics.Moments(torch.zeros(10).double(), torch.eye(10).double(), 9)
    generator = torch.Generator().manual_seed(0)
    values, raw = [], []
    for _ in range(20):
        x = torch.randn(600, 10, generator=generator)
        line = metrics.frechet_extrapolated(exact, x, generator)
        values.append(line.value)
        raw.append(line.distances[0])
        assert line.sizes == (600, 300, 200, 150, 120, 100)
    assert sum(raw) / 20 == pytest.approx((10 + 110 / 4) / 600, rel=0.15)
    assert abs(sum(values) / 20) < 0.25 * sum(raw) / 20


def test_kernel_distance_against_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    x, y = random_features(60, 7, 0), random_features(60, 7, 1, scale=1.2)
    found = metrics.kernel_distance(x, y)
    assert found == pytest.approx(poly_mmd(x, y).item(), rel=1e-9)
    assert metrics.kernel_distance(y, x) == pytest.approx(found, rel=1e-9)
    scores = metrics.library_scores(x, y, torch.zeros(60, 3))
    assert abs(scores.kernel - found) < scores.kernel_spread


def test_kernel_distance_of_equal_laws_is_zero_on_average():
    x = torch.randn(200, 40, 3, generator=torch.Generator().manual_seed(0))
    found = torch.tensor(
        [metrics.kernel_distance(*both) for both in zip(x[::2], x[1::2], strict=True)]
    )
    assert abs(found.mean()) < 4 * found.std() / 10
    assert found.min() < 0


def test_inception_score_against_torchmetrics():
    from torchmetrics.image.inception import InceptionScore

    logits = 3 * random_features(200, 5, 3)
    theirs = InceptionScore(feature=metrics.Through(5), splits=1)
    theirs.update(logits)
    found = metrics.inception_score(logits.softmax(1))
    assert found == pytest.approx(theirs.compute()[0].item(), rel=1e-6)


def test_library_scores_do_not_touch_the_global_generator():
    x, logits = random_features(60, 3, 0), random_features(60, 4, 1)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = metrics.library_scores(x, x + 1, logits, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert metrics.library_scores(x, x + 1, logits, seed=1) == first


def clouds(which, n, seed):
    """Points, n of them, around each of four far-off centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = 100.0 * torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])[which]
    z = torch.randn(len(which) * n, 2, generator=generator)
    return centres.repeat_interleave(n, 0) + z


def test_precision_and_recall_of_gaussians_of_known_overlap():
    """Three of four clouds made; then all of them and as much that is no data."""
    real, again = clouds([0, 1, 2, 3], 200, 0), clouds([0, 1, 2, 3], 200, 1)
    best = metrics.precision_recall(real, again)
    assert min(best) > 0.93
    fewer = metrics.precision_recall(real, clouds([0, 1, 2], 200, 1))
    assert fewer.precision == pytest.approx(best.precision, abs=0.03)
    assert fewer.recall == pytest.approx(0.75 * best.recall, abs=0.03)
    junk = torch.cat([again, 1e4 + torch.randn(800, 2)])
    half = metrics.precision_recall(real, junk)
    assert half.precision == pytest.approx(0.5 * best.precision, abs=1e-9)
    assert half.recall == pytest.approx(best.recall, abs=0.01)


def test_precision_and_recall_against_torch_fidelity():
    real = random_features(120, 6, 0).float()
    made = random_features(100, 6, 1, scale=0.8, shift=0.2).float()
    theirs = prc.prc_features_to_metric(
        made, real, prc_neighborhood=3, prc_batch_size=50, verbose=False
    )
    found = metrics.precision_recall(real, made, k=3)
    assert found.precision == pytest.approx(theirs[prc.KEY_METRIC_PRECISION], abs=1e-6)
    assert found.recall == pytest.approx(theirs[prc.KEY_METRIC_RECALL], abs=1e-6)


@given(n=st.integers(1, 9), m=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_nearest_neighbours_by_the_definition(n, m, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 3, 3, generator=generator)
    y = torch.rand(m, 1, 3, 3, generator=generator)
    found = metrics.nearest_neighbours(x, y, batch=4)
    torch.testing.assert_close(found.distance, metrics.nearest(x, y))
    apart = (x - y[found.place]).double().flatten(1).norm(dim=1)
    torch.testing.assert_close(found.distance, apart)


def test_copies_are_found_and_nothing_else():
    x = data.digits("train").images
    assert metrics.copied(x[:50], x, 1e-6) == 1
    assert metrics.copied(x[:50], x[50:], 1e-6) == 0
    half = torch.cat([x[:50], data.digits("test").images[:50]])
    assert metrics.copied(half, x, 1e-6) == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.moments(torch.zeros(1, 2)), "number of features"),
        (lambda: metrics.moments(torch.full((3, 2), torch.nan)), "finite"),
        (lambda: metrics.kernel_distance(torch.zeros(3, 2), torch.zeros(3, 1)), "y"),
        (lambda: metrics.kernel_distance(torch.zeros(1, 2), torch.zeros(3, 2)), "x"),
        (lambda: metrics.inception_score(torch.zeros(3)), "probabilities"),
        (lambda: metrics.inception_score(torch.full((3, 2), -1.0)), "lie in"),
        (lambda: metrics.copied(torch.zeros(3, 2), torch.zeros(3, 2), -1.0), "radius"),
        (
            lambda: metrics.nearest_neighbours(torch.zeros(3, 2), torch.zeros(3, 4)),
            "y",
        ),
    ],
)
def test_impossible_measurements(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_distances_of_different_spaces_are_refused():
    one, two = (metrics.moments(random_features(9, d, 0)) for d in (2, 3))
    with pytest.raises(ValueError, match="generated"):
        metrics.frechet_distance(one, two)
