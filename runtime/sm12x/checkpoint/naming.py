"""How models name their experts: in the config, and in the files. A table, and the search through it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# What stands before a layer's number: a language model alone, and inside models with other towers.
PREFIXES = (
    "model.layers.",
    "model.language_model.layers.",
    "language_model.model.layers.",
    "language_model.layers.",
    "layers.",
)
# All experts in one tensor, as transformers' own modules have them; the same for every model.
GATE_UP, DOWN = "gate_up_proj", "down_proj"
STACKED_WEIGHT = ("", ".weight")
STACKED_WEIGHT_SCALE = ("_scale_inv", ".weight_scale", "_weight_scale", ".weight_scale_inv", "_scale")
STACKED_INPUT_SCALE = ("_activation_scale", ".input_scale", "_input_scale")
STACKED_BIAS = ("_bias", ".bias")
# One expert's matrices, each a module of its own.
WEIGHT = (".weight",)
WEIGHT_SCALE = (".weight_scale", ".weight_scale_inv")
INPUT_SCALE = (".input_scale", ".activation_scale", ".act_scale")
BIAS = (".bias",)


@dataclass(frozen=True)
class Naming:
    """One model family.

    model_types: as config.json names it, of the whole model or of its text part.
    experts: the experts' module below a layer. gate, up, down: one expert's matrices below
    ``<experts>.<number>``.
    router_weight, router_scale, router_per_expert_scale: tensors below a layer, several where it was renamed.
    num_experts, top_k, intermediate_size, activation: keys of the config (of its text part).
    renormalize: the router's weights of the chosen experts are divided by their sum: always, or as that key
    of the config says (absent: no).
    enabled: a key of the config that is false where the model has no experts after all.
    norm_eps: key of the epsilon of a normalisation that the router applies to its input, and its default;
    None where there is none.
    """

    name: str
    model_types: tuple[str, ...]
    experts: tuple[str, ...]
    gate: str
    up: str
    down: str
    router_weight: tuple[str, ...]
    num_experts: tuple[str, ...]
    top_k: tuple[str, ...]
    intermediate_size: tuple[str, ...]
    activation: tuple[str, ...]
    renormalize: bool | str
    router_scale: tuple[str, ...] = ()
    router_per_expert_scale: tuple[str, ...] = ()
    enabled: str | None = None
    norm_eps: tuple[str, float] | None = None


NAMINGS = (
    Naming(
        name="mixtral",
        model_types=("mixtral",),
        experts=("block_sparse_moe.experts", "mlp.experts"),
        gate="w1",
        up="w3",
        down="w2",
        router_weight=("block_sparse_moe.gate.weight", "mlp.gate.weight"),
        num_experts=("num_local_experts", "num_experts"),
        top_k=("num_experts_per_tok",),
        intermediate_size=("intermediate_size",),
        activation=("hidden_act",),
        renormalize=True,
    ),
    Naming(
        name="qwen3_moe",
        model_types=("qwen3_moe",),
        experts=("mlp.experts",),
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
        router_weight=("mlp.gate.weight",),
        num_experts=("num_experts", "num_local_experts"),
        top_k=("num_experts_per_tok",),
        intermediate_size=("moe_intermediate_size",),
        activation=("hidden_act",),
        renormalize="norm_topk_prob",
    ),
    Naming(
        name="gemma4",
        model_types=("gemma4", "gemma4_text"),
        # Below "moe" in checkpoints from before transformers renamed it.
        experts=("experts", "moe.experts", "moe"),
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
        router_weight=("router.proj.weight",),
        router_scale=("router.scale",),
        router_per_expert_scale=("router.per_expert_scale", "moe.per_expert_scale"),
        num_experts=("num_experts",),
        top_k=("top_k_experts", "num_experts_per_tok"),
        intermediate_size=("moe_intermediate_size",),
        activation=("hidden_activation", "hidden_act"),
        renormalize=True,
        enabled="enable_moe_block",
        norm_eps=("rms_norm_eps", 1e-6),
    ),
)

# Configs' names of activations -> those of `sm12x.fused_moe`. Both tanh forms are the same formula.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu2": "relu2",
}


@dataclass(frozen=True)
class Place:
    """Where a layer's experts are. `layer`: what its names begin with, `experts`: what those of its experts
    begin with, both with a dot at the end. `stacked`: one tensor holds all experts."""

    layer: str
    experts: str
    stacked: bool


def find_experts(naming: Naming, layer: int, names: Iterable[str]) -> Place | None:
    """Where the experts of a layer are among tensor names; None where there are none."""
    names = [name for name in names if f"layers.{layer}." in name]
    for prefix in PREFIXES:
        for module in naming.experts:
            start = f"{prefix}{layer}.{module}."
            below = [name[len(start) :] for name in names if name.startswith(start)]
            if any(re.match(r"\d+\.", name) for name in below):
                return Place(f"{prefix}{layer}.", start, stacked=False)
            if any(name.startswith((GATE_UP, DOWN)) for name in below):
                return Place(f"{prefix}{layer}.", start, stacked=True)
    return None
