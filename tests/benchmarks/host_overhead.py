"""What a call costs the host: packed calls against a bare cuLaunchKernel, `import sm12x`, and the first
result.

    python tests/benchmarks/host_overhead.py [--json FILE] [--calls N]

Packed calls of the family fp8_packed, rows sorted by expert and rows gathered through a row_index. Each call
gets fresh tensor objects (made before the clock starts) and another activation pointer; out and workspace are
given, caches are warm. Beside each call, in the same loop, one ctypes cuLaunchKernel of an empty kernel is
timed.
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
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "runtime")]

LIMIT_CALL_US = 10.0
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


def packed_calls(calls: int, gather: bool) -> dict[str, float]:
    """Mean microseconds of a packed call and of the bare launch beside it."""
    import torch

    import sm12x
    from sm12x.validation.device import Gpu

    torch.zeros(1, device="cuda")
    gpu = Gpu.open(0)
    experts, rows, n, k, pool = 8, 32, 264, 272, 61
    a = torch.zeros((pool * rows, k), dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    b = torch.zeros((experts, n, k), dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    a_scale = torch.ones(pool * rows, device="cuda")
    b_scale = torch.ones((experts, n), device="cuda")
    offsets = torch.arange(0, rows + 1, rows // experts, dtype=torch.int32, device="cuda")
    index = torch.randint(0, rows, (pool * rows,), dtype=torch.int32, device="cuda")
    out = torch.empty((pool * rows, n), dtype=torch.bfloat16, device="cuda")
    workspace = torch.empty(sm12x.workspace_size(experts), dtype=torch.uint8, device="cuda")
    bare = empty_launch(torch.cuda.current_stream().cuda_stream)
    if bare() or not gpu.device.arch:
        raise RuntimeError("the empty kernel does not launch")

    def fresh(number: int) -> tuple[Any, ...]:
        part = slice(number % pool * rows, (number % pool + 1) * rows)
        which = index[part] if gather else None
        return a[part], b[:], a_scale[part], b_scale[:], offsets[:], which, out[part], workspace[:]

    total = bare_total = 0
    clock = time.perf_counter_ns
    grouped_gemm = sm12x.grouped_gemm
    for start_of in range(-4 * BATCH, calls, BATCH):  # the first batches warm caches and are not counted
        batch = [fresh(i) for i in range(max(0, start_of), max(0, start_of) + BATCH)]
        torch.cuda.synchronize()
        spent = bare_spent = 0
        for x, w, x_scale, w_scale, bounds, which, result, scratch in batch:
            start = clock()
            grouped_gemm(
                x,
                w,
                a_scale=x_scale,
                b_scale=w_scale,
                offsets=bounds,
                row_index=which,
                out=result,
                workspace=scratch,
            )
            middle = clock()
            bare()
            end = clock()
            spent += middle - start
            bare_spent += end - middle
        if start_of >= 0:
            total += spent
            bare_total += bare_spent
    counted = -(-calls // BATCH) * BATCH
    torch.cuda.synchronize()
    name = "gather" if gather else "contiguous"
    return {
        "calls": counted,
        f"{name}_call_us": total / counted / 1e3,
        f"{name}_bare_launch_us": bare_total / counted / 1e3,
    }


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
    part("contiguous", lambda: packed_calls(options.calls, False))
    part("gather", lambda: packed_calls(options.calls, True))
    first = [FIRST_RESULT] * min(5, options.repeats)
    part(
        "first result",
        lambda: {"first_result_ms": statistics.median(in_fresh_process(text) for text in first)},
    )
    checks = []
    for name in ("contiguous", "gather"):
        if f"{name}_call_us" in result:
            import torch

            result["device"] = torch.cuda.get_device_name(0)
            above = result[f"{name}_call_us"] - result[f"{name}_bare_launch_us"]
            checks.append((f"packed call ({name}) above a bare launch, us", above, LIMIT_CALL_US))
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
