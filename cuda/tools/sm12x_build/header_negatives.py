"""tests/cuda/negative.toml: programs that must not compile, and the sentence that each has to fail with.

A case is a program of the matrix, which compiles, with one fault. nvcc reads cases no further than its front
end: the fault stops it there.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import BuildError
from .header_matrix import TESTS_DIR, Entry, Matrix, instance_text, parse_entry, types_text

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[import-not-found,no-redef]

NEGATIVE_FILE = TESTS_DIR / "negative.toml"
PREFIX = "sm12x: "
_ERROR = re.compile(r"\berror\b[^:\n]*: (.*)")
_FIELDS = {"name", "base", "fault", "expect", "also", "instantiate"}


@dataclass(frozen=True)
class Negative:
    """One program that must not compile.

    ``expect`` is (part of) the sentence of the first error, ``also`` what the compiler has to print besides.
    ``instantiate``: the fault shows only where functions are compiled, not where types are named.
    """

    name: str
    base: str
    entry: Entry
    expect: str
    also: tuple[str, ...] = ()
    instantiate: bool = False

    def text(self) -> str:
        """The program."""
        write = instance_text if self.instantiate else types_text
        return write(self.entry, NEGATIVE_FILE.name)


def parse_negatives(text: str, matrix: Matrix, where: str) -> dict[str, Negative]:
    """The cases by name. Raises BuildError where one is wrong or there is none."""
    try:
        rows = tomllib.loads(text).get("negative", [])
    except tomllib.TOMLDecodeError as error:
        raise BuildError(f"{where}: {error}") from error
    if not rows:
        raise BuildError(f"{where} lists no negative")
    cases: dict[str, Negative] = {}
    for row in rows:
        case = _parse(row, matrix, f"{where}, {row.get('name', 'no name')}")
        if case.name in cases:
            raise BuildError(f"{where}: the name {case.name} stands twice")
        cases[case.name] = case
    return cases


def _parse(row: dict[str, Any], matrix: Matrix, where: str) -> Negative:
    unknown = sorted(set(row) - _FIELDS)
    missing = sorted({"name", "base", "fault", "expect"} - set(row))
    if unknown or missing:
        raise BuildError(f"{where}: unknown fields {unknown}, missing fields {missing}")
    base = matrix.entries.get(row["base"])
    if base is None:
        raise BuildError(f"{where}: the matrix has no entry {row['base']}")
    if not row["fault"]:
        raise BuildError(f"{where}: without a fault it is its base")
    if not row["expect"].startswith(PREFIX) or row["expect"] == PREFIX:
        raise BuildError(f"{where}: expect should begin with {PREFIX!r}, got {row['expect']!r}")
    sound = {
        field.name: getattr(base, field.name)
        for field in dataclasses.fields(Entry)
        if getattr(base, field.name) != field.default
    }
    faulty = parse_entry({**sound, **row["fault"], "name": row["name"]}, where)
    if dataclasses.replace(faulty, name=base.name) == base:
        raise BuildError(f"{where}: the fault changes nothing")
    return Negative(
        name=row["name"],
        base=base.name,
        entry=faulty,
        expect=row["expect"],
        also=tuple(row.get("also", ())),
        instantiate=row.get("instantiate", False),
    )


def load_negatives(matrix: Matrix, path: Path = NEGATIVE_FILE) -> dict[str, Negative]:
    """The cases of the tree."""
    if not path.is_file():
        raise BuildError(f"there is no {path}")
    return parse_negatives(path.read_text(), matrix, path.name)


def errors(log: str) -> list[str]:
    """What the compiler called errors, in order."""
    return [found.strip() for found in _ERROR.findall(log)]


def judge(case: Negative, returncode: int, log: str) -> list[str]:
    """Sentences on what is wrong with how ``case`` failed; none where it failed as it should."""
    if returncode == 0:
        return [f"{case.name}: compiles; it should be refused with {case.expect!r}"]
    found = errors(log)
    if not found:
        return [f"{case.name}: nvcc failed (exit {returncode}) without an error of the compiler:\n{log}"]
    if case.expect not in found[0]:
        later = [error for error in found if case.expect in error]
        where = f"; {case.expect!r} comes later" if later else f", expected {case.expect!r}"
        return [f"{case.name}: the first error is {found[0]!r}{where}"]
    return [f"{case.name}: {text!r} is not in the output" for text in case.also if text not in log]


def control_text(entry: Entry) -> str:
    """The types of a case's base, which have to compile; the whole of it is in the matrix."""
    return types_text(entry)
