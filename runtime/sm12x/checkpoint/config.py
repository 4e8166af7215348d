"""config.json: what a model says of its expert layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sm12x.checkpoint.naming import ACTIVATIONS, NAMINGS, Naming
from sm12x.errors import CheckpointError


@dataclass(frozen=True)
class ExpertConfig:
    """The experts of one layer as config.json describes them; sizes in elements.

    `norm_eps`: the router normalises its input, with that epsilon; None where it does not.
    """

    naming: Naming
    model_type: str
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    activation: str
    renormalize: bool
    norm_eps: float | None


def read_expert_config(config: Mapping[str, Any], file: Path, layer: int) -> ExpertConfig:
    """What `config`, all of config.json, says of layer `layer`; `file` is its path, for errors.

    Raises CheckpointError for a model type that is not known, for a layer that is not there or has no
    experts, and for entries that are missing or of no use.
    """
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        text = config
    naming, model_type = _naming(config, text, file)
    layers = _size(text, file, "num_hidden_layers")
    if layer >= layers:
        raise CheckpointError(file, None, f"a layer from 0 to {layers - 1}", f"layer {layer}")
    _refuse_dense(text, file, naming, layer)
    activation = str(_entry(text, file, *naming.activation))
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise CheckpointError(file, None, f"{naming.activation[0]} among {known}", repr(activation))
    found = ExpertConfig(
        naming=naming,
        model_type=model_type,
        num_experts=_size(text, file, *naming.num_experts),
        top_k=_size(text, file, *naming.top_k),
        hidden_size=_size(text, file, "hidden_size"),
        intermediate_size=_size(text, file, *naming.intermediate_size),
        activation=ACTIVATIONS[activation],
        renormalize=(
            bool(text.get(naming.renormalize, False))
            if isinstance(naming.renormalize, str)
            else naming.renormalize
        ),
        norm_eps=None if naming.norm_eps is None else float(text.get(*naming.norm_eps)),
    )
    if found.top_k > found.num_experts:
        raise CheckpointError(
            file, None, f"{naming.top_k[0]} of at most {found.num_experts} experts", str(found.top_k)
        )
    return found


def _naming(config: Mapping[str, Any], text: Mapping[str, Any], file: Path) -> tuple[Naming, str]:
    for model_type in (text.get("model_type"), config.get("model_type")):
        for naming in NAMINGS:
            if model_type in naming.model_types:
                return naming, str(model_type)
    known = ", ".join(name for naming in NAMINGS for name in naming.model_types)
    raise CheckpointError(file, None, f"a model_type among {known}", repr(config.get("model_type")))


def _refuse_dense(text: Mapping[str, Any], file: Path, naming: Naming, layer: int) -> None:
    """Raise where a layer has one MLP instead of experts: none has, that one is listed, or it is between the
    sparse ones.
    """
    reason = None
    step = text.get("decoder_sparse_step") or 1
    if naming.enabled is not None and not text.get(naming.enabled, False):
        reason = f"{naming.enabled} {text.get(naming.enabled, False)}"
    elif any(text.get(key) == 0 for key in naming.num_experts):
        reason = f"{naming.num_experts[0]} 0"
    elif layer in (text.get("mlp_only_layers") or ()):
        reason = f"mlp_only_layers {text['mlp_only_layers']}"
    elif (layer + 1) % step:
        reason = f"decoder_sparse_step {step}"
    if reason is not None:
        raise CheckpointError(file, None, "a layer of experts", f"layer {layer}, which is dense: {reason}")


def _entry(text: Mapping[str, Any], file: Path, *keys: str) -> Any:
    for key in keys:
        if text.get(key) is not None:
            return text[key]
    raise CheckpointError(file, None, f"an entry {' or '.join(keys)}", "none")


def _size(text: Mapping[str, Any], file: Path, *keys: str) -> int:
    value = _entry(text, file, *keys)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(file, None, f"{keys[0]} of at least 1", repr(value))
    return value
