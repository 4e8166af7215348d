/// The rows of GEMM2, quantised on their way into shared memory: bfloat16 or float16 from global memory,
/// divided by the row's scale, e4m3 into the same swizzled layout that TMA would write.
///
/// For few rows a CTA reads them once for each of its tiles of weights, out of L2, and a kernel of its own for
/// them would take longer to start than that takes. The rows of several k-tiles are in flight: each takes a trip
/// to L2.
#pragma once

#include <cstdint>

#include <cute/arch/cluster_sm90.hpp>
#include <sm12x/abi_moe.h>
#include <sm12x/arch/copy.hpp>
#include <sm12x/epilogue/quantise.hpp>
#include <sm12x/kernel/packed_scheduler.hpp>

namespace sm12x::kernel {

/// Tile: the WarpTile that will read them. Warps: that share the rows.
template <class Tile, int Tokens, int TileK, int Warps>
class QuantisedRows {
 public:
  __device__ QuantisedRows(sm12x_packed_params const& params, sm12x_down_params const& down,
                           int warp)
      : params_(params), down_(down), warp_(warp) {}

  /// One warp's part of the stages of one piece of work, with an arrival at each. to(state): shared address of
  /// a stage's tokens.
  template <class Ring, class State, class To>
  __device__ void load(Ring& ring, PackedWork const& work, State& state, To const& to) const {
    if (down_.a_type == SM12X_OUT_BFLOAT16) {
      load_as<__nv_bfloat16>(ring, work, state, to);
    } else {
      load_as<__half>(ring, work, state, to);
    }
  }

 private:
  // A lane makes 8 codes of 16 bytes at a time. Lanes lie along k first.
  static constexpr int kLanes = TileK / 8;
  static constexpr int kRowsAtOnce = 32 / kLanes;
  static constexpr int kPasses = Tokens / kRowsAtOnce / Warps;
  static_assert(kPasses * kRowsAtOnce * Warps == Tokens);
  // K-tiles whose rows are in flight: as many as the producers' registers hold.
  static constexpr int kDepth = kPasses <= 2 || Warps == 1 ? 4 : kPasses <= 4 ? 3 : 1;

  // Rows of a pass lie together. Warps take them in turns, so that few rows keep all busy.
  __device__ int first_row_of(int pass) const { return (pass * Warps + warp_) * kRowsAtOnce; }
  __device__ int row_of(int pass) const {
    return first_row_of(pass) + int(threadIdx.x) % 32 / kLanes;
  }

  template <class Element, class Ring, class State, class To>
  __device__ void load_as(Ring& ring, PackedWork const& work, State& state, To const& to) const {
    int const lane = threadIdx.x % kLanes;
    auto const* const maxima = reinterpret_cast<float const*>(down_.row_maxima) + work.row;
    auto const* const rows =
        reinterpret_cast<Element const*>(params_.a) + int64_t(work.row) * params_.stride_a;
    auto const fetch = [&](int k, uint4(&values)[kPasses]) {
      int const at = k * TileK + lane * 8;
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        int const row = row_of(pass);
        values[pass] = {};
        if (row < work.rows && at < params_.k && k < work.k_end) {
          values[pass] = __ldcg(reinterpret_cast<uint4 const*>(rows + row * params_.stride_a + at));
        }
      }
    };
    uint4 values[kDepth][kPasses];
    float scale[kPasses];
#pragma unroll
    for (int ahead = 0; ahead < kDepth; ++ahead) {
      fetch(work.k_begin + ahead, values[ahead]);
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      scale[pass] = __ldcg(maxima + min(row_of(pass), work.rows - 1));
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      scale[pass] = epilogue::scale_of_maximum(scale[pass]);
    }
#pragma unroll 1
    for (int first = work.k_begin; first < work.k_end; first += kDepth) {
#pragma unroll
      for (int i = 0; i < kDepth; ++i) {
        int const k = first + i;
        if (k >= work.k_end) {
          break;
        }
        uint2 codes[kPasses];
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
          codes[pass] = {};
          if (first_row_of(pass) < work.rows) {  // most passes of most tiles have no row
            codes[pass] = epilogue::quantised_chunk<Element>(values[i][pass],
                                                             epilogue::Quotient(scale[pass]));
          }
        }
        fetch(k + kDepth, values[i]);
        ring.wait_empty(state);
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
          arch::store_8_bytes(to(state) + Tile::swizzled(row_of(pass), lane / 2) + lane % 2 * 8,
                              codes[pass]);
        }
        __syncwarp();
        if (cute::elect_one_sync()) {
          ring.arrive_full(state);
        }
        ring.advance(state);
      }
    }
  }

  sm12x_packed_params const& params_;
  sm12x_down_params const& down_;
  int warp_;
};

}  // namespace sm12x::kernel
