"""Expert layers, routes and quantised rows of CuPy, JAX and protocol objects, each on its own current
stream.
"""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the GPU tests make their references with torch")

from layer_case import Layers, run_layer  # noqa: E402
from layer_problem import LayerProblem, make_layer  # noqa: E402
from layer_strata import make_spec  # noqa: E402
from test_gpu_frameworks import Dlpack, Interface, as_torch, jax_on_gpu  # noqa: E402
from torch_reference import DEVICE  # noqa: E402

import sm12x  # noqa: E402
from sm12x.arrays import numpy_dtype  # noqa: E402

SLEEP_CYCLES = 200_000_000  # about 0.1 s
FP8 = "float8_e4m3fn"


class Layer:
    """A layer on torch tensors, all of them arguments by name, and what it gives."""

    def __init__(self, seed: int, dtype: str = "float16", **changes: Any) -> None:
        known = {"tokens": 11, "top_k": 3, "experts": 6, "hidden": 144, "intermediate": 80, "dtype": dtype}
        known |= {"routing": "any", "bias1": "float32", "bias2": "float32", "static2": "array", "seed": seed}
        self.problem: LayerProblem = make_layer(make_spec(**{**known, **changes}))
        layers = Layers()
        layers.add("torch", run_layer(self.problem))
        layers.check(seed)
        self.expected = self.problem.call(None, None).clone()
        problem = self.problem
        arrays = {"x": problem.x, "w1": problem.w1, "w2": problem.w2}
        arrays |= {"topk_weights": problem.topk_weights, "topk_ids": problem.topk_ids}
        given = {name: value for name, value in problem.arguments.items() if value is not None}
        self.tensors: dict[str, Any] = {
            name: value for name, value in {**arrays, **given}.items() if isinstance(value, torch.Tensor)
        }
        self.options = {name: value for name, value in given.items() if name not in self.tensors}

    def bits(self) -> dict[str, Any]:
        """The tensors with weights as uint8."""
        plain = {name: self.tensors[name].view(torch.uint8) for name in ("w1", "w2")}
        return {**self.tensors, **plain}

    def right(self, out: Any) -> bool:
        torch.cuda.synchronize()
        return bool(torch.equal(out.view(torch.int16), self.expected.view(torch.int16)))


def late_copies(layer: Layer, producer: Any) -> dict[str, Any]:
    """Copies of a layer's arrays that hold NaN (ids: -1) until `producer`, behind a long kernel, fills
    them."""
    sources = {name: each.contiguous() for name, each in layer.bits().items()}
    copies = {name: torch.empty_like(source) for name, source in sources.items()}
    for copy in copies.values():
        copy.fill_(torch.nan if copy.is_floating_point() else 0x7F if copy.dtype == torch.uint8 else -1)
    torch.cuda.synchronize()
    with torch.cuda.stream(producer):
        torch.cuda._sleep(SLEEP_CYCLES)
        for name, copy in copies.items():
            copy.copy_(sources[name])
    return copies


class TestProtocols:
    def test_dlpack_producer_still_at_work_on_another_stream(self, seed: int) -> None:
        layer = Layer(seed)
        out = torch.full_like(layer.expected, torch.nan)
        producer, consumer = torch.cuda.Stream(), torch.cuda.Stream()
        late = late_copies(layer, producer)
        with torch.cuda.stream(producer):  # torch's exporter orders after its current stream
            arrays = {name: Dlpack(array) for name, array in late.items()}
            sm12x.fused_moe(**arrays, **layer.options, dtype=FP8, out=out, stream=consumer.cuda_stream)
        assert not consumer.query(), "the call waited for the device"
        consumer.synchronize()
        assert layer.right(out)

    def test_cuda_array_interface_names_the_producing_stream(self, seed: int) -> None:
        layer = Layer(seed)
        out = torch.full_like(layer.expected, torch.nan)
        producer, consumer = torch.cuda.Stream(), torch.cuda.Stream()
        late = late_copies(layer, producer)
        arrays = {name: Interface(array, producer.cuda_stream) for name, array in late.items()}
        sm12x.fused_moe(**arrays, **layer.options, dtype=FP8, out=out, stream=consumer.cuda_stream)
        assert not consumer.query(), "the call waited for the device"
        consumer.synchronize()
        assert layer.right(out)


