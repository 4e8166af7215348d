"""Skips, seeds and progress records of the GPU tests.

Every test here needs a CUDA device that the shipped cubins cover: SM120, SM121, or SM90 for the twin build.
Where there is none, each test skips and says why; but with SM12X_BACKEND=emulator those in EMULATED run on
the CPU, on emulated kernels, so that the tests themselves can be tried. SM12X_TEST_SEED repeats a run's
random inputs; SM12X_GPU_RECORD names a file that gets one JSON line per test start and outcome (tests/gpu/run
reads it, also after a hang).
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

from seeding import SEED  # noqa: E402  (needs the path above)

RECORD = os.environ.get("SM12X_GPU_RECORD")
# A kernel that hangs blocks the interpreter inside the driver: only a watchdog thread can end the process
# then.
HANG_SECONDS = float(os.environ.get("SM12X_GPU_HANG_SECONDS", "0"))


# Files whose tests also run on the CPU.
EMULATED = ("test_fused_moe.py", "test_fused_moe_whole.py", "test_moe_parts.py")
ON_EMULATOR = os.environ.get("SM12X_BACKEND") == "emulator"


def _skip_reason() -> str | None:
    try:
        import torch
    except ImportError:
        return "torch is not installed: the GPU tests make their references with it"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability not in ((9, 0), (12, 0), (12, 1)):
        return (
            f"compute capability {capability[0]}.{capability[1]}: cubins exist for 12.0, 12.1 and (twin) 9.0"
        )
    return None


SKIP_REASON = _skip_reason()


def pytest_report_header() -> str:
    return f"sm12x GPU tests: seed {SEED}, CUDA major {os.environ.get('SM12X_CUDA_MAJOR', 'default')}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if SKIP_REASON is None:
        return
    for item in items:
        if HERE in Path(str(item.path)).resolve().parents:
            if ON_EMULATOR and Path(str(item.path)).name in EMULATED:
                continue
            item.add_marker(pytest.mark.skip(reason=f"GPU tests: {SKIP_REASON}"))


def _record(**entry: object) -> None:
    if RECORD:
        with open(RECORD, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")


def pytest_runtest_logstart(nodeid: str) -> None:
    _record(test=nodeid, event="start", time=time.time())
    if HANG_SECONDS:
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        text = "" if report.outcome == "passed" else str(report.longreprtext)[-3000:]
        counted = re.findall(r"^(\d+) cases, worst error (\S+) of its bound$", report.capstdout, re.MULTILINE)
        _record(
            test=report.nodeid,
            event=report.outcome,
            seconds=round(report.duration, 3),
            cases=sum(int(cases) for cases, _ in counted),
            worst=max((float(worst) for _, worst in counted), default=0.0),
            text=text,
        )


def pytest_runtest_logfinish(nodeid: str) -> None:
    if HANG_SECONDS:
        faulthandler.cancel_dump_traceback_later()
    if _lost:
        pytest.exit(f"the CUDA context is lost since {_lost[0]}: no later test can run", returncode=77)


def pytest_collection_finish(session: pytest.Session) -> None:
    _record(event="collected", tests=[item.nodeid for item in session.items])


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of this run and this test, so that a test run alone repeats the inputs it had in the whole
    run.
    """
    value = zlib.crc32(f"{SEED}:{request.node.name}".encode())
    print(f"seed of this run: {SEED} (repeat with SM12X_TEST_SEED={SEED})")
    return value


_lost: list[str] = []


@pytest.fixture(autouse=True)
def _device_is_clean(request: pytest.FixtureRequest) -> Iterator[None]:
    """A sticky CUDA error belongs to the test that caused it, and ends the run: no later test could pass."""
    yield
    if SKIP_REASON is None:
        import torch

        try:
            torch.cuda.synchronize()
        except RuntimeError:
            _lost.append(request.node.nodeid)
            raise
