"""Written by tools/extract.py; edit the chapters:

- book/foundations/kl.ipynb
- book/foundations/elbo.ipynb
- book/foundations/vae.ipynb
- book/foundations/gan.ipynb
- book/ddpm/bound.ipynb
- book/ddpm/l_simple.ipynb
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddpm_core import checks
from ddpm_core.process import (
    at,
    posterior_mean,
    posterior_variance,
    q_sample,
    reverse_variance,
    signal_left,
    to_x_0,
)
from ddpm_core.schedules import Schedule

__all__ = [
    "Bound",
    "BoundChunk",
    "Estimate",
    "Guess",
    "Reverse",
    "bits_per_dim",
    "bound_chunks",
    "bound_term",
    "discretised_log_likelihood",
    "discriminator_loss",
    "effective_sample_size",
    "elbo",
    "eps_weight",
    "fixed_variance",
    "generator_loss",
    "gradient_penalty",
    "importance_weighted_bound",
    "js_categorical",
    "kl_bernoulli",
    "kl_categorical",
    "kl_multivariate_normal",
    "kl_normal",
    "kl_standard_normal",
    "kl_term",
    "last_term",
    "min_snr_weight",
    "monte_carlo_js",
    "monte_carlo_kl",
    "prior_kl",
    "simple_loss",
    "step_kl",
    "target",
    "variational_bound",
    "x_0_guess",
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
class Estimate(NamedTuple):
    """A Monte Carlo estimate with its standard error."""

    value: Tensor
    standard_error: Tensor


def monte_carlo_kl(
    log_p: Callable[[Tensor], Tensor],
    log_q: Callable[[Tensor], Tensor],
    x: Tensor,
    estimator: str = "naive",
) -> Estimate:
    r"""KL(p || q) estimated from samples of p, with its standard error.

    Equations `eq-kl-naive` and `eq-kl-low-variance` (unbiased if q = 0 where p = 0).
    Args: log_p, log_q: x -> log-densities [N] (nats). x: [N, ...], samples of p, N >= 2.
        estimator: "naive" or "low_variance".
    Returns: Estimate of two scalars. Raises: TypeError, ValueError for anything else.
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
    return Estimate(each.mean(), each.std() / math.sqrt(len(each)))


# --- book/foundations/elbo.ipynb · elbo-export-elbo · Climbing without a closed form
def _log_weight(log_joint: Tensor, log_q: Tensor) -> Tensor:
    """The log weights of samples z of q; at least two along the first axis."""
    _check_pair("log_joint", log_joint, "log_q", log_q)
    count = log_joint.shape[0] if log_joint.ndim else 0
    checks.integer("the number of repetitions in log_joint", count, 2)
    checks.between("log_joint", log_joint, -math.inf, torch.finfo(log_joint.dtype).max)
    checks.finite("log_q, z drawn from q,", log_q)
    return log_joint - log_q


def elbo(log_joint: Tensor, log_q: Tensor) -> Estimate:
    r"""Evidence lower bound from samples z_n of q, with its standard error.

    Equation `eq-elbo-estimate`. To be made large: as a loss, take its negative.
    Args: log_joint: [N, ...] log p(x, z_n), N >= 2 (-inf where p is 0). log_q: the
        same shape, log q(z_n). Gradients pass through both.
    Returns: Estimate of two tensors [...]. Raises: TypeError, ValueError.
    >>> log_q = torch.zeros(4)
    >>> elbo(torch.tensor([-1.0, -2.0, -3.0, -2.0]), log_q).value
    tensor(-2.)
    """
    each = _log_weight(log_joint, log_q)
    return Estimate(each.mean(0), each.std(0) / math.sqrt(len(each)))


# --- book/foundations/elbo.ipynb · elbo-export-importance · Several samples, a...
def importance_weighted_bound(log_joint: Tensor, log_q: Tensor) -> Estimate:
    r"""Bound on log p(x) from K samples at a time, estimated by N repetitions.

    Equation `eq-elbo-iw`; Burda et al. (2016), section 3. K = 1 gives `elbo`.
    Args: log_joint: [N, K, ...] log p(x, z), N >= 2 repetitions, K >= 1 samples of q
        each (-inf where p is 0). log_q: the same shape, log q(z).
    Returns: Estimate of two tensors [...]. Raises: TypeError, ValueError.
    >>> log_joint = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    >>> importance_weighted_bound(log_joint, torch.zeros(2, 2)).value
    tensor(1.4338)
    """
    log_weight = _log_weight(log_joint, log_q)
    samples = log_weight.shape[1] if log_weight.ndim > 1 else 0
    checks.integer("the number of samples in log_joint", samples, 1)
    each = log_weight.logsumexp(1) - math.log(samples)
    return Estimate(each.mean(0), each.std(0) / math.sqrt(len(each)))


