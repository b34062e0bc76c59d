"""Written by tools/extract.py; edit the chapters:

- book/ddpm/sampling.ipynb
- book/beyond/fast_sampling.ipynb
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_core import checks
from ddpm_core.process import (
    PREDICTIONS,
    VARIANCES,
    at,
    posterior_mean_coefficients,
    posterior_variance,
    reverse_variance,
    to_x_0,
)
from ddpm_core.schedules import Schedule
from ddpm_core.switching import mode

__all__ = [
    "SPACINGS",
    "STEEP",
    "Clip",
    "Generators",
    "Model",
    "State",
    "ancestral",
    "before",
    "check_options",
    "check_start",
    "ddim",
    "ddim_inversion",
    "ddim_tables",
    "dpm_solver_2m",
    "dpm_tables",
    "half_log_snr",
    "heun",
    "kept_steps",
    "last",
    "noise_in",
    "noise_like",
    "predict",
    "predict_pair",
    "predict_x_0",
    "sigma_bar",
    "slerp",
    "walk",
]


# --- book/ddpm/sampling.ipynb · sampling-modules · The mean, first form: predict...
Model = Callable[[Tensor, Tensor], Tensor]
Clip = bool | Callable[[Tensor], Tensor]


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
    listed = isinstance(generator, Sequence)
    each = generator if isinstance(generator, Sequence) else [generator]
    if listed and len(each) != len(x):
        raise ValueError(
            f"generator must hold one for each of the {len(x)} samples; got {len(each)}"
        )
    for one in each:
        if one is not None and one.device.type != "cpu":
            raise ValueError(
                "generator must be one of the CPU, so that a seed means the same on "
                f"every device; got one of {one.device}"
            )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = x.shape[1:] if listed else x.shape
    drawn = [
        torch.randn(shape, generator=one, dtype=dtype, device="cpu") for one in each
    ]
    z = torch.stack(drawn) if listed else drawn[0]
    # CUDA takes its copy of z before it goes; of other devices that is not certain
    return z.to(x.dtype).to(x.device, non_blocking=x.is_cuda)


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


def predict_x_0(
    model: Model,
    schedule: Schedule,
    x: Tensor,
    steps: Tensor,
    prediction: str,
    clip: Clip,
) -> Tensor:
    r"""The x_0 that the model predicts at entries `steps`, `eq-sampling-x-0`, cut.

    `clip`: True cuts to [-1, 1], False not at all, a function x_0 -> x_0 in its own
    way. The rest as for `predict`. Raises TypeError or ValueError.

    >>> from ddpm_core.schedules import linear
    >>> x, steps = torch.full((1, 2), 3.0), torch.tensor([7])
    >>> predict_x_0(lambda x, t: x, linear(), x, steps, "x_0", True)
    tensor([[1., 1.]])
    """
    x_0 = to_x_0(schedule, x, steps, predict(model, schedule, x, steps), prediction)
    if not callable(clip):
        cut = x_0.clamp(-1.0, 1.0) if clip else x_0
    else:
        cut = clip(x_0)
        checks.tensor("what clip returns", cut)
        checks.same_shape("what clip returns", cut, "x_0", x_0)
    checks.finite("the prediction of x_0", cut)
    return cut


def check_options(prediction: str, clip: Clip) -> None:
    r"""Check the options that every sampler has. Raises TypeError or ValueError.

    >>> check_options("eps", True)
    """
    checks.one_of("prediction", prediction, PREDICTIONS)
    if not isinstance(clip, bool) and not callable(clip):
        raise TypeError(f"clip must be True, False or a function; got {clip!r}")


# --- book/ddpm/sampling.ipynb · sampling-ancestral · The code
def ancestral(
    model: Model,
    schedule: Schedule,
    x_T: Tensor,
    *,
    prediction: str = "eps",
    clip: Clip = True,
    generator: Generators = None,
    variance: str = "fixed_large",
) -> Iterator[State]:
    r"""Algorithm 2 of Ho et al. 2020, `eq-sampling-algorithm-2`: T states, t = T-1...0.

    `model(x_t, t)` is told the step t of the training schedule; x_T [B, ...] is noise
    on the schedule's device; `prediction` and `clip` as for `predict_x_0`, the variance
    from VARIANCES, the noise by `noise_like`. Raises TypeError or ValueError, at the
    call for the inputs.

    >>> from ddpm_core.schedules import linear
    >>> states = ancestral(lambda x, t: 0 * x, linear(50), torch.zeros(2, 3))
    >>> [state.t for state in states][-3:]
    [2, 1, 0]
    """
    check_start(schedule, x_T)
    check_options(prediction, clip)
    checks.one_of("variance", variance, VARIANCES)
    c_0, c_t = posterior_mean_coefficients(schedule)
    sigma_squared = reverse_variance(schedule, variance)

    @torch.no_grad()
    def step(x: Tensor, t: int) -> State:
        steps = torch.full((len(x),), t, device=x.device)
        x_0 = predict_x_0(model, schedule, x, steps, prediction, clip)
        mean = at(c_0, steps, x) * x_0 + at(c_t, steps, x) * x
        if t == 1:
            return State(0, mean, x_0)
        sigma = at(sigma_squared, steps, x).sqrt()
        return State(t - 1, mean + sigma * noise_like(x, generator), x_0)

    return walk(step, x_T, schedule.T)


# --- book/ddpm/sampling.ipynb · sampling-walk · The code
def check_start(schedule: Schedule, x_T: Tensor, name: str = "x_T") -> None:
    r"""Check the start of a sampler: x_T [B, ...] finite, on the schedule's device.

    `name` is what messages call it. Raises TypeError for no floating tensor,
    ValueError for the rest.

    >>> from ddpm_core.schedules import linear
    >>> check_start(linear(), torch.zeros(2, 3))
    """
    checks.tensor(name, x_T)
    if x_T.ndim < 2 or len(x_T) == 0:
        raise ValueError(
            f"{name} must be a batch [B, ...] of at least one sample and two dimensions; "
            f"got shape {tuple(x_T.shape)}"
        )
    checks.finite(name, x_T)
    table = "schedule (move it with schedule.to)"
    checks.same_device(table, schedule.beta, name, x_T)


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


# --- book/beyond/fast_sampling.ipynb · fast-export-spacing · Which steps to visit
SPACINGS = ("leading", "trailing", "linspace")


def kept_steps(T: int, steps: int, spacing: str = "trailing") -> list[int]:
    r"""Which `steps` of the steps 1...T a shorter chain visits, in increasing order.

    `eq-fast-leading`, `eq-fast-trailing`, `eq-fast-linspace`: leading has step 1,
    trailing T, linspace both (T alone if steps is 1). To be given to `respace`. Raises
    TypeError or ValueError.

    >>> kept_steps(1000, 4), kept_steps(1000, 4, "leading")
    ([250, 500, 750, 1000], [1, 251, 501, 751])
    """
    checks.integer("T", T, low=1)
    checks.integer("steps", steps, low=1, high=T)
    checks.one_of("spacing", spacing, SPACINGS)
    if spacing == "leading":
        return [1 + (i - 1) * (T // steps) for i in range(1, steps + 1)]
    if spacing == "trailing" or steps == 1:
        return [round(i * T / steps) for i in range(1, steps + 1)]
    return [1 + round((i - 1) * (T - 1) / (steps - 1)) for i in range(1, steps + 1)]


# --- book/beyond/fast_sampling.ipynb · fast-export-tables · A family of samplers
def before(table: Tensor) -> Tensor:
    r"""The table [T+1] one step down: entry t is `table[t - 1]`, entry 0 is NaN.

    >>> before(torch.tensor([1.0, 2.0, 3.0])).tolist()
    [nan, 1.0, 2.0]
    """
    return torch.cat([torch.full_like(table[:1], float("nan")), table[:-1]])


def ddim_tables(schedule: Schedule, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    r"""Factors of x_0, of the noise in x_t and of fresh noise, `eq-fast-step`.

    Three tables [T+1] over the steps t of `schedule`, entry 0 NaN; the second by
    `eq-fast-left-over`, the third by `eq-fast-sigma` (Song et al. 2021, eq. 12 and 16).

    >>> from ddpm_core.schedules import linear
    >>> [table[1].item() for table in ddim_tables(linear(), 1.0)]
    [1.0, 0.0, 0.0]
    """
    rest, rest_before = (
        schedule.one_minus_alpha_bar,
        before(schedule.one_minus_alpha_bar),
    )
    inside = schedule.alpha * rest_before + (1 - eta**2) * schedule.beta
    left_over = rest_before / rest * inside
    sigma = eta * posterior_variance(schedule).sqrt()
    return before(schedule.alpha_bar).sqrt(), left_over.sqrt(), sigma


def noise_in(schedule: Schedule, x: Tensor, x_0: Tensor, steps: Tensor) -> Tensor:
    r"""The noise that `x` holds at entries `steps` if `x_0` is behind it, `eq-fast-noise`.

    x and x_0 [B, ...], steps int64 [B] in 1...T.

    >>> from ddpm_core.schedules import from_beta
    >>> x, x_0 = torch.tensor([[1.4]]), torch.tensor([[1.0]])
    >>> f"{noise_in(from_beta(torch.tensor([0.64])), x, x_0, torch.tensor([1])).item():.4f}"
    '1.0000'
    """
    signal = at(schedule.alpha_bar.sqrt(), steps, x)
    return (x - signal * x_0) / at(schedule.one_minus_alpha_bar.sqrt(), steps, x)


# --- book/beyond/fast_sampling.ipynb · fast-export-ddim · A family of samplers
def predict_pair(
    model: Model, schedule: Schedule, x: Tensor, t: int, prediction: str, clip: Clip
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Entry t for each sample, the prediction of x_0 there, and the noise that fits it.

    `eq-sampling-x-0`, cut by `clip`, and `eq-fast-noise`.

    >>> from ddpm_core.schedules import linear
    >>> zero = lambda x, t: 0 * x
    >>> predict_pair(zero, linear(), torch.zeros(1, 2), 7, "eps", True)[0]
    tensor([7])
    """
    steps = torch.full((len(x),), t, device=x.device)
    x_0 = predict_x_0(model, schedule, x, steps, prediction, clip)
    return steps, x_0, noise_in(schedule, x, x_0, steps)


