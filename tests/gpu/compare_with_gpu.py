#!/usr/bin/env python3
"""Runs every single-instruction form of `instructions` on the GPU and on the emulator, and compares the
results.

    python tests/gpu/compare_with_gpu.py [--json FILE] [--count 4096] [--seed 1] [--only TEXT] [--workers N]

Prints a table of families and every form that differs, with the operands and both results of the first
difference. The exit status is 1 where a form differs, fails, or is refused by the driver's compiler.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "runtime")]

from gpu.instructions import compare, on_device, on_emulator, operands, tables  # noqa: E402
from gpu.instructions.forms import Form, width  # noqa: E402

GROUP = 32  # forms of one module


@dataclass
class Row:
    """The outcome of one form. `problem`: why there are no results."""

    family: str
    name: str
    compared: int = 0
    mismatches: int = 0
    worst: float = 0.0
    nan_payloads: int = 0
    examples: tuple[str, ...] = ()
    problem: str = ""

    @property
    def passed(self) -> bool:
        return not self.mismatches and not self.problem and self.compared > 0


@dataclass(frozen=True)
class Group:
    """Forms that run together, with `count` operands each. Processes give each other names: the forms
    themselves hold functions.
    """

    family: str
    count: int
    names: tuple[str, ...]

    @property
    def forms(self) -> list[Form]:
        return [form for form in tables.forms(self.family) if form.name in self.names]


def groups(only: str, count: int) -> Iterator[Group]:
    """The forms in modules of GROUP, those of one operand of 16 bits with all of its values."""
    for family in tables.FAMILIES:
        chosen = [form for form in tables.forms(family) if only in f"{family} {form.name}"]
        every = [form for form in chosen if [width(kind) for kind in form.operands] == [16]]
        rest = [form for form in chosen if form not in set(every)]
        for size, members, step in ((1 << 16, every, GROUP // 4), (count, rest, GROUP)):
            for at in range(0, len(members), step):
                yield Group(family, size, tuple(form.name for form in members[at : at + step]))


def emulate(group: Group, seed: int) -> tuple[list[list[Any] | str], float]:
    """In a process of its own: the results of each form, or what the emulator says against it."""
    start = time.monotonic()
    found: list[list[Any] | str] = []
    for form in group.forms:
        try:
            columns = operands.generate(form, group.count, seed)
            found += on_emulator.run([form], [columns], group.count)
        except Exception as error:  # the other forms are to run on
            found.append(f"emulator: {type(error).__name__}: {error}")
    return found, time.monotonic() - start


def judge(group: Group, form: Form, seed: int, device: Any, emulator: Any) -> Row:
    """One form's row of the report."""
    row = Row(group.family, form.name)
    for found in (device, emulator):
        if isinstance(found, str):
            row.problem = found
            return row
    columns = operands.generate(form, group.count, seed)
    outcome = compare.compare(form, columns, device, emulator)
    row.compared, row.mismatches, row.examples = outcome.compared, outcome.mismatches, outcome.examples
    row.worst, row.nan_payloads = outcome.worst, outcome.nan
    return row


@dataclass
class OnDevice:
    """What a process with the device came to: `results` of the groups that it got through, in order."""

    name: str
    capability: tuple[int, int]
    results: list[list[Any]]
    error: str = ""


def run_on_device(work: Sequence[Group], seed: int) -> OnDevice:
    """In a process of its own: groups up to the first whose kernels fail, after which nothing runs there."""
    device = on_device.Device()
    done = OnDevice(device.name, device.capability, [])
    for group in work:
        columns = [operands.generate(form, group.count, seed) for form in group.forms]
        try:
            found = device.run(group.forms, columns, group.count)
        except on_device.DeviceError as error:
            done.error = f"device: {error}"
            return done
        done.results.append([str(x) if isinstance(x, on_device.DeviceError) else x for x in found])
    return done


def all_on_device(work: Sequence[Group], seed: int) -> tuple[OnDevice, dict[str, Any]]:
    """The results by the names of forms. A group that fails is run again form by form, each in a new process,
    so that one bad form is one line of the report.
    """
    left, found = list(work), {}
    while left:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            done = pool.submit(run_on_device, left, seed).result()
        for group, results in zip(left, done.results, strict=False):
            found.update(zip(group.names, results, strict=True))
        left = left[len(done.results) :]
        if done.error:
            group = left.pop(0)
            if len(group.names) == 1:
                found[group.names[0]] = done.error
            else:
                left[:0] = [Group(group.family, group.count, (name,)) for name in group.names]
    return done, found


def table(rows: Sequence[Row]) -> str:
    """A line for each family."""
    lines = [
        f"{'family':<16} {'forms':>6} {'results':>10} {'mismatches':>10} {'forms failed':>12} {'worst':>7}"
    ]
    for family in tables.FAMILIES:
        mine = [row for row in rows if row.family == family]
        if mine:
            bad = sum(not row.passed for row in mine)
            totals = sum(row.compared for row in mine), sum(row.mismatches for row in mine)
            worst = max(row.worst for row in mine)
            lines.append(f"{family:<16} {len(mine):6} {totals[0]:10} {totals[1]:10} {bad:12} {worst:7.3f}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="file for the results of every form")
    parser.add_argument("--count", type=int, default=4096, help="operands of each form (a multiple of 128)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="forms whose family and name contain this")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.count < 128 or options.count % 128:
        parser.error("--count: expected a multiple of 128")
    work = sorted(groups(options.only, options.count), key=lambda group: -group.count)
    if not work:
        parser.error(f"--only {options.only}: there is no such form")
    start = time.monotonic()
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")  # a fork would share the driver
    rows: list[Row] = []
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        jobs = [pool.submit(emulate, group, options.seed) for group in work]
        device, results = all_on_device(work, options.seed)
        device_seconds = time.monotonic() - start
        emulator_seconds = 0.0
        for group, job in zip(work, jobs, strict=True):
            emulated, seconds = job.result()
            emulator_seconds += seconds
            for form, found in zip(group.forms, emulated, strict=True):
                rows.append(judge(group, form, options.seed, results[form.name], found))
    failed = [row for row in rows if not row.passed]
    for row in failed:
        print(f"{row.family}: {row.name}: {row.problem or f'{row.mismatches} of {row.compared} differ'}")
        if row.examples:
            print(f"    {row.examples[0]}")
    print(table(rows))
    summary = {
        "device": device.name,
        "capability": device.capability,
        "seed": options.seed,
        "forms": len(rows),
        "results": sum(row.compared for row in rows),
        "failed": len(failed),
        "seconds": round(time.monotonic() - start, 1),
        "device_seconds": round(device_seconds, 1),
        "emulator_core_seconds": round(emulator_seconds, 1),
    }
    if options.json:
        content = {**summary, "rows": [asdict(row) for row in rows]}
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    words = f"{summary['forms']} forms, {summary['results']} results, {summary['failed']} forms failed, "
    words += f"{summary['seconds']} s ({device_seconds:.0f} s on the device)"
    print(f"{device.name}, seed {options.seed}: {words}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
