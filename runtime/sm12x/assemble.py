"""PTX to cubin: the one description of how every shipped cubin was assembled.

The build (cuda/tools) and ``python -m sm12x verify`` both go through this file, so that what verify
re-assembles is what the build assembled. Standard library only; nothing else of the package is imported.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

PTX_VERSIONS: dict[str, str | None] = {"cu12": "8.8", "cu13": None}
"""The ``.version`` line each CUDA major's ptxas is given; None leaves the compiler's own.

ptxas 12.9 refuses the version that nvcc 13.3 writes, and checks every instruction itself."""

_VERSION_LINE = re.compile(r"^\.version[ \t]+[0-9.]+[ \t]*$", re.MULTILINE)
_DROPPED = re.compile(r"\bwarning\b|setmaxnreg' ignored", re.IGNORECASE)
_TOOL_VERSION = re.compile(r"\bV(\d+\.\d+\.\d+)\b")


class AssemblyError(RuntimeError):
    """ptxas failed, or warned; the message carries what it printed."""


@dataclass(frozen=True)
class Assembled:
    """One cubin and what ``ptxas -v`` said about it.

    ``spill_bytes`` counts spill stores, ``stack_bytes`` is the entry function's stack frame.
    """

    cubin: bytes
    registers: int
    spill_bytes: int
    stack_bytes: int


def tool_version(tool: Path) -> str:
    """The version (``"13.3.73"``) that a CUDA tool prints for ``--version``. Raises AssemblyError where there
    is none.
    """
    try:
        done = subprocess.run([str(tool), "--version"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise AssemblyError(f"{tool} cannot be run: {error}") from error
    found = _TOOL_VERSION.search(done.stdout)
    if found is None:
        raise AssemblyError(f"{tool} --version prints no version: {done.stdout + done.stderr!r}")
    return found.group(1)


def ptx_for_major(text: str, major: str) -> str:
    """The PTX ``text`` as the ptxas of CUDA ``major`` ("cu12" or "cu13") gets it."""
    if major not in PTX_VERSIONS:
        raise ValueError(f"major: expected one of {sorted(PTX_VERSIONS)}, got {major!r}")
    version = PTX_VERSIONS[major]
    if version is None:
        return text
    rewritten, count = _VERSION_LINE.subn(f".version {version}", text)
    if count != 1:
        raise AssemblyError(f"expected one .version line in the PTX, found {count}")
    return rewritten


def assemble(ptxas: Path, text: str, target: str, major: str) -> Assembled:
    """Assemble PTX ``text`` for ``target`` ("sm_120a") with the ``ptxas`` of CUDA ``major``.

    The options are part of the cubin (ptxas records them in a note), so they are the same for every caller.
    -O2, not -O3: in warp-specialised kernels -O3 keeps values that several roles use in local memory, inside
    the loop that holds the MMAs, with registers to spare; main loops are the same instructions either way
    (ptxas 12.9 and 13.3: 52 to 104 bytes spilled with -O3, none with -O2).
    Raises AssemblyError where ptxas fails or warns: a warning says that it dropped something that the source
    asked for.
    """
    with tempfile.TemporaryDirectory(prefix="sm12x-") as folder:
        Path(folder, "kernel.ptx").write_bytes(ptx_for_major(text, major).encode())
        command = [str(ptxas), f"-arch={target}", "-O2", "-v", "kernel.ptx", "-o", "kernel.cubin"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        except OSError as error:
            raise AssemblyError(f"{ptxas} cannot be run: {error}") from error
        log = done.stdout + done.stderr
        if done.returncode != 0 or _DROPPED.search(log):
            raise AssemblyError(f"{' '.join(command)} (exit {done.returncode}) said:\n{log}")
        cubin = Path(folder, "kernel.cubin").read_bytes()
    registers, spill_bytes, stack_bytes = parse_usage(log)
    return Assembled(cubin, registers, spill_bytes, stack_bytes)


def parse_usage(log: str) -> tuple[int, int, int]:
    """Registers, bytes of spill stores and bytes of stack frame out of what ``ptxas -v`` printed.

    Spill stores are summed over the entry function and the functions it calls; the stack is the entry's.
    Raises AssemblyError where the log is not that of exactly one entry function.
    """
    entries = re.findall(r"Compiling entry function '([^']+)'", log)
    registers = re.findall(r"Used (\d+) registers", log)
    if len(entries) != 1 or len(registers) != 1:
        raise AssemblyError(f"expected the usage of one entry function, got:\n{log}")
    frames = re.findall(
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores", log
    )
    stacks = [int(stack) for name, stack, _ in frames if name == entries[0]]
    if len(stacks) != 1:
        raise AssemblyError(f"no stack frame of {entries[0]} in:\n{log}")
    return int(registers[0]), sum(int(spill) for _, _, spill in frames), stacks[0]
