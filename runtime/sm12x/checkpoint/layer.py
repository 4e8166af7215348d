"""One mixture-of-experts layer, from a Hugging Face directory to the device."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sm12x.checkpoint import naming
from sm12x.checkpoint.config import ExpertConfig, read_expert_config
from sm12x.checkpoint.destination import Destination, destination
from sm12x.checkpoint.experts import (
    FLOATS,
    Matrix,
    expert_modules,
    find_matrices,
    read_input_scale,
    read_matrix,
)
from sm12x.checkpoint.files import INDEX, SINGLE, Files, open_files, read, read_json
from sm12x.checkpoint.router import Router
from sm12x.checkpoint.scheme import Scheme, read_scheme
from sm12x.errors import CheckpointError


@dataclass(frozen=True, eq=False)
class MoELayer:
    """A layer as `sm12x.fused_moe` takes it; E experts, H hidden and I intermediate size.

    w1: (E, 2I, H) float8_e4m3fn, rows [gate; up]; w2: (E, H, I). w1_scale: (E, 2I) float32, one for each
    output feature, also where the checkpoint has one for gate and one for up; w2_scale: (E, H), or (E,)
    where the checkpoint has one for each expert. Scales multiply.
    a1_scale, a2_scale: the static scale of the input of each matrix, the largest of all experts, as the
    layer has one for all of them (as vLLM has); None where scales are dynamic.
    dtype: what fused_moe has to be told where w1 and w2 are uint8 (CuPy), else None.
    router: None where the checkpoint has no router's weight.
    model_type, scheme: what was found.
    """

    w1: Any
    w1_scale: Any
    w2: Any
    w2_scale: Any
    a1_scale: float | None
    a2_scale: float | None
    activation: str
    gated: bool
    dtype: str | None
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    router: Router | None
    model_type: str
    scheme: Scheme
    layer: int

    def arguments(self) -> dict[str, Any]:
        """The layer as keyword arguments:
        ``fused_moe(x, topk_weights=..., topk_ids=..., **layer.arguments())``.
        """
        names = (
            *("w1", "w2", "w1_scale", "w2_scale", "a1_scale", "a2_scale"),
            *("activation", "gated", "dtype"),
        )
        return {name: getattr(self, name) for name in names}


def load_moe_layer(
    path: str | os.PathLike[str],
    layer: int,
    *,
    framework: str | None = None,
    device: Any = None,
    on_expert: Callable[[int, int], None] | None = None,
) -> MoELayer:
    """Load the experts and the router of layer `layer` of the model in directory `path`.

    The directory is as Hugging Face models are: config.json, and model.safetensors, or several files with
    model.safetensors.index.json. Models: Mixtral, Qwen3-MoE, Gemma 4 (`sm12x.checkpoint.naming`), each
    expert with tensors of its own, or all stacked in one, (E, N, K) or transposed. Experts may be
      - compressed-tensors FP8: weight scales per channel or per tensor, activation scales dynamic or static
        (of the tensor). Dynamic scales are per token, also where the checkpoint asks for one of all tokens;
      - `quant_method: fp8` with a scale for each tensor (none for each block), dynamic or static. The two
        scales of w1's halves stay as they are: they are repeated per channel, nothing is quantised again;
      - bfloat16, float16 or float32: quantised here, symmetric, a scale for each channel.

    Arrays are of `framework`: "torch", "cupy" (weights as uint8), "numpy" (host memory), or "sm12x" (device
    memory of our own, exported through DLPack; needs no framework). None: torch where it is already imported
    and sees a GPU, else CuPy where it is installed and sees one, else NumPy. `device`: None (the framework's
    current one; "sm12x": 0), a CUDA ordinal, "cuda", "cuda:N" or "cpu" (torch and NumPy). Weights are
    allocated once and filled matrix by matrix: never is more than one expert's in host memory beside them.
    `on_expert` is called with the experts loaded so far and their number.

    Everything is checked before anything is loaded. Raises sm12x.CheckpointError, a ValueError that names
    file, tensor, what was expected and what is there, for whatever is wrong with the checkpoint, a layer that
    it does not have or that is dense among it; ValueError and TypeError naming a bad argument; ImportError
    where safetensors (extra "checkpoint") or the framework is not installed; and what the framework raises.
    """
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise TypeError(f"layer: expected an int, got {type(layer).__name__}")
    if layer < 0:
        raise ValueError(f"layer: expected at least 0, got {layer}")
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(folder, None, "a directory with config.json and safetensors files", "none")
    to = destination(framework, device)
    config_file = folder / "config.json"
    raw = read_json(config_file)
    config = read_expert_config(raw, config_file, layer)
    files = open_files(folder)
    place = naming.find_experts(config.naming, layer, files.files)
    if place is None:
        raise _no_experts(files, config, layer)
    scheme = read_scheme(raw, config_file, expert_modules(config, place))
    experts = list(find_matrices(files, config, scheme, place))
    router = _read_router(files, config, place)
    a1_scale, a2_scale = (_largest_input_scale(experts, target) for target in ("w1", "w2"))
    w1, w2, w1_scale, w2_scale = _load_experts(experts, config, scheme, to, on_expert)
    return MoELayer(
        w1=w1,
        w1_scale=to.copy(w1_scale),
        w2=w2,
        w2_scale=to.copy(w2_scale),
        a1_scale=a1_scale,
        a2_scale=a2_scale,
        activation=config.activation,
        gated=True,
        dtype=to.dtype,
        num_experts=config.num_experts,
        top_k=config.top_k,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        router=None if router is None else _placed(router, to),
        model_type=config.model_type,
        scheme=scheme,
        layer=layer,
    )


def _no_experts(files: Files, config: ExpertConfig, layer: int) -> CheckpointError:
    name = f"{naming.PREFIXES[0]}{layer}.{config.naming.experts[0]}.0.{config.naming.gate}.weight"
    file = INDEX if (files.folder / INDEX).is_file() else SINGLE
    return CheckpointError(
        files.folder / file,
        name,
        f"this tensor, or the experts of {config.model_type} by one of their other names",
        f"none of them among {len(files.files)}",
    )


def _load_experts(
    experts: list[list[Matrix]],
    config: ExpertConfig,
    scheme: Scheme,
    to: Destination,
    on_expert: Callable[[int, int], None] | None,
) -> tuple[Any, Any, NDArray[np.float32], NDArray[np.float32]]:
    """w1, w2 at their destination, and their scales on the host."""
    e, h, i = config.num_experts, config.hidden_size, config.intermediate_size
    weights = {
        "w1": to.empty((e, 2 * i, h), "float8_e4m3fn"),
        "w2": to.empty((e, h, i), "float8_e4m3fn"),
    }
    scales = {"w1": np.empty((e, 2 * i), np.float32), "w2": np.empty((e, h), np.float32)}
    for number, matrices in enumerate(experts):
        for matrix in matrices:
            at = matrix.expert, slice(matrix.first, matrix.first + matrix.rows)
            values, scales[matrix.target][at] = read_matrix(matrix)
            to.put(weights[matrix.target], at, values)
        if on_expert is not None:
            on_expert(number + 1, e)
    per_expert = scheme.weights == "tensor"
    w2_scale = np.ascontiguousarray(scales["w2"][:, 0]) if per_expert else scales["w2"]
    return weights["w1"], weights["w2"], scales["w1"], w2_scale


def _largest_input_scale(experts: list[list[Matrix]], target: str) -> float | None:
    scales = [
        read_input_scale(matrix)
        for matrices in experts
        for matrix in matrices
        if matrix.target == target and matrix.input_scale is not None
    ]
    return max(scales, default=None)


def _read_router(files: Files, config: ExpertConfig, place: naming.Place) -> Router | None:
    """The router in host memory, None where its weight is missing.

    Raises CheckpointError where another tensor of it is, or one is not as it should be.
    """
    e, h = config.num_experts, config.hidden_size
    names = config.naming

    def values(below: tuple[str, ...], shape: tuple[int, ...]) -> NDArray[np.float32] | None:
        if not below:
            return None
        tensor = files.tensor(*(place.layer + name for name in below))
        if tensor.shape != shape or tensor.dtype not in FLOATS:
            raise tensor.error(f"{' or '.join(FLOATS)} of shape {shape}")
        return read(tensor).astype(np.float32)

    if files.find(*(place.layer + name for name in names.router_weight)) is None:
        return None
    return Router(
        weight=values(names.router_weight, (e, h)),
        scale=values(names.router_scale, (h,)),
        per_expert_scale=values(names.router_per_expert_scale, (e,)),
        renormalize=config.renormalize,
        norm_eps=config.norm_eps,
    )


def _placed(router: Router, to: Destination) -> Router:
    return Router(
        weight=to.copy(router.weight),
        scale=None if router.scale is None else to.copy(router.scale),
        per_expert_scale=None if router.per_expert_scale is None else to.copy(router.per_expert_scale),
        renormalize=router.renormalize,
        norm_eps=router.norm_eps,
    )
