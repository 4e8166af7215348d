"""Packed FP8 grouped GEMM against torch._scaled_grouped_mm and vLLM's tuned Triton MoE kernel, in one run.

    python tests/benchmarks/grouped_gemm_h200.py [--only TEXT] [--tokens 1,2,4] [--rounds N]
        [--variants [FAMILY ...]] [--json FILE] [--markdown FILE] [--plot FILE] [--peer FOLDER] [--seconds S]

Shapes of three models at T tokens, per-token x per-channel scales, bfloat16 out; ours with rows sorted by
expert ("sm12x") and with rows read where the tokens lie ("sm12x gather"), both without and with early_weights
("early"), whose promise holds here: calls follow each other, and nobody writes weights or offsets. CUDA
graphs of at least 16 calls over 4 routings; weights rotate so that three times the L2 is read before a byte
comes again; all contenders replay in turns in an order drawn anew each round. Medians and interquartile
ranges of microseconds per call. The read floor is measured in the same rounds. --variants forces every
variant of the families beside that, with early_weights (default: fp8_packed, whole tiles as "KEY", split-K
as "KEY:split").

The exit status is 0 where every row ran with right results and the gates of gates.py hold.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "runtime"), str(HERE), str(ROOT / "tests" / "gpu")]

import gates  # noqa: E402
import vllm_triton  # noqa: E402
from forced import forced_arguments  # noqa: E402
from moe_batch import Batch, Expected, expected, make_batch, our_calls, random_fp8  # noqa: E402
from peers import fastest_triton, torch_calls, torch_graph  # noqa: E402
from read_floor import ReadFloor  # noqa: E402
from run_facts import ceilings, command, versions  # noqa: E402

import sm12x  # noqa: E402
from sm12x import manifest  # noqa: E402
from sm12x.select import Problem, select  # noqa: E402
from sm12x.validation import shapes  # noqa: E402
from sm12x.validation.device import Gpu, device_attribute  # noqa: E402
from sm12x.validation.plot import plot_rows  # noqa: E402
from sm12x.validation.shapes import MoeGemm  # noqa: E402
from sm12x.validation.timing import Contender, Timing, capture, interleave  # noqa: E402

E4M3 = "float8_e4m3fn"
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192)
ROUNDS, ROUNDS_NOT_GATED = 40, 15
HOPELESS = 8.0  # forced variants that take so many times what the chosen one does are not timed


class Bench:
    """The device, the peers that are there, and one row after another."""

    def __init__(self, gpu: Gpu, kernel: Any | None, floor: ReadFloor | None, families: list[str]) -> None:
        self.gpu, self.kernel, self.floor = gpu, kernel, floor
        self.stream = torch.cuda.ExternalStream(gpu.stream)
        self.l2 = device_attribute(gpu.device, "CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE")
        self.forced: dict[str, str] = {}
        for family in families:
            self.forced.update(forced_arguments(gpu.device.arch, family, "bfloat16"))
        self.failed: list[str] = []

    def ours(
        self, batches: list[Batch], weights: torch.Tensor, b_scale: torch.Tensor, right: Expected
    ) -> dict[str, Contender]:
        """The chosen variant for both ways to give rows, and the forced ones; each checked once. Raises
        ArithmeticError where a chosen one is wrong; a forced one is left out and noted."""
        workspace = torch.empty(sm12x.workspace_size(weights.shape[1]), dtype=torch.uint8, device="cuda")
        found: dict[str, Contender] = {}
        limit = 0.0
        chosen = [(name, None, "gather" in name, "early" in name) for name in gates.OURS]
        for name, variant, gather, early in [
            *chosen,
            *((*each, False, True) for each in self.forced.items()),
        ]:
            calls = our_calls(batches, weights, b_scale, workspace, self.gpu.stream, variant, gather, early)
            batches[0].out.fill_(float("nan"))
            torch.cuda.synchronize()
            try:
                calls[0]()
                right.check(batches[0].out, name)
                contender = capture(self.gpu, calls)
            except (ArithmeticError, ValueError) as error:
                if variant is None:
                    raise
                self.failed.append(f"{name}: {str(error)[:200]}")
                continue
            taken = [self.gpu.milliseconds(contender.replay) for _ in range(2)][1]
            limit = limit or HOPELESS * taken
            if variant is None or taken <= limit:
                found[name] = contender
        return found

    def row(
        self, shape: MoeGemm, tokens: int, pool: torch.Tensor, b_scale: torch.Tensor, rounds: int
    ) -> dict[str, Any]:
        """One row of the table; raises what a chosen variant or a peer that ran wrongly raises."""
        rng = np.random.default_rng()
        batches = [make_batch(shape, tokens, rng) for _ in range(shapes.ROUTINGS)]
        active = float(np.mean([batch.routing.active.size for batch in batches]))
        weights = pool[: shapes.weight_sets(shape, active, self.l2, pool.shape[0])]
        notes: dict[str, str] = {}
        contenders = self.ours(batches, weights, b_scale, expected(batches[0], weights[0], b_scale))
        try:
            contenders["torch"] = torch_graph(self.stream, torch_calls(batches, weights, b_scale))
        except Exception as error:
            notes["torch"] = str(error).splitlines()[0][:200]
        if self.kernel is not None:
            found = fastest_triton(
                self.gpu, self.stream, self.kernel, shape, tokens, batches, weights, b_scale
            )
            if found:
                contenders["triton"], notes["triton"] = found
        if self.floor is not None:
            addresses = [
                [weights[s].data_ptr() + int(e) * shape.expert_bytes for e in batches[r].routing.active]
                for r, s in shapes.rotation(weights.shape[0])
            ]
            contenders["read_floor"], notes["read_floor"] = self.floor.best(addresses, shape.expert_bytes)
        times = interleave(self.gpu, contenders, rounds)
        columns = float(np.mean([batch.mma_columns for batch in batches]))
        row = as_row(shape, tokens, active, columns, weights.shape[0], times, notes)
        return {**row, "chosen": {name: self.chosen(shape, tokens, name) for name in gates.OURS}}

    def chosen(self, shape: MoeGemm, tokens: int, name: str) -> str:
        """What `select` takes for a contender, named as a forced variant is."""
        device = self.gpu.device
        problem = Problem(
            *("packed", shape.experts, E4M3, E4M3, "bfloat16", device.arch),
            rows=tokens * shape.top_k,
            n=shape.n,
            k=shape.k,
            gathers="gather" in name,
            early="early" in name,
        )
        first = select(problem, manifest.default().gemms(), device.sm_count)[0]
        return first.variant.key + (":split" if first.least_units else "")


def as_row(
    shape: MoeGemm,
    tokens: int,
    active: float,
    mma_columns: float,
    sets: int,
    times: dict[str, Timing],
    notes: dict[str, str],
) -> dict[str, Any]:
    """A row as `plot_rows`, `python -m sm12x bench --from` and gates.py read it."""
    forced = [name for name in times if name.startswith("fp8_")]
    bytes_ = shapes.call_bytes(shape, tokens, active)
    floor = times.get("read_floor")
    selected = times["sm12x"].median_us
    return {
        "model": shape.model,
        "gemm": shape.gemm,
        "T": tokens,
        "experts": shape.experts,
        "top_k": shape.top_k,
        "K": shape.k,
        "N": shape.n,
        "active": active,
        "mma_columns": mma_columns,
        "weight_sets": sets,
        "bytes": round(bytes_),
        "sm12x_us": round(selected, 2),
        "best_variant": min(forced, key=lambda name: times[name].median_us, default=""),
        "gb_per_s": round(bytes_ / selected / 1e3),
        "tflop_per_s": round(2e-6 * tokens * shape.top_k * shape.n * shape.k / selected, 1),
        "floor": "read",
        "floor_us": round(floor.median_us, 2) if floor else None,
        "percent_of_floor": round(100 * floor.median_us / selected, 1) if floor else None,
        "times": {name: timing.as_json() for name, timing in times.items()},
        "notes": notes,
    }


SHOWN = (*gates.OURS, "triton", "torch", "read_floor")


def print_row(row: dict[str, Any]) -> None:
    def cell(name: str) -> str:
        entry = row["times"].get(name)
        return f"{entry['median_us']:8.1f} ±{entry['iqr_us'] / 2:4.1f}" if entry else f"{'-':>14}"

    shape = f"{row['model']} {row['gemm']}"
    cells = " ".join(cell(name) for name in SHOWN)
    percent = f"{row['percent_of_floor']:5.1f}" if row["percent_of_floor"] else "    -"
    names = [row["chosen"]["sm12x"], *filter(None, [row["best_variant"]])]
    shown = ", best ".join(name.removeprefix("fp8_") for name in names)
    print(f"{shape:<22} {row['T']:>4} {cells} {row['gb_per_s']:>6} {percent}  {shown}", flush=True)


def run_rows(bench: Bench, options: argparse.Namespace, result: dict[str, Any], start: float) -> None:
    """Fills `result["rows"]`, `["not_run"]` and `["failed"]`."""
    tokens = [int(text) for text in options.tokens.split(",")]
    for shape in shapes.MOE_GEMMS:
        if options.only.lower() not in shape.name.lower():
            continue
        if time.monotonic() - start > options.seconds:
            result["not_run"] += [f"{shape.name} T={t}" for t in tokens]
            continue
        most = shapes.weight_sets(shape, min(tokens) * shape.top_k, bench.l2)
        pool = random_fp8((most, shape.experts, shape.n, shape.k))
        b_scale = torch.rand((shape.experts, shape.n), device="cuda") * 1e-3
        for t in tokens:
            name = f"{shape.name} T={t}"
            if time.monotonic() - start > options.seconds:
                result["not_run"].append(name)
                continue
            rounds = options.rounds or (ROUNDS if t <= gates.GATED_TOKENS else ROUNDS_NOT_GATED)
            try:
                row = bench.row(shape, t, pool, b_scale, rounds)
            except Exception as error:  # the other rows are still worth having
                result["failed"].append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
                print(result["failed"][-1], flush=True)
                continue
            for text in bench.failed:
                result["failed"].append(f"{name}: {text}")
                print(result["failed"][-1], flush=True)
            bench.failed.clear()
            result["rows"].append(row)
            print_row(row)
        del pool
        torch.cuda.empty_cache()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="result file (default: tests/benchmarks/results/, dated)")
    parser.add_argument("--markdown", type=Path, help="table and gates (default: the result file with .md)")
    parser.add_argument("--plot", type=Path, help="PNG of time against T")
    parser.add_argument(
        "--peer", type=Path, default=ROOT / ".peer", help="folder with triton_moe.py (default: .peer)"
    )
    parser.add_argument("--only", default="", help="only shapes whose name contains this")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="values of T")
    parser.add_argument("--rounds", type=int, help="replays of each contender (default: 40, 15 past T = 128)")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further row after this time")
    parser.add_argument(
        "--variants", nargs="*", metavar="FAMILY", help="force every variant too (default: of fp8_packed)"
    )
    parser.add_argument(
        "--mma-rate",
        type=float,
        default=gates.TWIN_MMA_RATE,
        help=f"multiply-adds per clock and SM of the twin (default: {gates.TWIN_MMA_RATE:g}, measured)",
    )
    options = parser.parse_args()
    options.variants = [] if options.variants is None else options.variants or ["fp8_packed"]
    return options


def main() -> int:
    options = parse()
    start = time.monotonic()
    torch.cuda.set_device(0)
    torch.zeros(1, device="cuda")
    gpu = Gpu.open(0)
    kernel = vllm_triton.load_kernel(options.peer)
    if kernel is None:
        print(f"no Triton peer: {options.peer}/triton_moe.py or Triton is missing")
    try:
        floor: ReadFloor | None = ReadFloor(gpu)
    except Exception as error:
        floor = None
        print(f"no read floor: {type(error).__name__}: {error}")
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "device": gpu.device.name,
        "arch": gpu.device.arch,
        "sm_count": gpu.device.sm_count,
        "clock_mhz": device_attribute(gpu.device, "CU_DEVICE_ATTRIBUTE_CLOCK_RATE") / 1e3,
        "cuda_major": gpu.device.major,
        "versions": versions(),
        "command": command(sys.argv),
        "ceilings": ceilings(gpu, floor),
        "rows": [],
        "not_run": [],
        "failed": [],
    }
    print(f"{result['date']}, {gpu.device.name}, {result['versions']}, {result['ceilings']}")
    titles = " ".join(f"{name.replace('early gather', 'e. gather'):>14}" for name in SHOWN)
    print(f"{'us, median ± IQR/2':<22} {'T':>4} {titles} {'GB/s':>6} {'%flr':>5}  chosen, best of the forced")
    run_rows(Bench(gpu, kernel, floor, options.variants), options, result, start)
    for text in result["not_run"]:
        print(f"not run, out of time: {text}")
    result["seconds"] = round(time.monotonic() - start, 1)
    report = gates.judge(result, options.mma_rate)
    result["gates"] = {"held": report.held, "mma_rate": report.mma_rate, "report": gates.describe(report)}
    path = write(result, report, options)
    print("\n".join(["", *gates.describe(report)]))
    verdict = gates.describe(report)[-1]
    print(f"{path.name}: {len(result['rows'])} rows in {result['seconds']} s, {verdict}")
    return 0 if report.held and not result["not_run"] and not result["failed"] else 1


def write(result: dict[str, Any], report: gates.Report, options: argparse.Namespace) -> Path:
    """The result file, the table beside it, and the plot where one is wanted."""
    name = f"{result['date']}_grouped_gemm_{platform.node() or 'host'}.json"
    path: Path = options.json or HERE / "results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    table = options.markdown or path.with_suffix(".md")
    table.write_text(gates.markdown(result, report), encoding="utf-8")
    if options.plot and result["rows"]:
        try:
            plot_rows(result, options.plot)
        except ImportError as error:
            print(f"no plot: {error}")
    return path


if __name__ == "__main__":
    sys.exit(main())
