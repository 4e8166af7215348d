"""Whole FP8 expert layers against a pipeline of vLLM's tuned Triton MoE kernel, in one run.

    python tests/benchmarks/layer_h200.py [--only TEXT] [--tokens 1,2,4] [--rounds N] [--steps] [--variants]
        [--json FILE] [--markdown FILE] [--peer FOLDER] [--seconds S]

Layers of three models at T tokens, per-channel weights, dynamic per-token activations, silu, bfloat16: ours
through `FusedMoE`, without and with early_routes ("sm12x early"; in front of a layer is another one, which
writes no routes), the peer as layer_peer.py has it, in the fastest of its configurations. CUDA graphs of at
least 16 calls over 4 routings; weights rotate so that three times the L2 is read before a byte comes again;
all contenders replay in turns in an order drawn anew each round. Medians and interquartile ranges of
microseconds per layer. The read floors of both GEMMs are measured in the same rounds. --steps times every
launch of ours alone as well, --variants every kernel of either GEMM forced, whole layer and alone.

The exit status is 0 where every row ran with right results and the gates of layer_gates.py hold.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
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
import layer_gates  # noqa: E402
import vllm_triton  # noqa: E402
from forced import Forced  # noqa: E402
from layer_batch import (  # noqa: E402
    LAYERS,
    PEER_LIMIT,
    LayerBatch,
    MoeLayer,
    Weights,
    check,
    expected,
    make_batch,
    make_weights,
    our_calls,
    plans,
)
from layer_forced import downs, kernels, ups, wholes  # noqa: E402
from layer_steps import step_calls, step_names  # noqa: E402
from peers import torch_graph  # noqa: E402
from read_floor import ReadFloor  # noqa: E402
from run_facts import ceilings, command, versions  # noqa: E402
from torch_reference import DEVICE  # noqa: E402

from sm12x.abi import SM12X_LAYER_ROUTES, SM12X_MOST_COUNTED_EXPERTS  # noqa: E402
from sm12x.select.layer import LayerChoice  # noqa: E402
from sm12x.validation import shapes  # noqa: E402
from sm12x.validation.device import Gpu, device_attribute  # noqa: E402
from sm12x.validation.shapes import MoeGemm  # noqa: E402
from sm12x.validation.timing import Contender, capture, interleave  # noqa: E402

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
ROUNDS = 30
HOPELESS = 4.0  # forced kernels that take so many times what the chosen ones do are not timed
MOST_SETS = 16


class Bench:
    """The device, the peers that are there, and one row after another."""

    def __init__(
        self, gpu: Gpu, kernel: Any | None, floor: ReadFloor | None, options: argparse.Namespace
    ) -> None:
        self.gpu, self.kernel, self.floor = gpu, kernel, floor
        self.stream = torch.cuda.ExternalStream(gpu.stream)
        self.l2 = device_attribute(gpu.device, "CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE")
        self.steps, self.variants = options.steps or options.variants, options.variants
        self.failed: list[str] = []
        self.first = torch.empty(0)  # our result of the first call of the row's rotation

    def sets(self, layer: MoeLayer, active: float) -> int:
        """Sets of weights that keep anything from being read from L2, by the read floor of the second GEMM
        too, which reads a third of what a layer does."""
        needed = -(-shapes.COLD * self.l2 // int(active * layer.second.expert_bytes))
        return max(2, min(MOST_SETS, needed))

    def row(self, layer: MoeLayer, tokens: int, pool: Weights, rounds: int) -> dict[str, Any]:
        """One row of the table; raises what a chosen kernel or a peer that ran wrongly raises."""
        rng = np.random.default_rng()
        batches = [make_batch(layer, tokens, rng) for _ in range(shapes.ROUTINGS)]
        active = float(np.mean([batch.routing.active.size for batch in batches]))
        weights = pool.first(min(pool.sets, self.sets(layer, active)))
        right = expected(batches[0], weights, 0)
        contenders, choice, launches = self.ours(layer, batches, weights, right)
        notes: dict[str, str] = {}
        if self.kernel is not None:
            found = self.fastest_peer(layer, batches, weights, right)
            if found:
                contenders[layer_gates.PEER], notes["triton"] = found
        for number, gemm, sets in ((1, layer.first, weights.w1), (2, layer.second, weights.w2)):
            if self.floor is not None:
                name = f"read_floor{number}"
                contenders[name], notes[name] = self.floor.best(
                    addresses(gemm, batches, sets), gemm.expert_bytes
                )
        times = interleave(self.gpu, contenders, rounds)
        columns = float(np.mean([batch.mma_columns for batch in batches]))
        floors = [times.get(f"read_floor{number}") for number in (1, 2)]
        return {
            "model": layer.model,
            "T": tokens,
            "experts": layer.experts,
            "top_k": layer.top_k,
            "H": layer.hidden,
            "I": layer.intermediate,
            "active": active,
            "mma_columns": columns,
            "weight_sets": weights.sets,
            "launches": launches,
            "chosen": describe(choice),
            "floor1_us": floors[0] and round(floors[0].median_us, 2),
            "floor2_us": floors[1] and round(floors[1].median_us, 2),
            "times": {name: timing.as_json() for name, timing in times.items()},
            "notes": notes,
        }

    def ours(
        self, layer: MoeLayer, batches: list[LayerBatch], weights: Weights, right: torch.Tensor
    ) -> tuple[dict[str, Contender], LayerChoice, int]:
        """The chosen kernels, one launch or several where that is not chosen, and the forced ones; each
        checked once. Raises ArithmeticError where the chosen ones are wrong; others are only noted."""
        arch = self.gpu.device.arch
        cases: list[tuple[str, Forced | None, Forced | None, bool | None]] = [
            (layer_gates.OURS, None, None, None),
            (layer_gates.EARLY, None, None, None),
        ]
        routes = batches[0].x.shape[0] * layer.top_k
        if wholes(arch) and routes <= SM12X_LAYER_ROUTES and layer.experts <= SM12X_MOST_COUNTED_EXPERTS:
            cases += [("one launch", None, None, True), ("chain", None, None, False)]
        if self.variants:
            cases += [(f"up {each.name}", each, None, None) for each in ups(arch, True)]
            cases += [(f"down {each.name}", None, each, None) for each in downs(arch, False)]
        found: dict[str, Contender] = {}
        chosen: LayerChoice | None = None
        launches, limit = 0, 0.0
        stream = self.gpu.stream
        for name, up, down, whole in cases:
            if whole is not None and chosen is not None and whole == is_one_launch(chosen):
                continue  # the same as chosen
            try:
                with kernels(up, down, whole) as made:
                    layers = plans(weights, early_routes=name == layer_gates.EARLY)
                    size = max(each.workspace_size(batches[0].x.shape[0], layer.top_k) for each in layers)
                    spaces = [torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in batches]
                    calls = our_calls(batches, layers, spaces, stream)
                    batches[0].out.fill_(float("nan"))
                    torch.cuda.synchronize()
                    for call in calls:
                        call()
                    calls[0]()
                    self.gpu.synchronize()
                    check(batches[0].out, right, name)
                    if chosen is None:
                        self.first = batches[0].out.float()
                    contender = capture(self.gpu, calls)
            except (ArithmeticError, ValueError) as error:
                if chosen is None:
                    raise
                self.failed.append(f"{name}: {str(error)[:200]}")
                continue
            taken = [self.gpu.milliseconds(contender.replay) for _ in range(2)][1]
            limit = limit or HOPELESS * taken
            if taken > limit:
                continue
            found[name] = contender
            keys = step_names(layers[0], batches[0], spaces[0], stream)
            if chosen is None:
                chosen, launches = made.choices[-1], len(keys)
            if self.steps and len(keys) > 1 and name != layer_gates.EARLY:
                found.update(self.alone(name, keys, batches, layers, spaces, down is not None))
        assert chosen is not None
        return found, chosen, launches

    def alone(
        self,
        name: str,
        keys: list[str],
        batches: list[LayerBatch],
        layers: list[Any],
        spaces: list[torch.Tensor],
        is_down: bool,
    ) -> dict[str, Contender]:
        """Every launch of the chosen kernels by itself; of forced ones the GEMM that was forced, and what
        quantises its rows."""
        if name in (layer_gates.OURS, "chain"):
            wanted = range(len(keys))
        else:
            wanted = range(2, len(keys) - 1) if is_down else range(1, 2)
        return {
            f"{name} alone {keys[index]}": capture(
                self.gpu, step_calls(batches, layers, spaces, self.gpu.stream, index)
            )
            for index in wanted
        }

    def fastest_peer(
        self, layer: MoeLayer, batches: list[LayerBatch], weights: Weights, right: torch.Tensor
    ) -> tuple[Contender, str] | None:
        """The fastest of the configurations for this batch, and its name; None where none ran. Raises
        ArithmeticError where its results are wrong."""
        import layer_peer

        graphs: dict[str, Contender] = {}
        for config in layer_peer.configs(layer, batches[0].x.shape[0]):
            calls = layer_peer.peer_calls(self.kernel, layer, config, batches, weights)
            try:
                graphs[str(config)] = torch_graph(self.stream, calls)
            except Exception as error:  # this Triton cannot compile it, or it needs too much memory
                print(f"  Triton {config}: {str(error).splitlines()[0][:120]}", flush=True)
                continue
            batches[0].peer_out.fill_(float("nan"))
            calls[0]()
            torch.cuda.synchronize()
            check(batches[0].peer_out, right, f"Triton {config}", PEER_LIMIT)
            check(batches[0].peer_out, self.first, f"Triton {config} against ours", PEER_LIMIT)
        if not graphs:
            return None
        times = interleave(self.gpu, graphs, 5)
        best = min(times, key=lambda name: times[name].median_us)
        return graphs[best], best


def addresses(gemm: MoeGemm, batches: list[LayerBatch], sets: torch.Tensor) -> list[list[int]]:
    """Of the active experts' weights, call by call."""
    return [
        [sets[s].data_ptr() + int(e) * gemm.expert_bytes for e in batches[r].routing.active]
        for r, s in shapes.rotation(sets.shape[0])
    ]


