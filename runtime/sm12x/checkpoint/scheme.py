"""How a checkpoint's experts are quantised, by its quantization_config."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sm12x.errors import CheckpointError


@dataclass(frozen=True)
class Scheme:
    """A way of quantising.

    quant_method: "compressed-tensors", "fp8", or None where the experts are not quantised.
    weights: one scale for each "channel" (output feature) or "tensor" of an expert, None where they have
    none.
    activations: "dynamic" (scales are computed as the layer runs) or "static" (the checkpoint has them).
    """

    quant_method: str | None = None
    weights: str | None = None
    activations: str = "dynamic"

    def __str__(self) -> str:
        if self.quant_method is None:
            return "not quantised"
        return f"{self.quant_method}, e4m3 weights per {self.weights}, {self.activations} activation scales"


UNQUANTIZED = Scheme()
FP8_DYNAMIC = Scheme("compressed-tensors", "channel", "dynamic")
FP8_STATIC = Scheme("compressed-tensors", "tensor", "static")

_FORMATS = ("float-quantized", "naive-quantized", "mixed-precision", None)


def read_scheme(config: Mapping[str, Any], file: Path, modules: Iterable[str]) -> Scheme:
    """The one scheme of all `modules`, the experts' matrices by their names in the files.

    `config` is all of config.json, `file` its path, for errors. Raises CheckpointError for schemes that
    `load_moe_layer` has not, and where the modules differ in theirs.
    """
    quantization = _quantization_config(config)
    if quantization is None:
        return UNQUANTIZED
    method = quantization.get("quant_method")
    of = {"compressed-tensors": _compressed_tensors, "fp8": _fp8}.get(str(method))
    if of is None:
        raise _unsupported(file, "quant_method", '"compressed-tensors" or "fp8"', method)
    found: dict[Scheme, str] = {}
    for module in modules:
        found.setdefault(of(quantization, file, module), module)
    if len(found) != 1:
        each = "; ".join(f"{module}: {scheme}" for scheme, module in found.items())
        raise _unsupported(file, "quantization_config", "one scheme for all experts of a layer", each)
    return next(iter(found))


def _quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if part.get(key):
                found: Mapping[str, Any] = part[key]
                return found
    return None


def _unsupported(file: Path, what: str, expected: str, given: object) -> CheckpointError:
    return CheckpointError(file, None, f"{what} {expected}", given if isinstance(given, str) else repr(given))


def _fp8(quantization: Mapping[str, Any], file: Path, module: str) -> Scheme:
    """``quant_method: fp8``, one scale for each tensor."""
    ignored = quantization.get("ignored_layers") or quantization.get("modules_to_not_convert") or ()
    if any(_names(each, module) or _is_part_of(module, each) for each in ignored):
        return UNQUANTIZED
    blocks = quantization.get("weight_block_size")
    if blocks is not None:
        raise _unsupported(
            file, "weight_block_size", "null, one scale for each tensor: blocks are not supported", blocks
        )
    fmt = quantization.get("fmt", "e4m3")
    if fmt not in ("e4m3", "float8_e4m3fn"):
        raise _unsupported(file, "fmt", '"e4m3"', fmt)
    activations = quantization.get("activation_scheme", "dynamic")
    if activations not in ("dynamic", "static"):
        raise _unsupported(file, "activation_scheme", '"dynamic" or "static"', activations)
    return Scheme("fp8", "tensor", activations)


def _is_part_of(module: str, ignored: str) -> bool:
    """Whether `ignored` names the module, one that it is in, or its last parts."""
    return f"{module}.".startswith(f"{ignored}.") or module.endswith(f".{ignored}")


def _names(target: str, module: str) -> bool:
    """compressed-tensors' rule: the exact name, or behind "re:" a pattern that it begins with."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target == module


def _compressed_tensors(quantization: Mapping[str, Any], file: Path, module: str) -> Scheme:
    if any(_names(each, module) for each in quantization.get("ignore") or ()):
        return UNQUANTIZED
    group = _group(quantization, module)
    if group is None:
        return UNQUANTIZED
    fmt = group.get("format") or quantization.get("format")
    if fmt not in _FORMATS:
        raise _unsupported(file, "format", '"float-quantized"', fmt)
    weights = _arguments(group.get("weights"), file, "weights")
    activations = _arguments(group.get("input_activations"), file, "input_activations")
    if weights.get("dynamic"):
        raise _unsupported(file, "weights' dynamic", "false", weights["dynamic"])
    dynamic = activations.get("dynamic", False)
    if dynamic not in (True, False):
        raise _unsupported(file, "input_activations' dynamic", "true or false", dynamic)
    _strategy(activations, file, "input_activations", ("token", "tensor") if dynamic else ("tensor",))
    return Scheme(
        "compressed-tensors",
        _strategy(weights, file, "weights", ("channel", "tensor")),
        "dynamic" if dynamic else "static",
    )


def _group(quantization: Mapping[str, Any], module: str) -> Mapping[str, Any] | None:
    """The group of a module: exact names go before patterns, and those before the class of all matrices."""
    groups: Sequence[Mapping[str, Any]] = list((quantization.get("config_groups") or {}).values())
    for matches in (
        lambda target: target == module,
        lambda target: _names(target, module),
        lambda target: target == "Linear",
    ):
        for group in groups:
            if any(matches(target) for target in group.get("targets") or ()):
                return group
    return None


def _arguments(arguments: Any, file: Path, what: str) -> Mapping[str, Any]:
    """The part of a group for weights or activations, if it means symmetric e4m3."""
    if not isinstance(arguments, Mapping):  # weights alone are quantised: no FP8 GEMM is meant
        raise _unsupported(file, what, "of 8-bit floats", arguments)
    number = arguments.get("num_bits", 8), arguments.get("type", "int"), arguments.get("symmetric", True)
    if number != (8, "float", True):
        bits, kind, symmetric = number
        given = f"num_bits {bits}, type {kind}, symmetric {symmetric}"
        raise _unsupported(file, what, "num_bits 8, type float, symmetric True", given)
    return arguments


def _strategy(arguments: Mapping[str, Any], file: Path, what: str, known: tuple[str, ...]) -> str:
    # Absent, it follows from the rest: there is no group size here, so it is that of the tensor.
    strategy = arguments.get("strategy") or "tensor"
    if strategy not in known or arguments.get("block_structure"):
        expected = f"{' or '.join(known)}: blocks are not supported"
        given = f"{strategy}, block_structure {arguments.get('block_structure')}"
        raise _unsupported(file, f"{what}' strategy", expected, given)
    return str(strategy)
