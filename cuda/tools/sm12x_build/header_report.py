"""Writing down what a run over the whole matrix found: a JSON file with every instantiation, a summary."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import ROOT, BuildError
from .header_compile import FLAGS, LEVELS, SHELL_SPILL_BYTES, Outcome
from .header_matrix import TESTS_DIR

RESULTS_DIR = TESTS_DIR / "results"
README = TESTS_DIR / "README.md"


def result_of(
    outcomes: Sequence[Outcome],
    negatives: Sequence[Outcome],
    *,
    date: str,
    commit: str,
    tools: dict[str, str],
    seconds: float,
) -> dict[str, Any]:
    """The record of one full run."""
    return {
        "date": date,
        "commit": commit,
        "toolchain": tools,
        "nvcc_flags": list(FLAGS),
        "ptxas_levels": list(LEVELS),
        "seconds": round(seconds),
        "instantiations": {
            outcome.key: _record(outcome) for outcome in sorted(outcomes, key=lambda outcome: outcome.key)
        },
        "refused": {
            outcome.key: {"seconds": round(outcome.seconds, 1), "problems": outcome.problems}
            for outcome in sorted(negatives, key=lambda outcome: outcome.key)
        },
    }


def _record(outcome: Outcome) -> dict[str, Any]:
    return {**outcome.facts, "seconds": round(outcome.seconds, 1), "problems": outcome.problems}


def updated(outcomes: Sequence[Outcome], *, commit: str, folder: Path = RESULTS_DIR) -> dict[str, Any]:
    """The last record with ``outcomes`` in place of what it says of them; each says at which commit.

    Raises BuildError where there is no record, or none of an instantiation.
    """
    files = sorted(folder.glob("*_matrix.json"))
    if not files:
        raise BuildError(f"there is no record in {folder}: run --all first")
    result: dict[str, Any] = json.loads(files[-1].read_text())
    for outcome in outcomes:
        if outcome.key not in result["instantiations"]:
            raise BuildError(f"the last record has no {outcome.key}: run --all")
        result["instantiations"][outcome.key] = {**_record(outcome), "compiled_again": commit}
    return result


def write_result(result: dict[str, Any], folder: Path = RESULTS_DIR) -> Path:
    """Write the record; the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['date']}_matrix.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def _span(values: Sequence[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def summary(result: dict[str, Any]) -> str:
    """The record in a few lines of Markdown."""
    records = result["instantiations"]
    measured = {key: record for key, record in records.items() if "O3" in record}
    failed = sorted(key for key, record in records.items() if record["problems"])
    again = sorted(key for key, record in records.items() if "compiled_again" in record)
    refused = result["refused"]
    wrong = sorted(key for key, record in refused.items() if record["problems"])
    groups: dict[str, list[dict[str, Any]]] = {}
    for key, record in measured.items():
        groups.setdefault(key.partition("@")[2] or "sm_120a", []).append(record)
    tools = ", ".join(f"{name} {version}" for name, version in sorted(result["toolchain"].items()))
    lines = [
        f"Run on {result['date']}, {result['commit']}, {tools}: {len(records) - len(failed)} of "
        f"{len(records)} compile and keep the rules, {len(refused) - len(wrong)} of {len(refused)} "
        f"forbidden ones and controls end as they should, in {result['seconds']} s."
        + (f" Compiled again since, as the record says: {_listed(again)}." if again else ""),
        "",
        "| kind | programs | registers | shared memory | stages | spill stores, bytes (-O3 / -O2) "
        "| local memory in main loops (-O3 / -O2) | in loops over tiles (-O3 / -O2) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, group in sorted(groups.items()):
        spills = " / ".join(_span([one[level]["spill_store_bytes"] for one in group]) for level in LEVELS)
        main = " / ".join(_span([one[level]["local_in_main_loop"] for one in group]) for level in LEVELS)
        tiles = " / ".join(_span([one[level]["local_in_mma_loops"] for one in group]) for level in LEVELS)
        registers = _span([one[level]["registers"] for one in group for level in LEVELS])
        shared = _span([one["shared_memory"] for one in group])
        stages = _span([one["stages"] for one in group])
        lines.append(
            f"| {name} | {len(group)} | {registers} | {shared} | {stages} | {spills} | {main} | {tiles} |"
        )
    beyond = sorted(
        key for key, record in measured.items() if record["O3"]["spill_store_bytes"] > SHELL_SPILL_BYTES
    )
    lines += ["", f"Spill stores beyond {SHELL_SPILL_BYTES} bytes at -O3: {_listed(beyond)}."]
    lines += [f"Failed: {_listed(failed + wrong)}."]
    return "\n".join(lines) + "\n"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) if names else "none"


def replace_marked(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between its markers ``name``. Raises BuildError where it has not one pair of
    them.
    """
    begin, end = markers(name)
    pattern = re.compile(re.escape(begin) + r"\n.*?" + re.escape(end), re.DOTALL)
    if text.count(begin) != 1 or text.count(end) != 1 or not pattern.search(text):
        raise BuildError(f"expected one pair of markers {begin} {end}")
    return pattern.sub(lambda _: f"{begin}\n{content}{end}", text)


def markers(name: str) -> tuple[str, str]:
    """The lines between which a tool writes."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def write_summary(result: dict[str, Any], path: Path = README) -> None:
    """Put the summary into tests/cuda/README.md."""
    if not path.is_file():
        raise BuildError(f"there is no {path.relative_to(ROOT)}")
    path.write_text(replace_marked(path.read_text(), "matrix", summary(result)))
