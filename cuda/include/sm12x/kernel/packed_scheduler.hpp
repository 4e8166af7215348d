/// Which tiles a CTA of a packed kernel computes: every role asks for itself.
///
/// Input: bounds on the device (offsets of packed rows, or counts of masked ones), never trusted.
/// Order of tiles: groups as they come; within a group the tiles of tokens vary fastest, so that a
/// tile of weights is used again while it is in L2. Empty groups have none. Tile indices are 64-bit,
/// those inside one group 32-bit.
/// Convergence: all lanes of a warp call everything here together and get the same answers. No shared
/// memory, no barrier: a warp reads the bounds of 128 groups at once, four to a lane.
#pragma once

#include <cstdint>

#include <sm12x/abi.h>

namespace sm12x::kernel {

/// A tile of D.
struct PackedTile {
  int group;
  int row;      ///< first row: of d where rows are packed, of the group where they are masked
  int rows;     ///< that are the group's, at most the tile's
  int feature;  ///< first output feature
};

/// The row of a that row `row` of the call takes, where there is a row_index; -1: outside of a.
__device__ inline int64_t indexed_row(sm12x_packed_params const& params, int64_t row) {
  int64_t const index = params.row_index_is_64_bit
                            ? reinterpret_cast<int64_t const*>(params.row_index)[row]
                            : reinterpret_cast<int32_t const*>(params.row_index)[row];
  return index >= 0 && index < params.a_rows ? index : -1;
}

template <int TileTokens, int TileFeatures>
class GroupWalker {
 public:
  __device__ explicit GroupWalker(sm12x_packed_params const& params)
      : params_(params),
        lane_(threadIdx.x % 32),
        feature_tiles_((uint32_t(params.n) + TileFeatures - 1) / TileFeatures),
        limit_(params.rows < 0x7fffffff ? int(params.rows) : 0x7fffffff) {
    restart();
  }

  /// Tiles of all groups.
  __device__ uint64_t total() {
    uint64_t tiles = window_end();
    if (params_.num_groups > kWindow) {
      while (next_window()) {
        tiles = window_end();
      }
      restart();
    }
    return tiles;
  }

  /// The tile of an index that is not less than the last one asked for. False where there is none.
  __device__ bool find(uint64_t index, PackedTile& tile) {
    while (index >= window_end()) {
      if (!next_window()) {
        return false;
      }
    }
    uint32_t const behind = __ballot_sync(kAllLanes, index < window_start_ + tiles_up_to_);
    int const lane = __ffs(behind) - 1;
    uint64_t const before = __shfl_sync(kAllLanes, tiles_up_to_ - tiles_, lane);
    uint32_t rest = uint32_t(index - window_start_ - before);
    int first = __shfl_sync(kAllLanes, first_row_, lane);
    int group = window_ + lane * kPerLane;
    int rows = __shfl_sync(kAllLanes, rows_[0], lane);
#pragma unroll
    for (int i = 1; i < kPerLane; ++i) {
      int const next = __shfl_sync(kAllLanes, rows_[i], lane);
      uint32_t const tiles = tiles_of(rows);
      if (group == window_ + lane * kPerLane + i - 1 && rest >= tiles) {
        rest -= tiles;
        first += is_packed() ? rows : 0;
        rows = next;
        ++group;
      }
    }
    uint32_t const token_tiles = token_tiles_of(rows);
    uint32_t feature_tile = rest;
    uint32_t token_tile = 0;
    if (token_tiles > 1) {
      feature_tile = rest / token_tiles;
      token_tile = rest % token_tiles;
    }
    int const row = int(token_tile) * TileTokens;
    tile.group = group;
    tile.row = first + row;
    tile.rows = rows - row < TileTokens ? rows - row : TileTokens;
    tile.feature = int(feature_tile) * TileFeatures;
    return true;
  }

 private:
  static constexpr uint32_t kAllLanes = 0xffffffffu;
  static constexpr int kPerLane = 4;
  static constexpr int kWindow = 32 * kPerLane;

  __device__ bool is_packed() const { return params_.row_layout == SM12X_ROWS_PACKED; }

  __device__ static uint32_t token_tiles_of(int rows) {
    return (uint32_t(rows) + TileTokens - 1) / TileTokens;
  }
  __device__ uint32_t tiles_of(int rows) const { return token_tiles_of(rows) * feature_tiles_; }

  // Index after the last tile of the window.
  __device__ uint64_t window_end() const {
    return window_start_ + __shfl_sync(kAllLanes, tiles_up_to_, 31);
  }

  __device__ int load_bound(int index) const {
    if (params_.bounds_are_64_bit) {
      int64_t const value = reinterpret_cast<int64_t const*>(params_.bounds)[index];
      return value < 0 ? 0 : (value > limit_ ? limit_ : int(value));
    }
    int32_t const value = reinterpret_cast<int32_t const*>(params_.bounds)[index];
    return value < 0 ? 0 : (value > limit_ ? limit_ : value);
  }

  __device__ void restart() {
    window_ = 0;
    window_start_ = 0;
    carried_ = is_packed() ? load_bound(0) : 0;
    load_window();
  }

