"""clusterlaunchcontrol: CTAs that take over the work of others, and the 128-bit registers that it needs."""

from __future__ import annotations

import numpy as np
import pytest

from emulated.kernels import Machine, kernel, line_of
from emulated.lanes import run_lanes
from sm12x.emulator.errors import EmulatorError
from sm12x.emulator.launch import launch

# A persistent kernel as CUTLASS's dynamic schedulers are: do the tile of this CTA, then those of cancelled
# ones, and count each tile, by its number, and all that a CTA did.
DYNAMIC = """
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ctaid.y;
    mov.b32 %r20, 0;
    mov.u32 %r3, response;
    mov.u32 %r4, barrier;
    mbarrier.init.shared.b64 [%r4], 1;
    fence.mbarrier_init.release.cluster;
    ld.param.u64 %rd1, [out];
WORK:
    mov.u32 %r5, %nctaid.x;
    mad.lo.u32 %r6, %r2, %r5, %r1;
    mul.wide.u32 %rd2, %r6, 4;
    add.u64 %rd2, %rd1, %rd2;
    atom.global.add.u32 %r7, [%rd2], 1;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r4], 16;
    clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.b128 [%r3], [%r4];
POLL:
    mbarrier.try_wait.parity.shared.b64 %p1, [%r4], %r20;
    @!%p1 bra POLL;
    xor.b32 %r20, %r20, 1;
    ld.shared.b128 %q1, [%r3];
    clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p2, %q1;
    @!%p2 bra DONE;
    clusterlaunchcontrol.query_cancel.get_first_ctaid.v4.b32.b128 {%r1, %r2, %r8, _}, %q1;
    clusterlaunchcontrol.query_cancel.get_first_ctaid::x.b32.b128 %r9, %q1;
    setp.ne.u32 %p3, %r9, %r1;
    @%p3 trap;
    bra WORK;
DONE:
"""
SHARED = ".shared .align 16 .b8 response[16];\n.shared .align 8 .b64 barrier;"
QUADS = ".reg .b128 %q<8>;"


def dynamic(body=DYNAMIC):
    return kernel(body, params=".param .u64 out", shared=SHARED, registers=QUADS)


@pytest.mark.parametrize("resident", [None, 1, 3, 12])
@pytest.mark.parametrize("seed", range(3))
def test_every_tile_is_done_once_whoever_does_it(seed, resident):
    machine = Machine()
    out = machine.upload(np.zeros(12, np.uint32))
    program = machine.program(dynamic())
    launch(program, (4, 3, 1), (1, 1, 1), 0, out.to_bytes(8, "little"), memory=machine.memory, seed=seed,
           resident=resident)  # fmt: skip
    assert machine.download(out, (12,), np.uint32).tolist() == [1] * 12


def test_a_try_after_one_that_was_seen_to_fail_is_an_error():
    text = dynamic(DYNAMIC.replace("@!%p2 bra DONE;", "@!%p2 bra WORK;"))
    machine = Machine()
    out = machine.upload(np.zeros(2, np.uint32))
    with pytest.raises(EmulatorError, match="already seen that one failed") as caught:
        machine.run(text, 2, 1, out.to_bytes(8, "little"), seed=1, limit=20_000)
    assert caught.value.violation.line == line_of(text, "try_cancel")


def test_zeros_are_a_refusal_and_other_bytes_are_no_response():
    zeros = """
    mov.b64 %rd5, 0;
    mov.b128 %q1, {%rd5, %rd5};
    clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p2, %q1;
    @%p2 trap;
    """
    Machine().run(kernel(zeros, registers=QUADS), 1, 32)
    for body, message in (
        (zeros.replace("%rd5, 0", "%rd5, 77"), "no response of try_cancel"),
        (zeros + "clusterlaunchcontrol.query_cancel.get_first_ctaid::y.b32.b128 %r9, %q1;", "that failed"),
    ):
        with pytest.raises(EmulatorError, match=message):
            Machine().run(kernel(body, registers=QUADS), 1, 32)


def test_registers_of_128_bits_move_and_keep_the_lanes_that_do_not():
    code = """
    { .reg .b128 %q<4>; .reg .b64 %a<4>; .reg .b32 %b;
    mov.b128 %q1, {%rd1, %rd2};
    mov.b128 %q2, {%rd2, %rd1};
    @%p1 mov.b128 %q2, %q1;
    mov.b128 {%rd11, %rd12}, %q2; }
    """
    rng = np.random.default_rng(17)
    a, b = (rng.integers(0, 1 << 63, 96, np.uint64) for _ in range(2))
    low, high = run_lanes(code, [("b64", a), ("b64", b)], ["b64", "b64"])
    third = np.arange(96) % 3 == 0
    assert (low == np.where(third, a, b)).all()
    assert (high == np.where(third, b, a)).all()


@pytest.mark.parametrize("guard", ["", "@%p1"])
def test_loads_and_stores_of_128_bits(guard):
    code = f"""
    {{ .reg .b128 %q<4>; .reg .b32 %a<3>; .shared .align 16 .b8 buffer[1536];
    mov.u32 %a2, buffer;
    mad.lo.u32 %a1, %r60, 16, %a2;
    st.shared.v2.b64 [%a1], {{%rd2, %rd1}};
    mov.b128 %q1, {{%rd1, %rd2}};
    {guard} st.shared.b128 [%a1], %q1;
    mov.b128 %q2, {{%rd1, %rd1}};
    ld.shared.b128 %q2, [%a1];
    mov.b128 {{%rd11, %rd12}}, %q2; }}
    """
    rng = np.random.default_rng(23)
    a, b = (rng.integers(0, 1 << 63, 96, np.uint64) for _ in range(2))
    low, high = run_lanes(code, [("b64", a), ("b64", b)], ["b64", "b64"])
    stored = np.arange(96) % 3 == 0 if guard else np.ones(96, bool)
    assert (low == np.where(stored, a, b)).all()
    assert (high == np.where(stored, b, a)).all()


def test_bytes_are_packed_and_unpacked():
    code = """
    { .reg .b8 %c<3>; .reg .b16 %e;
    cvt.u8.u16 %c0, %h1; cvt.u8.u16 %c1, %h2;
    mov.b16 %h11, {%c0, %c1};
    mov.b16 {%c1, %c0}, %h11;
    cvt.u16.u8 %h12, %c0; }
    """
    rng = np.random.default_rng(29)
    a, b = (rng.integers(0, 256, 96, np.uint16) for _ in range(2))
    packed, high = run_lanes(code, [("b16", a), ("b16", b)], ["b16", "b16"])
    assert (packed == (a | b << 8)).all()
    assert (high == b).all()


def test_a_cta_that_is_not_there_has_an_address_that_nothing_has():
    body = """
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, word;
    mapa.shared::cluster.u32 %r3, %r2, %r1;
    setp.eq.u32 %p1, %r1, 0;
    @%p1 st.shared::cluster.u32 [%r3], 5;
    """
    Machine().run(kernel(body, shared=".shared .b32 word;"), 1, 32)
    with pytest.raises(EmulatorError, match="shared memory"):
        Machine().run(kernel(body.replace("@%p1 st", "st"), shared=".shared .b32 word;"), 1, 32)
