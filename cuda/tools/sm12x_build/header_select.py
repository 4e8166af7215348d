"""Which compiles of the matrix a run does: what changed, a rotating sample, in an order that a budget may cut
short.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Sequence
from pathlib import Path

from . import ROOT, BuildError
from .header_compile import Unit
from .header_matrix import MATRIX_FILE, TESTS_DIR, Matrix, Source, parse_matrix
from .sources import source_files

_GOLDEN = 0.6180339887498949
_HEADERS = ("grouped_program.hpp", "visitor_trees.hpp")
_TOOLS = (
    "requirements/toolchain.txt",
    "requirements/cutlass_45.txt",
    "cuda/tools/sm12x_build/header_matrix.py",
    "cuda/tools/sm12x_build/header_compile.py",
    "cuda/tools/sm12x_build/cutlass_headers.py",
)


def _git(root: Path, *arguments: str) -> str | None:
    """What git printed, or None where it failed."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def changed_files(revision: str, root: Path = ROOT) -> set[str] | None:
    """Files that differ from git ``revision``, new ones included; None where git cannot say."""
    differing = _git(root, "diff", "--name-only", "-z", revision, "--")
    new = _git(root, "ls-files", "--others", "--exclude-standard", "-z")
    if differing is None or new is None:
        return None
    return {name for name in (differing + new).split("\0") if name}


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def changed_units(
    units: Sequence[Unit], matrix: Matrix, revision: str, root: Path = ROOT
) -> tuple[list[Unit], str]:
    """The compiles that ``revision`` would not have done the same way, and why in a few words.

    A program changes with its line in the table, and every program with a header that programs include, or
    with the tools that write and compile them.
    """
    files = changed_files(revision, root)
    if files is None:
        return list(units), f"git has no {revision}: everything is new"
    included = {name for header in _HEADERS for name in source_files(_relative(TESTS_DIR / header), root)}
    shared = sorted(files & (included | set(_TOOLS)))
    if shared:
        return list(units), f"{shared[0]} changed{f' and {len(shared) - 1} more' if len(shared) > 1 else ''}"
    text = _git(root, "show", f"{revision}:{_relative(MATRIX_FILE)}")
    try:
        old = parse_matrix(text or "", f"{revision}:{MATRIX_FILE.name}")
    except BuildError:
        return list(units), f"{revision} has no such table: everything is new"
    changed = []
    for unit in units:
        if isinstance(unit.program, Source):
            same = old.sources.get(unit.program.name) == unit.program
            if not same or _relative(TESTS_DIR / unit.program.file) in files:
                changed.append(unit)
        elif old.entries.get(unit.program.name) != matrix.entries[unit.program.name]:
            changed.append(unit)
    return changed, f"{len(changed)} lines of the table changed"


def rotated(units: Sequence[Unit], seed: int) -> list[Unit]:
    """All of ``units`` in an order that starts elsewhere with every ``seed``.

    One of each kind (target, CUTLASS) comes first. Within a kind the order is that of hashed names, which
    mixes the table's sections, and seeds that follow each other start a golden section apart: the starts of
    any few runs lie evenly, so that runs that are cut short cover everything between them.
    """
    kinds: dict[str, list[Unit]] = {}
    for unit in units:
        kinds.setdefault(unit.kind, []).append(unit)
    first, rest = [], []
    for kind in sorted(kinds):
        ordered = sorted(kinds[kind], key=lambda unit: hashlib.sha256(unit.key.encode()).digest())
        start = int(seed * _GOLDEN % 1.0 * len(ordered))
        turned = ordered[start:] + ordered[:start]
        first.append(turned[0])
        rest.append(turned[1:])
    return first + [unit for group in rest for unit in group]


def choose(
    units: Sequence[Unit], changed: Sequence[Unit], sample: int, seed: int
) -> tuple[list[Unit], list[Unit]]:
    """What changed, in rotated order, and a sample of the rest: ``sample`` of the main kind and one of every
    other.
    """
    done = {unit.key for unit in changed}
    others = [unit for unit in units if unit.key not in done]
    if sample <= 0 or not others:
        return rotated(changed, seed), []
    picked = []
    for kind in sorted({unit.kind for unit in others}):
        of_kind = rotated([unit for unit in others if unit.kind == kind], seed)
        picked += of_kind[: sample if kind == "" else 1]
    return rotated(changed, seed), picked
