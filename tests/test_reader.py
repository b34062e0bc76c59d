"""The reader of equations: brackets from the inside out, one reading for one shape."""

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_core.equations import assemble, parse, same, shape, symbol

x, t = symbol("x"), symbol("t")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\ln (x+1) t", sympy.log(x + 1) * t),
        (r"\frac{1-(x-(t+1))}{2}", (1 - (x - (t + 1))) / 2),
        (r"\sqrt{x^2} \cdot (x+t)^2", sympy.sqrt(x**2) * (x + t) ** 2),
        (r"x^{-(t+1)}", x ** (-(t + 1))),
        (r"10^{-4} x", x / 10000),
        (r"\exp(-\frac{x^2}{2})", sympy.exp(-(x**2) / 2)),
        (r"\|x - t\|^2", (x - t) ** 2),
        (r"( x )", x),
        (r"2", sympy.Integer(2)),
    ],
)
def test_brackets_mean_what_they_mean(text, expected):
    assert same(parse(text), expected)


@pytest.mark.parametrize("text", [r"\mathbb E[x]", "x +", "(x", r"\frac{x}{}", ""])
def test_what_is_no_algebra_is_refused(text):
    with pytest.raises(ValueError, match="must be algebra"):
        parse(text)


def test_a_shape_is_read_once():
    shape.cache_clear()
    assemble("1-Z_{0}", [x])
    assemble("1-Z_{1}", [x, t])
    assert shape.cache_info().misses == 1


terms = st.recursive(
    st.sampled_from(["x", "t", "3"]),
    lambda inner: st.tuples(
        inner, st.sampled_from([" + ", " - ", r" \cdot "]), inner
    ).map(lambda parts: f"({''.join(parts)})"),
    max_leaves=8,
)


@settings(max_examples=30)
@given(terms)
def test_nested_brackets_agree_with_python(text):
    by_python = eval(text.replace(r"\cdot", "*"), {"x": x, "t": t})
    assert sympy.expand(parse(text) - by_python) == 0


def test_same_sees_a_difference_and_an_identity():
    assert same(parse("(x+t)^2"), parse("x^2 + 2 x t + t^2"))
    assert not same(parse("(x+t)^2"), parse("x^2 + t^2"))
    assert not same(parse(r"\sqrt{x^2}"), x)
