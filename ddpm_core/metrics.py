"""Written by tools/extract.py; edit the chapters:

- book/ddpm/two_d.ipynb
- book/ddpm/training.ipynb
- book/ddpm/families.ipynb
"""

import warnings
from typing import NamedTuple

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from ddpm_core import checks
from ddpm_core.losses import Estimate

__all__ = [
    "EXACT",
    "Judge",
    "PrecisionRecall",
    "Verdict",
    "blends",
    "energy_distance",
    "energy_estimate",
    "fit_classifier",
    "independent_pixels",
    "knn_radii",
    "nearest",
    "precision_recall",
    "shuffled_pixels",
]


# --- book/ddpm/two_d.ipynb · two-d-export-energy · How good is a sample
def energy_distance(x: Tensor, y: Tensor) -> float:
    r"""Energy distance of two samples, `eq-two-d-energy`; unbiased, so it may be < 0.

    Szekely and Rizzo 2013, (2.5), without the distances of points to themselves.
    Args: x, y: float tensors [N, D] and [M, D], finite, independent; N, M at least 2.
    Raises: TypeError, ValueError for anything else.
    >>> x = torch.tensor([[0.0], [1.0]])
    >>> energy_distance(x, x), energy_distance(x, x + 100)
    (-1.0, 198.0)
    """
    checks.tensor("x", x, ndim=2)
    checks.tensor("y", y, shape=(None, x.shape[1]))
    checks.same_device("y", y, "x", x)
    n = checks.integer("the number of samples x", len(x), 2)
    m = checks.integer("the number of samples y", len(y), 2)
    checks.finite("x", x)
    checks.finite("y", y)
    within_x = torch.cdist(x, x).sum() / (n * (n - 1))
    within_y = torch.cdist(y, y).sum() / (m * (m - 1))
    return (2 * torch.cdist(x, y).mean() - within_x - within_y).item()


# --- book/ddpm/training.ipynb · training-export-knn · Are they digits? A judge
class PrecisionRecall(NamedTuple):
    r"""Shares in 0...1: of samples among the real images, and the other way round.

    >>> PrecisionRecall(0.5, 1.0).recall
    1.0
    """

    precision: float
    recall: float


def knn_radii(features: Tensor, k: int = 3) -> Tensor:
    r"""Distance from each row of [N, D] to its k-th nearest other row, [N].

    >>> knn_radii(torch.tensor([[0.0], [1.0], [3.0]]), k=1).tolist()
    [1.0, 1.0, 2.0]
    """
    checks.tensor("features", features, ndim=2)
    checks.integer("k", k, low=1, high=len(features) - 1)
    distances = torch.cdist(features, features, compute_mode=EXACT)
    distances.fill_diagonal_(float("inf"))
    return distances.kthvalue(k, dim=1).values


EXACT = "donot_use_mm_for_euclid_dist"


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> PrecisionRecall:
    r"""Precision and recall by nearest neighbours (Kynkaanniemi et al. 2019, eq. 1-3).

    `eq-training-precision`: a point is covered by a set if it is no further from one of
    the set's points than that point's k-th neighbour in the set. Features [N, D] and
    [M, D]. Raises TypeError or ValueError.

    >>> line = torch.arange(8.0).reshape(8, 1)
    >>> precision_recall(line, line[:4] + 0.1, k=1)
    PrecisionRecall(precision=1.0, recall=0.625)
    """
    checks.tensor("real", real, ndim=2)
    checks.tensor("generated", generated, shape=(None, real.shape[1]))
    distances = torch.cdist(generated, real, compute_mode=EXACT)
    covered = (distances <= knn_radii(real, k)[None, :]).any(1)
    reached = (distances <= knn_radii(generated, k)[:, None]).any(0)
    return PrecisionRecall(
        covered.double().mean().item(), reached.double().mean().item()
    )


