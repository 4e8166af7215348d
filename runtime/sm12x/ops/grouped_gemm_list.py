"""The list call: every group has its own arrays and shape; their records travel in kernel parameters."""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from .. import abi, driver, manifest
from ..arrays import Array
from ..select import Choice, Problem
from ..tensors import allocate_like, current_stream, deliver, framework_of, ingest
from . import fp8_ptr_array, launch, validate
from .arguments import device_of, is_sequence, numpy_backend, scale
from .memory import check_alignment, check_present, check_workspace, overlaps, workspace_base
from .validate import Matrix, Scale

_pack_header = struct.Struct("=Q4i").pack_into
_pack_record = struct.Struct("=6Q3q3i2f2H").pack_into
_HEADER = abi.sm12x_prepare_list_params.groups.offset
_RECORD = ctypes.sizeof(abi.sm12x_group_record)


@dataclass(frozen=True, slots=True)
class Group:
    """One group, validated. `a`, `b` and `d` are its operands as rows."""

    index: int
    a_array: Array
    b_array: Array
    a: Matrix
    b: Matrix
    a_scale: Scale
    b_scale: Scale
    a_mode: int
    b_mode: int
    bias: Array | None
    kinds: tuple[str, str]


def list_call(
    a: Any,
    b: Any,
    a_scale: Any,
    b_scale: Any,
    out: Any,
    out_dtype: Any,
    bias: Any,
    workspace: Any,
    stream: Any,
    dtype: Any,
    variant: Any,
) -> list[Any]:
    """`grouped_gemm` with neither `offsets` nor `rows`. Raises as `sm12x.grouped_gemm` says."""
    for value, argument in ((a, "a"), (b, "b")):
        if not is_sequence(value):
            raise TypeError(
                f"{argument}: expected a sequence of arrays where offsets is not given, got "
                f"{type(value).__name__}"
            )
    count = len(a)
    if len(b) != count:
        raise ValueError(f"b: expected {count} arrays, as many as a, got {len(b)}")
    if count == 0:  # nothing tells whose arrays they would be, and nothing is launched
        workspace = stream = variant = None
    if count == 0 or framework_of(a[0], "a[0]") == "numpy":
        result: list[Any] = numpy_backend(
            a,
            b,
            a_scale=a_scale,
            b_scale=b_scale,
            out=out,
            out_dtype=out_dtype,
            bias=bias,
            workspace=workspace,
            stream=stream,
            dtype=dtype,
            variant=variant,
        )
        return result
    for value, argument in ((out, "out"), (bias, "bias")):
        if value is not None and not is_sequence(value):
            raise TypeError(f"{argument}: expected a sequence of arrays, got {type(value).__name__}")
    outs = _entries(out, count, "out")

    leader, name = (a[0], "a[0]") if out is None else (outs[0], "out[0]")
    framework = framework_of(leader, name)
    device = device_of(leader, framework, name)
    handle = current_stream(framework, device) if stream is None else validate.stream_handle(stream)

    kind_out = validate.out_dtype_name(out_dtype)
    names = validate.fp8_names(dtype)
    named: list[tuple[str, Array | None]] = []

    def take(value: Any, argument: str) -> Array:
        array = ingest(value, argument, handle)
        named.append((argument, array))
        return array

    def scales(value: Any, argument: str) -> list[Scale]:
        if not is_sequence(value):  # one value for all groups is taken in once
            one = scale(value, argument, handle)
            if isinstance(one, Array):
                named.append((argument, one))
                if math.prod(one.shape) != 1:
                    raise TypeError(
                        f"{argument}: expected a sequence with one entry for each group, got one array "
                        f"{one.shape}"
                    )
            return [one] * count
        taken = [
            scale(entry, f"{argument}[{i}]", handle)
            for i, entry in enumerate(_entries(value, count, argument))
        ]
        named.extend((f"{argument}[{i}]", each) for i, each in enumerate(taken) if isinstance(each, Array))
        return taken

    arrays_a = [take(each, f"a[{i}]") for i, each in enumerate(a)]
    arrays_b = [take(each, f"b[{i}]") for i, each in enumerate(b)]
    scales_a, scales_b = scales(a_scale, "a_scale"), scales(b_scale, "b_scale")
    biases = [
        None if each is None else take(each, f"bias[{i}]")
        for i, each in enumerate(_entries(bias, count, "bias"))
    ]
    groups = [
        _group(i, *operands, names)
        for i, operands in enumerate(zip(arrays_a, arrays_b, scales_a, scales_b, biases, strict=True))
    ]
    _one_kind(groups)
    given = None if out is None else [take(each, f"out[{i}]") for i, each in enumerate(outs)]
    if given is not None:
        for group, array in zip(groups, given, strict=True):
            shape = (group.a.rows, group.b.rows)
            validate.output(array, shape, kind_out, f"out[{group.index}]")
    scratch = None if workspace is None else take(workspace, "workspace")
    room = 0 if scratch is None else validate.workspace_bytes(scratch)
    opened = driver.get_device(validate.same_device(named))

    busy = [group for group in groups if group.a.rows]
    problem = Problem(
        "list",
        len(busy),
        *groups[0].kinds,
        kind_out,
        opened.arch,
        shapes=tuple((group.a.rows, group.b.rows, group.a.length) for group in busy),
    )
    chosen = launch.choose(problem, variant, opened)
    if given is None:
        outs = [
            allocate_like(framework, (group.a.rows, group.b.rows), kind_out, device, handle)
            for group in groups
        ]
        given = [ingest(each, f"out[{i}]", handle) for i, each in enumerate(outs)]
    targets = [
        (group, given[group.index], validate.matrix(given[group.index], f"out[{group.index}]", 2))
        for group in busy
    ]
    _check_addresses(targets)
    if busy:
        _run(problem, chosen, opened, targets, scratch, room, handle)
    if any(array is not None and array.framework == "jax" for _, array in named):
        inputs = [array for argument, array in named if array is not None and not argument.startswith("out")]
        return deliver(outs, inputs, handle, device)
    return list(outs)


