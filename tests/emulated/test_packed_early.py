"""Packed kernels behind a grid that is still running: what early_weights lets them read by then."""

from __future__ import annotations

import random

import numpy as np
import pytest

from emulated.kernels import Machine, kernel, ptx
from emulated.packed_case import PackedCase
from sm12x import manifest
from sm12x.emulator.chain import Link, launch_chain
from sm12x.emulator.errors import EmulatorError

KEYS = ["fp8_packed_128x8x128_swap", "fp8_packed_128x16x64_swap", "fp8_packed_64x128x128_pingpong"]
ROWS, N, K = (5, 0, 9, 3), 136, 208
# Lets the next grid begin, and then writes 32 words that lie somewhere else.
WRITER = kernel(
    """
    griddepcontrol.wait;
    griddepcontrol.launch_dependents;
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %rd0, %r0, 4;
    ld.param.u64 %rd1, [to];
    ld.param.u64 %rd2, [from];
    add.s64 %rd1, %rd1, %rd0;
    add.s64 %rd2, %rd2, %rd0;
    ld.global.u32 %r1, [%rd2];
    st.global.u32 [%rd1], %r1;
    """,
    params=".param .u64 to, .param .u64 from",
)


def odd_seed():
    """Of a schedule in which grids overlap (sm12x.emulator.chain)."""
    seed = 2 * random.randrange(10**6) + 1
    print(f"seed {seed}")
    return seed


def run(key, written, *, early, least_units, seed):
    """A call whose array `written`, of 32 words at most, is written by the grid in front of it."""
    variant, m = manifest.default().variants[key], Machine()
    case = PackedCase(ROWS, N, K, seed)
    params = case.parameters(m, variant, 3, least_units=least_units, early_weights=early)
    kept = {"bounds": case.offsets, "b": case.b.reshape(-1).view(np.uint32), "a_scale": case.a_scale}[written]
    words = min(32, kept.size)
    address = {"bounds": params.bounds, "b": case.b_address, "a_scale": params.a_scale}[written]
    source = m.upload(np.resize(kept[:words].view(np.uint32), 32), "what the writer copies")
    m.memory.write(address, np.full(4 * words, 0x7F, np.uint8))
    writer = np.array([address, source], np.uint64).tobytes()
    links = [
        Link(m.program(WRITER), (1, 1, 1), (words, 1, 1), 0, writer, seed=seed),
        Link(
            m.program(ptx(key)),
            (3, 1, 1) if variant.grid_axis == "x" else (1, 3, 1),
            (variant.threads, 1, 1),
            variant.shared_memory,
            bytes(params),
            programmatic=True,
            seed=seed,
        ),
    ]
    launch_chain(links, memory=m.memory)
    ratio = case.error_ratio(case.output(m, params))
    assert ratio <= 1, f"{ratio} of the bound"


@pytest.mark.parametrize("least_units", [0, 1], ids=["whole", "split"])
@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("key", KEYS)
def test_scales_of_rows_may_come_from_the_grid_in_front(key, early, least_units):
    """Rows, their scales and all else but bounds and weights: whatever was promised."""
    run(key, "a_scale", early=early, least_units=least_units, seed=odd_seed())


@pytest.mark.parametrize("written", ["bounds", "b"])
@pytest.mark.parametrize("key", KEYS)
def test_what_is_read_early_is_noticed_where_the_grid_in_front_writes_it(key, written):
    seed = odd_seed()
    with pytest.raises(EmulatorError, match=r"dependency: .* (reads|writes) .* before its griddepcontrol"):
        run(key, written, early=True, least_units=0, seed=seed)


@pytest.mark.parametrize("written", ["bounds", "b"])
@pytest.mark.parametrize("key", KEYS)
def test_without_the_promise_the_grid_in_front_may_write_all(key, written):
    seed = odd_seed()
    run(key, written, early=False, least_units=0, seed=seed)


@pytest.mark.parametrize("groups", [1, 3, 4, 5, 130])
def test_offsets_may_begin_at_any_word(groups):
    """They are read four at a time where they lie so, never behind the last one."""
    key = KEYS[0]
    variant = manifest.default().variants[key]
    for shift in range(4):
        m = Machine()
        seed = odd_seed()
        rows = [1, *((i + shift) % 3 for i in range(1, groups))]
        case = PackedCase(rows, 8, 64, seed)
        params = case.parameters(m, variant, 2, shift=shift)
        m.run_shipped(key, 2, params, seed=seed)
        assert case.error_ratio(case.output(m, params)) <= 1, (groups, shift)
