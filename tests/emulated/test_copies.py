"""Asynchronous copies of every kind through whole kernels, against a model that walks them item by item.

The same cases run on a GPU (tests/gpu/twins/copies.py); here is a sample, whose seed changes from run to run.
"""

import os
import random

import numpy as np
import pytest

from emulated.copies import encode_cases, generate, model, on_emulator
from emulated.copies.case import FIELDS, GUARD, Case, Map

_SEED = os.environ.get("SM12X_TEST_SEED")


@pytest.fixture
def seed():
    found = int(_SEED) if _SEED else random.SystemRandom().randrange(2**32)
    print(f"seed {found} (repeat with SM12X_TEST_SEED={found})")
    return found


def check(case, schedule=0):
    outcome = on_emulator.run(case, schedule)
    print(case.described())
    assert outcome.error is None, outcome.error
    found, wanted = np.frombuffer(outcome.arena, np.uint8), np.frombuffer(model.expected(case), np.uint8)
    wrong = np.flatnonzero(found != wanted)
    assert not len(wrong), f"{len(wrong)} bytes of the arena differ, the first at {wrong[0]} of {case.places}"


def sample(name, seed, count):
    """Some cases behind each other: generators go round operations, types and ranks."""
    cases = generate.batch(name, seed)
    start = random.Random(seed).randrange(max(1, len(cases) - count))
    return cases[start : start + count]


@pytest.mark.parametrize("name", ["loads", "strided", "narrow", "interleaved", "stores", "row_ends"])
def test_tensor_copies_move_what_the_model_moves(name, seed):
    cases = sample(name, seed, 70)
    assert len({case.map.rank for case in cases}) >= (5 if name in ("loads", "stores") else 1)
    for number, case in enumerate(cases):
        check(case, number)


def test_tensor_reductions_combine_what_the_model_combines(seed):
    cases = sample("reductions", seed, 90)
    assert len({case.kernel.split("_")[1] for case in cases}) == 8
    for number, case in enumerate(cases):
        check(case, number)


def test_bulk_copies_and_reductions_do_what_the_model_does(seed):
    cases = sample("bulk", seed, 40) + sample("bulk_within", seed, 10) + sample("bulk_reductions", seed, 110)
    for number, case in enumerate(cases):
        check(case, number)


def test_copies_of_threads_fill_with_zeros_behind_a_short_source(seed):
    for number, case in enumerate(sample("cp_async", seed, 24)):
        check(case, number)


def test_replaced_maps_load_as_maps_encoded_so(seed):
    cases = sample("replacements", seed, 90)
    assert {name for case in cases for name in case.replaced} == set(FIELDS)
    for number, case in enumerate(cases):
        check(case, number)


def test_barriers_give_the_counts_of_their_script(seed):
    for case in generate.batch("mbarrier", seed):
        check(case)


def test_prefetches_change_nothing(seed):
    for case in sample("prefetches", seed, 10):
        check(case)


def test_what_hardware_refuses_is_refused(seed):
    families = set()
    for number, case in enumerate(generate.batch("doubtful", seed)):
        outcome = on_emulator.run(case, number)
        assert outcome.error is not None, case.described()
        assert outcome.error.startswith("EmulatorError"), outcome.error
        families.add(case.family)
    assert len(families) > 20


@pytest.mark.parametrize("extent", [1, 15, 16, 17])
def test_a_write_goes_on_to_the_end_of_the_rows_last_16_bytes(extent):
    """What an H200 does; a load of the same box has zeros from the extent on."""
    for kernel in ("store_2d", "load_2d"):
        m = Map(0, (extent, 2), (64,), (48, 2), (1, 1))
        case = Case("", kernel, 7, 1024, 2048, m, coords=(0, 0), size=m.box_bytes)
        check(case)
        before = case.arena()
        after = np.frombuffer(on_emulator.run(case).arena, np.uint8)
        end = -(-extent // 16) * 16
        if kernel == "store_2d":
            stored = before[case.places[0] : case.places[0] + 48]
            row = after[GUARD : GUARD + 64]
            assert (row[:end] == stored[:end]).all()
            assert (row[end:] == before[GUARD + end : GUARD + 64]).all()
        else:
            loaded = after[case.places[1] : case.places[1] + 48]
            assert (loaded[:extent] == before[GUARD : GUARD + extent]).all()
            assert not loaded[extent:].any()


def test_legal_maps_are_taken(seed):
    rng = random.Random(seed)
    refused = 0
    for _ in range(400):
        base, changes = encode_cases.draw(rng)
        assert encode_cases.accepts(encode_cases.applied(base, []), 1 << 40) == (True, None)
        refused += not encode_cases.accepts(encode_cases.applied(base, changes), 1 << 40)[0]
    assert 50 < refused < 350, "the changes no longer reach the edges of the rules"
