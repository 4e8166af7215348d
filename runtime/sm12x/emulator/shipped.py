"""From a shipped cubin to the PTX that it was assembled from."""

from __future__ import annotations

import hashlib
import lzma

from .. import manifest
from ..errors import CubinError


def origin(image: bytes) -> tuple[manifest.Variant, str]:
    """The variant and architecture of a cubin. Raises CubinError where the manifest does not have it."""
    digest = hashlib.sha256(image).hexdigest()
    for variant in manifest.default().variants.values():
        for arch, target in variant.targets.items():
            if any(cubin.sha256 == digest for cubin in target.cubins.values()):
                return variant, arch
    raise CubinError(f"the emulator runs the cubins of {manifest.default().root}, and this is none of them")


def read_ptx(variant: manifest.Variant, arch: str) -> str:
    """The PTX text of a variant for an architecture. Raises CubinError where there is none, or it is missing
    or altered."""
    target = variant.targets.get(arch)
    if target is None:
        raise CubinError(f"{variant.key}: no PTX for {arch}; there is {', '.join(variant.targets) or 'none'}")
    path = manifest.default().root / target.ptx["path"]
    try:
        text = lzma.decompress(path.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise CubinError(f"{variant.key}: {path} cannot be read ({error}): {manifest.REINSTALL}") from error
    expected, digest = target.ptx["sha256"], hashlib.sha256(text).hexdigest()
    if digest != expected:
        raise CubinError(f"{variant.key}: {path} is altered: expected sha256 {expected}, got {digest}")
    return text.decode()
