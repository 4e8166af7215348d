"""Both wheels: what is in them, and that each imports with nothing but what it declares.

Builds wheels and installs them into fresh environments, so it needs the package index: run where
SM12X_REQUIRE_TOOLS=1, as in CI.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from sm12x_build import MAJORS, ROOT

pytestmark = pytest.mark.skipif(
    os.environ.get("SM12X_REQUIRE_TOOLS") != "1",
    reason="builds wheels and environments from the package index: set SM12X_REQUIRE_TOOLS=1",
)


def _run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """CUDA major -> wheel, each by the documented command."""
    folder = tmp_path_factory.mktemp("wheels")
    built = {}
    for major in MAJORS:
        out = folder / major
        done = _run([sys.executable, str(ROOT / "cuda/tools/wheel.py"), major, "--out", str(out)], ROOT)
        assert done.returncode == 0, done.stderr
        (built[major],) = out.glob("*.whl")
    return built


@pytest.mark.parametrize("major", MAJORS)
def test_wheel_is_pure_and_holds_only_its_cubins(
    wheels: dict[str, Path], manifest: dict[str, Any], major: str
) -> None:
    assert wheels[major].name == f"sm12x_{major}-0.1.0-py3-none-any.whl"
    names = zipfile.ZipFile(wheels[major]).namelist()
    expected = {
        f"sm12x/cubins/{record['cubins'][major]['path']}"
        for variant in manifest["variants"].values()
        for record in variant["targets"].values()
    }
    assert expected
    assert {name for name in names if name.endswith(".cubin")} == expected
    assert [name for name in names if "_cuda_major_" in name] == [f"sm12x/_cuda_major_{major[2:]}"]
    assert not [name for name in names if name.endswith((".so", ".dll", ".pyd", ".pyc")) or "_cache" in name]
    for needed in ("sm12x/cubins/manifest.json", "sm12x/py.typed", "sm12x/cli/verify.py"):
        assert needed in names
    assert {Path(name).name for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}


@pytest.fixture(scope="module")
def environments(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """CUDA major -> interpreter of a fresh environment with that wheel and its declared dependencies."""
    pythons = {}
    for major, wheel in wheels.items():
        folder = tmp_path_factory.mktemp(major)
        venv.create(folder, with_pip=True)
        pythons[major] = folder / "bin" / "python"
        done = _run([str(pythons[major]), "-m", "pip", "install", "--quiet", str(wheel)], folder)
        assert done.returncode == 0, done.stderr
    return pythons


@pytest.mark.parametrize("major", MAJORS)
def test_wheel_imports_and_verifies_alone(environments: dict[str, Path], tmp_path: Path, major: str) -> None:
    program = (
        "import sm12x, numpy, sm12x.manifest as m\n"
        "a = numpy.zeros((2, 16), numpy.uint8); b = numpy.zeros((1, 8, 16), numpy.uint8)\n"
        "out = sm12x.grouped_gemm(a, b, offsets=numpy.array([0, 2]), dtype='float8_e4m3fn')\n"
        "print(m.wheel_major(), out.shape)\n"
    )
    done = _run([str(environments[major]), "-c", program], tmp_path)
    assert done.stdout == f"{major} (2, 8)\n", done.stderr
    done = _run([str(environments[major]), "-m", "sm12x", "verify"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_both_wheels_at_once_say_what_to_do(
    wheels: dict[str, Path], environments: dict[str, Path], tmp_path: Path
) -> None:
    """Last in the file: it spoils the environment of cu13."""
    python = str(environments["cu13"])
    done = _run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheels["cu12"])], tmp_path)
    assert done.returncode == 0, done.stderr
    done = _run([python, "-c", "import sm12x"], tmp_path)
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert "pip uninstall -y sm12x-cu12 sm12x-cu13" in done.stderr
