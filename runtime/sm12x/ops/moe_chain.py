"""The launches of an expert layer, behind each other on one stream:

    moe_route     sorts the routes by expert and quantises the tokens; with many routes two launches
    fp8_up        the first GEMM, which gathers its rows, with the activation
    quantize_fp8  rows of its result, where `select` has them quantised apart
    fp8_down      the second GEMM, which quantises its rows on their way in; or fp8_packed
    moe_combine   the sum of each token's rows

With few routes the first GEMM counts its rows from them, so that it loads weights while the routes are
sorted; the second one loads weights while the first ends (programmatic dependent launch).

All are prepared once for a number of tokens. A call writes the addresses that it brings into the parameters
of the first and the last one; those of the others change with the workspace only.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from .. import abi, driver, manifest
from ..arrays import Array
from ..counters import counters_of
from ..launch_config import LaunchConfig, make_config
from ..manifest import Variant
from ..select import Choice, Problem
from ..select.layer import LayerChoice, LayerProblem, with_all_rows
from ..tensor_maps import BYTES, encode_array
from . import launch
from .moe_validate import Call, Layer, LayerArrays, Weights
from .moe_workspace import lay_out, route_ctas

_ACTIVATIONS = {
    "silu": abi.SM12X_ACTIVATION_SILU,
    "swigluoai": abi.SM12X_ACTIVATION_SILU,
    "swigluoai_uninterleave": abi.SM12X_ACTIVATION_SILU,
    "gelu": abi.SM12X_ACTIVATION_GELU,
    "gelu_tanh": abi.SM12X_ACTIVATION_GELU_TANH,
    "relu2": abi.SM12X_ACTIVATION_RELU2,
}
_Route, _Combine = abi.sm12x_route_params, abi.sm12x_combine_params
_X_AT = _Route.tokens.offset + abi.sm12x_quantize_params.x.offset
_WEIGHT_AT = _Route.tokens.offset + abi.sm12x_quantize_params.weight.offset
_IDS_AT = _Route.topk_ids.offset  # topk_weights behind it
_OUT_AT = _Combine.out.offset
_COUNTED_IDS_AT = abi.sm12x_up_params.topk_ids.offset
# Routes that the first GEMM counts itself, at most: each of its CTAs reads them all. Assumed.
MOST_COUNTED_ROUTES = 512
_pack_one = struct.Struct("@N").pack_into
_pack_two = struct.Struct("@2N").pack_into


@dataclass(slots=True)
class Step:
    """One launch: its parameters, and which of their addresses lie at what distance from the workspace's
    beginning. `counters`: where the address of split-K's counters belongs, -1 for nowhere; `map_a`: whether
    the tensor map of the rows lies over the workspace too."""

    key: str
    block: launch.Block
    config: LaunchConfig
    launch: Callable[[], int]
    scratch: tuple[tuple[int, int], ...]
    counters: int = -1
    map_a: Callable[[], int] | None = None


class Chain:
    """A layer's launches for one number of tokens. Only one call may be at it at a time."""

    __slots__ = (
        *("_base", "_combine", "_context", "_context_at", "_counts", "_device", "_routes", "_stream", "_up"),
        *("_weights_input", "needed", "steps"),
    )

    def __init__(
        self,
        device: driver.Device,
        steps: list[Step],
        routes: int,
        needed: int,
        *,
        weights_input: bool,
        counts: bool,
    ) -> None:
        """`routes`: steps that sort, the first ones. `weights_input`: router weights multiply the tokens.
        `counts`: the first GEMM counts the routes."""
        self.steps, self.needed, self._device = steps, needed, device
        self._routes = [step.block.memory for step in steps[:routes]]
        self._up = steps[routes].block.memory
        self._combine = steps[-1].block.memory
        self._weights_input, self._counts = weights_input, counts
        self._base = self._stream = -1
        self._context = ctypes.c_void_p()
        self._context_at = ctypes.byref(self._context)

    def context_is_current(self) -> bool:
        """Whether the device's context is the calling thread's."""
        status: int = self._device.driver.hot.cuCtxGetCurrent(self._context_at)
        return not status and self._context.value == self._device.context

    def run(self, stream: int, base: int, x: int, topk_weights: int, topk_ids: int, out: int) -> None:
        """Launch a call on `stream`, given its addresses; `base` is that of `needed` bytes of workspace. The
        device's context is current. Raises CudaError."""
        if base != self._base:
            self._point_at_workspace(base)
        for memory in self._routes:
            _pack_one(memory, _X_AT, x)
            _pack_two(memory, _IDS_AT, topk_ids, topk_weights)
            if self._weights_input:
                _pack_one(memory, _WEIGHT_AT, topk_weights)
        if self._counts:
            _pack_one(self._up, _COUNTED_IDS_AT, topk_ids)
        _pack_one(self._combine, _OUT_AT, out)
        if stream != self._stream:
            for step in self.steps:
                step.config.stream = stream
            self._stream = stream
        for step in self.steps:
            status = step.launch()
            if status:
                raise self._device.driver.error("cuLaunchKernelEx", status, variant=step.key)

    def _point_at_workspace(self, base: int) -> None:
        self._base = -1
        counters = 0
        for step in self.steps:
            for at, distance in step.scratch:
                _pack_one(step.block.memory, at, base + distance)
            if step.counters >= 0:
                counters = counters or counters_of(self._device, base)
                _pack_one(step.block.memory, step.counters, counters)
            if step.map_a is not None:
                status = step.map_a()
                if status:
                    raise self._device.driver.error("cuTensorMapReplaceAddress", status, variant=step.key)
        self._base = base


