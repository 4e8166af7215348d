"""PTX as text: normalising, retargeting, and the facts that a kernel states about itself."""

from __future__ import annotations

import re
from typing import Any

from . import BuildError
from .variants import GEMM_ROLES

INFO_SYMBOL = "sm12x_variant_info"
_GRID_AXES = ("x", "y")
_INFO_HEAD = ("threads", "shared_memory", "stages", "grid_axis", "workspace_per_cta")
# What the GEMM kernels of a family state beyond the head: more numbers, then tensor maps.
_PACKED_GEMMS = ("fp8_packed", "fp8_up", "fp8_down")
_PACKED_LAYER = (*_PACKED_GEMMS, "fp8_layer")
_GEMM_NUMBERS = {"fp8_ptr_array": (), **dict.fromkeys(_PACKED_LAYER, ("mma_warps", "weight_maps"))}
_GEMM_MAPS = {
    "fp8_ptr_array": ("a", "b", "d"),
    **dict.fromkeys(_PACKED_GEMMS, ("a", "b")),
    "fp8_layer": ("b", "b2"),  # w1's and w2's
}
_MAP_NUMBERS = 5  # rank, box0, box1, swizzle, element_bytes
_MOST_WEIGHT_MAPS = 6  # SM12X_WEIGHT_MAPS of abi_packed.h
_INTERNAL = re.compile(r"_INTERNAL_([0-9a-f]{8})_(\d+)_")
_ENTRY = re.compile(r"^[ \t]*(?:\.(?:visible|weak)[ \t]+)?\.entry[ \t]+([A-Za-z_$][\w$]*)", re.MULTILINE)
_TARGET = re.compile(r"^\.target[ \t]+(\S+)[ \t]*$", re.MULTILINE)
_SHARED = re.compile(
    r"^[ \t]*(?:\.(?:visible|weak)[ \t]+)?\.shared[ \t]+(?:\.align[ \t]+\d+[ \t]+)?"
    r"\.[bfsu](8|16|32|64|128)[ \t]+[\w$]+(?:\[(\d+)\])?[ \t]*;",
    re.MULTILINE,
)
_INFO = re.compile(
    r"\.(?:global|const)[ \t]+(?:\.align[ \t]+\d+[ \t]+)?\.(b8|u8|b32|u32)[ \t]+"
    + INFO_SYMBOL
    + r"\[(\d+)\][ \t]*=[ \t]*\{([^}]*)\}"
)


def normalise(text: str) -> str:
    """PTX without what depends on where and when it was compiled.

    nvcc hashes the absolute source path into names of internal linkage and writes build ids into the opening
    comment. Raises BuildError where an absolute path is left.
    """
    hashes: set[str] = set()
    for found in _INTERNAL.finditer(text):
        hashes.add(found.group(1))
        # _INTERNAL_<hash>_<length>_<file name>_<hash>: the length counts the file name alone.
        second = re.compile(rf".{{{found.group(2)}}}_([0-9a-f]{{8}})").match(text, found.end())
        if second is None:
            raise BuildError(f"unexpected internal name: {text[found.start() : found.end() + 40]!r}")
        hashes.add(second.group(1))
    for value in hashes:
        text = text.replace("_" + value, "_00000000")
    start = text.find(".version")
    if start < 0:
        raise BuildError("the PTX has no .version line")
    text = text[start:]
    lines = [line.rstrip() for line in text.splitlines()]
    for line in lines:
        if line.startswith(("\t.file", ".file")) or re.search(r'"/[^"]*/[^"]*"', line):
            raise BuildError(f"the PTX holds a path: {line}")
    return "\n".join(lines).rstrip("\n") + "\n"


def retarget(text: str, target: str) -> str:
    """The same PTX with its one ``.target`` line naming ``target``."""
    changed, count = _TARGET.subn(f".target {target}", text)
    if count != 1:
        raise BuildError(f"expected one .target line, found {count}")
    return changed


def target_of(text: str) -> str:
    """What the PTX's ``.target`` line names."""
    found = _TARGET.findall(text)
    if len(found) != 1:
        raise BuildError(f"expected one .target line, found {len(found)}")
    return str(found[0])


def entries(text: str) -> list[str]:
    """Names of the kernels defined in the PTX."""
    return _ENTRY.findall(text)


