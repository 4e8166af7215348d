"""Problems of the family fp8_packed: the same rows packed, gathered and masked, NaN wherever a kernel has no
business, and their float64 products.

NaN (e4m3 0x7f) lies before, behind and between rows, past K, in rows of `a` that the call does not take, and
in whole groups of a problem, rows or weights: what they give must be NaN, and nothing else may be. Scales,
weights and bias lie between float NaNs, indices and bounds between numbers that would lead into NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch_reference import DEVICE, DTYPES, E4M3_NAN, GUARD_ROWS, as_float64, in_poison, random_e4m3, ulp

from sm12x.validation.cases import Scales, make_scales, offsets_of

POISON = {"bfloat16": 0x7FC1, "float16": 0x7E01, "float32": 0x7FC12345}  # NaNs that no kernel writes
CHUNK = 1 << 26  # float64 elements of an operand that are multiplied at once


@dataclass
class Operands:
    """`a` as one layout has it. `arguments`: what says which rows the call takes. Of every row of the call,
    in the order of groups: `source`, its entry in what comes per row of `a` (-1: none), and `target`, its
    entry in what comes per row of `out`."""

    layout: str
    a: torch.Tensor
    arguments: dict[str, Any]
    source: torch.Tensor
    target: torch.Tensor
    rows_shape: tuple[int, ...]  # of what comes per row of a
    out_rows: tuple[int, ...]  # of what comes per row of out


@dataclass
class PackedProblem:
    """Rows of groups and their products without scales and bias. Some indices are outside of `tokens`: zeros.
    Tokens that are NaN are taken by groups of NaN only."""

    rows: NDArray[np.int64]  # of each group
    n: int
    k: int
    tokens: torch.Tensor  # (T, k) uint8
    index: torch.Tensor  # (M,) int64
    a_bits: torch.Tensor  # (M, k) uint8: the rows that the index takes
    b: torch.Tensor  # (E, n, k) float8_e4m3fn
    group_of_row: torch.Tensor  # (M,) int64
    product: torch.Tensor  # (M, n) float64: sum_k a b
    magnitude: torch.Tensor  # (M, n) float64: sum_k |a| |b|
    pad: int  # bytes between rows of a
    seed: int
    known: dict[str, Operands] = field(default_factory=dict)

    @property
    def total_rows(self) -> int:
        return int(self.rows.sum())

    @property
    def groups(self) -> int:
        return int(self.rows.size)

    def operands(self, layout: str) -> Operands:
        """Made when they are first asked for."""
        if layout not in self.known:
            self.known[layout] = _MAKE[layout](self)
        return self.known[layout]


def make_problem(
    rows: NDArray[np.int64],
    n: int,
    k: int,
    seed: int,
    *,
    pads: tuple[int, int, int] = (0, 0, 0),
    nan_groups: bool = True,
    operands: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> PackedProblem:
    """`pads`: bytes between rows of a, between rows of b (multiples of 16), rows between groups of b.
    `operands`: bits of the rows (M, k), which are then the tokens, and of the weights (E, n, k); else random
    ones, about a sixth of the groups NaN."""
    total, groups = int(rows.sum()), int(rows.size)
    rng = np.random.default_rng(seed)
    generator = torch.Generator(device="cuda").manual_seed(seed)
    group_of_row = np.repeat(np.arange(groups), rows)
    if operands is None:
        tokens, index, weights = _random_operands(rows, group_of_row, n, k, rng, generator, nan_groups)
    else:
        tokens, weights = operands
        index = np.arange(total)
    where = torch.as_tensor(index, device="cuda")
    outside = (where < 0) | (where >= tokens.shape[0])
    a_bits = tokens[where.clamp(0, max(tokens.shape[0] - 1, 0))]
    a_bits[outside] = 0
    product, magnitude = grouped_products(a_bits, weights, rows)
    buffer = torch.full((groups, n + pads[2], k), E4M3_NAN, dtype=torch.uint8, device="cuda")
    buffer[:, :n] = weights
    b = in_poison(buffer, pads[1]).view(torch.float8_e4m3fn)[:, :n]
    return PackedProblem(
        *(rows, n, k, tokens, where, a_bits, b, torch.as_tensor(group_of_row, device="cuda")),
        *(product, magnitude, pads[0], seed),
    )


def _random_operands(
    rows: NDArray[np.int64],
    group_of_row: NDArray[np.int64],
    n: int,
    k: int,
    rng: np.random.Generator,
    generator: torch.Generator,
    nan_groups: bool,
) -> tuple[torch.Tensor, NDArray[np.int64], torch.Tensor]:
    """Tokens, index and weights. Most tokens are taken more than once, as by the experts of a router."""
    total, groups = group_of_row.size, rows.size
    tokens = random_e4m3((2 * total // 3 + 8, k), generator, "cuda")
    nan_tokens = rng.permutation(tokens.shape[0])[:5]
    tokens[torch.as_tensor(nan_tokens, device="cuda")] = E4M3_NAN
    good = np.setdiff1d(np.arange(tokens.shape[0]), nan_tokens)
    index = rng.choice(good, total) if total else np.zeros(0, np.int64)
    outside = rng.random(total) < 0.03
    index[outside] = rng.choice((-1, tokens.shape[0], -(2**31), 2**31 - 1), int(outside.sum()))
    weights = random_e4m3((groups, n, k), generator, "cuda")
    if nan_groups and groups > 2:
        kind = rng.random(groups)
        of_nan = (kind < 0.1)[group_of_row]
        index[of_nan] = rng.choice(nan_tokens, int(of_nan.sum()))
        weights[torch.as_tensor(np.flatnonzero(kind > 0.93), device="cuda")] = E4M3_NAN
    return tokens, index.astype(np.int64), weights


def grouped_products(
    a_bits: torch.Tensor, b_bits: torch.Tensor, rows: NDArray[np.int64]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum_k a b, sum_k |a| |b|) of every row (M, k) with its group's weights (E, n, k), in float64 (M,
    n).
    """
    (total, k), n = a_bits.shape, b_bits.shape[1]
    found = torch.empty((2, total, n), dtype=torch.float64, device=a_bits.device)
    first = np.concatenate([[0], np.cumsum(rows)])
    active = np.flatnonzero(rows)
    while active.size:
        most = np.maximum.accumulate(np.maximum(rows[active], n))
        count = max(1, int(np.searchsorted(most * np.arange(1, active.size + 1) * k, CHUNK, "right")))
        mine, active = active[:count], active[count:]
        height = int(rows[mine].max())
        # Row i of group g of the padded block is row first[g] + i of a, or a row of zeros.
        inside = np.arange(height)[None, :] < rows[mine][:, None]
        number = torch.as_tensor(first[mine][:, None] + np.arange(height)[None, :], device=a_bits.device)
        mask = torch.as_tensor(inside, device=a_bits.device)
        left = as_float64(a_bits[number.clamp(max=total - 1)]) * 1.0
        left[~mask] = 0.0
        right = as_float64(b_bits[torch.as_tensor(mine, device=a_bits.device)]).transpose(1, 2)
        targets = number[mask]
        found[0, targets] = torch.bmm(left, right)[mask]
        found[1, targets] = torch.bmm(left.abs_(), right.abs())[mask]
    return found[0], found[1]


