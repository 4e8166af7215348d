// Family quantize_fp8: the largest magnitude of each CTA's share of the rows, for one scale of all.

#include <sm12x/arch/grid.hpp>
#include <sm12x/kernel/row_quantiser.hpp>

#ifndef SM12X_SYMBOL
#error "compile through cuda/tools/build.py: the variant table gives SM12X_SYMBOL and its kin"
#endif

// -------------------------------------------------------------------------------------------------
// Types
// -------------------------------------------------------------------------------------------------

namespace {

constexpr int kThreads = 256;

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

__device__ float largest(sm12x_maxima_params const& params) {
  int const chunks = params.k / 8;
  float maximum = 0.0f;
  for (int64_t number = blockIdx.x; number < params.rows; number += gridDim.x) {
    sm12x::kernel::Row const row(params.x, params.x_type, params.stride_x, number, nullptr);
    for (int chunk = threadIdx.x; chunk < chunks; chunk += kThreads) {
      float2 pairs[4];
      row.values(row.load(chunk), pairs);
      maximum = sm12x::kernel::raised(maximum, pairs);
    }
  }
  return maximum;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads)
    SM12X_SYMBOL(__grid_constant__ sm12x_maxima_params const params) {
  __shared__ float of_warps[kThreads / 32];
#if SM12X_PDL
  sm12x::arch::wait_on_prerequisite_grids();
  sm12x::arch::launch_dependent_grids();
#endif
  float const maximum = sm12x::kernel::largest_of_cta<kThreads>(largest(params), of_warps);
  if (threadIdx.x == 0) {
    reinterpret_cast<uint32_t*>(params.maxima)[blockIdx.x] = __float_as_uint(maximum);
  }
}
