"""`sm12x.route`: from a router's choices to rows sorted by expert."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..tensors import framework_of
from . import emulated
from .arguments import refuse_for_numpy


class Routing(NamedTuple):
    """Where the routes of a batch lie as rows sorted by expert; arrays of the framework of topk_ids.

    A row is a valid route. Rows of expert e are offsets[e] to offsets[e + 1], in the order of their route
    numbers t * k + j; there are offsets[E] of them.

    offsets: (E + 1,) int32.
    row_index: (T * k,) int32, the token of each row; -1 behind the last row.
    route_row: (T, k) int32, the row of each route; -1 where the route is invalid.
    row_weight: (T * k,) float32, the weight of each row's route; 0 behind the last row. None where no
      topk_weights were given.
    """

    offsets: Any
    row_index: Any
    route_row: Any
    row_weight: Any


def route(
    topk_ids: Any,
    num_experts: int,
    *,
    topk_weights: Any = None,
    expert_map: Any = None,
    stream: Any = None,
    backend: str | None = None,
) -> Routing:
    """Sort the routes of a batch by expert: offsets, row order, its inverse and the rows' weights.

    What it returns is what `grouped_gemm` takes: ``offsets=``, ``row_index=`` (the token of each row, so that
    no permuted copy of tokens is needed) and ``row_weight=``. The sort is stable: rows of an expert come in
    the order of their routes. Duplicate ids in a token are two rows.

      topk_ids (T, k) int32 or int64, contiguous: the expert of each route. T at most 65,536, T * k below
        2**31.
      num_experts: E, the experts on this device, 1 to 1024.
      topk_weights (T, k) float32, contiguous, or None.
      expert_map (E_global,) int32, contiguous: the number among this device's experts for each id, -1 for
        experts that are elsewhere. None: ids are this device's numbers.
      A route is invalid, and has no row, where its id is negative, not below E_global (without a map: E), or
      the map's entry is not in 0 to E - 1.

    stream: integer handle, or an object with __cuda_stream__, cuda_stream, ptr or value. None: the current
      stream of the framework of `topk_ids`. Nothing waits for the GPU.
    backend: "auto": arrays of a GPU are sorted there, NumPy arrays on the CPU; stream is then refused.
      "emulator": arrays in host memory run the GPU's kernels in `sm12x.emulator`. None: what SM12X_BACKEND
      said at the first call, or "auto".

    Returns a `Routing` of new arrays.

    Raises ValueError and TypeError naming the argument.
    """
    emulator = emulated.wanted(backend)
    if not emulator and framework_of(topk_ids, "topk_ids") == "numpy":
        refuse_for_numpy(stream=stream)
        from ..reference.route import route_numpy  # not above: GPU callers need no NumPy code

        return route_numpy(topk_ids, num_experts, topk_weights=topk_weights, expert_map=expert_map)
    return _route_on_device(topk_ids, num_experts, topk_weights, expert_map, stream, emulator)


def _route_on_device(
    topk_ids: Any, num_experts: Any, topk_weights: Any, expert_map: Any, stream: Any, emulator: bool
) -> Routing:
    """The same with the GPU's kernels; `emulator`: on host arrays, in the emulator."""
    raise NotImplementedError("sm12x.route: the GPU path (family moe_route) is not there yet")
