"""The backend of ``sm12x.route`` for NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sm12x.ops import moe_validate
from sm12x.ops.route import Routing
from sm12x.reference.problem import describe


def route_numpy(
    topk_ids: Any, num_experts: int, *, topk_weights: Any = None, expert_map: Any = None
) -> Routing:
    """``sm12x.route`` for NumPy arrays; arguments, result and errors are the same."""
    call = moe_validate.take_routes(
        describe(topk_ids, "topk_ids"),
        num_experts,
        None if topk_weights is None else describe(topk_weights, "topk_weights"),
        None if expert_map is None else describe(expert_map, "expert_map"),
    )
    experts = _local_experts(topk_ids.reshape(-1), num_experts, expert_map)
    order = np.argsort(experts, kind="stable")  # invalid routes, E, come last
    offsets = np.zeros(num_experts + 1, np.int32)
    np.cumsum(np.bincount(experts, minlength=num_experts)[:num_experts], out=offsets[1:])
    rows = order[: offsets[-1]]
    row_index = np.full(call.most_rows, -1, np.int32)
    row_index[: len(rows)] = rows // call.top_k
    route_row = np.full(call.most_rows, -1, np.int32)
    route_row[rows] = np.arange(len(rows), dtype=np.int32)
    row_weight = None
    if topk_weights is not None:
        row_weight = np.zeros(call.most_rows, np.float32)
        row_weight[: len(rows)] = topk_weights.reshape(-1)[rows]
    return Routing(offsets, row_index, route_row.reshape(call.tokens, call.top_k), row_weight)


def _local_experts(ids: NDArray[Any], experts: int, expert_map: NDArray[np.int32] | None) -> NDArray[np.intp]:
    """The expert of each route among those of this device, `experts` for an invalid route."""
    local = ids.astype(np.int64)
    if expert_map is not None:
        known = (local >= 0) & (local < len(expert_map))
        local = np.where(known, expert_map[np.where(known, local, 0)].astype(np.int64), -1)
    return np.where((local >= 0) & (local < experts), local, experts).astype(np.intp)
