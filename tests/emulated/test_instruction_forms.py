"""The instruction forms that tests/gpu/compare_with_gpu.py compares with a GPU, without one: each runs, on a
few operands, and computes what a model says where no other test has one; the comparison finds planted errors;
and what no form covers is named with its reason.
"""

from __future__ import annotations

import functools
import pickle

import numpy as np
import pytest

from emulated.instruction_models import model_of
from gpu import compare_with_gpu
from gpu.instructions import compare, coverage, on_device, operands, tables
from gpu.instructions.forms import width
from gpu.instructions.on_emulator import run
from gpu.instructions.rules import Bits
from sm12x.emulator.families import floating
from sm12x.emulator.numerics import arith

COUNT = 128


@functools.cache
def results(family):
    """Forms of a family with their operands and results. Seeds are the forms' names."""
    forms = tables.forms(family)
    columns = [operands.generate(form, COUNT, 1) for form in forms]
    return list(zip(forms, columns, run(forms, columns, COUNT), strict=True))


def named(name):
    return next(form for form in tables.all_forms() if form.name == name)


@pytest.mark.parametrize("family", tables.FAMILIES)
def test_every_form_runs_and_keeps_its_own_rule(family):
    """Approximations are within the ISA's error of the exact function; the rest only equals itself."""
    for form, columns, found in results(family):
        outcome = compare.compare(form, columns, found, found)
        assert outcome.compared == COUNT * len(form.results)
        assert outcome.mismatches == 0, f"{form.name}: {outcome.examples[:1]}"


