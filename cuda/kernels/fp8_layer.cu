// Family fp8_layer: a whole expert layer of few tokens in one launch.
//
// One translation unit is one variant; cuda/kernels/variants.toml says which, through these macros:
//   SM12X_SYMBOL      name of the exported kernel
//   SM12X_TILE_M/N/K  tile on the kernel's own sides: M features, N tokens
//   SM12X_SWAP_AB     1
//   SM12X_WARPS_M/N   how the warps of an MMA group divide the tile
//   SM12X_MMA_GROUPS  2: pingpong
//   SM12X_GATED       1: w1 has gates and ups
//   SM12X_PDL         1: waits for prerequisite grids and lets dependent ones begin
//   SM12X_MMA         the MMA instruction's policy
//
// Roles and registers: sm12x/kernel/layer_gemm.hpp.

#include <sm12x/arch/mma.hpp>
#include <sm12x/kernel/layer_gemm.hpp>

#ifndef SM12X_SYMBOL
#error "compile through cuda/tools/build.py: the variant table gives SM12X_SYMBOL and its kin"
#endif

// -------------------------------------------------------------------------------------------------
// Compile-time checks and types
// -------------------------------------------------------------------------------------------------

namespace {

static_assert(SM12X_SWAP_AB, "few tokens are on the N side");
using Layer = sm12x::kernel::LayerGemm<SM12X_MMA<cute::float_e4m3_t, cute::float_e4m3_t>,
                                       SM12X_GATED, SM12X_TILE_M, SM12X_TILE_N, SM12X_TILE_K,
                                       SM12X_WARPS_M, SM12X_WARPS_N, SM12X_MMA_GROUPS, SM12X_PDL>;

}  // namespace

// -------------------------------------------------------------------------------------------------
// Facts for the manifest (read from the PTX by cuda/tools)
// -------------------------------------------------------------------------------------------------

extern "C" {
extern __device__ const unsigned sm12x_variant_info[17];
__device__ const unsigned sm12x_variant_info[17] = {
    Layer::kThreads,
    Layer::kSharedBytes,
    Layer::kStages,
    0u,  // the CTAs lie along x
    0u,  // workspace of a CTA
    Layer::kGroupWarps,
    Layer::kWeightMaps,
    // clang-format off
    SM12X_GATED ? 5u : 3u, Layer::kTileK, Layer::kBoxFeatures, Layer::kTileK, 1u,  // w1
    3u, Layer::kTileK, Layer::kBoxFeatures, Layer::kTileK, 1u,  // w2
    // clang-format on
};
}

// -------------------------------------------------------------------------------------------------
// Body
// -------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(Layer::kThreads, 1)
    SM12X_SYMBOL(__grid_constant__ sm12x_layer_params const params) {
  extern __shared__ char shared_memory[];
  Layer::body(params, *reinterpret_cast<Layer::SharedMemory*>(shared_memory));
}
