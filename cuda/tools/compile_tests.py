#!/usr/bin/env python3
"""Compiles the header library in outside CUTLASS programs: the table tests/cuda/matrix.toml, and
tests/cuda/negative.toml with what must be refused.

    python cuda/tools/compile_tests.py --all              everything; records it in tests/cuda
    python cuda/tools/compile_tests.py --name 'auto_*'    these (may be repeated, names of --list); with
                                                          --again, put into the last record too
    python cuda/tools/compile_tests.py --changed-since REV --sample 4 --seconds 600
                                                          what must be refused, what changed since REV,
                                                          and a rotating sample, as far as 600 s go
    python cuda/tools/compile_tests.py --list             the names

Needs the toolchain of requirements/toolchain.txt (cuda/tools/rebuild.py installs it); compiles against
CUTLASS 4.5 download requirements/cutlass_45.txt once, into build/. A compile takes about 30 s and 4 GB of
memory. Nothing is cached.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from sm12x_build import ROOT, BuildError
from sm12x_build.cutlass_headers import with_cutlass
from sm12x_build.header_compile import (
    OUTPUT_DIR,
    SHELL_SPILL_BYTES,
    Outcome,
    Unit,
    compile_control,
    compile_negative,
    compile_unit,
    units_of,
)
from sm12x_build.header_matrix import Matrix, load_matrix
from sm12x_build.header_negatives import Negative, load_negatives
from sm12x_build.header_report import result_of, updated, write_result, write_summary
from sm12x_build.header_select import changed_units, choose, rotated
from sm12x_build.toolchain import Toolchain, find_toolchain

Work = tuple[str, Callable[[], Outcome]]


class Budget:
    """Seconds that a run may take; None: as many as it takes."""

    def __init__(self, seconds: float | None) -> None:
        self._started = time.monotonic()
        self._seconds = seconds

    def allows(self, seconds: float) -> bool:
        """Whether something that takes ``seconds`` would still end in time."""
        return self._seconds is None or self.elapsed() + seconds <= self._seconds

    def elapsed(self) -> float:
        return time.monotonic() - self._started


def _line(outcome: Outcome) -> str:
    """What is printed of one compile."""
    words = "ok" if not outcome.problems else "FAILS"
    if "O3" in outcome.facts:
        o3, o2 = outcome.facts["O3"], outcome.facts["O2"]
        words += f", {outcome.facts['stages']} stages, {outcome.facts['shared_memory']} bytes shared"
        words += f", {o3['registers']} registers, spills {o3['spill_store_bytes']} bytes"
        words += f" (-O2: {o2['spill_store_bytes']})"
        if o3["spill_store_bytes"] > SHELL_SPILL_BYTES:
            words += f", more than CUTLASS's shell accounts for ({SHELL_SPILL_BYTES})"
    lines = [f"{outcome.key}: {words} ({outcome.seconds:.0f} s)", *outcome.problems]
    return "\n".join(lines)


def run_all(
    work: Sequence[Work], jobs: int, budget: Budget, expected: float
) -> tuple[list[Outcome], list[str]]:
    """Do ``work`` in order, ``jobs`` at a time. What was done, and the names of what was not.

    Nothing starts that would end after the budget if it took as long as the median so far, ``expected``
    seconds at first.
    """
    taken: list[float] = []
    lock = threading.Lock()

    def one(item: Work) -> Outcome | str:
        name, compile_it = item
        with lock:
            usual = statistics.median(taken) if taken else expected
        if not budget.allows(usual):
            return name
        outcome = compile_it()
        with lock:
            taken.append(outcome.seconds)
        print(_line(outcome), flush=True)
        return outcome

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        ended = list(pool.map(one, work))
    return (
        [item for item in ended if isinstance(item, Outcome)],
        [item for item in ended if isinstance(item, str)],
    )


def negative_work(cases: dict[str, Negative], matrix: Matrix, toolchain: Toolchain) -> list[Work]:
    """The cases, and their bases as controls, each once."""
    bases = [matrix.entries[name] for name in sorted({case.base for case in cases.values()})]
    work: list[Work] = [(f"control_{base.name}", partial(compile_control, base, toolchain)) for base in bases]
    return work + [(case.name, partial(compile_negative, case, toolchain)) for case in cases.values()]


def unit_work(units: Sequence[Unit], toolchain: Toolchain) -> list[Work]:
    """The compiles of ``units``. Header sets that some of them need are made ready here, before threads
    start.
    """
    sets = {unit.cutlass: with_cutlass(toolchain, unit.cutlass) for unit in units}
    return [(unit.key, partial(compile_unit, unit, sets[unit.cutlass])) for unit in units]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _commit() -> str:
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return "no git history"
    return f"on top of {head.stdout.strip()}" if head.returncode == 0 else "no git history"


def conclude(kind: str, outcomes: Sequence[Outcome], left: Sequence[str]) -> int:
    """Print what became of one kind of work; how many failed."""
    failed = [outcome.key for outcome in outcomes if outcome.problems]
    total = len(outcomes) + len(left)
    print(f"{kind}: {len(outcomes)} of {total} compiled, {len(failed)} failed", flush=True)
    if failed:
        print("  failed: " + ", ".join(failed))
    if left:
        print(f"  no time left for {len(left)}: " + ", ".join(left))
    return len(failed)


def run(args: argparse.Namespace) -> int:
    """Do what the command line says; the exit status."""
    if args.again and not args.name:
        raise BuildError("--again goes with --name")
    matrix = load_matrix()
    cases = load_negatives(matrix)
    units = units_of(matrix)
    if args.list:
        print("\n".join([unit.key for unit in units] + sorted(cases)))
        return 0
    today = datetime.datetime.now(datetime.timezone.utc).date()
    seed = today.toordinal() if args.seed is None else args.seed
    budget = Budget(args.seconds)
    sample: list[Unit] = []
    if args.all:
        chosen = rotated(units, seed)
    elif args.name:
        chosen = [unit for unit in units if _matches(unit.key, args.name)]
        cases = {name: case for name, case in cases.items() if _matches(name, args.name)}
        if not chosen and not cases:
            raise BuildError(f"no name matches {args.name}; --list prints them")
    elif args.changed_since or args.sample:
        changed: list[Unit] = []
        if args.changed_since:
            changed, why = changed_units(units, matrix, args.changed_since)
            print(f"since {args.changed_since}: {why}")
        chosen, sample = choose(units, changed, args.sample, seed)
        print(
            f"seed {seed}: {len(chosen)} of {len(units)} changed, a sample of {len(sample)} of the rest",
            flush=True,
        )
    else:
        raise BuildError("nothing is selected: give --all, --name, --changed-since, --sample or --list")
    toolchain = find_toolchain()
    OUTPUT_DIR.mkdir(parents=True, exist_ok=True)
    refused, refused_left = run_all(negative_work(cases, matrix, toolchain), args.jobs, budget, 6.0)
    programs, left = run_all(unit_work([*chosen, *sample], toolchain), args.jobs, budget, 30.0)
    failed = conclude("forbidden programs and their controls", refused, refused_left)
    failed += conclude("programs", programs, left)
    if refused_left:
        print("the budget has to suffice for the forbidden programs", file=sys.stderr)
        failed += 1
    if args.again and programs:
        result = updated(programs, commit=_commit())
        write_summary(result)
        print(f"put into {write_result(result).name}")
    if args.all and (left or refused_left):
        print("not recorded: the budget cut the run short")
    elif args.all:
        result = result_of(
            programs,
            refused,
            date=today.isoformat(),
            commit=_commit(),
            tools=toolchain.versions,
            seconds=budget.elapsed(),
        )
        path = write_result(result)
        write_summary(result)
        print(f"recorded in {path.name}")
    print(f"{budget.elapsed():.0f} s in all")
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="the whole matrix, and record the result")
    which.add_argument("--name", action="append", default=[], metavar="PATTERN", help="names like this")
    which.add_argument("--changed-since", metavar="REV", help="what differs from git REV")
    which.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument(
        "--sample", type=int, default=0, metavar="N", help="N others, and one of every other kind"
    )
    parser.add_argument(
        "--again", action="store_true", help="with --name: put the results into the last record"
    )
    parser.add_argument("--seed", type=int, help="where order and sample start (default: the day's number)")
    parser.add_argument("--seconds", type=float, metavar="BUDGET", help="start nothing that would end later")
    parser.add_argument("--jobs", type=int, default=2, help="compiles at a time (default 2)")
    try:
        return run(parser.parse_args(arguments))
    except BuildError as error:
        print(f"compile_tests.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
