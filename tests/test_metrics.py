"""k-NN precision and recall against loops; the judge against its controls."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
