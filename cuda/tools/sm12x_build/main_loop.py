"""What a main loop is made of: the innermost loops with MMAs in SASS, and their instructions per k-tile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import BuildError
from .header_matrix import Entry
from .sass import Instruction, Kernel, loops_among

_MMA_M, _MMA_N, _MMA_K = 16, 8, 32


@dataclass(frozen=True)
class Mix:
    """Instructions that one MMA warp issues for one k-tile."""

    mma: float
    ldsm: float
    other: float
    k_tiles_per_iteration: int


def innermost_mma_loops(kernel: Kernel, *, with_waits: bool = False) -> list[list[Instruction]]:
    """The loops with MMAs that hold no smaller loop with MMAs. Smaller loops in them are retries of waits and
    are left out unless ``with_waits``.
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
            kept = loop if with_waits else loop - set().union(*inner)
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
    ldsm = sum(instruction.name == "LDSM" for instruction in loop)
    k_tiles, rest = divmod(mma, mma_per_k_tile(entry))
    if rest or not k_tiles:
        raise BuildError(f"{entry.name}: {mma} MMAs a loop, {mma_per_k_tile(entry)} a k-tile")
    return Mix(mma / k_tiles, ldsm / k_tiles, (len(loop) - mma - ldsm) / k_tiles, k_tiles)


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
