"""tests/cuda/matrix.toml: the instantiations of the header library that have to compile, and their C++ text.

An entry is data. What nvcc gets is grouped_program.hpp, as an outside CUTLASS program would write it, with
the types that the entry names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import ROOT, TARGETS, BuildError
from .ptx import INFO_SYMBOL

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[import-not-found,no-redef]

TESTS_DIR = ROOT / "tests" / "cuda"
MATRIX_FILE = TESTS_DIR / "matrix.toml"
MAIN_TARGET, MAIN_CUTLASS = "sm_120a", "4.2"
CUTLASS_VERSIONS = ("4.2", "4.5", "4.6")
SHARED_MEMORY_LIMIT = 101_376
STAGE_SLACK = 1536
"""What the builder reserves for the kernel shell, which it does not know when it counts stages. An automatic
count may be one too low where less than this is missing; the entry says so (``spare_stage``)."""

_ELEMENTS = {
    "e4m3": "cutlass::float_e4m3_t",
    "e5m2": "cutlass::float_e5m2_t",
    "bf16": "cutlass::bfloat16_t",
    "fp16": "cutlass::half_t",
    "fp32": "float",
    "void": "void",
}
_BYTES = {"e4m3": 1, "e5m2": 1, "bf16": 2, "fp16": 2, "fp32": 4}
_LAYOUTS = {"row": "cutlass::layout::RowMajor", "column": "cutlass::layout::ColumnMajor"}
_SCHEDULES = {
    "upstream_cooperative": "cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperativeSm120<{n}>",
    "upstream_pingpong": "cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpongSm120<{n}>",
    "cooperative": "sm12x::KernelPtrArrayCooperative<{n}, {mma}, {skip}>",
    "pingpong": "sm12x::KernelPtrArrayPingpong<{n}, {mma}, {skip}>",
    "auto": "sm12x::KernelScheduleAuto",
}
_MMA = {"unit_scale": "sm12x::MmaKind::kUnitScale", "plain": "sm12x::MmaKind::kPlain"}
_EPILOGUES = {
    "auto": "cutlass::epilogue::collective::EpilogueScheduleAuto",
    "cooperative": "cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative",
    "pingpong": "cutlass::epilogue::PtrArrayTmaWarpSpecializedPingpong",
    "tma": "sm12x::epilogue::PtrArrayTma",
    "no_smem": "cutlass::epilogue::PtrArrayNoSmemWarpSpecialized",
    "direct": "sm12x::epilogue::PtrArrayDirect",
}
_EPILOGUE_TILES = {
    "auto": "cutlass::epilogue::collective::EpilogueTileAuto",
    "narrow": "sm12x::epilogue::NarrowTile<TileShape>",
}
_SILU = "cutlass::epilogue::thread::SiLu"
_FUSIONS = {
    "linear_combination": "cutlass::epilogue::fusion::LinearCombination<ElementD, float, ElementC, float>",
    "linear_combination_silu": (
        f"cutlass::epilogue::fusion::LinCombEltAct<{_SILU}, ElementD, float, ElementC, float>"
    ),
    "linear_combination_aux": (
        "cutlass::epilogue::fusion::LinCombPerColBiasEltActAux<"
        f"cutlass::layout::RowMajor*, {_SILU}, ElementD, float>"
    ),
    "column_bias": "outside::ColumnBias<TileShape, ElementD>",
    "group_scaled": "sm12x::epilogue::GroupScaledAcc<ElementD, {side}>",
    "group_scaled_silu": f"sm12x::epilogue::GroupScaledAccEltAct<{_SILU}, ElementD, {{side}}>",
    "silu_residual": "outside::SiluResidual<ElementD, ElementC>",
}
# Of those that tests/cuda/run/run_program.hpp can check: their names in its enum Fusion.
FUSION_NAMES = {
    "linear_combination": "kLinearCombination",
    "linear_combination_silu": "kLinearCombinationSilu",
    "column_bias": "kColumnBias",
    "group_scaled": "kGroupScaled",
    "group_scaled_silu": "kGroupScaledSilu",
    "silu_residual": "kSiluResidual",
}
_SIDES = {"n": "sm12x::epilogue::kAlongN", "m": "sm12x::epilogue::kAlongM"}
_PROBLEMS = {"group": "cutlass::gemm::GroupProblemShape", "array": "cutlass::gemm::ArrayProblemShape"}
_STAGES = {
    "auto": "cutlass::gemm::collective::StageCountAuto",
    "auto_carveout": "cutlass::gemm::collective::StageCountAutoCarveout<EpilogueBytes>",
}
_VOCABULARY: dict[str, Mapping[str, str]] = {
    "schedule": _SCHEDULES,
    "mma": _MMA,
    "a": _ELEMENTS,
    "b": _ELEMENTS,
    "c": _ELEMENTS,
    "d": _ELEMENTS,
    "accumulator": _ELEMENTS,
    "layout": _LAYOUTS,
    "layout_a": _LAYOUTS,
    "layout_b": _LAYOUTS,
    "epilogue": _EPILOGUES,
    "fusion": _FUSIONS,
    "bias_side": _SIDES,
    "problem": _PROBLEMS,
}


@dataclass(frozen=True)
class Entry:
    """One program. The fields after ``bias_side`` are for programs that must not compile, except the last
    two.
    """

    name: str
    schedule: str
    tile: tuple[int, ...]
    scheduler_stages: int = 2
    mma: str = "unit_scale"
    skip_empty_columns: bool = False
    stages: int | str = "auto_carveout"
    spare_stage: bool = False
    tile_loop_spill: bool = False
    a: str = "e4m3"
    b: str = "e4m3"
    c: str = "void"
    d: str = "bf16"
    layout: str = "row"
    alignment_c: int = 0
    alignment_d: int = 0
    epilogue: str = "auto"
    epilogue_tile: str | tuple[int, ...] = "auto"
    fusion: str = "linear_combination"
    bias_side: str = "n"
    layout_a: str = "row"
    layout_b: str = "column"
    pointers: bool = True
    alignment_a: int = 16
    alignment_b: int = 16
    accumulator: str = "fp32"
    cluster: tuple[int, ...] = (1, 1, 1)
    problem: str = "group"
    targets: tuple[str, ...] = (MAIN_TARGET,)
    cutlass: tuple[str, ...] = (MAIN_CUTLASS,)

    @property
    def is_pingpong(self) -> bool:
        """Which of CUTLASS's two shells the schedule stands for."""
        return "pingpong" in self.schedule or (self.schedule == "auto" and self.tile[0] < 128)

    @property
    def mma_warps(self) -> int:
        """How many warps share one tile's MMAs."""
        return 4 if self.is_pingpong else 8


