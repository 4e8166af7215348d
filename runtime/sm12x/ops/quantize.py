"""`sm12x.quantize_fp8`: activations to e4m3 with scales per token, per tensor or given."""

from __future__ import annotations

from typing import Any

from ..tensors import framework_of
from . import emulated
from .arguments import refuse_for_numpy


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
    the scale is then infinite, q is 0 for finite values and NaN for infinite ones.

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
    raise NotImplementedError("sm12x.quantize_fp8: the GPU path is not there yet")