def waits_on_grid(text: str) -> bool:
    """Whether the PTX holds the wait of programmatic dependent launch."""
    return re.search(r"\bgriddepcontrol\.wait\b", text) is not None


def launches_dependents(text: str) -> bool:
    """Whether the PTX holds the trigger of programmatic dependent launch."""
    return re.search(r"\bgriddepcontrol\.launch_dependents\b", text) is not None


def static_shared_bytes(text: str) -> int:
    """Bytes of shared memory that the PTX declares by itself; dynamic shared memory is ``.extern`` and counts
    0.
    """
    return sum(int(kind) // 8 * int(count or 1) for kind, count in _SHARED.findall(text))


def info_words(text: str) -> list[int]:
    """The numbers of the kernel's ``sm12x_variant_info``; the compiler leaves trailing zeros out, they are
    put back.
    """
    found = _INFO.findall(text)
    if len(found) != 1:
        raise BuildError(f"expected one initialised {INFO_SYMBOL} in the PTX, found {len(found)}")
    kind, length, body = found[0]
    values = [int(value, 0) for value in body.replace("\n", " ").split(",") if value.strip()]
    values += [0] * (int(length) - len(values))
    if kind in ("b32", "u32"):
        return values
    if len(values) % 4:
        raise BuildError(f"{INFO_SYMBOL} has {len(values)} bytes, not a multiple of 4")
    return [int.from_bytes(bytes(values[at : at + 4]), "little") for at in range(0, len(values), 4)]


def variant_facts(text: str, family: str, role: str) -> dict[str, Any]:
    """What the compiled kernel says about its launch: the manifest's threads, shared_memory, stages,
    grid_axis, workspace_per_cta and, for GEMM kernels, what their family adds and tensor_maps (boxes
    innermost first).

    Raises BuildError where the numbers are not as many as the family has, or make no sense.
    """
    words = info_words(text)
    numbers: tuple[str, ...] = _INFO_HEAD
    map_names: tuple[str, ...] = ()
    if role in GEMM_ROLES:
        if family not in _GEMM_MAPS:
            raise BuildError(f"what do GEMM kernels of the family {family} state in {INFO_SYMBOL}?")
        numbers += _GEMM_NUMBERS[family]
        map_names = _GEMM_MAPS[family]
    expected = len(numbers) + _MAP_NUMBERS * len(map_names)
    if len(words) != expected:
        raise BuildError(f"{INFO_SYMBOL} of a {role} kernel has {expected} numbers, got {len(words)}")
    facts: dict[str, Any] = dict(zip(numbers, words, strict=False))
    axis = facts["grid_axis"]
    if not 0 < facts["threads"] <= 1024 or axis >= len(_GRID_AXES) or facts["workspace_per_cta"] % 128:
        raise BuildError(f"{INFO_SYMBOL} makes no sense: {words}")
    facts["grid_axis"] = _GRID_AXES[axis]
    if not 0 < facts.get("mma_warps", 1) <= facts["threads"] // 32:
        raise BuildError(f"{INFO_SYMBOL} makes no sense: {facts['mma_warps']} MMA warps in {words}")
    if not 0 < facts.get("weight_maps", 1) <= _MOST_WEIGHT_MAPS:
        raise BuildError(f"{INFO_SYMBOL} makes no sense: {facts['weight_maps']} maps of b in {words}")
    maps = {}
    for index, name in enumerate(map_names):
        start = len(numbers) + _MAP_NUMBERS * index
        rank, box0, box1, swizzle, element_bytes = words[start : start + _MAP_NUMBERS]
        if not 1 <= rank <= 5 or swizzle not in (0, 32, 64, 128) or not 0 < max(box0, box1) <= 256:
            raise BuildError(f"{INFO_SYMBOL}: the tensor map of {name} makes no sense: {words}")
        if name in ("b", "b2") and box1 << facts.get("weight_maps", 1) - 1 > 256:
            raise BuildError(
                f"{INFO_SYMBOL}: {facts['weight_maps']} maps of {name} from {box1} features: {words}"
            )
        maps[name] = {"rank": rank, "box": [box0, box1], "swizzle": swizzle, "element_bytes": element_bytes}
    if maps:
        facts["tensor_maps"] = maps
    return facts
