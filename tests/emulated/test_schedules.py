"""What seeds decide: when asynchronous operations complete, in which order, and when those go on who wait."""

from __future__ import annotations

import numpy as np
import pytest

from emulated.kernels import Machine, kernel
from emulated.planted.planting import BULK_LOAD, SHARED, init, wait
from sm12x.emulator.scheduler import Scheduler

SEEDS = range(12)  # all that seeds differ in, in all combinations


def last_word(code, seed, threads=32, **options):
    """What thread 0 has in %r9 at the end; %rd1 and %rd2 are 64 bytes of ones and of twos."""
    machine = Machine()
    ones, twos = (machine.upload(np.full(16, value, np.uint32)) for value in (1, 2))
    out = machine.upload(np.zeros(1, np.uint32))
    text = kernel(
        f"""
    mov.u64 %rd1, {ones};
    mov.u64 %rd2, {twos};
    mov.u64 %rd3, {out};
    mov.u32 %r1, %tid.x;
    setp.eq.u32 %p1, %r1, 0;
    {init()}
    {code}
    @%p1 st.global.b32 [%rd3], %r9;
    """,
        shared=SHARED,
    )
    machine.run(text, 1, threads, seed=seed, races=False, **options)
    return int(machine.download(out, 1, np.uint32)[0])


def test_copies_complete_in_any_order():
    """The later of two copies to one place is what is found there."""
    code = f"""
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 128;
    @%p1 {BULK_LOAD} [box], [%rd1], 64, [bar];
    @%p1 {BULK_LOAD} [box], [%rd2], 64, [bar];
    {wait()}
    ld.shared.b32 %r9, [box];
    """
    assert {last_word(code, seed) for seed in SEEDS} == {1, 2}


def test_copies_complete_late():
    """Behind a thousand instructions that do not wait for them, under most seeds; under some, early."""
    code = f"""
    mov.b32 %r9, 5;
    @%p1 st.shared.b32 [box], %r9;
    @%p1 fence.proxy.async.shared::cta;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 64;
    @%p1 {BULK_LOAD} [box], [%rd1], 64, [bar];
    mov.b32 %r8, 0;
WORK:
    add.u32 %r8, %r8, 1;
    setp.lt.u32 %p2, %r8, 100;
    @%p2 bra WORK;
    ld.shared.b32 %r9, [box];
    {wait()}
    """
    found = [last_word(code, seed) for seed in SEEDS]
    assert found.count(5) >= len(SEEDS) / 2
    assert set(found) == {1, 5}


def test_who_waited_goes_on_late_under_some_seeds():
    """Warp 0 waits for warp 1's arrival, which writes something much later."""
    code = f"""
    mov.b32 %r7, 0;
    @%p1 st.shared.b32 [box], %r7;
    bar.sync 0;
    setp.ge.u32 %p3, %r1, 32;
    @%p3 bra.uni OTHER;
    {wait()}
    ld.shared.b32 %r9, [box];
    bra.uni END;
OTHER:
    setp.eq.u32 %p4, %r1, 32;
    mov.b32 %r8, 0;
LATER:
    add.u32 %r8, %r8, 1;
    setp.eq.u32 %p5, %r8, 1000;
    and.pred %p5, %p5, %p4;
    @%p5 mbarrier.arrive.shared::cta.b64 _, [bar];
    setp.lt.u32 %p2, %r8, 1350;
    @%p2 bra LATER;
    mov.b32 %r7, 7;
    @%p4 st.shared.b32 [box], %r7;
END:
    """
    assert {last_word(code, seed, 64) for seed in SEEDS} == {0, 7}


@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_seed_is_the_same_run(seed):
    code = f"bar.sync 0;\n@%p1 mbarrier.arrive.shared::cta.b64 _, [bar];\n{wait()}\nmov.b32 %r9, 3;"

    def trace():
        found, burst = [], Scheduler._burst_of

        def noted(self, split):
            found.append((split.warp.index, split.pc))
            burst(self, split)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Scheduler, "_burst_of", noted)
            last_word(code, seed, 128)
        return found

    assert trace() == trace()
