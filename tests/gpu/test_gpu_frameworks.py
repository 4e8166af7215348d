"""CuPy, JAX, torch and protocol objects in and out, each on its own current stream; inputs late on another
stream.
"""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the GPU tests make their references with torch")

from packed_call import PackedCall, make_call  # noqa: E402

import sm12x  # noqa: E402
from sm12x.ops import grouped_gemm as grouped_gemm_module  # noqa: E402

SLEEP_CYCLES = 200_000_000  # about 0.1 s
FP8 = "float8_e4m3fn"


def late_copies(call: PackedCall, producer: torch.cuda.Stream) -> dict[str, torch.Tensor]:
    """Copies of a call's arrays that hold NaN (offsets: zeros) until ``producer``, behind a long kernel,
    fills them.
    """
    sources = {
        "a": call.problem.a.view(torch.uint8),
        "b": call.problem.b.view(torch.uint8),
        "a_scale": call.a_scale,
        "b_scale": call.b_scale,
        "offsets": call.offsets,
    }
    copies = {name: torch.empty_like(source) for name, source in sources.items()}
    for name, copy in copies.items():
        copy.fill_(0 if name == "offsets" else 0x7F if name in "ab" else float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(producer):
        torch.cuda._sleep(SLEEP_CYCLES)
        for name, copy in copies.items():
            copy.copy_(sources[name])
    return copies


def as_torch(array: Any) -> torch.Tensor:
    return torch.from_dlpack(array)


class TestTorch:
    def test_on_its_current_stream(self, seed: int) -> None:
        call = make_call(seed)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for dtype in ("bfloat16", "float16"):
                out = call(out_dtype=dtype)
                assert isinstance(out, torch.Tensor)
                assert out.device == call.problem.a.device
                stream.synchronize()
                call.check(out, f"torch {dtype}", dtype)

    def test_uint8_with_a_named_type(self, seed: int) -> None:
        call = make_call(seed)
        out = call(a=call.problem.a.view(torch.uint8), b=call.problem.b.view(torch.uint8), dtype=FP8)
        call.check(out, "uint8")

    def test_out_is_returned_itself(self, seed: int) -> None:
        call = make_call(seed)
        out = call.poisoned_out().out
        assert call(out=out) is out
        call.check(out, "out=")

    def test_parameters_and_int64_offsets(self, seed: int) -> None:
        """A weight that is an nn.Parameter, as in a model, is a tensor too."""
        call = make_call(seed)
        weight = torch.nn.Parameter(call.problem.b, requires_grad=False)
        call.check(call(b=weight, offsets=call.offsets.to(torch.int64)), "nn.Parameter")

    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    def test_a_second_call_takes_no_tensor_in(
        self, seed: int, mode: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It costs a third of the first way, and but for the time nothing else would tell."""
        call = make_call(seed)

        def arguments() -> dict[str, Any]:
            out = call.poisoned_out().out
            return {"out": out, "a": call.problem.a.clone(), "b_scale": call.b_scale[:]}

        with mode():
            call(**arguments())
            monkeypatch.setattr(grouped_gemm_module, "ingest", None)
            for _ in range(3):
                call.check(call(**arguments()), "again")

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("name", ["a", "b", "a_scale", "b_scale", "offsets", "out"])
    def test_a_nested_tensor_in_a_second_call_is_named(self, seed: int, name: str) -> None:
        """torch's guards end the process there."""
        call = make_call(seed)
        out = call.poisoned_out().out
        call(out=out)
        nested = torch.nested.nested_tensor([torch.ones(3, device="cuda")])
        with pytest.raises(TypeError, match=f"^{name}: expected a strided tensor|^{name}: expected a dtype"):
            call(**{"out": out, name: nested})
        call.check(call(out=out), "after")


class Dlpack:
    """Exports a torch tensor through DLPack only."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


class Interface:
    """Exports a torch tensor through __cuda_array_interface__ 3 only, naming the stream that still writes
    it.
    """

    def __init__(self, tensor: torch.Tensor, stream: int) -> None:
        self.tensor = tensor
        self.__cuda_array_interface__ = {**tensor.__cuda_array_interface__, "version": 3, "stream": stream}


class TestProtocols:
    def test_dlpack_producer_still_at_work_on_another_stream(self, seed: int) -> None:
        """The launch stream goes to __dlpack__, and the producer makes it wait: no event, no host sync."""
        call = make_call(seed)
        call()
        producer, consumer = torch.cuda.Stream(), torch.cuda.Stream()
        out = call.poisoned_out().out
        late = late_copies(call, producer)
        with torch.cuda.stream(producer):  # torch's exporter orders after its current stream
            arguments = {name: Dlpack(array) for name, array in late.items()}
            sm12x.grouped_gemm(**arguments, dtype=FP8, out=out, stream=consumer.cuda_stream)
        assert not consumer.query(), "the call waited for the device"
        consumer.synchronize()
        call.check(out, "DLPack")

    def test_dlpack_carries_float8(self, seed: int) -> None:
        call = make_call(seed)
        out = call.poisoned_out().out
        call(a=Dlpack(call.problem.a), b=Dlpack(call.problem.b), out=out)
        torch.cuda.synchronize()
        call.check(out, "float8 through DLPack")

    def test_cuda_array_interface_names_the_producing_stream(self, seed: int) -> None:
        call = make_call(seed)
        call()
        producer, consumer = torch.cuda.Stream(), torch.cuda.Stream()
        out = call.poisoned_out().out
        late = late_copies(call, producer)
        arguments = {name: Interface(array, producer.cuda_stream) for name, array in late.items()}
        sm12x.grouped_gemm(**arguments, dtype=FP8, out=out, stream=consumer.cuda_stream)
        assert not consumer.query(), "the call waited for the device"
        consumer.synchronize()
        call.check(out, "__cuda_array_interface__")


class TestCupy:
    def arrays(self, cupy: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {name: cupy.from_dlpack(tensor) for name, tensor in tensors.items()}

    def inputs(self, call: PackedCall) -> dict[str, torch.Tensor]:
        return {
            "a": call.problem.a.view(torch.uint8),
            "b": call.problem.b.view(torch.uint8),
            "a_scale": call.a_scale,
            "b_scale": call.b_scale,
            "offsets": call.offsets,
        }

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_in_and_out_on_its_current_stream(self, dtype: str, seed: int) -> None:
        cupy = pytest.importorskip("cupy")
        call = make_call(seed)
        arrays = self.arrays(cupy, self.inputs(call))
        torch.cuda.synchronize()
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            out = sm12x.grouped_gemm(**arrays, dtype=FP8, out_dtype=dtype)
        stream.synchronize()
        assert isinstance(out, cupy.ndarray)
        assert out.dtype.name == dtype
        bits = torch.as_tensor(out.view(cupy.int16), device="cuda")
        call.check(bits.view(getattr(torch, dtype)), f"CuPy {dtype}", dtype)

    def test_late_producer_on_its_current_stream(self, seed: int) -> None:
        cupy = pytest.importorskip("cupy")
        call = make_call(seed)
        call(out_dtype="float16")
        producer = torch.cuda.Stream()
        stream = cupy.cuda.ExternalStream(producer.cuda_stream)
        with stream:
            out = cupy.empty((call.problem.total_rows, call.problem.n), dtype=cupy.float16)
        late = late_copies(call, producer)
        with torch.cuda.stream(producer):
            arrays = self.arrays(cupy, late)
        with stream:
            returned = sm12x.grouped_gemm(**arrays, dtype=FP8, out=out, out_dtype="float16")
        assert returned is out
        assert not producer.query(), "the call waited for the device"
        producer.synchronize()
        call.check(as_torch(out), "CuPy, late", "float16")


def jax_on_gpu() -> Any:
    jax = pytest.importorskip("jax")
    if not any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("this JAX sees no GPU")
    return jax


class TestJax:
    def inputs(self, jax: Any, call: PackedCall) -> dict[str, Any]:
        torch.cuda.synchronize()
        numpy = jax.numpy
        arrays = {
            "a": jax.lax.bitcast_convert_type(
                numpy.from_dlpack(call.problem.a.view(torch.uint8)), numpy.float8_e4m3fn
            ),
            "b": jax.lax.bitcast_convert_type(
                numpy.from_dlpack(call.problem.b.view(torch.uint8)), numpy.float8_e4m3fn
            ),
            "a_scale": numpy.from_dlpack(call.a_scale),
            "b_scale": numpy.from_dlpack(call.b_scale),
            "offsets": numpy.from_dlpack(call.offsets),
        }
        # Memory that JAX owns, or it would share torch's.
        return {name: jax.block_until_ready(numpy.copy(array)) for name, array in arrays.items()}

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_in_and_out(self, dtype: str, seed: int) -> None:
        jax = jax_on_gpu()
        call = make_call(seed)
        out = sm12x.grouped_gemm(**self.inputs(jax, call), out_dtype=dtype)
        assert isinstance(out, jax.Array)
        assert out.dtype.name == dtype
        doubled = out + out  # JAX's own work on the result waits for ours
        call.check(as_torch(doubled / 2), f"JAX {dtype}", dtype)
        call.check(as_torch(out), f"JAX {dtype}", dtype)

    def test_inputs_still_being_computed(self, seed: int) -> None:
        """JAX dispatches asynchronously on streams that nobody can name; DLPack's handshake orders the
        launch.
        """
        jax = jax_on_gpu()
        numpy = jax.numpy
        call = make_call(seed)
        inputs = self.inputs(jax, call)
        matrix = numpy.eye(4096, dtype=numpy.float32)

        @jax.jit
        def slow(array: Any, scale: Any, matrix: Any) -> tuple[Any, Any]:
            for _ in range(60):
                matrix = matrix @ matrix
            bits = jax.lax.bitcast_convert_type(array, numpy.uint8)
            zero = numpy.isnan(matrix[0, 0]).astype(numpy.uint8)
            return jax.lax.bitcast_convert_type(bits + zero, numpy.float8_e4m3fn), scale * matrix[0, 0]

        def produce() -> tuple[Any, Any]:
            return slow(inputs["a"], inputs["a_scale"], matrix)

        jax.block_until_ready(produce())
        sm12x.grouped_gemm(**inputs)
        for _ in range(5):
            a, a_scale = produce()
            late = not a.is_ready()
            out = sm12x.grouped_gemm(**{**inputs, "a": a, "a_scale": a_scale})
            del a, a_scale  # the call keeps what it needs
            refill = [numpy.full((4096, 1024), float("nan"), dtype=numpy.float32) for _ in range(8)]
            assert late, "the producer was too quick for this test to mean anything"
            call.check(as_torch(out), "JAX, late")
            del refill

    def test_many_calls_reuse_memory_in_order(self, seed: int) -> None:
        """Results are used and die; memory that JAX reuses must not be one that a launch still reads or
        writes.
        """
        jax = jax_on_gpu()
        call = make_call(seed)
        inputs = self.inputs(jax, call)
        first = sm12x.grouped_gemm(**inputs)
        same = jax.jit(lambda x, y: jax.numpy.array_equal(x, y))
        equal = [
            same(sm12x.grouped_gemm(**{**inputs, "a_scale": inputs["a_scale"] * 1.0}), first)
            for _ in range(200)
        ]
        assert all(bool(value) for value in equal)
        call.check(as_torch(first), "JAX, first of many")


class TestMixed:
    def test_weights_of_torch_activations_of_cupy(self, seed: int) -> None:
        """Frameworks may be mixed: the result belongs to the framework of `a`."""
        cupy = pytest.importorskip("cupy")
        call = make_call(seed)
        a = cupy.from_dlpack(call.problem.a.view(torch.uint8))
        torch.cuda.synchronize()
        out = call(a=a, dtype=(FP8, FP8), out_dtype="float16")
        cupy.cuda.get_current_stream().synchronize()
        assert isinstance(out, cupy.ndarray)
        call.check(as_torch(out), "mixed", "float16")