@dataclass(frozen=True)
class Source:
    """A .cu file of tests/cuda that is compiled as it stands."""

    name: str
    file: str
    cutlass: tuple[str, ...] = (MAIN_CUTLASS,)


@dataclass(frozen=True)
class Matrix:
    """The table: programs, files written by hand, and the programs whose main loops are compared."""

    entries: dict[str, Entry]
    sources: dict[str, Source]
    main_loop: dict[str, Entry]


def parse_entry(row: Mapping[str, Any], where: str) -> Entry:
    """The entry of one line. Raises BuildError naming line and field where it is not one."""
    known = {field.name: field for field in dataclasses.fields(Entry)}
    unknown = sorted(set(row) - set(known))
    if unknown:
        raise BuildError(f"{where}: unknown fields {unknown}")
    for name in ("name", "schedule", "tile"):
        if name not in row:
            raise BuildError(f"{where}: the field {name} is missing")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    for name, value in values.items():
        expected = _expected(name, value)
        if expected:
            raise BuildError(f"{where}: {name} should be {expected}, got {row[name]!r}")
    entry = Entry(**values)
    if entry.schedule not in ("cooperative", "pingpong") and (
        entry.mma != "unit_scale" or entry.skip_empty_columns
    ):
        raise BuildError(f"{where}: mma and skip_empty_columns belong to sm12x's own tags")
    return entry


