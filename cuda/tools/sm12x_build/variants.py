"""The variant table, cuda/kernels/variants.toml: data, not code."""

from __future__ import annotations

import re
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
_GEMM = {"tile": list, "schedule": str, "swap_ab": bool, "a": str, "b": str, "out": str, "mma": str}
_PROBE = {"mma": str}
_OPTIONAL = {"symbol": str, "defines": dict, "pdl": bool, "targets": list, "token_step": int}


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
        rows = tomllib.load(stream).get("variant", [])
    if not rows:
        raise BuildError(f"{path} lists no [[variant]]")
    variants: dict[str, Variant] = {}
    for number, row in enumerate(rows, start=1):
        variant = _parse(row, f"{path.name}, variant {number} ({row.get('key', 'no key')})")
        if variant.key in variants:
            raise BuildError(f"{path.name}: the key {variant.key} stands twice")
        variants[variant.key] = variant
    symbols = [variant.symbol for variant in variants.values()]
    if len(set(symbols)) != len(symbols):
        raise BuildError(f"{path.name}: two variants share a symbol")
    return variants


def _parse(row: dict[str, Any], where: str) -> Variant:
    needed = {**_COMMON, **{"gemm": _GEMM, "probe": _PROBE}.get(str(row.get("role")), {})}
    for column, kind in {**needed, **_OPTIONAL}.items():
        if column not in row:
            if column in needed:
                raise BuildError(f"{where}: the column {column} is missing")
        elif not isinstance(row[column], kind):
            raise BuildError(f"{where}: {column} should be a {kind.__name__}, got {row[column]!r}")
    unknown = sorted(set(row) - set(needed) - set(_OPTIONAL))
    if unknown:
        raise BuildError(f"{where}: unknown columns {unknown}")
    if not _KEY.fullmatch(row["key"]):
        raise BuildError(f"{where}: a key is lower-case letters, digits and underscores")
    targets = tuple(row.get("targets", TARGETS))
    if not targets or not set(targets) <= set(TARGETS):
        raise BuildError(f"{where}: targets should be some of {list(TARGETS)}, got {list(targets)}")
    if row["role"] == "gemm" and (len(row["tile"]) != 3 or not all(isinstance(n, int) for n in row["tile"])):
        raise BuildError(f"{where}: tile should be three integers (M, N, K), got {row['tile']!r}")
    symbol = row.get("symbol", "sm12x_" + row["key"])
    facts = {name: row[name] for name in needed if name not in ("key", "source")}
    facts.update(pdl=row.get("pdl", False), symbol=symbol)
    if "token_step" in row:
        facts["token_step"] = row["token_step"]
    defines = {name: str(value) for name, value in row.get("defines", {}).items()}
    return Variant(row["key"], row["source"], symbol, row["role"], facts, defines, targets)
