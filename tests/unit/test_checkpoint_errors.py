"""What load_moe_layer says of checkpoints that it cannot use: file, tensor, what was expected and given."""

from __future__ import annotations

import json
import sys

import ml_dtypes
import numpy as np
import pytest

import sm12x
from sm12x.checkpoint import UNQUANTIZED, load_moe_layer, make_checkpoint
from unit.checkpoints import SCHEMES, alter, alter_config, new_seed

GATE = "model.layers.0.mlp.experts.2.gate_proj"
STACK = "model.language_model.layers.0.experts."


def load(folder, layer=0):
    return load_moe_layer(folder, layer, framework="numpy")


def refusal(folder, layer=0):
    with pytest.raises(sm12x.CheckpointError) as caught:
        load(folder, layer)
    error = caught.value
    assert isinstance(error, ValueError)
    assert f"expected {error.expected}, got {error.given}" in str(error)
    assert error.file in str(error)
    return error


@pytest.fixture
def qwen(tmp_path):
    make_checkpoint(
        tmp_path, model="qwen3_moe", scheme=SCHEMES["fp8-static"], num_experts=4, files=2, seed=new_seed()
    )
    return tmp_path


@pytest.fixture
def gemma(tmp_path):
    make_checkpoint(tmp_path, num_experts=4, stacked=True, scheme=UNQUANTIZED, seed=new_seed())
    return tmp_path


@pytest.mark.parametrize("suffix", ["weight", "weight_scale", "input_scale"])
def test_a_missing_tensor_is_named(qwen, suffix):
    name = f"{GATE}.{suffix}"
    alter(qwen, lambda tensors: tensors.pop(name, None))
    index = qwen / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    file = listed["weight_map"].pop(name)
    error = refusal(qwen)  # the index has it, the file has not
    assert (error.tensor, error.file) == (name, str(qwen / file))
    index.write_text(json.dumps(listed))
    error = refusal(qwen)  # neither has
    assert (error.tensor, error.file) == (name, str(index))
    assert "(there is model.layers.0.mlp.experts.2.gate_proj." in error.given


@pytest.mark.parametrize(
    ("suffix", "value", "expected"),
    [
        ("weight", np.zeros((32, 48), ml_dtypes.float8_e4m3fn), "shape (32, 64)"),
        ("weight", np.zeros((64, 32), ml_dtypes.float8_e4m3fn), "shape (32, 64)"),
        ("weight", np.zeros((32, 64), ml_dtypes.bfloat16), "float8_e4m3fn, because the experts are"),
        ("weight", np.zeros((32, 64), ml_dtypes.float8_e5m2), "float8_e4m3fn, because the experts are"),
        ("weight_scale", np.zeros((32, 1), np.float32), "of shape () or (1,) or (1, 1)"),
        ("weight_scale", np.zeros(1, np.int32), "bfloat16 or float16 or float32 of shape ()"),
        ("input_scale", np.zeros(2, np.float32), "of shape () or (1,) or (1, 1)"),
    ],
)
def test_a_misshapen_tensor_is_named_with_what_it_is(qwen, suffix, value, expected):
    name = f"{GATE}.{suffix}"
    alter(qwen, lambda tensors: name in tensors and tensors.update({name: value}))
    error = refusal(qwen)
    assert error.tensor == name
    assert expected in error.expected
    assert error.given == f"{value.dtype} {value.shape}"


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_a_static_scale_must_divide(qwen, value):
    name = f"{GATE}.input_scale"
    alter(qwen, lambda tensors: name in tensors and tensors.update({name: np.array([value], np.float32)}))
    error = refusal(qwen)
    assert (error.tensor, error.expected) == (name, "a finite scale above 0")


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("gate_up_proj", (4, 64, 40), "shape (4, 64, 48), or (4, 48, 64) where both"),
        ("down_proj", (3, 48, 32), "shape (4, 48, 32), or (4, 32, 48) where both"),
        # Transposed, but the other one is not:
        ("gate_up_proj", (4, 48, 64), "shape (4, 64, 48), or (4, 48, 64) where both"),
        ("down_proj", (4, 32, 48), "shape (4, 48, 32), or (4, 32, 48) where both"),
    ],
)
def test_a_misshapen_stack_is_named(tmp_path, name, shape, expected):
    make_checkpoint(
        tmp_path, num_experts=4, stacked=True, scheme=UNQUANTIZED, hidden_size=48, seed=new_seed()
    )
    alter(tmp_path, lambda tensors: tensors.update({STACK + name: np.zeros(shape, ml_dtypes.bfloat16)}))
    error = refusal(tmp_path)
    assert error.tensor == STACK + name
    assert error.expected.startswith(expected)
    assert error.given == f"bfloat16 {shape}"


def test_a_scale_of_a_stack_with_the_wrong_number_of_experts(tmp_path):
    make_checkpoint(tmp_path, num_experts=4, stacked=True, seed=new_seed())
    name = f"{STACK}down_proj.weight_scale"
    alter(tmp_path, lambda tensors: tensors.update({name: np.ones((3, 64, 1), np.float32)}))
    error = refusal(tmp_path)
    assert error.tensor == name
    assert error.expected.endswith("of shape (4, 64, 1) or (4, 64)")


def test_a_routers_tensor_that_is_missing_or_misshapen(gemma):
    name = "model.language_model.layers.0.router.scale"
    alter(gemma, lambda tensors: tensors.update({name: np.ones(63, np.float32)}))
    assert refusal(gemma).tensor == name
    alter(gemma, lambda tensors: tensors.pop(name))
    assert refusal(gemma).tensor == name


