/// The offsets of an expert layer's rows, counted from the router's choices by one warp: for few routes that is
/// sooner than they come from the kernel that sorts them.
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

/// Offsets, as sorting the routes by expert gives them, in shared memory.
struct RouteCounter {
  static constexpr int kPerRound = 128;  // experts that a warp sums up at once, four a lane
  static constexpr int kCapacity = SM12X_MOST_COUNTED_EXPERTS;
  static_assert(kCapacity % kPerRound == 0);

  alignas(16) int32_t offsets[kCapacity + 4];

  /// A whole warp, before count().
  __device__ void clear(int experts) {
    for (int first = 0; first < experts; first += kPerRound) {
      reinterpret_cast<int4*>(offsets + first)[threadIdx.x % 32] = {};
    }
    __syncwarp();
  }

  /// A whole warp. Calls visit(route, local expert or -1) for every route, on one lane.
  template <class Visit>
  __device__ void count(sm12x_up_params const& up, int experts, Visit const& visit) {
    constexpr uint32_t kAllLanes = 0xffffffffu;
    int const lane = threadIdx.x % 32;
    for (int first = 0; first < up.routes; first += 4 * 32) {
      int expert[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int const route = first + 32 * i + lane;
        expert[i] = route < up.routes ? expert_of(up, route, experts) : -1;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first + 32 * i + lane < up.routes) {
          visit(first + 32 * i + lane, expert[i]);
        }
        if (expert[i] >= 0) {
          atomicAdd(offsets + expert[i], 1);
        }
      }
    }
    __syncwarp();
    int rows = 0;
    for (int first = 0; first < experts; first += kPerRound) {
      int4* const own = reinterpret_cast<int4*>(offsets + first) + lane;
      int4 const counts = *own;
      int const sum = counts.x + counts.y + counts.z + counts.w;
      int up_to = sum;
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        int const before = __shfl_up_sync(kAllLanes, up_to, distance);
        up_to += lane >= distance ? before : 0;
      }
      int const start = rows + up_to - sum;
      *own = {start, start + counts.x, start + counts.x + counts.y, start + sum - counts.w};
      rows += __shfl_sync(kAllLanes, up_to, 31);
    }
    __syncwarp();
    if (lane == 0) {
      offsets[experts] = rows;
    }
    __syncwarp();
  }
};

}  // namespace sm12x::kernel
