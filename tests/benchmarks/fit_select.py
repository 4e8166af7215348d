"""How good the choices of `sm12x.select` are on measured times, and which constants would fit them best.

    python tests/benchmarks/fit_select.py tests/benchmarks/results/FILE.json [MORE.json ...]
    [--early] [--sms N] [--fit NAME,NAME] [--rounds N] [--search N] [--seed N]

Needs no GPU. A file has `arch` and `rows`. A row has `model`, `gemm`, `T`, `E` (or `experts`), `K`, `N` and
`times`; `top_k` where it is not the model's own; `gathers` true where rows came through an index. `times`
maps "VARIANT" (K whole) and "VARIANT:split" to microseconds or to an object with `median_us`. Other
contenders in it are left out. With --early all are taken for calls with early weights.

Printed: for every row the choice, the best variant and the loss of the choice over it; geometric mean and
worst loss; how far predictions are off; the constants of sm12x/select/rates.py that fit the times best, and
the losses with them. The fit is least squares of log(predicted / measured), variants near a row's best
counting most, held near the present constants where the rows do not say. With --search the constants are
sought instead that lose least: so many random steps from the present ones, each kept if it makes `regret`
less.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "runtime"))

from sm12x import manifest
from sm12x.manifest import Variant
from sm12x.select import Problem
from sm12x.select import model as cost
from sm12x.select.problem import expected_groups, fits
from sm12x.select.ranking import least_units, worth
from sm12x.select.rates import DRAM, EARLY_FAMILIES, EARLY_RATES, FAMILIES, RATES
from sm12x.validation.shapes import MOE_GEMMS

E4M3 = "float8_e4m3fn"
# Not fitted: the clock only scales the others, a launch cannot be told from the kernel's start, and DRAM is
# measured by a kernel that only reads.
FITTED_RATES = ("sm", "l2", "mma", "operand", "k_tile", "value", "overlap")
EARLY = " early"  # behind an architecture or a family: of calls with early weights
SPLIT_RATES, GATHER_RATES = ("fix_up",), ("gathered", "handed", "lookup")
FITTED_FAMILY = ("start", "setup", "cut", "hollow", "tile")
HELD = 0.05  # weight of a constant's distance, in logarithms, from where it was
STEP = 1e-3  # of the finite differences, in logarithms


@dataclass(frozen=True)
class Time:
    """One measured way to run a row."""

    name: str
    variant: Variant
    work: cost.Work
    leasts: tuple[int, ...]  # empty: K whole
    us: float


@dataclass(frozen=True)
class Row:
    """One row of a file: `times` of what the model can choose among."""

    name: str
    problem: Problem
    sms: int
    times: tuple[Time, ...]


# ---------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------


def read_rows(path: Path, variants: dict[str, Variant], sms: int | None, early: bool = False) -> list[Row]:
    """Rows of a file that have two or more times to choose among. Raises ValueError for what is no such file,
    and for a kernel of ours that the manifest does not hold."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(raw, dict) or "arch" not in raw or "rows" not in raw:
        raise ValueError(f"{path}: expected an object with `arch` and `rows`")
    arch = raw["arch"]
    count = sms or raw.get("sm_count") or (next(iter(DRAM[arch])) if len(DRAM[arch]) == 1 else None)
    if count is None:
        raise ValueError(f"{path}: no `sm_count`, and {arch} has several: give --sms")
    rows = [_row(path, each, arch, count, variants, early) for each in raw["rows"] if "times" in each]
    return [row for row in rows if len(row.times) > 1]


def _row(
    path: Path, raw: dict[str, Any], arch: str, sms: int, variants: dict[str, Variant], early: bool
) -> Row:
    experts = raw["E"] if "E" in raw else raw["experts"]
    top_k = raw.get("top_k")
    if top_k is None:
        top_k = {gemm.model: gemm.top_k for gemm in MOE_GEMMS}.get(raw["model"])
        if top_k is None:
            raise ValueError(f"{path}: no `top_k`, and {raw['model']} is not a model that is known")
    problem = Problem(
        "packed",
        experts,
        E4M3,
        E4M3,
        "bfloat16",
        arch,
        rows=raw["T"] * top_k,
        n=raw["N"],
        k=raw["K"],
        gathers=bool(raw.get("gathers", False)),
        early=early,
    )
    groups = expected_groups(problem)
    times = []
    for name, value in raw["times"].items():
        key, _, how = name.partition(":")
        if key not in variants:
            if key.startswith("fp8_"):
                raise ValueError(f"{path}: {key} is not in the manifest: build the cubins that were timed")
            continue
        variant = variants[key]
        if how not in ("", "whole", "split"):
            raise ValueError(f"{path}: expected {key} or {key}:split, got {name}")
        why = fits(problem, variant)
        if why is not None:
            raise ValueError(f"{path}: {name} cannot have run this row: {why}")
        leasts = tuple(least_units(problem, variant, sms)) if how == "split" else ()
        if how == "split" and not leasts:
            continue  # K has one k-tile: nothing was split
        work = cost.measure(problem, groups, variant)
        us = value["median_us"] if isinstance(value, dict) else value
        times.append(Time(name, variant, work, leasts, float(us)))
    gathered = " gather" if problem.gathers else ""
    return Row(f"{raw['model']} {raw['gemm']} T={raw['T']}{gathered}", problem, sms, tuple(times))


