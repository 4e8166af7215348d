"""The MMA probes and the copy: what the block-scaled and the plain FP8 instruction give, and how fast they
and DRAM are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import abi, manifest
from ..errors import CubinError
from ..reference import dequantise
from .cases import random_e4m3_bits
from .device import Gpu, numpy_dtype
from .timing import Contender, interleave

THREADS = 128
OUTPUTS = 32  # floats of each thread: 8 chains of 4
CTAS_PER_SM = 4
FLOP_PER_CTA = 4 * 8 * 16 * 8 * 32 * 2  # of one iteration: 4 warps, 8 chains, m16n8k32
FORMS = ("unit_scale", "plain")
TWIN = "sm_90a"


def _functions(gpu: Gpu) -> dict[str, int]:
    variants = manifest.default().variants
    missing = [form for form in FORMS if f"mma_probe_{form}" not in variants]
    if missing:
        raise CubinError(f"the manifest has no mma_probe_{missing[0]}: reinstall sm12x")
    return {form: gpu.load(variants[f"mma_probe_{form}"]) for form in FORMS}


def _run(gpu: Gpu, function: int, operands: NDArray[np.uint32], iterations: int) -> NDArray[np.float32]:
    """One CTA. `operands` (128, 6); the result is (128, 8, 4)."""
    source, out = gpu.upload(operands), gpu.empty((THREADS, OUTPUTS), "float32")
    gpu.fill(out, 0xFF)
    params = _params(source.ptr, out.ptr, iterations)
    gpu.launch(function, 1, THREADS, params)
    return gpu.download(out).reshape(THREADS, 8, 4)


def _params(source: int, out: int, iterations: int) -> Any:
    params = abi.STRUCTS["sm12x_mma_probe_params"]()
    for name, value in (("in", source), ("out", out), ("iterations", iterations)):
        setattr(params, name, value)
    return params


def fragment_product(operands: NDArray[np.uint32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What one m16n8k32 of every warp gives, in float64, and the sum of magnitudes; both (128, 4), as the
    lanes hold it.

    Lane l has rows l // 4 and l // 4 + 8 of A and column l // 4 of B at four k from 4 * (l % 4) on, and again
    16 further; of the result it has those rows at columns 2 * (l % 4) and the next.
    """
    values = dequantise(operands.view(np.uint8).view(numpy_dtype("float8_e4m3fn")), np.float64)
    lanes = values.reshape(4, 8, 4, 6, 4)  # warp, l // 4, l % 4, register, byte
    a, b = np.zeros((4, 16, 32)), np.zeros((4, 8, 32))
    for quarter in range(4):
        for half in range(2):
            at = slice(16 * half + 4 * quarter, 16 * half + 4 * quarter + 4)
            a[:, :8, at] = lanes[:, :, quarter, 2 * half]
            a[:, 8:, at] = lanes[:, :, quarter, 2 * half + 1]
            b[:, :, at] = lanes[:, :, quarter, 4 + half]
    results = []
    for left, right in ((a, b), (np.abs(a), np.abs(b))):
        product = left @ right.transpose(0, 2, 1)  # (4, 16, 8)
        spread = product.reshape(4, 2, 8, 4, 2)  # warp, upper or lower rows, l // 4, l % 4, column
        results.append(spread.transpose(0, 2, 3, 1, 4).reshape(THREADS, 4))
    return results[0], results[1]


