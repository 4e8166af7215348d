/// The rows of GEMM2, quantised on their way into shared memory: bfloat16 or float16 from global memory,
/// divided by the row's scale, e4m3 into the same swizzled layout that TMA would write.
///
/// For few rows a CTA reads them once for each of its tiles of weights, out of L2, and a kernel of its own for
/// them would take longer to start than that takes. What is in flight for the next k-tile hides behind
/// waiting for room for this one.
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
  // A lane makes 16 codes of 32 bytes at a time. Lanes lie along k first.
  static constexpr int kChunks = TileK / 16;
  static constexpr int kRowsAtOnce = 32 / kChunks;
  static constexpr int kPasses = Tokens / kRowsAtOnce / Warps;
  static_assert(kPasses * kRowsAtOnce * Warps == Tokens);

  struct Values {
    uint4 first;
    uint4 second;
  };

  // Rows of a pass lie together, the passes of a warp behind each other.
  __device__ int row_of(int pass) const {
    return (warp_ * kPasses + pass) * kRowsAtOnce + int(threadIdx.x) % 32 / kChunks;
  }

  template <class Element, class Ring, class State, class To>
  __device__ void load_as(Ring& ring, PackedWork const& work, State& state, To const& to) const {
    int const chunk = threadIdx.x % 32 % kChunks;
    auto const* const maxima = reinterpret_cast<float const*>(down_.row_maxima) + work.row;
    auto const* const rows =
        reinterpret_cast<Element const*>(params_.a) + int64_t(work.row) * params_.stride_a;
    auto const fetch = [&](int k, int pass) {
      int const at = k * TileK + chunk * 16;
      int const row = row_of(pass);
      Values values = {};
      if (row < work.rows && at < params_.k && k < work.k_end) {
        auto const* const from = reinterpret_cast<uint4 const*>(rows + row * params_.stride_a + at);
        values = {__ldcg(from), __ldcg(from + 1)};
      }
      return values;
    };
    Values values[kPasses];
    float scale[kPasses];
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      values[pass] = fetch(work.k_begin, pass);
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
    for (int k = work.k_begin; k < work.k_end; ++k) {
      uint4 codes[kPasses];
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        epilogue::Quotient const quotient(scale[pass]);
        uint2 const low = epilogue::quantised_chunk<Element>(values[pass].first, quotient);
        uint2 const high = epilogue::quantised_chunk<Element>(values[pass].second, quotient);
        codes[pass] = {low.x, low.y, high.x, high.y};
        values[pass] = fetch(k + 1, pass);
      }
      ring.wait_empty(state);
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        arch::store_16_bytes(to(state) + Tile::swizzled(row_of(pass), chunk), codes[pass]);
      }
      __syncwarp();
      if (cute::elect_one_sync()) {
        ring.arrive_full(state);
      }
      ring.advance(state);
    }
  }

  sm12x_packed_params const& params_;
  sm12x_down_params const& down_;
  int warp_;
};

}  // namespace sm12x::kernel
