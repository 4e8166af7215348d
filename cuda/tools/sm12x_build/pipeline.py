"""Compile, assemble, describe: the manifest entries of variants, several compiles at a time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import MAJORS, ROOT, BuildError, ptx, store
from .assembler import Assembled, assemble
from .compiler import CACHE_DIR, CompiledPtx, compile_ptx
from .toolchain import Toolchain
from .variants import Variant

TWIN_TARGETS = ("sm_120a", "sm_121a")  # one PTX text but for the .target line


@dataclass(frozen=True)
class BuiltTarget:
    """PTX and cubins of one variant for one target."""

    compiled: CompiledPtx
    cubins: dict[str, Assembled]


Built = dict[str, dict[str, BuiltTarget]]
"""Variant key -> target -> what was built."""


def build_variants(
    variants: Sequence[Variant],
    toolchain: Toolchain,
    *,
    jobs: int = 2,
    root: Path = ROOT,
    cache_dir: Path | None = CACHE_DIR,
    derive_sm121a: bool = False,
) -> Built:
    """Build every target of ``variants`` with ``jobs`` compiles at a time.

    ``derive_sm121a`` writes sm_121a's PTX from sm_120a's instead of compiling it. Otherwise both are compiled
    and BuildError is raised where they differ in more than their .target line.
    """
    derived = {"sm_121a"} if derive_sm121a else set()
    work = [
        (variant, target)
        for variant in variants
        for target in variant.targets
        if not (target in derived and "sm_120a" in variant.targets)
    ]
    started = time.monotonic()
    built: Built = {variant.key: {} for variant in variants}

    def one(item: tuple[Variant, str]) -> tuple[Variant, str, CompiledPtx]:
        variant, target = item
        return variant, target, compile_ptx(variant, target, toolchain, root=root, cache_dir=cache_dir)

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        futures = [pool.submit(one, item) for item in work]
        try:
            for number, future in enumerate(futures, start=1):
                variant, target, compiled = future.result()
                built[variant.key][target] = _assemble_all(compiled, target, toolchain)
                how = "from the cache" if compiled.cached else f"compiled in {compiled.seconds:.1f} s"
                elapsed = time.monotonic() - started
                print(f"[{number}/{len(work)}, {elapsed:.0f} s] {variant.key} {target}: {how}", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for variant in variants:
        targets = built[variant.key]
        if "sm_120a" in targets and "sm_121a" in variant.targets:
            if derive_sm121a:
                base = targets["sm_120a"].compiled
                flags = variant.compile_flags("sm_121a")
                text = ptx.retarget(base.text, "sm_121a")
                compiled = CompiledPtx(text, base.sources_sha256, flags, 0.0, True)
                targets["sm_121a"] = _assemble_all(compiled, "sm_121a", toolchain)
            require_same_but_target(variant.key, *(targets[name].compiled.text for name in TWIN_TARGETS))
    return built


def require_same_but_target(key: str, sm_120a: str, sm_121a: str) -> None:
    """Raise BuildError unless both PTX texts agree but for their .target line."""
    if ptx.target_of(sm_120a) != "sm_120a" or ptx.target_of(sm_121a) != "sm_121a":
        raise BuildError(f"{key}: wrong .target lines")
    if ptx.retarget(sm_120a, "sm_121a") != sm_121a:
        raise BuildError(
            f"{key}: the PTX of sm_121a differs from that of sm_120a in more than its .target line"
        )


def _assemble_all(compiled: CompiledPtx, target: str, toolchain: Toolchain) -> BuiltTarget:
    cubins = {major: assemble(toolchain.ptxas[major], compiled.text, target, major) for major in MAJORS}
    return BuiltTarget(compiled, cubins)


def describe(variant: Variant, targets: dict[str, BuiltTarget], toolchain: Toolchain) -> dict[str, Any]:
    """The manifest entry of one variant. Raises BuildError where its targets state different launch facts."""
    family = str(variant.facts["family"])
    facts = [ptx.variant_facts(built.compiled.text, family, variant.role) for built in targets.values()]
    if any(other != facts[0] for other in facts[1:]):
        raise BuildError(f"{variant.key}: its targets differ in {ptx.INFO_SYMBOL}: {facts}")
    entry: dict[str, Any] = {**variant.facts, **facts[0], "targets": {}}
    for target, built in targets.items():
        entry["targets"][target] = {
            "ptx": {
                "path": store.ptx_path(target, variant.key),
                "sha256": built.compiled.sha256,
                "sources_sha256": built.compiled.sources_sha256,
                "flags": built.compiled.flags,
            },
            "cubins": {
                major: {
                    "path": store.cubin_path(major, target, variant.key),
                    "size": len(cubin.cubin),
                    "sha256": store.sha256(cubin.cubin),
                    "assembler": toolchain.versions[f"ptxas_{major}"],
                    "registers": cubin.registers,
                    "spill_bytes": cubin.spill_bytes,
                    "stack_bytes": cubin.stack_bytes,
                }
                for major, cubin in built.cubins.items()
            },
        }
    return entry


def write_built(variant: Variant, targets: dict[str, BuiltTarget], folder: Path) -> None:
    """Write the PTX and the cubins of one variant."""
    for target, built in targets.items():
        store.write_ptx(built.compiled.text, folder / store.ptx_path(target, variant.key))
        for major, cubin in built.cubins.items():
            store.write_cubin(cubin.cubin, folder / store.cubin_path(major, target, variant.key))


def update_manifest(
    old: dict[str, Any] | None,
    entries: dict[str, dict[str, Any]],
    abi: dict[str, Any],
    toolchain: Toolchain,
    table: Iterable[str],
) -> dict[str, Any]:
    """The manifest with ``entries`` put in and variants that left the ``table`` dropped.

    Raises BuildError where entries that stay were built by another toolchain: one manifest, one toolchain.
    """
    wanted = set(table)
    kept = {}
    if old is not None:
        kept = {key: entry for key, entry in old["variants"].items() if key in wanted and key not in entries}
        if kept and old["toolchain"] != toolchain.versions:
            raise BuildError(
                f"cubins/ was built with {old['toolchain']}, this toolchain is {toolchain.versions}: "
                "rebuild with --all"
            )
    variants = {**kept, **entries}
    return {"schema": store.SCHEMA, "toolchain": toolchain.versions, "abi": abi, "variants": variants}
