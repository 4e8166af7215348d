"""An expert layer as one launch on emulated kernels: bit for bit the chain of launches with tiles of 8 tokens
and K whole, which other tests check; under every schedule, however many CTAs run at a time; its state is zero
behind every call.
"""

from __future__ import annotations

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "gpu"))

from layer_forced import chain_of_whole, kernels

import sm12x
from sm12x import abi, driver, emulator, manifest
from sm12x.ops import emulated
from sm12x.reference import fused_moe_float64, quantize_per_channel

BF16, FP16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
WORKSPACE, PATTERN = 1 << 18, 0xA5
STATE_BYTES = 4 * (abi.SM12X_LAYER_STATE + abi.SM12X_LAYER_STRIPS)
KINDS = [(name, gated) for name in ("silu", "gelu", "gelu_tanh", "relu2") for gated in (True, False)]

pytestmark = pytest.mark.skipif(
    not manifest.default().gemms(role="layer"), reason="the manifest has no kernel that does all of a layer"
)


@pytest.fixture(autouse=True)
def few_sms():
    """A CTA for each of fewer SMs: the same work in less time, and more of it for each."""
    with emulator.use(sms=5):
        yield


class Layer:
    """A random layer and its tokens; x, w1 and w2 have gaps between rows, which nothing may read."""

    def __init__(self, rng, tokens, top_k, experts, hidden, inner, *, ids=None, dtype=BF16, gap=0, **options):
        rows = 2 * inner if options.get("gated", True) else inner
        everywhere = len(options["expert_map"]) if "expert_map" in options else experts
        if ids is None:
            ids = rng.integers(-1, everywhere + 1, (tokens, top_k))
        self.ids = ids.astype(np.int64 if rng.random() < 0.5 else np.int32)
        self.x = _spread(rng.standard_normal((tokens, hidden)).astype(dtype), gap)
        (w1, w1_scale), (w2, w2_scale) = (
            quantize_per_channel((rng.standard_normal((experts, n, k)) * k**-0.5).astype(np.float32))
            for n, k in ((rows, hidden), (hidden, inner))
        )
        self.w1, self.w2 = _spread(w1, 2 * gap), _spread(w2, 2 * gap)
        self.topk_weights = rng.random(self.ids.shape).astype(np.float32)
        self.options = {"w1_scale": w1_scale, "w2_scale": w2_scale, **options}
        local = options["expert_map"] if "expert_map" in options else np.arange(experts)
        inside = (self.ids >= 0) & (self.ids < everywhere)
        found = np.where(inside, local[np.where(inside, self.ids, 0)], -1)
        self.valid = ((found >= 0) & (found < experts)).reshape(-1)
        self.topk_weights.reshape(-1)[~self.valid] = np.nan
        self.inner, self.hidden = inner, hidden

    @property
    def gated(self):
        return self.options.get("gated", True)

    def run(self, whole, **more):
        """out, h and y in the routes' order, and what else of the workspace was written."""
        out = np.full(self.x.shape, np.nan, self.x.dtype)
        workspace = np.full(WORKSPACE, PATTERN, np.uint8)
        forced = (None, None, True) if whole else chain_of_whole(self.gated)
        with kernels(*forced) as made:
            arrays = self.x, self.w1, self.w2, self.topk_weights, self.ids
            sm12x.fused_moe(*arrays, **self.options, backend="emulator", out=out, workspace=workspace, **more)
        at, routes = made.layouts[-1], self.ids.size
        sizes = {"h": 2 * routes * self.inner, "y": 2 * routes * self.hidden}
        parts = {
            name: workspace[getattr(at, name) : getattr(at, name) + size].reshape(routes, -1).copy()
            for name, size in sizes.items()
        }
        if not whole:
            rows = sm12x.route(self.ids, self.w1.shape[0], expert_map=self.options.get("expert_map"))
            row_of_route = rows.route_row.reshape(-1)
            return out, {name: part[row_of_route[self.valid]] for name, part in parts.items()}
        for name, size in sizes.items():
            assert (parts[name][~self.valid] == PATTERN).all(), f"{name} of a route without an expert"
            workspace[getattr(at, name) : getattr(at, name) + size] = PATTERN
        assert (workspace == PATTERN).all(), "written outside of h and y"
        return out, {name: part[self.valid] for name, part in parts.items()}

    def check(self):
        out, parts = self.run(True)
        states_are_zero()
        expected, its_parts = self.run(False)
        np.testing.assert_array_equal(out.view(np.uint16), expected.view(np.uint16))
        for name, part in parts.items():
            np.testing.assert_array_equal(part, its_parts[name], err_msg=name)
        return out


def _spread(values, gap):
    """The same with `gap` elements behind each row."""
    wide = np.zeros((*values.shape[:-1], values.shape[-1] + gap), values.dtype)
    wide[..., : values.shape[-1]] = values
    return wide[..., : values.shape[-1]]