def ddim(
    model: Model,
    schedule: Schedule,
    x_T: Tensor,
    *,
    prediction: str = "eps",
    clip: Clip = True,
    generator: Generators = None,
    eta: float = 0.0,
) -> Iterator[State]:
    r"""DDIM, `eq-fast-step`, Song et al. 2021, eq. 12: T states, one evaluation each.

    eta in [0, 1]: 0 draws no noise, 1 is `ancestral` with the posterior's variance.
    The noise is recomputed from the cut x_0. The rest as for `ancestral`; give it
    `respace(schedule, kept_steps(...))` for fewer steps. Raises TypeError, ValueError.

    >>> from ddpm_core.schedules import linear, respace
    >>> short = respace(linear(), kept_steps(1000, 10))
    >>> last(ddim(lambda x, t: 0 * x, short, torch.zeros(2, 3))).shape
    torch.Size([2, 3])
    """
    check_start(schedule, x_T)
    check_options(prediction, clip)
    eta = checks.number("eta", eta, low=0, high=1)
    signal, direction, sigma = ddim_tables(schedule, eta)

    @torch.no_grad()
    def step(x: Tensor, t: int) -> State:
        steps, x_0, eps = predict_pair(model, schedule, x, t, prediction, clip)
        mean = at(signal, steps, x) * x_0 + at(direction, steps, x) * eps
        if t == 1 or eta == 0:
            return State(t - 1, mean, x_0)
        z = noise_like(x, generator)
        return State(t - 1, mean + at(sigma, steps, x) * z, x_0)

    return walk(step, x_T, schedule.T)


