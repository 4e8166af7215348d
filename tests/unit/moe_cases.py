"""Random expert layers on NumPy arrays, shared by tests."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from sm12x import reference

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2", "swigluoai", "swigluoai_uninterleave")
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
# Every activation, gated and not, as far as it exists so.
KINDS = [(name, gated) for name in ACTIVATIONS for gated in (True, False) if gated or "swiglu" not in name]

WEIGHT_SCALES = {
    "none": lambda e, n: None,
    "value": lambda e, n: "value",
    "one": lambda e, n: (1,),
    "one_3d": lambda e, n: (1, 1, 1),
    "expert": lambda e, n: (e,),
    "expert_column": lambda e, n: (e, 1),
    "channel": lambda e, n: (e, n),
    "channel_column": lambda e, n: (e, n, 1),
}


def weight_scale(rng, kind, experts, n):
    """A scale of weights of about 1/1000, which keeps random codes of +-448 in the range of an activation."""
    shape = WEIGHT_SCALES[kind](experts, n)
    if shape is None:
        return None
    if shape == "value":
        return float(rng.uniform(5e-4, 2e-3))
    return rng.uniform(5e-4, 2e-3, shape).astype(np.float32)


def random_layer(
    rng,
    *,
    tokens=None,
    top_k=None,
    experts=None,
    hidden=None,
    intermediate=None,
    kind=None,
    dtype=None,
    scales=None,
    static=None,
    biases=None,
    mapped=None,
    weight_on_input=None,
):
    """Arguments of `fused_moe` as (positional, keywords); what is not given is drawn."""

    def drawn(value, low, high, step=1):
        return step * int(rng.integers(low, high)) if value is None else value

    t, e = drawn(tokens, 0, 6), drawn(experts, 1, 6)
    h, i = drawn(hidden, 1, 4, 16), drawn(intermediate, 1, 4, 16)
    on_input = bool(rng.random() < 0.2) if weight_on_input is None else weight_on_input
    k = 1 if on_input else drawn(top_k, 1, 4)
    name, gated = KINDS[rng.integers(len(KINDS))] if kind is None else kind
    n1 = 2 * i if gated else i
    scale1, scale2 = rng.choice(list(WEIGHT_SCALES)[1:], 2) if scales is None else scales
    fixed = rng.random(2) < 0.3 if static is None else static
    biased = rng.random(2) < 0.5 if biases is None else biases
    x_dtype = DTYPES[str(rng.choice(list(DTYPES))) if dtype is None else dtype]
    x = rng.standard_normal((t, h), dtype=np.float32).astype(x_dtype)
    everywhere = e + int(rng.integers(0, 3))
    keywords = {
        "w1_scale": weight_scale(rng, str(scale1), e, n1),
        "w2_scale": weight_scale(rng, str(scale2), e, h),
        "activation": name,
        "gated": gated,
        "apply_router_weight_on_input": on_input,
    }
    if rng.random() < 0.5 if mapped is None else mapped:
        keywords["expert_map"] = rng.integers(-1, e + 1, everywhere).astype(np.int32)
    for argument, wanted, value in (
        ("a1_scale", fixed[0], rng.uniform(2e-3, 2e-2)),
        ("a2_scale", fixed[1], rng.uniform(2e-3, 2e-2)),
    ):
        if wanted:
            keywords[argument] = float(value) if rng.random() < 0.5 else np.array([value], np.float32)
    for argument, wanted, n in (("bias1", biased[0], n1), ("bias2", biased[1], h)):
        if wanted:
            kept = rng.choice(["float32", "bfloat16", "float16"])
            bias = rng.standard_normal((e, n), dtype=np.float32)
            keywords[argument] = bias.astype(DTYPES.get(str(kept), np.float32))
    if "swiglu" in name or (name == "silu" and rng.random() < 0.5):
        keywords["limit"] = float(rng.uniform(0.5, 3))
    if "swiglu" in name and rng.random() < 0.5:
        keywords.update(alpha=float(rng.uniform(0.5, 2)), beta=float(rng.uniform(-1, 2)))
    ids = rng.integers(-1, everywhere + 1, (t, k)).astype(rng.choice(["i4", "i8"]))
    weights = rng.uniform(-1, 1, (t, k)).astype(np.float32)
    w1, w2 = small_codes(rng, (e, n1, h)), small_codes(rng, (e, h, i))
    return (x, w1, w2, weights, ids), keywords


def small_codes(rng, shape):
    """Weights as a checkpoint has them: normally distributed, the largest codes near 448."""
    values = np.clip(rng.standard_normal(shape, dtype=np.float32) * 150, -448, 448)
    return reference.to_e4m3(values)
