#!/usr/bin/env python3
"""Installs the pinned toolchain (requirements/toolchain.txt) into build/toolchain and runs build.py with it.

    python cuda/tools/rebuild.py --all                   rebuild every variant, two compiles at a time
    python cuda/tools/rebuild.py --variant 'fp8_packed*' --jobs 4
                                                         the variants whose keys are like this
    python cuda/tools/rebuild.py --all --compare         compile everything anew, require equality, and write
                                                         the result down in cubins/README.md
    python cuda/tools/rebuild.py                         install the toolchain only

Options are those of build.py. $SM12X_TOOLCHAIN names an environment that has the toolchain already. nvcc
needs g++.
"""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

from sm12x_build import ROOT, BuildError, store
from sm12x_build.toolchain import DEFAULT_VENV, ENVIRONMENT_VARIABLE, PINS_FILE

README = """# cubins

Written by `python cuda/tools/rebuild.py --all`; nothing here is edited by hand. `manifest.json` names every
file with its hash, what it was built from and by which assembler. `cu12/` and `cu13/` hold the cubins that
the wheels carry, `ptx/` the compressed PTX that each was assembled from. `python -m sm12x verify` checks all
of it.

## Last full rebuild and comparison

`{command}` compiles every variant for every target again from the committed sources, without a cache,
assembles the PTX with the ptxas of both CUDA majors, and requires every file and the manifest to be
identical.

| date | commit | toolchain | files | seconds | result |
|---|---|---|---|---|---|
| {date} | {commit} | {toolchain} | {files} | {seconds:.0f} | {result} |
"""


def environment_python(folder: Path) -> Path:
    """The interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def install_toolchain(folder: Path = DEFAULT_VENV) -> Path:
    """Make the environment unless it holds the current pins; its interpreter."""
    python = environment_python(folder)
    stamp = folder / "installed.txt"
    pins = PINS_FILE.read_text()
    if python.exists() and stamp.is_file() and stamp.read_text() == pins:
        return python
    print(f"installing {PINS_FILE.relative_to(ROOT)} into {folder.relative_to(ROOT)}", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "-r", str(PINS_FILE)], check=False)
    if done.returncode != 0:
        raise BuildError(f"pip could not install {PINS_FILE.relative_to(ROOT)} (exit {done.returncode})")
    stamp.write_text(pins)
    return python


def record(result: str, seconds: float) -> None:
    """Write cubins/README.md with the result of a full comparison."""
    manifest = store.read_manifest()
    if manifest is None:
        raise BuildError("there is no cubins/manifest.json")
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    text = README.format(
        command="python cuda/tools/rebuild.py --all --compare",
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        commit=f"on top of {head.stdout.strip()}" if head.returncode == 0 else "no git history",
        toolchain=", ".join(f"{name} {version}" for name, version in sorted(manifest["toolchain"].items())),
        files=len(store.listed_files(manifest)),
        seconds=seconds,
        result=result,
    )
    (store.CUBINS_DIR / "README.md").write_text(text)


def main(arguments: list[str]) -> int:
    """Entry point."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    given = os.environ.get(ENVIRONMENT_VARIABLE)
    environment = dict(os.environ)
    if given:
        python = Path(sys.executable)
    else:
        python = install_toolchain()
        environment[ENVIRONMENT_VARIABLE] = str(DEFAULT_VENV)
    if not arguments:
        return 0
    started = time.monotonic()
    command = [str(python), str(ROOT / "cuda" / "tools" / "build.py"), *arguments]
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    if {"--all", "--compare"} <= set(arguments):
        record("identical" if status == 0 else "DIFFERENT", time.monotonic() - started)
    return status


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BuildError as error:
        print(f"rebuild.py: {error}", file=sys.stderr)
        sys.exit(1)