@pytest.mark.parametrize("family", tables.FAMILIES)
def test_results_do_not_depend_on_the_schedule(family):
    some = results(family)[:: max(1, len(results(family)) // 12)]
    forms, columns = [form for form, _, _ in some], [column for _, column, _ in some]
    for (form, _, first), second in zip(some, run(forms, columns, COUNT, seed=99), strict=True):
        for x, y in zip(first, second, strict=True):
            np.testing.assert_array_equal(x, y, err_msg=form.name)


@pytest.mark.parametrize("family", tables.FAMILIES)
def test_forms_compute_what_their_models_say(family):
    modelled = 0
    for form, columns, found in results(family):
        model = model_of(form)
        if model is None:
            continue
        modelled += 1
        function, of_warp = model
        rows = list(zip(*(column.tolist() for column in columns), strict=True))
        if of_warp:
            expected = [row for at in range(0, COUNT, 32) for row in function(rows[at : at + 32])]
        else:
            expected = [function(row) for row in rows]
        for n, got in enumerate(found):
            want = np.array([row[n] for row in expected], got.dtype)
            differ = np.flatnonzero(got != want)
            assert not differ.size, f"{form.name}: operands {[hex(v) for v in rows[differ[0]]]}"
    least = {"compare_select": 500, "data_movement": 150, "atomics": 200, "warp_wide": 80, "logic": 20}
    assert modelled >= least.get(family, 0)


def test_every_handler_of_the_emulator_is_covered_or_exempt():
    names, reached = coverage.handlers()
    assert sorted(names - reached - set(coverage.HANDLERS)) == []
    assert sorted(set(coverage.HANDLERS) - names) == [], "exempt, and not there"
    assert sorted(set(coverage.HANDLERS) & reached) == [], "exempt, and covered"


def test_every_form_of_the_numerics_is_covered_or_exempt():
    assert coverage.uncovered() == []
    assert [form.name for form in tables.all_forms() if coverage.exempt(form.opcode)] == []
    # the check sees a form that goes missing
    assert coverage.exempt("fma.rn.f32") is None
    assert len(list(coverage.numerics())) > 600


def test_operands_have_special_values_ties_and_every_half():
    form = named("fma.rm.f32")
    columns = operands.generate(form, 4096, 7)
    assert all(len(column) == 4096 for column in columns)
    for bits in (0, 0x80000000, 1, 0x007FFFFF, 0x7F800000, 0xFF800000, 0x7FFFFFFF, 0x3F800000, 0x7F800001):
        assert all((column == bits).any() for column in columns), hex(bits)
    with np.errstate(all="ignore"):
        product = columns[0].view(np.float32).astype(np.float64) * columns[1].view(np.float32)
        near = np.abs(product + columns[2].view(np.float32)) <= 2.0**-20 * np.abs(product)
    assert (near & np.isfinite(product) & (product != 0)).sum() > 100, "sums that all but cancel"
    (halves,) = operands.generate(named("cvt.rzi.s32.f16"), 1 << 16, 7)
    assert len(np.unique(halves)) == 1 << 16
    (singles,) = operands.generate(named("cvt.rn.f16.f32"), 4096, 7)
    assert ((singles & 0x1FFF) == 0x1000).sum() > 100, "halfway between two numbers of f16"


def test_a_planted_error_is_found(monkeypatch):
    """One result in 64 is a unit off: the comparison counts it, and shows operands and both results."""
    form = named("mul.rz.f32")
    columns = operands.generate(form, COUNT, 1)
    right = run([form], [columns], COUNT)[0]
    true_lookup = arith.lookup

    def wrong(*arguments):
        function = true_lookup(*arguments)

        def run_wrong(a, b):
            return function(a, b) + ((a ^ b) % 64 == 5).astype(np.uint32)

        return run_wrong

    monkeypatch.setattr(floating.arith, "lookup", wrong)
    found = run([form], [columns], COUNT)[0]
    expected = int(((columns[0] ^ columns[1]) % 64 == 5).sum())
    outcome = compare.compare(form, columns, right, found)
    assert outcome.mismatches == expected > 0
    at = int(np.argmax(right[0] != found[0]))
    for value in (columns[0][at], columns[1][at], right[0][at], found[0][at]):
        assert f"{int(value):#010x}" in outcome.examples[0]
    assert compare.compare(form, columns, right, right).mismatches == 0


@pytest.mark.parametrize("name", ["rcp.approx.f32", "ex2.approx.f16x2", "tanh.approx.bf16", "div.full.f32"])
def test_errors_beyond_the_stated_ones_are_found(name):
    form, columns, found = next(entry for entry in results("approximate") if entry[0].name == name)
    step = found[0].dtype.type(4 if width(form.results[0]) == 32 and "x2" not in name else 64)
    normal = np.flatnonzero(_ordinary(form, found[0]))[:5]
    for at in normal:
        wrong = [found[0].copy()]
        wrong[0][at] += step
        outcome = compare.compare(form, columns, wrong, found)
        assert outcome.mismatches == 1, hex(int(found[0][at]))
        assert outcome.worst > 1


def _ordinary(form, bits):
    """Where a result is a finite number far from the ends of its type, and no ratio of special ones."""
    scalar = operands.PAIRS.get(form.results[0], form.results[0])
    part = bits.view(f"u{operands.FLOATS[scalar][0] // 8}").reshape(len(bits), -1)[:, 0]
    fraction, exponents = operands.FLOATS[scalar][2], operands.FLOATS[scalar][1]
    field = (part >> fraction) & ((1 << exponents) - 1)
    return (field > (1 << exponents - 2)) & (field < (1 << exponents - 1))


@pytest.mark.parametrize("accumulator", ["f16", "f32"])
def test_sums_off_by_more_than_their_order_explains_are_found(accumulator):
    opcode = f"mma.sync.aligned.m16n8k16.row.col.{accumulator}.f16.f16.{accumulator}"
    for inputs in ("gentle", "integer"):
        form, columns, found = next(e for e in results("matrix") if e[0].name == f"{opcode} {inputs}")
        wrong = [x.copy() for x in found]
        top = 1 << (30 if accumulator == "f32" else 14)  # the exponent's highest bit
        wrong[1][40] ^= np.uint32(top)
        assert compare.compare(form, columns, wrong, found).mismatches == 1
        wrong = [x.copy() for x in found]
        wrong[0][3] ^= np.uint32(1)
        assert compare.compare(form, columns, wrong, found).mismatches == (inputs == "integer")


def test_open_payloads_of_nan_are_counted_apart():
    rule = Bits(open_nan="f16x2")
    got, want = (
        [np.array([0x7E01_3C00, 0x7E01_3C00, 1], np.uint32)],
        [np.array([0x7FFF_3C00, 0x7FFF_3C01, 1], np.uint32)],
    )
    bad, _, nan = compare._bits(rule, got, want)
    assert bad[0].tolist() == [False, True, False]
    assert nan == 1


class _StandIn:
    """A device that gets one form wrong, refuses one, and fails at one."""

    name, capability = "stand-in", (9, 0)

    def run(self, forms, columns, count):
        found = run(forms, columns, count)
        for at, form in enumerate(forms):
            if form.name == "popc.b32":
                found[at][0][7] ^= 1
            elif form.name == "clz.b32":
                found[at] = on_device.DeviceError("refused")
            elif form.name == "brev.b32":
                raise on_device.DeviceError("failed")
        return found


def test_the_program_reports_each_form_that_differs_is_refused_or_fails(monkeypatch):
    monkeypatch.setattr(on_device, "Device", _StandIn)
    group = compare_with_gpu.Group("logic", COUNT, ("clz.b32", "popc.b32", "popc.b64"))
    assert pickle.loads(pickle.dumps(group)) == group
    done = compare_with_gpu.run_on_device([group], 3)
    emulated, _ = compare_with_gpu.emulate(group, 3)
    rows = [
        compare_with_gpu.judge(group, form, 3, x, y)
        for form, x, y in zip(group.forms, done.results[0], emulated, strict=True)
    ]
    by_name = {row.name: row for row in rows}
    assert by_name["clz.b32"].problem == "refused"
    assert by_name["popc.b32"].mismatches == 1
    assert by_name["popc.b32"].examples[0].startswith("thread 7: operands 0x")
    assert [row.name for row in rows if row.passed] == ["popc.b64"]
    assert "2" in compare_with_gpu.table(rows).split("\n")[1].split()
    broken = compare_with_gpu.Group("logic", COUNT, ("brev.b32",))
    done = compare_with_gpu.run_on_device([group, broken, group], 3)
    assert (len(done.results), done.error) == (1, "device: failed")


def test_the_program_runs_every_form_once():
    names = [name for group in compare_with_gpu.groups("", COUNT) for name in group.names]
    assert sorted(names) == sorted(form.name for form in tables.all_forms())
