"""A layer as one launch against the chain of several whose bits it must have: its result, h, y, what it
leaves in the workspace, and its state.
"""

from __future__ import annotations

import torch
from layer_forced import chain_of_whole, kernels, wholes
from layer_problem import LayerProblem, device_of_layers
from layer_strata import Spec
from torch_reference import DEVICE, DTYPES
from variants import ARCH

from sm12x import abi, driver
from sm12x.manifest import Variant
from sm12x.ops.moe_workspace import Layout, WholeLayout
from sm12x.select import layer as select_layer

Found = dict[str, torch.Tensor]
STATE_WORDS = abi.SM12X_LAYER_STATE + abi.SM12X_LAYER_STRIPS


def whole_kernel(spec: Spec) -> Variant | None:
    """The kernel that can do all of a layer, None where there is none."""
    variant = wholes(ARCH).get(spec.gated)
    if variant is None or not spec.tokens:
        return None
    problem = select_layer.LayerProblem(
        experts=spec.experts,
        hidden=spec.hidden,
        intermediate=spec.intermediate,
        gated=spec.gated,
        static=spec.static2 is not None,
        dtype=spec.dtype,
        arch=ARCH,
        rows=spec.tokens * spec.top_k,
        expected_rows=spec.tokens * spec.top_k,
        weighted=not spec.weight_on_input,
        static_input=spec.static1 is not None,
    )
    return variant if select_layer.fits_whole(problem, variant) is None else None


class _Words:
    """Words of device memory, for torch."""

    def __init__(self, address: int, count: int) -> None:
        self.__cuda_array_interface__ = {
            **{"shape": (count,), "typestr": "<i4", "data": (address, False), "version": 2, "strides": None}
        }


def nonzero_states() -> torch.Tensor:
    """How many words of the counters of any workspace of the device are not zero, on the device. Work of
    other streams has ended."""
    device = device_of_layers()
    zero = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for address in device.counters.values():
        if DEVICE == "cpu":
            with driver.current(device):
                content = driver.read_bytes(device, address, 4 * STATE_WORDS, 0)
            words = torch.frombuffer(bytearray(content), dtype=torch.int32)
        else:
            words = torch.as_tensor(_Words(address, STATE_WORDS), device=DEVICE)
        zero = zero + (words != 0).sum()
    return zero


def state_of(base: int) -> torch.Tensor:
    """How many words of the state that goes with a workspace on the device are not zero, on the device."""
    words = torch.as_tensor(_Words(device_of_layers().counters[base], STATE_WORDS), device=DEVICE)
    return (words != 0).sum()


def differing(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """How many elements of two bytes have other bits."""
    return (found.view(torch.int16) != expected.view(torch.int16)).sum()


def check_whole(problem: LayerProblem, workspace: torch.Tensor) -> Found:
    """What `LIMITS` limits of one launch, on the device: "whole", elements of out, h and y that are not those
    of the chain, bytes of the workspace that are neither, words of the state that are left; "outside", around
    out. The call is made twice on the same workspace, filled anew in between.
    """
    spec, base = problem.spec, -workspace.data_ptr() % 256 if workspace.is_cuda else 0
    target = torch.arange(spec.tokens, device=DEVICE)
    expected = problem.guarded_out()
    with kernels(*chain_of_whole(spec.gated)) as made:
        problem.call(expected.out, workspace)
    parts = _Parts(problem, workspace[base:], made.layouts[-1])
    h, y = parts.h.clone(), parts.y.clone()

    found: Found = {}
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    outside = expected.damaged(target)
    with kernels(whole=True) as made:
        for _ in range(2):
            out = problem.guarded_out()
            workspace.random_()
            before = workspace.clone()
            problem.call(out.out, workspace)
            at = made.layouts[-1]
            mine, untouched = (_Parts(problem, each[base:], at) for each in (workspace, before))
            wrong = wrong + differing(out.out, expected.out)
            wrong = wrong + differing(mine.h[parts.valid], h[parts.rows])
            wrong = wrong + differing(mine.y[parts.valid], y[parts.rows])
            wrong = wrong + differing(mine.h[~parts.valid], untouched.h[~parts.valid])
            wrong = wrong + differing(mine.y[~parts.valid], untouched.y[~parts.valid])
            mine.h.copy_(untouched.h)
            mine.y.copy_(untouched.y)
            wrong = wrong + (workspace != before).sum()
            outside = outside + out.damaged(target)
            if workspace.is_cuda:
                wrong = wrong + state_of(workspace.data_ptr() + base)
    if not workspace.is_cuda:
        wrong = wrong + nonzero_states()
    found["whole"], found["outside"] = wrong, outside
    return found


class _Parts:
    """h and y of a workspace, rows of all routes; `valid`: which routes have a row, `rows`: the row of each
    of those where rows are sorted by expert."""

    def __init__(self, problem: LayerProblem, workspace: torch.Tensor, at: Layout | WholeLayout) -> None:
        spec = problem.spec
        routes, kind = spec.tokens * spec.top_k, DTYPES[spec.dtype]

        def part(start: int, length: int) -> torch.Tensor:
            return workspace[start : start + 2 * routes * length].view(kind).view(routes, length)

        self.h, self.y = part(at.h, spec.intermediate), part(at.y, spec.hidden)
        row_of_route = problem.route_row.reshape(-1).long()
        self.valid = row_of_route >= 0
        self.rows = row_of_route[self.valid]
