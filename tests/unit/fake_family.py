"""The families of kernels with made-up cubins, laid out the way the build does."""

from __future__ import annotations

import ctypes
import hashlib
import json
import random
from typing import Any

from sm12x import abi

# (key stem, tile, schedule, swap_ab, threads, shared memory, workspace per CTA, grid axis)
GEMMS = [
    ("128x128x128_coop", (128, 128, 128), "cooperative", False, 384, 99328, 384, "x"),
    ("64x128x128_pingpong", (64, 128, 128), "pingpong", False, 384, 90112, 512, "x"),
    ("128x32x128_swap", (128, 32, 128), "cooperative", True, 384, 80896, 384, "y"),
    ("128x16x128_swap", (128, 16, 128), "cooperative", True, 384, 70656, 384, "y"),
]
OUTS = {"bf16": "bfloat16", "fp16": "float16"}
# (key stem, tile, schedule, swap_ab, threads, shared memory, partials per CTA, MMA warps)
PACKED = [
    ("128x8x128_swap", (128, 8, 128), "cooperative", True, 320, 88064, 8192, 8),
    ("128x32x128_swap", (128, 32, 128), "cooperative", True, 192, 82944, 32768, 4),
    ("128x16x64_swap", (128, 16, 64), "cooperative", True, 320, 93184, 16384, 8),
    ("128x128x128_coop", (128, 128, 128), "cooperative", False, 320, 99328, 131072, 8),
]
PACKED_OUTS = ["bfloat16", "float16", "float32"]
# The same of an expert layer's first GEMM, with gates and without, and of the one that quantises its rows.
UP = [
    PACKED[0],
    PACKED[1],
    ("64x8x128_swap", (64, 8, 128), "cooperative", True, 320, 100352, 4096, 4),
    PACKED[3],
]
UP_OUTS = ["bfloat16", "float16", "float8_e4m3fn"]
DOWN = PACKED[:2]
# Of all of an expert layer, with gates and without.
WHOLE_OUTS = ["bfloat16", "float16"]
WHOLE = [("128x8x128_swap", (128, 8, 128), "pingpong", True, 384, 98304, 0, 8)]
# (key, family, role, params, threads)
SMALL = [
    ("moe_route", "moe_route", "route", "sm12x_route_params", 512),
    ("moe_combine", "moe_combine", "combine", "sm12x_combine_params", 128),
    ("quantize_fp8", "quantize_fp8", "quantize", "sm12x_quantize_params", 256),
    ("quantize_fp8_maxima", "quantize_fp8", "maxima", "sm12x_maxima_params", 256),
]


def abi_record() -> dict[str, Any]:
    """The mirror as the build would record it."""
    structs = {}
    for name, struct in abi.STRUCTS.items():
        fields = {
            key: [getattr(struct, key).offset, getattr(struct, key).size]
            for key, *_ in struct._fields_
            if not key.startswith("_")
        }
        structs[name] = {"size": ctypes.sizeof(struct), "align": 8, "fields": fields}
    return {"structs": structs, "constants": abi.constants()}


