#!/usr/bin/env python3
"""Builds one wheel from the committed cubins: python cuda/tools/wheel.py {cu12,cu13} [--out dist]

`pip wheel .` gives sm12x-cu13. A project has one name, so sm12x-cu12 is built from a copy of the tree in
which the name, the cuda-bindings requirement and the CUDA major are rewritten. No compiler is run.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sm12x_build import ROOT, BuildError

NEEDED = ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "NOTICE", "runtime", "cubins")
CU12 = {
    'name = "sm12x-cu13"': 'name = "sm12x-cu12"',
    '"cuda-bindings>=13,<14"': '"cuda-bindings>=12.9,<13"',
    '"Environment :: GPU :: NVIDIA CUDA :: 13"': '"Environment :: GPU :: NVIDIA CUDA :: 12"',
    'SM12X_CUDA_MAJOR = "13"': 'SM12X_CUDA_MAJOR = "12"',
    '"cupy-cuda13x>=14"': '"cupy-cuda12x>=14"',
    '"jax[cuda13]>=0.7"': '"jax[cuda12]>=0.7"',
}


def rewrite(pyproject: str, major: str) -> str:
    """pyproject.toml's text for CUDA ``major``. Raises BuildError where a line to rewrite is not there
    exactly once.
    """
    if major == "cu13":
        return pyproject
    for old, new in CU12.items():
        if pyproject.count(old) != 1:
            raise BuildError(f"pyproject.toml should hold {old} once, it does {pyproject.count(old)} times")
        pyproject = pyproject.replace(old, new)
    return pyproject


def copy_tree(major: str, folder: Path, root: Path = ROOT) -> None:
    """Copy what a wheel is made of to ``folder``, rewritten for CUDA ``major``."""
    for name in NEEDED:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*_cache"))
        elif source.is_file():
            shutil.copy(source, folder / name)
        else:
            raise BuildError(f"{name} is missing: a wheel cannot be built without it")
    pyproject = folder / "pyproject.toml"
    pyproject.write_text(rewrite(pyproject.read_text(), major))


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("major", choices=["cu12", "cu13"])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the wheel (default dist)")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sm12x-wheel-") as folder:
        try:
            copy_tree(args.major, Path(folder))
        except BuildError as error:
            print(f"wheel.py: {error}", file=sys.stderr)
            return 1
        command = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--wheel-dir",
            str(args.out),
            folder,
        ]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
