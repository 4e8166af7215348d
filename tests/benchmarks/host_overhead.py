"""What a call costs the host: packed, gathered and masked calls against a bare cuLaunchKernel, `import
sm12x`, and the first result.

    python tests/benchmarks/host_overhead.py [--json FILE] [--calls N]

Each call gets fresh tensor objects (made before the clock starts) and another activation pointer; out and
workspace are given, caches are warm. Beside each call, in the same loop, one ctypes cuLaunchKernel of an
empty kernel is timed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "runtime")]

LIMIT_CALL_US = 10.0
LAYOUTS = ("packed", "gathered", "masked")
LIMIT_IMPORT_MS = 60.0
LIMIT_FIRST_MS = 100.0
BATCH = 64  # calls between two waits for the device, so that its queue never fills and blocks the host
EMPTY = b""".version 7.0
.target sm_80
.address_size 64
.visible .entry empty() { ret; }
"""


def empty_launch(stream: int) -> Any:
    """A function of no arguments that launches an empty kernel on `stream` through ctypes and returns the
    status.
    """
    from sm12x import driver

    module = driver.call("cuModuleLoadData", EMPTY)
    function = ctypes.c_void_p(int(driver.call("cuModuleGetFunction", module, b"empty")))
    library = ctypes.CDLL("libcuda.so.1")
    launch = library.cuLaunchKernel
    handle = ctypes.c_void_p(stream)

    def call() -> int:
        return int(launch(function, 1, 1, 1, 32, 1, 1, 0, handle, None, None))

    return call


def fresh_arguments(layout: str, workspace_size: Any, device: str = "cuda") -> Any:
    """A function that gives the arguments of the call of a number: new tensor objects, another part of the
    activations and of `out` each time. `layout`: "packed", "gathered" (with row weights) or "masked"."""
    import torch

    experts, rows, n, k, pool = 8, 32, 264, 272, 61
    most = rows // experts  # rows of each expert
    fp8 = torch.float8_e4m3fn
    a = torch.zeros((pool * rows, k), dtype=torch.uint8, device=device).view(fp8)
    b = torch.zeros((experts, n, k), dtype=torch.uint8, device=device).view(fp8)
    a_scale = torch.ones(pool * rows, device=device)
    row_weight = torch.ones(pool * rows, device=device)
    b_scale = torch.ones((experts, n), device=device)
    offsets = torch.arange(0, rows + 1, most, dtype=torch.int32, device=device)
    counts = torch.full((experts,), most, dtype=torch.int32, device=device)
    row_index = torch.arange(rows, dtype=torch.int32, device=device).repeat(pool)
    out = torch.empty((pool * rows, n), dtype=torch.bfloat16, device=device)
    workspace = torch.empty(workspace_size(experts), dtype=torch.uint8, device=device)

    def arguments(index: int) -> dict[str, Any]:
        part = slice(index % pool * rows, (index % pool + 1) * rows)
        shared = {"b": b[:], "b_scale": b_scale[:], "workspace": workspace[:]}
        if layout == "masked":
            rows_of = experts, most
            return {
                **shared,
                "a": a[part].view(*rows_of, k),
                "a_scale": a_scale[part].view(rows_of),
                "rows": counts[:],
                "out": out[part].view(*rows_of, n),
            }
        packed = {**shared, "a": a[part], "a_scale": a_scale[part], "offsets": offsets[:], "out": out[part]}
        if layout == "gathered":
            return {**packed, "row_index": row_index[part], "row_weight": row_weight[part]}
        return packed

    return arguments


def mean_costs(call: Any, bare: Any, fresh: Any, calls: int, synchronize: Any) -> tuple[int, float, float]:
    """How many calls were counted, and mean microseconds of a call and of the bare launch beside it."""
    total = bare_total = 0
    clock = time.perf_counter_ns
    for index in range(-4 * BATCH, calls, BATCH):  # the first batches warm caches and are not counted
        arguments = [fresh(i) for i in range(max(0, index), max(0, index) + BATCH)]
        synchronize()
        spent = bare_spent = 0
        for each in arguments:
            start = clock()
            call(**each)
            middle = clock()
            bare()
            end = clock()
            spent += middle - start
            bare_spent += end - middle
        if index >= 0:
            total += spent
            bare_total += bare_spent
    counted = -(-calls // BATCH) * BATCH
    synchronize()
    return counted, total / counted / 1e3, bare_total / counted / 1e3


def packed_call(calls: int, layout: str) -> dict[str, float]:
    """Mean microseconds of a call and of the bare launch beside it."""
    import torch

    import sm12x
    from sm12x.validation.device import Gpu

    torch.zeros(1, device="cuda")
    assert Gpu.open(0).device.arch
    bare = empty_launch(torch.cuda.current_stream().cuda_stream)
    assert bare() == 0
    fresh = fresh_arguments(layout, sm12x.workspace_size)
    counted, call, launch = mean_costs(sm12x.grouped_gemm, bare, fresh, calls, torch.cuda.synchronize)
    return {"calls": counted, f"{layout}_call_us": call, f"{layout}_bare_launch_us": launch}


def in_fresh_process(source: str) -> float:
    """The number that a program prints, run by a new interpreter."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT / "runtime"), XLA_PYTHON_CLIENT_PREALLOCATE="false")
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=120, env=environment
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-500:])
    return float(done.stdout.strip().splitlines()[-1])