def guarded(values: torch.Tensor, guard: float) -> torch.Tensor:
    """A copy of `values` with four elements of `guard` on each side."""
    buffer = torch.full((values.numel() + 8,), guard, dtype=values.dtype, device=DEVICE)
    inner = buffer[4 : 4 + values.numel()]
    inner.copy_(values.reshape(-1))
    return inner.view(values.shape)


# -------------------------------------------------------------------------------------------------
# Layouts
# -------------------------------------------------------------------------------------------------


def _integers(problem: PackedProblem, salt: int) -> torch.dtype:
    return torch.int64 if (problem.seed + salt) % 2 else torch.int32


def _offsets(problem: PackedProblem) -> torch.Tensor:
    bounds = torch.as_tensor(offsets_of(problem.rows), device="cuda")
    return guarded(bounds.to(_integers(problem, 0)), 2**31 - 1)


def _contiguous(problem: PackedProblem) -> Operands:
    total = problem.total_rows
    a = in_poison(problem.a_bits, problem.pad).view(torch.float8_e4m3fn)
    order = torch.arange(total, device="cuda")
    return Operands("contiguous", a, {"offsets": _offsets(problem)}, order, order, (total,), (total,))


def _gather(problem: PackedProblem) -> Operands:
    total, tokens = problem.total_rows, problem.tokens.shape[0]
    a = in_poison(problem.tokens, problem.pad).view(torch.float8_e4m3fn)
    inside = (problem.index >= 0) & (problem.index < tokens)
    source = torch.where(inside, problem.index, -1)
    index = guarded(problem.index.to(_integers(problem, 1)), 0)
    arguments = {"offsets": _offsets(problem), "row_index": index}
    order = torch.arange(total, device="cuda")
    return Operands("gather", a, arguments, source, order, (tokens,), (total,))


