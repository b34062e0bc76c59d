"""Written by tools/extract.py; edit the chapters:

- book/workshop/checks.ipynb
"""

import math
from collections.abc import Collection, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = [
    "KINDS",
    "between",
    "can_look",
    "finite",
    "images",
    "integer",
    "number",
    "one_of",
    "same_device",
    "same_shape",
    "tensor",
    "timesteps",
]


# --- book/workshop/checks.ipynb · checks-can-look · Two kinds of question
def can_look(x: Tensor) -> bool:
    r"""Whether the values of `x` may be looked at: a plain CPU tensor, not compiling.

    Fake and meta tensors have no values, a look at an accelerator's tensor makes the
    program wait for it, and a look inside `torch.compile` breaks the graph. A tensor
    inside `torch.func.vmap` or `torch.func.grad` stands for many.

    >>> can_look(torch.zeros(2)), can_look(torch.zeros(2, device="meta"))
    (True, False)
    """
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    return x.device.type == "cpu"


# --- book/workshop/checks.ipynb · checks-numbers · Numbers and names
def _in_words(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f" from {low} to {high}"
    if low is not None:
        return f" of at least {low}"
    return "" if high is None else f" of at most {high}"


def _outside(value: float, low: float | None, high: float | None) -> bool:
    return (low is not None and value < low) or (high is not None and value > high)


def integer(
    name: str, value: object, low: int | None = None, high: int | None = None
) -> int:
    r"""Return `value` as an int; refuse what is no integer (bool too) or out of range.

    Raises TypeError or ValueError naming the argument, the value and the range.

    >>> integer("T", 1000, low=1)
    1000
    >>> integer("T", 0, low=1)
    Traceback (most recent call last):
    ValueError: T must be an integer of at least 1; got 0
    """
    right = f"{name} must be an integer{_in_words(low, high)}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{right}; got {value!r} ({type(value).__name__})")
    if _outside(int(value), low, high):
        raise ValueError(f"{right}; got {value}")
    return int(value)


def number(
    name: str, value: object, low: float | None = None, high: float | None = None
) -> float:
    r"""Return `value` as a float; refuse what is no finite real number or out of range.

    Raises TypeError or ValueError naming the argument, the value and the range.

    >>> number("eta", 0.5, low=0, high=1)
    0.5
    """
    right = f"{name} must be a finite number{_in_words(low, high)}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{right}; got {value!r} ({type(value).__name__})")
    if not math.isfinite(value) or _outside(float(value), low, high):
        raise ValueError(f"{right}; got {value}")
    return float(value)


def one_of(name: str, value: object, choices: Collection[str]) -> str:
    r"""Return `value` if it is among `choices`, else raise ValueError that lists them.

    >>> one_of("prediction", "v", ("eps", "x_0", "v"))
    'v'
    """
    if not isinstance(value, str) or value not in choices:
        known = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{name} must be one of {known}; got {value!r}")
    return value


# --- book/workshop/checks.ipynb · checks-structure · Types, shapes and devices
KINDS = ("floating", "integer", "any")


def _shape(x: Sequence[int | None]) -> str:
    return "[" + ", ".join("any" if n is None else str(n) for n in x) + "]"


def tensor(
    name: str,
    x: object,
    shape: Sequence[int | None] | None = None,
    ndim: int | None = None,
    kind: str = "floating",
) -> None:
    r"""Check that `x` is a tensor of this kind, shape (None: any size) and `ndim`.

    `kind` is "floating", "integer" (bool is none) or "any". Values are not looked at.
    Raises TypeError for the type or dtype, ValueError for the shape.

    >>> tensor("x_0", torch.zeros(8, 3), shape=(None, 3))
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(x).__name__}")
    is_integer = not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
    fits = {"floating": x.is_floating_point(), "integer": is_integer, "any": True}
    if not fits[one_of("kind", kind, KINDS)]:
        raise TypeError(f"{name} must be a tensor of {kind} dtype; got {x.dtype}")
    if ndim is not None and x.ndim != ndim:
        got = _shape(x.shape)
        raise ValueError(f"{name} must have {ndim} dimensions; got shape {got}")
    if shape is not None and (
        len(shape) != x.ndim
        or any(n is not None and n != m for n, m in zip(shape, x.shape, strict=True))
    ):
        raise ValueError(
            f"{name} must have shape {_shape(shape)}; got shape {_shape(x.shape)}"
        )


def same_shape(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    r"""Check that two tensors have one shape, so that nothing is broadcast in silence.

    >>> same_shape("eps", torch.zeros(2, 3), "x_0", torch.ones(2, 3))
    """
    if a.shape != b.shape:
        raise ValueError(
            f"{name_a} must have the shape of {name_b}, {_shape(b.shape)}; "
            f"got shape {_shape(a.shape)}"
        )


def same_device(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    r"""Check that two tensors lie on one device; nothing is moved in silence.

    >>> same_device("eps", torch.zeros(2), "x_0", torch.ones(3))
    """
    if a.device != b.device:
        raise ValueError(
            f"{name_a} must lie on the device of {name_b}, {b.device}; "
            f"got {a.device} (move it with .to({str(b.device)!r}))"
        )


# --- book/workshop/checks.ipynb · checks-values · Values
def _refuse_where(name: str, x: Tensor, bad: Tensor, right: str) -> None:
    if bool(bad.any()):
        place = tuple(bad.nonzero()[0].tolist())
        where = f" at index {list(place)}" if place else ""
        raise ValueError(f"{name} must {right}; got {x[place].item()}{where}")


def finite(name: str, x: Tensor) -> None:
    r"""Check that no element of `x` is infinite or NaN (where `can_look`).

    >>> finite("x_T", torch.zeros(2))
    """
    if can_look(x):
        _refuse_where(name, x, ~torch.isfinite(x), "be finite")


def between(name: str, x: Tensor, low: float, high: float) -> None:
    r"""Check that each element of `x` lies in [low, high], no NaN (where `can_look`).

    >>> between("alpha_bar", torch.tensor([1.0, 0.5]), 0, 1)
    """
    if can_look(x):
        _refuse_where(name, x, ~((x >= low) & (x <= high)), f"lie in [{low}, {high}]")


def timesteps(name: str, t: object, T: int, batch: int, low: int = 1) -> None:
    r"""Check that `t` is an int64 tensor [batch] with values in low...T.

    Other integer types are refused: as an index, PyTorch reads uint8 as a mask.

    >>> timesteps("t", torch.tensor([1, 1000]), T=1000, batch=2)
    >>> timesteps("t", torch.tensor([0]), T=1000, batch=1)
    Traceback (most recent call last):
    ValueError: t must lie in [1, 1000]; got 0 at index [0]
    """
    if not isinstance(t, Tensor) or t.dtype != torch.int64:
        got = t.dtype if isinstance(t, Tensor) else repr(t)
        raise TypeError(f"{name} must be an int64 tensor of shape [{batch}]; got {got}")
    tensor(name, t, shape=(batch,), kind="integer")
    between(name, t, low, T)


def images(name: str, x: object) -> None:
    r"""Check images: floating, shape B C H W, every value in [-1, 1] (so no NaN).

    >>> images("x_0", torch.zeros(2, 1, 8, 8))
    """
    if isinstance(x, Tensor) and not x.is_floating_point():
        raise TypeError(
            f"{name} must be floating with values in [-1, 1]; got {x.dtype} "
            "(for 8-bit images: x.float() / 127.5 - 1)"
        )
    tensor(name, x, ndim=4)
    assert isinstance(x, Tensor)
    between(name, x, -1, 1)
