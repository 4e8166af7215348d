"""The variant table, cuda/kernels/variants.toml: data, not code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import ROOT, TARGETS, BuildError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[import-not-found,no-redef]

TABLE_FILE = ROOT / "cuda" / "kernels" / "variants.toml"
_KEY = re.compile(r"[a-z][a-z0-9_]*")
_COMMON = {"key": str, "source": str, "family": str, "role": str, "params": str}
_GEMM = {"tile": list, "schedule": str, "swap_ab": bool, "a": str, "b": str, "mma": str}
_PROBE = {"mma": str}
# Kernels that multiply: grouped_gemm's, the two of an expert layer, and those that do all of a layer.
GEMM_ROLES = ("gemm", "up", "down", "layer")
# In the manifest where the row has them.
_OPTIONAL_FACTS = {"out": str, "outs": list, "token_step": int, "gated": bool}
# For the build alone.
_OPTIONAL = {"symbol": str, "defines": dict, "pdl": bool, "targets": list, "warps": list, "mma_groups": int}


@dataclass(frozen=True)
class Variant:
    """One row of the table. ``facts`` are the columns that go into the manifest as they stand."""

    key: str
    source: str
    symbol: str
    role: str
    facts: dict[str, Any]
    defines: dict[str, str] = field(default_factory=dict)
    targets: tuple[str, ...] = TARGETS

    def compile_flags(self, target: str) -> list[str]:
        """The nvcc options of this variant but for include folders, which hold machine paths."""
        flags = ["--ptx", f"-arch={target}", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-DNDEBUG"]
        defines = {"SM12X_SYMBOL": self.symbol, **self.defines}
        return flags + [
            f"-D{name}={value}" if value else f"-D{name}" for name, value in sorted(defines.items())
        ]


def load_variants(path: Path = TABLE_FILE) -> dict[str, Variant]:
    """Every variant by key. Raises BuildError naming the row and the column where the table is wrong."""
    if not path.is_file():
        raise BuildError(f"there is no variant table at {path}")
    with path.open("rb") as stream:
        table = tomllib.load(stream)
    unknown = sorted(set(table) - {"variant", "family"})
    if unknown:
        raise BuildError(f"{path.name}: unknown tables {unknown}")
    variants: dict[str, Variant] = {}
    for where, row in _rows(table, path.name):
        variant = _parse(row, f"{where} ({row.get('key', 'no key')})")
        if variant.key in variants:
            raise BuildError(f"{path.name}: the key {variant.key} stands twice")
        variants[variant.key] = variant
    if not variants:
        raise BuildError(f"{path} lists no [[variant]] and no [[family]]")
    symbols = [variant.symbol for variant in variants.values()]
    if len(set(symbols)) != len(symbols):
        raise BuildError(f"{path.name}: two variants share a symbol")
    return variants


def _rows(table: dict[str, Any], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row stands, and the row: those of [[family]] have the family's columns too."""
    for number, row in enumerate(table.get("variant", []), start=1):
        yield f"{name}, variant {number}", row
    for number, family in enumerate(table.get("family", []), start=1):
        shared = {column: value for column, value in family.items() if column != "variants"}
        rows = family.get("variants", [])
        if not rows:
            raise BuildError(f"{name}, family {number}: it lists no variants")
        for at, row in enumerate(rows, start=1):
            where = f"{name}, family {number}, variant {at}"
            twice = sorted(set(shared) & set(row))
            if twice:
                raise BuildError(f"{where}: {twice} are columns of the family")
            yield where, {**shared, **row}


def _parse(row: dict[str, Any], where: str) -> Variant:
    needed = {
        **_COMMON,
        **{**dict.fromkeys(GEMM_ROLES, _GEMM), "probe": _PROBE}.get(str(row.get("role")), {}),
    }
    known = {**needed, **_OPTIONAL_FACTS, **_OPTIONAL}
    for column, kind in known.items():
        if column not in row:
            if column in needed:
                raise BuildError(f"{where}: the column {column} is missing")
        elif not isinstance(row[column], kind):
            raise BuildError(f"{where}: {column} should be a {kind.__name__}, got {row[column]!r}")
    unknown = sorted(set(row) - set(known))
    if unknown:
        raise BuildError(f"{where}: unknown columns {unknown}")
    if not _KEY.fullmatch(row["key"]):
        raise BuildError(f"{where}: a key is lower-case letters, digits and underscores")
    targets = tuple(row.get("targets", TARGETS))
    if not targets or not set(targets) <= set(TARGETS):
        raise BuildError(f"{where}: targets should be some of {list(TARGETS)}, got {list(targets)}")
    if row["role"] in GEMM_ROLES:
        if len(row["tile"]) != 3 or not all(isinstance(n, int) for n in row["tile"]):
            raise BuildError(f"{where}: tile should be three integers (M, N, K), got {row['tile']!r}")
        if ("out" in row) == ("outs" in row) or not row.get("outs", ["one"]):
            raise BuildError(f"{where}: a GEMM has one of out and outs, which is a list of at least one type")
    symbol = row.get("symbol", "sm12x_" + row["key"])
    facts = {name: row[name] for name in (*needed, *_OPTIONAL_FACTS) if name in row}
    facts = {name: value for name, value in facts.items() if name not in ("key", "source")}
    facts.update(pdl=row.get("pdl", False), symbol=symbol)
    defines = {
        name: _filled_in(value, {"pdl": False, **row}, f"{where}: {name}")
        for name, value in row.get("defines", {}).items()
    }
    return Variant(row["key"], row["source"], symbol, row["role"], facts, defines, targets)


def _filled_in(value: object, row: dict[str, Any], where: str) -> str:
    """A define with its "{column}" replaced, so that no number stands twice in a row."""
    try:
        return str(value).format_map(row)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise BuildError(
            f"{where}: {value!r} cannot be filled in ({type(error).__name__}: {error})"
        ) from error
