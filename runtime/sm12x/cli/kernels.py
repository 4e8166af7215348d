"""``python -m sm12x kernels``: what is precompiled, for which device, at which cost in registers and
memory."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from typing import Any

from sm12x import manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    held = manifest.default()
    rows = list(describe(held))
    if args.json:
        print(json.dumps({"toolchain": dict(held.toolchain), "kernels": rows}, indent=1))
    else:
        print(_table(rows))
        tools = ", ".join(f"{name} {version}" for name, version in held.toolchain.items())
        print(f"{len(held.variants)} kernels, {len(rows)} cubins in {held.root}; {tools}")
    return 0


def describe(held: manifest.Manifest) -> Iterable[dict[str, Any]]:
    """One record for each cubin: a kernel for one architecture and CUDA major.

    `tile` is (M, N, K) of the kernel's own sides, `token_tile` and `feature_tile` the same by meaning (all
    null for preparation kernels); `outs`: types of D that the kernel can write; `pdl`: it may begin before
    what is ahead of it in the stream has ended, and waits for that itself; `mma_warps`: of those kernels that
    state them, else null; `registers` per thread; `spill_bytes` and `stack_bytes` per thread; `shared_memory`
    in bytes, dynamic, per CTA; `installed` is false where another wheel has the file.
    """
    for variant in held.variants.values():
        gemm = variant.role == "gemm"
        for arch, target in variant.targets.items():
            for major, cubin in target.cubins.items():
                yield {
                    "kernel": variant.key,
                    "family": variant.family,
                    "role": variant.role,
                    "arch": arch,
                    "cuda_major": major,
                    "registers": cubin.registers,
                    "spill_bytes": cubin.spill_bytes,
                    "stack_bytes": cubin.stack_bytes,
                    "shared_memory": variant.shared_memory,
                    "threads": variant.threads,
                    "stages": variant.stages if gemm else None,
                    "tile": list(variant.tile) if gemm else None,
                    "token_tile": variant.token_tile if gemm else None,
                    "feature_tile": variant.feature_tile if gemm else None,
                    "schedule": variant.schedule or None,
                    "a": variant.a or None,
                    "b": variant.b or None,
                    "outs": list(variant.outs) if gemm else None,
                    "pdl": variant.pdl,
                    "mma_warps": variant.mma_warps or None,
                    "flags": _flags(variant, arch),
                    "compile_flags": _compile_flags(target.ptx),
                    "size": cubin.size,
                    "assembler": cubin.assembler,
                    "path": cubin.path,
                    "installed": (held.root / cubin.path).is_file(),
                }


def _flags(variant: manifest.Variant, arch: str) -> list[str]:
    flags = [name for name, is_set in (("swap_ab", variant.swap_ab), ("pdl", variant.pdl)) if is_set]
    if arch == "sm_90a":
        return [*flags, "twin"]  # Hopper has neither of the MMAs that `mma` names, and takes sm_89's
    return flags + ([f"mma={variant.mma}"] if variant.mma else [])


def _compile_flags(ptx: Mapping[str, Any]) -> list[str]:
    return [str(flag) for flag in ptx.get("flags", [])]


_COLUMNS = (
    ("kernel", "kernel"),
    ("arch", "arch"),
    ("CUDA", "cuda_major"),
    ("regs", "registers"),
    ("spill B", "spill_bytes"),
    ("smem B", "shared_memory"),
    ("threads", "threads"),
    ("stages", "stages"),
    ("tile", "tile"),
    ("out", "outs"),
    ("flags", "flags"),
    ("", "installed"),
)
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def _cell(name: str, value: Any) -> str:
    if name == "tile" and value:
        return "x".join(map(str, value))
    if name == "flags":
        return " ".join(value)
    if name == "outs":
        return ",".join(_SHORT.get(each, each) for each in value or ())
    if name == "installed":
        return "" if value else "not installed"
    return "" if value is None else str(value)


def _table(rows: Iterable[Mapping[str, Any]]) -> str:
    cells = [[title for title, _ in _COLUMNS]] + [
        [_cell(name, row[name]) for _, name in _COLUMNS] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = {"registers", "spill_bytes", "shared_memory", "threads", "stages"}
    lines = [
        "  ".join(
            cell.rjust(width) if name in numeric else cell.ljust(width)
            for cell, width, (_, name) in zip(line, widths, _COLUMNS, strict=True)
        ).rstrip()
        for line in cells
    ]
    return "\n".join(lines)
