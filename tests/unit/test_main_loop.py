"""Finding the main loop in SASS and counting it: planted listings, no toolchain needed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Appended, not put in front: build.py and wheel.py there must not hide packages of those names.
sys.path.append(str(ROOT / "cuda" / "tools"))

from sm12x_build import BuildError, header_compile, main_loop, sass  # noqa: E402
from sm12x_build.header_matrix import Entry  # noqa: E402

MMA = "QMMA.SF.16832.F32.E4M3.E4M3.E8 R8, R4, R12, R8, R1, R1, UR4"
# A loop over tiles holds a k-loop, which waits in a loop of its own, and another MMA after the k-loop.
LISTING = """
\t.section\t.text.planted,"ax",@progbits
planted:
.text.planted:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_tile:
        /*0010*/                   {in_tile} ;
.L_k:
        /*0020*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0030*/                   {in_k} ;
        /*0040*/                   QMMA ;
        /*0050*/                   QMMA ;
.L_wait:
        /*0060*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;
        /*0070*/             @!P0 BRA `(.L_wait) ;
        /*0080*/              @P1 BRA `(.L_k) ;
        /*0090*/                   QMMA ;
        /*00a0*/              @P2 BRA `(.L_tile) ;
        /*00b0*/                   EXIT ;
\t.section\t.nv.info,"",@"SHT_CUDA_INFO"
"""


def _planted(in_tile: str = "NOP", in_k: str = "NOP") -> sass.Kernel:
    listing = LISTING.replace("{in_tile}", in_tile).replace("{in_k}", in_k).replace("QMMA ;", MMA + " ;")
    (kernel,) = sass.parse(listing)
    return kernel


# 2 MMAs a k-tile: 4 warps share 1 x 1 x 8 of them.
ENTRY = Entry("x", "pingpong", (16, 8, 256))


def test_main_loop_is_the_innermost_one_without_its_waits() -> None:
    (loop,) = main_loop.innermost_mma_loops(_planted())
    assert [instruction.address for instruction in loop] == [0x20, 0x30, 0x40, 0x50, 0x80]
    (loop,) = main_loop.innermost_mma_loops(_planted(), with_waits=True)
    assert [instruction.address for instruction in loop] == [*range(0x20, 0x90, 0x10)]


def test_instructions_are_counted_per_k_tile() -> None:
    assert main_loop.mma_per_k_tile(ENTRY) == 2
    assert main_loop.mix_of(ENTRY, _planted()) == main_loop.Mix(2.0, 1.0, 2.0, 1)
    half = Entry("x", "pingpong", (16, 8, 128))
    assert main_loop.mix_of(half, _planted()) == main_loop.Mix(1.0, 0.5, 1.0, 2)


def test_loop_of_broken_k_tiles_is_refused() -> None:
    with pytest.raises(BuildError, match="2 MMAs a loop, 4 a k-tile"):
        main_loop.mix_of(Entry("x", "pingpong", (16, 8, 512)), _planted())
    with pytest.raises(BuildError, match="do not spread"):
        main_loop.mma_per_k_tile(Entry("x", "pingpong", (16, 8, 32)))


@pytest.mark.parametrize(
    ("place", "in_main_loop"), [({"in_tile": "LDL R2, [R1]"}, 0), ({"in_k": "STL [R1], R2"}, 1)]
)
def test_local_memory_is_told_apart_by_loop(place: dict[str, str], in_main_loop: int) -> None:
    code = header_compile.describe_code(_planted(**place))
    assert code["local_in_main_loop"] == in_main_loop
    assert code["local_in_mma_loops"] == 1
    assert code["main_loops"] == 1


def test_kernel_without_a_loop_has_no_main_loop() -> None:
    kernel = _planted()
    straight = sass.Kernel("k", tuple(i for i in kernel.instructions if i.name != "BRA"), {})
    assert main_loop.innermost_mma_loops(straight) == []
    with pytest.raises(BuildError, match="found 0"):
        main_loop.mix_of(ENTRY, straight)


def test_table_has_a_row_for_every_program() -> None:
    facts = {"mma": ["QMMA.SF"], "stages": 3, "O3": {"registers": 168}}
    text = main_loop.table(
        [(ENTRY, (main_loop.Mix(2.0, 0.5, 2.0, 1), facts))], {"nvcc": "13", "cutlass": "4"}
    )
    assert "| 16x8x256 | Pingpong | `QMMA.SF` | 2 | 0.5 | 2 | 3 | 168 |" in text
