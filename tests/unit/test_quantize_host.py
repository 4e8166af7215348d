"""`quantize_fp8` on a fake driver: what it launches, with which parameters, and what it refuses."""

from __future__ import annotations

import pytest

import sm12x
from sm12x import abi, outputs
from sm12x.errors import CudaError
from unit.fake_driver import CONTEXT, install
from unit.fake_jax import ArrayImpl, install_jax
from unit.layer_params import facts

T, K = 5, 96
STREAM = 0x7F12_3456_7890


@pytest.fixture
def fake(monkeypatch, layer_root):
    fake = install(monkeypatch, layer_root)
    fake.streams[0] = STREAM
    return fake


def expected(x, q, scale, mode, **more):
    """All of sm12x_quantize_params."""
    return {
        "x": x.address,
        "q": q.address,
        "scale": 0 if scale is None else scale.address,
        "source": 0,
        "weight": 0,
        "row_count": 0,
        "rows": x.extents[0],
        "stride_x": x.steps[0],
        "stride_q": q.steps[0],
        "k": x.extents[1],
        "x_type": abi.OUT_TYPES[x.dtype.name],
        "mode": getattr(abi, f"SM12X_QUANTIZE_{mode}"),
        "count": 0,
        "static_scale": 1.0,
        "padding": 0,
        **more,
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_one_scale_for_each_row_is_one_launch(fake, dtype):
    x = fake.tensor((T, K), dtype, strides=(2 * K, 1))
    q, scale = sm12x.quantize_fp8(x)
    (launched,) = fake.launches
    assert (launched.symbol, launched.grid, launched.block) == ("sm12x_quantize_fp8", (T, 1, 1), (256, 1, 1))
    assert (launched.stream, launched.context, launched.programmatic) == (STREAM, CONTEXT, True)
    assert facts(launched.params) == expected(x, q, scale, "ROWS")
    assert (q.shape, q.dtype.name, scale.shape, scale.dtype.name) == (
        *((T, K), "float8_e4m3fn"),
        *((T, 1), "float32"),
    )
    assert fake.allocated == fake.kept == {}
    assert fake.context == 0


@pytest.mark.parametrize("shape", [(T, 1), (T,)])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "uint8"])
def test_results_of_the_callers(fake, shape, dtype):
    x, scale = fake.tensor((T, K), "bfloat16"), fake.tensor(shape, "float32")
    out = fake.tensor((T, K), dtype, strides=(K + 16, 1))
    made = sm12x.quantize_fp8(x, out=out, out_scale=scale)
    assert made[0] is out
    assert made[1] is scale
    assert facts(fake.launches[0].params) == expected(x, out, scale, "ROWS")


@pytest.mark.parametrize(("count", "ctas"), [(T, T), (340, 340), (341, 340), (0, 1)])
@pytest.mark.parametrize("given", [False, True])
def test_one_scale_for_all_is_a_maximum_first(fake, count, ctas, given):
    x = fake.tensor((count, K), "float16")
    out_scale = fake.tensor((1,), "float32") if given else None
    q, scale = sm12x.quantize_fp8(x, per_token=False, out_scale=out_scale)
    assert (scale is out_scale) is given
    assert scale.shape == (1,)
    (address,) = fake.allocated
    assert fake.allocated[address] == 4 * ctas
    assert [entry[0] for entry in fake.log] == ["alloc", "launch", "launch", "free"]
    assert {entry[-1] for entry in fake.log} == {STREAM}
    largest, launched = fake.launches
    assert (largest.symbol, largest.grid) == ("sm12x_quantize_fp8_maxima", (ctas, 1, 1))
    kind = abi.OUT_TYPES["float16"]
    assert facts(largest.params) == {
        **{"x": x.address, "maxima": address, "rows": count},
        **{"stride_x": K, "k": K, "x_type": kind},
    }
    assert launched.grid == (max(1, count), 1, 1)
    assert facts(launched.params) == expected(x, q, scale, "TENSOR", source=address, count=ctas)


def test_a_static_scale_that_is_a_number(fake):
    x = fake.tensor((T, K), "bfloat16")
    q, scale = sm12x.quantize_fp8(x, scale=0.25, per_token=False)
    (launched,) = fake.launches
    assert facts(launched.params) == expected(x, q, scale, "STATIC", static_scale=0.25)
    assert (scale.shape, scale.dtype.name) == ((1,), "float32")


@pytest.mark.parametrize("shape", [(1,), (), (1, 1)])
def test_a_static_scale_that_is_an_array_is_given_back(fake, shape):
    x, given = fake.tensor((T, K), "bfloat16"), fake.tensor(shape, "float32")
    q, scale = sm12x.quantize_fp8(x, scale=given)
    assert scale is given
    assert facts(fake.launches[0].params) == expected(x, q, None, "STATIC", source=given.address)


def test_no_rows_are_no_launch_where_each_has_its_scale(fake):
    x = fake.tensor((0, K), "bfloat16")
    x.address = 0
    q, scale = sm12x.quantize_fp8(x)
    assert (q.shape, scale.shape, fake.launches) == ((0, K), (0, 1), [])
    # A number is still made an array.
    _, scale = sm12x.quantize_fp8(x, scale=0.5)
    (launched,) = fake.launches
    assert (launched.grid, launched.params.scale) == ((1, 1, 1), scale.address)


