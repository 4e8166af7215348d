"""What the launches of a layer left in the workspace, and whether it is right: each stage against float64 on
what the stage before it really gave, and the layer against the float64 composition.
"""

from __future__ import annotations

from dataclasses import dataclass

import layer_reference as reference
import numpy as np
import torch
from layer_problem import LayerProblem
from packed_problem import grouped_products
from torch_reference import DTYPES, ulp

from sm12x.ops.moe_workspace import Layout
from sm12x.select.layer import LayerChoice

TINY = 2.0**-8  # tokens below are quantised too coarsely for the layer's error to say anything
LAYER_LIMIT = 2e-2  # relative Frobenius error of a token
# A token may be further off where a last bit of h shifts a row's scale, and with it a part of its codes, or
# where its rows all but cancel: relative to its rows together, by the step of a code, which is an eighth of
# the smallest that has it (0.0605 were seen once in 65,536 tokens, I 48), and if the sum in float64 of rows
# from our own codes is within the second figure, which is that of their rounding.
REQUANTISED_LIMIT, EXPLAINED = 2.0**-3, 4e-3

# What is measured of a layer, and the most that passes.
LIMITS = {
    "route": 0.0,  # entries of offsets, row_index, route_row, row_weight and maxima that are wrong
    "scales": 0.0,  # s1, s2 that are not the rule's bits
    "codes": 0.0,  # q1, q2 more than an e4m3 step from the exact quotient
    "bits": 0.0,  # q1, q2 that are not the nearest to the float32 quotient
    "gemm1": 1.0,  # error over its bound
    "gemm2": 1.0,
    "combine": 0.0,  # elements of out that are not the float32 sum
    "layer": 1.0,  # relative Frobenius error of the worst token, over LAYER_LIMIT
    "outside": 0.0,  # elements around out that changed
    "again": 0.0,  # elements that another call of the same gave otherwise
    "whole": 0.0,  # elements that one launch for all of the layer gives otherwise, as layer_whole.py says
}


@dataclass
class Stages:
    """Views of a workspace. Rows are those of valid routes only; `q2` and `s2` where a launch of its own made
    them, `s1` where it is not static, `maxima` where s2 is not."""

    offsets: torch.Tensor
    row_index: torch.Tensor
    route_row: torch.Tensor
    row_weight: torch.Tensor
    q1: torch.Tensor
    s1: torch.Tensor | None
    maxima: torch.Tensor | None
    h: torch.Tensor
    q2: torch.Tensor | None
    s2: torch.Tensor | None
    y: torch.Tensor


