"""What preparation kernels and GEMMs leave in the workspace, on both sides: group arrays and tensor maps."""

from __future__ import annotations

from typing import Any

import numpy as np
from twins import problems as data
from twins.problems import Call, Problem

import sm12x
from sm12x import abi, manifest

POINTERS = ("PTR_A", "PTR_B", "PTR_D", "M_SCALE", "N_SCALE", "BIAS")


def workspace_of(groups: int) -> np.ndarray:
    from sm12x import emulator

    with emulator.use(device="h200"):
        size = sm12x.workspace_size(groups, backend="emulator")
    found = data.aligned(size)
    found[:] = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    return found


def relative(arrays: np.ndarray, groups: int, call: Call, places: dict[str, int]) -> np.ndarray:
    """Group arrays with addresses as (number of the operand, offset from its first element)."""
    found = arrays.copy()
    padded = abi.groups_padded(groups)
    spans = {
        name: (places[name] - operand.offset, len(operand.buffer))
        for name, operand in call.operands.items()
        if name in places  # those with elements
    }
    spans["workspace"] = places["workspace"], len(arrays) + (1 << 20)
    numbers = {name: number for number, name in enumerate(sorted([*call.operands, "workspace"]), 1)}
    for pointer in POINTERS:
        start = padded * getattr(abi, f"SM12X_OFFSET_{pointer}")
        words = found[start : start + 8 * padded].view(np.uint64)
        for i, word in enumerate(words.tolist()):
            for name, (first, size) in spans.items():
                if first <= word < first + size:
                    words[i] = numbers[name] << 48 | (word - places[name]) % (1 << 48)
                    break
    return found


def compare_workspace(
    result: dict[str, Any],
    problem: Problem,
    call: Call,
    ours: dict[str, Any],
    theirs: dict[str, Any],
    encode: Any,
) -> None:
    # List calls leave groups without rows out.
    groups = sum(rows > 0 for rows in problem.rows) if problem.shapes else len(problem.rows)
    variant = manifest.default().variants[problem.variant]
    maps = -(-ours["ctas"] * variant.workspace_per_cta // 128) * 128
    end = maps + abi.group_arrays_bytes(groups)
    found = [
        relative(side["workspace"][maps:end].copy(), groups, call, side["places"]) for side in (ours, theirs)
    ]
    wrong = np.flatnonzero(found[0] != found[1])
    if len(wrong):
        at = int(wrong[0])
        near = [side[at // 8 * 8 : at // 8 * 8 + 8].tobytes().hex() for side in found]
        result["failures"].append(
            f"group arrays: {len(wrong)} of {end - maps} bytes differ, first at {at}: {near[0]} and {near[1]}"
        )
    status = abi.status_offset(groups)
    if not problem.shapes:  # list calls write none
        result["status"] = [int(side[status : status + 4].view(np.int32)[0]) for side in found]
    result["array_bytes"] = end - maps
    if not np.array_equal(ours["workspace"][end:], theirs["workspace"][end:]):
        result["failures"].append("bytes behind the group arrays differ")
    result["maps"] = _compare_maps(ours, theirs, maps, call, encode)


def _compare_maps(
    ours: dict[str, Any], theirs: dict[str, Any], size: int, call: Call, encode: Any
) -> dict[str, int]:
    """How many tensor maps are the same: untouched on both sides, or the emulator's, encoded by the driver
    with the GPU's address, the GPU's bytes."""
    from sm12x.emulator import tensor_map

    tally = {"untouched": 0, "equal": 0, "differ": 0, "not comparable": 0}
    begin = workspace_of(len(call.problem.rows))
    for at in range(0, size, 128):
        mine, real = (side["workspace"][at : at + 128] for side in (ours, theirs))
        if np.array_equal(mine, begin[at : at + 128]):
            tally["untouched" if np.array_equal(mine, real) else "differ"] += 1
            continue
        try:
            decoded = tensor_map.decode(mine.tobytes())
        except ValueError:
            tally["not comparable"] += 1
            continue
        address = None
        for name, place in ours["places"].items():
            if name in call.operands:
                first = place - call.operands[name].offset
                if first <= decoded.address < first + len(call.operands[name].buffer):
                    address = decoded.address - place + theirs["places"][name]
        if address is None or encode is None:
            tally["not comparable"] += 1
            continue
        raw = tensor_map._Raw.unpack(mine.tobytes(), blank=False)
        try:
            same = encoded_alike(decoded, raw, address, encode)
        except RuntimeError:
            tally["not comparable"] += 1
            continue
        tally["equal" if same(real) else "differ"] += 1
    return tally


def encoded_alike(decoded: Any, raw: Any, address: int, encode: Any) -> Any:
    """`real -> bool`: whether 128 bytes are what the driver encodes for a decoded map, in all bits but those
    that say the rank or belong to dimensions beyond it, where a kernel may leave anything. Raises
    RuntimeError where the driver refuses it."""
    from sm12x.emulator import tensor_map

    rank = decoded.rank
    arguments = {
        "kind": tensor_map.ELEMENTS.index(decoded.element),
        "interleave": (0, 16, 32).index(decoded.interleave),
        "swizzle": (0, 32, 64, 128).index(decoded.swizzle),
        "l2": decoded.l2_promotion,
        "fill": ("zero", "nan").index(decoded.fill),
    }

    def full(dim: int, stride: int, box: int, step: int, rank_of: int) -> np.ndarray:
        lists = {
            "dims": [*raw.dims[:rank], *[dim] * (5 - rank)],
            "strides": [*raw.strides[: rank - 1], *[stride] * (5 - rank)],
            "box": [*raw.box[:rank], *[box] * (5 - rank)],
            "steps": [*raw.element_strides[:rank], *[step] * (5 - rank)],
        }
        return np.frombuffer(encode(address, {**arguments, **lists, "rank": rank_of}), np.uint8)

    exact = full(1, 16, 1, 1, rank)
    least, most = full(1, 16, 1, 1, 5), full(1 << 32, (1 << 40) - 32, 2, 8, 5)
    known = ~((exact ^ least) | (least ^ most) | (exact ^ most))
    return lambda real: bool(((real ^ exact) & known == 0).all())
