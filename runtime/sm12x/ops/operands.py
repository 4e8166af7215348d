"""The operands of a packed or masked call, validated but for their addresses.

This is the one place where such a call's arrays are checked, whatever family of kernels runs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from .. import driver
from ..abi import SM12X_ROWS_MASKED, SM12X_ROWS_PACKED
from ..arrays import Array
from ..select import Problem
from . import row_layout, validate
from .validate import Matrix, Scale

Addresses = tuple[int, int, int, int, int, int, int, int, int]


def _address(value: Array | float | None) -> int:
    return value.ptr if isinstance(value, Array) else 0


class Given(NamedTuple):
    """The arrays of a call as they were taken in. `bounds` are offsets, or masked the counts of `rows=`."""

    a: Array
    b: Array
    a_scale: Scale
    b_scale: Scale
    bounds: Array
    row_index: Array | None
    row_weight: Array | None
    bias: Array | None
    out: Array | None
    workspace: Array | None
    masked: bool

    def arrays(self) -> tuple[Array | float | None, ...]:
        """Every argument that may be an array."""
        return self[:-1]

    def addresses(self, d: int) -> Addresses:
        """As a launch takes them: a, b, d, bounds, row_index, a_scale, b_scale, bias, row_weight; 0 for what
        is not given."""
        return (
            self.a.ptr,
            self.b.ptr,
            d,
            self.bounds.ptr,
            _address(self.row_index),
            _address(self.a_scale),
            _address(self.b_scale),
            _address(self.bias),
            _address(self.row_weight),
        )

    def scale_values(self) -> tuple[float, float]:
        """Of a_scale and b_scale; 1.0 for an array."""
        a, b = self.a_scale, self.b_scale
        return 1.0 if isinstance(a, Array) else a, 1.0 if isinstance(b, Array) else b

    def named(self) -> tuple[tuple[str, Array | None], ...]:
        """Every array by its argument's name."""
        scales = (("a_scale", self.a_scale), ("b_scale", self.b_scale))
        return (
            ("a", self.a),
            ("b", self.b),
            ("rows" if self.masked else "offsets", self.bounds),
            ("row_index", self.row_index),
            *((name, scale if isinstance(scale, Array) else None) for name, scale in scales),
            ("row_weight", self.row_weight),
            ("bias", self.bias),
            ("out", self.out),
            ("workspace", self.workspace),
        )


@dataclass(frozen=True, slots=True)
class Operands:
    """What does not change with the addresses. `rows` of the result, masked: of each group; `a_rows`: rows of
    a, masked: of each group. `a`, `b`, `d`: rows of a and the result (masked: of one group) and of one
    expert's weights, with elements between groups beside them. Types by name; scale modes are SM12X_SCALE_*.
    """

    problem: Problem
    device: driver.Device
    row_layout: int
    rows: int
    a_rows: int
    a: Matrix
    a_group: int
    b: Matrix
    b_group: int
    d: Matrix
    d_group: int
    wide_bounds: bool
    wide_row_index: bool | None  # None: rows of a are taken as they come
    a_scale_mode: int
    b_scale_mode: int
    b_scale_stride: int
    bias: str | None
    bias_stride: int
    weighted: bool
    workspace_bytes: int | None

    @property
    def out_shape(self) -> tuple[int, ...]:
        n = self.problem.n
        if self.row_layout == SM12X_ROWS_MASKED:
            return self.problem.groups, self.rows, n
        return self.rows, n

    @property
    def shapes(self) -> str:
        """For errors of the driver."""
        p = self.problem
        name, more = ("max_m", "masked") if p.kind == "masked" else ("M", "packed")
        gathered = f" of {self.a_rows}" if self.wide_row_index is not None else ""
        return f"{more} {name}={self.rows}{gathered} E={p.groups} N={p.n} K={p.k}"


