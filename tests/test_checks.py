"""ddpm_core.checks: what is accepted, what is refused, and what the message says."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from ddpm_core import checks


def says(error: type[Exception], *words: str) -> object:
    """Expect an error whose message holds all the words, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, words)))


def test_can_look_at_plain_cpu_tensors_only() -> None:
    assert checks.can_look(torch.zeros(2))
    assert checks.can_look(torch.nn.Parameter(torch.zeros(2)))
    assert checks.can_look(torch.zeros(2, requires_grad=True) * 2)
    assert not checks.can_look(torch.zeros(2, device="meta"))
    with FakeTensorMode():
        assert not checks.can_look(torch.zeros(2))
        assert not checks.can_look(torch.zeros(2, device="cuda"))


def test_can_look_is_false_while_compiling() -> None:
    seen = []

    def f(x: torch.Tensor) -> torch.Tensor:
        seen.append(checks.can_look(x))
        return x + 1

    torch.compile(f, backend="eager", fullgraph=True)(torch.zeros(2))
    assert seen == [False]


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_integer_accepts(value: object) -> None:
    found = checks.integer("T", value, low=3, high=3)
    assert found == 3
    assert type(found) is int


@pytest.mark.parametrize(
    "value", [3.0, True, "3", None, torch.tensor(3), np.float32(3)]
)
def test_integer_refuses_the_type(value: object) -> None:
    with says(TypeError, "T must be an integer of at least 1", type(value).__name__):
        checks.integer("T", value, low=1)


@given(st.integers(), st.integers(), st.integers(min_value=0))
def test_integer_range(value: int, low: int, width: int) -> None:
    if low <= value <= low + width:
        assert checks.integer("n", value, low, low + width) == value
    else:
        with says(ValueError, f"n must be an integer from {low} to", f"got {value}"):
            checks.integer("n", value, low, low + width)


def test_integer_one_sided() -> None:
    assert checks.integer("n", -5, high=0) == -5
    assert checks.integer("n", -5) == -5
    with says(ValueError, "n must be an integer of at most 0", "got 1"):
        checks.integer("n", 1, high=0)


@given(st.floats(), st.floats(-1e9, 1e9), st.floats(0, 1e9))
def test_number_range(value: float, low: float, width: float) -> None:
    high = low + width
    if math.isfinite(value) and low <= value <= high:
        assert checks.number("eta", value, low, high) == value
    else:
        with says(ValueError, "eta must be a finite number from", "got"):
            checks.number("eta", value, low, high)


@pytest.mark.parametrize("value", [True, "0.5", None, 1j, torch.tensor(0.5)])
def test_number_refuses_the_type(value: object) -> None:
    with says(TypeError, "eta must be a finite number", type(value).__name__):
        checks.number("eta", value)


def test_number_gives_a_float() -> None:
    assert type(checks.number("eta", 1)) is float
    assert type(checks.number("eta", np.float32(0.5))) is float
    for value in (math.nan, math.inf, -math.inf):
        with says(ValueError, "eta must be a finite number", str(value)):
            checks.number("eta", value)


def test_one_of() -> None:
    assert checks.one_of("mode", "a", ("a", "b")) == "a"
    for wrong in ("c", "", "A", None, 1):
        with says(ValueError, "mode must be one of 'a', 'b'", repr(wrong)):
            checks.one_of("mode", wrong, ("a", "b"))
    with says(ValueError, "got 'ab'"):  # a list of one string is no substring test
        checks.one_of("mode", "ab", ("abc",))


FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
OTHER = (torch.bool, torch.complex64)


@pytest.mark.parametrize("dtype", FLOATING + WHOLE + OTHER)
def test_tensor_kinds(dtype: torch.dtype) -> None:
    x = torch.zeros(2, dtype=dtype)
    checks.tensor("x", x, kind="any")
    for kind, right in (("floating", FLOATING), ("integer", WHOLE)):
        if dtype in right:
            checks.tensor("x", x, kind=kind)
        else:
            with says(TypeError, f"x must be a tensor of {kind} dtype", str(dtype)):
                checks.tensor("x", x, kind=kind)


def test_tensor_refuses_what_is_none() -> None:
    for wrong in (np.zeros(2), [0.0], 1.0, None):
        with says(TypeError, "x must be a torch.Tensor", type(wrong).__name__):
            checks.tensor("x", wrong)
    with says(ValueError, "kind must be one of", "'float'"):
        checks.tensor("x", torch.zeros(1), kind="float")


shapes = st.lists(st.integers(0, 3), max_size=4)
patterns = st.lists(st.one_of(st.none(), st.integers(0, 3)), max_size=4)


@given(shapes, patterns)
def test_tensor_shape(shape: list[int], pattern: list[int | None]) -> None:
    x = torch.zeros(shape)
    fits = len(shape) == len(pattern) and all(
        p in (None, n) for n, p in zip(shape, pattern, strict=True)
    )
    if fits:
        checks.tensor("x", x, shape=pattern)
    else:
        with says(ValueError, "x must have shape [", "got shape ["):
            checks.tensor("x", x, shape=pattern)


