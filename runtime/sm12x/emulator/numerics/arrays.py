"""The array types of the numerics."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
"""Register bits (unsigned integers), or values on the way between registers."""

Floats: TypeAlias = NDArray[np.float64]


def permuted(array: Array, grid: tuple[int, ...], order: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """The last axis of ``array`` split into ``grid``, its parts reordered, and merged into ``shape``;
    contiguous.

    One -1 may stand in ``grid`` and in ``shape``. Leading axes stay as they are.
    """
    lead = array.shape[:-1]
    result: Array = array.reshape(*lead, *grid).transpose(_axes(len(lead), order)).reshape(*lead, *shape)
    return result


@cache
def _axes(leading: int, order: tuple[int, ...]) -> tuple[int, ...]:
    return (*range(leading), *(leading + axis for axis in order))
