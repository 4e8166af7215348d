/// Sorts routes by expert, stably: a counting sort by one CTA, or by many in two launches.
///
/// A CTA's routes are cut into equal parts, one for each of its sorting warps. A warp counts its routes of
/// each expert; the sums over experts, CTAs and warps in front are where its routes begin; then it places
/// each. No CTA waits for another one, and with few routes no warp for another one: one sorts them, and does
/// what it can while their ids are on their way.
#pragma once

#include <cstdint>

#include <sm12x/abi_moe.h>
#include <sm12x/arch/warp.hpp>

namespace sm12x::kernel {

/// Threads: of the CTA.
template <int Threads>
class Router {
 public:
  static constexpr int kMostExperts = 1024;
  static constexpr int kCounters = 4096;  // of all warps: with many experts fewer warps sort
  static constexpr int kWarps = Threads / 32;
  static_assert((kWarps & (kWarps - 1)) == 0 && kCounters / kMostExperts >= 1);

  struct SharedMemory {
    alignas(
        16) uint32_t of_warp[kCounters];  // of an expert, for each warp: its routes, later where
                                          // they begin
    alignas(16) uint32_t totals[kMostExperts];  // of an expert, where one warp does not know them
    uint32_t rows;
  };

  __device__ Router(sm12x_route_params const& params, SharedMemory& shared)
      : params_(params),
        shared_(shared),
        warp_(int(threadIdx.x / 32)),
        lane_(int(threadIdx.x % 32)),
        first_(int(blockIdx.x) * SM12X_ROUTES_PER_CTA),
        end_(min(first_ + SM12X_ROUTES_PER_CTA, params.routes)),
        // A multiple of 4 counters, which are one word of a load.
        experts_((params.num_experts + 3) & ~3) {
    int const rounds = (end_ - first_ + 31) >> 5;
    int rounds_of_warp = rounds;
    // Halving needs no divisions.
#pragma unroll 1
    while (rounds_of_warp > kAtOnce && warps_ < kWarps && 2 * warps_ * experts_ <= kCounters) {
      warps_ *= 2;
      rounds_of_warp = (rounds_of_warp + 1) >> 1;
    }
    alone_ = warps_ == 1 && params.phase == SM12X_ROUTE_ALL;
    held_ = rounds_of_warp <= kAtOnce;
    begin_of_warp_ = first_ + warp_ * rounds_of_warp * 32;
    end_of_warp_ = min(begin_of_warp_ + rounds_of_warp * 32, end_);
    counters_ = shared.of_warp + warp_ * experts_;
  }

  /// All threads of CTAs 0 to route_ctas - 1.
  __device__ void run() {
    bool const sorts = warp_ < warps_;
    if (sorts) {
      request(begin_of_warp_);
      reciprocal_ = 0xffffffffu / uint32_t(params_.top_k);
      zero_counters();
    }
    if (params_.phase != SM12X_ROUTE_PLACE) {
      clear();
    }
    // Twice through the routes, with one copy of the instructions: counting, then placing.
    uint32_t rows = 0;
#pragma unroll 1
    for (bool places = false;; places = true) {
      if (sorts) {
        go_through(places);
      }
      if (places) {
        break;
      }
      if (!alone_) {
        __syncthreads();
        add_warps();
        if (params_.phase == SM12X_ROUTE_COUNT) {
          return;
        }
        __syncthreads();
      }
      if (sorts) {
        rows = find_starts();
      }
    }
    if (sorts) {
      finish(rows);
    }
    if (params_.padded != 0 && blockIdx.x == 0) {
      __syncthreads();
      pad(shared_.rows);
    }
  }

 private:
  static constexpr uint32_t kAllLanes = 0xffffffffu;

  // Rounds of 32 routes whose experts are asked for together: each takes a trip to L2, or two with a map. So
  // many one warp sorts by itself sooner than several that have to wait for each other.
  static constexpr int kAtOnce = 2;

  // Asks for the ids of the routes from `at` on and, where they are to be placed, for their weights.
  __device__ void request(int at) {
    auto const* const ids = reinterpret_cast<uint32_t const*>(params_.topk_ids);
    auto const* const weights = reinterpret_cast<float const*>(params_.topk_weights);
    int const wide = params_.ids_are_64_bit != 0 ? 1 : 0;
    bool const weighted = params_.row_weight != 0 && params_.phase != SM12X_ROUTE_COUNT;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      int const route = at + 32 * i + lane_;
      ids_[i] = ~0u;
      high_[i] = 0;
      if (route < end_of_warp_) {
        auto const* const id = ids + (int64_t(route) << wide);
        ids_[i] = __ldcg(id);
        if (wide != 0) {
          high_[i] = __ldcg(id + 1);
        }
        if (weighted) {
          weights_[i] = weights[route];
        }
      }
    }
  }

