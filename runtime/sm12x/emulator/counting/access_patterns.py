"""What a warp's access costs in shared-memory wavefronts and in sectors of global memory.

Shared memory has 32 banks of 4 bytes; a wavefront serves one word of each. Threads that touch the same word
do not conflict. A warp's access of up to 4 bytes a thread goes in one phase; of 8 bytes in two, by half
warps; of 16 bytes in four, by quarter warps (CUDA C++ Programming Guide 8.0, "Shared Memory" of compute
capability 5.x, and of 2.x for 64 and 128 bits: later editions say nothing of these). `ldmatrix` and
`stmatrix` take one phase for each 8 rows of 16 bytes (PTX ISA, "ldmatrix": 8 threads give the rows of one
matrix). A phase needs as many wavefronts as the bank with most distinct words has of them, and one at least:
what exceeds the number of phases is conflicts. This is a rule from documents; nobody here has an SM12x to
measure it on.

Global memory moves in sectors of 32 bytes (CUDA C++ Best Practices Guide, "Coalesced Access to Global
Memory").
"""

from __future__ import annotations

import numpy as np

from ..memory import Array

BANKS = 32
BANK_BYTES = 4
SECTOR_BYTES = 32
MATRIX_ROWS = 8  # rows of a matrix that go in one phase


def phase_lanes(size: int) -> int:
    """Lanes whose accesses of `size` bytes each go in one phase."""
    return min(32, BANKS * BANK_BYTES // size)


def wavefronts(address: Array, active: Array, size: int, lanes: int) -> tuple[int, int]:
    """Wavefronts that accesses to shared memory need, and how many they need at least.

    address: (n, threads) int64, one access a row; active: bool of the same shape; `size` bytes for each
    thread; `lanes`, which divides `threads`, of them go in one phase.
    """
    address, active = address.reshape(-1, lanes), active.reshape(-1, lanes)
    taking = active.any(axis=1)
    if not taking.all():
        address, active = address[taking], active[taking]
    if not len(address):
        return 0, 0
    words = np.arange(max(1, size // BANK_BYTES))
    word = (_everywhere(address, active)[:, :, None] // BANK_BYTES + words).reshape(len(address), -1)
    word.sort(axis=1)
    distinct = np.ones(word.shape, bool)
    distinct[:, 1:] = word[:, 1:] != word[:, :-1]
    slot = (word % BANKS + np.arange(len(word))[:, None] * BANKS)[distinct]
    by_bank = np.bincount(slot, minlength=len(word) * BANKS).reshape(-1, BANKS)
    return int(by_bank.max(axis=1).sum()), len(word)


def sectors(address: Array, active: Array) -> int:
    """Sectors of global memory that accesses touch, each row of (n, 32) addresses for itself. No thread's
    access lies in two, as accesses are aligned and of at most 32 bytes.
    """
    taking = active.any(axis=1)
    if not taking.any():
        return 0
    sector = _everywhere(address[taking], active[taking]) // SECTOR_BYTES
    sector.sort(axis=1)
    return int(len(sector) + np.count_nonzero(sector[:, 1:] != sector[:, :-1]))


def _everywhere(address: Array, active: Array) -> Array:
    """Addresses in which threads that take no part have that of one in their row that does."""
    if active.all():
        return address
    first = address[np.arange(len(address)), active.argmax(axis=1)]
    found: Array = np.where(active, address, first[:, None])
    return found