def states_are_zero():
    device = emulated.device()
    assert device.counters
    for address in device.counters.values():
        with driver.current(device):
            assert not any(driver.read_bytes(device, address, STATE_BYTES, 0)), "a state was left behind"


@pytest.mark.parametrize(("activation", "gated"), KINDS)
def test_every_activation(rng, activation, gated):
    more = {"limit": 0.75} if activation == "silu" and gated else {}
    Layer(rng, 3, 2, 4, 96, 80, activation=activation, gated=gated, gap=16, **more).check()


@pytest.mark.parametrize("activation", ["swigluoai", "swigluoai_uninterleave"])
def test_swigluoai_in_both_layouts_with_biases(rng, activation):
    Layer(
        rng, 5, 2, 3, 64, 48, activation=activation, alpha=1.5, beta=0.5, limit=0.4, gap=8,
        bias1=rng.standard_normal((3, 96)).astype(np.float32),
        bias2=rng.standard_normal((3, 64)).astype(BF16),
    ).check()  # fmt: skip


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_both_types_and_sizes_that_no_tile_divides(rng, tokens, gated):
    sizes = rng.choice([16, 48, 112, 144, 208], 2)
    bias = rng.standard_normal((5, sizes[0])).astype(FP16)
    dtype = (BF16, FP16)[int(rng.integers(2))]
    Layer(rng, tokens, 3, 5, *map(int, sizes), dtype=dtype, gated=gated, bias2=bias).check()


def test_experts_elsewhere_invalid_and_duplicate_ids(rng):
    expert_map = np.full(12, -1, np.int32)
    expert_map[rng.permutation(12)[:4]] = rng.permutation(4)
    ids = rng.integers(-1, 13, (9, 3))
    ids[0], ids[1] = -1, int(np.argmax(expert_map >= 0))
    out = Layer(rng, 9, 3, 4, 64, 48, ids=ids, expert_map=expert_map, limit=2.0).check()
    assert (out[0].view(np.uint16) == 0).all()


@pytest.mark.parametrize("rows", [7, 8, 9, 40])
def test_one_expert_takes_everything(rng, rows):
    Layer(rng, rows, 1, 3, 64, 48, ids=np.ones((rows, 1), int)).check()


def test_no_valid_route_at_all_gives_zeros(rng):
    layer = Layer(rng, 5, 2, 3, 64, 48, ids=np.full((5, 2), -1))
    assert (layer.check().view(np.uint16) == 0).all()


def test_many_experts_and_64_tokens(rng):
    Layer(rng, 64, 1, 256, 32, 16, dtype=FP16).check()


def test_it_is_near_float64(rng):
    """Whatever the chain does."""
    layer = Layer(rng, 6, 3, 5, 144, 112, ids=rng.integers(0, 5, (6, 3)))
    out, _ = layer.run(True)
    arrays = layer.x, layer.w1, layer.w2, layer.topk_weights, layer.ids
    ref = fused_moe_float64(*arrays, **layer.options)
    error = np.linalg.norm(out.astype(np.float64) - ref, axis=1)
    assert (error <= 2e-2 * np.linalg.norm(ref, axis=1)).all()


@pytest.mark.parametrize("schedule", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("resident", [None, 1, 2])
def test_the_same_bits_under_every_schedule(rng, schedule, resident):
    """And however many CTAs run at a time: none waits for one that is not running."""
    layer = Layer(rng, 9, 3, 6, 144, 80, ids=rng.integers(-1, 6, (9, 3)))
    expected, _ = layer.run(False)
    with emulator.use(sms=5, seed=schedule, resident=resident) as session:
        out, _ = layer.run(True)
        states_are_zero()
    assert len(session.launches) == 1
    np.testing.assert_array_equal(out.view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("sms", [1, 2, 13, 40])
def test_a_grid_of_any_size(rng, sms):
    layer = Layer(rng, 5, 3, 6, 144, 80)
    expected, _ = layer.run(False)
    with emulator.use(sms=sms, seed=int(rng.integers(1 << 16))) as session:
        out, _ = layer.run(True)
        states_are_zero()
    assert [launch.grid for launch in session.launches] == [(sms, 1, 1)]
    np.testing.assert_array_equal(out.view(np.uint16), expected.view(np.uint16))


def test_select_takes_it_and_needs_no_workspace_of_the_caller(rng):
    layer = Layer(rng, 3, 2, 4, 64, 48)
    expected, _ = layer.run(False)
    arrays = layer.x, layer.w1, layer.w2, layer.topk_weights, layer.ids
    with emulator.use(sms=5) as session, kernels():
        out = sm12x.fused_moe(*arrays, **layer.options, backend="emulator")
        assert [launch.variant for launch in session.launches] == ["fp8_layer_gated_128x8x128_swap"]
        states_are_zero()
    np.testing.assert_array_equal(out.view(np.uint16), expected.view(np.uint16))
