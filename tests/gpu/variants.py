"""The GEMM variants that the manifest has for this machine's device (for the twin where there is no
device).
"""

from __future__ import annotations

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
    return "sm_90a"


VARIANTS: list[Variant] = gemm_variants(_arch())
FORCED: list[Forced] = forced(_arch())


def key(variant: Variant) -> str:
    """Test id of a variant."""
    return variant.key


def name(each: Forced) -> str:
    """Test id of a forced variant."""
    return each.argument


__all__ = ["FORCED", "VARIANTS", "Forced", "Variant", "key", "name"]
