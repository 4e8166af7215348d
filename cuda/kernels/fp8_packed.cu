// Family fp8_packed: grouped FP8 GEMM over stacked weights (E, N, K), in one launch: rows packed,
// masked, or gathered through a row index.
//
// One translation unit is one variant; cuda/kernels/variants.toml says which, through these macros:
//   SM12X_SYMBOL      name of the exported kernel
//   SM12X_TILE_M/N/K  tile on the kernel's own sides
//   SM12X_SWAP_AB     1: the kernel's M side carries weights, its N side tokens
//   SM12X_WARPS_M/N   how the warps of an MMA group divide the tile
//   SM12X_MMA_GROUPS  2: pingpong
//   SM12X_PDL         1: waits for prerequisite grids and lets dependent ones begin
//   SM12X_MMA         the MMA instruction's policy
//
// Roles and registers: sm12x/kernel/packed_gemm.hpp.

#include <sm12x/arch/mma.hpp>
#include <sm12x/kernel/packed_gemm.hpp>

#ifndef SM12X_SYMBOL
#error "compile through cuda/tools/build.py: the variant table gives SM12X_SYMBOL and its kin"
#endif

// -------------------------------------------------------------------------------------------------
// Compile-time checks and types
// -------------------------------------------------------------------------------------------------

namespace {

using Gemm = sm12x::kernel::PackedGemm<sm12x::kernel::PackedConfig<
    sm12x::kernel::Product, SM12X_MMA<cute::float_e4m3_t, cute::float_e4m3_t>, SM12X_TILE_M,
    SM12X_TILE_N, SM12X_TILE_K, SM12X_SWAP_AB, SM12X_WARPS_M, SM12X_WARPS_N, SM12X_MMA_GROUPS,
    SM12X_PDL>>;

}  // namespace

// -------------------------------------------------------------------------------------------------
// Facts for the manifest (read from the PTX by cuda/tools)
// -------------------------------------------------------------------------------------------------

extern "C" {
extern __device__ const unsigned sm12x_variant_info[17];
__device__ const unsigned sm12x_variant_info[17] = {
    Gemm::kThreads,
    Gemm::kSharedBytes,
    Gemm::kStages,
    0u,  // the CTAs lie along x
    Gemm::Split::kBytesPerCta,
    Gemm::kGroupWarps,
    Gemm::kWeightMaps,
    // clang-format off
    3u, Gemm::kTileK, Gemm::kTokens, Gemm::kTileK, 1u,    // a
    3u, Gemm::kTileK, Gemm::kBoxFeatures, Gemm::kTileK, 1u,  // b
    // clang-format on
};
}

// -------------------------------------------------------------------------------------------------
// Body
// -------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(Gemm::kThreads, 1)
    SM12X_SYMBOL(__grid_constant__ sm12x_packed_params const params) {
  extern __shared__ char shared_memory[];
  Gemm::body(params, {}, *reinterpret_cast<Gemm::SharedMemory*>(shared_memory));
}