def _entries(value: Any, count: int, argument: str) -> list[Any]:
    """A sequence with one entry for each group; None is None for all."""
    if value is None:
        return [None] * count
    if len(value) != count:
        raise ValueError(f"{argument}: expected {count} entries, one for each group, got {len(value)}")
    return list(value)


def _group(
    i: int,
    a: Array,
    b: Array,
    a_scale: Scale,
    b_scale: Scale,
    bias: Array | None,
    names: tuple[str | None, str | None],
) -> Group:
    kinds = validate.fp8_dtype(a, f"a[{i}]", names[0]), validate.fp8_dtype(b, f"b[{i}]", names[1])
    validate.rank(a, f"a[{i}]", "(M, K)", 2)
    validate.rank(b, f"b[{i}]", "(N, K)", 2)
    (m, k), (n, k_of_b) = a.shape, b.shape
    validate.sizes(m, n, k, k_of_b, f"a[{i}]", f"b[{i}]")
    if bias is not None:
        validate.bias(bias, (n,), f"bias[{i}]")
    return Group(
        index=i,
        a_array=a,
        b_array=b,
        a=validate.matrix(a, f"a[{i}]", 1),
        b=validate.matrix(b, f"b[{i}]", 1),
        a_scale=a_scale,
        b_scale=b_scale,
        a_mode=validate.list_scale(a_scale, m, f"a_scale[{i}]", "token"),
        b_mode=validate.list_scale(b_scale, n, f"b_scale[{i}]", "channel"),
        bias=bias,
        kinds=kinds,
    )


def _one_kind(groups: Sequence[Group]) -> None:
    """One kernel runs all groups, so that they share their types."""
    first_bias = next((group for group in groups if group.bias is not None), None)
    for group in groups:
        for side, kind, expected in zip("ab", group.kinds, groups[0].kinds, strict=True):
            if kind != expected:
                raise TypeError(f"{side}[{group.index}]: expected {expected} like {side}[0], got {kind}")
        if first_bias is not None and first_bias.bias is not None and group.bias is not None:
            expected = first_bias.bias.dtype
            if group.bias.dtype != expected:
                raise TypeError(
                    f"bias[{group.index}]: expected {expected} like bias[{first_bias.index}], got "
                    f"{group.bias.dtype}"
                )