# ---------------------------------------------------------------------------------------------------
# The model on measured rows
# ---------------------------------------------------------------------------------------------------


def predict(row: Row, time: Time) -> float:
    """Microseconds that the model expects, with the constants that are set now."""
    if not time.leasts:
        return cost.whole_k(row.problem, time.work, time.variant, row.sms).us
    return min(cost.split_k(row.problem, time.work, time.variant, row.sms, least).us for least in time.leasts)


@dataclass(frozen=True)
class Verdict:
    """What the model chose for a row, what was best, and what the choice took over the best's time."""

    row: Row
    chosen: Time
    predicted: float
    best: Time

    @property
    def loss(self) -> float:
        return self.chosen.us / self.best.us


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """A verdict for each row."""
    verdicts = []
    for row in rows:
        predicted = {time.name: predict(row, time) for time in row.times}
        chosen = min(
            row.times, key=lambda time: (worth(predicted[time.name], int(bool(time.leasts))), time.name)
        )
        best = min(row.times, key=lambda time: (time.us, time.name))
        verdicts.append(Verdict(row, chosen, predicted[chosen.name], best))
    return verdicts


def summary(verdicts: Sequence[Verdict]) -> str:
    """Geometric mean and worst loss in one line."""
    losses = [verdict.loss for verdict in verdicts]
    mean = math.exp(sum(map(math.log, losses)) / len(losses))
    worst = max(verdicts, key=lambda verdict: verdict.loss)
    right = sum(verdict.chosen is verdict.best for verdict in verdicts)
    return (
        f"{len(losses)} rows, best chosen in {right}; loss: geometric mean {100 * (mean - 1):.2f}%, "
        f"worst {100 * (worst.loss - 1):.1f}% ({worst.row.name})"
    )


def errors(rows: Sequence[Row]) -> str:
    """How far predictions are off, by family and way of dividing."""
    logs: dict[str, list[float]] = {}
    for row in rows:
        for time in row.times:
            kind = time.variant.family + (":split" if time.leasts else "")
            logs.setdefault(kind, []).append(math.log(predict(row, time) / time.us))
    return "\n".join(
        f"  {kind}: {len(values)} times, predicted / measured {math.exp(np.mean(values)):.3f} "
        f"x/ {math.exp(np.std(values)):.3f}, from {math.exp(min(values)):.2f} to {math.exp(max(values)):.2f}"
        for kind, values in sorted(logs.items())
    )


# ---------------------------------------------------------------------------------------------------
# The fit
# ---------------------------------------------------------------------------------------------------


