"""What a run of layer_h200.py has to show (issue 6), computed from its rows alone: of layers without and with
the promise of early_routes.

Row gates: not slower than the Triton pipeline beyond the run's spread (half the two interquartile ranges
together), and at most 1.08 times the read floors of the two GEMMs, of the same rounds, plus 4 us. Mean gates:
the geometric mean of Triton's time over ours, over the two fine-grained models, is at least 1.25 for T <= 8
and 1.1 for 16 <= T <= 128; 1.4 for few tokens is a goal. Launches of a layer: at most 4.

A row is reported and not gated where the twin's MMAs take more than 0.8 of the memory time, as gates.py has
it: here of both GEMMs against both read floors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gates import FINE_GRAINED, GATED_TOKENS, MMA_SHARE_LIMIT, TWIN_MMA_RATE

FLOOR_FACTOR, FLOOR_EXTRA_US = 1.08, 4.0
MEANS = (((1, 8), 1.25, 1.4), ((16, 128), 1.1, 1.1))  # tokens, limit, goal
MOST_LAUNCHES = 4
OURS, EARLY, PEER = "sm12x", "sm12x early", "triton"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """One row of one of ours, `name`. Times in microseconds; `to_peer` is ours over theirs; None where there
    is nothing to compare with. `faults` says what a gated row misses."""

    name: str
    model: str
    tokens: int
    ours_us: float | None
    peer_us: float | None
    to_peer: float | None
    spread_us: float
    limit_us: float | None
    mma_share: float | None
    gated: bool
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Mean:
    """A geometric mean of Triton's time over ours, over `rows` rows; NaN where there is none."""

    name: str
    value: float
    rows: int
    limit: float
    goal: float

    @property
    def held(self) -> bool:
        return self.rows == 0 or self.value >= self.limit


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
    """The least MMA time of both GEMMs over their memory time; None without read floors."""
    floors = row["floor1_us"], row["floor2_us"]
    if not all(floors):
        return None
    hidden, inner = row["H"], row["I"]
    depth = 2 * inner * (-(-hidden // 32) * 32) + hidden * (-(-inner // 32) * 32)
    return float(row["mma_columns"] * depth / (mma_rate * sm_count * clock_mhz) / sum(floors))


def judge(result: Mapping[str, Any], mma_rate: float = TWIN_MMA_RATE) -> Report:
    """Judges the rows of `result`, which also names the device's sm_count and clock_mhz."""
    rows: Sequence[Row] = result["rows"]
    verdicts = []
    means = []
    for name in (OURS, EARLY):
        if not any(name in row["times"] for row in rows):
            continue
        for row in rows:
            share = mma_share(row, result["sm_count"], result["clock_mhz"], mma_rate)
            verdicts.append(_verdict(row, share, name))
        for (least, most), limit, goal in MEANS:
            counted = [
                v
                for v in verdicts
                if v.name == name
                and v.gated
                and v.model in FINE_GRAINED
                and least <= v.tokens <= most
                and v.to_peer
            ]
            value = (
                math.exp(-sum(math.log(v.to_peer or 1.0) for v in counted) / len(counted))
                if counted
                else math.nan
            )
            title = f"{name}, fine-grained models, T = {least} to {most}"
            means.append(Mean(title, value, len(counted), limit, goal))
    return Report(tuple(verdicts), tuple(means), mma_rate)


def _verdict(row: Row, share: float | None, name: str) -> Verdict:
    mine, theirs = row["times"].get(name), row["times"].get(PEER)
    gated = row["T"] <= GATED_TOKENS and (share is None or share <= MMA_SHARE_LIMIT)
    if mine is None:
        nothing = (None, None, None, 0.0, None, share, gated)
        return Verdict(name, row["model"], row["T"], *nothing, ("did not run",) if gated else ())
    ours = mine["median_us"]
    faults = []
    to_peer, spread = None, 0.0
    if theirs is None:
        faults.append("no peer ran")
    else:
        to_peer = ours / theirs["median_us"]
        spread = (mine["iqr_us"] + theirs["iqr_us"]) / 2
        if ours > theirs["median_us"] + spread:
            faults.append("slower than triton")
    limit = None
    if not (row["floor1_us"] and row["floor2_us"]):
        faults.append("no read floor")
    else:
        limit = FLOOR_FACTOR * (row["floor1_us"] + row["floor2_us"]) + FLOOR_EXTRA_US
        if ours > limit:
            faults.append(f"{ours:.1f} us, the floors allow {limit:.1f}")
    if row["launches"] > MOST_LAUNCHES:
        faults.append(f"{row['launches']} launches")
    return Verdict(
        *(
            name,
            row["model"],
            row["T"],
            ours,
            theirs and theirs["median_us"],
            to_peer,
            spread,
            limit,
            share,
            gated,
        ),
        tuple(faults) if gated else (),
    )


def markdown(result: Mapping[str, Any], report: Report) -> str:
    """The table of all rows and the gate report."""
    columns = ["model", "T", "sm12x", "early", "Triton", "floor 1", "floor 2", "limit", "Triton / sm12x"]
    columns += ["Triton / early", "launches", "kernels", "MMA share", "gate", "gate, early"]
    head = f"{result['date']}, {result['device']}, {result.get('command', '')}"
    lines = [
        f"{head}: microseconds per layer, median ± half the interquartile range.",
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
    ]
    late, early = ([v for v in report.verdicts if v.name == name] for name in (OURS, EARLY))
    for i, row in enumerate(result["rows"]):
        lines.append(f"| {' | '.join(_cells(row, late[i], early[i] if early else None))} |")
    return "\n".join([*lines, "", *describe(report)]) + "\n"


def _cells(row: Row, verdict: Verdict, early: Verdict | None) -> list[str]:
    def time_of(name: str) -> str:
        entry = row["times"].get(name)
        return f"{entry['median_us']:.1f} ± {entry['iqr_us'] / 2:.1f}" if entry else "-"

    def number(value: float | None, digits: int = 1) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    def faster(of: Verdict | None) -> str:
        return number(1 / of.to_peer if of is not None and of.to_peer else None, 2)

    def word(of: Verdict | None) -> str:
        return "-" if of is None else "; ".join(of.faults) or ("holds" if of.gated else "reported")

    floors = [time_of(name) for name in ("read_floor1", "read_floor2")]
    return [
        *(row["model"], str(row["T"]), time_of(OURS), time_of(EARLY), time_of(PEER), *floors),
        *(number(verdict.limit_us), faster(verdict), faster(early), str(row["launches"]), row["chosen"]),
        *(number(verdict.mma_share, 2), word(verdict), word(early)),
    ]


def describe(report: Report) -> list[str]:
    """The verdicts as lines: what fails, what is not gated and why, the means."""
    gated = [verdict for verdict in report.verdicts if verdict.gated]
    failed = [verdict for verdict in gated if verdict.faults]
    lines = [f"gated: {len(gated)} times, of which {len(failed)} fail"]
    lines += [f"- {v.model} T={v.tokens} {v.name}: {', '.join(v.faults)}" for v in failed]
    bound = [
        f"{v.model} T={v.tokens} ({v.mma_share:.2f})"
        for v in report.verdicts
        if v.name == OURS and not v.gated and v.mma_share
    ]
    lines.append(
        f"not gated: rows whose MMAs, at {report.mma_rate:.0f} multiply-adds per clock and SM (measured on "
        f"the twin), take more than {MMA_SHARE_LIMIT} of the read floors: {', '.join(bound) or 'none'}"
    )
    for mean in report.means:
        if not mean.rows:
            lines.append(f"- {mean.name}: no row to take a mean of")
            continue
        goal = f"goal {mean.goal}: {'met' if mean.value >= mean.goal else 'not met'}"
        lines.append(
            f"- Triton's time over ours, geometric mean of {mean.rows} rows, {mean.name}: {mean.value:.3f}; "
            f"gate {mean.limit}: {'holds' if mean.held else 'FAILS'}; {goal}"
        )
    word = "hold" if report.held else "do NOT hold" if gated else "were not reached: no row was gated"
    return [*lines, f"the gates {word}"]
