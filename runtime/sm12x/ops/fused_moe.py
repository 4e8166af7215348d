"""`sm12x.fused_moe`: the whole FP8 expert layer, from a router's choices to the layer's output."""

from __future__ import annotations

from typing import Any

from .. import driver
from ..arrays import HOST, Array
from ..tensors import allocate_like, current_stream, deliver, framework_of, ingest
from . import emulated, validate
from .arguments import device_of, refuse_for_numpy, scale
from .moe_plan import CallPlan, LayerPlan
from .moe_validate import CallArrays, LayerArrays, LayerOptions

MAX_PLANS = 1024  # layers: of a few models
_plans: dict[Any, LayerPlan] = {}
driver.clear_after_fork(_plans)


def fused_moe(
    x: Any,
    w1: Any,
    w2: Any,
    topk_weights: Any,
    topk_ids: Any,
    *,
    w1_scale: Any = None,
    w2_scale: Any = None,
    a1_scale: Any = None,
    a2_scale: Any = None,
    activation: str = "silu",
    gated: bool = True,
    expert_map: Any = None,
    apply_router_weight_on_input: bool = False,
    bias1: Any = None,
    bias2: Any = None,
    alpha: float | None = None,
    beta: float | None = None,
    limit: float | None = None,
    out: Any = None,
    workspace: Any = None,
    stream: Any = None,
    dtype: Any = None,
    early_routes: bool = False,
    backend: str | None = None,
) -> Any:
    """The expert layer of a mixture-of-experts model in FP8: quantise, route, GEMM, activation, quantise,
    GEMM, weighted sum over each token's experts.

    T tokens, k routes per token, hidden size H, intermediate size I, E experts on this device. The meaning of
    the arguments is vLLM's.

      x (T, H) bfloat16 or float16, T at most 65,536; H contiguous, row stride a multiple of 16 bytes.
      w1 (E, 2I, H) with the rows of the gate before those of up, or (E, I, H) where not gated; w2 (E, H, I).
        Both float8_e4m3fn, or uint8 with `dtype`; the last axis contiguous; E at most 1024, H and I multiples
        of 16; addresses and strides multiples of 16 bytes.
      topk_weights (T, k) float32; topk_ids (T, k) int32 or int64; contiguous. A route whose id is negative or
        not below E, or with an expert_map not below E_global, is left out. Duplicate ids in a token count as
        often as they come.
      expert_map (E_global,) int32: the number among the E experts for each id, -1 (or anything outside 0 to
        E - 1) for experts that are elsewhere, whose routes are left out. None: ids are numbers of the E
        experts.
      w1_scale, w2_scale: None (1.0), one value (float or one-element array), per expert (E,) or (E, 1), or
        per output feature (E, N) or (E, N, 1), N the rows of w1, or H. Float32; scales multiply (dequantise).
      a1_scale, a2_scale: None: x, or the activation's result, is quantised with one scale for each row, as
        `quantize_fp8` does. One positive value, float or one-element float32 array: the static scale of all
        rows. Each by itself.
      bias1 (E, 2I), or (E, I) where not gated, in the order of w1's rows; bias2 (E, H); float32, bfloat16 or
        float16, or None.

      activation, with g and u the gate and up outputs of the first GEMM:
        "silu" ``g * sigmoid(g)``, "gelu" ``g * (1 + erf(g / sqrt(2))) / 2``, "gelu_tanh" its approximation by
        tanh, "relu2" ``max(g, 0)**2``, each times u; not gated: without u.
        "swigluoai": ``(u + beta) * g * sigmoid(alpha * g)``, where the rows of w1, w1_scale and bias1 are
        interleaved, g0 u0 g1 u1 ...; "swigluoai_uninterleave": the same with the gate before up. Both are
        gated only.
      limit: g is ``min(g, limit)`` and u is clamped to +-limit before; of swigluoai, 7 where not given, and
        of silu, none where not given. The others take none. alpha and beta: of swigluoai only, 1.702 and 1
        where not given.
      apply_router_weight_on_input: k must be 1; x is multiplied by the route's weight (rounded to x's dtype,
        as is the product), and the result is not weighted.

    out (T, H) of x's dtype, row stride a multiple of 16 bytes, memory of its own. None: a new array of x's
      framework. A token without a valid route gets zeros.
    workspace: contiguous array of any dtype on the device, never shared between streams or threads (of
      calls that overlap on one, one may never end). None: memory of the library's own,
      one block for each stream; while a graph is captured, memory that it allocates and frees.
    stream: integer handle, or an object with __cuda_stream__, cuda_stream, ptr or value. None: the current
      stream of the framework of `out`, or of `x` where there is none. Nothing waits for the GPU.
    dtype: "float8_e4m3fn", the type of uint8 weights.
    early_routes: a promise: what is right in front of a call on its stream (and work of other streams that
      this one was made to wait for since) writes none of `topk_ids`, `expert_map` and `w1`; it may write all
      else. Where a call of up to 512 routes is several launches, weights are then loaded while that still
      runs: 1 to 2 us less on an H200. The kernel in front may be any of this package, any that is launched
      without the attribute of programmatic dependent launch, or one whose CTAs all execute
      griddepcontrol.wait before they trigger or end. Where the promise is broken, results are wrong, and
      those of later calls with the same workspace may be. No effect on NumPy arrays.
    backend: "auto": arrays of a GPU run on it, NumPy arrays on the CPU in `sm12x.reference`; workspace and
      stream are then refused. "emulator": arrays in host memory run the GPU's kernels in `sm12x.emulator`;
      stream is then refused. None: what SM12X_BACKEND said at the first call, or "auto".

    Numerics. The stages are those of ``quantize_fp8(x)``, ``grouped_gemm`` with ``row_index``, the
    activation, ``quantize_fp8``, ``grouped_gemm`` with ``row_weight``, and a sum, with these roundings and no
    others:
      q1, s1: as `quantize_fp8` gives them for x, per token or static.
      g, u: float32 of ``s1 * w1_scale * sum + bias1``. They are not rounded to x's dtype, as a grouped_gemm
        that writes it would: this is the rounding that fusion removes.
      h: the activation in float32. Dynamic: rounded to x's dtype, then q2, s2 as `quantize_fp8` gives them
        for h. Static: ``q2 = e4m3(h / a2_scale)`` straight from float32, again without a rounding between.
      y: ``(s2 * w2_scale * sum + bias2) * weight`` in float32, rounded to x's dtype.
      out: the float32 sum of a token's y in the order of its routes, rounded to x's dtype.
    Results are the same bits from run to run. A NaN in x or h, with dynamic scales also an infinity, makes
    NaN of all that is computed from its row.

    Returns `out` or a new array.

    Raises ValueError and TypeError naming the argument, with nothing written.
    """
    emulator = emulated.wanted(backend)
    layer = {
        "w1_scale": w1_scale,
        "w2_scale": w2_scale,
        "a1_scale": a1_scale,
        "a2_scale": a2_scale,
        "activation": activation,
        "gated": gated,
        "expert_map": expert_map,
        "apply_router_weight_on_input": apply_router_weight_on_input,
        "bias1": bias1,
        "bias2": bias2,
        "alpha": alpha,
        "beta": beta,
        "limit": limit,
        "dtype": dtype,
        "early_routes": early_routes,
    }
    if not emulator and framework_of(x, "x") == "numpy":
        refuse_for_numpy(workspace=workspace, stream=stream)
        from ..reference.moe import fused_moe_numpy  # not above: GPU callers need no NumPy code

        return fused_moe_numpy(x, w1, w2, topk_weights, topk_ids, out=out, **layer)
    return _fused_moe_on_device(x, w1, w2, topk_weights, topk_ids, layer, out, workspace, stream, emulator)


