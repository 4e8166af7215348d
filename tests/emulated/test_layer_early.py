"""Expert layers behind a grid that is still running: what early_routes lets the first GEMM read by then."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "gpu"))

from layer_forced import kernels

import sm12x
from emulated.kernels import kernel
from sm12x import abi, emulator
from sm12x.emulator import launches
from sm12x.emulator.chain import Link
from sm12x.emulator.errors import EmulatorError
from sm12x.emulator.launch import load
from sm12x.reference import quantize_per_channel

BF16 = np.dtype(ml_dtypes.bfloat16)
TOKENS, TOP_K, EXPERTS, HIDDEN, INNER = 3, 2, 4, 64, 48
# Lets the next grid begin, and then complements words that lie somewhere else.
WRITER = kernel(
    """
    griddepcontrol.wait;
    griddepcontrol.launch_dependents;
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %rd0, %r0, 4;
    ld.param.u64 %rd1, [to];
    add.s64 %rd1, %rd1, %rd0;
    ld.global.u32 %r1, [%rd1];
    not.b32 %r1, %r1;
    st.global.u32 [%rd1], %r1;
    """,
    params=".param .u64 to",
)
# What the grid in front writes: words of it, and where its address is among the parameters of moe_route.
WRITTEN = {
    "topk_ids": (TOKENS * TOP_K, lambda route: route.topk_ids),
    "expert_map": (2 * EXPERTS, lambda route: route.expert_map),
    "x": (HIDDEN // 2, lambda route: route.tokens.x),
    "topk_weights": (TOKENS * TOP_K, lambda route: route.topk_weights),
}


@pytest.fixture
def layer():
    rng = np.random.default_rng()
    (w1, w1_scale), (w2, w2_scale) = (
        quantize_per_channel((rng.standard_normal((EXPERTS, n, k)) * k**-0.5).astype(np.float32))
        for n, k in ((2 * INNER, HIDDEN), (HIDDEN, INNER))
    )
    expert_map = np.full(2 * EXPERTS, -1, np.int32)
    expert_map[rng.permutation(2 * EXPERTS)[:EXPERTS]] = rng.permutation(EXPERTS)
    arrays = {
        "x": rng.standard_normal((TOKENS, HIDDEN)).astype(BF16),
        "w1": w1,
        "w2": w2,
        "topk_weights": rng.random((TOKENS, TOP_K)).astype(np.float32),
        "topk_ids": rng.integers(0, 2 * EXPERTS, (TOKENS, TOP_K)).astype(np.int32),
    }
    scales = {"w1_scale": w1_scale, "w2_scale": w2_scale, "expert_map": expert_map}
    return lambda **more: sm12x.fused_moe(**arrays, **scales, **more).view(np.uint16)


@pytest.fixture
def behind_a_writer(monkeypatch, layer):
    """Runs the layer behind a grid that writes one of its arrays, in a schedule in which grids overlap."""
    really = launches.launch_chain

    def run(written, **more):
        words, address_in = WRITTEN[written]
        seen = []

        def launch_chain(links, *, memory):
            route = abi.sm12x_route_params.from_buffer_copy(links[0].parameters)
            seen.append(route.early)
            at = address_in(route)
            content = np.frombuffer(memory.read(at, 4 * words), np.uint32)
            memory.write(at, (~content).view(np.uint8))
            module = load(WRITER, memory)
            program = module.kernel(next(iter(module.ir.kernels)))
            parameters = np.array([at], np.uint64).tobytes()
            writer = Link(program, (1, 1, 1), (words, 1, 1), 0, parameters, seed=links[0].seed)
            return really([writer, *links], memory=memory)[1:]

        monkeypatch.setattr(launches, "launch_chain", launch_chain)
        seed = 2 * random.randrange(10**6) + 1  # odd: grids overlap (sm12x.emulator.chain)
        print(f"seed {seed}")
        with kernels(whole=False), emulator.use(sms=5, seed=seed):
            out = layer(backend="emulator", **more)
        assert seen == [int(more.get("early_routes", False))]
        return out

    return run


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("written", ["x", "topk_weights"])
def test_tokens_and_weights_may_come_from_the_grid_in_front(behind_a_writer, layer, written, early):
    with kernels(whole=False), emulator.use(sms=5):
        expected = layer(backend="emulator")
    np.testing.assert_array_equal(behind_a_writer(written, early_routes=early), expected)


@pytest.mark.parametrize("written", ["topk_ids", "expert_map"])
def test_without_the_promise_the_grid_in_front_may_write_the_routes(behind_a_writer, layer, written):
    with kernels(whole=False), emulator.use(sms=5):
        expected = layer(backend="emulator")
    np.testing.assert_array_equal(behind_a_writer(written), expected)


@pytest.mark.parametrize("written", ["topk_ids", "expert_map"])
def test_routes_that_the_grid_in_front_writes_are_noticed(behind_a_writer, written):
    with pytest.raises(EmulatorError, match=r"dependency: .* (reads|writes) .* before its griddepcontrol"):
        behind_a_writer(written, early_routes=True)


def test_the_promise_changes_no_bit(layer):
    with kernels(whole=False), emulator.use(sms=5):
        late = layer(backend="emulator")
        for seed in (1, 2, 3):
            with emulator.use(sms=5, seed=seed):
                np.testing.assert_array_equal(layer(backend="emulator", early_routes=True), late)
