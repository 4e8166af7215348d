"""nvcc: one source and one target to normalised PTX, through a content-addressed cache."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from . import ROOT, BuildError, ptx
from .sources import check_dependencies, sources_sha256
from .toolchain import Toolchain
from .variants import Variant

CACHE_DIR = ROOT / "build" / "ptx-cache"


@dataclass(frozen=True)
class CompiledPtx:
    """Normalised PTX of one (variant, target) and what it came from."""

    text: str
    sources_sha256: str
    flags: list[str]
    seconds: float
    cached: bool

    @property
    def sha256(self) -> str:
        """Hash of the uncompressed text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def cache_key(variant: Variant, target: str, toolchain: Toolchain, root: Path = ROOT) -> str:
    """Everything that decides the PTX: sources outside CUTLASS and the toolkit, flags, tool versions."""
    parts = {
        "source": variant.source,
        "sources_sha256": sources_sha256(variant.source, root),
        "flags": variant.compile_flags(target),
        "nvcc": toolchain.versions["nvcc"],
        "cutlass": toolchain.versions["cutlass"],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def compile_ptx(
    variant: Variant,
    target: str,
    toolchain: Toolchain,
    *,
    root: Path = ROOT,
    cache_dir: Path | None = CACHE_DIR,
) -> CompiledPtx:
    """Compile one variant for one target; ``cache_dir=None`` always runs nvcc. Raises BuildError with nvcc's
    words.
    """
    started = time.monotonic()
    flags = variant.compile_flags(target)
    sources = sources_sha256(variant.source, root)
    entry = None
    if cache_dir is not None:
        entry = cache_dir / f"{cache_key(variant, target, toolchain, root)}.ptx"
        if entry.is_file():
            return CompiledPtx(entry.read_text(), sources, flags, time.monotonic() - started, True)
    text = _run_nvcc(variant, flags, toolchain, root)
    if sources_sha256(variant.source, root) != sources:
        raise BuildError(f"{variant.key}: a source file changed while it was compiled; build again")
    if entry is not None:
        entry.parent.mkdir(parents=True, exist_ok=True)
        # A reader never sees half a file: written beside it and moved into place.
        with tempfile.NamedTemporaryFile("w", dir=entry.parent, suffix=".part", delete=False) as stream:
            stream.write(text)
        os.replace(stream.name, entry)
    return CompiledPtx(text, sources, flags, time.monotonic() - started, False)


def nvcc_command(toolchain: Toolchain, root: Path) -> list[str]:
    """nvcc and the include folders every compile gets."""
    includes = (root / "cuda" / "include", *toolchain.include_dirs)
    return [str(toolchain.nvcc), *(word for folder in includes for word in ("-I", str(folder)))]


def _run_nvcc(variant: Variant, flags: list[str], toolchain: Toolchain, root: Path) -> str:
    with tempfile.TemporaryDirectory(prefix="sm12x-nvcc-") as folder:
        output, listing = Path(folder, "kernel.ptx"), Path(folder, "kernel.d")
        command = [*nvcc_command(toolchain, root), *flags, "-MD", "-MF", str(listing)]
        command += [variant.source, "-o", str(output)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        log = (done.stdout + done.stderr).strip()
        if done.returncode != 0:
            raise BuildError(
                f"{variant.key}: nvcc failed (exit {done.returncode}):\n{' '.join(command)}\n{log}"
            )
        if log:
            print(f"{variant.key} {flags[1]}: nvcc said\n{log}", flush=True)
        check_dependencies(listing.read_text(), variant.source, root)
        text = ptx.normalise(output.read_text())
    found = ptx.entries(text)
    if found != [variant.symbol]:
        raise BuildError(
            f"{variant.key}: the PTX should hold the one kernel {variant.symbol}, it holds {found}"
        )
    return text
