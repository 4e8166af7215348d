"""References and poisoned buffers of the GPU tests: float64 on the device, checked element by element.

A check never synchronises: it leaves its worst ratio of error to bound, and the count of damaged guard
elements, on the device. `Verdicts` gathers them and reads them back once, so that thousands of cases take
seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from sm12x.validation.cases import Scales, offsets_of

# The tests of expert layers also run on the CPU, where SM12X_BACKEND=emulator has kernels emulated.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Significand bits and the exponent of the smallest ulp.
FORMATS = {"bfloat16": (8, -133), "float16": (11, -24), "float32": (24, -149)}
POISON = {"bfloat16": 0x7FC1, "float16": 0x7E01}  # a NaN that no kernel writes by itself
GUARD_ROWS = 8
E4M3_NAN = 0x7F


def random_e4m3(shape: tuple[int, ...], generator: torch.Generator, device: str) -> torch.Tensor:
    """Random finite e4m3 bit patterns as uint8, every exponent and sign included."""
    codes = torch.randint(0, 254, shape, generator=generator, device=device, dtype=torch.uint8)
    return codes + (codes >= 127)


def as_float64(bits: torch.Tensor) -> torch.Tensor:
    return bits.view(torch.float8_e4m3fn).to(torch.float32).to(torch.float64)


def in_poison(data: torch.Tensor, row_pad: int = 0, guard_rows: int = GUARD_ROWS) -> torch.Tensor:
    """A copy of uint8 ``data`` (..., rows, k) whose surroundings, and row padding if any, are all e4m3
    NaN.
    """
    *lead, k = data.shape
    rows = int(np.prod(lead)) if lead else 1
    pitch = k + row_pad
    buffer = torch.full((rows + 2 * guard_rows, pitch), E4M3_NAN, dtype=torch.uint8, device=data.device)
    inner = buffer[guard_rows : guard_rows + rows]
    inner[:, :k] = data.reshape(rows, k)
    return inner.view(*lead, pitch)[..., :k]


@dataclass
class PoisonedOut:
    """An output of (rows, n) inside a buffer of NaN, with guard rows around it and, if wanted, a wider row
    stride.
    """

    rows: int
    n: int
    dtype: str
    device: str
    row_pad: int = 0
    buffer: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        shape = (self.rows + 2 * GUARD_ROWS, self.n + self.row_pad)
        self.buffer = torch.empty(shape, dtype=torch.int16, device=self.device)
        self.poison()

    def poison(self) -> None:
        self.buffer.fill_(POISON[self.dtype])

    @property
    def out(self) -> torch.Tensor:
        inner = self.buffer[GUARD_ROWS : GUARD_ROWS + self.rows, : self.n]
        return inner.view(DTYPES[self.dtype])

    def damaged(self, written: slice | None = None) -> torch.Tensor:
        """How many elements outside the rows ``written`` (default: all of `out`) have changed, on the
        device.
        """
        changed = self.buffer != POISON[self.dtype]
        start, stop = (0, self.rows) if written is None else (written.start, written.stop)
        return changed.sum() - changed[GUARD_ROWS + start : GUARD_ROWS + stop, : self.n].sum()


@dataclass
class Problem:
    """One packed problem, its operands in poisoned surroundings, and the float64 product of every group."""

    rows: NDArray[np.int64]  # of each group
    n: int
    k: int
    a: torch.Tensor  # (total rows, k) float8_e4m3fn
    b: torch.Tensor  # (groups, n, k) float8_e4m3fn
    group_of_row: torch.Tensor  # (total rows,) int64
    product: torch.Tensor  # (total rows, n) float64: sum_k a b
    magnitude: torch.Tensor  # (total rows, n) float64: sum_k |a| |b|

    @property
    def total_rows(self) -> int:
        return int(self.rows.sum())

    @property
    def groups(self) -> int:
        return int(self.rows.size)


def make_problem(
    rows: NDArray[np.int64],
    n: int,
    k: int,
    seed: int,
    device: str = "cuda",
    row_pad: int = 0,
    operands: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Problem:
    """``row_pad``: e4m3 NaN bytes between rows of a and of b, a multiple of 16."""
    total, groups = int(rows.sum()), int(rows.size)
    generator = torch.Generator(device=device).manual_seed(seed)
    if operands is None:
        operands = random_e4m3((total, k), generator, device), random_e4m3((groups, n, k), generator, device)
    a_bits, b_bits = operands
    product = torch.empty((total, n), dtype=torch.float64, device=device)
    magnitude = torch.empty_like(product)
    offsets = offsets_of(rows).tolist()
    for e in range(groups):
        first, last = offsets[e], offsets[e + 1]
        if first == last:
            continue
        left, right = as_float64(a_bits[first:last]), as_float64(b_bits[e]).T
        torch.mm(left, right, out=product[first:last])
        torch.mm(left.abs(), right.abs(), out=magnitude[first:last])
    group_of_row = torch.repeat_interleave(torch.arange(groups), torch.as_tensor(rows)).to(device)
    return Problem(
        rows=rows,
        n=n,
        k=k,
        a=in_poison(a_bits, row_pad).view(torch.float8_e4m3fn),
        b=in_poison(b_bits, row_pad).view(torch.float8_e4m3fn),
        group_of_row=group_of_row,
        product=product,
        magnitude=magnitude,
    )


def ulp(value: torch.Tensor, dtype: str) -> torch.Tensor:
    """Distance between neighbours of ``dtype`` at each float64 ``value``."""
    bits, smallest = FORMATS[dtype]
    exponent = (torch.frexp(value).exponent - bits).clamp(min=smallest)
    exponent = torch.where(value == 0, smallest, exponent)
    return torch.exp2(exponent.to(torch.float64))


def error_ratio(
    out: torch.Tensor,
    reference: torch.Tensor,
    magnitude: torch.Tensor,
    k: int,
    dtype: str,
) -> torch.Tensor:
    """Largest |out - reference| over its bound (DESIGN section 7), on the device; NaN and infinity count as
    infinite.

    ``magnitude`` is sum_k |a_scale a| |b_scale b|.
    """
    if reference.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=reference.device)
    bound = ulp(reference, dtype) + (2.0**-20 * (k / 32)) * magnitude
    ratio = (out.to(torch.float64) - reference).abs() / bound
    return torch.nan_to_num(ratio, nan=torch.inf).max()


def scaled_reference(
    problem: Problem, scales: Scales, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(reference, magnitude) of a packed call with these scales and bias (groups, n)."""
    a_factor, b_factor = scales.per_row(problem.rows, problem.n)
    device = problem.product.device
    a = torch.as_tensor(np.array(a_factor), device=device)
    b = torch.as_tensor(np.array(b_factor), device=device)[problem.group_of_row]
    factor = a * b
    reference = problem.product * factor
    if bias is not None:
        reference += bias.to(torch.float64)[problem.group_of_row]
    return reference, problem.magnitude * factor.abs()


