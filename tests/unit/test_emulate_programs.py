"""The tool that runs CUTLASS programs on the emulator: its table, what it compiles, the device it shows."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "cuda" / "tools"))

import emulate_programs  # noqa: E402
from emulated.kernels import kernel  # noqa: E402
from sm12x.emulator.launch import load  # noqa: E402
from sm12x.emulator.memory import GlobalMemory  # noqa: E402
from sm12x_build import BuildError, emulated_build  # noqa: E402
from sm12x_build.emulated_program import INVALID_VALUE, LAUNCH_FAILURE, Emulation  # noqa: E402


def test_the_table_names_sources_that_are_there():
    programs = emulated_build.load_programs()
    assert {p.name for p in programs} >= {
        "dense_f8f6f4",
        "dense_mxf8f6f4",
        "dense_nvfp4_mxfp4",
        "grouped_scaled",
    }
    for program in programs:
        assert not program.file or (ROOT / program.file).is_file()
        assert not program.entry or "run_small<Kernel" in emulated_build.entry_text(program.entry)


@pytest.mark.parametrize(
    "text",
    ["", '[[program]]\nname = "a"', '[[program]]\nname = "a"\nfile = "x"\nentry = "y"',
     '[[program]]\nname = "a"\nfile = "x"\n[[program]]\nname = "a"\nfile = "z"',
     '[[program]]\nname = "a"\nfile = "x"\nargument = []'],
)  # fmt: skip
def test_a_wrong_table_is_refused(tmp_path, text):
    path = tmp_path / "programs.toml"
    path.write_text(text)
    with pytest.raises(BuildError, match=r"programs\.toml"):
        emulated_build.load_programs(path)


def test_one_word_of_the_builder_is_changed_and_only_where_it_stands_once(tmp_path):
    header = tmp_path / "cutlass" / emulated_build._BUILDER
    header.parent.mkdir(parents=True)
    header.write_text("a\nstatic constexpr auto SFVectorSize = x;\nb\n")
    made = emulated_build.signed_builder(tmp_path / "cutlass", tmp_path / "made")
    assert (made / emulated_build._BUILDER).read_text() == "a\nstatic constexpr int SFVectorSize = x;\nb\n"
    header.write_text("nothing of the kind")
    with pytest.raises(BuildError, match="not CUTLASS 4.2's"):
        emulated_build.signed_builder(tmp_path / "cutlass", tmp_path / "made")


def emulation(text):
    memory = GlobalMemory()
    return Emulation(load(text, memory), memory, seed=0)


def test_a_launch_takes_its_parameters_from_where_the_host_has_them():
    params = ".param .u32 a, .param .u64 out"
    body = (
        "ld.param.u32 %r1, [a];\nld.param.u64 %rd1, [out];\nmov.u32 %r2, %ctaid.x;\n"
        "mul.wide.u32 %rd2, %r2, 4;\n"
        "add.u64 %rd1, %rd1, %rd2;\nadd.u32 %r1, %r1, %r2;\nst.global.u32 [%rd1], %r1;"
    )
    device = emulation(kernel(body, params=params))
    out = device.allocate(12)
    values = [ctypes.c_uint32(40), ctypes.c_uint64(out)]
    arguments = (ctypes.c_void_p * 2)(*(ctypes.addressof(value) for value in values))
    sizes = (ctypes.c_uint32 * 7)(3, 1, 1, 1, 1, 1, 0)
    assert device.launch(b"test", sizes, arguments) == 0
    host = np.zeros(3, np.uint32)
    assert device.read(host.ctypes.data, out, 12) == 0
    assert host.tolist() == [40, 41, 42]
    assert [launched.grid for launched in device.launches] == [(3, 1, 1)]


def test_what_a_kernel_does_wrong_is_kept_and_told(capsys):
    device = emulation(kernel("trap;"))
    sizes = (ctypes.c_uint32 * 7)(1, 1, 1, 1, 1, 1, 0)
    assert device.launch(b"test", sizes, None) == LAUNCH_FAILURE
    assert "the kernel trapped" in str(device.error)
    assert "the kernel trapped" in capsys.readouterr().err


def test_memory_that_is_not_the_devices_is_refused():
    device = emulation(kernel("ret;"))
    host = np.zeros(1, np.uint32)
    assert device.release(12345) == INVALID_VALUE
    assert device.read(host.ctypes.data, 1 << 50, 4) == INVALID_VALUE
    assert device.write(1 << 50, host.ctypes.data, 4) == INVALID_VALUE
    assert device.fill(1 << 50, 0, 4) == INVALID_VALUE


def test_all_programs_run_where_the_emulator_changed_else_a_sample_that_rotates(monkeypatch):
    programs = [emulated_build.Program(name, file="x") for name in "abcdef"]

    def chosen(files, seed):
        monkeypatch.setattr(emulate_programs, "changed_files", lambda revision: files)
        words = ["--changed-since", "HEAD", "--sample", "2", "--seed", str(seed)]
        return [p.name for p in emulate_programs.select(emulate_programs.parse(words), programs)]

    for changed in (
        "runtime/sm12x/emulator/warp.py",
        "cuda/include/sm12x/abi.h",
        "tests/cuda/emulated/dense.cu",
    ):
        assert sorted(chosen({changed}, 0)) == list("abcdef")
    assert sorted(chosen(None, 0)) == list("abcdef")
    assert chosen({"README.md"}, 0) == ["a", "b"]
    assert chosen({"README.md"}, 1) == ["d", "e"]
