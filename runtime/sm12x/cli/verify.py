"""``python -m sm12x verify``: are the cubins of this installation the ones that the manifest describes?

Checks the manifest's schema and the size and hash of every cubin and PTX that is here. With a ptxas of the
recorded version at hand it also assembles every PTX again and requires the cubin's very bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..assemble import AssemblyError, assemble, tool_version
from ..errors import CubinError
from ..manifest import MAJORS, Cubin, Manifest, find_root, load, wheel_major
from .progress import progress

HELP = "check the hashes of cubins and PTX; with a ptxas at hand, re-assemble every PTX"
_WHEEL_PTXAS = ("nvidia/cu13/bin", "nvidia/cuda_nvcc/bin")  # where PyPI's CUDA 13 and CUDA 12 packages put it


@dataclass
class Report:
    """What was found. ``problems`` decide the verdict, ``not_checked`` says what the verdict leaves out."""

    root: str = ""
    variants: int = 0
    cubins: int = 0
    ptx: int = 0
    reassembled: dict[str, int] = field(default_factory=dict)
    not_checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        return {
            "ok": not self.problems,
            "root": self.root,
            "variants": self.variants,
            "checked": {"cubins": self.cubins, "ptx": self.ptx, "reassembled": self.reassembled},
            "not_checked": self.not_checked,
            "problems": self.problems,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the sub-command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--ptxas",
        action="append",
        default=[],
        type=Path,
        metavar="PATH",
        help="a ptxas to re-assemble with; may be repeated (also looked for: PATH, the NVIDIA wheels here)",
    )
    parser.add_argument("--cubins", type=Path, metavar="DIR", help="check this folder, not the installed one")


def run(args: argparse.Namespace) -> int:
    """Check, print; 0 where nothing is wrong, else 1."""
    report = verify(args.cubins, args.ptxas, show_progress=not args.json or sys.stderr.isatty())
    if args.json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        _print(report)
    return 1 if report.problems else 0


def verify(
    root: Path | None = None, ptxas: list[Path] | None = None, *, show_progress: bool = False
) -> Report:
    """Check the cubins under ``root`` (default: this installation's), with ``ptxas`` beside those that are
    found.
    """
    report = Report()
    try:
        folder = find_root() if root is None else root
        report.root = str(folder)
        manifest = load(folder)
    except CubinError as error:
        report.problems.append(str(error))
        return report
    report.variants = len(manifest.variants)
    if not manifest.variants:
        report.problems.append(f"{folder}: the manifest lists no variant")
    wheel = wheel_major() if root is None else None
    majors = MAJORS if wheel is None else (wheel,)
    report.not_checked += [
        f"the cubins of {m}: sm12x-{wheel} does not hold them" for m in MAJORS if m not in majors
    ]
    intact = _check_cubins(manifest, majors, report)
    texts = _check_ptx(manifest, report)
    _check_strays(manifest, report)
    _reassemble(intact, texts, find_ptxas(ptxas or [], report), report, show_progress)
    return report


def _check_cubins(
    manifest: Manifest, majors: tuple[str, ...], report: Report
) -> list[tuple[str, str, Cubin, bytes]]:
    """Size and hash of every cubin; returns (architecture, major, record, bytes) of the ones that match."""
    intact = []
    for variant in manifest.variants.values():
        for arch, target in variant.targets.items():
            for major in majors:
                cubin = target.cubins.get(major)
                if cubin is None:
                    report.problems.append(f"{variant.key} {arch}: the manifest lists no cubin for {major}")
                    continue
                report.cubins += 1
                data = _read(manifest.root / cubin.path, report)
                if data is None:
                    continue
                digest = hashlib.sha256(data).hexdigest()
                if len(data) != cubin.size:
                    report.problems.append(f"{cubin.path}: expected {cubin.size} bytes, it has {len(data)}")
                elif digest != cubin.sha256:
                    report.problems.append(f"{cubin.path}: expected sha256 {cubin.sha256}, it has {digest}")
                else:
                    intact.append((arch, major, cubin, data))
    return intact


def _check_ptx(manifest: Manifest, report: Report) -> dict[str, str]:
    """Hash of every PTX; returns the texts by the name that PTX and cubin share, such as ``sm_120a/key``."""
    texts: dict[str, str] = {}
    for arch, recorded in _ptx_records(manifest):
        path = manifest.root / recorded["path"]
        report.ptx += 1
        packed = _read(path, report)
        if packed is None:
            continue
        try:
            plain = lzma.decompress(packed)
        except lzma.LZMAError as error:
            report.problems.append(f"{recorded['path']}: cannot be unpacked: {error}")
            continue
        digest = hashlib.sha256(plain).hexdigest()
        if digest != recorded["sha256"]:
            report.problems.append(
                f"{recorded['path']}: expected sha256 {recorded['sha256']}, it has {digest}"
            )
        else:
            texts[f"{arch}/{path.name.removesuffix('.ptx.xz')}"] = plain.decode()
    return texts


def _ptx_records(manifest: Manifest) -> Iterator[tuple[str, dict[str, Any]]]:
    for variant in manifest.variants.values():
        for arch, target in variant.targets.items():
            yield arch, dict(target.ptx)


def _check_strays(manifest: Manifest, report: Report) -> None:
    """Cubins and PTX that no manifest entry names."""
    known = {str(record["path"]) for _, record in _ptx_records(manifest)}
    for variant in manifest.variants.values():
        known |= {cubin.path for target in variant.targets.values() for cubin in target.cubins.values()}
    for path in sorted(manifest.root.rglob("*")):
        name = path.relative_to(manifest.root).as_posix()
        if path.is_file() and name.endswith((".cubin", ".ptx.xz")) and name not in known:
            report.problems.append(f"{name}: the manifest does not name it")


def _read(path: Path, report: Report) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError as error:
        report.problems.append(f"{path}: cannot be read: {error.strerror}")
        return None


def find_ptxas(given: list[Path], report: Report) -> dict[str, Path]:
    """Version -> ptxas: the ``given`` ones, PATH's, and those of NVIDIA's packages in this Python
    environment.
    """
    suffix = ".exe" if os.name == "nt" else ""
    site = Path(sysconfig.get_path("purelib"))
    found = [site / folder / f"ptxas{suffix}" for folder in _WHEEL_PTXAS]
    on_path = shutil.which("ptxas")
    if on_path is not None:
        found.append(Path(on_path))
    tools: dict[str, Path] = {}
    for path in [*given, *(tool for tool in found if tool.is_file())]:
        try:
            # Absolute, because it runs in another folder; a name that is no file here is looked for in PATH.
            tools.setdefault(tool_version(tool := path.absolute() if path.is_file() else path), tool)
        except AssemblyError as error:
            if path in given:
                report.problems.append(f"--ptxas: {error}")
    return tools


def _reassemble(
    intact: list[tuple[str, str, Cubin, bytes]],
    texts: dict[str, str],
    tools: dict[str, Path],
    report: Report,
    show_progress: bool,
) -> None:
    work = []
    without_tool: dict[str, int] = {}
    without_ptx = 0
    for arch, major, cubin, data in intact:
        text = texts.get(f"{arch}/{Path(cubin.path).stem}")
        if text is None:
            without_ptx += 1
        elif cubin.assembler not in tools:
            without_tool[cubin.assembler] = without_tool.get(cubin.assembler, 0) + 1
        else:
            work.append((arch, major, cubin, data, text))

    def one(item: tuple[str, str, Cubin, bytes, str]) -> str | None:
        arch, major, cubin, data, text = item
        try:
            made = assemble(tools[cubin.assembler], text, arch, major)
        except AssemblyError as error:
            return f"{cubin.path}: {error}"
        if made.cubin != data:
            return f"{cubin.path}: ptxas {cubin.assembler} makes other bytes of its PTX"
        usage = (made.registers, made.spill_bytes, made.stack_bytes)
        if usage != (cubin.registers, cubin.spill_bytes, cubin.stack_bytes):
            return (
                f"{cubin.path}: ptxas reports registers, spill and stack bytes {usage}, the manifest others"
            )
        return None

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        found = progress(
            pool.map(one, work), "re-assembling", len(work), enabled=show_progress and bool(work)
        )
        for item, problem in zip(work, found, strict=True):
            if problem is not None:
                report.problems.append(problem)
            else:
                name = f"{item[1]} (ptxas {item[2].assembler})"
                report.reassembled[name] = report.reassembled.get(name, 0) + 1
    for version, count in sorted(without_tool.items()):
        report.not_checked.append(
            f"re-assembling {count} cubins: no ptxas {version} was found (give one with --ptxas)"
        )
    if without_ptx:
        report.not_checked.append(f"re-assembling {without_ptx} cubins: their PTX is missing or altered")


def _print(report: Report) -> None:
    print(f"{report.root}: {report.variants} variants")
    print(f"size and sha256 of {report.cubins} cubins and sha256 of {report.ptx} PTX files checked")
    for name, count in sorted(report.reassembled.items()):
        print(f"{count} PTX files re-assembled for {name}: identical cubins")
    for line in report.not_checked:
        print(f"not checked: {line}")
    for line in report.problems:
        print(f"PROBLEM: {line}", file=sys.stderr)
    print("ok" if not report.problems else f"{len(report.problems)} problems")
