"""Packed FP8 grouped GEMM against torch._scaled_grouped_mm and vLLM's tuned Triton MoE kernel, in one run.

    python tests/benchmarks/grouped_gemm_h200.py [--json FILE] [--plot FILE] [--peer FOLDER] [--only TEXT]
    [--seconds S]

Shapes of three models at T tokens, per-token x per-channel scales, bfloat16 out. CUDA graphs of at least 16
calls over 4 routings; weights rotate so that three times the L2 is read before a byte comes again; all
contenders replay in turns in an order drawn anew each round. Medians and interquartile ranges of microseconds
per call; the preparation kernel of a packed call is inside. The read floor is measured in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "runtime"), str(HERE), str(ROOT / "tests" / "gpu")]

import vllm_triton  # noqa: E402
from read_floor import ReadFloor  # noqa: E402
from torch_reference import as_float64, error_ratio  # noqa: E402

import sm12x  # noqa: E402
from sm12x import driver  # noqa: E402
from sm12x.validation import shapes  # noqa: E402
from sm12x.validation.device import Gpu  # noqa: E402
from sm12x.validation.plot import plot_rows  # noqa: E402
from sm12x.validation.shapes import MoeGemm, Routing  # noqa: E402
from sm12x.validation.timing import Contender, Timing, capture, interleave  # noqa: E402
from sm12x.validation.variants import gemm_variants  # noqa: E402

FP8 = torch.float8_e4m3fn
ROUNDS = 40


@dataclass
class Batch:
    """Everything that a call of one routing needs, for each contender."""

    routing: Routing
    offsets: torch.Tensor  # (E + 1,) int32
    tokens: (
        torch.Tensor
    )  # activations as the model has them: (T, K) for GEMM1, one row per routed token for GEMM2
    token_scale: torch.Tensor
    rows: torch.Tensor  # the same, one row per routed token, sorted by expert
    row_scale: torch.Tensor
    out: torch.Tensor
    peer_out: torch.Tensor


def random_fp8(shape: tuple[int, ...]) -> torch.Tensor:
    """Normally distributed values over most of e4m3's range, as quantised weights and activations have."""
    out = torch.empty(shape, dtype=FP8, device="cuda")
    flat = out.view(-1)
    for part in flat.split(1 << 26):
        part.copy_((torch.randn(part.numel(), device="cuda", dtype=torch.bfloat16) * 64).to(FP8))
    return out


