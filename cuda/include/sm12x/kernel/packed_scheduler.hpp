/// What a CTA of a packed kernel computes: every role asks for itself.
///
/// Input: bounds on the device (offsets of packed rows, or counts of masked ones), never trusted.
/// Empty groups have no work. Nothing here writes, waits or uses shared memory: a warp reads the bounds
/// of 128 groups at once, four to a lane, and all its lanes come to the same answers. They call
/// everything here together.
///
/// Three schedules. Groups follow each other as they come; T is a group's tiles of tokens.
///   turns    CTA c of G takes tiles c, c + G, c + 2G, ...; within a group the tiles of tokens vary
///            fastest, so that a tile of weights is used again while it is in L2.
///   runs     the features of all groups in a row, in strips of 16 weighted with T, are cut into equal
///            runs, one for each CTA, and a run into pieces of at most a tile. No CTA has more than a
///            strip's work more than another, whatever the number of tiles; a CTA takes all tiles of
///            tokens of a piece one after the other.
///   split-K  (stream-K) the k-tiles of all tiles in a row are cut into equal runs. A tile that the end of
///            a run cuts is finished by whoever comes last (split_k.hpp). For so few tiles that their
///            strips do not fill the device.
/// Turns count tiles in 64 bits; for the others the host sees to it that units * CTAs < 2^32.
#pragma once

#include <cstdint>

#include <sm12x/abi.h>

namespace sm12x::kernel {

/// The row of a that row `row` of the call takes, where there is a row_index; -1: outside of a.
__device__ inline int64_t indexed_row(sm12x_packed_params const& params, int64_t row) {
  int64_t const index = params.row_index_is_64_bit
                            ? reinterpret_cast<int64_t const*>(params.row_index)[row]
                            : reinterpret_cast<int32_t const*>(params.row_index)[row];
  return index >= 0 && index < params.a_rows ? index : -1;
}

/// A piece of work: k-tiles [k_begin, k_end) of a part of D.
struct PackedWork {
  int group;
  int row;          ///< first row: of d where rows are packed, of the group where masked
  int rows;         ///< of the group, at most a tile's
  int feature;      ///< first output feature
  int feature_end;  ///< features of the piece end here (N at the latest)
  int k_begin;
  int k_end;
  uint32_t first_unit;  ///< split-K: the tile's first unit (k-tile), counted over all tiles
};

/// Finds groups by a running count of their units: `feature_units` for each tile of tokens.
template <int TileTokens>
class GroupWalker {
 public:
  struct Group {
    int index;
    int first_row;
    int rows;
    uint32_t token_tiles;
    uint32_t offset;  ///< of the unit asked for, in the group
  };

  __device__ GroupWalker(sm12x_packed_params const& params, uint32_t feature_units)
      : params_(params),
        lane_(threadIdx.x % 32),
        feature_units_(feature_units),
        window_(-kWindow),
        units_(0),
        units_up_to_(0),
        window_start_(0) {}

  /// Units of all groups. Before the first find().
  __device__ uint64_t total() {
    while (next_window()) {
    }
    uint64_t const units = window_end();
    if (window_ > 0) {
      window_ = -kWindow;
      window_start_ = 0;
      units_up_to_ = 0;
    }
    return units;
  }

