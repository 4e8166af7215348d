#!/usr/bin/env python3
"""The sm_90a twin of every GEMM variant, its preparation kernels and the MMA probes: the same calls on the
GPU and on the emulator.

    python tests/gpu/twins/gemms.py [--out FOLDER] [--jobs N] [-k TEXT] [--no-gpu]

Compared: outputs with the guards around them, the group arrays that preparation kernels write (byte by byte,
addresses relative to their operand), and the tensor maps that the GEMMs left in the workspace (the
emulator's, decoded and encoded by the real driver).

Outputs of "exact" problems, and all that is no output, must be equal bit for bit. Elsewhere both sides sum
the same products in another order and to another precision. With S = sum_k |a_scale a| |b_scale b|, an MMA of
32 products adds to an accumulator of magnitude at most S; hardware aligns its addends and keeps at least 21
bits, an error of at most 2^-20 S, and the emulator rounds once, 2^-24 S. Over the ceil(K / 32) MMAs of an
element the two sums part by at most ceil(K / 32) (2^-20 + 2^-24) S. Scales and bias are applied by the same
FP32 operations, so that what follows adds the rounding to the output's type on each side, half a unit in the
last place each:

    |emulator - GPU| <= ulp_out + ceil(K / 32) (2^-20 + 2^-24) S

A bound of that form is all but met by any output that the two sides round to different neighbours, since the
second term is small beside the first. The eight worst of an H200's run (2026-11-22) are such outputs, a unit
apart. The first, 0.99983, is one bfloat16 of 37,976 in "fp8_ptr_array_128x32x128_swap_bf16: list": 256 where
256.043 are allowed, for a reference, -33408.0024, that lies 0.0024 beside the middle of its two neighbours.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path[:0] = [str(ROOT / "runtime"), str(ROOT / "tests"), str(ROOT / "tests/gpu")]

import numpy as np  # noqa: E402
from twins import problems as data  # noqa: E402
from twins.probes import compare_probes  # noqa: E402
from twins.problems import Call, Operand, Problem  # noqa: E402
from twins.workspaces import compare_workspace, workspace_of  # noqa: E402

import sm12x  # noqa: E402
from sm12x import reference  # noqa: E402
from sm12x.reference.rounding import ulp  # noqa: E402

STEP = 2.0**-20 + 2.0**-24


def emulated(problem: Problem) -> dict[str, Any]:
    """Outputs, workspace, CTAs and where operands lay, of a call on the emulator."""
    from sm12x import emulator
    from sm12x.emulator import host_arrays

    call = data.make(problem)
    workspace = workspace_of(len(problem.rows))
    places: dict[str, int] = {}
    upload = host_arrays.Mirror.upload

    def noting(mirror: Any) -> None:
        upload(mirror)
        places.update({piece.name: piece.mirrored.ptr for piece in mirror._pieces})

    host_arrays.Mirror.upload = noting  # type: ignore[method-assign]
    start = time.monotonic()
    try:
        arguments = call.resolved(lambda _, operand: operand.host())
        with emulator.use(device="h200") as session:
            sm12x.grouped_gemm(**arguments, workspace=workspace, backend="emulator")
        ctas = max(session.launches[-1].grid)
        kernels = [launch.variant for launch in session.launches]
    except Exception as error:  # whatever it is, it is a call that the emulator does not run
        return {"error": f"{type(error).__name__}: {error}"[:600]}
    finally:
        host_arrays.Mirror.upload = upload  # type: ignore[method-assign]
    return {
        "outs": [out.buffer.copy() for out in call.outs],
        "workspace": workspace,
        "places": places,
        "ctas": ctas,
        "kernels": kernels,
        "seconds": time.monotonic() - start,
    }


def on_gpu(gpu: Any, problem: Problem) -> dict[str, Any]:
    from sm12x.device_memory import DeviceArray

    call = data.make(problem)
    held: dict[str, Any] = {}
    places: dict[str, int] = {}

    def take(name: str, operand: Operand) -> Any:
        buffer = held[name] = gpu.upload(operand.buffer)
        address = 0  # of an array without elements, as the emulator has it
        if 0 not in operand.shape:
            address = places[name] = buffer.ptr + operand.offset
        return DeviceArray(
            address, operand.shape, operand.dtype, buffer.ordinal, buffer.owner, operand.strides, gpu.stream
        )

    arguments = call.resolved(take)
    workspace = gpu.upload(workspace_of(len(problem.rows)))
    sm12x.grouped_gemm(**arguments, workspace=workspace, stream=gpu.stream)
    gpu.synchronize()
    places["workspace"] = workspace.ptr
    names = ["out"] if not problem.shapes else [f"out[{i}]" for i in range(len(problem.rows))]
    return {
        "outs": [gpu.download(held[name]) for name in names],
        "workspace": gpu.download(workspace),
        "places": places,
    }


def bounds(call: Call) -> list[np.ndarray]:
    """For each output how far the two sides may part, (rows, n); NaN where nothing is computed."""
    p = call.problem
    arguments = call.resolved(lambda _, operand: operand.host())
    operands = {name: arguments.get(name) for name in ("a", "b", "a_scale", "b_scale", "bias")}
    offsets = arguments.get("offsets")
    refs, sums = reference.grouped_gemm_float64(**operands, offsets=offsets)
    ks = [k for _, k in p.shapes] or [p.k]
    if not p.shapes:
        refs, sums = [refs], [sums]
    return [
        ulp(ref, p.out) + -(-k // 32) * STEP * total for ref, total, k in zip(refs, sums, ks, strict=True)
    ]


def compare(problem: Problem, ours: dict[str, Any], theirs: dict[str, Any], encode: Any) -> dict[str, Any]:
    """What differs, and how much is equal."""
    result: dict[str, Any] = {
        "problem": problem.key,
        "failures": [],
        "elements": 0,
        "identical": 0,
        "worst": 0.0,
    }
    for side, found in (("emulator", ours), ("GPU", theirs)):
        if "error" in found:
            result["failures"].append(f"{side}: {found['error']}")
    if result["failures"]:
        return result
    call = data.make(problem)
    strict = problem.values == "exact"
    limits = bounds(call) if problem.offsets is None else [None] * len(call.outs)
    for number, out in enumerate(call.outs):
        _compare_output(result, call, number, out, ours, theirs, limits[number], strict)
    compare_workspace(result, problem, call, ours, theirs, encode)
    return result


def _compare_output(
    result: dict[str, Any],
    call: Call,
    number: int,
    out: Operand,
    ours: dict[str, Any],
    theirs: dict[str, Any],
    limit: Any,
    strict: bool,
) -> None:
    sides = [
        Operand(found["outs"][number], out.offset, out.shape, out.strides, out.dtype)
        for found in (ours, theirs)
    ]
    before = out.buffer.copy()
    owned = call.owned[number]
    mine, real = (side.host()[owned].copy() for side in sides)
    bits = [values.view(np.uint16) for values in (mine, real)]
    equal = bits[0] == bits[1]
    result["elements"] += equal.size
    result["identical"] += int(equal.sum())
    label = f"output {number}"
    if strict and not equal.all():
        at = tuple(int(i) for i in np.argwhere(~equal)[0])
        result["failures"].append(
            f"{label}: {int((~equal).sum())} elements differ, first {at}: {mine[at]} and {real[at]}"
        )
    elif not strict and equal.size:
        x, y = mine.astype(np.float64), real.astype(np.float64)
        same = equal | (np.isnan(x) & np.isnan(y))
        with np.errstate(invalid="ignore"):
            ratio = np.where(same, 0.0, np.abs(x - y) / limit[owned])
        ratio = np.where(np.isnan(ratio), np.inf, ratio)
        result["worst"] = max(result["worst"], float(ratio.max()))
        if ratio.max() > 1:
            at = tuple(int(i) for i in np.unravel_index(int(ratio.argmax()), ratio.shape))
            result["failures"].append(f"{label}: {ratio.max():.3g} of the bound at {at}: {x[at]} and {y[at]}")
    # Everything else, guards included: as it was on both sides, or, with bad offsets, the same on both.
    for side in sides:
        side.host()[owned] = out.host()[owned]
    names = ("emulator", "GPU")
    if call.problem.offsets is not None:
        wrong = np.flatnonzero(sides[0].buffer != sides[1].buffer)
        if len(wrong):
            result["failures"].append(f"{label}: {len(wrong)} bytes differ, first at {int(wrong[0])}")
        for side in sides:
            side.host()[...] = out.host()
    for name, side in zip(names, sides, strict=True):
        wrong = np.flatnonzero(side.buffer != before)
        if len(wrong):
            result["failures"].append(
                f"{label}: {name} wrote {len(wrong)} bytes outside, first at {int(wrong[0])}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2)
    parser.add_argument("-k", dest="text", default="", help="problems whose name has this")
    parser.add_argument(
        "--no-gpu", action="store_true", help="the emulator against itself, to try this program"
    )
    options = parser.parse_args()
    start = time.monotonic()
    chosen = [p for p in data.problems() if options.text in p.key]
    # The longest first.
    chosen.sort(
        key=lambda p: (
            -sum(-(-max(r, 1) // 64) for r in p.rows) * max([p.n * p.k, *(n * k for n, k in p.shapes)])
        )
    )
    results: list[dict[str, Any]] = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(emulated, problem) for problem in chosen]
        if options.no_gpu:
            gpu, encode = None, None
        else:
            from twins.libcuda import Cuda

            from sm12x.validation.device import Gpu

            gpu, encode = Gpu.open(0), Cuda().encode
        for problem, future in zip(chosen, running, strict=True):
            if gpu is None:
                theirs = future.result()
            else:
                try:
                    theirs = on_gpu(gpu, problem)
                except Exception as error:
                    theirs = {"error": f"{type(error).__name__}: {error}"[:600]}
            ours = future.result()
            result = compare(problem, ours, theirs, encode)
            result["emulator_seconds"] = round(ours.get("seconds", 0.0), 2)
            result["kernels"] = ours.get("kernels")
            results.append(result)
    if gpu is not None:
        results += compare_probes(gpu, STEP)
    return report(results, Path(options.out), time.monotonic() - start)


def report(results: list[dict[str, Any]], out: Path, seconds: float) -> int:
    out.mkdir(parents=True, exist_ok=True)
    width = max(len(row["problem"]) for row in results)
    maps: dict[str, int] = {}
    for row in sorted(results, key=lambda row: row["problem"]):
        for name, count in row.get("maps", {}).items():
            maps[name] = maps.get(name, 0) + count
        word = "ok" if not row["failures"] else "FAILED"
        print(
            f"{row['problem']:<{width}}  {word:6}  {row['identical']:7} of {row['elements']:7} bit-identical,"
            f" worst {row['worst']:.5f} of the bound"
            + (f", status {row['status'][0]}" if row.get("status", [0])[0] else "")
            + (f", {row['identical_with_22_bits']} with 22 bits" if "identical_with_22_bits" in row else "")
        )
        for failure in row["failures"]:
            print(f"    {failure}")
    failed = sum(bool(row["failures"]) for row in results)
    elements, same = (sum(row[name] for row in results) for name in ("elements", "identical"))
    arrays = sum(row.get("array_bytes", 0) for row in results)
    worst = max(row["worst"] for row in results)
    summary = {
        "problems": len(results),
        "failed": failed,
        "elements": elements,
        "identical": same,
        "worst": worst,
        "group_array_bytes": arrays,
        "tensor_maps": maps,
        "seconds": round(seconds, 1),
    }
    text = json.dumps({**summary, "results": results}, indent=1, default=str)
    (out / "gemms.json").write_text(text + "\n", encoding="utf-8")
    print(f"tensor maps: {maps}")
    print(
        f"gemms: {len(results) - failed} of {len(results)} problems agree, {same} of {elements} outputs "
        f"bit-identical, worst {worst:.5f} of the bound, {arrays} bytes of group arrays, {seconds:.0f} s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
