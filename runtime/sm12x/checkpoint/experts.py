"""The matrices of a layer's experts: which tensors they are in, checked before any is read; their values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from sm12x import reference
from sm12x.checkpoint import naming
from sm12x.checkpoint.config import ExpertConfig
from sm12x.checkpoint.files import Files, Tensor, read
from sm12x.checkpoint.scheme import Scheme

FLOATS = ("bfloat16", "float16", "float32")
# Elements that are quantised at a time: what it takes in float32 stays below 100 MB whatever an expert has.
_QUANTIZED_AT_A_TIME = 1 << 22


@dataclass(frozen=True)
class Matrix:
    """One matrix of one expert, (rows, columns) = (N, K), or several under one another.

    target: "w1" or "w2", whose rows from `first` of `expert` it fills.
    weight: the tensor, of which it is the slice `index` (None: all of it); `transposed` where that is (K, N).
    scale: the tensor with its scales, None where it is not quantised; input_scale likewise, None where
    activations are not static.
    """

    target: str
    expert: int
    first: int
    rows: int
    columns: int
    weight: Tensor
    index: int | None
    transposed: bool
    scale: Tensor | None
    input_scale: Tensor | None


def expert_modules(config: ExpertConfig, place: naming.Place) -> list[str]:
    """The names that a quantization_config has for the experts' matrices."""
    if place.stacked:
        return [place.experts + name for name in (naming.GATE_UP, naming.DOWN)]
    names = config.naming.gate, config.naming.up, config.naming.down
    return [f"{place.experts}{e}.{name}" for e in range(config.num_experts) for name in names]


def find_matrices(
    files: Files, config: ExpertConfig, scheme: Scheme, place: naming.Place
) -> Iterator[list[Matrix]]:
    """For each expert its matrices.

    Raises CheckpointError naming a tensor that is missing or is not as it has to be.
    """
    h, i = config.hidden_size, config.intermediate_size
    if place.stacked:
        gate_up = _find(files, place.experts + naming.GATE_UP, scheme, stacked=True)
        down = _find(files, place.experts + naming.DOWN, scheme, stacked=True)
        transposed = _is_transposed(gate_up[0], down[0], config)
        for e in range(config.num_experts):
            yield [
                _stacked("w1", e, config.num_experts, 2 * i, h, gate_up, scheme, transposed),
                _stacked("w2", e, config.num_experts, h, i, down, scheme, transposed),
            ]
        return
    more = files.find(f"{place.experts}{config.num_experts}.{config.naming.gate}.weight")
    if more is not None:
        raise more.error(f"{config.num_experts} experts, as config.json says", "one more")
    for e in range(config.num_experts):
        expert = f"{place.experts}{e}."
        gate, up, down = (
            _find(files, expert + name, scheme, stacked=False)
            for name in (config.naming.gate, config.naming.up, config.naming.down)
        )
        yield [
            _single("w1", e, 0, i, h, gate, scheme),
            _single("w1", e, i, i, h, up, scheme),
            _single("w2", e, 0, h, i, down, scheme),
        ]


_Found = tuple[Tensor, Tensor | None, Tensor | None]


def _find(files: Files, module: str, scheme: Scheme, *, stacked: bool) -> _Found:
    """The weight of a module, its scale and the scale of its input."""
    weight, weight_scale, input_scale, bias = (
        (naming.STACKED_WEIGHT, naming.STACKED_WEIGHT_SCALE, naming.STACKED_INPUT_SCALE, naming.STACKED_BIAS)
        if stacked
        else (naming.WEIGHT, naming.WEIGHT_SCALE, naming.INPUT_SCALE, naming.BIAS)
    )
    unwanted = files.find(*(module + each for each in bias))
    if unwanted is not None:
        raise unwanted.error("experts without a bias")
    return (
        files.tensor(*(module + each for each in weight)),
        None if scheme.weights is None else files.tensor(*(module + each for each in weight_scale)),
        None if scheme.activations == "dynamic" else files.tensor(*(module + each for each in input_scale)),
    )


def _is_transposed(gate_up: Tensor, down: Tensor, config: ExpertConfig) -> bool:
    """Whether stacked tensors have the input features before the output features.

    Both are asked: one of them alone is square for some sizes, both never.
    """
    e, h, i = config.num_experts, config.hidden_size, config.intermediate_size
    plain, transposed = ((e, 2 * i, h), (e, h, i)), ((e, h, 2 * i), (e, i, h))
    given = gate_up.shape, down.shape
    if given == plain:
        return False
    if given == transposed:
        return True
    # One that is neither; else the one that is transposed while the other is not.
    neither = [at for at in (0, 1) if given[at] not in (plain[at], transposed[at])]
    at = neither[0] if neither else int(given[0] == plain[0])
    raise (gate_up, down)[at].error(
        f"shape {plain[at]}, or {transposed[at]} where both stacked tensors are transposed"
    )