def compare_forms(gpu: Gpu, rng: np.random.Generator, draws: int = 32) -> dict[str, Any]:
    """Both forms on random operands: equal bit for bit, and near float64 after one step.

    `steps` of 1, 3 and 100 accumulations; `bits_equal` says whether any element ever differed; `worst_error`
    is the largest error after one step over 2**-20 of the sum of magnitudes, which is what one step may be
    off.
    """
    functions = _functions(gpu)
    differing, worst = 0, 0.0
    for draw in range(draws):
        bits = random_e4m3_bits((THREADS, 24), rng)
        if draw % 2:  # everyday operands: exponents near one another
            bits = (bits & 0x8F | 0x30).astype(np.uint8)
        operands = bits.view(np.uint32)
        reference, magnitude = fragment_product(operands)
        for steps in (1, 3, 100):
            results = {form: _run(gpu, functions[form], operands, steps) for form in FORMS}
            differing += int(
                (results["unit_scale"].view(np.uint32) != results["plain"].view(np.uint32)).sum()
            )
            if steps == 1:
                for values in results.values():
                    error = np.abs(values.astype(np.float64) - reference[:, None, :])
                    ratio = error / (2.0**-20 * magnitude[:, None, :] + 1e-300)
                    worst = max(worst, float(np.where(np.isnan(ratio), np.inf, ratio).max()))
    return {
        "block_scaled": _availability(gpu),
        "draws": draws,
        "differing_elements": differing,
        "bits_equal": differing == 0,
        "worst_error": worst,
        "passed": differing == 0 and worst <= 1.0,
    }


def _availability(gpu: Gpu) -> str:
    if gpu.device.arch == TWIN:
        return "not available on sm_90a: both probes are the sm_89 form there, and compare it with itself"
    return "kind::mxf8f6f4.block_scale with unit scales"


def throughput(gpu: Gpu, rng: np.random.Generator) -> dict[str, Any]:
    """TFLOP/s of both forms with every SM busy and nothing but MMAs, in turns; `ratio` is unit-scale over
    plain.
    """
    functions = _functions(gpu)
    ctas = gpu.device.sm_count * CTAS_PER_SM
    # Small operands, or 10**5 accumulations overflow, and infinities may run at another power.
    bits = (random_e4m3_bits((THREADS, 24), rng) & 0x87 | 0x20).astype(np.uint8)
    source, out = gpu.upload(bits.view(np.uint32)), gpu.empty((ctas, THREADS, OUTPUTS), "float32")

    def contender(form: str, iterations: int) -> Contender:
        params = _params(source.ptr, out.ptr, iterations)
        return Contender(lambda: gpu.launch(functions[form], ctas, THREADS, params), 1)

    first = interleave(gpu, {form: contender(form, 2000) for form in FORMS}, 3)
    slowest = max(timing.median_us for timing in first.values())
    iterations = int(min(1e6, max(2000, 2000 * 8000 / slowest)))  # about 8 ms
    times = interleave(gpu, {form: contender(form, iterations) for form in FORMS}, 15)
    rates = {form: FLOP_PER_CTA * iterations * ctas / times[form].median_us / 1e6 for form in FORMS}
    return {
        "block_scaled": _availability(gpu),
        "iterations": iterations,
        "unit_scale_tflop_per_s": round(rates["unit_scale"], 1),
        "plain_tflop_per_s": round(rates["plain"], 1),
        "ratio": round(rates["unit_scale"] / rates["plain"], 3),
        "times": {form: timing.as_json() for form, timing in times.items()},
        "passed": True,
    }


def bandwidth(gpu: Gpu, free_bytes: int) -> dict[str, Any]:
    """GB/s of a device-to-device copy, bytes read plus bytes written, of up to 1 GiB."""
    nbytes = min(1 << 30, free_bytes // 8) // 4096 * 4096
    source, target = gpu.empty((nbytes,), "uint8"), gpu.empty((nbytes,), "uint8")
    gpu.fill(source, 0x55)
    copy: Callable[[], object] = lambda: gpu.copy(target, source)  # noqa: E731
    timing = interleave(gpu, {"copy": Contender(copy, 1)}, 15)["copy"]
    return {
        "copied_bytes": nbytes,
        "copy_gb_per_s": round(2 * nbytes / timing.median_us / 1e3, 1),
        "times": {"copy": timing.as_json()},
        "passed": True,
    }