@pytest.mark.parametrize("stacked", [False, True])
def test_experts_with_a_bias_are_refused(tmp_path, stacked):
    make_checkpoint(tmp_path, stacked=stacked, seed=new_seed())
    name = STACK + ("down_proj_bias" if stacked else "3.up_proj.bias")
    alter(tmp_path, lambda tensors: tensors.update({name: np.ones(4, np.float32)}))
    error = refusal(tmp_path)
    assert (error.tensor, error.expected) == (name, "experts without a bias")


def test_more_experts_than_the_config_says(qwen):
    alter_config(qwen, lambda config: config.update(num_experts=3))
    error = refusal(qwen)
    assert error.tensor == "model.layers.0.mlp.experts.3.gate_proj.weight"
    assert "3 experts" in error.expected


def test_a_layer_without_experts_among_the_names(qwen):
    alter_config(qwen, lambda config: config.update(num_hidden_layers=2))
    error = refusal(qwen, 1)
    assert error.tensor == "model.layers.1.mlp.experts.0.gate_proj.weight"


def test_a_layer_out_of_range(qwen):
    error = refusal(qwen, 1)
    assert error.file == str(qwen / "config.json")
    assert (error.expected, error.given) == ("a layer from 0 to 0", "layer 1")


def test_block_scales_are_refused(qwen):
    blocks = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    alter_config(qwen, lambda config: config.update(quantization_config=blocks))
    error = refusal(qwen)
    assert "blocks are not supported" in error.expected
    assert error.given == "[128, 128]"


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"mlp_only_layers": [0]}, "mlp_only_layers [0]"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
        ({"num_experts": 0}, "num_experts 0"),
    ],
)
def test_a_dense_layer(qwen, entries, reason):
    alter_config(qwen, lambda config: config.update(entries))
    assert refusal(qwen).given == f"layer 0, which is dense: {reason}"


@pytest.mark.parametrize("said", [False, None])
def test_a_dense_gemma(gemma, said):
    alter_config(gemma, lambda config: config["text_config"].update(enable_moe_block=said))
    assert "layer 0, which is dense: enable_moe_block" in refusal(gemma).given


def test_an_unknown_model_type(qwen):
    alter_config(qwen, lambda config: config.update(model_type="llama"))
    error = refusal(qwen)
    assert error.expected == "a model_type among mixtral, qwen3_moe, gemma4, gemma4_text"
    assert error.given == "'llama'"


@pytest.mark.parametrize(
    ("entry", "value", "expected"),
    [
        ("hidden_size", None, "an entry hidden_size"),
        ("hidden_size", "64", "hidden_size of at least 1"),
        ("num_experts", -1, "num_experts of at least 1"),
        ("moe_intermediate_size", True, "moe_intermediate_size of at least 1"),
        ("num_experts_per_tok", 5, "num_experts_per_tok of at most 4 experts"),
        ("hidden_act", "tanh", "hidden_act among silu, swish, gelu"),
        ("hidden_act", ["silu"], "hidden_act among silu, swish, gelu"),
    ],
)
def test_an_entry_of_the_config_that_is_of_no_use(qwen, entry, value, expected):
    alter_config(qwen, lambda config: config.update({entry: value}))
    assert refusal(qwen).expected.startswith(expected)


def test_no_directory_no_config_no_files(tmp_path, qwen):
    assert refusal(tmp_path / "none").expected == "a directory with config.json and safetensors files"
    (qwen / "model.safetensors.index.json").unlink()
    error = refusal(qwen)
    assert error.expected == "model.safetensors.index.json or model.safetensors"
    assert "model-00001-of-00002.safetensors" in error.given
    (qwen / "config.json").unlink()
    assert refusal(qwen).file == str(qwen / "config.json")


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_config_that_is_no_json_object(qwen, text):
    (qwen / "config.json").write_text(text, encoding="latin-1")
    assert refusal(qwen).expected in ("JSON", "a JSON object")


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, {"a": "../other.safetensors"}])
def test_an_index_that_names_no_files_beside_it(qwen, weight_map):
    index = qwen / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    error = refusal(qwen)
    assert error.file == str(index)
    assert "weight_map" in error.expected


def test_a_file_that_is_missing_or_cut_short(qwen):
    file = qwen / "model-00002-of-00002.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert (refusal(qwen).file, refusal(qwen).expected) == (str(file), "a whole safetensors file")
    file.write_bytes(b"\xff" * 100)
    assert refusal(qwen).file == str(file)
    file.unlink()
    assert refusal(qwen).file == str(file)


def test_nothing_is_loaded_before_all_is_checked(qwen, monkeypatch):
    """The last expert's last scale is missing: no weight was read."""
    index = qwen / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    del listed["weight_map"]["model.layers.0.mlp.experts.3.down_proj.input_scale"]
    index.write_text(json.dumps(listed))
    monkeypatch.setattr("sm12x.checkpoint.layer.read_matrix", lambda matrix: pytest.fail("read"))
    refusal(qwen)


def test_bad_arguments_are_named(qwen):
    for layer in ("0", 0.0, True):
        with pytest.raises(TypeError, match="layer: expected an int"):
            load(qwen, layer)
    with pytest.raises(ValueError, match="layer: expected at least 0, got -1"):
        load(qwen, -1)
    with pytest.raises(ValueError, match="framework: expected None or one of torch, cupy, numpy, sm12x"):
        load_moe_layer(qwen, 0, framework="jax")


def test_without_safetensors_the_error_says_what_to_install(qwen, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        load(qwen)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        make_checkpoint(qwen / "new")
