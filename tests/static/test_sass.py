"""The machine code of the shipped cubins: the right MMA, nothing in local memory beside it, no stage handed
back before it was read, PDL wait and trigger iff flagged, and how many issue slots the packed kernels' main
loops take.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sm12x_build import BuildError, lint, main_loop, releases, sass, store

HERE = Path(__file__).resolve().parent
README = HERE.parents[1] / "cuda" / "README.md"


@pytest.fixture(scope="module")
def kernels(manifest: dict[str, Any], nvdisasm: Path) -> dict[str, sass.Kernel]:
    """Every cubin's code by the cubin's path."""
    paths = [path for _, _, _, path in _cubins(manifest)]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        read = pool.map(lambda path: sass.disassemble(nvdisasm, store.CUBINS_DIR / path), paths)
        return dict(zip(paths, read, strict=True))


def _cubins(manifest: dict[str, Any]) -> list[tuple[str, dict[str, Any], str, str]]:
    found = [
        (key, variant, target, cubin["path"])
        for key, variant in sorted(manifest["variants"].items())
        for target, record in sorted(variant["targets"].items())
        for cubin in record["cubins"].values()
    ]
    assert found, "the manifest lists no cubin"
    return found


def test_main_loops_hold_the_right_mma_and_no_local_memory(
    manifest: dict[str, Any], kernels: dict[str, sass.Kernel]
) -> None:
    with_mma = [item for item in _cubins(manifest) if "mma" in item[1]]
    assert {item[1]["role"] for item in with_mma} >= {"gemm", "up", "down", "layer"}, (
        "GEMM kernels are missing"
    )
    problems = []
    for _, variant, target, path in with_mma:
        found = sass.mma_problems(kernels[path], mma=variant["mma"], target=target)
        problems += [f"{path}: {problem}" for problem in found]
    assert problems == []


def test_own_kernels_use_no_local_memory(manifest: dict[str, Any], kernels: dict[str, sass.Kernel]) -> None:
    own = [item for item in _cubins(manifest) if not lint.runs_in_cutlass_shell(item[1])]
    roles = {"gemm", "up", "down", "layer", "route", "quantize", "combine", "prepare_packed"}
    assert {item[1]["role"] for item in own} >= roles, "kernels of our own are missing"
    used = {path: [str(i) for i in kernels[path].instructions if i.is_local] for _, _, _, path in own}
    assert {path: found for path, found in used.items() if found} == {}


@pytest.mark.parametrize("family", ["fp8_packed", "fp8_ptr_array", "fp8_up", "fp8_down", "fp8_layer"])
def test_stages_are_handed_back_once_their_fragments_are_there(
    manifest: dict[str, Any], kernels: dict[str, sass.Kernel], family: str
) -> None:
    """Or TMA writes the next stage over fragments that are still to be read, as seen on an H200."""
    roles = "gemm", "up", "down", "layer"
    gemms = [path for _, v, _, path in _cubins(manifest) if v["role"] in roles and v["family"] == family]
    assert gemms, "the manifest lists no GEMM kernel"
    problems = []
    for path in gemms:
        code = kernels[path].instructions
        assert any(i.name == releases.LOAD for i in code), path
        assert any(releases.is_release(i) for i in code), path
        problems += [f"{path}: {problem}" for problem in releases.early_releases(kernels[path])]
    assert problems == []


def test_pdl_wait_and_trigger_iff_flagged(manifest: dict[str, Any], kernels: dict[str, sass.Kernel]) -> None:
    assert {variant["pdl"] for _, variant, _, _ in _cubins(manifest)} == {False, True}
    for _, variant, _, path in _cubins(manifest):
        assert sass.waits_on_grid(kernels[path]) == variant["pdl"], path
        assert sass.launches_dependents(kernels[path]) == variant["pdl"], path


@pytest.mark.parametrize("target", ["sm_120a", "sm_121a"])
@pytest.mark.parametrize("major", ["cu12", "cu13"])
def test_the_large_packed_tile_takes_few_issue_slots(
    manifest: dict[str, Any], kernels: dict[str, sass.Kernel], target: str, major: str
) -> None:
    """At most 1.6 per MMA. The NOPs that ptxas 12.9 puts behind most QMMA.SF, in every kernel, are not the
    source's: for cu12 the same without them."""
    rows = main_loop.read_shipped(manifest, kernels.__getitem__, target=target, major=major)
    large = [loop for variant, _, loop in rows if variant["tile"][:2] == [128, 128] and not loop.step]
    ups = [v for v in manifest["variants"].values() if v["role"] == "up" and v["tile"][:2] == [128, 128]]
    for up in ups:
        path = up["targets"][target]["cubins"][major]["path"]
        large += [loop for loop in main_loop.shipped_loops(up, kernels[path]) if not loop.step]
    assert len(large) >= 3, "a 128x128 tile is missing"
    for loop in large:
        padding = loop.mix.nop / loop.mix.mma if major == "cu12" else 0.0
        assert loop.mix.slots_per_mma - padding <= 1.6, loop


