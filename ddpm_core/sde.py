"""Written by tools/extract.py; edit the chapters:

- book/beyond/sde.ipynb
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_core import checks
from ddpm_core.losses import bits_per_dim
from ddpm_core.process import PREDICTIONS, convert, signal_left
from ddpm_core.samplers import Generators, Model, State, noise_like, predict, walk
from ddpm_core.schedules import Schedule

__all__ = [
    "METHODS",
    "PROBES",
    "VP",
    "Field",
    "FlowLikelihood",
    "angle_velocity",
    "angles",
    "density_bits",
    "dequantise",
    "diffusion",
    "divergence",
    "drift",
    "flow",
    "flow_velocity",
    "log_likelihood",
    "probes_like",
    "reverse_sde",
    "standard_normal_log_prob",
    "vp_from_schedule",
    "vp_linear",
]


# --- book/beyond/sde.ipynb · sde-export-vp · From steps to time
class VP(NamedTuple):
    r"""A variance-preserving process in continuous time, tau from 0 (data) to 1.

    `eq-sde-forward` and `eq-sde-alpha-bar`; Song et al. 2021 (SDE), (11). `beta` is the
    rate of noise and `spent` its integral from 0; both take float64 tensors tau of any
    shape. Make one by `vp_linear` or `vp_from_schedule`.

    >>> process = vp_linear()
    >>> f"{process.alpha_bar(torch.tensor(1.0, dtype=torch.float64)):.3e}"
    '4.319e-05'
    """

    beta: Callable[[Tensor], Tensor]
    spent: Callable[[Tensor], Tensor]

    def alpha_bar(self, tau: Tensor) -> Tensor:
        r"""What is left of the data's variance, exp(-B), `eq-sde-alpha-bar`."""
        return torch.exp(-self.spent(tau))

    def one_minus_alpha_bar(self, tau: Tensor) -> Tensor:
        r"""The variance of the noise, with all its digits near tau = 0."""
        return -torch.expm1(-self.spent(tau))


def vp_linear(beta_min: float = 0.1, beta_max: float = 20.0) -> VP:
    r"""The process whose rate rises linearly, `eq-sde-linear`; Song et al. 2021, app. C.

    0 < beta_min <= beta_max. The limit of `schedules.linear` as T grows.
    Raises TypeError or ValueError.

    >>> vp_linear().spent(torch.tensor([0.0, 1.0])).tolist()
    [0.0, 10.050000190734863]
    """
    if checks.number("beta_min", beta_min, low=0) == 0:
        raise ValueError("beta_min must be above 0; got 0")
    rise = checks.number("beta_max", beta_max, low=beta_min) - beta_min

    def beta(tau: Tensor) -> Tensor:
        return beta_min + rise * tau

    def spent(tau: Tensor) -> Tensor:
        return beta_min * tau + 0.5 * rise * tau**2

    return VP(beta, spent)


def vp_from_schedule(schedule: Schedule) -> VP:
    r"""The process that has a schedule's alpha_bar_t at tau = t/T, for every t.

    Its rate is constant within each step, -T log(alpha_t), and jumps between them: at
    t/T it is that of step t. Raises ValueError if beta_T = 1.

    >>> from ddpm_core.schedules import from_beta
    >>> process = vp_from_schedule(from_beta(torch.tensor([0.5, 0.5])))
    >>> process.alpha_bar(torch.tensor([0.0, 0.5, 1.0])).tolist()
    [1.0, 0.5, 0.25]
    """
    signal_left(schedule)
    T = schedule.T
    cost = -torch.log1p(-schedule.beta.to(dtype=torch.float64))
    total = cost.cumsum(0)

    def step(tau: Tensor) -> Tensor:
        return torch.ceil(tau * T - 1e-9).clamp(1, T).to(torch.int64)

    def beta(tau: Tensor) -> Tensor:
        return T * cost[step(tau)]

    def spent(tau: Tensor) -> Tensor:
        k = step(tau)
        return total[k - 1] + (tau * T - (k - 1)) * cost[k]

    return VP(beta, spent)


# --- book/beyond/sde.ipynb · sde-export-drift · From steps to time
def _check_time(tau: Tensor) -> None:
    """One time, a tensor without dimensions."""
    checks.tensor("tau", tau, ndim=0)
    checks.finite("tau", tau)


def drift(process: VP, x: Tensor, tau: Tensor) -> Tensor:
    r"""The drift of the forward process, -beta(tau) x / 2: the first part of
    `eq-sde-forward`; Song et al. 2021 (SDE), (11).

    x [B, ...]; tau a tensor [] in [0, 1], float64. Returns a tensor like x.
    Raises TypeError or ValueError.

    >>> drift(vp_linear(), torch.ones(1, 1), torch.tensor(1.0))
    tensor([[-10.]])
    """
    checks.tensor("x", x)
    _check_time(tau)
    return -0.5 * process.beta(tau) * x


