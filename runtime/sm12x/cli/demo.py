"""``python -m sm12x demo``: an FP8 mixture-of-experts projection from BF16 data to a checked result.

gemma-4-26B-A4B's first expert projection: BF16 activations and weights quantised per token and per channel to
e4m3, as FP8-Dynamic checkpoints are, routed by a top-8 router, through ``sm12x.grouped_gemm``. Without a GPU
the same kernels run in the emulator, on a smaller problem.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from typing import Any

import sm12x
from sm12x import emulator
from sm12x.cli import workload as work
from sm12x.cli.doctor import Finding, problems
from sm12x.cli.progress import counting
from sm12x.emulator import devices

GPU_TOKENS, CPU_TOKENS, CPU_EXPERTS = 128, 16, 16
CHECKED_EXPERTS = 16


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _experts(text: str) -> int:
    value = _positive(text)
    if value > 1024:
        raise argparse.ArgumentTypeError(f"expected at most 1024, got {value}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--tokens", type=_positive, help=f"tokens T (default: {GPU_TOKENS} on a GPU, {CPU_TOKENS} without)"
    )
    parser.add_argument(
        "--experts",
        type=_experts,
        help=f"experts E (default: {work.EXPERTS} on a GPU, {CPU_EXPERTS} without)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random data (default: 0)")


def run(args: argparse.Namespace) -> int:
    found = problems()
    if found and not found[0].is_about_the_machine:
        return _broken_installation(args, found[0])
    problem = found[0] if found else None
    show_progress = not args.json or sys.stderr.isatty()
    tokens = args.tokens or (CPU_TOKENS if problem else GPU_TOKENS)
    experts = args.experts or (CPU_EXPERTS if problem else work.EXPERTS)
    lines = [f"sm12x {sm12x.__version__} demo: FP8 mixture-of-experts projection of gemma-4-26B-A4B"]
    if problem is not None:
        lines += _why_no_gpu(problem)
    _say(args, lines)
    workload = work.build(
        tokens, experts, args.seed, show_progress=show_progress, emulated=problem is not None
    )
    shape = ", ".join(f"{name} {value}" for name, value in workload.shape.items())
    _say(args, [f"shape      {shape}; {(workload.counts > 0).sum()} experts have rows"])
    try:
        report, lines = (
            _emulated(workload, show_progress) if problem else _on_gpu(workload, args.seed, show_progress)
        )
    except (sm12x.CudaError, sm12x.CubinError, emulator.EmulatorError) as error:
        return _failed(args, f"{type(error).__name__}: {error}")
    _say(args, lines)
    if args.json:
        print(json.dumps(report))
    else:
        print("ok" if report["ok"] else "FAILED: the error exceeds the tolerance")
    return 0 if report["ok"] else 1


def _say(args: argparse.Namespace, lines: list[str]) -> None:
    if not args.json:
        print("\n".join(lines), flush=True)


def _broken_installation(args: argparse.Namespace, problem: Finding) -> int:
    return _failed(args, f"{problem.check}: {problem.detail}\n-> {problem.remedy}")


def _failed(args: argparse.Namespace, why: str) -> int:
    print(f"sm12x demo: {why}", file=sys.stderr)
    if args.json:
        keys = "backend", "device", "variant", "max_rel_err", "tolerance_ratio", "time_us", "shape"
        print(json.dumps({"ok": False, **dict.fromkeys(keys)}))
    return 1


def _why_no_gpu(problem: Finding) -> list[str]:
    return [
        f"no GPU is used. {problem.check}: {problem.detail}",
        f"   -> {problem.remedy}" if problem.remedy else "   -> `python -m sm12x doctor` says more",
        "the same kernels run in the emulator, their PTX on this CPU instruction by instruction, on a "
        f"smaller problem: K {work.EMULATED_K} and N {work.EMULATED_N} instead of {work.K} and {work.N}",
        "no time of the emulator says anything about a GPU",
    ]


def _report(
    workload: work.Workload,
    backend: str,
    device: str,
    variant: str | None,
    time_us: float,
    error: tuple[float, float],
) -> dict[str, Any]:
    max_rel_err, ratio = error
    return {
        "ok": ratio <= 1.0,
        "backend": backend,
        "device": device,
        "variant": variant,
        # JSON has no infinity, which stands for a NaN in the output.
        "max_rel_err": max_rel_err if math.isfinite(max_rel_err) else None,
        "tolerance_ratio": ratio if math.isfinite(ratio) else None,
        "time_us": round(time_us, 3),
        "shape": workload.shape,
    }


def _error_line(error: tuple[float, float], experts: str) -> str:
    return (
        f"error      largest {error[0]:.2e} of the largest output; {error[1]:.3f} of the tolerance "
        f"(at most 1 passes) against float64, {experts}"
    )


def _emulated(workload: work.Workload, show_progress: bool) -> tuple[dict[str, Any], list[str]]:
    start = time.perf_counter()
    with counting("segments", enabled=show_progress) as show, emulator.use() as session:
        session.progress = show
        out = sm12x.grouped_gemm(
            workload.a,
            workload.b,
            a_scale=workload.a_scale,
            b_scale=workload.b_scale,
            offsets=workload.offsets,
            backend="emulator",
        )
    seconds = time.perf_counter() - start
    experts = work.sample_experts(workload, len(workload.counts), seed=0)
    error = work.check(workload, out, experts, show_progress=show_progress)
    device = f"{devices.find(session.options.device).name} (emulated)"
    variant = session.launches[-1].variant if session.launches else None
    lines = [
        f"backend    emulator on the CPU, as if it were an {devices.find(session.options.device).name}",
        *(f"launch     {launch.variant} ({launch.arch})" for launch in session.launches),
        f"time       {seconds:.2f} s to emulate, no GPU's time",
        _error_line(error, "all experts"),
    ]
    return _report(workload, "emulator", device, variant, seconds * 1e6, error), lines


def _on_gpu(workload: work.Workload, seed: int, show_progress: bool) -> tuple[dict[str, Any], list[str]]:
    from sm12x import driver
    from sm12x.cli import demo_gpu

    device = demo_gpu.open_device()
    result = demo_gpu.run(workload, device)
    experts = work.sample_experts(workload, CHECKED_EXPERTS, seed)
    error = work.check(workload, result.out, experts, show_progress=show_progress)
    limit, source = demo_gpu.bandwidth(device)
    least = workload.least_bytes()
    speed = least / result.time_us / 1e3
    if limit:
        floor_us = least / limit / 1e3
        floor = (
            f"{100 * floor_us / result.time_us:.0f}% of the memory floor "
            f"({least / 1e6:.1f} MB at {limit:.0f} GB/s, {source}: {floor_us:.1f} us)"
        )
    else:
        floor = f"{least / 1e6:.1f} MB; the memory floor is unknown, the driver reports no memory clock"
    enough = (
        "cold: at least 3 times the" if result.rotated_bytes >= 3 * result.l2_bytes else "NOT cold: for an"
    )
    cold = f"{enough} L2 of {result.l2_bytes / 1e6:.0f} MB"
    version = driver.get_driver().version
    lines = [
        f"device     {device.name}, compute capability {device.capability[0]}.{device.capability[1]}, "
        f"driver for CUDA {version // 1000}.{version % 1000 // 10}",
        f"variant    {result.variant} ({device.major}/{device.arch})",
        f"time       {result.time_us:.1f} us a call: CUDA graph, median of {demo_gpu.REPLAYS} replays; "
        f"weights read before any is read again: {result.rotated_bytes / 1e6:.0f} MB ({cold})",
        f"speed      {speed:.0f} GB/s, {floor}",
        _error_line(error, f"{len(experts)} of the {(workload.counts > 0).sum()} experts with rows"),
    ]
    return _report(workload, "cuda", device.name, result.variant, result.time_us, error), lines
