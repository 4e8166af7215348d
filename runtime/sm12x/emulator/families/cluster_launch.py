"""Taking over the work of CTAs that have not been launched (PTX ISA, "clusterlaunchcontrol")."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ..asynchronous import Issuer, Operation
from ..checkers.barriers import check_initialisation
from ..checkers.races import Ticket
from ..cta import Cta
from ..emitter import Emitter
from ..errors import Fault
from ..memory import Array
from ..ptx.ir import Instruction, Vector
from ..registry import instruction, unsupported
from ..spaces import shared_addresses, space_of
from ..warp import LANES, Split, Warp
from .bulk_copy import issue

_BYTES = 16  # of a response
# The response is opaque. Here: x and y in the low half, z and this mark in the high one, and zeros for a try
# that failed: CUTLASS's schedulers write 16 zero bytes to tell their warps that there is nothing more to do.
_CANCELED = 0x5C1C0001
_HINTS = {"async", "shared::cta", "mbarrier::complete_tx::bytes", "multicast::cluster::all", "b128"}


@instruction("clusterlaunchcontrol.try_cancel", yields=True)
def try_cancel(i: Instruction, e: Emitter) -> None:
    """Clusters have one CTA, so that a response for all of a cluster is one for that CTA."""
    space = space_of(i)
    if set(i.opcode[2:]) - _HINTS or not i.has("mbarrier::complete_tx::bytes") or i.opcode[-1] != "b128":
        raise unsupported(i)

    def run(w: Warp, _s: Split, lanes: Array | None, to: Array, barrier: Array) -> None:
        active = LANES if lanes is None else lanes
        places = shared_addresses(to[active], space).tolist()
        barriers = shared_addresses(barrier[active], space).tolist()
        for lane, place, target in zip(active.tolist(), places, barriers, strict=True):
            cta = w.cta
            if cta.cancel_refused:
                raise Fault("cancel", "try_cancel in a CTA that has already seen that one failed", (lane,))
            if place % _BYTES:
                raise Fault(
                    "alignment", f"a response at shared {place:#x}, which is no multiple of 16", (lane,)
                )
            cta.mbarrier(target)
            check_initialisation(cta, target)
            cta.in_flight += 1
            step = partial(_respond, cta, place, target, issue(i, w, lane))
            cta.grid.scheduler.submit(Operation(Issuer(i, w, lane), step))

    e.call(run, e.address(i.operands[0]), e.address(i.operands[1]))


def _respond(cta: Cta, place: int, barrier: int, ticket: Ticket | None) -> None:
    found = cta.grid.cancel_launch()
    x, y, z, mark = (0, 0, 0, 0) if found is None else (*found, _CANCELED)
    words = np.array([[x | y << 32, z | mark << 32]], np.uint64)
    cta.shared.scatter(np.array([place]), words, _BYTES)
    cta.in_flight -= 1
    if ticket is not None and cta.races is not None:
        cta.races.copied_in(ticket, np.array([place]), _BYTES, cta.mbarrier(barrier))
    cta.mbarrier_complete(cta.mbarrier(barrier), _BYTES)


def _canceled(response: Array, lanes: Array) -> Array:
    """bool (n,): what the responses of the active lanes say. Raises Fault for what is none."""
    marks = response["high"][lanes] >> np.uint64(32)
    found: Array = marks == np.uint64(_CANCELED)
    known = found | ((response["high"][lanes] | response["low"][lanes]) == np.uint64(0))
    if not known.all():
        raise Fault("cancel", "these 16 bytes are no response of try_cancel", tuple(lanes[~known].tolist()))
    return found


def _is_canceled(w: Warp, _s: Split, lanes: Array | None, response: Array) -> Array:
    found = _canceled(response, LANES if lanes is None else lanes)
    if not found.all():
        w.cta.cancel_refused = True
    return found


def _first_ctaid(_w: Warp, _s: Split, lanes: Array | None, response: Array) -> Any:
    active = LANES if lanes is None else lanes
    found = _canceled(response, active)
    if not found.all():
        raise Fault("cancel", "get_first_ctaid of a try_cancel that failed", tuple(active[~found].tolist()))
    low, high = response["low"][active], response["high"][active]
    zero = np.zeros(len(active), np.uint32)
    return low.astype(np.uint32), (low >> np.uint64(32)).astype(np.uint32), high.astype(np.uint32), zero


@instruction("clusterlaunchcontrol.query_cancel.is_canceled.pred.b128")
def is_canceled(i: Instruction, e: Emitter) -> None:
    d, a = i.operands
    lanes = e.lanes()
    e.put(d, "pred", e.call(_is_canceled, e.value(a, "b128").u, result=True), lanes)


@instruction("clusterlaunchcontrol.query_cancel.get_first_ctaid.v4.b32.b128")
def first_ctaid(i: Instruction, e: Emitter) -> None:
    d, a = i.operands
    if not isinstance(d, Vector) or len(d.elements) != 4:
        raise unsupported(i, "expected 4 destinations")
    lanes = e.lanes()
    found = e.call(_first_ctaid, e.value(a, "b128").u, result=True)
    for at, element in enumerate(d.elements):
        e.put(element, "b32", f"{found}[{at}]", lanes)


@instruction(*(f"clusterlaunchcontrol.query_cancel.get_first_ctaid::{axis}.b32.b128" for axis in "xyz"))
def first_ctaid_of(i: Instruction, e: Emitter) -> None:
    d, a = i.operands
    lanes = e.lanes()
    found = e.call(_first_ctaid, e.value(a, "b128").u, result=True)
    at = "xyz".index(i.opcode[2][-1])
    e.put(d, "b32", f"{found}[{at}]", lanes)