def make_batch(shape: MoeGemm, tokens: int, rng: np.random.Generator) -> Batch:
    routing = shapes.make_routing(shape, tokens, rng)
    rows = tokens * shape.top_k
    order = np.argsort(routing.expert_ids.reshape(-1), kind="stable")
    first = shape.gemm == "GEMM1"
    source = random_fp8((tokens if first else rows, shape.k))
    scale = torch.rand(source.shape[0], device="cuda") * 1e-3
    index = torch.as_tensor(order // shape.top_k if first else order, device="cuda")
    return Batch(
        routing=routing,
        offsets=torch.as_tensor(routing.offsets, dtype=torch.int32, device="cuda"),
        tokens=source,
        token_scale=scale,
        rows=source.view(torch.uint8)[index].view(FP8),
        row_scale=scale[index].contiguous(),
        out=torch.empty((rows, shape.n), dtype=torch.bfloat16, device="cuda"),
        peer_out=torch.empty((rows, shape.n), dtype=torch.bfloat16, device="cuda"),
    )


def torch_graph(stream: Any, calls: list[Callable[[], object]]) -> Contender:
    """A graph captured by torch, which allocates its results in a pool of the graph's own."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def replay() -> None:
        with torch.cuda.stream(stream):
            graph.replay()

    return Contender(replay, len(calls), calls)


class Bench:
    """One shape's weights, and the contenders over them."""

    def __init__(self, gpu: Gpu, kernel: Any | None, floor: ReadFloor | None) -> None:
        self.gpu, self.kernel, self.floor = gpu, kernel, floor
        self.stream = torch.cuda.ExternalStream(gpu.stream)
        attribute = driver.get_driver().bindings.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE
        self.l2 = int(driver.call("cuDeviceGetAttribute", attribute, gpu.device.ordinal))
        self.variants = [v for v in gemm_variants(gpu.device.arch) if v.out == "bfloat16"]

    def ours(
        self,
        shape: MoeGemm,
        batches: list[Batch],
        weights: torch.Tensor,
        b_scale: torch.Tensor,
        variant: str | None,
    ) -> list[Callable[[], object]]:
        workspace = torch.empty(sm12x.workspace_size(shape.experts), dtype=torch.uint8, device="cuda")

        def one(batch: Batch, b: torch.Tensor) -> Callable[[], object]:
            return lambda: sm12x.grouped_gemm(
                batch.rows,
                b,
                a_scale=batch.row_scale,
                b_scale=b_scale,
                offsets=batch.offsets,
                out=batch.out,
                workspace=workspace,
                stream=self.gpu.stream,
                variant=variant,
            )

        return [one(batches[r], weights[s]) for r, s in shapes.rotation(weights.shape[0])]

    def check(self, shape: MoeGemm, batch: Batch, b: torch.Tensor, b_scale: torch.Tensor, name: str) -> None:
        """The result in batch.out against float64, for up to eight experts. A time of wrong results means
        nothing.
        """
        torch.cuda.synchronize()
        for expert in batch.routing.active[:8].tolist():
            first, last = batch.routing.offsets[expert : expert + 2].tolist()
            left, right = as_float64(batch.rows[first:last]), as_float64(b[expert]).T
            factor = batch.row_scale[first:last].double()[:, None] * b_scale[expert].double()[None, :]
            bound = (left.abs() @ right.abs()) * factor
            ratio = float(
                error_ratio(batch.out[first:last], (left @ right) * factor, bound, shape.k, "bfloat16")
            )
            if not ratio <= 1.0:
                raise ArithmeticError(f"{name}: expert {expert} is wrong, error {ratio:.3g} of its bound")

    def torch_peer(
        self, batches: list[Batch], weights: torch.Tensor, b_scale: torch.Tensor
    ) -> list[Callable[[], object]]:
        def one(batch: Batch, b: torch.Tensor) -> Callable[[], object]:
            ends = batch.offsets[1:].contiguous()
            return lambda: torch._scaled_grouped_mm(
                batch.rows,
                b.transpose(-2, -1),
                batch.row_scale,
                b_scale,
                offs=ends,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )

        return [one(batches[r], weights[s]) for r, s in shapes.rotation(weights.shape[0])]

    def triton_peer(
        self, shape: MoeGemm, tokens: int, batches: list[Batch], weights: torch.Tensor, b_scale: torch.Tensor
    ) -> tuple[Contender, str] | None:
        """The fastest of the configurations for this batch."""
        graphs: dict[str, Contender] = {}
        top_k = shape.top_k if shape.gemm == "GEMM1" else 1
        rows = tokens * shape.top_k
        for config in vllm_triton.configs(tokens, rows, shape.experts):
            blocks = [vllm_triton.make_blocks(batch.routing, shape.experts, config) for batch in batches]
            calls = [
                vllm_triton.make_call(
                    self.kernel,
                    shape,
                    config,
                    blocks[r],
                    batches[r].tokens,
                    weights[s],
                    batches[r].peer_out,
                    batches[r].token_scale,
                    b_scale,
                    top_k,
                )
                for r, s in shapes.rotation(weights.shape[0])
            ]
            try:
                graphs[str(config)] = torch_graph(self.stream, calls)
            except (
                Exception
            ) as error:  # a configuration that this Triton cannot compile, or that needs too much memory
                print(f"  Triton {config}: {str(error).splitlines()[0][:120]}", flush=True)
        if not graphs:
            return None
        times = interleave(self.gpu, graphs, 5)
        best = min(times, key=lambda name: times[name].median_us)
        self.compare_triton(shape, batches[-1], weights, b_scale)
        return graphs[best], best

    def compare_triton(
        self, shape: MoeGemm, batch: Batch, weights: torch.Tensor, b_scale: torch.Tensor
    ) -> None:
        """The peer's last result, in the order of the tokens, against ours, sorted by expert."""
        torch.cuda.synchronize()
        last = weights[shapes.rotation(weights.shape[0])[-1][1]]
        mine = sm12x.grouped_gemm(
            batch.rows, last, a_scale=batch.row_scale, b_scale=b_scale, offsets=batch.offsets
        ).double()
        order = np.argsort(batch.routing.expert_ids.reshape(-1), kind="stable")
        theirs = batch.peer_out[torch.as_tensor(order, device="cuda")].double()
        difference = float((mine - theirs).norm() / mine.norm())
        if not difference < 1e-2:
            raise ArithmeticError(f"Triton: differs from ours by {difference:.3g}: not the same problem")

    def row(
        self, shape: MoeGemm, tokens: int, pool: torch.Tensor, b_scale: torch.Tensor, rounds: int
    ) -> dict[str, Any]:
        rng = np.random.default_rng()
        batches = [make_batch(shape, tokens, rng) for _ in range(shapes.ROUTINGS)]
        active = float(np.mean([batch.routing.active.size for batch in batches]))
        weights = pool[: shapes.weight_sets(shape, active, self.l2, pool.shape[0])]
        notes: dict[str, str] = {}
        contenders: dict[str, Contender] = {}
        torch.cuda.synchronize()
        for name, variant in [("sm12x", None), *((v.key, v.key) for v in self.variants)]:
            calls = self.ours(shape, batches, weights, b_scale, variant)
            for batch in batches:
                batch.out.fill_(float("nan"))
            torch.cuda.synchronize()
            calls[0]()
            self.check(shape, batches[0], weights[0], b_scale, name)
            contenders[name] = capture(self.gpu, calls)
        try:
            contenders["torch"] = torch_graph(self.stream, self.torch_peer(batches, weights, b_scale))
        except Exception as error:
            notes["torch"] = str(error).splitlines()[0][:200]
        if self.kernel is not None:
            found = self.triton_peer(shape, tokens, batches, weights, b_scale)
            if found:
                contenders["triton"], notes["triton"] = found
        if self.floor is not None:
            addresses = [
                [weights[s].data_ptr() + int(e) * shape.expert_bytes for e in batches[r].routing.active]
                for r, s in shapes.rotation(weights.shape[0])
            ]
            contenders["read_floor"], notes["read_floor"] = self.floor.best(addresses, shape.expert_bytes)
        times = interleave(self.gpu, contenders, rounds)
        return self.as_row(shape, tokens, active, weights.shape[0], times, notes)

    def as_row(
        self,
        shape: MoeGemm,
        tokens: int,
        active: float,
        sets: int,
        times: dict[str, Timing],
        notes: dict[str, str],
    ) -> dict[str, Any]:
        forced = {v.key: times[v.key].median_us for v in self.variants}
        best = min(forced, key=lambda name: forced[name])
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
            "weight_sets": sets,
            "bytes": round(bytes_),
            "sm12x_us": round(selected, 2),
            "best_variant": best,
            "gb_per_s": round(bytes_ / selected / 1e3),
            "tflop_per_s": round(2e-6 * tokens * shape.top_k * shape.n * shape.k / selected, 1),
            "floor": "read",
            "floor_us": round(floor.median_us, 2) if floor else None,
            "percent_of_floor": round(100 * floor.median_us / selected, 1) if floor else None,
            "times": {name: timing.as_json() for name, timing in times.items()},
            "notes": notes,
        }