def _expected(name: str, value: Any) -> str:
    """What the field should have been; empty where ``value`` is right."""
    if name in _VOCABULARY:
        return "" if value in _VOCABULARY[name] else f"one of {sorted(_VOCABULARY[name])}"
    if name in ("tile", "cluster"):
        return "" if _is_shape(value, 3) else "three integers"
    if name == "epilogue_tile":
        good = value in _EPILOGUE_TILES if isinstance(value, str) else _is_shape(value, 2)
        return "" if good else f"one of {sorted(_EPILOGUE_TILES)} or two integers"
    if name == "stages":
        good = value in _STAGES if isinstance(value, str) else _is_count(value)
        return "" if good else f"one of {sorted(_STAGES)} or a number"
    if name in ("targets", "cutlass"):
        allowed = TARGETS if name == "targets" else CUTLASS_VERSIONS
        good = isinstance(value, tuple) and value and set(value) <= set(allowed)
        return "" if good else f"some of {list(allowed)}"
    if name in ("skip_empty_columns", "spare_stage", "tile_loop_spill", "pointers"):
        return "" if isinstance(value, bool) else "true or false"
    if name == "name":
        good = isinstance(value, str) and value.replace("_", "").isalnum() and value == value.lower()
        return "" if good else "lower-case letters, digits and underscores"
    return "" if _is_count(value) else "a positive number"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_shape(value: Any, rank: int) -> bool:
    return isinstance(value, tuple) and len(value) == rank and all(_is_count(number) for number in value)


def parse_matrix(text: str, where: str) -> Matrix:
    """The table in ``text``. Raises BuildError where a line is wrong, a name stands twice or nothing is
    listed.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BuildError(f"{where}: {error}") from error
    unknown = sorted(set(table) - {"entry", "source", "main_loop"})
    if unknown:
        raise BuildError(f"{where}: unknown tables {unknown}")
    parsed: dict[str, list[Entry]] = {}
    for kind in ("entry", "main_loop"):
        rows = table.get(kind, [])
        parsed[kind] = [
            parse_entry(row, f"{where}, {kind} {number} ({row.get('name', 'no name')})")
            for number, row in enumerate(rows, start=1)
        ]
    if not parsed["entry"]:
        raise BuildError(f"{where} lists no entry")
    sources = []
    for row in table.get("source", []):
        if set(row) - {"name", "file", "cutlass"} or not {"name", "file"} <= set(row):
            raise BuildError(f"{where}: a source has name, file and cutlass, got {row!r}")
        versions = tuple(row.get("cutlass", Source.cutlass))
        if not versions or not set(versions) <= set(CUTLASS_VERSIONS):
            raise BuildError(f"{where}: {row['name']}: cutlass should be some of {list(CUTLASS_VERSIONS)}")
        sources.append(Source(row["name"], row["file"], versions))
    names = [item.name for item in (*parsed["entry"], *parsed["main_loop"], *sources)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BuildError(f"{where}: names that stand twice: {twice}")
    return Matrix(
        entries={entry.name: entry for entry in parsed["entry"]},
        sources={source.name: source for source in sources},
        main_loop={entry.name: entry for entry in parsed["main_loop"]},
    )


def load_matrix(path: Path = MATRIX_FILE) -> Matrix:
    """The table of the tree."""
    if not path.is_file():
        raise BuildError(f"there is no {path}")
    matrix = parse_matrix(path.read_text(), path.name)
    for source in matrix.sources.values():
        if not (path.parent / source.file).is_file():
            raise BuildError(f"{path.name}: there is no {source.file}")
    return matrix


def _shape(numbers: Sequence[int]) -> str:
    return "cute::Shape<" + ", ".join(f"cute::Int<{number}>" for number in numbers) + ">"


def _schedule(entry: Entry) -> str:
    skip = "true" if entry.skip_empty_columns else "false"
    return _SCHEDULES[entry.schedule].format(n=entry.scheduler_stages, mma=_MMA[entry.mma], skip=skip)


def _alignment(given: int, element: str) -> int:
    """In elements: what was given, else 16 bytes."""
    return given or 16 // _BYTES[element]


def choice(entry: Entry) -> str:
    """The struct that names the program's types."""
    star = "*" if entry.pointers else ""
    layout = _LAYOUTS[entry.layout] + star
    tile = (
        _EPILOGUE_TILES[entry.epilogue_tile]
        if isinstance(entry.epilogue_tile, str)
        else _shape(entry.epilogue_tile)
    )
    stages = (
        _STAGES[entry.stages]
        if isinstance(entry.stages, str)
        else f"cutlass::gemm::collective::StageCount<{entry.stages}>"
    )
    source = entry.d if entry.c == "void" else entry.c
    lines = [
        f"using ElementA = {_ELEMENTS[entry.a]};",
        f"using LayoutA = {_LAYOUTS[entry.layout_a]}{star};",
        f"static constexpr int kAlignmentA = {entry.alignment_a};",
        f"using ElementB = {_ELEMENTS[entry.b]};",
        f"using LayoutB = {_LAYOUTS[entry.layout_b]}{star};",
        f"static constexpr int kAlignmentB = {entry.alignment_b};",
        f"using ElementC = {_ELEMENTS[entry.c]};",
        f"using LayoutC = {layout};",
        f"static constexpr int kAlignmentC = {_alignment(entry.alignment_c, source)};",
        f"using ElementD = {_ELEMENTS[entry.d]};",
        f"using LayoutD = {layout};",
        f"static constexpr int kAlignmentD = {_alignment(entry.alignment_d, entry.d)};",
        f"using ElementAccumulator = {_ELEMENTS[entry.accumulator]};",
        f"using TileShape = {_shape(entry.tile)};",
        f"using ClusterShape = {_shape(entry.cluster)};",
        f"using ProblemShape = {_PROBLEMS[entry.problem]}<cute::Shape<int, int, int>>;",
        f"using EpilogueSchedule = {_EPILOGUES[entry.epilogue]};",
        f"using EpilogueTile = {tile};",
        f"using Fusion = {_FUSIONS[entry.fusion].format(side=_SIDES[entry.bias_side])};",
        f"template <int EpilogueBytes> using StageCount = {stages};",
        f"using MainloopSchedule = {_schedule(entry)};",
    ]
    return "struct Choice {\n" + "".join(f"  {line}\n" for line in lines) + "};\n"


