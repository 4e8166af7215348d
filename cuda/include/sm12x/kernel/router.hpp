/// Sorts routes by expert, stably: a counting sort by one CTA, or by many in two launches.
///
/// A CTA's routes are cut into equal parts, one for each of its sorting warps. A warp counts its routes of
/// each expert; the sums over experts, CTAs and warps in front are where its routes begin; then it goes
/// through them again and places each. No CTA waits for another one.
#pragma once

#include <cstdint>

#include <sm12x/abi_moe.h>

namespace sm12x::kernel {

/// Local expert of a route, -1: none of this device's. Params: a launch struct with ids and a map.
template <class Params>
__device__ int expert_of(Params const& params, int route, int num_experts) {
  int64_t id = params.ids_are_64_bit
                   ? __ldcg(reinterpret_cast<long long const*>(params.topk_ids) + route)
                   : int64_t(__ldcg(reinterpret_cast<int32_t const*>(params.topk_ids) + route));
  if (params.expert_map != 0) {
    bool const known = id >= 0 && id < params.map_size;
    id = known ? __ldcg(reinterpret_cast<int32_t const*>(params.expert_map) + id) : -1;
  }
  return id >= 0 && id < num_experts ? int(id) : -1;
}

/// Threads: of the CTA.
template <int Threads>
class Router {
 public:
  static constexpr int kMostExperts = 1024;
  static constexpr int kCounters = 4096;  // of all warps: with many experts fewer warps sort
  static constexpr int kWarps = Threads / 32;
  static_assert(kWarps <= 32 && 2 * Threads >= kMostExperts);
  static_assert(kCounters / kMostExperts >= 1);

  struct SharedMemory {
    uint32_t of_warp[kCounters];  // of an expert, for each warp: its routes, later where they begin
    uint32_t totals[kWarps];
  };

  __device__ Router(sm12x_route_params const& params, SharedMemory& shared)
      : params_(params),
        shared_(shared),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        first_(int(blockIdx.x) * SM12X_ROUTES_PER_CTA),
        end_(min(first_ + SM12X_ROUTES_PER_CTA, params.routes)),
        // An even number of counters, so that two are one word of a load.
        experts_((params.num_experts + 1) / 2 * 2) {
    int const rounds = (end_ - first_ + 31) / 32;
    warps_ = max(1, min(min(kWarps, kCounters / experts_), rounds));
    part_ = (rounds + warps_ - 1) / warps_ * 32;
  }

  /// All threads of CTAs 0 to route_ctas - 1.
  __device__ void run() {
    count();
    __syncthreads();
    if (params_.phase == SM12X_ROUTE_COUNT) {
      write_counts();
      clear();
      return;
    }
    uint32_t const rows = find_starts();
    __syncthreads();
    place();
    finish(rows);
    if (params_.phase == SM12X_ROUTE_ALL) {
      clear();
    }
  }

 private:
  static constexpr uint32_t kAllLanes = 0xffffffffu;

  // Rounds of 32 routes whose experts are asked for together: each takes a trip to L2, or two with a map.
  static constexpr int kAtOnce = 4;

  __device__ void load_experts(int at, int end, int (&experts)[kAtOnce]) const {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      int const route = at + 32 * i + lane_;
      experts[i] = route < end ? expert_of(params_, route, params_.num_experts) : -1;
    }
  }

