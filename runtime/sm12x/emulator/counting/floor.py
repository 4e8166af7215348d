"""The least time that a device can take for the work that was counted in a launch.

It is a bound: memory, tensor cores and issue slots are each taken to be busy without a pause, at the rates of
`devices`, and the longest of the three is the floor. It is no measurement, and no forecast: latencies, the
fill of pipelines, the cost of a launch and the L2 cache are not in it.

- Memory: bytes of global memory that were touched, each once, over the bandwidth of DRAM, as if L2 had held
  nothing of them before and kept nothing of what was stored. What an earlier launch of the same call stored
  does not count as loaded.
- MMA: multiply-adds that were issued, at the rate of their form and, to compare, at the plain form's.
- Issue: 4 warp instructions per clock and SM, of the PTX instructions that surely become one
  (`instruction_classes`).

For the latter two, a CTA runs on one SM: the busiest CTA's share is a bound as much as the average SM's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..devices import Gpu, MmaRate
from .counters import Counters

WARPS_PER_CLOCK = 4  # that an SM issues instructions of: it has 4 schedulers


@dataclass(frozen=True, slots=True)
class Floor:
    """Microseconds. `mma_us` is None where nobody knows the device's rate for an MMA that was issued, and is
    then no part of the floor; so is `mma_plain_us`, what the same multiply-adds would take in the plain form.
    `binds`: "memory", "mma" or "issue".
    """

    memory_us: float
    mma_us: float | None
    mma_plain_us: float | None
    issue_us: float
    binds: str
    floor_us: float


def floor_of(counters: Counters, gpu: Gpu, sms: int | None = None) -> Floor:
    """The floor of what was counted, on `sms` SMs of a device (None: all)."""
    sms = sms or gpu.sm_count
    clock = gpu.clock_ghz * 1e3  # clocks in a microsecond
    memory = sum(counters.unique_bytes.values()) / (gpu.dram_gbps * 1e3)
    mma = _mma_clocks(counters, gpu.mma.get, sms)
    plain = _mma_clocks(counters, lambda form: gpu.mma.get("plain"), sms)
    sure = max(counters.work.surely_issued / sms, counters.busiest_cta.surely_issued)
    issue = sure / WARPS_PER_CLOCK / clock
    terms = {"memory": memory, "issue": issue} | ({} if mma is None else {"mma": mma / clock})
    binds = max(terms, key=lambda name: terms[name])
    return Floor(
        memory_us=memory,
        mma_us=terms.get("mma"),
        mma_plain_us=None if plain is None else plain / clock,
        issue_us=issue,
        binds=binds,
        floor_us=terms[binds],
    )


def _mma_clocks(counters: Counters, rate_of: Callable[[str], MmaRate | None], sms: int) -> float | None:
    """Clocks of the tensor cores; None where a form has no rate."""
    shared, busiest = 0.0, 0.0
    for form, count in counters.work.multiply_adds.items():
        rate = rate_of(form)
        if count and rate is None:
            return None
        if rate is not None:
            shared += 2 * count / rate.per_clock / sms
            busiest = max(busiest, 2 * counters.busiest_cta.multiply_adds[form] / rate.per_clock)
    return max(shared, busiest)