def is_one_launch(choice: LayerChoice) -> bool:
    """In a CUDA graph, as all contenders here are."""
    return choice.whole is not None and not choice.several_in_graphs


def describe(choice: LayerChoice) -> str:
    """The kernel that does all, or those of both GEMMs and what quantises between them."""

    def name(each: Any) -> str:
        return str(each.variant.key) + (":split" if each.least_units else "")

    if choice.whole is not None and not choice.several_in_graphs:
        return str(choice.whole.key)
    return f"{name(choice.up)}, {name(choice.down)}" + (", quantised apart" if choice.quantises_apart else "")


SHOWN = (layer_gates.OURS, layer_gates.EARLY, layer_gates.PEER, "read_floor1", "read_floor2")


def print_row(row: dict[str, Any]) -> None:
    def cell(name: str) -> str:
        entry = row["times"].get(name)
        return f"{entry['median_us']:8.1f} ±{entry['iqr_us'] / 2:4.1f}" if entry else f"{'-':>14}"

    cells = " ".join(cell(name) for name in SHOWN)
    print(
        f"{row['model']:<16} {row['T']:>4} {cells}  {row['launches']} launches: {row['chosen']}", flush=True
    )
    others = {name: entry for name, entry in row["times"].items() if name not in SHOWN}
    for name, entry in sorted(others.items(), key=lambda item: item[1]["median_us"]):
        print(f"    {entry['median_us']:8.2f} ±{entry['iqr_us'] / 2:5.2f}  {name}", flush=True)


