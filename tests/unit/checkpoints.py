"""Checkpoints for tests: written by make_checkpoint, read back without the loader, and altered."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from sm12x.checkpoint import FP8_DYNAMIC, FP8_STATIC, UNQUANTIZED, Scheme

SCHEMES = {
    "fp8-dynamic": FP8_DYNAMIC,
    "fp8-static": FP8_STATIC,
    "fp8-channel-static": Scheme("compressed-tensors", "channel", "static"),
    "fp8-tensor-dynamic": Scheme("compressed-tensors", "tensor", "dynamic"),
    "method-fp8-dynamic": Scheme("fp8", "tensor", "dynamic"),
    "method-fp8-static": Scheme("fp8", "tensor", "static"),
    "unquantized": UNQUANTIZED,
}
# What stands before the names of the three matrices of an expert, and the router's: {} is the layer's number.
EXPERTS = {
    "mixtral": "model.layers.{}.block_sparse_moe.experts",
    "qwen3_moe": "model.layers.{}.mlp.experts",
    "gemma4": "model.language_model.layers.{}.experts",
}
PROJECTIONS = {
    "mixtral": ("w1", "w3", "w2"),
    "qwen3_moe": ("gate_proj", "up_proj", "down_proj"),
    "gemma4": ("gate_proj", "up_proj", "down_proj"),
}
ROUTER = {
    "mixtral": "model.layers.{}.block_sparse_moe.gate.weight",
    "qwen3_moe": "model.layers.{}.mlp.gate.weight",
    "gemma4": "model.language_model.layers.{}.router.proj.weight",
}
_DTYPES = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}


def new_seed():
    seed = int(np.random.SeedSequence().entropy) % 2**32
    print(f"seed {seed}")
    return seed


def read_file(file):
    """All tensors of a file, through the safetensors package alone."""
    return {
        name: np.frombuffer(bytes(entry["data"]), _DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in safetensors.deserialize(file.read_bytes())
    }


def read_all(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= read_file(file)
    return tensors


def alter(folder, change):
    """Give the tensors of every file to `change`, which alters the dict in place, and write them again."""
    for file in sorted(folder.glob("*.safetensors")):
        tensors = {name: value.copy() for name, value in read_file(file).items()}
        change(tensors)
        save_file(tensors, file)


def alter_config(folder, change):
    """Give config.json to `change`, which alters the dict in place, and write it again."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