def constants_of(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(table entry, name) of every constant that the rows can say something about. Not those that are 0,
    which say that there is no such cost: a fit moves logarithms."""
    arch = rows[0].problem.arch
    times = [time for row in rows for time in row.times]
    names = list(FITTED_RATES)
    if any(time.leasts for time in times):
        names += SPLIT_RATES
    if any(row.problem.gathers for row in rows):
        names += GATHER_RATES
    families = sorted({time.variant.family for time in times})
    early = EARLY if rows[0].problem.early else ""
    found = [(arch + early, name) for name in names]
    found += [(family + early, name) for family in families for name in FITTED_FAMILY]
    return [where for where in found if get_constant(where) > 0.0]


def get_constant(where: tuple[str, str]) -> float:
    """The constant's present value."""
    entry, name = where
    table, key = _table(entry)
    return float(getattr(table[key], name))


def _table(entry: str) -> tuple[dict[str, Any], str]:
    """The table of rates.py that has an entry, which gets one of its own there, and the key."""
    key = entry.removesuffix(EARLY)
    late: dict[str, Any] = FAMILIES if key in FAMILIES else RATES
    if key == entry:
        return late, key
    early: dict[str, Any] = EARLY_FAMILIES if key in FAMILIES else EARLY_RATES
    early.setdefault(key, late[key])
    return early, key


def set_constant(where: tuple[str, str], value: float) -> None:
    """Sets a constant in this process."""
    entry, name = where
    table, key = _table(entry)
    table[key] = replace(table[key], **{name: value})


def fit(rows: Sequence[Row], which: Sequence[tuple[str, str]], rounds: int) -> None:
    """Sets the constants `which` to what fits the rows best: Levenberg-Marquardt on their logarithms."""
    start = np.log([get_constant(where) for where in which])
    pairs = [(row, time) for row in rows for time in row.times]
    measured = np.log([time.us for _, time in pairs])
    # A variant that takes three times as long as the best is never chosen, well predicted or not.
    weights = np.array([min(each.us for each in row.times) / time.us for row, time in pairs])

    def residuals(values: np.ndarray) -> np.ndarray:
        for where, value in zip(which, values, strict=True):
            set_constant(where, math.exp(value))
        predicted = np.log([predict(row, time) for row, time in pairs])
        return np.concatenate([weights * (predicted - measured), HELD * (values - start)])

    at, damping = start, 1e-2
    now = residuals(at)
    for _ in range(rounds):
        slopes = np.stack([(residuals(at + STEP * unit) - now) / STEP for unit in np.eye(len(which))], axis=1)
        normal = slopes.T @ slopes
        while damping < 1e6:
            move = np.linalg.solve(normal + damping * np.diag(normal.diagonal() + 1e-9), -slopes.T @ now)
            then = residuals(at + move)
            if then @ then < now @ now:
                break
            damping *= 4.0
        else:
            break
        gain = now @ now - then @ then
        at, now, damping = at + move, then, damping / 4.0
        if gain < 1e-9 * (now @ now):
            break
    residuals(at)


def regret(rows: Sequence[Row]) -> float:
    """Mean logarithm of the choices' losses, and a 25th of the spread of predicted / measured among times
    within 1.3 of a row's best, so that constants still mean what they say."""
    losses = [math.log(verdict.loss) for verdict in judge(rows)]
    off = [
        math.log(predict(row, time) / time.us)
        for row in rows
        for time in row.times
        if time.us < 1.3 * min(each.us for each in row.times)
    ]
    return float(np.mean(losses) + 0.04 * np.sqrt(np.mean(np.square(off))))


def search(rows: Sequence[Row], which: Sequence[tuple[str, str]], steps: int, seed: int) -> None:
    """Sets the constants `which` to those with the least regret of `steps` random steps."""
    rng = np.random.default_rng(seed)
    least = regret(rows)
    for _ in range(steps):
        some = [which[int(at)] for at in rng.permutation(len(which))[: rng.integers(1, 4)]]
        before = [get_constant(where) for where in some]
        for where, was in zip(some, before, strict=True):
            set_constant(where, was * math.exp(rng.normal(0.0, rng.choice((0.05, 0.2, 0.6)))))
        now = regret(rows)
        if now < least:
            least = now
            continue
        for where, was in zip(some, before, strict=True):
            set_constant(where, was)


# ---------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------


def report(
    rows: Sequence[Row], which: Sequence[tuple[str, str]], rounds: int, steps: int = 0, seed: int = 0
) -> str:
    """Everything that is printed. Leaves the module's constants as they were."""
    lines = ["| row | chosen | predicted us | us | best | us | loss |", "|---|---|---|---|---|---|---|"]
    verdicts = judge(rows)
    for verdict in verdicts:
        chosen, best = verdict.chosen, verdict.best
        lines.append(
            f"| {verdict.row.name} | {chosen.name} | {verdict.predicted:.1f} | {chosen.us:.1f} "
            f"| {best.name} | {best.us:.1f} | {100 * (verdict.loss - 1):.1f}% |"
        )
    lines += ["", f"present constants: {summary(verdicts)}", errors(rows), ""]
    before = [get_constant(where) for where in which]
    try:
        if steps:
            search(rows, which, steps, seed)
        else:
            fit(rows, which, rounds)
        lines.append("| constant | present | fitted |")
        lines.append("|---|---|---|")
        for where, was in zip(which, before, strict=True):
            lines.append(f"| {where[0]} {where[1]} | {was:.4g} | {get_constant(where):.4g} |")
        lines += ["", f"fitted constants: {summary(judge(rows))}", errors(rows)]
    finally:
        for where, was in zip(which, before, strict=True):
            set_constant(where, was)
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--sms", type=int, help="SMs of the device, where the file does not say")
    parser.add_argument("--early", action="store_true", help="the calls had early weights")
    parser.add_argument("--fit", help="names of constants to fit, by commas; default: all that the rows show")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--search", type=int, default=0, help="random steps instead of the fit")
    parser.add_argument("--seed", type=int, default=0, help="of the search")
    options = parser.parse_args()
    variants = {variant.key: variant for variant in manifest.default().gemms()}
    rows = [row for path in options.files for row in read_rows(path, variants, options.sms, options.early)]
    if not rows:
        print("no row has two times to choose among", file=sys.stderr)
        return 1
    if len({(row.problem.arch, row.sms) for row in rows}) > 1:
        print("rows of different devices: fit one at a time", file=sys.stderr)
        return 1
    which = constants_of(rows)
    if options.fit:
        wanted = options.fit.split(",")
        unknown = set(wanted) - {name for _, name in which}
        if unknown:
            known = ", ".join(sorted({name for _, name in which}))
            print(f"--fit: expected names out of {known}, got {', '.join(sorted(unknown))}", file=sys.stderr)
            return 1
        which = [where for where in which if where[1] in wanted]
    print(report(rows, which, options.rounds, options.search, options.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
