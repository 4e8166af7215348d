"""Checks on the tree and on cubins/ that need no compiler. Each returns sentences, and one of them where
there was nothing to check: an empty set is a broken check, not a clean tree.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from . import MAJORS, BuildError, ptx, store
from .pipeline import TWIN_TARGETS, require_same_but_target

SHARED_MEMORY_LIMIT = 101_376
SHELL_SPILL_LIMIT = 128
WRAPS_GEMM_UNIVERSAL = frozenset({"fp8_ptr_array"})
"""Families whose GEMM kernels run in CUTLASS's own shell, which holds its producer warp to 40 registers."""

_SUFFIXES = frozenset(
    [".cmake", ".cpp", ".csv", ".cu", ".cuh", ".h", ".hpp", ".json", ".md", ".py", ".svg", ".toml", ".txt"]
)
_NAMES = frozenset(
    {
        ".clang-format",
        ".gitignore",
        "runtime/sm12x/py.typed",
        "LICENSE",
        "NOTICE",
        "CMakeLists.txt",
        ".ci/run",
        "tests/gpu/build_headers",
        "tests/gpu/run",
    }
)
_BINARY_SUFFIXES = (".cubin", ".ptx.xz")
_SKIPPED_FOLDERS = frozenset({".git", "build", "dist", "__pycache__", ".venv", "venv", "node_modules"})
_LARGEST_TEXT = 1 << 20
# Spelled in pieces, so that this file does not hold what it looks for.
_FORBIDDEN = {
    "a machine path": re.compile(r"(?<![\w.$}])/(?:ro" + r"ot|wo" + r"rk|ho" + r"me|Us" + r"ers)/\w"),
    "a registry host": re.compile(r"(?:pyp" + r"i\.org|pythonho" + r"sted\.org|registry\.np" + r"mjs)"),
    "unfinished work": re.compile(r"\bTO" + r"DO\b|\bFIX" + r"ME\b|\braise NotImplemented" + r"Error\b"),
}


def tracked_files(root: Path) -> list[str]:
    """Files of the tree relative to ``root``: git's, tracked or about to be; without git, what is not build
    output.
    """
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        done = None
    if done is not None and done.returncode == 0:
        return sorted(name for name in done.stdout.split("\0") if name and (root / name).is_file())
    found = []
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in _SKIPPED_FOLDERS and not name.endswith("_cache")]
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in files]
    return sorted(found)


def tree_problems(root: Path, files: Sequence[str]) -> list[str]:
    """Wrong kinds of file, binaries outside cubins/, and text that no file should hold."""
    if not files:
        return [f"{root}: no file to check"]
    problems = []
    for name in files:
        path = root / name
        data = path.read_bytes()
        if name.startswith("cubins/"):
            if not name.endswith((*_BINARY_SUFFIXES, ".json", ".md")):
                problems.append(
                    f"{name}: only cubins, compressed PTX, the manifest and its README belong here"
                )
            if name.endswith(_BINARY_SUFFIXES):
                continue
        elif PurePosixPath(name).suffix not in _SUFFIXES and name not in _NAMES:
            problems.append(f"{name}: this kind of file has no place here")
        if b"\0" in data:
            problems.append(f"{name}: a binary file outside cubins/")
            continue
        if len(data) > _LARGEST_TEXT and not name.startswith("cubins/"):
            problems.append(f"{name}: {len(data)} bytes, over 1 MiB")
        try:
            text = data.decode()
        except UnicodeDecodeError:
            problems.append(f"{name}: not UTF-8")
            continue
        if text and not text.endswith("\n"):
            problems.append(f"{name}: no newline at the end")
        if "\r" in text:
            problems.append(f"{name}: carriage returns")
        for what, pattern in _FORBIDDEN.items():
            found = pattern.search(text)
            if found:
                problems.append(
                    f"{name}:{text.count(chr(10), 0, found.start()) + 1}: {what}: {found.group(0)}"
                )
    return problems


def _targets(manifest: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any], str, dict[str, Any]]]:
    for key, variant in sorted(manifest["variants"].items()):
        for target, record in sorted(variant["targets"].items()):
            yield key, variant, target, record


def runs_in_cutlass_shell(variant: dict[str, Any]) -> bool:
    """Whether a variant is one of CUTLASS's kernels around our main loop; all others are ours throughout."""
    return variant["role"] == "gemm" and variant["family"] in WRAPS_GEMM_UNIVERSAL


