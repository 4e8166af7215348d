"""ldmatrix, stmatrix, movmatrix and mma.sync (PTX ISA, "Warp-level Matrix Instructions")."""

from __future__ import annotations

from collections.abc import Iterator

from ..forms import Form
from ..rules import Accumulation, Bits
from .data_movement import registers

FP8 = ("e4m3", "e5m2")

# shapes, multiplicands and accumulators; significant bits that partial sums are allowed to be cut to
FLOATING = (
    *((shape, "f16", "f16", d) for shape in ("m16n8k8", "m16n8k16") for d in ("f16", "f32")),
    *((shape, "bf16", "bf16", "f32") for shape in ("m16n8k8", "m16n8k16")),
    *((shape, "tf32", "tf32", "f32") for shape in ("m16n8k4", "m16n8k8")),
    *(
        (shape, a, b, d)
        for shape in ("m16n8k16", "m16n8k32")
        for a in FP8
        for b in FP8
        for d in ("f16", "f32")
    ),
)
BITS = {"f16": 11, "f32": 24}
PER_REGISTER = {"tf32": 1, "f16": 2, "bf16": 2, "e4m3": 4, "e5m2": 4, "s8": 4, "u8": 4}


def forms() -> Iterator[Form]:
    for number in (1, 2, 4):
        for trans in ("", ".trans"):
            for space in ("shared", "shared::cta"):
                yield _ldmatrix(f"ldmatrix.sync.aligned.m8n8.x{number}{trans}.{space}.b16", number)
                yield _stmatrix(f"stmatrix.sync.aligned.m8n8.x{number}{trans}.{space}.b16", number)
    code = "movmatrix.sync.aligned.m8n8.trans.b16 {d0}, {a0};"
    yield Form("movmatrix.sync.aligned.m8n8.trans.b16", code, ("b32",), ("b32",))
    for shape, a, b, d in FLOATING:
        for inputs in ("gentle", "integer", "any"):
            rule = Accumulation(shape, a, b, d, BITS[d], inputs == "integer")
            yield _mma(f"mma.sync.aligned.{shape}.row.col.{d}.{a}.{b}.{d}", shape, a, b, d, inputs, rule)
    for shape in ("m16n8k16", "m16n8k32"):
        for a in ("s8", "u8"):
            for b in ("s8", "u8"):
                for sat in ("", ".satfinite"):
                    opcode = f"mma.sync.aligned.{shape}.row.col{sat}.s32.{a}.{b}.s32"
                    yield _mma(opcode, shape, a, b, "s32", "any", Bits())


def _mma(opcode: str, shape: str, a: str, b: str, d: str, inputs: str, rule: Accumulation | Bits) -> Form:
    k = int(shape.rpartition("k")[2])
    a_count, b_count = 16 * k // 32 // PER_REGISTER[a], 8 * k // 32 // PER_REGISTER[b]
    d_count = 2 if d == "f16" else 4
    code = (
        f"{opcode} {registers('d', d_count)}, {registers('a', a_count)}, {registers('a', b_count, a_count)}, "
    )
    code += f"{registers('a', d_count, a_count + b_count)};"
    operands = (
        (f"mma:{a}:{inputs}",) * a_count + (f"mma:{b}:{inputs}",) * b_count + (f"mma:{d}:{inputs}",) * d_count
    )
    return Form(f"{opcode} {inputs}", code, operands, ("b32",) * d_count, rule)


def _rows() -> str:
    """%t3: for each lane the address of a row of 16 bytes, rows being in an order of their own."""
    lines = ("mul.lo.u32 %t3, %my_lane, 13;", "add.u32 %t3, %t3, 7;", "and.b32 %t3, %t3, 31;")
    return "\n".join((*lines, "mad.lo.u32 %t3, %t3, 16, {warp_box};")) + "\n"


def _ldmatrix(opcode: str, number: int) -> Form:
    code = _rows() + f"st.shared.v4.b32 [%t3], {registers('a', 4)};\nbar.warp.sync -1;\n"
    return Form(opcode, code + f"{opcode} {registers('d', number)}, [%t3];", ("b32",) * 4, ("b32",) * number)


def _stmatrix(opcode: str, number: int) -> Form:
    """Rows that are not stored to keep what they had."""
    code = _rows() + f"st.shared.v4.b32 [%t3], {registers('a', 4, 4)};\nbar.warp.sync -1;\n"
    code += f"{opcode} [%t3], {registers('a', number)};\nbar.warp.sync -1;\n"
    return Form(opcode, code + f"ld.shared.v4.b32 {registers('d', 4)}, [%t3];", ("b32",) * 8, ("b32",) * 4)
