/// What a CTA of a packed kernel computes.
///
/// Input: bounds on the device (offsets of packed rows, or counts of masked ones), never trusted, or how many
/// rows each group has, counted by the CTA itself. Empty groups have no work. Nothing here writes or waits: a
/// warp reads the bounds of 128 groups at once, and all its lanes come to the same answers. They call
/// everything here together.
///
/// Three schedules. Groups follow each other as they come; T is a group's tiles of tokens.
///   turns    CTA c of G takes tiles c, c + G, c + 2G, ...; within a group the tiles of tokens vary
///            fastest, so that a tile of weights is used again while it is in L2.
///   runs     the features of all groups in a row, in strips of 8 (16: with gates and ups) weighted with T, are cut into equal
///            runs, one for each CTA, and a run into pieces of at most a tile. No CTA has more than a
///            strip's work more than another, whatever the number of tiles; a CTA takes all tiles of
///            tokens of a piece one after the other.
///   split-K  (stream-K) the k-tiles of all tiles in a row are cut into equal runs. A tile that the end of
///            a run cuts is finished by whoever comes last (split_k.hpp). For so few tiles that their
///            strips do not fill the device.
/// Turns count tiles in 64 bits; for the others the host sees to it that units * CTAs < 2^32.
///
/// Between the bounds' arrival and a CTA's first load nothing else happens on the SM, so this code counts
/// its cycles: 5 to 8 for an instruction, because each waits for the one in front. So no division on the way (about
/// 150), all loads before the first use, and what needs no bounds (Cuts) before they arrive.
#pragma once

#include <cstdint>

#include <cute/util/type_traits.hpp>
#include <sm12x/abi_packed.h>
#include <sm12x/arch/copy.hpp>
#include <sm12x/arch/grid.hpp>
#include <sm12x/arch/math.hpp>
#include <sm12x/arch/warp.hpp>

namespace sm12x::kernel {

/// The row of a that row `row` of the call takes, where there is a row_index; -1: outside of a.
__device__ inline int64_t indexed_row(sm12x_packed_params const& params, int64_t row) {
  int64_t const index = params.row_index_is_64_bit
                            ? reinterpret_cast<int64_t const*>(params.row_index)[row]
                            : reinterpret_cast<int32_t const*>(params.row_index)[row];
  return index >= 0 && index < params.a_rows ? index : -1;
}

/// A piece of work: k-tiles [k_begin, k_end) of a part of D.
struct alignas(16) PackedWork {
  int group;        ///< negative: there is no more work
  int row;          ///< first row: of d where rows are packed, of the group where masked
  int rows;         ///< of the group, at most a tile's
  int feature;      ///< first output feature
  int feature_end;  ///< features of the piece end here (N at the latest)
  int k_begin;
  int k_end;
  uint32_t largest_piece;  ///< boxes of weights in a stage, the same for all pieces of the CTA
  // Split-K counts the k-tiles of all tiles: units.
  uint32_t first_unit;  ///< the tile's
  uint32_t units;       ///< of all tiles
  uint32_t runs;        ///< into which they are cut
  bool reads_once;      ///< no other tile of tokens takes the same weights

  /// Split-K: the CTA whose run holds a unit.
  __device__ uint32_t run_of(uint32_t unit) const { return ((unit + 1) * runs - 1) / units; }
};

/// Where bounds come from.
enum class Bounds {
  kGiven,           ///< by a grid that has ended, perhaps since L1 last forgot (load_past_l1)
  kGivenOrCounted,  ///< given, or rows that the CTA itself has counted: groups follow each other
  kCounted          ///< the same, but rows of each group are numbered from 0
};

/// Finds groups by a running count of their tiles of tokens; each is `feature_units` units.
///
/// A window is 128 groups, four neighbours of each lane.
/// Count: unsigned type that holds the units of all groups.
template <int TileTokens, class Count, Bounds From>
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
      : params_(params), lane_(threadIdx.x % 32), feature_units_(feature_units) {}

