"""What ``python -m sm12x emulate`` says about counters and floors, as JSON and as lines of text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sm12x.emulator import Session
from sm12x.emulator.counting.counters import Counters, total
from sm12x.emulator.counting.floor import WARPS_PER_CLOCK, Floor, floor_of
from sm12x.emulator.devices import Gpu

NOTE = "a bound from counted work with a cold L2, not a measurement"


@dataclass(frozen=True)
class Least:
    """What any kernel has to do for a problem: bytes to move, multiply-adds to compute."""

    bytes: int
    multiply_adds: int


@dataclass(frozen=True)
class Account:
    """Counters and floor of every launch (with its variant) and of the whole call."""

    launches: list[tuple[str, Counters, Floor]]
    counters: Counters
    floor: Floor


def account(session: Session, gpu: Gpu, sms: int | None) -> Account | None:
    """What the launches of a session come to; None where one of them has no counters."""
    found = [(launch.variant, launch.counters) for launch in session.launches]
    counted = [(variant, counters) for variant, counters in found if counters is not None]
    if not counted or len(counted) != len(found):
        return None
    together = total((counters for _, counters in counted), session.touched)
    launches = [(variant, counters, floor_of(counters, gpu, sms)) for variant, counters in counted]
    return Account(launches, together, floor_of(together, gpu, sms))


def as_json(found: Account | None, least: Least, gpu: Gpu) -> dict[str, Any]:
    """`counters` and `floor_us` of the whole call, what the floor is made of, and how much more than the
    problem's least the kernels did. None for each where nothing was counted."""
    if found is None:
        return dict.fromkeys(("counters", "floor_us", "floor", "efficiency"))
    counters = found.counters.to_dict()
    del counters["by_line"]  # that is each launch's
    return {
        "counters": counters,
        "floor_us": found.floor.floor_us,
        "floor": {
            "note": NOTE,
            **asdict(found.floor),
            "launches": [{"variant": variant, **asdict(floor)} for variant, _, floor in found.launches],
            "rates": {
                "dram_gbps": [gpu.dram_gbps, gpu.dram_source],
                "clock_ghz": [gpu.clock_ghz, gpu.clock_source],
                **{f"{form}_flop_per_clock_and_sm": [r.per_clock, r.source] for form, r in gpu.mma.items()},
            },
        },
        "efficiency": _efficiency(found.counters, least),
    }


def _efficiency(counters: Counters, least: Least) -> dict[str, Any]:
    unique, issued = sum(counters.unique_bytes.values()), counters.multiply_adds
    return {
        "least_bytes": least.bytes,
        "unique_bytes": unique,
        "unique_over_least": unique / least.bytes,
        "requested_bytes": counters.requested_bytes,
        "requested_over_least": counters.requested_bytes / least.bytes,
        "useful_multiply_adds": least.multiply_adds,
        "issued_multiply_adds": issued,
        "useful_fraction": least.multiply_adds / issued if issued else None,
    }


def lines(found: Account, least: Least, gpu: Gpu) -> list[str]:
    """The text."""
    text = []
    for variant, counters, floor in found.launches:
        text.append(f"counted    {variant}: {_counted(counters)}")
        text.append(f"           {_accesses(counters)}")
        text.append(f"           {_conflicts(counters)}")
        text.append(f"floor      {variant}: {_terms(floor)}")
    rate = gpu.mma.get("block_scaled")
    mma = f", {rate.per_clock} FLOP per clock and SM ({rate.source})" if rate else ""
    text += [
        f"floor      whole call: {_terms(found.floor)}",
        f"           {NOTE}: {gpu.dram_gbps:.0f} GB/s ({gpu.dram_source}), {gpu.clock_ghz} GHz "
        f"({gpu.clock_source}){mma}, {WARPS_PER_CLOCK} instructions per clock and SM",
        f"work       {_work(_efficiency(found.counters, least))}",
    ]
    return text


def _counted(counters: Counters) -> str:
    mmas = sum(each["issued"] for each in counters.mma.values())
    unique = counters.unique_bytes
    return (
        f"{counters.work.issued} instructions, {mmas} MMAs; {_bytes(unique['loaded'])} loaded and "
        f"{_bytes(unique['stored'])} stored, each byte once; {_bytes(counters.requested_bytes)} requested"
    )


def _accesses(counters: Counters) -> str:
    engine = [counters.copies[name] for name in ("tma_load", "tma_store") if name in counters.copies]
    parts = [f"TMA {_bytes(sum(each.global_bytes for each in engine))}"] if engine else []
    for name, each in counters.global_memory.items():
        if each.requests:
            parts.append(f"global {name}: {each.requests} of {each.sectors_per_request:.1f} sectors")
    for name, waits in counters.waits.items():
        times = waits.at_once + waits.waited + waits.gave_up
        if times:
            parts.append(f"{name.replace('_', ' ')} waits: {waits.waited} of {times}")
    return "; ".join(parts) or "no access to global memory"


def _conflicts(counters: Counters) -> str:
    found = {name: each.conflicts for name, each in counters.shared_memory.items() if each.conflicts}
    if not found:
        return "no bank conflicts"
    worst = max(counters.by_line, key=lambda line: line.conflicts)
    each = ", ".join(f"{name} {count}" for name, count in found.items())
    return (
        f"bank conflicts: {each}; {counters.main_loop_conflicts} of them in the main loop; most at PTX line "
        f"{worst.line}, {worst.conflicts}: {worst.text}"
    )


def _terms(floor: Floor) -> str:
    mma = "unknown" if floor.mma_us is None else _us(floor.mma_us)
    if floor.mma_us:
        mma += f" ({'unknown' if floor.mma_plain_us is None else _us(floor.mma_plain_us)} with the plain MMA)"
    names = {"memory": "memory", "mma": "MMA", "issue": "issue slots"}
    return (
        f"{_us(floor.floor_us)}, {names[floor.binds]} binds: memory {_us(floor.memory_us)}, MMA {mma}, "
        f"issue slots {_us(floor.issue_us)}"
    )


def _work(efficiency: dict[str, Any]) -> str:
    part, least = efficiency["useful_fraction"], _bytes(efficiency["least_bytes"])
    useful = "no multiply-adds" if part is None else f"{100 * part:.1f}% of multiply-adds are the problem's"
    return (
        f"{useful}; {efficiency['unique_over_least']:.2f} times its least bytes ({least}) from and to "
        f"DRAM, {efficiency['requested_over_least']:.2f} times with what is requested again"
    )


def _us(time: float) -> str:
    return f"{time:.3g} us"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} KB"
