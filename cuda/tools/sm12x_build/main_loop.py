"""What a main loop is made of: the innermost loops with MMAs in SASS, and their instructions per k-tile; of
header programs and of shipped cubins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from . import BuildError
from .header_matrix import Entry
from .sass import Instruction, Kernel, loops_among

_MMA_M, _MMA_N, _MMA_K = 16, 8, 32


PACKED = "fp8_packed"


@dataclass(frozen=True)
class Mix:
    """Instructions that one MMA warp issues for one k-tile. ``nop``: of the others, those that do nothing."""

    mma: float
    ldsm: float
    other: float
    k_tiles_per_iteration: int
    nop: float = 0.0

    @property
    def slots_per_mma(self) -> float:
        """Issue slots that the loop takes for one MMA."""
        return (self.mma + self.ldsm + self.other) / self.mma


@dataclass(frozen=True)
class ShippedLoop:
    """A main loop of a shipped kernel, for a ``part`` of its tile: 1, or less where it skips atoms that hold
    nothing. ``step``: another loop for the same part takes more k-tiles at a time.
    """

    part: Fraction
    step: bool
    mix: Mix


ShippedRow = tuple[Mapping[str, Any], int, ShippedLoop]
"""A manifest entry, registers, and one of the kernel's main loops."""


def innermost_mma_loops(kernel: Kernel, *, with_waits: bool = False) -> list[list[Instruction]]:
    """The loops with MMAs that hold no smaller loop with MMAs. Smaller loops in them are retries of waits and
    are left out unless ``with_waits``, and so is the way back from a retry that lies out of line.
    """
    successors = kernel.successors()
    waiting = loops_among(set(range(len(successors))), successors)
    found = []
    while waiting:
        loop = waiting.pop()
        if not any(kernel.instructions[index].is_mma for index in loop):
            continue
        inner = _loops_inside(loop, successors)
        if any(kernel.instructions[index].is_mma for smaller in inner for index in smaller):
            waiting.extend(inner)
        else:
            kept = loop
            if not with_waits:
                kept = loop - set().union(*inner)
                without_ways_back = loops_among(kept, successors)
                # Where a retry lies in line, nothing goes round without it.
                kept = without_ways_back[0] if len(without_ways_back) == 1 else kept
            found.append([kernel.instructions[index] for index in sorted(kept)])
    return sorted(found, key=lambda loop: loop[0].address)


def _loops_inside(loop: set[int], successors: list[set[int]]) -> list[set[int]]:
    """The loops left once the edges back to where ``loop`` is entered are cut."""
    heads = {
        target
        for node, targets in enumerate(successors)
        if node not in loop
        for target in targets
        if target in loop
    }
    heads = heads or {min(loop)}
    cut = [targets - heads if node in loop else targets for node, targets in enumerate(successors)]
    return loops_among(loop, cut)


