#!/usr/bin/env python3
"""Makes tests/emulated/copies/hardware.json of a run's results: what CI holds the emulator to.

    python tests/gpu/twins/sample.py copies_hardware.pkl.xz encoding.json [--out FILE] [--each N] [--sets N]

Some cases of each family, with digests of what the GPU made of them, and argument sets of
cuTensorMapEncodeTiled with the driver's answers. The sets are drawn again, as they were for the run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path[:0] = [str(ROOT / "runtime"), str(ROOT / "tests"), str(ROOT / "tests/gpu")]

from twins import copies  # noqa: E402

from emulated.copies import encode_cases  # noqa: E402
from emulated.copies.sample import row_of  # noqa: E402


def cases_of(batches: dict, real: dict, each: int) -> list[dict]:
    """`each` cases of every family, the small ones of three times as many."""
    by_family: dict[str, list] = {}
    for name, cases in batches.items():
        for case, outcome in zip(cases, real[name], strict=True):
            if outcome.error is None or "CUDA_ERROR" in outcome.error:
                by_family.setdefault(case.family, []).append((case, outcome))
    rows = []
    for family, found in by_family.items():
        drawn = random.Random(family).sample(found, min(len(found), 3 * each))
        drawn.sort(key=lambda item: item[0].places[3])
        rows += [row_of(case, outcome.arena) for case, outcome in drawn[:each]]
    return rows


def sets_of(encoding: dict, count: int) -> list[list]:
    """[arguments, whether the driver takes them], as many of either answer; none of later devices."""
    rng, drawn = random.Random(encoding["seed"]), hashlib.sha256()
    found: dict[str, list] = {"0": [], "1": []}
    for number in range(encoding["count"]):
        arguments = encode_cases.applied(*encode_cases.draw(rng))
        drawn.update(json.dumps(arguments).encode())
        if not encode_cases.of_later_devices(arguments):
            found[encoding["answers"][number]].append(arguments)
    if drawn.hexdigest() != encoding["drawn"]:
        sys.exit("sample: other sets are drawn now than those that were answered")
    return [[each, answer == "1"] for answer in "01" for each in found[answer][: count // 2]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("copies")
    parser.add_argument("encoding")
    parser.add_argument("--out", default=str(ROOT / "tests/emulated/copies/hardware.json"))
    parser.add_argument("--each", type=int, default=4)
    parser.add_argument("--sets", type=int, default=300)
    parser.add_argument("--device", default="", help="device and driver, for the file")
    options = parser.parse_args()
    batches, real = copies.held_in(Path(options.copies))
    encoding = json.loads(Path(options.encoding).read_text(encoding="utf-8"))
    rows, sets = cases_of(batches, real, options.each), sets_of(encoding, options.sets)
    lines = [
        f'{{"device": {json.dumps(options.device)},',
        '"cases": [\n' + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "\n],",
        '"sets": [\n' + ",\n".join(json.dumps(each, separators=(",", ":")) for each in sets) + "\n]}",
    ]
    Path(options.out).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"sample: {len(rows)} cases, {len(sets)} sets, {Path(options.out).stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