# --- book/foundations/elbo.ipynb · elbo-export-ess · Several samples, a smaller gap
def effective_sample_size(log_weight: Tensor, dim: int = -1) -> Tensor:
    r"""How many equally weighted samples the weights along dim are worth, 1 to K.

    Equation `eq-elbo-ess`; weights need not be normalised. 0 if all of them are 0.
    Args: log_weight: float tensor, log p(x, z_k) - log q(z_k) along dim; -inf is a
        weight of 0.
    Returns: its shape without dim. Raises: TypeError, ValueError for anything else.
    >>> effective_sample_size(torch.tensor([[0.0, 0.0], [5.0, -torch.inf]]))
    tensor([2., 1.])
    """
    checks.tensor("log_weight", log_weight)
    checks.integer("log_weight.ndim", log_weight.ndim, 1)
    dim = checks.integer("dim", dim, -log_weight.ndim, log_weight.ndim - 1)
    checks.integer("the number of weights", log_weight.shape[dim], 1)
    checks.between(
        "log_weight", log_weight, -math.inf, torch.finfo(log_weight.dtype).max
    )
    largest = log_weight.amax(dim, keepdim=True)
    some = largest > -math.inf
    weight = (log_weight - torch.where(some, largest, 0.0)).exp()  # the largest is 1
    squares = weight.square().sum(dim)
    return weight.sum(dim).square() / torch.where(some.squeeze(dim), squares, 1.0)


# --- book/foundations/vae.ipynb · vae-export-kl · The regulariser in closed form
def kl_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    r"""KL(N(mean, exp(log_variance)) || N(0, 1)) in nats, elementwise, `eq-vae-kl`.

    For independent coordinates sum the result over them. No checks of values: it
    stands in the inner loop of training.
    Args: two float tensors of one shape.
    Returns: a tensor of that shape, >= 0.
    Raises: TypeError, ValueError for other types and shapes.
    >>> kl_standard_normal(torch.tensor([0.0, 1.0]), torch.zeros(2))
    tensor([0.0000, 0.5000])
    """
    checks.tensor("mean", mean)
    checks.tensor("log_variance", log_variance)
    checks.same_shape("log_variance", log_variance, "mean", mean)
    spread = torch.expm1(log_variance) - log_variance
    return 0.5 * (mean.square() + spread)


# --- book/foundations/vae.ipynb · vae-export-tail · Without losing digits
def _log_tail(u: Tensor) -> Tensor:
    """The log of the mass above u of N(0, 1), with no underflow: `eq-vae-tail`."""
    right = u > 0
    a, b = torch.where(right, u, 0.0), torch.where(right, 0.0, u)
    far = torch.special.erfcx(a / math.sqrt(2)).log() - math.log(2) - a.square() / 2
    return torch.where(right, far, torch.log1p(-torch.erfc(-b / math.sqrt(2)) / 2))


def _log_between(near: Tensor, far: Tensor, centre: Tensor, width: Tensor) -> Tensor:
    """The log of the mass of N(0, 1) from near to far, in whichever way loses no digits.

    near < far, centre >= 0 is their middle and width their difference, all exact.
    """
    root = math.sqrt(2)
    outside = (torch.erfc(-near / root) + torch.erfc(far / root)) / 2
    most = outside < 0.5  # most of the mass is inside: count what is not
    most_inside = torch.log1p(-torch.where(most, outside, 0.0))
    thin = (width < 0.1) & (width * centre < 0.1)  # density times width, nearly
    w, m = torch.where(thin, width, 0.1), torch.where(thin, centre, 0.0)
    bend = torch.exp(-0.075 * w.square()) * torch.cosh(math.sqrt(0.15) * w * m) - 1
    height = -0.5 * m.square() - 0.5 * math.log(2 * math.pi)
    thin_inside = w.log() + height + torch.log1p(bend * 5 / 9)
    rest = ~(most | thin)  # in one tail: a difference of two tails
    n, f = torch.where(rest, near, 1.0), torch.where(rest, far, 2.0)
    ratio = torch.special.erfcx(f / root).log() - torch.special.erfcx(n / root).log()
    step = ratio - torch.where(rest, width * centre, 1.0)  # log tail(f) - log tail(n)
    tails = _log_tail(n) + torch.log(-torch.expm1(step))
    return torch.where(most, most_inside, torch.where(thin, thin_inside, tails))


