"""Packed calls on torch tensors that look like one before: what is skipped, and what never is."""

from __future__ import annotations

import pytest

import sm12x
from sm12x.ops import grouped_gemm as module
from unit.fake_driver import install
from unit.gemm_cases import STREAM, E, K, M, N, operands


@pytest.fixture
def fake(monkeypatch, tmp_path):
    fake = install(monkeypatch, tmp_path)
    fake.streams[0] = STREAM
    return fake


def complete(fake, **more):
    """A call with everything given, on fresh tensors."""
    t = fake.tensor
    return {
        **operands(fake),
        "a_scale": t((M,), "float32"),
        "b_scale": t((E, N), "float32"),
        "workspace": t((sm12x.workspace_size(E),), "uint8"),
        **more,
    }


@pytest.fixture
def remembered(fake, monkeypatch):
    """A fake whose first call was made; taking an array in the long way fails from here on."""
    sm12x.grouped_gemm(**complete(fake))
    fake.launches.clear()

    def long_way(obj, name, stream):
        raise AssertionError(f"{name} was taken in")

    monkeypatch.setattr(module, "ingest", long_way)
    return fake


def test_a_call_like_one_before_launches_with_the_new_addresses(remembered):
    args = complete(remembered)
    remembered.streams[0] = STREAM + 64
    assert sm12x.grouped_gemm(**args) is args["out"]
    prepare, gemm = remembered.launches
    assert (prepare.stream, gemm.stream) == (STREAM + 64, STREAM + 64)
    p, g = prepare.params, gemm.params
    assert (p.a, p.b, p.d) == tuple(args[name].address for name in ("a", "b", "out"))
    assert (p.a_scale, p.b_scale, p.offsets) == tuple(
        args[name].address for name in ("a_scale", "b_scale", "offsets")
    )
    base = (args["workspace"].address + 255) // 256 * 256
    assert g.tensor_maps == base
    assert g.group_arrays == p.group_arrays > base
    assert remembered.allocated == {}


@pytest.mark.parametrize(
    "changed",
    [
        {"a": ((M + 1, K), "float8_e4m3fn")},
        {"a": ((M, K), "float8_e5m2")},
        {"b": ((E, N, K), "float8_e4m3fn", 0, (2 * N * K, K, 1))},
        {"a_scale": ((M, 1), "float32")},
        {"b_scale": ((E, N), "float16")},
        {"offsets": ((E + 1,), "int64")},
        {"offsets": ((E + 1,), "int32", -1)},
        {"out": ((M, N), "float16")},
        {"workspace": ((64,), "uint8")},
        {"a": ((M, K), "float8_e4m3fn", 1)},
    ],
    ids=lambda changed: f"{next(iter(changed))}-{next(iter(changed.values()))}",
)
def test_a_call_that_differs_in_anything_but_addresses_is_looked_at_in_full(remembered, changed):
    tensors = {name: remembered.tensor(*spec) for name, spec in changed.items()}
    with pytest.raises(AssertionError, match="was taken in"):
        sm12x.grouped_gemm(**complete(remembered, **tensors))
    assert remembered.launches == []


@pytest.mark.parametrize(
    "changed", [{"variant": "no such"}, {"dtype": "float8_e5m2"}, {"out_dtype": "float16"}]
)
def test_other_options_are_another_call(remembered, changed):
    with pytest.raises(AssertionError, match="was taken in"):
        sm12x.grouped_gemm(**complete(remembered), **changed)


def test_a_lazily_negated_scale_is_not_mistaken_for_a_plain_one(remembered):
    args = complete(remembered)
    args["a_scale"].is_neg = lambda: True
    with pytest.raises(AssertionError, match="was taken in"):
        sm12x.grouped_gemm(**args)


@pytest.mark.parametrize("name", ["a", "b", "out", "offsets", "a_scale", "b_scale"])
def test_a_misaligned_address_is_refused_in_a_remembered_call_too(fake, name):
    sm12x.grouped_gemm(**complete(fake))
    fake.launches.clear()
    args = complete(fake)
    args[name].address += 2
    with pytest.raises(ValueError, match=f"^{name}: "):
        sm12x.grouped_gemm(**args)
    assert fake.launches == []


def test_an_overlap_is_refused_in_a_remembered_call_too(fake):
    sm12x.grouped_gemm(**complete(fake))
    fake.launches.clear()
    args = complete(fake)
    args["out"].address = args["a"].address
    with pytest.raises(ValueError, match="^out: "):
        sm12x.grouped_gemm(**args)
    assert fake.launches == []


def test_weights_that_are_parameters_are_remembered_too(fake, monkeypatch):
    class Parameter(type(fake.tensor((1,), "uint8"))):
        __module__ = "torch.nn.parameter"

    def call():
        args = complete(fake)
        args["b"].__class__ = args["b_scale"].__class__ = Parameter
        return args

    sm12x.grouped_gemm(**call())
    fake.launches.clear()
    monkeypatch.setattr(module, "ingest", None)
    args = call()
    sm12x.grouped_gemm(**args)
    assert fake.launches[0].params.b == args["b"].address


def test_a_subclass_or_another_type_among_the_arrays_takes_the_long_way(remembered):
    class Other:
        pass

    for name in ("a", "b_scale", "offsets", "workspace"):
        with pytest.raises((AssertionError, TypeError)):
            sm12x.grouped_gemm(**complete(remembered, **{name: Other()}))
    assert remembered.launches == []


def test_a_tensor_without_memory_is_named_in_a_remembered_call_too(fake):
    sm12x.grouped_gemm(**complete(fake))
    fake.launches.clear()
    args = complete(fake)

    def no_storage():  # what the tensors of torch.vmap do, whose type is torch.Tensor
        raise RuntimeError("Cannot access data pointer of Tensor that doesn't have storage")

    args["b"].data_ptr = no_storage
    with pytest.raises(TypeError, match=r"^b: .*doesn't have storage"):
        sm12x.grouped_gemm(**args)
    assert fake.launches == []
