"""Runs cases on the GPU, each in a launch of its own.

    python hardware.py IN OUT

IN is a pickled list of cases; OUT gets the outcome of each as soon as it is there, one pickle behind the
other. A copy that faults takes the process's context with it: the process ends, the outcomes before it are
kept, the case is known, and `run` goes on behind it in a new process. So a bad case costs one process, about
2 s, and no other case. A kind of case that goes on failing is given up (`MOST_FAILURES`).
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/gpu")]

import numpy as np  # noqa: E402
from twins.libcuda import Cuda, CudaFailure  # noqa: E402

from emulated.copies import ptx  # noqa: E402
from emulated.copies.case import RECORD_BYTES, Case, Map, Outcome  # noqa: E402

SECONDS = 30  # after which a process counts as hung
MOST_FAILURES = 6  # of a case's family and kernel, after which the rest of them is not run
_LINE = 1024  # arenas begin at multiples of it


def arguments_of(m: Map) -> dict:
    """A map as `Cuda.encode` takes it."""
    names = ("kind", "rank", "dims", "strides", "box", "steps", "interleave", "swizzle", "l2", "fill")
    return {name: getattr(m, name) for name in names}


class Runner:
    """Memory and kernels for some cases on the GPU. Raises CudaFailure where a launch faults."""

    def __init__(self, cases: list[Case]) -> None:
        self._cuda = Cuda()
        size = max(case.places[3] for case in cases)
        self._arena = -(-self._cuda.allocate(size + _LINE) // _LINE) * _LINE
        self._table = self._cuda.allocate(RECORD_BYTES)
        # Each map has a place of its own: none is ever seen through what a cache has of another.
        self._maps = self._cuda.allocate(len(cases) * 128)
        self._functions: dict = {}

    def run(self, case: Case, number: int) -> Outcome:
        used, place = case.template or case.map, self._maps + 128 * number
        cuda = self._cuda
        if used is not None:
            try:
                bits = cuda.encode(self._arena + used.offset, arguments_of(used))
            except CudaFailure as error:
                return Outcome(error=str(error))
            cuda.upload(place, np.frombuffer(bits, np.uint8))
        function = self._function(case.kernel)
        if isinstance(function, str):
            return Outcome(error=function)
        cuda.upload(self._arena, case.arena())
        cuda.upload(self._table, np.frombuffer(case.record(self._arena, place, raw=True), np.uint8))
        cuda.launch(function, 1, 32, self._table, 0)
        found = cuda.download(self._arena, case.places[3])
        raw = _take_raw(case, found)
        return Outcome(found.tobytes(), raw=raw)

    def _function(self, kernel: str):
        """A kernel, or a message where the driver's assembler refuses it."""
        if kernel not in self._functions:
            try:
                module = self._cuda.module(ptx.module((kernel,)))
                self._functions[kernel] = self._cuda.function(module, kernel)
            except CudaFailure as error:
                self._functions[kernel] = str(error)
        return self._functions[kernel]


def _take_raw(case: Case, arena: np.ndarray) -> int | None:
    """What hardware had in the mbarrier, taken out of the result, where the emulator has nothing to put."""
    if not case.kernel.startswith(("load", "replace", "bulk_load", "bulk_within")):
        return None
    at = case.places[2] + 8
    raw = int(arena[at : at + 8].view(np.uint64)[0])
    arena[at : at + 8] = case.arena()[at : at + 8]
    return raw


def run(cases: list[Case], until: float) -> list[Outcome]:
    """Outcomes of cases, found in processes of their own until `until` (time.monotonic)."""
    outcomes: list[Outcome | None] = [None] * len(cases)
    failures: Counter = Counter()
    left = list(range(len(cases)))
    while left:
        if time.monotonic() > until:
            for i in left:
                outcomes[i] = Outcome(error="not run: no time left")
            break
        found, reason = _in_a_process([cases[i] for i in left], until)
        for i, outcome in zip(left, found, strict=False):
            outcomes[i] = outcome
        left = left[len(found) :]
        if not left:
            break
        guilty = left.pop(0)
        outcomes[guilty] = Outcome(error=reason)
        kind = (cases[guilty].family, cases[guilty].kernel)
        failures[kind] += 1
        if failures[kind] >= MOST_FAILURES:
            for i in left:
                if (cases[i].family, cases[i].kernel) == kind:
                    outcomes[i] = Outcome(error=f"not run: {MOST_FAILURES} cases of its kind failed")
            left = [i for i in left if outcomes[i] is None]
    return [outcome if outcome is not None else Outcome(error="not run") for outcome in outcomes]


def _in_a_process(cases: list[Case], until: float) -> tuple[list[Outcome], str]:
    """Outcomes up to the case that ended the process, and how it did."""
    with tempfile.TemporaryDirectory() as folder:
        given, got = Path(folder, "in"), Path(folder, "out")
        given.write_bytes(pickle.dumps(cases))
        command = [sys.executable, str(HERE / "hardware.py"), str(given), str(got)]
        limit = max(5.0, min(SECONDS, until - time.monotonic()))
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
            reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:600]
        except subprocess.TimeoutExpired:
            reason = "hung"
        found: list[Outcome] = []
        if got.exists():
            with got.open("rb") as file:
                while True:
                    try:
                        found.append(pickle.load(file))
                    except (EOFError, pickle.UnpicklingError):
                        break
        return found, reason


def _serve(given: Path, got: Path) -> None:
    cases: list[Case] = pickle.loads(given.read_bytes())
    runner = Runner(cases)
    with got.open("wb") as file:
        for number, case in enumerate(cases):
            pickle.dump(runner.run(case, number), file)
            file.flush()


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), Path(sys.argv[2]))
