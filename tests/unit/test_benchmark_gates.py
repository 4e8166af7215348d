"""The gates of the H200 benchmark: what fails a row, what is not gated, which rows the means are over."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from benchmarks import gates

DEVICE = {"date": "2026-11-23", "device": "a GPU", "sm_count": 132, "clock_mhz": 1980.0}


@pytest.fixture(autouse=True)
def draw() -> random.Random:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


def make_row(draw: random.Random, model: str = "gemma-4-26B-A4B", tokens: int = 8, **changes: float) -> Any:
    """A row that passes every gate by a little; `changes` are factors on the times of contenders."""
    floor = draw.uniform(5.0, 200.0)
    median = {
        "read_floor": floor,
        **{ours: floor * draw.uniform(1.02, 1.1) for ours in gates.OURS},
        "triton": floor * draw.uniform(1.35, 1.5),
        "torch": floor * draw.uniform(1.6, 2.5),
    }
    times = {
        name: {"median_us": us * changes.get(name, 1.0), "iqr_us": us * 0.01} for name, us in median.items()
    }
    return {
        **{"model": model, "gemm": "GEMM1", "T": tokens, "K": 2816, "N": 1408, "floor_us": floor},
        **{"mma_columns": 8.0 * draw.randrange(1, 5), "times": times},
    }


def judged(*rows: Any, **device: Any) -> gates.Report:
    return gates.judge({**DEVICE, **device, "rows": list(rows)})


def test_rows_within_every_gate_hold(draw: random.Random) -> None:
    rows = [make_row(draw, model, t) for model in gates.FINE_GRAINED for t in (1, 8, 128)]
    report = judged(*rows)
    assert report.held, gates.describe(report)
    assert all(verdict.gated and not verdict.faults for verdict in report.verdicts)
    assert len(report.verdicts) == len(gates.OURS) * len(rows)


@pytest.mark.parametrize("ours", gates.OURS)
@pytest.mark.parametrize("peer", gates.PEERS)
def test_slower_than_either_peer_beyond_the_spread_fails(ours: str, peer: str, draw: random.Random) -> None:
    row = make_row(draw)
    other = next(name for name in gates.PEERS if name != peer)
    mine, theirs = row["times"][ours], row["times"][peer]
    row["times"][other]["median_us"] = 1e4
    theirs["median_us"] = mine["median_us"]
    mine["iqr_us"] = theirs["iqr_us"] = 0.2
    mine["median_us"] += 0.19  # half of each range: 0.2 together
    assert not faults(judged(row), ours)
    mine["median_us"] += 0.02
    assert faults(judged(row), ours) == [f"slower than {peer}"]
    assert not judged(row).held


def faults(report: gates.Report, ours: str) -> list[str]:
    """Those of one contender that the comparison with peers found."""
    return [text for v in report.verdicts if v.contender == ours for text in v.faults if "slower" in text]


@pytest.mark.parametrize("ours", gates.OURS)
def test_too_far_from_the_read_floor_fails(ours: str, draw: random.Random) -> None:
    row = make_row(draw)
    row["times"][ours]["median_us"] = row["times"]["read_floor"]["median_us"] * 1.121
    report = judged(row)
    assert [v.contender for v in report.verdicts if v.faults] == [ours]
    assert not report.held


def test_a_gated_row_without_a_floor_or_a_peer_fails(draw: random.Random) -> None:
    without_floor = make_row(draw)
    without_floor["floor_us"] = None
    del without_floor["times"]["read_floor"]
    assert not judged(without_floor).held
    alone = make_row(draw)
    for peer in gates.PEERS:
        del alone["times"][peer]
    assert not judged(alone).held


def test_a_run_without_gated_rows_does_not_hold(draw: random.Random) -> None:
    assert not judged().held
    report = judged(make_row(draw, tokens=512))
    assert not report.held
    assert gates.describe(report)[-1].endswith("no row was gated")


def test_rows_that_the_twin_cannot_multiply_fast_enough_are_reported_only(draw: random.Random) -> None:
    good, bound = make_row(draw), make_row(draw, "mixtral-8x7B", 64, sm12x=3.0)
    rate = gates.TWIN_MMA_RATE * DEVICE["sm_count"] * DEVICE["clock_mhz"]  # multiply-adds in a microsecond
    columns = bound["floor_us"] * rate / (bound["N"] * bound["K"])
    bound["mma_columns"] = 0.79 * columns
    assert not judged(good, bound).held
    bound["mma_columns"] = 0.81 * columns
    report = judged(good, bound)
    assert report.held
    assert [v.gated for v in report.verdicts] == [True] * len(gates.OURS) + [False] * len(gates.OURS)
    assert not any(v.faults for v in report.verdicts), "a row that is not gated misses nothing"
    assert any("mixtral-8x7B GEMM1 T=64 (0.81)" in line for line in gates.describe(report))
    faster = gates.judge({**DEVICE, "rows": [good, bound]}, 2 * gates.TWIN_MMA_RATE)
    assert not faster.held, "with a higher rate the row is memory-bound and its time counts"


def test_k_is_counted_in_whole_mmas(draw: random.Random) -> None:
    row = make_row(draw)
    row["K"] = 704 + 16
    long = gates.mma_share(row, 132, 1980.0, 694.0)
    row["K"] = 736
    assert gates.mma_share(row, 132, 1980.0, 694.0) == long


def test_rows_past_128_tokens_are_never_gated(draw: random.Random) -> None:
    report = judged(make_row(draw), make_row(draw, tokens=512, sm12x=10.0))
    assert report.held
    assert [v.gated for v in report.verdicts] == [True] * len(gates.OURS) + [False] * len(gates.OURS)


def test_means_are_geometric_and_over_fine_grained_gated_rows(draw: random.Random) -> None:
    rows = [make_row(draw, model, t) for model in gates.FINE_GRAINED for t in (1, 4)]
    others = [make_row(draw, "mixtral-8x7B", 1, triton=0.9), make_row(draw, tokens=512, triton=0.1)]
    ratios = [row["times"]["triton"]["median_us"] / row["times"]["sm12x"]["median_us"] for row in rows]
    found = {(mean.name, mean.contender): mean for mean in judged(*rows, *others).means}
    every = found["fine-grained models", "sm12x"]
    one = found["fine-grained models, T = 1", "sm12x"]
    assert every.rows == 4
    assert every.value == pytest.approx(math.prod(ratios) ** 0.25)
    assert one.value == pytest.approx(math.sqrt(ratios[0] * ratios[2]))
    assert found["Mixtral", "sm12x gather"].rows == 1


@pytest.mark.parametrize(("tokens", "limit"), [(8, 1.08), (1, 1.2)])
def test_the_means_have_limits(tokens: int, limit: float, draw: random.Random) -> None:
    rows = [make_row(draw, model, tokens) for model in gates.FINE_GRAINED]
    for row in rows:
        for ours in gates.OURS:
            row["times"][ours]["median_us"] = row["floor_us"]
        row["times"]["triton"]["median_us"] = row["floor_us"] * (limit + 0.001)
    assert judged(*rows).held
    rows[0]["times"]["triton"]["median_us"] = rows[0]["floor_us"] * (limit - 0.01)
    report = judged(*rows)
    assert not any(verdict.faults for verdict in report.verdicts)
    assert not report.held


def test_mixtral_parity_is_no_gate(draw: random.Random) -> None:
    row = make_row(draw, "mixtral-8x7B")
    for ours in gates.OURS:
        row["times"][ours] = {"median_us": row["floor_us"] * 1.05, "iqr_us": row["floor_us"] * 0.1}
    row["times"]["triton"] = {"median_us": row["floor_us"] * 1.01, "iqr_us": row["floor_us"] * 0.1}
    report = judged(row)
    assert report.held
    assert any("goal 1.0: not met" in line for line in gates.describe(report))


def test_the_table_has_every_row_and_the_verdict(draw: random.Random) -> None:
    rows = [make_row(draw), make_row(draw, "mixtral-8x7B", 512), make_row(draw, "qwen3-30B-A3B", sm12x=2.0)]
    del rows[0]["times"]["torch"]
    result = {**DEVICE, "rows": rows}
    text = gates.markdown(result, gates.judge(result))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows)
    assert len({line.count("|") for line in table}) == 1
    assert table[2].endswith("holds |")
    assert table[3].endswith("reported |")
    assert "of the read floor" in table[4]
    assert text.rstrip().endswith("the gates do NOT hold")
