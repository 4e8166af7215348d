"""The tables of the headers' compile tests, and the logic around the compiler: no toolchain needed."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Appended, not put in front: build.py and wheel.py there must not hide packages of those names.
sys.path.append(str(ROOT / "cuda" / "tools"))

import compile_tests  # noqa: E402
from sm12x_build import BuildError, cutlass_headers, header_compile, header_report, header_select  # noqa: E402
from sm12x_build.header_compile import Outcome, Unit, units_of  # noqa: E402
from sm12x_build.header_matrix import (  # noqa: E402
    CUTLASS_VERSIONS,
    Entry,
    Matrix,
    Source,
    load_matrix,
    parse_entry,
    parse_matrix,
    program_text,
    types_text,
)
from sm12x_build.header_negatives import Negative, judge, load_negatives, parse_negatives  # noqa: E402

TILE_M, TILE_N, TILE_K = (64, 128, 256), (8, 16, 32, 64, 128, 256), (64, 128)
LEAST = 64


@pytest.fixture(scope="module")
def matrix() -> Matrix:
    return load_matrix()


@pytest.fixture(scope="module")
def units(matrix: Matrix) -> list[Unit]:
    return units_of(matrix)


# The table


def test_enough_instantiations_for_the_main_target(units: list[Unit]) -> None:
    kinds = Counter(unit.kind for unit in units if isinstance(unit.program, Entry))
    assert kinds[""] >= LEAST
    assert {"@sm_121a", "@sm_90a", "@cutlass-4.5", "@cutlass-4.6"} <= set(kinds)
    assert min(kinds.values()) >= 2
    assert len({unit.key for unit in units}) == len(units)


def test_no_two_lines_are_the_same_program(matrix: Matrix) -> None:
    programs = [dataclasses.replace(entry, name="x") for entry in matrix.entries.values()]
    assert len(set(programs)) == len(programs)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("schedule", {"upstream_cooperative", "upstream_pingpong", "cooperative", "pingpong", "auto"}),
        ("mma", {"unit_scale", "plain"}),
        ("skip_empty_columns", {True, False}),
        ("stages", {"auto", "auto_carveout", 2, 3, 4}),
        ("c", {"void", "bf16", "fp16", "fp32"}),
        ("d", {"bf16", "fp16", "fp32", "e4m3", "e5m2"}),
        ("layout", {"row", "column"}),
        ("epilogue", {"auto", "cooperative", "pingpong", "tma", "no_smem", "direct"}),
        ("fusion", {"linear_combination", "linear_combination_silu", "column_bias", "group_scaled",
                    "group_scaled_silu", "silu_residual"}),
        ("bias_side", {"n", "m"}),
        ("alignment_d", {0, 1, 2, 4}),
    ],
)  # fmt: skip
def test_every_value_of_a_field_stands_in_the_table(matrix: Matrix, field: str, values: set[Any]) -> None:
    assert {getattr(entry, field) for entry in matrix.entries.values()} >= values


def test_every_upstream_name_stands_in_the_table(matrix: Matrix) -> None:
    names = {(entry.schedule, entry.scheduler_stages) for entry in matrix.entries.values()}
    assert names >= {(f"upstream_{kind}", n) for kind in ("cooperative", "pingpong") for n in (1, 2, 3)}


def test_both_instructions_take_all_element_types(matrix: Matrix) -> None:
    pairs = {(entry.mma, entry.a, entry.b) for entry in matrix.entries.values()}
    types = ("e4m3", "e5m2")
    assert pairs >= {(mma, a, b) for mma in ("unit_scale", "plain") for a in types for b in types}


@pytest.mark.parametrize(("pingpong", "limit"), [(False, 32768), (True, 16384)])
def test_every_tile_that_the_registers_allow_stands_in_the_table(
    matrix: Matrix, pingpong: bool, limit: int
) -> None:
    wanted = {(m, n, k) for m in TILE_M for n in TILE_N for k in TILE_K if m * n <= limit}
    if not pingpong:
        wanted = {tile for tile in wanted if tile[0] >= 128}
    assert {entry.tile for entry in matrix.entries.values() if entry.is_pingpong == pingpong} >= wanted


def test_main_loops_to_compare(matrix: Matrix) -> None:
    tiles = {entry.tile for entry in matrix.main_loop.values()}
    assert {(128, 128, 128), (64, 128, 128), (128, 64, 128), (128, 32, 128), (128, 16, 128)} <= tiles


GOOD = {"name": "x", "schedule": "cooperative", "tile": [128, 64, 128]}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"colour": 1}, "unknown fields"),
        ({"tile": [128, 64]}, "tile should be three integers"),
        ({"tile": [128, 64, 0]}, "tile should be three integers"),
        ({"schedule": "fast"}, "schedule should be one of"),
        ({"stages": "many"}, "stages should be one of"),
        ({"stages": True}, "stages should be one of"),
        ({"epilogue_tile": [64]}, "epilogue_tile should be"),
        ({"targets": []}, "targets should be some of"),
        ({"cutlass": ["3.9"]}, "cutlass should be some of"),
        ({"pointers": 1}, "pointers should be true or false"),
        ({"name": "X y"}, "name should be lower-case"),
        ({"schedule": "auto", "mma": "plain"}, "own tags"),
    ],
)
def test_wrong_line_is_refused_with_the_field(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(BuildError, match=expected):
        parse_entry({**GOOD, **change}, "here")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "lists no entry"),
        ("entry = [", "here: "),
        ("other = 1\n", "unknown tables"),
        ('entry = [{ name = "x", schedule = "auto" }]', "tile is missing"),
        (
            'entry = [{ name = "x", schedule = "auto", tile = [64, 64, 64] },'
            ' { name = "x", schedule = "auto", tile = [64, 64, 128] }]',
            "stand twice",
        ),
    ],
)
def test_wrong_table_is_refused(text: str, expected: str) -> None:
    with pytest.raises(BuildError, match=expected):
        parse_matrix(text, "here")


# The text of a program


def test_text_says_what_the_line_says() -> None:
    entry = parse_entry(
        {**GOOD, "scheduler_stages": 3, "mma": "plain", "skip_empty_columns": True, "stages": 4, "a": "e5m2",
         "c": "fp32", "d": "fp16", "layout": "column", "alignment_d": 2, "epilogue": "direct",
         "epilogue_tile": [128, 32], "fusion": "group_scaled", "bias_side": "m"},
        "here",
    )  # fmt: skip
    lines = [line.strip() for line in program_text(entry).splitlines()]
    for expected in (
        "using ElementA = cutlass::float_e5m2_t;",
        "using ElementB = cutlass::float_e4m3_t;",
        "using LayoutA = cutlass::layout::RowMajor*;",
        "using LayoutB = cutlass::layout::ColumnMajor*;",
        "using ElementC = float;",
        "static constexpr int kAlignmentC = 4;",
        "using ElementD = cutlass::half_t;",
        "using LayoutD = cutlass::layout::ColumnMajor*;",
        "static constexpr int kAlignmentD = 2;",
        "using TileShape = cute::Shape<cute::Int<128>, cute::Int<64>, cute::Int<128>>;",
        "using EpilogueTile = cute::Shape<cute::Int<128>, cute::Int<32>>;",
        "using EpilogueSchedule = sm12x::epilogue::PtrArrayDirect;",
        "using Fusion = sm12x::epilogue::GroupScaledAcc<ElementD, sm12x::epilogue::kAlongM>;",
        "template <int EpilogueBytes> using StageCount = cutlass::gemm::collective::StageCount<4>;",
        "using MainloopSchedule = sm12x::KernelPtrArrayCooperative<3, sm12x::MmaKind::kPlain, true>;",
        "template struct outside::GroupedGemm<Choice>;",
        "static_assert(Program::Kernel::SharedStorageSize <= 101376);",
        "static_assert(Program::kStages == 4);",
    ):
        assert expected in lines


def test_automatic_stages_are_checked_for_waste() -> None:
    one_more = "static_assert(outside::kBytesWithOneMoreStage<Choice>"
    text = program_text(parse_entry(GOOD, "here"))
    assert "StageCountAutoCarveout<EpilogueBytes>" in text
    assert f"{one_more} > 101376);" in text
    text = program_text(parse_entry({**GOOD, "spare_stage": True}, "here"))
    assert f"{one_more} <= 101376);" in text
    assert f"{one_more} + 1536 > 101376);" in text
    for stages in ("auto", 3):
        assert one_more not in program_text(parse_entry({**GOOD, "stages": stages}, "here"))


def test_texts_differ_wherever_lines_do(matrix: Matrix) -> None:
    texts = {types_text(dataclasses.replace(entry, name="x")) for entry in matrix.entries.values()}
    assert len(texts) == len(matrix.entries)


# What must not compile


def test_every_forbidden_program_is_a_mended_one_with_a_fault(matrix: Matrix) -> None:
    cases = load_negatives(matrix)
    assert len(cases) >= 20
    for case in cases.values():
        assert case.expect.startswith("sm12x: "), case.name
        assert case.text() != types_text(matrix.entries[case.base]), case.name


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ('base = "y"', "has no entry y"),
        ("fault = {}", "without a fault"),
        ("fault = { mma = 'unit_scale' }", "changes nothing"),
        ("fault = { colour = 1 }", "unknown fields"),
        ('expect = "error"', "should begin with"),
        ('expect = "sm12x: "', "should begin with"),
        ('hope = "so"', "unknown fields"),
    ],
)
def test_wrong_case_is_refused(change: str, expected: str) -> None:
    table = Matrix({"x": parse_entry(GOOD, "here")}, {}, {})
    fields = {"name": '"n"', "base": '"x"', "fault": "{ tile = [96, 64, 128] }", "expect": '"sm12x: no"'}
    name, _, value = change.partition(" = ")
    row = ", ".join(f"{key} = {text}" for key, text in {**fields, name: value}.items())
    with pytest.raises(BuildError, match=expected):
        parse_negatives(f"negative = [{{ {row} }}]", table, "here")


def test_no_case_is_a_failure(matrix: Matrix) -> None:
    with pytest.raises(BuildError, match="lists no negative"):
        parse_negatives("", matrix, "here")


CASE = Negative("n", "x", Entry("n", "cooperative", (96, 64, 128)), "sm12x: the tile's M", ("Limit<1>",))
OURS = 'a.hpp(3): error: static assertion failed with "sm12x: the tile\'s M must be 64"\n  [Limit<1>]\n'
THEIRS = 'b.hpp(4): error: static assertion failed with "Only TN layout is supported."\n'


def test_refused_as_expected_is_good() -> None:
    assert judge(CASE, 2, OURS) == []
    assert judge(CASE, 2, OURS + THEIRS) == []


@pytest.mark.parametrize(
    ("status", "log", "expected"),
    [
        (0, "", "compiles; it should be refused"),
        (0, OURS, "compiles; it should be refused"),
        (2, THEIRS, "the first error is"),
        (2, THEIRS + OURS, "comes later"),
        (2, OURS.replace("[Limit<1>]", ""), "is not in the output"),
        (1, "nvcc fatal   : out of memory\n", "without an error of the compiler"),
        (139, "", "without an error of the compiler"),
    ],
)
def test_any_other_end_is_a_failure(status: int, log: str, expected: str) -> None:
    problems = judge(CASE, status, log)
    assert len(problems) == 1
    assert expected in problems[0]


# Reading results


USAGE = """ptxas info    : Compiling entry function 'k' for 'sm_120a'
ptxas info    : Function properties for k
    16 bytes stack frame, 64 bytes spill stores, 44 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers, 16 bytes cumulative stack size
