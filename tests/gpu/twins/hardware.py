"""Runs cases on the GPU: a process for a batch, since a copy that faults takes the context with it.

    python hardware.py IN OUT

IN is a pickled list of cases; OUT becomes a pickled list of outcomes. `run_isolated` is the caller's side: a
batch that fails is halved until the case that does it stands alone.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/gpu")]

import numpy as np  # noqa: E402
from twins.libcuda import Cuda, CudaFailure  # noqa: E402

from emulated.copies import ptx  # noqa: E402
from emulated.copies.case import RECORD_BYTES, Case, Map, Outcome  # noqa: E402

SECONDS = 60  # after which a batch counts as hung
_LINE = 1024  # arenas begin at multiples of it


def arguments_of(m: Map) -> dict:
    """A map as `Cuda.encode` takes it."""
    names = ("kind", "rank", "dims", "strides", "box", "steps", "interleave", "swizzle", "l2", "fill")
    return {name: getattr(m, name) for name in names}


def run_batch(cases: list[Case]) -> list[Outcome]:
    """One launch for each kernel, with a CTA for each case. Raises CudaFailure where one fails."""
    cuda = Cuda()
    order = sorted(range(len(cases)), key=lambda i: cases[i].kernel)
    starts, at = {}, 0
    for i in order:
        starts[i] = at
        at += -(-cases[i].places[3] // _LINE) * _LINE
    base = cuda.allocate(at + _LINE)
    table = cuda.allocate(len(cases) * RECORD_BYTES)
    maps = cuda.allocate(len(cases) * 128)
    content = np.zeros(at, np.uint8)
    records, encoded, outcomes = bytearray(), bytearray(), [Outcome() for _ in cases]
    ready = []
    for i in order:
        case = cases[i]
        used, address = case.template or case.map, base + starts[i]
        bits = bytes(128)
        try:
            if used is not None:
                bits = cuda.encode(address + used.offset, arguments_of(used))
        except CudaFailure as error:
            outcomes[i] = Outcome(error=str(error))
            continue
        content[starts[i] : starts[i] + case.places[3]] = case.arena()
        records += case.record(address, maps + len(encoded), raw=True)
        encoded += bits
        ready.append(i)
    cuda.upload(base, content)
    cuda.upload(table, np.frombuffer(bytes(records), np.uint8))
    cuda.upload(maps, np.frombuffer(bytes(encoded), np.uint8))
    names = tuple(sorted({cases[i].kernel for i in ready}))
    functions = _functions(cuda, names)
    first = 0
    for name in names:
        count = sum(cases[i].kernel == name for i in ready)
        if isinstance(functions[name], str):
            for i in ready[first : first + count]:
                outcomes[i] = Outcome(error=functions[name])
        else:
            try:
                cuda.launch(functions[name], count, 32, table, first)
            except CudaFailure as error:
                raise CudaFailure(f"{name}: {error}") from None
        first += count
    after = cuda.download(base, at)
    for i in ready:
        if outcomes[i].error is None:
            case = cases[i]
            found = after[starts[i] : starts[i] + case.places[3]].copy()
            raw = _take_raw(case, found)
            outcomes[i] = Outcome(found.tobytes(), raw=raw)
    return outcomes


def _functions(cuda: Cuda, names: tuple[str, ...]) -> dict:
    """Kernels by name; a message for one that the driver's assembler refuses."""
    try:
        module = cuda.module(ptx.module(names))
        return {name: cuda.function(module, name) for name in names}
    except CudaFailure:
        found = {}
        for name in names:
            try:
                found[name] = cuda.function(cuda.module(ptx.module((name,))), name)
            except CudaFailure as error:
                found[name] = str(error)
        return found


def _take_raw(case: Case, arena: np.ndarray) -> int | None:
    """What hardware had in the mbarrier, taken out of the result, where the emulator has nothing to put."""
    if not case.kernel.startswith(("load", "replace", "bulk_load", "bulk_within")):
        return None
    at = case.places[2] + 8
    raw = int(arena[at : at + 8].view(np.uint64)[0])
    arena[at : at + 8] = case.arena()[at : at + 8]
    return raw


def run_isolated(cases: list[Case], until: float) -> list[Outcome]:
    """Outcomes of cases, found in processes of their own until `until` (time.monotonic)."""
    if time.monotonic() > until:
        return [Outcome(error="not run: no time left behind a case that failed") for _ in cases]
    with tempfile.TemporaryDirectory() as folder:
        given, got = Path(folder, "in"), Path(folder, "out")
        given.write_bytes(pickle.dumps(cases))
        command = [sys.executable, str(HERE / "hardware.py"), str(given), str(got)]
        left = max(5.0, min(SECONDS, until - time.monotonic()))
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
            reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:600]
        except subprocess.TimeoutExpired:
            reason = "hung"
        if got.exists():
            found: list[Outcome] = pickle.loads(got.read_bytes())
            return found
    if len(cases) == 1:
        return [Outcome(error=reason)]
    kernels = sorted({case.kernel for case in cases})
    named = next((name for name in kernels if f"{name}: " in reason), None)
    if named is not None and len(kernels) > 1:
        # The kernels before the one that failed, and those after it, are most likely well.
        parts = [[i for i, c in enumerate(cases) if (c.kernel == named) == mine] for mine in (True, False)]
    else:
        half = len(cases) // 2
        parts = [list(range(half)), list(range(half, len(cases)))]
    outcomes: dict[int, Outcome] = {}
    for part in parts:
        outcomes.update(zip(part, run_isolated([cases[i] for i in part], until), strict=True))
    return [outcomes[i] for i in range(len(cases))]


if __name__ == "__main__":
    taken: list[Case] = pickle.loads(Path(sys.argv[1]).read_bytes())
    results = run_batch(taken)
    Path(sys.argv[2]).write_bytes(pickle.dumps(results))
