"""load_moe_layer: every naming, scheme and layout gives the weights and scales that the files hold."""

from __future__ import annotations

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from sm12x import reference
from sm12x.checkpoint import UNQUANTIZED, Scheme, files, load_moe_layer, make_checkpoint
from unit.checkpoints import (
    EXPERTS,
    PROJECTIONS,
    ROUTER,
    SCHEMES,
    alter,
    alter_config,
    new_seed,
    read_all,
)

E, H, INNER = 4, 48, 32
LAYOUTS = {"single": {}, "stacked": {"stacked": True}, "transposed": {"stacked": True, "transposed": True}}


def make(folder, **options):
    sizes = {"num_experts": E, "hidden_size": H, "intermediate_size": INNER, "top_k": 2, "seed": new_seed()}
    make_checkpoint(folder, **{**sizes, **options})
    return folder


def load(folder, layer=0, **options):
    return load_moe_layer(folder, layer, framework="numpy", **options)


def one(tensors, start, suffixes):
    """The one tensor of these names that there is."""
    (found,) = [tensors[start + suffix] for suffix in suffixes if start + suffix in tensors]
    return found


def matrices(tensors, model, layer, e, layout):
    """[gate, up] and [down] of an expert straight from the files, each with its scales as a column (None: it
    is not quantised) and the scale of its input."""
    start = EXPERTS[model].format(layer)
    static = [name for name in tensors if "input_scale" in name or "activation_scale" in name]
    quantised = any("scale" in name and "router" not in name for name in tensors)
    result = []
    for names in (PROJECTIONS[model][:2], PROJECTIONS[model][2:]):
        if layout != "single":
            names = ["gate_up_proj"] if len(names) == 2 else ["down_proj"]
        found = []
        for name in names:
            if layout == "single":
                where = f"{start}.{e}.{name}"
                weight = tensors[f"{where}.weight"]
                scale = tensors[f"{where}.weight_scale"].astype(np.float32) if quantised else None
                input_scale = tensors[f"{where}.input_scale"] if static else None
            else:
                where = f"{start}.{name}"
                weight = tensors[where][e]
                weight = weight.T if layout == "transposed" else weight
                scale = input_scale = None
                if quantised:
                    scale = one(tensors, where, (".weight_scale", "_scale_inv"))[e].astype(np.float32)
                if static:
                    input_scale = one(tensors, where, (".input_scale", "_activation_scale"))[e]
            if scale is not None:
                scale = np.broadcast_to(scale.reshape(-1, 1), (len(weight), 1))
            found.append((weight, scale, input_scale))
        result.append(found)
    return result


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("model", EXPERTS)
def test_a_layer_is_what_its_files_hold(tmp_path, model, scheme, layout, files):
    make(tmp_path, model=model, scheme=SCHEMES[scheme], layers=3, files=files, **LAYOUTS[layout])
    tensors = read_all(tmp_path)
    layer = load(tmp_path, 1)
    assert (layer.num_experts, layer.top_k, layer.hidden_size, layer.intermediate_size) == (E, 2, H, INNER)
    assert layer.w1.shape == (E, 2 * INNER, H)
    assert layer.w2.shape == (E, H, INNER)
    assert layer.w1.dtype == layer.w2.dtype == ml_dtypes.float8_e4m3fn
    assert layer.w1_scale.dtype == layer.w2_scale.dtype == np.float32
    assert layer.w1_scale.shape == (E, 2 * INNER)
    assert layer.w2_scale.shape == ((E,) if SCHEMES[scheme].weights == "tensor" else (E, H))
    input_scales = {"w1": [], "w2": []}
    for e in range(E):
        for target, parts in zip(("w1", "w2"), matrices(tensors, model, 1, e, layout), strict=True):
            weight = np.concatenate([part[0] for part in parts])
            if parts[0][1] is None:
                (weight,), (scale,) = reference.quantize_per_channel(weight[None])
            else:
                scale = np.concatenate([part[1] for part in parts])
            codes = getattr(layer, target)[e]
            np.testing.assert_array_equal(codes.view(np.uint8), weight.view(np.uint8))
            scales = np.broadcast_to(getattr(layer, f"{target}_scale")[e].reshape(-1, 1), scale.shape)
            np.testing.assert_array_equal(scales, scale)
            np.testing.assert_array_equal(
                codes.astype(np.float64) * scales, weight.astype(np.float64) * scale
            )
            input_scales[target] += [float(part[2].max()) for part in parts if part[2] is not None]
    assert layer.a1_scale == max(input_scales["w1"], default=None)
    assert layer.a2_scale == max(input_scales["w2"], default=None)
    assert (layer.a1_scale is None) == (SCHEMES[scheme].activations == "dynamic")
    assert layer.scheme == SCHEMES[scheme]
    np.testing.assert_array_equal(layer.router.weight, tensors[ROUTER[model].format(1)].astype(np.float32))
    assert layer.router.weight.dtype == np.float32


