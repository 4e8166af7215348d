"""Which files of this repository a kernel is made of, and their hash.

Includes are followed in the text alone, through every branch of every #if: a superset of what the compiler
reads, the same on every machine, and to be had without a compiler. So a stale cubin shows where there is no
toolchain; the compile checks the set against nvcc's own dependency list.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from . import ROOT, BuildError

_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*(?:<([^>\n]+)>|\"([^\"\n]+)\"|(\S+))", re.MULTILINE)


def source_files(source: str, root: Path = ROOT) -> list[str]:
    """``source`` and every header of this repository it includes, directly or not: sorted paths relative to
    ``root``.

    Raises BuildError where a file is missing or an include is computed by a macro.
    """
    include_dir = root / "cuda" / "include"
    seen: set[str] = set()
    waiting = [source]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        path = root / name
        if not path.is_file():
            raise BuildError(f"there is no {name}")
        seen.add(name)
        for system, quoted, computed in _INCLUDE.findall(path.read_text()):
            if computed:
                raise BuildError(f"{name}: the include {computed} cannot be followed, name the file")
            places = [include_dir / (system or quoted)]
            if quoted:
                places.insert(0, path.parent / quoted)
            found = next((place for place in places if place.is_file()), None)
            if found is not None:
                waiting.append(found.resolve().relative_to(root.resolve()).as_posix())
            elif (system or quoted).startswith("sm12x/"):
                raise BuildError(f"{name} includes {system or quoted}, which is not there")
    return sorted(seen)


def sources_sha256(source: str, root: Path = ROOT) -> str:
    """One hash over the names and contents of :func:`source_files`."""
    total = hashlib.sha256()
    for name in source_files(source, root):
        content = hashlib.sha256((root / name).read_bytes()).hexdigest()
        total.update(f"{content}  {name}\n".encode())
    return total.hexdigest()


def check_dependencies(listing: str, source: str, root: Path = ROOT) -> None:
    """Raise BuildError where nvcc's dependency ``listing`` (-MD) names a file of ``root`` that the hash
    leaves out.
    """
    known = set(source_files(source, root))
    words = listing.replace("\\\n", " ").split()
    top = root.resolve()
    used = set()
    for word in words[words.index(":") + 1 :] if ":" in words else words[1:]:
        path = (root / word).resolve()
        if path.is_relative_to(top) and "site-packages" not in path.parts:
            used.add(path.relative_to(top).as_posix())
    if source not in used:
        raise BuildError(f"the dependency list of {source} does not name it: {sorted(used)}")
    if used - known:
        raise BuildError(f"{source} reads files that its hash leaves out: {sorted(used - known)}")