def test_the_readme_has_the_packed_main_loops_as_they_are(
    manifest: dict[str, Any], kernels: dict[str, sass.Kernel]
) -> None:
    rows = main_loop.read_shipped(manifest, kernels.__getitem__)
    table = main_loop.shipped_table(rows, manifest["toolchain"])
    assert table in README.read_text(), "run python cuda/tools/main_loop.py --shipped"


def test_the_thread_that_loads_weights_does_not_yield(
    manifest: dict[str, Any], kernels: dict[str, sass.Kernel]
) -> None:
    """ptxas puts a YIELD into such loops where it takes a load for synchronisation (arch/grid.hpp), at which
    the thread stands back for its warp's other lanes. On SM12x it does so in fp8_up and fp8_down too, because
    of exact divisions, which are calls; what that costs there nobody has measured."""
    seen, problems = 0, []
    for _, variant, target, path in _cubins(manifest):
        family = variant["family"]
        if family == "fp8_packed" or (family in ("fp8_up", "fp8_down") and target == "sm_90a"):
            code = kernels[path].instructions
            loads = [index for index, each in enumerate(code) if each.name == "UTMALDG"]
            cycles = [cycle for index in loads if (cycle := kernels[path].shortest_cycle(index))]
            assert len(cycles) > 1, path
            seen += 1
            problems += [path for cycle in cycles if any(each.name == "YIELD" for each in cycle)]
    assert seen > 80
    assert problems == []


def test_kernel_has_its_symbol(manifest: dict[str, Any], kernels: dict[str, sass.Kernel]) -> None:
    for _, variant, _, path in _cubins(manifest):
        assert kernels[path].name == variant["symbol"]


# The reader of SASS itself, on listings with planted violations. Each has two warp roles: a producer loop
# that may use local memory, and a consumer loop with the MMA whose wait the assembler moved behind the end of
# the kernel.


def test_the_shortest_cycle_is_that_of_the_innermost_loop() -> None:
    (planted,) = sass.parse(LISTING)
    names = [each.name for each in planted.instructions]
    assert [each.name for each in planted.shortest_cycle(names.index("LDL"))] == ["BRA", "STL", "LDL"]
    assert planted.shortest_cycle(names.index("S2R")) == []


