"""What copies do, told item by item and apart from the emulator: plain loops, from PTX ISA ("Tensors" and the
instructions) and the driver API's reference, with what an H200 does where they are silent.
"""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from emulated.copies.case import SPANS, TYPES, Case
from emulated.copies.mbarrier_scripts import script

Bytes = NDArray[np.uint8]

UNIT = 16  # bytes in which the copy engine judges where a row of the tensor ends, when it writes
NAN_FILL = bytes.fromhex("f77f")


def pieces(case: Case, *, writes: bool):
    """(offset in shared memory, offset in the arena or None where out of bounds, bytes) of each item of a
    box, or each half of one that a swizzle takes apart."""
    m = case.map
    span, item = SPANS[m.swizzle], m.item
    steps = m.steps if m.interleave else (1, *m.steps[1:])
    extent = m.dims[0] * item
    if writes:
        extent = -(-extent // UNIT) * UNIT
    for row, outer in enumerate(itertools.product(*(range(n) for n in reversed(m.counts[1:])))):
        index = (0, *reversed(outer))
        inside, start = True, m.offset
        for d in range(1, m.rank):
            at = case.coords[d] + index[d] * steps[d]
            inside = inside and 0 <= at < m.dims[d]
            start += at * m.strides[d - 1]
        for i in range(m.counts[0]):
            at = (case.coords[0] + i * steps[0]) * item
            held = inside and 0 <= at < extent
            for part in range(0, item, 16):
                to = case.offset + row * m.pitch + i * item + part
                if span:
                    line, chunk, rest = to // 128, to % 128 // 16, to % 16
                    to = 128 * line + 16 * (chunk ^ line % (span // 16)) + rest
                yield to, start + at + part if held else None, min(item, 16)


def expected(case: Case) -> bytes:
    """The arena behind a case's kernel."""
    before = case.arena()
    after = before.copy()
    shared_in, shared_out, _, _ = case.places
    after[shared_out : shared_out + case.dump] = before[shared_in : shared_in + case.dump]
    _OPERATIONS[case.kernel.split("_")[0]](case, before, after)
    return after.tobytes()


def _load(case: Case, before: Bytes, after: Bytes) -> None:
    fill = np.frombuffer(NAN_FILL * 8 if case.map.fill else bytes(16), np.uint8)
    template = case.template or case.map
    rounds = "tf32" in TYPES[case.map.kind][0] or "tf32" in TYPES[template.kind][0]
    for to, at, size in pieces(case, writes=False):
        to += case.places[1]
        if at is None:
            after[to : to + size] = fill[:size]
        else:
            item = before[at : at + size]
            after[to : to + size] = tf32(item) if rounds else item
    _completed(case, after)


def tf32(item: Bytes) -> Bytes:
    """FP32 values rounded to the nearest of 10 bits behind the point, of two to the even one."""
    found = []
    for value in item.view(np.float32):
        mantissa, exponent = np.frexp(np.float64(value))
        digits = max(exponent, -125) - 11  # of the last bit
        whole = np.round(np.ldexp(np.float64(value), -digits))
        with np.errstate(over="ignore"):
            bits = np.float32(np.ldexp(whole, digits)).view(np.uint32)
        if np.isnan(value):
            found.append(0x7FFFE000)
        else:
            found.append(int(bits if np.isfinite(mantissa) else value.view(np.uint32)))
    return np.array(found, np.uint32).view(np.uint8)


def _completed(case: Case, after: Bytes) -> None:
    """What a kernel that waits for an mbarrier tells: that its phase ended."""
    after[case.places[2] :][:4] = [1, 0, 0, 0]


def _store(case: Case, before: Bytes, after: Bytes) -> None:
    for to, at, size in pieces(case, writes=True):
        if at is not None:
            to += case.places[0]
            after[at : at + size] = before[to : to + size]


def _reduce(case: Case, before: Bytes, after: Bytes) -> None:
    operation, kind = case.kernel.split("_")[1], TYPES[case.map.kind][0]
    for to, at, size in pieces(case, writes=True):
        if at is not None:
            to += case.places[0]
            after[at : at + size] = reduced(operation, kind, before[at : at + size], before[to : to + size])


def _bulk(case: Case, before: Bytes, after: Bytes) -> None:
    what = case.kernel.split("_")[1]
    size, start, shared = case.size, case.start, case.places[0] + case.offset
    if what == "load":
        to = case.places[1] + case.offset
        after[to : to + size] = before[start : start + size]
        _completed(case, after)
    elif what == "within":
        to = case.places[1] + case.extra
        after[to : to + size] = before[shared : shared + size]
        _completed(case, after)
    elif what == "store":
        after[start : start + size] = before[shared : shared + size]
    elif what != "prefetch":
        kind = case.kernel.split("_")[2]
        width = 2 if kind == "bf16" else int(kind[1:]) // 8
        for i in range(0, size, width):
            old, new = before[start + i :][:width], before[shared + i :][:width]
            after[start + i : start + i + width] = reduced(what, kind, old, new)


def _cp_async(case: Case, before: Bytes, after: Bytes) -> None:
    size = int(case.kernel.split("_")[3])
    for lane in range(32):
        taken = (lane + case.extra) % (size + 1)
        to, at = case.places[1] + case.offset + 16 * lane, case.start + lane * size
        after[to : to + size] = 0
        after[to : to + taken] = before[at : at + taken]


def _mbarrier(case: Case, before: Bytes, after: Bytes) -> None:
    words = np.array(script(int(case.kernel.split("_")[1]))[1], np.uint32).view(np.uint8)
    after[case.places[2] :][: len(words)] = words


def _nothing(case: Case, before: Bytes, after: Bytes) -> None:
    pass


_OPERATIONS = {
    "load": _load,
    "replace": _load,
    "store": _store,
    "reduce": _reduce,
    "prefetch": _nothing,
    "bulk": _bulk,
    "cp": _cp_async,
    "mbarrier": _mbarrier,
}
_FLOATS = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64}
_NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF}


def reduced(operation: str, kind: str, old: Bytes, new: Bytes) -> Bytes:
    """One element of a reduction: bytes of it."""
    if kind in _FLOATS:
        return _reduced_float(operation, kind, old, new)
    signed = kind[0] == "s"
    x, y = (int.from_bytes(value.tobytes(), "little", signed=signed) for value in (old, new))
    found = {
        "add": lambda: x + y,
        "min": lambda: min(x, y),
        "max": lambda: max(x, y),
        "inc": lambda: 0 if x >= y else x + 1,
        "dec": lambda: y if x == 0 or x > y else x - 1,
        "and": lambda: x & y,
        "or": lambda: x | y,
        "xor": lambda: x ^ y,
    }[operation]()
    return _bytes(found % (1 << 8 * len(old)), len(old))


def _reduced_float(operation: str, kind: str, old: Bytes, new: Bytes) -> Bytes:
    with np.errstate(invalid="ignore"):  # of signalling NaNs
        return _combined(operation, kind, old, new)


def _combined(operation: str, kind: str, old: Bytes, new: Bytes) -> Bytes:
    x, y = (value.view(_FLOATS[kind])[0] for value in (old, new))
    if operation == "add":
        if kind == "f64" and (np.isnan(x) or np.isnan(y)):
            return new if np.isnan(y) else old  # as it is, not made quiet
        with np.errstate(all="ignore"):
            # float64 has over twice the digits of the others, so that rounding twice rounds once.
            found = np.array([np.float64(x) + np.float64(y)]).astype(_FLOATS[kind])
        if not np.isnan(found[0]):
            return found.view(np.uint8)
        return _bytes(_NAN[kind] if kind != "f64" else 0xFFF8 << 48, len(old))
    if np.isnan(x) and np.isnan(y):
        return _bytes(_NAN[kind], len(old))
    if np.isnan(x) or np.isnan(y):
        return new if np.isnan(x) else old
    smaller = np.signbit(x) if x == y else x < y  # zeros may have two signs
    return old if bool(smaller) == (operation == "min") else new


def _bytes(value: int, size: int) -> Bytes:
    return np.frombuffer(value.to_bytes(size, "little"), np.uint8)
