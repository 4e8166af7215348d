"""`sm12x.grouped_gemm`: takes the caller's arrays in, on the right stream, and hands them to a plan."""

from __future__ import annotations

from typing import Any

from .. import driver
from ..arrays import Array
from ..tensors import allocate_like, current_stream, deliver, framework_of, ingest
from . import emulated, validate
from .arguments import device_of, numpy_backend, refuse_layouts, scale
from .grouped_gemm_list import list_call
from .operands import Given
from .packed import PackedPlan, plan_packed, refuse, suspicious
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
    row_index: Any = None,
    rows: Any = None,
    expected_m: int | None = None,
    row_weight: Any = None,
    out: Any = None,
    out_dtype: Any = "bfloat16",
    bias: Any = None,
    workspace: Any = None,
    stream: Any = None,
    dtype: Any = None,
    variant: str | None = None,
    early_weights: bool = False,
    backend: str | None = None,
) -> Any:
    """Grouped GEMM in FP8: one matrix product per expert (group), scaled, in one call.

    ``D_e[m, n] = cast((a_scale * b_scale * sum_k a[m, k] * b[e, n, k] + bias[e, n]) * row_weight[m])``, in
    float32 until the cast.

    Packed call (`offsets` given); E at most 1024, K a multiple of 16, N a multiple of 8:
      a (M, K): rows of all experts behind each other. b (E, N, K). Both float8_e4m3fn (NumPy: or
        float8_e5m2), or uint8 with `dtype`. K contiguous; addresses and row strides multiples of 16 bytes.
      offsets (E + 1,) int32 or int64, on the device: expert e has rows offsets[e] to offsets[e + 1]. They are
        not checked on the host; the kernel clamps them to [0, M] and to never decrease. With SM12X_CHECK=1 in
        the environment at the first call, bad ones raise ValueError and `out` is not written (each call then
        waits for the GPU; with M = 0 nothing runs and nothing is looked at).
      row_index (M,) int32 or int64, on the device, or None: row r of the call takes row row_index[r] of `a`,
        which is then (T, K) with any T: no permuted copy of tokens is needed. An index outside 0 to T - 1
        reads zeros, so that its row of `out` is the bias.
      a_scale: None (1.0), one value (float or one-element array), per token, that is per row of `a`, (M,) or
        (M, 1), or per expert (E, 1, 1). One axis of more than one element is per token, also where M = E.
      b_scale: None, one value, per expert (E,) or (E, 1), or per output feature (E, N) or (E, N, 1).
        Scales multiply (dequantise). Arrays are float32 on the device.
      bias (E, N) float32, bfloat16 or float16, or None.
      row_weight (M,) or (M, 1) float32 (a router's weights), or None (1.0).
      out (M, N) of `out_dtype`, row stride a multiple of 16 bytes. Rows outside offsets[0] to offsets[E] are
        not written. None: a new array of a's framework, in which those rows are uninitialised.

    Masked call (`rows` given instead of `offsets`; no row_index):
      a (E, max_m, K), out (E, max_m, N): each expert has rows of its own, any row and expert strides that are
        multiples of 16 bytes. rows (E,) int32 or int64, on the device: expert e has its first rows[e] rows,
        clamped to [0, max_m] (SM12X_CHECK=1: refused); rows of `out` beyond them are not written.
      expected_m: int, how many rows an expert is expected to have, a hint for choosing the kernel; or None.
      a_scale: as above, per token (E, max_m) or (E, max_m, 1). row_weight (E, max_m) or (E, max_m, 1).
        b, b_scale and bias as above.

    List call (`a` and `b` are sequences, no `offsets`, no `rows`): a[i] (M_i, K_i), b[i] (N_i, K_i), each
      its own shape.
      a_scale, b_scale: None, one value for all, or a sequence with, for each group, None, one value, or an
        array: (M_i,) or (M_i, 1) for a, (N_i,) or (N_i, 1) for b.
      bias: None or a sequence of (N_i,) arrays, all of one dtype, or None. out: None or a sequence.

    out_dtype: "bfloat16", "float16" or "float32" (a list call on a GPU: not float32); must be that of `out`.
    workspace: contiguous array of any dtype, `workspace_size(E)` bytes on the device, never shared between
      streams. None: what is needed is allocated and freed in stream order. With `out` and `workspace` given,
      a packed or masked call allocates nothing (but, once for each new workspace, a few KB of counters).
    stream: integer handle, or an object with __cuda_stream__, cuda_stream, ptr or value. None: the current
      stream of the framework of `out`, or of `a` where there is none. Nothing waits for the GPU. Calls can be
      captured in CUDA graphs; make one of the same shapes before, because the first loads the kernels. On a
      stream that is not the framework's current one, keep the arrays alive until the work is done.
    dtype: FP8 type of uint8 operands, or a pair (for a, for b).
    variant: key of the kernel to use (`python -m sm12x kernels`); ":split" behind it has several CTAs share
      out the K of a tile, ":whole" never. None: the best for the shape (SM12X_LOG=select prints why).
    early_weights: a promise, of a packed or masked call: what is right in front of it on the stream (and work
      of other streams that this one was made to wait for since) writes neither `b` nor `offsets` or `rows`.
      Weights may then be loaded while that is still running: while rows are being quantised, say. The kernel
      in front may be any of this package, any that is launched without the attribute of programmatic
      dependent launch, or one whose CTAs all execute griddepcontrol.wait before they trigger or end. Where
      the promise is broken, results are wrong, and those of later calls with the same workspace may be. No
      effect on NumPy arrays and on variants of fp8_ptr_array.
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
            a,
            b,
            a_scale=a_scale,
            b_scale=b_scale,
            offsets=offsets,
            row_index=row_index,
            rows=rows,
            expected_m=expected_m,
            row_weight=row_weight,
            out=out,
            out_dtype=out_dtype,
            bias=bias,
            workspace=workspace,
            stream=stream,
            dtype=dtype,
            variant=variant,
            early_weights=early_weights,
        )
    bounds = offsets if rows is None else rows
    # With everything given, as in an inference loop: a call like one before costs a look into a dictionary.
    missed = None
    if (
        out is not None
        and bias is None
        and stream is None
        and (offsets is None) is not (rows is None)  # one of them
    ):
        missed = run_known_torch_call(
            a,
            b,
            a_scale,
            b_scale,
            bounds,
            row_index,
            row_weight,
            out,
            workspace,
            rows is not None,
            out_dtype,
            dtype,
            variant,
            expected_m,
            early_weights,
        )
        if missed is None:
            return out
    if bounds is None or isinstance(a, (list, tuple)):
        refuse_layouts(a, offsets, row_index, rows, expected_m, row_weight, early_weights)
        return list_call(a, b, a_scale, b_scale, out, out_dtype, bias, workspace, stream, dtype, variant)
    refuse_layouts(a, offsets, row_index, rows, expected_m, row_weight, early_weights)
    framework = framework_of(a, "a")
    if framework == "numpy":
        return numpy_backend(
            a,
            b,
            a_scale=a_scale,
            b_scale=b_scale,
            offsets=offsets,
            row_index=row_index,
            rows=rows,
            expected_m=expected_m,
            row_weight=row_weight,
            out=out,
            out_dtype=out_dtype,
            bias=bias,
            workspace=workspace,
            stream=stream,
            dtype=dtype,
            variant=variant,
        )

    # From here on written for speed: this function, ingest and the launch are all that runs on a known plan.
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

    def take(value: Any, argument: str) -> Array | None:
        return None if value is None else ingest(value, argument, handle)

    def take_scale(value: Any, argument: str) -> validate.Scale:
        if type(value) is array_type:
            return ingest(value, argument, handle)
        return scale(value, argument, handle)

    given = Given(
        a=lead if out is None else ingest(a, "a", handle),
        b=ingest(b, "b", handle),
        a_scale=take_scale(a_scale, "a_scale"),
        b_scale=take_scale(b_scale, "b_scale"),
        bounds=ingest(bounds, "offsets" if rows is None else "rows", handle),
        row_index=take(row_index, "row_index"),
        row_weight=take(row_weight, "row_weight"),
        bias=take(bias, "bias"),
        out=None if out is None else lead,
        workspace=take(workspace, "workspace"),
        masked=rows is not None,
    )
    key = (*map(_facts, given.arrays()), given.masked, out_dtype, dtype, variant, expected_m, early_weights)
    try:
        plan = _plans.get(key)
    except TypeError:  # an argument that cannot be hashed: planning says which, or is not cached
        plan = key = None  # type: ignore[assignment]
    if plan is None:
        plan = plan_packed(given, out_dtype, dtype, expected_m, variant, early_weights)
        if key is not None:
            if len(_plans) >= MAX_PLANS:
                _plans.clear()
            _plans[key] = plan
    target = given.out
    if target is None:
        out = allocate_like(given.a.framework, plan.out_shape, plan.out_dtype, device, handle)
        target = ingest(out, "out", handle)

    if plan.launches is not None:
        addresses = given.addresses(target.ptr)
        start = 0 if given.workspace is None else given.workspace.ptr
        base = (start + 255) & -256
        if (
            target.readonly
            or (given.workspace is not None and given.workspace.readonly)
            or suspicious(plan, *addresses, start, base)
        ):
            refuse(plan, given, target)
        elif missed is not None and framework == "torch":
            remember_torch_call(plan, missed)
        plan.launches.run(handle, base, *addresses, *given.scale_values())
    if plan.hand_over:
        inputs = [array for name, array in given.named() if array is not None and name != "out"]
        (out,) = deliver([out], inputs, handle, device)
    return out


def _facts(array: Array | float | None) -> Any:
    """What a plan depends on of an argument: shape, strides, dtype, device and framework."""
    return array[1:6] if isinstance(array, Array) else None
