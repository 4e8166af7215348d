"""What an expert layer costs the host: calls through `FusedMoE` and `fused_moe`, and as many bare launches.

    python tests/benchmarks/layer_host.py [--json FILE] [--calls N]

Each call gets fresh tensor objects of tokens, routes and `out` (made before the clock starts) at other
addresses; caches are warm. Beside each call, in the same loop, as many empty kernels are launched by ctypes
with cuLaunchKernelEx, attribute and all. Then calls are counted that allocate, copy or wait: there may be
none.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "runtime"), str(HERE), str(ROOT / "tests" / "gpu")]

from host_overhead import EMPTY, mean_costs  # noqa: E402

import sm12x  # noqa: E402
from sm12x import driver  # noqa: E402
from sm12x.launch_config import make_config  # noqa: E402

LIMIT_US = 12.0  # of the plan object, above the bare launches
TOKENS, TOP_K, EXPERTS, HIDDEN, INNER, POOL = 4, 2, 8, 256, 128, 61
GATED = "plan"  # the way to call that has a limit


@dataclass
class Layer:
    """Ways to call one layer, and fresh arguments for the call of a number."""

    calls: dict[str, Callable[..., Any]]
    fresh: Callable[[int], dict[str, Any]]
    launches: int


def make_layer(empty: Callable[..., Any], view: Callable[[Any, int], Any]) -> Layer:
    """`empty(shape, dtype)` makes an array, `view(array, i)` a new object for its part number `i`."""
    weights = {
        "w1": empty((EXPERTS, 2 * INNER, HIDDEN), "float8_e4m3fn"),
        "w2": empty((EXPERTS, HIDDEN, INNER), "float8_e4m3fn"),
        "w1_scale": empty((EXPERTS, 2 * INNER), "float32"),
        "w2_scale": empty((EXPERTS, HIDDEN), "float32"),
    }
    pools = {
        "x": empty((POOL, TOKENS, HIDDEN), "bfloat16"),
        "topk_weights": empty((POOL, TOKENS, TOP_K), "float32"),
        "topk_ids": empty((POOL, TOKENS, TOP_K), "int32"),
        "out": empty((POOL, TOKENS, HIDDEN), "bfloat16"),
    }
    plan = sm12x.FusedMoE(**weights)
    workspace = empty((plan.workspace_size(TOKENS, TOP_K),), "uint8")

    def fresh(index: int) -> dict[str, Any]:
        return {name: view(pool, index % POOL) for name, pool in pools.items()}

    plan(**fresh(0))
    chain = next(iter(plan._plan._calls.values())).chains[-1]  # type: ignore[union-attr]
    return Layer(
        calls={
            GATED: plan,
            "plan, workspace given": lambda **each: plan(**each, workspace=workspace),
            "function": lambda **each: sm12x.fused_moe(**each, **weights),
        },
        fresh=fresh,
        launches=len(chain.steps),
    )


def bare_launches(device: driver.Device, stream: int, count: int) -> Callable[[], int]:
    """What launches `count` empty kernels as a layer launches its own, and gives the last status."""
    with driver.current(device):
        module = device.driver.call("cuModuleLoadData", EMPTY)
        function = int(device.driver.call("cuModuleGetFunction", module, b"empty"))
    return launches_of(device, function, None, stream, count)


def launches_of(
    device: driver.Device, function: int, arguments: Any, stream: int, count: int
) -> Callable[[], int]:
    """The same with a kernel that is there; `arguments`: those of cuLaunchKernelEx."""
    config: Any = make_config((1, 1, 1), 32, 0, programmatic=True)
    config.stream = stream
    launch, pointer = device.driver.hot.cuLaunchKernelEx, device.driver.pointer
    given = pointer(ctypes.addressof(config)), pointer(function), arguments, None

    def call(config: Any = config) -> int:  # which has to live as long
        status = 0
        for _ in range(count):
            status |= launch(*given)
        return int(status)

    return call


def measure(
    layer: Layer, bare: Callable[[], int], calls: int, synchronize: Callable[[], None]
) -> dict[str, Any]:
    """Mean microseconds of each way to call, of the bare launches beside it, and the difference."""
    found: dict[str, Any] = {"launches": layer.launches}
    for name, call in layer.calls.items():
        counted, each, launches = mean_costs(call, bare, layer.fresh, calls, synchronize)
        found["calls"] = counted
        found[name] = {"call_us": each, "bare_launches_us": launches, "above_us": each - launches}
    return found


def costly_calls(layer: Layer, calls: int) -> dict[str, dict[str, int]]:
    """What of LayerGraph's COSTLY warm calls did, by the way to call; fresh arrays are made before."""
    from layer_graph import counted_allocations

    found = {}
    for name, call in layer.calls.items():
        arguments = [layer.fresh(index) for index in range(calls)]
        with counted_allocations() as counts:
            for each in arguments:
                call(**each)
        found[name] = dict(counts)
    return found


def main() -> int:
    import torch

    from sm12x.validation.device import Gpu

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="result file (default: tests/benchmarks/results/, dated)")
    parser.add_argument("--calls", type=int, default=10_000)
    options = parser.parse_args()
    torch.zeros(1, device="cuda")
    gpu = Gpu.open(0)

    def empty(shape: tuple[int, ...], dtype: str) -> Any:
        kind = getattr(torch, dtype)
        if dtype.startswith("float8"):
            return torch.zeros(shape, dtype=torch.uint8, device="cuda").view(kind)
        return torch.zeros(shape, dtype=kind, device="cuda")

    layer = make_layer(empty, lambda pool, index: pool[index])
    bare = bare_launches(gpu.device, torch.cuda.current_stream().cuda_stream, layer.launches)
    if bare():
        raise RuntimeError("an empty kernel could not be launched")
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(0),
        "python": platform.python_version(),
        "command": " ".join(["python", *sys.argv]),
        "costs": measure(layer, bare, options.calls, torch.cuda.synchronize),
        "costly_calls": costly_calls(layer, 200),
    }
    path = options.json or HERE / "results" / f"{result['date']}_layer_host_{platform.node() or 'host'}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return report(result)


def report(result: dict[str, Any]) -> int:
    """Prints the result; 0 where it is within the limits."""
    costs = result["costs"]
    print(f"{costs['calls']} calls of {costs['launches']} launches each, {result['device']}")
    for name in result["costly_calls"]:
        each = costs[name]
        limit = f"  (limit {LIMIT_US:g})" if name == GATED else ""
        print(
            f"{name:<22} {each['call_us']:7.2f} us, bare launches {each['bare_launches_us']:7.2f} us, above "
            f"them {each['above_us']:6.2f} us{limit}"
        )
    costly = {name: counts for name, counts in result["costly_calls"].items() if counts}
    print(f"allocations, copies, waits of warm calls: {costly or 'none'}")
    good = costs[GATED]["above_us"] <= LIMIT_US and not costly
    above = costs[GATED]["above_us"]
    print(
        f"a layer's call costs the host {above:.2f} us above {costs['launches']} bare launches: "
        + ("ok" if good else "TOO MUCH")
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
