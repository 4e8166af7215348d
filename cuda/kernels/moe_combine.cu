// Family moe_combine: the output of an expert layer, from the rows that its experts made of each token.
//
// A thread has 8 features of one token. It reads them of all the token's rows before it adds the first, and
// adds in the order of the routes.

#include <cstdint>

#include <sm12x/abi_moe.h>
#include <sm12x/arch/grid.hpp>
#include <sm12x/epilogue/quantise.hpp>

#ifndef SM12X_SYMBOL
#error "compile through cuda/tools/build.py: the variant table gives SM12X_SYMBOL and its kin"
#endif

// -------------------------------------------------------------------------------------------------
// Types
// -------------------------------------------------------------------------------------------------

namespace {

constexpr int kThreads = 128;
constexpr int kAtOnce = 8;  // rows whose loads are in flight together

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

template <class Element>
__device__ void combine(sm12x_combine_params const& params, int token, int chunk) {
  using Pair = sm12x::epilogue::Pair<Element>;
  auto const* const route_row =
      reinterpret_cast<int32_t const*>(params.route_row) + int64_t(token) * params.top_k;
  auto const* const rows = reinterpret_cast<Element const*>(params.rows) + chunk * 8;
  float2 sum[4] = {};
  for (int first = 0; first < params.top_k; first += kAtOnce) {
    int row[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      row[i] = first + i < params.top_k ? route_row[first + i] : -1;
    }
    uint4 values[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      values[i] = {};
      if (row[i] >= 0) {
        values[i] = *reinterpret_cast<uint4 const*>(rows + row[i] * params.stride_rows);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (row[i] >= 0) {
        uint32_t const words[4] = {values[i].x, values[i].y, values[i].z, values[i].w};
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          float2 const two = Pair::unpack(words[pair]);
          sum[pair].x += two.x;
          sum[pair].y += two.y;
        }
      }
    }
  }
  auto* const out =
      reinterpret_cast<Element*>(params.out) + int64_t(token) * params.stride_out + chunk * 8;
  *reinterpret_cast<uint4*>(out) = {Pair::pack(sum[0].x, sum[0].y), Pair::pack(sum[1].x, sum[1].y),
                                    Pair::pack(sum[2].x, sum[2].y), Pair::pack(sum[3].x, sum[3].y)};
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads)
    SM12X_SYMBOL(__grid_constant__ sm12x_combine_params const params) {
#if SM12X_PDL
  sm12x::arch::wait_on_prerequisite_grids();
  sm12x::arch::launch_dependent_grids();
#endif
  int const chunk = blockIdx.y * kThreads + threadIdx.x;
  if (chunk * 8 >= params.n) {
    return;
  }
  if (params.type == SM12X_OUT_BFLOAT16) {
    combine<__nv_bfloat16>(params, blockIdx.x, chunk);
  } else {
    combine<__half>(params, blockIdx.x, chunk);
  }
}