class TestCupy:
    def arrays(self, cupy: Any, layer: Layer) -> dict[str, Any]:
        found = {}
        for name, tensor in layer.bits().items():
            if tensor.dtype == torch.bfloat16:
                bits = cupy.from_dlpack(tensor.contiguous().view(torch.int16))
                found[name] = bits.view(numpy_dtype("bfloat16"))
            else:
                found[name] = cupy.from_dlpack(tensor)
        torch.cuda.synchronize()
        return found

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    @pytest.mark.parametrize("planned", [False, True], ids=["function", "plan"])
    def test_in_and_out_on_its_current_stream(self, planned: bool, dtype: str, seed: int) -> None:
        cupy = pytest.importorskip("cupy")
        layer = Layer(seed, dtype)
        arrays = self.arrays(cupy, layer)
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            if planned:
                held = {
                    name: arrays[name] for name in arrays if name not in ("x", "topk_weights", "topk_ids")
                }
                plan = sm12x.FusedMoE(**held, **layer.options, dtype=FP8)
                out = plan(arrays["x"], arrays["topk_weights"], arrays["topk_ids"])
            else:
                out = sm12x.fused_moe(**arrays, **layer.options, dtype=FP8)
        stream.synchronize()
        assert isinstance(out, cupy.ndarray)
        assert out.dtype.name == dtype
        bits = torch.as_tensor(out.view(cupy.int16), device=DEVICE)
        assert layer.right(bits)

    def test_out_and_workspace_of_its_own(self, seed: int) -> None:
        cupy = pytest.importorskip("cupy")
        layer = Layer(seed)
        arrays = self.arrays(cupy, layer)
        out = cupy.full(tuple(layer.expected.shape), cupy.nan, dtype=cupy.float16)
        workspace = cupy.empty(layer.problem.workspace_bytes(), dtype=cupy.uint8)
        returned = sm12x.fused_moe(**arrays, **layer.options, dtype=FP8, out=out, workspace=workspace)
        assert returned is out
        cupy.cuda.get_current_stream().synchronize()
        assert layer.right(as_torch(out))

    def test_parts(self, seed: int) -> None:
        """route gives CuPy arrays; quantize_fp8 is given an `out`, because CuPy has no FP8."""
        cupy = pytest.importorskip("cupy")
        layer = Layer(seed)
        arrays = self.arrays(cupy, layer)
        mine = sm12x.route(arrays["topk_ids"], 6, topk_weights=arrays["topk_weights"])
        right = sm12x.route(layer.tensors["topk_ids"], 6, topk_weights=layer.tensors["topk_weights"])
        cupy.cuda.get_current_stream().synchronize()
        for found, expected in zip(mine, right, strict=True):
            assert isinstance(found, cupy.ndarray)
            assert torch.equal(as_torch(found), expected)
        codes = cupy.empty(tuple(layer.expected.shape), dtype=cupy.uint8)
        q, scale = sm12x.quantize_fp8(arrays["x"], out=codes)
        expected_q, expected_scale = sm12x.quantize_fp8(layer.tensors["x"])
        cupy.cuda.get_current_stream().synchronize()
        assert q is codes
        assert isinstance(scale, cupy.ndarray)
        assert torch.equal(as_torch(q), expected_q.view(torch.uint8))
        assert torch.equal(as_torch(scale), expected_scale)