def nearest(x: Tensor, y: Tensor) -> Tensor:
    r"""Distance from each of the images x [N, ...] to the nearest of y [M, ...], [N].

    >>> nearest(torch.zeros(1, 1, 2, 2), torch.ones(3, 1, 2, 2)).tolist()
    [2.0]
    """
    flat = (x.flatten(1).double(), y.flatten(1).double())
    return torch.cdist(*flat, compute_mode=EXACT).min(1).values


# --- book/ddpm/training.ipynb · training-export-none · Are they digits? A judge
def shuffled_pixels(x: Tensor, generator: torch.Generator) -> Tensor:
    r"""Each image [N, ...] with its own pixels in an order drawn at random.

    >>> x = torch.arange(4.0).reshape(1, 1, 2, 2)
    >>> shuffled_pixels(x, torch.Generator().manual_seed(0)).sum().item()
    6.0
    """
    order = torch.rand(x.flatten(1).shape, generator=generator).argsort(1)
    return x.flatten(1).gather(1, order).reshape(x.shape)


def independent_pixels(x: Tensor, n: int, generator: torch.Generator) -> Tensor:
    r"""`n` images, each pixel from an image of [N, ...] of its own: right marginals.

    >>> independent_pixels(torch.ones(4, 1, 2, 2), 3, torch.Generator()).shape
    torch.Size([3, 1, 2, 2])
    """
    flat = x.flatten(1)
    which = torch.randint(len(x), (n, flat.shape[1]), generator=generator)
    return flat.gather(0, which).reshape(n, *x.shape[1:])


def blends(x: Tensor, labels: Tensor, n: int, generator: torch.Generator) -> Tensor:
    r"""`n` mixtures of two images of different classes, weights 0.35 to 0.65.

    >>> two = torch.stack([torch.ones(1, 2, 2), -torch.ones(1, 2, 2)])
    >>> mixed = blends(two, torch.tensor([0, 1]), 3, torch.Generator())
    >>> bool((mixed.abs() <= 0.3001).all())
    True
    """
    first = torch.randint(len(x), (n,), generator=generator)
    order = torch.rand(n, len(x), generator=generator)
    same = labels[first][:, None] == labels[None, :]
    second = order.masked_fill(same, -1.0).argmax(1)
    part = 0.35 + 0.3 * torch.rand(n, *[1] * (x.ndim - 1), generator=generator)
    return part * x[first] + (1 - part) * x[second]


# --- book/ddpm/training.ipynb · training-export-judge · Are they digits? A judge
class Verdict(NamedTuple):
    r"""The four measurements of `Judge.verdict` and what each must reach.

    `share` of samples called a digit with probability 0.9 or more; k-NN `precision` and
    `recall`; smallest and largest share of a class; `copies`. `passed` names the
    criteria (a to d) that hold.

    >>> Verdict(0.9, 0.9, 0.9, 0.05, 0.15, 0.01, "abcd").good
    True
    """

    share: float
    precision: float
    recall: float
    smallest: float
    largest: float
    copies: float
    passed: str

    @property
    def good(self) -> bool:
        """Whether all four criteria hold."""
        return self.passed == "abcd"


