"""A sample of what hardware did with cases, as text: a case, and a digest of each part of its arena."""

from __future__ import annotations

import hashlib
from typing import Any

from emulated.copies.case import Case, Map

DIGITS = 10  # hexadecimal, of a digest


def parts_of(case: Case) -> list[tuple[str, int, int]]:
    """Names of the parts of an arena, with where they begin and end."""
    first, second, third, end = case.places
    return [
        ("tensor", 0, first),
        ("shared in", first, second),
        ("shared out", second, third),
        ("result", third, end),
    ]


def digests(case: Case, arena: bytes) -> dict[str, str]:
    """Of each part of an arena."""
    return {
        name: hashlib.sha256(arena[begin:end]).hexdigest()[:DIGITS] for name, begin, end in parts_of(case)
    }


def row_of(case: Case, arena: bytes | None) -> dict[str, Any]:
    """A case for JSON, with the parts that its kernel changed in the arena; None where hardware refused."""
    before = digests(case, case.arena().tobytes())
    if arena is None:
        return {**case.described(), "before": before["tensor"], "refused": True}
    after = digests(case, arena)
    changed = {name: value for name, value in after.items() if value != before[name]}
    return {**case.described(), "before": before["tensor"], "after": changed}


def case_of(row: dict[str, Any]) -> Case:
    """The case of a row."""
    fields: dict[str, Any] = {"family": "", "kernel": "", "seed": 0, "region": 0, "dump": 0}
    fields |= {name: _tuple(value) for name, value in row.items() if name in Case.__dataclass_fields__}
    for name in ("map", "template"):
        if name in fields:
            fields[name] = Map(**{key: _tuple(value) for key, value in fields[name].items()})
    return Case(**fields)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def wrong_parts(row: dict[str, Any], case: Case, arena: bytes) -> list[str]:
    """Parts of an arena that are not what hardware made of them. Raises ValueError where the case begins with
    other bytes than it did there: NumPy's generator has changed, and the sample is of no use any more."""
    before = digests(case, case.arena().tobytes())
    if before["tensor"] != row["before"]:
        raise ValueError(
            "this NumPy draws other bytes for a case's memory than the one that the GPU ran with"
        )
    expected = {**before, **row["after"]}
    return [name for name, value in digests(case, arena).items() if value != expected[name]]
