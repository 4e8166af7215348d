"""The manifest's ABI part: names out of sm12x/abi.h, abi_packed.h and abi_moe.h, sizes and offsets from the
host compiler.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from . import ROOT, BuildError

HEADERS = ("abi.h", "abi_packed.h", "abi_moe.h")
_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_STRUCT = re.compile(r"typedef\s+struct\s+(\w+)\s*\{(.*?)\}\s*(\w+)\s*;", re.DOTALL)
_ENUM = re.compile(r"\benum\s+\w+\s*\{(.*?)\}", re.DOTALL)
_FIELD = re.compile(r"(\w+)\s*(?:\[[^\]]*\]\s*)*$")
_DEFINE = re.compile(r"^[ \t]*#[ \t]*define[ \t]+(SM12X_\w+)[ \t]+\S", re.MULTILINE)


def header_names(header: str) -> tuple[dict[str, list[str]], list[str]]:
    """The structs of the headers' text with their fields in order, and the names of its constants.

    Constants are the enumerators and the object-like macros that have a value and begin with SM12X_.
    """
    text = _COMMENT.sub(" ", header)
    structs = {}
    for tag, body, name in _STRUCT.findall(text):
        if tag != name:
            raise BuildError(f"abi.h: struct {tag} is typedef'd as {name}")
        fields = []
        for declaration in filter(None, (part.strip() for part in body.split(";"))):
            found = _FIELD.search(declaration)
            if found is None or "," in declaration:
                raise BuildError(f"abi.h: {name}: one field a declaration, got {declaration!r}")
            fields.append(found.group(1))
        structs[name] = fields
    constants = _DEFINE.findall(text)
    for body in _ENUM.findall(text):
        constants += [part.split("=")[0].strip() for part in body.split(",") if part.strip()]
    if not structs or not constants:
        raise BuildError("abi.h: no struct or no constant found")
    return structs, constants


def dump_abi(root: Path = ROOT) -> dict[str, Any]:
    """{"structs": {name: {size, align, fields: {field: [offset, size]}}}, "constants": {name: value}}.

    Compiles cuda/tools/abi_dump.cpp with the host compiler ($CXX, else c++ or g++).
    """
    folder = root / "cuda" / "include" / "sm12x"
    structs, constants = header_names("".join((folder / name).read_text() for name in HEADERS))
    lines = []
    for name, fields in structs.items():
        lines += [
            f"STRUCT_BEGIN({name})",
            *(f"FIELD({name}, {field})" for field in fields),
            f"STRUCT_END({name})",
        ]
    lines += [f"CONSTANT({name})" for name in constants]
    with tempfile.TemporaryDirectory(prefix="sm12x-abi-") as folder:
        Path(folder, "abi_names.inc").write_text("\n".join(lines) + "\n")
        program = Path(folder, "abi_dump")
        command = [*_host_compiler(), "-std=c++17", "-Wall", "-Werror", "-I", folder]
        command += ["-I", str(root / "cuda" / "include"), str(root / "cuda" / "tools" / "abi_dump.cpp")]
        done = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BuildError(f"abi_dump.cpp does not compile:\n{done.stdout}{done.stderr}")
        abi: dict[str, Any] = json.loads(
            subprocess.run([str(program)], capture_output=True, check=True).stdout
        )
    for name, layout in abi["structs"].items():
        _require_no_holes(name, layout)
    return abi


def _host_compiler() -> list[str]:
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)
    for name in ("c++", "g++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no host C++ compiler: install g++ or set CXX (nvcc needs one too)")


def _require_no_holes(name: str, layout: dict[str, Any]) -> None:
    """Launch structs name every byte but their tail padding: a gap is a field that the header's reader
    overlooked.
    """
    end = 0
    for field, (offset, size) in layout["fields"].items():
        if offset != end:
            raise BuildError(f"abi.h: {name} has a hole of {offset - end} bytes before {field}")
        end = offset + size
    if layout["size"] - end >= layout["align"]:
        raise BuildError(f"abi.h: {name} ends {layout['size'] - end} bytes after its last field")
