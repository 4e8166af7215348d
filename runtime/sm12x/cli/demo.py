"""``python -m sm12x demo``: one FP8 expert layer, from a checkpoint's files to a checked result.

The layer comes from a Hugging Face directory (``--checkpoint``), or from a small one that is written first,
in the form of gemma-4-26B-A4B's FP8-Dynamic checkpoints. Random tokens are routed by the layer's own router
and go through ``sm12x.fused_moe``. Without a GPU the same kernels run in the emulator, on a smaller layer.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import sm12x
from sm12x import emulator
from sm12x.cli import workload as work
from sm12x.cli.doctor import Finding, problems
from sm12x.cli.progress import counting
from sm12x.emulator import devices

GPU_TOKENS, CPU_TOKENS, CPU_TOKENS_OF_A_CHECKPOINT = 128, 16, 1
CHECKED_TOKENS = 16
KEYS = (
    *("backend", "device", "variant", "max_rel_err", "tolerance_ratio", "time_us", "shape"),
    *("checkpoint", "layer", "model_type", "scheme"),
)


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


def _layer(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected at least 0, got {value}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="directory of a Mixtral, Qwen3-MoE or Gemma 4 model (default: a small one is made first)",
    )
    source.add_argument(
        "--experts",
        type=_experts,
        help="experts E of the model that is made (default: 64 on a GPU, 16 without)",
    )
    parser.add_argument("--layer", type=_layer, default=0, metavar="L", help="its layer (default: 0)")
    parser.add_argument(
        "--tokens",
        type=_positive,
        help=f"tokens T (default: {GPU_TOKENS} on a GPU; without, {CPU_TOKENS}, or "
        f"{CPU_TOKENS_OF_A_CHECKPOINT} with --checkpoint)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random data (default: 0)")


def run(args: argparse.Namespace) -> int:
    found = problems()
    if found and not found[0].is_about_the_machine:
        return _failed(args, f"{found[0].check}: {found[0].detail}\n-> {found[0].remedy}")
    try:
        with ExitStack() as stack:
            report, lines = _from_files(args, found[0] if found else None, stack)
    except (sm12x.CheckpointError, sm12x.CudaError, sm12x.CubinError, emulator.EmulatorError) as error:
        return _failed(args, f"{type(error).__name__}: {error}")
    except ImportError as error:  # safetensors
        return _failed(args, str(error))
    _say(args, lines)
    if args.json:
        print(json.dumps(report))
    else:
        print("ok" if report["ok"] else "FAILED: the error exceeds the tolerance")
    return 0 if report["ok"] else 1


def _from_files(
    args: argparse.Namespace, problem: Finding | None, stack: ExitStack
) -> tuple[dict[str, Any], list[str]]:
    """The whole job; `stack` keeps the files of a checkpoint that is made here as long as they are needed."""
    show_progress = not args.json or sys.stderr.isatty()
    emulated = problem is not None
    lines = [f"sm12x {sm12x.__version__} demo: one FP8 expert layer, from a checkpoint's files to its output"]
    if problem is not None:
        lines += _why_no_gpu(problem)
    _say(args, lines)
    if args.checkpoint is None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sm12x-demo-")))
        experts = args.experts or (work.EMULATED_EXPERTS if emulated else work.EXPERTS)
        work.make(folder, experts, args.seed, emulated=emulated)
        _say(
            args,
            [f"made       a checkpoint with random weights ({_size(folder)}); --checkpoint DIR: a real one"],
        )
    else:
        folder = Path(args.checkpoint)
    few = CPU_TOKENS if args.checkpoint is None else CPU_TOKENS_OF_A_CHECKPOINT
    tokens = args.tokens or (few if emulated else GPU_TOKENS)
    start = time.perf_counter()
    workload = work.build(folder, args.layer, tokens, args.seed, show_progress=show_progress)
    layer = workload.layer
    _say(
        args,
        [
            f"layer      {args.layer} of {layer.model_type}: {layer.scheme}; {layer.activation}; "
            f"read in {time.perf_counter() - start:.2f} s",
            "shape      "
            + ", ".join(f"{name} {value}" for name, value in workload.shape.items())
            + f"; {(workload.counts > 0).sum()} experts have tokens",
        ],
    )
    report, lines = (
        _emulated(workload, show_progress)
        if emulated
        else _on_gpu(workload, folder, args.seed, show_progress)
    )
    report |= {
        "checkpoint": args.checkpoint,
        "layer": args.layer,
        "model_type": layer.model_type,
        "scheme": str(layer.scheme),
    }
    return report, lines


def _size(folder: Path) -> str:
    files = list(folder.glob("*.safetensors"))
    return f"{len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB"


def _say(args: argparse.Namespace, lines: list[str]) -> None:
    if not args.json:
        print("\n".join(lines), flush=True)


def _failed(args: argparse.Namespace, why: str) -> int:
    print(f"sm12x demo: {why}", file=sys.stderr)
    if args.json:
        print(json.dumps({"ok": False, **dict.fromkeys(KEYS)}))
    return 1


def _why_no_gpu(problem: Finding) -> list[str]:
    return [
        f"no GPU is used. {problem.check}: {problem.detail}",
        f"   -> {problem.remedy}" if problem.remedy else "   -> `python -m sm12x doctor` says more",
        "the same kernels run in the emulator, their PTX on this CPU instruction by instruction; "
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


def _error_line(error: tuple[float, float], tokens: str) -> str:
    return (
        f"error      largest of a token {error[0]:.2e} of its length; {error[1]:.3f} of the tolerance "
        f"(at most 1 passes) against float64, {tokens}"
    )


def _emulated(workload: work.Workload, show_progress: bool) -> tuple[dict[str, Any], list[str]]:

    start = time.perf_counter()
    with counting("segments", enabled=show_progress) as show, emulator.use() as session:
        session.progress = show
        out = sm12x.fused_moe(
            workload.x,
            topk_weights=workload.topk_weights,
            topk_ids=workload.topk_ids,
            **workload.layer.arguments(),
            backend="emulator",
        )
    seconds = time.perf_counter() - start
    error = work.check(workload, out, list(range(len(out))), show_progress=show_progress)
    part = devices.find(session.options.device).name
    lines = [
        f"backend    emulator on the CPU, as if it were an {part}",
        *(f"launch     {launch.variant} ({launch.arch})" for launch in session.launches),
        f"time       {seconds:.2f} s to emulate, no GPU's time",
        _error_line(error, "all tokens"),
    ]
    variants = ", ".join(launch.variant for launch in session.launches) or None
    return _report(workload, "emulator", f"{part} (emulated)", variants, seconds * 1e6, error), lines


def _on_gpu(
    workload: work.Workload, folder: Path, seed: int, show_progress: bool
) -> tuple[dict[str, Any], list[str]]:
    from sm12x import driver
    from sm12x.cli import demo_gpu

    device = demo_gpu.open_device()
    result = demo_gpu.run(workload, folder, device)
    tokens = work.sample_tokens(workload, CHECKED_TOKENS, seed)
    error = work.check(workload, result.out, tokens, show_progress=show_progress)
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
        f"driver for CUDA {version // 1000}.{version % 1000 // 10}, cubins {device.major}/{device.arch}",
        f"time       {result.time_us:.1f} us a layer: CUDA graph, median of {demo_gpu.REPLAYS} replays; "
        f"weights read before any is read again: {result.rotated_bytes / 1e6:.0f} MB ({cold})",
        f"speed      {speed:.0f} GB/s, {floor}",
        _error_line(error, f"{len(tokens)} of {workload.x.shape[0]} tokens"),
    ]
    return _report(workload, "cuda", device.name, None, result.time_us, error), lines