  /// Where the bounds are, or the counts: zeros behind the last group's, up to a whole window. Before all else.
  __device__ void set_bounds(void const* bounds, bool are_64_bit) {
    bounds_ = bounds;
    bounds_are_64_bit_ = are_64_bit;
  }
  __device__ void set_counts(int32_t const* counts) {
    counts_ = counts;
    has_counts_ = true;
  }

  /// Tiles of tokens of all groups. Before the first find().
  __device__ Count total() {
#pragma unroll 1
    while (next_window()) {
    }
    Count const tiles = window_end_;
    if (__builtin_expect(window_ > 0, 0)) {
      restart();
    }
    return tiles;
  }

  /// The group of a unit that is not less than the last one asked for. False where there is none.
  __device__ bool find(Count unit, Group& group) {
#pragma unroll 1
    while (__builtin_expect(unit >= window_end_ * feature_units_, 0)) {
      if (!next_window()) {
        return false;
      }
    }
    // One lane's groups hold the unit: tiles [before, before + tiles) of the window.
    uint32_t const units = feature_units_;
    uint32_t const in_lane = uint32_t(unit - window_start_ * units) - before_ * units;
    uint32_t tiles = 0;
    uint32_t start = 0;
    int index = window_ + kPerLane * lane_;
    int first_row = first_row_;
    int rows = rows_[0];
#pragma unroll
    for (int i = 0; i + 1 < kPerLane; ++i) {
      tiles += token_tiles_of(rows_[i]);
      if (in_lane >= tiles * units) {
        start = tiles * units;
        index += 1;
        first_row += rows_follow() ? rows_[i] : 0;
        rows = rows_[i + 1];
      }
    }
    uint32_t const lanes = __ballot_sync(kAllLanes, in_lane < tiles_ * units);
    int const lane = __ffs(lanes) - 1;
    group.index = __shfl_sync(kAllLanes, index, lane);
    group.offset = __shfl_sync(kAllLanes, in_lane - start, lane);
    group.rows = __shfl_sync(kAllLanes, rows, lane);
    group.first_row = __shfl_sync(kAllLanes, first_row, lane);
    group.token_tiles = token_tiles_of(group.rows);
    return true;
  }

 private:
  static constexpr uint32_t kAllLanes = 0xffffffffu;
  static constexpr int kPerLane = 4;
  static constexpr int kWindow = 32 * kPerLane;

  __device__ bool is_packed() const { return params_.row_layout == SM12X_ROWS_PACKED; }

  // Whether a group's rows are numbered on from those in front of it.
  __device__ bool rows_follow() const { return From != Bounds::kCounted && is_packed(); }

  __device__ static uint32_t token_tiles_of(int rows) {
    return (uint32_t(rows) + TileTokens - 1) / TileTokens;
  }

  __device__ void restart() {
    window_ = -kWindow;
    window_start_ = 0;
    window_end_ = 0;
    carried_ = 0;
    decreases_ = false;
  }

  __device__ bool next_window() {
    if (window_ + kWindow >= params_.num_groups) {
      return false;
    }
    window_ += kWindow;
    window_start_ = window_end_;
    if (From == Bounds::kCounted || (From == Bounds::kGivenOrCounted && has_counts_)) {
      take_counts();
    } else {
      load_bounds();
    }
    return true;
  }

  // This lane's groups out of the counts. Rows and tiles of tokens are summed up together: there are at most
  // 2^16 - 1 of them.
  __device__ void take_counts() {
    int4 const own = reinterpret_cast<int4 const*>(counts_ + window_)[lane_];
    rows_[0] = own.x;
    rows_[1] = own.y;
    rows_[2] = own.z;
    rows_[3] = own.w;
    tiles_ = tiles_of_lane();
    uint32_t const both = tiles_ + (uint32_t(own.x + own.y + own.z + own.w) << 16);
    uint32_t const up_to = arch::sum_up_to_lane(both);
    uint32_t const all = __shfl_sync(kAllLanes, up_to, 31);
    before_ = (up_to - both) & 0xffff;
    window_end_ = window_start_ + (all & 0xffff);
    if (From != Bounds::kCounted) {
      first_row_ = carried_ + int((up_to - both) >> 16);
      carried_ += int(all >> 16);
    }
  }