class Judge:
    r"""A classifier that knows ten digits and "none", and says how good samples are.

    scikit-learn's multi-layer perceptron, trained on `train` images [N, 1, 8, 8] with
    labels 0...9 and on four kinds of non-digits. `test`: held-out images, the standard.
    About 3 s on one core. Raises TypeError or ValueError.

    >>> isinstance(Judge.NONE, int)
    True
    """

    NONE = 10

    def __init__(
        self, train: Tensor, labels: Tensor, test: Tensor, seed: int = 0
    ) -> None:
        checks.images("train", train)
        checks.images("test", test)
        self.train, self.test = train, test
        generator = torch.Generator().manual_seed(seed)
        self.network = fit_classifier(train, labels, generator, seed)
        some = torch.randperm(len(train), generator=generator)[: len(test)]
        self.real = precision_recall(self.features(test), self.features(train[some]))
        self.share = self.called_digit(test)
        self.radius = nearest(test, train).quantile(0.01).item()

    def probabilities(self, x: Tensor) -> Tensor:
        """Probability of each of the 11 classes for images [N, 1, 8, 8]: [N, 11]."""
        return torch.from_numpy(
            self.network.predict_proba(x.flatten(1).double().numpy())
        )

    def features(self, x: Tensor) -> Tensor:
        """The hidden layer for images [N, 1, 8, 8]: [N, 128], float64."""
        weight = torch.from_numpy(self.network.coefs_[0])
        bias = torch.from_numpy(self.network.intercepts_[0])
        return torch.relu(x.flatten(1).double() @ weight + bias)

    def called_digit(self, x: Tensor) -> float:
        """The share of images that are some digit with probability 0.9 or more."""
        sure = self.probabilities(x)[:, : self.NONE].max(1).values >= 0.9
        return sure.double().mean().item()

    def verdict(self, x: Tensor) -> Verdict:
        """Measure samples [N, 1, 8, 8] (500 of them) by the four criteria."""
        checks.images("x", x)
        digit = self.probabilities(x)[:, : self.NONE].argmax(1)
        classes = torch.bincount(digit, minlength=self.NONE).double() / len(x)
        smallest, largest = classes.min().item(), classes.max().item()
        share = self.called_digit(x)
        quality = precision_recall(self.features(self.test), self.features(x))
        copies = (nearest(x, self.train) < self.radius).double().mean().item()
        criteria = {
            "a": share >= 0.75 * self.share,
            "b": quality.precision >= 0.8 * self.real.precision
            and quality.recall >= 0.8 * self.real.recall,
            "c": smallest >= 0.04 and largest <= 0.20,
            "d": copies <= 0.03,
        }
        passed = "".join(name for name, holds in criteria.items() if holds)
        return Verdict(share, *quality, smallest, largest, copies, passed)


def fit_classifier(
    x: Tensor, labels: Tensor, generator: torch.Generator, seed: int
) -> MLPClassifier:
    r"""Train the judge's network on images, slightly noised copies and non-digits.

    >>> fit_classifier.__name__
    'fit_classifier'
    """
    n = len(x) // 2
    noised = [x + 0.15 * torch.randn(x.shape, generator=generator) for _ in range(2)]
    some = x[torch.randint(len(x), (n,), generator=generator)]
    none = [
        torch.randn(n, *x.shape[1:], generator=generator).clamp(-1, 1),
        shuffled_pixels(some, generator),
        independent_pixels(x, n, generator),
        blends(x, labels, n, generator),
    ]
    images = torch.cat([x, *noised, *none]).flatten(1).double().numpy()
    ten = torch.full((4 * n,), Judge.NONE)
    network = MLPClassifier(
        (128,),
        batch_size=64,
        learning_rate_init=2e-3,
        alpha=1e-3,
        max_iter=40,
        random_state=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return network.fit(images, torch.cat([labels.repeat(3), ten]).numpy())


# --- book/ddpm/families.ipynb · families-export-energy · The data, and how we measure
def energy_estimate(x: Tensor, y: Tensor, blocks: int = 10) -> Estimate:
    r"""`energy_distance` in blocks of two samples, with its standard error.

    The value is the mean over pairs of blocks, the standard error comes from their
    spread.
    Args: x, y: float tensors [N, D] and [M, D], finite, independent samples; N and M
        at least 2 * blocks. blocks: at least 2.
    Returns: Estimate of two float64 scalars. Raises: TypeError, ValueError otherwise.
    >>> x = torch.arange(8.0)[:, None]
    >>> energy_estimate(x, x + 100, blocks=2).value > 100
    tensor(True)
    """
    checks.integer("blocks", blocks, 2)
    for name, sample in (("x", x), ("y", y)):
        checks.tensor(name, sample, ndim=2)
        checks.integer(f"the number of samples {name}", len(sample), 2 * blocks)
    pairs = zip(x.tensor_split(blocks), y.tensor_split(blocks), strict=True)
    each = torch.tensor([energy_distance(a, b) for a, b in pairs], dtype=torch.float64)
    return Estimate(each.mean(), each.std() / blocks**0.5)
