"""Small checkpoints with random weights, in the form of real ones, for the demo and for tests."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sm12x import reference
from sm12x.arrays import numpy_dtype
from sm12x.checkpoint import naming
from sm12x.checkpoint.experts import FLOATS
from sm12x.checkpoint.files import INDEX, SINGLE
from sm12x.checkpoint.scheme import FP8_DYNAMIC, Scheme

# What goes before a layer's number, and the activation's name; other models have the first of the table.
_PREFIX = {"gemma4": "model.language_model.layers."}
_ACTIVATION = {"gemma4": "gelu_pytorch_tanh"}
_E4M3_MAX = 448.0
Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class _Model:
    names: naming.Naming
    scheme: Scheme
    layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    stacked: bool
    transposed: bool
    dtype: str

    @property
    def prefix(self) -> str:
        return _PREFIX.get(self.names.name, naming.PREFIXES[0])


def make_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: str = "gemma4",
    scheme: Scheme = FP8_DYNAMIC,
    layers: int = 1,
    num_experts: int = 8,
    top_k: int = 2,
    hidden_size: int = 64,
    intermediate_size: int = 32,
    stacked: bool = False,
    transposed: bool = False,
    files: int = 1,
    dtype: str = "bfloat16",
    seed: int = 0,
) -> None:
    """Write config.json and the safetensors files of a model that is nothing but expert layers into directory
    `path`, which is made where it is missing and must hold no other model.

    model: a name in `sm12x.checkpoint.naming`: "mixtral", "qwen3_moe" or "gemma4". scheme: how the experts
    are quantised; a Scheme without a method leaves them in `dtype` (bfloat16, float16 or float32), which is
    also that of routers and of scales per channel. stacked: one tensor for all experts, `transposed`:
    (E, K, N) instead of (E, N, K). files: how many, with an index if more than one. Weights are normally
    distributed with standard deviation 1 / sqrt(K); the same seed writes the same bytes. The tensors of one
    file are in memory at a time.

    Raises ValueError naming a bad argument, ImportError where safetensors is not installed.
    """
    names = {each.name: each for each in naming.NAMINGS}
    parts = layers * (1 if stacked else num_experts)
    for argument, value, known in (
        ("model", model, names),
        ("dtype", dtype, FLOATS),
        ("top_k", top_k, range(1, num_experts + 1)),
        ("files", files, range(1, parts + 1)),
        ("transposed", transposed, (False, stacked)),
    ):
        if value not in known:
            expected = f"1 to {known[-1]}" if isinstance(known, range) and known else f"one of {list(known)}"
            raise ValueError(f"{argument}: expected {expected}, got {value!r}")
    made = _Model(
        names=names[model],
        scheme=scheme,
        layers=layers,
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        stacked=stacked,
        transposed=transposed,
        dtype=dtype,
    )
    config = _config(made)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    old = sorted(file.name for file in folder.iterdir() if file.name.endswith((".safetensors", ".json")))
    if old:  # what would be left of it could be read for a part of the new one
        raise ValueError(
            f"path: expected a directory without a model, got {folder} with {', '.join(old[:3])}"
        )
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _save(folder, _parts(made, seed), parts, files)


def _save(folder: Path, parts: Iterator[Tensors], count: int, files: int) -> None:
    """Write the tensors of `count` parts, a file as soon as it has its share of them."""
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise ImportError(
            'writing a checkpoint needs safetensors: pip install safetensors, or the extra "checkpoint"'
        ) from error
    where: dict[str, str] = {}
    for number in range(files):
        name = SINGLE if files == 1 else f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        tensors: Tensors = {}
        for _ in range(count * number // files, count * (number + 1) // files):
            tensors |= next(parts)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    if files > 1:
        index = {"metadata": {}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _parts(model: _Model, seed: int) -> Iterator[Tensors]:
    """The tensors of each expert, or stacked those of each layer; a layer's first part has its router."""
    for layer, layer_seed in enumerate(np.random.SeedSequence(seed).spawn(model.layers)):
        router_seed, *seeds = layer_seed.spawn(1 + model.num_experts)
        start = f"{model.prefix}{layer}."
        tensors = {
            start + name: value for name, value in _router(model, np.random.default_rng(router_seed)).items()
        }
        experts = (_expert(model, np.random.default_rng(each)) for each in seeds)
        start += model.names.experts[0]
        if model.stacked:
            all_experts = list(experts)
            for name in all_experts[0]:
                tensors[f"{start}.{name}"] = np.stack([expert[name] for expert in all_experts])
            yield tensors
            continue
        for number, expert in enumerate(experts):
            yield tensors | {f"{start}.{number}.{name}": value for name, value in expert.items()}
            tensors = {}