  /// The group of a unit that is not less than the last one asked for. False where there is none.
  __device__ bool find(uint64_t unit, Group& group) {
    while (unit >= window_end()) {
      if (!next_window()) {
        return false;
      }
    }
    uint32_t const behind = __ballot_sync(kAllLanes, unit < window_start_ + units_up_to_);
    int const lane = __ffs(behind) - 1;
    uint64_t const before = __shfl_sync(kAllLanes, units_up_to_ - units_, lane);
    int rows[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      rows[i] = __shfl_sync(kAllLanes, rows_[i], lane);
    }
    group.first_row = __shfl_sync(kAllLanes, first_row_, lane);
    group.offset = uint32_t(unit - window_start_ - before);
    int i = 0;
    group.rows = rows[0];
#pragma unroll
    for (int next = 1; next < kPerLane; ++next) {
      uint32_t const units = units_of(group.rows);
      if (i == next - 1 && group.offset >= units) {
        group.offset -= units;
        group.first_row += is_packed() ? group.rows : 0;
        group.rows = rows[next];
        i = next;
      }
    }
    group.index = window_ + lane * kPerLane + i;
    group.token_tiles = token_tiles_of(group.rows);
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
  __device__ uint32_t units_of(int rows) const { return token_tiles_of(rows) * feature_units_; }

  // The unit after the last one of the window.
  __device__ uint64_t window_end() const {
    return window_start_ + __shfl_sync(kAllLanes, units_up_to_, 31);
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

  // Reads the rows of this lane's groups and counts the units up to them.
  __device__ void load_window() {
    int const limit = params_.rows < 0x7fffffff ? int(params_.rows) : 0x7fffffff;
    int const group = window_ + lane_ * kPerLane;
    bool const packed = is_packed();
    // Offsets of rows begin one before the first group's end; past the last bound it counts again. All
    // loads go out before the first is looked at.
    int bounds[kPerLane + 1];
    int const last = params_.num_groups - (packed ? 0 : 1);
    if (params_.bounds_are_64_bit) {
      int64_t wide[kPerLane + 1];
#pragma unroll
      for (int i = 0; i <= kPerLane; ++i) {
        wide[i] = reinterpret_cast<int64_t const*>(params_.bounds)[min(group + i, last)];
      }
#pragma unroll
      for (int i = 0; i <= kPerLane; ++i) {
        bounds[i] = wide[i] < 0 ? 0 : (wide[i] > limit ? limit : int(wide[i]));
      }
    } else {
#pragma unroll
      for (int i = 0; i <= kPerLane; ++i) {
        bounds[i] = reinterpret_cast<int32_t const*>(params_.bounds)[min(group + i, last)];
      }
#pragma unroll
      for (int i = 0; i <= kPerLane; ++i) {
        bounds[i] = max(0, min(bounds[i], limit));
      }
    }
    if (packed) {
      bool sorted = window_ == 0 || bounds[0] >= carried_;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        sorted = sorted && bounds[i] <= bounds[i + 1];
      }
      if (!__all_sync(kAllLanes, sorted)) {
        raise_to_maximum(bounds);
      }
      carried_ = __shfl_sync(kAllLanes, bounds[kPerLane], 31);
      first_row_ = bounds[0];
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        rows_[i] = bounds[i + 1] - bounds[i];
      }
    } else {
      first_row_ = 0;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        rows_[i] = group + i <= last ? bounds[i] : 0;
      }
    }
    units_ = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      units_ += units_of(rows_[i]);
    }
    units_up_to_ = units_;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      uint64_t const before = __shfl_up_sync(kAllLanes, units_up_to_, distance);
      units_up_to_ += lane_ >= distance ? before : 0;
    }
  }

  // Offsets that decrease count as their running maximum.
  __device__ void raise_to_maximum(int (&bounds)[kPerLane + 1]) const {
    if (window_ > 0) {
      bounds[0] = max(bounds[0], carried_);
    }
#pragma unroll
    for (int i = 1; i <= kPerLane; ++i) {
      bounds[i] = max(bounds[i], bounds[i - 1]);
    }
    int highest = bounds[kPerLane];
#pragma unroll 1
    for (int distance = 1; distance < 32; distance *= 2) {
      int const before = __shfl_up_sync(kAllLanes, highest, distance);
      highest = lane_ >= distance ? max(highest, before) : highest;
    }
    highest = __shfl_up_sync(kAllLanes, highest, 1);
    if (lane_ > 0) {
#pragma unroll
      for (int i = 0; i <= kPerLane; ++i) {
        bounds[i] = max(bounds[i], highest);
      }
    }
  }

  sm12x_packed_params const& params_;
  int lane_;
  uint32_t feature_units_;
  int window_;             // first group of the window
  int carried_;            // end of the groups before the next window
  int first_row_;          // of this lane's first group
  int rows_[kPerLane];     // of this lane's groups
  uint64_t units_;         // of this lane's groups
  uint64_t units_up_to_;   // of the window, up to and with this lane's groups
  uint64_t window_start_;  // units before the window
};

/// The work of one CTA, in order. Runs: the family's swapped kernels; turns: the others.
template <bool Runs, int TileTokens, int TileFeatures, int TileK>
class PackedSchedule {
 public:
  static constexpr int kStrip = 16;

  __device__ explicit PackedSchedule(sm12x_packed_params const& params)
      : params_(params),
        k_tiles_((params.k + TileK - 1) / TileK),
        splits_(params.least_units > 0),
        strips_((uint32_t(params.n) + kStrip - 1) / kStrip),
        walker_(params, Runs && !splits_ ? strips_
                                         : (uint32_t(params.n) + TileFeatures - 1) / TileFeatures) {
    if (!Runs && !splits_) {
      return;
    }
    units_ = uint32_t(walker_.total()) * (splits_ ? k_tiles_ : 1);
    uint32_t const most = splits_ ? units_ / uint32_t(params.least_units) : units_;
    runs_ = most < 1 ? 1 : (most < gridDim.x ? most : gridDim.x);
    if (blockIdx.x < runs_) {
      unit_ = run_start(blockIdx.x);
      end_ = run_start(blockIdx.x + 1);
    }
  }

