"""The float64 stages that the GPU tests compute with torch are those of `sm12x.reference` in NumPy."""

from __future__ import annotations

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
sys.path.append(str(Path(__file__).resolve().parents[1] / "gpu"))

import layer_reference  # noqa: E402
from layer_strata import KINDS  # noqa: E402

from sm12x.ops.activation import activation  # noqa: E402
from sm12x.reference import activation as numpy_activation  # noqa: E402
from sm12x.reference import moe, moe_checks, quantize, rounding  # noqa: E402


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(np.random.default_rng().integers(1 << 31))
    print(f"seed {seed}")
    return np.random.default_rng(seed)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("limit", [None, 0.6])
def test_activations_and_their_errors(kind: tuple[str, bool], limit: float | None, rng) -> None:
    name, gated = kind
    how = activation(name, gated, limit=limit if name == "silu" or name.startswith("swiglu") else None)
    rows = rng.standard_normal((7, 64)) * np.exp(2 * rng.standard_normal((7, 1)))
    errors = np.abs(rng.standard_normal(rows.shape)) * 1e-5
    (g, u), (eg, eu) = numpy_activation.split(rows, how), numpy_activation.split(errors, how)
    ours = layer_reference.split(torch.as_tensor(rows), how)
    allowed = layer_reference.split(torch.as_tensor(errors), how)
    expected = numpy_activation.activate(g, u, how)
    np.testing.assert_allclose(layer_reference.activate(*ours, how), expected, rtol=1e-12, atol=1e-300)
    expected = moe_checks.activation_error(g, u, eg, eu, how)
    found = layer_reference.activation_error(*ours, *allowed, how)
    # What a clamped value may move by is a difference of neighbours.
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_codes_and_scales(dtype, rng) -> None:
    x = (
        (rng.standard_normal((40, 48)) * np.exp2(rng.integers(-20, 8, (40, 1))))
        .astype(dtype)
        .astype(np.float32)
    )
    x[3], x[4, 5] = 0, np.nan
    codes, scale = quantize.quantize_fp8_numpy(x)
    values = torch.as_tensor(x)
    found = layer_reference.dynamic_scale(values)
    np.testing.assert_array_equal(found, scale)
    np.testing.assert_array_equal(layer_reference.codes_of(values, found), codes.view(np.uint8))
    assert [
        int(n) for n in layer_reference.wrong_codes(values, torch.as_tensor(codes.view(np.uint8)), found)
    ] == [0, 0]
    wrong = codes.view(np.uint8).copy()
    wrong[0, 0] ^= 0x80 if wrong[0, 0] & 0x7F > 8 else 0x7F
    far, unequal = layer_reference.wrong_codes(values, torch.as_tensor(wrong), found)
    assert (int(far), int(unequal)) == (1, 1)
    wide = rng.standard_normal((9, 32)) * 50
    expected = rounding.to_e4m3(wide / 0.37).view(np.uint8)
    divisor = torch.tensor([0.37], dtype=torch.float64)
    np.testing.assert_array_equal(layer_reference.codes_of(torch.as_tensor(wide), divisor), expected)


def test_rows_are_combined_in_order(rng) -> None:
    y = rng.standard_normal((11, 16)).astype(np.float32)
    route_row = rng.permutation(12).reshape(4, 3) - 1
    found = layer_reference.combine(torch.as_tensor(y), torch.as_tensor(route_row))
    np.testing.assert_array_equal(found, moe.combine(y, route_row))


def test_errors_of_tokens(rng) -> None:
    ref = rng.standard_normal((5, 16))
    ref[2] = 0
    out = ref + 1e-3 * rng.standard_normal(ref.shape)
    out[2], out[4, 0] = 0, np.nan
    norm = torch.as_tensor(ref).norm(dim=1)
    found = layer_reference.token_errors(torch.as_tensor(out), torch.as_tensor(ref), norm)
    np.testing.assert_allclose(found, moe_checks.token_errors(out, ref), rtol=1e-12)