"""


def test_usage_is_read_or_refused() -> None:
    assert header_compile.parse_usage(USAGE) == {
        "registers": 168,
        "spill_store_bytes": 64,
        "spill_load_bytes": 44,
        "stack_bytes": 16,
    }
    for log in ("", USAGE + USAGE):
        with pytest.raises(BuildError, match="one function"):
            header_compile.parse_usage(log)


CODE: dict[str, Any] = {
    "mma": ["QMMA.SF.16832.F32.E4M3.E5M2.E8"],
    "main_loops": 1,
    "local_in_main_loop": 0,
    "local_in_mma_loops": 0,
    "spill_store_bytes": 64,
}
MIXED = Entry("x", "cooperative", (128, 64, 128), b="e5m2")


@pytest.mark.parametrize("level", header_compile.LEVELS)
def test_right_code_passes(level: str) -> None:
    assert header_compile.code_problems(MIXED, "sm_120a", level, CODE) == []
    plain = dataclasses.replace(MIXED, mma="plain")
    code = {**CODE, "mma": ["QMMA.16832.F32.E4M3.E5M2"]}
    assert header_compile.code_problems(plain, "sm_121a", level, code) == []
    code = {**CODE, "mma": ["HMMA.16816.F32"]}
    assert header_compile.code_problems(MIXED, "sm_90a", level, code) == []


@pytest.mark.parametrize(
    ("level", "change", "expected"),
    [
        ("O3", {"mma": ["QMMA.16832.F32.E4M3.E5M2"]}, "the MMA is"),
        ("O3", {"mma": ["QMMA.SF.16832.F32.E5M2.E4M3.E8"]}, "the MMA is"),
        ("O3", {"mma": []}, "the MMA is"),
        ("O3", {"main_loops": 0}, "no loop holds an MMA"),
        ("O3", {"local_in_main_loop": 1, "local_in_mma_loops": 1}, "in the main loop"),
        ("O2", {"local_in_mma_loops": 1}, "in loops with an MMA"),
        (
            "O3",
            {"local_in_mma_loops": 1, "spill_store_bytes": 132},
            "in loops with an MMA, 132 bytes spilled",
        ),
    ],
)
def test_wrong_code_is_caught(level: str, change: dict[str, Any], expected: str) -> None:
    problems = header_compile.code_problems(MIXED, "sm_120a", level, {**CODE, **change})
    assert len(problems) == 1
    assert expected in problems[0]


def test_a_spill_per_tile_is_let_through_only_where_the_table_says_so() -> None:
    flagged = dataclasses.replace(MIXED, tile_loop_spill=True)
    spills = {**CODE, "local_in_mma_loops": 1, "spill_store_bytes": 12}
    assert header_compile.code_problems(flagged, "sm_120a", "O2", spills) == []
    [problem] = header_compile.code_problems(flagged, "sm_120a", "O2", CODE)
    assert "nothing spills" in problem
    [problem] = header_compile.code_problems(flagged, "sm_120a", "O2", {**spills, "local_in_main_loop": 1})
    assert "in the main loop" in problem


def test_a_program_compiled_again_takes_its_place_in_the_last_record(tmp_path: Path) -> None:
    old = {"date": "2026-01-02", "instantiations": {"one": {"problems": ["bad"]}, "two": {"problems": []}}}
    header_report.write_result(old, tmp_path)
    outcome = header_compile.Outcome("one", [], {"stages": 3}, 4.0)
    result = header_report.updated([outcome], commit="abc", folder=tmp_path)
    assert result["instantiations"]["one"] == {
        "stages": 3,
        "seconds": 4.0,
        "problems": [],
        "compiled_again": "abc",
    }
    assert result["instantiations"]["two"] == {"problems": []}
    with pytest.raises(BuildError, match="has no three"):
        header_report.updated([dataclasses.replace(outcome, key="three")], commit="abc", folder=tmp_path)


def test_spills_of_the_shell_are_let_pass_at_o3() -> None:
    for change in ({"local_in_mma_loops": 7, "spill_store_bytes": 128}, {"spill_store_bytes": 132}):
        assert header_compile.code_problems(MIXED, "sm_120a", "O3", {**CODE, **change}) == []


# Which compiles a run does


def test_order_is_a_permutation_with_every_kind_in_front(units: list[Unit]) -> None:
    for seed in range(20):
        ordered = header_select.rotated(units, seed)
        assert Counter(ordered) == Counter(units)
        kinds = {unit.kind for unit in units}
        assert {unit.kind for unit in ordered[: len(kinds)]} == kinds
        assert ordered == header_select.rotated(list(reversed(units)), seed)


def test_runs_that_are_cut_short_cover_the_table(units: list[Unit]) -> None:
    main = [unit for unit in units if unit.kind == ""]
    a_third = len(main) // 3
    for start in (0, 739_000):
        seen: set[str] = set()
        for seed in range(start, start + 8):
            seen |= {unit.key for unit in header_select.rotated(main, seed)[:a_third]}
        assert seen == {unit.key for unit in main}


def test_sample_rotates_and_is_the_same_for_a_seed(units: list[Unit]) -> None:
    _, first = header_select.choose(units, [], 4, 7)
    _, again = header_select.choose(units, [], 4, 7)
    _, next_day = header_select.choose(units, [], 4, 8)
    assert first == again
    assert first != next_day
    kinds = Counter(unit.kind for unit in first)
    assert kinds[""] == 4
    assert {count for kind, count in kinds.items() if kind} == {1}


def test_what_changed_is_not_sampled_again(units: list[Unit]) -> None:
    changed = units[:40]
    chosen, sample = header_select.choose(units, changed, 1000, 3)
    assert Counter(chosen) == Counter(changed)
    assert not {unit.key for unit in sample} & {unit.key for unit in changed}
    assert header_select.choose(units, units, 4, 3)[1] == []
    assert header_select.choose(units, changed, 0, 3)[1] == []


def test_unknown_revision_changes_everything(
    monkeypatch: pytest.MonkeyPatch, matrix: Matrix, units: list[Unit]
) -> None:
    monkeypatch.setattr(header_select, "_git", lambda root, *arguments: None)
    assert header_select.changed_units(units, matrix, "none")[0] == units


def _at_revision(monkeypatch: pytest.MonkeyPatch, files: set[str], table: str) -> None:
    monkeypatch.setattr(header_select, "changed_files", lambda revision, root: files)
    monkeypatch.setattr(header_select, "_git", lambda root, *arguments: table)


@pytest.mark.parametrize(
    "name",
    ["cuda/include/sm12x/arch/mma.hpp", "tests/cuda/grouped_program.hpp", "requirements/toolchain.txt"],
)
def test_header_or_tool_changes_everything(
    monkeypatch: pytest.MonkeyPatch, matrix: Matrix, units: list[Unit], name: str
) -> None:
    _at_revision(monkeypatch, {name}, (ROOT / "tests/cuda/matrix.toml").read_text())
    changed, why = header_select.changed_units(units, matrix, "rev")
    assert changed == units
    assert name in why


def test_changed_line_and_changed_source_alone(
    monkeypatch: pytest.MonkeyPatch, matrix: Matrix, units: list[Unit]
) -> None:
    text = (ROOT / "tests/cuda/matrix.toml").read_text()
    _at_revision(monkeypatch, {"README.md", "cuda/kernels/variants.toml"}, text)
    assert header_select.changed_units(units, matrix, "rev")[0] == []
    entry = next(iter(matrix.entries.values()))
    line = next(line for line in text.splitlines() if f'"{entry.name}"' in line)
    _at_revision(monkeypatch, set(), text.replace(line + "\n", ""))
    changed, _ = header_select.changed_units(units, matrix, "rev")
    assert {unit.program.name for unit in changed} == {entry.name}
    source = next(iter(matrix.sources.values()))
    _at_revision(monkeypatch, {f"tests/cuda/{source.file}"}, text)
    changed, _ = header_select.changed_units(units, matrix, "rev")
    assert {unit.program.name for unit in changed} == {source.name}


def test_changed_files_holds_new_ones(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "old").write_text("1\n")
    (tmp_path / "same").write_text("1\n")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    (tmp_path / "old").write_text("2\n")
    (tmp_path / "new").write_text("1\n")
    assert header_select.changed_files("HEAD", tmp_path) == {"old", "new"}
    assert header_select.changed_files("0123456", tmp_path) is None


# The record


def _result(problems: list[str]) -> dict[str, Any]:
    level = {"registers": 168, "spill_store_bytes": 200, "local_in_main_loop": 0, "local_in_mma_loops": 3}
    facts = {"stages": 2, "shared_memory": 90000, "O3": level, "O2": {**level, "spill_store_bytes": 0}}
    outcomes = [Outcome("good", [], facts, 20.0), Outcome("other@sm_90a", problems, facts, 21.0)]
    negatives = [Outcome("refused", [], {}, 5.0)]
    return header_report.result_of(
        outcomes, negatives, date="2001-02-03", commit="c", tools={"nvcc": "13"}, seconds=46.4
    )


def test_record_holds_every_instantiation(tmp_path: Path) -> None:
    result = _result(["other: broken"])
    path = header_report.write_result(result, tmp_path)
    assert path.name == "2001-02-03_matrix.json"
    assert result["instantiations"]["good"]["O3"]["registers"] == 168
    assert result["instantiations"]["other@sm_90a"]["problems"] == ["other: broken"]
    text = header_report.summary(result)
    assert "1 of 2 compile" in text
    assert "Failed: `other@sm_90a`." in text
    assert "beyond 128 bytes at -O3: `good`, `other@sm_90a`" in text
    assert "Failed: none." in header_report.summary(_result([]))


def test_summary_replaces_what_stands_between_its_markers() -> None:
    begin, end = header_report.markers("x")
    text = f"before\n{begin}\nold \\1\n{end}\nafter\n"
    assert header_report.replace_marked(text, "x", "new \\1\n") == f"before\n{begin}\nnew \\1\n{end}\nafter\n"
    for wrong in ("", begin, text + text):
        with pytest.raises(BuildError, match="markers"):
            header_report.replace_marked(wrong, "x", "new\n")


def test_readme_has_the_markers() -> None:
    text = (ROOT / "tests/cuda/README.md").read_text()
    assert header_report.replace_marked(text, "matrix", "new\n") != ""


# CUTLASS's header sets


def _cutlass(folder: Path, minor: int) -> Path:
    path = folder / "cutlass" / "version.h"
    path.parent.mkdir(parents=True)
    path.write_text(f"#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR {minor}\n#define CUTLASS_PATCH 0\n")
    return folder


def test_stand_in_says_4_6_and_leaves_the_rest(tmp_path: Path) -> None:
    own = _cutlass(tmp_path / "own", 2)
    assert cutlass_headers.version_of(own) == "4.2"
    stand_in = cutlass_headers.stand_in_46(own, tmp_path / "made")
    assert cutlass_headers.version_of(stand_in) == "4.6"
    assert cutlass_headers.version_of(own) == "4.2"


@pytest.mark.parametrize(("minor", "good"), [(5, True), (4, False)])
def test_only_the_headers_of_the_right_wheel_are_unpacked(tmp_path: Path, minor: int, good: bool) -> None:
    source = _cutlass(tmp_path / "source", minor)
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(source / "cutlass/version.h", "flashinfer/data/cutlass/include/cutlass/version.h")
        archive.writestr("flashinfer/other.py", "x")
    if good:
        cutlass_headers.unpack(wheel, tmp_path / "out")
        files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
        assert [path.name for path in files] == ["version.h"]
    else:
        with pytest.raises(BuildError, match="expected 4.5"):
            cutlass_headers.unpack(wheel, tmp_path / "out")


def test_pinned_wheel_has_a_hash() -> None:
    text = cutlass_headers.REQUIREMENT.read_text()
    assert re.search(r"^[a-z-]+==\S+ \\\n +--hash=sha256:[0-9a-f]{64}$", text, re.MULTILINE)


def test_every_cutlass_of_the_table_has_headers(units: list[Unit]) -> None:
    assert {unit.cutlass for unit in units} == set(CUTLASS_VERSIONS)
    assert any(isinstance(unit.program, Source) and unit.cutlass == "4.6" for unit in units)


# The run


def _work(count: int, done: list[str], seconds: float = 1.0) -> list[compile_tests.Work]:
    def one(name: str) -> Outcome:
        done.append(name)
        return Outcome(name, ["broken"] if name == "1" else [], {}, seconds)

    return [(str(number), lambda number=number: one(str(number))) for number in range(count)]


def test_all_work_is_done_without_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    done: list[str] = []
    outcomes, left = compile_tests.run_all(_work(5, done), 2, compile_tests.Budget(None), 1e9)
    assert [outcome.key for outcome in outcomes] == ["0", "1", "2", "3", "4"]
    assert left == []
    assert compile_tests.conclude("programs", outcomes, left) == 1
    printed = capsys.readouterr().out
    assert "1: FAILS (1 s)\nbroken\n" in printed
    assert "programs: 5 of 5 compiled, 1 failed" in printed


def test_what_the_budget_leaves_out_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    done: list[str] = []
    # The first takes its word for an hour, so that no other would end in time.
    outcomes, left = compile_tests.run_all(_work(4, done, 3600.0), 1, compile_tests.Budget(60.0), 30.0)
    assert [outcome.key for outcome in outcomes] == done == ["0"]
    assert left == ["1", "2", "3"]
    assert compile_tests.conclude("programs", outcomes, left) == 0
    assert "programs: 1 of 4 compiled, 0 failed\n  no time left for 3: 1, 2, 3" in capsys.readouterr().out
    assert compile_tests.run_all(_work(2, done), 2, compile_tests.Budget(10.0), 30.0) == ([], ["0", "1"])


def test_nothing_selected_and_unknown_names_are_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_tests.main([]) == 1
    assert "nothing is selected" in capsys.readouterr().err
    assert compile_tests.main(["--name", "no such name"]) == 1
    assert "no name matches" in capsys.readouterr().err


def test_names_are_listed_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_tests.main(["--list"]) == 0
    names = capsys.readouterr().out.split()
    assert len(names) == len(set(names)) > LEAST


class FakeToolchain:
    versions: ClassVar[dict[str, str]] = {"nvcc": "13"}


@pytest.fixture
def fake_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Every compile ends well at once; the keys of what was compiled."""
    done: list[str] = []

    def good(key: str) -> Outcome:
        done.append(key)
        return Outcome(key, [], {}, 0.0)

    monkeypatch.setattr(compile_tests, "find_toolchain", FakeToolchain)
    monkeypatch.setattr(compile_tests, "with_cutlass", lambda toolchain, version: toolchain)
    monkeypatch.setattr(compile_tests, "OUTPUT_DIR", tmp_path / "out")
    monkeypatch.setattr(compile_tests, "compile_unit", lambda unit, toolchain: good(unit.key))
    monkeypatch.setattr(compile_tests, "compile_negative", lambda case, toolchain: good(case.name))
    monkeypatch.setattr(
        compile_tests, "compile_control", lambda entry, toolchain: good("control_" + entry.name)
    )
    return done