  // Reads where this lane's groups begin and how many rows they have. All loads go out before the first
  // is looked at; indices past the last bound read it again, which makes groups without rows.
  __device__ void load_bounds() {
    int const limit = params_.rows < 0x7fffffff ? int(params_.rows) : 0x7fffffff;
    bool const packed = is_packed();
    int const first = window_ + kPerLane * lane_;
    int const last = params_.num_groups - (packed ? 0 : 1);
    int bound[kPerLane + 1];
    if (__builtin_expect(bounds_are_64_bit_, 0)) {
      auto const* const bounds = static_cast<int64_t const*>(bounds_);
      int64_t wide[kPerLane + 1];
#pragma unroll
      for (int i = 0; i <= kPerLane; ++i) {
        wide[i] = arch::load_past_l1(bounds + min(first + i, last));
      }
#pragma unroll
      for (int i = 0; i <= kPerLane; ++i) {
        bound[i] = clamped(wide[i], limit);
      }
    } else {
      auto const* const bounds = static_cast<int32_t const*>(bounds_);
      bound[kPerLane] = arch::load_past_l1(bounds + min(first + kPerLane, last));
      // One load instead of four wherever it can be: each is a trip to L2.
      if (reinterpret_cast<uint64_t>(bounds) % 16 == 0 && first + kPerLane <= last + 1) {
        int4 const four = arch::load_past_l1(reinterpret_cast<int4 const*>(bounds + first));
        bound[0] = four.x;
        bound[1] = four.y;
        bound[2] = four.z;
        bound[3] = four.w;
      } else {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
          bound[i] = arch::load_past_l1(bounds + min(first + i, last));
        }
      }
#pragma unroll
      for (int i = 0; i <= kPerLane; ++i) {
        bound[i] = max(0, min(bound[i], limit));
      }
    }
    if (__builtin_expect(!packed, 0)) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        rows_[i] = first + i <= last ? bound[i] : 0;
      }
      first_row_ = 0;
    } else {
      bool sorted = true;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        sorted = sorted && bound[i] <= bound[i + 1];
      }
      if (__builtin_expect(!__all_sync(kAllLanes, sorted) || decreases_, 0)) {
        raise_to_maximum(bound);
      }
      carried_ = __shfl_sync(kAllLanes, bound[kPerLane], 31);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        rows_[i] = bound[i + 1] - bound[i];
      }
      first_row_ = bound[0];
    }
    tiles_ = tiles_of_lane();
    uint32_t const up_to = arch::sum_up_to_lane(tiles_);
    before_ = up_to - tiles_;
    window_end_ = window_start_ + __shfl_sync(kAllLanes, up_to, 31);
  }

  __device__ uint32_t tiles_of_lane() const {
    uint32_t tiles = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      tiles += token_tiles_of(rows_[i]);
    }
    return tiles;
  }

  // Offsets that decrease count as their running maximum, from here on.
  __device__ void raise_to_maximum(int (&bound)[kPerLane + 1]) {
    int const in_front = decreases_ || window_ > 0 ? carried_ : 0;
    decreases_ = true;
    bound[0] = max(bound[0], in_front);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      bound[i + 1] = max(bound[i + 1], bound[i]);
    }
    int up_to = bound[kPerLane];
#pragma unroll 1
    for (int distance = 1; distance < 32; distance *= 2) {
      int const before = __shfl_up_sync(kAllLanes, up_to, distance);
      up_to = lane_ >= distance ? max(up_to, before) : up_to;
    }
    int const before = __shfl_up_sync(kAllLanes, up_to, 1);
