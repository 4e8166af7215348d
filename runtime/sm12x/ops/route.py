"""`sm12x.route`: from a router's choices to rows sorted by expert."""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import abi, driver
from ..arrays import Array
from ..tensors import allocate_like, current_stream, deliver, framework_of, ingest
from . import emulated, single_launch, validate
from .arguments import device_of, refuse_for_numpy
from .memory import check_alignment, check_present
from .moe_validate import Routes, take_routes
from .moe_workspace import route_ctas


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
    if emulator:
        return _emulated(topk_ids, num_experts, topk_weights, expert_map, stream)
    framework = framework_of(topk_ids, "topk_ids")
    ordinal = device_of(topk_ids, framework, "topk_ids")
    handle = current_stream(framework, ordinal) if stream is None else validate.stream_handle(stream)
    ids, weights, experts = (
        None if array is None else ingest(array, name, handle)
        for name, array in (
            ("topk_ids", topk_ids),
            ("topk_weights", topk_weights),
            ("expert_map", expert_map),
        )
    )
    if ids is None:
        raise TypeError("topk_ids: expected an array, got None")
    call = take_routes(ids, num_experts, weights, experts)
    named = (("topk_ids", ids), ("topk_weights", weights), ("expert_map", experts))
    device = driver.get_device(validate.same_device(named))
    _check_addresses(call, ids, weights, experts)
    made = [
        None if shape is None else allocate_like(framework, shape, dtype, ordinal, handle)
        for shape, dtype in _results(call)
    ]
    addresses = [0 if array is None else ingest(array, "out", handle).ptr for array in made]
    _launch(device, call, ids, weights, experts, addresses, handle)
    inputs = [array for _, array in named if array is not None]
    if any(array.framework == "jax" for array in inputs):
        there = [array for array in made if array is not None]
        delivered = iter(deliver(there, inputs, handle, ordinal))
        made = [None if array is None else next(delivered) for array in made]
    return Routing(*made)


def _results(call: Routes) -> tuple[tuple[tuple[int, ...] | None, str], ...]:
    """Shape and dtype of what a call gives; no shape where it gives none."""
    rows = (call.most_rows,)
    return (
        ((call.experts + 1,), "int32"),
        (rows, "int32"),
        ((call.tokens, call.top_k), "int32"),
        (rows if call.weighted else None, "float32"),
    )


def _check_addresses(call: Routes, ids: Array, weights: Array | None, experts: Array | None) -> None:
    """Raises ValueError for arrays that have no memory, or not where they may."""
    arrays = [
        ("topk_ids", ids, 8 if call.wide_ids else 4),
        ("topk_weights", weights, 4),
        ("expert_map", experts, 4),
    ]
    there = [(name, array.ptr, multiple) for name, array, multiple in arrays if array is not None]
    if call.tokens:
        check_present([(name, address) for name, address, _ in there])
    check_alignment(there)


def _launch(
    device: driver.Device,
    call: Routes,
    ids: Array,
    weights: Array | None,
    experts: Array | None,
    addresses: list[int],
    stream: int,
) -> None:
    ctas = route_ctas(call.most_rows)
    offsets, row_index, route_row, row_weight = addresses
    params = abi.sm12x_route_params(
        topk_ids=ids.ptr,
        topk_weights=0 if weights is None else weights.ptr,
        expert_map=0 if experts is None else experts.ptr,
        offsets=offsets,
        row_index=row_index,
        route_row=route_row,
        row_weight=row_weight,
        routes=call.most_rows,
        top_k=call.top_k,
        num_experts=call.experts,
        map_size=call.global_experts,
        ids_are_64_bit=int(call.wide_ids),
        phase=abi.SM12X_ROUTE_ALL,
        route_ctas=ctas,
    )
    shapes = f"topk_ids {ids.shape} {ids.dtype}, {call.experts} experts"
    with driver.current(device):
        if ctas == 1:
            single_launch.run(device, "moe_route", "route", params, (1, 1, 1), stream, shapes)
            return
        with driver.temporary(device, 4 * ctas * call.experts, stream) as counts:
            params.counts = counts
            for phase in (abi.SM12X_ROUTE_COUNT, abi.SM12X_ROUTE_PLACE):
                params.phase = phase
                single_launch.run(device, "moe_route", "route", params, (ctas, 1, 1), stream, shapes)


def _emulated(topk_ids: Any, num_experts: Any, topk_weights: Any, expert_map: Any, stream: Any) -> Routing:
    from ..emulator import host_arrays  # not above: nobody else needs the emulator

    emulated.refuse_stream(stream)
    ids, weights, experts = (
        None if array is None else ingest(array, name, 0)
        for name, array in (
            ("topk_ids", topk_ids),
            ("topk_weights", topk_weights),
            ("expert_map", expert_map),
        )
    )
    if ids is None:
        raise TypeError("topk_ids: expected an array, got None")
    call = take_routes(ids, num_experts, weights, experts)
    made = [
        (None, None) if shape is None else emulated.new_output(ids.framework, shape, dtype)
        for shape, dtype in _results(call)
    ]
    with host_arrays.Mirror(emulated.device()) as mirror:
        there = [
            None if array is None else mirror.add(array, name, host_arrays.INPUT)
            for name, array in (("topk_ids", ids), ("topk_weights", weights), ("expert_map", experts))
        ]
        outs = [
            None if array is None else mirror.add(ingest(array, "out", 0), "out", host_arrays.OUTPUT)
            for array, _ in made
        ]
        mirror.upload()
        taken = [None if array is None else ingest(array, "topk_ids", 0) for array in there]
        if taken[0] is not None:
            addresses = [0 if out is None else out.ptr for out in outs]
            _launch(emulated.device(), call, taken[0], taken[1], taken[2], addresses, 0)
        mirror.collect()
    return Routing(*(None if array is None or finish is None else finish(array) for array, finish in made))
