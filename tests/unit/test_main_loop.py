"""Finding the main loop in SASS and counting it: planted listings, no toolchain needed."""

from __future__ import annotations

import sys
from fractions import Fraction
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


# The same with the retry out of line, as where ptxas expects the stage to be there.
OUT_OF_LINE = """
\t.section\t.text.planted,"ax",@progbits
planted:
.text.planted:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_k:
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;
        /*0020*/             @!P0 BRA `(.L_retry) ;
.L_back:
        /*0030*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0040*/                   QMMA ;
        /*0050*/                   SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R2], RZ ;
        /*0060*/              @P1 BRA `(.L_k) ;
        /*0070*/                   EXIT ;
.L_retry:
        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;
        /*0090*/             @!P0 BRA `(.L_retry) ;
        /*00a0*/                   BRA `(.L_back) ;
\t.section\t.nv.info,"",@"SHT_CUDA_INFO"
"""


def _out_of_line() -> sass.Kernel:
    (kernel,) = sass.parse(OUT_OF_LINE.replace("QMMA ;", MMA + " ;"))
    return kernel


# 2 MMAs a k-tile: 4 warps share 1 x 1 x 8 of them.
ENTRY = Entry("x", "pingpong", (16, 8, 256))


def test_main_loop_is_the_innermost_one_without_its_waits() -> None:
    (loop,) = main_loop.innermost_mma_loops(_planted())
    assert [instruction.address for instruction in loop] == [0x20, 0x30, 0x40, 0x50, 0x80]
    (loop,) = main_loop.innermost_mma_loops(_planted(), with_waits=True)
    assert [instruction.address for instruction in loop] == [*range(0x20, 0x90, 0x10)]


def test_the_way_back_from_a_retry_is_no_part_of_the_main_loop() -> None:
    (loop,) = main_loop.innermost_mma_loops(_out_of_line())
    assert [instruction.address for instruction in loop] == [*range(0x10, 0x70, 0x10)]
    (loop,) = main_loop.innermost_mma_loops(_out_of_line(), with_waits=True)
    assert [instruction.address for instruction in loop] == [*range(0x10, 0x70, 0x10), 0x80, 0x90, 0xA0]


def _loop(at: int, mmas: int, ldsms: int, k_tiles: int) -> str:
    """A loop of so many instructions and two more for each k-tile, and one to go round."""
    body = [MMA] * mmas + ["LDSM.16.M88.4 R4, [R2]"] * ldsms
    body += [
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3",
        "SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R2], RZ",
    ] * k_tiles
    body += [f"@P1 BRA `(.L_{at})"]
    lines = [f"        /*{at + 16 * n:04x}*/                   {text} ;" for n, text in enumerate(body)]
    return f".L_{at}:\n" + "\n".join(lines) + "\n"


def _shipped(*loops: tuple[int, int, int]) -> sass.Kernel:
    text = "".join(_loop(0x1000 * (n + 1), *loop) for n, loop in enumerate(loops))
    text += "        /*9000*/                   EXIT ;\n"
    (kernel,) = sass.parse('\t.section\t.text.planted,"ax",@progbits\n' + text)
    return kernel


# 8 MMAs a warp and k-tile of the whole tile.
SWAPPED = {
    "tile": [128, 16, 64],
    "swap_ab": True,
    "schedule": "cooperative",
    "mma_warps": 4,
    "stages": 10,
}


def test_loops_of_a_shipped_kernel_are_told_apart() -> None:
    """By the part of the tile, as it skips atoms, and by k-tiles at a time."""
    loops = main_loop.shipped_loops(SWAPPED, _shipped((8, 6, 1), (4, 4, 1), (24, 18, 3)))
    assert loops == [
        main_loop.ShippedLoop(Fraction(1), False, main_loop.Mix(8.0, 6.0, 7 / 3, 3)),
        main_loop.ShippedLoop(Fraction(1), True, main_loop.Mix(8.0, 6.0, 3.0, 1)),
        main_loop.ShippedLoop(Fraction(1, 2), False, main_loop.Mix(4.0, 4.0, 3.0, 1)),
    ]
    assert loops[1].mix.slots_per_mma == 17 / 8
    # The warps of one of its two groups share a tile.
    pingpong = {**SWAPPED, "schedule": "pingpong"}
    assert main_loop.shipped_loops(pingpong, _shipped((8, 6, 1)))[0].part == 1


@pytest.mark.parametrize(
    ("loops", "expected"),
    [
        ([(7, 6, 1)], "7 MMAs and 1 k-tiles a loop, 8 MMAs a k-tile"),
        ([(8, 6, 0)], "8 MMAs and 0 k-tiles"),
        ([(16, 6, 1)], "16 MMAs and 1 k-tiles"),
        ([(4, 6, 1)], "no main loop for a full tile"),
        ([], "no main loop for a full tile"),
    ],
)
def test_shipped_loop_that_does_not_fit_the_tile_is_refused(
    loops: list[tuple[int, int, int]], expected: str
) -> None:
    with pytest.raises(BuildError, match=expected):
        main_loop.shipped_loops(SWAPPED, _shipped(*loops))


def test_shipped_kernels_are_read_and_have_a_row_for_every_loop() -> None:
    large = {**SWAPPED, "tile": [128, 128, 128], "swap_ab": False, "mma_warps": 8}
    kernels = {"small": _shipped((8, 6, 1), (4, 4, 1)), "large": _shipped((128, 48, 2))}
    variants = {}
    for key, variant in (("large", large), ("small", SWAPPED)):
        cubins = {"cu13": {"path": key, "registers": 168}}
        targets = {"sm_120a": {"cubins": cubins}}
        variants[key] = {**variant, "family": "fp8_packed", "role": "gemm", "targets": targets}
    manifest = {"variants": {**variants, "other": {"family": "fp8_ptr_array", "role": "gemm"}}}
    rows = main_loop.read_shipped(manifest, kernels.__getitem__)
    assert [(variant["tile"], registers, loop.part) for variant, registers, loop in rows] == [
        ([128, 16, 64], 168, 1),
        ([128, 16, 64], 168, Fraction(1, 2)),
        ([128, 128, 128], 168, 1),
    ]
    text = main_loop.shipped_table(rows, {"ptxas_cu13": "13"})
    assert "| 128x16x64 swapped | Cooperative | 1/2 | 1 | 4 | 4 | 3 | 2.75 | 10 | 168 |\n" in text
    assert "| 128x128x128 | Cooperative | 1 | 2 | 64 | 24 | 2.5 | 1.414 | 10 | 168 |\n" in text
    with pytest.raises(BuildError, match="no GEMM kernel of the family fp8_packed"):
        main_loop.read_shipped({"variants": {}}, kernels.__getitem__)


def test_instructions_are_counted_per_k_tile() -> None:
    assert main_loop.mma_per_k_tile(ENTRY) == 2
    assert main_loop.mix_of(ENTRY, _planted()) == main_loop.Mix(2.0, 1.0, 2.0, 1, 1.0)
    half = Entry("x", "pingpong", (16, 8, 128))
    assert main_loop.mix_of(half, _planted()) == main_loop.Mix(1.0, 0.5, 1.0, 2, 0.5)


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
