"""``python -m sm12x bench``: time the grouped GEMM on shapes of real models, print a table, store JSON, draw
a plot.

Needs a GPU, and nothing but sm12x; torch and Triton are timed beside it where they are installed. With
``--from`` it only draws what an earlier run stored.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw time against T, with the floor")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the results")
    parser.add_argument(
        "--from", type=Path, dest="stored", metavar="FILE", help="plot and print stored results, run nothing"
    )
    parser.add_argument("--device", type=int, default=0, help="CUDA ordinal (default: 0)")
    parser.add_argument("--tokens", default="1,8,32,128", help="values of T (default: 1,8,32,128)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only shapes whose name contains this")
    parser.add_argument("--rounds", type=int, default=25, help="replays of each contender (default: 25)")
    parser.add_argument("--no-peers", action="store_true", help="leave torch and Triton out")


def run(args: argparse.Namespace) -> int:
    """0 where all shapes ran with right results, 1 where one did not, 2 for bad usage."""
    if args.stored:
        try:
            result = json.loads(args.stored.read_text(encoding="utf-8"))
            count = len(result["rows"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"--from: {args.stored} cannot be read as results of a benchmark: {error}", file=sys.stderr)
            return 2
        print(f"{count} rows of {result.get('date')}, {result.get('device')}")
    else:
        try:
            tokens = tuple(int(text) for text in args.tokens.split(","))
        except ValueError:
            tokens = ()
        if not tokens or min(tokens) < 1:
            print(
                f"--tokens: expected positive integers between commas, got {args.tokens!r}", file=sys.stderr
            )
            return 2
        result = _measure(args, tokens)
        if not result["rows"] and not result["not_run"]:
            print(f"--only: no shape's name contains {args.only!r}", file=sys.stderr)
            return 2
    from .validate import print_rows

    print_rows(result["rows"])
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        from ..validation.plot import plot_rows

        try:
            plot_rows(result, args.plot)
        except (ImportError, ValueError) as error:
            print(f"--plot: {error}", file=sys.stderr)
            return 1
        print(f"plot: {args.plot}")
    return 0 if all(row.get("passed", True) for row in result["rows"]) and not result.get("not_run") else 1


def _measure(args: argparse.Namespace, tokens: tuple[int, ...]) -> dict[str, Any]:
    import numpy as np

    from .. import __version__
    from ..validation import probe, speed
    from ..validation.device import Gpu
    from ..validation.shapes import MOE_GEMMS
    from .progress import progress

    gpu = Gpu.open(args.device)
    copy = probe.bandwidth(gpu, speed.free_bytes())["copy_gb_per_s"]
    print(f"{gpu.device.name}, {gpu.device.arch}, copy {copy} GB/s")
    rng = np.random.default_rng()
    rows: list[dict[str, Any]] = []
    not_run: dict[str, str] = {}
    for shape in MOE_GEMMS:
        if args.only not in shape.name:
            continue
        try:
            timed = speed.time_shape(gpu, shape, tokens, copy, args.rounds, not args.no_peers, rng)
            rows += progress(timed, shape.name, len(tokens))
        except MemoryError as error:
            not_run[shape.name] = str(error)
            print(error, file=sys.stderr)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": gpu.device.name,
        "arch": gpu.device.arch,
        "versions": {"sm12x": __version__, "python": platform.python_version()},
        "copy_gb_per_s": copy,
        "rows": rows,
        "not_run": not_run,
    }