#pragma unroll
    for (int i = 0; i <= kPerLane; ++i) {
      bound[i] = lane_ == 0 ? bound[i] : max(bound[i], before);
    }
  }

  __device__ static int clamped(int64_t value, int limit) {
    return value < 0 ? 0 : (value > limit ? limit : int(value));
  }

  sm12x_packed_params const& params_;
  void const* bounds_ = nullptr;
  bool bounds_are_64_bit_ = false;
  int32_t const* counts_ = nullptr;
  bool has_counts_ = false;
  int lane_;
  uint32_t feature_units_;
  int window_ = -kWindow;   // first group of the window
  Count window_start_ = 0;  // tiles of tokens before the window
  Count window_end_ = 0;    // up to its end
  int carried_ = 0;         // end of the groups before the next window
  bool decreases_ = false;  // some offset was less than the one before it
  int rows_[kPerLane];      // of this lane's groups
  int first_row_ = 0;       // of the first of them
  uint32_t tiles_;          // of tokens, of all of them
  uint32_t before_;         // tiles of the window before them
};

/// How runs are cut, as far as it depends on the grid alone: before the bounds are there. Lane l knows it for l + 1
/// tiles of tokens.
class Cuts {
 public:
  /// A whole warp, before all else.
  __device__ void prepare() {
    per_cta_ = 0xffffffffu / gridDim.x + 1;
    ctas_ = ctas_of_tile(threadIdx.x % 32 + 1);
    share_ = __float_as_uint(arch::fast_reciprocal(float(ctas_)));
    arch::keep(per_cta_);
    arch::keep(ctas_);
    arch::keep(share_);
  }

  /// How many CTAs share a tile of tokens where each tile gets equally many, and 1 / that; 0 where runs are cut
  /// without regard to tiles.
  struct Tile {
    uint32_t ctas;
    float share;
  };
  __device__ Tile of_tile(uint32_t tiles) const {
    if (__builtin_expect(tiles > 32, 0)) {
      uint32_t const ctas = ctas_of_tile(tiles);
      return {ctas, arch::fast_reciprocal(float(ctas))};
    }
    return {__shfl_sync(0xffffffffu, ctas_, tiles - 1),
            __uint_as_float(__shfl_sync(0xffffffffu, share_, tiles - 1))};
  }

  /// 2^32 / CTAs, rounded up; 0 for one CTA.
  __device__ uint32_t per_cta() const { return per_cta_; }

 private:
  __device__ static uint32_t ctas_of_tile(uint32_t tiles) {
    if (4 * tiles > gridDim.x) {
      return 0;
    }
    uint32_t const ctas = uint32_t((float(gridDim.x) + 0.5f) * arch::fast_reciprocal(float(tiles)));
    return 16 * ctas * tiles >= 15 * gridDim.x ? ctas : 0;
  }

  uint32_t per_cta_;
  uint32_t ctas_;
  uint32_t share_;
};

/// The work of one CTA, in order. Runs: the family's swapped kernels; turns: the others. Strip: features that
/// no run parts. From: GroupWalker's.
template <bool Runs, int TileTokens, int TileFeatures, int TileK, int Strip, Bounds From>
class PackedSchedule {
 public:
  static constexpr int kStrip = Strip;
  static constexpr uint32_t kMostStrips = TileFeatures / kStrip;
  static_assert((kMostStrips & (kMostStrips - 1)) == 0);

  /// Reads nothing on the device.
  __device__ PackedSchedule(sm12x_packed_params const& params, Cuts const& cuts)
      : params_(params),
        k_tiles_((params.k + TileK - 1) / TileK),
        splits_(params.least_units > 0),
        strips_((uint32_t(params.n) + kStrip - 1) / kStrip),
        walker_(params, Runs && !splits_ ? strips_
                                         : (uint32_t(params.n) + TileFeatures - 1) / TileFeatures),
        cuts_(cuts),
        largest_piece_(Runs && !splits_ ? 0 : kMostStrips) {}

