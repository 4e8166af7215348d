"""The numbers of the model, each with where it comes from.

"Measured", "fitted" and "sought" are from a file of tests/benchmarks/results; fitted and sought numbers are
what fit_select.py makes of it. "DESIGN 2" is that section's facts and table of devices. "Assumed" is what
nobody measured. None of it was measured on SM12x by us.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    quantised    clocks for each 16 values that the quantising warps make
    handed       clocks of the gathering warp for each k-tile besides: 32 arrivals at one barrier
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
    quantised: float
    handed: float
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
    quantises     makes e4m3 of rows of two bytes itself
    held_rows     tiles of so many rows hold their codes for all pieces that share them, where K is at most
    held_k        so large (sm12x/kernel/quantised_rows.hpp); 0: none
    skips_k       does not compute the part of a k-tile that lies past K
    prepared      groups of a list call that one launch of its preparation kernel takes (a packed call needs
                  one launch); 0 where it needs none
    start         microseconds from the kernel's beginning to its first load and from its last load to its end
    setup         microseconds for which each expert that a CTA turns to keeps its loads waiting
    cut           microseconds for each k-tile of 128 features that the end of a run of strips cuts: two short
                  pieces take longer than one of both their sizes
    hollow        part of the time to read it that the part of a k-tile past K costs: it fills a stage
    tile          microseconds of the MMA warps for each tile besides its values
    hold          microseconds for which holding codes keeps an expert's first tile waiting
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
    cut: float
    hollow: float
    tile: float
    quantises: bool = False
    held_rows: int = 0
    held_k: int = 0
    hold: float = 0.0


FAMILIES = {
    "fp8_ptr_array": Family(
        kinds=("packed", "list"),
        gathers=False,
        weights_rows=False,
        splits=False,
        runs=False,
        skips_k=False,
        prepared=340,  # SM12X_LIST_CAPACITY of abi.h
        # Fitted, 2026-11-22_grouped_gemm_h200.json.
        start=2.4,
        setup=1.1,  # tensor maps rewritten, fenced and fetched anew
        cut=0.0,
        hollow=0.0,
        tile=0.35,
    ),
    "fp8_packed": Family(
        kinds=("packed", "masked"),
        gathers=True,
        weights_rows=True,
        splits=True,
        runs=True,
        skips_k=True,
        prepared=0,
        # Sought, 2026-11-23_forced_h200.json.
        start=0.67,  # fitted to an earlier kernel, held by the search
        setup=0.001,
        cut=0.2,
        hollow=0.24,
        tile=0.54,
    ),
}
# Of calls that load their weights early. Sought: EARLY_RATES says on what.
EARLY_FAMILIES = {"fp8_packed": replace(FAMILIES["fp8_packed"], cut=0.074, hollow=0.0055, tile=0.077)}
# On the same kernel layer, and always early; its constants are taken for theirs.
_packed = EARLY_FAMILIES["fp8_packed"]
FAMILIES["fp8_up"] = replace(_packed, kinds=("packed",), weights_rows=False)
FAMILIES["fp8_down"] = replace(
    _packed,
    kinds=("packed",),
    gathers=False,
    quantises=True,
    held_rows=16,
    held_k=768,
    # Measured, H200, 2026-11-23: layers of 2 to 16 tokens took 1 to 2 longer with tiles of 16 rows, whose
    # CTAs turn to one or two experts, than with 8.
    hold=0.8,
)

RATES = {
    # "Sought": what loses least on 2026-11-23_forced_h200.json, every packed variant forced on 60 rows:
    # fit_select.py --search 800 --seed 7 --fit l2,mma,operand,k_tile,value,overlap,fix_up,cut,hollow,tile,
    # and then `fix_up` 1.6 instead of 2.16 by hand, for split-K rows that later kernels do faster. Single
    # constants are less exact than where they are fitted to times. "Measured":
    # 2026-11-22_grouped_gemm_h200.json.
    "sm_90a": Rates(
        clock=1.92,  # DESIGN 2: 512 bytes in 29.5 clocks for each of 132 SMs at 4400 GB/s
        sm=46.0,  # fitted before the search: 2.6 times the fair share
        l2=20.9,  # sought
        mma=1378.0,  # sought, with `operand`
        operand=0.0158,  # sought
        k_tile=72.0,  # sought
        value=0.49,  # sought
        # Both from tiles of 64 features and of 8, 16 and 64 tokens, which gathering bounds: measured by hand.
        gathered=2.0,
        # Between what 2026-11-23_layer_h200_chain.json says (125 us of GEMM2, Mixtral at T = 32, tiles of 16
        # tokens) and the same with later kernels (150): such layers took 369 us so, 349 quantised apart.
        quantised=9.0,
        handed=450.0,
        launch=2.5,  # measured: the read floor of no bytes at all, 2.3 to 2.7
        next_launch=2.5,  # assumed: as the first
        lookup=0.7,  # assumed: a trip to DRAM
        fix_up=1.6,  # sought
        overlap=0.036,  # sought
    ),
    # Nothing of it measured. What the SM's data sheet does not say is assumed: about what the twin had when
    # it was written down; the twin's microseconds of a family are taken for SM12x's too.
    "sm_120a": Rates(
        clock=2.4,  # boost clocks of the data sheets, 2.4 to 2.6
        sm=40.0,  # assumed: about the twin's
        l2=20.0,  # assumed
        mma=1024.0,  # DESIGN 2: 2048 FLOP a clock with unit scales
        operand=0.0,  # nothing is converted
        k_tile=57.0,
        value=0.3,
        gathered=2.0,
        quantised=9.0,
        handed=450.0,
        launch=2.5,
        next_launch=2.5,
        lookup=0.7,
        fix_up=2.0,
        overlap=0.09,
    ),
}
RATES["sm_121a"] = RATES["sm_120a"]  # the same SM; what differs is DRAM, below

# Of calls that load their weights early, where they differ. Sought: what loses least on the 48 rows of
# 2026-11-24_forced_h200.json (up to 128 tokens, early) and the 12 of 2026-11-23_forced_h200.json past them
# (not early): fit_select.py --early --search 600 --seed 7
# --fit l2,mma,operand,k_tile,value,overlap,fix_up,cut,hollow,tile (0.84 % lost; 1.49 with the others).
EARLY_RATES = {
    "sm_90a": replace(
        RATES["sm_90a"],
        **{"l2": 18.5, "mma": 1233.0, "operand": 0.0221, "k_tile": 16.8, "value": 0.415},
        **{"fix_up": 0.35, "overlap": 0.004},
    )
}


def rates_of(arch: str, early: bool) -> Rates:
    """Of calls that load their weights early, or of others. Raises KeyError where there are none."""
    return EARLY_RATES.get(arch, RATES[arch]) if early else RATES[arch]


def family_of(name: str, early: bool) -> Family:
    """The same of a family."""
    return EARLY_FAMILIES.get(name, FAMILIES[name]) if early else FAMILIES[name]


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
