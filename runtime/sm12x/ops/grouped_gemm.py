"""`sm12x.grouped_gemm`: takes the caller's arrays in, on the right stream, and hands them to a plan."""

from __future__ import annotations

from typing import Any

from .. import driver
from ..arrays import Array
from ..tensors import allocate_like, current_stream, deliver, framework_of, ingest
from . import emulated, validate
from .arguments import device_of, numpy_backend, scale
from .grouped_gemm_list import list_call
from .packed import PackedPlan, plan_packed, refuse, run_packed, suspicious
from .torch_call import remember_torch_call, run_known_torch_call

MAX_PLANS = 4096
_plans: dict[Any, PackedPlan] = {}
driver.clear_after_fork(_plans)


def grouped_gemm(
    a: Any,
    b: Any,
    *,
    a_scale: Any = None,
    b_scale: Any = None,
    offsets: Any = None,
    out: Any = None,
    out_dtype: Any = "bfloat16",
    bias: Any = None,
    workspace: Any = None,
    stream: Any = None,
    dtype: Any = None,
    variant: str | None = None,
    backend: str | None = None,
) -> Any:
    """Grouped GEMM in FP8: one matrix product per expert (group), scaled, in one call.

    ``D_e[m, n] = cast(a_scale * b_scale * sum_k a[m, k] * b[e, n, k] + bias[e, n])``, in float32.

    Packed call (`offsets` given); E at most 1024, K a multiple of 16, N a multiple of 8:
      a (M, K): rows of all experts behind each other. b (E, N, K). Both float8_e4m3fn (NumPy: or
        float8_e5m2), or uint8 with `dtype`. K contiguous; addresses and row strides multiples of 16 bytes.
      offsets (E + 1,) int32 or int64, on the device: expert e has rows offsets[e] to offsets[e + 1]. They are
        not checked on the host; the kernel clamps them to [0, M] and to never decrease. With SM12X_CHECK=1 in
        the environment at the first call, bad ones raise ValueError and `out` is not written (each call then
        waits for the GPU; with M = 0 nothing runs and nothing is looked at).
      a_scale: None (1.0), one value (float or one-element array), per token (M,) or (M, 1), or per expert
        (E, 1, 1). One axis of more than one element is per token, also where M = E.
      b_scale: None, one value, per expert (E,) or (E, 1), or per output feature (E, N) or (E, N, 1).
        Scales multiply (dequantise). Arrays are float32 on the device.
      bias (E, N) float32, bfloat16 or float16, or None.
      out (M, N) of `out_dtype`, row stride a multiple of 16 bytes. Rows outside offsets[0] to offsets[E] are
        not written. None: a new array of a's framework, in which those rows are uninitialised.

    List call (`a` and `b` are sequences, no `offsets`): a[i] (M_i, K_i), b[i] (N_i, K_i), each its own shape.
      a_scale, b_scale: None, one value for all, or a sequence with, for each group, None, one value, or an
        array: (M_i,) or (M_i, 1) for a, (N_i,) or (N_i, 1) for b.
      bias: None or a sequence of (N_i,) arrays, all of one dtype, or None. out: None or a sequence.

    out_dtype: "bfloat16" or "float16" (NumPy: or "float32"); must be that of `out`.
    workspace: contiguous array of any dtype, `workspace_size(E)` bytes on the device, never shared between
      streams. None: allocated and freed in stream order. With `out` and `workspace` given, a packed call
      allocates nothing.
    stream: integer handle, or an object with __cuda_stream__, cuda_stream, ptr or value. None: the current
      stream of the framework of `out`, or of `a` where there is none. Nothing waits for the GPU. Calls can be
      captured in CUDA graphs; make one of the same shapes before, because the first loads the kernels. On a
      stream that is not the framework's current one, keep the arrays alive until the work is done.
    dtype: FP8 type of uint8 operands, or a pair (for a, for b).
    variant: key of the kernel to use (`python -m sm12x kernels`). None: the best for the shape
      (SM12X_LOG=select prints why).
    backend: "auto": torch, CuPy, JAX and other DLPack arrays run on the GPU they lie on, NumPy arrays on the
      CPU, in `sm12x.reference`; workspace, stream and variant are then refused. "emulator": NumPy arrays and
      others in host memory run the GPU's kernels in `sm12x.emulator`, which needs no GPU; slowly; stream is
      then refused. None: what SM12X_BACKEND said at the first call, or "auto".

    Returns `out` or a new array; a list for a list call.

    Raises ValueError and TypeError naming the argument, with nothing written; DriverError,
    UnsupportedDeviceError and CubinError where the machine or the installation cannot run it; CudaError
    where a driver call fails; `sm12x.emulator.EmulatorError` where an emulated kernel does what it must not.
    """
    if (backend is not None or emulated.BACKEND is not None) and emulated.wanted(backend):
        return emulated.emulated_call(
            grouped_gemm,
            *(a, b, a_scale, b_scale, offsets, out, out_dtype, bias, workspace, stream, dtype, variant),
        )
    if offsets is None or isinstance(a, (list, tuple)):
        return list_call(
            a, b, a_scale, b_scale, offsets, out, out_dtype, bias, workspace, stream, dtype, variant
        )
    # With everything given, as in an inference loop: a call like one before costs a look into a dictionary.
    complete = out is not None and workspace is not None and bias is None and stream is None
    if complete and run_known_torch_call(
        a, b, a_scale, b_scale, offsets, out, workspace, out_dtype, dtype, variant
    ):
        return out
    framework = framework_of(a, "a")
    if framework == "numpy":
        return numpy_backend(
            a, b, a_scale, b_scale, offsets, out, out_dtype, bias, workspace, stream, dtype, variant
        )

    # From here on written for speed: this function, ingest and run_packed are all that runs on a known plan.
    leader, name = (a, "a") if out is None else (out, "out")
    array_type = type(leader)
    if array_type is not type(a):
        framework = framework_of(leader, name)
    lead: Array | None = None
    if framework == "torch" or framework == "cupy":  # taken in as they are, whatever the stream
        lead = ingest(leader, name, 0)
        device = lead.device
    if lead is None or device < 0:
        device = device_of(leader, framework, name)
    handle = current_stream(framework, device) if stream is None else validate.stream_handle(stream)
    if lead is None:
        lead = ingest(leader, name, handle)

    x = lead if out is None else ingest(a, "a", handle)
    w = ingest(b, "b", handle)
    bounds = ingest(offsets, "offsets", handle)
    scale_x: validate.Scale = (
        ingest(a_scale, "a_scale", handle)
        if type(a_scale) is array_type
        else scale(a_scale, "a_scale", handle)
    )
    scale_w: validate.Scale = (
        ingest(b_scale, "b_scale", handle)
        if type(b_scale) is array_type
        else scale(b_scale, "b_scale", handle)
    )
    pointer_x = pointer_w = pointer_bias = 0
    value_x = value_w = 1.0
    key_x = key_w = key_bias = key_out = key_scratch = None
    if isinstance(scale_x, Array):
        key_x, pointer_x = scale_x[1:6], scale_x.ptr
    else:
        value_x = scale_x
    if isinstance(scale_w, Array):
        key_w, pointer_w = scale_w[1:6], scale_w.ptr
    else:
        value_w = scale_w
    addend = scratch = target = None
    if bias is not None:
        addend = ingest(bias, "bias", handle)
        key_bias, pointer_bias = addend[1:6], addend.ptr
    if workspace is not None:
        scratch = ingest(workspace, "workspace", handle)
        key_scratch = scratch[1:6]
    if out is not None:
        target = lead
        key_out = lead[1:6]

    key = (
        *(x[1:6], w[1:6], bounds[1:6], key_x, key_w),
        *(key_out, key_bias, key_scratch, out_dtype, dtype, variant),
    )
    try:
        plan = _plans.get(key)
    except TypeError:  # an argument that cannot be hashed: planning says which, or is not cached
        plan = key = None  # type: ignore[assignment]
    if plan is None:
        plan = plan_packed(x, w, scale_x, scale_w, bounds, target, out_dtype, addend, scratch, dtype, variant)
        if key is not None:
            if len(_plans) >= MAX_PLANS:
                _plans.clear()
            _plans[key] = plan
    if target is None:
        out = allocate_like(x.framework, plan.out_shape, plan.out_dtype, device, handle)
        target = ingest(out, "out", handle)

    kernels = plan.kernels
    if kernels is not None:
        p, q, d = x.ptr, w.ptr, target.ptr
        start = 0 if scratch is None else scratch.ptr
        base = (start + 255) & -256
        if (
            target.readonly
            or (scratch is not None and scratch.readonly)
            or suspicious(plan, kernels, p, q, d, bounds.ptr, pointer_x, pointer_w, pointer_bias, start, base)
        ):
            refuse(plan, x, w, target, bounds, pointer_x, pointer_w, pointer_bias, scratch)
        elif complete and framework == "torch":
            remember_torch_call(
                plan, a, b, a_scale, b_scale, offsets, out, workspace, out_dtype, dtype, variant
            )
        run_packed(
            kernels, handle, p, q, d, bounds.ptr, pointer_x, pointer_w, pointer_bias, value_x, value_w, base
        )
    if plan.hand_over:
        inputs = [
            x,
            w,
            bounds,
            *(each for each in (scale_x, scale_w, addend, scratch) if isinstance(each, Array)),
        ]
        (out,) = deliver([out], inputs, handle, device)
    return out
