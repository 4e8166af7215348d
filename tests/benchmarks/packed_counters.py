"""Counters and floors of the packed kernels on SM12x devices, without one: counted in the emulator, and
for the shapes of models derived from there by counting tiles.

    python tests/benchmarks/packed_counters.py [--out FOLDER]

Writes DATE_packed_counters.json and .md. Needs no GPU; a minute and a half.

Counted, by emulating the shipped sm_120a PTX, with every result compared with float64:
  bank conflicts, TMA bytes of full tiles, MMAs of one group of 1 to 128 rows, and the instructions of a CTA,
  a tile and a k-tile that surely take an issue slot.
Derived (kernel_work.py; tests/emulated/test_counters_packed.py holds it against the emulator):
  MMAs, bytes and issue slots of calls on the models' shapes, and of the family fp8_ptr_array likewise.
A floor is what the emulator's `floor_of` says: the longest of DRAM, tensor cores and issue slots, each busy
without a pause. It is a bound, no measurement: launches, latencies and pipeline fill are not in it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "runtime"), str(ROOT / "tests")]

from benchmarks import packed_report  # noqa: E402
from benchmarks.kernel_work import (  # noqa: E402
    PACKED,
    PTR_ARRAY,
    Call,
    Issue,
    derived_counters,
    even_rows,
    fit_issue,
    multiply_adds,
    tma_load_bytes,
)
from emulated.gemm_case import Case, Problem  # noqa: E402
from emulated.kernels import Machine  # noqa: E402
from emulated.packed_case import PackedCase  # noqa: E402
from sm12x import manifest  # noqa: E402
from sm12x.emulator.counting.counters import Counters  # noqa: E402
from sm12x.emulator.counting.floor import Floor, floor_of  # noqa: E402
from sm12x.emulator.devices import GPUS, Gpu  # noqa: E402
from sm12x.manifest import Variant  # noqa: E402
from sm12x.validation.shapes import MOE_GEMMS, ROUTINGS, MoeGemm, make_routing  # noqa: E402

DEVICES = ("rtx5090", "gb10")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
TOKENS = (*ROWS, 512, 2048, 8192)
USEFUL_N, USEFUL_K = 128, 704  # of the calls that useful fractions are counted of: the flagship's K tail
EVEN_SHAPE = MOE_GEMMS[0]
ASSUMED_PLAIN = 2  # times as long as the block-scaled MMA, as on GeForce, where nobody measured it


@dataclass(frozen=True)
class Counted:
    """What the emulator counted of one variant. `tma_over_least`: bytes that TMA asks for over those of the
    operands, in a full tile. `wavefronts_per_mma`: of ldmatrix in a full tile. `useful`: by rows of a group,
    the part of the multiply-adds that is the problem's; `agrees`: whether every count of multiply-adds was
    the derived one."""

    main_loop_conflicts: int
    conflicts: int
    tma_over_least: float
    wavefronts_per_mma: float
    useful: dict[int, float]
    agrees: bool
    issue: Issue


def emulate(variant: Variant, rows: tuple[int, ...], n: int, k: int, ctas: int) -> Counters:
    """Counters of one call. Raises RuntimeError where its result is wrong: counts of wrong work are
    worthless."""
    machine = Machine(counting=True)
    if variant.family == PACKED:
        packed = PackedCase(rows, n, k, 1)
        ratio = packed.error_ratio(packed.run(variant, ctas, machine=machine))
        found = packed.result.counters
    else:
        case = Case(Problem(rows, n, k), variant.out, 1)
        ratio = case.check(case.run(variant, ctas, machine=machine))
        found = case.result.counters
    if ratio > 1:
        raise RuntimeError(f"{variant.key}, rows {rows}, N {n}, K {k}: {ratio:.2f} of the tolerance")
    return found


def count(variant: Variant) -> Counted:
    """Emulate small calls on a variant."""
    token, feature, depth = variant.token_tile, variant.feature_tile, variant.tile[2]
    one = emulate(variant, (token,), feature, 2 * depth, 1)
    deeper = emulate(variant, (token,), feature, 5 * depth, 1)
    wider = emulate(variant, (token,), 2 * feature, 2 * depth, 1)
    seen = [one, deeper, wider]
    useful, agrees = {}, True
    for rows in ROWS:
        call = Call((rows,), USEFUL_N, USEFUL_K)
        found = emulate(variant, call.rows, call.n, call.k, 2)
        seen.append(found)
        useful[rows] = call.multiply_adds / found.multiply_adds
        agrees &= found.multiply_adds == multiply_adds(variant, call, 2)
    operands = (token + feature) * 5 * depth
    return Counted(
        main_loop_conflicts=sum(each.main_loop_conflicts for each in seen),
        conflicts=sum(access.conflicts for each in seen for access in each.shared_memory.values()),
        tma_over_least=deeper.copies["tma_load"].global_bytes / operands,
        wavefronts_per_mma=deeper.shared_memory["ldmatrix"].wavefronts / deeper.instructions["mma"],
        useful=useful,
        agrees=agrees,
        issue=fit_issue((2, 5), *(each.work.surely_issued for each in (one, deeper, wider))),
    )


def routed_calls(shape: MoeGemm, tokens: int) -> list[Call]:
    """The calls of a few random routings of so many tokens."""
    rng = np.random.default_rng(tokens)
    routings = [make_routing(shape, tokens, rng) for _ in range(ROUTINGS)]
    return [Call(tuple(np.diff(r.offsets).tolist()), shape.n, shape.k) for r in routings]


def plain_mma_us(floor: Floor) -> float:
    """MMA time of the same multiply-adds in the plain form; assumed where its rate is not known."""
    if floor.mma_plain_us is not None:
        return floor.mma_plain_us
    return ASSUMED_PLAIN * (floor.mma_us or 0.0)


def floors(variant: Variant, issue: Issue, calls: list[Call], gpu: Gpu) -> dict[str, Any]:
    """Means over calls, in microseconds, of a variant's floor and its terms, and of the floor that a
    plain-MMA build of the same tile would have: it differs in the MMA term alone."""
    found = [floor_of(derived_counters(variant, call, gpu.sm_count, issue), gpu) for call in calls]
    plain = [max(each.memory_us, plain_mma_us(each), each.issue_us) for each in found]
    terms = {
        name: float(np.mean([getattr(each, name) for each in found]))
        for name in ("floor_us", "memory_us", "mma_us", "issue_us")
    }
    binds = [each.binds for each in found]
    return {
        "variant": variant.key,
        **{name: round(value, 3) for name, value in terms.items()},
        "asked_of_l2": float(np.mean([tma_load_bytes(variant, call, gpu.sm_count) for call in calls])),
        "plain_floor_us": round(float(np.mean(plain)), 3),
        "binds": max(set(binds), key=binds.count),
    }


def best(choices: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the floors within a hundredth of the lowest, that of the kernel that asks L2 for the fewest bytes,
    of which a floor knows nothing."""
    lowest = min(each["floor_us"] for each in choices)
    close = [each for each in choices if each["floor_us"] <= 1.01 * lowest]
    return min(close, key=lambda each: (each["asked_of_l2"], each["mma_us"]))


