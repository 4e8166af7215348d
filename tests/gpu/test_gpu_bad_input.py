"""Bad input on a real device: ValueError or TypeError that names the argument, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the GPU tests make their references with torch")

from packed_call import PackedCall, make_call  # noqa: E402
from variants import VARIANTS  # noqa: E402

import sm12x  # noqa: E402

Change = Callable[[PackedCall], dict[str, Any]]
PTR_ARRAY = next((v.key for v in VARIANTS if "bfloat16" in v.outs), "")


def shifted(tensor: torch.Tensor, bytes_: int) -> torch.Tensor:
    """The same values ``bytes_`` past a 16-byte boundary."""
    raw = torch.empty(tensor.numel() * tensor.element_size() + bytes_, dtype=torch.uint8, device="cuda")[
        bytes_:
    ]
    return raw.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def fp8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)


BAD: dict[str, tuple[str, Change]] = {
    "a_bfloat16": ("a", lambda c: {"a": c.problem.a.to(torch.bfloat16)}),
    "b_float16": ("b", lambda c: {"b": c.problem.b.to(torch.float16)}),
    "a_e5m2": ("a|dtype", lambda c: {"a": c.problem.a.view(torch.uint8).view(torch.float8_e5m2)}),
    "a_uint8_without_dtype": ("a", lambda c: {"a": c.problem.a.view(torch.uint8)}),
    "a_1d": ("a", lambda c: {"a": c.problem.a[0]}),
    "b_2d": ("b", lambda c: {"b": c.problem.b[0]}),
    "K_differs": ("b|a", lambda c: {"b": fp8(12, 264, 720)}),
    "K_not_16": ("a|b|K", lambda c: {"a": fp8(c.problem.total_rows, 712), "b": fp8(12, 264, 712)}),
    "N_not_8": ("b|N", lambda c: {"b": fp8(12, 260, 704)}),
    "a_K_not_contiguous": ("a", lambda c: {"a": fp8(704, c.problem.total_rows).t()}),
    "b_K_not_contiguous": ("b", lambda c: {"b": fp8(12, 704, 264).transpose(1, 2)}),
    "a_on_the_host": ("a", lambda c: {"a": c.problem.a.cpu()}),
    "b_on_the_host": ("b", lambda c: {"b": c.problem.b.cpu()}),
    "a_scale_on_the_host": ("a_scale", lambda c: {"a_scale": c.a_scale.cpu()}),
    "b_scale_numpy": ("b_scale", lambda c: {"b_scale": c.b_scale.cpu().numpy()}),
    "offsets_on_the_host": ("offsets", lambda c: {"offsets": c.offsets.cpu()}),
    "offsets_numpy": ("offsets", lambda c: {"offsets": c.offsets.cpu().numpy()}),
    "offsets_list": ("offsets", lambda c: {"offsets": c.offsets.tolist()}),
    "offsets_too_short": ("offsets", lambda c: {"offsets": c.offsets[:-1]}),
    "offsets_too_long": ("offsets", lambda c: {"offsets": torch.cat([c.offsets, c.offsets[-1:]])}),
    "offsets_float": ("offsets", lambda c: {"offsets": c.offsets.float()}),
    "offsets_2d": ("offsets", lambda c: {"offsets": c.offsets[None]}),
    "a_misaligned": ("a", lambda c: {"a": shifted(c.problem.a, 8)}),
    "b_misaligned": ("b", lambda c: {"b": shifted(c.problem.b, 1)}),
    "a_row_stride": ("a", lambda c: {"a": fp8(c.problem.total_rows, 712)[:, :704]}),
    "a_scale_shape": ("a_scale", lambda c: {"a_scale": c.a_scale[:-1]}),
    "a_scale_per_expert_1d": ("a_scale", lambda c: {"a_scale": torch.ones(12, device="cuda")}),
    "a_scale_bfloat16": ("a_scale", lambda c: {"a_scale": c.a_scale.to(torch.bfloat16)}),
    "b_scale_shape": ("b_scale", lambda c: {"b_scale": c.b_scale[:, :-8]}),
    "b_scale_transposed": ("b_scale", lambda c: {"b_scale": c.b_scale.t()}),
    "bias_shape": ("bias", lambda c: {"bias": torch.zeros(264, device="cuda")}),
    "bias_dtype": ("bias", lambda c: {"bias": torch.zeros(12, 264, device="cuda", dtype=torch.float64)}),
    "bias_on_the_host": ("bias", lambda c: {"bias": torch.zeros(12, 264)}),
    "out_shape": ("out", lambda c: {"out": torch.empty(5, 264, device="cuda", dtype=torch.bfloat16)}),
    "out_dtype_differs": ("out", lambda c: {"out_dtype": "float16"}),
    "out_dtype_unknown": ("out_dtype", lambda c: {"out": None, "out_dtype": "int8"}),
    "out_on_the_host": (
        "out",
        lambda c: {"out": torch.empty(c.problem.total_rows, 264, dtype=torch.bfloat16)},
    ),
    "out_is_a": ("out", lambda c: {"out": overlapping(c.problem.a, c)}),
    "out_is_b": ("out", lambda c: {"out": overlapping(c.problem.b, c)}),
    "workspace_too_small": (  # of a kernel that needs one, which whole tiles of fp8_packed do not
        "workspace",
        lambda c: {"workspace": torch.empty(128, dtype=torch.uint8, device="cuda"), "variant": PTR_ARRAY},
    ),
    "workspace_on_the_host": ("workspace", lambda c: {"workspace": torch.empty(1 << 24, dtype=torch.uint8)}),
    "variant_unknown": ("variant", lambda c: {"variant": "fp8_ptr_array_1x1x1_bf16"}),
    "variant_of_another_out_type": ("variant", lambda c: {"variant": "fp8_ptr_array_128x128x128_coop_fp16"}),
    "dtype_unknown": ("dtype", lambda c: {"dtype": "float8_e3m4"}),
    "row_index_on_the_host": ("row_index", lambda c: {"row_index": index_of(c).cpu()}),
    "row_index_float": ("row_index", lambda c: {"row_index": index_of(c).float()}),
    "row_index_2d": ("row_index", lambda c: {"row_index": index_of(c)[:, None]}),
    "row_index_with_rows": (
        "row_index|offsets",
        lambda c: {"row_index": index_of(c), "rows": torch.ones(12, dtype=torch.int32, device="cuda")},
    ),
    "rows_with_offsets": (
        "offsets|rows",
        lambda c: {"rows": torch.ones(12, dtype=torch.int32, device="cuda"), "a": c.problem.a[None]},
    ),
    "row_weight_shape": ("row_weight", lambda c: {"row_weight": c.a_scale[:-1]}),
    "row_weight_bfloat16": ("row_weight", lambda c: {"row_weight": c.a_scale.to(torch.bfloat16)}),
    "row_index_on_a_kernel_without": (
        "variant",
        lambda c: {"row_index": index_of(c), "variant": PTR_ARRAY},
    ),
    "split_of_a_kernel_that_cannot": ("variant", lambda c: {"variant": f"{PTR_ARRAY}:split"}),
}


def index_of(call: PackedCall) -> torch.Tensor:
    return torch.arange(call.problem.total_rows, dtype=torch.int32, device="cuda")


def overlapping(operand: torch.Tensor, call: PackedCall) -> torch.Tensor:
    """A view of the right shape and type for `out` on the memory of an operand, or just past its first
    row.
    """
    flat = operand.view(torch.uint8).view(-1)
    needed = call.problem.total_rows * call.problem.n * 2
    assert flat.numel() >= needed, "make_call's operands must be larger than its output"
    return flat[:needed].view(torch.bfloat16).view(call.problem.total_rows, call.problem.n)


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_is_named_and_nothing_written(name: str, seed: int) -> None:
    call = make_call(seed)
    argument, change = BAD[name]
    poisoned = call.poisoned_out()
    before = poisoned.buffer.clone()
    operand_bits = call.problem.a.view(torch.uint8).clone(), call.problem.b.view(torch.uint8).clone()
    arguments = call.arguments(**{"out": poisoned.out, **change(call)})
    with pytest.raises((ValueError, TypeError), match=rf"\b({argument})\b") as raised:
        sm12x.grouped_gemm(**arguments)
    print(raised.value)
    torch.cuda.synchronize()
    assert torch.equal(poisoned.buffer, before), "out was written"
    assert torch.equal(call.problem.a.view(torch.uint8), operand_bits[0]), "a was written"
    assert torch.equal(call.problem.b.view(torch.uint8), operand_bits[1]), "b was written"


def test_operands_all_on_the_host_are_refused(seed: int) -> None:
    """torch CPU tensors are no NumPy arrays: nothing falls back to the reference backend by itself."""
    call = make_call(seed)
    arrays = {name: value.cpu() for name, value in call.arguments().items()}
    with pytest.raises((ValueError, TypeError), match=r"\ba\b"):
        sm12x.grouped_gemm(**arrays)


def test_numpy_arrays_use_the_reference_backend(seed: int) -> None:
    """The same call on NumPy arrays gives what the GPU gives, within both bounds."""
    call = make_call(seed)
    arrays = {name: value.cpu() for name, value in call.arguments().items() if name not in "ab"}
    host = sm12x.grouped_gemm(
        call.problem.a.view(torch.uint8).cpu().numpy(),
        call.problem.b.view(torch.uint8).cpu().numpy(),
        **{name: value.numpy() for name, value in arrays.items()},
        dtype="float8_e4m3fn",
    )
    assert isinstance(host, np.ndarray)
    call.check(torch.from_numpy(host.view(np.int16)).cuda().view(torch.bfloat16), "NumPy backend")


@pytest.mark.parametrize(("groups", "rows"), [(0, 0), (5, 0)])
def test_nothing_to_do(groups: int, rows: int) -> None:
    """No rows or no experts: nothing is launched and `out` comes back, empty."""
    out = sm12x.grouped_gemm(
        fp8(rows, 32), fp8(groups, 8, 32), offsets=torch.zeros(groups + 1, dtype=torch.int32, device="cuda")
    )
    assert tuple(out.shape) == (rows, 8)
    assert out.dtype == torch.bfloat16
