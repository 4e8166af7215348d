"""Compiles the programs of tests/cuda/emulated/programs.toml for the emulator: the PTX of their kernels, and
their host code as a shared object with a stand-in for the CUDA runtime.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import ROOT, BuildError
from .header_matrix import FUSION_NAMES, TESTS_DIR, choice, load_matrix, tomllib
from .toolchain import Toolchain

FOLDER = TESTS_DIR / "emulated"
TABLE = FOLDER / "programs.toml"
STAND_IN = FOLDER / "runtime_stand_in.cpp"
OUTPUT_DIR = ROOT / "build" / "emulated-programs"
FLAGS = ("-std=c++17", "-O1", "--expt-relaxed-constexpr", "-DNDEBUG", "-Xcompiler", "-fPIC")
TARGET = "compute_120a"
_FIELDS = {"name", "file", "example", "entry", "defines", "arguments", "early_maps"}
_BUILDER = Path("cutlass", "gemm", "collective", "builders", "sm120_blockscaled_mma_builder.inl")
_UNSIGNED, _SIGNED = "static constexpr auto SFVectorSize =", "static constexpr int SFVectorSize ="


@dataclass(frozen=True)
class Program:
    """A line of the table. One of `file` (from the root), `example` (in CUTLASS's examples) and `entry` (of
    matrix.toml) is not empty.
    """

    name: str
    file: str = ""
    example: str = ""
    entry: str = ""
    defines: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    early_maps: bool = False


@dataclass(frozen=True)
class Built:
    """What a compile made."""

    library: Path
    ptx: Path


def load_programs(path: Path = TABLE) -> list[Program]:
    """The table. Raises BuildError for a line that is not as the table's head says."""
    programs = [_program(line, path) for line in tomllib.loads(path.read_text()).get("program", [])]
    names = [program.name for program in programs]
    if not programs or len(set(names)) != len(names):
        raise BuildError(f"{path.name}: expected programs with different names, found {names}")
    return programs


def _program(line: dict[str, Any], path: Path) -> Program:
    unknown = set(line) - _FIELDS
    sources = [key for key in ("file", "example", "entry") if line.get(key)]
    if unknown or not line.get("name") or len(sources) != 1:
        raise BuildError(f"{path.name}: {line.get('name')}: expected a name and one source, found {line}")
    lists = {key: tuple(line.get(key, ())) for key in ("defines", "arguments")}
    early = bool(line.get("early_maps", False))
    return Program(line["name"], **{key: line[key] for key in sources}, **lists, early_maps=early)


def signed_builder(cutlass: Path, folder: Path) -> Path:
    """An include folder to be searched before `cutlass`, with CUTLASS's block-scaled SM120 builder, in which
    the scale vector's size is an int.

    It is unsigned in CUTLASS 4.2, and gets into the kernel's type, where nvcc 13.3 takes C<16u> and C<16> for
    one type and g++ does not: the host then calls a stub that nothing was registered for, and every launch
    fails. The PTX is the same.
    """
    text = (cutlass / _BUILDER).read_text()
    if text.count(_UNSIGNED) != 1:
        raise BuildError(f"{_BUILDER.name} is not CUTLASS 4.2's: look at it again")
    path = folder / _BUILDER
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace(_UNSIGNED, _SIGNED))
    return folder


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).strip().splitlines()
        errors = [line[:400] for line in lines if "error" in line] or lines[-10:]
        raise BuildError(f"{what} does not compile (exit {done.returncode}):\n" + "\n".join(errors[:10]))


def compile_stand_in(toolchain: Toolchain) -> Path:
    """The object that takes the place of the CUDA runtime."""
    OUTPUT_DIR.mkdir(parents=True, exist_ok=True)
    made = OUTPUT_DIR / "runtime_stand_in.o"
    include = toolchain.include_dirs[1]  # the toolkit's
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    _run([*command, "-I", str(include), "-c", str(STAND_IN), "-o", str(made)], STAND_IN.name)
    return made


def _source(program: Program, toolchain: Toolchain, folder: Path) -> tuple[Path, list[Path]]:
    """The source file, and include folders of its own."""
    if program.file:
        return ROOT / program.file, []
    cutlass = toolchain.include_dirs[0].parent
    if program.example:
        return cutlass / "examples" / program.example, [cutlass / "examples" / "common"]
    source = folder / f"{program.name}.cu"
    source.write_text(entry_text(program.entry))
    return source, []


def entry_text(name: str) -> str:
    """A main() around the kernel of an entry of matrix.toml."""
    entry = load_matrix().entries.get(name)
    if entry is None or entry.fusion not in FUSION_NAMES:
        raise BuildError(f"matrix.toml has no entry {name} with a fusion that can be run")
    side = "true" if entry.bias_side == "m" else "false"
    return (
        '#include "grouped_program.hpp"\n#include "visitor_trees.hpp"\n'
        '#include "emulated/small_problems.hpp"\n\n'
        + choice(entry)
        + "\nint main(int argc, char** argv) {\n  using Kernel = outside::GroupedGemm<Choice>::Kernel;\n"
        + f'  run::Options const options{{"{name}", Choice::kAlignmentC, Choice::kAlignmentD, {side}}};\n'
        + f"  return run::run_small<Kernel, run::Fusion::{FUSION_NAMES[entry.fusion]}>"
        + "(options, argc, argv);\n}\n"
    )


def compile_program(program: Program, toolchain: Toolchain, stand_in: Path) -> Built:
    """Compile one program, for which nvcc runs once. Raises BuildError with its words."""
    folder = OUTPUT_DIR / program.name
    kept = folder / "kept"
    kept.mkdir(parents=True, exist_ok=True)
    for old in kept.iterdir():
        old.unlink()
    source, own = _source(program, toolchain, folder)
    cutlass = toolchain.include_dirs[0]
    tools = cutlass.parent / "tools" / "util" / "include"
    includes = [
        *(signed_builder(cutlass, folder / "include"), ROOT / "cuda" / "include", TESTS_DIR),
        *(*toolchain.include_dirs, tools, *own),
    ]
    command = [str(toolchain.nvcc), "-gencode", f"arch={TARGET},code={TARGET}", *FLAGS]
    command += [f"-D{define}" for define in program.defines]
    command += [word for include in includes for word in ("-I", str(include))]
    command += ["--keep", "--keep-dir", str(kept), "-cudart", "none", "-c", str(source)]
    compiled, library = folder / "program.o", folder / "program.so"
    _run([*command, "-o", str(compiled)], program.name)
    link = [os.environ.get("CXX", "g++"), "-shared", "-pthread", str(compiled), str(stand_in)]
    _run([*link, "-o", str(library)], program.name)
    found = sorted(kept.glob("*.ptx"))
    if len(found) != 1:
        raise BuildError(f"{program.name}: nvcc kept {len(found)} PTX files, expected one")
    ptx = folder / "program.ptx"
    found[0].replace(ptx)
    for rest in kept.iterdir():
        rest.unlink()
    return Built(library, ptx)
