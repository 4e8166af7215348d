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
from twins.problems import Call, Operand, Problem  # noqa: E402

import sm12x  # noqa: E402
from sm12x import abi, manifest, reference  # noqa: E402
from sm12x.reference.rounding import ulp  # noqa: E402

STEP = 2.0**-20 + 2.0**-24
POINTERS = ("PTR_A", "PTR_B", "PTR_D", "M_SCALE", "N_SCALE", "BIAS")
PROBE_STEPS = (1, 3, 100)


def workspace_of(groups: int) -> np.ndarray:
    from sm12x import emulator

    with emulator.use(device="h200"):
        size = sm12x.workspace_size(groups, backend="emulator")
    found = data.aligned(size)
    found[:] = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    return found


def relative(arrays: np.ndarray, groups: int, call: Call, places: dict[str, int]) -> np.ndarray:
    """Group arrays with addresses as (number of the operand, offset from its first element)."""
    found = arrays.copy()
    padded = abi.groups_padded(groups)
    spans = {
        name: (places[name] - operand.offset, len(operand.buffer))
        for name, operand in call.operands.items()
        if name in places  # those with elements
    }
    spans["workspace"] = places["workspace"], len(arrays) + (1 << 20)
    numbers = {name: number for number, name in enumerate(sorted([*call.operands, "workspace"]), 1)}
    for pointer in POINTERS:
        start = padded * getattr(abi, f"SM12X_OFFSET_{pointer}")
        words = found[start : start + 8 * padded].view(np.uint64)
        for i, word in enumerate(words.tolist()):
            for name, (first, size) in spans.items():
                if first <= word < first + size:
                    words[i] = numbers[name] << 48 | (word - places[name]) % (1 << 48)
                    break
    return found


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
    _compare_workspace(result, problem, call, ours, theirs, encode)
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


def _compare_workspace(
    result: dict[str, Any],
    problem: Problem,
    call: Call,
    ours: dict[str, Any],
    theirs: dict[str, Any],
    encode: Any,
) -> None:
    # List calls leave groups without rows out.
    groups = sum(rows > 0 for rows in problem.rows) if problem.shapes else len(problem.rows)
    variant = manifest.default().variants[problem.variant]
    maps = -(-ours["ctas"] * variant.workspace_per_cta // 128) * 128
    end = maps + abi.group_arrays_bytes(groups)
    found = [
        relative(side["workspace"][maps:end].copy(), groups, call, side["places"]) for side in (ours, theirs)
    ]
    wrong = np.flatnonzero(found[0] != found[1])
    if len(wrong):
        at = int(wrong[0])
        near = [side[at // 8 * 8 : at // 8 * 8 + 8].tobytes().hex() for side in found]
        result["failures"].append(
            f"group arrays: {len(wrong)} of {end - maps} bytes differ, first at {at}: {near[0]} and {near[1]}"
        )
    status = abi.status_offset(groups)
    if not problem.shapes:  # list calls write none
        result["status"] = [int(side[status : status + 4].view(np.int32)[0]) for side in found]
    result["array_bytes"] = end - maps
    if not np.array_equal(ours["workspace"][end:], theirs["workspace"][end:]):
        result["failures"].append("bytes behind the group arrays differ")
    result["maps"] = _compare_maps(ours, theirs, maps, call, encode)


def _compare_maps(
    ours: dict[str, Any], theirs: dict[str, Any], size: int, call: Call, encode: Any
) -> dict[str, int]:
    """How many tensor maps are the same: untouched on both sides, or the emulator's, encoded by the driver
    with the GPU's address, the GPU's bytes."""
    from sm12x.emulator import tensor_map

    tally = {"untouched": 0, "equal": 0, "differ": 0, "not comparable": 0}
    begin = workspace_of(len(call.problem.rows))
    for at in range(0, size, 128):
        mine, real = (side["workspace"][at : at + 128] for side in (ours, theirs))
        if np.array_equal(mine, begin[at : at + 128]):
            tally["untouched" if np.array_equal(mine, real) else "differ"] += 1
            continue
        try:
            decoded = tensor_map.decode(mine.tobytes())
        except ValueError:
            tally["not comparable"] += 1
            continue
        address = None
        for name, place in ours["places"].items():
            if name in call.operands:
                first = place - call.operands[name].offset
                if first <= decoded.address < first + len(call.operands[name].buffer):
                    address = decoded.address - place + theirs["places"][name]
        if address is None or encode is None:
            tally["not comparable"] += 1
            continue
        raw = tensor_map._Raw.unpack(mine.tobytes(), blank=False)
        try:
            same = encoded_alike(decoded, raw, address, encode)
        except RuntimeError:
            tally["not comparable"] += 1
            continue
        tally["equal" if same(real) else "differ"] += 1
    return tally


def encoded_alike(decoded: Any, raw: Any, address: int, encode: Any) -> Any:
    """`real -> bool`: whether 128 bytes are what the driver encodes for a decoded map, in all bits but those
    that say the rank or belong to dimensions beyond it, where a kernel may leave anything. Raises
    RuntimeError where the driver refuses it."""
    from sm12x.emulator import tensor_map

    rank = decoded.rank
    arguments = {
        "kind": tensor_map.ELEMENTS.index(decoded.element),
        "interleave": (0, 16, 32).index(decoded.interleave),
        "swizzle": (0, 32, 64, 128).index(decoded.swizzle),
        "l2": decoded.l2_promotion,
        "fill": ("zero", "nan").index(decoded.fill),
    }

    def full(dim: int, stride: int, box: int, step: int, rank_of: int) -> np.ndarray:
        lists = {
            "dims": [*raw.dims[:rank], *[dim] * (5 - rank)],
            "strides": [*raw.strides[: rank - 1], *[stride] * (5 - rank)],
            "box": [*raw.box[:rank], *[box] * (5 - rank)],
            "steps": [*raw.element_strides[:rank], *[step] * (5 - rank)],
        }
        return np.frombuffer(encode(address, {**arguments, **lists, "rank": rank_of}), np.uint8)

    exact = full(1, 16, 1, 1, rank)
    least, most = full(1, 16, 1, 1, 5), full(1 << 32, (1 << 40) - 32, 2, 8, 5)
    known = ~((exact ^ least) | (least ^ most) | (exact ^ most))
    return lambda real: bool(((real ^ exact) & known == 0).all())


# The MMA probes


def probe_operands(values: str) -> np.ndarray:
    rng = np.random.default_rng(zlib_of(values))
    if values == "exact":
        import ml_dtypes

        return rng.integers(-3, 4, (128, 24)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8).view(np.uint32)
    return data.random_e4m3_bits((128, 24), rng).view(np.uint32)


def zlib_of(text: str) -> int:
    import zlib

    return zlib.crc32(text.encode())


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


def compare_probes(gpu: Any) -> list[dict[str, Any]]:
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
                    limit = steps * (steps + 1) / 2 * STEP * magnitude[:, None, :]
                    ratio = np.abs(mine.astype(np.float64) - real) / (limit + 1e-300)
                    row["worst"] = float(np.where(np.isnan(ratio), np.inf, ratio).max())
                    if row["worst"] > 1:
                        row["failures"].append(f"{row['worst']:.3g} of the bound")
                found.append(row)
    return found


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
        results += compare_probes(gpu)
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
            f" worst {row['worst']:.3f} of the bound"
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
        f"bit-identical, worst {worst:.3f} of the bound, {arrays} bytes of group arrays, {seconds:.0f} s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
