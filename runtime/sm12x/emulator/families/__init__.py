"""Instruction families: one module each, named after the chapters of the PTX ISA. Importing one registers its
handlers.
"""

from __future__ import annotations

import importlib
from functools import lru_cache

MODULES = (
    "integer",
    "extended",
    "logic",
    "compare_select",
    "conversion",
    "floating",
    "data_movement",
    "atomics",
    "control",
    "calls",
    "warp_wide",
    "barriers",
    "mbarrier",
    "cluster",
    "cluster_launch",
    "copy",
    "bulk_copy",
    "bulk_reduce",
    "tensor_map_edit",
    "matrix",
)


@lru_cache(maxsize=1)
def load() -> None:
    """Register the handlers of every family."""
    for name in MODULES:
        importlib.import_module(f".{name}", __name__)
