"""The expert layer in plain Python, one token and one route at a time: shares nothing with `sm12x.reference`.

Python's floats are float64. Types are decoded and rounded by hand.
"""

from __future__ import annotations

import math

# Stored fraction bits, exponent of the least normal, and the largest finite value.
FORMATS = {
    "float8_e4m3fn": (3, -6, 448.0),
    "bfloat16": (7, -126, float.fromhex("0x1.fep127")),
    "float16": (10, -14, 65504.0),
    "float32": (23, -126, float.fromhex("0x1.fffffep127")),
}


def nearest(x, name):
    """`x` in a format, ties to even; infinite past the largest value."""
    bits, least, largest = FORMATS[name]
    if x == 0 or math.isnan(x) or math.isinf(x):
        return x
    exponent = max(math.frexp(x)[1] - 1, least)
    step = 2.0 ** (exponent - bits)
    value = round(x / step) * step  # Python rounds halves to even
    return math.copysign(math.inf, x) if abs(value) > largest else value


def code(quotient):
    """The e4m3 value of a quotient, saturating."""
    return nearest(min(max(quotient, -448.0), 448.0), "float8_e4m3fn") if quotient == quotient else math.nan


def decode(byte):
    """The value of an e4m3 code."""
    exponent, fraction = byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return math.nan
    magnitude = fraction * 2.0**-9 if exponent == 0 else (8 + fraction) * 2.0 ** (exponent - 10)
    return -magnitude if byte & 128 else magnitude


def quantise(row, static=None):
    """Values (floats that are exact in float32) to e4m3 values, and their scale."""
    scale = static
    if scale is None:
        largest = max((abs(v) for v in row if not math.isnan(v)), default=0.0)
        scale = nearest(max(largest, 1 / 512) / 448, "float32")
    return [code(nearest(v / scale, "float32")) for v in row], scale


def sigmoid(v):
    return 1 / (1 + math.exp(-v)) if v > -700 else 0.0


def act(name, g, alpha):
    if name == "silu":
        return g * sigmoid(g)
    if name == "gelu":
        return g * (1 + math.erf(g / math.sqrt(2))) / 2
    if name == "gelu_tanh":
        return g * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) / 2
    if name == "relu2":
        return g * g if g > 0 else 0.0
    return g * sigmoid(alpha * g)


def one_weight(scale, e, n):
    """The scale of output feature n of expert e, by the shapes that the operation takes."""
    if scale is None or isinstance(scale, float):
        return float32(1.0 if scale is None else scale)
    if scale.size == 1:
        return float(scale.reshape(-1)[0])
    if scale.ndim == 1 or scale.shape[1:] == (1,):
        return float(scale.reshape(-1)[e])
    return float(scale.reshape(scale.shape[:2])[e, n])


def float32(x):
    return None if x is None else nearest(float(x), "float32")


def expert_of(given, experts, expert_map):
    """The number among this device's experts, None for an invalid route."""
    if expert_map is not None:
        if not 0 <= given < len(expert_map):
            return None
        given = int(expert_map[given])
    return given if 0 <= given < experts else None


def layer(
    x,
    w1,
    w2,
    topk_weights,
    topk_ids,
    *,
    w1_scale=None,
    w2_scale=None,
    a1_scale=None,
    a2_scale=None,
    activation="silu",
    gated=True,
    expert_map=None,
    apply_router_weight_on_input=False,
    bias1=None,
    bias2=None,
    alpha=None,
    beta=None,
    limit=None,
):
    """Rows of the result, a list of lists of floats, unrounded but where something is quantised."""
    kind = x.dtype.name
    experts, n1, hidden = w1.shape
    inner = w2.shape[2]
    swiglu = activation.startswith("swigluoai")
    alpha, beta = float32(1.702 if alpha is None else alpha), float32(1.0 if beta is None else beta)
    limit = float32(7.0 if limit is None and swiglu else limit)
    statics = [
        None if a is None else float32(a if isinstance(a, float) else a.reshape(-1)[0])
        for a in (a1_scale, a2_scale)
    ]
    values = [decode(byte) for byte in range(256)]
    bits1, bits2 = w1.view("u1").tolist(), w2.view("u1").tolist()

    def linear(codes, scale, bits, scales, bias, e, n):
        total = math.fsum(c * values[b] for c, b in zip(codes, bits[e][n], strict=True))
        return scale * one_weight(scales, e, n) * total + (0.0 if bias is None else float(bias[e, n]))

    def expert(row, e):
        q1, s1 = quantise(row, statics[0])
        pre = [linear(q1, s1, bits1, w1_scale, bias1, e, n) for n in range(n1)]
        h = []
        for i in range(inner):
            g_at, u_at = (2 * i, 2 * i + 1) if activation == "swigluoai" else (i, inner + i)
            g, u = pre[g_at], pre[u_at] if gated else 1.0
            if limit is not None:
                g, u = min(g, limit), min(max(u, -limit), limit) if gated else u
            h.append(act(activation, g, alpha) * (u + beta if swiglu else u))
        if statics[1] is None:
            q2, s2 = quantise([nearest(v, kind) for v in h])
        else:
            q2, s2 = [code(v / statics[1]) for v in h], statics[1]
        return [linear(q2, s2, bits2, w2_scale, bias2, e, n) for n in range(hidden)]

    result = []
    for t in range(x.shape[0]):
        row, total = [float(v) for v in x[t]], [0.0] * hidden
        for j in range(topk_ids.shape[1]):
            e = expert_of(int(topk_ids[t, j]), experts, expert_map)
            if e is None:
                continue
            weight = float(topk_weights[t, j])
            taken = row
            if apply_router_weight_on_input:
                taken, weight = [nearest(v * nearest(weight, kind), kind) for v in row], 1.0
            for n, y in enumerate(expert(taken, e)):
                total[n] += y * weight
        result.append(total)
    return result
