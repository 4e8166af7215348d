"""``python -m sm12x validate``: run every kernel on this GPU against float64, compare instructions, time
shapes, report.

For owners of the hardware: nothing but sm12x is needed; torch and Triton are timed beside it where they are
installed. A part that cannot run on a device says so in the report.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..manifest import Variant
    from ..validation.device import Gpu
    from ..validation.matrix import Result

PARTS = ("matrix", "offsets", "repeats", "mma", "throughput", "bandwidth", "shapes")
REPEATS = 1000
PACKAGES = ("numpy", "ml_dtypes", "cuda-bindings", "torch", "triton", "cupy-cuda13x", "cupy-cuda12x", "jax")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--device", type=int, default=0, help="CUDA ordinal (default: 0)")
    parser.add_argument(
        "--quick", action="store_true", help="a small part of the matrix, 50 repeats, two shapes"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--seed", type=int, help="seed of the random operands (default: a new one)")


def run(args: argparse.Namespace) -> int:
    """0 where everything that ran passed, 1 where something failed, 2 for unknown parts."""
    parts = args.parts.split(",")
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        print(f"--parts: expected some of {', '.join(PARTS)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    from ..validation.device import Gpu

    gpu = Gpu.open(args.device)
    session = _Session(gpu, args.quick, args.seed)
    report = session.header()
    device = report["device"]
    print(f"{device['name']} ({device['arch']}), driver {report['driver']}, seed {session.seed}")
    for part in parts:
        report["parts"][part] = session.part(part)
    results = report["parts"].values()
    report["ok"] = all(result["passed"] for result in results) and bool(results)
    report["seconds"] = round(time.monotonic() - session.start, 1)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"report: {args.json}")
    failed = [name for name, result in report["parts"].items() if not result["passed"]]
    print(f"{'passed' if report['ok'] else 'FAILED: ' + ', '.join(failed)} in {report['seconds']} s")
    return 0 if report["ok"] else 1


class _Session:
    """What the parts share: the device, the seed, the variants, and the copy bandwidth once it is known."""

    def __init__(self, gpu: Gpu, quick: bool, seed: int | None) -> None:
        import numpy as np

        from ..validation.variants import gemm_variants

        self.gpu, self.quick, self.start = gpu, quick, time.monotonic()
        self.seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
        self.rng = np.random.default_rng(self.seed)
        self.variants: list[Variant] = gemm_variants(gpu.device.arch)
        self.copy_gb_per_s = 0.0

    def header(self) -> dict[str, Any]:
        from .. import __version__, driver, manifest

        device = self.gpu.device
        number = driver.get_driver().version
        found = {"sm12x": __version__}
        for package in PACKAGES:
            try:
                found[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        return {
            "report": 1,
            "date": time.strftime("%Y-%m-%d %H:%M:%S"),
            "device": {
                "name": device.name,
                "arch": device.arch,
                "capability": f"{device.capability[0]}.{device.capability[1]}",
                "sm_count": device.sm_count,
            },
            "driver": f"CUDA {number // 1000}.{number % 1000 // 10}",
            "cubins": device.major,
            "toolchain": dict(manifest.default().toolchain),
            "versions": {"python": platform.python_version(), **found},
            "machine": platform.machine(),
            "system": platform.platform(),
            "seed": self.seed,
            "quick": self.quick,
            "variants": [variant.key for variant in self.variants],
            "parts": {},
        }

    def part(self, name: str) -> dict[str, Any]:
        """One part's results; a part that raises has failed, and the next one runs."""
        start = time.monotonic()
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "matrix": self.matrix,
            "offsets": self.offsets,
            "repeats": self.repeats,
            "mma": self.mma,
            "throughput": self.throughput,
            "bandwidth": self.bandwidth,
            "shapes": self.shapes,
        }
        try:
            result = parts[name]()
        except Exception as error:
            traceback.print_exc()
            result = {"passed": False, "error": f"{type(error).__name__}: {error}"}
        result["seconds"] = round(time.monotonic() - start, 1)
        detail = result.get("summary") or result.get("error", "")
        word = "passed" if result["passed"] else "FAILED"
        print(f"{name:<11} {word:<7} {result['seconds']:6.1f} s  {detail}", flush=True)
        return result

    def matrix(self) -> dict[str, Any]:
        from ..validation import matrix
        from .progress import progress

        found: list[Result] = []
        total = matrix.steps(self.variants, self.quick)
        lists = matrix.tile_edges(self.gpu, self.variants, self.quick, self.rng)
        for results in progress(lists, "matrix", total):
            found += results
        for variant in self.variants:
            found += matrix.rows_as_experts(self.gpu, variant, self.rng)
        return _judged(found, self.variants)

    def offsets(self) -> dict[str, Any]:
        from ..validation import matrix

        found = [
            result
            for variant in self.variants
            for result in matrix.wrong_offsets(self.gpu, variant, self.rng)
        ]
        return _judged(found, self.variants)

    def repeats(self) -> dict[str, Any]:
        from ..validation import matrix
        from .progress import progress

        count = 50 if self.quick else REPEATS
        variants = progress(self.variants, f"{count} repeats", len(self.variants))
        return _judged(
            [matrix.repeats(self.gpu, variant, count, self.rng) for variant in variants], self.variants
        )

    def mma(self) -> dict[str, Any]:
        from ..validation import probe

        result = probe.compare_forms(self.gpu, self.rng)
        equal = (
            "equal bit for bit" if result["bits_equal"] else f"{result['differing_elements']} elements differ"
        )
        result["summary"] = (
            f"{equal}; error {result['worst_error']:.3f} of its bound; {result['block_scaled']}"
        )
        return result

    def throughput(self) -> dict[str, Any]:
        from ..validation import probe

        result = probe.throughput(self.gpu, self.rng)
        result["summary"] = (
            f"unit-scale {result['unit_scale_tflop_per_s']}, plain {result['plain_tflop_per_s']} TFLOP/s; "
            f"{result['block_scaled']}"
        )
        return result

    def bandwidth(self) -> dict[str, Any]:
        from ..validation import probe, speed

        result = probe.bandwidth(self.gpu, speed.free_bytes())
        self.copy_gb_per_s = result["copy_gb_per_s"]
        result["summary"] = f"copy {result['copy_gb_per_s']} GB/s, read plus written"
        return result

    def shapes(self) -> dict[str, Any]:
        from ..validation import probe, speed
        from ..validation.shapes import MOE_GEMMS
        from .progress import progress

        if not self.copy_gb_per_s:
            self.copy_gb_per_s = probe.bandwidth(self.gpu, speed.free_bytes())["copy_gb_per_s"]
        tokens = (1, 32) if self.quick else (1, 8, 128)
        chosen = MOE_GEMMS[:2]
        rows: list[dict[str, Any]] = []
        skipped: dict[str, str] = {}
        for shape in chosen:
            timed = speed.time_shape(self.gpu, shape, tokens, self.copy_gb_per_s, 15, True, self.rng)
            try:
                rows += progress(timed, shape.name, len(tokens))
            except MemoryError as error:
                skipped[shape.name] = str(error)
        print_rows(rows)
        summary = f"{len(rows)} rows" + "".join(f"; not run: {text}" for text in skipped.values())
        return {
            "passed": all(row["passed"] for row in rows),
            "summary": summary,
            "rows": rows,
            "not_run": skipped,
        }


