"""Error-free float64 sums, and round-to-odd: how an exact result survives until its one rounding.

A result that float64 cannot hold is kept rounded to odd: truncated, with the last bit set if anything was
cut off. Rounding such a value to a format of at most 51 significand bits, in any mode, gives what rounding
the exact value gives (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
"""

from __future__ import annotations

import numpy as np

from sm12x.emulator.numerics.arrays import Array


def two_sum(x: Array, y: Array) -> tuple[Array, Array]:
    """``(s, e)`` with ``s = x + y`` rounded to nearest and ``s + e`` equal to ``x + y`` (Knuth).

    Exact for finite float64 arrays unless ``s`` overflows; ``e`` is NaN where ``s`` is not finite.
    """
    s = x + y
    part = s - x
    return s, (x - (s - part)) + (y - part)


def to_odd(nearest: Array, error: Array) -> Array:
    """The sum ``nearest + error`` rounded to odd; ``nearest`` is that sum rounded to nearest (float64)."""
    # a NaN error belongs to an infinite or NaN sum, which is exact: both comparisons leave it alone
    inexact = (error > 0) | (error < 0)
    bits = nearest.view(np.int64)
    # the exact value lies between an even ``nearest`` and its odd neighbour on the error's side
    step = np.where((error > 0) == (nearest > 0), 1, -1)
    return (bits + np.where(inexact & ((bits & 1) == 0), step, 0)).view(np.float64)


def sum_to_odd(x: Array, y: Array) -> Array:
    """``x + y`` rounded to odd (finite or special float64 arrays)."""
    s, error = two_sum(x, y)
    return to_odd(s, error) if error.any() else s


def quotient_to_odd(a: Array, b: Array) -> Array:
    """``a / b`` rounded to odd, for float64 arrays that hold float32 values."""
    head = _head(a / b)
    # 26 bits of quotient times 24 bits, and the remainder, are exact
    return _with_sticky(head, (a - head * b) * np.sign(b))


def root_to_odd(a: Array) -> Array:
    """The square root of ``a`` rounded to odd, for a float64 array that holds float32 values."""
    head = _head(np.sqrt(a))
    return _with_sticky(head, a - head * head)


def _head(values: Array) -> Array:
    """The first 26 significant bits."""
    head: Array = (values.view(np.int64) & -(1 << 27)).view(np.float64)
    return head


def _with_sticky(head: Array, remainder: Array) -> Array:
    """An odd number on that side of ``head`` to which ``remainder`` points (NaN: ``head`` is exact)."""
    grows = (remainder > 0) == (head > 0)
    inexact = (remainder > 0) | (remainder < 0)
    odd: Array = (head.view(np.int64) + np.where(inexact, np.where(grows, 1, -1), 0)).view(np.float64)
    return odd


def has_nan(values: Array) -> bool:
    """Whether a float array holds a NaN; one BLAS call, because it runs after every instruction."""
    total = np.vdot(values, values)  # squares: infinities cannot cancel
    return bool(total != total)