  /// Where the bounds or the counts lie (GroupWalker). Then all tiles are counted.
  __device__ void read_bounds(void const* bounds, bool are_64_bit) {
    walker_.set_bounds(bounds, are_64_bit);
    count_tiles();
  }
  __device__ void read_counts(int32_t const* counts) {
    walker_.set_counts(counts);
    count_tiles();
  }

  /// Takes up a share of the work, this CTA's own or one after the other, in ascending order.
  __device__ void take(uint32_t cta) {
    turn_ = cta;
    if (__builtin_expect(splits_, !Runs)) {
      units_ = tiles_ * ((uint32_t(params_.n) + TileFeatures - 1) / TileFeatures) * k_tiles_;
      uint32_t const most = units_ / uint32_t(params_.least_units);
      runs_ = most < 1 ? 1 : min(most, gridDim.x);
      if (cta < runs_) {
        run_.begin = cta * units_ / runs_;
        run_.end = (cta + 1) * units_ / runs_;
      }
    } else if (Runs && tiles_ > 0) {
      run_ = run_of(cta);
    }
  }

  /// Tiles of tokens of all groups, and strips of features of one of them. Not where CTAs take turns.
  __device__ uint32_t tiles() const { return tiles_; }
  __device__ uint32_t strips() const { return strips_; }

  /// Boxes of weights that are enough for every piece of every run, where all tiles have so many strips.
  __device__ uint32_t largest_piece_of_all(uint32_t strips) const {
    if (cut_.ctas > 0) {
      // Runs have so many strips, rounded up, or one less; halves and the like of them are shorter.
      uint32_t const longest = uint32_t((float(strips) - 0.5f) * cut_.share) + 1;
      return max(max(piece_of(longest), piece_of(max(longest, 2u) - 1)),
                 min((longest + 3) / 2, kMostStrips));
    }
    // One CTA: 2^32 / CTAs is too large for a word.
    uint32_t const of_cta =
        cuts_.per_cta() == 0 ? kMostStrips : __umulhi(tiles_ * strips, cuts_.per_cta());
    return min(of_cta + 2, kMostStrips);
  }
  /// No piece gets larger, and each says so. Before next().
  __device__ void set_largest_piece(uint32_t boxes) { largest_piece_ = boxes; }

  /// The CTA's next piece.
  __device__ void next(PackedWork& work) {
    if (!find_next(work)) {
      work.group = -1;
    }
    work.largest_piece = largest_piece_;
  }

 private:
  using Count = cute::conditional_t<Runs, uint32_t, uint64_t>;

  __device__ void count_tiles() {
    if (Runs || splits_) {
      tiles_ = uint32_t(walker_.total());
    }
    if (Runs && tiles_ > 0) {
      cut_ = cuts_.of_tile(tiles_);
    }
  }