def resource_problems(manifest: dict[str, Any]) -> list[str]:
    """Shared memory, registers, spills and stacks beyond what is allowed."""
    problems = []
    checked = 0
    for key, variant, target, record in _targets(manifest):
        if variant["shared_memory"] > SHARED_MEMORY_LIMIT:
            problems.append(
                f"{key}: {variant['shared_memory']} bytes of shared memory, over {SHARED_MEMORY_LIMIT}"
            )
        in_shell = runs_in_cutlass_shell(variant)
        allowed = SHELL_SPILL_LIMIT if in_shell else 0
        if set(record["cubins"]) != set(MAJORS):
            problems.append(f"{key} {target}: cubins for {sorted(record['cubins'])}, expected {list(MAJORS)}")
        for major, cubin in record["cubins"].items():
            checked += 1
            if cubin["spill_bytes"] > allowed:
                problems.append(
                    f"{key} {target} {major}: spills {cubin['spill_bytes']} bytes, {allowed} allowed"
                )
            if cubin["stack_bytes"] and not in_shell:
                problems.append(f"{key} {target} {major}: a stack of {cubin['stack_bytes']} bytes")
            if cubin["registers"] * variant["threads"] > 65_536:
                problems.append(
                    f"{key} {target} {major}: {cubin['registers']} registers x {variant['threads']}"
                )
    return problems if checked else ["the manifest lists no cubin"]


def file_problems(manifest: dict[str, Any], folder: Path) -> list[str]:
    """Files that only the folder or only the manifest has, and files whose hash or size is not the
    manifest's.
    """
    listed = store.listed_files(manifest)
    if not listed:
        return ["the manifest lists no file"]
    problems = [f"{name}: listed twice" for name in sorted(set(listed)) if listed.count(name) > 1]
    problems += [f"{name}: not in the manifest" for name in store.stray_files(manifest, folder)]
    for key, _, target, record in _targets(manifest):
        for cubin in record["cubins"].values():
            path = folder / cubin["path"]
            if not path.is_file():
                problems.append(f"{cubin['path']}: missing")
            elif (store.sha256(path.read_bytes()), path.stat().st_size) != (cubin["sha256"], cubin["size"]):
                problems.append(
                    f"{cubin['path']}: not the size or sha256 that the manifest has for {key} {target}"
                )
    return problems


def ptx_problems(manifest: dict[str, Any], folder: Path) -> list[str]:
    """PTX whose hash, target, entry, launch facts or PDL wait and trigger are not what the manifest says, or
    whose sm_121a text is not sm_120a's but for its target."""
    problems = []
    checked = 0
    for key, variant, target, record in _targets(manifest):
        where = f"{key} {target}"
        try:
            text = store.read_ptx(folder / record["ptx"]["path"])
            checked += 1
            if store.sha256(text.encode()) != record["ptx"]["sha256"]:
                problems.append(f"{where}: the PTX is not the one that the manifest hashed")
            if ptx.normalise(text) != text:
                problems.append(f"{where}: the PTX is not normalised")
            if ptx.target_of(text) != target:
                problems.append(f"{where}: the PTX is for {ptx.target_of(text)}")
            if ptx.entries(text) != [variant["symbol"]]:
                problems.append(f"{where}: entries {ptx.entries(text)}, expected only {variant['symbol']}")
            facts = ptx.variant_facts(text, variant["family"], variant["role"])
            problems += [
                f"{where}: {name} is {value} in the PTX, {variant.get(name)} in the manifest"
                for name, value in facts.items()
                if variant.get(name) != value
            ]
            shared = variant["shared_memory"] + ptx.static_shared_bytes(text)
            if shared > SHARED_MEMORY_LIMIT:
                problems.append(f"{where}: {shared} bytes of shared memory, static included")
            if ptx.waits_on_grid(text) != variant["pdl"]:
                problems.append(f"{where}: pdl is {variant['pdl']}, griddepcontrol.wait says otherwise")
            if ptx.launches_dependents(text) != variant["pdl"]:
                problems.append(
                    f"{where}: pdl is {variant['pdl']}, griddepcontrol.launch_dependents says otherwise"
                )
        except BuildError as error:
            problems.append(f"{where}: {error}")
    for key, variant in sorted(manifest["variants"].items()):
        if set(TWIN_TARGETS) <= set(variant["targets"]):
            try:
                paths = [folder / variant["targets"][target]["ptx"]["path"] for target in TWIN_TARGETS]
                require_same_but_target(key, *(store.read_ptx(path) for path in paths))
            except BuildError as error:
                problems.append(str(error))
    return problems if checked else [*problems, "the manifest lists no PTX"]