def test_the_stream_is_that_of_outs_framework_or_the_callers(fake):
    fake.streams[1] = STREAM + 16
    sm12x.quantize_fp8(fake.tensor((T, K), "bfloat16", 1))
    arguments = call(fake, static=False)
    sm12x.quantize_fp8(arguments.pop("x"), **arguments, stream=STREAM + 32)
    x, out = ArrayImpl(fake, (T, K), "bfloat16"), fake.tensor((T, K), "uint8")
    sm12x.quantize_fp8(x, out=out, out_scale=fake.tensor((T,), "float32"))
    assert [x.stream for x in fake.launches] == [STREAM + 16, STREAM + 32, STREAM]
    assert [x.context for x in fake.launches] == [CONTEXT + 1, CONTEXT, CONTEXT]


def call(fake, static):
    t = fake.tensor
    given = {"x": t((T, K), "bfloat16"), "out": t((T, K), "uint8")}
    return {**given, **({"scale": t((1,), "float32")} if static else {"out_scale": t((T,), "float32")})}


@pytest.mark.parametrize(
    ("name", "by", "multiple"), [("x", 8, 16), ("out", 8, 16), ("scale", 2, 4), ("out_scale", 2, 4)]
)
def test_bad_addresses_name_the_argument(fake, name, by, multiple):
    for wrong, words in ((by, f"a multiple of {multiple} bytes"), (None, "has memory, got address 0")):
        arguments = call(fake, name == "scale")
        array = arguments[name]
        array.address = 0 if wrong is None else array.address + wrong
        with pytest.raises(ValueError, match=f"^{name}: expected .*{words}"):
            sm12x.quantize_fp8(arguments.pop("x"), **arguments)
    assert fake.launches == []


@pytest.mark.parametrize("name", ["x", "out", "scale", "out_scale"])
@pytest.mark.parametrize("device", [1, -1])
def test_arrays_of_another_device(fake, name, device):
    arguments = call(fake, name == "scale")
    array = arguments[name]
    arguments[name] = fake.tensor(array.shape, array.dtype.name, device)
    with pytest.raises(ValueError, match=r"^(x|out|scale|out_scale): expected memory of (a )?CUDA device"):
        sm12x.quantize_fp8(arguments.pop("x"), **arguments)
    assert fake.launches == []


@pytest.mark.parametrize(
    ("which", "read"), [("out", "x"), ("out_scale", "x"), ("out_scale", "out"), ("out", "scale")]
)
def test_results_share_no_memory(fake, which, read):
    """One CTA reads while another writes."""
    for end in (False, True):
        arguments = call(fake, "scale" in (which, read))
        sizes = {"x": 2 * T * K, "out": T * K, "out_scale": 4 * T, "scale": 4}
        at = arguments[read].address
        arguments[which].address = at + (sizes[read] - 1) // 16 * 16 if end else at
        words = f"^{which}: expected memory of its own, got an array that overlaps {read}$"
        with pytest.raises(ValueError, match=words):
            sm12x.quantize_fp8(arguments.pop("x"), **arguments)
        assert fake.launches == []


@pytest.mark.parametrize(
    ("options", "statuses", "key"),
    [
        ({}, [719], "quantize_fp8"),
        ({"per_token": False}, [719], "quantize_fp8_maxima"),
        ({"per_token": False}, [0, 719], "quantize_fp8"),
    ],
)
def test_a_failed_launch_is_an_error_with_everything_in_it(fake, options, statuses, key):
    fake.fail["cuLaunchKernelEx"] = statuses
    with pytest.raises(CudaError, match="cuLaunchKernelEx failed with .*719") as caught:
        sm12x.quantize_fp8(fake.tensor((T, K), "bfloat16"), **options)
    assert (caught.value.variant, caught.value.shapes) == (key, f"x ({T}, {K}) bfloat16")
    assert list(fake.allocated) == fake.freed
    assert fake.context == 0


@pytest.mark.parametrize("static", [False, True])
def test_jax_arrays_are_handed_over_on_both_sides(fake, monkeypatch, static):
    install_jax(monkeypatch, fake)
    monkeypatch.setattr(fake.bindings, "cuEventQuery", lambda event: (fake.bindings.CUresult(600),))
    x = ArrayImpl(fake, (T, K), "bfloat16")
    given = ArrayImpl(fake, (1,), "float32") if static else None
    q, scale = sm12x.quantize_fp8(x, scale=given)
    (launched,) = fake.launches
    assert (q[0], launched.params.q) == ("imported", q[1].tensor.address)
    if static:
        assert scale is given
    else:
        assert (scale[0], launched.params.scale) == ("imported", scale[1].tensor.address)
    assert launched.stream > 2
    (held,) = outputs._held
    assert len(held.owners[0]) == 1 + static
    kinds = [entry[0] for entry in fake.log]
    assert kinds.index("launch") < len(kinds) - 1 - kinds[::-1].index("record")
