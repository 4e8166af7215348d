"""The .approx and .full instructions, with the errors that the PTX ISA states for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..forms import Form, simple
from ..rules import Approximation
from .floating import flags

_RANGE = 2.0**126


def _within(limit: float) -> Any:
    return lambda x: (np.abs(x) <= limit) | ~np.isfinite(x)


def _divisor_inside(_a: Any, b: Any) -> Any:
    """Of a subnormal divisor the ISA says nothing."""
    return (np.abs(b) >= 1 / _RANGE) | (b == 0) | np.isnan(b)


def _quotient(a: Any, b: Any) -> Any:
    """div.approx: for a divisor beyond 2^126 the result is zero, NaN for an infinite dividend."""
    found = a / b
    large = np.isfinite(b) & (np.abs(b) > _RANGE) & ~np.isnan(found)
    return np.where(large, np.where(np.isinf(a), np.nan, np.copysign(0.0, found)), found)


# opcode -> function, ISA section of the error, and the error
SINGLES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "rcp": (lambda x: 1 / x, "rcp: at most 1 ulp over the full range", {"ulps": 1}),
    "sqrt": (np.sqrt, "sqrt: relative 2^-23 over the positive finite range", {"relative": 2.0**-23}),
    "rsqrt": (lambda x: 1 / np.sqrt(x), "rsqrt: relative 2^-22.9", {"relative": 2.0**-22.9}),
    "ex2": (np.exp2, "ex2: at most 2 ulp over the full range", {"ulps": 2}),
    "lg2": (
        np.log2,
        "lg2: absolute 2^-22 in (0.5, 2), relative 2^-22 elsewhere",
        {"relative": 2.0**-22, "absolute": 2.0**-22},
    ),
    "sin": (
        np.sin,
        "sin: absolute 2^-20.5 in [-2pi, 2pi]",
        {"absolute": 2.0**-20.5, "inside": _within(2 * np.pi)},
    ),
    "cos": (
        np.cos,
        "cos: absolute 2^-20.5 in [-2pi, 2pi]",
        {"absolute": 2.0**-20.5, "inside": _within(2 * np.pi)},
    ),
}


def forms() -> Iterator[Form]:
    for op, (function, section, error) in SINGLES.items():
        for extra in flags("ftz"):
            rule = Approximation("f32", function, section, ftz=bool(extra), **error)
            yield simple(f"{op}.approx{extra}.f32", "f32", "f32", rule=rule)
    for op in ("sin", "cos"):
        function = SINGLES[op][0]
        rule = Approximation(
            "f32",
            function,
            f"{op}: absolute 2^-14.7 in [-100pi, 100pi]",
            absolute=2.0**-14.7,
            inside=_within(100 * np.pi),
        )
        yield simple(f"{op}.approx.f32", "f32", "f32", note="to 100 pi", rule=rule, relation="angles")
    for extra in flags("ftz"):
        rule = Approximation(
            "f32",
            _quotient,
            "div.approx: 2 ulp for 2^-126 <= |b| <= 2^126",
            ulps=2,
            ftz=bool(extra),
            inside=_divisor_inside,
        )
        yield simple(f"div.approx{extra}.f32", "f32 f32", "f32", rule=rule)
        rule = Approximation(
            "f32", lambda a, b: a / b, "div.full: 2 ulp over the full range", ulps=2, ftz=bool(extra)
        )
        yield simple(f"div.full{extra}.f32", "f32 f32", "f32", rule=rule)
    rule = Approximation("f32", np.tanh, "tanh: relative 2^-11", relative=2.0**-11)
    yield simple("tanh.approx.f32", "f32", "f32", rule=rule)
    for kind, tanh, ex2 in (("f16", 2.0**-10.987, 2.0**-9.9), ("bf16", 2.0**-8, 2.0**-7)):
        for pair in ("", "x2"):
            rule = Approximation(kind, np.tanh, f"tanh.{kind}: absolute", absolute=tanh)
            yield simple(f"tanh.approx.{kind}{pair}", f"{kind}{pair}", f"{kind}{pair}", rule=rule)
            ftz = kind == "bf16"
            # The H200 cuts subnormal results of f16 off where it rounds normal ones: half a unit of the last
            # place more, in which a relative error of 2^-9.9 means little.
            more = 0.5 if kind == "f16" else 0.0
            section = f"ex2.{kind}: relative"
            rule = Approximation(kind, np.exp2, section, relative=ex2, ftz=ftz, subnormal_ulps=more)
            opcode = f"ex2.approx{'.ftz' if ftz else ''}.{kind}{pair}"
            yield simple(opcode, f"{kind}{pair}", f"{kind}{pair}", rule=rule)
    for op, function in (("rcp", lambda x: 1 / x), ("rsqrt", lambda x: 1 / np.sqrt(x))):
        rule = Approximation(
            "f64",
            _of_upper_word(function),
            f"{op}.approx.ftz.f64: a gross approximation of 20 fraction bits",
            relative=2.0**-19,
            ftz=True,
        )
        yield simple(f"{op}.approx.ftz.f64", "f64", "f64", rule=rule)
    rule = Approximation("f64", SINGLES["rsqrt"][0], "rsqrt.approx.f64: emulated in steps", relative=2.0**-50)
    yield simple("rsqrt.approx.f64", "f64", "f64", rule=rule)


def _of_upper_word(function: Any) -> Any:
    """The function of operands whose lower 32 bits do not count."""

    def run(x: Any) -> Any:
        upper = (x.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)
        return function(upper)

    return run
