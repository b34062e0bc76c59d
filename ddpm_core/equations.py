"""Written by tools/extract.py; edit the chapters:

- book/workshop/equations.ipynb
"""

import functools
import json
import re
from importlib.resources import files
from typing import Any

import sympy
from sympy.parsing.latex import parse_latex
from torch import Tensor

from ddpm_core import checks
from ddpm_core.schedules import Schedule

__all__ = [
    "CONSTANTS",
    "GREEK",
    "INNERMOST",
    "LETTER",
    "NUMBERED",
    "OFFSETS",
    "POSITIVE",
    "SAME_MEANING",
    "SYMBOL",
    "TABLES",
    "assemble",
    "equations",
    "evaluate",
    "parse",
    "same",
    "schedule_value",
    "shape",
    "split_outside",
    "substitute",
    "symbol",
    "symbol_name",
    "tex",
]


# --- book/workshop/equations.ipynb · equations-load · Finding the equations
@functools.cache
def equations() -> dict[str, str]:
    r"""All labelled equations of the book: label -> TeX, as on the pages.

    >>> "eq-posterior-variance" in equations()
    True
    """
    text = (files("ddpm_core") / "equations.json").read_text(encoding="utf-8")
    found: dict[str, str] = json.loads(text)
    return found


# --- book/workshop/equations.ipynb · equations-names · From TeX to symbols
GREEK = (
    r"alpha|beta|gamma|delta|epsilon|varepsilon|eta|theta|lambda|mu|nu|xi|pi|rho|"
    r"sigma|tau|phi|varphi|psi|omega|Sigma|Delta|Lambda"
)
LETTER = rf"\\(?:{GREEK})(?![a-zA-Z])|(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])"
SYMBOL = re.compile(
    rf"(?:\\(?P<accent>bar|tilde|hat)\s*(?:\{{\s*(?P<inner>{LETTER})\s*\}}|"
    rf"(?P<under>{LETTER}))|(?P<base>{LETTER}))"
    r"(?:_(?:\{(?P<long>[^{}]*)\}|\\(?P<greek>[a-z]+)|(?P<short>\w)))?"
    r"(?P<star>\^(?:\*|\\star|\{\*\}|\{\\star\}))?"
)
CONSTANTS = {"pi": sympy.pi, "e": sympy.E}
POSITIVE = ("alpha", "beta", "sigma", "snr", "s", "gamma", "eta", "delta")
SAME_MEANING = (
    (r"\\(?:mathbf|boldsymbol|bm|mathit)\s*\{([^{}]*)\}", r" \1"),
    (r"\\(?:mathbf|boldsymbol|bm)\s*([a-zA-Z]|\\[a-zA-Z]+)", r" \1"),
    (r"\\(?:mathrm|operatorname|text)\s*\{SNR\}\s*\(([^()]*)\)", r" S_{NR,\1} "),
    (r"\\begin\{aligned\}|\\end\{aligned\}|&|\\\\(?:\[[^\]]*\])?", " "),
    (r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\s*\.?", " "),
    (r"\\(?:[,;:!]|quad|qquad|displaystyle|nonumber)(?![a-zA-Z])|~", " "),
    (r"\\[td]frac", r"\\frac"),
    (r"\\log(?![a-zA-Z])", r"\\ln "),
    (r"\\[lr]Vert|\\\|", "|"),
    (r"[\[]", "("),
    (r"[\]]", ")"),
)


def symbol_name(match: re.Match[str]) -> str:
    r"""The name in code of a symbol on the page, such as `alpha_bar_t_minus_1`.

    >>> symbol_name(SYMBOL.match(r"\bar\alpha_{t-1}"))
    'alpha_bar_t_minus_1'
    """
    base = (match["base"] or match["inner"] or match["under"]).lstrip("\\")
    base = "eps" if base in ("epsilon", "varepsilon") else base
    index = match["long"] or match["greek"] or match["short"] or ""
    if base == "S" and index.startswith("NR,"):
        base, index = "snr", index[3:]
    index = index.replace("-", "_minus_").replace("+", "_plus_")
    index = re.sub(r"\W+", "_", index.replace("\\", "")).strip("_")
    index = re.sub(r"_+", "_", index)
    accent = match["accent"] or ""
    parts = [base, index, accent] if accent == "hat" else [base, accent, index]
    return "_".join(filter(None, [*parts, "star" if match["star"] else ""]))


def symbol(name: str) -> sympy.Expr:
    r"""The SymPy symbol of that name: real, and positive where its meaning is.

    The two constants `pi` and `e` are the numbers.

    >>> symbol("alpha_bar_t").is_positive, symbol("x_t").is_positive
    (True, None)
    """
    if name in CONSTANTS:
        return CONSTANTS[name]
    positive = name.split("_")[0] in POSITIVE
    return (
        sympy.Symbol(name, positive=True) if positive else sympy.Symbol(name, real=True)
    )


# --- book/workshop/equations.ipynb · equations-shape · From TeX to symbols
NUMBERED = re.compile(r"Z_\{(\d+)\}")
INNERMOST = re.compile(
    r"(?<=[^_][({])(?!(?:Z_\{\d+\}|\d+)[)}])(?:[^(){}]|_\{\d+\})+(?=[)}])"
)


@functools.cache
def shape(text: str) -> sympy.Expr:
    r"""SymPy's reading of TeX whose only symbols are Z_{0}, Z_{1}, ...

    >>> shape("1-Z_{0}").free_symbols
    {Z_{0}}
    """
    return parse_latex(text, backend="antlr", strict=True)


def assemble(text: str, values: list[sympy.Expr]) -> sympy.Expr:
    r"""TeX in which Z_{i} stands for `values[i]`, its brackets read from the inside out.

    Raises ValueError where a letter is left that is no Z.

    >>> assemble("(1-Z_{0})^2", [symbol("x")])
    (1 - x)**2
    """
    text, values = (
        " " + re.sub(r"(?<=[({])\s+|\s+(?=[)}])", "", text.strip()),
        [*values],
    )
    while match := INNERMOST.search(text):
        values.append(assemble(match[0], values))
        inside = f"Z_{{{len(values) - 1}}}"
        text = text[: match.start()] + inside + text[match.end() :]
    used = list(dict.fromkeys(NUMBERED.findall(text)))
    found = shape(NUMBERED.sub(lambda m: f"Z_{{{used.index(m[1])}}}", text.strip()))
    known = {sympy.Symbol(f"Z_{{{i}}}"): values[int(n)] for i, n in enumerate(used)}
    if strange := found.free_symbols - known.keys():
        raise ValueError(f"{strange} is no symbol")
    return found.xreplace(known)


# --- book/workshop/equations.ipynb · equations-parse · From TeX to symbols
@functools.cache
def parse(text: str) -> sympy.Expr:
    r"""One piece of algebra in TeX, as a SymPy expression.

    Raises ValueError where the TeX is not algebra (an expectation, an integral).

    >>> parse(r"\frac{1-\bar\alpha_{t-1}}{1-\bar\alpha_t} \beta_t")
    beta_t*(1 - alpha_bar_t_minus_1)/(1 - alpha_bar_t)
    """
    plain = text.strip().rstrip(".,;")
    for pattern, replacement in SAME_MEANING:
        plain = re.sub(pattern, replacement, plain)
    plain = re.sub(r"\|([^|]*)\|\s*\^\s*(?:2|\{2\})", r"(\1)^2", plain)
    names: list[str] = []

    def number(match: re.Match[str]) -> str:
        names.append(symbol_name(match))
        return f"Z_{{{len(names) - 1}}}"

    plain = SYMBOL.sub(number, plain)
    plain = re.sub(r"(Z_\{\d+\})\s*\((?:[^()]*,)[^()]*\)", r"\1", plain)
    plain = re.sub(r"(?<=[\w})])\s*(?=\(|\\(?:ln|exp|sin|cos)\b)", r" \\cdot ", plain)
    plain = re.sub(r"(\\(?:ln|exp|sin|cos|cdot|times)\s*) \\cdot ", r"\1 ", plain)
    try:
        return assemble(plain, [symbol(name) for name in names]).doit()
    except Exception as error:
        raise ValueError(f"text must be algebra; SymPy cannot read {text!r}") from error


# --- book/workshop/equations.ipynb · equations-tex · One side of an equation
def split_outside(text: str, marks: str) -> list[str]:
    r"""Cut `text` at each of `marks` that stands outside all brackets.

    >>> split_outside("a = (b = c) = d", "=")
    ['a ', ' (b = c) ', ' d']
    """
    parts, depth = [""], 0
    for character in text:
        depth += (character in "({[") - (character in ")}]")
        if depth == 0 and character in marks:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def tex(label: str, part: int = -1) -> Any:
    r"""A part of the labelled equation, read from the page by SymPy.

    `part` counts the pieces between the equals signs: -1 is the last one, 0 the
    left-hand side. A normal law gives the pair (mean, variance). Raises ValueError
    for a label that no page has and for TeX that is not algebra.

    >>> tex("eq-posterior-variance")
    beta_t*(1 - alpha_bar_t_minus_1)/(1 - alpha_bar_t)
    """
    checks.one_of("label", label, equations())
    text = re.sub(r"\\begin\{aligned\}|\\end\{aligned\}", "", equations()[label])
    text = split_outside(text, "=")[part]
    normal = re.search(r"\\mathcal\s*\{?N\}?\s*(?:\\[a-zA-Z]+)?\s*\((.*)\)", text, re.S)
    if normal is None:
        return parse(text)
    inside = split_outside(normal[1], ";")[-1]
    mean, variance = split_outside(inside, ",")
    identity = r"\\(?:mathbf|boldsymbol)\s*\{?\s*I\s*\}?|(?<![a-zA-Z\\])I(?![a-zA-Z])"
    return parse(mean), parse(re.sub(identity, "", variance).strip() or "1")


# --- book/workshop/equations.ipynb · equations-evaluate · Numbers for the symbols
TABLES = ("alpha_bar", "alpha", "beta_tilde", "beta", "snr")
OFFSETS = {"t": 0, "t_minus_1": -1, "t_plus_1": 1}


def schedule_value(name: str, schedule: Schedule, t: int) -> float | None:
    r"""The number that a symbol such as `alpha_bar_t_minus_1` has at step t, or None."""
    for table in TABLES:
        index = name.removeprefix(table + "_")
        if index == name:
            continue
        if index in OFFSETS:
            step = t + OFFSETS[index]
        elif index == "T":
            step = schedule.T
        elif index.isdecimal():
            step = int(index)
        else:
            return None
        if table == "beta_tilde":
            return float(evaluate("eq-posterior-variance", schedule, step))
        return float(getattr(schedule, table)[step])
    return None


def evaluate(
    label: str,
    schedule: Schedule | None = None,
    t: int = 0,
    part: int = -1,
    **values: float | Tensor,
) -> Any:
    r"""The number that the labelled equation gives, or two numbers for a normal law.

    Symbols of the schedule with index t, t-1, t+1, T or a number are filled in; all
    others are keyword arguments. Raises ValueError naming a symbol without a value.

    >>> from ddpm_core.schedules import linear
    >>> round(evaluate("eq-posterior-variance", linear(), 2), 9)
    5.4532e-05
    """
    found = tex(label, part)
    if isinstance(found, tuple):
        return tuple(substitute(label, part, schedule, t, values) for part in found)
    return substitute(label, found, schedule, t, values)


def substitute(
    label: str,
    expression: sympy.Expr,
    schedule: Schedule | None,
    t: int,
    values: dict[str, float | Tensor],
) -> float:
    r"""The float that `expression` has with the schedule's and the given values."""
    numbers = {}
    for free in expression.free_symbols:
        value = values.get(str(free))
        if value is None and schedule is not None:
            value = schedule_value(str(free), schedule, t)
        if value is None:
            raise ValueError(f"{label} needs a value for {free}; give it by keyword")
        numbers[free] = float(value)
    return float(expression.subs(numbers))


def same(left: sympy.Expr, right: sympy.Expr) -> bool:
    r"""Whether two expressions are equal for all values of their symbols.

    >>> same(parse("(x+1)^2"), parse("x^2 + 2 x + 1"))
    True
    """
    difference = sympy.sympify(left - right)
    names = sorted(difference.free_symbols, key=str)
    point = {s: sympy.Float(0.11 + 0.07 * i) for i, s in enumerate(names)}
    number = difference.evalf(subs=point)  # a cheap look first: one point may suffice
    if number.is_number and abs(number) > 1e-6:
        return False
    return bool(sympy.simplify(sympy.expand(difference)) == 0)
