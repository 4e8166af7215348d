"""The gates of the layer benchmark: what fails a row, what is not gated, which rows the means are over."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import layer_gates

DEVICE = {"date": "2026-11-23", "device": "a GPU", "sm_count": 132, "clock_mhz": 1980.0}


@pytest.fixture(autouse=True)
def draw() -> random.Random:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


def make_row(draw: random.Random, model: str = "gemma-4-26B-A4B", tokens: int = 8, **changes: Any) -> Any:
    """A row that passes every gate; `changes` are factors on the times of contenders, or fields of the
    row."""
    floors = draw.uniform(5.0, 100.0), draw.uniform(5.0, 100.0)
    ours = sum(floors) * draw.uniform(1.0, 1.07) + 3.9
    median = {"sm12x": ours, "sm12x early": ours, "triton": ours * draw.uniform(1.42, 1.6)}
    median |= {"read_floor1": floors[0], "read_floor2": floors[1]}
    times = {
        name: {"median_us": us * changes.pop(name, 1.0), "iqr_us": us * 0.01} for name, us in median.items()
    }
    return {
        **{"model": model, "T": tokens, "H": 2816, "I": 704, "mma_columns": 8.0, "launches": 4},
        **{"floor1_us": floors[0], "floor2_us": floors[1], "times": times, "chosen": "up, down"},
        **changes,
    }


def judged(*rows: Any, **device: Any) -> layer_gates.Report:
    return layer_gates.judge({**DEVICE, **device, "rows": list(rows)})


def faults(report: layer_gates.Report) -> str:
    return "; ".join(fault for verdict in report.verdicts for fault in verdict.faults)


def test_rows_within_every_gate_hold(draw: random.Random) -> None:
    rows = [make_row(draw, model, t) for model in layer_gates.FINE_GRAINED for t in (1, 8, 16, 128)]
    report = judged(*rows)
    assert report.held, layer_gates.describe(report)
    assert [mean.rows for mean in report.means] == [4, 4, 4, 4]
    assert "the gates hold" in layer_gates.describe(report)[-1]
    assert len(layer_gates.markdown({**DEVICE, "rows": rows}, report).splitlines()) > len(rows)


@pytest.mark.parametrize("name", ["sm12x", "sm12x early"])
def test_each_of_ours_is_judged_by_itself(name: str, draw: random.Random) -> None:
    row = make_row(draw, **{name: 2.0})
    report = judged(row)
    assert {v.name for v in report.verdicts if v.faults} == {name}
    assert [mean.name.split(",")[0] for mean in report.means if not mean.held] == [name]
    del row["times"]["sm12x early"]
    alone = judged(row)
    assert {v.name for v in alone.verdicts} == {"sm12x"}, "a run without the promise"
    assert "did not run" in faults(judged(row, make_row(draw)))


def test_slower_than_the_peer_beyond_the_spread_fails(draw: random.Random) -> None:
    row = make_row(draw, **{"sm12x early": 0.5})
    mine, theirs = row["times"]["sm12x"], row["times"]["triton"]
    spread = (mine["iqr_us"] + theirs["iqr_us"]) / 2
    theirs["median_us"] = mine["median_us"] - spread * 0.99
    assert "slower" not in faults(judged(row))
    theirs["median_us"] = mine["median_us"] - spread * 1.01
    assert "slower than triton" in faults(judged(row))


def test_four_microseconds_and_eight_percent_over_the_floors_are_allowed(draw: random.Random) -> None:
    row = make_row(draw, **{"sm12x early": 0.5})
    limit = 1.08 * (row["floor1_us"] + row["floor2_us"]) + 4.0
    row["times"]["sm12x"]["median_us"] = limit - 0.01
    assert "floors allow" not in faults(judged(row))
    row["times"]["sm12x"]["median_us"] = limit + 0.01
    assert "floors allow" in faults(judged(row))


@pytest.mark.parametrize("missing", ["triton", "floor"])
def test_what_was_not_measured_fails(missing: str, draw: random.Random) -> None:
    row = make_row(draw)
    if missing == "triton":
        del row["times"]["triton"]
    else:
        row["floor2_us"] = None
    assert "no " in faults(judged(row))


def test_more_launches_than_four_fail(draw: random.Random) -> None:
    assert "5 launches" in faults(judged(make_row(draw, launches=5)))


def test_a_row_that_the_twins_mmas_bind_is_not_gated(draw: random.Random) -> None:
    row = make_row(draw, tokens=128, launches=9)
    depth = 2 * 704 * 2816 + 2816 * 704
    memory = (row["floor1_us"] + row["floor2_us"]) * layer_gates.TWIN_MMA_RATE * 132 * 1980.0
    row["mma_columns"] = 0.81 * memory / depth
    report = judged(row)
    assert not report.verdicts[0].gated
    assert not report.verdicts[0].faults
    assert not report.held, "no row was gated"
    assert "T=128 (0.81)" in "\n".join(layer_gates.describe(report))
    row["mma_columns"] = 0.79 * memory / depth
    assert judged(row).verdicts[0].gated


@pytest.mark.parametrize(("tokens", "limit"), [(1, 1.25), (8, 1.25), (16, 1.1), (128, 1.1)])
def test_means_are_over_few_and_many_tokens_of_fine_grained_models(
    tokens: int, limit: float, draw: random.Random
) -> None:
    for factor, held in ((0.999, False), (1.001, True)):
        rows = [make_row(draw, model, tokens) for model in layer_gates.FINE_GRAINED]
        rows.append(make_row(draw, "mixtral-8x7B", tokens))
        del rows[2]["times"]["sm12x early"]
        for row in rows[:2]:
            row["times"]["triton"]["median_us"] = limit * factor * row["times"]["sm12x"]["median_us"]
            del row["times"]["sm12x early"]
        report = judged(*rows)
        assert report.held == held, layer_gates.describe(report)
        (mean,) = [mean for mean in report.means if mean.rows]
        assert mean.value == pytest.approx(limit * factor)