def diffusion(process: VP, tau: Tensor) -> Tensor:
    r"""The factor of the noise in the forward process, sqrt(beta(tau)), a tensor [].

    The second part of `eq-sde-forward`. Raises TypeError or ValueError.

    >>> round(diffusion(vp_linear(), torch.tensor(1.0)).item(), 4)
    4.4721
    """
    _check_time(tau)
    return process.beta(tau).sqrt()


# --- book/beyond/sde.ipynb · sde-export-reverse · With less noise, or none
Field = Callable[[Tensor, Tensor], Tensor]


def _ask(name: str, field: Field, x: Tensor, tau: Tensor) -> Tensor:
    """The field at x and tau, checked: a finite tensor like x."""
    value = field(x, tau)
    checks.tensor(f"the {name}", value)
    checks.same_shape(f"the {name}", value, "x", x)
    checks.same_device(f"the {name}", value, "x", x)
    checks.finite(f"the {name}", value)
    return value


def _check_way(x: Tensor, times: Tensor) -> None:
    """A batch to start from, and times that only rise or only fall."""
    checks.tensor("x", x)
    checks.finite("x", x)
    if x.ndim < 2 or len(x) == 0:
        raise ValueError(
            "x must be a batch [B, ...] of at least one sample and two dimensions; "
            f"got shape {tuple(x.shape)}"
        )
    checks.tensor("times", times, ndim=1)
    checks.integer("the number of times", len(times), low=2)
    checks.finite("times", times)
    if checks.can_look(times):
        steps = times.diff()
        if not (bool((steps > 0).all()) or bool((steps < 0).all())):
            raise ValueError("times must only rise or only fall; they turn or stand")


def reverse_sde(
    score: Field,
    process: VP,
    x_1: Tensor,
    times: Tensor,
    *,
    noise: float = 1.0,
    generator: Generators = None,
) -> Iterator[State]:
    r"""Euler-Maruyama backwards, `eq-sde-maruyama`: one state for each step.

    `score(x, tau)` for one tau []; x_1 [B, ...] at times[0]; `times` [N+1] falling, on
    the CPU, in [0, 1]; `noise` is omega: 1 the reverse SDE, 0 the flow by Euler. A
    state's `t` counts the steps still to come, `x_0` is the guess before the step.
    Raises TypeError or ValueError, at the call for the inputs.

    >>> times = torch.linspace(1, 0.001, 11, dtype=torch.float64)
    >>> states = reverse_sde(lambda x, tau: -x, vp_linear(), torch.ones(2, 3), times)
    >>> [state.t for state in states][-3:]
    [2, 1, 0]
    """
    _check_way(x_1, times)
    checks.between("times", times, 0, 1)
    if checks.can_look(times) and bool(times[0] < times[-1]):
        raise ValueError("times must fall, from noise to data; they rise")
    omega, steps = checks.number("noise", noise, low=0), len(times) - 1

    @torch.no_grad()
    def step(x: Tensor, left: int) -> State:
        tau, delta = times[steps - left], -times[steps - left : steps - left + 2].diff()
        g, spent = _ask("score", score, x, tau), process.beta(tau) * delta[0]
        x_0 = x + process.one_minus_alpha_bar(tau) * g
        mean = x + spent * (x / 2 + (1 + omega**2) / 2 * g)
        if omega > 0:
            mean = mean + omega * spent.sqrt() * noise_like(x, generator)
        return State(left - 1, mean, x_0 / process.alpha_bar(tau).sqrt())

    return walk(step, x_1, steps)


# --- book/beyond/sde.ipynb · sde-export-flow · With less noise, or none
METHODS = ("euler", "heun", "rk4")


def flow_velocity(score: Field, process: VP) -> Field:
    r"""The velocity of the probability flow, -beta (x + score)/2, as (x, tau) -> F.

    `eq-sde-flow-vp`; Song et al. 2021 (SDE), (13). `score(x, tau)` takes x [B, ...] and
    one tau [] in [0, 1].

    >>> velocity = flow_velocity(lambda x, tau: -x / 4, vp_linear())
    >>> velocity(torch.ones(1, 1), torch.tensor(1.0))
    tensor([[-7.5000]])
    """

    def velocity(x: Tensor, tau: Tensor) -> Tensor:
        return -0.5 * process.beta(tau) * (x + _ask("score", score, x, tau))

    return velocity