# --- book/foundations/vae.ipynb · vae-export-likelihood · Without losing digits
def _check_levels(x: Tensor, levels: int) -> None:
    """Every entry is one of `levels` equally spaced numbers from -1 to 1."""
    checks.between("x", x, -1.0, 1.0)
    if checks.can_look(x) and x.numel():
        last = levels - 1
        off = (x - (2 * torch.round((x + 1) * (last / 2)) / last - 1)).abs().flatten()
        if off.max() > 1e-6:
            raise ValueError(
                f"x must lie on the {levels} levels from -1 to 1; "
                f"got {x.flatten()[off.argmax()].item()} (are the levels right?)"
            )


def _check_law(x: Tensor, name: str, y: Tensor) -> None:
    """Whether y fits x in type, shape and device, and is finite."""
    _check_pair(name, y, "x", x)
    if x.dtype not in (torch.float32, torch.float64) or y.dtype != x.dtype:
        both = f"x and {name} must both be float32 or both float64"
        raise TypeError(f"{both}; got {x.dtype} and {y.dtype}")
    checks.finite(name, y)


def discretised_log_likelihood(
    x: Tensor, mean: Tensor, variance: Tensor, levels: int
) -> Tensor:
    r"""Log-mass in nats of the bin of grey level x under N(mean, variance), elementwise.

    Equation `eq-vae-decoder`; Ho et al. (2020), eq. 13, for any number of levels.
    Args: x, mean, variance: float32 or float64 of one shape; x on `levels` >= 2 equally
        spaced levels from -1 to 1 (17 for 8x8 digits, 256 for 8-bit images).
    Returns: a tensor of that shape, <= 0. The edge bins reach to infinity.
    Raises: TypeError, ValueError for anything else.
    >>> x = torch.tensor([-1.0, 0.0, 1.0])
    >>> discretised_log_likelihood(x, 0 * x, 0 * x + 0.25, levels=3).exp()
    tensor([0.1587, 0.6827, 0.1587])
    """
    levels = checks.integer("levels", levels, 2)
    _check_law(x, "mean", mean)
    _check_law(x, "variance", variance)
    if checks.can_look(variance) and not bool((variance > 0).all()):
        lowest = variance.min().item()
        raise ValueError(f"variance must be above 0 everywhere; got {lowest}")
    _check_levels(x, levels)
    last, sigma = levels - 1, variance.sqrt()
    place = 2 * torch.round((x.detach() + 1) * (last / 2)) - last  # a whole number
    low, high = ((place - 1) / last - mean) / sigma, ((place + 1) / last - mean) / sigma
    centre = (place / last - mean) / sigma
    right = torch.where(centre == 0, place >= 0, centre > 0)  # mirror the left side
    near, far = torch.where(right, low, -high), torch.where(right, high, -low)
    middle = torch.where(right, centre, -centre)  # not abs, whose slope at 0 is 0
    inner = _log_between(near, far, middle, 2 / last / sigma)
    inner = torch.where(place >= last, _log_tail(low), inner)
    return torch.where(place <= -last, _log_tail(-high), inner)


