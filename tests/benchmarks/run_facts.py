"""What a result file says of the run that made it: the device's ceilings, the command, versions."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from read_floor import ReadFloor

import sm12x
from sm12x import driver
from sm12x.validation.device import Gpu
from sm12x.validation.timing import Contender, interleave


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


def command(arguments: list[str]) -> str:
    """The command line without the paths of results, which mean nothing elsewhere."""
    kept = ["python", f"tests/benchmarks/{Path(arguments[0]).name}"]
    paths = ("--json", "--markdown", "--plot", "--peer")
    for before, each in zip(["", *arguments[1:]], arguments[1:], strict=False):
        if each.split("=")[0] not in paths and before not in paths:
            kept.append(each)
    return " ".join(kept)


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