LISTING = """
\t.section\t.text.planted,"ax",@progbits
planted:
.text.planted:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @P0 BRA `(.L_consumer) ;
.L_producer:
        /*0020*/                   STL [R1], R2 ;
        /*0030*/                   LDL R2, [R1] ;
        /*0040*/              @P1 BRA `(.L_producer) ;
        /*0050*/                   EXIT ;
.L_consumer:
        /*0060*/                   BSSY.RECONVERGENT B0, `(.L_joined) ;
        /*0070*/             @!P2 BRA `(.L_wait) ;
.L_back:
        /*0080*/                   {mma} ;
        /*0090*/                   BSYNC.RECONVERGENT B0 ;
.L_far:
        /*00a0*/                   BRA.U UP0, `(.L_consumer) ;
        /*00b0*/                   EXIT ;
.L_wait:
        /*00c0*/                   {waiting} ;
        /*00d0*/                   BRA `(.L_back) ;
.L_joined:
        /*00e0*/                   {joined} ;
        /*00f0*/                   BRA `(.L_far) ;
\t.section\t.nv.info,"",@"SHT_CUDA_INFO"
"""
UNIT_SCALE = "QMMA.SF.16832.F32.E4M3.E4M3.E8 R8, R4, R12, R8, R1, R1, UR4"
PLAIN = "QMMA.16832.F32.E4M3.E4M3 R8, R4, R12, R8"
HALF = "HMMA.16816.F32 R8, R4, R12, R8"


def _planted(mma: str = UNIT_SCALE, waiting: str = "NOP", joined: str = "NOP") -> sass.Kernel:
    listing = LISTING.replace("{mma}", mma).replace("{waiting}", waiting).replace("{joined}", joined)
    (kernel,) = sass.parse(listing)
    return kernel


def test_clean_listing_passes_with_a_spilling_producer() -> None:
    assert sass.mma_problems(_planted(), mma="unit_scale", target="sm_120a") == []
    assert sass.mma_problems(_planted(mma=PLAIN), mma="plain", target="sm_120a") == []
    assert sass.mma_problems(_planted(mma=HALF), mma="unit_scale", target="sm_90a") == []


def test_loops_are_told_apart() -> None:
    loops = _planted().loops()
    assert [[i.address for i in loop] for loop in loops] == [
        [0x20, 0x30, 0x40],
        [0x60, 0x70, 0x80, 0x90, 0xA0, 0xC0, 0xD0, 0xE0, 0xF0],
    ]


@pytest.mark.parametrize(
    ("mma", "policy", "target"),
    [(PLAIN, "unit_scale", "sm_120a"), (UNIT_SCALE, "plain", "sm_121a"), (UNIT_SCALE, "unit_scale", "sm_90a"),
     (HALF, "unit_scale", "sm_120a")],
)  # fmt: skip
def test_wrong_mma_is_caught(mma: str, policy: str, target: str) -> None:
    problems = sass.mma_problems(_planted(mma=mma), mma=policy, target=target)
    assert any("wrong MMA" in problem for problem in problems), problems


def test_missing_mma_is_caught() -> None:
    assert sass.mma_problems(_planted(mma="FADD R1, R2, R3"), mma="unit_scale", target="sm_120a") == [
        "planted: no loop holds an MMA"
    ]


@pytest.mark.parametrize("place", ["waiting", "joined"])
@pytest.mark.parametrize("access", ["LDL.64 R2, [R1+0x8]", "STL [R1], R3"])
def test_local_memory_in_an_mma_loop_is_caught(place: str, access: str) -> None:
    problems = sass.mma_problems(_planted(**{place: access}), mma="unit_scale", target="sm_120a")
    assert any("local memory in a loop with an MMA" in problem for problem in problems), problems


def test_local_memory_in_a_called_function_is_caught() -> None:
    listing = LISTING.replace("{waiting}", "CALL.REL.NOINC `($helper)").replace("{joined}", "NOP")
    helper = "$helper:\n"
    helper += "        /*0100*/                   LDL R2, [R1] ;\n"
    helper += "        /*0110*/                   RET.REL.NODEC R4 `(planted) ;\n"
    listing = listing.replace("{mma}", UNIT_SCALE).replace(
        "\t.section\t.nv.info", helper + "\t.section\t.nv.info"
    )
    (kernel,) = sass.parse(listing)
    problems = sass.mma_problems(kernel, mma="unit_scale", target="sm_120a")
    assert any("/*0100*/" in problem for problem in problems), problems


