"""Device-side offsets that are wrong: nothing outside `out` is ever written, and SM12X_CHECK=1 names them."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the GPU tests make their references with torch")

from torch_reference import PoisonedOut, Verdicts, error_ratio, make_problem, scaled_reference  # noqa: E402
from variants import VARIANTS, Variant, key  # noqa: E402

import sm12x  # noqa: E402
from sm12x.validation.cases import Scales, offsets_of  # noqa: E402

ROWS = np.array([40, 0, 130, 7, 64], dtype=np.int64)
TOTAL = int(ROWS.sum())
BROKEN = {
    "decreasing": [0, 40, 20, 177, 170, TOTAL],
    "past_M": [0, 40, 40, 170, 177, TOTAL + 500],
    "far_past_M": [0, 2**31 - 1, 2**31 - 1, 2**31 - 1, 2**31 - 1, 2**31 - 1],
    "negative": [-64, 40, 40, 170, 177, TOTAL],
    "most_negative": [-(2**31), -(2**31), 0, 0, 177, TOTAL],
    "reversed": list(reversed(offsets_of(ROWS).tolist())),
    "starts_past_M": [TOTAL + 7] * 6,
}
BROKEN_64 = {
    "above_32_bits": [0, 40, 40, 170, 177, 2**32 + TOTAL],
    "below_32_bits": [-(2**40), 40, 40, 170, 177, TOTAL],
}


@pytest.mark.parametrize("variant", VARIANTS, ids=key)
def test_wrong_offsets_never_write_outside_out(variant: Variant, seed: int) -> None:
    problem = make_problem(ROWS, 136, 144, seed)
    cases = [(name, offsets, torch.int32) for name, offsets in BROKEN.items()]
    cases += [(name, offsets, torch.int64) for name, offsets in {**BROKEN, **BROKEN_64}.items()]
    for name, offsets, dtype in cases:
        poisoned = PoisonedOut(TOTAL, 136, variant.out, "cuda", row_pad=8)
        sm12x.grouped_gemm(
            problem.a,
            problem.b,
            a_scale=2.0**-8,
            b_scale=2.0**-8,
            offsets=torch.tensor(offsets, dtype=dtype, device="cuda"),
            out=poisoned.out,
            out_dtype=variant.out,
            variant=variant.key,
        )
        damaged = int(poisoned.damaged().item())
        assert damaged == 0, f"{name} ({dtype}): {damaged} elements outside out were written"


@pytest.mark.parametrize("variant", VARIANTS, ids=key)
def test_rows_that_no_group_owns_are_not_written(variant: Variant, seed: int) -> None:
    """offsets may start after row 0 and end before row M: those rows of out stay as they were."""
    problem = make_problem(ROWS, 136, 144, seed)
    before, after = 5, 9
    total = before + TOTAL + after
    a = torch.full((total, 144), 0x7F, dtype=torch.uint8, device="cuda")
    a[before : before + TOTAL] = problem.a.view(torch.uint8)
    poisoned = PoisonedOut(total, 136, variant.out, "cuda")
    sm12x.grouped_gemm(
        a.view(torch.float8_e4m3fn),
        problem.b,
        a_scale=2.0**-8,
        b_scale=2.0**-8,
        offsets=torch.as_tensor(offsets_of(ROWS, before), dtype=torch.int32, device="cuda"),
        out=poisoned.out,
        out_dtype=variant.out,
        variant=variant.key,
    )
    verdicts = Verdicts()
    reference, magnitude = scaled_reference(problem, Scales(2.0**-8, 2.0**-8))
    inner = slice(before, before + TOTAL)
    ratio = error_ratio(poisoned.out[inner], reference, magnitude, 144, variant.out)
    verdicts.add("owned rows", ratio, poisoned.damaged(inner))
    verdicts.check(seed)


CHECKED = """
import sys, torch, sm12x
offsets = [int(x) for x in sys.argv[1].split(",")]
a = torch.zeros(241, 16, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
b = torch.zeros(5, 8, 16, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
out = torch.full((241, 8), 7.0, dtype=torch.bfloat16, device="cuda")
good = torch.tensor([0, 40, 40, 170, 177, 241], dtype=torch.int32, device="cuda")
sm12x.grouped_gemm(a, b, offsets=good, out=out)
assert (out == 0).all(), "a call with right offsets must run"
out.fill_(7.0)
try:
    sm12x.grouped_gemm(a, b, offsets=torch.tensor(offsets, dtype=torch.int32, device="cuda"), out=out)
except ValueError as error:
    print(error)
    assert "offsets" in str(error), error
    assert (out == 7.0).all(), "out was written"
else:
    raise SystemExit("no ValueError")
workspace = torch.empty(sm12x.workspace_size(5), dtype=torch.uint8, device="cuda")
graph = torch.cuda.CUDAGraph()
try:
    with torch.cuda.graph(graph):
        sm12x.grouped_gemm(a, b, offsets=good, out=out, workspace=workspace)
except Exception as error:
    print(type(error).__name__, error)
    assert "captur" in str(error), error
else:
    raise SystemExit("SM12X_CHECK=1 was not refused while capturing")
"""


@pytest.mark.parametrize("name", ["decreasing", "past_M", "negative", "far_past_M"])
def test_checked_offsets_are_an_error(name: str) -> None:
    """SM12X_CHECK=1: ValueError naming `offsets`, out untouched; refused with a sentence under capture."""
    assert TOTAL == 241
    text = ",".join(str(value) for value in BROKEN[name])
    environment = dict(os.environ, SM12X_CHECK="1")
    done = subprocess.run(
        [sys.executable, "-c", CHECKED, text], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
