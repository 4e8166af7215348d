"""Comparing cubins/ with what the sources and the toolchain give now."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import ROOT, store
from .abi import dump_abi
from .pipeline import Built, describe
from .sources import sources_sha256
from .toolchain import Toolchain
from .variants import Variant


def stale_targets(variants: dict[str, Variant], manifest: dict[str, Any], root: Path = ROOT) -> list[str]:
    """Sentences on every difference between the table with its sources and what the manifest says it was
    built from.
    """
    stale = [
        f"{key}: in the manifest, not in the table"
        for key in sorted(set(manifest["variants"]) - set(variants))
    ]
    for key, variant in sorted(variants.items()):
        entry = manifest["variants"].get(key)
        if entry is None:
            stale.append(f"{key}: in the table, not in the manifest")
            continue
        for name, value in variant.facts.items():
            if entry.get(name) != value:
                stale.append(f"{key}: {name} is {value!r} in the table, {entry.get(name)!r} in the manifest")
        if sorted(entry["targets"]) != sorted(variant.targets):
            stale.append(
                f"{key}: built for {sorted(entry['targets'])}, the table says {sorted(variant.targets)}"
            )
            continue
        sources = sources_sha256(variant.source, root)
        for target in variant.targets:
            recorded = entry["targets"][target]["ptx"]
            if recorded["sources_sha256"] != sources:
                stale.append(f"{key} {target}: {variant.source} or a header of it changed since it was built")
            if recorded["flags"] != variant.compile_flags(target):
                stale.append(f"{key} {target}: the flags changed since it was built")
    return stale


def compare_built(variants: Sequence[Variant], built: Built, folder: Path = store.CUBINS_DIR) -> list[str]:
    """Sentences on every PTX and cubin in ``folder`` that is not what was built now."""
    differences = []
    for variant in variants:
        for target, one in built[variant.key].items():
            path = folder / store.ptx_path(target, variant.key)
            if not path.is_file() or store.read_ptx(path) != one.compiled.text:
                differences.append(f"{path.relative_to(folder)}: the PTX compiled now differs")
            for major, cubin in one.cubins.items():
                path = folder / store.cubin_path(major, target, variant.key)
                if not path.is_file() or path.read_bytes() != cubin.cubin:
                    differences.append(f"{path.relative_to(folder)}: the cubin assembled now differs")
    return differences


def compare_manifest(
    variants: Sequence[Variant], built: Built, toolchain: Toolchain, manifest: dict[str, Any]
) -> list[str]:
    """Sentences on every manifest entry of ``variants`` that is not what was built now, the ABI part
    included.
    """
    differences = []
    for variant in variants:
        if manifest["variants"].get(variant.key) != describe(variant, built[variant.key], toolchain):
            differences.append(f"manifest.json: the entry of {variant.key} differs")
    if manifest["abi"] != dump_abi():
        differences.append("manifest.json: the ABI part differs")
    if manifest["toolchain"] != toolchain.versions:
        differences.append("manifest.json: the toolchain differs")
    return differences


def changed_since(manifest: dict[str, Any], revision: str, root: Path = ROOT) -> set[str]:
    """Keys of variants whose manifest entry is not what it was at git ``revision``; all where there was no
    manifest.
    """
    done = subprocess.run(
        ["git", "show", f"{revision}:cubins/manifest.json"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return set(manifest["variants"])
    old = json.loads(done.stdout)
    if old.get("toolchain") != manifest["toolchain"]:
        return set(manifest["variants"])
    return {key for key, entry in manifest["variants"].items() if old["variants"].get(key) != entry}


def rotating_sample(keys: Sequence[str], count: int, day: int) -> list[str]:
    """``count`` of ``keys``, another lot each ``day``, so that every key has its turn in len(keys) / count
    days.
    """
    ordered = sorted(keys)
    if not ordered:
        return []
    start = day * count % len(ordered)
    return [ordered[(start + step) % len(ordered)] for step in range(min(count, len(ordered)))]
