"""Written by tools/extract.py; edit the chapters:

- book/beyond/improved.ipynb
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_core import checks
from ddpm_core.losses import Guess, Reverse, bits_per_dim, bound_term, simple_loss
from ddpm_core.process import (
    at,
    posterior_mean,
    posterior_mean_coefficients,
    posterior_variance,
    q_sample,
    reverse_variance,
    to_x_0,
)
from ddpm_core.samplers import Generators, State, check_start, noise_like, walk
from ddpm_core.schedules import Schedule
from ddpm_core.unet import UNet

__all__ = [
    "HybridParts",
    "ImportanceSteps",
    "StepDraw",
    "best_variance",
    "hybrid_loss",
    "hybrid_parts",
    "interpolated_variance",
    "learned_reverse",
    "log_variance_range",
    "reverse_chain",
    "split_output",
    "squared_errors",
    "widen",
]


# --- book/beyond/improved.ipynb · improved-export-variance · A variance between two...
def log_variance_range(schedule: Schedule) -> tuple[Tensor, Tensor]:
    r"""The ends of a learned variance, as logs: of beta_tilde_t and of beta_t.

    `eq-improved-range`: at t = 1, where beta_tilde is 0, the lower end is that of t = 2.
    The tables are those of *this* schedule: of a respaced one, those of its kept steps.

    Returns: (low, high), tables [T+1]; entry 0 is NaN. Raises: ValueError if T = 1.

    >>> from ddpm_core.schedules import linear
    >>> low, high = log_variance_range(linear())
    >>> f"{low[1]:.3f} {high[1]:.3f}"
    '-9.817 -9.210'
    """
    low = reverse_variance(schedule, "fixed_small")
    high = reverse_variance(schedule, "fixed_large")
    return low.log(), high.log()


def interpolated_variance(schedule: Schedule, t: Tensor, raw: Tensor) -> Tensor:
    r"""Variance of a reverse step from a raw output: -1 is beta_tilde_t, 1 is beta_t.

    `eq-improved-share`, `eq-improved-variance`; Nichol and Dhariwal (2021), eq. 15.

    Args: raw [B, ...], any numbers, not cut; t int64 [B] in 1..T.
    Returns: a tensor like raw, above 0. Raises: TypeError, ValueError otherwise.

    >>> from ddpm_core.schedules import linear
    >>> t, raw = torch.tensor([2, 2]), torch.tensor([[-1.0], [1.0]])
    >>> [f"{v:.3g}" for v in interpolated_variance(linear(), t, raw).flatten().tolist()]
    ['5.45e-05', '0.00012']
    """
    checks.tensor("raw", raw)
    checks.timesteps("t", t, schedule.T, raw.shape[0])
    low, high = log_variance_range(schedule)
    share = (raw + 1) / 2
    return (share * at(high, t, raw) + (1 - share) * at(low, t, raw)).exp()


# --- book/beyond/improved.ipynb · improved-export-hybrid · The hybrid loss
def split_output(output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
    r"""Cut a network's output [B, 2C, ...] into the prediction and the raw variance.

    Returns: two tensors like x_t [B, C, ...]. Raises: TypeError, ValueError otherwise.

    >>> x_t = torch.zeros(2, 1, 8, 8)
    >>> [tuple(y.shape) for y in split_output(torch.zeros(2, 2, 8, 8), x_t)]
    [(2, 1, 8, 8), (2, 1, 8, 8)]
    """
    checks.tensor("x_t", x_t)
    wanted = (x_t.shape[0], 2 * x_t.shape[1], *x_t.shape[2:])
    checks.tensor("the model's output", output, shape=wanted)
    prediction, raw = output.chunk(2, dim=1)
    return prediction, raw


class HybridParts(NamedTuple):
    r"""The two parts of the hybrid loss, [B] each: L_simple, and B_t in bits/dim.

    >>> HybridParts._fields
    ('simple', 'bits')
    """

    simple: Tensor
    bits: Tensor


def hybrid_parts(
    model: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    x_0: Tensor,
    t: Tensor,
    eps: Tensor,
    *,
    prediction: str = "eps",
    levels: int | None = None,
    clip: bool = False,
    detach: bool = True,
) -> HybridParts:
    r"""L_simple and the bound's term B_t (`eq-improved-bits`), from one look at x_t.

    Nichol and Dhariwal (2021), section 3.1. The model puts out [B, 2C, ...], see
    `split_output`, and is called with the schedule's `timesteps[t]`.
    Args: x_0, eps [B, C, ...]; t int64 [B] in 1..T; levels: as in `last_term`; clip:
    cut the guess of x_0 in B_t; detach: no gradient from B_t to the mean.
    Raises: TypeError, ValueError for anything else.

    >>> from ddpm_core.schedules import linear
    >>> x, t = torch.zeros(2, 1, 4), torch.tensor([3, 500])
    >>> hybrid_parts(lambda x, t: torch.cat([x, 0 * x], 1), linear(), x, t, x).simple
    tensor([0., 0.])
    """
    x_t = q_sample(schedule, x_0, t, eps)
    output = model(x_t, schedule.timesteps[t]).to(x_0.dtype)
    guess, raw = split_output(output, x_t)
    simple = simple_loss(lambda *_: guess, schedule, x_0, t, eps, prediction=prediction)
    fixed = guess.detach() if detach else guess
    x_0_hat = to_x_0(schedule, x_t, t, fixed, prediction)
    x_0_hat = x_0_hat.clamp(-1, 1) if clip else x_0_hat
    law = x_0_hat, interpolated_variance(schedule, t, raw)
    nats = bound_term(lambda *_: law, schedule, x_0, t, eps, levels)
    return HybridParts(simple, bits_per_dim(nats, x_0[0].numel()))


def hybrid_loss(
    model: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    x_0: Tensor,
    t: Tensor,
    eps: Tensor,
    *,
    weight: float = 0.001,
    prediction: str = "eps",
    levels: int | None = None,
    clip: bool = False,
) -> Tensor:
    r"""L_simple + weight T B_t, the mean detached in B_t, one value per sample.

    `eq-improved-hybrid`; Nichol and Dhariwal (2021), eq. 16. t is drawn uniformly.
    Args: as in `hybrid_parts`; weight: lambda, at least 0. Returns: losses [B].
    Raises: TypeError, ValueError for anything else.

    >>> from ddpm_core.schedules import linear
    >>> x, t = torch.zeros(2, 1, 4), torch.tensor([3, 500])
    >>> hybrid_loss(lambda x, t: torch.cat([x, 0 * x], 1), linear(), x, t, x).shape
    torch.Size([2])
    """
    checks.number("weight", weight, low=0.0)
    parts = hybrid_parts(
        model, schedule, x_0, t, eps, prediction=prediction, levels=levels, clip=clip
    )
    return parts.simple + weight * schedule.T * parts.bits


# --- book/beyond/improved.ipynb · improved-export-reverse · One object for the bound...
def learned_reverse(
    model: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    *,
    prediction: str = "eps",
    clip: bool = False,
) -> Reverse:
    r"""A network with a learned variance as a reverse chain (x_t, t) -> (x_0_hat, var).

    `eq-improved-variance`. For `variational_bound`, `bound_term`, `reverse_chain`. Put
    a network into `eval()` before. Of a respaced schedule the model is told the
    `timesteps[t]`, and the range is that of the kept steps.
    Args: model: to [B, 2C, ...], see `split_output`. clip: cut x_0_hat to [-1, 1].
    The function raises TypeError or ValueError for what does not fit.

    >>> from ddpm_core.schedules import linear
    >>> reverse = learned_reverse(lambda x, t: torch.cat([x, x], 1), linear())
    >>> [tuple(y.shape) for y in reverse(torch.ones(2, 1, 3), torch.tensor([1, 9]))]
    [(2, 1, 3), (2, 1, 3)]
    """

    def reverse(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        output = model(x_t, schedule.timesteps[t]).to(x_t.dtype)
        guess, raw = split_output(output, x_t)
        x_0_hat = to_x_0(schedule, x_t, t, guess, prediction)
        variance = interpolated_variance(schedule, t, raw)
        return (x_0_hat.clamp(-1, 1) if clip else x_0_hat), variance

    return reverse


def reverse_chain(
    reverse: Reverse,
    schedule: Schedule,
    x_T: Tensor,
    *,
    generator: Generators = None,
) -> Iterator[State]:
    r"""Ancestral sampling with any variance, fixed, measured or learned: T states.

    `eq-sampling-algorithm-2` with the variance that `reverse(x_t, t)` gives; no noise in
    the last step. With `fixed_variance` it is `ancestral`. `eval()` a network before.
    Args: x_T [B, ...] noise on the schedule's device; generator as in `noise_like`.
    Raises: TypeError or ValueError, at the call for the inputs.

    >>> from ddpm_core.schedules import linear
    >>> reverse = learned_reverse(lambda x, t: torch.cat([x, x], 1), linear(50))
    >>> states = reverse_chain(reverse, linear(50), torch.zeros(2, 1, 3))
    >>> [state.t for state in states][-2:]
    [1, 0]
    """
    check_start(schedule, x_T)

    @torch.no_grad()
    def step(x: Tensor, t: int) -> State:
        steps = torch.full((len(x),), t, device=x.device)
        x_0, variance = reverse(x, steps)
        mean = posterior_mean(schedule, x_0, x, steps)
        if t == 1:
            return State(0, mean, x_0)
        z = noise_like(x, generator)
        return State(t - 1, mean + variance.sqrt() * z, x_0)

    return walk(step, x_T, schedule.T)


# --- book/beyond/improved.ipynb · improved-export-best · The best variance is known
@torch.no_grad()
def squared_errors(
    guess: Guess,
    schedule: Schedule,
    x_0: Tensor,
    *,
    clip: bool = False,
    repeats: int = 1,
    generator: Generators = None,
) -> Tensor:
    r"""Mean of (x_0 - x_0_hat)^2 over the samples, for each t and each coordinate.

    An estimate of E Var(x_0 | x_t) for a perfect guess. No training: T times `repeats`
    looks at the samples. Put a network into `eval()` before.
    Args: guess: (x_t, t) -> x_0_hat, see `x_0_guess`. x_0 [B, ...]. clip: cut x_0_hat.
    Returns: a table [T+1, ...], the schedule's dtype; entry 0 is NaN.

    >>> from ddpm_core.schedules import linear
    >>> squared_errors(lambda x, t: 0 * x, linear(50), torch.ones(4, 2))[50]
    tensor([1., 1.], dtype=torch.float64)
    """
    checks.tensor("x_0", x_0)
    checks.integer("repeats", repeats, low=1)
    shape = (schedule.T + 1, *x_0.shape[1:])
    table = schedule.beta.new_full(shape, float("nan"))
    for t in range(1, schedule.T + 1):
        steps = torch.full((len(x_0),), t, device=x_0.device)
        total = torch.zeros_like(table[0])
        for _ in range(repeats):
            x_t = q_sample(schedule, x_0, steps, noise_like(x_0, generator))
            x_0_hat = guess(x_t, steps)
            x_0_hat = x_0_hat.clamp(-1, 1) if clip else x_0_hat
            total += (x_0 - x_0_hat).square().mean(0).to(table.dtype)
        table[t] = total / repeats
    return table


def best_variance(schedule: Schedule, error: Tensor) -> Tensor:
    r"""The variance of least bound, beta_tilde_t + c_0^2 error_t, for every t.

    `eq-simple-best-variance`, `eq-simple-optimal-variance`. `error`: mean squared error
    of x_0_hat, [T+1] or, for a variance of each coordinate, [T+1, ...]; see
    `squared_errors`. At t = 1 it is the error itself, but at least beta_tilde_2.
    Returns: a table like error, entry 0 NaN. Raises: TypeError, ValueError.

    >>> from ddpm_core.schedules import linear
    >>> table = best_variance(linear(), linear().one_minus_alpha_bar)
    >>> torch.allclose(table[1:], linear().beta[1:])
    True
    """
    checks.tensor("error", error)
    checks.tensor("error", error, shape=(schedule.T + 1, *error.shape[1:]))
    shape = (-1, *[1] * (error.ndim - 1))
    pull, _ = posterior_mean_coefficients(schedule)
    pull, small = pull.to(error), posterior_variance(schedule).to(error)
    best = small.reshape(shape) + pull.square().reshape(shape) * error
    floor = reverse_variance(schedule, "fixed_small")[1].to(error)
    best[1] = best[1].clamp(min=floor)
    return best


# --- book/beyond/improved.ipynb · improved-export-importance · Drawing $t$ by...
class StepDraw(NamedTuple):
    r"""Steps `t` int64 [n] and the `weight` [n], float64, that undoes their chances.

    >>> StepDraw._fields
    ('t', 'weight')
    """

    t: Tensor
    weight: Tensor


class ImportanceSteps:
    r"""Draws t in proportion to the root mean square of its latest losses.

    `eq-improved-optimal`, `eq-improved-mixed`; Nichol and Dhariwal (2021), section 3.3.
    Uniform until each t has `history` losses; later a share `uniform` of the draws.
    The mean of weight times loss is that of uniform t. Lives on the CPU.

    >>> steps = ImportanceSteps(2, history=1)
    >>> steps.update(torch.tensor([1, 2]), torch.tensor([3.0, 1.0]))
    >>> [round(p, 5) for p in steps.probabilities().tolist()]
    [0.0, 0.74975, 0.25025]
    """

    def __init__(self, T: int, history: int = 10, uniform: float = 0.001) -> None:
        self.T = checks.integer("T", T, low=1)
        self.history = checks.integer("history", history, low=1)
        self.uniform = checks.number("uniform", uniform, low=0.0, high=1.0)
        self.losses = torch.zeros(self.T + 1, self.history, dtype=torch.float64)
        self.seen = torch.zeros(self.T + 1, dtype=torch.int64)

    @property
    def ready(self) -> bool:
        """Whether every t has its history: the warm-up is over."""
        return bool((self.seen[1:] >= self.history).all())

    def probabilities(self) -> Tensor:
        """The chance of every t, float64 [T+1]; entry 0 is 0."""
        size = self.losses.square().mean(1).sqrt()
        if not self.ready or not bool(size[1:].sum() > 0):
            size = torch.ones_like(size)
        size[0] = 0.0
        p = (1 - self.uniform) * size / size.sum() + self.uniform / self.T
        p[0] = 0.0
        return p

    def draw(self, n: int, generator: torch.Generator | None = None) -> StepDraw:
        """Draw n steps, with replacement, from a generator of the CPU."""
        p = self.probabilities()
        count = checks.integer("n", n, low=1)
        t = torch.multinomial(p, count, replacement=True, generator=generator)
        return StepDraw(t, 1 / (self.T * p[t]))

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Take in losses [n], not weighted, of steps t [n]; the oldest are dropped."""
        checks.tensor("losses", losses, ndim=1)
        checks.timesteps("t", t, self.T, len(losses))
        checks.finite("losses", losses)
        for step, loss in zip(t.tolist(), losses.tolist(), strict=True):
            self.losses[step, self.seen[step] % self.history] = loss
            self.seen[step] += 1


# --- book/beyond/improved.ipynb · improved-export-widen · Trained weights learn a...
def widen(network: UNet) -> UNet:
    r"""A copy of a U-Net with twice the outputs: its own, then as many zeros.

    So trained weights start with a learned variance: the first half of the output is
    what it was, and the raw variance 0 lies half-way between the rules on a log scale
    (`eq-improved-variance`). Same device, dtype and mode; no tensor is shared.

    >>> from ddpm_core.unet import UNET_CONFIGS
    >>> wide = widen(UNet(UNET_CONFIGS["digits"]))
    >>> wide(torch.zeros(2, 1, 8, 8), torch.tensor([1, 7])).shape
    torch.Size([2, 2, 8, 8])
    """
    config = replace(network.config, out_channels=2 * network.config.out_channels)
    with torch.random.fork_rng(devices=[]):  # the drawn weights are overwritten
        wide = UNet(config)
    state = dict(network.state_dict())
    for name in ("conv_out.weight", "conv_out.bias"):
        state[name] = torch.cat([state[name], torch.zeros_like(state[name])])
    wide.to(state["conv_out.weight"]).load_state_dict(state)
    return wide.train(network.training)
