"""A small manifest that the runtime accepts, for tests of the commands that read it."""

from __future__ import annotations

import copy
import json

from sm12x import manifest

CUBIN = {
    "size": 9,
    "sha256": "0" * 64,
    "assembler": "13.3.73",
    "registers": 168,
    "spill_bytes": 0,
    "stack_bytes": 0,
}
PREPARE = {
    "family": "fp8_ptr_array",
    "role": "prepare_packed",
    "params": "sm12x_prepare_packed_params",
    "symbol": "sm12x_prepare",
    "threads": 1024,
    "shared_memory": 0,
    "grid_axis": "x",
    "workspace_per_cta": 0,
}
GEMM = {
    **PREPARE,
    "role": "gemm",
    "params": "sm12x_ptr_array_params",
    "symbol": "sm12x_gemm",
    "threads": 384,
    "shared_memory": 99000,
    "workspace_per_cta": 384,
    "tile": [128, 32, 64],
    "schedule": "cooperative",
    "swap_ab": True,
    "a": "float8_e4m3fn",
    "b": "float8_e4m3fn",
    "out": "bfloat16",
    "mma": "unit_scale",
    "pdl": False,
    "stages": 3,
    "tensor_maps": {x: {"rank": 2, "box": [128, 32], "swizzle": 128, "element_bytes": 1} for x in "abd"},
}
_PACKED = {name: value for name, value in GEMM.items() if name not in ("out", "tensor_maps")}
PACKED = {
    **_PACKED,
    "family": "fp8_packed",
    "params": "sm12x_packed_params",
    "symbol": "sm12x_packed",
    "threads": 192,
    "outs": ["bfloat16", "float16", "float32"],
    "pdl": True,
    "mma_warps": 4,
    "tensor_maps": {x: {"rank": 3, "box": [64, 32], "swizzle": 64, "element_bytes": 1} for x in "ab"},
}


def write_manifest(root, kernels):
    """A manifest of `kernels` for two architectures and both CUDA majors; registers tell the cubins apart."""
    variants = {}
    for key, kernel in kernels.items():
        targets = {}
        for i, arch in enumerate(("sm_120a", "sm_121a")):
            cubins = {
                major: {
                    **CUBIN,
                    "path": f"{major}/{arch}/{key}.cubin",
                    "registers": 100 + 10 * i + j,
                    "spill_bytes": 72 * j,
                }
                for j, major in enumerate(("cu12", "cu13"))
            }
            targets[arch] = {"ptx": {"path": "x.ptx.xz", "flags": ["-O3", f"-arch={arch}"]}, "cubins": cubins}
        variants[key] = {**copy.deepcopy(kernel), "targets": targets}
    contents = {"schema": 1, "toolchain": {"nvcc": "13.3.73"}, "abi": {}, "variants": variants}
    (root / "manifest.json").write_text(json.dumps(contents))
    return manifest.load(root)
