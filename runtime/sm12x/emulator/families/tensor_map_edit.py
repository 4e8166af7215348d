"""Editing tensor maps (PTX ISA, "tensormap.replace", "tensormap.cp_fenceproxy")."""

from __future__ import annotations

import numpy as np

from .. import tensor_map
from ..checkers import tensor_maps
from ..cta import Cta
from ..emitter import Emitter
from ..errors import Fault
from ..memory import SHARED_BASE, SHARED_WINDOW, WINDOW_BYTES, Array, Region
from ..ptx.ir import Immediate, Instruction
from ..registry import instruction, unsupported
from ..spaces import aligned, shared_address, space_of, uniform
from ..warp import LANES, Split, Warp

_INDEXED = {"box_dim", "global_dim", "global_stride", "element_stride"}


def _place(cta: Cta, space: str, address: int) -> tuple[Region, slice]:
    """Where the tensor map at an address of a space lies."""
    if address % 128:
        raise Fault("alignment", f"a tensor map to edit at {address:#x}, which is no multiple of 128")
    if space == "generic" and SHARED_WINDOW <= address < SHARED_WINDOW + WINDOW_BYTES:
        space, address = "shared", address - SHARED_WINDOW
    region = cta.shared if space == "shared" else cta.grid.memory.region(address, "edit of a tensor map")
    return region, region.span(address, tensor_map.SIZE, "edit of a tensor map")


@instruction("tensormap.replace.tile", yields=True)
def replace(i: Instruction, e: Emitter) -> None:
    """One field of the 128 bytes is replaced; the map is judged when it is used."""
    field, kind, space = i.opcode[3], i.opcode[-1], space_of(i)
    if "b1024" not in i.opcode or kind not in ("b32", "b64"):
        raise unsupported(i)
    index = None
    if field in _INDEXED:
        ordinal = i.operands[1]
        if not isinstance(ordinal, Immediate):
            raise unsupported(i, "an ordinal that is no constant")
        index = ordinal.value

    def run(w: Warp, _s: Split, lanes: Array | None, address: Array, value: Array) -> None:
        for lane in LANES if lanes is None else lanes:
            region, span = _place(w.cta, space, int(address[lane]))
            if np.count_nonzero(region.shadow[span]):
                raise Fault("uninitialised", "the tensor map to edit was never wholly written", (int(lane),))
            try:
                content = tensor_map.replace(region.data[span].tobytes(), field, index, int(value[lane]))
            except ValueError as error:
                raise Fault("tensor map", str(error), (int(lane),)) from error
            changed = np.frombuffer(content, np.uint8)
            region.tell(region.base + span.start, tensor_map.SIZE, None)
            region.tell(region.base + span.start, tensor_map.SIZE, changed)
            region.data[span] = changed
            if region is w.cta.shared and w.cta.races is not None:
                _map_edited(w, int(lane), span)

    e.call(run, e.address(i.operands[0]), e.value(i.operands[-1], kind).u)


def _map_edited(w: Warp, lane: int, span: slice) -> None:
    """A lane has read and written a whole tensor map, so far as races go."""
    assert w.cta.races is not None
    address, one = np.array([SHARED_BASE + span.start]), np.array([lane])
    w.cta.races.load(w, one, address, tensor_map.SIZE)
    w.cta.races.store(w, one, address, tensor_map.SIZE)


@instruction("tensormap.cp_fenceproxy", yields=True)
def cp_fenceproxy(i: Instruction, e: Emitter) -> None:
    """A warp copies a map from shared to global memory, where the tensor-map proxy sees it after an acquire
    fence.
    """
    if i.opcode[2:4] != ("global", "shared::cta") or i.opcode[-2:] != ("sync", "aligned"):
        raise unsupported(i)
    to, source, size = i.operands
    if not isinstance(size, Immediate) or size.value != tensor_map.SIZE:
        raise unsupported(i, "a size other than 128")
    e.call(_copy, e.address(to), e.address(source))


def _copy(w: Warp, s: Split, lanes: Array | None, to: Array, source: Array) -> None:
    aligned(s, lanes)
    target, span = _place(w.cta, "global", uniform(to, lanes, "the destination"))
    region, read = _place(w.cta, "shared", shared_address(source, lanes, "shared"))
    if np.count_nonzero(region.shadow[read]):
        raise Fault("uninitialised", "the tensor map to copy was never wholly written")
    if w.cta.races is not None:
        rows = SHARED_BASE + read.start + 16 * np.arange(tensor_map.SIZE // 16)
        w.cta.races.load_rows(w, rows, 16)
    target.tell(target.base + span.start, tensor_map.SIZE, region.data[read])
    target.data[span] = region.data[read]
    target.shadow[span] = 0
    tensor_maps.publish(w.cta)
