"""What packed_counters.py found, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

NAMES = {"rtx5090": "RTX 5090", "gb10": "GB10"}
PREFIXES = ("fp8_packed_", "fp8_ptr_array_")


def markdown(result: dict[str, Any]) -> str:
    """The whole report."""
    useful, even = result["useful_shape"], result["even_shape"]
    parts = [
        "# Counters and floors of the packed kernels",
        f"`{result['command']}`, {result['date']}, {result['commit']}: the shipped `sm_120a` PTX in the "
        "emulator, no GPU. Counted: small calls, whose results were compared with float64. Derived from them "
        "by counting tiles: everything on models' shapes. Nothing was measured on an SM12x device. A floor "
        "is the longest of DRAM, tensor cores and issue slots, each busy without a pause: a bound, and no "
        "forecast.",
        _rates(result),
        "## Counted",
        "Conflicts: in all calls. The rest: of full tiles. For an MMA's four clocks an SM has four "
        "wavefronts of shared memory and sixteen issue slots.",
        _counted(result),
        "## Useful part of the multiply-adds",
        f"Counted: one group of so many rows, N {useful['n']}, K {useful['k']}.",
        _useful(result),
        "## Floors by rows of an expert",
        f"Derived: {even['model']} {even['gemm']}, all {even['experts']} experts with so many rows each, "
        "microseconds; behind a slash that of a plain-MMA build of a packed tile, where it is another.",
        *(_even(result, device) for device in NAMES),
        "## Floors of the models' shapes",
        "Derived: means over random routings of T tokens, microseconds. Bound: which of the problem's own "
        "bytes and multiply-adds takes longer. Kernel: of the floors within a hundredth of the lowest, the "
        "one that asks L2 for least. MMA: what its multiply-adds take. Plain: floor of a plain-MMA build of "
        "that packed tile. Where both families have one floor, DRAM binds both; what the packed one saves "
        "there, a preparation kernel and the updates of tensor maps, no floor has.",
        *(_shapes(result, device) for device in NAMES),
        "## Where the problem's multiply-adds bind",
        _bound(result),
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _us(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _short(key: str) -> str:
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    return key.removesuffix("_bf16")


def _rates(result: dict[str, Any]) -> str:
    parts = []
    for device, name in NAMES.items():
        rates = result["rates"][device]
        scaled = rates["mma"]["block_scaled"]
        plain = rates["mma"].get("plain", {"per_clock": scaled["per_clock"] // 2, "source": "assumed"})
        parts.append(
            f"{name}: {rates['sm_count']} SMs, {rates['clock_ghz']} GHz ({rates['clock_source']}), "
            f"{rates['dram_gbps']:.0f} GB/s ({rates['dram_source']}), FLOP per clock and SM: block-scaled "
            f"{scaled['per_clock']} ({scaled['source']}), plain {plain['per_clock']} ({plain['source']})."
        )
    return "Rates. " + " ".join(parts)


def _counted(result: dict[str, Any]) -> str:
    rows = []
    for key, each in result["counted"].items():
        slots = " / ".join(f"{each['issue'][name]:.0f}" for name in ("cta", "tile", "k_tile"))
        rows.append(
            [
                f"`{key}`",
                f"{each['main_loop_conflicts']}",
                f"{each['conflicts'] - each['main_loop_conflicts']}",
                f"{each['tma_over_least']:.3f}",
                f"{each['wavefronts_per_mma']:.2f}",
                slots,
                "yes" if each["agrees"] else "NO",
            ]
        )
    head = ["kernel", "bank conflicts, main loop", "elsewhere", "TMA bytes / operands' bytes"]
    head += ["`ldmatrix` wavefronts / MMA", "issue slots for sure: CTA / tile / k-tile", "MMAs as derived"]
    return _table(head, rows)


def _useful(result: dict[str, Any]) -> str:
    counted = result["counted"]
    columns = list(next(iter(counted.values()))["useful"])
    rows = [
        [f"`{key}`", *(f"{100 * each['useful'][column]:.1f}%" for column in columns)]
        for key, each in counted.items()
    ]
    return _table(["kernel", *(_rows(column) for column in columns)], rows)


def _rows(count: object) -> str:
    return f"{count} row{'' if str(count) == '1' else 's'}"


def _even(result: dict[str, Any], device: str) -> str:
    even = result["even_rows"]
    rows = []
    for key in even[0][device]["all"]:
        plain = [row[device]["all_plain"].get(key) for row in even]
        floors = [row[device]["all"][key] for row in even]
        rows.append([f"`{key}`", *map(_with_plain, floors, plain)])
    return f"{NAMES[device]}\n\n" + _table(["kernel", *(_rows(row["name"]) for row in even)], rows)


def _with_plain(floor: float, plain: float | None) -> str:
    same = plain is None or _us(plain) == _us(floor)
    return _us(floor) if same else f"{_us(floor)} / {_us(plain or 0.0)}"


def _shapes(result: dict[str, Any], device: str) -> str:
    rows = []
    for row in result["shapes"]:
        found = row[device]
        packed, other = found["fp8_packed"], found["fp8_ptr_array"]
        rows.append(
            [
                row["name"],
                str(row["T"]),
                f"{row['rows_per_active_expert']:.1f}",
                f"{row['least_megabytes']:.1f}",
                found["problem"]["bound"],
                _short(packed["variant"]),
                _us(packed["floor_us"]),
                _us(packed["mma_us"]),
                _us(packed["plain_floor_us"]),
                _short(other["variant"]),
                _us(other["floor_us"]),
                _us(other["mma_us"]),
            ]
        )
    head = ["shape", "T", "rows per expert", "least MB", "bound", "packed", "floor", "MMA", "plain"]
    return f"{NAMES[device]}\n\n" + _table([*head, "ptr_array", "floor", "MMA"], rows)


def _bound(result: dict[str, Any]) -> str:
    rows, others = [], []
    for device, name in NAMES.items():
        for row in result["shapes"]:
            found = row[device]
            own, packed, plain = found["problem"], found["fp8_packed"], found["plain"]["plain_floor_us"]
            longer = f"{plain / packed['floor_us']:.2f}"
            if own["bound"] == "MMA":
                terms = (own[term] for term in ("memory_us", "mma_us", "mma_plain_us"))
                ends = (packed["floor_us"], packed["plain_floor_us"], plain)
                rows.append([name, row["name"], str(row["T"]), *map(_us, (*terms, *ends)), longer])
            elif plain > 1.005 * packed["floor_us"]:
                others.append(f"{name}, {row['name']}, T = {row['T']}: {longer} times as long")
    head = ["device", "shape", "T", "its bytes", "its multiply-adds", "the same, plain", "packed floor"]
    head += ["plain, same tile", "plain, best tile", "times as long"]
    text = _table(head, rows) if rows else "Nowhere."
    listed = "; ".join(others) if others else "nowhere"
    return f"{text}\n\nBound by bytes, but by multiply-adds in any plain-MMA build: {listed}."
