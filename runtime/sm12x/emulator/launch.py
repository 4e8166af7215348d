"""Loading PTX and launching its kernels: what the driver layer stands on.

memory = GlobalMemory()
module = load(ptx_text, memory)
launch(module.kernel("name"), grid=(4, 1, 1), block=(384, 1, 1), shared_bytes=0, parameters=bytes(struct),
memory=memory)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .checkers.dependents import Dependency
from .compiler import Program
from .counting.collector import Collector
from .counting.counters import Counters
from .errors import EmulatorError
from .grid import Grid
from .layout import lay_out
from .memory import GlobalMemory, Region
from .ptx import parse
from .ptx.inline import inline
from .ptx.ir import TYPE_BITS, Immediate, Kernel, Module, Symbol, Variable

SHARED_LIMIT = 101_376  # bytes a block may have on SM120 (DESIGN section 2)
THREADS_LIMIT = 1024
SEGMENT_LIMIT = 200_000_000
_numbers = itertools.count(1)


@dataclass(slots=True)
class LoadedModule:
    """A PTX module whose global and constant variables have addresses. Kernels are compiled when first asked
    for.
    """

    ir: Module
    addresses: dict[str, int]
    constants: Region
    truncate_bits: int | None = None
    _programs: dict[str, Program] = field(default_factory=dict)

    def kernel(self, name: str) -> Program:
        """The kernel of that name. Raises EmulatorError where there is none, or it uses what is not
        implemented.
        """
        if name not in self._programs:
            if name not in self.ir.kernels:
                raise EmulatorError(
                    f"there is no kernel {name!r}: there are {', '.join(self.ir.kernels) or 'none'}"
                )
            kernel = inline(self.ir.kernels[name], self.ir)
            layout = lay_out(kernel, self.ir.variables, self.addresses)
            self._programs[name] = Program(kernel, layout, self.constants, self.truncate_bits)
        return self._programs[name]


@dataclass(frozen=True, slots=True)
class LaunchResult:
    """What a launch did: `segments` of the program run, asynchronous `operations` completed, and `counters`
    where they were asked for.
    """

    segments: int
    operations: int
    counters: Counters | None = None


def load(text: str, memory: GlobalMemory, *, truncate_bits: int | None = None) -> LoadedModule:
    """Parse PTX and give its global variables memory. With `truncate_bits`, MMAs with FP32 accumulators cut
    their sums to so many significant bits, as hardware is reported to with 22; without, they are rounded
    once.

    Raises EmulatorError where the text cannot be read.
    """
    module = parse(text)
    addresses: dict[str, int] = {}
    constant_bytes = 0
    for variable in module.variables.values():
        if variable.space == "global" and not variable.extern:
            addresses[variable.name] = memory.allocate(max(variable.size, 1), variable.name)
        elif variable.space == "const":
            constant_bytes = -(-constant_bytes // variable.align) * variable.align
            addresses[variable.name] = constant_bytes
            constant_bytes += variable.size
    constants = Region(0, max(constant_bytes, 1), "constant memory", read_only=True)
    constants.shadow[:] = 0
    for variable in module.variables.values():
        if variable.name not in addresses:
            continue
        content = _initial(variable, addresses)
        if variable.space == "global":
            memory.write(addresses[variable.name], content)
        else:
            start = addresses[variable.name]
            constants.data[start : start + variable.size] = np.frombuffer(content, np.uint8)
    return LoadedModule(module, addresses, constants, truncate_bits)


def _initial(variable: Variable, addresses: dict[str, int]) -> bytes:
    """The first content of a variable: its initialiser, and zeros for the rest."""
    width = max(1, TYPE_BITS[variable.type] // 8)
    content = bytearray()
    for value in variable.initial or ():
        if isinstance(value, Symbol):
            if value.name not in addresses:
                raise EmulatorError(f"{variable.name} is initialised with {value.name}, which has no address")
            content += (addresses[value.name] + value.offset).to_bytes(8, "little")
        else:
            content += _pattern(value, variable, width)
    return bytes(content.ljust(variable.size, b"\0"))


def _pattern(value: Immediate, variable: Variable, width: int) -> bytes:
    if variable.type == "f32" and value.bits == 64:
        number = np.array([value.value], np.uint64).view(np.float64).astype(np.float32)
        return number.tobytes()
    return (value.value & (1 << 8 * width) - 1).to_bytes(width, "little")


def launch(
    program: Program,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_bytes: int,
    parameters: bytes,
    *,
    memory: GlobalMemory,
    seed: int = 0,
    segment_limit: int = SEGMENT_LIMIT,
    resident: int | None = None,
    cooperative: bool = False,
    races: bool = True,
    early_maps: bool = False,
    progress: Callable[[int], None] | None = None,
    counts: Collector | None = None,
) -> LaunchResult:
    """Run a kernel to its end.

    `parameters` are the bytes of the kernel's parameters, in PTX's layout; at least as many as it declares.
    `seed` chooses how warps interleave, when asynchronous operations complete, and how many CTAs are there
    at a time unless `resident` says so or the launch is `cooperative`: then all are. `races`: whether
    accesses of shared memory that nothing orders are a violation, however they went (checkers.races).
    `progress` is called now and then with the segments that have run. `counts`, a new Collector, has the
    result come with counters.
    With `early_maps`, a tensor load uses its map as it is when the load is issued, not when it completes:
    CUTLASS's own array kernels rewrite maps under loads in flight, and only run right this way.

    Raises ValueError for a launch that CUDA would refuse, and EmulatorError where the kernel breaks a rule.
    """
    state = prepare(
        program,
        grid,
        block,
        shared_bytes,
        parameters,
        memory=memory,
        seed=seed,
        segment_limit=segment_limit,
        resident=resident,
        cooperative=cooperative,
        races=races,
        early_maps=early_maps,
        counts=counts,
    )
    try:
        with np.errstate(all="ignore"):
            if progress is not None:
                state.scheduler.watch(progress)
            state.scheduler.run()
    finally:
        state.close()
    return result_of(state)


def result_of(state: Grid) -> LaunchResult:
    """What a grid that has run did."""
    counted = None if state.counts is None else state.counts.result()
    return LaunchResult(state.scheduler.steps, state.scheduler.completed, counted)


def residents(seed: int, count: int) -> int:
    """How many of a grid's `count` CTAs a seed lets in at a time: all (seeds 0 and 2 modulo 5), one (1), two
    (3) or half of them (4).

    CUDA guarantees that the CTAs of a grid are there together only for a cooperative launch, however few they
    are: a kernel in which one waits for another that has not begun fails under some seeds.
    """
    return (count, 1, count, min(2, count), -(-count // 2))[seed % 5]


def prepare(
    program: Program,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_bytes: int,
    parameters: bytes,
    *,
    memory: GlobalMemory,
    seed: int,
    segment_limit: int = SEGMENT_LIMIT,
    resident: int | None = None,
    cooperative: bool = False,
    races: bool = True,
    early_maps: bool = False,
    counts: Collector | None = None,
    dependency: Dependency | None = None,
) -> Grid:
    """A grid ready to run, to be closed behind its end. Arguments and ValueErrors as of `launch`."""
    check(program, grid, block, shared_bytes, parameters)
    count = grid[0] * grid[1] * grid[2]
    if counts is not None:
        counts.begin(program, memory)
    return Grid(
        program,
        memory,
        grid,
        block,
        shared_bytes,
        parameters[: program.layout.parameter_bytes],
        seed=seed,
        limit=segment_limit,
        number=next(_numbers),
        resident=count if cooperative else resident or residents(seed, count),
        races=races,
        early_maps=early_maps,
        counts=counts,
        dependency=dependency,
    )


def check(
    program: Program,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_bytes: int,
    parameters: bytes,
) -> None:
    """Raises ValueError for a launch that CUDA would refuse."""
    kernel = program.kernel
    for name, sizes in (("grid", grid), ("block", block)):
        if len(sizes) != 3 or min(sizes) < 1:
            raise ValueError(f"{name}: expected three sizes of at least 1, got {sizes}")
    _check_block(kernel, block)
    total = program.layout.dynamic_shared - 1024 + shared_bytes
    if shared_bytes < 0 or total > SHARED_LIMIT:
        raise ValueError(
            f"shared_bytes: expected at most {SHARED_LIMIT} bytes with the kernel's own, got {total}"
        )
    if len(parameters) < program.layout.parameter_bytes:
        raise ValueError(
            f"parameters: expected {program.layout.parameter_bytes} bytes for {kernel.name}, "
            f"got {len(parameters)}"
        )


def _check_block(kernel: Kernel, block: tuple[int, int, int]) -> None:
    threads = block[0] * block[1] * block[2]
    if threads > THREADS_LIMIT or block[2] > 64:
        raise ValueError(f"block: expected at most {THREADS_LIMIT} threads, 64 in z, got {block}")
    for name, exact in (("reqntid", True), ("maxntid", False)):
        sizes = kernel.directives.get(name)
        if sizes is None:
            continue
        allowed = int(np.prod(sizes))
        if threads > allowed or (exact and block != (*sizes, 1, 1)[:3]):
            raise ValueError(f"block: {kernel.name} has .{name} {sizes}, got {block}")
