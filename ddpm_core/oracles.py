"""Written by tools/extract.py; edit the chapters:

- book/workshop/oracles.ipynb
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_core import checks, process
from ddpm_core.schedules import Schedule

__all__ = ["CHUNK", "Empirical", "Mixture", "Noised", "Oracle", "denoiser", "gaussian"]


# --- book/workshop/oracles.ipynb · oracles-code-noised · The law of $x_t$
CHUNK = 2**24  # numbers held at once: 64 MB in float32


class Noised(NamedTuple):
    r"""What every answer about x_t starts from: B points, K components, D dimensions.

    x [B, D]; signal = sqrt(alpha_bar) and noise = 1 - alpha_bar, [B, 1]; the means
    [K, D] and variances [K] of the data; variance [B, K], that of x_t in a component;
    joint [B, K], the log of weight times density, the terms of `eq-oracles-marginal`.
    """

    x: Tensor
    signal: Tensor
    noise: Tensor
    means: Tensor
    variances: Tensor
    variance: Tensor
    joint: Tensor


def _levels(alpha_bar: float | Tensor, x_t: Tensor, dtype: torch.dtype) -> Tensor:
    """Columns sqrt(alpha_bar) and 1 - alpha_bar, computed before the cast to dtype."""
    if isinstance(alpha_bar, Tensor):
        shape = (x_t.shape[0],) if alpha_bar.ndim else ()
        checks.tensor("alpha_bar", alpha_bar, shape=shape)
        checks.between("alpha_bar", alpha_bar, 0, 1)
    else:
        number = checks.number("alpha_bar", alpha_bar, low=0, high=1)
        alpha_bar = torch.tensor(number, dtype=torch.float64)
    levels = torch.stack([alpha_bar.sqrt(), 1 - alpha_bar], dim=-1)
    return levels.to(dtype).to(x_t.device).expand(x_t.shape[0], 2)


def _noised(
    weights: Tensor, means: Tensor, variances: Tensor, x: Tensor, levels: Tensor
) -> Noised:
    signal, noise = levels[:, :1], levels[:, 1:]
    variance = signal**2 * variances + noise
    scale = signal.clamp_min(1e-10)  # x / scale is compared with the means themselves
    distance = scale * torch.cdist(
        x / scale, means, compute_mode="donot_use_mm_for_euclid_dist"
    )
    log_density = distance**2 / variance + x.shape[1] * (math.tau * variance).log()
    joint = weights.log() - 0.5 * log_density
    return Noised(x, signal, noise, means, variances, variance, joint)


# --- book/workshop/oracles.ipynb · oracles-code-answers · How much is left unknown
def _log_prob(q: Noised) -> Tensor:
    return q.joint.logsumexp(1)


def _x_0(q: Noised) -> Tensor:
    share = q.joint.softmax(1) / q.variance
    moved = (share * q.variances).sum(1, keepdim=True) * q.signal * q.x
    return (q.noise * share) @ q.means + moved


def _score(q: Noised) -> Tensor:
    share = q.joint.softmax(1) / q.variance
    return (q.signal * share) @ q.means - share.sum(1, keepdim=True) * q.x


def _eps(q: Noised) -> Tensor:
    return -q.noise.sqrt() * _score(q)


def _v(q: Noised) -> Tensor:
    return q.signal * _eps(q) - q.noise.sqrt() * _x_0(q)


def _x_0_variance(q: Noised) -> Tensor:
    share = q.joint.softmax(1)
    within = (share * q.variances * q.noise / q.variance).sum(1, keepdim=True)
    pull = (q.noise / q.variance).unsqueeze(2)
    gain = (q.signal * q.variances / q.variance).unsqueeze(2)
    apart = (pull * q.means + gain * q.x.unsqueeze(1) - _x_0(q).unsqueeze(1)) ** 2
    return within + (share.unsqueeze(2) * apart).sum(1)


# --- book/workshop/oracles.ipynb · oracles-code-oracle · How much is left unknown
class Oracle:
    r"""Exact answers about noised data that are a mixture of K isotropic normals.

    Make one by `Mixture`, `gaussian` or `Empirical`. x_t has shape [B, ...], the data's
    shape behind B; alpha_bar is a number, a tensor [] or a tensor [B], in [0, 1].
    It may be 1 only if no component has variance 0: a point has no density.
    Answers have x_t's shape ([B] for `log_prob`) and dtype; they are computed in the
    wider of x_t's and the oracle's dtype. All raise TypeError or ValueError.
    """

    weights: Tensor
    means: Tensor
    variances: Tensor

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        r"""Draw n clean samples x_0, shape [n, ...], in the oracle's dtype."""
        return _sample(self, checks.integer("n", n, low=1), generator)

    def log_prob(self, x_t: Tensor, alpha_bar: float | Tensor) -> Tensor:
        r"""The log of the density q(x_t) in nats, shape [B], `eq-oracles-marginal`."""
        return _answer(self, _log_prob, x_t, alpha_bar).reshape(-1)

    def score(self, x_t: Tensor, alpha_bar: float | Tensor) -> Tensor:
        r"""The gradient of log q(x_t) by x_t, `eq-oracles-score`."""
        return _answer(self, _score, x_t, alpha_bar)

    def x_0(self, x_t: Tensor, alpha_bar: float | Tensor) -> Tensor:
        r"""E[x_0 | x_t], the best guess of the clean data, `eq-oracles-x-0`."""
        return _answer(self, _x_0, x_t, alpha_bar)

    def eps(self, x_t: Tensor, alpha_bar: float | Tensor) -> Tensor:
        r"""E[epsilon | x_t], what a perfect noise predictor says, `eq-oracles-eps`."""
        return _answer(self, _eps, x_t, alpha_bar)

    def v(self, x_t: Tensor, alpha_bar: float | Tensor) -> Tensor:
        r"""E[v | x_t], the velocity that a v-predictor is trained for, `eq-oracles-v`."""
        return _answer(self, _v, x_t, alpha_bar)

    def x_0_variance(self, x_t: Tensor, alpha_bar: float | Tensor) -> Tensor:
        r"""Var(x_0 | x_t) of each coordinate, `eq-oracles-variance`."""
        return _answer(self, _x_0_variance, x_t, alpha_bar, self.means[0].numel())


