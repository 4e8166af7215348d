"""Calls of functions: arguments, results, divergence, what is refused, and the functions of the driver."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest

from emulated.kernels import Machine, kernel, line_of
from sm12x.emulator.errors import EmulatorError

THREADS = 64

# gcd leaves its loop at a different time in every lane, and returns from two places.
GCD = """
.func (.param .b32 func_retval0) gcd(.param .b32 gcd_param_0, .param .b32 gcd_param_1)
{
    .reg .pred %p<3>;
    .reg .b32 %r<6>;
    ld.param.b32 %r1, [gcd_param_0];
    ld.param.b32 %r2, [gcd_param_1];
    setp.ne.u32 %p1, %r2, 0;
    @%p1 bra LOOP;
    st.param.b32 [func_retval0], %r1;
    ret;
LOOP:
    rem.u32 %r3, %r1, %r2;
    mov.b32 %r1, %r2;
    mov.b32 %r2, %r3;
    setp.ne.u32 %p2, %r2, 0;
    @%p2 bra LOOP;
    st.param.b32 [func_retval0], %r1;
    ret;
}
"""
# A structure in, a structure out, a call of its own, and the same names of arguments as its caller's.
PAIR = """
.func (.param .align 8 .b8 func_retval0[16])
pair(.param .align 8 .b8 pair_param_0[16], .param .b32 pair_param_1)
{
    .reg .b32 %r<6>;
    .reg .b64 %rd<4>;
    ld.param.b64 %rd1, [pair_param_0];
    ld.param.b32 %r1, [pair_param_0+8];
    ld.param.b32 %r2, [pair_param_1];
    {
    .param .b32 param0;
    .param .b32 param1;
    .param .b32 retval0;
    st.param.b32 [param0], %r1;
    st.param.b32 [param1], %r2;
    call.uni (retval0), gcd, (param0, param1);
    ld.param.b32 %r3, [retval0];
    }
    cvt.u64.u32 %rd2, %r3;
    add.u64 %rd1, %rd1, %rd2;
    st.param.b64 [func_retval0], %rd1;
    st.param.b32 [func_retval0+8], %r3;
    ret;
}
"""


def call_gcd(first, second, result, *, guard="", block="{"):
    return f"""
    {block}
    .param .b32 param0;
    .param .b32 param1;
    .param .b32 retval0;
    st.param.b32 [param0], {first};
    st.param.b32 [param1], {second};
    st.param.b32 [retval0], 7;
    {guard} call.uni (retval0), gcd, (param0, param1);
    ld.param.b32 {result}, [retval0];
    }}
"""


def run(body, functions, *, threads=THREADS, seed=0):
    """Run a body in which %r1 is the thread's number, and give its %r10."""
    machine = Machine()
    out = machine.memory.allocate(4 * threads)
    text = kernel(
        f"mov.u32 %r1, %tid.x;\n{body}\nmul.wide.u32 %rd40, %r1, 4;\n"
        f"add.u64 %rd40, %rd40, {out};\nst.global.b32 [%rd40], %r10;",
        shared=functions,
    )
    machine.run(text, 1, threads, seed=seed)
    return machine.download(out, (threads,), np.uint32).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_a_function_is_called_by_all_lanes_and_by_some(seed):
    body = "mul.lo.u32 %r2, %r1, 6;\nmov.b32 %r10, 0;\n" + call_gcd("%r2", 60, "%r10")
    assert run(body, GCD, seed=seed) == [math.gcd(6 * thread, 60) for thread in range(THREADS)]
    some = "setp.lt.u32 %p5, %r1, 20;\n" + call_gcd("%r1", 12, "%r10", guard="@%p5")
    expected = [math.gcd(thread, 12) if thread < 20 else 7 for thread in range(THREADS)]
    assert run(some, GCD, seed=seed) == expected


@pytest.mark.parametrize("seed", range(3))
def test_lanes_in_different_copies_of_a_function_keep_apart(seed):
    """Both ways of a branch call it, so that the copies' registers are in use at once."""
    body = f"""
    and.b32 %r3, %r1, 1;
    setp.eq.u32 %p1, %r3, 0;
    @%p1 bra EVEN;
    {call_gcd("%r1", 45, "%r10")}
    bra DONE;
EVEN:
    {call_gcd("%r1", 64, "%r10")}
DONE:
    """
    expected = [math.gcd(thread, 45 if thread % 2 else 64) for thread in range(THREADS)]
    assert run(body, GCD, seed=seed) == expected


def test_structures_go_in_and_out_through_functions_that_call():
    """The caller's variables keep their values: those of the callee, of the same names, are others."""
    body = """
    cvt.u64.u32 %rd1, %r1;
    {
    .param .align 8 .b8 param0[16];
    .param .b32 param1;
    .param .align 8 .b8 retval0[16];
    st.param.b64 [param0], %rd1;
    st.param.b32 [param0+8], %r1;
    st.param.b32 [param1], 30;
    call.uni (retval0), pair, (param0, param1);
    ld.param.b64 %rd2, [retval0];
    ld.param.b32 %r4, [retval0+8];
    ld.param.b32 %r5, [param0+8];
    }
    cvt.u32.u64 %r10, %rd2;
    mad.lo.u32 %r10, %r4, 1000, %r10;
    mad.lo.u32 %r10, %r5, 100000, %r10;
    """
    gcds = [math.gcd(thread, 30) for thread in range(THREADS)]
    expected = [thread + g + 1000 * g + 100000 * thread for thread, g in enumerate(gcds)]
    assert run(body, GCD + PAIR) == expected