# --- book/beyond/fast_sampling.ipynb · fast-export-sigma-bar · DDIM is Euler's method
def sigma_bar(schedule: Schedule) -> Tensor:
    r"""Noise over signal at every t, `eq-fast-sigma-bar`: table [T+1], 0 at t = 0.

    Infinite where alpha_bar is 0. This is the sigma of Karras et al. 2022.

    >>> from ddpm_core.schedules import from_beta
    >>> [f"{x:.3f}" for x in sigma_bar(from_beta(torch.tensor([0.5, 0.6]))).tolist()]
    ['0.000', '1.000', '2.000']
    """
    return (schedule.one_minus_alpha_bar / schedule.alpha_bar).sqrt()


# --- book/beyond/fast_sampling.ipynb · fast-export-inversion · Backwards: from an...
def ddim_inversion(
    model: Model,
    schedule: Schedule,
    x_0: Tensor,
    *,
    prediction: str = "eps",
    clip: Clip = False,
    generator: Generators = None,
) -> Iterator[State]:
    r"""From an image to its noise, `eq-fast-inversion`: T states, t = 1...T.

    `ddim` with eta 0 the other way, one evaluation a step, the first at step 1. x_0
    [B, ...]; the options as for `ddim`, but nothing is drawn from `generator`: it is
    there so that all samplers are called alike. Raises TypeError or ValueError.

    >>> from ddpm_core.schedules import linear
    >>> states = ddim_inversion(lambda x, t: 0 * x, linear(50), torch.zeros(2, 3))
    >>> [state.t for state in states][-2:]
    [49, 50]
    """
    check_start(schedule, x_0, "x_0")
    check_options(prediction, clip)
    rest = schedule.one_minus_alpha_bar.sqrt()
    shrink = schedule.alpha.sqrt()
    grow = rest - shrink * before(rest)

    @torch.no_grad()
    def step(x: Tensor, t: int) -> State:
        here, known = max(t - 1, 1), (model, schedule)
        _, guess, eps = predict_pair(*known, x, here, prediction, clip)
        steps = torch.full((len(x),), t, device=x.device)
        return State(t, at(shrink, steps, x) * x + at(grow, steps, x) * eps, guess)

    def states() -> Iterator[State]:
        x = x_0
        for t in range(1, schedule.T + 1):
            state = step(x, t)
            x = state.x
            yield state

    return states()