def _checked_weight(weight: Tensor, scheme: Scheme) -> Tensor:
    dtypes = FLOATS if scheme.weights is None else ("float8_e4m3fn",)
    if weight.dtype not in dtypes:
        raise weight.error(f"{' or '.join(dtypes)}, because the experts are {scheme}")
    return weight


def _checked_scale(scale: Tensor | None, shapes: tuple[tuple[int, ...], ...]) -> Tensor | None:
    if scale is not None and (scale.shape not in shapes or scale.dtype not in FLOATS):
        expected = " or ".join(str(shape) for shape in dict.fromkeys(shapes))
        raise scale.error(f"{' or '.join(FLOATS)} of shape {expected}")
    return scale


def _single(
    target: str, expert: int, first: int, rows: int, columns: int, found: _Found, scheme: Scheme
) -> Matrix:
    """A matrix that is a tensor of its own."""
    weight, scale, input_scale = found
    if _checked_weight(weight, scheme).shape != (rows, columns):
        raise weight.error(f"shape {(rows, columns)}")
    one = (), (1,), (1, 1)
    per_channel = (rows, 1), (rows,)
    return Matrix(
        target,
        expert,
        first,
        rows,
        columns,
        weight,
        None,
        False,
        _checked_scale(scale, per_channel if scheme.weights == "channel" else one),
        _checked_scale(input_scale, one),
    )


def _stacked(
    target: str,
    expert: int,
    experts: int,
    rows: int,
    columns: int,
    found: _Found,
    scheme: Scheme,
    transposed: bool,
) -> Matrix:
    """A slice of a tensor for all experts, whose shape was checked. w1's matrices may have a scale each."""
    weight, scale, input_scale = found
    one: tuple[tuple[int, ...], ...] = (experts,), (experts, 1), (experts, 1, 1), (), (1,)
    per_channel = (experts, rows, 1), (experts, rows), *([(experts, 1, rows)] if transposed else [])
    per_tensor = (*one, (experts, 2)) if target == "w1" else one
    return Matrix(
        target,
        expert,
        0,
        rows,
        columns,
        _checked_weight(weight, scheme),
        expert,
        transposed,
        _checked_scale(scale, per_channel if scheme.weights == "channel" else per_tensor),
        _checked_scale(input_scale, one),
    )


def read_matrix(matrix: Matrix) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Its values, (N, K) float8_e4m3fn, and their scales, (N,) float32.

    Not quantised, it is quantised with a scale for each row. One scale is repeated for every row: those of
    gate and up differ, and one for both would mean to quantise again.
    """
    values = read(matrix.weight, matrix.index)
    if matrix.transposed:
        values = np.ascontiguousarray(values.T)
    if matrix.scale is None:
        return _quantize(values)
    scales = _read_scale(matrix.scale, matrix)
    return values, np.repeat(scales, matrix.rows // scales.size)


def read_input_scale(matrix: Matrix) -> float:
    """The static scale of its input. Raises CheckpointError where nothing can be divided by it."""
    if matrix.input_scale is None:
        raise ValueError(f"matrix: expected one with an input_scale, got {matrix.weight.name}")
    value = float(_read_scale(matrix.input_scale, matrix)[0])
    if not (math.isfinite(value) and value > 0):
        raise matrix.input_scale.error("a finite scale above 0", repr(value))
    return value


def _read_scale(scale: Tensor, matrix: Matrix) -> NDArray[np.float32]:
    """The scales of a matrix as a vector of one, two or N."""
    per_expert = matrix.index is not None and scale.shape not in ((), (1,))
    return read(scale, matrix.index if per_expert else None).astype(np.float32).reshape(-1)


def _quantize(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Some rows at a time: intermediate results in float32 are several times an expert's size."""
    rows, columns = values.shape
    quantized: NDArray[Any] = np.empty(values.shape, ml_dtypes.float8_e4m3fn)
    scales = np.empty(rows, np.float32)
    step = max(1, _QUANTIZED_AT_A_TIME // columns)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        (quantized[part],), (scale,) = reference.quantize_per_channel(values[None, part])
        scales[part] = scale[:, 0]
    return quantized, scales