def _fused_moe_on_device(
    x: Any,
    w1: Any,
    w2: Any,
    topk_weights: Any,
    topk_ids: Any,
    layer: dict[str, Any],
    out: Any,
    workspace: Any,
    stream: Any,
    emulator: bool,
) -> Any:
    """The same with the GPU's kernels; `layer`: all arguments that each call does not bring, by name;
    `emulator`: on host arrays, in the emulator."""
    if emulator:
        return _emulated(x, w1, w2, topk_weights, topk_ids, layer, out, workspace, stream)
    handle, given, device = take_call_arrays(x, topk_weights, topk_ids, out, workspace, stream)
    arrays, options = take_layer_arrays(w1, w2, layer, handle)
    # With the options' types: True is 1, but only one of them is a flag.
    kinds = tuple(map(type, options))
    key = (tuple(each[:6] if isinstance(each, Array) else each for each in arrays), options, kinds)
    try:
        plan = _plans.get(key)
    except TypeError:  # an argument that cannot be hashed: planning says which
        plan = key = None  # type: ignore[assignment]
    if plan is None:
        plan = LayerPlan(arrays, options)
        if key is not None:
            if len(_plans) >= MAX_PLANS:
                _plans.clear()
            _plans[key] = plan
    inputs = [array for _, array in arrays.named() if array is not None]
    return run_layer(plan, given, out, handle, device, inputs)[1]


