"""What the launches of an expert layer must get: every field of every struct, and the workspace's parts."""

from __future__ import annotations

import ctypes
import math
from itertools import pairwise

import pytest

from sm12x import abi, manifest
from unit.layer_cases import make, run

MAPS = ("map_a", "map_b")
ELEMENT = {"bfloat16": 2, "float16": 2}


def facts(params):
    """Every field of a struct but tensor maps, with those of the structs in it."""
    found = {}
    for name, *_ in params._fields_:
        value = getattr(params, name)
        if isinstance(value, ctypes.Structure) and name not in MAPS:
            found.update({f"{name}.{key}": each for key, each in facts(value).items()})
        elif name not in MAPS and not name.startswith(("_", "reserved")):
            found[name] = value
    return found


def launched(fake, layer, call):
    """The parameters of one call's launches, by what each is for."""
    fake.launches.clear()
    assert run(layer, call) is call["out"]
    names = {"moe_route": "route", "moe_combine": "combine", "quantize_fp8": "quantise"}
    found = {}
    for each in fake.launches:
        key = each.symbol.removeprefix("sm12x_")
        name = names.get(key, "up" if key.startswith("fp8_up") else "down")
        if name == "route" and each.params.phase == abi.SM12X_ROUTE_PLACE:
            name = "place"
        assert name not in found
        found[name] = each
    return found


def gemm_of(launch):
    return getattr(launch.params, "gemm", launch.params)


def value(params, name):
    return pytest.approx(getattr(params, name), rel=1e-6)


