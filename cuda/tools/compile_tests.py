#!/usr/bin/env python3
"""Compiles every tests/cuda/*.cu for sm_120a, as an outside CUTLASS program would be. Nothing is cached."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sm12x_build import ROOT, BuildError
from sm12x_build.compiler import nvcc_command
from sm12x_build.toolchain import Toolchain, find_toolchain

FLAGS = ("-cubin", "-arch=sm_120a", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-DNDEBUG")


def compile_one(source: Path, toolchain: Toolchain) -> tuple[bool, str]:
    """Whether ``source`` compiles, and the line to print."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sm12x-tests-") as folder:
        command = [*nvcc_command(toolchain, ROOT), *FLAGS, str(source), "-o", str(Path(folder, "out.cubin"))]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    good = done.returncode == 0
    words = "" if good else f"\n{done.stdout}{done.stderr}"
    verdict = "compiles" if good else "FAILS"
    return good, f"{source.relative_to(ROOT)}: {verdict} ({time.monotonic() - started:.0f} s){words}"


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="compiles at a time (default 2)")
    args = parser.parse_args(arguments)
    try:
        sources = sorted((ROOT / "tests" / "cuda").glob("*.cu"))
        if not sources:
            raise BuildError("there is no tests/cuda/*.cu to compile")
        toolchain = find_toolchain()
    except BuildError as error:
        print(f"compile_tests.py: {error}", file=sys.stderr)
        return 1
    failed = 0
    with ThreadPoolExecutor(max_workers=args.jobs) as pool:
        for good, line in pool.map(lambda source: compile_one(source, toolchain), sources):
            print(line, flush=True)
            failed += not good
    print(f"{len(sources) - failed} of {len(sources)} CUDA tests compile")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