_HEAD = """// {name}: written by cuda/tools/compile_tests.py from tests/cuda/{table}.
#include "grouped_program.hpp"
#include "visitor_trees.hpp"

"""


def types_text(entry: Entry, table: str = "matrix.toml") -> str:
    """A program that names the kernel's types and calls nothing: the compiler's front end alone judges it."""
    return (
        _HEAD.format(name=entry.name, table=table)
        + choice(entry)
        + "using Program = outside::GroupedGemm<Choice>;\n"
        + "static_assert(Program::Kernel::SharedStorageSize > 0);\n"
    )


def instance_text(entry: Entry, table: str = "matrix.toml") -> str:
    """A program that builds the kernel and the host side that launches it."""
    return (
        _HEAD.format(name=entry.name, table=table)
        + choice(entry)
        + "template struct outside::GroupedGemm<Choice>;\n"
    )


def program_text(entry: Entry) -> str:
    """The whole program with its checks, and a table in which it says what it is."""
    checks = [f"static_assert(Program::Kernel::SharedStorageSize <= {SHARED_MEMORY_LIMIT});"]
    if entry.stages == "auto_carveout":
        one_more = "static_assert(outside::kBytesWithOneMoreStage<Choice>"
        if entry.spare_stage:
            checks += [
                "// One stage more would have fitted, by less than the builder reserves for the shell.",
                f"{one_more} <= {SHARED_MEMORY_LIMIT});",
                f"{one_more} + {STAGE_SLACK} > {SHARED_MEMORY_LIMIT});",
            ]
        else:
            checks += [
                "// One stage more would not have fitted.",
                f"{one_more} > {SHARED_MEMORY_LIMIT});",
            ]
        checks.append("static_assert(Program::kStages >= 2);")
    elif entry.stages == "auto":
        checks.append("static_assert(Program::kStages >= 2);")
    else:
        checks.append(f"static_assert(Program::kStages == {entry.stages});")
    facts = (
        "Program::Kernel::MaxThreadsPerBlock",
        "Program::Kernel::SharedStorageSize",
        "Program::kStages",
        "outside::kBytesWithOneMoreStage<Choice>",
    )
    return (
        instance_text(entry)
        + "\nusing Program = outside::GroupedGemm<Choice>;\n"
        + "".join(check + "\n" for check in checks)
        + '\n// Read back from the PTX.\nextern "C" {\n'
        + f"extern __device__ const unsigned {INFO_SYMBOL}[{len(facts)}];\n"
        + f"__device__ const unsigned {INFO_SYMBOL}[{len(facts)}] = {{\n"
        + "".join(f"    {fact},\n" for fact in facts)
        + "};\n}\n"
    )
