// Family moe_route: sorts the routes of an expert layer by expert and quantises its tokens, in one launch
// for few routes and in two for many.

#include <sm12x/arch/grid.hpp>
#include <sm12x/kernel/router.hpp>
#include <sm12x/kernel/row_quantiser.hpp>

#ifndef SM12X_SYMBOL
#error "compile through cuda/tools/build.py: the variant table gives SM12X_SYMBOL and its kin"
#endif

// -------------------------------------------------------------------------------------------------
// Types
// -------------------------------------------------------------------------------------------------

namespace {

constexpr int kThreads = 512;
using Router = sm12x::kernel::Router<kThreads>;
using Quantiser = sm12x::kernel::RowQuantiser<kThreads>;

union SharedMemory {
  Router::SharedMemory router;
  Quantiser::SharedMemory quantiser;
};

}  // namespace

// -------------------------------------------------------------------------------------------------
// Facts for the manifest (read from the PTX by cuda/tools)
// -------------------------------------------------------------------------------------------------

extern "C" {
extern __device__ const unsigned sm12x_variant_info[5];
__device__ const unsigned sm12x_variant_info[5] = {
    kThreads,
    0u,  // dynamic shared memory
    0u,  // stages
    0u,  // the CTAs lie along x
    0u,  // workspace of a CTA
};
}

// -------------------------------------------------------------------------------------------------
// Body
// -------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(kThreads)
    SM12X_SYMBOL(__grid_constant__ sm12x_route_params const params) {
  __shared__ SharedMemory shared;
#if SM12X_PDL
  // GEMM1 then asks for the ids and loads weights while the grid in front still runs, and waits for this one with all else.
  if (params.early != 0) {
    sm12x::arch::launch_dependent_grids();
  }
  sm12x::arch::wait_on_prerequisite_grids();
  sm12x::arch::launch_dependent_grids();
#endif
  if (int(blockIdx.x) < params.route_ctas) {
    Router(params, shared.router).run();
  } else {
    Quantiser::quantise(params.tokens, int64_t(blockIdx.x) - params.route_ctas, shared.quantiser);
  }
}
