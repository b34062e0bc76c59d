"""Written by tools/extract.py; edit the chapters:

- book/beyond/score.ipynb
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_core import checks
from ddpm_core.process import at
from ddpm_core.samplers import Generators, noise_like
from ddpm_core.schedules import Schedule
from ddpm_core.switching import mode

__all__ = [
    "Annealed",
    "LeveledScore",
    "Score",
    "annealed_langevin",
    "check_walk",
    "denoising_score_matching",
    "eps_from_score",
    "geometric_levels",
    "implicit_score_matching",
    "langevin",
    "langevin_step",
    "score_from_eps",
    "sliced_score_matching",
    "step_sizes",
]


# --- book/beyond/score.ipynb · score-code-convert · The score of noised data
def score_from_eps(schedule: Schedule, eps: Tensor, t: Tensor) -> Tensor:
    r"""The score of q(x_t) that a noise prediction stands for, `eq-score-eps`.

    Ho et al. 2020, section 3.2. `eps` [B, ...], t int64 [B] in 1...T. For another
    prediction, `process.convert` it to eps first. Raises TypeError or ValueError.

    >>> from ddpm_core.schedules import linear
    >>> round(score_from_eps(linear(), torch.ones(1, 1), torch.tensor([100])).item(), 3)
    -3.116
    """
    checks.tensor("eps", eps)
    checks.timesteps("t", t, schedule.T, eps.shape[0])
    return -eps / at(schedule.one_minus_alpha_bar.sqrt(), t, eps)


def eps_from_score(schedule: Schedule, score: Tensor, t: Tensor) -> Tensor:
    r"""The noise prediction that a score of q(x_t) stands for, `eq-score-eps`.

    `score` [B, ...], t int64 [B] in 1...T. Raises TypeError or ValueError.

    >>> from ddpm_core.schedules import linear
    >>> t = torch.tensor([7])
    >>> eps_from_score(linear(), score_from_eps(linear(), torch.ones(1, 1), t), t)
    tensor([[1.]])
    """
    checks.tensor("score", score)
    checks.timesteps("t", t, schedule.T, score.shape[0])
    return -at(schedule.one_minus_alpha_bar.sqrt(), t, score) * score


# --- book/beyond/score.ipynb · score-code-langevin · Sampling with a gradient:...
Score = Callable[[Tensor], Tensor]


@torch.no_grad()
def langevin_step(
    score: Score, x: Tensor, step_size: float, generator: Generators = None
) -> Tensor:
    r"""One move of the walk, `eq-score-langevin`, from x [B, ...]; no gradient is kept.

    `score` is called with x alone, a network in `eval()`. Raises TypeError or
    ValueError, also for a score that is not finite or not shaped like x.

    >>> langevin_step(lambda x: -x, torch.ones(1, 1), 0.0)
    tensor([[1.]])
    """
    with mode(score, training=False):
        g = score(x)
    checks.tensor("the score", g)
    checks.same_shape("the score", g, "x", x)
    checks.same_device("the score", g, "x", x)
    checks.finite("the score", g)
    return x + step_size / 2 * g + math.sqrt(step_size) * noise_like(x, generator)


def check_walk(x: Tensor, step_size: float, steps: int) -> None:
    r"""Check the start of a walk: x [B, ...] finite, step_size >= 0, steps >= 1.

    Raises TypeError or ValueError.

    >>> check_walk(torch.zeros(2, 3), 0.1, 5)
    """
    checks.tensor("x", x)
    checks.finite("x", x)
    checks.number("step_size", step_size, low=0)
    checks.integer("steps", steps, low=1)


def langevin(
    score: Score,
    x: Tensor,
    step_size: float,
    steps: int,
    generator: Generators = None,
) -> Iterator[Tensor]:
    r"""Langevin dynamics, `eq-score-langevin` (the unadjusted walk of Roberts and
    Tweedie 1996).

    Yields x [B, ...] after each of `steps` moves; the law they tend to is off by the
    order of `step_size`, `eq-score-bias`. The noise is that of `samplers.noise_like`.
    Raises TypeError or ValueError, at the call for all but the score.

    >>> walk = langevin(lambda x: -x, torch.zeros(4, 2), 0.1, steps=3)
    >>> [x.shape for x in walk]
    [torch.Size([4, 2]), torch.Size([4, 2]), torch.Size([4, 2])]
    """
    check_walk(x, step_size, steps)

    def walk() -> Iterator[Tensor]:
        y = x
        for _ in range(steps):
            y = langevin_step(score, y, step_size, generator)
            yield y

    return walk()


# --- book/beyond/score.ipynb · score-code-implicit · Learning a score: the idea, and...
def _with_slope(model: Score, x: Tensor) -> tuple[Tensor, Tensor]:
    """Start a graph at x and ask for the score there."""
    checks.tensor("x", x)
    checks.finite("x", x)
    x = x.detach().requires_grad_(True)
    s = model(x)
    checks.tensor("the score", s)
    checks.same_shape("the score", s, "x", x)
    return x, s


@torch.enable_grad()
def implicit_score_matching(model: Score, x: Tensor) -> Tensor:
    r"""Half the squared score plus its divergence, `eq-score-trace`, for each sample.

    Hyvarinen 2005, theorem 1. model(x) -> score; x [B, ...], D numbers a sample.
    Returns [B]. Costs D derivatives: for few dimensions. Raises TypeError, ValueError.

    >>> implicit_score_matching(lambda x: -x, torch.ones(1, 2)).item()  # 1/2 * 2 - 2
    -1.0
    """
    x, s = _with_slope(model, x)
    columns = s.flatten(1).unbind(1)
    trace = torch.zeros_like(columns[0])
    for i, column in enumerate(columns):
        (row,) = torch.autograd.grad(column.sum(), x, create_graph=True)
        trace = trace + row.flatten(1)[:, i]
    return 0.5 * s.square().flatten(1).sum(1) + trace


# --- book/beyond/score.ipynb · score-code-sliced · Sliced score matching
@torch.enable_grad()
def sliced_score_matching(model: Score, x: Tensor, v: Tensor) -> Tensor:
    r"""The sliced loss, `eq-score-sliced`, for each sample: one derivative in all.

    Song et al. 2019 (sliced), section 3. model(x) -> score; v like x [B, ...], random
    signs or normals, uncorrelated. Returns [B], on average over v what
    `implicit_score_matching` does. Raises TypeError or ValueError.

    >>> x, v = torch.ones(1, 2), torch.tensor([[1.0, -1.0]])
    >>> sliced_score_matching(lambda x: -x, x, v).item()
    -1.0
    """
    x, s = _with_slope(model, x)
    checks.tensor("v", v)
    checks.same_shape("v", v, "x", x)
    checks.same_device("v", v, "x", x)
    (row,) = torch.autograd.grad((s * v).sum(), x, create_graph=True)
    return 0.5 * s.square().flatten(1).sum(1) + (row * v).flatten(1).sum(1)


# --- book/beyond/score.ipynb · score-code-denoising · Denoising score matching
LeveledScore = Callable[[Tensor, Tensor], Tensor]


def denoising_score_matching(
    model: LeveledScore, x_0: Tensor, sigma: Tensor, eps: Tensor
) -> Tensor:
    r"""Denoising score matching times sigma^2, `eq-score-weighted`, for each sample.

    Vincent 2011, with the weight of Song and Ermon 2019, eqs. 5 and 6. The model is
    asked for the score at x_0 + sigma eps: model(x, sigma). x_0 and eps [B, ...],
    sigma [B] > 0. Returns [B], summed over dimensions. Raises TypeError or ValueError.

    >>> one = torch.ones(1, 1)
    >>> denoising_score_matching(lambda x, sigma: 0 * x, one, one[0], one).item()
    0.5
    """
    checks.tensor("x_0", x_0)
    checks.tensor("eps", eps)
    checks.same_shape("eps", eps, "x_0", x_0)
    checks.tensor("sigma", sigma, shape=(len(x_0),))
    if checks.can_look(sigma) and not bool((sigma > 0).all()):
        raise ValueError(f"sigma must be above 0; got {sigma.min().item()}")
    column = sigma.reshape(-1, *[1] * (x_0.ndim - 1))
    s = model(x_0 + column * eps, sigma)
    checks.same_shape("the score", s, "x_0", x_0)
    return 0.5 * (column * s + eps).square().flatten(1).sum(1)


# --- book/beyond/score.ipynb · score-code-annealed · Many noise levels
def geometric_levels(first: float, last: float, count: int) -> Tensor:
    r"""Noise levels that fall in equal ratios, `eq-score-levels`: [count], float64.

    Song and Ermon 2019, section 4. first > last > 0, count of at least 2. Raises
    TypeError or ValueError.

    >>> geometric_levels(8.0, 0.5, 5).tolist()
    [8.0, 4.0, 2.0, 1.0, 0.5]
    """
    high = checks.number("first", first, low=0)
    low = checks.number("last", last, low=0)
    checks.integer("count", count, low=2)
    if not high > low > 0:
        raise ValueError(f"first > last > 0 must hold; got first {first}, last {last}")
    part = torch.arange(count, dtype=torch.float64, device="cpu") / (count - 1)
    return high * (low / high) ** part


def step_sizes(sigmas: Tensor, step_size: float) -> Tensor:
    r"""The step size of each level, `eq-score-step-sizes`: like sigmas, [L].

    Song and Ermon 2019, Algorithm 1. `step_size` > 0 is that of the last level; sigmas
    [L] > 0. Raises TypeError or ValueError.

    >>> step_sizes(torch.tensor([2.0, 1.0]), 0.1)
    tensor([0.4000, 0.1000])
    """
    checks.tensor("sigmas", sigmas, ndim=1)
    size = checks.number("step_size", step_size, low=0)
    if checks.can_look(sigmas) and not (len(sigmas) and bool((sigmas > 0).all())):
        raise ValueError(f"sigmas must be one or more numbers above 0; got {sigmas}")
    return size * (sigmas / sigmas[-1]).square()


class Annealed(NamedTuple):
    r"""What `annealed_langevin` yields: x [B, ...] after a move at `level`, from 0.

    >>> Annealed._fields
    ('level', 'x')
    """

    level: int
    x: Tensor


# --- book/beyond/score.ipynb · score-code-annealed-walk · Many noise levels
def annealed_langevin(
    score: LeveledScore,
    x: Tensor,
    sigmas: Tensor,
    step_size: float,
    steps: int,
    generator: Generators = None,
) -> Iterator[Annealed]:
    r"""Annealed Langevin dynamics, Algorithm 1 of Song and Ermon 2019.

    `score(x, sigma)`, sigma [B]; x [B, ...]; sigmas [L], the largest first; `step_size`
    that of the last level (`eq-score-step-sizes`); `steps` moves at each level. Yields
    an `Annealed` after each. Raises TypeError or ValueError.

    >>> levels = geometric_levels(2.0, 1.0, 2)
    >>> walk = annealed_langevin(lambda x, s: -x, torch.zeros(1, 2), levels, 0.1, 2)
    >>> [state.level for state in walk]
    [0, 0, 1, 1]
    """
    sizes = step_sizes(sigmas, step_size).tolist()
    if checks.can_look(sigmas) and not bool((sigmas.diff() <= 0).all()):
        raise ValueError(f"sigmas must not rise; got {sigmas.tolist()}")
    check_walk(x, step_size, steps)

    def walk() -> Iterator[Annealed]:
        y = x
        for level, size in enumerate(sizes):
            sigma = sigmas[level].to(x.dtype).to(x.device).expand(len(x))

            def here(z: Tensor, sigma: Tensor = sigma) -> Tensor:
                with mode(score, training=False):
                    return score(z, sigma)

            for moved in langevin(here, y, size, steps, generator):
                y = moved
                yield Annealed(level, y)

    return walk()
