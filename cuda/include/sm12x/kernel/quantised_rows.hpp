/// Rows of a GEMM, quantised on their way into shared memory: bfloat16 or float16 from global memory, divided
/// by the row's scale, e4m3 into the same swizzled layout that TMA would write.
///
/// For few rows a CTA reads them once for each of its tiles of weights, out of L2, and a kernel of its own for
/// them would take longer to start than that takes. The rows of several k-tiles are in flight: each takes a trip
/// to L2.
#pragma once

#include <cstdint>

#include <cute/arch/cluster_sm90.hpp>
#include <sm12x/arch/copy.hpp>
#include <sm12x/epilogue/quantise.hpp>
#include <sm12x/kernel/packed_scheduler.hpp>

namespace sm12x::kernel {

/// One warp's share of the rows of a tile. Tile: the WarpTile that will read them. Warps: that share the rows.
template <class Tile, int Tokens, int TileK, int Warps>
class QuantisedRows {
 public:
  // A lane makes 8 codes of 16 bytes at a time. Lanes lie along k first.
  static constexpr int kTileK = TileK;
  static constexpr int kLanes = TileK / 8;
  static constexpr int kRowsAtOnce = 32 / kLanes;
  static constexpr int kPasses = Tokens / kRowsAtOnce / Warps;
  static_assert(kPasses * kRowsAtOnce * Warps == Tokens);

  __device__ explicit QuantisedRows(int warp) : warp_(warp) {}

  /// The tile's row that this lane has in a pass. Rows of a pass lie together. Warps take them in turns, so that
  /// few rows keep all busy.
  __device__ int row_of(int pass) const {
    return first_row_of(pass) + int(threadIdx.x) % 32 / kLanes;
  }

  /// Fills the stages of one piece of work, with an arrival at each. from, scale_of(pass): of the lane's row in
  /// each pass, where there is one; scales are asked for when the first rows are on the way. k: elements of a
  /// row. to(state): shared address of a stage's tokens.
  template <class Element, class Ring, class State, class To, class ScaleOf>
  __device__ void load(Ring& ring, PackedWork const& work, State& state, To const& to,
                       Element const* const (&from)[kPasses], ScaleOf const& scale_of,
                       int k) const {
    int const lane = threadIdx.x % kLanes;
    auto const fetch = [&](int k_tile, uint4(&values)[kPasses]) {
      int const at = k_tile * TileK + lane * 8;
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        values[pass] = {};
        if (row_of(pass) < work.rows && at < k && k_tile < work.k_end) {
          values[pass] = __ldcg(reinterpret_cast<uint4 const*>(from[pass] + at));
        }
      }
    };
    uint4 values[kDepth][kPasses];
#pragma unroll
    for (int ahead = 0; ahead < kDepth; ++ahead) {
      fetch(work.k_begin + ahead, values[ahead]);
    }
    float scale[kPasses];
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      scale[pass] = scale_of(pass);
    }
#pragma unroll 1
    for (int first = work.k_begin; first < work.k_end; first += kDepth) {
#pragma unroll
      for (int i = 0; i < kDepth; ++i) {
        int const k_tile = first + i;
        if (k_tile >= work.k_end) {
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
        fetch(k_tile + kDepth, values[i]);
        fill(ring, state, to, codes);
      }
    }
  }

  /// Codes of a whole row of up to so many k-tiles, which a warp can hold for the next pieces of the same rows; of
  /// not too many rows, that is.
  static constexpr int kHeldTiles = 6;
  static constexpr bool kHolds = kPasses <= 4;
  using Held = uint2[kHeldTiles][kHolds ? kPasses : 1];