  // Calls visit(route, expert, how many of the warp's 32 routes in front have the same one, how many of all
  // have it) for this warp's routes, in order; expert -1 has no row. Before the first of every few rounds
  // prepare(their first route, behind their last).
  template <class Prepare, class Visit>
  __device__ void for_each_route(Prepare const& prepare, Visit const& visit) {
    if (warp_ >= warps_) {
      return;
    }
    int const begin = first_ + warp_ * part_;
    int const end = min(begin + part_, end_);
    for (int at = begin; at < end; at += 32 * kAtOnce) {
      if (at != held_at_) {
        load_experts(at, end, held_);
        held_at_ = at;
      }
      prepare(at, end);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (at + 32 * i < end) {
          int const route = at + 32 * i + lane_;
          uint32_t const peers = __match_any_sync(kAllLanes, held_[i]);
          visit(i, route < end ? route : -1, held_[i], __popc(peers & ((1u << lane_) - 1)),
                __popc(peers));
          __syncwarp();
        }
      }
    }
  }

  __device__ uint32_t* counters_of_warp(int warp) const {
    return shared_.of_warp + warp * experts_;
  }

  __device__ void count() {
    for (int i = threadIdx.x; i < warps_ * experts_; i += Threads) {
      shared_.of_warp[i] = 0;
    }
    __syncthreads();
    uint32_t* const counters = counters_of_warp(warp_ < warps_ ? warp_ : 0);
    for_each_route([](int, int) {},
                   [&](int, int, int expert, int in_front, int all) {
                     if (expert >= 0 && in_front == 0) {
                       counters[expert] += all;
                     }
                   });
  }

  __device__ void write_counts() const {
    auto* const counts =
        reinterpret_cast<uint32_t*>(params_.counts) + int64_t(blockIdx.x) * params_.num_experts;
    for (int expert = threadIdx.x; expert < params_.num_experts; expert += Threads) {
      uint32_t sum = 0;
      for (int warp = 0; warp < warps_; ++warp) {
        sum += counters_of_warp(warp)[expert];
      }
      counts[expert] = sum;
    }
  }

  // Turns counts into the rows at which the warps' routes begin. Returns the rows of all experts. A thread has
  // two experts, neighbours.
  __device__ uint32_t find_starts() {
    uint32_t in_front[2] = {0, 0};  // routes of CTAs before this one
    uint32_t total[2] = {0, 0};
    int const expert = 2 * int(threadIdx.x);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (expert + i >= params_.num_experts) {
        continue;
      }
      if (params_.phase == SM12X_ROUTE_PLACE) {
        auto const* counts = reinterpret_cast<uint32_t const*>(params_.counts) + expert + i;
        for (int cta = 0; cta < params_.route_ctas; ++cta, counts += params_.num_experts) {
          uint32_t const count = *counts;
          in_front[i] += cta < int(blockIdx.x) ? count : 0;
          total[i] += count;
        }
      } else {
        for (int warp = 0; warp < warps_; ++warp) {
          total[i] += counters_of_warp(warp)[expert + i];
        }
      }
    }
    uint32_t up_to = total[0] + total[1];
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      uint32_t const before = __shfl_up_sync(kAllLanes, up_to, distance);
      up_to += lane_ >= distance ? before : 0;
    }
    if (lane_ == 31) {
      shared_.totals[warp_] = up_to;
    }
    __syncthreads();
    uint32_t before = up_to - total[0] - total[1];
    uint32_t rows = 0;
    for (int warp = 0; warp < kWarps; ++warp) {
      before += warp < warp_ ? shared_.totals[warp] : 0;
      rows += shared_.totals[warp];
    }
    auto* const offsets = reinterpret_cast<int32_t*>(params_.offsets);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (expert + i < params_.num_experts) {
        if (blockIdx.x == 0) {
          offsets[expert + i] = int(before);
        }
        uint32_t start = before + in_front[i];
        for (int warp = 0; warp < warps_; ++warp) {
          uint32_t& counter = counters_of_warp(warp)[expert + i];
          uint32_t const own = counter;
          counter = start;
          start += own;
        }
        before += total[i];
      }
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      offsets[params_.num_experts] = int(rows);
    }
    return rows;
  }

  __device__ void place() {
    auto* const row_index = reinterpret_cast<int32_t*>(params_.row_index);
    auto* const route_row = reinterpret_cast<int32_t*>(params_.route_row);
    auto* const row_weight = reinterpret_cast<float*>(params_.row_weight);
    auto const* const weights = reinterpret_cast<float const*>(params_.topk_weights);
    uint32_t* const starts = counters_of_warp(warp_ < warps_ ? warp_ : 0);
    float weight[kAtOnce];
    auto const load_weights = [&](int at, int end) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        int const route = at + 32 * i + lane_;
        weight[i] = row_weight != nullptr && route < end ? weights[route] : 0.0f;
      }
    };
    for_each_route(load_weights, [&](int i, int route, int expert, int in_front, int all) {
      uint32_t const start = expert >= 0 ? starts[expert] : 0;
      __syncwarp();
      if (expert >= 0 && in_front == 0) {
        starts[expert] = start + all;
      }
      if (route < 0) {
        return;
      }
      int const row = expert >= 0 ? int(start) + in_front : -1;
      route_row[route] = row;
      if (row >= 0) {
        row_index[row] = route / params_.top_k;
        if (row_weight != nullptr) {
          row_weight[row] = weight[i];
        }
      }
    });
  }

  // Rows that no route has. CTAs share them.
  __device__ void finish(uint32_t rows) const {
    auto* const row_index = reinterpret_cast<int32_t*>(params_.row_index);
    auto* const row_weight = reinterpret_cast<float*>(params_.row_weight);
    for (int row = max(int(rows), first_) + int(threadIdx.x); row < end_; row += Threads) {
      row_index[row] = -1;
      if (row_weight != nullptr) {
        row_weight[row] = 0.0f;
      }
    }
    if (params_.padded != 0 && blockIdx.x == 0) {
      int const chunks = params_.padded_bytes / 16;
      int const padding = min(params_.padding, params_.routes - int(rows));
      auto* const to = reinterpret_cast<uint4*>(params_.padded) + int64_t(rows) * chunks;
      for (int64_t i = threadIdx.x; i < int64_t(padding) * chunks; i += Threads) {
        to[i] = {};
      }
    }
  }

  __device__ void clear() const {
    auto* const maxima = reinterpret_cast<uint32_t*>(params_.row_maxima);
    if (maxima != nullptr) {
      for (int row = first_ + int(threadIdx.x); row < end_; row += Threads) {
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
  int warps_;  // that sort
  int part_;   // routes of a sorting warp, a multiple of 32
  int held_at_ = -1;
  int held_[kAtOnce];  // local experts of this lane's routes from there on
};

}  // namespace sm12x::kernel