  __device__ bool next_window() {
    if (window_ + kWindow >= params_.num_groups) {
      return false;
    }
    window_start_ = window_end();
    window_ += kWindow;
    load_window();
    return true;
  }

  // Reads the rows of this lane's groups and counts the tiles up to them.
  __device__ void load_window() {
    int const group = window_ + lane_ * kPerLane;
    bool const packed = is_packed();
    int bounds[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      bounds[i] = group + i < params_.num_groups ? load_bound(group + i + (packed ? 1 : 0)) : 0;
    }
    if (packed) {
      // Offsets that decrease count as their running maximum.
      int highest = bounds[0];
#pragma unroll
      for (int i = 1; i < kPerLane; ++i) {
        highest = max(highest, bounds[i]);
      }
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        int const before = __shfl_up_sync(kAllLanes, highest, distance);
        highest = lane_ >= distance ? max(highest, before) : highest;
      }
      int start = __shfl_up_sync(kAllLanes, highest, 1);
      start = max(lane_ == 0 ? 0 : start, carried_);
      carried_ = max(carried_, __shfl_sync(kAllLanes, highest, 31));
      first_row_ = start;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        int const end = max(start, bounds[i]);
        rows_[i] = end - start;
        start = end;
      }
    } else {
      first_row_ = 0;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        rows_[i] = bounds[i];
      }
    }
    tiles_ = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      tiles_ += tiles_of(rows_[i]);
    }
    tiles_up_to_ = tiles_;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      uint64_t const before = __shfl_up_sync(kAllLanes, tiles_up_to_, distance);
      tiles_up_to_ += lane_ >= distance ? before : 0;
    }
  }

  sm12x_packed_params const& params_;
  int lane_;
  uint32_t feature_tiles_;
  int limit_;              // rows that bounds may name
  int window_;             // first group of the window
  int carried_;            // end of the groups before the window
  int first_row_;          // of this lane's first group
  int rows_[kPerLane];     // of this lane's groups
  uint64_t window_start_;  // tiles before the window
  uint64_t tiles_;         // of this lane's groups
  uint64_t tiles_up_to_;   // of the window, up to and with this lane's groups
};

/// What a CTA does next: k-tiles [k_begin, k_end) of a tile.
struct PackedWork {
  PackedTile tile;
  int k_begin;
  int k_end;
  uint32_t first_unit;  ///< split-K: the tile's first unit (k-tile), counted over all tiles
};

/// The work of one CTA, in order.
///
/// Whole tiles: CTA c of G takes tiles c, c + G, c + 2G, ...
/// Split-K (stream-K): the k-tiles of all tiles in a row are units; C = min(G, units / least_units), at
/// least 1, CTAs take runs of them that differ by at most one unit. A tile that a run's end cuts is
/// finished by whoever comes last (split_k.hpp). The host sees to it that units * G < 2^32.
template <int TileTokens, int TileFeatures, int TileK>
class PackedSchedule {
 public:
  __device__ explicit PackedSchedule(sm12x_packed_params const& params)
      : walker_(params), k_tiles_((params.k + TileK - 1) / TileK), splits_(params.least_units > 0) {
    if (splits_) {
      units_ = uint32_t(walker_.total()) * k_tiles_;
      uint32_t const most = units_ / uint32_t(params.least_units);
      runs_ = most < 1 ? 1 : (most < gridDim.x ? most : gridDim.x);
      unit_ = blockIdx.x < runs_ ? run_start(blockIdx.x) : 0;
      end_ = blockIdx.x < runs_ ? run_start(blockIdx.x + 1) : 0;
    } else {
      index_ = blockIdx.x;
    }
  }

  /// False where the CTA has done its work.
  __device__ bool next(PackedWork& work) {
    if (!splits_) {
      work.k_begin = 0;
      work.k_end = k_tiles_;
      bool const found = walker_.find(index_, work.tile);
      index_ += gridDim.x;
      return found;
    }
    if (unit_ >= end_) {
      return false;
    }
    uint32_t const index = unit_ / k_tiles_;
    work.first_unit = index * k_tiles_;
    work.k_begin = int(unit_ - work.first_unit);
    uint32_t const rest = end_ - work.first_unit;
    work.k_end = rest < k_tiles_ ? int(rest) : int(k_tiles_);
    unit_ = work.first_unit + work.k_end;
    return walker_.find(index, work.tile);
  }

  /// Split-K: the CTA whose run holds a unit.
  __device__ uint32_t run_of(uint32_t unit) const { return ((unit + 1) * runs_ - 1) / units_; }

  __device__ uint32_t k_tiles() const { return k_tiles_; }

 private:
  __device__ uint32_t run_start(uint32_t run) const { return run * units_ / runs_; }

  GroupWalker<TileTokens, TileFeatures> walker_;
  uint32_t k_tiles_;
  bool splits_;
  uint32_t units_ = 0;
  uint32_t runs_ = 1;
  uint32_t unit_ = 0;
  uint32_t end_ = 0;
  uint64_t index_ = 0;
};

}  // namespace sm12x::kernel
