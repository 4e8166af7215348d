"""The MMA probes on both sides: one CTA, sums in FP32 of 1, 3 and 100 MMAs."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from twins import problems as data

from sm12x import abi, manifest

PROBE_STEPS = (1, 3, 100)


def probe_operands(values: str) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(values.encode()))
    if values == "exact":
        import ml_dtypes

        return rng.integers(-3, 4, (128, 24)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8).view(np.uint32)
    return data.random_e4m3_bits((128, 24), rng).view(np.uint32)


def emulated_probe(key: str, values: str, steps: int, truncate_bits: int | None = None) -> np.ndarray:
    """float32 (128, 8, 4)."""
    from sm12x.emulator.launch import launch, load
    from sm12x.emulator.memory import GlobalMemory
    from sm12x.emulator.shipped import read_ptx

    variant = manifest.default().variants[key]
    memory = GlobalMemory()
    program = load(read_ptx(variant, "sm_90a"), memory, truncate_bits=truncate_bits).kernel(variant.symbol)
    operands = probe_operands(values)
    source, out = memory.allocate(operands.nbytes), memory.allocate(128 * 128)
    memory.write(source, operands)
    params = abi.sm12x_mma_probe_params(out=out, iterations=steps)
    setattr(params, "in", source)
    launch(program, (1, 1, 1), (variant.threads, 1, 1), 0, bytes(params), memory=memory)
    return np.frombuffer(memory.read(out, 128 * 128), np.float32).reshape(128, 8, 4).copy()


def compare_probes(gpu: Any, step: float) -> list[dict[str, Any]]:
    """A row for each probe and kind of operands. `step` is by how much the two sides may part in one MMA,
    over the magnitude of the sum."""
    from sm12x.validation import probe

    found = []
    functions = probe._functions(gpu)
    for form, function in functions.items():
        for values in ("exact", "random"):
            operands = probe_operands(values)
            _, magnitude = probe.fragment_product(operands)
            for steps in PROBE_STEPS:
                real = probe._run(gpu, function, operands, steps)
                mine = emulated_probe(f"mma_probe_{form}", values, steps)
                equal = mine.view(np.uint32) == real.view(np.uint32)
                cut = emulated_probe(f"mma_probe_{form}", values, steps, 22).view(np.uint32) == real.view(
                    np.uint32
                )
                row = {
                    "problem": f"mma_probe_{form}: {values}, {steps} steps",
                    "failures": [],
                    "elements": equal.size,
                    "identical": int(equal.sum()),
                    "identical_with_22_bits": int(cut.sum()),
                    "worst": 0.0,
                }
                if values == "exact":
                    if not equal.all():
                        row["failures"].append(f"{int((~equal).sum())} elements differ")
                else:
                    # Step i adds to a sum of at most i times the magnitude.
                    limit = steps * (steps + 1) / 2 * step * magnitude[:, None, :]
                    ratio = np.abs(mine.astype(np.float64) - real) / (limit + 1e-300)
                    row["worst"] = float(np.where(np.isnan(ratio), np.inf, ratio).max())
                    if row["worst"] > 1:
                        row["failures"].append(f"{row['worst']:.3g} of the bound")
                found.append(row)
    return found