def bits_per_dim(nats: Tensor, dims: int) -> Tensor:
    r"""A negative log-likelihood in nats for `dims` numbers, as bits for each of them.

    Equation `eq-vae-bits`: nats / (dims log 2). For an 8x8 grey image dims is 64.
    >>> bits_per_dim(torch.tensor([64 * math.log(17)]), 64)
    tensor([4.0875])
    """
    checks.tensor("nats", nats)
    return nats / (checks.integer("dims", dims, 1) * math.log(2))


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
) -> Estimate:
    r"""Jensen-Shannon divergence estimated from samples of both laws, with its error.

    Equation `eq-gan-monte-carlo`; unbiased, never above log 2.
    Args: log_p, log_q: x -> log-densities [N] (nats), -inf where there is none. x_p,
        x_q: [N, ...] and [N', ...], samples of p and of q, at least two of each.
    Returns: Estimate of two scalars. Raises: TypeError, ValueError for anything else.
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
    return Estimate(value, (squares[0] + squares[1]).sqrt())


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


def _like_samples(name: str, y: Tensor, x_0: Tensor) -> Tensor:
    """A tensor [B, 1, ...] or like x_0, spread out to x_0's shape."""
    checks.tensor(name, y, ndim=x_0.ndim)
    checks.same_device(name, y, "x_0", x_0)
    if y.shape not in (x_0.shape, x_0.shape[:1] + (1,) * (x_0.ndim - 1)):
        right = (
            f"be like x_0, {tuple(x_0.shape)}, or hold one number a sample, [B, 1, ...]"
        )
        raise ValueError(f"{name} must {right}; got shape {tuple(y.shape)}")
    return y.to(x_0.dtype).expand_as(x_0)


def step_kl(
    schedule: Schedule, x_0: Tensor, t: Tensor, x_0_hat: Tensor, variance: Tensor
) -> Tensor:
    r"""L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in nats per sample.

    Equation `eq-bound-step-x-0`; Ho et al. 2020, (5) and (8). p has the mean that
    `posterior_mean` gives at x_0_hat, so x_t cancels and is not asked for.
    Args: x_0, x_0_hat: float tensors [B, ...]. t: int64 [B], 2..T. variance: sigma_t^2
        above 0, [B, 1, ...] as `at(table, t, x_0)` gives it, or like x_0 if learned.
    Returns: [B], summed over all dimensions. Raises: TypeError, ValueError otherwise.
    >>> from ddpm_core.schedules import linear
    >>> one, t = torch.ones(1, 1), torch.tensor([2])
    >>> step_kl(linear(), one, t, one, at(posterior_variance(linear()), t, one))
    tensor([0.])
    """
    checks.tensor("x_0", x_0)
    checks.same_shape("x_0_hat", x_0_hat, "x_0", x_0)
    checks.integer("x_0.ndim", x_0.ndim, 1)
    checks.timesteps("t", t, schedule.T, x_0.shape[0], low=2)
    model = _like_samples("variance", variance, x_0)
    # The mean is linear in (x_0, x_t): the difference of the two means is the mean of
    # the differences. Subtracting the means themselves would lose digits in float32.
    none = torch.zeros_like(x_0)
    shift = posterior_mean(schedule, x_0 - x_0_hat, none, t)
    true = at(posterior_variance(schedule), t, x_0).expand_as(x_0)
    return _per_sample(kl_normal(shift, true, none, model))


# --- book/ddpm/bound.ipynb · bound-export-last · Grey levels: the last term of an image
def last_term(
    x_0: Tensor, x_0_hat: Tensor, variance: Tensor, levels: int | None = None
) -> Tensor:
    r"""L_0 = -log p(x_0 | x_1) in nats per sample: of a density, or of grey levels.

    `eq-bound-last` without levels, `eq-bound-cell` with them; Ho et al. 2020, (13).
    Args: x_0, x_0_hat: float tensors [B, ...]. variance: sigma_1^2, [B, 1, ...] or like
        x_0. levels: how many grey levels x_0 has in [-1, 1]; None for real numbers.
    Returns: [B]. Raises: TypeError, ValueError for anything else.
    >>> x = torch.zeros(1, 1)
    >>> last_term(x, x, x + 1)
    tensor([0.9189])
    """
    checks.tensor("x_0", x_0)
    checks.same_shape("x_0_hat", x_0_hat, "x_0", x_0)
    checks.integer("x_0.ndim", x_0.ndim, 1)
    spread = _like_samples("variance", variance, x_0)
    if levels is not None:
        return -_per_sample(discretised_log_likelihood(x_0, x_0_hat, spread, levels))
    square = (x_0 - x_0_hat).square() / spread
    return 0.5 * _per_sample(square + spread.log() + math.log(2 * math.pi))


