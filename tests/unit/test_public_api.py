"""What `import sm12x` gives, and what it must not import."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
import textwrap

import pytest

import sm12x


def run(code):
    """Run `code` in a fresh interpreter that sees this one's paths."""
    path = [entry for entry in sys.path if entry]
    script = f"import sys\nsys.path[:] = {path!r}\n" + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=False)


def test_every_public_name_exists_and_is_documented():
    assert sm12x.__version__ == "0.1.0"
    assert set(sm12x.__all__) <= set(dir(sm12x))
    for name in sm12x.__all__:
        value = getattr(sm12x, name)
        assert name == "__version__" or inspect.getdoc(value), name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'sm12x' has no attribute 'grouped'"):
        _ = sm12x.grouped


def test_errors_are_what_callers_may_catch():
    assert issubclass(sm12x.DriverError, sm12x.CudaError)
    assert issubclass(sm12x.UnsupportedDeviceError, sm12x.CudaError)
    assert issubclass(sm12x.CudaError, RuntimeError)
    assert issubclass(sm12x.CubinError, RuntimeError)
    error = sm12x.CudaError("words", call="cuInit", name="X", code=3, text="t", variant="v", shapes="s")
    assert (error.call, error.name, error.code, error.text, error.variant, error.shapes) == (
        *("cuInit", "X", 3, "t"),
        *("v", "s"),
    )


def test_importing_imports_no_cuda_no_framework_and_no_numpy():
    done = run(
        """
        before = set(sys.modules)  # a .pth file of cuda-bindings 12 imports cuda into every process
        import sm12x
        heavy = {"cuda", "torch", "jax", "jaxlib", "cupy", "numpy", "ml_dtypes", "tvm_ffi"}
        print(sorted(heavy & {name.partition(".")[0] for name in set(sys.modules) - before}))
        """
    )
    assert done.stdout.strip() == "[]", done.stderr


CALLS = {
    "grouped_gemm": """
        a, b = np.zeros((4, 16), np.uint8), np.zeros((1, 8, 16), np.uint8)
        sm12x.grouped_gemm(a, b, offsets=np.array([0, 4], np.int32), dtype="float8_e4m3fn")
    """,
    "fused_moe": """
        x = np.ones((4, 16), np.float16)
        w1, w2 = np.zeros((1, 32, 16), np.uint8), np.zeros((1, 16, 16), np.uint8)
        ids, weights = np.zeros((4, 1), np.int32), np.ones((4, 1), np.float32)
        sm12x.fused_moe(x, w1, w2, weights, ids, dtype="float8_e4m3fn")
        sm12x.route(ids, 1)
        sm12x.quantize_fp8(x)
    """,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_on_numpy_arrays_imports_no_cuda_and_no_framework(name):
    before = """
        before = set(sys.modules)
        import numpy as np
        import sm12x
    """
    after = """
        heavy = {"cuda", "torch", "jax", "jaxlib", "cupy", "tvm_ffi"}
        print(sorted(heavy & {name.partition(".")[0] for name in set(sys.modules) - before}))
    """
    done = run("".join(textwrap.dedent(part) for part in (before, CALLS[name], after)))
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("name", ["emulator.use", "reference.grouped_gemm_float64"])
def test_subpackages_are_there_without_an_import_of_their_own(name):
    done = run(f"import sm12x\nprint(callable(sm12x.{name}))")
    assert done.stdout.strip() == "True", done.stderr


def test_both_wheels_installed_is_one_sentence_at_import(tmp_path):
    source = sm12x.__path__[0]
    package = tmp_path / "sm12x"
    package.mkdir()
    for name in ("__init__.py", "manifest.py", "errors.py"):
        shutil.copy(f"{source}/{name}", package / name)
    for major in (12, 13):
        (package / f"_cuda_major_{major}").touch()
    done = run(f"sys.path.insert(0, {str(tmp_path)!r})\nimport sm12x")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: sm12x-cu12 and sm12x-cu13 are both installed")
    assert "pip uninstall -y sm12x-cu12 sm12x-cu13" in last
