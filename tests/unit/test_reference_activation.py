"""The activations of an expert layer: values, derivatives and how errors pass through them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from sm12x.ops.activation import ACTIVATIONS, activation
from sm12x.reference.activation import activate, gate, gate_curvature, gate_slope, split
from sm12x.reference.moe_checks import activation_error
from unit.moe_cases import KINDS
from unit.moe_oracle import act

PARAMETERS = {
    "swigluoai": ({}, {"alpha": 0.8, "beta": -0.5, "limit": 2.0}, {"alpha": -1.5}),
    "silu": ({}, {"limit": 1.5}),
}
# Every activation with its parameters, gated and not.
VARIANTS = [
    (name, gated, parameters)
    for name, gated in KINDS
    for parameters in PARAMETERS.get(name.removesuffix("_uninterleave"), ({},))
]


@pytest.fixture
def rng():
    seed = int(np.random.SeedSequence().entropy) % 2**32
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def spread(rng, size):
    """Values from tiny to some tens, of both signs."""
    return rng.standard_normal(size) * 10.0 ** rng.uniform(-3, 1.5, size)


def slow(chosen, g, u):
    if chosen.limit is not None:
        g, u = min(g, chosen.limit), min(max(u, -chosen.limit), chosen.limit)
    up = (u + chosen.beta if "swiglu" in chosen.name else u) if chosen.gated else 1.0
    return act(chosen.name, g, chosen.alpha) * up


@pytest.mark.parametrize(("name", "gated", "parameters"), VARIANTS)
def test_values_are_those_of_the_formulas(name, gated, parameters, rng):
    """float64 to a few units in the last place, but for what the formula itself cancels; float32 near it."""
    chosen = activation(name, gated, **parameters)
    g, u = spread(rng, 300), spread(rng, 300)
    given = g, u if gated else None
    expected = np.array([slow(chosen, *pair) for pair in zip(g, u, strict=True)])
    size = np.abs(g) * (np.abs(u) + abs(chosen.beta)) if gated else np.abs(g)
    got = activate(*given, chosen)
    assert got.dtype == np.float64
    assert (np.abs(got - expected) <= 1e-14 * np.abs(expected) + 1e-15 * size).all()
    narrow = [None if x is None else x.astype(np.float32) for x in given]
    single = activate(*narrow, chosen)
    assert single.dtype == np.float32
    wide = activate(*(None if x is None else x.astype(np.float64) for x in narrow), chosen)
    # A relative error of one rounding of alpha * g, or g**2 / 2, becomes an absolute one of the exponent.
    # Past 88.7 the exponential is infinite, where its inverse is 3e-39.
    steep = 1 + np.abs(g) * max(abs(chosen.alpha), 1) + np.minimum(g * g, 200)
    f = np.abs(activate(narrow[0].astype(np.float64), None, replace(chosen, gated=False)))
    largest = f * (np.abs(u) + abs(chosen.beta)) if gated else f
    assert (np.abs(single - wide) <= 2.0**-21 * steep * largest + 4e-39 * size + 1e-40).all()


def test_gelu_does_not_cancel_where_g_is_negative():
    """Of 1 + erf in float32 nothing would be left there."""
    for name in ("gelu", "gelu_tanh"):
        chosen = activation(name, False)
        g = np.array([-5.5, -4.0, -3.0])
        wide, single = activate(g, None, chosen), activate(g.astype(np.float32), None, chosen)
        np.testing.assert_allclose(single, wide, rtol=1e-4)


@pytest.mark.parametrize(("name", "gated", "parameters"), VARIANTS)
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_extremes_do_not_overflow_and_nan_stays(name, gated, parameters, kind):
    chosen = activation(name, gated, **parameters)
    g = np.array([-1e18, -1000, -0.0, 0.0, 1000, 1e18, np.nan], kind)
    u = np.ones_like(g)
    h = activate(g, u if gated else None, chosen)
    assert h.dtype == kind
    assert np.isnan(h[-1])
    assert np.isfinite(h[:-1]).all()
    if gated:
        u[2] = np.nan
        assert np.isnan(activate(g, u, chosen)[2])


def test_split_takes_both_layouts_apart():
    rows = np.arange(12).reshape(2, 6)
    g, u = split(rows, activation("swigluoai"))
    assert (g.tolist(), u.tolist()) == ([[0, 2, 4], [6, 8, 10]], [[1, 3, 5], [7, 9, 11]])
    for name in ("swigluoai_uninterleave", "silu"):
        g, u = split(rows, activation(name))
        assert (g.tolist(), u.tolist()) == ([[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10, 11]])
    g, u = split(rows, activation("relu2", False))
    assert u is None
    assert g is rows


@pytest.mark.parametrize(("name", "gated", "parameters"), VARIANTS)
def test_slope_and_curvature_are_those_of_the_function(name, gated, parameters, rng):
    """Against differences of the function, and the largest curvature is reached."""
    chosen = activation(name, gated, **parameters)
    g, step = np.concatenate([rng.uniform(-20, 20, 500), rng.uniform(-3, 3, 500)]), 1e-5
    difference = (gate(g + step, chosen) - gate(g - step, chosen)) / (2 * step)
    np.testing.assert_allclose(gate_slope(g, chosen), difference, rtol=1e-7, atol=2 * step)
    dense = np.linspace(-20, 20, 400_001)
    bends = np.abs(np.diff(gate_slope(dense, chosen))) / (dense[1] - dense[0])
    assert bends.max() <= gate_curvature(chosen) * (1 + 1e-6)
    assert bends.max() >= gate_curvature(chosen) * 0.999


@pytest.mark.parametrize(("name", "gated", "parameters"), VARIANTS)
def test_no_error_of_the_inputs_goes_past_its_bound(name, gated, parameters, rng):
    """Errors small and as large as the values, at the corners and within, with clamped values among them."""
    chosen = activation(name, gated, **parameters)
    size = 2000
    g, u = spread(rng, size), spread(rng, size)
    g_error, u_error = (np.abs(spread(rng, size)) * rng.choice([1e-6, 1e-2, 1], size) for _ in "gu")
    if not gated:
        u = u_error = None
    bound = activation_error(g, u, g_error, u_error, chosen)
    middle = activate(g, u, chosen)
    for a, b in [*itertools.product((-1, 1), repeat=2), *rng.uniform(-1, 1, (20, 2))]:
        moved = activate(g + a * g_error, None if u is None else u + b * u_error, chosen)
        assert (np.abs(moved - middle) <= bound * (1 + 1e-12)).all()


@pytest.mark.parametrize(("name", "gated", "parameters"), VARIANTS)
def test_the_bound_of_small_errors_is_nearly_reached(name, gated, parameters, rng):
    """Where errors are small the bound is their first order, not a wide guess; a clamped value has none."""
    chosen = activation(name, gated, **parameters)
    size = 2000
    g, u = rng.uniform(-4, 4, size), rng.uniform(-4, 4, size)
    error = np.full(size, 1e-3)
    given = (g, u if gated else None)
    bound = activation_error(*given, error, error if gated else None, chosen)
    middle = activate(*given, chosen)
    reached = np.zeros(size)
    for a, b in itertools.product((-1, 1), repeat=2):
        moved = activate(g + a * error, u + b * error if gated else None, chosen)
        reached = np.maximum(reached, np.abs(moved - middle))
    # The second order and the errors of float32 come on top.
    least = 1e-6 * (np.abs(u) + abs(chosen.beta) + 1) * gate_curvature(chosen) + 2.0**-18 * np.abs(middle)
    assert (bound <= reached * 1.001 + least + 1e-5).all()
    if chosen.limit is not None:
        high = np.full(1, 3 * chosen.limit)
        none = activation_error(
            high, high if gated else None, np.ones(1), np.ones(1) if gated else None, chosen
        )
        assert none <= 2.0**-19 * np.abs(activate(high, high if gated else None, chosen))


BAD = [
    ({"name": "swish"}, ValueError, "activation: expected one of silu, gelu, .*got 'swish'"),
    ({"name": None}, TypeError, "activation: expected a str, got NoneType"),
    ({"gated": 1}, TypeError, "gated: expected a bool, got int"),
    ({"name": "swigluoai", "gated": False}, ValueError, "gated: expected True with activation 'swigluoai'"),
    ({"alpha": 1.0}, ValueError, "alpha: expected None with activation 'silu'"),
    ({"name": "gelu", "beta": 0.0}, ValueError, "beta: expected None with activation 'gelu'"),
    ({"name": "gelu", "limit": 7.0}, ValueError, "limit: expected None with activation 'gelu'"),
    ({"name": "relu2", "gated": False, "limit": 7.0}, ValueError, "limit: expected None"),
    ({"limit": 0.0}, ValueError, "limit: expected a positive number, got 0.0"),
    ({"limit": -1}, ValueError, "limit: expected a positive number, got -1"),
    ({"limit": "7"}, TypeError, "limit: expected a number, got str"),
    ({"limit": True}, TypeError, "limit: expected a float"),
    ({"limit": math.nan}, ValueError, "limit: expected a number, got nan"),
    ({"name": "swigluoai", "alpha": math.inf}, ValueError, "alpha: expected a finite number, got inf"),
    ({"name": "swigluoai", "beta": math.nan}, ValueError, "beta: expected a number, got nan"),
    ({"name": "swigluoai", "alpha": 1e39}, ValueError, "alpha: expected a value that float32 holds"),
    ({"name": "swigluoai", "beta": "1"}, TypeError, "beta: expected a number, got str"),
]


@pytest.mark.parametrize(("arguments", "error", "words"), BAD)
def test_bad_activations_are_named(arguments, error, words):
    with pytest.raises(error, match=f"^{words}"):
        activation(**{"name": "silu", **arguments})


def test_defaults_and_parameters_as_float32_holds_them():
    chosen = activation("swigluoai_uninterleave")
    assert (chosen.alpha, chosen.beta, chosen.limit) == (float(np.float32(1.702)), 1.0, 7.0)
    assert not chosen.interleaved
    assert activation("swigluoai").interleaved
    given = activation("swigluoai", alpha=np.float64(0.1), beta=2, limit=math.inf)
    assert (given.alpha, given.beta, given.limit) == (float(np.float32(0.1)), 2.0, math.inf)
    assert activation("silu").limit is None
    assert all(activation(name).gated for name in ACTIVATIONS)