def _moved(
    velocity: Field, x: Tensor, tau: Tensor, delta: Tensor, method: str
) -> Tensor:
    """One step of length delta from x at tau."""
    first = velocity(x, tau)
    if method == "euler":
        return x + delta * first
    if method == "heun":
        return x + delta / 2 * (first + velocity(x + delta * first, tau + delta))
    second = velocity(x + delta / 2 * first, tau + delta / 2)
    third = velocity(x + delta / 2 * second, tau + delta / 2)
    fourth = velocity(x + delta * third, tau + delta)
    return x + delta / 6 * (first + 2 * second + 2 * third + fourth)


def flow(
    velocity: Field, x: Tensor, times: Tensor, method: str = "rk4"
) -> Iterator[Tensor]:
    r"""Solve dx/dtau = velocity(x, tau) from x at times[0]: x at each later time.

    `times` [N+1], float64 on the CPU, rising (data to noise) or falling; `method` from
    METHODS. Raises TypeError or ValueError, at the call for the inputs.

    >>> times = torch.linspace(0, 1, 11, dtype=torch.float64)
    >>> *_, x = flow(lambda x, tau: x, torch.ones(1, 1, dtype=torch.float64), times)
    >>> round(x.item(), 4)
    2.7183
    """
    _check_way(x, times)
    checks.one_of("method", method, METHODS)

    def checked(x: Tensor, tau: Tensor) -> Tensor:
        return _ask("velocity", velocity, x, tau)

    @torch.no_grad()
    def step(x: Tensor, k: int) -> Tensor:
        delta = times[k + 1] - times[k]
        return _moved(checked, x, times[k], delta, method)

    def states() -> Iterator[Tensor]:
        here = x
        for k in range(len(times) - 1):
            here = step(here, k)
            yield here

    return states()


# --- book/beyond/sde.ipynb · sde-export-divergence · The log-density along the flow
PROBES = ("rademacher", "gaussian")


