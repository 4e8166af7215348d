"""How results are compared: the rules as data. `compare` applies them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bits:
    """Every bit is the same. `open_nan`: a floating-point type whose NaN payload the ISA leaves open; results
    that are NaN in both are then counted apart, and are no mismatch.
    """

    open_nan: str = ""


@dataclass(frozen=True)
class Approximation:
    """A result of `type` within an error of the exact function, which takes float64 arrays.

    The error is the largest of `relative` times the exact result, `absolute`, and `ulps` units in the last
    place. Where the exact result is NaN, infinite or zero, bits must be the same. `section`: what the ISA
    says.
    """

    type: str
    function: Callable[..., Any]
    section: str
    relative: float = 0.0
    absolute: float = 0.0
    ulps: float = 0.0
    ftz: bool = False
    # units in the last place more for subnormal results: see `tables.approximate`
    subnormal_ulps: float = 0.0
    # the operands of which the ISA says something; results of others are not compared
    inside: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Accumulation:
    """D of an mma. Each element may differ from the exact sum by the error of adding its products and C one
    after the other in any order, every partial sum truncated to `bits` significant bits, and one rounding to
    the accumulator's type. `exact`: sums are exact by construction, and every bit must be the same.
    """

    shape: str
    a_type: str
    b_type: str
    accumulator: str
    bits: int
    exact: bool


Rule = Bits | Approximation | Accumulation
