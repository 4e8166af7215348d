"""Finds the pinned toolchain (requirements/toolchain.txt) in a Python environment."""

from __future__ import annotations

import os
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from . import ROOT, BuildError
from .assembler import tool_version

PINS_FILE = ROOT / "requirements" / "toolchain.txt"
ENVIRONMENT_VARIABLE = "SM12X_TOOLCHAIN"
DEFAULT_VENV = ROOT / "build" / "toolchain"


@dataclass(frozen=True)
class Toolchain:
    """Paths of the tools and what the manifest records about their versions."""

    nvcc: Path
    ptxas: dict[str, Path]
    cuobjdump: Path
    nvdisasm: Path
    include_dirs: tuple[Path, ...]
    versions: dict[str, str]


def read_pins(path: Path = PINS_FILE) -> dict[str, str]:
    """Package name -> pinned version, environment markers dropped."""
    pins = {}
    for line in path.read_text().splitlines():
        found = re.match(r"([A-Za-z0-9_.-]+)==([^;\s]+)", line.strip())
        if found:
            pins[found.group(1)] = found.group(2)
    if not pins:
        raise BuildError(f"{path} pins no package")
    return pins


def _site_packages(prefix: Path) -> list[Path]:
    """The folders under ``prefix`` (a virtual environment or a site-packages folder) that may hold
    packages.
    """
    return [prefix, *sorted(prefix.glob("lib/python3*/site-packages")), prefix / "Lib" / "site-packages"]


def _candidates(explicit: Path | None) -> list[Path]:
    if explicit is not None:
        return _site_packages(explicit)
    from_environment = os.environ.get(ENVIRONMENT_VARIABLE)
    if from_environment:
        return _site_packages(Path(from_environment))
    own = {Path(sysconfig.get_path("platlib")), Path(sysconfig.get_path("purelib"))}
    return [*sorted(own), *_site_packages(DEFAULT_VENV)]


def find_toolchain(prefix: Path | None = None) -> Toolchain:
    """The toolchain under ``prefix``, else under $SM12X_TOOLCHAIN, else in this environment or
    build/toolchain.

    Raises BuildError where a tool is missing or is not of the pinned version.
    """
    tried = _candidates(prefix)
    for site in tried:
        cu13 = site / "nvidia" / "cu13"
        if (cu13 / "bin" / "nvcc").is_file():
            return _checked(site, cu13)
    raise BuildError(
        "no CUDA toolchain found in " + ", ".join(str(path) for path in tried) + ": run "
        "'python cuda/tools/rebuild.py', which installs it, or set "
        + ENVIRONMENT_VARIABLE
        + " to an environment "
        "that has requirements/toolchain.txt installed"
    )


def _checked(site: Path, cu13: Path) -> Toolchain:
    cutlass = site / "cutlass_library" / "source" / "include"
    tools = {name: cu13 / "bin" / name for name in ("nvcc", "ptxas", "cuobjdump", "nvdisasm")}
    ptxas_cu12 = site / "nvidia" / "cuda_nvcc" / "bin" / "ptxas"
    needed = [*tools.values(), ptxas_cu12, cutlass / "cutlass" / "cutlass.h"]
    missing = [str(path) for path in needed if not path.is_file()]
    if missing:
        raise BuildError("the toolchain is incomplete, missing: " + ", ".join(missing))
    versions = {
        "nvcc": tool_version(tools["nvcc"]),
        "ptxas_cu12": tool_version(ptxas_cu12),
        "ptxas_cu13": tool_version(tools["ptxas"]),
        "cutlass": _installed_version(site, "nvidia_cutlass"),
    }
    pins = read_pins()
    expected = {
        "nvcc": pins["nvidia-cuda-nvcc"],
        "ptxas_cu12": pins["nvidia-cuda-nvcc-cu12"],
        "ptxas_cu13": pins["nvidia-cuda-nvcc"],
        "cutlass": pins["nvidia-cutlass"],
    }
    if versions != expected:
        raise BuildError(f"the toolchain in {site} is {versions}, {PINS_FILE.name} pins {expected}")
    return Toolchain(
        nvcc=tools["nvcc"],
        ptxas={"cu12": ptxas_cu12, "cu13": tools["ptxas"]},
        cuobjdump=tools["cuobjdump"],
        nvdisasm=tools["nvdisasm"],
        include_dirs=(cutlass, cu13 / "include", cu13 / "include" / "cccl"),
        versions=versions,
    )


def _installed_version(site: Path, package: str) -> str:
    found = sorted(site.glob(f"{package}-*.dist-info"))
    if len(found) != 1:
        raise BuildError(f"expected one {package}-*.dist-info in {site}, found {len(found)}")
    return found[0].name[len(package) + 1 : -len(".dist-info")]