# --- book/ddpm/bound.ipynb · bound-export-term · The bound of any model, in code
Guess = Callable[[Tensor, Tensor], Tensor]
Reverse = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def fixed_variance(
    guess: Guess, schedule: Schedule, variance: str | Tensor, *, clip: bool = False
) -> Reverse:
    r"""A reverse chain (x_t, t) -> (x_0_hat, sigma_t^2) whose variances are a table.

    `eq-posterior-rules`; Ho et al. 2020, section 3.2. A network that learns its
    variance needs no such wrapper: let it return both.
    Args: guess: (x_t, t) -> x_0_hat like x_t. variance: a rule of `reverse_variance` or
        a table [T+1]. clip: cut x_0_hat to [-1, 1].
    Returns: a function. Raises: TypeError, ValueError for an unknown rule or table.
    >>> from ddpm_core.schedules import linear
    >>> reverse = fixed_variance(lambda x_t, t: x_t, linear(), "fixed_small")
    >>> [tuple(part.shape) for part in reverse(torch.ones(2, 3), torch.tensor([1, 2]))]
    [(2, 3), (2, 1)]
    """
    table = (
        reverse_variance(schedule, variance) if isinstance(variance, str) else variance
    )
    checks.tensor("variance", table, shape=(schedule.T + 1,))

    def reverse(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x_0_hat = guess(x_t, t)
        return (x_0_hat.clamp(-1, 1) if clip else x_0_hat), at(table, t, x_t)

    return reverse


def bound_term(
    reverse: Reverse,
    schedule: Schedule,
    x_0: Tensor,
    t: Tensor,
    eps: Tensor,
    levels: int | None = None,
) -> Tensor:
    r"""The bound's term of step t at one draw of x_t: L_{t-1}, and L_0 where t = 1.

    `eq-bound-terms`; Ho et al. 2020, (5). Differentiable, for any fixed or learned
    variance: reverse(x_t, t) gives (x_0_hat like x_t, variance [B, 1, ...] or like x_t).
    Args: x_0, eps: [B, ...]. t: int64 [B], 1..T. levels: as in `last_term`.
    Returns: [B], nats per sample. Raises: TypeError, ValueError for anything else.
    >>> from ddpm_core.schedules import linear
    >>> reverse = fixed_variance(lambda x_t, t: 0 * x_t, linear(), "fixed_small")
    >>> x_0, t = torch.zeros(1, 3), torch.tensor([9])
    >>> bound_term(reverse, linear(), x_0, t, eps=x_0 + 1)
    tensor([0.])
    """
    x_0_hat, variance = reverse(q_sample(schedule, x_0, t, eps), t)
    last = last_term(x_0, x_0_hat, variance, levels)
    if schedule.T == 1:
        return last
    step = step_kl(schedule, x_0, t.clamp(min=2), x_0_hat, variance)
    return torch.where(t == 1, last, step)


# --- book/ddpm/bound.ipynb · bound-export-whole · The bound of any model, in code
class BoundChunk(NamedTuple):
    """Terms of some steps: `t` int64 [n] and `terms` [n, B] in nats per sample."""

    t: Tensor
    terms: Tensor


def bound_chunks(
    reverse: Reverse,
    schedule: Schedule,
    x_0: Tensor,
    steps: Sequence[int] | None = None,
    *,
    levels: int | None = None,
    chunk: int = 8,
    generator: torch.Generator | None = None,
) -> Iterator[BoundChunk]:
    r"""The terms L_0, L_1, ..., L_{T-1} of `eq-bound-terms`, a few steps at a time.

    Each step draws its own noise, on the CPU, so the numbers do not depend on `chunk`.
    Args: reverse, levels: as in `bound_term`. x_0: [B, ...]. steps: those wanted, in
        1..T, repeats allowed; all by default. chunk: steps evaluated together.
    Returns: an iterator of BoundChunk, without gradients. Raises: TypeError, ValueError.
    >>> from ddpm_core.schedules import linear
    >>> reverse = fixed_variance(lambda x_t, t: 0 * x_t, linear(), "fixed_small")
    >>> parts = bound_chunks(reverse, linear(), torch.ones(2, 3), range(1, 13))
    >>> [len(part.t) for part in parts]
    [8, 4]
    """
    checks.tensor("x_0", x_0)
    checks.integer("the number of samples x_0", x_0.shape[0] if x_0.ndim else 0, 1)
    checks.integer("chunk", chunk, 1)
    wanted = range(1, schedule.T + 1) if steps is None else steps
    wanted = [checks.integer("each of steps", t, 1, schedule.T) for t in wanted]
    kind = torch.float64 if x_0.dtype == torch.float64 else torch.float32
    keep = [1] * (x_0.ndim - 1)

    @torch.no_grad()
    def terms_of(some: list[int]) -> BoundChunk:
        draws = [torch.randn(x_0.shape, generator=generator, dtype=kind) for _ in some]
        eps = torch.cat(draws).to(x_0.dtype).to(x_0.device)
        t = torch.tensor(some, device=x_0.device)
        each, many = t.repeat_interleave(x_0.shape[0]), x_0.repeat(len(some), *keep)
        terms = bound_term(reverse, schedule, many, each, eps, levels)
        return BoundChunk(t, terms.reshape(len(some), -1))

    parts = range(0, len(wanted), chunk)
    return (terms_of(wanted[first : first + chunk]) for first in parts)


class Bound(NamedTuple):
    """A bound in nats per sample, [B] each; `by_t` [T+1] holds means over the batch.

    by_t[1] is the mean of L_0, by_t[t] that of L_{t-1}; by_t[0] is NaN.
    """

    prior: Tensor
    steps: Tensor
    last: Tensor
    by_t: Tensor

    @property
    def total(self) -> Tensor:
        """L_T plus the sum of the steps plus L_0, [B]."""
        return self.prior + self.steps + self.last


def variational_bound(
    reverse: Reverse,
    schedule: Schedule,
    x_0: Tensor,
    *,
    levels: int | None = None,
    repeats: int = 1,
    chunk: int = 8,
    generator: torch.Generator | None = None,
) -> Bound:
    r"""-log p(x_0) <= L_T + sum of L_{t-1} + L_0, estimated with noise at every t.

    `eq-bound-terms`; Ho et al. 2020, (5). Unbiased; memory does not grow with T. Put a
    network into `eval()` before.
    Args: reverse, levels: as in `bound_term`; chunk, generator: as in `bound_chunks`.
        x_0: [B, ...]. repeats: draws of the noise at every t.
    Returns: Bound. Raises: TypeError, ValueError for anything else.
    >>> from ddpm_core.schedules import linear
    >>> reverse = fixed_variance(lambda x_t, t: 0 * x_t, linear(), "fixed_small")
    >>> f"{variational_bound(reverse, linear(), torch.zeros(1, 1)).total.item():.2f}"
    '-3.99'
    """
    checks.integer("repeats", repeats, 1)
    prior = prior_kl(schedule, x_0)
    steps, last = torch.zeros_like(prior), torch.zeros_like(prior)
    by_t = prior.new_zeros(schedule.T + 1)
    wanted = [t for t in range(1, schedule.T + 1) for _ in range(repeats)]
    parts = bound_chunks(
        reverse, schedule, x_0, wanted, levels=levels, chunk=chunk, generator=generator
    )
    for t, terms in parts:
        first = (t == 1)[:, None]
        last += torch.where(first, terms, 0.0).sum(0) / repeats
        steps += torch.where(first, 0.0, terms).sum(0) / repeats
        by_t.index_add_(0, t, terms.mean(1) / repeats)
    by_t[0] = math.nan
    return Bound(prior, steps, last, by_t)


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


# --- book/ddpm/l_simple.ipynb · l-simple-code-guess · From the bound to...
def x_0_guess(
    model: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    prediction: str = "eps",
) -> Callable[[Tensor, Tensor], Tensor]:
    r"""A network as a guess (x_t, t) -> x_0_hat, by `to_x_0`; not clipped.

    With `fixed_variance` it is a reverse chain for `variational_bound`. The model is
    called with the schedule's `timesteps[t]`.

    Args: prediction 'eps', 'x_0', 'v' or 'mean', what the model puts out.
    Returns: a function. It raises ValueError for 'eps' if beta_T = 1, and TypeError or
    ValueError for inputs or outputs that do not fit.

    >>> from ddpm_core.schedules import linear
    >>> guess = x_0_guess(lambda x_t, t: 0 * x_t, linear())
    >>> round(guess(torch.ones(1, 1), torch.tensor([1])).item(), 5)
    1.00005
    """

    def guess(x_t: Tensor, t: Tensor) -> Tensor:
        output = model(x_t, schedule.timesteps[t])
        return to_x_0(schedule, x_t, t, output, prediction)

    return guess
