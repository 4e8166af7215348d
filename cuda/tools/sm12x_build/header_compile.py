"""Compiles one program of tests/cuda as an outside CUTLASS program is compiled, and reads the result:
resource usage and machine code.

nvcc writes PTX, ptxas assembles it twice: with -O3, which is what nvcc asks of it unless told otherwise, and
with -O2, which is what the shipped cubins are assembled with and what cuda/README.md advises. CUTLASS's
kernel shell holds values that several warp roles use; at -O3 ptxas keeps some of them in local memory, up to
128 bytes, and the MMA warps reload a few once per output tile. So the rules are: no local memory in the main
loop (the innermost loop with MMAs) at -O3, nor, where more than those 128 bytes are spilled, in the loop over
output tiles around it; and at -O2 none in any loop with an MMA. Spills are recorded for both.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import ROOT, BuildError, ptx, sass
from .compiler import nvcc_command
from .header_matrix import (
    MAIN_CUTLASS,
    MAIN_TARGET,
    SHARED_MEMORY_LIMIT,
    TESTS_DIR,
    Entry,
    Matrix,
    Source,
    program_text,
)
from .header_negatives import Negative, control_text, judge
from .main_loop import Mix, innermost_mma_loops, mix_of
from .toolchain import Toolchain

OUTPUT_DIR = ROOT / "build" / "header-tests"
FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-DNDEBUG")
LEVELS = ("O3", "O2")
SHELL_SPILL_BYTES = 128
_USAGE = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+"
    r"ptxas info\s*: Used (\d+) registers"
)
_IGNORED = re.compile(r"setmaxnreg' ignored", re.IGNORECASE)


@dataclass(frozen=True)
class Unit:
    """One compile: a program, a target and a CUTLASS."""

    program: Entry | Source
    target: str = MAIN_TARGET
    cutlass: str = MAIN_CUTLASS

    @property
    def kind(self) -> str:
        """What is special about the compile; empty for the main target with the toolchain's CUTLASS."""
        target = "" if self.target == MAIN_TARGET else "@" + self.target
        return target + ("" if self.cutlass == MAIN_CUTLASS else "@cutlass-" + self.cutlass)

    @property
    def key(self) -> str:
        """Its name in results and on the command line."""
        return self.program.name + self.kind


@dataclass(frozen=True)
class Outcome:
    """How a compile ended. ``problems`` are sentences; ``facts`` is what is recorded."""

    key: str
    problems: list[str]
    facts: dict[str, Any]
    seconds: float


def units_of(matrix: Matrix) -> list[Unit]:
    """Every compile that the table asks for: each target with the toolchain's CUTLASS, every other CUTLASS
    for the main target.
    """
    found = []
    for source in matrix.sources.values():
        found += [Unit(source, MAIN_TARGET, version) for version in source.cutlass]
    for entry in matrix.entries.values():
        if MAIN_CUTLASS in entry.cutlass:
            found += [Unit(entry, target) for target in entry.targets]
        found += [Unit(entry, MAIN_TARGET, version) for version in entry.cutlass if version != MAIN_CUTLASS]
    return found


