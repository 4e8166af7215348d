"""fit_select.py: what it says about choices and constants, on times that are known beforehand."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import fit_select

from sm12x.select.rates import FAMILIES, RATES
from unit.packed_variants import packed_variants

VARIANTS = {variant.key: variant for variant in packed_variants()}
FAST, SLOW = "fp8_packed_128x8x128_swap", "fp8_packed_128x128x128_coop"
SHAPES = [("gemma-4-26B-A4B", "GEMM1", 128, 2816, 1408), ("mixtral-8x7B", "GEMM2", 8, 14336, 4096)]


@pytest.fixture(autouse=True)
def constants_stay():
    rates, families = dict(RATES), dict(FAMILIES)
    yield
    assert rates == RATES
    assert families == FAMILIES


def write(path, rows, **more):
    path.write_text(json.dumps({"arch": "sm_90a", "sm_count": 132, "rows": rows, **more}))
    return path


def row(times, tokens=8, shape=SHAPES[0], **more):
    model, gemm, experts, k, n = shape
    return {"model": model, "gemm": gemm, "T": tokens, "E": experts, "K": k, "N": n, "times": times, **more}


def rows_of_the_model(path):
    """Rows whose times are what the model expects with the constants that are set now."""
    names = [key + mode for key in VARIANTS for mode in ("", ":split")]
    blank = [
        row(dict.fromkeys(names, 1.0), tokens, shape, gathers=gathers)
        for tokens in (1, 4, 16, 64, 256)
        for shape in SHAPES
        for gathers in (False, True)
    ]
    read = fit_select.read_rows(write(path, blank), VARIANTS, None)
    return [
        replace(one, times=tuple(replace(time, us=fit_select.predict(one, time)) for time in one.times))
        for one in read
    ]


def test_times_come_in_both_forms_and_others_are_left_out(tmp_path):
    times = {
        FAST: {"median_us": 3.5, "iqr_us": 0.1},
        f"{SLOW}:split": 4,
        "torch": {"median_us": 1},
        "sm12x": 2,
    }
    path = write(tmp_path / "a.json", [row(times), row({FAST: 1.0}), {"model": "failed", "error": "x"}])
    [one] = fit_select.read_rows(path, VARIANTS, None)
    assert [(time.name, time.us, bool(time.leasts)) for time in one.times] == [
        (FAST, 3.5, False),
        (f"{SLOW}:split", 4.0, True),
    ]
    assert (one.problem.rows, one.problem.groups, one.sms) == (64, 128, 132)
    assert not one.problem.gathers


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row({"fp8_packed_1x1x1": 1})], "fp8_packed_1x1x1 is not in the manifest"),
        ([row({f"{FAST}:half": 1})], "expected fp8_packed_128x8x128_swap or"),
        ([row({FAST: 1}, shape=("other", "GEMM1", 8, 64, 64))], "other is not a model"),
    ],
)
def test_what_cannot_be_judged_is_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        fit_select.read_rows(write(tmp_path / "a.json", rows), VARIANTS, None)


def test_a_file_that_is_no_result_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match="expected an object"):
        fit_select.read_rows(path, VARIANTS, None)


def test_loss_is_the_choice_over_the_best(tmp_path):
    # The model takes the small tile; by these times that is 25 % slower in one row and right in the other.
    path = write(tmp_path / "a.json", [row({FAST: 10.0, SLOW: 8.0}), row({FAST: 8.0, SLOW: 10.0})])
    verdicts = fit_select.judge(fit_select.read_rows(path, VARIANTS, None))
    assert [verdict.chosen.name for verdict in verdicts] == [FAST, FAST]
    assert [verdict.loss for verdict in verdicts] == pytest.approx([1.25, 1.0])
    assert "best chosen in 1; loss: geometric mean 11.80%, worst 25.0%" in fit_select.summary(verdicts)


def test_the_fit_finds_constants_that_made_the_times(tmp_path, monkeypatch):
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    arch = "sm_90a"
    present, family = RATES[arch], FAMILIES["fp8_packed"]
    with monkeypatch.context() as other:
        truth = replace(present, mma=present.mma * rng.uniform(0.6, 0.8), fix_up=present.fix_up * 1.5)
        other.setitem(RATES, arch, truth)
        other.setitem(FAMILIES, "fp8_packed", replace(family, start=family.start * rng.uniform(1.5, 2.5)))
        true_start = FAMILIES["fp8_packed"].start
        rows = rows_of_the_model(tmp_path / "a.json")
    which = [where for where in fit_select.constants_of(rows) if where[1] in ("mma", "fix_up", "start")]
    assert len(which) == 3
    try:
        fit_select.fit(rows, which, 60)
        found = {where[1]: fit_select.get_constant(where) for where in which}
    finally:
        RATES[arch], FAMILIES["fp8_packed"] = present, family
    assert found["mma"] == pytest.approx(truth.mma, rel=0.02)
    assert found["start"] == pytest.approx(true_start, rel=0.05)
    assert found["fix_up"] == pytest.approx(truth.fix_up, rel=0.1)


def test_constants_that_rows_say_nothing_of_are_not_fitted(tmp_path):
    path = write(tmp_path / "a.json", [row({FAST: 10.0, SLOW: 8.0})])
    names = {name for _, name in fit_select.constants_of(fit_select.read_rows(path, VARIANTS, None))}
    assert not names & {"fix_up", "gathered", "handed", "lookup"}
    both = {name for _, name in fit_select.constants_of(rows_of_the_model(tmp_path / "b.json"))}
    assert names | {"fix_up", "gathered", "handed", "lookup"} == both


def test_the_report_has_everything_and_changes_nothing(tmp_path):
    rows = rows_of_the_model(tmp_path / "a.json")
    text = fit_select.report(rows, fit_select.constants_of(rows), 2)
    assert "present constants: 20 rows, best chosen in 20; loss: geometric mean 0.00%" in text
    assert "| sm_90a mma |" in text
    assert "fitted constants: 20 rows" in text
    assert "fp8_packed:split: " in text


def test_the_stored_run_is_chosen_well():
    """The constants of ptr_array stand on this file: its best variant is chosen in nearly every row."""
    from sm12x import manifest

    path = Path(__file__).resolve().parents[1] / "benchmarks/results/2026-11-22_grouped_gemm_h200.json"
    variants = {variant.key: variant for variant in manifest.default().gemms()}
    verdicts = fit_select.judge(fit_select.read_rows(path, variants, None))
    assert len(verdicts) == 24
    assert max(verdict.loss for verdict in verdicts) < 1.02
    for verdict in verdicts:
        assert verdict.predicted == pytest.approx(verdict.chosen.us, rel=0.2), verdict.row.name