def test_ci_compiles_what_must_be_refused_and_a_sample(
    fake_compiler: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compile_tests, "changed_units", lambda *arguments: ([], "nothing"))
    arguments = ["--changed-since", "rev", "--sample", "4", "--seed", "11", "--seconds", "600"]
    assert compile_tests.main(arguments) == 0
    cases = load_negatives(load_matrix())
    assert set(cases) | {"control_" + case.base for case in cases.values()} <= set(fake_compiler)
    kinds = len({unit.kind for unit in units_of(load_matrix())})
    printed = capsys.readouterr().out
    assert f"seed 11: 0 of {len(units_of(load_matrix()))} changed, a sample of {3 + kinds} of" in printed
    assert f"programs: {3 + kinds} of {3 + kinds} compiled, 0 failed" in printed


def test_full_run_is_recorded_and_one_cut_short_is_not(
    fake_compiler: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    begin, end = header_report.markers("matrix")
    readme = tmp_path / "README.md"
    readme.write_text(f"{begin}\n{end}\n")
    monkeypatch.setattr(
        compile_tests, "write_summary", lambda result: header_report.write_summary(result, readme)
    )
    monkeypatch.setattr(
        compile_tests, "write_result", lambda result: header_report.write_result(result, tmp_path)
    )
    assert compile_tests.main(["--all", "--seconds", "1"]) == 1
    assert "not recorded" in capsys.readouterr().out
    assert compile_tests.main(["--all"]) == 0
    (path,) = tmp_path.glob("*_matrix.json")
    result = json.loads(path.read_text())
    assert set(result["instantiations"]) == {unit.key for unit in units_of(load_matrix())}
    assert set(load_negatives(load_matrix())) <= set(result["refused"])
    assert "Failed: none." in readme.read_text()


def test_budget_too_small_for_what_must_be_refused_is_a_failure(
    fake_compiler: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compile_tests.main(["--sample", "1", "--seconds", "1"]) == 1
    assert fake_compiler == []
    assert "no time left for" in capsys.readouterr().out


def test_one_program_that_ends_badly_fails_the_run(
    fake_compiler: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(iter(load_negatives(load_matrix())))
    assert compile_tests.main(["--name", case]) == 0
    monkeypatch.setattr(
        compile_tests, "compile_negative", lambda case, toolchain: Outcome(case.name, ["compiles"], {}, 0.0)
    )
    assert compile_tests.main(["--name", case]) == 1