def _check_addresses(targets: Sequence[tuple[Group, Array, Matrix]]) -> None:
    """Alignment, and that no output shares memory with an input or another output."""
    spans: list[tuple[int, Matrix, str, bool]] = []
    for group, out, d in targets:
        i = group.index
        check_present(
            ((f"a[{i}]", group.a_array.ptr), (f"b[{i}]", group.b_array.ptr), (f"out[{i}]", out.ptr))
        )
        check_alignment(
            (
                *(
                    (f"a[{i}]", group.a_array.ptr, 16),
                    (f"b[{i}]", group.b_array.ptr, 16),
                    (f"out[{i}]", out.ptr, 16),
                ),
                (f"a_scale[{i}]", _address(group.a_scale), 4),
                (f"b_scale[{i}]", _address(group.b_scale), 4),
                (
                    f"bias[{i}]",
                    _address(group.bias),
                    1 if group.bias is None else validate.BIAS_BYTES[group.bias.dtype],
                ),
            )
        )
        spans.append((group.a_array.ptr, group.a, f"a[{i}]", False))
        spans.append((group.b_array.ptr, group.b, f"b[{i}]", False))
        spans.append((out.ptr, d, f"out[{i}]", True))
    # In the order of their addresses, each need only be compared with those that have not ended yet.
    open_spans: list[tuple[int, Matrix, str, bool]] = []
    for span in sorted(spans, key=lambda each: each[0]):
        address, matrix, argument, written = span
        open_spans = [other for other in open_spans if other[0] + other[1].span > address]
        for other_address, other_matrix, other, other_written in open_spans:
            if (written or other_written) and overlaps(address, matrix, other_address, other_matrix):
                out_name, with_name = (argument, other) if written else (other, argument)
                raise ValueError(
                    f"{out_name}: expected memory of its own, got an array that overlaps {with_name}"
                )
        open_spans.append(span)


def _address(value: Scale | None) -> int:
    return value.ptr if isinstance(value, Array) else 0


def _run(
    problem: Problem,
    choice: Choice,
    device: driver.Device,
    targets: Sequence[tuple[Group, Array, Matrix]],
    scratch: Array | None,
    room: int,
    stream: int,
) -> None:
    count = len(targets)
    variant = choice.variant
    ctas = launch.grid_size(problem, choice, device)
    maps = launch.scratch_bytes(variant, ctas)
    needed = maps + abi.group_arrays_bytes(count)
    base = 0
    if scratch is not None:
        base = workspace_base(scratch.ptr, room, needed)
        for group, out, d in targets:
            i = group.index
            operands = ((f"a[{i}]", group.a_array.ptr, group.a), (f"b[{i}]", group.b_array.ptr, group.b))
            check_workspace(base, needed, (*operands, (f"out[{i}]", out.ptr, d)))
    prepare = manifest.default().only(variant.family, "prepare_list")
    prepare_launch = fp8_ptr_array.kernel_launch(device, prepare, 1)
    gemm_launch = fp8_ptr_array.kernel_launch(device, variant, ctas)
    dtypes = [group.bias.dtype for group, _, _ in targets if group.bias is not None]
    bias_type = abi.BIAS_TYPES[dtypes[0]] if dtypes else 0
    params = fp8_ptr_array.gemm_params(device, variant, count, ctas, bias_type, targets[0][0].b_array.ptr)
    m, n, k = (max(each) for each in zip(*problem.shapes, strict=True))
    shapes = f"list of {count} groups, at most M={m} N={n} K={k}"
    handle = ctypes.c_void_p(stream)
    room_for = driver.temporary(device, needed, stream) if scratch is None else nullcontext(base)
    with driver.current(device), room_for as base:
        for first in range(0, count, abi.SM12X_LIST_CAPACITY):
            chunk = targets[first : first + abi.SM12X_LIST_CAPACITY]
            block = launch.Block(_list_params(base + maps, count, first, chunk, variant.swap_ab))
            status = prepare_launch(handle, block.arguments, None)
            if status:
                raise launch.launch_error(device, status, prepare.key, shapes)
        block = launch.Block(params)
        fp8_ptr_array.pack_workspace(block.memory, fp8_ptr_array.WORKSPACE_AT, base + maps, base)
        status = gemm_launch(handle, block.arguments, None)
        if status:
            raise launch.launch_error(device, status, variant.key, shapes)


def _list_params(
    group_arrays: int, count: int, first: int, chunk: Sequence[tuple[Group, Array, Matrix]], swap_ab: bool
) -> bytearray:
    """sm12x_prepare_list_params for the groups of one launch."""
    memory = bytearray(ctypes.sizeof(abi.sm12x_prepare_list_params))
    _pack_header(memory, 0, group_arrays, count, first, len(chunk), int(swap_ab))
    for i, (group, out, d) in enumerate(chunk):
        _pack_record(
            memory,
            _HEADER + i * _RECORD,
            group.a_array.ptr,
            group.b_array.ptr,
            out.ptr,
            _address(group.a_scale),
            _address(group.b_scale),
            _address(group.bias),
            group.a.stride,
            group.b.stride,
            d.stride,
            group.a.rows,
            group.b.rows,
            group.a.length,
            1.0 if isinstance(group.a_scale, Array) else group.a_scale,
            1.0 if isinstance(group.b_scale, Array) else group.b_scale,
            group.a_mode,
            group.b_mode,
        )
    return memory
