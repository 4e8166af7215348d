#!/usr/bin/env python3
"""cuTensorMapEncodeTiled: what the driver takes and refuses against what the emulator does.

    python tests/gpu/twins/encoding.py [--seed N] [--count N] [--out FOLDER] [--replay FILE]

Legal argument sets, and sets with one to three arguments changed to values at the edges of their rules. Where
the two disagree, changes are taken back as long as they still do, so that a disagreement is reported by what
causes it. Values that only later devices have are counted apart and decide nothing. `--replay` takes the
driver's answers from an encoding.json, as long as the same sets are drawn, and needs no driver.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path[:0] = [str(ROOT / "runtime"), str(ROOT / "tests"), str(ROOT / "tests/gpu")]

from twins.libcuda import Cuda  # noqa: E402

from emulated.copies import encode_cases  # noqa: E402


def driver_of_this_machine() -> tuple[int, Callable[[dict], bool]]:
    """A device address, and whether the driver takes a set of arguments."""
    cuda = Cuda()
    address = cuda.allocate(1 << 16)
    memory = ctypes.create_string_buffer(256)
    at = -(-ctypes.addressof(memory) // 64) * 64

    def takes(arguments: dict) -> bool:
        assert len(memory) == 256  # kept alive: the map is written there
        where = 0 if arguments["null"] else address + arguments["shift"]
        return cuda.encode_status(where, arguments, at=at) == 0

    return address, takes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=30000)
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--replay", help="an encoding.json instead of a driver")
    options = parser.parse_args()
    start = time.monotonic()
    held = json.loads(Path(options.replay).read_text(encoding="utf-8")) if options.replay else None
    if held:
        options.seed, options.count = held["seed"], held["count"]
        address, driver = 1 << 40, None
    else:
        address, driver = driver_of_this_machine()
    answers, drawn = [], hashlib.sha256()
    rng = random.Random(options.seed)
    tally: Counter = Counter()
    causes: dict[str, dict] = {}
    for number in range(options.count):
        base, changes = encode_cases.draw(rng)
        arguments = encode_cases.applied(base, changes)
        drawn.update(json.dumps(arguments).encode())
        theirs = driver(arguments) if driver else held["answers"][number] == "1"
        answers.append("01"[theirs])
        ours, reason = encode_cases.accepts(arguments, address)
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

        for change in list(changes) if driver else []:
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
    if held and held["drawn"] != drawn.hexdigest():
        sys.exit("encoding: other sets are drawn now than those that were answered")
    differ = sum(cause["count"] for cause in causes.values() if not cause["later"])
    for key, cause in sorted(causes.items(), key=lambda item: -item[1]["count"]):
        print(f"{cause['count']:6}  {key}")
        for example in cause["examples"]:
            print(f"          {json.dumps(example, default=str)[:700]}")
    Path(options.out, "encoding.json").write_text(
        json.dumps(
            {
                "seed": options.seed,
                "count": options.count,
                "tally": tally,
                "causes": causes,
                "answers": "".join(answers),
                "drawn": drawn.hexdigest(),
            },
            indent=1,
            default=str,
        )
        + "\n",
        encoding="utf-8",
    )
    print(f"encoding: {dict(tally)}, {time.monotonic() - start:.0f} s")
    return 0 if not differ else 1


if __name__ == "__main__":
    sys.exit(main())