def _sample(oracle: Oracle, n: int, generator: torch.Generator | None) -> Tensor:
    means, variances = oracle.means, oracle.variances
    k = torch.multinomial(oracle.weights, n, replacement=True, generator=generator)
    z = torch.empty_like(means[k]).normal_(generator=generator)
    return means[k] + variances[k].sqrt().reshape(-1, *[1] * (means.ndim - 1)) * z


def _answer(
    oracle: Oracle,
    question: Callable[[Noised], Tensor],
    x_t: Tensor,
    alpha_bar: float | Tensor,
    width: int = 1,
) -> Tensor:
    means, variances = oracle.means, oracle.variances
    checks.tensor("x_t", x_t, shape=(None, *means.shape[1:]))
    checks.finite("x_t", x_t)
    checks.same_device("x_t", x_t, "the oracle's means", means)
    dtype = torch.promote_types(x_t.dtype, means.dtype)
    levels = _levels(alpha_bar, x_t, dtype)
    if checks.can_look(x_t) and bool(((variances == 0).any() & (levels == 0)).any()):
        raise ValueError("alpha_bar must be below 1 where a variance is 0; got 1")
    parts = oracle.weights.to(dtype), means.flatten(1).to(dtype), variances.to(dtype)
    rows = max(1, CHUNK // (means.shape[0] * width))
    points = torch.split(x_t.flatten(1).to(dtype), rows)
    pairs = zip(points, torch.split(levels, rows), strict=True)
    answers = torch.cat([question(_noised(*parts, x, level)) for x, level in pairs])
    return answers.to(x_t.dtype).reshape(-1, *x_t.shape[1:] if answers.ndim > 1 else ())


# --- book/workshop/oracles.ipynb · oracles-code-mixture · How much is left unknown
class Mixture(Oracle):
    r"""Data from a mixture of K isotropic normals N(means[k], variances[k] I).

    weights [K] >= 0 that sum to 1 (to 1e-6); means [K, D] or [K, ...]; variances [K]
    >= 0, per coordinate. One floating dtype, one device. Raises TypeError, ValueError.

    >>> one = torch.ones(1, dtype=torch.float64)
    >>> data = Mixture(one, torch.zeros(1, 1, dtype=torch.float64), one / 4)
    >>> data.x_0(torch.tensor([[2.0]]), 0.5).item()  # 2 sqrt(.5) (1/4) / (1/8 + 1/2)
    0.5656854510307312
    """

    def __init__(self, weights: Tensor, means: Tensor, variances: Tensor) -> None:
        checks.tensor("means", means)
        checks.finite("means", means)
        for name, table in (("weights", weights), ("variances", variances)):
            checks.tensor(name, table, shape=means.shape[:1])
            checks.same_device(name, table, "means", means)
            checks.between(name, table, 0, 1 if name == "weights" else math.inf)
        if means.ndim < 2 or means.shape[0] == 0:
            raise ValueError(f"means must have shape [K, D]; got {list(means.shape)}")
        total = weights.sum()
        if checks.can_look(weights) and abs(float(total) - 1) > 1e-6:
            raise ValueError(f"weights must sum to 1; got the sum {float(total)}")
        self.weights, self.means, self.variances = weights / total, means, variances

    def reverse_kernel(
        self, x_t: Tensor, alpha_t: float, alpha_bar_t: float
    ) -> "Mixture":
        r"""q(x_{t-1} | x_t) for one x_t [D]: itself a mixture, `eq-oracles-reverse`.

        0 < alpha_t < 1 and 0 < alpha_bar_t <= alpha_t. Its density at x is
        `log_prob(x, 1.0)`. Raises TypeError or ValueError.
        """
        return _reverse_kernel(self, x_t, alpha_t, alpha_bar_t)


def gaussian(mean: Tensor, variance: float) -> Mixture:
    r"""Data from one normal N(mean, variance I): a mixture of one component.

    mean [D] or of any shape but []; variance >= 0. Raises TypeError or ValueError.

    >>> gaussian(torch.zeros(2), 1.0).x_0(torch.ones(1, 2), 0.25)
    tensor([[0.5000, 0.5000]])
    """
    checks.tensor("mean", mean)
    value = checks.number("variance", variance, low=0)
    return Mixture(mean.new_ones(1), mean.unsqueeze(0), mean.new_full((1,), value))


# --- book/workshop/oracles.ipynb · oracles-code-reverse · The reverse kernel
def _reverse_kernel(
    data: Mixture, x_t: Tensor, alpha_t: float, alpha_bar_t: float
) -> Mixture:
    checks.tensor("x_t", x_t, shape=data.means.shape[1:])
    alpha = checks.number("alpha_t", alpha_t, low=0, high=1)
    alpha_bar = checks.number("alpha_bar_t", alpha_bar_t, low=0, high=alpha)
    if alpha_bar == 0 or alpha == 1:
        raise ValueError(
            "alpha_t must be below 1 and alpha_bar_t above 0; "
            f"got alpha_t {alpha}, alpha_bar_t {alpha_bar}"
        )
    before, beta = alpha_bar / alpha, 1 - alpha
    prior = before * data.variances + (1 - before)
    gain = math.sqrt(alpha) * prior / (alpha * prior + beta)
    column = gain.reshape(-1, *[1] * x_t.ndim)
    missed = x_t - math.sqrt(alpha_bar) * data.means
    dtype = torch.promote_types(x_t.dtype, data.means.dtype)
    levels = _levels(alpha_bar, x_t.unsqueeze(0), dtype)
    parts = data.weights.to(dtype), data.means.flatten(1).to(dtype), data.variances
    q = _noised(*parts, x_t.reshape(1, -1).to(dtype), levels)
    return Mixture(
        q.joint.softmax(1)[0],
        math.sqrt(before) * data.means + column * missed,
        beta * prior / (alpha * prior + beta),
    )


# --- book/workshop/oracles.ipynb · oracles-code-empirical · A data set taken as it is
class Empirical(Oracle):
    r"""Data that are exactly the N given points, each as likely: variances of 0.

    data [N, ...], floating and finite. The cost of one answer is N distances; points
    x_t are taken in chunks, so that memory stays bounded. Raises TypeError, ValueError.

    >>> data = Empirical(torch.tensor([[-1.0], [1.0]]))
    >>> data.x_0(torch.tensor([[0.0], [3.0]]), 0.9).flatten().tolist()
    [0.0, 1.0]
    """

    def __init__(self, data: Tensor) -> None:
        checks.tensor("data", data)
        checks.finite("data", data)
        if data.ndim < 2 or data.shape[0] == 0:
            raise ValueError(f"data must have shape [N, ...]; got {list(data.shape)}")
        self.means = data
        self.weights = data.new_full((data.shape[0],), 1 / data.shape[0])
        self.variances = data.new_zeros(data.shape[0])


# --- book/workshop/oracles.ipynb · oracles-code-denoiser · In the place of a network
def denoiser(
    oracle: Oracle, schedule: Schedule, prediction: str = "eps"
) -> Callable[[Tensor, Tensor], Tensor]:
    r"""The oracle as a model(x_t, t) that predicts eps, x_0, v or the posterior mean.

    t int64 [B] in 1...T of `schedule`. It stands where a trained network stands, and
    is the best that any network can be. Raises ValueError for an unknown prediction.

    >>> from ddpm_core.schedules import linear
    >>> model = denoiser(gaussian(torch.zeros(2), 1.0), linear(), "x_0")
    >>> model(torch.zeros(3, 2), torch.tensor([1, 500, 1000])).shape
    torch.Size([3, 2])
    """
    checks.one_of("prediction", prediction, process.PREDICTIONS)

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        checks.timesteps("t", t, schedule.T, x_t.shape[0])
        table = schedule.alpha_bar
        alpha_bar = process.at(table, t, x_t.flatten(1).to(table.dtype)).flatten()
        if prediction in ("eps", "v"):
            answer = oracle.eps if prediction == "eps" else oracle.v
            return answer(x_t, alpha_bar)
        x_0 = oracle.x_0(x_t, alpha_bar)
        return (
            x_0
            if prediction == "x_0"
            else process.posterior_mean(schedule, x_0, x_t, t)
        )

    return model