  /// Runs: strips that the largest piece of this CTA has, for the layout of its stages.
  __device__ uint32_t piece_strips() const {
    constexpr uint32_t kMost = TileFeatures / kStrip;
    if (!Runs || splits_) {
      return kMost;
    }
    // As many pieces as are needed, of equal size. With more tiles of tokens a run has fewer strips.
    uint32_t const strips = max(end_ - unit_, 1u);
    uint32_t const pieces = (strips + kMost - 1) / kMost;
    return (strips + pieces - 1) / pieces;
  }

  /// False where the CTA has done its work. `piece` is what piece_strips() said at the start.
  __device__ bool next(PackedWork& work, uint32_t piece) {
    if (Runs && !splits_) {
      return next_of_run(work, piece);
    }
    work.k_begin = 0;
    work.k_end = int(k_tiles_);
    uint64_t index = turn_;
    if (splits_) {
      if (unit_ >= end_) {
        return false;
      }
      index = unit_ / k_tiles_;
      work.first_unit = uint32_t(index) * k_tiles_;
      work.k_begin = int(unit_ - work.first_unit);
      work.k_end = int(min(end_ - work.first_unit, k_tiles_));
      unit_ = work.first_unit + work.k_end;
    }
    turn_ += gridDim.x;
    if (!walker_.find(index, group_)) {
      return false;
    }
    uint32_t feature_tile = group_.offset;
    uint32_t token_tile = 0;
    if (group_.token_tiles > 1) {
      feature_tile = group_.offset / group_.token_tiles;
      token_tile = group_.offset % group_.token_tiles;
    }
    set_part(work, token_tile, int(feature_tile) * TileFeatures,
             int(feature_tile + 1) * TileFeatures);
    return true;
  }

  /// Split-K: the CTA whose run holds a unit.
  __device__ uint32_t run_of(uint32_t unit) const { return ((unit + 1) * runs_ - 1) / units_; }

  __device__ uint32_t k_tiles() const { return k_tiles_; }

 private:
  __device__ uint32_t run_start(uint32_t run) const { return run * units_ / runs_; }

  __device__ bool next_of_run(PackedWork& work, uint32_t piece) {
    if (token_tile_ == 0) {
      while (strip_ == strip_end_) {
        if (unit_ >= end_ || !walker_.find(unit_, group_)) {
          return false;
        }
        // A group's units are its strips times its tiles of tokens. A run may begin or end inside a
        // strip's units: both neighbours round up.
        uint32_t const tiles = group_.token_tiles;
        uint32_t const start = unit_ - group_.offset;
        uint32_t const last = min(end_ - start, tiles * strips_);
        strip_ = tiles == 1 ? group_.offset : (group_.offset + tiles - 1) / tiles;
        strip_end_ = tiles == 1 ? last : (last + tiles - 1) / tiles;
        unit_ = start + tiles * strips_;
      }
      uint32_t const left = strip_end_ - strip_;
      uint32_t const pieces = (left + piece - 1) / piece;
      piece_end_ = strip_ + (pieces == 1 ? left : (left + pieces - 1) / pieces);
    }
    work.k_begin = 0;
    work.k_end = int(k_tiles_);
    set_part(work, token_tile_, int(strip_) * kStrip, int(piece_end_) * kStrip);
    if (++token_tile_ == group_.token_tiles) {
      token_tile_ = 0;
      strip_ = piece_end_;
    }
    return true;
  }

  __device__ void set_part(PackedWork& work, uint32_t token_tile, int feature,
                           int feature_end) const {
    int const row = int(token_tile) * TileTokens;
    work.group = group_.index;
    work.row = group_.first_row + row;
    work.rows = min(group_.rows - row, TileTokens);
    work.feature = feature;
    work.feature_end = min(feature_end, params_.n);
  }

  sm12x_packed_params const& params_;
  uint32_t k_tiles_;
  bool splits_;
  uint32_t strips_;  // of one group
  GroupWalker<TileTokens> walker_;
  typename GroupWalker<TileTokens>::Group group_;
  uint32_t units_ = 0;
  uint32_t runs_ = 1;
  uint32_t unit_ = 0;  // of the run: the next one that is not yet in work
  uint32_t end_ = 0;
  uint64_t turn_ = blockIdx.x;
  // Runs: the strips of the current group that are left, the piece in work, its next tile of tokens.
  uint32_t strip_ = 0;
  uint32_t strip_end_ = 0;
  uint32_t piece_end_ = 0;
  uint32_t token_tile_ = 0;
};

}  // namespace sm12x::kernel