  __device__ void zero_counters() {
#pragma unroll 1
    for (int expert = 4 * lane_; expert < experts_; expert += 4 * 32) {
      reinterpret_cast<uint4&>(counters_[expert]) = {};
    }
    __syncwarp();
  }

  // Counts this warp's routes, or places them.
  __device__ void go_through(bool places) {
#pragma unroll 1
    for (int at = begin_of_warp_; at < end_of_warp_; at += 32 * kAtOnce) {
      if (!places || !held_) {
        look_up();
        number(at);
      }
      if (places) {
        place(at);
      }
      if (!held_) {  // the next ones, behind the last ones the first ones again
        int const next = at + 32 * kAtOnce;
        request(next < end_of_warp_ ? next : begin_of_warp_);
      }
    }
  }

  // Makes local experts of the ids, -1: none of this device's. No number of experts reaches 2^31, so that
  // negative ids are too large.
  __device__ void look_up() {
    auto const* const map = reinterpret_cast<int32_t const*>(params_.expert_map);
    uint32_t const known = map != nullptr ? params_.map_size : params_.num_experts;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      expert_[i] = high_[i] == 0 && ids_[i] < known ? int(ids_[i]) : -1;
    }
    if (map == nullptr) {
      return;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      expert_[i] = expert_[i] >= 0 ? __ldcg(map + expert_[i]) : -1;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      expert_[i] = uint32_t(expert_[i]) < uint32_t(params_.num_experts) ? expert_[i] : -1;
    }
  }

  // Numbers the routes of each expert, in order, from its counter on, and raises that.
  __device__ void number(int at) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (at + 32 * i < end_of_warp_) {
        bool const there = expert_[i] >= 0;
        uint32_t const peers = __match_any_sync(kAllLanes, expert_[i]);
        uint32_t const in_front = __popc(peers & ((1u << lane_) - 1));
        uint32_t const before = there ? counters_[expert_[i]] : 0;
        __syncwarp();
        if (there && in_front == 0) {
          counters_[expert_[i]] = before + __popc(peers);
        }
        __syncwarp();
        number_[i] = before + in_front;
      }
    }
  }

  // Makes of the counts of warps how many routes of an expert lie in front of a warp's, and adds them up.
  __device__ void add_warps() {
    constexpr int kTogether = 4;
#pragma unroll 1
    for (int expert = threadIdx.x; expert < experts_; expert += Threads) {
      uint32_t in_front = 0;
      uint32_t total = 0;
      if (params_.phase == SM12X_ROUTE_PLACE && expert < params_.num_experts) {
        auto const* counts = reinterpret_cast<uint32_t const*>(params_.counts) + expert;
#pragma unroll 4
        for (int cta = 0; cta < params_.route_ctas; ++cta, counts += params_.num_experts) {
          uint32_t const count = *counts;
          in_front += cta < int(blockIdx.x) ? count : 0;
          total += count;
        }
      }
#pragma unroll 1
      for (int warp = 0; warp < warps_; warp += kTogether) {
        uint32_t* const counters = shared_.of_warp + warp * experts_ + expert;
        uint32_t own[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          own[i] = warp + i < warps_ ? counters[i * experts_] : 0;
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          if (warp + i < warps_) {
            counters[i * experts_] = in_front;
          }
          in_front += own[i];
        }
      }
      if (params_.phase == SM12X_ROUTE_COUNT) {
        if (expert < params_.num_experts) {
          reinterpret_cast<uint32_t*>(
              params_.counts)[int64_t(blockIdx.x) * params_.num_experts + expert] = in_front;
        }
      } else {
        shared_.totals[expert] = params_.phase == SM12X_ROUTE_PLACE ? total : in_front;
      }
    }
  }

  // Makes of this warp's counters the rows at which its routes begin. Returns the rows of all experts. Every
  // sorting warp goes through all experts, four of a lane at a time.
  __device__ uint32_t find_starts() {
    uint32_t const* const totals = alone_ ? counters_ : shared_.totals;
    bool const tells = warp_ == 0 && blockIdx.x == 0;
    auto* const offsets = reinterpret_cast<int32_t*>(params_.offsets);
    uint32_t rows = 0;
#pragma unroll 1
    for (int first = 0; first < experts_; first += 4 * 32) {
      int const expert = first + 4 * lane_;
      bool const there = expert < experts_;
      uint4 const total = there ? reinterpret_cast<uint4 const&>(totals[expert]) : uint4{};
      uint4& counters = reinterpret_cast<uint4&>(counters_[expert]);
      uint4 const in_front = there && !alone_ ? counters : uint4{};
      uint32_t const sum = total.x + total.y + total.z + total.w;
      uint32_t const up_to = arch::sum_up_to_lane(sum);
      uint4 start;
      start.x = rows + up_to - sum;
      start.y = start.x + total.x;
      start.z = start.y + total.y;
      start.w = start.z + total.z;
      if (there) {
        counters = {start.x + in_front.x, start.y + in_front.y, start.z + in_front.z,
                    start.w + in_front.w};
      }
      if (tells) {
        uint32_t const of[4] = {start.x, start.y, start.z, start.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (expert + i < params_.num_experts) {
            offsets[expert + i] = int(of[i]);
          }
        }
      }
      rows += __shfl_sync(kAllLanes, up_to, 31);
    }
    if (tells && lane_ == 0) {
      offsets[params_.num_experts] = int(rows);
      shared_.rows = rows;
    }
    __syncwarp();
    return rows;
  }

  // Numbered routes. Where numbers were counted from 0, counters say where experts begin.
  __device__ void place(int at) const {
    auto* const row_index = reinterpret_cast<int32_t*>(params_.row_index);
    auto* const route_row = reinterpret_cast<int32_t*>(params_.route_row);
    auto* const row_weight = reinterpret_cast<float*>(params_.row_weight);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      int const route = at + 32 * i + lane_;
      if (route < end_of_warp_) {
        int row = -1;
        if (expert_[i] >= 0) {
          row = int(number_[i] + (held_ ? counters_[expert_[i]] : 0));
          row_index[row] = token_of(route);
          if (row_weight != nullptr) {
            row_weight[row] = weights_[i];
          }
        }
        route_row[route] = row;
      }
    }
  }

  // route / top_k. The reciprocal, of 32 bits and rounded down, gives this or one less for every route.
  __device__ int token_of(int route) const {
    uint32_t const near = __umulhi(uint32_t(route), reciprocal_);
    uint32_t const top_k = uint32_t(params_.top_k);
    return int(near + (uint32_t(route) - near * top_k >= top_k ? 1 : 0));
  }

  // Rows that no route has. CTAs share them, and the warps that sort.
  __device__ void finish(uint32_t rows) const {
    auto* const row_index = reinterpret_cast<int32_t*>(params_.row_index);
    auto* const row_weight = reinterpret_cast<float*>(params_.row_weight);
#pragma unroll 1
    for (int row = max(int(rows), first_) + int(threadIdx.x); row < end_; row += 32 * warps_) {
      row_index[row] = -1;
      if (row_weight != nullptr) {
        row_weight[row] = 0.0f;
      }
    }
  }

  __device__ void pad(uint32_t rows) const {
    int const chunks = params_.padded_bytes / 16;
    int const zeros = min(params_.padding, params_.routes - int(rows)) * chunks;
    auto* const to = reinterpret_cast<uint4*>(params_.padded) + int64_t(rows) * chunks;
#pragma unroll 1
    for (int i = threadIdx.x; i < zeros; i += Threads) {
      to[i] = {};
    }
  }

  // The last warps first: with few routes they have nothing else to do.
  __device__ void clear() const {
    auto* const maxima = reinterpret_cast<uint32_t*>(params_.row_maxima);
    if (maxima != nullptr) {
#pragma unroll 1
      for (int row = first_ + Threads - 1 - int(threadIdx.x); row < end_; row += Threads) {
        maxima[row] = 0;
      }
    }
  }

  sm12x_route_params const& params_;
  SharedMemory& shared_;
  int warp_;
  int lane_;
  int first_;  // of this CTA's routes
  int end_;
  int experts_;
  int warps_ = 1;      // that sort
  bool alone_;         // one warp knows all routes: nobody waits
  bool held_;          // a warp's routes are all in its registers
  int begin_of_warp_;  // of this warp's routes
  int end_of_warp_;
  uint32_t* counters_;     // of this warp, of each expert
  uint32_t reciprocal_;    // of top_k, times 2^32
  uint32_t ids_[kAtOnce];  // of this lane's routes, a round's each
  uint32_t high_[kAtOnce];
  float weights_[kAtOnce];
  int expert_[kAtOnce];       // local
  uint32_t number_[kAtOnce];  // among the expert's routes
};

}  // namespace sm12x::kernel
