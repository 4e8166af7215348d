"""Arrays that are not torch's: DLPack producers, JAX and NumPy."""

from __future__ import annotations

import numpy as np
import pytest

import sm12x
from sm12x import outputs
from sm12x.ops import grouped_gemm as module
from unit.fake_driver import install, reset
from unit.fake_family import write_family
from unit.fake_jax import ArrayImpl, DlpackArray, install_jax
from unit.gemm_cases import STREAM, E, K, M, N, nothing_happened, operands


@pytest.fixture
def fake(monkeypatch, tmp_path):
    fake = install(monkeypatch, tmp_path)
    fake.streams[0] = STREAM
    return fake


def dlpack_operands(fake, kind=DlpackArray):
    return {
        "a": kind(fake, (M, K), "float8_e4m3fn"),
        "b": kind(fake, (E, N, K), "float8_e4m3fn"),
        "offsets": kind(fake, (E + 1,), "int32"),
    }


def test_dlpack_producers_are_handed_the_launch_stream(fake):
    out = fake.tensor((M, N), "bfloat16")
    args = dlpack_operands(fake)
    scale = DlpackArray(fake, (M,), "float32")
    sm12x.grouped_gemm(**args, a_scale=scale, out=out)
    for each in (*args.values(), scale):
        assert each.streams == [STREAM], "torch owns out: its current stream"
    p = fake.launches[0].params
    assert (p.a, p.a_scale, p.d) == (args["a"].tensor.address, scale.tensor.address, out.address)


def test_dlpack_producers_alone_run_on_the_legacy_default_stream(fake):
    args = dlpack_operands(fake)
    with pytest.raises(TypeError, match="out: expected an array, dlpack arrays bring no allocator"):
        sm12x.grouped_gemm(**args)
    assert nothing_happened(fake)
    out = DlpackArray(fake, (M, N), "bfloat16")
    assert sm12x.grouped_gemm(**args, out=out) is out
    assert {each.stream for each in fake.launches} == {0}
    assert out.streams == [1], "DLPack's name for it"


def test_a_dlpack_array_on_the_host_is_refused(fake):
    class Host(DlpackArray):
        def __dlpack_device__(self):
            return 1, 0

    args = dlpack_operands(fake)
    with pytest.raises(ValueError, match="a: expected memory of a CUDA device, got host memory"):
        sm12x.grouped_gemm(**{**args, "a": Host(fake, (M, K), "float8_e4m3fn")}, out=None)
    assert nothing_happened(fake)


@pytest.mark.parametrize("name", ["out", "workspace"])
def test_a_read_only_array_is_refused_also_by_a_known_plan(fake, monkeypatch, name):
    readonly = set()

    def ingest(obj, *rest):
        return real(obj, *rest)._replace(readonly=id(obj) in readonly)

    real = module.ingest
    monkeypatch.setattr(module, "ingest", ingest)
    scratch = fake.tensor((sm12x.workspace_size(E),), "uint8")
    args = operands(fake, workspace=scratch)
    sm12x.grouped_gemm(**args)
    fake.launches.clear()
    readonly.add(id(args[name]))
    with pytest.raises(ValueError, match=f"{name}: expected an array that can be written"):
        sm12x.grouped_gemm(**args)
    assert nothing_happened(fake)


@pytest.fixture
def jax(fake, monkeypatch):
    return install_jax(monkeypatch, fake)


def test_jax_in_and_out_is_ordered_on_both_sides(fake, jax):
    args = dlpack_operands(fake, ArrayImpl)
    kind, array = sm12x.grouped_gemm(**args)
    assert (kind, array.tensor.shape) == ("imported", (M, N))
    ours = fake.launches[0].stream
    assert ours > 2, "a stream of our own"
    assert all(each.streams == [ours] for each in args.values())
    assert fake.launches[0].params.d == array.tensor.address
    order = [entry for entry in fake.log if entry[0] in ("launch", "record", "wait")]
    assert [entry[0] for entry in order] == ["launch", "launch", "record", "wait"]
    assert [entry[-1] for entry in order] == [ours, ours, ours, 0x9000]


@pytest.mark.parametrize("layout", ["gathered", "masked"])
def test_rows_of_jax_arrays_are_ordered_and_held_too(fake, jax, monkeypatch, tmp_path, layout):
    write_family(tmp_path / "cubins", packed=True)
    reset()
    fake.streams[0] = STREAM
    args = dlpack_operands(fake, ArrayImpl)
    rows, shape = (M,), (M, N)
    if layout == "gathered":
        args["row_index"] = ArrayImpl(fake, (M,), "int32")
    else:
        rows, shape = (E, 5), (E, 5, N)
        del args["offsets"]
        args.update(a=ArrayImpl(fake, (E, 5, K), "float8_e4m3fn"), rows=ArrayImpl(fake, (E,), "int32"))
    args["row_weight"] = ArrayImpl(fake, rows, "float32")
    # What is held is the capsules that the arrays were taken in by.
    held = []
    monkeypatch.setattr(outputs, "_hold", held.append)
    kind, array = sm12x.grouped_gemm(**args)
    assert (kind, array.tensor.shape) == ("imported", shape)
    gemm = fake.launches[-1]
    assert gemm.symbol.startswith("sm12x_fp8_packed_")
    assert gemm.params.d == array.tensor.address
    assert all(each.streams == [gemm.stream] for each in args.values())
    ((inputs, pending),) = [entry.owners for entry in held]
    assert len(inputs) == len(args)
    assert len(pending) == 1


