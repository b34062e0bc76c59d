"""Written by tools/extract.py; edit the chapters:

- book/foundations/kl.ipynb
- book/foundations/gan.ipynb
- book/ddpm/bound.ipynb
- book/ddpm/l_simple.ipynb
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddpm_core import checks
from ddpm_core.process import (
    at,
    posterior_mean,
    posterior_variance,
    q_sample,
    signal_left,
)
from ddpm_core.schedules import Schedule

__all__ = [
    "KLEstimate",
    "discriminator_loss",
    "eps_weight",
    "generator_loss",
    "gradient_penalty",
    "js_categorical",
    "kl_bernoulli",
    "kl_categorical",
    "kl_multivariate_normal",
    "kl_normal",
    "kl_term",
    "min_snr_weight",
    "monte_carlo_js",
    "monte_carlo_kl",
    "prior_kl",
    "simple_loss",
    "step_kl",
    "target",
]


# --- book/foundations/kl.ipynb · kl-export-term · It is never negative: the tangent
def _check_pair(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """Two float tensors of one shape on one device."""
    checks.tensor(name_a, a)
    checks.tensor(name_b, b)
    checks.same_shape(name_a, a, name_b, b)
    checks.same_device(name_a, a, name_b, b)


def _check_at_least_zero(name: str, x: Tensor) -> None:
    """Every entry is finite and not negative."""
    checks.finite(name, x)
    checks.between(name, x, 0.0, math.inf)


def kl_term(p: Tensor, q: Tensor) -> Tensor:
    r"""What one outcome adds to KL(p || q): p log(p/q) - p + q, never negative.

    Equation `eq-kl-term`. The part - p + q cancels in a sum over all outcomes. Where p
    and q nearly agree a series takes over, so no digits are lost.
    Args: p, q: float tensors of one shape, >= 0 and finite.
    Returns: a tensor of that shape; q where p = 0, inf where q = 0 < p.
    Raises: TypeError, ValueError for anything else.
    >>> kl_term(torch.tensor([0.0, 0.5, 0.5]), torch.tensor([0.25, 0.5, 0.0]))
    tensor([0.2500, 0.0000,    inf])
    """
    _check_pair("p", p, "q", q)
    _check_at_least_zero("p", p)
    _check_at_least_zero("q", q)
    occurs, total = p > 0, p + q
    p_safe, q_safe = torch.where(occurs, p, 1.0), torch.where(occurs, q, 1.0)
    s = (q - p) / torch.where(total > 0, total, 1.0)
    close = s.abs() < 0.5
    log_ratio = q_safe.log() - p_safe.log()  # log(q/p), by atanh where they are close
    log_ratio = torch.where(close, 2 * torch.where(close, s, 0.0).atanh(), log_ratio)
    plain = q - p - torch.where(occurs, p * log_ratio, 0.0)
    near = s.abs() < 0.05
    s = torch.where(near, s, 0.0)
    rest = 1 / 5 + s**2 * (1 / 7 + s**2 * (1 / 9 + s**2 * (1 / 11 + s**2 / 13)))
    series = s * (q - p) - 2 * p * s**3 * (1 / 3 + s**2 * rest)
    return torch.where(near, series, plain)


# --- book/foundations/kl.ipynb · kl-export-discrete · It is never negative: the tangent
def _check_probabilities(name: str, p: Tensor, dim: int) -> None:
    """Entries in [0, 1] whose sum along dim is 1 to rounding."""
    checks.between(name, p, 0.0, 1.0)
    if checks.can_look(p):
        error = (p.sum(dim) - 1).abs().max().item() if p.numel() else 0.0
        if error > max(1e-6, 32 * torch.finfo(p.dtype).eps):
            raise ValueError(
                f"{name} must sum to 1 along dim {dim}; off by {error:.2g}"
            )


def kl_bernoulli(p: Tensor, q: Tensor) -> Tensor:
    r"""KL(Bernoulli(p) || Bernoulli(q)) in nats, elementwise, `eq-kl-bernoulli`.

    Args: p, q: probabilities of a one, float tensors of one shape, in [0, 1].
    Returns: a tensor of that shape; inf where q rules out what p allows.
    Raises: TypeError, ValueError for anything else.
    >>> kl_bernoulli(torch.tensor([0.6, 0.5, 0.5]), torch.tensor([0.7, 0.5, 1.0]))
    tensor([0.0226, 0.0000,    inf])
    """
    _check_pair("p", p, "q", q)
    checks.between("p", p, 0.0, 1.0)
    checks.between("q", q, 0.0, 1.0)
    return kl_term(p, q) + kl_term(1 - p, 1 - q)


def kl_categorical(p: Tensor, q: Tensor, dim: int = -1) -> Tensor:
    r"""KL(p || q) in nats between lists of probabilities along dim, `eq-kl-discrete`.

    Args: p, q: float tensors of one shape; entries in [0, 1] summing to 1 along dim.
    Returns: their shape without dim; inf where q is 0 and p is not.
    Raises: TypeError, ValueError for anything else.
    >>> p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.25, 0.5])
    >>> kl_categorical(p, q), kl_categorical(q, p)
    (tensor(0.6931), tensor(inf))
    """
    _check_pair("p", p, "q", q)
    dim = checks.integer("dim", dim, -p.ndim, p.ndim - 1)
    _check_probabilities("p", p, dim)
    _check_probabilities("q", q, dim)
    return kl_term(p, q).sum(dim)


# --- book/foundations/kl.ipynb · kl-export-normal · Two Gaussians
def _check_positive(name: str, x: Tensor) -> None:
    """Every entry is finite and above zero."""
    checks.finite(name, x)
    if checks.can_look(x) and not bool((x > 0).all()):
        raise ValueError(f"{name} must be above 0 everywhere; got {x.min().item()}")


def kl_normal(
    mean_1: Tensor, variance_1: Tensor, mean_2: Tensor, variance_2: Tensor
) -> Tensor:
    r"""KL(N(mean_1, variance_1) || N(mean_2, variance_2)) in nats, elementwise.

    Equation `eq-kl-normal`. For independent coordinates sum the result over them.
    Args: four finite float tensors of one shape; variances (not deviations) above 0.
    Returns: a tensor of that shape.
    Raises: TypeError, ValueError for anything else, a variance of 0 above all.
    >>> zero, one = torch.zeros(2), torch.ones(2)
    >>> kl_normal(torch.tensor([0.0, 1.0]), one, zero, one)
    tensor([0.0000, 0.5000])
    """
    _check_pair("mean_1", mean_1, "mean_2", mean_2)
    _check_pair("mean_1", mean_1, "variance_1", variance_1)
    _check_pair("mean_1", mean_1, "variance_2", variance_2)
    checks.finite("mean_1", mean_1)
    checks.finite("mean_2", mean_2)
    _check_positive("variance_1", variance_1)
    _check_positive("variance_2", variance_2)
    spread = kl_term(variance_2, variance_1) / variance_2
    return 0.5 * (spread + ((mean_1 - mean_2) / variance_2.sqrt()).square())


# --- book/foundations/kl.ipynb · kl-export-multivariate · Gaussians with many...
def _cholesky(name: str, covariance: Tensor) -> Tensor:
    """The lower triangular factor of a covariance; refuses what is none."""
    checks.finite(name, covariance)
    if checks.can_look(covariance) and covariance.numel():
        gap = (covariance - covariance.mT).abs().max().item()
        if gap > 1e-5 * covariance.abs().max().item():
            raise ValueError(f"{name} must be symmetric; entries differ by {gap:.2g}")
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(covariance)
    if checks.can_look(info) and bool(info.any()):
        raise ValueError(f"{name} must be positive definite; got one that is not")
    return factor


def kl_multivariate_normal(
    mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor
) -> Tensor:
    r"""KL(N(mean_1, cov_1) || N(mean_2, cov_2)) in nats for full covariances.

    Equations `eq-kl-multivariate` and `eq-kl-cholesky`; no part of it is negative.
    Args: means [..., D] and covariances [..., D, D], symmetric positive definite.
    Returns: a tensor [...].
    Raises: TypeError, ValueError for anything else.
    >>> mean, cov = torch.zeros(2), torch.eye(2)
    >>> kl_multivariate_normal(mean + 1, cov, mean, cov)
    tensor(1.)
    """
    _check_pair("mean_1", mean_1, "mean_2", mean_2)
    _check_pair("cov_1", cov_1, "cov_2", cov_2)
    checks.integer("mean_1.ndim", mean_1.ndim, 1)
    checks.tensor("cov_1", cov_1, shape=(*mean_1.shape, mean_1.shape[-1]))
    checks.same_device("mean_1", mean_1, "cov_1", cov_1)
    checks.finite("mean_1", mean_1)
    checks.finite("mean_2", mean_2)
    factor_1, factor_2 = _cholesky("cov_1", cov_1), _cholesky("cov_2", cov_2)
    square_1 = factor_1.diagonal(dim1=-2, dim2=-1).square()
    square_2 = factor_2.diagonal(dim1=-2, dim2=-1).square()
    spread = (kl_term(square_2, square_1) / square_2).sum(-1)
    ratio: Tensor = torch.linalg.solve_triangular(factor_2, factor_1, upper=False)
    correlation = ratio.tril(-1).square().sum((-2, -1))
    gap = (mean_1 - mean_2).unsqueeze(-1)
    shift: Tensor = torch.linalg.solve_triangular(factor_2, gap, upper=False)
    return 0.5 * (spread + correlation + shift.square().sum((-2, -1)))


# --- book/foundations/kl.ipynb · kl-export-monte-carlo · When there is no closed...
class KLEstimate(NamedTuple):
    """A Monte Carlo estimate of a KL divergence in nats, with its standard error."""

    value: Tensor
    standard_error: Tensor


def monte_carlo_kl(
    log_p: Callable[[Tensor], Tensor],
    log_q: Callable[[Tensor], Tensor],
    x: Tensor,
    estimator: str = "naive",
) -> KLEstimate:
    r"""KL(p || q) estimated from samples of p, with its standard error.

    Equations `eq-kl-naive` and `eq-kl-low-variance` (unbiased if q = 0 where p = 0).
    Args: log_p, log_q: x -> log-densities [N] (nats). x: [N, ...], samples of p, N >= 2.
        estimator: "naive" or "low_variance".
    Returns: KLEstimate of two scalars. Raises: TypeError, ValueError for anything else.
    >>> x = torch.tensor([-1.0, 1.0])
    >>> monte_carlo_kl(lambda x: -x, lambda x: x, x).value
    tensor(0.)
    """
    checks.one_of("estimator", estimator, ("naive", "low_variance"))
    checks.tensor("x", x)
    checks.integer("the number of samples x", x.shape[0] if x.ndim else 0, 2)
    checks.finite("x", x)
    at_p, at_q = log_p(x), log_q(x)
    checks.tensor("log_p(x)", at_p, shape=(x.shape[0],))
    checks.tensor("log_q(x)", at_q, shape=(x.shape[0],))
    checks.finite("log_p(x), x drawn from p,", at_p)
    checks.between("log_q(x)", at_q, -math.inf, torch.finfo(at_q.dtype).max)
    log_ratio = at_q - at_p
    each = -log_ratio
    if estimator == "low_variance":
        each = each + torch.expm1(log_ratio)
    return KLEstimate(each.mean(), each.std() / math.sqrt(len(each)))


# --- book/foundations/gan.ipynb · gan-export-game · The game
def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    r"""Minus the value of the GAN game, -V(D, G): what the discriminator minimises.

    Equation `eq-gan-value`; Goodfellow et al. 2014, (1). Half of it is the mean binary
    cross-entropy in nats (`eq-gan-mean-cross-entropy`).
    Args: real, fake: logits of D on data and on samples, float tensors, not empty; each
        is averaged by itself.
    Returns: a scalar. Raises: TypeError, ValueError for anything else.
    >>> discriminator_loss(torch.zeros(3), torch.zeros(5))
    tensor(1.3863)
    """
    for name, logits in (("real", real), ("fake", fake)):
        checks.tensor(name, logits)
        checks.integer(f"the number of logits {name}", logits.numel(), 1)
    softplus = nn.functional.softplus
    return softplus(-real).mean() + softplus(fake).mean()


# --- book/foundations/gan.ipynb · gan-export-js · What the best discriminator leaves
def js_categorical(p: Tensor, q: Tensor, dim: int = -1) -> Tensor:
    r"""Jensen-Shannon divergence in nats of lists of probabilities along dim.

    Equation `eq-gan-js`: symmetric, 0 exactly for equal lists, log 2 for disjoint ones.
    Args: p, q: float tensors of one shape; entries in [0, 1] summing to 1 along dim.
    Returns: their shape without dim.
    Raises: TypeError, ValueError for anything else.
    >>> js_categorical(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    tensor(0.6931)
    """
    _check_pair("p", p, "q", q)
    dim = checks.integer("dim", dim, -p.ndim, p.ndim - 1)
    _check_probabilities("p", p, dim)
    _check_probabilities("q", q, dim)
    each = kl_term(2 * p, p + q) + kl_term(2 * q, p + q)
    return each.sum(dim) / 4


# --- book/foundations/gan.ipynb · gan-export-monte-carlo · Estimating it from samples
def monte_carlo_js(
    log_p: Callable[[Tensor], Tensor],
    log_q: Callable[[Tensor], Tensor],
    x_p: Tensor,
    x_q: Tensor,
) -> KLEstimate:
    r"""Jensen-Shannon divergence estimated from samples of both laws, with its error.

    Equation `eq-gan-monte-carlo`; unbiased, never above log 2.
    Args: log_p, log_q: x -> log-densities [N] (nats), -inf where there is none. x_p,
        x_q: [N, ...] and [N', ...], samples of p and of q, at least two of each.
    Returns: KLEstimate of two scalars. Raises: TypeError, ValueError for anything else.
    >>> x = torch.tensor([-1.0, 1.0])
    >>> f"{monte_carlo_js(lambda x: -x**2, lambda x: -x**2, x, x).value:.3f}"
    '0.000'
    """
    halves = []
    for name, x, own, other in (("p", x_p, log_p, log_q), ("q", x_q, log_q, log_p)):
        checks.tensor(f"x_{name}", x)
        checks.integer(f"the number of x_{name}", x.shape[0] if x.ndim else 0, 2)
        checks.finite(f"x_{name}", x)
        at_own, at_other = own(x), other(x)
        checks.tensor(f"the log-density of {name}", at_own, shape=(x.shape[0],))
        checks.tensor("the other log-density", at_other, shape=(x.shape[0],))
        checks.finite(f"the log-density of {name} at its own samples", at_own)
        highest = torch.finfo(at_other.dtype).max
        checks.between("the other log-density", at_other, -math.inf, highest)
        halves.append(nn.functional.softplus(at_other - at_own) / 2)
    value = math.log(2) - halves[0].mean() - halves[1].mean()
    squares = [half.var() / len(half) for half in halves]
    return KLEstimate(value, (squares[0] + squares[1]).sqrt())


# --- book/foundations/gan.ipynb · gan-export-generator · What the generator feels
def generator_loss(fake: Tensor, kind: str = "non_saturating") -> Tensor:
    r"""What a GAN's generator minimises, from the logits of D on its samples.

    "non_saturating" is the mean of -log D (`eq-gan-non-saturating-slope`), "saturating"
    that of log(1 - D) (`eq-gan-saturating-slope`); Goodfellow et al. 2014, section 3.
    Args: fake: logits, a float tensor, not empty.
    Returns: a scalar. Raises: TypeError, ValueError for anything else.
    >>> generator_loss(torch.zeros(5)), generator_loss(torch.zeros(5), "saturating")
    (tensor(0.6931), tensor(-0.6931))
    """
    checks.one_of("kind", kind, ("non_saturating", "saturating"))
    checks.tensor("fake", fake)
    checks.integer("the number of logits fake", fake.numel(), 1)
    softplus = nn.functional.softplus
    return (
        softplus(-fake).mean() if kind == "non_saturating" else -softplus(fake).mean()
    )


# --- book/foundations/gan.ipynb · gan-export-penalty · Why the game circles, and a...
def gradient_penalty(discriminator: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    r"""Squared length of the slope of a discriminator's logits by its input, [B].

    The mean over data, times lambda/2, is R1 (`eq-gan-penalty`; Mescheder et al. 2018,
    (9)). It can be differentiated by the discriminator's weights.
    Args: discriminator: x -> logits, each of its own x only. x: float tensor [B, ...],
        finite; it may hold several points for each of its B rows, whose terms add up.
    Returns: [B]. Raises: TypeError, ValueError for anything else.
    >>> gradient_penalty(lambda x: (x**2).sum(1), torch.ones(1, 3))
    tensor([12.], grad_fn=<SumBackward1>)
    """
    checks.tensor("x", x)
    checks.integer("x.ndim", x.ndim, 1)
    checks.finite("x", x)
    x = x.detach().requires_grad_()
    total = discriminator(x).sum()
    (slope,) = torch.autograd.grad(total, x, create_graph=True)
    return slope.square().reshape(len(x), -1).sum(1)


# --- book/ddpm/bound.ipynb · bound-export-terms · Closed forms
def _per_sample(x: Tensor) -> Tensor:
    """Sum over everything but the batch: [B, ...] -> [B]."""
    return x.reshape(x.shape[0], -1).sum(1)


def prior_kl(schedule: Schedule, x_0: Tensor) -> Tensor:
    r"""L_T = KL(q(x_T | x_0) || N(0, I)) in nats per sample; nothing in it is learned.

    Equation `eq-bound-prior`; first term of (5) in Ho et al. 2020.
    Args: x_0: float tensor [B, ...], finite.
    Returns: [B], summed over all dimensions.
    Raises: TypeError, ValueError for anything else.
    >>> from ddpm_core.schedules import linear
    >>> f"{prior_kl(linear(), torch.ones(1, 3)).item():.3g}"
    '6.05e-05'
    """
    checks.tensor("x_0", x_0)
    checks.integer("x_0.ndim", x_0.ndim, 1)
    checks.finite("x_0", x_0)
    t = torch.full(x_0.shape[:1], schedule.T, device=x_0.device)
    one = torch.ones_like(schedule.one_minus_alpha_bar)
    spread = at(kl_term(one, schedule.one_minus_alpha_bar), t, x_0)
    return _per_sample(0.5 * (spread + at(schedule.alpha_bar, t, x_0) * x_0**2))


def step_kl(
    schedule: Schedule,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    x_0_hat: Tensor,
    variance: Tensor,
) -> Tensor:
    r"""L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in nats per sample.

    Equation `eq-bound-step`; Ho et al. 2020, (5) and (8). p's mean is `posterior_mean`
    of x_0_hat, so x_t cancels.
    Args: x_0, x_t, x_0_hat: float tensors [B, ...]; x_0_hat is the model's prediction.
        t: int64 [B], 2..T. variance: table [T+1] of the sigma_t^2, above 0 from 2 on.
    Returns: [B], summed over all dimensions. Raises: TypeError, ValueError otherwise.
    >>> from ddpm_core.schedules import linear
    >>> one, t = torch.ones(1, 1), torch.tensor([2])
    >>> step_kl(linear(), one, one, t, one, posterior_variance(linear()))
    tensor([0.])
    """
    checks.tensor("x_0", x_0)
    checks.same_shape("x_t", x_t, "x_0", x_0)
    checks.same_shape("x_0_hat", x_0_hat, "x_0", x_0)
    checks.integer("x_0.ndim", x_0.ndim, 1)
    checks.finite("x_t", x_t)
    checks.timesteps("t", t, schedule.T, x_0.shape[0], low=2)
    checks.tensor("variance", variance, shape=(schedule.T + 1,))
    # The mean is linear in (x_0, x_t): the difference of the two means is the mean of
    # the differences. Subtracting the means themselves would lose digits in float32.
    shift = posterior_mean(schedule, x_0 - x_0_hat, x_t - x_t, t)
    true = at(posterior_variance(schedule), t, x_0).expand_as(x_0)
    model = at(variance, t, x_0).expand_as(x_0)
    return _per_sample(kl_normal(shift, true, torch.zeros_like(shift), model))


# --- book/ddpm/l_simple.ipynb · l-simple-code-loss · The best answer is a...
def target(
    schedule: Schedule, x_0: Tensor, t: Tensor, eps: Tensor, prediction: str
) -> Tensor:
    r"""What the network is asked for at x_t = q_sample(schedule, x_0, t, eps).

    'eps', 'x_0', 'v' (`eq-simple-v`; Salimans and Ho, 2022) or 'mean'
    (`eq-posterior-mean`).

    Args: x_0 and eps of one shape [B, ...]; t int64 [B] in 1..T.
    Returns: a tensor like x_0.
    Raises: ValueError for 'eps' if beta_T = 1, and for inputs that do not fit.

    >>> from ddpm_core.schedules import linear
    >>> x, t = torch.ones(1, 1), torch.tensor([1000])
    >>> round(target(linear(), x, t, 0 * x, "v").item(), 3)
    -1.0
    """
    checks.one_of("prediction", prediction, ("eps", "x_0", "v", "mean"))
    checks.tensor("x_0", x_0)
    checks.same_shape("x_0", x_0, "eps", eps)
    checks.timesteps("t", t, schedule.T, x_0.shape[0])
    if prediction == "eps":
        signal_left(schedule)
        return eps
    if prediction == "x_0":
        return x_0
    if prediction == "mean":
        return posterior_mean(schedule, x_0, q_sample(schedule, x_0, t, eps), t)
    signal = at(schedule.alpha_bar.sqrt(), t, x_0)
    return signal * eps - at(schedule.one_minus_alpha_bar.sqrt(), t, x_0) * x_0


def simple_loss(
    model: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    x_0: Tensor,
    t: Tensor,
    eps: Tensor,
    *,
    prediction: str = "eps",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Squared error of a network, a mean over dimensions, one value per sample.

    `eq-simple-loss`; Ho et al. (2020), eq. 14. The model is called with the schedule's
    `timesteps[t]`. weight is a table [T+1] indexed by t, or None for 1.

    Args: x_0 and eps [B, ...]; t int64 [B] in 1..T. Returns: losses [B].
    Raises: TypeError or ValueError for inputs or outputs that do not fit.

    >>> from ddpm_core.schedules import linear
    >>> x, t = torch.ones(2, 3), torch.tensor([1, 1000])
    >>> simple_loss(lambda x_t, t: 0 * x_t, linear(), x, t, 2 * x)
    tensor([4., 4.])
    """
    wanted = target(schedule, x_0, t, eps, prediction)
    output = model(q_sample(schedule, x_0, t, eps), schedule.timesteps[t])
    checks.same_shape("the model's output", output, "x_0", x_0)
    loss = (output - wanted).square().flatten(1).mean(1)
    if weight is None:
        return loss
    checks.tensor("weight", weight, shape=(schedule.T + 1,))
    return at(weight, t, loss) * loss


# --- book/ddpm/l_simple.ipynb · l-simple-code-weights · From the bound to...
def eps_weight(schedule: Schedule, variance: Tensor) -> Tensor:
    r"""The bound's own weight on the squared error of eps, for every t.

    `eq-simple-weight`; Ho et al. (2020), eq. 12. Times the *sum* of squares over
    dimensions it is L_{t-1} up to a constant; at t = 1 with a Gaussian decoder.

    Args: variance is the table [T+1] of sigma_t^2, as `reverse_variance` gives it.
    Returns: a table [T+1], entry 0 NaN. Raises: ValueError if beta_T = 1.

    >>> from ddpm_core.process import reverse_variance
    >>> from ddpm_core.schedules import linear
    >>> weight = eps_weight(linear(), reverse_variance(linear(), "fixed_large"))
    >>> [f"{w:.3g}" for w in weight[[1, 1000]].tolist()]
    ['0.5', '0.0102']
    """
    checks.tensor("variance", variance, shape=(schedule.T + 1,))
    signal_left(schedule)
    scale = 2 * variance * schedule.alpha * schedule.one_minus_alpha_bar
    return schedule.beta.square() / scale


def min_snr_weight(schedule: Schedule, gamma: float, prediction: str) -> Tensor:
    r"""Min-SNR weight on the squared error of a prediction, for every t.

    `eq-simple-min-snr`; Hang et al. (2023), section 3.4: min(SNR, gamma) on the error of
    x_0, carried over to 'eps' or 'v'.

    Args: gamma > 0, 5 in the paper; prediction 'eps', 'x_0' or 'v'.
    Returns: a table [T+1], entry 0 NaN. Raises: ValueError for other arguments.

    >>> from ddpm_core.schedules import linear
    >>> min_snr_weight(linear(), 5.0, "x_0")[1].item()
    5.0
    """
    checks.one_of("prediction", prediction, ("eps", "x_0", "v"))
    if checks.number("gamma", gamma, low=0.0) == 0:
        raise ValueError("gamma must be above 0, got 0")
    if prediction == "eps":
        signal_left(schedule)
    snr = schedule.snr.clone()
    snr[0] = float("nan")
    scale = {"eps": 1 / snr, "x_0": torch.ones_like(snr), "v": 1 / (snr + 1)}
    return snr.clamp(max=gamma) * scale[prediction]
