"""Written by tools/extract.py; edit the chapters:

- book/ddpm/forward.ipynb
- book/ddpm/posterior.ipynb
- book/ddpm/l_simple.ipynb
- book/ddpm/sampling.ipynb
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_core import checks, schedules
from ddpm_core.schedules import Schedule

__all__ = [
    "PREDICTIONS",
    "VARIANCES",
    "ReverseStep",
    "at",
    "convert",
    "from_x_0",
    "p_mean_variance",
    "posterior_mean",
    "posterior_mean_coefficients",
    "posterior_mean_from_eps",
    "posterior_variance",
    "q_sample",
    "q_step",
    "reverse_variance",
    "signal_left",
    "to_x_0",
]


# --- book/ddpm/forward.ipynb · forward-q-step · Reading a table
def at(table: Tensor, t: Tensor, x: Tensor) -> Tensor:
    r"""`table[t]`, one number per sample, shaped [B, 1, ...] to multiply x [B, ...].

    The only place that indexes a table. `table` [T+1]; t int64 [B] in 0...T; the
    result has x's dtype. All three must lie on one device; else ValueError.

    >>> import torch
    >>> table = torch.tensor([0.0, 0.1, 0.2])
    >>> at(table, torch.tensor([2, 1]), torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 1, 1, 1])
    """
    checks.tensor("table", table, ndim=1)
    checks.tensor("x", x)
    checks.timesteps("t", t, table.shape[0] - 1, x.shape[0], low=0)
    checks.same_device("table (a schedule: schedule.to)", table, "x", x)
    checks.same_device("t", t, "x", x)
    return table[t].to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def q_step(
    schedule: schedules.Schedule, x_prev: Tensor, t: Tensor, eps: Tensor
) -> Tensor:
    r"""Draw x_t ~ q(x_t | x_{t-1}) from the noise `eps`, `eq-forward-step-sample`.

    Ho et al. 2020, eq. 2. `x_prev` = x_{t-1} and eps [B, ...] of one shape, t int64 [B]
    in 1...T. Returns x_t. Raises TypeError or ValueError.

    >>> import torch
    >>> from ddpm_core.schedules import from_beta
    >>> schedule = from_beta(torch.tensor([0.64]))
    >>> one = torch.ones(1, 1)
    >>> round(q_step(schedule, one, torch.tensor([1]), one).item(), 4)
    1.4
    """
    checks.tensor("x_prev", x_prev)
    checks.tensor("eps", eps)
    checks.same_shape("eps", eps, "x_prev", x_prev)
    checks.same_device("eps", eps, "x_prev", x_prev)
    checks.timesteps("t", t, schedule.T, x_prev.shape[0])
    signal = at(schedule.alpha.sqrt(), t, x_prev)
    noise = at(schedule.beta.sqrt(), t, x_prev)
    return signal * x_prev + noise * eps


# --- book/ddpm/forward.ipynb · forward-q-sample · The same by induction
def q_sample(
    schedule: schedules.Schedule, x_0: Tensor, t: Tensor, eps: Tensor
) -> Tensor:
    r"""Draw x_t ~ q(x_t | x_0) from the noise `eps`, `eq-forward-closed-sample`.

    Ho et al. 2020, eq. 4. `x_0` and eps [B, ...] of one shape, t int64 [B] in 0...T;
    t = 0 returns x_0. Returns x_t. Raises TypeError or ValueError.

    >>> import torch
    >>> from ddpm_core.schedules import from_beta
    >>> schedule = from_beta(torch.tensor([0.64]))
    >>> x_0 = torch.ones(2, 1, dtype=torch.float64)
    >>> x_t = q_sample(schedule, x_0, torch.tensor([0, 1]), x_0)
    >>> [round(x, 4) for x in x_t.flatten().tolist()]
    [1.0, 1.4]
    """
    checks.tensor("x_0", x_0)
    checks.tensor("eps", eps)
    checks.same_shape("eps", eps, "x_0", x_0)
    checks.same_device("eps", eps, "x_0", x_0)
    checks.timesteps("t", t, schedule.T, x_0.shape[0], low=0)
    signal = at(schedule.alpha_bar.sqrt(), t, x_0)
    noise = at(schedule.one_minus_alpha_bar.sqrt(), t, x_0)
    return signal * x_0 + noise * eps


# --- book/ddpm/posterior.ipynb · posterior-code-variance · The mean
def posterior_variance(schedule: Schedule) -> Tensor:
    r"""Variance of q(x_{t-1} | x_t, x_0) for every t, as a table.

    `eq-posterior-variance`; Ho et al. (2020), eq. 7. Entry 1 is 0: given x_0, nothing
    about x_0 is left to be uncertain of. Entry 0 has no meaning and is NaN.

    Returns: beta_tilde, shape [T+1], dtype and device of the schedule.

    >>> from ddpm_core.schedules import linear
    >>> [f"{b:.3g}" for b in posterior_variance(linear())[[1, 2, 1000]].tolist()]
    ['0', '5.45e-05', '0.02']
    """
    rest = schedule.one_minus_alpha_bar
    beta_tilde = torch.full_like(rest, float("nan"))
    beta_tilde[1:] = rest[:-1] / rest[1:] * schedule.beta[1:]
    return beta_tilde


# --- book/ddpm/posterior.ipynb · posterior-code-mean · The mean
def posterior_mean_coefficients(schedule: Schedule) -> tuple[Tensor, Tensor]:
    r"""Coefficients of x_0 and of x_t in the mean of q(x_{t-1} | x_t, x_0).

    `eq-posterior-mean`; Ho et al. (2020), eq. 7.

    Returns: (c_0, c_t), two tables of shape [T+1], dtype and device of the schedule;
    entry 0 has no meaning and is NaN.

    >>> from ddpm_core.schedules import linear
    >>> c_0, c_t = posterior_mean_coefficients(linear())
    >>> c_0[1].item(), c_t[1].item()
    (1.0, 0.0)
    """
    rest, alpha_bar = schedule.one_minus_alpha_bar, schedule.alpha_bar
    c_0, c_t = torch.full_like(rest, float("nan")), torch.full_like(rest, float("nan"))
    c_0[1:] = alpha_bar[:-1].sqrt() * schedule.beta[1:] / rest[1:]
    c_t[1:] = schedule.alpha[1:].sqrt() * rest[:-1] / rest[1:]
    return c_0, c_t


def posterior_mean(schedule: Schedule, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    r"""Mean of q(x_{t-1} | x_t, x_0), `eq-posterior-mean`; Ho et al. (2020), eq. 7.

    Args: x_0 and x_t of one shape [B, ...]; t int64 [B] in 1..T.
    Returns: a tensor like x_t. At t = 1 it is x_0.
    Raises: TypeError or ValueError for shapes, dtypes or steps that do not fit.

    >>> from ddpm_core.schedules import linear
    >>> x_0, x_t = torch.ones(1, 2), torch.zeros(1, 2)
    >>> posterior_mean(linear(), x_0, x_t, torch.tensor([1]))
    tensor([[1., 1.]])
    """
    checks.tensor("x_t", x_t)
    checks.same_shape("x_0", x_0, "x_t", x_t)
    checks.timesteps("t", t, schedule.T, x_t.shape[0])
    c_0, c_t = posterior_mean_coefficients(schedule)
    return at(c_0, t, x_t) * x_0 + at(c_t, t, x_t) * x_t


# --- book/ddpm/posterior.ipynb · posterior-code-eps · With the noise in place of the...
def signal_left(schedule: Schedule) -> None:
    r"""Refuse a schedule whose alpha_bar_T is 0 (beta_T = 1).

    There x_T is the noise itself, so the noise says nothing about x_0
    (`eq-posterior-x-0-from-eps` divides by 0). Only tables on a CPU are looked at.

    Raises: ValueError naming the schedule and the way out.

    >>> from ddpm_core.schedules import linear
    >>> signal_left(linear())
    """
    if checks.can_look(schedule.alpha_bar) and schedule.alpha_bar[-1] == 0:
        raise ValueError(
            f"schedule {schedule.name!r} has beta_T = 1, so alpha_bar_T = 0 and x_T is "
            "pure noise: no eps-prediction there, predict 'v' or 'x_0'"
        )


def posterior_mean_from_eps(
    schedule: Schedule, x_t: Tensor, eps: Tensor, t: Tensor
) -> Tensor:
    r"""Posterior mean with x_0 expressed by the noise in x_t.

    `eq-posterior-mean-eps`; Ho et al. (2020), eqs. 10 and 11.

    Args: x_t and eps of one shape [B, ...]; t int64 [B] in 1..T.
    Returns: a tensor like x_t.
    Raises: ValueError if beta_T = 1; TypeError or ValueError for inputs that do not fit.

    >>> from ddpm_core.schedules import linear
    >>> x_t, t = torch.ones(1, 1), torch.tensor([1000])
    >>> posterior_mean_from_eps(linear(), x_t, x_t, t).item() < 1
    True
    """
    checks.tensor("x_t", x_t)
    checks.same_shape("eps", eps, "x_t", x_t)
    checks.timesteps("t", t, schedule.T, x_t.shape[0])
    signal_left(schedule)
    slope = schedule.beta / schedule.one_minus_alpha_bar.sqrt()
    return (x_t - at(slope, t, x_t) * eps) / at(schedule.alpha.sqrt(), t, x_t)


# --- book/ddpm/posterior.ipynb · posterior-code-rules · The first step has variance 0
VARIANCES = ("fixed_large", "fixed_small", "fixed_large_reference")


def reverse_variance(schedule: Schedule, rule: str) -> Tensor:
    r"""Variance sigma_t^2 of the reverse step for every t, by one of three fixed rules.

    fixed_large: beta_t. fixed_small: beta_tilde_t, and beta_tilde_2 at t = 1.
    fixed_large_reference: beta_t, and beta_tilde_2 at t = 1. `eq-posterior-rules`;
    Ho et al. (2020), section 3.2; the third is their released code's.

    Returns: a table of shape [T+1], positive from entry 1 on; entry 0 is NaN.
    Raises: ValueError for another rule, or if beta_tilde_2 is needed and T = 1.

    >>> from ddpm_core.schedules import linear
    >>> [f"{reverse_variance(linear(), r)[1]:.3g}" for r in VARIANCES]
    ['0.0001', '5.45e-05', '5.45e-05']
    """
    checks.one_of("rule", rule, VARIANCES)
    small = posterior_variance(schedule)
    variance = small.clone() if rule == "fixed_small" else schedule.beta.clone()
    variance[:1].fill_(float("nan"))
    if rule != "fixed_large":
        if schedule.T < 2:
            raise ValueError(f"rule {rule!r} needs beta_tilde_2, so T >= 2, got T = 1")
        variance[1] = small[2]
    return variance


# --- book/ddpm/l_simple.ipynb · l-simple-code-convert · Four things to predict
PREDICTIONS = ("eps", "x_0", "v", "mean")


def to_x_0(
    schedule: Schedule, x_t: Tensor, t: Tensor, output: Tensor, prediction: str
) -> Tensor:
    r"""The x_0 that a network's output stands for, `eq-posterior-x-0-from-eps`,
    `eq-simple-x-0-from-v` and `eq-simple-x-0-from-mean`.

    Args: x_t and output of one shape [B, ...]; t int64 [B] in 1..T; prediction one of
    PREDICTIONS. Returns: a tensor like x_t, not clipped.
    Raises: ValueError for 'eps' if beta_T = 1, and for inputs that do not fit.

    >>> from ddpm_core.schedules import linear
    >>> x, t = torch.ones(1, 1), torch.tensor([1])
    >>> round(to_x_0(linear(), x, t, 0 * x, "eps").item(), 5)
    1.00005
    """
    checks.one_of("prediction", prediction, PREDICTIONS)
    checks.tensor("x_t", x_t)
    checks.same_shape("output", output, "x_t", x_t)
    checks.timesteps("t", t, schedule.T, x_t.shape[0])
    if prediction == "x_0":
        return output
    if prediction == "mean":
        c_0, c_t = posterior_mean_coefficients(schedule)
        return (output - at(c_t, t, x_t) * x_t) / at(c_0, t, x_t)
    signal = at(schedule.alpha_bar.sqrt(), t, x_t)
    noise = at(schedule.one_minus_alpha_bar.sqrt(), t, x_t)
    if prediction == "v":
        return signal * x_t - noise * output
    signal_left(schedule)
    return (x_t - noise * output) / signal


def from_x_0(
    schedule: Schedule, x_t: Tensor, t: Tensor, x_0: Tensor, prediction: str
) -> Tensor:
    r"""What a network of this prediction type should put out if x_0 is its answer,
    `eq-simple-eps-from-x-0` and `eq-simple-v-from-x-0`; the inverse of `to_x_0`.

    Args: x_t and x_0 of one shape [B, ...]; t int64 [B] in 1..T; prediction one of
    PREDICTIONS. Returns: a tensor like x_t.
    Raises: ValueError for 'eps' if beta_T = 1, and for inputs that do not fit.

    >>> from ddpm_core.schedules import linear
    >>> x, t = torch.ones(1, 1), torch.tensor([1000])
    >>> round(from_x_0(linear(), x, t, 0 * x, "eps").item(), 3)
    1.0
    """
    checks.one_of("prediction", prediction, PREDICTIONS)
    checks.tensor("x_t", x_t)
    checks.same_shape("x_0", x_0, "x_t", x_t)
    checks.timesteps("t", t, schedule.T, x_t.shape[0])
    if prediction == "x_0":
        return x_0
    if prediction == "mean":
        return posterior_mean(schedule, x_0, x_t, t)
    signal = at(schedule.alpha_bar.sqrt(), t, x_t)
    noise = at(schedule.one_minus_alpha_bar.sqrt(), t, x_t)
    if prediction == "v":
        return (signal * x_t - x_0) / noise
    signal_left(schedule)
    return (x_t - signal * x_0) / noise


def convert(
    schedule: Schedule, x_t: Tensor, t: Tensor, output: Tensor, source: str, target: str
) -> Tensor:
    r"""Turn a prediction of one type into another: `to_x_0`, then `from_x_0`.

    Args: x_t and output of one shape [B, ...]; t int64 [B] in 1..T; source and target
    from PREDICTIONS. Returns: a tensor like x_t; the output itself if they are the same.
    Raises: ValueError for 'eps' if beta_T = 1, and for inputs that do not fit.

    >>> from ddpm_core.schedules import linear
    >>> x, t = torch.ones(1, 1), torch.tensor([500])
    >>> v = convert(linear(), x, t, 0.5 * x, "eps", "v")
    >>> round(convert(linear(), x, t, v, "v", "eps").item(), 5)
    0.5
    """
    checks.one_of("source", source, PREDICTIONS)
    checks.one_of("target", target, PREDICTIONS)
    x_0 = to_x_0(schedule, x_t, t, output, source)
    return output if source == target else from_x_0(schedule, x_t, t, x_0, target)


# --- book/ddpm/sampling.ipynb · sampling-p-mean-variance · The mean, first form:...
class ReverseStep(NamedTuple):
    r"""One reverse step's law: `mean` [B, ...], `variance` [B, 1, ...], its `x_0`.

    `eq-sampling-mean` and `eq-posterior-rules`; `x_0` is the prediction behind it.

    >>> ReverseStep._fields
    ('mean', 'variance', 'x_0')
    """

    mean: Tensor
    variance: Tensor
    x_0: Tensor


def p_mean_variance(
    schedule: Schedule,
    x_t: Tensor,
    t: Tensor,
    output: Tensor,
    *,
    prediction: str = "eps",
    variance: str = "fixed_large",
    clip: bool = True,
) -> ReverseStep:
    r"""Mean and variance of p(x_{t-1} | x_t), `eq-sampling-mean`, given a prediction.

    x_0 by `eq-sampling-x-0`, cut to [-1, 1] if `clip`, then the posterior's mean; Ho et
    al. 2020, section 3.2. `x_t`, `output` [B, ...]; t int64 [B] in 1...T, entries of
    `schedule`; `prediction` from PREDICTIONS, `variance` from VARIANCES. Raises
    TypeError or ValueError for inputs that do not fit.

    >>> from ddpm_core.schedules import linear
    >>> x, t = torch.full((1, 1), 0.5), torch.tensor([1])
    >>> round(p_mean_variance(linear(), x, t, 0 * x).mean.item(), 4)
    0.5
    """
    checks.finite("output", output)
    x_0 = to_x_0(schedule, x_t, t, output, prediction)
    if clip:
        x_0 = x_0.clamp(-1, 1)
    mean = posterior_mean(schedule, x_0, x_t, t)
    return ReverseStep(mean, at(reverse_variance(schedule, variance), t, x_t), x_0)