def _masked(problem: PackedProblem) -> Operands:
    groups, k = problem.groups, problem.k
    most = int(problem.rows.max(initial=0)) + 1 + problem.seed % 3
    gap = problem.seed // 3 % 2  # rows of NaN between groups, besides those past the count
    first = torch.as_tensor(offsets_of(problem.rows)[:-1], device="cuda")[problem.group_of_row]
    within = torch.arange(problem.total_rows, device="cuda") - first
    buffer = torch.full((groups, most + gap, k), E4M3_NAN, dtype=torch.uint8, device="cuda")
    buffer[problem.group_of_row, within] = problem.a_bits
    a = in_poison(buffer, problem.pad).view(torch.float8_e4m3fn)[:, :most]
    rows = torch.as_tensor(problem.rows, device="cuda").to(_integers(problem, 2))
    arguments: dict[str, Any] = {"rows": guarded(rows, 2**31 - 1)}
    if problem.seed % 2:
        arguments["expected_m"] = 1 + problem.seed % most
    order = problem.group_of_row * most + within
    return Operands("masked", a, arguments, order, order, (groups, most), (groups, most))


_MAKE = {"contiguous": _contiguous, "gather": _gather, "masked": _masked}


# -------------------------------------------------------------------------------------------------
# Scales, weights, bias
# -------------------------------------------------------------------------------------------------

Given = torch.Tensor | float | None


@dataclass
class Epilogue:
    """What a call is given besides operands, and the same for each row of the call in float64."""

    arguments: dict[str, Given]
    factor: torch.Tensor  # (M, n) or (M, 1): a_scale * b_scale
    bias: torch.Tensor | None  # (M, n)
    weight: torch.Tensor | None  # (M, 1)

    def reference(self, problem: PackedProblem) -> tuple[torch.Tensor, torch.Tensor]:
        """(reference, sum of magnitudes) of each row of the call, float64 (M, n)."""
        reference, magnitude = problem.product * self.factor, problem.magnitude * self.factor.abs()
        if self.bias is not None:
            reference += self.bias
        if self.weight is not None:
            reference *= self.weight
            magnitude *= self.weight.abs()
        return reference, magnitude


def _spread(values: torch.Tensor, entries: torch.Tensor, guard: float) -> torch.Tensor:
    """`values` with `guard` in every entry that no row has: nobody may use it."""
    used = torch.zeros(values.numel(), dtype=torch.bool, device="cuda")
    used[entries[entries >= 0]] = True
    return torch.where(used, values.reshape(-1), guard).view(values.shape)


def _device_scale(
    scale: Any, entries: torch.Tensor, rows_shape: tuple[int, ...], problem: PackedProblem, form: int
) -> tuple[Given, torch.Tensor | float]:
    """a_scale as the caller passes it, and its factor for each row (M, 1)."""
    if scale is None or isinstance(scale, float):
        return scale, 1.0 if scale is None else scale
    values = torch.as_tensor(scale, device="cuda")
    if values.ndim == 3:  # (E, 1, 1)
        return guarded(values, torch.nan), values.double().view(-1, 1)[problem.group_of_row]
    if values.numel() == 1:
        return guarded(values, torch.nan), float(scale.reshape(-1)[0])
    values = _spread(values.reshape(rows_shape), entries, torch.nan)
    flat = values.reshape(-1)
    factor = torch.where(entries >= 0, flat[entries.clamp(min=0)], 0.0).double()[:, None]
    shape = (*rows_shape, 1) if form % 2 else rows_shape
    return guarded(values.view(shape), torch.nan), factor


