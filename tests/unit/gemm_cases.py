"""Operands of `grouped_gemm` on fake tensors, shared by its tests."""

from __future__ import annotations

from pathlib import Path

SHIPPED = Path(__file__).resolve().parents[2] / "cubins"
M, E, N, K = 48, 12, 64, 128
STREAM = 0x7F12_3456_7890
PREPARE = "sm12x_fp8_ptr_array_prepare_packed"


def operands(fake, m=M, e=E, n=N, k=K, **more):
    """A packed call with `out`; `more` adds or replaces arguments."""
    t = fake.tensor
    return {
        "a": t((m, k), "float8_e4m3fn"),
        "b": t((e, n, k), "float8_e4m3fn"),
        "offsets": t((e + 1,), "int32"),
        "out": t((m, n), "bfloat16"),
        **more,
    }


def groups(fake, shapes):
    """A list call with `out` for groups of (m, n, k)."""
    t = fake.tensor
    return {
        "a": [t((m, k), "float8_e4m3fn") for m, _, k in shapes],
        "b": [t((n, k), "float8_e4m3fn") for _, n, k in shapes],
        "out": [t((m, n), "bfloat16") for m, n, _ in shapes],
    }


def nothing_happened(fake):
    """Whether nothing was launched or allocated."""
    return fake.launches == [] and fake.allocated == {}
