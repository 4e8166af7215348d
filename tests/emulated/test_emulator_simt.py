"""Divergence and reconvergence, exchange between lanes, and partial warps, against Python models of single
threads.
"""

from __future__ import annotations

import random

import numpy as np
import pytest

from emulated.kernels import Machine, kernel, line_of
from emulated.lanes import run_lanes
from sm12x.emulator.errors import EmulatorError

SEEDS = range(4)
NUMBERS = np.random.default_rng(5).integers(0, 1 << 32, 96, np.uint64).astype(np.uint32)


@pytest.mark.parametrize("seed", SEEDS)
def test_each_lane_leaves_a_loop_when_its_own_condition_says(seed):
    """Collatz: the number of steps differs from lane to lane, with a branch inside the loop."""
    code = """
    mov.b32 %r11, 0;
    add.u32 %r2, %r60, 1;
LOOP:
    setp.eq.u32 %p2, %r2, 1;
    @%p2 bra DONE;
    and.b32 %r3, %r2, 1;
    setp.eq.u32 %p3, %r3, 0;
    @%p3 bra EVEN;
    mad.lo.u32 %r2, %r2, 3, 1;
    bra.uni NEXT;
EVEN:
    shr.u32 %r2, %r2, 1;
NEXT:
    add.u32 %r11, %r11, 1;
    bra.uni LOOP;
DONE:
    // converged again: every lane of the warp counts
    activemask.b32 %r12;
    """
    steps, active = run_lanes(code, [], ["b32", "b32"], seed=seed)

    def collatz(n):
        count = 0
        while n != 1:
            n = 3 * n + 1 if n % 2 else n // 2
            count += 1
        return count

    assert steps.tolist() == [collatz(thread + 1) for thread in range(96)]
    assert set(active.tolist()) == {0xFFFFFFFF}