@pytest.mark.parametrize(
    ("model", "model_type", "activation"),
    [
        ("mixtral", "mixtral", "silu"),
        ("qwen3_moe", "qwen3_moe", "silu"),
        ("gemma4", "gemma4_text", "gelu_tanh"),
    ],
)
def test_activation_and_model_type(tmp_path, model, model_type, activation):
    layer = load(make(tmp_path, model=model))
    assert (layer.model_type, layer.activation, layer.gated, layer.layer) == (model_type, activation, True, 0)


def test_gemmas_router_has_its_scales_and_normalises(tmp_path):
    router = load(make(tmp_path, model="gemma4")).router
    tensors = read_all(tmp_path)
    start = "model.language_model.layers.0.router."
    np.testing.assert_array_equal(router.scale, tensors[start + "scale"].astype(np.float32))
    np.testing.assert_array_equal(
        router.per_expert_scale, tensors[start + "per_expert_scale"].astype(np.float32)
    )
    assert router.norm_eps == 1e-6
    assert router.renormalize


@pytest.mark.parametrize(("said", "expected"), [(True, True), (False, False), (None, False)])
def test_qwens_weights_are_renormalised_as_the_config_says(tmp_path, said, expected):
    make(tmp_path, model="qwen3_moe")
    alter_config(tmp_path, lambda config: config.update(norm_topk_prob=said))
    router = load(tmp_path).router
    assert router.renormalize is expected
    assert (router.scale, router.per_expert_scale, router.norm_eps) == (None, None, None)


def test_mixtrals_weights_are_renormalised(tmp_path):
    assert load(make(tmp_path, model="mixtral")).router.renormalize


def test_a_layer_without_a_routers_weight_has_none(tmp_path):
    make(tmp_path, model="mixtral")
    alter(tmp_path, lambda tensors: tensors.pop(ROUTER["mixtral"].format(0)))
    assert load(tmp_path).router is None


def test_arguments_are_those_of_fused_moe(tmp_path):
    layer = load(make(tmp_path, scheme=SCHEMES["fp8-static"]))
    arguments = layer.arguments()
    assert set(arguments) == {
        *("w1", "w2", "w1_scale", "w2_scale", "a1_scale", "a2_scale"),
        *("activation", "gated", "dtype"),
    }
    assert arguments["w1"] is layer.w1
    assert arguments["a2_scale"] == layer.a2_scale
    assert arguments["dtype"] is None


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_floats_are_quantised_too(tmp_path, dtype):
    layer = load(make(tmp_path, model="mixtral", scheme=UNQUANTIZED, dtype=dtype))
    down = read_all(tmp_path)["model.layers.0.block_sparse_moe.experts.3.w2.weight"]
    assert down.dtype == dtype
    (codes,), (scale,) = reference.quantize_per_channel(down[None])
    np.testing.assert_array_equal(layer.w2[3].view(np.uint8), codes.view(np.uint8))
    np.testing.assert_array_equal(layer.w2_scale[3], scale[:, 0])


def test_quantising_in_pieces_changes_nothing(tmp_path, monkeypatch):
    make(tmp_path, scheme=UNQUANTIZED)
    whole = load(tmp_path)
    monkeypatch.setattr("sm12x.checkpoint.experts._QUANTIZED_AT_A_TIME", 5 * H)  # 64 rows: 12 times 5, and 4
    pieces = load(tmp_path)
    for name in ("w1", "w2", "w1_scale", "w2_scale"):
        np.testing.assert_array_equal(
            getattr(whole, name).view(np.uint8), getattr(pieces, name).view(np.uint8)
        )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", [(64, 32), (32, 32), (32, 16), (16, 32)])
