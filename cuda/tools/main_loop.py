#!/usr/bin/env python3
"""The main loop against the same tile built with the plain MMA: what is in it per k-tile, from the SASS.

    python cuda/tools/main_loop.py        prints the table and writes it into cuda/README.md

Compiles the entries that tests/cuda/matrix.toml lists under main_loop for sm_120a, each with the unit-scale
MMA and with the plain one. Needs what compile_tests.py needs.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from sm12x_build import ROOT, BuildError
from sm12x_build.header_compile import OUTPUT_DIR, main_loop_of
from sm12x_build.header_matrix import Entry, load_matrix
from sm12x_build.header_report import markers, replace_marked
from sm12x_build.main_loop import table
from sm12x_build.toolchain import find_toolchain

README = ROOT / "cuda" / "README.md"
MARKER = "main loop"


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=2, help="compiles at a time (default 2)")
    args = parser.parse_args(arguments)
    try:
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
        with ThreadPoolExecutor(max_workers=args.jobs) as pool:
            rows = list(pool.map(lambda entry: main_loop_of(entry, toolchain), entries))
        text = table(list(zip(entries, rows, strict=True)), toolchain.versions)
        print(text)
        begin, end = markers(MARKER)
        old = README.read_text() if README.is_file() else f"# The CUDA side\n\n{begin}\n{end}\n"
        README.write_text(replace_marked(old, MARKER, text))
    except BuildError as error:
        print(f"main_loop.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
