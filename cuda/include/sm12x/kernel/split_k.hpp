/// Split-K: the parts of a tile that several CTAs computed, added in the order of k by whoever of them
/// comes last. Nobody waits, so no CTA depends on another being resident.
///
/// Every MMA warp does this for its own part of the tile: a warp with a part first looks at the tile's
/// counter. If all others have arrived it adds their parts to its own and finishes the tile; else it
/// writes its part, arrives, and is done unless that made it the last. Whoever finishes sets the counter
/// back to zero, for the next launch. The sum does not depend on who that is: parts are added in the
/// order of k.
#pragma once

#include <cstdint>

#include <sm12x/abi_packed.h>
#include <sm12x/arch/grid.hpp>

namespace sm12x::kernel {

/// Values: accumulators of one lane, a multiple of four. Warps: MMA warps that share a tile.
template <int Values, int Warps>
class SplitK {
 public:
  static_assert(Values % 4 == 0);
  /// A CTA's run begins inside a tile and ends inside another: two parts at most.
  static constexpr int kPartsPerCta = 2;
  static constexpr int kBytesPerCta = kPartsPerCta * Warps * 32 * Values * int(sizeof(float));

  __device__ SplitK(sm12x_packed_params const& params, int warp)
      : partials_(reinterpret_cast<float4*>(params.partials)),
        counters_(reinterpret_cast<uint32_t*>(params.counters)),
        warp_(warp) {}

  /// Hands in the part of CTA `own` of a tile that CTAs `first` to `last` share. True where this warp has
  /// to finish the tile: `values` is then the sum of all parts.
  __device__ bool finishes(uint32_t first, uint32_t last, uint32_t own,
                           float (&values)[Values]) const {
    int const lane = threadIdx.x % 32;
    uint32_t* const counter = counters_ + first * Warps + warp_;
    uint32_t const others = last - first;
    uint32_t arrived = 0;
    if (lane == 0) {
      arrived = arch::load_acquire(counter);
    }
    bool is_last = __shfl_sync(0xffffffffu, arrived, 0) == others;
    if (!is_last) {
      float4* const to = part(own, first);
#pragma unroll
      for (int i = 0; i < Values / 4; ++i) {
        to[i * 32 + lane] = {values[4 * i], values[4 * i + 1], values[4 * i + 2],
                             values[4 * i + 3]};
      }
      __syncwarp();
      if (lane == 0) {
        arrived = arch::add_acquire_release(counter, 1);
      }
      is_last = __shfl_sync(0xffffffffu, arrived, 0) == others;
    }
    if (!is_last) {
      return false;
    }
    __syncwarp();
    if (lane == 0) {
      *counter = 0;
    }
    float sum[Values];
#pragma unroll
    for (int i = 0; i < Values; ++i) {
      sum[i] = 0.0f;
    }
    for (uint32_t cta = first; cta <= last; ++cta) {
      float4 const* const from = part(cta, first);
#pragma unroll
      for (int i = 0; i < Values / 4; ++i) {
        float4 const four = cta == own ? float4{values[4 * i], values[4 * i + 1], values[4 * i + 2],
                                                values[4 * i + 3]}
                                       : __ldcg(from + i * 32 + lane);
        sum[4 * i] += four.x;
        sum[4 * i + 1] += four.y;
        sum[4 * i + 2] += four.z;
        sum[4 * i + 3] += four.w;
      }
    }
#pragma unroll
    for (int i = 0; i < Values; ++i) {
      values[i] = sum[i];
    }
    return true;
  }

 private:
  // The first CTA of a tile holds it at the end of its run, all others at the start of theirs.
  __device__ float4* part(uint32_t cta, uint32_t first) const {
    uint32_t const which = cta == first ? 1 : 0;
    return partials_ + ((cta * kPartsPerCta + which) * Warps + warp_) * (32 * Values / 4);
  }

  float4* partials_;
  uint32_t* counters_;
  int warp_;
};

}  // namespace sm12x::kernel
