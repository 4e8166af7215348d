"""Programmatic dependent launch: grids that touch what a grid before them may still use, and clean twins.

Each case is a chain of kernels, all but the first launched with the attribute; they run one after the other
and overlapping, by the seed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pytest

from emulated.gemm_case import Case, Problem, variant_of
from emulated.kernels import Machine, kernel, line_of
from emulated.planted.planting import (
    BULK_LOAD,
    BULK_STORE,
    COMMIT,
    LOAD,
    PARAMS,
    PROLOGUE,
    SHARED,
    Bench,
    init,
    wait,
)
from sm12x.emulator.chain import Link, launch_chain
from sm12x.emulator.errors import EmulatorError

SEEDS = range(6)
GDC = "griddepcontrol.wait;"
TRIGGER = "griddepcontrol.launch_dependents;"
# Long enough for a secondary to run that begins at the trigger.
WORK = """
    mov.b32 %r40, 0;
WORK:
    add.u32 %r40, %r40, 1;
    setp.lt.u32 %p40, %r40, 500;
    @%p40 bra WORK;
"""
WRITE = f"{TRIGGER}\n{WORK}\nst.global.b32 [%rd7], %r1;"  # fresh
READ = f"{TRIGGER}\nld.global.b32 %r9, [%rd6];"  # data
NOTHING = f"{TRIGGER}"


@dataclass(frozen=True)
class Chained:
    """Kernels one after the other. `line` is where the access of the last one stands, which is reported,
    `other` that of the one it conflicts with, in kernel `cause`.
    """

    name: str
    kernels: tuple[str, ...]
    bug: str
    mended: str
    message: str
    line: str
    other: str = r"st\.global"
    cause: int = 0
    threads: int = 32
    ctas: int = 1

    def texts(self, part: str) -> list[str]:
        return [
            kernel(PROLOGUE + code.replace("<HERE>", part), params=PARAMS, shared=SHARED).replace(
                "entry test", f"entry grid{at}"
            )
            for at, code in enumerate(self.kernels)
        ]

    def run(self, part: str, seed: int) -> list[str]:
        bench, texts = Bench(), self.texts(part)
        links = [
            Link(bench.machine.program(text), (self.ctas, 1, 1), (self.threads, 1, 1), 0, bench.params,
                 programmatic=True, seed=seed)
            for text in texts
        ]  # fmt: skip
        launch_chain(links, memory=bench.machine.memory, segment_limit=200_000)
        return texts


def early(name, access, line, message, mended=None, **more):
    """An access before the wait to what the kernel before writes."""
    code = f"<HERE>\n{access if mended is None else ''}"
    return Chained(
        name, (WRITE, f"{code}\n{GDC}" if mended is None else "<HERE>"),
        "" if mended is None else f"{access}\n{GDC}",
        GDC if mended is None else mended, message, line, **more,
    )  # fmt: skip


READS = r"grid1 reads fresh at offset 0 before its griddepcontrol.wait, which grid0 writes at PTX line {} and"
LOAD_FRESH = "ld.global.b32 %r9, [%rd7];"
HALF = """
    setp.ge.u32 %p2, %r1, 32;
    @%p2 bra.uni SECOND;
    {first}
    ret;
SECOND:
    {second}