class TestJax:
    def inputs(self, jax: Any, layer: Layer) -> dict[str, Any]:
        torch.cuda.synchronize()
        numpy = jax.numpy
        found = {}
        for name, tensor in layer.bits().items():
            array = numpy.from_dlpack(tensor.contiguous())
            if name in ("w1", "w2"):
                array = jax.lax.bitcast_convert_type(array, numpy.float8_e4m3fn)
            # Memory that JAX owns, or it would share torch's.
            found[name] = jax.block_until_ready(numpy.copy(array))
        return found

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize("planned", [False, True], ids=["function", "plan"])
    def test_in_and_out(self, planned: bool, dtype: str, seed: int) -> None:
        jax = jax_on_gpu()
        layer = Layer(seed, dtype)
        inputs = self.inputs(jax, layer)
        if planned:
            held = {name: inputs[name] for name in inputs if name not in ("x", "topk_weights", "topk_ids")}
            plan = sm12x.FusedMoE(**held, **layer.options)
            out = plan(inputs["x"], inputs["topk_weights"], inputs["topk_ids"])
        else:
            out = sm12x.fused_moe(**inputs, **layer.options)
        assert isinstance(out, jax.Array)
        assert out.dtype.name == dtype
        doubled = out + out  # JAX's own work on the result waits for ours
        assert torch.allclose(as_torch(doubled).float(), 2 * layer.expected.float(), rtol=1e-2)
        assert layer.right(as_torch(out))

    def test_inputs_still_being_computed(self, seed: int) -> None:
        jax = jax_on_gpu()
        numpy = jax.numpy
        layer = Layer(seed)
        inputs = self.inputs(jax, layer)
        matrix = numpy.eye(4096, dtype=numpy.float32)

        @jax.jit
        def slow(x: Any, weights: Any, matrix: Any) -> tuple[Any, Any]:
            for _ in range(60):
                matrix = matrix @ matrix
            one = matrix[0, 0]
            return x * one.astype(x.dtype), weights * one

        def produce() -> tuple[Any, Any]:
            return slow(inputs["x"], inputs["topk_weights"], matrix)

        jax.block_until_ready(produce())
        sm12x.fused_moe(**inputs, **layer.options)
        for _ in range(3):
            x, weights = produce()
            late = not x.is_ready()
            out = sm12x.fused_moe(**{**inputs, "x": x, "topk_weights": weights}, **layer.options)
            del x, weights  # the call keeps what it needs
            refill = [numpy.full((4096, 1024), float("nan"), dtype=numpy.float32) for _ in range(8)]
            assert late, "the producer was too quick for this test to mean anything"
            assert layer.right(as_torch(out))
            del refill

    def test_parts(self, seed: int) -> None:
        jax = jax_on_gpu()
        layer = Layer(seed, "bfloat16")
        inputs = self.inputs(jax, layer)
        mine = sm12x.route(inputs["topk_ids"], 6, topk_weights=inputs["topk_weights"])
        right = sm12x.route(layer.tensors["topk_ids"], 6, topk_weights=layer.tensors["topk_weights"])
        for found, expected in zip(mine, right, strict=True):
            assert isinstance(found, jax.Array)
            assert torch.equal(as_torch(found), expected)
        q, scale = sm12x.quantize_fp8(inputs["x"])
        expected_q, expected_scale = sm12x.quantize_fp8(layer.tensors["x"])
        assert q.dtype.name == FP8
        bits = as_torch(jax.lax.bitcast_convert_type(q, jax.numpy.uint8))
        assert torch.equal(bits, expected_q.view(torch.uint8))
        assert torch.equal(as_torch(scale), expected_scale)


def test_weights_of_torch_tokens_of_cupy(seed: int) -> None:
    """Frameworks may be mixed: the result belongs to the framework of x."""
    cupy = pytest.importorskip("cupy")
    layer = Layer(seed)
    x = cupy.from_dlpack(layer.tensors["x"])
    torch.cuda.synchronize()
    out = sm12x.fused_moe(**{**layer.tensors, "x": x}, **layer.options)
    cupy.cuda.get_current_stream().synchronize()
    assert isinstance(out, cupy.ndarray)
    assert layer.right(as_torch(out))
