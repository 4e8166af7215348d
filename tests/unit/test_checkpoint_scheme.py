"""quantization_config: which scheme it gives an expert's matrix, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from sm12x.checkpoint.scheme import FP8_DYNAMIC, FP8_STATIC, UNQUANTIZED, Scheme, read_scheme
from sm12x.errors import CheckpointError

FILE = Path("config.json")
MODULE = "model.layers.3.mlp.experts.0.gate_proj"


def arguments(strategy, dynamic, **others):
    return {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": strategy,
        "dynamic": dynamic,
        **others,
    }


def group(weights="channel", activations="token", dynamic=True, targets=("Linear",)):
    return {
        "targets": list(targets),
        "weights": arguments(weights, False),
        "input_activations": arguments(activations, dynamic),
    }


def compressed(*groups, **others):
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {f"group_{i}": each for i, each in enumerate(groups)},
            "ignore": ["lm_head"],
            **others,
        }
    }


def fp8(**entries):
    return {"quantization_config": {"quant_method": "fp8", **entries}}


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        ({}, UNQUANTIZED),
        ({"quantization_config": None}, UNQUANTIZED),
        (compressed(group()), FP8_DYNAMIC),
        (compressed(group("tensor", "tensor", False)), FP8_STATIC),
        (compressed(group("tensor", "tensor", True)), Scheme("compressed-tensors", "tensor", "dynamic")),
        (compressed(group("channel", "tensor", False)), Scheme("compressed-tensors", "channel", "static")),
        (compressed(group(None, "token")), Scheme("compressed-tensors", "tensor", "dynamic")),
        (fp8(activation_scheme="static"), Scheme("fp8", "tensor", "static")),
        (fp8(activation_scheme="dynamic", weight_block_size=None), Scheme("fp8", "tensor", "dynamic")),
        (fp8(fmt="e4m3"), Scheme("fp8", "tensor", "dynamic")),
    ],
)
def test_known_schemes(config, scheme):
    assert read_scheme(config, FILE, [MODULE]) == scheme


def test_where_a_config_may_have_it():
    found = compressed(group())["quantization_config"]
    assert read_scheme({"text_config": {"quantization_config": found}}, FILE, [MODULE]) == FP8_DYNAMIC
    assert read_scheme({"compression_config": found}, FILE, [MODULE]) == FP8_DYNAMIC


@pytest.mark.parametrize(
    ("ignored", "is_ignored"),
    [
        (MODULE, True),
        ("re:.*experts.*", True),
        ("re:.*mlp\\.gate$", False),
        ("re:.*gate$", False),
        ("re:experts", False),  # a pattern is matched from the start of the name on
        ("model.layers.3.mlp.experts.0", False),
        ("model.layers.3.mlp.experts.0.gate", False),
        ("Linear", False),
    ],
)
def test_what_compressed_tensors_ignores(ignored, is_ignored):
    config = compressed(group(), ignore=["lm_head", ignored])
    assert (read_scheme(config, FILE, [MODULE]) == UNQUANTIZED) is is_ignored


@pytest.mark.parametrize("key", ["ignored_layers", "modules_to_not_convert"])
@pytest.mark.parametrize(
    ("ignored", "is_ignored"),
    [
        (MODULE, True),
        ("model.layers.3.mlp.experts", True),
        ("model.layers.3.mlp", True),
        ("gate_proj", True),
        ("re:.*experts.*", True),
        ("model.layers.3.mlp.experts.0.gate", False),
        ("model.layers.3.mlp.gate", False),
        ("gate", False),
        ("model.layers.30", False),
    ],
)
def test_what_method_fp8_ignores(key, ignored, is_ignored):
    assert (read_scheme(fp8(**{key: ["lm_head", ignored]}), FILE, [MODULE]) == UNQUANTIZED) is is_ignored


def test_a_name_goes_before_a_pattern_and_that_before_the_class():
    named = group("tensor", targets=(MODULE,))
    pattern = group("channel", targets=("re:.*experts.*",))
    everything = group("channel", "tensor", False)
    by_name = Scheme("compressed-tensors", "tensor", "dynamic")
    assert read_scheme(compressed(everything, pattern, named), FILE, [MODULE]) == by_name
    assert read_scheme(compressed(everything, pattern), FILE, [MODULE]) == FP8_DYNAMIC
    other = group(targets=("re:.*self_attn.*",))
    assert read_scheme(compressed(other), FILE, [MODULE]) == UNQUANTIZED


def test_a_groups_own_format_counts():
    int4 = {**group(targets=("re:.*self_attn.*",)), "format": "pack-quantized"}
    ours = {**group(), "format": "float-quantized"}
    assert read_scheme(compressed(int4, ours, format="mixed-precision"), FILE, [MODULE]) == FP8_DYNAMIC


def changed(part, **entries):
    made = group()
    made[part] = {**made[part], **entries}
    return compressed(made)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"quantization_config": {"quant_method": "gptq"}},
            'quant_method "compressed-tensors" or "fp8", got',
        ),
        (fp8(weight_block_size=[128, 128]), "blocks are not supported, got [128, 128]"),
        (fp8(fmt="e5m2"), 'fmt "e4m3", got e5m2'),
        (fp8(activation_scheme="none"), "activation_scheme"),
        (compressed(group(), format="pack-quantized"), 'format "float-quantized", got pack-quantized'),
        (compressed({**group(), "format": "int-quantized"}, format="mixed-precision"), "got int-quantized"),
        (
            changed("weights", strategy="block"),
            "weights' strategy channel or tensor: blocks are not supported",
        ),
        (changed("weights", block_structure="128x128"), "blocks are not supported"),
        (changed("weights", num_bits=4), "got num_bits 4, type float, symmetric True"),
        (changed("weights", type="int"), "got num_bits 8, type int"),
        (changed("weights", symmetric=False), "symmetric False"),
        (changed("weights", dynamic=True), "weights' dynamic false"),
        (changed("input_activations", strategy="group"), "input_activations' strategy"),
        (changed("input_activations", strategy="token", dynamic=False), "input_activations' strategy tensor"),
        (changed("input_activations", dynamic="local"), "dynamic true or false, got local"),
        (compressed({**group(), "input_activations": None}), "input_activations of 8-bit floats, got None"),
    ],
)
def test_what_is_refused_is_named(config, words):
    with pytest.raises(CheckpointError) as caught:
        read_scheme(config, FILE, [MODULE])
    assert words in str(caught.value)
    assert str(caught.value).startswith("config.json: expected ")


def test_experts_with_different_schemes_are_refused():
    down = MODULE.replace("gate", "down")
    config = compressed(group(), ignore=["re:.*down_proj"])
    with pytest.raises(CheckpointError, match="one scheme for all experts of a layer") as caught:
        read_scheme(config, FILE, [MODULE, down])
    assert f"{down}: not quantised" in str(caught.value)
