"""The semantics of sm12x in NumPy: float64 references and error bounds, CPU backends, quantisers.

Needs only NumPy and ml_dtypes.
"""

from sm12x.reference.backend import grouped_gemm_numpy
from sm12x.reference.gemm import check, check_list, grouped_gemm_float64, tolerance
from sm12x.reference.moe import fused_moe_float64, fused_moe_numpy, fused_moe_stages
from sm12x.reference.moe_checks import (
    check_combine,
    check_gemm1_stage,
    check_gemm2_stage,
    check_quantised,
    token_errors,
)
from sm12x.reference.problem import dequantise
from sm12x.reference.quantize import (
    quantize_fp8_numpy,
    quantize_per_channel,
    quantize_per_token,
    random_bfloat16,
    random_fp8,
    random_routing,
    route_top_k,
)
from sm12x.reference.rounding import round_to, to_e4m3, ulp
from sm12x.reference.route import route_numpy

__all__ = [
    "check",
    "check_combine",
    "check_gemm1_stage",
    "check_gemm2_stage",
    "check_list",
    "check_quantised",
    "dequantise",
    "fused_moe_float64",
    "fused_moe_numpy",
    "fused_moe_stages",
    "grouped_gemm_float64",
    "grouped_gemm_numpy",
    "quantize_fp8_numpy",
    "quantize_per_channel",
    "quantize_per_token",
    "random_bfloat16",
    "random_fp8",
    "random_routing",
    "round_to",
    "route_numpy",
    "route_top_k",
    "to_e4m3",
    "token_errors",
    "tolerance",
    "ulp",
]
