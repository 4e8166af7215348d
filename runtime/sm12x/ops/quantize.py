"""`sm12x.quantize_fp8`: activations to e4m3 with scales per token, per tensor or given."""

from __future__ import annotations

import math
from typing import Any

from .. import abi, driver
from ..arrays import Array
from ..tensors import allocate_like, current_stream, deliver, framework_of, ingest
from . import emulated, single_launch, validate
from .arguments import device_of, refuse_for_numpy
from .arguments import scale as take_scale
from .memory import check_alignment, check_overlap, check_present
from .moe_validate import E4M3, PER_TENSOR, PER_TOKEN, STATIC, Quantisation, take_quantisation
from .validate import Matrix


def quantize_fp8(
    x: Any,
    *,
    scale: Any = None,
    per_token: bool = True,
    out: Any = None,
    out_scale: Any = None,
    stream: Any = None,
    backend: str | None = None,
) -> tuple[Any, Any]:
    """Quantise activations to float8_e4m3fn, so that ``q * scale`` is about `x`.

    ``q = e4m3(x / scale)``: a true division in float32, rounded to nearest even, saturating at +-448,
    infinities too; NaN stays NaN (0x7f). What `scale` is:

      per_token=True: one for each row, (T, 1): ``max(amax, 1/512) / 448`` in float32, amax the largest
        magnitude of the row. This is vLLM's floor, 1 / (448 * 512) of the scale.
      per_token=False: one for all of `x`, (1,): the same rule with the largest magnitude of all.
      scale given: static, one positive value, a float or a one-element float32 array; per_token is then not
        looked at.
    A NaN does not enter amax, which is that of the other values (0 where there are none). An infinity does:
    the scale is then infinite, q is 0 for finite values and NaN for infinite ones. On the GPU -0 gives 0.

      x (T, K) bfloat16, float16 or float32; K a positive multiple of 16 and contiguous, row stride a multiple
        of 16 bytes.
      out (T, K) float8_e4m3fn, or uint8 for its bits; row stride a multiple of 16 bytes. None: a new array.
      out_scale: float32, (T, 1) or (T,) per token, (1,) per tensor, contiguous; refused where `scale` is
        given. None: a new array.

    stream: integer handle, or an object with __cuda_stream__, cuda_stream, ptr or value. None: the current
      stream of the framework of `out`, or of `x` where there is none. Nothing waits for the GPU.
    backend: "auto": arrays of a GPU are quantised there, NumPy arrays on the CPU; stream is then refused.
      "emulator": arrays in host memory run the GPU's kernels in `sm12x.emulator`. None: what SM12X_BACKEND
      said at the first call, or "auto".

    Returns (q, scale): `out` and `out_scale`, or new arrays; scale is float32, (T, 1) per token, else (1,),
    with a static one as it was given. `quantize_per_token` of `sm12x.reference` follows another rule, which
    its module explains.

    Raises ValueError and TypeError naming the argument, with nothing written.
    """
    emulator = emulated.wanted(backend)
    if not emulator and framework_of(x, "x") == "numpy":
        refuse_for_numpy(stream=stream)
        from ..reference.quantize import quantize_fp8_numpy  # not above: GPU callers need no NumPy code

        return quantize_fp8_numpy(x, scale=scale, per_token=per_token, out=out, out_scale=out_scale)
    return _quantize_on_device(x, scale, per_token, out, out_scale, stream, emulator)


def _quantize_on_device(
    x: Any, scale: Any, per_token: Any, out: Any, out_scale: Any, stream: Any, emulator: bool
) -> tuple[Any, Any]:
    """The same with the GPU's kernels; `emulator`: on host arrays, in the emulator."""
    if emulator:
        return _emulated(x, scale, per_token, out, out_scale, stream)
    leader, name = (x, "x") if out is None else (out, "out")
    framework = framework_of(leader, name)
    ordinal = device_of(leader, framework, name)
    handle = current_stream(framework, ordinal) if stream is None else validate.stream_handle(stream)
    taken = ingest(x, "x", handle)
    given = None if scale is None else take_scale(scale, "scale", handle)
    q, written = (
        None if array is None else ingest(array, argument, handle)
        for argument, array in (("out", out), ("out_scale", out_scale))
    )
    call = take_quantisation(taken, given, per_token, q, written)
    named = [("x", taken), ("out", q), ("out_scale", written)]
    named.append(("scale", given if isinstance(given, Array) else None))
    device = driver.get_device(validate.same_device(named))
    if out is None:
        out = allocate_like(taken.framework, (call.tokens, call.k), E4M3, ordinal, handle)
        q = ingest(out, "out", handle)
    if call.mode == STATIC:
        returned = scale
        if not isinstance(given, Array):
            returned = allocate_like(taken.framework, (1,), "float32", ordinal, handle)
            written = ingest(returned, "out_scale", handle)
    elif out_scale is None:
        returned = allocate_like(taken.framework, call.scale_shape, "float32", ordinal, handle)
        written = ingest(returned, "out_scale", handle)
    else:
        returned = out_scale
    if q is None:
        raise TypeError("out: expected an array, got None")
    _check_addresses(call, taken, q, given, written)
    _launch(device, call, taken, q, given, written, handle)
    inputs = [array for _, array in named if array is not None]
    if any(array.framework == "jax" for array in inputs):
        out, returned = deliver([out, returned], inputs, handle, ordinal)
    return out, returned