@pytest.mark.parametrize("seed", SEEDS)
def test_nested_divergence_and_exits(seed):
    """Lanes that end inside of a branch are gone behind it; the rest meet again."""
    machine = Machine()
    out = machine.upload(np.zeros(64, np.uint32), "out")
    text = kernel(f"""
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd1, %r1, 4;
    add.u64 %rd1, %rd1, {out};
    and.b32 %r2, %r1, 3;
    setp.eq.u32 %p1, %r2, 0;
    @!%p1 bra ELSE;
    and.b32 %r3, %r1, 4;
    setp.ne.u32 %p2, %r3, 0;
    @%p2 ret;
    mov.b32 %r4, 100;
    bra MEET;
ELSE:
    setp.eq.u32 %p3, %r2, 1;
    @%p3 bra INNER;
    mov.b32 %r4, 200;
    bra MEET;
INNER:
    mov.b32 %r4, 300;
    setp.gt.u32 %p4, %r1, 40;
    @%p4 exit;
MEET:
    bar.sync 0;  // all lanes that are left, together
    vote.sync.ballot.b32 %r5, %p5, -1;
    activemask.b32 %r5;
    popc.b32 %r5, %r5;
    add.u32 %r4, %r4, %r5;
    st.global.b32 [%rd1], %r4;
    """)
    machine.run(text, 1, 64, seed=seed)
    got = machine.download(out, (64,), np.uint32)
    ended = [(t % 4 == 0 and t & 4) or (t % 4 == 1 and t > 40) for t in range(64)]
    for t in range(64):
        alive = sum(not e for e in ended[t // 32 * 32 : t // 32 * 32 + 32])
        value = 100 if t % 4 == 0 else 300 if t % 4 == 1 else 200
        assert got[t] == (0 if ended[t] else value + alive), t


def test_indexed_branches_go_where_each_lane_says():
    code = """
    rem.u32 %r2, %r60, 3;
    ts: .branchtargets A, B, C;
    brx.idx %r2, ts;
A:  mov.b32 %r11, 7;
    bra END;
B:  mov.b32 %r11, 8;
    bra END;
C:  mov.b32 %r11, 9;
END:
    activemask.b32 %r12;
    """
    got, active = run_lanes(code, [], ["b32", "b32"])
    assert got.tolist() == [7 + t % 3 for t in range(96)]
    assert set(active.tolist()) == {0xFFFFFFFF}


def shuffled(mode, values, b, c):
    """PTX ISA, shfl.sync, for one warp."""
    out, valid = [], []
    for lane in range(32):
        segment, clamp, b_lane = c[lane] >> 8 & 31, c[lane] & 31, b[lane] & 31
        most = (lane & segment) | (clamp & ~segment & 31)
        least = lane & segment
        j = {
            "up": lane - b_lane,
            "down": lane + b_lane,
            "bfly": lane ^ b_lane,
            "idx": least | (b_lane & ~segment & 31),
        }[mode]
        ok = j >= most if mode == "up" else j <= most
        out.append(values[j] if ok else values[lane])
        valid.append(ok)
    return out, valid


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("constant", [True, False])
def test_shuffles(mode, constant):
    rng = random.Random(mode)
    b, c = [rng.randrange(32) for _ in range(96)], [rng.choice((0, 31, 0x1C03, 0x181F, 0x1000))] * 96
    if constant:
        b = [b[0]] * 96
    operands = f"{b[0]}, {c[0]}" if constant else "%r2, %r3"
    code = f"shfl.sync.{mode}.b32 %r11|%p2, %r1, {operands}, -1;\nselp.b32 %r12, 1, 0, %p2;"
    got, flags = run_lanes(code, [("b32", NUMBERS), ("b32", b), ("b32", c)], ["b32", "b32"])
    for first in range(0, 96, 32):
        warp = slice(first, first + 32)
        values, valid = shuffled(mode, NUMBERS[warp].tolist(), b[warp], c[warp])
        assert got[warp].tolist() == values
        assert flags[warp].tolist() == valid


@pytest.mark.parametrize("seed", SEEDS)
def test_lanes_named_in_a_member_mask_wait_for_each_other_in_divergent_code(seed):
    """Both sides of a branch come to the same shuffle by themselves; its mask names all lanes."""
    code = """
    and.b32 %r2, %r60, 1;
    setp.eq.u32 %p2, %r2, 0;
    mov.b32 %r3, 0;
    @%p2 bra SHUFFLE;
AGAIN:
    add.u32 %r3, %r3, 1;
    setp.lt.u32 %p3, %r3, 5;
    @%p3 bra AGAIN;
    bra SHUFFLE;
NEVER:
    mov.b32 %r3, 99;
SHUFFLE:
    shfl.sync.bfly.b32 %r11, %r1, 1, 31, -1;
    vote.sync.ballot.b32 %r12, %p2, -1;
    """
    got, votes = run_lanes(code, [("b32", NUMBERS)], ["b32", "b32"], seed=seed)
    assert got.tolist() == NUMBERS[np.arange(96) ^ 1].tolist()
    assert set(votes.tolist()) == {0x55555555}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_vote_inside_of_a_branch_is_among_the_lanes_that_its_mask_names(seed):
    code = """
    setp.lt.u32 %p2, %r60, 12;
    and.b32 %r3, %r60, 1;
    setp.ne.u32 %p3, %r3, 0;
    @%p2 bra LOW;
    vote.sync.ballot.b32 %r11, %p3, 0xFFFFF000;
    vote.sync.any.pred %p4, %p3, 0xFFFFF000;
    vote.sync.all.pred %p5, %p3, 0xFFFFF000;
    elect.sync %r12|%p6, 0xFFFFF000;
    redux.sync.add.u32 %r13, %r60, 0xFFFFF000;
    bra END;
LOW:
    vote.sync.ballot.b32 %r11, %p3, 0xFFF;
    vote.sync.any.pred %p4, %p3, 0xFFF;
    vote.sync.all.pred %p5, %p3, 0xFFF;
    elect.sync %r12|%p6, 0xFFF;
    redux.sync.add.u32 %r13, %r60, 0xFFF;
END:
    selp.b32 %r14, 1, 0, %p4;
    selp.b32 %r15, 1, 0, %p5;
    selp.b32 %r16, 1, 0, %p6;
    """
    ballot, leader, total, some, every, elected = run_lanes(code, [], ["b32"] * 6, seed=seed, threads=32)
    low = np.arange(32) < 12
    assert ballot.tolist() == np.where(low, 0xAAA, 0xAAAAA000).tolist()
    assert leader.tolist() == np.where(low, 0, 12).tolist()
    assert total.tolist() == np.where(low, sum(range(12)), sum(range(12, 32))).tolist()
    assert some.tolist() == [1] * 32
    assert every.tolist() == [0] * 32
    assert elected.tolist() == [lane in (0, 12) for lane in range(32)]


def test_a_deadlock_report_says_who_waits_for_what():
    code = """
    mov.u32 %r1, %tid.x;
    setp.lt.u32 %p1, %r1, 30;
    @%p1 bra A;
    barrier.sync 1, 64;
A:
    bar.warp.sync 0xFFFFFFFF;
    """
    text = kernel(code)
    with pytest.raises(EmulatorError, match="deadlock") as caught:
        Machine().run(text, 1, 64)
    report = str(caught.value).splitlines()
    assert caught.value.violation.kind == "deadlock"
    first = line_of(text, "barrier.sync 1")
    waits = f"CTA 0 warp 0 (2 lanes) waits for barrier 1 (34 of 64 threads are there) at PTX line {first}"
    parked = f"warp 0 (30 lanes) waits for its other lanes before PTX line {line_of(text, 'bar.warp')}"
    other = f"warp 1 (32 lanes) waits for barrier 1 (34 of 64 threads are there) at PTX line {first}"
    for expected in (waits, parked, other):
        assert any(expected in line for line in report), expected


def test_a_guard_that_leaves_lanes_out_of_an_aligned_instruction_is_reported():
    text = kernel("mov.u32 %r1, %tid.x;\nsetp.lt.u32 %p1, %r1, 8;\n@%p1 bar.sync 0;")
    with pytest.raises(EmulatorError, match="divergence: only 8 of the warp's 32 lanes") as caught:
        Machine().run(text, 1, 32)
    assert caught.value.violation.lanes == tuple(range(8, 32))
    assert caught.value.line == line_of(text, "@%p1 bar")


@pytest.mark.parametrize("seed", SEEDS)
def test_threads_that_have_returned_are_not_waited_for(seed):
    code = """
    setp.ge.u32 %p2, %r60, 50;
    @%p2 ret;
    bar.sync 0;
    vote.sync.ballot.b32 %r11, %p1, -1;
    mov.b32 %r2, 1;
    bar.red.popc.u32 %r12, 0, %p1;
    """
    votes, count = run_lanes(code, [], ["b32", "b32"], seed=seed, threads=64)
    assert count.tolist() == [sum(t % 3 == 0 for t in range(50))] * 50 + [0] * 14
    assert votes.tolist()[32:50] == [sum(1 << t - 32 for t in range(32, 50) if t % 3 == 0)] * 18


@pytest.mark.parametrize("threads", [1, 33, 95])
def test_blocks_need_not_be_whole_warps(threads):
    code = """
    activemask.b32 %r11;
    bar.sync 0;
    vote.sync.ballot.b32 %r12, %p1, -1;
    mov.u32 %r13, %nwarpid;
    """
    active, votes, _ = run_lanes(code, [], ["b32"] * 3, threads=threads)
    for t in range(threads):
        lanes = [t // 32 * 32 + lane for lane in range(32) if t // 32 * 32 + lane < threads]
        assert active[t] == sum(1 << lane % 32 for lane in lanes)
        assert votes[t] == sum(1 << lane % 32 for lane in lanes if lane % 3 == 0)


def test_special_registers():
    machine = Machine()
    count = 2 * 3 * 2 * 48
    out = machine.memory.allocate(count * 16, "out")
    text = kernel(f"""
    mov.u32 %r1, %tid.x;  mov.u32 %r2, %tid.y;  mov.u32 %r3, %tid.z;
    mov.u32 %r4, %ntid.x; mov.u32 %r5, %ntid.y; mov.u32 %r6, %ntid.z;
    mov.u32 %r7, %ctaid.x; mov.u32 %r8, %ctaid.y; mov.u32 %r9, %ctaid.z;
    mov.u32 %r10, %nctaid.x; mov.u32 %r11, %nctaid.y;
    mad.lo.u32 %r12, %r3, %r5, %r2;
    mad.lo.u32 %r12, %r12, %r4, %r1;         // thread
    mad.lo.u32 %r13, %r9, %r11, %r8;
    mad.lo.u32 %r13, %r13, %r10, %r7;        // CTA
    mul.lo.u32 %r14, %r4, %r5;
    mul.lo.u32 %r14, %r14, %r6;
    mad.lo.u32 %r15, %r13, %r14, %r12;
    mul.wide.u32 %rd1, %r15, 16;
    add.u64 %rd1, %rd1, {out};
    mov.u32 %r16, %laneid;
    mov.u32 %r17, %warpid;
    mov.u32 %r18, %lanemask_lt;
    st.global.v4.b32 [%rd1], {{%r15, %r16, %r17, %r18}};
    """)
    machine.run(text, (2, 3, 2), (4, 6, 2))
    got = machine.download(out, (count, 4), np.uint32)
    thread = np.arange(count) % 48
    assert (got[:, 0] == np.arange(count)).all()
    assert (got[:, 1] == thread % 32).all()
    assert (got[:, 2] == thread // 32).all()
    assert (got[:, 3] == (1 << thread % 32) - 1).all()
