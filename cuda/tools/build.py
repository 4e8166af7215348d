#!/usr/bin/env python3
"""Builds cubins/ from cuda/kernels/variants.toml, or checks it.

    python cuda/tools/build.py --all                 every variant, unchanged ones from the cache
    python cuda/tools/build.py --variant 'fp8_packed*'
                                                     these only; the manifest keeps its other entries
    python cuda/tools/build.py --all --compare       compile everything anew, write nothing, require equality
    python cuda/tools/build.py --changed-since REV --sample 2 --compare
                                                     what changed since REV and a rotating sample of the rest
    python cuda/tools/build.py --stale               no compiler: are the recorded source hashes current?

Needs the toolchain of requirements/toolchain.txt in this environment, in build/toolchain or in
$SM12X_TOOLCHAIN; cuda/tools/rebuild.py installs it and calls this file.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import sys
import time
from pathlib import Path

from sm12x_build import BuildError, checks, pipeline, store
from sm12x_build.abi import dump_abi
from sm12x_build.assembler import AssemblyError
from sm12x_build.compiler import CACHE_DIR
from sm12x_build.toolchain import Toolchain, find_toolchain
from sm12x_build.variants import Variant, load_variants


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line, shared with rebuild.py."""
    which = parser.add_argument_group("which variants")
    which.add_argument("--all", action="store_true", help="every variant of the table")
    which.add_argument(
        "--variant", action="append", default=[], metavar="PATTERN", help="keys like this; may be repeated"
    )
    which.add_argument(
        "--changed-since", metavar="REV", help="those whose manifest entry differs from git REV's"
    )
    which.add_argument("--sample", type=int, default=0, metavar="N", help="and N others, rotating day by day")
    what = parser.add_argument_group("what to do with them")
    what.add_argument("--compare", action="store_true", help="write nothing; require cubins/ to be identical")
    what.add_argument("--stale", action="store_true", help="only check the recorded source hashes and flags")
    what.add_argument(
        "--fast", action="store_true", help="derive sm_121a's PTX from sm_120a's, do not compile it"
    )
    what.add_argument("--no-cache", action="store_true", help="run nvcc even where its output is cached")
    parser.add_argument(
        "--jobs", type=int, default=2, help="compiles at a time (default 2; each takes about 2 GB)"
    )


def _selected(args: argparse.Namespace, table: dict[str, Variant]) -> list[Variant]:
    matched = {pattern: fnmatch.filter(table, pattern) for pattern in args.variant}
    unknown = sorted(pattern for pattern, keys in matched.items() if not keys)
    if unknown:
        raise BuildError(f"no variant is like {unknown}; the table has {sorted(table)}")
    keys = set(table) if args.all else {key for found in matched.values() for key in found}
    if args.changed_since or args.sample:
        manifest = store.read_manifest()
        if manifest is None:
            raise BuildError("--changed-since and --sample need a manifest")
        changed = checks.changed_since(manifest, args.changed_since) if args.changed_since else set()
        today = datetime.datetime.now(datetime.timezone.utc).date().toordinal()
        sample = checks.rotating_sample(sorted(set(table) - changed - keys), args.sample, today)
        print(f"changed: {sorted(changed) or 'nothing'}; sample of the rest: {sample or 'none'}", flush=True)
        keys |= (changed & set(table)) | set(sample)
    if not keys:
        raise BuildError("no variant is selected: give --all, --variant, --changed-since or --sample")
    return [table[key] for key in sorted(keys)]


def _report(differences: list[str]) -> int:
    for line in differences:
        print(line, file=sys.stderr)
    return 1 if differences else 0


def _compare(variants: list[Variant], built: pipeline.Built, toolchain: Toolchain) -> int:
    manifest = store.read_manifest()
    if manifest is None:
        raise BuildError("there is no cubins/manifest.json to compare with")
    differences = checks.compare_built(variants, built)
    differences += checks.compare_manifest(variants, built, toolchain, manifest)
    return _report(differences)


def _write(
    variants: list[Variant], built: pipeline.Built, toolchain: Toolchain, table: dict[str, Variant]
) -> None:
    entries = {variant.key: pipeline.describe(variant, built[variant.key], toolchain) for variant in variants}
    manifest = pipeline.update_manifest(store.read_manifest(), entries, dump_abi(), toolchain, table)
    for variant in variants:
        pipeline.write_built(variant, built[variant.key], store.CUBINS_DIR)
    store.write_manifest(manifest)
    for name in store.remove_strays(manifest):
        print(f"removed cubins/{name}: no variant of the table")


def run(args: argparse.Namespace) -> int:
    """Do what the command line says; the exit status."""
    started = time.monotonic()
    table = load_variants()
    if args.stale:
        manifest = store.read_manifest()
        if manifest is None:
            raise BuildError("there is no cubins/manifest.json")
        stale = checks.stale_targets(table, manifest)
        print(f"{len(table)} variants checked, {len(stale)} differences")
        return _report(stale)
    variants = _selected(args, table)
    toolchain = find_toolchain()
    # A comparison through the cache would compare the cache with what was written from it.
    cache_dir: Path | None = None if args.no_cache or args.compare else CACHE_DIR
    built = pipeline.build_variants(
        variants, toolchain, jobs=args.jobs, cache_dir=cache_dir, derive_sm121a=args.fast
    )
    if args.compare:
        status = _compare(variants, built, toolchain)
    else:
        _write(variants, built, toolchain, table)
        status = 0
    files = sum(len(targets) * 3 for targets in built.values())
    verb = "compared" if args.compare else "built"
    verdict = "DIFFERENT" if status else "identical" if args.compare else "written to cubins/"
    print(f"{verb} {len(variants)} variants, {files} files in {time.monotonic() - started:.0f} s: {verdict}")
    return status


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(arguments))
    except (BuildError, AssemblyError) as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
