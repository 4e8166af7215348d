"""The shortest way from torch tensors to an expert layer's launches: calls of a layer that look like one that
it made before, known again by a guard as in torch_call.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .moe_plan import CallPlan, LayerPlan
from .torch_call import MAX_ALIKE, Guard, make_guard

MAX_CALLS = 1024  # shapes that a layer remembers

# The guard of a call's tensors, its plan, and what gives torch's current stream on a device.
_Known = tuple[Guard, CallPlan, Callable[[int], int]]
# By what is quickly compared; of a layer, so that they go when it does.
KnownCalls = dict[Any, tuple[_Known, ...]]


def run_known(
    layer: LayerPlan, known: KnownCalls, x: Any, topk_weights: Any, topk_ids: Any, out: Any, workspace: Any
) -> bool:
    """Launch the call on torch's current stream where one like it is known; else, or where an address needs a
    closer look, do nothing and return False. Raises what `LayerPlan.launch` raises."""
    try:
        alike = known.get((x.shape, workspace is None))
        # A guard ends the process at a strided nested tensor.
        if (
            alike is None
            or x.is_nested
            or topk_weights.is_nested
            or topk_ids.is_nested
            or out.is_nested
            or (workspace is not None and workspace.is_nested)
        ):
            return False
        tensors: tuple[Any, ...] = x, topk_weights, topk_ids, out
        if workspace is not None:
            tensors = *tensors, workspace
        for each in alike:
            if each[0](*tensors):
                break
        else:
            return False
        _, plan, get_stream = each
        addresses = x.data_ptr(), topk_weights.data_ptr(), topk_ids.data_ptr(), out.data_ptr()
        given = None if workspace is None else workspace.data_ptr()
    except (TypeError, AttributeError, RuntimeError):  # no tensor, not hashable, no memory:
        return False  # the long way says which
    if not layer.looks_right(plan, *addresses):
        return False
    layer.launch(plan, get_stream(layer.device.ordinal), addresses, given)
    return True


def remember(
    known: KnownCalls, plan: CallPlan, x: Any, topk_weights: Any, topk_ids: Any, out: Any, workspace: Any
) -> None:
    """Keep the plan of a call that was just checked in full; nothing where not all arrays are torch's."""
    tensors = x, topk_weights, topk_ids, out
    made = make_guard(tensors if workspace is None else (*tensors, workspace))
    if made is None:
        return
    check, get_stream = made
    key = x.shape, workspace is None
    alike = known.get(key, ())
    if not alike and len(known) >= MAX_CALLS:
        known.clear()
    known[key] = ((check, plan, get_stream), *alike[: MAX_ALIKE - 1])
