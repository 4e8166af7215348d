"""An expert layer as several launches, behind each other on one stream:

    moe_route     sorts the routes by expert and quantises the tokens; with many routes two launches
    fp8_up        the first GEMM, which gathers its rows, with the activation
    quantize_fp8  rows of its result, where `select` has them quantised apart
    fp8_down      the second GEMM, which quantises its rows on their way in; or fp8_packed
    moe_combine   the sum of each token's rows

With few routes the first GEMM counts its rows from them, so that it loads weights while the routes are
sorted; the second one loads weights while the first ends (programmatic dependent launch). Where rows are few,
`moe_whole` does all of it in one launch.

All are prepared once for a number of tokens. A call writes the addresses that it brings into the parameters
of the first and the last one, and the ids' into the first GEMM's; others change with the workspace only.
"""

from __future__ import annotations

from typing import Any

from .. import abi, driver, manifest
from ..manifest import Variant
from ..select import Choice
from ..select.layer import LayerChoice, LayerProblem, with_all_rows
from ..tensor_maps import BYTES, encode_array
from . import launch
from .moe_launches import Chain, Step, make_step
from .moe_params import address, first_maps, gemm_params, number, second_maps, up_params
from .moe_validate import Call, Layer, LayerArrays
from .moe_workspace import lay_out, route_ctas

_Route, _Combine = abi.sm12x_route_params, abi.sm12x_combine_params
_X_AT = _Route.tokens.offset + abi.sm12x_quantize_params.x.offset
_WEIGHT_AT = _Route.tokens.offset + abi.sm12x_quantize_params.weight.offset
_COUNTED_IDS_AT = abi.sm12x_up_params.topk_ids.offset
# Routes that the first GEMM counts itself, at most: each of its CTAs reads them all. Assumed.
MOST_COUNTED_ROUTES = 512
# Results of both GEMMs together that leave L2 last, because the next launch reads them: else weights that
# stream through push single lines of them out, to be written between reads. On an H200 (L2 of 50 MB) gemma's
# layer takes 3.9 us less at 64 tokens, 3.1 at 128 (7 MB), 1.2 at 32. A GB10's L2 has 24 MB.
MOST_KEPT_BYTES = 8 << 20


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
        up, down, combine = self._up(), self._down(), self._combine()
        between = [self._quantise()] if self.choice.quantises_apart else []
        ids = [(step, _Route.topk_ids.offset) for step in routes]
        if self._counts_routes():
            ids.append((up, _COUNTED_IDS_AT))
        weights = [(step, _Route.topk_weights.offset) for step in routes]
        if self.layer.weight_on_input:
            weights += [(step, _WEIGHT_AT) for step in routes]
        return Chain(
            self.device,
            [*routes, up, *between, down, combine],
            self.at.size,
            x=[(step, _X_AT) for step in routes],
            topk_weights=weights,
            topk_ids=ids,
            out=[(combine, _Combine.out.offset)],
        )

    def _counts_routes(self) -> bool:
        experts = self.layer.experts
        return self.rows <= MOST_COUNTED_ROUTES and experts <= abi.SM12X_MOST_COUNTED_EXPERTS

    def _flags(self) -> int:
        values = self.rows * (self.layer.hidden + self.layer.intermediate)
        return abi.SM12X_KEEP_RESULTS if 2 * values <= MOST_KEPT_BYTES else 0

    def _only(self, family: str, role: str) -> Variant:
        return manifest.default().only(family, role)

    def _route(self) -> list[Step]:
        layer, at, quantise, route = self.layer, self.at, abi.sm12x_quantize_params, _Route
        static = layer.a1_scale_mode is not None
        ctas = route_ctas(self.rows)
        params = route(
            tokens=quantise(
                source=address(self.weights.a1_scale),
                rows=self.tokens,
                stride_x=self.call.x.stride,
                stride_q=layer.hidden,
                k=layer.hidden,
                x_type=self.type,
                mode=abi.SM12X_QUANTIZE_STATIC if static else abi.SM12X_QUANTIZE_ROWS,
                static_scale=number(self.weights.a1_scale),
            ),
            expert_map=address(self.weights.expert_map),
            routes=self.rows,
            top_k=self.call.routes.top_k,
            num_experts=layer.experts,
            map_size=layer.global_experts,
            ids_are_64_bit=int(self.call.routes.wide_ids),
            phase=abi.SM12X_ROUTE_ALL if ctas == 1 else abi.SM12X_ROUTE_COUNT,
            route_ctas=ctas,
            padded_bytes=layer.intermediate,
            padding=self.choice.down.variant.token_tile,
            early=int(layer.early_routes and self._counts_routes()),
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
        steps = [make_step(self.device, variant, params, (ctas + self.tokens, 1, 1), scratch)]
        if ctas > 1:
            params.phase = abi.SM12X_ROUTE_PLACE
            steps.append(make_step(self.device, variant, params, (ctas, 1, 1), scratch))
        return steps

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
        return make_step(self.device, chosen.variant, params, (ctas, 1, 1), scratch, counters, map_a)

    def _up(self) -> Step:
        layer, weights, at, packed = self.layer, self.weights, self.at, abi.sm12x_packed_params
        chosen = self.choice.up
        gemm = gemm_params(self.up, layer.w1, weights.w1_scale, weights.bias1)
        gemm.least_units = chosen.least_units
        gemm.a_rows, gemm.stride_a, gemm.stride_d = self.tokens, layer.hidden, layer.intermediate
        gemm.flags = self._flags()
        dynamic = layer.a1_scale_mode is None
        gemm.a_scale_mode = abi.SM12X_SCALE_VECTOR if dynamic else layer.a1_scale_mode
        gemm.a_scale, gemm.a_scale_value = address(weights.a1_scale), number(weights.a1_scale)
        content = bytearray(up_params(gemm, layer, weights, self.call))
        maps = first_maps(self.device, chosen.variant, layer, weights.w1)
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
        variant = self._only("quantize_fp8", "quantize")
        return make_step(self.device, variant, filled, (self.rows, 1, 1), scratch)

    def _down(self) -> Step:
        layer, weights, at, packed = self.layer, self.weights, self.at, abi.sm12x_packed_params
        chosen, variant = self.choice.down, self.choice.down.variant
        gemm = gemm_params(self.down, layer.w2, weights.w2_scale, weights.bias2)
        gemm.least_units = chosen.least_units
        gemm.stride_a, gemm.stride_d = layer.intermediate, layer.hidden
        gemm.flags = self._flags()
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
            gemm.a_scale, gemm.a_scale_value = address(weights.a2_scale), number(weights.a2_scale)
            gemm.a_scale_mode = layer.a2_scale_mode if self.static else abi.SM12X_SCALE_VECTOR
            if not self.static:
                scratch[packed.a_scale.offset] = at.s2
            # What is in front writes rows; the offsets come from the launch before that.
            gemm.flags |= abi.SM12X_EARLY_WEIGHTS
        content = bytearray(params)
        maps = second_maps(self.device, variant, "b", layer, weights.w2)
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
        return make_step(self.device, variant, params, (self.tokens, chunks, 1), scratch)
