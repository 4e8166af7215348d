"""Which kernels of the manifest a device of one architecture can be asked to run."""

from __future__ import annotations

from ..manifest import Manifest, Variant, default


def gemm_variants(
    arch: str, family: str = "fp8_ptr_array", manifest: Manifest | None = None
) -> list[Variant]:
    """The GEMM variants of ``family`` built for ``arch`` ("sm_120a", ...), those with one token tile side by
    side.

    Raises CubinError where the manifest is missing or broken.
    """
    known = default() if manifest is None else manifest
    return sorted(
        (variant for variant in known.gemms(family) if arch in variant.targets),
        key=lambda variant: (variant.token_tile, variant.key),
    )
