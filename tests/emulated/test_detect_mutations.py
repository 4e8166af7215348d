"""A shipped kernel that lacks any one of the fences, barriers and waits of its epilogue, or of its consumers'
waits for a full stage, is caught: by the checkers, not by a wrong result.
"""

from __future__ import annotations

import itertools
import re

import pytest

from emulated import kernels
from emulated.gemm_case import Case, Problem, variant_of
from sm12x.emulator.errors import EmulatorError

KEY = "fp8_ptr_array_128x128x128_coop_bf16"
PROBLEM = Problem((130, 5), 192, 256)
# What is taken out, and the kinds of violation that it may be reported as.
NEEDED = {
    r"fence\.proxy\.async\.shared::cta;": {"proxy"},
    r"bar\.sync %r\d+, %r\d+;": {"race"},
    r"cp\.async\.bulk\.wait_group\.read\s+1;": {"race"},
}


def _lines():
    """Line numbers, from 0, of the epilogue's synchronisation: between its first and last matrix store, so
    that the tile scheduler's own is not among them.
    """
    lines = kernels.ptx(KEY).split("\n")
    stores = [at for at, line in enumerate(lines) if "stmatrix" in line]
    found = []
    for at in range(stores[0], stores[-1]):
        for pattern, kinds in NEEDED.items():
            if re.search(pattern, lines[at]):
                found.append((at, kinds))
    return found


def _run(monkeypatch, text, seed):
    monkeypatch.setattr(
        kernels,
        "ptx",
        lambda key, arch="sm_120a", plain=kernels.ptx: text if key == KEY else plain(key, arch),
    )
    case, variant = Case(PROBLEM, "bfloat16", 5), variant_of(KEY)
    return case.check(case.run(variant, 1, seed=seed))


def test_there_is_something_to_take_out():
    assert len(_lines()) >= 20


def test_the_kernel_as_it_is_passes(monkeypatch):
    assert _run(monkeypatch, kernels.ptx(KEY), 1) <= 1


@pytest.mark.parametrize("number", range(0, 28, 3))
def test_without_one_of_the_epilogues_synchronisations(monkeypatch, number):
    at, kinds = _lines()[number]
    lines = kernels.ptx(KEY).split("\n")
    taken, lines[at] = lines[at], ""
    with pytest.raises(EmulatorError) as caught:
        _run(monkeypatch, "\n".join(lines), number)
    assert caught.value.violation is not None, caught.value
    assert caught.value.violation.kind in kinds, (at + 1, taken, caught.value)


def test_without_the_wait_for_a_full_stage(monkeypatch):
    text = kernels.ptx(KEY)
    events = list(re.finditer(r"(ldmatrix)|(mbarrier\.try_wait\.parity\.shared::cta\.b64 P1, [^;]*;)", text))
    waits = [wait[2] for wait, following in itertools.pairwise(events) if wait[2] and following[1]]
    assert len(waits) == 2  # before a tile's first k-tile, and before every other one
    for wait in waits:
        with pytest.raises(EmulatorError) as caught:
            _run(monkeypatch, text.replace(wait, "setp.eq.u32 P1, 0, 0;"), 2)
        assert caught.value.violation.kind in ("race", "uninitialised")
