#!/usr/bin/env python3
"""What main loops are made of per k-tile, from the SASS for sm_120a: tables in cuda/README.md.

    python cuda/tools/main_loop.py              header programs, each against the same tile with the plain MMA
    python cuda/tools/main_loop.py --shipped    the packed kernels in cubins/: nothing is compiled

Prints the table and writes it down. Header programs are the entries that tests/cuda/matrix.toml lists under
main_loop; they need what compile_tests.py needs. Cubins need nvdisasm of the toolchain.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from sm12x_build import ROOT, BuildError, store
from sm12x_build.header_compile import OUTPUT_DIR, main_loop_of
from sm12x_build.header_matrix import Entry, load_matrix
from sm12x_build.header_report import replace_marked
from sm12x_build.main_loop import read_shipped, shipped_table, table
from sm12x_build.sass import disassemble
from sm12x_build.toolchain import find_toolchain

README = ROOT / "cuda" / "README.md"
MARKER = "main loop"
SHIPPED_MARKER = "packed main loop"


def header_table(jobs: int) -> str:
    """Compiles the header programs, ``jobs`` at a time; their table."""
    toolchain = find_toolchain()
    bases = load_matrix().main_loop
    if not bases:
        raise BuildError("tests/cuda/matrix.toml lists no main_loop")
    entries: list[Entry] = [
        replace(base, name=f"{base.name}_{mma}", mma=mma)
        for base in bases.values()
        for mma in ("unit_scale", "plain")
    ]
    OUTPUT_DIR.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        rows = list(pool.map(lambda entry: main_loop_of(entry, toolchain), entries))
    return table(list(zip(entries, rows, strict=True)), toolchain.versions)


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shipped", action="store_true", help="the packed kernels in cubins/")
    parser.add_argument("--jobs", type=int, default=2, help="compiles at a time (default 2)")
    args = parser.parse_args(arguments)
    try:
        if args.shipped:
            manifest = store.read_manifest()
            if manifest is None:
                raise BuildError("there is no cubins/manifest.json")
            nvdisasm = find_toolchain().nvdisasm
            rows = read_shipped(manifest, lambda path: disassemble(nvdisasm, store.CUBINS_DIR / path))
            text = shipped_table(rows, manifest["toolchain"])
        else:
            text = header_table(args.jobs)
        print(text)
        marker = SHIPPED_MARKER if args.shipped else MARKER
        README.write_text(replace_marked(README.read_text(), marker, text))
    except BuildError as error:
        print(f"main_loop.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
