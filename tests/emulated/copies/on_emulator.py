"""Runs cases on the emulator, each in a launch of its own, so that one that fails takes no other with it."""

from __future__ import annotations

from functools import lru_cache

from emulated.copies import ptx
from emulated.copies.case import Case, Map, Outcome
from sm12x.emulator import tensor_map
from sm12x.emulator.launch import LoadedModule, launch, load
from sm12x.emulator.memory import GlobalMemory

_memory = GlobalMemory()


@lru_cache(maxsize=256)
def _module(kernel: str) -> LoadedModule:
    return load(ptx.module((kernel,)), _memory)


def encode(m: Map, address: int) -> bytes:
    return tensor_map.encode_tiled(
        m.kind, m.rank, address, m.dims, m.strides, m.box, m.steps, m.interleave, m.swizzle, m.l2, m.fill
    )


def run(case: Case, seed: int = 0) -> Outcome:
    """What the emulator makes of a case; `seed` decides when its asynchronous operations complete."""
    content = case.arena()
    arena = _memory.allocate(len(content), "the arena")
    table = _memory.allocate(512, "the table")
    try:
        _memory.write(arena, content)
        used = case.template or case.map
        if used is not None:
            _memory.write(table + 256, encode(used, arena + used.offset))
        _memory.write(table, case.record(arena, table + 256, raw=False))
        program = _module(case.kernel).kernel(case.kernel)
        parameters = table.to_bytes(8, "little") + bytes(4)
        launch(program, (1, 1, 1), (32, 1, 1), 0, parameters, memory=_memory, seed=seed)
        return Outcome(_memory.read(arena, len(content)))
    except Exception as error:  # whatever it is, it is a case that the emulator does not run
        return Outcome(error=f"{type(error).__name__}: {error}"[:500])
    finally:
        _memory.free(table)
        _memory.free(arena)


def run_all(cases: list[Case]) -> list[Outcome]:
    return [run(case) for case in cases]
