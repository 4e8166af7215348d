"""The activation between the two GEMMs of an expert layer: its name and parameters, checked."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

from . import validate

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2", "swigluoai", "swigluoai_uninterleave")
ALPHA, BETA, LIMIT = 1.702, 1.0, 7.0  # what swigluoai takes where nothing is given


@dataclass(frozen=True, slots=True)
class Activation:
    """What stands between the two GEMMs. `alpha`, `beta` and `limit` are values that float32 holds; alpha and
    beta only count for swigluoai, and a `limit` of None clamps nothing."""

    name: str
    gated: bool
    alpha: float
    beta: float
    limit: float | None

    @property
    def interleaved(self) -> bool:
        """Whether rows of w1 are g0 u0 g1 u1 ..., not all of the gate before all of up."""
        return self.name == "swigluoai"

    @property
    def is_swigluoai(self) -> bool:
        """Whether it is ``(u + beta) * g * sigmoid(alpha * g)``, in either layout."""
        return self.name.startswith("swigluoai")


def flag(value: Any, argument: str) -> bool:
    """An argument that must be a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{argument}: expected a bool, got {type(value).__name__}")
    return value


def _number(value: Any, argument: str) -> float:
    """A number as float32 holds it. NaN is refused, infinities are not."""
    number = validate.scale_value(value, argument)
    if number is None:
        raise TypeError(f"{argument}: expected a number, got {type(value).__name__}")
    if math.isnan(number):
        raise ValueError(f"{argument}: expected a number, got nan")
    return ctypes.c_float(number).value


def activation(
    name: Any, gated: Any = True, alpha: Any = None, beta: Any = None, limit: Any = None
) -> Activation:
    """The activation that a layer names, its defaults filled in.

    Raises ValueError and TypeError naming `activation`, `gated`, `alpha`, `beta` or `limit`.
    """
    if not isinstance(name, str):
        raise TypeError(f"activation: expected a str, got {type(name).__name__}")
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
    is_swigluoai = name.startswith("swigluoai")
    if not flag(gated, "gated") and is_swigluoai:
        raise ValueError(f"gated: expected True with activation {name!r}, which is gated only, got False")
    if not is_swigluoai:
        for argument, value in (("alpha", alpha), ("beta", beta)):
            if value is not None:
                raise ValueError(
                    f"{argument}: expected None with activation {name!r}, only swigluoai takes it, got "
                    f"{value!r}"
                )
        if limit is not None and name != "silu":
            raise ValueError(
                f"limit: expected None with activation {name!r}, only silu and swigluoai take it, got "
                f"{limit!r}"
            )
    values = {}
    for argument, value, default in (("alpha", alpha, ALPHA), ("beta", beta, BETA)):
        values[argument] = _number(default if value is None else value, argument)
        if math.isinf(values[argument]):
            raise ValueError(f"{argument}: expected a finite number, got {value!r}")
    clamp = None
    if limit is not None or is_swigluoai:
        clamp = _number(LIMIT if limit is None else limit, "limit")
        if clamp <= 0:
            raise ValueError(f"limit: expected a positive number, got {limit!r}")
    return Activation(name=name, gated=gated, limit=clamp, **values)
