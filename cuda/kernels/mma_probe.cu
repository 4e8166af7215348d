// Family mma_probe: a register-only kernel that issues nothing but FP8 MMAs, for `sm12x validate`:
// the block-scaled instruction with unit scales against the plain one, bit for bit and in TFLOP/s.
//
//   SM12X_SYMBOL  name of the exported kernel
//   SM12X_MMA     sm12x::arch::UnitScaleMma or sm12x::arch::PlainMma

#include <sm12x/abi.h>
#include <sm12x/arch/mma.hpp>

// -------------------------------------------------------------------------------------------------
// Compile-time checks and types
// -------------------------------------------------------------------------------------------------

namespace {

using Mma = SM12X_MMA<cute::float_e4m3_t, cute::float_e4m3_t>;

constexpr int kThreads = 128;
constexpr int kChains = 8;  // independent accumulators: enough to hide the instruction's latency

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

// in: uint32[kThreads][6], a[4] and b[2] of every thread. out: float[ctas][kThreads][kChains][4].
extern "C" __global__ void __launch_bounds__(kThreads)
    SM12X_SYMBOL(__grid_constant__ sm12x_mma_probe_params const launch) {
  auto const* in = reinterpret_cast<uint32_t const*>(launch.in) + threadIdx.x * 6;
  uint32_t const a[4] = {in[0], in[1], in[2], in[3]};
  uint32_t const b[2] = {in[4], in[5]};
  float d[kChains][4] = {};

#pragma unroll 1
  for (int i = 0; i < launch.iterations; ++i) {
#pragma unroll
    for (int chain = 0; chain < kChains; ++chain) {
      float (&c)[4] = d[chain];
      Mma::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], c[2], c[3]);
    }
  }

  auto* out = reinterpret_cast<float*>(launch.out) +
              (int64_t(blockIdx.x) * kThreads + threadIdx.x) * (kChains * 4);
#pragma unroll
  for (int chain = 0; chain < kChains; ++chain) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[chain * 4 + i] = d[chain][i];
    }
  }
}
