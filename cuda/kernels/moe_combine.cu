// Family moe_combine: the output of an expert layer, from the rows that its experts made of each token.
//
// A thread has 8 features of one token.

#include <cstdint>

#include <sm12x/abi_moe.h>
#include <sm12x/arch/grid.hpp>
#include <sm12x/epilogue/combine.hpp>

#ifndef SM12X_SYMBOL
#error "compile through cuda/tools/build.py: the variant table gives SM12X_SYMBOL and its kin"
#endif

// -------------------------------------------------------------------------------------------------
// Types
// -------------------------------------------------------------------------------------------------

namespace {

constexpr int kThreads = 128;

}  // namespace

// -------------------------------------------------------------------------------------------------
// Facts for the manifest (read from the PTX by cuda/tools)
// -------------------------------------------------------------------------------------------------

extern "C" {
extern __device__ const unsigned sm12x_variant_info[5];
__device__ const unsigned sm12x_variant_info[5] = {kThreads, 0u, 0u, 0u, 0u};
}

// -------------------------------------------------------------------------------------------------
// Body
// -------------------------------------------------------------------------------------------------

namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

// `first_rows`: of the token's first 32 routes, one a lane. Whole warps.
template <class Element>
__device__ void combine(sm12x_combine_params const& params, int token, int chunk, int first_rows) {
  bool const inside = chunk * 8 < params.n;
  auto const* const route_row =
      reinterpret_cast<int32_t const*>(params.route_row) + int64_t(token) * params.top_k;
  auto* const out =
      reinterpret_cast<Element*>(params.out) + int64_t(token) * params.stride_out + chunk * 8;
  uint4 const sum = sm12x::epilogue::combined_chunk(
      reinterpret_cast<Element const*>(params.rows) + chunk * 8, params.stride_rows, params.top_k,
      [&](int route) {
        int const row = route < 32 ? __shfl_sync(kAllLanes, first_rows, route) : route_row[route];
        return inside ? row : -1;
      });
  if (inside) {
    *reinterpret_cast<uint4*>(out) = sum;
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads)
    SM12X_SYMBOL(__grid_constant__ sm12x_combine_params const params) {
  // Sorting the routes has ended long ago.
  int const lane = threadIdx.x % 32;
  int const first_rows = lane < params.top_k
                             ? __ldcg(reinterpret_cast<int32_t const*>(params.route_row) +
                                      int64_t(blockIdx.x) * params.top_k + lane)
                             : -1;
#if SM12X_PDL
  sm12x::arch::wait_on_prerequisite_grids();
  sm12x::arch::launch_dependent_grids();
#endif
  int const chunk = blockIdx.y * kThreads + threadIdx.x;
  if (params.type == SM12X_OUT_BFLOAT16) {
    combine<__nv_bfloat16>(params, blockIdx.x, chunk, first_rows);
  } else {
    combine<__half>(params, blockIdx.x, chunk, first_rows);
  }
}