def _router(model: _Model, rng: np.random.Generator) -> Tensors:
    """By names below a layer. A scale of a router is near 1."""
    e, h = model.num_experts, model.hidden_size
    tensors = {model.names.router_weight[0]: _normal(model, (e, h), rng)}
    for names, size in ((model.names.router_scale, h), (model.names.router_per_expert_scale, e)):
        if names:
            tensors[names[0]] = rng.uniform(0.5, 1.5, size).astype(numpy_dtype(model.dtype))
    return tensors


def _normal(model: _Model, shape: tuple[int, int], rng: np.random.Generator) -> NDArray[Any]:
    values = rng.standard_normal(shape, dtype=np.float32) * np.float32(shape[1] ** -0.5)
    rounded: NDArray[Any] = values.astype(numpy_dtype(model.dtype))
    return rounded


def _expert(model: _Model, rng: np.random.Generator) -> Tensors:
    """By names below the expert, or stacked below the experts."""
    h, i = model.hidden_size, model.intermediate_size
    names = model.names.gate, model.names.up, model.names.down
    matrices = {
        name: _normal(model, shape, rng) for name, shape in zip(names, ((i, h), (i, h), (h, i)), strict=True)
    }
    if model.stacked:
        gate, up, down = matrices.values()
        matrices = {naming.GATE_UP: np.concatenate([gate, up]), naming.DOWN: down}
    return {
        name + suffix: np.ascontiguousarray(value.T) if model.transposed else value
        for name, matrix in matrices.items()
        for suffix, value in _quantized(model, matrix, rng).items()
    }


def _quantized(model: _Model, matrix: NDArray[Any], rng: np.random.Generator) -> Tensors:
    """A matrix and its scales, by what stands behind its name."""
    fp8 = model.scheme.quant_method == "fp8"
    weight, weight_scale, input_scale = (
        ("", "_scale_inv" if fp8 else ".weight_scale", "_activation_scale" if fp8 else ".input_scale")
        if model.stacked
        else (".weight", ".weight_scale", ".input_scale")
    )
    if model.scheme.weights is None:
        return {weight: matrix}
    # One scale is () in files of `quant_method: fp8` and (1,) in those of compressed-tensors.
    one: tuple[int, ...] = () if fp8 and not model.stacked else (1,)
    values = matrix.astype(np.float32)
    if model.scheme.weights == "channel":
        _, (scale,) = reference.quantize_per_channel(values[None])
        scale = scale.astype(numpy_dtype(model.dtype))
    else:
        scale = np.full(one, np.abs(values).max() / np.float32(_E4M3_MAX))
    scaled = values / scale.astype(np.float32)
    tensors = {
        weight: np.clip(scaled, -_E4M3_MAX, _E4M3_MAX).astype(numpy_dtype("float8_e4m3fn")),
        weight_scale: scale,
    }
    if model.scheme.activations == "static":
        tensors[input_scale] = np.full(one, rng.uniform(0.01, 0.02), np.float32)
    return tensors


def _config(model: _Model) -> dict[str, Any]:
    """config.json. Raises ValueError for a scheme that no checkpoint has."""
    names = model.names
    text: dict[str, Any] = {
        "model_type": names.model_types[-1],
        names.num_experts[0]: model.num_experts,
        names.top_k[0]: model.top_k,
        names.intermediate_size[0]: model.intermediate_size,
        names.activation[0]: _ACTIVATION.get(names.name, "silu"),
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.layers,
        "dtype": model.dtype,
    }
    if isinstance(names.renormalize, str):
        text[names.renormalize] = True
    if names.enabled is not None:
        text[names.enabled] = True
    if names.norm_eps is not None:
        text |= [names.norm_eps]
    config = text
    if len(names.model_types) > 1:
        config = {"model_type": names.model_types[0], "text_config": text}
    if model.scheme.quant_method is not None:
        config["quantization_config"] = _quantization_config(model)
    return config


def _quantization_config(model: _Model) -> dict[str, Any]:
    scheme = model.scheme
    router = model.names.router_weight[0].removesuffix(".weight")
    ignored = ["lm_head", *(f"{model.prefix}{layer}.{router}" for layer in range(model.layers))]
    if scheme.quant_method == "fp8" and scheme.weights == "tensor":
        return {
            "quant_method": "fp8",
            "activation_scheme": scheme.activations,
            "weight_block_size": None,
            "modules_to_not_convert" if model.stacked else "ignored_layers": ignored,
        }
    if scheme.quant_method != "compressed-tensors":
        raise ValueError(f"scheme: expected one that load_moe_layer reads, got {scheme}")
    dynamic = scheme.activations == "dynamic"
    both = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**both, "strategy": scheme.weights, "dynamic": False},
        "input_activations": {**both, "strategy": "token" if dynamic else "tensor", "dynamic": dynamic},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
        "kv_cache_scheme": None,
    }
