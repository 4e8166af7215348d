"""torch and Triton beside sm12x, where they are installed: the same operands, graphs replayed in the same
turns.

Triton has no grouped GEMM of its own, so a plain one is here (triton_kernel.py): one tile per program, a few
configurations tried. It says what the plain MMA gives without further work, not what a tuned kernel gives.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from .device import DeviceArray, Gpu, numpy_dtype
from .shapes import MoeGemm
from .timing import Contender, interleave


def peer_contenders(
    gpu: Gpu, shape: MoeGemm, batches: Sequence[Any], weights: Any, turns: Sequence[tuple[int, int]]
) -> tuple[dict[str, Contender], dict[str, str]]:
    """(contenders by name, why a peer is missing or which configuration it runs)."""
    if importlib.util.find_spec("torch") is None:
        return {}, {"torch": "not installed", "triton": "torch is not installed"}
    torch: Any = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return {}, {"torch": "sees no CUDA device", "triton": "torch sees no CUDA device"}
    found: dict[str, Contender] = {}
    notes: dict[str, str] = {}
    operands = _Operands(torch, gpu, batches, weights)
    builders = {"torch": _torch_calls, "triton": _best_triton}
    for name, builder in builders.items():
        try:
            found[name], notes[name] = builder(operands, shape, turns)
        except (
            Exception
        ) as error:  # a peer that cannot run here is a fact for the report, not a failure of ours
            notes[name] = f"not available: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    return found, notes


class _CudaArray:
    """A compact array of the kit through `__cuda_array_interface__`; torch holds it while a tensor looks
    at it.
    """

    def __init__(self, array: DeviceArray, typestr: str | None) -> None:
        self.array = array
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": array.shape,
            "typestr": typestr or numpy_dtype(array.dtype).str,
            "data": (array.ptr, False),
            "strides": None,
        }


class _Operands:
    """torch views of the kit's arrays."""

    def __init__(self, torch: Any, gpu: Gpu, batches: Sequence[Any], weights: Any) -> None:
        self.torch, self.gpu = torch, gpu
        torch.cuda.set_device(gpu.device.ordinal)
        self.stream = torch.cuda.ExternalStream(gpu.stream)
        self.a = [self._view(batch.a, True) for batch in batches]
        self.a_scale = [self._view(batch.a_scale) for batch in batches]
        self.offsets = [self._view(batch.offsets) for batch in batches]
        self.b = self._view(weights.pool, True)
        self.b_scale = self._view(weights.scale)

    def _view(self, array: DeviceArray, fp8: bool = False) -> Any:
        # As bytes: the interface has no 8-bit floats, nor has the DLPack of every torch.
        tensor = self.torch.as_tensor(_CudaArray(array, "|u1" if fp8 else None), device="cuda")
        return tensor.view(self.torch.float8_e4m3fn) if fp8 else tensor

    def graph(self, calls: Sequence[Callable[[], object]]) -> Contender:
        calls[0]()
        self.torch.cuda.synchronize()
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            for each in calls:
                each()

        def replay() -> None:
            with self.torch.cuda.stream(self.stream):
                graph.replay()

        return Contender(replay, len(calls), calls)


def _torch_calls(
    operands: _Operands, shape: MoeGemm, turns: Sequence[tuple[int, int]]
) -> tuple[Contender, str]:
    torch = operands.torch
    ends = [offsets[1:].contiguous() for offsets in operands.offsets]

    def one(r: int, s: int) -> Callable[[], object]:
        return lambda: torch._scaled_grouped_mm(
            operands.a[r],
            operands.b[s].transpose(-2, -1),
            operands.a_scale[r],
            operands.b_scale,
            offs=ends[r],
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    return operands.graph([one(r, s) for r, s in turns]), "torch._scaled_grouped_mm"


def _best_triton(
    operands: _Operands, shape: MoeGemm, turns: Sequence[tuple[int, int]]
) -> tuple[Contender, str]:
    kernel = importlib.import_module(".triton_kernel", __package__)
    torch = operands.torch
    rows = operands.a[0].shape[0]
    most = min(rows, rows // shape.top_k)  # of one expert
    out = torch.empty((rows, shape.n), dtype=torch.bfloat16, device=operands.b.device)
    graphs: dict[str, Contender] = {}
    for config in kernel.configs(most):

        def one(r: int, s: int, config: Any = config) -> Callable[[], object]:
            return lambda: kernel.launch(
                operands.a[r],
                operands.b[s],
                operands.a_scale[r],
                operands.b_scale,
                operands.offsets[r],
                out,
                most,
                config,
            )

        graphs[str(config)] = operands.graph([one(r, s) for r, s in turns])
    times = interleave(operands.gpu, graphs, 5)
    best = min(times, key=lambda name: times[name].median_us)
    return graphs[best], f"plain grouped GEMM in Triton, {best}"