def probes_like(
    x: Tensor,
    n: int = 1,
    kind: str = "rademacher",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw n probes [n, B, ...] for `divergence`: signs, or standard normal numbers.

    Drawn on the CPU, then moved to x's device; `kind` from PROBES.
    Raises TypeError or ValueError.

    >>> probes_like(torch.zeros(2, 3), 4).abs().sum()
    tensor(24.)
    """
    checks.tensor("x", x)
    shape = (checks.integer("n", n, low=1), *x.shape)
    if checks.one_of("kind", kind, PROBES) == "gaussian":
        z = torch.randn(shape, generator=generator, device="cpu")
    else:
        z = 2.0 * torch.randint(2, shape, generator=generator, device="cpu") - 1
    return z.to(x.dtype).to(x.device)


def divergence(
    velocity: Field, x: Tensor, tau: Tensor, probes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""The velocity at x, and its divergence [B]: exact, or Hutchinson's estimate.

    `eq-sde-hutchinson`. Exact without probes: the D unit vectors take their place; else
    the mean over `probes` [n, B, ...]. Each takes one backward pass. A sample's
    velocity may depend on that sample only. Raises TypeError or ValueError.

    >>> value, trace = divergence(lambda x, tau: x**2, torch.ones(1, 3), torch.ones(()))
    >>> trace
    tensor([6.])
    """
    checks.tensor("x", x)
    directions = probes
    if directions is None:
        unit = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device)
        directions = unit.reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape)
    checks.tensor("probes", directions, shape=(None, *x.shape))
    checks.same_device("probes", directions, "x", x)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = _ask("velocity", velocity, x, tau)
    total = x.new_zeros(len(x))
    if not value.requires_grad:
        return value, total
    for z in directions:
        (pulled,) = torch.autograd.grad(
            value, x, z, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        total = total + (pulled * z).flatten(1).sum(1)
    return value.detach(), total if probes is None else total / len(probes)


# --- book/beyond/sde.ipynb · sde-export-likelihood · The log-density along the flow
class FlowLikelihood(NamedTuple):
    r"""`log_prob` [B] in nats of the points at times[0], and where the flow took them.

    >>> FlowLikelihood._fields
    ('log_prob', 'x_end')
    """

    log_prob: Tensor
    x_end: Tensor


def standard_normal_log_prob(x: Tensor) -> Tensor:
    r"""The log-density of N(0, I) in nats for each sample of x [B, ...]: [B].

    >>> round(standard_normal_log_prob(torch.zeros(1, 2)).item(), 4)
    -1.8379
    """
    checks.tensor("x", x)
    return -0.5 * (x.square() + math.log(2 * math.pi)).flatten(1).sum(1)


def log_likelihood(
    velocity: Field,
    x: Tensor,
    times: Tensor,
    log_end: Callable[[Tensor], Tensor] = standard_normal_log_prob,
    *,
    probes: Tensor | None = None,
    method: str = "rk4",
) -> FlowLikelihood:
    r"""The log-density of x at times[0], by the flow, `eq-sde-likelihood`.

    `log_end` gives the log-density [B] at times[-1]; x [B, ...], `velocity`, `probes`
    as in `divergence`; times, `method` as in `flow`. Raises TypeError or ValueError.

    >>> times = torch.linspace(0, 1, 11, dtype=torch.float64)
    >>> still = log_likelihood(lambda x, tau: 0 * x, torch.zeros(1, 2), times)
    >>> round(still.log_prob.item(), 4)
    -1.8379
    """
    _check_way(x, times)

    def both(state: Tensor, tau: Tensor) -> Tensor:
        here = state[:, :-1].reshape(x.shape)
        value, trace = divergence(velocity, here, tau, probes)
        return torch.cat([value.flatten(1), trace[:, None]], 1)

    state = torch.cat([x.flatten(1), torch.zeros_like(x.flatten(1)[:, :1])], 1)
    *_, state = flow(both, state, times, method)
    x_end = state[:, :-1].reshape(x.shape)
    return FlowLikelihood(log_end(x_end) + state[:, -1], x_end)


# --- book/beyond/sde.ipynb · sde-export-angle · The clock of the velocity
def angles(schedule: Schedule) -> Tensor:
    r"""The angle phi of every step, [T+1], from 0 up to at most pi/2, on the CPU.

    cos(phi)^2 = alpha_bar: the clock of `eq-sde-clock`.

    >>> from ddpm_core.schedules import linear
    >>> [round(phi, 4) for phi in angles(linear())[[0, 1, 1000]].tolist()]
    [0.0, 0.01, 1.5644]
    """
    noise, signal = schedule.one_minus_alpha_bar.sqrt(), schedule.alpha_bar.sqrt()
    return torch.atan2(noise, signal).cpu().to(torch.float64)


def angle_velocity(model: Model, schedule: Schedule, prediction: str = "eps") -> Field:
    r"""A network as the velocity (x, phi) -> v of the flow on the clock of angles.

    `eq-sde-angle`. phi must be one of `angles(schedule)` from step 1 on, as it is for
    "euler" and "heun" on those times; another raises ValueError. `prediction` from
    PREDICTIONS: what the model puts out.

    >>> from ddpm_core.schedules import linear
    >>> velocity = angle_velocity(lambda x, t: 0 * x, linear(), "v")
    >>> velocity(torch.ones(1, 2), angles(linear())[7])
    tensor([[0., 0.]])
    """
    checks.one_of("prediction", prediction, PREDICTIONS)
    nodes = angles(schedule)

    def velocity(x: Tensor, phi: Tensor) -> Tensor:
        apart = (nodes - phi).abs()
        t = int(apart.argmin())
        if t == 0 or apart[t] > 1e-6:
            raise ValueError(
                "phi must be the angle of one of the schedule's steps 1...T; "
                f"got {float(phi)}, the nearest is step {t}"
            )
        steps = torch.full((len(x),), t, device=x.device)
        output = predict(model, schedule, x, steps)
        return convert(schedule, x, steps, output, prediction, "v")

    return velocity


# --- book/beyond/sde.ipynb · sde-export-bits · Bits per dimension of an image
def dequantise(
    x: Tensor, levels: int, generator: torch.Generator | None = None
) -> Tensor:
    r"""Spread grey levels evenly over their bins: x plus a uniform number in +-1/(L-1).

    x [B, ...] on `levels` >= 2 equally spaced levels from -1 to 1. Drawn on the CPU.
    Raises TypeError or ValueError.

    >>> y = dequantise(torch.ones(1000, 1), levels=17)
    >>> bool((y - 1).abs().max() <= 1 / 16)
    True
    """
    checks.tensor("x", x)
    checks.between("x", x, -1, 1)
    last_level = checks.integer("levels", levels, low=2) - 1
    if checks.can_look(x) and x.numel():
        place = (x.double() + 1) * last_level / 2
        if bool(((place - place.round()).abs() > 1e-4).any()):
            raise ValueError(f"x must lie on {levels} levels from -1 to 1; it does not")
    u = torch.rand(x.shape, generator=generator, device="cpu").to(x.dtype).to(x.device)
    return x + (2 * u - 1) / last_level


def density_bits(log_prob: Tensor, dims: int, levels: int) -> Tensor:
    r"""Bits per dimension from the log-density [B] of dequantised images, `eq-sde-bits`.

    In nats, for images in [-1, 1] of `dims` numbers with `levels` grey levels.

    >>> density_bits(torch.zeros(1), 64, 17)
    tensor([3.])
    """
    levels = checks.integer("levels", levels, low=2)
    return bits_per_dim(-log_prob, dims) + math.log2((levels - 1) / 2)