def test_a_list_of_jax_arrays(fake, jax):
    a = [ArrayImpl(fake, (3, 64), "float8_e4m3fn"), ArrayImpl(fake, (0, 64), "float8_e4m3fn")]
    b = [ArrayImpl(fake, (8, 64), "float8_e4m3fn"), ArrayImpl(fake, (16, 64), "float8_e4m3fn")]
    outs = sm12x.grouped_gemm(a, b)
    assert [(kind, array.tensor.shape) for kind, array in outs] == [
        ("imported", (3, 8)),
        ("imported", (0, 16)),
    ]


def test_a_jax_array_cannot_be_written_to(fake, jax):
    out = ArrayImpl(fake, (M, N), "bfloat16")
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"out: expected an array that can be written, got a read-only.*jax"
        ):
            sm12x.grouped_gemm(**dlpack_operands(fake, ArrayImpl), out=out)
    scratch = ArrayImpl(fake, (sm12x.workspace_size(E),), "uint8")
    with pytest.raises(ValueError, match="workspace: expected an array that can be written"):
        sm12x.grouped_gemm(**dlpack_operands(fake, ArrayImpl), workspace=scratch)
    assert nothing_happened(fake)


def test_numpy_arrays_take_the_reference_and_no_driver(fake):
    rng = np.random.default_rng()
    a = rng.integers(0, 0x7E, (4, 32), np.uint8)
    b = rng.integers(0, 0x7E, (2, 8, 32), np.uint8)
    offsets = np.array([0, 1, 4], np.int32)
    out = sm12x.grouped_gemm(a, b, offsets=offsets, dtype="float8_e4m3fn", b_scale=0.5)
    assert isinstance(out, np.ndarray)
    assert out.shape == (4, 8)
    outs = sm12x.grouped_gemm([a[:1], a[1:]], list(b), dtype="float8_e4m3fn", b_scale=0.5)
    assert np.array_equal(np.concatenate(outs).view(np.uint16), out.view(np.uint16))
    assert fake.calls == []


@pytest.mark.parametrize("name", ["workspace", "stream", "variant"])
def test_gpu_arguments_with_numpy_arrays_are_refused(fake, name):
    a, b = np.zeros((4, 32), np.uint8), np.zeros((2, 8, 32), np.uint8)
    with pytest.raises(ValueError, match=f"{name}: expected None with NumPy arrays"):
        sm12x.grouped_gemm(a, b, offsets=np.zeros(3, np.int32), dtype="float8_e4m3fn", **{name: "fp8"})


def test_a_leading_jax_array_that_is_gone_or_sharded_is_named(fake, jax):
    class Deleted(ArrayImpl):
        def is_deleted(self):
            return True

        def __dlpack_device__(self):
            raise RuntimeError("Array has been deleted")

    class Sharded(ArrayImpl):
        def __dlpack_device__(self):
            raise BufferError("__dlpack__ only supported for unsharded arrays.")

    for kind, error, text in ((Deleted, ValueError, "a: .*deleted"), (Sharded, TypeError, "a: .*unsharded")):
        args = dlpack_operands(fake, ArrayImpl) | {"a": kind(fake, (M, K), "float8_e4m3fn")}
        with pytest.raises(error, match=text):
            sm12x.grouped_gemm(**args)
    assert nothing_happened(fake)


def test_a_leading_empty_array_of_the_cuda_array_interface_is_named(fake):
    class Interface:
        __cuda_array_interface__ = {"shape": (0, K), "typestr": "|u1", "data": (0, False), "version": 3}  # noqa: RUF012

    with pytest.raises(TypeError, match="a: an empty array"):
        sm12x.grouped_gemm(**{**dlpack_operands(fake), "a": Interface()}, dtype="float8_e4m3fn")
    assert nothing_happened(fake)


def test_empty_arrays_may_have_any_strides(fake):
    t = fake.tensor
    zero = {
        "a": t((0, K), "float8_e4m3fn", strides=(0, 0)),
        "out": t((0, N), "bfloat16", strides=(0, 0)),
    }
    sm12x.grouped_gemm(**operands(fake, **zero))
    none = {
        "b": t((0, N, K), "float8_e4m3fn", strides=(0, 0, 0)),
        "offsets": t((1,), "int32"),
        "b_scale": t((0, N), "float32", strides=(0, 0)),
        "bias": t((0, N), "float32", strides=(0, 0)),
    }
    sm12x.grouped_gemm(**operands(fake, **none))
    assert nothing_happened(fake)


def test_empty_numpy_arrays_have_strides_of_zero():
    a, b = np.zeros((4, 32), np.uint8), np.empty((0, 8, 32), np.uint8)
    empty = np.empty((0, 8), np.float32)
    out = sm12x.grouped_gemm(
        a, b, offsets=np.zeros(1, np.int32), b_scale=empty, bias=empty, dtype="float8_e4m3fn"
    )
    assert out.shape == (4, 8)


def test_numpy_outputs_that_overlap_each_other_are_refused():
    a, b = [np.zeros((4, 32), np.uint8)] * 2, [np.zeros((8, 32), np.uint8)] * 2
    halves = np.zeros((4, 16), np.float16)
    columns = [halves[:, :8], halves[:, 8:]]  # share no element
    sm12x.grouped_gemm(a, b, out=columns, out_dtype="float16", dtype="float8_e4m3fn")
    with pytest.raises(ValueError, match=r"out\[1\]: .* overlaps out\[0\]"):
        sm12x.grouped_gemm(a, b, out=[columns[0]] * 2, out_dtype="float16", dtype="float8_e4m3fn")