IMPORT = "import time; t = time.perf_counter(); import {}; print((time.perf_counter() - t) * 1e3)"
FIRST_USE = IMPORT.format("sm12x; sm12x.grouped_gemm")
FIRST_RESULT = """
import time, torch
a = torch.zeros(32, 704, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
b = torch.zeros(8, 264, 704, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
offsets = torch.arange(0, 33, 4, dtype=torch.int32, device="cuda")
torch.cuda.synchronize()
t = time.perf_counter()
import sm12x
out = sm12x.grouped_gemm(a, b, a_scale=0.5, b_scale=0.5, offsets=offsets)
torch.cuda.synchronize()
print((time.perf_counter() - t) * 1e3)
"""


def imports(repeats: int) -> dict[str, float]:
    """Medians in milliseconds over fresh processes, one of each in turn."""
    sources = {
        "import_numpy_ms": IMPORT.format("numpy"),
        "import_sm12x_ms": IMPORT.format("sm12x"),
        "import_and_name_ms": FIRST_USE,
    }
    samples: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(repeats + 1):  # the first round fills the page cache
        for name, source in sources.items():
            samples[name].append(in_fresh_process(source))
    return {name: statistics.median(values[1:]) for name, values in samples.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="result file (default: tests/benchmarks/results/, dated)")
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=10, help="fresh processes for each start-up time")
    options = parser.parse_args()
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version()}
    result["command"] = " ".join(["python", *sys.argv])
    failed = []

    def part(name: str, function: Any) -> None:
        try:
            result.update(function())
        except Exception as error:  # the other parts are still worth having
            failed.append(f"{name}: {type(error).__name__}: {str(error)[:400]}")

    part("imports", lambda: imports(options.repeats))
    for layout in LAYOUTS:
        part(f"{layout} call", partial(packed_call, options.calls, layout))
    first = [FIRST_RESULT] * min(5, options.repeats)
    part(
        "first result",
        lambda: {"first_result_ms": statistics.median(in_fresh_process(text) for text in first)},
    )
    checks = []
    for layout in LAYOUTS:
        if f"{layout}_call_us" in result:
            import torch

            result["device"] = torch.cuda.get_device_name(0)
            above = result[f"{layout}_call_us"] - result[f"{layout}_bare_launch_us"]
            checks.append((f"{layout} call above a bare launch, us", above, LIMIT_CALL_US))
    if "import_sm12x_ms" in result:
        above = result["import_sm12x_ms"] - result["import_numpy_ms"]
        checks.append(("import sm12x above import numpy, ms", above, LIMIT_IMPORT_MS))
        above = result["import_and_name_ms"] - result["import_numpy_ms"]
        checks.append(("the same with sm12x.grouped_gemm looked up, ms", above, LIMIT_IMPORT_MS))
    if "first_result_ms" in result:
        checks.append(("first result, driver started, ms", result["first_result_ms"], LIMIT_FIRST_MS))
    for name, value in result.items():
        print(f"{name:<24} {value:.2f}" if isinstance(value, float) else f"{name:<24} {value}")
    for name, value, limit in checks:
        print(f"{name:<48} {value:8.2f}  (limit {limit:g}) {'ok' if value <= limit else 'TOO MUCH'}")
    for text in failed:
        print(f"FAILED {text}")
    result["failed"] = failed
    path = (
        options.json or HERE / "results" / f"host_overhead_{platform.node() or 'host'}_{result['date']}.json"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if failed or any(value > limit for _, value, limit in checks) else 0


if __name__ == "__main__":
    sys.exit(main())
