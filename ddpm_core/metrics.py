"""Written by tools/extract.py; edit the chapters:

- book/ddpm/two_d.ipynb
- book/ddpm/training.ipynb
- book/ddpm/evaluation.ipynb
- book/ddpm/families.ipynb
"""

import warnings
from typing import Any, NamedTuple

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from torch import Tensor, nn

from ddpm_core import checks
from ddpm_core.losses import Estimate, kl_categorical

__all__ = [
    "EXACT",
    "Extrapolation",
    "Judge",
    "LibraryScores",
    "Moments",
    "Neighbours",
    "PrecisionRecall",
    "Through",
    "Verdict",
    "blends",
    "copied",
    "cubic_kernel",
    "energy_distance",
    "energy_estimate",
    "fit_classifier",
    "frechet_distance",
    "frechet_extrapolated",
    "inception_score",
    "independent_pixels",
    "kernel_distance",
    "knn_radii",
    "library_scores",
    "matrix_root",
    "moments",
    "nearest",
    "nearest_neighbours",
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


# --- book/ddpm/evaluation.ipynb · evaluation-export-frechet · The Fréchet distance
class Moments(NamedTuple):
    r"""Mean [D], covariance [D, D] (float64) and number of the features behind them.

    >>> Moments(torch.zeros(2), torch.eye(2), 9).size
    9
    """

    mean: Tensor
    covariance: Tensor
    size: int


def moments(features: Tensor) -> Moments:
    r"""Mean and covariance (the sum of squares over N - 1) of features [N, D].

    Raises TypeError or ValueError; N must be at least 2.

    >>> moments(torch.tensor([[0.0], [2.0]])).covariance.item()
    2.0
    """
    checks.tensor("features", features, ndim=2)
    n = checks.integer("the number of features", len(features), 2)
    checks.finite("features", features)
    x = features.double()
    centred = x - x.mean(0)
    return Moments(x.mean(0), centred.T @ centred / (n - 1), n)


def matrix_root(covariance: Tensor) -> Tensor:
    r"""The symmetric root of a covariance matrix [D, D]: times itself, the matrix.

    >>> matrix_root(torch.tensor([[4.0]]))
    tensor([[2.]])
    """
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def frechet_distance(real: Moments, generated: Moments) -> float:
    r"""Fréchet distance of two Gaussians with these moments, `eq-evaluation-frechet`.

    Heusel et al. 2017, (6). In the square of the features' unit; float64. Raises
    ValueError if the two are of different feature spaces.

    >>> one = Moments(torch.zeros(1), torch.ones(1, 1), 9)
    >>> frechet_distance(one, Moments(torch.ones(1), 4 * torch.ones(1, 1), 9))
    2.0
    """
    checks.same_shape("generated.mean", generated.mean, "real.mean", real.mean)
    root = matrix_root(real.covariance)
    inner = torch.linalg.eigvalsh(root @ generated.covariance @ root)
    cross = inner.clamp(min=0).sqrt().sum()
    spread = real.covariance.trace() + generated.covariance.trace() - 2 * cross
    shift = (real.mean - generated.mean).square().sum()
    return float(shift + spread)


# --- book/ddpm/evaluation.ipynb · evaluation-export-nearest · The yardstick that ships
class Neighbours(NamedTuple):
    r"""Of each image: the distance to the nearest of others [N], and which it is [N].

    >>> Neighbours._fields
    ('distance', 'place')
    """

    distance: Tensor
    place: Tensor


def nearest_neighbours(x: Tensor, y: Tensor, batch: int = 250) -> Neighbours:
    r"""The nearest of the images y [M, ...] for each of x [N, ...], in pixels.

    Found by a product of matrices in float32, measured again in float64; so it takes
    seconds for 2,000 images against 60,000. Raises TypeError or ValueError.

    >>> nearest_neighbours(torch.zeros(1, 2), torch.tensor([[3.0, 4.0], [9.0, 9.0]]))
    Neighbours(distance=tensor([5.], dtype=torch.float64), place=tensor([0]))
    """
    checks.tensor("x", x, ndim=y.ndim)
    checks.tensor("y", y, shape=(None, *x.shape[1:]))
    there = y.flatten(1).float()
    squares = there.square().sum(1)
    found = []
    for part in torch.split(x.flatten(1), batch):
        place = (squares - 2 * part.float() @ there.T).argmin(1)
        apart = part.double() - y.flatten(1)[place].double()
        found.append((apart.square().sum(1).sqrt(), place))
    distances, places = zip(*found, strict=True)
    return Neighbours(torch.cat(distances), torch.cat(places))


def copied(x: Tensor, train: Tensor, radius: float) -> float:
    r"""Share of images x nearer than `radius` to a training image, `eq-evaluation-copies`.

    >>> copied(torch.zeros(2, 3), torch.eye(3), radius=0.5)
    0.0
    """
    checks.number("radius", radius, low=0)
    return (nearest_neighbours(x, train).distance < radius).double().mean().item()


# --- book/ddpm/evaluation.ipynb · evaluation-export-extrapolate · The number of samples
class Extrapolation(NamedTuple):
    r"""A line through Fréchet distances over 1/n: its `value` at 1/n = 0, its `slope`.

    `sizes` are the numbers n of samples, `distances` what was measured with them.

    >>> Extrapolation(1.0, 2.0, (9,), (1.2,)).value
    1.0
    """

    value: float
    slope: float
    sizes: tuple[int, ...]
    distances: tuple[float, ...]


def frechet_extrapolated(
    real: Moments, generated: Tensor, generator: torch.Generator, points: int = 6
) -> Extrapolation:
    r"""Fréchet distance of features [N, D] extrapolated to N = oo.

    `eq-evaluation-extrapolate` by least squares; Chong and Forsyth 2020. At each of
    `points` sizes from N down to N / points, evenly spaced in 1/n, the mean over
    disjoint parts of a random order. Raises TypeError or ValueError.

    >>> x = torch.randn(600, 2, generator=torch.Generator().manual_seed(0))
    >>> frechet_extrapolated(moments(x), x, torch.Generator(), 3).sizes
    (600, 300, 200)
    """
    checks.integer("points", points, 2, len(generated) // 2)
    sizes, distances = [], []
    for k in range(1, points + 1):
        size = len(generated) // k
        order = torch.randperm(len(generated), generator=generator)
        parts = torch.split(order[: k * size], size)
        each = [frechet_distance(real, moments(generated[part])) for part in parts]
        sizes.append(size)
        distances.append(sum(each) / len(each))
    x = 1 / torch.tensor(sizes, dtype=torch.float64)
    y = torch.tensor(distances, dtype=torch.float64)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    value = y.mean() - slope * x.mean()
    return Extrapolation(value.item(), slope.item(), tuple(sizes), tuple(distances))


# --- book/ddpm/evaluation.ipynb · evaluation-export-kernel · The kernel distance
def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    r"""(x y / D + 1)^3 for all pairs of features [N, D] and [M, D]: [N, M].

    >>> cubic_kernel(torch.ones(1, 2), torch.ones(1, 2))
    tensor([[8.]])
    """
    return (x @ y.T / x.shape[1] + 1) ** 3


def kernel_distance(x: Tensor, y: Tensor) -> float:
    r"""Squared MMD with the cubic kernel, `eq-evaluation-kernel`; may be negative.

    Unbiased; Binkowski et al. 2018, section 4. Args: x, y: independent features
    [N, D] and [M, D], N and M at least 2. Raises: TypeError, ValueError.

    >>> kernel_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [2.0]]))
    -62.0
    """
    checks.tensor("x", x, ndim=2)
    checks.tensor("y", y, shape=(None, x.shape[1]))
    n = checks.integer("the number of samples x", len(x), 2)
    m = checks.integer("the number of samples y", len(y), 2)
    x, y = x.double(), y.double()
    xx, yy = cubic_kernel(x, x), cubic_kernel(y, y)
    within_x = (xx.sum() - xx.trace()) / (n * (n - 1))
    within_y = (yy.sum() - yy.trace()) / (m * (m - 1))
    return (within_x + within_y - 2 * cubic_kernel(x, y).mean()).item()


# --- book/ddpm/evaluation.ipynb · evaluation-export-inception · The Inception score,...
def inception_score(probabilities: Tensor) -> float:
    r"""Inception score of class probabilities [N, K], `eq-evaluation-inception`: 1...K.

    Salimans et al. 2016, section 4. Raises TypeError or ValueError.

    >>> inception_score(torch.eye(10))
    10.0
    """
    checks.tensor("probabilities", probabilities, ndim=2)
    checks.between("probabilities", probabilities, 0, 1)
    p = probabilities.double()
    p = p / p.sum(1, keepdim=True)
    divergence = kl_categorical(p, p.mean(0).expand_as(p))
    return round(divergence.mean().exp().item(), 12)


# --- book/ddpm/evaluation.ipynb · evaluation-export-quality · All of it in one...
class LibraryScores(NamedTuple):
    r"""Fréchet distance, kernel distance with its spread over subsets, Inception score.

    >>> LibraryScores._fields
    ('frechet', 'kernel', 'kernel_spread', 'inception')
    """

    frechet: float
    kernel: float
    kernel_spread: float
    inception: float


class Through(nn.Module):
    r"""Hands features on, so that torchmetrics takes them in the place of images.

    >>> Through(3)(torch.ones(1, 3)).shape
    torch.Size([1, 3])
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        """The same features again."""
        return x


def library_scores(
    real: Tensor, generated: Tensor, logits: Tensor, seed: int = 0
) -> LibraryScores:
    r"""Scores by torchmetrics of features [N, D] against real ones [M, D].

    `logits` [N, K] of the generated images. The kernel distance is a mean over 100
    subsets of 1,000 (or a third) of each, drawn from `seed`. Raises ValueError, and
    ModuleNotFoundError without torchmetrics.

    >>> library_scores.__name__
    'library_scores'
    """
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    checks.tensor("real", real, ndim=2)
    checks.tensor("generated", generated, shape=(None, real.shape[1]))
    through = Through(real.shape[1])
    size = min(1000, len(real) // 3, len(generated) // 3)
    alone: Any = {"sync_on_compute": False}  # other processes do not take part
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the memory they take
        frechet = FrechetInceptionDistance(feature=through, **alone)
        kernel = KernelInceptionDistance(feature=through, subset_size=size, **alone)
        inception = InceptionScore(feature=Through(logits.shape[1]), **alone)
    for metric in (frechet, kernel):
        metric.update(real.double(), real=True)
        metric.update(generated.double(), real=False)
    inception.update(logits.double())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mean, spread = kernel.compute()
        score, _ = inception.compute()
    distance = frechet.compute().item()
    return LibraryScores(distance, mean.item(), spread.item(), score.item())


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