def run_rows(bench: Bench, options: argparse.Namespace, result: dict[str, Any], start: float) -> None:
    """Fills `result["rows"]`, `["not_run"]` and `["failed"]`."""
    tokens = [int(text) for text in options.tokens.split(",")]
    for layer in LAYERS:
        if options.only.lower() not in layer.model.lower():
            continue
        if time.monotonic() - start > options.seconds:
            result["not_run"] += [f"{layer.model} T={t}" for t in tokens]
            continue
        pool = make_weights(layer, bench.sets(layer, min(layer.experts, min(tokens) * layer.top_k)))
        for t in tokens:
            name = f"{layer.model} T={t}"
            if time.monotonic() - start > options.seconds:
                result["not_run"].append(name)
                continue
            try:
                row = bench.row(layer, t, pool, options.rounds)
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


def compile_peers(options: argparse.Namespace) -> None:
    """Has every kernel of the peer compiled, in processes of their own beside each other: Triton keeps what
    they compiled on disk. A process that fails leaves its kernels to be compiled later."""
    tokens = options.tokens.split(",")
    halves = [",".join(tokens[: len(tokens) // 2]), ",".join(tokens[len(tokens) // 2 :])]
    started = []
    for layer in LAYERS:
        if options.only.lower() in layer.model.lower():
            for half in filter(None, halves):
                command_line = [
                    sys.executable,
                    __file__,
                    "--compile-only",
                    "--only",
                    layer.model,
                    "--tokens",
                    half,
                ]
                command_line += ["--peer", str(options.peer)]
                started.append(subprocess.Popen(command_line, stdout=subprocess.DEVNULL, env=os.environ))
    for process in started:
        process.wait()


def compile_only(options: argparse.Namespace) -> int:
    """Runs every configuration once, on weights that hold anything."""
    import layer_peer

    kernel = vllm_triton.load_kernel(options.peer)
    if kernel is None:
        return 1
    rng = np.random.default_rng()
    for layer in LAYERS:
        if options.only.lower() not in layer.model.lower():
            continue
        first, second = layer.first, layer.second
        weights = Weights(
            torch.zeros((1, first.experts, first.n, first.k), dtype=torch.uint8, device=DEVICE).view(
                layer_peer.FP8
            ),
            torch.zeros((1, second.experts, second.n, second.k), dtype=torch.uint8, device=DEVICE).view(
                layer_peer.FP8
            ),
            torch.ones((first.experts, first.n), device=DEVICE),
            torch.ones((second.experts, second.n), device=DEVICE),
        )
        for t in (int(text) for text in options.tokens.split(",")):
            batches = [make_batch(layer, t, rng)] * shapes.ROUTINGS
            for config in layer_peer.configs(layer, t):
                layer_peer.peer_calls(kernel, layer, config, batches, weights)[0]()
    torch.cuda.synchronize()
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="result file (default: tests/benchmarks/results/, dated)")
    parser.add_argument("--markdown", type=Path, help="table and gates (default: the result file with .md)")
    parser.add_argument(
        "--peer", type=Path, default=ROOT / ".peer", help="folder with triton_moe.py (default: .peer)"
    )
    parser.add_argument("--only", default="", help="only models whose name contains this")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="values of T")
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help=f"replays of each contender (default: {ROUNDS})"
    )
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further row after this time")
    parser.add_argument("--steps", action="store_true", help="every launch of ours alone too")
    parser.add_argument("--variants", action="store_true", help="every kernel of either GEMM forced too")
    parser.add_argument("--no-peer", action="store_true", help="without Triton")
    parser.add_argument(
        "--mma-rate",
        type=float,
        default=gates.TWIN_MMA_RATE,
        help=f"multiply-adds per clock and SM of the twin (default: {gates.TWIN_MMA_RATE:g}, measured)",
    )
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse()
    start = time.monotonic()
    if options.compile_only:
        return compile_only(options)
    torch.cuda.set_device(0)
    torch.zeros(1, device=DEVICE)
    gpu = Gpu.open(0)
    kernel = None if options.no_peer else vllm_triton.load_kernel(options.peer)
    if kernel is None:
        print(f"no Triton peer: {options.peer}/triton_moe.py or Triton is missing, or --no-peer")
    else:
        compile_peers(options)
        print(f"peers compiled in {time.monotonic() - start:.1f} s", flush=True)
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
    titles = " ".join(f"{name:>14}" for name in SHOWN)
    print(f"{'us, median ± IQR/2':<16} {'T':>4} {titles}")
    run_rows(Bench(gpu, kernel, floor, options), options, result, start)
    for text in result["not_run"]:
        print(f"not run, out of time: {text}")
    result["seconds"] = round(time.monotonic() - start, 1)
    report = layer_gates.judge(result, options.mma_rate)
    lines = layer_gates.describe(report)
    result["gates"] = {"held": report.held, "mma_rate": report.mma_rate, "report": lines}
    path: Path = options.json or HERE / "results" / f"{result['date']}_layer_{platform.node() or 'host'}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    table = options.markdown or path.with_suffix(".md")
    table.write_text(layer_gates.markdown(result, report), encoding="utf-8")
    print("\n".join(["", *lines]))
    print(f"{path.name}: {len(result['rows'])} rows in {result['seconds']} s, {lines[-1]}")
    return 0 if report.held and not result["not_run"] and not result["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