def expected_route(given, call, parts, **more):
    """All of sm12x_route_params; `parts`: addresses in the workspace."""
    count, top_k = call["topk_ids"].extents
    hidden = call["x"].extents[1]
    static = given.get("a1_scale")
    array = hasattr(static, "address")
    token = {
        "x": call["x"].address,
        "q": parts["q1"],
        "scale": 0 if static is not None else parts["s1"],
        "source": static.address if array else 0,
        "weight": call["topk_weights"].address if given.get("apply_router_weight_on_input") else 0,
        "row_count": 0,
        "rows": count,
        "stride_x": call["x"].steps[0],
        "stride_q": hidden,
        "k": hidden,
        "x_type": abi.OUT_TYPES[call["x"].dtype.name],
        "mode": abi.SM12X_QUANTIZE_ROWS if static is None else abi.SM12X_QUANTIZE_STATIC,
        "count": 0,
        "static_scale": 1.0 if static is None or array else pytest.approx(static),
        "padding": 0,
    }
    expert_map = given.get("expert_map")
    dynamic = given.get("a2_scale") is None
    routes = count * top_k
    return {
        **{f"tokens.{name}": each for name, each in token.items()},
        "topk_ids": call["topk_ids"].address,
        "topk_weights": call["topk_weights"].address,
        "expert_map": 0 if expert_map is None else expert_map.address,
        "offsets": parts["offsets"],
        "row_index": parts["row_index"],
        "route_row": parts["route_row"],
        "row_weight": parts["row_weight"],
        "row_maxima": parts["maxima"] if dynamic else 0,
        "counts": parts["counts"],
        "padded": 0 if dynamic else parts["h"],
        "routes": routes,
        "top_k": top_k,
        "num_experts": given["w1"].extents[0],
        "map_size": 0 if expert_map is None else expert_map.extents[0],
        "ids_are_64_bit": int(call["topk_ids"].dtype.name == "int64"),
        "phase": abi.SM12X_ROUTE_ALL,
        "route_ctas": -(-routes // 8192),
        "padded_bytes": given["w2"].extents[2],
        "padding": more.pop("padding"),
        "early": int(given.get("early_routes", False) and routes <= 512),
        **more,
    }


def scale_facts(scale, name, n):
    """Fields of a scale of weights."""
    if not hasattr(scale, "address"):
        number = 1.0 if scale is None else pytest.approx(scale)
        facts_ = {"": 0, "_mode": abi.SM12X_SCALE_VALUE, "_value": number}
        stride = 0
    else:
        count = math.prod(scale.extents)
        mode = abi.SM12X_SCALE_ONE if count == 1 else abi.SM12X_SCALE_GROUP
        stride = 0
        if len(scale.extents) > 1 and scale.extents[1] == n:
            mode, stride = abi.SM12X_SCALE_VECTOR, scale.steps[0]
        facts_ = {"": scale.address, "_mode": mode, "_value": 1.0}
    return {**{name + end: each for end, each in facts_.items()}, f"stride_{name}": stride}


def bias_facts(bias):
    if bias is None:
        return {"bias": 0, "bias_type": 0, "stride_bias": 0}
    kind = abi.BIAS_TYPES[bias.dtype.name]
    return {"bias": bias.address, "bias_type": kind, "stride_bias": bias.steps[0]}


def rows_scale(static, dynamic):
    """Fields of the scale of a GEMM's rows; `dynamic`: where the scales per row lie."""
    if static is None:
        return {"a_scale": dynamic, "a_scale_mode": abi.SM12X_SCALE_VECTOR, "a_scale_value": 1.0}
    if hasattr(static, "address"):
        return {"a_scale": static.address, "a_scale_mode": abi.SM12X_SCALE_ONE, "a_scale_value": 1.0}
    number = pytest.approx(static)
    return {"a_scale": 0, "a_scale_mode": abi.SM12X_SCALE_VALUE, "a_scale_value": number}


def kept(given, rows):
    """Results of both GEMMs leave L2 last where they are 8 MiB at most."""
    _, hidden, inner = given["w2"].extents
    return abi.SM12X_KEEP_RESULTS if 2 * rows * (hidden + inner) <= 8 << 20 else 0


def expected_gemm(given, call, which, **more):
    """All of sm12x_packed_params but its maps; `more` has what differs between the two."""
    weights_ = given[f"w{which}"]
    experts, n, k = weights_.extents
    rows = math.prod(call["topk_ids"].extents)
    return {
        "row_index": 0,
        "row_weight": 0,
        "partials": 0,
        "counters": 0,
        "rows": rows,
        "a_rows": rows,
        "stride_a": k,
        "stride_d_group": 0,
        "n": n,
        "k": k,
        "num_groups": experts,
        "row_layout": abi.SM12X_ROWS_PACKED,
        "bounds_are_64_bit": 0,
        "row_index_is_64_bit": 0,
        "least_units": 0,
        "flags": kept(given, rows),
        **scale_facts(given.get(f"w{which}_scale"), "b_scale", n),
        **bias_facts(given.get(f"bias{which}")),
        **more,
    }


def expected_up(given, call, parts, **more):
    interleaved = given.get("activation") == "swigluoai"
    swiglu = given.get("activation", "silu").startswith("swigluoai")
    static = given.get("a2_scale")
    inner = given["w2"].extents[2]
    array = hasattr(static, "address")
    limit = given.get("limit", 7.0 if swiglu else math.inf)
    gemm = expected_gemm(
        given,
        call,
        1,
        a=parts["q1"],
        d=parts["h"],
        bounds=parts["offsets"],
        a_rows=call["x"].extents[0],
        stride_d=inner,
        out_type=abi.SM12X_OUT_E4M3 if static is not None else abi.OUT_TYPES[call["x"].dtype.name],
        **rows_scale(given.get("a1_scale"), parts["s1"]),
        **{"row_index": parts["row_index"], **more},
    )
    codes = {"gelu": "GELU", "gelu_tanh": "GELU_TANH", "relu2": "RELU2"}
    count, top_k = call["topk_ids"].extents
    expert_map = given.get("expert_map")
    counts = count * top_k <= 512 and given["w1"].extents[0] <= 256  # the kernel counts its rows itself
    return {
        **{f"gemm.{name}": each for name, each in gemm.items()},
        "row_maxima": parts["maxima"] if static is None else 0,
        "d_scale": static.address if array else 0,
        "d_scale_value": 1.0 if static is None or array else pytest.approx(static),
        "alpha": pytest.approx(given.get("alpha", 1.702)) if swiglu else 1.0,
        "beta": pytest.approx(given.get("beta", 1.0)) if swiglu else 0.0,
        "limit": pytest.approx(limit),
        "activation": getattr(abi, f"SM12X_ACTIVATION_{codes.get(given.get('activation'), 'SILU')}"),
        "half_stride": 1 if interleaved else inner,
        "pair_stride": 2 if interleaved else 1,
        "topk_ids": call["topk_ids"].address if counts else 0,
        "expert_map": 0 if expert_map is None else expert_map.address,
        "routes": count * top_k,
        "map_size": 0 if expert_map is None else expert_map.extents[0],
        "ids_are_64_bit": int(call["topk_ids"].dtype.name == "int64"),
    }


def expected_down(given, call, parts, quantises, **more):
    static = given.get("a2_scale")
    scale = {"a_scale": 0, "a_scale_mode": 0, "a_scale_value": 0.0}  # it makes the scales itself
    if not quantises:
        scale = rows_scale(static, parts["s2"])
    gemm = expected_gemm(
        given,
        call,
        2,
        a=parts["h"] if quantises or static is not None else parts["q2"],
        d=parts["y"],
        bounds=parts["offsets"],
        stride_d=call["x"].extents[1],
        out_type=abi.OUT_TYPES[call["x"].dtype.name],
        **scale,
        **{"row_weight": 0 if given.get("apply_router_weight_on_input") else parts["row_weight"], **more},
    )
    if not quantises:
        gemm["flags"] |= abi.SM12X_EARLY_WEIGHTS  # fp8_down loads them early in any case
        return gemm
    more = {"row_maxima": parts["maxima"], "a_type": abi.OUT_TYPES[call["x"].dtype.name]}
    return {**{f"gemm.{name}": each for name, each in gemm.items()}, **more}


def expected_quantise(given, call, parts, padding):
    inner, rows = given["w2"].extents[2], math.prod(call["topk_ids"].extents)
    return {
        "x": parts["h"],
        "q": parts["q2"],
        "scale": parts["s2"],
        "source": parts["maxima"],
        "weight": 0,
        "row_count": parts["offsets"] + 4 * given["w1"].extents[0],
        "rows": rows,
        "stride_x": inner,
        "stride_q": inner,
        "k": inner,
        "x_type": abi.OUT_TYPES[call["x"].dtype.name],
        "mode": abi.SM12X_QUANTIZE_MAXIMA,
        "count": 0,
        "static_scale": 0.0,
        "padding": padding,
    }


def expected_combine(call, parts):
    count, top_k = call["topk_ids"].extents
    hidden = call["x"].extents[1]
    return {
        "rows": parts["y"],
        "out": call["out"].address,
        "route_row": parts["route_row"],
        "stride_rows": hidden,
        "stride_out": call["out"].steps[0] if count > 1 else hidden,
        "tokens": count,
        "top_k": top_k,
        "n": hidden,
        "type": abi.OUT_TYPES[call["x"].dtype.name],
    }


def parts_of(found):
    """Where the parts of the workspace are, each as the launch has it that writes it."""
    route, up, down = found["route"].params, found["up"].params, found["down"]
    parts = {
        "q1": route.tokens.q,
        "s1": route.tokens.scale,
        "h": up.gemm.d,
        "y": gemm_of(down).d,
        "maxima": route.row_maxima,
        "q2": 0,
        "s2": 0,
        **{name: getattr(route, name) for name in ("offsets", "row_index", "route_row", "row_weight")},
        "counts": route.counts,
        "partials": max(up.gemm.partials, gemm_of(down).partials),
    }
    if "quantise" in found:
        parts |= {"q2": found["quantise"].params.q, "s2": found["quantise"].params.scale}
    return parts


def sizes_of(given, call, found):
    """Bytes of those parts, which the launches write and read."""
    count, top_k = call["topk_ids"].extents
    experts, hidden, inner = given["w2"].extents
    rows, element = count * top_k, ELEMENT[call["x"].dtype.name]
    ctas = -(-rows // 8192)
    kept = manifest.default().variants
    partials = [
        each.grid[0] * kept[each.symbol.removeprefix("sm12x_")].workspace_per_cta
        for each in (found["up"], found["down"])
        if gemm_of(each).partials
    ]
    return {
        "q1": count * hidden,
        "s1": 4 * count if given.get("a1_scale") is None else 0,
        "h": rows * inner * (element if given.get("a2_scale") is None else 1),
        "y": rows * hidden * element,
        "maxima": 4 * rows if given.get("a2_scale") is None else 0,
        "offsets": 4 * (experts + 1),
        "row_index": 4 * rows,
        "route_row": 4 * rows,
        "row_weight": 4 * rows,
        "counts": 4 * ctas * experts if ctas > 1 else 0,
        "q2": rows * inner if "quantise" in found else 0,
        "s2": 4 * rows if "quantise" in found else 0,
        "partials": max(partials, default=0),
    }


def check_workspace(given, call, found, base, size):
    """Every part lies inside, aligned, and none on another."""
    parts, taken = parts_of(found), []
    for name, length in sizes_of(given, call, found).items():
        if not length:
            continue
        address = parts[name]
        assert address % 256 == 0, name
        assert base <= address, name
        assert address + length <= base + size, name
        taken.append((address, address + length, name))
    taken.sort()
    for (_, end, name), (start, _, other) in pairwise(taken):
        assert end <= start, f"{name} reaches into {other}"


def check_call(fake, given, call, quantises=True, padding=8, layer=None, up=None, down=None):
    """One call: every field of every launch."""
    layer = layer or make(given)
    found = launched(fake, layer, call)
    parts = parts_of(found)
    assert facts(found["route"].params) == expected_route(given, call, parts, padding=padding)
    assert facts(found["up"].params) == expected_up(given, call, parts, **(up or {}))
    assert facts(found["down"].params) == expected_down(given, call, parts, quantises, **(down or {}))
    assert facts(found["combine"].params) == expected_combine(call, parts)
    apart = not quantises and given.get("a2_scale") is None
    assert ("quantise" in found) == apart
    if apart:
        assert facts(found["quantise"].params) == expected_quantise(given, call, parts, padding)
    (base,) = fake.kept if len(fake.kept) == 1 else (min(fake.kept),)
    check_workspace(given, call, found, base, fake.kept[base])
    return found
