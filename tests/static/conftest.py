"""What the static tests read: the committed manifest, and the tools where they are installed.

CI sets SM12X_REQUIRE_TOOLS=1, so that a missing tool fails there instead of skipping.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Appended, not put in front: build.py and wheel.py there must not hide packages of those names.
sys.path.append(str(ROOT / "cuda" / "tools"))

from sm12x_build import BuildError, store  # noqa: E402
from sm12x_build.toolchain import Toolchain, find_toolchain  # noqa: E402


def _absent(reason: str) -> None:
    if os.environ.get("SM12X_REQUIRE_TOOLS") == "1":
        pytest.fail(f"{reason} (SM12X_REQUIRE_TOOLS=1)")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def manifest() -> dict[str, Any]:
    """The committed manifest."""
    found = store.read_manifest()
    assert found is not None, "cubins/manifest.json is missing"
    return found


@pytest.fixture(scope="session")
def toolchain() -> Toolchain:
    """The pinned toolchain, or a skip that says where it was looked for."""
    try:
        return find_toolchain()
    except BuildError as error:
        _absent(str(error))
        raise


@pytest.fixture(scope="session")
def nvdisasm() -> Path:
    """nvdisasm: the one of the extra [test], else the toolchain's."""
    own = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin", "nvdisasm")
    if own.is_file():
        return own
    try:
        return find_toolchain().nvdisasm
    except BuildError as error:
        _absent(f"no nvdisasm: {error}")
        raise
