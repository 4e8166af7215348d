"""The GEMM variants of the family fp8_packed as a manifest would hold them, without their cubins."""

from __future__ import annotations

from sm12x.manifest import Target, Variant

E4M3 = "float8_e4m3fn"
ARCHES = ("sm_120a", "sm_121a", "sm_90a")
# (tile on the kernel's own sides, schedule, swap_ab, token_step, MMA warps that share a tile)
PACKED = [
    ((128, 8, 128), "pingpong", True, 0, 4),
    ((128, 16, 128), "pingpong", True, 0, 4),
    ((128, 32, 128), "pingpong", True, 0, 4),
    ((128, 64, 128), "pingpong", True, 16, 4),
    ((64, 8, 128), "pingpong", True, 0, 4),
    ((64, 16, 128), "pingpong", True, 0, 4),
    ((128, 8, 64), "pingpong", True, 0, 4),
    ((128, 16, 64), "pingpong", True, 0, 4),
    ((64, 128, 128), "pingpong", False, 0, 4),
    ((128, 128, 128), "cooperative", False, 0, 8),
]


def packed_variants(arches: tuple[str, ...] = ARCHES) -> list[Variant]:
    """One Variant for each entry of PACKED."""
    variants = []
    for tile, schedule, swap_ab, step, warps in PACKED:
        end = "swap" if swap_ab else {"cooperative": "coop", "pingpong": "pingpong"}[schedule]
        key = f"fp8_packed_{'x'.join(map(str, tile))}_{end}"
        variants.append(
            Variant(
                key=key,
                family="fp8_packed",
                role="gemm",
                params="sm12x_packed_params",
                symbol=f"sm12x_{key}",
                threads=320 if tile == (64, 8, 128) else 384,
                shared_memory=100352,
                targets={arch: Target({}, {}) for arch in arches},
                workspace_per_cta=2 * 4 * tile[0] * tile[1],
                tile=tile,
                schedule=schedule,
                swap_ab=swap_ab,
                a=E4M3,
                b=E4M3,
                outs=("bfloat16", "float16", "float32"),
                mma="unit_scale",
                pdl=True,
                stages=4,
                token_step=step,
                mma_warps=warps,
                weight_maps=(tile[0] // 8).bit_length() if swap_ab else 1,
            )
        )
    return variants
