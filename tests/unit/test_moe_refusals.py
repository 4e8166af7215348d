"""Addresses and devices that calls of expert layers refuse, on a fake driver."""

from __future__ import annotations

import pytest

from unit.fake_driver import install
from unit.layer_cases import (
    CALL,
    INNER,
    STREAM,
    E,
    H,
    T,
    make,
    nothing_happened,
    run,
    run_function,
    tokens,
    weights,
)


@pytest.fixture
def fake(monkeypatch, layer_root):
    fake = install(monkeypatch, layer_root)
    fake.streams[0] = STREAM
    return fake


def moved(tensor, by):
    tensor.address += by
    return tensor


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    ("name", "by", "multiple"),
    [("x", 8, 16), ("out", 8, 16), ("topk_weights", 2, 4), ("topk_ids", 2, 4), ("wide topk_ids", 4, 8)],
)
def test_misaligned_and_null_addresses_name_the_argument(fake, name, by, multiple, warm):
    layer = make(weights(fake))
    ids = "int64" if name.startswith("wide ") else "int32"
    name = name.removeprefix("wide ")
    if warm:
        run(layer, tokens(fake, ids=ids))
        fake.launches.clear()
    call = tokens(fake, ids=ids)
    words = f"^{name}: expected an address that is a multiple of {multiple} bytes"
    with pytest.raises(ValueError, match=words):
        run(layer, {**call, name: moved(call[name], by)})
    assert nothing_happened(fake)
    call = tokens(fake, ids=ids)
    call[name].address = 0
    with pytest.raises(ValueError, match=f"^{name}: expected an array that has memory, got address 0"):
        run(layer, call)
    assert nothing_happened(fake)
    run(layer, tokens(fake, ids=ids))


def test_addresses_that_are_aligned_just_enough(fake):
    layer = make(weights(fake))
    for ids, by in (("int32", 4), ("int64", 8)):
        call = tokens(fake, ids=ids)
        moved(call["topk_ids"], by)
        moved(call["topk_weights"], 4)
        run(layer, call)


@pytest.mark.parametrize("kind", ["object", "function"])
@pytest.mark.parametrize(
    ("name", "multiple"),
    [
        *[("w1", 16), ("w2", 16), ("w1_scale", 4), ("w2_scale", 4), ("a1_scale", 4), ("a2_scale", 4)],
        *[("expert_map", 4), ("bias1", 4), ("bias2", 2)],
    ],
)
def test_misaligned_and_null_addresses_of_the_layer(fake, name, multiple, kind):
    def given():
        t = fake.tensor
        return weights(
            fake,
            w1_scale=t((E,), "float32"),
            w2_scale=t((E, H), "float32"),
            a1_scale=t((1,), "float32"),
            a2_scale=t((1,), "float32"),
            expert_map=t((2 * E,), "int32"),
            bias1=t((E, 2 * INNER), "float32"),
            bias2=t((E, H), "bfloat16"),
        )

    def use(layer):
        if kind == "object":
            make(layer)
        else:
            run_function(layer, tokens(fake))

    layer = given()
    moved(layer[name], multiple)
    use(layer)
    fake.launches.clear()
    layer = given()
    moved(layer[name], multiple // 2)
    words = f"^{name}: expected an address that is a multiple of {multiple} bytes"
    with pytest.raises(ValueError, match=words):
        use(layer)
    layer = given()
    layer[name].address = 0
    with pytest.raises(ValueError, match=f"^{name}: expected an array that has memory, got address 0"):
        use(layer)
    assert nothing_happened(fake)


@pytest.mark.parametrize("name", ["x", "w1", "w2"])
def test_out_that_overlaps_what_is_read(fake, name):
    given = weights(fake)
    call = tokens(fake)
    layer = make(given)
    read = {**given, **call}[name]
    end = read.address + (T * H * 2 if name == "x" else read.extents[0] * read.steps[0])
    for address in (read.address, end - 16, read.address - T * H * 2 + 16):
        out = fake.tensor((T, H), "bfloat16")
        out.address = address
        with pytest.raises(ValueError, match=f"^out: expected memory of its own, .* overlaps {name}"):
            run(layer, {**call, "out": out})
    assert nothing_happened(fake)
    for address in (end, read.address - T * H * 2):  # behind each other without a gap
        out = fake.tensor((T, H), "bfloat16")
        out.address = address
        run(layer, {**call, "out": out})


def test_out_in_the_gaps_between_the_rows_of_x(fake):
    x = fake.tensor((T, H), "bfloat16", strides=(2 * H, 1))
    out = fake.tensor((T, H), "bfloat16", strides=(2 * H, 1))
    out.address = x.address + 2 * H
    run(make(weights(fake)), tokens(fake, x=x, out=out))
    assert len(fake.launches) == 4


@pytest.mark.parametrize("name", [*CALL, "out"])
@pytest.mark.parametrize("device", [1, -1])
def test_arrays_of_another_device(fake, name, device):
    layer, call = make(weights(fake)), tokens(fake)
    call[name] = fake.tensor(call[name].shape, call[name].dtype.name, device)
    with pytest.raises(ValueError, match=r"^(x|out|topk_\w+): expected memory of (a )?CUDA device"):
        run(layer, call)
    assert nothing_happened(fake)


def test_tokens_of_another_device_than_the_weights(fake):
    layer = make(weights(fake))
    call = {name: fake.tensor(x.shape, x.dtype.name, 1) for name, x in tokens(fake).items()}
    words = "^x: expected memory of CUDA device 0, where w1 is, got 1"
    with pytest.raises(ValueError, match=words):
        run(layer, call)
    given = weights(fake, w1_scale=fake.tensor((E,), "float32", 1))
    with pytest.raises(ValueError, match="^w1_scale: expected memory of CUDA device 0 like w1, got device 1"):
        make(given)
    assert nothing_happened(fake)


def test_no_tokens_are_no_launch(fake):
    layer = make(weights(fake))
    call = tokens(fake, 0)
    for each in call.values():
        each.address = 0
    assert run(layer, call) is call["out"]
    del call["out"]
    assert run(layer, call).shape == (0, H)
    assert nothing_happened(fake)
    assert fake.kept == {}
