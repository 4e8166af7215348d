"""sm12x: precompiled FP8 kernels of expert layers for consumer and workstation Blackwell (CC 12.x).

`fused_moe`, a whole expert layer, and its parts `quantize_fp8`, `route` and `grouped_gemm` are the
operations; `checkpoint` loads layers for them, `reference` is what they compute in NumPy, `emulator` runs
their kernels on the CPU. Names are loaded on first use: `import sm12x` imports no CUDA, no framework and not
even NumPy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .manifest import wheel_major as _wheel_major

if TYPE_CHECKING:
    from . import checkpoint, emulator, reference
    from .errors import CheckpointError, CubinError, CudaError, DriverError, UnsupportedDeviceError
    from .ops.fused_moe import fused_moe
    from .ops.grouped_gemm import grouped_gemm
    from .ops.launch import workspace_size
    from .ops.moe_layer import FusedMoE
    from .ops.quantize import quantize_fp8
    from .ops.route import Routing, route

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "CubinError",
    "CudaError",
    "DriverError",
    "FusedMoE",
    "Routing",
    "UnsupportedDeviceError",
    "__version__",
    "checkpoint",
    "emulator",
    "fused_moe",
    "grouped_gemm",
    "quantize_fp8",
    "reference",
    "route",
    "workspace_size",
]

_wheel_major()  # ImportError where both wheels are installed

_MODULES = {
    "CheckpointError": ".errors",
    "CubinError": ".errors",
    "CudaError": ".errors",
    "DriverError": ".errors",
    "FusedMoE": ".ops.moe_layer",
    "Routing": ".ops.route",
    "UnsupportedDeviceError": ".errors",
    "fused_moe": ".ops.fused_moe",
    "grouped_gemm": ".ops.grouped_gemm",
    "quantize_fp8": ".ops.quantize",
    "route": ".ops.route",
    "workspace_size": ".ops.launch",
}


def __getattr__(name: str) -> Any:
    if name in ("checkpoint", "emulator", "reference"):
        return importlib.import_module(f".{name}", __name__)
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module 'sm12x' has no attribute {name!r}")
    value = getattr(importlib.import_module(module, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
