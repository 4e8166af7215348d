"""The parts of `sm12x validate` and `sm12x bench` that need no GPU: cases, routings, fragments, plots,
bad usage.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from sm12x.cli import main
from sm12x.reference import dequantise
from sm12x.validation import cases, matrix, probe, shapes
from sm12x.validation.device import numpy_dtype

E4M3 = numpy_dtype("float8_e4m3fn")


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def test_random_operands_hold_every_finite_pattern_and_no_nan(rng: np.random.Generator) -> None:
    bits = cases.random_e4m3_bits((100_000,), rng)
    assert set(np.unique(bits).tolist()) == set(range(256)) - {0x7F, 0xFF}


@pytest.mark.parametrize("pattern", cases.ROW_PATTERNS)
@pytest.mark.parametrize("groups", [1, 2, 33])
def test_row_patterns_are_what_they_are_called(pattern: str, groups: int, rng: np.random.Generator) -> None:
    rows = cases.rows_per_group(pattern, groups, 32, rng)
    assert rows.shape == (groups,)
    assert rows.min() >= 0
    uniform = {"no_rows": 0, "one_row": 1, "tile_minus_1": 31, "tile": 32, "tile_plus_1": 33}
    if pattern in uniform:
        assert (rows == uniform[pattern]).all()
    elif pattern == "empty_first":
        assert rows[0] == 0
    elif pattern == "empty_last":
        assert rows[-1] == 0
    elif pattern == "all_but_one_empty":
        assert (rows > 0).sum() == 1
    offsets = cases.offsets_of(rows, 3)
    assert offsets[0] == 3
    assert (np.diff(offsets) == rows).all()


@pytest.mark.parametrize("modes", cases.SCALE_MODES)
@pytest.mark.parametrize("form", range(9))
def test_scales_spread_to_what_the_reference_makes_of_them(
    modes: tuple[str, str], form: int, rng: np.random.Generator
) -> None:
    """`Scales.per_row` and the reference backend read the same shapes the same way, M = E included."""
    from sm12x.reference import grouped_gemm_float64

    rows, n, k = np.array([2, 0, 1]), 8, 16
    one = np.full((3, k), 0x38, np.uint8).view(E4M3), np.full((3, n, k), 0x38, np.uint8).view(E4M3)
    scales = cases.make_scales(modes, 3, 3, n, form, rng)
    reference, _ = grouped_gemm_float64(
        *one, a_scale=scales.a, b_scale=scales.b, offsets=cases.offsets_of(rows).astype(np.int32)
    )
    a, b = scales.per_row(rows, n)
    assert np.allclose(reference, k * a * np.repeat(b, rows, axis=0), rtol=1e-12, atol=0)


def test_fragments_hold_what_mma_m16n8k32_says(rng: np.random.Generator) -> None:
    """Each lane's registers, written out one value at a time, against the vectorised reference."""
    operands = cases.random_e4m3_bits((128, 24), rng).view(np.uint32)
    values = dequantise(operands.view(np.uint8).view(E4M3), np.float64).reshape(128, 6, 4)
    product, magnitude = probe.fragment_product(operands)
    a, b = np.zeros((4, 16, 32)), np.zeros((4, 8, 32))
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        group, quad = divmod(lane, 4)
        for byte in range(4):
            for register in range(4):
                row, column = group + 8 * (register % 2), 4 * quad + byte + 16 * (register // 2)
                a[warp, row, column] = values[thread, register, byte]
            for register in range(2):
                b[warp, group, 4 * quad + byte + 16 * register] = values[thread, 4 + register, byte]
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        group, quad = divmod(lane, 4)
        for i in range(4):
            row, column = group + 8 * (i // 2), 2 * quad + i % 2
            assert product[thread, i] == pytest.approx(a[warp, row] @ b[warp, column], rel=1e-12, abs=1e-9)
            assert magnitude[thread, i] >= abs(product[thread, i]) * (1 - 1e-12)


@pytest.mark.parametrize("shape", shapes.MOE_GEMMS, ids=lambda shape: shape.name.replace(" ", "-"))
def test_routings_and_rotation(shape: shapes.MoeGemm, rng: np.random.Generator) -> None:
    routing = shapes.make_routing(shape, 32, rng)
    assert all(len(set(row)) == shape.top_k for row in routing.expert_ids.tolist())
    assert routing.offsets[-1] == 32 * shape.top_k
    counts = np.bincount(routing.expert_ids.reshape(-1), minlength=shape.experts)
    assert (np.diff(routing.offsets) == counts).all()
    l2 = 60 << 20
    sets = shapes.weight_sets(shape, routing.active.size, l2)
    assert sets * routing.active.size * shape.expert_bytes >= 3 * l2
    turns = shapes.rotation(sets)
    assert len(turns) >= 16
    assert set(turns) == {(r, s) for r in range(shapes.ROUTINGS) for s in range(sets)}


def test_a_result_passes_within_its_bound_and_with_nothing_damaged() -> None:
    assert matrix.Result("v", "c", 1.0, 0).passed
    assert not matrix.Result("v", "c", 1.001, 0).passed
    assert not matrix.Result("v", "c", float("inf"), 0).passed
    assert not matrix.Result("v", "c", float("nan"), 0).passed
    assert not matrix.Result("v", "c", 0.5, 1).passed


STORED = {
    "date": "2026-11-22",
    "device": "a device",
    "rows": [
        {
            **{"model": "m", "gemm": "GEMM1", "T": t, "experts": 8, "K": 16, "N": 8, "floor": "read"},
            **{
                "floor_us": 5.0 * t,
                "percent_of_floor": 80.0,
                "gb_per_s": 100.0,
                "best_variant": "v",
                "notes": {},
            },
            "times": {"sm12x": {"median_us": 7.0 * t, "iqr_us": 0.5, "replays": 9}},
        }
        for t in (1, 8)
    ],
}


def test_bench_draws_stored_results(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    stored, plot = tmp_path / "stored.json", tmp_path / "plot.png"
    stored.write_text(json.dumps(STORED))
    assert main(["bench", "--from", str(stored), "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "GEMM1" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"rows": 5}'])
def test_bench_refuses_what_is_no_result(tmp_path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    stored = tmp_path / "stored.json"
    stored.write_text(text)
    assert main(["bench", "--from", str(stored)]) == 2
    assert "--from" in capsys.readouterr().err


def test_bad_usage_is_said_before_a_gpu_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--parts", "matrix,nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err
    assert main(["bench", "--tokens", "1,x"]) == 2
    assert "--tokens" in capsys.readouterr().err
