"""The semantics of sm12x in NumPy: float64 reference and error bound, CPU backend, FP8-Dynamic quantisers.

Needs only NumPy and ml_dtypes.
"""

from sm12x.reference.backend import grouped_gemm_numpy
from sm12x.reference.gemm import check, check_list, grouped_gemm_float64, tolerance
from sm12x.reference.problem import dequantise
from sm12x.reference.quantize import (
    quantize_per_channel,
    quantize_per_token,
    random_bfloat16,
    random_fp8,
    random_routing,
    route_top_k,
)
from sm12x.reference.rounding import round_to, ulp

__all__ = [
    "check",
    "check_list",
    "dequantise",
    "grouped_gemm_float64",
    "grouped_gemm_numpy",
    "quantize_per_channel",
    "quantize_per_token",
    "random_bfloat16",
    "random_fp8",
    "random_routing",
    "round_to",
    "route_top_k",
    "tolerance",
    "ulp",
]
