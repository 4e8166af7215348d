"""The shortest way from torch tensors to an expert layer's launches: calls of a layer that look like one that
it made before, known again by a guard as in torch_call.py.
"""

from __future__ import annotations

from typing import Any

from .moe_plan import CallPlan, LayerPlan
from .torch_call import MAX_ALIKE, make_guard


def run_known(layer: LayerPlan, x: Any, topk_weights: Any, topk_ids: Any, out: Any, workspace: Any) -> bool:
    """Launch the call on torch's current stream where one like it is known; else, or where an address needs a
    closer look, do nothing and return False. Raises what `LayerPlan.launch` raises."""
    try:
        alike = layer.known.get((x.shape, workspace is None))
        # A guard ends the process at a strided nested tensor, which has no strides. `x.shape` raises there.
        if (
            alike is None
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
    layer: LayerPlan, plan: CallPlan, x: Any, topk_weights: Any, topk_ids: Any, out: Any, workspace: Any
) -> None:
    """Keep the plan of a call that was just checked in full, where nothing but launches is to be done for it
    and all arrays are torch's."""
    if plan.hand_over or not plan.call.routes.tokens:
        return
    tensors = x, topk_weights, topk_ids, out
    made = make_guard(tensors if workspace is None else (*tensors, workspace))
    if made is None:
        return
    check, get_stream = made
    key = x.shape, workspace is None
    layer.known[key] = ((check, plan, get_stream), *layer.known.get(key, ())[: MAX_ALIKE - 1])