def _check_addresses(call: Quantisation, x: Array, q: Array, scale: Any, written: Array | None) -> None:
    """Raises ValueError for arrays that have no memory, or not where they may, or share it."""
    if not call.tokens:
        return
    floats = [
        (name, each) for name, each in (("scale", scale), ("out_scale", written)) if isinstance(each, Array)
    ]
    check_present([("x", x.ptr), ("out", q.ptr), *((name, each.ptr) for name, each in floats)])
    check_alignment(
        [
            ("x", x.ptr, validate.ALIGNMENT),
            ("out", q.ptr, validate.ALIGNMENT),
            *((n, e.ptr, 4) for n, e in floats),
        ]
    )
    spans = [(n, e.ptr, Matrix(1, math.prod(e.shape), math.prod(e.shape), 4)) for n, e in floats]
    read = ("x", x.ptr, call.x)
    check_overlap("out", q.ptr, call.q, (read, *(each for each in spans if each[0] == "scale")))
    for name, address, span in spans:
        if name == "out_scale":
            check_overlap(name, address, span, (read, ("out", q.ptr, call.q)))


def _launch(
    device: driver.Device,
    call: Quantisation,
    x: Array,
    q: Array,
    scale: Any,
    written: Array | None,
    stream: int,
) -> None:
    modes = {
        PER_TOKEN: abi.SM12X_QUANTIZE_ROWS,
        PER_TENSOR: abi.SM12X_QUANTIZE_TENSOR,
        STATIC: abi.SM12X_QUANTIZE_STATIC,
    }
    shapes = f"x {x.shape} {x.dtype}"
    params = abi.sm12x_quantize_params(
        x=x.ptr,
        q=q.ptr,
        scale=0 if written is None else written.ptr,
        source=scale.ptr if isinstance(scale, Array) else 0,
        rows=call.tokens,
        stride_x=call.x.stride,
        stride_q=call.q.stride,
        k=call.k,
        x_type=abi.OUT_TYPES[call.x_dtype],
        mode=modes[call.mode],
        static_scale=1.0 if scale is None or isinstance(scale, Array) else scale,
    )
    if not call.tokens and call.mode == PER_TOKEN:
        return
    with driver.current(device):
        if call.mode != PER_TENSOR:
            single_launch.run(
                device, "quantize_fp8", "quantize", params, (max(1, call.tokens), 1, 1), stream, shapes
            )
            return
        ctas = max(1, min(call.tokens, 2 * device.sm_count))
        with driver.temporary(device, 4 * ctas, stream) as maxima:
            largest = abi.sm12x_maxima_params(
                x=x.ptr,
                maxima=maxima,
                rows=call.tokens,
                stride_x=call.x.stride,
                k=call.k,
                x_type=abi.OUT_TYPES[call.x_dtype],
            )
            single_launch.run(device, "quantize_fp8", "maxima", largest, (ctas, 1, 1), stream, shapes)
            params.source, params.count = maxima, ctas
            single_launch.run(
                device, "quantize_fp8", "quantize", params, (max(1, call.tokens), 1, 1), stream, shapes
            )


def _emulated(x: Any, scale: Any, per_token: Any, out: Any, out_scale: Any, stream: Any) -> tuple[Any, Any]:
    emulated.refuse_stream(stream)
    given = ingest(x, "x", 0)
    static = None if scale is None else take_scale(scale, "scale", 0)
    taken = [
        None if array is None else ingest(array, name, 0)
        for name, array in (("out", out), ("out_scale", out_scale))
    ]
    call = take_quantisation(given, static, per_token, *taken)
    finish_q = finish_scale = None
    returned = scale if isinstance(static, Array) else out_scale
    if out is None:
        out, finish_q = emulated.new_output(given.framework, (call.tokens, call.k), E4M3)
    if out_scale is None and not isinstance(static, Array):
        returned, finish_scale = emulated.new_output(given.framework, call.scale_shape, "float32")
    outputs = {"out": out}
    if call.mode != STATIC:
        outputs["out_scale"] = returned
    elif not isinstance(static, Array):
        returned[...] = static
        scale = returned  # the number, as an array of the caller's framework
    emulated.mirrored_call(
        lambda **arrays: quantize_fp8(**arrays, per_token=per_token, backend="auto"),
        {"x": x, "scale": scale},
        outputs,
        {},
    )
    return (
        out if finish_q is None else finish_q(out),
        returned if finish_scale is None else finish_scale(returned),
    )
