"""What the launches of an expert layer leave for each other, and where in the workspace it lies."""

from __future__ import annotations

from dataclasses import dataclass

from .. import abi
from .memory import WORKSPACE_ALIGNMENT
from .moe_validate import Call, Layer
from .validate import itemsize


@dataclass(frozen=True, slots=True)
class Layout:
    """Bytes from the workspace's beginning to each of its parts, and of all of them. Rows are routes sorted
    by expert; parts that a layer has no use for are empty.

    q1, s1: the quantised tokens and their scales. offsets, row_index, route_row, row_weight: as `route` has
    them. maxima: of each row of h. counts: routes of each expert, where several CTAs count. h: the first
    GEMM's result. q2, s2: its quantised rows, where a launch of its own makes them. y: the second GEMM's
    result. partials: of split-K, one GEMM after the other.
    """

    q1: int
    s1: int
    offsets: int
    row_index: int
    route_row: int
    row_weight: int
    maxima: int
    counts: int
    h: int
    q2: int
    s2: int
    y: int
    partials: int
    size: int


def lay_out(layer: Layer, call: Call, *, quantises_apart: bool, partials: int) -> Layout:
    """The workspace of a call; `partials`: bytes that split-K needs."""
    routes = call.routes
    tokens, rows, element = routes.tokens, routes.most_rows, itemsize(call.dtype)
    static = layer.a2_scale_mode is not None
    ctas = route_ctas(rows)
    sizes = {
        "q1": tokens * layer.hidden,
        "s1": 4 * tokens,
        "offsets": 4 * (layer.experts + 1),
        "row_index": 4 * rows,
        "route_row": 4 * rows,
        "row_weight": 4 * rows,
        "maxima": 0 if static else 4 * rows,
        "counts": 4 * ctas * layer.experts if ctas > 1 else 0,
        "h": rows * layer.intermediate * (1 if static else element),
        "q2": rows * layer.intermediate if quantises_apart else 0,
        "s2": 4 * rows if quantises_apart else 0,
        "y": rows * layer.hidden * element,
        "partials": partials,
    }
    starts, size = _behind_each_other(sizes)
    return Layout(**starts, size=size)


@dataclass(frozen=True, slots=True)
class WholeLayout:
    """The same for a layer that is one launch: h and y of every route, in the routes' order. Never larger
    than the layout of several launches."""

    h: int
    y: int
    size: int


def lay_out_whole(layer: Layer, call: Call) -> WholeLayout:
    """The workspace of a call that is one launch."""
    rows, element = call.routes.most_rows, itemsize(call.dtype)
    sizes = {"h": rows * layer.intermediate * element, "y": rows * layer.hidden * element}
    starts, size = _behind_each_other(sizes)
    return WholeLayout(**starts, size=size)


def _behind_each_other(sizes: dict[str, int]) -> tuple[dict[str, int], int]:
    """Where each part begins, and where the last one ends."""
    starts, at = {}, 0
    for name, size in sizes.items():
        starts[name] = at
        at += -(-size // WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT
    return starts, at


def route_ctas(routes: int) -> int:
    """CTAs that sort so many routes."""
    return max(1, -(-routes // abi.SM12X_ROUTES_PER_CTA))