def test_square_stacks_are_not_mistaken_for_transposed_ones(tmp_path, sizes, transposed):
    """H = 2I makes gate_up square, H = INNER makes down so."""
    h, i = sizes
    seed = new_seed()
    common = {"scheme": UNQUANTIZED, "hidden_size": h, "intermediate_size": i, "num_experts": E, "seed": seed}
    make_checkpoint(tmp_path / "single", **common)
    make_checkpoint(tmp_path / "stacked", stacked=True, transposed=transposed, **common)
    single, stacked = load(tmp_path / "single"), load(tmp_path / "stacked")
    np.testing.assert_array_equal(single.w1.view(np.uint8), stacked.w1.view(np.uint8))
    np.testing.assert_array_equal(single.w2.view(np.uint8), stacked.w2.view(np.uint8))


def test_gate_and_up_of_a_stack_may_have_a_scale_each(tmp_path):
    make(tmp_path, scheme=SCHEMES["method-fp8-dynamic"], stacked=True)
    name = "model.language_model.layers.0.experts.gate_up_proj_scale_inv"
    pairs = np.random.default_rng(new_seed()).random((E, 2), np.float32)
    alter(tmp_path, lambda tensors: tensors.update({name: pairs}))
    layer = load(tmp_path)
    np.testing.assert_array_equal(layer.w1_scale[:, :INNER], np.repeat(pairs[:, :1], INNER, axis=1))
    np.testing.assert_array_equal(layer.w1_scale[:, INNER:], np.repeat(pairs[:, 1:], INNER, axis=1))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_scale_may_serve_a_whole_stack(tmp_path, shape):
    make(tmp_path, scheme=SCHEMES["method-fp8-static"], stacked=True)
    start = "model.language_model.layers.0.experts."
    changed = {"gate_up_proj_scale_inv": 0.5, "down_proj_scale_inv": 0.25, "down_proj_activation_scale": 3.0}
    alter(
        tmp_path,
        lambda tensors: tensors.update(
            {start + name: np.full(shape, value, np.float32) for name, value in changed.items()}
        ),
    )
    layer = load(tmp_path)
    assert (layer.w1_scale == 0.5).all()
    assert (layer.w2_scale == 0.25).all()
    assert layer.a2_scale == 3.0


@pytest.mark.parametrize(
    ("model", "old", "new"),
    [
        # transformers writes a text model alone so, and other towers' wrappers otherwise.
        ("gemma4", "model.language_model.layers.", "model.layers."),
        ("gemma4", "model.language_model.layers.", "language_model.model.layers."),
        ("gemma4", ".experts.", ".moe.experts."),
        ("mixtral", "model.layers.", "layers."),
        ("mixtral", "block_sparse_moe.", "mlp."),
        ("qwen3_moe", ".weight_scale", ".weight_scale_inv"),
        ("qwen3_moe", ".input_scale", ".activation_scale"),
        ("mixtral", ".input_scale", ".act_scale"),
    ],
)
def test_other_names_of_the_same(tmp_path, model, old, new):
    make(tmp_path, model=model, scheme=SCHEMES["method-fp8-static"])
    before = load(tmp_path)

    def rename(tensors):
        renamed = {name.replace(old, new): value for name, value in tensors.items()}
        assert set(renamed) != set(tensors)
        tensors.clear()
        tensors.update(renamed)

    alter(tmp_path, rename)
    after = load(tmp_path)
    np.testing.assert_array_equal(before.w1.view(np.uint8), after.w1.view(np.uint8))
    np.testing.assert_array_equal(before.w1_scale, after.w1_scale)
    np.testing.assert_array_equal(before.router.weight, after.router.weight)
    assert (before.a1_scale, before.a2_scale) == (after.a1_scale, after.a2_scale)


