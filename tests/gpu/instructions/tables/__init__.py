"""Instruction forms by family, in the order and under the names of the emulator's family modules."""

from __future__ import annotations

import importlib
from functools import cache

from ..forms import Form

FAMILIES = (
    "integer",
    "extended",
    "logic",
    "compare_select",
    "floating",
    "approximate",
    "conversion",
    "data_movement",
    "atomics",
    "warp_wide",
    "matrix",
)


@cache
def forms(family: str) -> tuple[Form, ...]:
    """The forms of a family; their names differ."""
    found: tuple[Form, ...] = tuple(importlib.import_module(f".{family}", __name__).forms())
    return found


def all_forms() -> list[Form]:
    """The forms of all families. Raises ValueError where two have the same name."""
    found = [form for family in FAMILIES for form in forms(family)]
    seen: set[str] = set()
    for form in found:
        if form.name in seen:
            raise ValueError(f"two forms are called {form.name!r}")
        seen.add(form.name)
    return found