def take_operands(given: Given, out_dtype: Any, dtype: Any, expected_m: Any) -> Operands:
    """Validate everything but addresses. Raises as `sm12x.grouped_gemm` says."""
    a, b, masked = given.a, given.b, given.masked
    names = validate.fp8_names(dtype)
    kind_a, kind_b = validate.fp8_dtype(a, "a", names[0]), validate.fp8_dtype(b, "b", names[1])
    kind_out = validate.out_dtype_name(out_dtype)
    out_bytes = validate.itemsize(kind_out)
    expected = row_layout.expected_m(expected_m)
    validate.rank(a, "a", "(E, max_m, K)" if masked else "(M, K)", 3 if masked else 2)
    validate.rank(b, "b", "(E, N, K)", 3)
    a_rows, k = a.shape[-2:]
    groups, n, k_of_b = b.shape
    if masked and a.shape[0] != groups:
        raise ValueError(f"a: expected {groups} experts, as many as b, got {a.shape[0]}")
    validate.sizes(a_rows, n, k, k_of_b, "a", "b")
    if groups > validate.MAX_GROUPS:
        raise ValueError(f"b: expected at most {validate.MAX_GROUPS} experts, got {groups}")
    a_matrix = validate.matrix(a, "a", 1, (1, 2) if masked else (0, 1))
    a_group = row_layout.group_stride(a, "a", a_matrix) if masked else 0
    b_matrix = validate.matrix(b, "b", 1, (1, 2))
    b_group = row_layout.group_stride(b, "b", b_matrix)
    wide = None if given.row_index is None else row_layout.row_index(given.row_index)
    m = a_rows if given.row_index is None else given.row_index.shape[0]
    if masked:
        wide_bounds = row_layout.counts(given.bounds, groups)
        a_mode = row_layout.masked_a_scale(given.a_scale, groups, a_rows)
        out_rows: tuple[int, ...] = (groups, m)
    else:
        wide_bounds = row_layout.offsets(given.bounds, groups)
        a_mode = validate.packed_a_scale(given.a_scale, a_rows, groups)
        out_rows = (m,)
    b_mode, b_scale_stride = validate.packed_b_scale(given.b_scale, groups, n)
    if given.row_weight is not None:
        row_layout.row_weight(given.row_weight, out_rows)
    if given.bias is not None:
        validate.bias(given.bias, (groups, n), "bias")
    d_matrix, d_group = Matrix(m, n, n, out_bytes), m * n if masked else 0
    if given.out is not None:
        d_matrix = validate.output(given.out, (*out_rows, n), kind_out, "out")
        if masked:
            d_group = row_layout.group_stride(given.out, "out", d_matrix)
            row_layout.disjoint(given.out, "out", d_matrix, d_group)
    workspace_bytes = None if given.workspace is None else validate.workspace_bytes(given.workspace)
    device = driver.get_device(validate.same_device(given.named()))
    problem = Problem(
        "masked" if masked else "packed",
        groups,
        kind_a,
        kind_b,
        kind_out,
        device.arch,
        0 if masked else m,
        n,
        k,
        gathers=wide is not None,
        weighted=given.row_weight is not None,
        max_rows=m if masked else 0,
        expected_rows=expected,
    )
    return Operands(
        problem=problem,
        device=device,
        row_layout=SM12X_ROWS_MASKED if masked else SM12X_ROWS_PACKED,
        rows=m,
        a_rows=a_rows,
        a=a_matrix,
        a_group=a_group,
        b=b_matrix,
        b_group=b_group,
        d=d_matrix,
        d_group=d_group,
        wide_bounds=wide_bounds,
        wide_row_index=wide,
        a_scale_mode=a_mode,
        b_scale_mode=b_mode,
        b_scale_stride=b_scale_stride,
        bias=None if given.bias is None else given.bias.dtype,
        bias_stride=0 if given.bias is None else validate.between(given.bias, "bias", n),
        weighted=given.row_weight is not None,
        workspace_bytes=workspace_bytes,
    )
