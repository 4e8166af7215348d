"""What a tensor copy does, told element by element and apart from the emulator: plain loops over the items of a
box, from PTX ISA ("Tensors") and the driver API's reference, with what an H200 does where they are silent.
"""

from __future__ import annotations

import itertools

import numpy as np

from emulated.copies.case import SPANS, TYPES, Case

UNIT = 16  # bytes in which the copy engine judges where a row of the tensor ends, when it writes
NAN_FILL = bytes.fromhex("f77f")


def pieces(case: Case, *, writes: bool):
    """(offset in shared memory, offset in the arena or None where out of bounds, bytes) of each item of a box,
    or each half of one that a swizzle takes apart."""
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
    """The arena behind a load or a store."""
    before = case.arena()
    after = before.copy()
    shared_in, shared_out, result, _ = case.places
    after[shared_out : shared_out + case.dump] = before[shared_in : shared_in + case.dump]
    item = case.map.item
    if case.kernel.startswith("load"):
        fill = np.frombuffer(NAN_FILL * 8 if case.map.fill else bytes(16), np.uint8)
        for to, at, size in pieces(case, writes=False):
            content = fill[:size] if at is None else before[at : at + size]
            after[shared_out + to : shared_out + to + size] = content
        after[result : result + 4] = np.frombuffer((1).to_bytes(4, "little"), np.uint8)
    elif case.kernel.startswith("store"):
        for to, at, size in pieces(case, writes=True):
            if at is not None:
                after[at : at + size] = before[shared_in + to : shared_in + to + size]
    elif case.kernel.startswith("reduce"):
        _, operation, _ = case.kernel.split("_")
        name = TYPES[case.map.kind][0]
        word = np.dtype(f"{'i' if name[0] == 's' else 'u'}{item}")
        for to, at, _ in pieces(case, writes=True):
            if at is not None:
                old = before[at : at + item].view(word)
                new = before[shared_in + to : shared_in + to + item].view(word)
                after[at : at + item] = reduced(operation, old, new, word).view(np.uint8)
    return after.tobytes()


def reduced(operation: str, old, new, word) -> np.ndarray:
    """An integer reduction; Python's integers, cut to the word."""
    x, y = int(old[0]), int(new[0])
    bits = 8 * word.itemsize
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
    return np.array([found & (1 << bits) - 1], f"u{word.itemsize}")
