"""The shortest way from torch tensors to the launches: packed calls that look like one made before.

In an inference loop only addresses change from call to call. What the first call learned is kept under all
that it depended on, read straight off the tensors, and a later call does without taking every tensor in.
"""

from __future__ import annotations

import sys
from typing import Any

from .. import driver
from .packed import PackedPlan, run_packed, suspicious

MAX_CALLS = 4096
_calls: dict[Any, PackedPlan] = {}
_tensor_types: set[type] = set()  # that `ingest` took for plain torch tensors; Parameter is another
driver.clear_after_fork(_calls)


def _key(
    a: Any,
    b: Any,
    a_scale: Any,
    b_scale: Any,
    offsets: Any,
    out: Any,
    workspace: Any,
    out_dtype: Any,
    dtype: Any,
    variant: Any,
) -> tuple[Any, ...]:
    # is_neg: a lazily negated tensor has the metadata of a plain one, and only float32 ones can be.
    return (
        *(a.shape, a.stride(), a.dtype, a.device),
        *(b.shape, b.stride(), b.dtype, b.device),
        *(a_scale.shape, a_scale.stride(), a_scale.dtype, a_scale.device, a_scale.is_neg()),
        *(b_scale.shape, b_scale.stride(), b_scale.dtype, b_scale.device, b_scale.is_neg()),
        *(offsets.shape, offsets.stride(), offsets.dtype, offsets.device),
        *(out.shape, out.stride(), out.dtype, out.device),
        *(workspace.shape, workspace.stride(), workspace.dtype, workspace.device),
        *(out_dtype, dtype, variant),
    )


def run_known_torch_call(
    a: Any,
    b: Any,
    a_scale: Any,
    b_scale: Any,
    offsets: Any,
    out: Any,
    workspace: Any,
    out_dtype: Any,
    dtype: Any,
    variant: Any,
) -> bool:
    """Launch the call and return True where one like it was remembered; else, or where an address needs a
    closer look, return False with nothing done. Runs on torch's current stream of the plan's device.
    """
    known = _tensor_types
    if not (
        type(a) in known
        and type(b) in known
        and type(a_scale) in known
        and type(b_scale) in known
        and type(offsets) in known
        and type(out) in known
        and type(workspace) in known
    ):
        return False
    try:
        plan = _calls.get(_key(a, b, a_scale, b_scale, offsets, out, workspace, out_dtype, dtype, variant))
        if plan is None:
            return False
        p, q, d, bounds = a.data_ptr(), b.data_ptr(), out.data_ptr(), offsets.data_ptr()
        x, w, start = a_scale.data_ptr(), b_scale.data_ptr(), workspace.data_ptr()
    except (TypeError, RuntimeError):  # not hashable, no strides, no memory: the long way says which
        return False
    kernels = plan.kernels
    assert kernels is not None  # what `remember_torch_call` takes
    base = (start + 255) & -256
    if suspicious(plan, kernels, p, q, d, bounds, x, w, 0, start, base):
        return False
    stream = sys.modules["torch"]._C._cuda_getCurrentRawStream(plan.device)
    run_packed(kernels, stream, p, q, d, bounds, x, w, 0, 1.0, 1.0, base)
    return True


def remember_torch_call(
    plan: PackedPlan,
    a: Any,
    b: Any,
    a_scale: Any,
    b_scale: Any,
    offsets: Any,
    out: Any,
    workspace: Any,
    out_dtype: Any,
    dtype: Any,
    variant: Any,
) -> None:
    """Keep the plan of a call that was just checked in full, where all arrays are tensors (or parameters)."""
    torch = sys.modules["torch"]
    arguments = (a, b, a_scale, b_scale, offsets, out, workspace)
    if plan.kernels is None or not all(isinstance(each, torch.Tensor) for each in arguments):
        return
    if not hasattr(torch._C, "_cuda_getCurrentRawStream"):
        return  # a torch without it: its public way to the stream costs more than this saves
    try:
        key = _key(a, b, a_scale, b_scale, offsets, out, workspace, out_dtype, dtype, variant)
        hash(key)
    except (TypeError, AttributeError):  # not hashable, or a stand-in for a tensor without these attributes
        return
    if len(_calls) >= MAX_CALLS:
        _calls.clear()
    _calls[key] = plan
    _tensor_types.update(map(type, arguments))
