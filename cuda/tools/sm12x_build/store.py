"""The folder cubins/: manifest.json, cubins, compressed PTX. Reading, writing, and what does not belong
there.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from pathlib import Path
from typing import Any

from . import ROOT, BuildError

SCHEMA = 1
CUBINS_DIR = ROOT / "cubins"
MANIFEST = "manifest.json"
NOT_IN_MANIFEST = (MANIFEST, "README.md")


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def ptx_path(target: str, key: str) -> str:
    """Where the compressed PTX lies, relative to cubins/."""
    return f"ptx/{target}/{key}.ptx.xz"


def cubin_path(major: str, target: str, key: str) -> str:
    """Where the cubin lies, relative to cubins/."""
    return f"{major}/{target}/{key}.cubin"


def canonical_json(value: Any) -> str:
    """One spelling for one value, so that a rebuild that changes nothing changes no byte."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=True) + "\n"


def read_manifest(folder: Path = CUBINS_DIR) -> dict[str, Any] | None:
    """The manifest as it stands, None where there is none. Raises BuildError on another schema."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest: dict[str, Any] = json.loads(path.read_text())
    if manifest.get("schema") != SCHEMA:
        raise BuildError(f"{path} has schema {manifest.get('schema')}, this build writes {SCHEMA}")
    return manifest


def write_manifest(manifest: dict[str, Any], folder: Path = CUBINS_DIR) -> None:
    """Write the manifest in canonical form."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).write_text(canonical_json(manifest))


def read_ptx(path: Path) -> str:
    """Uncompressed PTX of one .ptx.xz. Raises BuildError where it is missing or broken."""
    try:
        return lzma.decompress(path.read_bytes()).decode()
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise BuildError(f"{path} cannot be read: {error}") from error


def write_ptx(text: str, path: Path) -> None:
    """Write PTX compressed. An archive of the same text is left alone: another liblzma may pack it
    differently.
    """
    if path.is_file():
        try:
            if read_ptx(path) == text:
                return
        except BuildError:
            pass  # broken: replaced below
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(text.encode(), format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME))


def write_cubin(data: bytes, path: Path) -> None:
    """Write one cubin."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def listed_files(manifest: dict[str, Any]) -> list[str]:
    """Every path that the manifest names."""
    paths = []
    for variant in manifest["variants"].values():
        for target in variant["targets"].values():
            paths.append(target["ptx"]["path"])
            paths += [cubin["path"] for cubin in target["cubins"].values()]
    return paths


def stray_files(manifest: dict[str, Any], folder: Path = CUBINS_DIR) -> list[str]:
    """Files in the folder that the manifest does not name."""
    known = {*listed_files(manifest), *NOT_IN_MANIFEST}
    present = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(set(present) - known)


def remove_strays(manifest: dict[str, Any], folder: Path = CUBINS_DIR) -> list[str]:
    """Delete PTX and cubins of variants that are gone; returns their paths. Other files are left and reported
    by lint.
    """
    gone = [name for name in stray_files(manifest, folder) if name.endswith((".cubin", ".ptx.xz"))]
    for name in gone:
        (folder / name).unlink()
    return gone