# --- book/beyond/fast_sampling.ipynb · fast-export-slerp · Between two noises
def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    r"""From `a` (weight 0) to `b` (weight 1) along the arc, `eq-fast-slerp`.

    a and b [B, ...], one angle for each sample; where they are parallel, the straight
    line. Shoemake 1985. Raises TypeError or ValueError.

    >>> a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> [f"{x:.4f}" for x in slerp(a, b, 0.5)[0].tolist()]
    ['0.7071', '0.7071']
    """
    checks.tensor("a", a)
    checks.tensor("b", b)
    checks.same_shape("b", b, "a", a)
    checks.same_device("b", b, "a", a)
    checks.number("weight", weight, low=0, high=1)
    along = torch.cosine_similarity(a.flatten(1), b.flatten(1), dim=1).clamp(-1, 1)
    angle = along.acos().reshape(-1, *[1] * (a.ndim - 1))
    parallel = angle.sin() < 1e-6
    whole = torch.where(parallel, 1.0, angle.sin())
    first = torch.where(parallel, 1 - weight, ((1 - weight) * angle).sin() / whole)
    second = torch.where(parallel, weight, (weight * angle).sin() / whole)
    return first.to(a.dtype) * a + second.to(a.dtype) * b


# --- book/beyond/fast_sampling.ipynb · fast-export-heun · Heun: look at both ends
STEEP = 20.0  # a fall of sigma_bar over one step that Heun's mean is not made for