def test_what_cannot_be_called_is_named_with_its_line():
    recursive = """
.func loop(.param .b32 loop_param_0)
{
    {
    .param .b32 param0;
    call.uni loop, (param0);
    }
    ret;
}
"""
    for body, functions, message in (
        ("{\n.param .b32 param0;\ncall.uni loop, (param0);\n}", recursive, "recursion of loop is not impl"),
        ("call.uni gcd, (%r1);", GCD, "gcd takes other arguments"),
        ("call.uni (%r2), gcd, (%r1, %r1);", GCD, "not implemented but with .param variables"),
        ("call.uni (%r2), malloc, (%r1);", ".extern .func (.param .b64 r) malloc (.param .b64 a);",
         "malloc has no body in this module"),
        ("call.uni %rd1, (%r1);", "", "call through a pointer is not implemented"),
    ):  # fmt: skip
        text = kernel(body, shared=functions)
        with pytest.raises(EmulatorError, match=message) as caught:
            Machine().program(text)
        assert caught.value.line == line_of(text, r"call\.uni")


def printing(form, values, *, threads=32):
    """A kernel that prints from its lanes below 2; `values` are the bytes of the arguments."""
    text = ", ".join(str(byte) for byte in form.encode() + b"\0")
    data = ", ".join(str(byte) for byte in values)
    return kernel(
        """
    mov.u32 %r1, %tid.x;
    setp.lt.u32 %p1, %r1, 2;
    mov.u64 %rd3, form;
    cvta.global.u64 %rd3, %rd3;
    mov.u64 %rd4, values;
    cvta.global.u64 %rd4, %rd4;
    {
    .param .b64 param0;
    .param .b64 param1;
    .param .b32 retval0;
    st.param.b64 [param0], %rd3;
    st.param.b64 [param1], %rd4;
    @%p1 call.uni (retval0), vprintf, (param0, param1);
    @%p1 ld.param.b32 %r10, [retval0];
    }
    ld.param.u64 %rd1, [out];
    @%p1 st.global.b32 [%rd1], %r10;
    """,
        params=".param .u64 out",
        shared=f".global .b8 form[] = {{{text}}};\n.global .align 8 .b8 values[] = {{{data}}};\n"
        ".extern .func (.param .b32 func_retval0) vprintf "
        "(.param .b64 vprintf_param_0, .param .b64 vprintf_param_1);",
    )


def test_printf_writes_what_c_would(capsys):
    values = struct.pack("<iIq", -5, 0xBEEF, 1 << 40) + struct.pack("<dii", 2.5, 65, 9)
    text = printing("%d %#x|%lld|%7.3f|%c|%*d|%%\n", values + struct.pack("<i", 4))
    machine = Machine()
    out = machine.memory.allocate(4)
    machine.run(text, 1, 32, out.to_bytes(8, "little"))
    line = f"-5 0xbeef|{1 << 40}|  2.500|A|{4:9d}|%\n"
    assert capsys.readouterr().out == 2 * line
    assert machine.download(out, (1,), np.uint32).tolist() == [7]  # arguments


def test_a_failed_assertion_is_reported_in_its_own_words():
    strings = {"message": "n < 100", "file": "kernel.cu", "function": "void k(int)"}
    data = "".join(
        f".global .b8 {name}[] = {{{', '.join(str(b) for b in text.encode())}, 0}};\n"
        for name, text in strings.items()
    )
    names = ("param0", "param1", "param2", "param3", "param4")
    moves = "".join(
        f"mov.u64 %rd{at}, {name};\ncvta.global.u64 %rd{at}, %rd{at};\nst.param.b64 [param{at}], %rd{at};\n"
        for at, name in ((0, "message"), (1, "file"), (3, "function"))
    )
    text = kernel(
        f"mov.u32 %r1, %tid.x;\nsetp.eq.u32 %p1, %r1, 7;\n{{\n.param .b64 param0;\n.param .b64 param1;\n"
        ".param .b32 param2;\n.param .b64 param3;\n.param .b64 param4;\n"
        f"{moves}st.param.b32 [param2], 42;\nst.param.b64 [param4], 1;\n"
        f"@%p1 call.uni __assertfail, ({', '.join(names)});\n}}",
        shared=data
        + ".extern .func __assertfail (.param .b64 a, .param .b64 b, .param .b32 c, .param .b64 d, "
        ".param .b64 e) .noreturn;\n",
    )
    with pytest.raises(EmulatorError) as caught:
        Machine().run(text, 1, 32)
    found = caught.value.violation
    assert found.kind == "assert"
    assert found.lanes == (7,)
    assert found.message == "assertion `n < 100` failed in void k(int), kernel.cu:42"
    assert found.line == line_of(text, r"call\.uni __assertfail")