def test_empty_or_odd_listing_is_a_failure() -> None:
    with pytest.raises(BuildError, match="no code"):
        sass.parse("")
    with pytest.raises(BuildError, match="no instruction"):
        sass.parse('\t.section\t.text.empty,"ax",@progbits\n')
    with pytest.raises(BuildError, match="where does this go"):
        _planted(joined="BRX R2 -0x100").loops()


def test_wait_and_trigger_are_seen() -> None:
    assert not sass.waits_on_grid(_planted(joined="PREEXIT"))
    assert sass.waits_on_grid(_planted(joined="ACQBULK"))
    assert not sass.launches_dependents(_planted(joined="ACQBULK"))
    assert sass.launches_dependents(_planted(joined="PREEXIT"))


# Releases of stages, on code with planted ones that come too early: a line an instruction, or a label.

LOAD = "LDSM.16.M88.4 R8, [R20+0x400]"
READ = "LOP3.LUT R1, R11, R2, R3, 0x96, !PT"
ARRIVE = "SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R21+URZ+0x100], RZ"
LOOP = "@P1 BRA `(.L_loop)"

EARLY: dict[str, list[str]] = {  # the last instruction but EXIT arrives, the first LDSM is not waited for
    "unread": [LOAD, ARRIVE],
    "predicated": [LOAD, f"@P0 {ARRIVE}"],
    "remote": [LOAD, "@P0 SYNCS.ARRIVE.TRANS64.RED.A1T0 RZ, [UR4+0x100], RZ"],
    "another load is read": [LOAD, "LDSM.16.M88.4 R4, [R22]", "MOV R1, R4", ARRIVE],
    "its address is read": ["LDSM.16.M88.4 R8, [R8]", ARRIVE],
    "written, not read": [LOAD, "MOV R8, R2", "SHFL.IDX PT, R9, R2, RZ, 0x1f", ARRIVE],
    "neighbours are read": [LOAD, "HMMA.16816.F32 R12, R4, R6, R12", ARRIVE],
    "uniform registers": [LOAD, "IADD3 R1, R2, UR8, RZ", ARRIVE],
    "overwritten in pairs": [LOAD, "LDS.64 R8, [R2]", "CS2R R10, SRZ", "IADD3 R1, R9, R11, RZ", ARRIVE],
    "overwritten at once": [LOAD, "LDS.128 R8, [R2]", READ, ARRIVE],
    "overwritten by MMA": [LOAD, "QMMA.16832.F32.E4M3.E4M3 R8, R4, R12, RZ", READ, ARRIVE],
    "overwritten by the next": [LOAD, "LDSM.16.M88.4 R8, [R22]", READ, ARRIVE],
    "read on one path": [LOAD, "@P1 BRA `(.L_past)", READ, ".L_past:", ARRIVE],
    "read after a branch to it": [LOAD, "BRA `(.L_arrive)", READ, "EXIT", ".L_arrive:", ARRIVE],
    "read if": [LOAD, f"@P0 {READ}", ARRIVE],
    "read if another": [LOAD, f"@P1 {READ}", f"@P0 {ARRIVE}"],
    "read if not": [LOAD, f"@!P0 {READ}", f"@P0 {ARRIVE}"],
    "the predicate changes": [LOAD, f"@P0 {READ}", "ELECT P0, URZ, PT", f"@P0 {ARRIVE}"],
    "all predicates change": [LOAD, f"@P0 {READ}", "R2P PR, R2, 0x6", f"@P0 {ARRIVE}"],
    "loaded if": [f"@P1 {LOAD}", f"@P0 {READ}", ARRIVE],
}
IN_TIME: dict[str, list[str]] = {
    "read": [LOAD, READ, ARRIVE],
    "read and overwritten": [LOAD, "MOV R9, R8", "CS2R R8, SRZ", "CS2R R10, SRZ", ARRIVE],
    "read into itself": [LOAD, "IADD3 R8, R8, 0x1, RZ", ARRIVE],
    "address of the next": [LOAD, "LDSM.16.M88.4 R4, [R9]", "MOV R1, R4", ARRIVE],
    "by the arrival": [LOAD, "SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R8+URZ+0x100], RZ"],
    "half": [LOAD, "F2FP.F16.E4M3.UNPACK_B R1, R8.reuse.H1", ARRIVE],
    "stored": [LOAD, "STS [R1+0x10], R9", ARRIVE],
    "shuffled": [LOAD, "SHFL.IDX PT, R1, R10, RZ, 0x1f", ARRIVE],
    "compared": [LOAD, "ISETP.NE.AND P1, PT, R8, RZ, PT", ARRIVE],
    "quad of A": [LOAD, "HMMA.16816.F32 R40, R5, R30, R40", ARRIVE],
    "pair of B": [LOAD, "QMMA.SF.16832.F32.E4M3.E4M3.E8 R40, R30, R7, R40, R2, R2, UR4", ARRIVE],
    "quad of C": [LOAD, "QMMA.16832.F32.E4M3.E4M3 R40, R30, R34, R5", ARRIVE],
    "on both paths": [LOAD, "@P1 BRA `(.L_a)", READ, "BRA `(.L_b)", ".L_a:", READ, ".L_b:", ARRIVE],
    "if it arrives": [LOAD, f"@P0 {READ}", "ELECT P1, URZ, PT", f"@P0 {ARRIVE}"],
    "if loaded": [f"@P1 {LOAD}", f"@P1 {READ}", "ELECT P1, URZ, PT", f"@P0 {ARRIVE}"],
    "either way": [LOAD, f"@P0 {READ}", f"@!P0 {READ}", ARRIVE],
    "not loaded on the way": [LOAD, "BRA `(.L_past)", ".L_arrive:", ARRIVE, "EXIT", ".L_past:", READ],
    "wait and expect": [LOAD, "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2+URZ], R3",
                        "SYNCS.ARRIVE.TRANS64 RZ, [R4+URZ], R5"],
    "round a loop": [".L_loop:", READ, ARRIVE, LOAD, LOOP],
}  # fmt: skip


