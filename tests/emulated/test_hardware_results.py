"""The emulator against results of single instructions that a GPU gave (`hardware_results.txt`), without one.

The table holds the operands and results of the forms of which emulator and GPU once differed, as
tests/gpu/compare_with_gpu.py reported them; their rules of comparison are those of the forms.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpu.instructions import compare, tables
from gpu.instructions.forms import width
from gpu.instructions.on_emulator import run

COUNT = 128
TABLE = Path(__file__).with_name("hardware_results.txt")


def columns(kinds, rows):
    """One unsigned array for each operand or result; the rows again and again up to COUNT."""
    words = zip(*(row.split() for row in rows), strict=True)
    return [
        np.resize(np.array([int(word, 16) for word in column], f"u{width(kind) // 8}"), COUNT)
        for kind, column in zip(kinds, words, strict=True)
    ]


def stored(family):
    """Forms of a family with the operands and results of the GPU."""
    forms = {form.name: form for form in tables.forms(family)}
    found = []
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{family} | "):
            _, name, examples = line.split(" | ")
            sources, results = zip(*(example.split(" = ") for example in examples.split("; ")), strict=True)
            form = forms[name]
            found.append((form, columns(form.operands, sources), columns(form.results, results)))
    return found


# family -> forms in the table
FORMS = {"approximate": 2, "floating": 54, "conversion": 26, "logic": 3, "atomics": 4}


@pytest.mark.parametrize("family", FORMS)
def test_the_emulator_gives_what_the_gpu_gave(family):
    examples = stored(family)
    assert len(examples) == FORMS[family]
    forms, operands, _ = zip(*examples, strict=True)
    for (form, sources, want), got in zip(examples, run(forms, operands, COUNT), strict=True):
        outcome = compare.compare(form, sources, want, got)
        assert outcome.mismatches == 0, f"{form.name}: {outcome.examples[0]}"
        # the comparison sees a wrong bit of the result
        wrong = [*want[:-1], want[-1] ^ want[-1].dtype.type(64)]
        assert compare.compare(form, sources, wrong, got).mismatches == COUNT, form.name


def test_every_line_of_the_table_is_used():
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert len(lines) == sum(FORMS.values())
