"""The special registers that the emulator knows (PTX ISA, "Special Registers"), and their types."""

from __future__ import annotations

_AXES = ("x", "y", "z")

SPECIAL_REGISTERS: dict[str, str] = {
    **{f"%{name}.{axis}": "u32" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in _AXES},
    **{
        f"%{name}.{axis}": "u32"
        for name in ("clusterid", "nclusterid", "cluster_ctaid", "cluster_nctaid")
        for axis in _AXES
    },
    **dict.fromkeys(
        (
            *("%laneid", "%warpid", "%nwarpid", "%smid", "%nsmid"),
            *("%lanemask_eq", "%lanemask_le", "%lanemask_lt", "%lanemask_ge", "%lanemask_gt"),
            *("%cluster_ctarank", "%cluster_nctarank", "%clock", "%clock_hi"),
            *("%dynamic_smem_size", "%total_smem_size", "%aggr_smem_size"),
            *("%globaltimer_lo", "%globaltimer_hi"),
        ),
        "u32",
    ),
    "%is_explicit_cluster": "pred",
    "%gridid": "u64",
    "%clock64": "u64",
    "%globaltimer": "u64",
}