def make_chain(
    device: driver.Device,
    layer: Layer,
    weights: LayerArrays,
    call: Call,
    problem: LayerProblem,
    choice: LayerChoice,
) -> Chain:
    """Prepare the launches of `choice`. Raises CubinError and CudaError."""
    return _Maker(device, layer, weights, call, problem, choice).chain()


def most_partials(device: driver.Device) -> int:
    """Bytes of split-K's partials that are enough for either GEMM, whatever kernel runs it."""
    held = manifest.default()
    gemms = [*held.gemms("fp8_up", "up"), *held.gemms("fp8_down", "down"), *held.gemms("fp8_packed")]
    return max(launch.scratch_bytes(v, device.sm_count) for v in gemms if device.arch in v.targets)


def _address(value: Array | float | None) -> int:
    return value.ptr if isinstance(value, Array) else 0


def _value(value: Array | float | None) -> float:
    return value if isinstance(value, float) else 1.0


class _Maker:
    """What all steps are made from."""

    def __init__(
        self,
        device: driver.Device,
        layer: Layer,
        weights: LayerArrays,
        call: Call,
        problem: LayerProblem,
        choice: LayerChoice,
    ) -> None:
        self.device, self.layer, self.weights, self.call, self.choice = device, layer, weights, call, choice
        self.up, self.down = with_all_rows(problem, choice)
        self.grids = [
            launch.grid_size(gemm, chosen, device)
            for gemm, chosen in ((self.up, choice.up), (self.down, choice.down))
        ]
        partials = [
            launch.scratch_bytes(chosen.variant, ctas) if chosen.least_units else 0
            for ctas, chosen in zip(self.grids, (choice.up, choice.down), strict=True)
        ]
        self.at = lay_out(layer, call, quantises_apart=choice.quantises_apart, partials=max(partials))
        self.tokens, self.rows = call.routes.tokens, call.routes.most_rows
        self.type = abi.OUT_TYPES[call.dtype]
        self.static = layer.a2_scale_mode is not None

    def chain(self) -> Chain:
        routes = self._route()
        steps = [*routes, self._up()]
        if self.choice.quantises_apart:
            steps.append(self._quantise())
        steps += [self._down(), self._combine()]
        return Chain(
            self.device,
            steps,
            len(routes),
            self.at.size,
            weights_input=self.layer.weight_on_input,
            counts=self._counts_routes(),
        )

    def _counts_routes(self) -> bool:
        experts = self.layer.experts
        return self.rows <= MOST_COUNTED_ROUTES and experts <= abi.SM12X_MOST_COUNTED_EXPERTS

    def _step(
        self,
        variant: Variant,
        params: ctypes.Structure | bytearray,
        grid: tuple[int, int, int],
        scratch: dict[int, int],
        counters: int = -1,
        map_a: tuple[int, int] | None = None,
    ) -> Step:
        """`scratch`: offset in the parameters to offset in the workspace; `map_a`: offsets of the map and of
        the address in the parameters that it has to point at."""
        block = launch.Block(bytes(params))
        config = make_config(grid, variant.threads, variant.shared_memory, programmatic=variant.pdl)
        hot, pointer = self.device.driver.hot, self.device.driver.pointer
        replaced: Callable[[], int] | None = None
        if map_a is not None:
            address = ctypes.c_void_p.from_address(block.address + map_a[1])
            replaced = partial(hot.cuTensorMapReplaceAddress, pointer(block.address + map_a[0]), address)
        function = driver.get_function(self.device, variant)
        launches = partial(
            hot.cuLaunchKernelEx,
            pointer(ctypes.addressof(config)),
            pointer(function),
            pointer(ctypes.addressof(block.arguments)),
            None,
        )
        return Step(variant.key, block, config, launches, tuple(scratch.items()), counters, replaced)

    def _only(self, family: str, role: str) -> Variant:
        return manifest.default().only(family, role)

    def _route(self) -> list[Step]:
        layer, at, quantise, route = self.layer, self.at, abi.sm12x_quantize_params, _Route
        static = layer.a1_scale_mode is not None
        ctas = route_ctas(self.rows)
        params = route(
            tokens=quantise(
                source=_address(self.weights.a1_scale),
                rows=self.tokens,
                stride_x=self.call.x.stride,
                stride_q=layer.hidden,
                k=layer.hidden,
                x_type=self.type,
                mode=abi.SM12X_QUANTIZE_STATIC if static else abi.SM12X_QUANTIZE_ROWS,
                static_scale=_value(self.weights.a1_scale),
            ),
            expert_map=_address(self.weights.expert_map),
            routes=self.rows,
            top_k=self.call.routes.top_k,
            num_experts=layer.experts,
            map_size=layer.global_experts,
            ids_are_64_bit=int(self.call.routes.wide_ids),
            phase=abi.SM12X_ROUTE_ALL if ctas == 1 else abi.SM12X_ROUTE_COUNT,
            route_ctas=ctas,
            padded_bytes=layer.intermediate,
            padding=self.choice.down.variant.token_tile,
        )
        tokens = route.tokens.offset
        scratch = {
            tokens + quantise.q.offset: at.q1,
            route.offsets.offset: at.offsets,
            route.row_index.offset: at.row_index,
            route.route_row.offset: at.route_row,
            route.row_weight.offset: at.row_weight,
            route.counts.offset: at.counts,
        }
        if not static:
            scratch[tokens + quantise.scale.offset] = at.s1
        if self.static:  # the second GEMM's last tile may reach behind the last row
            scratch[route.padded.offset] = at.h
        else:
            scratch[route.row_maxima.offset] = at.maxima
        variant = self._only("moe_route", "route")
        steps = [self._step(variant, params, (ctas + self.tokens, 1, 1), scratch)]
        if ctas > 1:
            params.phase = abi.SM12X_ROUTE_PLACE
            steps.append(self._step(variant, params, (ctas, 1, 1), scratch))
        return steps

    def _gemm(self, gemm: Problem, chosen: Choice, weights: Weights, scale: Any, bias: Any) -> Any:
        """The parameters that both GEMMs have in common, without addresses in the workspace."""
        return abi.sm12x_packed_params(
            b_scale=_address(scale),
            bias=_address(bias),
            rows=self.rows,
            a_rows=self.rows,
            stride_b_scale=weights.scale_stride,
            stride_bias=weights.bias_stride,
            n=gemm.n,
            k=gemm.k,
            num_groups=gemm.groups,
            row_layout=abi.SM12X_ROWS_PACKED,
            b_scale_mode=weights.scale_mode,
            b_scale_value=_value(scale),
            bias_type=0 if weights.bias is None else abi.BIAS_TYPES[weights.bias],
            out_type=abi.OUT_TYPES[gemm.out],
            least_units=chosen.least_units,
        )

    def _maps_of_weights(self, variant: Variant, array: Array, weights: Weights) -> bytes:
        """The tensor maps of w1 or w2, one for each size of a box."""
        experts, n, k = array.shape
        row, expert = weights.inner.stride, weights.group_stride
        shape: tuple[int, ...] = (k, n, experts)
        strides: tuple[int, ...] = (row, expert)
        if variant.gated:
            pair, half = self._pairs()
            shape = (k, 8, 2, n // 16, experts)
            strides = (pair * row, half * row, 8 * pair * row, expert)
        return b"".join(
            encode_array(self.device, variant, "b", array.ptr, shape, strides, size)
            for size in range(variant.weight_maps)
        )

    def _pairs(self) -> tuple[int, int]:
        """Rows of w1 from a gate to the next, and from a gate to its up."""
        return (2, 1) if self.layer.activation.interleaved else (1, self.layer.intermediate)

    def _gemm_step(
        self,
        chosen: Choice,
        params: Any,
        ctas: int,
        scratch: dict[int, int],
        map_a: tuple[int, int] | None = None,
    ) -> Step:
        packed = abi.sm12x_packed_params
        splits = chosen.least_units > 0
        if splits:
            scratch[packed.partials.offset] = self.at.partials
        counters = packed.counters.offset if splits else -1
        return self._step(chosen.variant, params, (ctas, 1, 1), scratch, counters, map_a)

    def _up(self) -> Step:
        layer, weights, at, packed = self.layer, self.weights, self.at, abi.sm12x_packed_params
        chosen, how = self.choice.up, layer.activation
        gemm = self._gemm(self.up, chosen, layer.w1, weights.w1_scale, weights.bias1)
        gemm.a_rows, gemm.stride_a, gemm.stride_d = self.tokens, layer.hidden, layer.intermediate
        dynamic = layer.a1_scale_mode is None
        gemm.a_scale_mode = abi.SM12X_SCALE_VECTOR if dynamic else layer.a1_scale_mode
        gemm.a_scale, gemm.a_scale_value = _address(weights.a1_scale), _value(weights.a1_scale)
        pair, half = self._pairs()
        params = abi.sm12x_up_params(
            gemm=gemm,
            d_scale=_address(weights.a2_scale),
            d_scale_value=_value(weights.a2_scale),
            alpha=how.alpha if how.is_swigluoai else 1.0,
            beta=how.beta if how.is_swigluoai else 0.0,
            limit=math.inf if how.limit is None else how.limit,
            activation=_ACTIVATIONS[how.name],
            half_stride=half,
            pair_stride=pair,
            expert_map=_address(weights.expert_map),
            routes=self.rows,
            map_size=layer.global_experts,
            ids_are_64_bit=int(self.call.routes.wide_ids),
        )
        content = bytearray(params)
        maps = self._maps_of_weights(chosen.variant, weights.w1, layer.w1)
        content[packed.map_b.offset : packed.map_b.offset + len(maps)] = maps
        scratch = {
            packed.a.offset: at.q1,
            packed.d.offset: at.h,
            packed.bounds.offset: at.offsets,
            packed.row_index.offset: at.row_index,
        }
        if dynamic:
            scratch[packed.a_scale.offset] = at.s1
        if not self.static:
            scratch[abi.sm12x_up_params.row_maxima.offset] = at.maxima
        return self._gemm_step(chosen, content, self.grids[0], scratch)

    def _quantise(self) -> Step:
        params = abi.sm12x_quantize_params
        inner = self.layer.intermediate
        filled = params(
            rows=self.rows,
            stride_x=inner,
            stride_q=inner,
            k=inner,
            x_type=self.type,
            mode=abi.SM12X_QUANTIZE_MAXIMA,
            padding=self.choice.down.variant.token_tile,
        )
        at = self.at
        scratch = {
            params.x.offset: at.h,
            params.q.offset: at.q2,
            params.scale.offset: at.s2,
            params.source.offset: at.maxima,
            params.row_count.offset: at.offsets + 4 * self.layer.experts,
        }
        return self._step(self._only("quantize_fp8", "quantize"), filled, (self.rows, 1, 1), scratch)

    def _down(self) -> Step:
        layer, weights, at, packed = self.layer, self.weights, self.at, abi.sm12x_packed_params
        chosen, variant = self.choice.down, self.choice.down.variant
        gemm = self._gemm(self.down, chosen, layer.w2, weights.w2_scale, weights.bias2)
        gemm.stride_a, gemm.stride_d = layer.intermediate, layer.hidden
        scratch = {packed.d.offset: at.y, packed.bounds.offset: at.offsets}
        if not layer.weight_on_input:
            scratch[packed.row_weight.offset] = at.row_weight
        map_a = None
        params: Any = gemm
        if variant.role == "down":
            params = abi.sm12x_down_params(gemm=gemm, a_type=self.type)
            scratch[packed.a.offset] = at.h
            scratch[abi.sm12x_down_params.row_maxima.offset] = at.maxima
        else:
            map_a = packed.map_a.offset, packed.a.offset
            scratch[packed.a.offset] = at.h if self.static else at.q2
            gemm.a_scale, gemm.a_scale_value = _address(weights.a2_scale), _value(weights.a2_scale)
            gemm.a_scale_mode = layer.a2_scale_mode if self.static else abi.SM12X_SCALE_VECTOR
            if not self.static:
                scratch[packed.a_scale.offset] = at.s2
        content = bytearray(params)
        maps = self._maps_of_weights(variant, weights.w2, layer.w2)
        content[packed.map_b.offset : packed.map_b.offset + len(maps)] = maps
        if map_a is not None:
            k = layer.intermediate
            encoded = encode_array(self.device, variant, "a", weights.w2.ptr, (k, self.rows, 1), (k, k))
            content[packed.map_a.offset : packed.map_a.offset + BYTES] = encoded
        return self._gemm_step(chosen, content, self.grids[1], scratch, map_a)

    def _combine(self) -> Step:
        at, layer, variant = self.at, self.layer, self._only("moe_combine", "combine")
        params = _Combine(
            stride_rows=layer.hidden,
            stride_out=self.call.out.stride,
            tokens=self.tokens,
            top_k=self.call.routes.top_k,
            n=layer.hidden,
            type=self.type,
        )
        scratch = {_Combine.rows.offset: at.y, _Combine.route_row.offset: at.route_row}
        chunks = -(-layer.hidden // (8 * variant.threads))
        return self._step(variant, params, (self.tokens, chunks, 1), scratch)
