"""Floating-point, conversion and matrix instructions as PTX writes them. What they compute is tested with the
numerics; here it is that each operand, type, rounding and flag gets there.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from emulated.kernels import Machine, kernel
from emulated.lanes import THREADS, run_lanes
from sm12x.emulator.errors import EmulatorError

RNG = np.random.default_rng(1)
SINGLES = (RNG.standard_normal((3, THREADS)) * 100).astype(np.float32)
DOUBLES = RNG.standard_normal((3, THREADS)) * 100
HALVES = (RNG.standard_normal((3, THREADS, 2)) * 10).astype(np.float16)


def f32(code, *values):
    """The float32 result in %f11 of code on operands %f1, %f2, %f3."""
    (bits,) = run_lanes(code, [("f32", v.view(np.uint32)) for v in values], ["f32"])
    return bits.view(np.float32)


def test_single_precision():
    a, b, c = SINGLES
    np.testing.assert_array_equal(f32("add.f32 %f11, %f1, %f2;", a, b), a + b)
    np.testing.assert_array_equal(f32("sub.rn.f32 %f11, %f1, 0f3F800000;", a), a - np.float32(1))
    np.testing.assert_array_equal(f32("mul.f32 %f11, %f1, 2.5;", a), a * np.float32(2.5))
    exact = a.astype(np.float64) * b + c  # 48 bits and 24 bits: the sum is all but exact
    np.testing.assert_array_equal(f32("fma.rn.f32 %f11, %f1, %f2, %f3;", a, b, c), exact.astype(np.float32))
    np.testing.assert_array_equal(f32("div.rn.f32 %f11, %f1, %f2;", a, b), a / b)
    np.testing.assert_array_equal(f32("neg.f32 %f11, %f1;", a), -a)
    np.testing.assert_array_equal(f32("max.NaN.f32 %f11, %f1, %f2;", a, b), np.maximum(a, b))
    down, up = (f32(f"add.{mode}.f32 %f11, %f1, %f2;", a, b).astype(np.float64) for mode in ("rm", "rp"))
    total = a.astype(np.float64) + b
    assert ((down <= total) & (total <= up)).all()
    assert (down < up).any()
    saturated = f32("add.sat.f32 %f11, %f1, %f2;", a, b)
    np.testing.assert_array_equal(saturated, np.clip(a + b, 0, 1))


def test_double_and_half_precision():
    a, b, _ = DOUBLES
    (bits,) = run_lanes("mul.rz.f64 %d11, %d1, %d2;", [("f64", x.view(np.uint64)) for x in (a, b)], ["f64"])
    found = bits.view(np.float64)
    assert (np.abs(found) <= np.abs(a * b)).all()
    np.testing.assert_allclose(found, a * b, rtol=3e-16)
    x, y, z = (v.view(np.uint32).ravel() for v in HALVES)
    (pairs,) = run_lanes("fma.rn.f16x2 %r11, %r1, %r2, %r3;", [("b32", v) for v in (x, y, z)], ["b32"])
    p, q, r = (v.astype(np.float64) for v in HALVES)
    np.testing.assert_array_equal(pairs.view(np.float16).reshape(-1, 2), (p * q + r).astype(np.float16))


def test_comparisons_of_floats_and_their_unordered_forms():
    a = np.array([1.0, 2.0, np.nan, np.nan, 0.0, -0.0], np.float32).repeat(16)
    b = np.array([2.0, 2.0, 1.0, np.nan, -0.0, 1e-45], np.float32).repeat(16)
    hows = ("lt", "ltu", "eq", "equ", "ne", "neu", "num", "nan", "ge", "geu")
    code = "\n".join(
        f"setp.{how}.f32 %p10, %f1, %f2;\nselp.b32 %r{11 + at}, 1, 0, %p10;" for at, how in enumerate(hows)
    )
    got = run_lanes(code, [("f32", a.view(np.uint32)), ("f32", b.view(np.uint32))], ["b32"] * len(hows))
    nan = np.isnan(a) | np.isnan(b)
    expected = {
        "lt": a < b, "ltu": (a < b) | nan, "eq": a == b, "equ": (a == b) | nan, "ne": (a != b) & ~nan,
        "neu": a != b, "num": ~nan, "nan": nan, "ge": a >= b, "geu": (a >= b) | nan,
    }  # fmt: skip
    for how, found in zip(hows, got, strict=True):
        np.testing.assert_array_equal(found != 0, expected[how], err_msg=how)
    (flushed,) = run_lanes(
        "setp.eq.ftz.f32 %p10, %f1, %f2;\nselp.b32 %r11, 1, 0, %p10;",
        [("f32", a.view(np.uint32)), ("f32", b.view(np.uint32))],
        ["b32"],
    )
    assert flushed[-1] == 1


def test_conversions():
    a, b, _ = SINGLES
    operands = [("f32", a.view(np.uint32)), ("f32", b.view(np.uint32))]
    (bits,) = run_lanes("cvt.rn.bf16x2.f32 %r11, %f1, %f2;", operands, ["b32"])
    pairs = bits.view(ml_dtypes.bfloat16).reshape(-1, 2)
    np.testing.assert_array_equal(
        pairs[:, 0].astype(np.float32), b.astype(ml_dtypes.bfloat16).astype(np.float32)
    )
    np.testing.assert_array_equal(
        pairs[:, 1].astype(np.float32), a.astype(ml_dtypes.bfloat16).astype(np.float32)
    )
    (bits,) = run_lanes("cvt.rn.satfinite.e4m3x2.f32 %h11, %f1, %f2;", operands, ["b16"])
    codes = bits.view(np.uint8).reshape(-1, 2)
    expected = a.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(codes[:, 1], expected)
    (bits,) = run_lanes("cvt.rn.f16x2.e4m3x2 %r11, %h1;", [("b16", bits)], ["b32"])
    np.testing.assert_array_equal(
        bits.view(np.float16).reshape(-1, 2)[:, 1], expected.view(ml_dtypes.float8_e4m3fn).astype(np.float16)
    )
    (whole,) = run_lanes("cvt.rzi.s32.f32 %r11, %f1;", operands, ["b32"])
    np.testing.assert_array_equal(whole.view(np.int32), np.trunc(a).astype(np.int32))
    numbers = RNG.integers(0, 1 << 32, THREADS, np.uint64).astype(np.uint32)
    (single,) = run_lanes("cvt.rn.f32.u32 %f11, %r1;", [("b32", numbers)], ["f32"])
    np.testing.assert_array_equal(single.view(np.float32), numbers.astype(np.float32))
    (wide,) = run_lanes("cvt.f64.f32 %d11, %f1;", operands, ["f64"])
    np.testing.assert_array_equal(wide.view(np.float64), a.astype(np.float64))


def test_classes_of_numbers():
    a = np.array([1.0, 0.0, 1e-40, np.inf, np.nan, -5.0], np.float32).repeat(16)
    names = ("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    code = "\n".join(
        f"testp.{n}.f32 %p10, %f1;\nselp.b32 %r{11 + i}, 1, 0, %p10;" for i, n in enumerate(names)
    )
    got = run_lanes(code, [("f32", a.view(np.uint32))], ["b32"] * 6)
    assert [found[::16].tolist() for found in got] == [
        [1, 1, 1, 0, 0, 1], [0, 0, 0, 1, 0, 0], [1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 1, 0], [1, 1, 0, 0, 0, 1],
        [0, 0, 1, 0, 0, 0],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "body", ["add.rn.relu.f32 %f1, %f1, %f2;", "cvt.f16.f32 %h1, %f1;", "sin.f32 %f1, %f1;"]
)
def test_forms_that_ptx_does_not_have_are_refused(body):
    with pytest.raises(EmulatorError, match="is not implemented"):
        Machine().program(kernel(body))


SHARED = ".shared .align 16 .b8 box[2048];"


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_matrices_are_loaded_and_stored_by_rows_or_columns(trans, number):
    """Rows from the addresses of 8 lanes for each matrix; stored again, they are where they were."""
    machine = Machine()
    data = RNG.integers(0, 1 << 16, (number * 8, 8)).astype(np.uint16)
    source = machine.upload(data, "source")
    out = machine.memory.allocate(32 * 16 + data.nbytes, "out")
    registers = ", ".join(f"%r{10 + i}" for i in range(number))
    text = kernel(
        f"""
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd1, %r1, 16;
    add.u64 %rd2, %rd1, {source};
    setp.lt.u32 %p1, %r1, {8 * number};
    mov.b32 %r2, box;
    shl.b32 %r3, %r1, 4;
    xor.b32 %r3, %r3, 64;                      // rows need not follow each other
    add.u32 %r2, %r2, %r3;
    @%p1 ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd2];
    @%p1 st.shared.v4.b32 [%r2], {{%r4, %r5, %r6, %r7}};
    bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x{number}{trans}.shared.b16 {{{registers}}}, [%r2];
    stmatrix.sync.aligned.m8n8.x{number}{trans}.shared.b16 [%r2+1024], {{{registers}}};
    bar.warp.sync -1;
    add.u64 %rd3, %rd1, {out};
    {" ".join(f"st.global.b32 [%rd3+{4 * i}], %r{10 + i};" for i in range(number))}
    @%p1 ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r2+1024];
    @%p1 st.global.v4.b32 [%rd3+512], {{%r4, %r5, %r6, %r7}};
    """,
        shared=SHARED,
    )
    machine.run(text, 1, 32)
    got = machine.download(out, (32, 4), np.uint32)
    for matrix in range(number):
        block = data[8 * matrix : 8 * matrix + 8]
        block = block.T if trans else block
        for lane in range(32):
            pair = block[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
            assert int(got[lane, matrix]) == int(pair[0]) | int(pair[1]) << 16
    np.testing.assert_array_equal(machine.download(out + 512, data.shape, np.uint16), data)


def test_mmas_that_depend_on_each_other_and_some_that_do_not():
    """Chains and independent MMAs in one block, with a move and an overwritten operand in between."""
    machine = Machine()
    ones = int.from_bytes(np.ones(4, np.float32).astype(ml_dtypes.float8_e4m3fn).tobytes(), "little")
    out = machine.memory.allocate(32 * 16, "out")
    form = "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"
    text = kernel(f"""
    mov.b32 %r1, {ones};
    mov.f32 %f1, 0f00000000;
    {form} {{%f11, %f12, %f13, %f14}}, {{%r1, %r1, %r1, %r1}}, {{%r1, %r1}}, {{%f1, %f1, %f1, %f1}};
    {form} {{%f21, %f22, %f23, %f24}}, {{%r1, %r1, %r1, %r1}}, {{%r1, %r1}}, {{%f1, %f1, %f1, %f1}};
    mov.b32 %r1, 0;
    {form} {{%f31, %f32, %f33, %f34}}, {{%r1, %r1, %r1, %r1}}, {{%r1, %r1}}, {{%f11, %f12, %f13, %f14}};
    mov.f32 %f12, %f21;
    mov.b32 %r1, {ones};
    {form} {{%f11, %f42, %f43, %f44}}, {{%r1, %r1, %r1, %r1}}, {{%r1, %r1}}, {{%f31, %f12, %f21, %f1}};
    mov.u32 %r2, %tid.x;
    mul.wide.u32 %rd1, %r2, 16;
    add.u64 %rd1, %rd1, {out};
    st.global.v4.f32 [%rd1], {{%f11, %f42, %f43, %f44}};
    """)
    machine.run(text, 1, 32)
    assert machine.download(out, (32, 4), np.float32).tolist() == [[64.0, 64.0, 64.0, 32.0]] * 32
