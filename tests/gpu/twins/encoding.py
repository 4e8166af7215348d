#!/usr/bin/env python3
"""cuTensorMapEncodeTiled: what the driver takes and refuses against what the emulator does.

    python tests/gpu/twins/encoding.py [--seed N] [--count N] [--out FOLDER]

Legal argument sets, and sets with one to three arguments changed to values at the edges of their rules. Where
the two disagree, changes are taken back as long as they still do, so that a disagreement is reported by what
causes it. Values that only later devices have are counted apart and decide nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path[:0] = [str(ROOT / "runtime"), str(ROOT / "tests"), str(ROOT / "tests/gpu")]

from twins.libcuda import Cuda  # noqa: E402

from emulated.copies import encode_cases  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=30000)
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    options = parser.parse_args()
    start = time.monotonic()
    cuda = Cuda()
    address = cuda.allocate(1 << 16)
    import ctypes

    memory = ctypes.create_string_buffer(256)
    at = -(-ctypes.addressof(memory) // 64) * 64

    def driver(arguments: dict) -> bool:
        return (
            cuda.encode_status(address + arguments["shift"] if not arguments["null"] else 0, arguments, at=at)
            == 0
        )

    rng = random.Random(options.seed)
    tally: Counter = Counter()
    causes: dict[str, dict] = {}
    for _ in range(options.count):
        base, changes = encode_cases.draw(rng)
        arguments = encode_cases.applied(base, changes)
        theirs, (ours, reason) = driver(arguments), encode_cases.accepts(arguments, address)
        later = encode_cases.of_later_devices(arguments)
        tally[
            "later devices"
            if later
            else "accepted by both"
            if theirs and ours
            else "refused by both"
            if not theirs and not ours
            else "differ"
        ] += 1
        if theirs == ours:
            continue

        def still(subset: list) -> bool:
            tried = encode_cases.applied(base, subset)  # noqa: B023
            return driver(tried) == theirs and encode_cases.accepts(tried, address)[0] == ours  # noqa: B023

        for change in list(changes):
            fewer = [each for each in changes if each is not change]
            if still(fewer):
                changes = fewer
        arguments = encode_cases.applied(base, changes)
        ours, reason = encode_cases.accepts(arguments, address)
        side = (
            "the driver takes it, the emulator refuses"
            if theirs
            else "the driver refuses, the emulator takes it"
        )
        what = (
            (reason or "").split(":")[0]
            if theirs
            else ", ".join(sorted(name for name, *_ in changes)) or "a legal set"
        )
        key = f"{'later devices: ' if later else ''}{side}: {what}"
        cause = causes.setdefault(key, {"count": 0, "later": later, "examples": []})
        cause["count"] += 1
        if len(cause["examples"]) < 6:
            cause["examples"].append({"changes": changes, "arguments": arguments, "emulator": reason})
    differ = sum(cause["count"] for cause in causes.values() if not cause["later"])
    for key, cause in sorted(causes.items(), key=lambda item: -item[1]["count"]):
        print(f"{cause['count']:6}  {key}")
        for example in cause["examples"]:
            print(f"          {json.dumps(example, default=str)[:700]}")
    Path(options.out, "encoding.json").write_text(
        json.dumps({"seed": options.seed, "tally": tally, "causes": causes}, indent=1, default=str) + "\n",
        encoding="utf-8",
    )
    print(f"encoding: {dict(tally)}, {time.monotonic() - start:.0f} s")
    return 0 if not differ else 1


if __name__ == "__main__":
    sys.exit(main())
