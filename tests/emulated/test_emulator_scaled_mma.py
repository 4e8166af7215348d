"""Block-scaled MMA as nvcc writes it: with the selectors of scales in registers."""

from __future__ import annotations

import numpy as np
import pytest

from emulated.kernels import Machine, kernel, line_of
from emulated.lanes import run_lanes
from sm12x.emulator.errors import EmulatorError

MMA = "mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::2X.m16n8k64.row.col.f32.e2m1.e2m1.f32.ue8m0"


def code(*selectors, before=""):
    a_byte, a_thread, b_byte, b_thread = selectors
    return f"""
    {before}
    {{
    .reg .f32 %z<5>;
    mov.f32 %z0, 0f00000000;
    {MMA} {{%z1, %z2, %z3, %z4}}, {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}}, {{%z0, %z0, %z0, %z0}},
        {{%r7}}, {{{a_byte}, {a_thread}}}, {{%r8}}, {{{b_byte}, {b_thread}}};
    mov.b32 %r11, %z1; mov.b32 %r12, %z2; mov.b32 %r13, %z3; mov.b32 %r14, %z4;
    }}
    """


def operands(seed):
    rng = np.random.default_rng(seed)
    found = [("b32", rng.integers(0, 1 << 32, 32, np.uint64)) for _ in range(6)]
    scales = rng.integers(120, 135, (2, 32, 4), np.uint8)
    return found + [("b32", each.reshape(-1).view(np.uint32)) for each in scales]


@pytest.mark.parametrize("selectors", [(0, 0, 0, 0), (2, 1, 0, 3), (0, 1, 2, 2)])
def test_selectors_in_registers_are_those_in_the_instruction(selectors):
    given = operands(sum(selectors))
    results = ["b32"] * 4
    moves = "\n".join(f"mov.b16 %h{at}, {value};" for at, value in enumerate(selectors, 20))
    constants = run_lanes(code(*selectors), given, results, threads=32)
    registers = run_lanes(
        code(*(f"%h{at}" for at in range(20, 24)), before=moves), given, results, threads=32
    )
    others = run_lanes(code(2 - selectors[0], *selectors[1:]), given, results, threads=32)
    assert np.array_equal(constants, registers)
    assert not np.array_equal(constants, others)


@pytest.mark.parametrize(
    "before",
    [
        "mov.b16 %h20, 0;\nmov.b16 %h20, 2;",
        "@%p1 mov.b16 %h20, 0;",
        "mov.b16 %h20, %h21;",
        "add.u16 %h20, %h21, 1;",
    ],
)
def test_a_selector_that_may_change_is_refused(before):
    text = kernel(code("%h20", 0, 0, 0, before=before))
    with pytest.raises(EmulatorError, match="selectors that are no constants") as caught:
        Machine().program(text)
    assert caught.value.line == line_of(text, "mma.sync")
