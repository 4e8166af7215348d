"""The numbers of the model, each with where it comes from.

"measured" and "fitted" name a file of tests/benchmarks/results; fitted numbers are what fit_select.py makes
of it. "DESIGN 2" is that section's table of devices. "assumed" is what nobody measured. None of it was
measured on SM12x by us.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Rates:
    """An architecture. Clocks are those of one SM.

    clock        GHz
    sm           bytes a clock that one SM pulls at most, however idle the others are
    l2           bytes a clock that each SM gets from L2 when all do
    mma          FP8 multiply-adds a clock
    operand      clocks for each byte of weights before it can be multiplied (the twin converts to FP16)
    k_tile       clocks of the MMA warps for each k-tile besides (barriers, ldmatrix)
    value        clocks of the epilogue for each value of a tile
    gathered     clocks for each 16 bytes that the gathering warp copies
    launch       microseconds of one launch in a CUDA graph, ramp included
    next_launch  microseconds of another one in the same call
    lookup       microseconds to read the row index before the first rows
    fix_up       microseconds in which a CTA hands its part of a tile in and the last one finds the others'
    overlap      part of the shorter concurrent terms that does not hide behind the longest one
    """

    clock: float
    sm: float
    l2: float
    mma: float
    operand: float
    k_tile: float
    value: float
    gathered: float
    launch: float
    next_launch: float
    lookup: float
    fix_up: float
    overlap: float


@dataclass(frozen=True, slots=True)
class Family:
    """What the kernels of a family can do, and what their way of working costs.

    kinds         of problems
    gathers       takes a row index
    weights_rows  takes row weights
    splits        can split K
    runs          its swapped kernels take runs of feature strips, all others tiles in turns
    skips_k       does not compute the part of a k-tile that lies past K
    prepared      groups of a list call that one launch of its preparation kernel takes (a packed call needs
                  one launch); 0 where it needs none
    start         microseconds from the kernel's beginning to its first load and from its last load to its end
    setup         microseconds for which each expert that a CTA turns to keeps its loads waiting
    tile          microseconds of the MMA warps for each tile besides its values
    """

    kinds: tuple[str, ...]
    gathers: bool
    weights_rows: bool
    splits: bool
    runs: bool
    skips_k: bool
    prepared: int
    start: float
    setup: float
    tile: float


FAMILIES = {
    "fp8_ptr_array": Family(
        kinds=("packed", "list"),
        gathers=False,
        weights_rows=False,
        splits=False,
        runs=False,
        skips_k=False,
        prepared=340,  # SM12X_LIST_CAPACITY
        start=2.4,
        setup=1.2,
        tile=0.38,
    ),
    "fp8_packed": Family(
        kinds=("packed", "masked"),
        gathers=True,
        weights_rows=True,
        splits=True,
        runs=True,
        skips_k=True,
        prepared=0,
        start=1.5,
        setup=0.05,
        tile=0.38,
    ),
}

RATES = {
    "sm_90a": Rates(
        clock=1.92,
        sm=45.0,
        l2=30.0,
        mma=1050.0,
        operand=0.015,
        k_tile=60.0,
        value=0.2,
        gathered=2.0,
        launch=2.5,
        next_launch=2.5,
        lookup=0.7,
        fix_up=2.0,
        overlap=0.08,
    ),
    "sm_120a": Rates(
        clock=2.4,
        sm=40.0,
        l2=20.0,
        mma=1024.0,
        operand=0.0,
        k_tile=60.0,
        value=0.2,
        gathered=2.0,
        launch=2.5,
        next_launch=2.5,
        lookup=0.7,
        fix_up=2.0,
        overlap=0.08,
    ),
}
RATES["sm_121a"] = RATES["sm_120a"]  # the same SM; what differs is DRAM, below

# GB/s that a read-only kernel gets from DRAM, by SM count: all that the model knows of a part.
DRAM = {
    "sm_90a": {132: 4350.0},  # H200, measured 4241 to 4500; an H100 has as many SMs and less bandwidth
    "sm_120a": {  # DESIGN 2, 0.94 of the data sheet as on the H200: assumed
        36: 0.94 * 448.0,  # RTX 5060 Ti
        170: 0.94 * 1792.0,  # RTX 5090
        188: 0.94 * 1792.0,  # RTX PRO 6000
    },
    "sm_121a": {48: 232.0},  # GB10, DESIGN 2: 231 to 234 measured by others
}


def dram(arch: str, sms: int) -> float:
    """GB/s of the part of `arch` that has `sms` SMs. For a count that is not in the table: on the line
    between its neighbours, and beyond them the nearest part's bandwidth for each SM. That is assumed.

    Raises KeyError for an architecture without rates.
    """
    known = sorted(DRAM[arch].items())
    if sms <= known[0][0]:
        return known[0][1] * sms / known[0][0]
    for (below, low), (above, high) in pairwise(known):
        if sms <= above:
            return low + (high - low) * (sms - below) / (above - below)
    return known[-1][1] * sms / known[-1][0]
