"""An expert layer of few tokens as one launch of family fp8_layer, which routes, quantises, multiplies twice
and sums on its own.

Rows of h and y lie in the order of the routes. Besides them the kernel keeps its state, which a launch finds
zero and leaves so: the counters that go with the workspace. A call writes four addresses.
"""

from __future__ import annotations

from .. import abi, driver
from ..manifest import Variant
from ..select.layer import LayerProblem
from .moe_launches import Chain, make_step
from .moe_params import first_maps, gemm_params, second_maps, up_params
from .moe_validate import Call, Layer, LayerArrays
from .moe_workspace import lay_out_whole

_Params, _Packed = abi.sm12x_layer_params, abi.sm12x_packed_params
_UP_AT = _Params.up.offset + abi.sm12x_up_params.gemm.offset
_IDS_AT = _Params.up.offset + abi.sm12x_up_params.topk_ids.offset
_DOWN_AT = _Params.down.offset


def make_whole(
    device: driver.Device,
    layer: Layer,
    weights: LayerArrays,
    call: Call,
    problem: LayerProblem,
    variant: Variant,
) -> Chain:
    """Prepare the launch of `variant`. Raises CubinError and CudaError."""
    at = lay_out_whole(layer, call)
    params = bytearray(_params(layer, weights, call, problem))
    for start, maps in (
        (_UP_AT, first_maps(device, variant, layer, weights.w1)),
        (_DOWN_AT, second_maps(device, variant, "b2", layer, weights.w2)),
    ):
        start += _Packed.map_b.offset
        params[start : start + len(maps)] = maps
    scratch = {
        _UP_AT + _Packed.d.offset: at.h,
        _DOWN_AT + _Packed.a.offset: at.h,
        _DOWN_AT + _Packed.d.offset: at.y,
    }
    grid = device.sm_count, 1, 1
    step = make_step(device, variant, params, grid, scratch, _Params.state.offset)
    return Chain(
        device,
        [step],
        at.size,
        x=[(step, _UP_AT + _Packed.a.offset)],
        topk_weights=[(step, _Params.topk_weights.offset)],
        topk_ids=[(step, _IDS_AT)],
        out=[(step, _Params.out.offset)],
    )


def _params(layer: Layer, weights: LayerArrays, call: Call, problem: LayerProblem) -> abi.sm12x_layer_params:
    """Without tensor maps, and addresses of the call and in the workspace."""
    up = gemm_params(problem.up(problem.rows), layer.w1, weights.w1_scale, weights.bias1)
    up.a_rows, up.stride_a, up.stride_d = call.routes.tokens, call.x.stride, layer.intermediate
    gemm = problem.down(problem.rows, quantises=True)
    down = gemm_params(gemm, layer.w2, weights.w2_scale, weights.bias2)
    down.stride_a, down.stride_d = layer.intermediate, layer.hidden
    return _Params(
        up=up_params(up, layer, weights, call),
        down=down,
        stride_out=call.out.stride,
        tokens=call.routes.tokens,
        top_k=call.routes.top_k,
        type=abi.OUT_TYPES[call.dtype],
    )