def make_epilogue(
    problem: PackedProblem,
    operands: Operands,
    modes: tuple[str, str],
    form: int,
    rng: np.random.Generator,
    *,
    bias: str | None = None,
    weighted: bool = False,
    scales: Scales | None = None,
) -> Epilogue:
    """Random scales for one of SCALE_MODES (or `scales`), a bias of a dtype, a row_weight; `form` rotates
    through shapes that mean the same."""
    if scales is None:
        entries = int(np.prod(operands.rows_shape))
        scales = make_scales(modes, entries, problem.groups, problem.n, form, rng)
    a_scale, a_factor = _device_scale(scales.a, operands.source, operands.rows_shape, problem, form)
    arguments: dict[str, Given] = {"a_scale": a_scale, "b_scale": scales.b}  # type: ignore[dict-item]
    b_factor: torch.Tensor | float = 1.0 if scales.b is None else scales.b  # type: ignore[assignment]
    if isinstance(scales.b, np.ndarray):
        values = torch.as_tensor(scales.b, device="cuda")
        arguments["b_scale"] = guarded(values, torch.nan)
        b_factor = values.double().reshape(-1, 1)
        if values.numel() > 1:
            b_factor = values.double().reshape(problem.groups, -1)[problem.group_of_row]
    ones = torch.ones((problem.total_rows, 1), dtype=torch.float64, device="cuda")
    found = Epilogue(arguments, ones * a_factor * b_factor, None, None)
    if bias is not None:
        drawn = rng.standard_normal((problem.groups, problem.n), np.float32)
        values = torch.as_tensor(drawn, device="cuda").to(DTYPES[bias])
        arguments["bias"] = guarded(values, torch.nan)
        found.bias = values.double()[problem.group_of_row]
    if weighted:
        drawn = rng.uniform(-1.5, 1.5, operands.out_rows).astype(np.float32)
        drawn[rng.random(operands.out_rows) < 0.05] = 0.0
        values = _spread(torch.as_tensor(drawn, device="cuda"), operands.target, torch.nan)
        shape = operands.out_rows if form % 2 else (*operands.out_rows, 1)
        arguments["row_weight"] = guarded(values.view(shape), torch.nan)
        found.weight = values.double().reshape(-1)[operands.target][:, None]
    return found


# -------------------------------------------------------------------------------------------------
# Outputs
# -------------------------------------------------------------------------------------------------


class GuardedOut:
    """An output (M, n) or (E, max_m, n) inside a buffer of NaN, with guard rows around, `row_pad` elements
    behind each row and `gap` rows behind each group."""

    def __init__(
        self, rows_shape: tuple[int, ...], n: int, dtype: str, row_pad: int = 0, gap: int = 0
    ) -> None:
        *groups, self.most = rows_shape
        self.n, self.dtype, self.gap = n, dtype, gap if groups else 0
        count = groups[0] if groups else 1
        pitch = self.most + self.gap
        whole = torch.int32 if dtype == "float32" else torch.int16
        self.buffer = torch.empty((count * pitch + 2 * GUARD_ROWS, n + row_pad), dtype=whole, device=DEVICE)
        self.poison()
        inner = self.buffer[GUARD_ROWS : GUARD_ROWS + count * pitch].view(DTYPES[dtype])
        self.out = inner.view(count, pitch, n + row_pad)[:, : self.most, :n]
        if not groups:
            self.out = self.out[0]

    def poison(self) -> None:
        self.buffer.fill_(POISON[self.dtype])

    def _in_buffer(self, target: torch.Tensor) -> torch.Tensor:
        return GUARD_ROWS + target + (target // self.most * self.gap if self.gap else 0)

    def rows(self, target: torch.Tensor) -> torch.Tensor:
        """The rows of `out` with these numbers, groups flattened."""
        return self.buffer[self._in_buffer(target), : self.n].view(DTYPES[self.dtype])

    def damaged(self, target: torch.Tensor) -> torch.Tensor:
        """How many elements outside these rows have changed, on the device."""
        changed = self.buffer != POISON[self.dtype]
        return changed.sum() - changed[self._in_buffer(target), : self.n].sum()


def error_ratio(values: torch.Tensor, epilogue: Epilogue, problem: PackedProblem, dtype: str) -> torch.Tensor:
    """Largest error of the rows of a call over its bound (DESIGN section 7), on the device; infinite where a
    NaN is missing or there is one too many.

    A row_weight is a multiplication more in FP32: another half unit of a float32 result.
    """
    if values.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=values.device)
    reference, magnitude = epilogue.reference(problem)
    bound = ulp(reference, dtype) + (2.0**-20 * (problem.k / 32)) * magnitude
    if epilogue.weight is not None:
        bound += 2.0**-24 * reference.abs()
    found = values.to(torch.float64)
    ratio = torch.nan_to_num((found - reference).abs() / bound, nan=torch.inf)
    return torch.where(reference.isnan(), torch.where(found.isnan(), 0.0, torch.inf), ratio).max()
