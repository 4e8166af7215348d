"""What a run of grouped_gemm_h200.py has to show (DESIGN section 9, issue 5), computed from its rows alone.

Row gates, T <= 128, for contiguous rows and for gathered ones, each without and with early_weights: not
slower than the faster peer beyond the run's spread (half the two interquartile ranges together), and at most
1.12 times the read floor of the same rounds. Mean gates: the geometric mean of Triton's time over ours, over
the two fine-grained models, is at least 1.08, and at T = 1 at least 1.2. On Mixtral parity is a goal, not a
gate.

A row is reported and not gated where the twin's MMAs take more than 0.8 of the memory time: the memory time
is the row's read floor, the MMAs are those of every expert's rows rounded up to the MMA's 8, and their rate
is `TWIN_MMA_RATE`. Hopper has no FP8 `mma.sync`: SM12x is not bound like this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

GATED_TOKENS = 128
FLOOR_LIMIT = 1.12
MEAN_LIMIT, MEAN_STRETCH = 1.08, 1.15
MEAN_LIMIT_AT_ONE, MEAN_STRETCH_AT_ONE = 1.2, 1.35
MMA_SHARE_LIMIT = 0.8
# FP8 multiply-adds per clock and SM of the twin, conversions included. Measured on an H200 on 2026-11-22:
# Mixtral GEMM1 at T = 128 in a 128x64 tile that always computes 64 columns took 331.7 us, 60.1e9
# multiply-adds on 132 SMs at 1980 MHz (tests/benchmarks/README.md). DESIGN section 2's clocks for
# conversions alone are 630 to 964.
TWIN_MMA_RATE = 694.0
# Rows sorted and gathered, without and with the promise of early_weights.
OURS = ("sm12x", "sm12x gather", "sm12x early", "sm12x early gather")
PEERS = ("triton", "torch")
FINE_GRAINED = ("gemma-4-26B-A4B", "qwen3-30B-A3B")
PARITY = ("mixtral-8x7B",)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """One row of one of OURS. Times in microseconds; `to_peer` and `to_floor` are ours over theirs, None
    where there is nothing to compare with. `faults` says what a gated row misses."""

    row: str
    tokens: int
    contender: str
    ours_us: float
    peer: str | None
    to_peer: float | None
    spread_us: float
    to_floor: float | None
    mma_share: float | None
    gated: bool
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Mean:
    """A geometric mean of Triton's time over ours, over `rows` rows; NaN where there is none. `limit` None: a
    goal, which decides nothing."""

    name: str
    contender: str
    value: float
    rows: int
    limit: float | None
    goal: float

    @property
    def held(self) -> bool:
        return self.limit is None or self.rows == 0 or self.value >= self.limit


@dataclass(frozen=True)
class Report:
    verdicts: tuple[Verdict, ...]
    means: tuple[Mean, ...]
    mma_rate: float

    @property
    def held(self) -> bool:
        """Whether a row was gated at all, and every gate that the rows reach holds."""
        gated = [verdict for verdict in self.verdicts if verdict.gated]
        return bool(gated) and not any(v.faults for v in gated) and all(mean.held for mean in self.means)


def mma_share(row: Row, sm_count: int, clock_mhz: float, mma_rate: float) -> float | None:
    """The row's least MMA time over its memory time; None without a read floor."""
    if not row["floor_us"]:
        return None
    macs = row["mma_columns"] * row["N"] * (-(-row["K"] // 32) * 32)
    return float(macs / (mma_rate * sm_count * clock_mhz) / row["floor_us"])


def judge(result: Mapping[str, Any], mma_rate: float = TWIN_MMA_RATE) -> Report:
    """Judges the rows of `result`, which also names the device's sm_count and clock_mhz."""
    rows: Sequence[Row] = result["rows"]
    share = {id(row): mma_share(row, result["sm_count"], result["clock_mhz"], mma_rate) for row in rows}
    verdicts = [_verdict(row, ours, share[id(row)]) for row in rows for ours in OURS if ours in row["times"]]
    gated = [row for row in rows if _is_gated(row, share[id(row)])]
    means = []
    for ours in OURS:
        fine = [row for row in gated if row["model"] in FINE_GRAINED]
        one = [row for row in fine if row["T"] == 1]
        parity = [row for row in gated if row["model"] in PARITY]
        means += [
            _mean("fine-grained models", ours, fine, MEAN_LIMIT, MEAN_STRETCH),
            _mean("fine-grained models, T = 1", ours, one, MEAN_LIMIT_AT_ONE, MEAN_STRETCH_AT_ONE),
            _mean("Mixtral", ours, parity, None, 1.0),
        ]
    return Report(tuple(verdicts), tuple(means), mma_rate)


def _is_gated(row: Row, share: float | None) -> bool:
    return row["T"] <= GATED_TOKENS and (share is None or share <= MMA_SHARE_LIMIT)


def _verdict(row: Row, ours: str, share: float | None) -> Verdict:
    times = row["times"]
    mine = times[ours]
    peer = min((name for name in PEERS if name in times), key=lambda n: times[n]["median_us"], default=None)
    to_peer = to_floor = None
    spread = 0.0
    faults = []
    if peer is None:
        faults.append("no peer ran")
    else:
        theirs = times[peer]
        to_peer = mine["median_us"] / theirs["median_us"]
        spread = (mine["iqr_us"] + theirs["iqr_us"]) / 2
        if mine["median_us"] > theirs["median_us"] + spread:
            faults.append(f"slower than {peer}")
    if not row["floor_us"]:
        faults.append("no read floor")
    else:
        to_floor = mine["median_us"] / times["read_floor"]["median_us"]
        if to_floor > FLOOR_LIMIT:
            faults.append(f"{to_floor:.3f} of the read floor")
    gated = _is_gated(row, share)
    name = f"{row['model']} {row['gemm']}"
    return Verdict(
        *(name, row["T"], ours, mine["median_us"], peer, to_peer, spread, to_floor, share, gated),
        tuple(faults) if gated else (),
    )


def _mean(name: str, ours: str, rows: Sequence[Row], limit: float | None, goal: float) -> Mean:
    ratios = [
        row["times"]["triton"]["median_us"] / row["times"][ours]["median_us"]
        for row in rows
        if "triton" in row["times"] and ours in row["times"]
    ]
    value = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan
    return Mean(name, ours, value, len(ratios), limit, goal)


def markdown(result: Mapping[str, Any], report: Report) -> str:
    """The table of all rows and the gate report, for the README and for people."""
    columns = ["shape", "T", *OURS, "Triton", "torch", "read floor", "Triton / ours", "ours / floor"]
    lines = [
        f"{result['date']}, {result['device']}, {result.get('command', '')}: microseconds per call, median ± "
        "half the interquartile range; ratios for contiguous rows, gathered ones, and both with "
        "early_weights.",
        "",
        "| " + " | ".join([*columns, "MMA share", "gate"]) + " |",
        "|" + "---|" * (len(columns) + 2),
    ]
    for row in result["rows"]:
        lines.append("| " + " | ".join(_cells(row, report)) + " |")
    return "\n".join([*lines, "", *describe(report)]) + "\n"


def _cells(row: Row, report: Report) -> list[str]:
    times = row["times"]
    name = f"{row['model']} {row['gemm']}"
    mine = {v.contender: v for v in report.verdicts if (v.row, v.tokens) == (name, row["T"])}

    def time_of(contender: str) -> str:
        entry = times.get(contender)
        return f"{entry['median_us']:.1f} ± {entry['iqr_us'] / 2:.1f}" if entry else "-"

    def pair(values: list[float | None]) -> str:
        return ", ".join("-" if value is None else f"{value:.2f}" for value in values)

    triton = times.get("triton", {}).get("median_us")
    faster = [triton / times[ours]["median_us"] if triton and ours in times else None for ours in OURS]
    floors = [mine[ours].to_floor if ours in mine else None for ours in OURS]
    faults = [f"{v.contender}: {', '.join(v.faults)}" for v in mine.values() if v.faults]
    first = next(iter(mine.values()), None)
    gated = first is not None and first.gated
    verdict = "; ".join(faults) if faults else ("holds" if gated else "reported")
    share = "-" if first is None or first.mma_share is None else f"{first.mma_share:.2f}"
    shown = [time_of(each) for each in (*OURS, "triton", "torch", "read_floor")]
    return [name, str(row["T"]), *shown, pair(faster), pair(floors), share, verdict]


def describe(report: Report) -> list[str]:
    """The verdicts as lines: what fails, what is not gated and why, the means."""
    gated = [verdict for verdict in report.verdicts if verdict.gated]
    failed = [verdict for verdict in gated if verdict.faults]
    counts = [(ours, sum(v.contender == ours for v in failed)) for ours in OURS]
    lines = [
        f"gated: {len(gated)} times, of which {len(failed)} fail: "
        + ", ".join(f"{ours} {count}" for ours, count in counts)
    ]
    lines += [
        f"- {v.row} T={v.tokens} {v.contender} {v.ours_us:.1f} us: {', '.join(v.faults)}"
        + (f" ({v.to_peer:.3f} of it, spread {v.spread_us:.2f} us)" if v.to_peer is not None else "")
        for v in failed
    ]
    bound = sorted(
        {
            (v.row, v.tokens, v.mma_share)
            for v in report.verdicts
            if v.tokens <= GATED_TOKENS and not v.gated and v.mma_share is not None
        }
    )
    lines.append(
        f"not gated up to T = {GATED_TOKENS}: rows whose MMAs, at {report.mma_rate:.0f} multiply-adds per "
        f"clock and SM (measured on the twin), take more than {MMA_SHARE_LIMIT} of the read floor: "
        + (", ".join(f"{name} T={tokens} ({share:.2f})" for name, tokens, share in bound) or "none")
    )
    for mean in report.means:
        if mean.rows == 0:
            lines.append(f"- {mean.name}, {mean.contender}: no row to take a mean of")
            continue
        gate = "no gate" if mean.limit is None else f"gate {mean.limit}: {'holds' if mean.held else 'FAILS'}"
        goal = f"goal {mean.goal}: {'met' if mean.value >= mean.goal else 'not met'}"
        lines.append(
            f"- Triton / {mean.contender}, geometric mean over {mean.rows} rows of the {mean.name}: "
            f"{mean.value:.3f}; {gate}; {goal}"
        )
    word = "hold" if report.held else "do NOT hold" if gated else "were not reached: no row was gated"
    return [*lines, f"the gates {word}"]