"""
SIGNAL = "mbarrier.arrive.shared::cta.b64 _, [bar];"
CASES = [
    early("a load of what the primary writes", LOAD_FRESH, r"ld\.global", READS),
    early("an atomic on what the primary writes", "red.global.add.u32 [%rd7], %r1;", r"red\.global", READS),
    early(
        "cp.async from what the primary writes",
        "cp.async.ca.shared.global [%r3], [%rd7], 4;\ncp.async.wait_all;",
        r"cp\.async\.ca",
        READS,
    ),
    early(
        "a bulk copy from what the primary writes",
        f"""{init()}
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 64;
    @%p1 {BULK_LOAD} [box], [%rd2], 64, [bar];
    {wait()}""",
        r"cp\.async\.bulk",
        READS,
    ),
    early(
        "a tensor copy from what the primary writes",
        f"""{init()}
    mov.b32 %r24, 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 128;
    @%p1 {LOAD} [box], [%rd4, {{%r24, %r24}}], [bar];
    {wait()}""",
        r"cp\.async\.bulk",
        READS,
    ),
    Chained(
        "a store to what the primary reads",
        (READ, f"<HERE>\nst.global.b32 [%rd6], %r1;\n{GDC}"),
        "",
        GDC,
        "grid1 writes data at offset 0 before its griddepcontrol.wait, which grid0 reads at PTX line {}",
        r"st\.global",
        r"ld\.global",
    ),
    Chained(
        "a store to what the primary writes",
        (WRITE, f"<HERE>\nst.global.b32 [%rd7], %r1;\n{GDC}"),
        "",
        GDC,
        "grid1 writes fresh at offset 0 before its griddepcontrol.wait, which grid0 writes at PTX line {}",
        r"st\.global",
    ),
    Chained(
        "a bulk store to what the primary reads",
        (
            READ,
            f"""st.shared.b32 [%r3], %r1;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    <HERE>
    @%p1 {BULK_STORE} [%rd1], [box], 64;
    @%p1 {COMMIT}
    cp.async.bulk.wait_group 0;
    {GDC}""",
        ),
        "",
        GDC,
        "grid1 writes data at offset 0 before its griddepcontrol.wait, which grid0 reads at PTX line {}",
        r"cp\.async\.bulk\.global",
        r"ld\.global",
    ),
    Chained("no wait at all", (WRITE, f"<HERE>\n{LOAD_FRESH}"), "", GDC, READS, r"ld\.global"),
    Chained(
        "no trigger and no wait",
        ("st.global.b32 [%rd7], %r1;", f"<HERE>\n{LOAD_FRESH}"), "", GDC, READS, r"ld\.global",
    ),
    Chained(
        "one warp waits and bar.sync follows",
        (WRITE, HALF.format(first=f"{GDC}\nbar.sync 0;", second=f"<HERE>\n{LOAD_FRESH}\n")),
        f"{LOAD_FRESH}\nbar.sync 0;", "bar.sync 0;", READS, r"ld\.global", threads=64,
    ),
    Chained(
        "one warp waits and an mbarrier follows",
        (WRITE, init() + HALF.format(first=f"{GDC}\n@%p1 {SIGNAL}", second=f"<HERE>\n{LOAD_FRESH}\n")),
        f"{LOAD_FRESH}\n{wait()}", wait(), READS, r"ld\.global", threads=64,
    ),
    Chained(
        "one warp waits behind its signal",
        (WRITE, init() + HALF.format(first="<HERE>", second=f"{wait()}\n{LOAD_FRESH}\n")),
        f"@%p1 {SIGNAL}\n{GDC}", f"{GDC}\n@%p1 {SIGNAL}", READS, r"ld\.global", threads=64,
    ),
    Chained(
        "one lane waits and bar.warp.sync follows",
        (WRITE, f"@!%p1 bra MEET;\n{GDC}\nMEET:\n<HERE>\n{LOAD_FRESH}"),
        "", "bar.warp.sync -1;", READS.replace("offset 0", r"offset \d+"), r"ld\.global",
    ),
    Chained(
        "one lane waits and another loads",
        (WRITE, f"setp.eq.u32 %p3, %r1, 1;\n@%p1 {GDC}\n<HERE> {LOAD_FRESH}"),
        "@%p3",
        "@%p1",
        READS.replace("offset 0", "offset 4"),
        r"ld\.global",
    ),
    Chained(
        "a flag that is polled",
        (
            f"{TRIGGER}\nmov.b32 %r9, 7;\n@%p1 st.release.gpu.global.b32 [%rd1], %r9;",
            f"POLL:\n<HERE>\nsetp.ne.u32 %p5, %r9, 7;\n@%p5 bra POLL;\n{GDC}",
        ),
        "ld.global.b32 %r9, [%rd1];",
        "ld.acquire.gpu.global.b32 %r9, [%rd1];",
        READS.replace("fresh", "data"), r"ld\.global", r"st\.release",
    ),
    Chained(
        "a flag that is set by a weak store",
        (
            f"{TRIGGER}\nmov.b32 %r9, 7;\n@%p1 <HERE> [%rd1], %r9;",
            f"POLL:\nld.acquire.gpu.global.b32 %r9, [%rd1];\nsetp.ne.u32 %p5, %r9, 7;\n@%p5 bra POLL;\n{GDC}",
        ),
        "st.global.b32",
        "st.release.gpu.global.b32",
        READS.replace("fresh", "data"), r"ld\.acquire",
    ),
    Chained(
        "only the lane that waits loads what the primary writes",
        (
            f"{TRIGGER}\n{WORK}\n@%p1 st.global.b32 [%rd6], %r1;",
            f"setp.eq.u32 %p3, %r1, 1;\n<HERE> {GDC}\nld.global.b32 %r9, [%rd6];",
        ),
        "@%p3",
        "@%p1",
        READS.replace("fresh", "data"), r"ld\.global",
    ),
    Chained(
        "a grid in between that never waits",
        (WRITE, f"<HERE>\n{TRIGGER}", f"{GDC}\n{LOAD_FRESH}"),
        "",
        GDC,
        "grid2 reads fresh at offset 0 behind its griddepcontrol.wait, which does not cover grid0: .* never "
        "waited, which grid0 writes at PTX line {}",
        r"ld\.global",
    ),
    Chained(
        "a grid in between that triggers before it waits",
        (WRITE, "<HERE>", f"{LOAD_FRESH}\n{GDC}"),
        f"{TRIGGER}\n{GDC}",
        f"{GDC}\n{TRIGGER}",
        READS.replace("grid1", "grid2"),
        r"ld\.global",
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_grid_that_conflicts_with_one_that_may_still_run(case):
    for seed in SEEDS:
        with pytest.raises(EmulatorError) as caught:
            case.run(case.bug, seed)
        violation, texts = caught.value.violation, case.texts(case.bug)
        assert violation.kind == "dependency", f"seed {seed}: {violation}"
        where = f"{line_of(texts[case.cause], case.other)}: "
        assert re.search(case.message.format(where + ".*"), violation.message), f"seed {seed}: {violation}"
        assert violation.line == line_of(texts[-1], case.line), f"seed {seed}: {violation}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_its_clean_twin(case):
    for seed in SEEDS:
        case.run(case.mended, seed)


def polls(seed):
    """Segments that a kernel runs which polls for something its predecessor writes at its end: for so long
    that a livelock would be proven if no other grid ran."""
    machine = Machine()
    flag = machine.upload(np.zeros(1, np.uint32), "flag")
    primary = f"{TRIGGER}\nmov.b32 %r9, 0;\nLOOP:\nadd.u32 %r9, %r9, 1;\nsetp.lt.u32 %p1, %r9, 10000;\n" \
        f"@%p1 bra LOOP;\nmov.u64 %rd1, {flag};\nst.release.gpu.global.b32 [%rd1], %r9;"  # fmt: skip
    secondary = f"mov.u64 %rd1, {flag};\nPOLL:\nld.acquire.gpu.global.b32 %r9, [%rd1];\n" \
        f"setp.eq.u32 %p1, %r9, 0;\n@%p1 bra POLL;\n{GDC}"  # fmt: skip
    links = [
        Link(machine.program(kernel(code)), (1, 1, 1), (32, 1, 1), 0, b"", programmatic=True, seed=seed)
        for code in (primary, secondary)
    ]
    return launch_chain(links, memory=machine.memory)[1].segments


def test_grids_overlap_under_odd_seeds_only():
    assert all(polls(seed) < 30 for seed in (0, 2, 4))
    assert all(polls(seed) > 300 for seed in (1, 3, 5))


def test_a_launch_without_the_attribute_waits_for_all_before_it():
    bench = Bench()
    texts = [kernel(PROLOGUE + code, params=PARAMS, shared=SHARED) for code in (WRITE, "", LOAD_FRESH)]
    for seed in SEEDS:
        links = [
            Link(
                bench.machine.program(text),
                (1, 1, 1),
                (32, 1, 1),
                0,
                bench.params,
                programmatic=at == 1,
                seed=seed,
            )
            for at, text in enumerate(texts)
        ]
        assert len(launch_chain(links, memory=bench.machine.memory)) == 3
    assert bench.machine.memory.region(bench.data).observers == ()


class Overlapped(Machine):
    """Runs the two kernels of a case as a chain."""

    def __init__(self, programmatic):
        super().__init__()
        self.programmatic, self.links = programmatic, []

    def run(self, text, grid, block, params=b"", *, shared=0, seed=0, limit=10_000_000):
        sizes = grid if isinstance(grid, tuple) else (grid, 1, 1), (block, 1, 1)
        self.links.append(
            Link(self.program(text), *sizes, shared, bytes(params), programmatic=self.programmatic, seed=seed)
        )
        return launch_chain(self.links, memory=self.memory) if len(self.links) == 2 else None


@pytest.mark.parametrize("seed", [0, 1])
def test_the_attribute_on_a_shipped_kernel_that_does_not_wait(seed):
    """Preparation writes the group arrays, which the GEMM reads at once."""
    variant = variant_of("fp8_ptr_array_128x16x128_swap_bf16")
    case = Case(Problem((5, 2), 24, 32), variant.out, seed)
    with pytest.raises(EmulatorError, match=r"dependency: .* before its griddepcontrol.wait, which .*prep"):
        case.run(variant, 2, seed=seed, machine=Overlapped(True))
    assert case.check(case.run(variant, 2, seed=seed, machine=Overlapped(False))) <= 1
