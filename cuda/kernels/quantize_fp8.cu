// Family quantize_fp8: rows to e4m3, a CTA a row.

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
using Quantiser = sm12x::kernel::RowQuantiser<kThreads>;

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

extern "C" __global__ void __launch_bounds__(kThreads, 4)
    SM12X_SYMBOL(__grid_constant__ sm12x_quantize_params const params) {
  __shared__ Quantiser::SharedMemory shared;
#if SM12X_PDL
  sm12x::arch::wait_on_prerequisite_grids();
  sm12x::arch::launch_dependent_grids();
#endif
  Quantiser::quantise(params, blockIdx.x, shared);
}