  // False where the CTA has done its work.
  __device__ bool find_next(PackedWork& work) {
    work.k_begin = 0;
    work.k_end = int(k_tiles_);
    if (Runs && !splits_) {
      return next_of_run(work);
    }
    Count index = turn_;
    if (splits_) {
      if (run_.begin >= run_.end) {
        return false;
      }
      uint32_t const tile = run_.begin / k_tiles_;
      work.first_unit = tile * k_tiles_;
      work.units = units_;
      work.runs = runs_;
      work.k_begin = int(run_.begin - work.first_unit);
      work.k_end = int(min(run_.end - work.first_unit, k_tiles_));
      run_.begin = work.first_unit + work.k_end;
      index = tile;
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

  // Strips of the next piece where so many are left: halves of what is more than a tile, but less than
  // two, because short pieces keep few bytes in flight.
  __device__ static uint32_t piece_of(uint32_t strips) {
    return strips <= kMostStrips ? strips
                                 : (strips < 2 * kMostStrips ? (strips + 1) / 2 : kMostStrips);
  }

  struct Run {
    uint32_t begin = 0;  ///< the next unit that is not yet in work
    uint32_t end = 0;
  };

  // Runs: a CTA's, of all groups' tiles of tokens. Equal ones, with many units one more here and there. But
  // where there are few tiles, each gets equally many CTAs if that leaves less than one in 16 idle: a run that
  // crosses from one group to the next comes in two pieces, which take longer than one of both their sizes.
  __device__ Run run_of(uint32_t cta) const {
    uint32_t const units = tiles_ * strips_;
    uint32_t const ctas = cut_.ctas;
    if (ctas > 0) {
      // With a half added where the quotient could be whole. All CTAs round alike, so that runs meet.
      float const per_cta = cut_.share;
      auto const start = [&](uint32_t run) {
        uint32_t const tile = uint32_t((float(run) + 0.5f) * per_cta);
        uint32_t const part = run - tile * ctas;
        uint32_t const strip = uint32_t((float(part * strips_) + 0.5f) * per_cta);
        return min(tile * strips_ + strip, units);
      };
      return {start(cta), start(cta + 1)};
    }
    auto const start = [&](uint32_t run) {
      return min(__umulhi(run * units, cuts_.per_cta()), units);
    };
    return {start(cta), cta + 1 == gridDim.x ? units : start(cta + 1)};
  }

  // Takes up the next group that has a part in the run; with none, strip_ stays strip_end_.
  __device__ void next_group_of_run() {
    while (strip_ == strip_end_ && run_.begin < run_.end && walker_.find(run_.begin, group_)) {
      // A group's units are its strips times its tiles of tokens. A run may begin or end inside a
      // strip's units: both neighbours round up.
      uint32_t const tiles = group_.token_tiles;
      uint32_t const first = run_.begin - group_.offset;
      uint32_t const last = min(run_.end - first, tiles * strips_);
      strip_ = group_.offset;
      strip_end_ = last;
      if (tiles > 1) {
        strip_ = (strip_ + tiles - 1) / tiles;
        strip_end_ = (strip_end_ + tiles - 1) / tiles;
      }
      run_.begin = first + tiles * strips_;
    }
  }

  __device__ bool next_of_run(PackedWork& work) {
    if (token_tile_ == 0) {
      if (strip_ == strip_end_) {
        next_group_of_run();
        if (largest_piece_ == 0) {
          // What is left of the run behind its first group's part is one part or several.
          uint32_t const behind = run_.end > run_.begin ? run_.end - run_.begin : 0;
          largest_piece_ = min(max(max(strip_end_ - strip_, behind), 1u), kMostStrips);
        }
        if (strip_ == strip_end_) {
          return false;
        }
      }
      piece_end_ = strip_ + min(piece_of(strip_end_ - strip_), largest_piece_);
    }
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
    work.reads_once = group_.token_tiles == 1;
  }

  sm12x_packed_params const& params_;
  uint32_t k_tiles_;
  bool splits_;
  uint32_t strips_;  // of one group
  GroupWalker<TileTokens, Count, From> walker_;
  typename GroupWalker<TileTokens, Count, From>::Group group_;
  Cuts cuts_;
  Cuts::Tile cut_ = {};     // of the tiles that there are
  uint32_t largest_piece_;  // in strips; 0 before the first piece of a run
  uint32_t tiles_ = 0;
  uint32_t units_ = 0;
  uint32_t runs_ = 1;
  Run run_;
  Count turn_;
  // Runs: the strips of the current group that are left, the piece in work, its next tile of tokens.
  uint32_t strip_ = 0;
  uint32_t strip_end_ = 0;
  uint32_t piece_end_ = 0;
  uint32_t token_tile_ = 0;
};

}  // namespace sm12x::kernel