def read_stages(problem: LayerProblem, workspace: torch.Tensor, at: Layout, choice: LayerChoice) -> Stages:
    """What a call left in its workspace."""
    spec = problem.spec
    most, tokens = spec.tokens * spec.top_k, spec.tokens
    base = -workspace.data_ptr() % 256 if workspace.is_cuda else 0  # the emulator's copy is aligned

    def part(start: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        size = int(np.prod(shape)) * dtype.itemsize
        return workspace[base + start : base + start + size].view(dtype).view(shape)

    kind = DTYPES[spec.dtype] if problem.a2 is None else torch.uint8
    apart = choice.quantises_apart
    count, inner = problem.total_rows, spec.intermediate
    return Stages(
        offsets=part(at.offsets, torch.int32, spec.experts + 1),
        row_index=part(at.row_index, torch.int32, most),
        route_row=part(at.route_row, torch.int32, tokens, spec.top_k),
        row_weight=part(at.row_weight, torch.float32, most),
        q1=part(at.q1, torch.uint8, tokens, spec.hidden),
        s1=part(at.s1, torch.float32, tokens, 1) if problem.a1 is None else None,
        maxima=part(at.maxima, torch.float32, most)[:count] if problem.a2 is None else None,
        h=part(at.h, kind, most, inner)[:count],
        q2=part(at.q2, torch.uint8, most, inner)[:count] if apart else None,
        s2=part(at.s2, torch.float32, most, 1)[:count] if apart else None,
        y=part(at.y, DTYPES[spec.dtype], most, spec.hidden)[:count],
    )


def check(problem: LayerProblem, out: torch.Tensor, stages: Stages) -> dict[str, torch.Tensor]:
    """All of LIMITS but what the caller sees, and how many tokens were "requantised", on the device."""
    found: dict[str, torch.Tensor] = {"route": _wrong_routes(problem, stages)}
    x = problem.quantised_x()
    s1 = reference.dynamic_scale(x) if problem.a1 is None else problem.a1
    far, unequal = reference.wrong_codes(x, stages.q1, s1)
    wrong_scales = _differing(stages.s1, s1)
    how, a2, spec = problem.activation, problem.a2, problem.spec

    pre, error = _first(problem, stages.q1, s1)
    g, u = reference.split(pre, how)
    g_error, u_error = reference.split(error, how)
    allowed = reference.activation_error(g, u, g_error, u_error, how)
    h = reference.activate(g, u, how)
    if a2 is None:
        bound = ulp(h, spec.dtype) + allowed
        found["gemm1"] = reference.worst(_overflow_excused(stages.h, h, bound), h, bound)
        largest = torch.where(stages.h.isnan(), 0.0, stages.h.float().abs())
        largest = largest.amax(1) if stages.h.numel() else largest[:, 0]
        found["route"] = found["route"] + _differing(stages.maxima, largest)
        s2 = reference.dynamic_scale(stages.h.float())
        q2 = reference.codes_of(stages.h.float(), s2)
        if stages.q2 is not None:
            wrong = reference.wrong_codes(stages.h.float(), stages.q2, s2)
            far, unequal = far + wrong[0], unequal + wrong[1]
            wrong_scales = wrong_scales + _differing(stages.s2, s2)
            q2 = stages.q2
        exact_s2 = reference.dynamic_scale(h.to(DTYPES[spec.dtype]).float())
        exact_q2 = reference.codes_of(h.to(DTYPES[spec.dtype]).float(), exact_s2)
    else:
        divisor = a2.double()
        quotient = (h / divisor).clamp(-reference.E4M3_MAX, reference.E4M3_MAX)
        bound = ulp(quotient, "e4m3") + allowed / divisor
        found["gemm1"] = reference.worst(reference.values_of(stages.h), quotient, bound)
        s2, q2 = a2, stages.h
        exact_s2, exact_q2 = a2, reference.codes_of(h, divisor)
    found.update(scales=wrong_scales, codes=far, bits=unequal)

    y, bound = _second(problem, q2, s2)
    codes = reference.values_of(q2)
    finite = codes.isfinite().all(1)
    found["gemm2"] = reference.worst(_overflow_excused(stages.y, y, bound)[finite], y[finite], bound[finite])
    summed = reference.combine(stages.y.float(), problem.route_row).to(out.dtype)
    found["combine"] = (~((out == summed) | (out.isnan() & summed.isnan()))).sum()

    exact, _ = _second(problem, exact_q2, exact_s2)
    exact = reference.combine(exact, problem.route_row)
    norm = exact.norm(dim=1)
    errors = reference.token_errors(out.double(), exact, norm)
    counted = x.abs().nan_to_num().amax(1) >= TINY
    errors = torch.where(counted | errors.isinf(), errors, 0.0)
    if y.shape[0]:
        # What overflowed has been judged above; of what is next to nothing steps of float16 are too much.
        kind = torch.finfo(out.dtype)
        step = kind.smallest_normal * kind.eps
        says = finite & stages.y.isfinite().all(1)
        if a2 is None:
            says &= stages.h.abs().amax(1) >= step / LAYER_LIMIT
        of_routes = says[problem.route_row.long().clamp(min=0)] | (problem.route_row < 0)
        large = norm >= step * out.shape[1] ** 0.5 / LAYER_LIMIT
        errors = torch.where(of_routes.all(1) & (large | norm.isnan()), errors, 0.0)
    of_rows = reference.combine(y.square(), problem.route_row).sum(1).sqrt()
    from_ours = reference.token_errors(out.double(), reference.combine(y, problem.route_row), of_rows)
    explained = (errors * norm <= REQUANTISED_LIMIT * of_rows) & (from_ours <= EXPLAINED)
    requantised = (errors > LAYER_LIMIT) & explained
    found["layer"] = torch.where(requantised, 0.0, errors).max() / LAYER_LIMIT
    found["requantised"] = requantised.sum()
    return found


def _overflow_excused(found: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """`found` in float64, and `exact` where that may round to the infinity that was found, as squares in
    float16 do."""
    beyond = exact.abs() + bound > torch.finfo(found.dtype).max
    right = found.isinf() & (found.sign() == exact.sign()) & beyond
    return torch.where(right, exact, found.double())


def _wrong_routes(problem: LayerProblem, stages: Stages) -> torch.Tensor:
    pairs = (
        *((stages.offsets, problem.offsets), (stages.row_index, problem.row_index)),
        *((stages.route_row, problem.route_row), (stages.row_weight, problem.row_weight)),
    )
    return torch.stack([_differing(found, expected) for found, expected in pairs]).sum()


def _first(problem: LayerProblem, q1: torch.Tensor, s1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the first GEMM gives (R, N1), and its bound as a float32."""
    product, magnitude = grouped_products(q1[problem.token_of_row], problem.bits1, problem.rows)
    scale = s1.double()
    factor = (scale[problem.token_of_row] if s1.ndim == 2 else scale) * problem.factor1[problem.expert_of_row]
    pre = product * factor
    if problem.bias1 is not None:
        pre = pre + problem.bias1[problem.expert_of_row]
    return pre, ulp(pre, "float32") + 2.0**-20 * (problem.spec.hidden / 32) * magnitude * factor.abs()


def _second(problem: LayerProblem, q2: torch.Tensor, s2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the second GEMM gives (R, H), and its bound."""
    product, magnitude = grouped_products(q2, problem.bits2, problem.rows)
    factor = s2.double() * problem.factor2[problem.expert_of_row]
    y = product * factor
    if problem.bias2 is not None:
        y = y + problem.bias2[problem.expert_of_row]
    if not problem.spec.weight_on_input:
        weight = problem.row_weight[: problem.total_rows, None].double()
        y, factor = y * weight, factor * weight
    drift = 2.0**-20 * (problem.spec.intermediate / 32) * magnitude * factor.abs()
    # The weight is a multiplication more in float32.
    return y, ulp(y, problem.spec.dtype) + drift + 2.0**-24 * y.abs()


def _differing(found: torch.Tensor | None, expected: torch.Tensor) -> torch.Tensor:
    """How many elements differ, bit for bit but for NaN."""
    if found is None:
        return torch.zeros((), dtype=torch.int64, device=expected.device)
    same = found.reshape(-1) == expected.reshape(-1)
    if found.is_floating_point():
        same = same | (found.reshape(-1).isnan() & expected.reshape(-1).isnan())
    return (~same).sum()
