"""``python -m sm12x emulate``: a shipped kernel's PTX on the CPU, through the runtime's own launch path.

A packed call on random operands: the preparation kernel and the GEMM, every instruction of them, in an order
of warps that the seed decides. ``--check`` compares the result with float64. What the kernels did is counted,
and gives a floor: the time that the device needs for it at least.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import sm12x
from sm12x import emulator, manifest, reference
from sm12x.arrays import numpy_dtype
from sm12x.cli import emulate_report, workload
from sm12x.cli.progress import counting
from sm12x.emulator import devices
from sm12x.ops.validate import MAX_GROUPS

_OPTIONS = "device", "sms", "seed", "resident", "truncate_bits", "counters"
_MOST_ROWS = 2**31 - 1  # offsets are int32
_SCALE = 2.0**-7  # of each side: keeps float16 outputs of any finite FP8 operands in range


@dataclass(frozen=True)
class Problem:
    """One packed call. a (M, K), a_scale (M, 1), b (E, N, K), b_scale (E, N, 1), offsets (E + 1,)."""

    a: NDArray[Any]
    b: NDArray[Any]
    a_scale: NDArray[np.float32]
    b_scale: NDArray[np.float32]
    offsets: NDArray[np.int32]


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"expected at least {least}, got {value}")
    return value


def _count(text: str) -> int:
    return _at_least(0, text)


def _positive(text: str) -> int:
    return _at_least(1, text)


def _rows(text: str) -> list[int]:
    entries = text.split(",")
    if not all(entry.strip().lstrip("+-").isdecimal() for entry in entries):
        raise argparse.ArgumentTypeError(f"expected rows for each group, as in 5,0,130, got {text!r}")
    rows = [_count(entry) for entry in entries]
    if len(rows) > MAX_GROUPS:
        raise argparse.ArgumentTypeError(f"expected at most {MAX_GROUPS} groups, got {len(rows)}")
    if sum(rows) > _MOST_ROWS:
        raise argparse.ArgumentTypeError(f"expected at most {_MOST_ROWS} rows in all, got {sum(rows)}")
    return rows


def _variant(text: str) -> str:
    keys = [variant.key for variant in manifest.default().gemms()]
    if text.partition(":")[0] not in keys:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(keys)}, got {text!r}")
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--variant",
        type=_variant,
        help="the kernel, one of `python -m sm12x kernels`, with :split or :whole behind it for how K is "
        "shared out (default: the best)",
    )
    parser.add_argument(
        "--m",
        type=_rows,
        default=[5, 0, 130],
        metavar="M,M,...",
        help="rows of each group (default: 5,0,130)",
    )
    parser.add_argument("--n", type=_positive, default=256, help="output features (default: 256)")
    parser.add_argument("--k", type=_positive, default=704, help="reduction (default: 704)")
    parser.add_argument(
        "--seed", type=_count, default=0, help="seed of the data and of the order of warps (default: 0)"
    )
    parser.add_argument("--check", action="store_true", help="compare the result with float64")
    parser.add_argument(
        "--device",
        choices=list(devices.GPUS),
        default=devices.DEFAULT,
        help=f"the device to be (default: {devices.DEFAULT})",
    )
    parser.add_argument("--sms", type=_positive, help="SMs that it has, for speed (default: all)")
    parser.add_argument(
        "--resident", type=_positive, help="CTAs that are let in at a time (default: as the seed says)"
    )
    parser.add_argument(
        "--truncate-bits",
        type=_positive,
        metavar="BITS",
        help="bits that sums of FP32 MMAs keep: hardware is reported to keep 22 (default: one rounding)",
    )
    parser.add_argument(
        "--no-counters", dest="counters", action="store_false", help="count nothing, which is a little faster"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    try:
        problem = _random_problem(args)
    except (MemoryError, OverflowError, ValueError) as error:  # NumPy's ValueError: larger than any array
        print(f"sm12x emulate: m, n, k: expected operands that fit into memory: {error}", file=sys.stderr)
        return 2
    out_dtype = (
        "bfloat16"
        if args.variant is None
        else manifest.default().variants[args.variant.partition(":")[0]].out
    )
    report: dict[str, Any] = {
        "ok": False,
        "max_rel_err": None,
        "tolerance_ratio": None,
        "violations": [],
        "device": args.device,
        "seed": args.seed,
        "shape": {"m": args.m, "M": sum(args.m), "E": len(args.m), "N": args.n, "K": args.k},
        "launches": [],
        **emulate_report.as_json(None, _least(problem, out_dtype), devices.find(args.device)),
    }
    try:
        with _session(args) as session:
            try:
                out = _emulate(problem, out_dtype, args.variant)
            finally:
                report["launches"] = _described(session)
    except emulator.EmulatorError as error:
        if error.violation is None:  # the emulator's fault, not the kernel's
            report["error"] = str(error)
        else:
            report["violations"] = [{"variant": session.failed, **asdict(error.violation)}]
        return _finish(args, report, f"{session.failed}: {error}")
    except ValueError as error:
        print(f"sm12x emulate: {error}", file=sys.stderr)
        return 2
    report["ok"] = True
    gpu, least = devices.find(args.device), _least(problem, out_dtype)
    found = emulate_report.account(session, gpu, args.sms)
    report |= emulate_report.as_json(found, least, gpu)
    if args.check:
        report |= _check(problem, out)
    return _finish(args, report, None, [] if found is None else emulate_report.lines(found, least, gpu))


@contextmanager
def _session(args: argparse.Namespace) -> Iterator[emulator.Session]:
    """The emulator as the arguments want it, with a bar for what is not over in a second."""
    options = {name: getattr(args, name) for name in _OPTIONS}
    show_progress = not args.json or sys.stderr.isatty()
    with counting("segments", enabled=show_progress) as show, emulator.use(**options) as session:
        session.progress = show
        yield session


def _random_problem(args: argparse.Namespace) -> Problem:
    rng = np.random.default_rng(args.seed)
    rows, groups = sum(args.m), len(args.m)

    def scales(*shape: int) -> NDArray[np.float32]:
        drawn: NDArray[np.float32] = (rng.uniform(0.5, 1.5, shape) * _SCALE).astype(np.float32)
        return drawn

    return Problem(
        a=reference.random_fp8((rows, args.k), rng),
        b=reference.random_fp8((groups, args.n, args.k), rng),
        a_scale=scales(rows, 1),
        b_scale=scales(groups, args.n, 1),
        offsets=np.cumsum([0, *args.m]).astype(np.int32),
    )


def _emulate(problem: Problem, out_dtype: str, variant: str | None) -> NDArray[Any]:
    out: NDArray[Any] = sm12x.grouped_gemm(
        problem.a,
        problem.b,
        a_scale=problem.a_scale,
        b_scale=problem.b_scale,
        offsets=problem.offsets,
        out_dtype=out_dtype,
        variant=variant,
        backend="emulator",
    )
    return out


def _check(problem: Problem, out: NDArray[Any]) -> dict[str, Any]:
    ref, abs_sum = reference.grouped_gemm_float64(
        problem.a,
        problem.b,
        a_scale=problem.a_scale,
        b_scale=problem.b_scale,
        offsets=problem.offsets,
    )
    error, ratio = reference.check(out, ref, abs_sum, problem.a.shape[1])
    return {
        "ok": ratio <= 1.0,
        # JSON has no infinity, which stands for a NaN in the output.
        "max_rel_err": error if math.isfinite(error) else None,
        "tolerance_ratio": ratio if math.isfinite(ratio) else None,
    }


def _least(problem: Problem, out_dtype: str) -> emulate_report.Least:
    """What any kernel must do for a problem."""
    counts, (n, k) = np.diff(problem.offsets), problem.b.shape[1:]
    moved = workload.least_bytes(counts, n, k, numpy_dtype(out_dtype).itemsize)
    return emulate_report.Least(moved + problem.offsets.nbytes, problem.a.shape[0] * n * k)


def _described(session: emulator.Session) -> list[dict[str, Any]]:
    return [
        {
            "variant": launch.variant,
            "arch": launch.arch,
            "grid": list(launch.grid),
            "block": list(launch.block),
            "shared_memory": launch.shared_memory,
            "emulation_seconds": round(launch.seconds, 3),
            "segments": launch.result.segments,
            "operations": launch.result.operations,
            "counters": None if launch.counters is None else launch.counters.to_dict(),
        }
        for launch in session.launches
    ]


def _finish(
    args: argparse.Namespace, report: dict[str, Any], failure: str | None, counted: Sequence[str] = ()
) -> int:
    if args.json:
        print(json.dumps(report))
    else:
        print("\n".join(_lines(args, report, failure, counted)))
    return 0 if report["ok"] else 1


def _lines(
    args: argparse.Namespace, report: dict[str, Any], failure: str | None, counted: Sequence[str]
) -> list[str]:
    gpu = devices.find(args.device)
    rows = ", ".join(str(m) for m in args.m)
    lines = [
        f"device     {gpu.name}, emulated, {args.sms or gpu.sm_count} SMs",
        f"problem    {len(args.m)} groups with {rows} rows, N {args.n}, K {args.k}; seed {args.seed}",
    ]
    for launch in report["launches"]:
        size = max(launch["grid"])
        lines.append(
            f"launch     {launch['variant']} ({launch['arch']}): {size} x {launch['block'][0]} threads, "
            f"emulated in {launch['emulation_seconds']:.1f} s"
        )
    lines += counted
    if failure is not None:
        return [*lines, f"FAILED: {failure}"]
    if not report["launches"]:
        return [*lines, "ok: no kernel had to run, there are no rows"]
    if not args.check:
        return [*lines, "ok: every kernel ran to its end (--check compares the result)"]
    if report["tolerance_ratio"] is None:
        return [*lines, "FAILED: the output has a NaN where there is none in the reference"]
    lines.append(
        f"error      largest {report['max_rel_err']:.2e} of the largest output; "
        f"{report['tolerance_ratio']:.3f} of the tolerance (at most 1 passes) against float64"
    )
    return [*lines, "ok" if report["ok"] else "FAILED: the error exceeds the tolerance"]