  /// Makes them, and the scales of the lane's rows from their largest magnitudes: a trip to L2 for two passes. NaN does
  /// not count. Where there is no row, zeros and 1.
  template <class Element>
  __device__ void hold(int rows, Element const* const (&from)[kPasses], int k, Held& held,
                       float (&scale)[kPasses]) const {
    hold_rows(rows, from, k, held, [&](int pass, uint4 const(&values)[kHeldTiles]) {
      typename epilogue::Pair<Element>::Type largest[4] = {};
#pragma unroll
      for (int tile = 0; tile < kHeldTiles; ++tile) {
        epilogue::raise<Element>(largest, values[tile]);
      }
      return scale[pass] = epilogue::scale_of_maximum(of_row<Element>(largest));
    });
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      if (first_row_of(pass) >= rows) {
        scale[pass] = 1.0f;
      }
    }
  }

  /// The same with scales that are known: scale_of(pass), asked for when the rows are on the way.
  template <class Element, class ScaleOf>
  __device__ void hold(int rows, Element const* const (&from)[kPasses], int k, Held& held,
                       ScaleOf const& scale_of) const {
    hold_rows(rows, from, k, held,
              [&](int pass, uint4 const(&)[kHeldTiles]) { return scale_of(pass); });
  }

  /// load() from what is held.
  template <class Ring, class State, class To>
  __device__ void load_held(Ring& ring, PackedWork const& work, State& state, To const& to,
                            Held const& held) const {
#pragma unroll
    for (int tile = 0; tile < kHeldTiles; ++tile) {
      if (tile < work.k_end) {
        fill(ring, state, to, held[tile]);
      }
    }
  }

  /// The scales of the lane's rows, made from their largest magnitudes: NaN does not count. 1 where there is no
  /// row.
  template <class Element>
  __device__ void scales(int rows, Element const* const (&from)[kPasses], int k,
                         float (&scale)[kPasses]) const {
    int const chunks = k / 8;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      scale[pass] = 1.0f;
      if (first_row_of(pass) < rows) {
        int const end = row_of(pass) < rows ? chunks : 0;
        typename epilogue::Pair<Element>::Type largest[4] = {};
#pragma unroll 1
        for (int first = threadIdx.x % kLanes; first < chunks; first += kLanes * kAtOnce) {
          uint4 values[kAtOnce];
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            values[i] = {};
            if (first + i * kLanes < end) {
              values[i] = __ldcg(reinterpret_cast<uint4 const*>(from[pass]) + first + i * kLanes);
            }
          }
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            epilogue::raise<Element>(largest, values[i]);
          }
        }
        scale[pass] = epilogue::scale_of_maximum(of_row<Element>(largest));
      }
    }
  }

 private:
  // find_scale(pass, values): of a row that is there, by all lanes. Two passes' rows are on the way together: more
  // would take more registers than producers have.
  template <class Element, class FindScale>
  __device__ void hold_rows(int rows, Element const* const (&from)[kPasses], int k, Held& held,
                            FindScale const& find_scale) const {
    constexpr int kTogether = kPasses < 2 ? kPasses : 2;
    static_assert(kHolds);
    int const lane = threadIdx.x % kLanes;
#pragma unroll
    for (int first = 0; first < kPasses; first += kTogether) {
      uint4 values[kTogether][kHeldTiles];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
#pragma unroll
        for (int tile = 0; tile < kHeldTiles; ++tile) {
          int const at = tile * TileK + lane * 8;
          values[i][tile] = {};
          if (row_of(first + i) < rows && at < k) {
            values[i][tile] = __ldcg(reinterpret_cast<uint4 const*>(from[first + i] + at));
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        int const pass = first + i;
        bool const there = first_row_of(pass) < rows;
        if (there) {
          epilogue::Quotient const quotient(find_scale(pass, values[i]));
#pragma unroll
          for (int tile = 0; tile < kHeldTiles; ++tile) {
            held[tile][pass] = epilogue::quantised_chunk<Element>(values[i][tile], quotient);
          }
        } else {
#pragma unroll
          for (int tile = 0; tile < kHeldTiles; ++tile) {
            held[tile][pass] = {};
          }
        }
      }
    }
  }

  // K-tiles whose rows are in flight: as many as the producers' registers hold.
  static constexpr int kDepth = kPasses <= 2 || Warps == 1 ? 4 : kPasses <= 4 ? 3 : 1;
  // Chunks of a row whose loads are in flight while its maximum is looked for.
  static constexpr int kAtOnce = 12;

  // Of all lanes that share the row.
  template <class Element>
  __device__ static float of_row(typename epilogue::Pair<Element>::Type const (&largest)[4]) {
    float maximum = epilogue::largest_of<Element>(largest);
#pragma unroll
    for (int apart = kLanes / 2; apart > 0; apart /= 2) {
      maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, apart));
    }
    return maximum;
  }

  // One stage.
  template <class Ring, class State, class To>
  __device__ void fill(Ring& ring, State& state, To const& to,
                       uint2 const (&codes)[kPasses]) const {
    int const lane = threadIdx.x % kLanes;
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

  __device__ int first_row_of(int pass) const { return (pass * Warps + warp_) * kRowsAtOnce; }

  int warp_;
};

}  // namespace sm12x::kernel
