"""A * B + C over small matrices, every element rounded once from its exact value.

All products of the formats that tensor cores take are exact in float64. A sum of them is exact too if
float64 can hold every partial sum, which follows from the largest and the smallest magnitudes of a row of A
and a column of B; where it does not, the element is summed with ``math.fsum``, which is correctly rounded
whatever the terms.
"""

from __future__ import annotations

import math

import numpy as np

from sm12x.emulator.numerics.arrays import Array
from sm12x.emulator.numerics.rounding import sum_to_odd


def dot_to_odd(
    a: Array,
    b: Array,
    c: Array,
    scale: Array | None = None,
    *,
    limit: float,
    fraction_bits: tuple[int, int],
) -> Array:
    """``(a @ b.T) * scale + c`` rounded to odd.

    Shapes: ``a`` (..., m, k), ``b`` (..., n, k), ``c``, ``scale`` and the result (..., m, n), all float64;
    leading axes broadcast. ``scale`` holds powers of two. ``limit``: no partial sum of products needs more
    than 53 bits where the largest magnitude of ``a`` times that of ``b`` is at most this (infinity: never).
    ``fraction_bits``: at most so many follow the leading one in an element of ``a`` and of ``b``. Infinities
    and NaN propagate as IEEE 754 says.
    """
    products = np.matmul(a, np.swapaxes(b, -1, -2))
    if scale is not None:
        products = products * scale
    result = sum_to_odd(products, c)
    if limit == math.inf or (limit > 0 and np.abs(a).max() * np.abs(b).max() <= limit):
        return result
    doubtful = ~_fits(a, b, fraction_bits) & np.isfinite(result)
    if doubtful.any():
        lead = result.shape[:-2]
        rows = np.broadcast_to(a, lead + a.shape[-2:])
        columns = np.broadcast_to(b, lead + b.shape[-2:])
        addends = np.broadcast_to(c, result.shape)
        factors = np.broadcast_to(1.0 if scale is None else scale, result.shape)
        for place in zip(*np.nonzero(doubtful), strict=True):
            batch, i, j = place[:-2], place[-2], place[-1]
            terms = (rows[batch][i] * columns[batch][j] * factors[place]).tolist()
            result[place] = _sum_to_odd([*terms, float(addends[place])])
    return result


def _fits(a: Array, b: Array, fraction_bits: tuple[int, int]) -> Array:
    """Where all partial sums of ``a @ b.T`` are multiples of one unit below 2^53 units, shape (..., m, n)."""
    spans = []
    for matrix, bits in zip((a, b), fraction_bits, strict=True):
        magnitude = np.abs(matrix)
        largest = magnitude.max(axis=-1)
        # zeros do not count; a row of nothing but zeros has the span of one number
        smallest = np.where(magnitude == 0, largest[..., None], magnitude).min(axis=-1)
        spans.append(np.frexp(largest)[1] - np.frexp(smallest)[1] + 1 + bits)
    total = spans[0][..., :, None] + spans[1][..., None, :] + (a.shape[-1] - 1).bit_length()
    fits: Array = total <= 53
    return fits


def _sum_to_odd(terms: list[float]) -> float:
    """The exact sum of finite numbers rounded to odd."""
    nearest = math.fsum(terms)
    error = math.fsum([*terms, -nearest])  # correctly rounded, so its sign is that of the exact remainder
    if error == 0 or int(np.float64(nearest).view(np.int64)) & 1:
        return nearest
    return math.nextafter(nearest, math.copysign(math.inf, error))
