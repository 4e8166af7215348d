"""The GEMM variants that the manifest has for this machine's device (for the twin where there is no
device).
"""

from __future__ import annotations

import os

from forced import Forced, forced

from sm12x.manifest import Variant
from sm12x.validation.variants import gemm_variants


def _arch() -> str:
    try:
        import torch

        if torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            return f"sm_{major}{minor}a"
    except ImportError:
        pass
    # SM12X_BACKEND=emulator: kernels of an emulated RTX 5090.
    return "sm_120a" if os.environ.get("SM12X_BACKEND") == "emulator" else "sm_90a"


ARCH = _arch()
VARIANTS: list[Variant] = gemm_variants(ARCH)
FORCED: list[Forced] = forced(ARCH)


def key(variant: Variant) -> str:
    """Test id of a variant."""
    return variant.key


def name(each: Forced) -> str:
    """Test id of a forced variant."""
    return each.argument


__all__ = ["ARCH", "FORCED", "VARIANTS", "Forced", "Variant", "key", "name"]
