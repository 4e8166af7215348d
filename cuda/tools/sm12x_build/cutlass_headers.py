"""The CUTLASS header sets that the headers are compiled against: 4.2 is the toolchain's, 4.5 comes out of the
wheel that carries it, and "4.6" is 4.2 with a version.h that says so.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

from . import ROOT, BuildError
from .toolchain import Toolchain

REQUIREMENT = ROOT / "requirements" / "cutlass_45.txt"
FOLDER = ROOT / "build" / "cutlass-headers"
_IN_WHEEL = "flashinfer/data/cutlass/include/"
_STAMP = "unpacked-from.txt"


def version_of(include: Path) -> str:
    """ "4.2" and the like, from cutlass/version.h."""
    text = (include / "cutlass" / "version.h").read_text()
    numbers = [re.search(rf"#define CUTLASS_{name}\s+(\d+)", text) for name in ("MAJOR", "MINOR")]
    if None in numbers:
        raise BuildError(f"{include / 'cutlass' / 'version.h'} states no version")
    return ".".join(number.group(1) for number in numbers if number)


def cutlass_45(folder: Path = FOLDER) -> Path:
    """CUTLASS 4.5's include folder, downloaded and unpacked where it is not there yet."""
    wanted = REQUIREMENT.read_text()
    home = folder / "4.5"
    stamp = home / _STAMP
    if stamp.is_file() and stamp.read_text() == wanted:
        return home / "include"
    print(f"downloading {REQUIREMENT.relative_to(ROOT)} for CUTLASS 4.5's headers", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--dest", scratch]
        done = subprocess.run([*command, "-r", str(REQUIREMENT)], check=False)
        wheels = sorted(Path(scratch).glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            raise BuildError(f"pip could not download {REQUIREMENT.name} (exit {done.returncode})")
        new = Path(scratch, "new")
        unpack(wheels[0], new / "include")
        (new / _STAMP).write_text(wanted)
        shutil.rmtree(home, ignore_errors=True)
        new.rename(home)
    return home / "include"


def unpack(wheel: Path, include: Path) -> None:
    """The CUTLASS headers of ``wheel``, and nothing else of it, into ``include``."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(_IN_WHEEL) and not name.endswith("/")]
        if not names:
            raise BuildError(f"{wheel.name} holds no {_IN_WHEEL}")
        for name in names:
            path = include / name[len(_IN_WHEEL) :]
            if ".." in path.parts:
                raise BuildError(f"{wheel.name} holds the odd name {name!r}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(name))
    found = version_of(include)
    if found != "4.5":
        raise BuildError(f"{wheel.name} holds CUTLASS {found}, expected 4.5")


def stand_in_46(cutlass: Path, folder: Path = FOLDER) -> Path:
    """A folder to be searched before ``cutlass``, whose version.h says 4.6."""
    text = (cutlass / "cutlass" / "version.h").read_text()
    changed, count = re.subn(r"(#define CUTLASS_MINOR\s+)\d+", r"\g<1>6", text)
    if count != 1 or version_of(cutlass).split(".")[0] != "4":
        raise BuildError(f"{cutlass / 'cutlass' / 'version.h'}: expected one CUTLASS_MINOR of CUTLASS 4")
    path = folder / "4.6" / "include" / "cutlass" / "version.h"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(changed)
    return folder / "4.6" / "include"


def with_cutlass(toolchain: Toolchain, version: str, folder: Path = FOLDER) -> Toolchain:
    """``toolchain`` with the headers of CUTLASS ``version`` ("4.2", "4.5", "4.6") in place of its own."""
    own, *others = toolchain.include_dirs
    if version == version_of(own):
        return toolchain
    if version == "4.5":
        return replace(toolchain, include_dirs=(cutlass_45(folder), *others))
    if version == "4.6":
        return replace(toolchain, include_dirs=(stand_in_46(own, folder), own, *others))
    raise BuildError(f"there are no headers of CUTLASS {version}")
