#!/usr/bin/env python3
"""Compiles CUTLASS programs (tests/cuda/emulated/programs.toml) and runs them on the emulator, host code and
all: this project's, small ones around CUTLASS's own SM120 kernels, and NVIDIA's examples.

    python cuda/tools/emulate_programs.py                     all of them, under 3 schedules each
    python cuda/tools/emulate_programs.py --name 'dense_*'    these (may be repeated, names of --list)
    python cuda/tools/emulate_programs.py --changed-since REV --sample 3 --seconds 300
                                                              all if anything that they are made of, or run
                                                              on, differs from REV, else a rotating sample;
                                                              as far as 300 s go
    python cuda/tools/emulate_programs.py --list              the names

Needs the toolchain of requirements/toolchain.txt (cuda/tools/rebuild.py installs it), g++ and NumPy. A
compile takes about a minute and 4 GB of memory, a run seconds; nothing is cached.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from sm12x_build import ROOT, BuildError
from sm12x_build.emulated_build import (
    Built,
    Program,
    compile_program,
    compile_stand_in,
    load_programs,
)
from sm12x_build.header_select import changed_files
from sm12x_build.toolchain import Toolchain, find_toolchain

SEEDS = (0, 1, 2)  # of the emulator's schedule: they differ in all that a seed decides
RUN_LIMIT = 240.0  # seconds
_EXPECTED = 75.0  # seconds that the first program takes
_MARK = "emulated: "
_MADE_OF = (
    "runtime/sm12x/emulator/",
    "cuda/include/",
    "cuda/examples/",
    "tests/cuda/",
    "requirements/toolchain.txt",
)
_TOOLS = ("emulate_programs.py", "emulated_build.py", "emulated_program.py", "header_matrix.py")


@dataclass
class Outcome:
    """What became of a program: `problems` are sentences, `lines` what it printed."""

    name: str
    problems: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    compile_seconds: float = 0.0
    run_seconds: float = 0.0


def run_once(program: Program, built: Built, seed: int) -> tuple[list[str], list[str]]:
    """Run a program under one schedule, in a process of its own. Problems, and lines printed."""
    arguments = [argument.format(seed=seed) for argument in program.arguments]
    maps = "early" if program.early_maps else "late"
    command = [sys.executable, __file__, "--run", str(built.library), str(built.ptx), str(seed), maps]
    command += arguments
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=RUN_LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return [f"seed {seed}: did not end within {RUN_LIMIT:.0f} s"], []
    lines = (done.stdout + done.stderr).strip().splitlines()
    launches = next((json.loads(line[len(_MARK) :]) for line in lines if line.startswith(_MARK)), [])
    lines = [line for line in lines if not line.startswith(_MARK)]
    if done.returncode != 0 or not launches:
        what = f"exit status {done.returncode}" if done.returncode else "no kernel ran"
        return [f"seed {seed}: {what}", *lines[-30:]], lines
    grids = ", ".join(f"{'x'.join(map(str, each['grid']))} in {each['seconds']:.1f} s" for each in launches)
    return [], [*lines, f"seed {seed}: grids {grids}"]


def do(program: Program, toolchain: Toolchain, stand_in: Path) -> Outcome:
    """Compile a program and run it under every schedule."""
    outcome = Outcome(program.name)
    started = time.monotonic()
    try:
        built = compile_program(program, toolchain, stand_in)
    except BuildError as error:
        outcome.problems.append(str(error))
        return outcome
    outcome.compile_seconds = time.monotonic() - started
    started = time.monotonic()
    for seed in SEEDS:
        problems, lines = run_once(program, built, seed)
        outcome.problems += problems
        outcome.lines += lines
    outcome.run_seconds = time.monotonic() - started
    return outcome


def report(outcome: Outcome, verbose: bool) -> None:
    words = "ok" if not outcome.problems else "FAILS"
    seconds = f"{outcome.compile_seconds:.0f} s + {outcome.run_seconds:.1f} s"
    lines = [f"{outcome.name}: {words} ({seconds})", *outcome.problems]
    if verbose:
        lines += [f"  {line}" for line in outcome.lines]
    print("\n".join(lines), flush=True)


def select(args: argparse.Namespace, programs: list[Program]) -> list[Program]:
    """The programs of this run, in the order in which a budget takes them: the table's where all are to run,
    else from the day's place on.
    """
    if args.name:
        chosen = [p for p in programs if any(fnmatch.fnmatchcase(p.name, pattern) for pattern in args.name)]
        if not chosen:
            raise BuildError(f"no name matches {args.name}; --list prints them")
        return chosen
    if not args.changed_since:
        return programs
    files = changed_files(args.changed_since)
    tools = {f"cuda/tools/{name}" for name in _TOOLS[:1]} | {
        f"cuda/tools/sm12x_build/{name}" for name in _TOOLS[1:]
    }
    changed = files is None or sorted(f for f in files if f.startswith(_MADE_OF) or f in tools)
    day = datetime.datetime.now(datetime.timezone.utc).date().toordinal() if args.seed is None else args.seed
    start = day * 3 % len(programs)
    rotated = programs[start:] + programs[:start]
    if changed:
        why = f"git has no {args.changed_since}" if files is None else f"{changed[0]} changed"  # type: ignore[index]
        print(f"since {args.changed_since}: {why}: all {len(programs)} programs", flush=True)
        return rotated
    print(f"nothing changed since {args.changed_since}: a sample of {args.sample}", flush=True)
    return rotated[: args.sample]


def run_all(programs: list[Program], args: argparse.Namespace) -> int:
    """Compile and run, `args.jobs` at a time; the exit status. Nothing starts that would end after the budget
    if it took as long as the slowest so far.
    """
    toolchain = find_toolchain()
    stand_in = compile_stand_in(toolchain)
    started = time.monotonic()
    slowest = [_EXPECTED]
    lock = threading.Lock()

    def one(program: Program) -> Outcome | str:
        begun = time.monotonic()
        if args.seconds is not None and begun - started + max(slowest) > args.seconds:
            return program.name
        outcome = do(program, toolchain, stand_in)
        with lock:
            slowest.append(time.monotonic() - begun)
        report(outcome, args.verbose)
        return outcome

    with ThreadPoolExecutor(max_workers=args.jobs) as pool:
        ended = list(pool.map(one, programs))
    done = [item for item in ended if isinstance(item, Outcome)]
    left = [item for item in ended if isinstance(item, str)]
    failed = [outcome.name for outcome in done if outcome.problems]
    print(
        f"{len(done)} of {len(ended)} programs run, {len(failed)} failed, {time.monotonic() - started:.0f} s"
    )
    if failed:
        print("  failed: " + ", ".join(failed))
    if left:
        print("  no time left for " + ", ".join(left))
    return 1 if failed or not done else 0


def child(library: str, ptx: str, seed: str, maps: str, *arguments: str) -> int:
    """--run: one program, in this process, whose exit status is the program's."""
    sys.path.insert(0, str(ROOT / "runtime"))
    from sm12x.emulator.errors import EmulatorError
    from sm12x_build.emulated_program import run

    try:
        status, emulation = run(
            Path(library), Path(ptx), arguments, seed=int(seed), early_maps=maps == "early"
        )
    except EmulatorError as error:
        print(error, file=sys.stderr)
        return 1
    print(_MARK + json.dumps([{"grid": each.grid, "seconds": each.seconds} for each in emulation.launches]))
    sys.stdout.flush()
    # Python ends before the program's destructors, which free device memory, would run.
    os._exit(status & 255)


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--name", action="append", default=[], metavar="PATTERN", help="names like this")
    which.add_argument("--changed-since", metavar="REV", help="all if something differs from git REV")
    which.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--sample", type=int, default=3, metavar="N", help="so many where nothing changed")
    parser.add_argument("--seed", type=int, help="where the order starts (default: the day's number)")
    parser.add_argument("--seconds", type=float, metavar="BUDGET", help="start nothing that would end later")
    parser.add_argument("--jobs", type=int, default=2, help="programs at a time (default 2)")
    parser.add_argument("--verbose", action="store_true", help="print what the programs print")
    return parser.parse_args(words)


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["--run"]:
        return child(*words[1:])
    args = parse(words)
    try:
        programs = load_programs()
        if args.list:
            print("\n".join(program.name for program in programs))
            return 0
        return run_all(select(args, programs), args)
    except BuildError as error:
        print(f"emulate_programs.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
