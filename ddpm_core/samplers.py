"""Written by tools/extract.py; edit the chapters:

- book/ddpm/sampling.ipynb
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_core import checks
from ddpm_core.process import PREDICTIONS, VARIANCES, p_mean_variance
from ddpm_core.schedules import Schedule
from ddpm_core.switching import mode

__all__ = [
    "Generators",
    "Model",
    "State",
    "ancestral",
    "check_start",
    "last",
    "noise_like",
    "predict",
    "walk",
]


# --- book/ddpm/sampling.ipynb · sampling-modules · The mean, first form: predict...
Model = Callable[[Tensor, Tensor], Tensor]


# --- book/ddpm/sampling.ipynb · sampling-state · The code
class State(NamedTuple):
    r"""What a sampler yields after each step: `x` is x_t for this `t`, 0 at the end.

    `x_0` is the prediction of x_0 from which the step to `x` was made, so the one at
    t + 1. Both are [B, ...] like x_T.

    >>> State._fields
    ('t', 'x', 'x_0')
    """

    t: int
    x: Tensor
    x_0: Tensor


# --- book/ddpm/sampling.ipynb · sampling-noise-like · The code
Generators = torch.Generator | Sequence[torch.Generator] | None


def noise_like(x: Tensor, generator: Generators = None) -> Tensor:
    r"""Standard Gaussian noise like `x`, drawn on the CPU and then moved to x's device.

    So one seed gives the same noise on every device. Drawn in float64 for a float64
    `x` and in float32 for all others. `generator`: one of the CPU; a list of them, one
    for each of the B samples of x [B, ...]; or None for PyTorch's global one. Raises
    ValueError for a generator of another device or another number of them.

    >>> noise_like(torch.zeros(2, 3), torch.Generator().manual_seed(0)).shape
    torch.Size([2, 3])
    """
    checks.tensor("x", x)
    if isinstance(generator, Sequence):
        if len(generator) != len(x):
            raise ValueError(
                f"generator must hold one for each of the {len(x)} samples; "
                f"got {len(generator)}"
            )
        return torch.stack([noise_like(*z) for z in zip(x, generator, strict=True)])
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(
            "generator must be one of the CPU, so that a seed means the same on every "
            f"device; got one of {generator.device}"
        )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    z = torch.randn(x.shape, generator=generator, dtype=dtype, device="cpu")
    return z.to(x.dtype).to(x.device)


def predict(model: Model, schedule: Schedule, x: Tensor, steps: Tensor) -> Tensor:
    r"""The model's output at entries `steps` of `schedule`, checked: a tensor like x.

    The model is told `schedule.timesteps[steps]`, the steps that it was trained with;
    they differ from the entries where the schedule is respaced. Runs in `eval()`.
    Raises TypeError or ValueError if the output is no tensor like `x`.

    >>> from ddpm_core.schedules import linear
    >>> x, steps = torch.zeros(1, 2), torch.tensor([7])
    >>> predict(lambda x, t: x + t, linear(), x, steps)
    tensor([[7., 7.]])
    """
    with mode(model, training=False):
        output = model(x, schedule.timesteps[steps])
    checks.tensor("the model's output", output)
    checks.same_shape("the model's output", output, "x_t", x)
    checks.same_device("the model's output", output, "x_t", x)
    checks.finite("the model's output", output)
    return output


# --- book/ddpm/sampling.ipynb · sampling-ancestral · The code
def ancestral(
    model: Model,
    schedule: Schedule,
    x_T: Tensor,
    *,
    prediction: str = "eps",
    variance: str = "fixed_large",
    clip: bool = True,
    generator: Generators = None,
) -> Iterator[State]:
    r"""Algorithm 2 of Ho et al. 2020, `eq-sampling-algorithm-2`: T states, t = T-1...0.

    `model(x_t, t)` is told the step t of the training schedule; x_T [B, ...] is noise
    on the schedule's device; the options are those of `p_mean_variance`, the noise
    that of `noise_like`. Raises TypeError or ValueError, at the call for the inputs.

    >>> from ddpm_core.schedules import linear
    >>> states = ancestral(lambda x, t: 0 * x, linear(50), torch.zeros(2, 3))
    >>> [state.t for state in states][-3:]
    [2, 1, 0]
    """
    check_start(schedule, x_T)
    checks.one_of("prediction", prediction, PREDICTIONS)
    checks.one_of("variance", variance, VARIANCES)

    @torch.no_grad()
    def step(x: Tensor, t: int) -> State:
        steps = torch.full((len(x),), t, device=x.device)
        law = p_mean_variance(
            schedule,
            x,
            steps,
            predict(model, schedule, x, steps),
            prediction=prediction,
            variance=variance,
            clip=clip,
        )
        if t == 1:
            return State(0, law.mean, law.x_0)
        z = noise_like(x, generator)
        return State(t - 1, law.mean + law.variance.sqrt() * z, law.x_0)

    return walk(step, x_T, schedule.T)


# --- book/ddpm/sampling.ipynb · sampling-walk · The code
def check_start(schedule: Schedule, x_T: Tensor) -> None:
    r"""Check the start of a sampler: x_T [B, ...] finite, on the schedule's device.

    Raises TypeError for no floating tensor, ValueError for the rest.

    >>> from ddpm_core.schedules import linear
    >>> check_start(linear(), torch.zeros(2, 3))
    """
    checks.tensor("x_T", x_T)
    if x_T.ndim < 2 or len(x_T) == 0:
        raise ValueError(
            "x_T must be a batch [B, ...] of at least one sample and two dimensions; "
            f"got shape {tuple(x_T.shape)}"
        )
    checks.finite("x_T", x_T)
    name = "schedule (move it with schedule.to)"
    checks.same_device(name, schedule.beta, "x_T", x_T)


def walk(step: Callable[[Tensor, int], State], x_T: Tensor, T: int) -> Iterator[State]:
    r"""Yield `step(x, t)` for t = T...1, each from the x of the state before it.

    No context is open while a state is out: `step` enters and leaves its own.

    >>> states = walk(lambda x, t: State(t - 1, x / 2, x), torch.ones(1, 1), 3)
    >>> [state.x.item() for state in states]
    [0.5, 0.25, 0.125]
    """
    x = x_T
    for t in range(T, 0, -1):
        state = step(x, t)
        x = state.x
        yield state


def last(states: Iterable[State]) -> Tensor:
    r"""Run a sampler to its end and return the final x, which is the sample.

    Raises ValueError if `states` is empty (a generator that has been used up).

    >>> last([State(0, torch.ones(1, 1), torch.ones(1, 1))])
    tensor([[1.]])
    """
    x = None
    for state in states:
        x = state.x
    if x is None:
        raise ValueError("states must yield at least one state; this one is used up")
    return x