def heun(
    model: Model,
    schedule: Schedule,
    x_T: Tensor,
    *,
    prediction: str = "eps",
    clip: Clip = True,
    generator: Generators = None,
) -> Iterator[State]:
    r"""Heun's method, `eq-fast-heun-x` (Karras et al. 2022, algorithm 1): T states.

    Two evaluations a step, one at the last: 2 T - 1. Steps over which sigma_bar falls
    more than STEEP times stay Euler's. State.x_0 is the prediction at the start of the
    step. The options as for `ddim`; nothing is drawn from `generator`. Raises TypeError
    or ValueError.

    >>> from ddpm_core.schedules import linear, respace
    >>> short = respace(linear(), kept_steps(1000, 10))
    >>> last(heun(lambda x, t: 0 * x, short, torch.zeros(2, 3))).shape
    torch.Size([2, 3])
    """
    check_start(schedule, x_T)
    check_options(prediction, clip)
    signal, direction, _ = ddim_tables(schedule, 0.0)
    levels = sigma_bar(schedule)
    half = before(schedule.alpha_bar).sqrt() * (before(levels) - levels) / 2
    half = torch.where(levels / before(levels) <= STEEP, half, 0.0)

    @torch.no_grad()
    def step(x: Tensor, t: int) -> State:
        steps, x_0, eps = predict_pair(model, schedule, x, t, prediction, clip)
        euler = at(signal, steps, x) * x_0 + at(direction, steps, x) * eps
        if t == 1:
            return State(0, euler, x_0)
        known = (model, schedule)
        _, _, there = predict_pair(*known, euler, t - 1, prediction, clip)
        return State(t - 1, euler + at(half, steps, x) * (there - eps), x_0)

    return walk(step, x_T, schedule.T)


# --- book/beyond/fast_sampling.ipynb · fast-export-dpm · DPM-Solver++(2M): remember...
def half_log_snr(schedule: Schedule) -> Tensor:
    r"""lambda_t = log(alpha_bar_t / (1 - alpha_bar_t)) / 2, `eq-fast-lambda`: [T+1].

    Infinite at t = 0, and minus infinity where alpha_bar is 0.

    >>> from ddpm_core.schedules import from_beta
    >>> [f"{x:.3f}" for x in half_log_snr(from_beta(torch.tensor([0.8]))).tolist()]
    ['inf', '-0.693']
    """
    return -sigma_bar(schedule).log()


def dpm_tables(schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
    r"""Factors of x_t and of D in `eq-fast-2m`, and the share in `eq-fast-2m-mix`.

    Three tables [T+1]; the share is 0 at the first step, t = T, and at the last, t = 1.

    >>> from ddpm_core.schedules import linear
    >>> [table[1].item() for table in dpm_tables(linear())]
    [0.0, 1.0, 0.0]
    """
    rest, bar = schedule.one_minus_alpha_bar, schedule.alpha_bar
    keep = (before(rest) / rest).sqrt()
    gain = before(bar).sqrt() - bar.sqrt() * keep
    h = before(half_log_snr(schedule)) - half_log_snr(schedule)
    share = torch.zeros_like(h)
    share[2:-1] = h[2:-1] / (2 * h[3:])
    return keep, gain, share


def dpm_solver_2m(
    model: Model,
    schedule: Schedule,
    x_T: Tensor,
    *,
    prediction: str = "eps",
    clip: Clip = True,
    generator: Generators = None,
) -> Iterator[State]:
    r"""DPM-Solver++(2M), `eq-fast-2m` (Lu et al. 2022, algorithm 2): T states.

    One evaluation a step; first and last step are of first order. The options as for
    `ddim`; nothing is drawn from `generator`. `clip` cuts the predictions, not their
    mixture. Raises TypeError or ValueError.

    >>> from ddpm_core.schedules import linear, respace
    >>> short = respace(linear(), kept_steps(1000, 10))
    >>> last(dpm_solver_2m(lambda x, t: 0 * x, short, torch.zeros(2, 3))).shape
    torch.Size([2, 3])
    """
    check_start(schedule, x_T)
    check_options(prediction, clip)
    keep, gain, share = dpm_tables(schedule)
    older: list[Tensor] = []

    @torch.no_grad()
    def step(x: Tensor, t: int) -> State:
        steps = torch.full((len(x),), t, device=x.device)
        x_0 = predict_x_0(model, schedule, x, steps, prediction, clip)
        mixed = x_0 + at(share, steps, x) * (x_0 - older.pop()) if older else x_0
        older.append(x_0)
        return State(t - 1, at(keep, steps, x) * x + at(gain, steps, x) * mixed, x_0)

    return walk(step, x_T, schedule.T)