def print_rows(rows: list[dict[str, Any]]) -> None:
    """A table of `speed.time_shape`'s rows, and why a peer is missing."""
    if not rows:
        return
    titles = " ".join(f"{title:>9}" for title in ("sm12x", "torch", "triton"))
    print(f"{'us per call':<24} {'T':>4} {titles} {'GB/s':>7} {'% of floor':>10}  best variant")
    for row in rows:
        cells = []
        for name in ("sm12x", "torch", "triton"):
            entry = row["times"].get(name)
            cells.append(f"{entry['median_us']:9.1f}" if entry else f"{'-':>9}")
        name = f"{row['model']} {row['gemm']}"
        percent = f"{row['percent_of_floor']:.1f}" if row["percent_of_floor"] else "-"
        print(
            f"{name:<24} {row['T']:>4} {' '.join(cells)} {row['gb_per_s']:>7.0f} {percent:>10}  "
            f"{row['best_variant']}"
        )
    for name, note in sorted(
        {item for row in rows for item in row["notes"].items() if item[0] not in row["times"]}
    ):
        print(f"  {name}: {note}")


def finite(value: float) -> float | str:
    """`value` as JSON can hold it."""
    return value if math.isfinite(value) else "infinite"


def _judged(results: list[Result], variants: list[Variant]) -> dict[str, Any]:
    """Counts and the worst ratio of each variant, and every case that failed."""
    wrong = [result for result in results if not result.passed]
    by_variant = {}
    for variant in variants:
        mine = [result for result in results if result.variant == variant.key]
        by_variant[variant.key] = {
            "cases": len(mine),
            "failed": sum(not result.passed for result in mine),
            "worst_error_ratio": finite(max((result.ratio for result in mine), default=0.0)),
        }
    worst = max((result.ratio for result in results), default=0.0)
    first = f"; first: {wrong[0].variant} {wrong[0].case}" if wrong else ""
    return {
        "passed": bool(results) and not wrong,
        "summary": f"{len(results)} cases, {len(wrong)} failed, worst error {worst:.3f} of its bound{first}",
        "variants": by_variant,
        "failures": [
            {
                "variant": each.variant,
                "case": each.case,
                "error_ratio": str(each.ratio),
                "changed_outside": each.damaged,
            }
            for each in wrong[:200]
        ],
    }
