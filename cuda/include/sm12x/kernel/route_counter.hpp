/// The rows of an expert layer's experts, counted from the router's choices by one warp: for few routes that is
/// sooner than they come from the kernel that sorts them.
#pragma once

#include <cstdint>

#include <sm12x/abi_moe.h>
#include <sm12x/arch/grid.hpp>

namespace sm12x::kernel {

/// How many routes each expert has, in shared memory; zeros behind the last one, up to a multiple of kPerRound.
struct RouteCounter {
  static constexpr int kPerRound = 128;  // experts that a warp clears at once, four a lane
  static constexpr int kCapacity = SM12X_MOST_COUNTED_EXPERTS;
  static_assert(kCapacity % kPerRound == 0);

  alignas(16) int32_t counts[kCapacity];

  /// A whole warp, before count().
  __device__ void clear(int experts) {
#pragma unroll 1
    for (int first = 0; first < experts; first += kPerRound) {
      reinterpret_cast<int4*>(counts + first)[threadIdx.x % 32] = {};
    }
    __syncwarp();
  }

  /// Ids of 128 routes on their way, four a lane, in two words each.
  struct Ids {
    static constexpr int kPerLane = 4;
    uint32_t low[kPerLane];
    uint32_t high[kPerLane];
  };

  /// Asks for the ids of the routes from `first` on and waits for none of them. A whole warp.
  __device__ static Ids request(sm12x_up_params const& up, int first) {
    auto const* const ids = reinterpret_cast<uint32_t const*>(up.topk_ids);
    int const routes = ids != nullptr ? up.routes : 0;
    int const wide = up.ids_are_64_bit != 0 ? 1 : 0;
    Ids asked;
#pragma unroll
    for (int i = 0; i < Ids::kPerLane; ++i) {
      asked.low[i] = ~0u;
      asked.high[i] = 0;
    }
#pragma unroll
    for (int i = 0; i < Ids::kPerLane; ++i) {
      if (first + 32 * i >= routes) {
        break;
      }
      int const route = first + 32 * i + int(threadIdx.x % 32);
      if (route < routes) {
        asked.low[i] = arch::load_past_l1(ids + (int64_t(route) << wide));
        if (wide != 0) {
          asked.high[i] = arch::load_past_l1(ids + (int64_t(route) << wide) + 1);
        }
      }
    }
    return asked;
  }

  /// A whole warp. `ids`: of the first routes. Calls visit(route, local expert or -1) for every route, on one lane.
  template <class Visit>
  __device__ void count(sm12x_up_params const& up, int experts, Ids const& ids,
                        Visit const& visit) {
    // Few routes are the case in a hurry. Of many, the next ones are on their way while some are counted.
    Ids next;
    if (__builtin_expect(up.routes > kAtOnce, 0)) {
      next = request(up, kAtOnce);
    }
    count_round(up, experts, ids, 0, visit);
#pragma unroll 1
    for (int first = kAtOnce; __builtin_expect(first < up.routes, 0); first += kAtOnce) {
      Ids const these = next;
      next = request(up, first + kAtOnce);
      count_round(up, experts, these, first, visit);
    }
    __syncwarp();
  }

 private:
  static constexpr int kAtOnce = 32 * Ids::kPerLane;

  template <class Visit>
  __device__ void count_round(sm12x_up_params const& up, int experts, Ids const& ids, int first,
                              Visit const& visit) {
#pragma unroll
    for (int i = 0; i < Ids::kPerLane; ++i) {
      if (first + 32 * i >= up.routes) {
        break;
      }
      int const route = first + 32 * i + int(threadIdx.x % 32);
      int const expert = expert_of(up, ids.low[i], ids.high[i], experts);
      if (route < up.routes) {
        visit(route, expert);
      }
      if (expert >= 0) {
        atomicAdd(counts + expert, 1);
      }
    }
  }

  // Local expert of a route, -1: none of this device's. No number of experts reaches 2^31, so that negative ids are
  // too large.
  __device__ static int expert_of(sm12x_up_params const& up, uint32_t low, uint32_t high,
                                  int experts) {
    int id =
        high == 0 && low < uint32_t(up.expert_map != 0 ? up.map_size : experts) ? int(low) : -1;
    if (up.expert_map != 0 && id >= 0) {
      id = arch::load_past_l1(reinterpret_cast<int32_t const*>(up.expert_map) + id);
    }
    return uint32_t(id) < uint32_t(experts) ? id : -1;
  }
};

}  // namespace sm12x::kernel