def own_terms(calls: list[Call], gpu: Gpu) -> dict[str, Any]:
    """What the problem itself needs: its bytes once, its multiply-adds and no others."""
    clocks = gpu.sm_count * gpu.clock_ghz * 1e3
    rate = gpu.mma["block_scaled"].per_clock / 2
    memory = [(call.least_loaded + call.least_stored) / (gpu.dram_gbps * 1e3) for call in calls]
    mma = [call.multiply_adds / rate / clocks for call in calls]
    plain = gpu.mma["plain"].per_clock / 2 if "plain" in gpu.mma else rate / ASSUMED_PLAIN
    return {
        "memory_us": float(np.mean(memory)),
        "mma_us": float(np.mean(mma)),
        "mma_plain_us": float(np.mean([call.multiply_adds / plain / clocks for call in calls])),
        "bound": "MMA" if np.mean(mma) > np.mean(memory) else "memory",
    }


def row_of(name: str, calls: list[Call], variants: dict[str, Variant], issues: dict[str, Issue]) -> Any:
    """Floors of a problem on each device: the best variant of either family, the packed one that would be
    the best with the plain MMA, and all of them by their keys.
    """
    active = float(np.mean([call.active for call in calls]))
    row: dict[str, Any] = {
        "name": name,
        "active_experts": active,
        "rows_per_active_expert": calls[0].total_rows / active,
        "least_megabytes": float(np.mean([c.least_loaded + c.least_stored for c in calls])) / 1e6,
    }
    for key in DEVICES:
        gpu = GPUS[key]
        found = {
            family: [
                floors(variant, issues[variant.key], calls, gpu)
                for variant in variants.values()
                if variant.family == family
            ]
            for family in (PACKED, PTR_ARRAY)
        }
        row[key] = {
            "problem": own_terms(calls, gpu),
            PACKED: best(found[PACKED]),
            PTR_ARRAY: best(found[PTR_ARRAY]),
            "plain": min(found[PACKED], key=lambda each: each["plain_floor_us"]),
            "all": {
                each["variant"]: round(each["floor_us"], 3) for family in found.values() for each in family
            },
            "all_plain": {each["variant"]: round(each["plain_floor_us"], 3) for each in found[PACKED]},
        }
    return row


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "no git history"


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder (default: results/)")
    args = parser.parse_args(arguments)
    held = manifest.default()
    variants = {
        each.key: each
        for family in (PACKED, PTR_ARRAY)
        for each in sorted(
            held.gemms(family), key=lambda v: (not v.swap_ab, -v.tile[2], v.tile[1], v.tile[0])
        )
        if "bfloat16" in each.outs
    }
    counted = {}
    for key, variant in variants.items():
        counted[key] = count(variant)
        print(f"counted {key}", flush=True)
    issues = {key: each.issue for key, each in counted.items()}
    even = [
        row_of(
            str(rows),
            [Call(even_rows(EVEN_SHAPE.experts, rows), EVEN_SHAPE.n, EVEN_SHAPE.k)],
            variants,
            issues,
        )
        for rows in ROWS
    ]
    shapes = [
        {"T": tokens, **row_of(shape.name, routed_calls(shape, tokens), variants, issues)}
        for shape in MOE_GEMMS
        for tokens in TOKENS
    ]
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit(),
        "command": "python tests/benchmarks/packed_counters.py",
        "toolchain": dict(held.toolchain),
        "sources_sha256": sorted(
            {v.targets["sm_120a"].ptx["sources_sha256"] for v in variants.values() if v.family == PACKED}
        ),
        "rates": {key: asdict(GPUS[key]) for key in DEVICES},
        "assumed_plain": f"where nobody measured it: {ASSUMED_PLAIN} times the block-scaled MMA's time",
        "useful_shape": {"groups": 1, "n": USEFUL_N, "k": USEFUL_K},
        "even_shape": asdict(EVEN_SHAPE),
        "counted": {key: asdict(each) for key, each in counted.items()},
        "even_rows": even,
        "shapes": shapes,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{result['date']}_packed_counters"
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    text = packed_report.markdown(result)
    path.with_suffix(".md").write_text(text)
    print(text)
    bad = [key for key, each in counted.items() if each.conflicts or not each.agrees]
    if bad:
        print(f"bank conflicts, or counts that are not the derived ones: {', '.join(bad)}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