def _code(lines: list[str]) -> sass.Kernel:
    text, address = '\t.section\t.text.planted,"ax",@progbits\n', 0
    for line in [*lines, "EXIT"]:
        text += f"{line}\n" if line.endswith(":") else f"        /*{address:04x}*/  {line} ;\n"
        address += 0 if line.endswith(":") else 16
    (kernel,) = sass.parse(text)
    return kernel


@pytest.mark.parametrize("lines", EARLY.values(), ids=EARLY)
def test_a_release_before_the_fragments_is_named_by_address(lines: list[str]) -> None:
    kernel = _code(lines)
    load, arrival = kernel.instructions[0], kernel.instructions[-2]
    assert releases.early_releases(kernel) == [f"planted: {arrival} overtakes {load}"]


@pytest.mark.parametrize("lines", IN_TIME.values(), ids=IN_TIME)
def test_a_release_after_a_read_passes(lines: list[str]) -> None:
    assert releases.early_releases(_code(lines)) == []


def test_a_load_at_the_end_of_a_loop_is_followed_into_the_next_iteration() -> None:
    late = _code([".L_loop:", ARRIVE, READ, LOAD, LOOP])
    assert releases.early_releases(late) == [f"planted: /*0000*/ {ARRIVE} overtakes /*0020*/ {LOAD}"]
    own = _code([".L_loop:", LOAD, LOOP, ARRIVE, ARRIVE])  # overwritten by itself; early once
    assert releases.early_releases(own) == [f"planted: /*0020*/ {ARRIVE} overtakes /*0000*/ {LOAD}"]
