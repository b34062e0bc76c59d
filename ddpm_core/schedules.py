"""Written by tools/extract.py; edit the chapters:

- book/ddpm/forward.ipynb
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_core import checks

__all__ = [
    "SCHEDULES",
    "Schedule",
    "ScheduleCard",
    "card",
    "cosine",
    "from_alpha_bar",
    "from_beta",
    "linear",
    "respace",
    "scaled_linear",
]


# --- book/ddpm/forward.ipynb · forward-schedule · The tables
@dataclass(frozen=True, eq=False)
class Schedule:
    r"""A noise schedule: tables [T+1] indexed by t, entry 0 being the clean data.

    `beta[t]`, `alpha[t]` = 1 - beta[t] as in `def-alpha`, `alpha_bar[t]` as in
    `eq-forward-alpha-bar` (Ho et al. 2020, eq. 2 and 4), `one_minus_alpha_bar[t]` kept
    because float32 cannot recover it; float64 on the CPU. `timesteps[t]` (int64) is the
    step of the training schedule that entry t stands for; `clipped` counts the betas
    that were cut. Build one with `linear`, `cosine`, `from_beta`, ...

    >>> schedule = linear(1000)
    >>> schedule.T, schedule.alpha_bar[0].item(), f"{schedule.alpha_bar[1000]:.3e}"
    (1000, 1.0, '4.036e-05')
    """

    name: str
    beta: Tensor
    alpha: Tensor
    alpha_bar: Tensor
    one_minus_alpha_bar: Tensor
    timesteps: Tensor
    clipped: int = 0

    def __post_init__(self) -> None:
        checks.tensor("beta", self.beta, ndim=1)
        checks.integer("T", self.T, low=1)
        for name in ("alpha", "alpha_bar", "one_minus_alpha_bar"):
            checks.tensor(name, getattr(self, name), shape=(self.T + 1,))
        checks.tensor("timesteps", self.timesteps, (self.T + 1,), kind="integer")

    @property
    def T(self) -> int:
        r"""The number of steps."""
        return self.beta.shape[0] - 1

    @property
    def snr(self) -> Tensor:
        r"""The signal-to-noise ratio, `eq-forward-snr`, [T+1]; infinite at t = 0."""
        return self.alpha_bar / self.one_minus_alpha_bar

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Schedule":
        r"""The same schedule in another dtype and on another device, cast, then moved.

        >>> linear(100).to(dtype=torch.float32).beta.dtype
        torch.float32
        """
        tables = ("beta", "alpha", "alpha_bar", "one_minus_alpha_bar")
        moved = {n: getattr(self, n).to(dtype=dtype).to(device=device) for n in tables}
        return replace(self, timesteps=self.timesteps.to(device=device), **moved)


def from_beta(beta: Tensor, name: str = "custom", clipped: int = 0) -> Schedule:
    r"""The schedule of given `beta` [T], the variances of steps 1...T.

    Each lies in (0, 1]; 1 is allowed at t = T only. Raises TypeError or ValueError.

    >>> from_beta(torch.tensor([0.5, 0.5])).alpha_bar.tolist()
    [1.0, 0.5, 0.25]
    """
    checks.tensor("beta", beta, ndim=1)
    checks.integer("T, the length of beta,", beta.shape[0], low=1)
    beta = beta.detach().to("cpu", torch.float64)
    _check_beta(beta)
    beta = torch.cat([beta.new_zeros(1), beta])
    alpha = 1 - beta
    alpha_bar = alpha.cumprod(0)
    noise = torch.cat([beta[:1], (beta[1:] * alpha_bar[:-1]).cumsum(0)])
    steps = torch.arange(len(beta), device="cpu")
    return Schedule(name, beta, alpha, alpha_bar, noise, steps, clipped)


def _check_beta(beta: Tensor) -> None:
    """Every beta lies in (0, 1], and only the last may be 1."""
    if not checks.can_look(beta):
        return
    for t, b in enumerate(beta.tolist(), start=1):
        if not 0 < b <= 1:
            raise ValueError(f"beta must lie in (0, 1]; got {b} at t = {t}")
        if b == 1 and t < len(beta):
            raise ValueError(
                f"beta may be 1 at the last step, t = {len(beta)}, only; "
                f"got 1 at t = {t}: nothing is left to be noised afterwards"
            )


# --- book/ddpm/forward.ipynb · forward-schedules-code · Three schedules
def linear(T: int = 1000) -> Schedule:
    r"""Linear beta from 1e-4 to 0.02, times 1000/T (Ho et al. 2020, section 4).

    `eq-forward-linear`. Raises ValueError for T <= 20, where beta_T = 20/T >= 1.

    >>> linear(1000).beta[[1, 1000]].tolist()
    [0.0001, 0.02]
    """
    checks.integer("T of the linear schedule", T, low=21)
    scale = 1000 / T
    first, last = 1e-4 * scale, 0.02 * scale
    beta = torch.linspace(first, last, T, dtype=torch.float64, device="cpu")
    return from_beta(beta, "linear")


def scaled_linear(T: int = 1000) -> Schedule:
    r"""Stable Diffusion's schedule: sqrt(beta) linear, beta 8.5e-4 to 0.012, x 1000/T.

    `eq-forward-scaled-linear` (Rombach et al. 2022). Raises ValueError for T <= 12.

    >>> f"{scaled_linear(1000).alpha_bar[1000]:.3e}"
    '4.660e-03'
    """
    checks.integer("T of the scaled-linear schedule", T, low=13)
    scale = 1000 / T
    first, last = math.sqrt(8.5e-4 * scale), math.sqrt(0.012 * scale)
    root = torch.linspace(first, last, T, dtype=torch.float64, device="cpu")
    return from_beta(root.square(), "scaled-linear")


def cosine(T: int = 1000, s: float = 0.008, beta_max: float = 0.999) -> Schedule:
    r"""The cosine schedule, beta cut at `beta_max` (Nichol & Dhariwal 2021, eq. 17).

    `eq-forward-cosine`, `eq-forward-cosine-beta`; s > 0 is the offset h there,
    0 < beta_max < 1. Raises TypeError or ValueError.

    >>> schedule = cosine(1000)
    >>> f"{schedule.alpha_bar[1000]:.2e}", schedule.clipped
    ('2.43e-09', 1)
    """
    checks.integer("T", T, low=1)
    checks.number("s", s, low=1e-6)
    checks.number("beta_max", beta_max, low=1e-6, high=1 - 1e-6)
    u = torch.arange(T + 1, dtype=torch.float64, device="cpu") / T
    f = torch.cos((u + s) / (1 + s) * math.pi / 2).square()
    beta = 1 - f[1:] / f[:-1]
    clipped = int((beta > beta_max).sum()) if checks.can_look(beta) else 0
    return from_beta(beta.clamp(max=beta_max), "cosine", clipped)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "linear": linear,
    "cosine": cosine,
    "scaled-linear": scaled_linear,
}


# --- book/ddpm/forward.ipynb · forward-card-code · A card for each schedule
class ScheduleCard(NamedTuple):
    r"""What to know about a schedule before training with it; see `card`."""

    name: str
    T: int
    alpha_bar_T: float
    prior_bits: float
    clipped: int
    snr_1: float
    snr_T: float


def card(schedule: Schedule) -> ScheduleCard:
    r"""Sum a schedule up: what is left of the data at T, and what that costs.

    `prior_bits` is L_T in bits per dimension at x_0^2 = 1, `eq-forward-card`;
    `clipped` counts the betas that were cut. Needs a schedule on the CPU.

    >>> f"{card(linear(1000)).prior_bits:.1e}"
    '2.9e-05'
    """
    left = float(schedule.alpha_bar[-1])
    bits = -0.5 * math.log1p(-left) / math.log(2)
    snr_1, snr_T = float(schedule.snr[1]), float(schedule.snr[-1])
    T, name = schedule.T, schedule.name
    return ScheduleCard(name, T, left, bits, schedule.clipped, snr_1, snr_T)


# --- book/ddpm/forward.ipynb · forward-respace · Visiting only some steps
def from_alpha_bar(alpha_bar: Tensor, name: str = "custom") -> Schedule:
    r"""The schedule of given `alpha_bar` [T+1], from alpha_bar[0] = 1 strictly down.

    beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}, `eq-forward-kept-beta`; alpha_bar = 0
    is allowed at t = T only. Raises TypeError or ValueError.

    >>> from_alpha_bar(torch.tensor([1.0, 0.5, 0.25])).beta.tolist()
    [0.0, 0.5, 0.5]
    """
    checks.tensor("alpha_bar", alpha_bar, ndim=1)
    checks.integer("T, the length of alpha_bar minus 1,", len(alpha_bar) - 1, low=1)
    alpha_bar = alpha_bar.detach().to("cpu", torch.float64)
    if checks.can_look(alpha_bar) and alpha_bar[0] != 1:
        raise ValueError(f"alpha_bar[0] must be 1; got {alpha_bar[0].item()}")
    checks.between("alpha_bar", alpha_bar, 0, 1)
    alpha = torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    if checks.can_look(alpha) and not bool((alpha[1:] < 1).all()):
        t = int((~(alpha < 1))[1:].nonzero()[0]) + 1
        before, here = alpha_bar[t - 1].item(), alpha_bar[t].item()
        raise ValueError(
            "alpha_bar must fall at every step, reaching 0 at t = T at the earliest; "
            f"got {before} at t = {t - 1} and {here} at t = {t}"
        )
    steps = torch.arange(len(alpha), device="cpu")
    return Schedule(name, 1 - alpha, alpha, alpha_bar, 1 - alpha_bar, steps)


def respace(schedule: Schedule, kept: Sequence[int]) -> Schedule:
    r"""The schedule that visits only the steps `kept` of `schedule`.

    alpha_bar is that of the kept steps, beta follows by `eq-forward-kept-beta`.
    `kept`: strictly increasing ints in 1...T; the last may be any of them.
    `timesteps` still names the steps of the training schedule. Raises ValueError.

    >>> short = respace(linear(1000), [1, 500, 1000])
    >>> short.T, short.timesteps.tolist()
    (3, [0, 1, 500, 1000])
    """
    checks.integer("the number of kept steps", len(kept), low=1)
    steps = [checks.integer("kept", k, low=1, high=schedule.T) for k in kept]
    for before, after in pairwise(steps):
        if after <= before:
            raise ValueError(f"kept must increase; got {after} after {before}")
    index = torch.tensor([0, *steps], device=schedule.beta.device)
    alpha_bar = schedule.alpha_bar[index]
    noise = schedule.one_minus_alpha_bar[index]
    beta = torch.cat([noise[:1], (noise[1:] - noise[:-1]) / alpha_bar[:-1]])
    name = f"{schedule.name}, {len(steps)} of {schedule.T} steps"
    kept_steps = schedule.timesteps[index]
    return Schedule(name, beta, 1 - beta, alpha_bar, noise, kept_steps)
