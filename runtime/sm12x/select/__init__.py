"""Which variant runs a problem, and how: a pure function from a description to a ranked list with reasons.

No GPU, no arrays, no state. `problem` says what a call is and what fits it, `rates` holds the numbers of
devices and families, `model` makes microseconds of them, `ranking` sorts.
"""

from __future__ import annotations

from .model import Choice
from .problem import Problem, expected_active, fits, tiles_upper_bound, units_upper_bound
from .ranking import can_count, describe, select
from .rates import RATES

__all__ = [
    "RATES",
    "Choice",
    "Problem",
    "can_count",
    "describe",
    "expected_active",
    "fits",
    "select",
    "tiles_upper_bound",
    "units_upper_bound",
]
