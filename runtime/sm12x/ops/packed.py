"""The plan of a packed or masked call: all that does not change with the addresses, worked out once.

A call with a known plan checks addresses and launches. `suspicious` looks at all of them at once; where it
finds a sign of trouble, `refuse` says which argument it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..arrays import Array
from . import fp8_packed, fp8_ptr_array, launch, row_layout, validate
from .memory import (
    check_alignment,
    check_operands,
    check_overlap,
    check_present,
    check_workspace,
    workspace_base,
)
from .operands import Given, take_operands
from .validate import Matrix

Launches = fp8_packed.PackedLaunch | fp8_ptr_array.PtrArrayLaunch


@dataclass(slots=True)
class PackedPlan:
    """A validated call without its addresses. `launches` is None where there is nothing to compute.

    `a`, `b`, `d`: all rows of a, of the weights and of the result; spans are bytes from first to behind last.
    Masks have the bits that an address must not have.
    """

    device: int
    out_shape: tuple[int, ...]
    out_dtype: str
    a: Matrix
    b: Matrix
    d: Matrix
    span_a: int
    span_b: int
    span_d: int
    bounds_mask: int
    index_mask: int
    bias_mask: int
    gathers: bool
    weighted: bool
    needed: int
    workspace_bytes: int
    hand_over: bool  # an array is JAX's: `tensors.deliver` has work to do
    launches: Launches | None


def plan_packed(
    given: Given, out_dtype: Any, dtype: Any, expected_m: Any, variant: Any, early_weights: bool = False
) -> PackedPlan:
    """Validate everything but addresses and prepare the launches. Raises as `sm12x.grouped_gemm` says."""
    operands = take_operands(given, out_dtype, dtype, expected_m)
    problem, groups = operands.problem, operands.problem.groups
    choice = launch.choose(replace(problem, early=early_weights), variant, operands.device)
    around = groups if given.masked else 1
    a = row_layout.whole(operands.a, around, operands.a_group)
    b = row_layout.whole(operands.b, groups, operands.b_group)
    d = row_layout.whole(operands.d, around, operands.d_group)
    made: Launches | None = None
    if groups and operands.rows:
        if choice.variant.family == "fp8_packed":
            made = fp8_packed.make_launch(operands, choice, given.a.ptr, given.b.ptr, early_weights)
        else:
            made = fp8_ptr_array.make_launch(operands, choice, given.b.ptr)
    needed = 0 if made is None else made.needed
    if needed and operands.workspace_bytes is not None:
        workspace_base(0, operands.workspace_bytes, needed)  # an empty one has no address to check
    return PackedPlan(
        device=operands.device.ordinal,
        out_shape=operands.out_shape,
        out_dtype=problem.out,
        a=a,
        b=b,
        d=d,
        span_a=a.span,
        span_b=b.span if groups else 0,
        span_d=d.span,
        bounds_mask=7 if operands.wide_bounds else 3,
        index_mask=7 if operands.wide_row_index else 3,
        bias_mask=0 if operands.bias is None else validate.BIAS_BYTES[operands.bias] - 1,
        gathers=operands.wide_row_index is not None,
        weighted=operands.weighted,
        needed=needed,
        workspace_bytes=operands.workspace_bytes or 0,
        hand_over=any(array is not None and array.framework == "jax" for _, array in given.named()),
        launches=made,
    )


def suspicious(
    plan: PackedPlan,
    a: int,
    b: int,
    d: int,
    bounds: int,
    row_index: int,
    a_scale: int,
    b_scale: int,
    bias: int,
    row_weight: int,
    workspace: int,
    base: int,
) -> bool:
    """Whether an address breaks a rule, or may (a span is wider than the rows in it): `refuse` decides.

    `workspace` is the address of the caller's, or 0; `base` where in it we begin.
    """
    a_end, b_end, d_end = a + plan.span_a, b + plan.span_b, d + plan.span_d
    # Most arrays begin at multiples of 16, which is enough for all of them.
    odd = (a | b | d | bounds | row_index | a_scale | b_scale | bias | row_weight) & 15
    if (
        (odd and _misaligned(plan, a | b | d, bounds, row_index, a_scale | b_scale | row_weight, bias))
        or not (a and b and d and bounds)
        or (row_index == 0) is plan.gathers
        or (row_weight == 0) is plan.weighted
        or (d < a_end and a < d_end)
        or (d < b_end and b < d_end)
    ):
        return True
    if not workspace or not plan.needed:
        return False
    end = base + plan.needed
    return (
        end > workspace + plan.workspace_bytes
        or (base < a_end and a < end)
        or (base < b_end and b < end)
        or (base < d_end and d < end)
    )


def _misaligned(plan: PackedPlan, tma: int, bounds: int, row_index: int, floats: int, bias: int) -> int:
    """Other than 0 where an address is not aligned; `tma` and `floats`: what TMA and float32 need of all."""
    return (
        tma & 15
        | bounds & plan.bounds_mask
        | row_index & plan.index_mask
        | floats & 3
        | bias & plan.bias_mask
    )


def refuse(plan: PackedPlan, given: Given, out: Array) -> None:
    """The checks of a call's addresses, in full. Whoever calls has found a sign that one fails; where none
    does (rows in each other's gaps) it returns."""
    validate.writable(out, "out")
    a, b, bounds, workspace = given.a, given.b, given.bounds, given.workspace
    name = "rows" if given.masked else "offsets"
    if workspace is not None:
        validate.writable(workspace, "workspace")
    index = 0 if given.row_index is None else given.row_index.ptr
    weight = 0 if given.row_weight is None else given.row_weight.ptr
    check_present((("b", b.ptr), ("out", out.ptr), (name, bounds.ptr)))
    if plan.span_a:
        check_present((("a", a.ptr),))
    if plan.gathers:
        check_present((("row_index", index),))
    if plan.weighted:
        check_present((("row_weight", weight),))
    check_operands(a.ptr, b.ptr, out.ptr)
    check_alignment(
        (
            (name, bounds.ptr, plan.bounds_mask + 1),
            ("row_index", index, plan.index_mask + 1),
            ("a_scale", given.a_scale.ptr if isinstance(given.a_scale, Array) else 0, 4),
            ("b_scale", given.b_scale.ptr if isinstance(given.b_scale, Array) else 0, 4),
            ("row_weight", weight, 4),
            ("bias", 0 if given.bias is None else given.bias.ptr, plan.bias_mask + 1),
        )
    )
    check_overlap("out", out.ptr, plan.d, (("a", a.ptr, plan.a), ("b", b.ptr, plan.b)))
    if workspace is not None and plan.needed:
        base = workspace_base(workspace.ptr, plan.workspace_bytes, plan.needed)
        operands = (("a", a.ptr, plan.a), ("b", b.ptr, plan.b), ("out", out.ptr, plan.d))
        check_workspace(base, plan.needed, operands)