def write_family(
    root,
    archs=("sm_120a", "sm_121a", "sm_90a"),
    majors=("cu12", "cu13"),
    packed=False,
    layer=False,
    whole=False,
):
    """The family fp8_ptr_array with made-up cubins under `root`, the way the build lays it out; with `packed`
    fp8_packed too, with `layer` also all that an expert layer needs, with `whole` the kernels that do all of
    one besides."""
    variants = {}

    def add(key, kernel):
        targets = {}
        for arch in archs:
            cubins = {}
            for major in majors:
                path = root / major / arch / f"{key}.cubin"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(random.randbytes(random.randrange(200, 400)) + key.encode())
                cubins[major] = {
                    "path": f"{major}/{arch}/{key}.cubin",
                    "size": path.stat().st_size,
                    "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                    "assembler": "13.3.73",
                    "registers": 168,
                    "spill_bytes": 0,
                    "stack_bytes": 0,
                }
            targets[arch] = {"ptx": {"path": f"ptx/{arch}/{key}.ptx.xz"}, "cubins": cubins}
        variants[key] = {
            "family": "fp8_ptr_array",
            "symbol": f"sm12x_{key}",
            "targets": targets,
            "pdl": False,
            **kernel,
        }

    for stem, tile, schedule, swap, threads, shared, workspace, axis in GEMMS:
        for short, out in OUTS.items():
            maps = {
                "a": {"rank": 2, "box": [128, tile[0]], "swizzle": 128, "element_bytes": 1},
                "b": {"rank": 2, "box": [128, tile[1]], "swizzle": 128, "element_bytes": 1},
                "d": {"rank": 2, "box": [64, 64], "swizzle": 128, "element_bytes": 2},
            }
            add(
                f"fp8_ptr_array_{stem}_{short}",
                {
                    "role": "gemm",
                    "params": "sm12x_ptr_array_params",
                    "tile": list(tile),
                    "schedule": schedule,
                    "swap_ab": swap,
                    "a": "float8_e4m3fn",
                    "b": "float8_e4m3fn",
                    "out": out,
                    "mma": "unit_scale",
                    "stages": 2,
                    "threads": threads,
                    "shared_memory": shared,
                    "grid_axis": axis,
                    "workspace_per_cta": workspace,
                    "tensor_maps": maps,
                },
            )
    for role, threads in (("packed", 1024), ("list", 384)):
        add(
            f"fp8_ptr_array_prepare_{role}",
            {
                "role": f"prepare_{role}",
                "params": f"sm12x_prepare_{role}_params",
                "threads": threads,
                "shared_memory": 0,
                "grid_axis": "x",
                "workspace_per_cta": 0,
            },
        )
    for row in PACKED if packed or layer else ():
        add(*_packed_kernel("fp8_packed", "gemm", "sm12x_packed_params", PACKED_OUTS, *row))
    for row in UP if layer else ():
        for gated in (False, True):
            add(*_packed_kernel("fp8_up", "up", "sm12x_up_params", UP_OUTS, *row, gated=gated))
    for row in DOWN if layer else ():
        add(*_packed_kernel("fp8_down", "down", "sm12x_down_params", PACKED_OUTS, *row))
    for row in WHOLE if whole else ():
        for gated in (False, True):
            add(*_packed_kernel("fp8_layer", "layer", "sm12x_layer_params", WHOLE_OUTS, *row, gated=gated))
    for key, family, role, params, threads in SMALL if layer else ():
        facts = {"threads": threads, "shared_memory": 0, "grid_axis": "x", "workspace_per_cta": 0}
        add(key, {"family": family, "role": role, "params": params, "pdl": True, **facts})
    contents = {"schema": 1, "toolchain": {"nvcc": "13.3.73"}, "abi": abi_record(), "variants": variants}
    root.mkdir(parents=True, exist_ok=True)
    (root / "manifest.json").write_text(json.dumps(contents))
    return contents


def _packed_kernel(
    family, role, params, outs, stem, tile, schedule, swap, threads, shared, workspace, warps, gated=False
):
    """Key and facts of a kernel on the packed layer."""
    token, feature = (tile[1], tile[0]) if swap else (tile[0], tile[1])
    whole = role == "layer"
    least = (16 if gated or whole else 8) if swap else feature  # features of the smallest box
    boxes = [("a", 3, token), ("b", 5 if gated else 3, least), ("b2", 3, least)]
    maps = {
        name: {"rank": rank, "box": [tile[2], rows], "swizzle": tile[2], "element_bytes": 1}
        for name, rank, rows in (boxes[1:] if whole else boxes[:2])
    }
    return f"{family}_{'gated_' if gated else ''}{stem}", {
        "family": family,
        "role": role,
        "params": params,
        "tile": list(tile),
        "schedule": schedule,
        "swap_ab": swap,
        "a": "float8_e4m3fn",
        "b": "float8_e4m3fn",
        "outs": outs,
        "mma": "unit_scale",
        "pdl": role != "gemm" or stem != "128x32x128_swap",
        "stages": 4,
        "threads": threads,
        "shared_memory": shared,
        "grid_axis": "x",
        "workspace_per_cta": workspace,
        "mma_warps": warps,
        "weight_maps": (feature // least).bit_length(),
        "tensor_maps": maps,
        **({"gated": gated} if role in ("up", "layer") else {}),
    }