def ceilings(gpu: Gpu, floor: ReadFloor | None) -> dict[str, float]:
    """GB/s of a copy (read plus written) and of the read-floor kernel, on 1 GiB and more."""
    source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    torch.cuda.synchronize()
    found = {}
    stream = torch.cuda.ExternalStream(gpu.stream)

    def copy() -> None:
        with torch.cuda.stream(stream):
            target.copy_(source)

    found["copy"] = Contender(copy, 1)
    if floor is not None:
        found["read"], _ = floor.best([[source.data_ptr()], [target.data_ptr()]], source.numel())
    times = interleave(gpu, found, 15)
    moved = {"copy": 2 * source.numel(), "read": source.numel()}
    return {f"{name}_gb_per_s": round(moved[name] / times[name].median_us / 1e3) for name in found}


def print_row(row: dict[str, Any]) -> None:
    def cell(name: str) -> str:
        entry = row["times"].get(name)
        return f"{entry['median_us']:8.1f} ±{entry['iqr_us'] / 2:4.1f}" if entry else f"{'-':>14}"

    shape = f"{row['model']} {row['gemm']}"
    percent = f"{row['percent_of_floor']:5.1f}" if row["percent_of_floor"] else "    -"
    short = row["best_variant"].removeprefix("fp8_ptr_array_").removesuffix("_bf16")
    cells = " ".join(cell(name) for name in ("sm12x", "torch", "triton", "read_floor"))
    print(f"{shape:<22} {row['T']:>4} {cells} {row['gb_per_s']:>6} {percent}  {short}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="result file (default: tests/benchmarks/results/, dated)")
    parser.add_argument("--plot", type=Path, help="PNG of time against T")
    parser.add_argument(
        "--peer", type=Path, default=ROOT / ".peer", help="folder with triton_moe.py (default: .peer)"
    )
    parser.add_argument("--only", default="", help="only shapes whose name contains this")
    parser.add_argument("--tokens", default=",".join(map(str, shapes.TOKENS)), help="values of T")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="replays of each contender")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further row after this time")
    options = parser.parse_args()
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
        "cuda_major": gpu.device.major,
        "versions": versions(),
        "command": " ".join(["python", *sys.argv]),
        "ceilings": ceilings(gpu, floor),
        "rows": [],
    }
    print(f"{result['date']}, {gpu.device.name}, {result['versions']}, {result['ceilings']}")
    titles = " ".join(f"{title:>14}" for title in ("sm12x", "torch", "triton", "read floor"))
    print(f"{'us, median ± IQR/2':<22} {'T':>4} {titles} {'GB/s':>6} {'%flr':>5}  best variant")
    bench = Bench(gpu, kernel, floor)
    missing, failed = [], []
    for shape in shapes.MOE_GEMMS:
        if options.only not in shape.name:
            continue
        tokens = [int(text) for text in options.tokens.split(",")]
        if time.monotonic() - start > options.seconds:
            missing += [f"{shape.name} T={t}" for t in tokens]
            continue
        most = shapes.weight_sets(shape, min(tokens) * shape.top_k, bench.l2)
        pool = random_fp8((most, shape.experts, shape.n, shape.k))
        b_scale = torch.rand((shape.experts, shape.n), device="cuda") * 1e-3
        for t in tokens:
            if time.monotonic() - start > options.seconds:
                missing.append(f"{shape.name} T={t}")
                continue
            try:
                row = bench.row(shape, t, pool, b_scale, options.rounds)
            except Exception as error:  # the other rows are still worth having
                failed.append(f"{shape.name} T={t}: {type(error).__name__}: {str(error)[:300]}")
                print(failed[-1], flush=True)
                continue
            result["rows"].append(row)
            print_row(row)
        del pool
        torch.cuda.empty_cache()
    slower = [
        f"{row['model']} {row['gemm']} T={row['T']}"
        for row in result["rows"]
        if "torch" in row["times"] and row["times"]["torch"]["median_us"] < row["sm12x_us"]
    ]
    print(f"slower than torch._scaled_grouped_mm: {', '.join(slower) or 'no row'}")
    for text in missing:
        print(f"not run, out of time: {text}")
    result["not_run"], result["failed"] = missing, failed
    result["seconds"] = round(time.monotonic() - start, 1)
    path = (
        options.json or HERE / "results" / f"grouped_gemm_{platform.node() or 'host'}_{result['date']}.json"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.plot and result["rows"]:
        try:
            plot_rows(result, options.plot)
        except ImportError as error:
            print(f"no plot: {error}")
    print(f"{len(result['rows'])} rows in {result['seconds']} s, {path}")
    return 1 if missing or failed or slower or not result["rows"] else 0


def versions() -> dict[str, str]:
    found = {"sm12x": sm12x.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "cupy", "cuda.bindings"):
        try:
            found[name] = __import__(name, fromlist=["__version__"]).__version__
        except ImportError:
            continue
    number = driver.get_driver().version
    found["driver"] = f"CUDA {number // 1000}.{number % 1000 // 10}"
    return found


if __name__ == "__main__":
    sys.exit(main())