def test_stacks_of_gemmas_first_names(tmp_path):
    make(tmp_path, scheme=UNQUANTIZED, stacked=True)
    before = load(tmp_path)

    def rename(tensors):
        for name in list(tensors):
            new = name.replace(".experts.", ".moe.").replace("router.per_expert", "moe.per_expert")
            tensors[new] = tensors.pop(name)

    alter(tmp_path, rename)
    after = load(tmp_path)
    np.testing.assert_array_equal(before.w2.view(np.uint8), after.w2.view(np.uint8))
    np.testing.assert_array_equal(before.router.per_expert_scale, after.router.per_expert_scale)


def test_a_flat_config_of_gemmas_text_model(tmp_path):
    make(tmp_path, model="gemma4")

    def flatten(config):
        text = config.pop("text_config")
        config.update(text)

    alter_config(tmp_path, flatten)
    assert load(tmp_path).model_type == "gemma4_text"


def test_layers_are_told_apart(tmp_path):
    """Layer 1 of 12 is neither layer 10 nor 11."""
    make(tmp_path, model="qwen3_moe", layers=12, num_experts=2)
    first = read_all(tmp_path)["model.layers.1.mlp.experts.0.gate_proj.weight"]
    np.testing.assert_array_equal(load(tmp_path, 1).w1[0, :INNER].view(np.uint8), first.view(np.uint8))


def test_reading_goes_expert_by_expert_and_reads_nothing_twice(tmp_path, monkeypatch):
    """A stack is not read whole, other layers not at all."""
    make(tmp_path, scheme=UNQUANTIZED, stacked=True, layers=3, files=3)
    sizes = []
    fill = files._fill

    def counting(opened, values):
        sizes.append(values.nbytes)
        return fill(opened, values)

    monkeypatch.setattr(files, "_fill", counting)
    load(tmp_path, 2)
    router = 2 * (E * H + H + E)
    assert max(sizes) == 2 * 2 * INNER * H
    assert sum(sizes) == 2 * E * 3 * INNER * H + router


def test_host_memory_holds_one_expert_beside_the_layer(tmp_path):
    experts, h, i = 64, 128, 64
    make(tmp_path, scheme=UNQUANTIZED, stacked=True, num_experts=experts, hidden_size=h, intermediate_size=i)
    load(tmp_path)  # what is imported and compiled on the way
    tracemalloc.start()
    try:
        layer = load(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    kept = sum(array.nbytes for array in (layer.w1, layer.w2, layer.w1_scale, layer.w2_scale))
    gate_up = 2 * 2 * i * h  # in bfloat16; quantised in float32, with three results between
    assert peak - kept < 12 * gate_up + 200_000  # names and headers
    assert 2 * experts * 3 * i * h > 20 * gate_up + 200_000  # a whole layer would not pass


def test_progress_is_told(tmp_path):
    seen = []
    load(make(tmp_path), on_expert=lambda done, total: seen.append((done, total)))
    assert seen == [(1, E), (2, E), (3, E), (4, E)]


def test_the_writer_writes_the_documented_names_and_the_same_bytes_again(tmp_path):
    options = {"scheme": SCHEMES["fp8-static"], "model": "qwen3_moe", "files": 2, "num_experts": 2, "seed": 7}
    for name in ("a", "b"):
        make_checkpoint(tmp_path / name, **options)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    parts = [f"model.layers.0.mlp.experts.{e}.{p}" for e in (0, 1) for p in PROJECTIONS["qwen3_moe"]]
    suffixes = ("weight", "weight_scale", "input_scale")
    expected = {f"{part}.{suffix}" for part in parts for suffix in suffixes}
    assert set(read_all(tmp_path / "a")) == expected | {"model.layers.0.mlp.gate.weight"}
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("model", "llama"),
        ("dtype", "int8"),
        ("top_k", 9),
        ("files", 0),
        ("transposed", True),
        ("scheme", Scheme("fp8", "channel")),
    ],
)
def test_the_writer_names_a_bad_argument(tmp_path, argument, value):
    with pytest.raises(ValueError, match=f"{argument}: expected"):
        make_checkpoint(tmp_path / "new", **{argument: value})
    assert not (tmp_path / "new").exists()


def test_the_writer_leaves_no_files_of_another_model_beside_its_own(tmp_path):
    make(tmp_path, files=2)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match="path: expected a directory without a model, got .* with config.json"
    ):
        make(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