def _nvcc(
    text_or_file: str | Path, key: str, target: str, toolchain: Toolchain, output: Path
) -> tuple[int, str]:
    """Exit status and words of nvcc, compiling a text (kept in build/) or a file to PTX."""
    if isinstance(text_or_file, Path):
        source = text_or_file
    else:
        OUTPUT_DIR.mkdir(parents=True, exist_ok=True)
        source = OUTPUT_DIR / f"{key}.cu"
        source.write_text(text_or_file)
    command = [*nvcc_command(toolchain, ROOT), "-I", str(TESTS_DIR), *FLAGS, f"-arch={target}", "--ptx"]
    done = subprocess.run(
        [*command, str(source), "-o", str(output)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.returncode, (done.stdout + done.stderr).replace(str(ROOT) + "/", "")


def compile_unit(unit: Unit, toolchain: Toolchain) -> Outcome:
    """Compile ``unit`` with a toolchain that has its CUTLASS, and check what came out."""
    started = time.monotonic()
    facts: dict[str, Any] = {}
    program = unit.program
    with tempfile.TemporaryDirectory(prefix="sm12x-tests-") as folder:
        output = Path(folder, "kernel.ptx")
        source = TESTS_DIR / program.file if isinstance(program, Source) else program_text(program)
        status, log = _nvcc(source, unit.key, unit.target, toolchain, output)
        if status != 0:
            problems = [f"{unit.key}: does not compile (nvcc exit {status})\n{log.strip()}"]
        elif isinstance(program, Source):  # no kernel in it
            problems = []
        else:
            try:
                facts, problems = read_kernel(program, unit.target, output.read_text(), toolchain)
            except BuildError as error:
                problems = [str(error)]
            problems = [f"{unit.key}: {problem}" for problem in problems]
    return Outcome(unit.key, problems, facts, time.monotonic() - started)


def read_kernel(
    entry: Entry, target: str, text: str, toolchain: Toolchain
) -> tuple[dict[str, Any], list[str]]:
    """What the PTX of ``entry`` says of itself and its machine code holds, and what is wrong with it."""
    threads, shared, stages, one_more = ptx.info_words(text)
    facts: dict[str, Any] = {
        "threads": threads,
        "stages": stages,
        "shared_memory": shared,
        "shared_memory_with_one_more_stage": one_more,
    }
    problems = []
    if shared > SHARED_MEMORY_LIMIT:
        problems.append(f"{shared} bytes of shared memory, over {SHARED_MEMORY_LIMIT}")
    for level in LEVELS:
        usage, kernel = _assembled(text, target, level, toolchain)
        code = {**usage, **describe_code(kernel)}
        local = {name: count for name, count in code.items() if name.startswith("local_")}
        facts.update({level: {**usage, **local}, "mma": code["mma"]})
        problems += [f"-{level}: {problem}" for problem in code_problems(entry, target, level, code)]
    return facts, list(dict.fromkeys(problems))


def _assembled(
    text: str, target: str, level: str, toolchain: Toolchain
) -> tuple[dict[str, int], sass.Kernel]:
    """Resource usage and code of the one kernel in ``text``."""
    with tempfile.TemporaryDirectory(prefix="sm12x-tests-") as folder:
        source, output = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(text)
        command = [str(toolchain.ptxas["cu13"]), f"-arch={target}", f"-{level}", "-v", str(source)]
        done = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True, check=False)
        log = done.stdout + done.stderr
        if done.returncode != 0 or _IGNORED.search(log):
            raise BuildError(f"ptxas -{level} (exit {done.returncode}) said:\n{log}")
        return parse_usage(log), sass.disassemble(toolchain.nvdisasm, output)


def parse_usage(log: str) -> dict[str, int]:
    """Registers, spills and stack of the one entry function in what ``ptxas -v`` printed."""
    found = _USAGE.findall(log)
    if len(found) != 1:
        raise BuildError(f"expected the resource usage of one function, got:\n{log}")
    stack, stores, loads, registers = (int(number) for number in found[0])
    return {
        "registers": registers,
        "spill_store_bytes": stores,
        "spill_load_bytes": loads,
        "stack_bytes": stack,
    }


def describe_code(kernel: sass.Kernel) -> dict[str, Any]:
    """The kinds of MMA in a kernel, and local-memory instructions in its loops: in the innermost loops with
    MMAs, and in all loops with MMAs.
    """
    loops = [loop for loop in kernel.loops() if any(instruction.is_mma for instruction in loop)]
    innermost = innermost_mma_loops(kernel, with_waits=True)
    return {
        "mma": sorted({instruction.opcode for instruction in kernel.instructions if instruction.is_mma}),
        "main_loops": len(innermost),
        "local_in_main_loop": sum(i.is_local for loop in innermost for i in loop),
        "local_in_mma_loops": sum(i.is_local for loop in loops for i in loop),
    }


def code_problems(entry: Entry, target: str, level: str, code: dict[str, Any]) -> list[str]:
    """Sentences on machine code that is not what ``entry`` asks for."""
    problems = []
    if not code["main_loops"]:
        problems.append("no loop holds an MMA")
    wanted = _mma_pattern(entry, target)
    wrong = [opcode for opcode in code["mma"] if not re.fullmatch(wanted, opcode)]
    if wrong or not code["mma"]:
        problems.append(f"the MMA is {code['mma']}, expected {wanted}")
    spilled = code["spill_store_bytes"]
    strict = level == "O2" and not entry.tile_loop_spill
    if code["local_in_main_loop"]:
        problems.append(f"{code['local_in_main_loop']} local-memory instructions in the main loop")
    elif level == "O2" and entry.tile_loop_spill and not code["local_in_mma_loops"]:
        problems.append("the table says tile_loop_spill, and nothing spills")
    elif code["local_in_mma_loops"] and (strict or spilled > SHELL_SPILL_BYTES):
        count = code["local_in_mma_loops"]
        problems.append(f"{count} local-memory instructions in loops with an MMA, {spilled} bytes spilled")
    return problems


def _mma_pattern(entry: Entry, target: str) -> str:
    """The opcode of the MMA, as a regular expression: instruction and element types."""
    if target == "sm_90a":
        return r"HMMA\.16816\.F32"
    kind = r"QMMA\.SF" if entry.mma == "unit_scale" else "QMMA"
    scale = r"\.E8" if entry.mma == "unit_scale" else ""
    return rf"{kind}\.16832\.F32\.{entry.a.upper()}\.{entry.b.upper()}{scale}"


def compile_negative(case: Negative, toolchain: Toolchain) -> Outcome:
    """Compile a program that must not compile, and look at how it fails."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sm12x-tests-") as folder:
        output = Path(folder, "kernel.ptx")
        status, log = _nvcc(case.text(), f"negative_{case.name}", MAIN_TARGET, toolchain, output)
    return Outcome(case.name, judge(case, status, log), {}, time.monotonic() - started)


def compile_control(entry: Entry, toolchain: Toolchain) -> Outcome:
    """Compile the types of a base of negative cases: they have to compile."""
    started = time.monotonic()
    key = f"control_{entry.name}"
    with tempfile.TemporaryDirectory(prefix="sm12x-tests-") as folder:
        status, log = _nvcc(control_text(entry), key, MAIN_TARGET, toolchain, Path(folder, "kernel.ptx"))
    problems = [f"{key}: does not compile, so its negative cases prove nothing\n{log}"] if status else []
    return Outcome(key, problems, {}, time.monotonic() - started)


def main_loop_of(entry: Entry, toolchain: Toolchain) -> tuple[Mix, dict[str, Any]]:
    """What the main loop of ``entry`` is made of for the main target, and the program's facts. Raises
    BuildError where it does not compile or breaks a rule.
    """
    with tempfile.TemporaryDirectory(prefix="sm12x-tests-") as folder:
        output = Path(folder, "kernel.ptx")
        status, log = _nvcc(program_text(entry), entry.name, MAIN_TARGET, toolchain, output)
        if status != 0:
            raise BuildError(f"{entry.name}: does not compile (nvcc exit {status})\n{log.strip()}")
        text = output.read_text()
    facts, problems = read_kernel(entry, MAIN_TARGET, text, toolchain)
    if problems:
        raise BuildError(f"{entry.name}: " + "; ".join(problems))
    return mix_of(entry, _assembled(text, MAIN_TARGET, LEVELS[0], toolchain)[1]), facts