def mma_per_k_tile(entry: Entry) -> int:
    """MMAs of m16n8k32 that each MMA warp issues for one k-tile of ``entry``."""
    m, n, k = entry.tile
    total = (m // _MMA_M) * (n // _MMA_N) * (k // _MMA_K)
    if total % entry.mma_warps:
        raise BuildError(f"{entry.name}: {total} MMAs do not spread over {entry.mma_warps} warps")
    return total // entry.mma_warps


def mix_of(entry: Entry, kernel: Kernel) -> Mix:
    """Instructions per k-tile in the main loop of ``entry``. Raises BuildError where it is not one loop over
    whole k-tiles.
    """
    loops = innermost_mma_loops(kernel)
    if len(loops) != 1:
        raise BuildError(f"{entry.name}: expected one main loop, found {len(loops)}")
    (loop,) = loops
    mma = sum(instruction.is_mma for instruction in loop)
    k_tiles, rest = divmod(mma, mma_per_k_tile(entry))
    if rest or not k_tiles:
        raise BuildError(f"{entry.name}: {mma} MMAs a loop, {mma_per_k_tile(entry)} a k-tile")
    return _mix(loop, k_tiles)


def _mix(loop: Sequence[Instruction], k_tiles: int) -> Mix:
    mma = sum(instruction.is_mma for instruction in loop)
    ldsm = sum(instruction.name == "LDSM" for instruction in loop)
    nop = sum(instruction.name == "NOP" for instruction in loop)
    other = len(loop) - mma - ldsm
    return Mix(mma / k_tiles, ldsm / k_tiles, other / k_tiles, k_tiles, nop / k_tiles)


def table(rows: Sequence[tuple[Entry, tuple[Mix, dict[str, Any]]]], tools: Mapping[str, str]) -> str:
    """The table in Markdown: one row per program, unit-scale and plain below each other."""
    lines = [
        "Instructions that one MMA warp issues per k-tile, from the SASS for `sm_120a`: the innermost loop "
        f"with MMAs, without the retries of a wait (nvcc {tools['nvcc']}, ptxas -O3, CUTLASS "
        f"{tools['cutlass']}; e4m3 x e4m3, bf16 out, TMA epilogue). Written by `python "
        "cuda/tools/main_loop.py`.",
        "",
        "| tile | schedule | MMA | MMAs | `LDSM` | other | stages | registers at launch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry, (mix, facts) in rows:
        tile = "x".join(str(number) for number in entry.tile)
        schedule = "Pingpong" if entry.is_pingpong else "Cooperative"
        opcodes = ", ".join(f"`{opcode}`" for opcode in facts["mma"])
        numbers = " | ".join(f"{number:g}" for number in (mix.mma, mix.ldsm, mix.other))
        registers = facts["O3"]["registers"]
        lines.append(f"| {tile} | {schedule} | {opcodes} | {numbers} | {facts['stages']} | {registers} |")
    return "\n".join(lines) + "\n"


def shipped_loops(variant: Mapping[str, Any], kernel: Kernel) -> list[ShippedLoop]:
    """The main loops of a shipped GEMM kernel for SM12x with its manifest entry ``variant``, whose
    ``mma_warps`` share a tile: full tiles first, then most k-tiles at a time.

    Every MMA warp releases each k-tile's stage once, which tells how many k-tiles an iteration takes. Raises
    BuildError where there is no loop for the whole tile, or one that does not fit it.
    """
    m, n, k = variant["tile"]
    full = Fraction((m // _MMA_M) * (n // _MMA_N) * (k // _MMA_K), variant["mma_warps"])
    found: list[tuple[Fraction, Mix]] = []
    for loop in innermost_mma_loops(kernel):
        mma = sum(instruction.is_mma for instruction in loop)
        k_tiles = sum(instruction.opcode.startswith("SYNCS.ARRIVE") for instruction in loop)
        if not k_tiles or mma % (k_tiles * (k // _MMA_K)) or mma > k_tiles * full:
            raise BuildError(f"{kernel.name}: {mma} MMAs and {k_tiles} k-tiles a loop, {full} MMAs a k-tile")
        found.append((Fraction(mma, k_tiles) / full, _mix(loop, k_tiles)))
    most: dict[Fraction, int] = {}
    for part, mix in found:
        most[part] = max(most.get(part, 0), mix.k_tiles_per_iteration)
    if Fraction(1) not in most:
        raise BuildError(f"{kernel.name}: no main loop for a full tile")
    loops = [ShippedLoop(part, mix.k_tiles_per_iteration < most[part], mix) for part, mix in found]
    return sorted(loops, key=lambda each: (-each.part, -each.mix.k_tiles_per_iteration))


def read_shipped(
    manifest: Mapping[str, Any],
    code_of: Callable[[str], Kernel],
    *,
    target: str = "sm_120a",
    major: str = "cu13",
) -> list[ShippedRow]:
    """The main loops of the shipped packed kernels, swapped ones first, large k-tiles first, small tiles
    first. ``code_of``: the code of a cubin by its path in cubins/. Raises BuildError where there is no such
    kernel.
    """
    packed = [
        variant
        for variant in manifest["variants"].values()
        if variant["family"] == PACKED and variant["role"] == "gemm"
    ]
    rows = []
    for variant in sorted(packed, key=_table_order):
        cubin = variant["targets"][target]["cubins"][major]
        loops = shipped_loops(variant, code_of(cubin["path"]))
        rows += [(variant, int(cubin["registers"]), loop) for loop in loops]
    if not rows:
        raise BuildError(f"the manifest lists no GEMM kernel of the family {PACKED}")
    return rows


def _table_order(variant: Mapping[str, Any]) -> tuple[bool, int, int, int]:
    m, n, k = variant["tile"]
    return not variant["swap_ab"], -k, m * n, n


def shipped_table(rows: Sequence[ShippedRow], tools: Mapping[str, str]) -> str:
    """The table of shipped kernels in Markdown: a main loop a row."""
    lines = [
        "The same of the shipped kernels of the family `fp8_packed` (`cubins/cu13`, ptxas "
        f"{tools['ptxas_cu13']} -O2). Issue slots: of all instructions of the loop, per MMA; ptxas 12.9 "
        "puts a NOP behind most of them, in every kernel (`cubins/cu12`). Of a tile that is not full, some "
        "compute a part. Written by `python cuda/tools/main_loop.py --shipped`.",
        "",
        "| tile | schedule | part | k-tiles at a time | MMAs | `LDSM` | other | issue slots per MMA "
        "| stages | registers |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for variant, registers, loop in rows:
        tile = "x".join(str(number) for number in variant["tile"]) + (
            " swapped" if variant["swap_ab"] else ""
        )
        mix = loop.mix
        numbers = " | ".join(f"{number:.4g}" for number in (mix.mma, mix.ldsm, mix.other, mix.slots_per_mma))
        lines.append(
            f"| {tile} | {variant['schedule'].capitalize()} | {loop.part} | {mix.k_tiles_per_iteration} "
            f"| {numbers} | {variant['stages']} | {registers} |"
        )
    return "\n".join(lines) + "\n"