Scale = torch.Tensor | float | None


def scales_to_device(scales: Scales, device: str = "cuda") -> tuple[Scale, Scale]:
    """The scales as the caller of grouped_gemm passes them; arrays lie between NaNs."""

    def convert(value: NDArray[np.float32] | float | None) -> Scale:
        if value is None or isinstance(value, float):
            return value
        buffer = torch.full((value.size + 8,), torch.nan, dtype=torch.float32, device=device)
        inner = buffer[4 : 4 + value.size]
        inner.copy_(torch.from_numpy(value.reshape(-1)))
        return inner.view(value.shape)

    return convert(scales.a), convert(scales.b)


@dataclass
class Verdicts:
    """Device-side outcomes of many cases, read back once."""

    labels: list[str] = field(default_factory=list)
    ratios: list[torch.Tensor] = field(default_factory=list)
    damages: list[torch.Tensor] = field(default_factory=list)

    def add(self, label: str, ratio: torch.Tensor, damage: torch.Tensor | None = None) -> None:
        self.labels.append(label)
        self.ratios.append(ratio.to(torch.float64))
        self.damages.append(
            torch.zeros_like(ratio, dtype=torch.int64) if damage is None else damage.to(torch.int64)
        )

    def check(self, seed: int) -> float:
        """Fails with the first bad cases; returns the worst ratio of error to bound."""
        assert self.labels, "no case ran"
        ratios = torch.stack(self.ratios).cpu().numpy()
        damages = torch.stack(self.damages).cpu().numpy()
        wrong = [
            f"{label}: error is {ratio:.3g} of its bound, {damage} elements outside the output changed"
            for label, ratio, damage in zip(self.labels, ratios, damages, strict=True)
            if not ratio <= 1.0 or damage
        ]
        worst = float(ratios.max())
        print(f"{len(self.labels)} cases, worst error {worst:.3f} of its bound")
        shown = "\n".join(wrong[:12])
        assert not wrong, f"{len(wrong)} of {len(self.labels)} cases wrong (test seed {seed}):\n{shown}"
        return worst
