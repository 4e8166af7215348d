"""The shortest way from torch tensors to the launches: packed calls that look like one made before.

In an inference loop only addresses change from call to call. What the first call learned is kept under all
that it depended on, read straight off the tensors, and a later call does without taking every tensor in.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from .. import driver
from .packed import PackedPlan, suspicious

MAX_CALLS = 4096
# Behind all that a call depends on: its plan, what launches it, and what gives torch's current stream.
_calls: dict[Any, tuple[PackedPlan, Callable[..., None], Callable[[int], int]]] = {}
_tensor_types: set[type] = set()  # that `ingest` took for plain torch tensors; Parameter is another
driver.clear_after_fork(_calls)


def _key(
    a: Any,
    b: Any,
    a_scale: Any,
    b_scale: Any,
    bounds: Any,
    row_index: Any,
    row_weight: Any,
    out: Any,
    workspace: Any,
    masked: bool,
    out_dtype: Any,
    dtype: Any,
    variant: Any,
    expected_m: Any,
) -> tuple[Any, ...]:
    # Written out flat: a tuple of starred parts takes 0.5 us longer to build.
    # is_neg: a lazily negated tensor has the metadata of a plain one, and only float32 ones can be.
    key = (
        a.shape,
        a.stride(),
        a.dtype,
        a.device,
        b.shape,
        b.stride(),
        b.dtype,
        b.device,
        a_scale.shape,
        a_scale.stride(),
        a_scale.dtype,
        a_scale.device,
        a_scale.is_neg(),
        b_scale.shape,
        b_scale.stride(),
        b_scale.dtype,
        b_scale.device,
        b_scale.is_neg(),
        bounds.shape,
        bounds.stride(),
        bounds.dtype,
        bounds.device,
        out.shape,
        out.stride(),
        out.dtype,
        out.device,
        masked,
        out_dtype,
        dtype,
        variant,
        expected_m,
    )
    scratch = index = weight = None
    if workspace is not None:
        scratch = workspace.shape, workspace.stride(), workspace.dtype, workspace.device
        if row_index is None and row_weight is None:
            return key, scratch
    if row_index is not None:
        index = row_index.shape, row_index.stride(), row_index.dtype, row_index.device
    if row_weight is not None:
        strides = row_weight.stride()
        weight = row_weight.shape, strides, row_weight.dtype, row_weight.device, row_weight.is_neg()
    return key, scratch, index, weight


def run_known_torch_call(
    a: Any,
    b: Any,
    a_scale: Any,
    b_scale: Any,
    bounds: Any,
    row_index: Any,
    row_weight: Any,
    out: Any,
    workspace: Any,
    masked: bool,
    out_dtype: Any,
    dtype: Any,
    variant: Any,
    expected_m: Any,
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
        and type(bounds) in known
        and type(out) in known
        and (workspace is None or type(workspace) in known)
        and (row_index is None or type(row_index) in known)
        and (row_weight is None or type(row_weight) in known)
    ):
        return False
    try:
        call = _calls.get(
            _key(
                a,
                b,
                a_scale,
                b_scale,
                bounds,
                row_index,
                row_weight,
                out,
                workspace,
                masked,
                out_dtype,
                dtype,
                variant,
                expected_m,
            )
        )
        if call is None:
            return False
        p, q, d, groups = a.data_ptr(), b.data_ptr(), out.data_ptr(), bounds.data_ptr()
        x, w = a_scale.data_ptr(), b_scale.data_ptr()
        start = 0 if workspace is None else workspace.data_ptr()
        index = 0 if row_index is None else row_index.data_ptr()
        weight = 0 if row_weight is None else row_weight.data_ptr()
    except (TypeError, RuntimeError):  # not hashable, no strides, no memory: the long way says which
        return False
    plan, run, get_stream = call
    base = (start + 255) & -256
    if suspicious(plan, p, q, d, groups, index, x, w, 0, weight, start, base):
        return False
    run(get_stream(plan.device), base, p, q, d, groups, index, x, w, 0, weight, 1.0, 1.0)
    return True


def remember_torch_call(
    plan: PackedPlan,
    a: Any,
    b: Any,
    a_scale: Any,
    b_scale: Any,
    bounds: Any,
    row_index: Any,
    row_weight: Any,
    out: Any,
    workspace: Any,
    *options: Any,
) -> None:
    """Keep the plan of a call that was just checked in full, where all arrays are tensors (or parameters)."""
    torch = sys.modules["torch"]
    arguments = [a, b, a_scale, b_scale, bounds, out]
    arguments += [each for each in (row_index, row_weight, workspace) if each is not None]
    if plan.launches is None or not all(isinstance(each, torch.Tensor) for each in arguments):
        return
    get_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    if get_stream is None:
        return  # a torch without it: its public way to the stream costs more than this saves
    try:
        key = _key(a, b, a_scale, b_scale, bounds, row_index, row_weight, out, workspace, *options)
        hash(key)
    except (TypeError, AttributeError):  # not hashable, or a stand-in for a tensor without these attributes
        return
    if len(_calls) >= MAX_CALLS:
        _calls.clear()
    _calls[key] = plan, plan.launches.run, get_stream
    _tensor_types.update(map(type, arguments))