def take_call_arrays(
    x: Any, topk_weights: Any, topk_ids: Any, out: Any, workspace: Any, stream: Any
) -> tuple[int, CallArrays, int]:
    """What a call brings: the stream's handle, the arrays, the device."""
    leader, name = (x, "x") if out is None else (out, "out")
    framework = framework_of(leader, name)
    lead: Array | None = None
    device = HOST
    if framework == "torch" or framework == "cupy":  # taken in as they are, whatever the stream
        lead = ingest(leader, name, 0)
        device = lead.device
    if device < 0:
        device = device_of(leader, framework, name)
    handle = current_stream(framework, device) if stream is None else validate.stream_handle(stream)
    if lead is None:
        lead = ingest(leader, name, handle)
    given = CallArrays(
        lead if out is None else ingest(x, "x", handle),
        ingest(topk_weights, "topk_weights", handle),
        ingest(topk_ids, "topk_ids", handle),
        None if out is None else lead,
        None if workspace is None else ingest(workspace, "workspace", handle),
    )
    return handle, given, device


def take_layer_arrays(
    w1: Any, w2: Any, layer: dict[str, Any], stream: int
) -> tuple[LayerArrays, LayerOptions]:
    """What makes a layer: its arrays, taken in on `stream`, and its other arguments."""

    def take(name: str) -> Array | None:
        value = layer[name]
        return None if value is None else ingest(value, name, stream)

    def static(name: str) -> validate.Scale | None:
        return None if layer[name] is None else scale(layer[name], name, stream)

    arrays = LayerArrays(
        w1=ingest(w1, "w1", stream),
        w2=ingest(w2, "w2", stream),
        w1_scale=scale(layer["w1_scale"], "w1_scale", stream),
        w2_scale=scale(layer["w2_scale"], "w2_scale", stream),
        a1_scale=static("a1_scale"),
        a2_scale=static("a2_scale"),
        expert_map=take("expert_map"),
        bias1=take("bias1"),
        bias2=take("bias2"),
    )
    return arrays, LayerOptions(**{name: layer[name] for name in LayerOptions._fields})


def run_layer(
    plan: LayerPlan, given: CallArrays, out: Any, stream: int, device: int, weights: list[Array]
) -> tuple[CallPlan, Any]:
    """One call of a planned layer: its plan and its result; `weights`: the layer's arrays, which JAX has to
    keep."""
    calls = plan.take(given)
    target = given.out
    if target is None:
        shape = (calls.call.routes.tokens, plan.layer.hidden)
        out = allocate_like(given.x.framework, shape, calls.call.dtype, device, stream)
        target = ingest(out, "out", stream)
    plan.run(calls, given, target, stream)
    if calls.hand_over:
        inputs = [given.x, given.topk_weights, given.topk_ids, *weights]
        (out,) = deliver([out], inputs, stream, device)
    return calls, out


def _emulated(
    x: Any,
    w1: Any,
    w2: Any,
    topk_weights: Any,
    topk_ids: Any,
    layer: dict[str, Any],
    out: Any,
    workspace: Any,
    stream: Any,
) -> Any:
    emulated.refuse_stream(stream)
    finish = None
    if out is None:
        given = ingest(x, "x", 0)
        out, finish = emulated.new_output(given.framework, given.shape, given.dtype)
    arrays = {name: value for name, value in layer.items() if name not in LayerOptions._fields}
    options = {name: layer[name] for name in LayerOptions._fields}
    inputs = {"x": x, "w1": w1, "w2": w2, "topk_weights": topk_weights, "topk_ids": topk_ids, **arrays}
    emulated.mirrored_call(
        lambda **taken: fused_moe(**taken, **options, backend="auto"),
        inputs,
        {"out": out},
        {"workspace": workspace},
    )
    return out if finish is None else finish(out)