def test_shape_messages() -> None:
    with says(ValueError, "x must have shape [any, 3]; got shape [2, 4]"):
        checks.tensor("x", torch.zeros(2, 4), shape=(None, 3))
    with says(ValueError, "x must have 4 dimensions; got shape [2, 4]"):
        checks.tensor("x", torch.zeros(2, 4), ndim=4)
    with says(ValueError, "eps must have the shape of x_0, [2, 3]; got shape [3]"):
        checks.same_shape("eps", torch.zeros(3), "x_0", torch.zeros(2, 3))
    checks.same_shape("eps", torch.zeros(2, 3), "x_0", torch.zeros(2, 3))


def test_same_device() -> None:
    here, nowhere = torch.zeros(2), torch.zeros(2, device="meta")
    checks.same_device("t", here, "x", torch.ones(5))
    with says(ValueError, "t must lie on the device of x, cpu; got meta", ".to('cpu')"):
        checks.same_device("t", nowhere, "x", here)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_finite(bad: float) -> None:
    x = torch.zeros(2, 3)
    checks.finite("x_T", x)
    checks.finite("x_T", torch.zeros(0))
    x[1, 2] = bad
    with says(ValueError, f"x_T must be finite; got {bad} at index [1, 2]"):
        checks.finite("x_T", x)
    checks.finite("x_T", x.to("meta"))
    with says(ValueError, f"x_T must be finite; got {bad}"):
        checks.finite("x_T", torch.tensor(bad))


@given(st.lists(st.floats(width=32), max_size=5))
def test_between(values: list[float]) -> None:
    x = torch.tensor(values)
    if all(-1 <= v <= 1 for v in values):
        checks.between("x", x, -1, 1)
    else:
        first = next(i for i, v in enumerate(values) if not -1 <= v <= 1)
        with says(ValueError, "x must lie in [-1, 1]", f"at index [{first}]"):
            checks.between("x", x, -1, 1)


def test_timesteps() -> None:
    checks.timesteps("t", torch.tensor([1, 5]), T=5, batch=2)
    checks.timesteps("t", torch.tensor([0, 5]), T=5, batch=2, low=0)
    checks.timesteps("t", torch.zeros(2, dtype=torch.int64, device="meta"), 5, 2)
    for bad in (0, -1, 6):
        with says(ValueError, f"t must lie in [1, 5]; got {bad} at index [1]"):
            checks.timesteps("t", torch.tensor([1, bad]), T=5, batch=2)
    with says(ValueError, "t must lie in [0, 5]; got -1"):
        checks.timesteps("t", torch.tensor([-1]), T=5, batch=1, low=0)
    with says(ValueError, "t must have shape [2]; got shape [2, 1]"):
        checks.timesteps("t", torch.ones(2, 1, dtype=torch.int64), T=5, batch=2)


@pytest.mark.parametrize("dtype", [*FLOATING, *OTHER, torch.uint8, torch.int32])
def test_timesteps_must_be_int64(dtype: torch.dtype) -> None:
    with says(TypeError, "t must be an int64 tensor of shape [2]", str(dtype)):
        checks.timesteps("t", torch.ones(2, dtype=dtype), T=5, batch=2)


def test_timesteps_must_be_a_tensor() -> None:
    for wrong in (3, [3, 3], None):
        with says(TypeError, "t must be an int64 tensor of shape [2]", repr(wrong)):
            checks.timesteps("t", wrong, T=5, batch=2)


def test_images() -> None:
    x = torch.zeros(2, 3, 4, 4)
    checks.images("x_0", x)
    checks.images("x_0", torch.full_like(x, -1))
    checks.images("x_0", torch.ones(2, 3, 4, 4, device="meta") * 7)
    with says(TypeError, "x_0 must be floating", "torch.uint8", "/ 127.5 - 1"):
        checks.images("x_0", x.to(torch.uint8))
    with says(TypeError, "x_0 must be a torch.Tensor", "ndarray"):
        checks.images("x_0", x.numpy())
    with says(ValueError, "x_0 must have 4 dimensions; got shape [3, 4, 4]"):
        checks.images("x_0", x[0])
    for bad in (1.5, -1.01, math.nan, math.inf):
        wrong = x.clone()
        wrong[1, 0, 2, 3] = bad
        with says(ValueError, "x_0 must lie in [-1, 1]", "at index [1, 0, 2, 3]"):
            checks.images("x_0", wrong)


def test_8_bit_hint_is_right() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x = levels.float() / 127.5 - 1
    checks.images("x_0", x)
    assert (x.min(), x.max()) == (-1, 1)


def test_nothing_is_looked_at_while_compiling() -> None:
    def f(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        checks.images("x", x)
        checks.timesteps("t", t, 5, 2)
        checks.finite("x", x)
        return x + 1

    t = torch.tensor([1, 2])
    out = torch.compile(f, backend="eager", fullgraph=True)(torch.zeros(2, 1, 4, 4), t)
    assert (out == 1).all()
