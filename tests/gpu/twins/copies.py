#!/usr/bin/env python3
"""Asynchronous copies on the GPU and on the emulator, byte for byte.

    python tests/gpu/twins/copies.py [--seed N] [--out FOLDER] [--jobs N] [--only FAMILY,...]

Prints a table by family, what differs with the case that shows it, and what the map from shared to global
memory was there. Writes copies.json, and copies_hardware.pkl.xz with everything that the GPU gave, from which
`--replay FILE` compares again without one. The exit status is 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import pickle
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path[:0] = [str(ROOT / "runtime"), str(ROOT / "tests"), str(ROOT / "tests/gpu")]

import numpy as np  # noqa: E402
from twins import hardware  # noqa: E402

from emulated.copies import generate, on_emulator  # noqa: E402
from emulated.copies.case import Case, Outcome  # noqa: E402
from emulated.copies.sample import parts_of  # noqa: E402

SHOWN = 3  # differences of a family that are printed in full
PROCESSES = 10  # that share the GPU
DOUBTFUL_PART = 4  # cases of a doubtful batch that one process begins with
ADDRESSABLE = 4  # bytes by which a difference is looked up in the tensor


def difference(case: Case, emulated: Outcome, real: Outcome) -> dict | None:
    """Where the two sides part; None where they do not."""
    if emulated.error or real.error:
        if emulated.error and real.error and "CUDA_ERROR" in real.error:
            return None  # both refuse
        side = "the emulator refuses" if emulated.error else "the GPU refuses"
        return {"what": side, "emulator": emulated.error, "gpu": real.error}
    ours, theirs = (np.frombuffer(side.arena or b"", np.uint8) for side in (emulated, real))
    wrong = np.flatnonzero(ours != theirs)
    if not len(wrong):
        return None
    counts = {}
    for name, begin, end in parts_of(case):
        inside = wrong[(wrong >= begin) & (wrong < end)]
        if len(inside):
            at = int(inside[0])
            counts[name] = {
                "bytes": len(inside),
                "first": at - begin - (case.map.offset if case.map and name == "tensor" else 0),
                "emulator": ours[at : at + 16].tobytes().hex(),
                "gpu": theirs[at : at + 16].tobytes().hex(),
                "before": case.arena()[at : at + 16].tobytes().hex(),
            }
    what = "other bytes in " + " and ".join(counts)
    return {"what": what, "parts": counts, "raw": hex(real.raw) if real.raw is not None else None}


def provenance(case: Case, outcome: Outcome) -> list[str]:
    """For each run of shared memory that a load changed, where in the tensor its bytes came from."""
    if outcome.arena is None or case.map is None:
        return []
    before, after = case.arena(), np.frombuffer(outcome.arena, np.uint8)
    shared_in, shared_out = case.places[0], case.places[1]
    tensor = before[: case.region].tobytes()
    unit = ADDRESSABLE
    found: list[tuple[int, int | str, int]] = []
    for at in range(0, case.dump, unit):
        now = after[shared_out + at : shared_out + at + unit].tobytes()
        if now == before[shared_in + at : shared_in + at + unit].tobytes():
            continue
        source = tensor.find(now)
        origin = source - case.map.offset if source >= 0 else now.hex()
        last = found[-1] if found else None
        if (
            last
            and last[0] + last[2] == at
            and (
                last[1] == origin
                if isinstance(origin, str)
                else isinstance(last[1], int) and last[1] + last[2] == origin
            )
        ):
            found[-1] = (last[0], last[1], last[2] + unit)
        else:
            found.append((at, origin, unit))
    return [f"{to - case.offset}..{to - case.offset + n - 1} <- {origin}" for to, origin, n in found[:48]]


def emulate(batches: dict[str, list[Case]], jobs: int) -> dict[str, list[Outcome]]:
    chunks = [
        (name, i, cases[i : i + 40]) for name, cases in batches.items() for i in range(0, len(cases), 40)
    ]
    found: dict[str, list[Outcome]] = {name: [Outcome()] * len(cases) for name, cases in batches.items()}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for (name, i, cases), outcomes in zip(
            chunks, pool.map(on_emulator.run_all, [c for *_, c in chunks]), strict=True
        ):
            found[name][i : i + len(cases)] = outcomes
    return found


def on_gpu(batches: dict[str, list[Case]], seconds: float) -> dict[str, list[Outcome]]:
    """Batches side by side, those behind each other that are likely to fail: they start last, in small parts,
    so that what they cost is waited for by nobody."""
    until = time.monotonic() + seconds
    with ThreadPoolExecutor(PROCESSES) as pool:
        jobs = {}
        for name in sorted(batches, key=lambda name: name in generate.DOUBTFUL):
            cases = batches[name]
            size = DOUBTFUL_PART if name in generate.DOUBTFUL else len(cases) or 1
            parts = [cases[i : i + size] for i in range(0, len(cases), size)]
            jobs[name] = [pool.submit(hardware.run, part, until) for part in parts]
        return {name: [outcome for job in jobs[name] for outcome in job.result()] for name in batches}


def report(batches: dict, emulated: dict, real: dict) -> dict:
    families: dict[str, dict] = {}
    for name, cases in batches.items():
        for case, ours, theirs in zip(cases, emulated[name], real[name], strict=True):
            row = families.setdefault(case.family, {"cases": 0, "equal": 0, "causes": Counter(), "shown": []})
            row["cases"] += 1
            wrong = difference(case, ours, theirs)
            if wrong is None:
                row["equal"] += 1
                continue
            row["causes"][
                wrong["what"]
                if "refuse" not in wrong["what"]
                else f"{wrong['what']}: {wrong['emulator'] or wrong['gpu']}"[:200]
            ] += 1
            if len(row["shown"]) < SHOWN:
                shown = {"case": case.described(), **wrong}
                if "load" in case.kernel or "replace" in case.kernel:
                    shown["gpu_sources"] = provenance(case, theirs)
                    shown["emulator_sources"] = provenance(case, ours)
                row["shown"].append(shown)
    return families


def print_report(families: dict) -> None:
    width = max(len(name) for name in families)
    print(f"{'family':<{width}}  cases  equal  what differs")
    for name, row in families.items():
        causes = "; ".join(f"{count}x {cause}" for cause, count in row["causes"].most_common(4))
        print(f"{name:<{width}}  {row['cases']:5}  {row['equal']:5}  {causes}")
    for name, row in families.items():
        for shown in row["shown"]:
            print(f"\n{name}: {json.dumps(shown, default=str)[:2500]}")


def row_ends_table(batches: dict, real: dict) -> list[str]:
    """What a write does behind the end of a row: the bytes between the extent and the next multiple of 16,
    how many of them the box has, and which are written."""
    tally: Counter = Counter()
    for case, outcome in zip(batches.get("row_ends", []), real.get("row_ends", []), strict=True):
        m = case.map
        if outcome.arena is None or case.family.startswith("load") or not 0 <= case.coords[1] < m.dims[1]:
            continue
        extent, start = m.dims[0] * m.item, case.coords[0] * m.item
        rest = -extent % 16
        covered = max(0, min(start + m.box[0] * m.item - extent, rest)) if start < extent + rest else 0
        begin = m.offset + case.coords[1] * m.strides[0]
        before, after = case.arena(), np.frombuffer(outcome.arena, np.uint8)
        changed = np.flatnonzero(before[begin : begin + 128] != after[begin : begin + 128])
        past = [int(i) - extent for i in changed if extent <= i < m.strides[0]]
        # Of 256 bytes written one is what it was.
        written = "none" if not past else "all" if past[-1] + 2 >= covered else f"to {past[-1] + 1}"
        written += " and behind" if past and past[-1] >= rest else ""
        tally[case.family, rest, covered, written] += 1
    return [
        f"{count:5}  {family}: {rest:2} bytes to the next 16, {covered:2} of them boxed, {written} written"
        for (family, rest, covered, written), count in sorted(tally.items())
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--only", default="", help="families of generate.FAMILIES, by comma")
    parser.add_argument("--seconds", type=float, default=150, help="for the GPU's side")
    parser.add_argument("--replay", help="a copies_hardware.pkl.xz instead of a GPU")
    options = parser.parse_args()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    names = [name for name in options.only.split(",") if name] or list(generate.FAMILIES)
    if options.replay:
        batches, real = held_in(Path(options.replay))
    else:
        batches = {name: generate.batch(name, options.seed) for name in names}
        real = on_gpu(batches, options.seconds)
    seconds_gpu = time.monotonic() - start
    emulated = emulate(batches, options.jobs)
    families = report(batches, emulated, real)
    print_report(families)
    ends = row_ends_table(batches, real)
    print("\nBytes behind a row's extent, by cases:")
    print("\n".join(ends))
    cases = sum(row["cases"] for row in families.values())
    equal = sum(row["equal"] for row in families.values())
    summary = {"seed": options.seed, "cases": cases, "equal": equal, "row_ends": ends, "families": families}
    (out / "copies.json").write_text(json.dumps(summary, indent=1, default=str) + "\n", encoding="utf-8")
    if not options.replay:
        packed = {
            name: [_packed(c, o) for c, o in zip(batches[name], real[name], strict=True)] for name in batches
        }
        content = pickle.dumps({"batches": batches, "real": packed})
        (out / "copies_hardware.pkl.xz").write_bytes(lzma.compress(content, preset=1))
    seconds = time.monotonic() - start
    print(
        f"copies: {equal} of {cases} cases equal byte for byte, {seconds:.0f} s "
        f"({seconds_gpu:.0f} s on the GPU)"
    )
    return 0 if equal == cases else 1


def held_in(path: Path) -> tuple[dict[str, list[Case]], dict[str, list[Outcome]]]:
    """Cases and what the GPU made of them, from a copies_hardware.pkl.xz."""
    held = pickle.loads(lzma.decompress(path.read_bytes()))
    batches = held["batches"]
    real = {
        name: [_whole(case, *packed) for case, packed in zip(batches[name], held["real"][name], strict=True)]
        for name in batches
    }
    return batches, real


def _packed(case: Case, outcome: Outcome) -> tuple:
    """An outcome less what the case itself says; mostly zeros."""
    if outcome.arena is None:
        return None, outcome.error, outcome.raw
    before = _baseline(case)
    return (before ^ np.frombuffer(outcome.arena, np.uint8)).tobytes(), None, outcome.raw


def _whole(case: Case, delta: bytes | None, error: str | None, raw: int | None) -> Outcome:
    if delta is None:
        return Outcome(error=error, raw=raw)
    return Outcome((_baseline(case) ^ np.frombuffer(delta, np.uint8)).tobytes(), raw=raw)


def _baseline(case: Case) -> np.ndarray:
    found = case.arena()
    first, second, _, _ = case.places
    found[second : second + case.dump] = found[first : first + case.dump]
    return found


if __name__ == "__main__":
    sys.exit(main())
