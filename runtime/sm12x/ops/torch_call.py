"""The shortest way from torch tensors to the launches: packed calls that look like one made before.

In an inference loop only addresses change from call to call. What the first call learned is kept, and with it
a guard of torch.compile's, which compares all that a plan depends on of all tensors in one call of C: type,
dtype, device, shape, strides and whether a tensor is plain (no lazy negation, no wrapper of a transform).
Reading the same off each tensor takes five times as long.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from .. import driver
from .packed import PackedPlan, suspicious

MAX_CALLS = 4096
# Calls of the same shape of out and the same options that differ otherwise, as in K, strides or devices.
MAX_ALIKE = 8
Guard = Callable[..., bool]
# The guard of its tensors, its plan, what launches it, and what gives torch's current stream on a device.
_Known = tuple[Guard, PackedPlan, Callable[..., None], Callable[[int], int]]
_calls: dict[Any, tuple[_Known, ...]] = {}
_tensor_types: set[type] = set()  # of remembered calls; guards compare them by address, so they live on
driver.clear_after_fork(_calls)

# What a call that was not known leaves for `remember_torch_call`: under what, and its tensors.
Missed = tuple[Any, tuple[Any, ...]]
_NEVER: Missed = (None, ())


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
    early_weights: Any,
) -> Missed | None:
    """Launch the call and return None where one like it was remembered; else, or where an address needs a
    closer look, do nothing and return what remembers it. Runs on torch's current stream of the plan's device.
    """
    start = base = index = weight = 0
    if early_weights is not True and early_weights is not False:  # 1 == True, and would be found as that
        return _NEVER
    try:
        if a_scale is b_scale and type(b_scale) in _tensor_types:  # a guard takes no tensor twice
            b_scale = b_scale.detach()
        # Which of the last three there are is part of the key. The most frequent are written out.
        tensors: tuple[Any, ...]
        if workspace is None or (row_index is None) is not (row_weight is None):
            tensors, given = (a, b, out, bounds, a_scale, b_scale), 0
            if workspace is not None:
                tensors, given = (*tensors, workspace), 1
            if row_index is not None:
                tensors, given = (*tensors, row_index), given | 2
            if row_weight is not None:
                tensors, given = (*tensors, row_weight), given | 4
        elif row_index is None:
            tensors, given = (a, b, out, bounds, a_scale, b_scale, workspace), 1
        else:
            tensors, given = (a, b, out, bounds, a_scale, b_scale, workspace, row_index, row_weight), 7
        key = (out.shape, masked, given, out_dtype, dtype, variant, expected_m, early_weights)
        known = _calls.get(key)
        if known is None:
            return key, tensors
        # A guard ends the process at a strided nested tensor, which has no strides. `out.shape` raises there.
        if (
            a.is_nested
            or b.is_nested
            or bounds.is_nested
            or a_scale.is_nested
            or b_scale.is_nested
            or (workspace is not None and workspace.is_nested)
            or (row_index is not None and row_index.is_nested)
            or (row_weight is not None and row_weight.is_nested)
        ):
            return _NEVER
        for each in known:
            if each[0](*tensors):
                break
        else:
            return key, tensors
        _, plan, run, get_stream = each
        p, q, d, groups = a.data_ptr(), b.data_ptr(), out.data_ptr(), bounds.data_ptr()
        x, w = a_scale.data_ptr(), b_scale.data_ptr()
        if row_index is not None:
            index = row_index.data_ptr()
        if row_weight is not None:
            weight = row_weight.data_ptr()
        if plan.needed and workspace is not None:
            start = workspace.data_ptr()
            base = (start + 255) & -256
    except (TypeError, AttributeError, RuntimeError):  # no tensor, not hashable, no shape, no memory:
        return _NEVER  # the long way says which
    # `suspicious` decides. Calling it costs more than to see here that nothing is near anything it looks for.
    if (
        start
        or (p | q | d | groups | index | x | w | weight) & 15
        or not (p and q and d and groups)
        or (index == 0) is plan.gathers
        or (weight == 0) is plan.weighted
        or (d < p + plan.span_a and p < d + plan.span_d)
        or (d < q + plan.span_b and q < d + plan.span_d)
    ) and suspicious(plan, p, q, d, groups, index, x, w, 0, weight, start, base):
        return _NEVER
    run(get_stream(plan.device), base, p, q, d, groups, index, x, w, 0, weight, 1.0, 1.0)
    return None


def make_guard(tensors: tuple[Any, ...]) -> tuple[Guard, Callable[[int], int]] | None:
    """What tells whether other tensors are like these in all but their addresses, and what gives torch's
    current stream on a device. None where not all are tensors (or parameters), or one is two arguments. The
    guard may not be asked about nested tensors.
    """
    torch = sys.modules["torch"]
    if not tensors or not all(isinstance(each, torch.Tensor) for each in tensors):
        return None
    try:
        get_stream = torch._C._cuda_getCurrentRawStream
        guards = torch._C._dynamo.guards.TensorGuards
        check = guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        _tensor_types.update(map(type, tensors))
        return (check, get_stream) if check(*tensors) else None
    except (AttributeError, TypeError, RuntimeError):
        return None  # a torch without them: its public ways cost more than this saves


def remember_torch_call(plan: PackedPlan, missed: Missed) -> None:
    """Keep the plan of a call that was just checked in full."""
    key, tensors = missed
    made = None if plan.launches is None else make_guard(tensors)
    if plan.launches is None or made is None:
        return
    check, get_stream = made
    alike = _calls.get(key, ())
    if not alike and len(_calls) >= MAX_CALLS:
        _calls.clear()
    _calls[key] = ((check, plan, plan.launches.run, get_stream), *alike[: MAX_ALIKE - 1])
