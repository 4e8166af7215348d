"""Kernels with a planted bug, each with a clean twin: the same text with the bug mended.

A kernel has 64 words of `data` (0 to 63) at %rd1, 64 words that nobody wrote at %rd2 ("fresh"), tensor maps
of both as 4 x 16 words in boxes of 2 x 16 at %rd3 and %rd4, and a copy of the first map to edit at %rd5. %r1
is the thread, %p1 whether it is thread 0, %r2 four times its lane, %r3 the shared address `box` of 4096
bytes plus that, %rd6 and %rd7 `data` and `fresh` plus that. `bar` are four mbarriers; every `{init}` sets up
the first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from emulated.kernels import Machine, kernel, line_of
from sm12x.emulator import tensor_map
from sm12x.emulator.errors import EmulatorError
from sm12x.emulator.launch import launch

SEEDS = range(6)
SHARED = ".shared .align 1024 .b8 box[4096];\n.shared .align 8 .b64 bar[4];"
PARAMS = ", ".join(f".param .b64 p{i}" for i in range(5))
PROLOGUE = """
    ld.param.b64 %rd1, [p0];
    ld.param.b64 %rd2, [p1];
    ld.param.b64 %rd3, [p2];
    ld.param.b64 %rd4, [p3];
    ld.param.b64 %rd5, [p4];
    mov.u32 %r1, %tid.x;
    setp.eq.u32 %p1, %r1, 0;
    mov.u32 %r2, %laneid;
    shl.b32 %r2, %r2, 2;
    mov.b32 %r3, box;
    add.u32 %r3, %r3, %r2;
    cvt.u64.u32 %rd8, %r2;
    add.u64 %rd6, %rd1, %rd8;
    add.u64 %rd7, %rd2, %rd8;
"""
INIT = """
    mov.b32 %r59, {count};
    @%p1 mbarrier.init.shared::cta.b64 [bar], %r59;
    fence.mbarrier_init.release.cluster;
    bar.sync 0;
"""
FILL = "st.shared.b32 [%r3], %r1;\n    fence.proxy.async.shared::cta;\n    bar.sync 0;"
_WAIT = """
AGAIN{n}:
    mbarrier.try_wait.parity.shared::cta.b64 %p59, [{bar}], {parity};
    @!%p59 bra AGAIN{n};
"""
LOAD = "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes"
STORE = "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group"
BULK_LOAD = "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes"
BULK_STORE = "cp.async.bulk.global.shared::cta.bulk_group"
PUBLISH = "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned"
COMMIT = "cp.async.bulk.commit_group;"


def init(count: int = 1) -> str:
    return INIT.format(count=count)


def wait(bar: str = "bar", parity: Any = 0, n: Any = 0) -> str:
    return _WAIT.format(bar=bar, parity=parity, n=n)


@dataclass(frozen=True)
class Planted:
    """`code` with `bug` in place of <HERE>, and its twin with `mended`. The bug is reported as a violation of
    `kind` whose message matches `message`, at the line that `line` matches (None: at no line), under every
    one of `seeds`; under at least `least` of them where that depends on the schedule."""

    name: str
    code: str
    bug: str
    mended: str
    kind: str
    message: str
    line: str | None
    threads: int = 32
    ctas: int = 1
    shared: str = SHARED
    least: int | None = None
    seeds: Any = SEEDS
    options: dict[str, Any] = field(default_factory=dict)

    def text(self, part: str) -> str:
        return kernel(PROLOGUE + self.code.replace("<HERE>", part), params=PARAMS, shared=self.shared)


def encoded(address: int) -> bytes:
    """A map of 4 x 16 words in boxes of 2 x 16."""
    return tensor_map.encode_tiled(2, 2, address, (16, 4), (64,), (16, 2), (1, 1), 0, 0, 0, 0)


class Bench:
    """What a kernel of this folder works on."""

    def __init__(self) -> None:
        self.machine = m = Machine()
        self.data = m.upload(np.arange(64, dtype=np.uint32), "data")
        self.fresh = m.memory.allocate(256, "fresh")
        maps = [np.frombuffer(encoded(address), np.uint8) for address in (self.data, self.fresh, self.data)]
        addresses = [
            m.upload(each, name) for each, name in zip(maps, ("map", "fresh map", "room"), strict=True)
        ]
        self.params = np.array([self.data, self.fresh, *addresses], np.uint64).tobytes()

    def run(self, text: str, planted: Planted, seed: int) -> None:
        options = {"segment_limit": 500_000, **planted.options}
        sizes = (planted.ctas, 1, 1), (planted.threads, 1, 1)
        program = self.machine.program(text)
        options.setdefault("races", False)  # all lanes do the same: test_detect_races has the races
        launch(program, *sizes, 0, self.params, memory=self.machine.memory, seed=seed, **options)


def found(planted: Planted) -> None:
    """The bug is reported as it should be."""
    text = planted.text(planted.bug)
    line = line_of(text, planted.line) if planted.line else None
    errors = {seed: _error(text, planted, seed) for seed in planted.seeds}
    reports = {seed: error for seed, error in errors.items() if error is not None}
    for seed, error in reports.items():
        assert error.violation is not None, f"seed {seed}: {error}"
        assert error.violation.kind == planted.kind, f"seed {seed}: {error}"
        assert re.search(planted.message, error.violation.message), f"seed {seed}: {error}"
        assert error.violation.line == line, f"seed {seed}: {error}"
    least = len(errors) if planted.least is None else planted.least
    assert len(reports) >= least, f"reported under seeds {sorted(reports)} of {sorted(errors)} only"


def _error(text: str, planted: Planted, seed: int) -> EmulatorError | None:
    try:
        Bench().run(text, planted, seed)
    except EmulatorError as error:
        return error
    return None


def clean(planted: Planted) -> None:
    """The twin runs to its end, whatever the seed."""
    text = planted.text(planted.mended)
    for seed in planted.seeds:
        Bench().run(text, planted, seed)


def both(cases: list[Planted]) -> Any:
    """Parametrise a test with (check, planted): the bug and the twin of every case."""
    return pytest.mark.parametrize(
        ("check", "planted"),
        [
            pytest.param(check, planted, id=f"{planted.name}-{name}")
            for planted in cases
            for check, name in ((found, "bug"), (clean, "clean twin"))
        ],
    )
