/// The kernel layer of the family fp8_layer: a whole expert layer of few tokens in one launch.
///
/// What separate launches lose between them, weights that nobody loads while a grid ends and the next one
/// begins, this one does not: each CTA has a part of GEMM1 and then one of GEMM2 (packed_scheduler.hpp, runs), and
/// its ring of stages goes on from one to the other. Nothing is sorted: rows of h and y lie in the order of the
/// routes, and each piece of work lists its own (ListedRows).
///
/// Roles, one warp each but for the MMA warps, as in packed_gemm.hpp:
///   warp 0      counts the routes, takes shares of work, hands pieces to the others, loads weights
///   warps 1, 2  rows: of x, of h once GEMM1 is done; a row's scale from its largest magnitude, then its codes
///   warp 3      none
///   others      MMA and epilogue, two groups in turns
///
/// Between CTAs. Shares are claimed, first those of GEMM1, then those of GEMM2: who waits for GEMM1 knows that
/// running CTAs have all of it. Of y, whoever brings the last row of some features adds them up for all tokens and
/// waits for nobody. All sums have a fixed order. The last warp to leave puts the shared words back to zero.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cute/numeric/integral_constant.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <sm12x/abi_moe.h>
#include <sm12x/arch/copy.hpp>
#include <sm12x/arch/grid.hpp>
#include <sm12x/epilogue/combine.hpp>
#include <sm12x/kernel/layer_operations.hpp>
#include <sm12x/kernel/packed_gemm.hpp>
#include <sm12x/kernel/route_counter.hpp>

namespace sm12x::kernel {

template <class Mma, bool Gated, int TileM, int TileN, int TileK, int WarpsM, int WarpsN,
          int MmaGroups, bool Pdl>
class LayerGemm {
 public:
  // -----------------------------------------------------------------------------------------------
  // Compile-time checks and types
  // -----------------------------------------------------------------------------------------------

  template <class Operation>
  using Gemm = PackedGemm<
      PackedConfig<Operation, Mma, TileM, TileN, TileK, true, WarpsM, WarpsN, MmaGroups, Pdl>>;
  using Up = Gemm<LayerUp<Gated>>;
  using Down = Gemm<LayerDown>;
  using Params = sm12x_layer_params;

  static constexpr int kTokens = Up::kTokens;
  static constexpr int kTileK = TileK;
  static constexpr int kBoxFeatures = Up::kBoxFeatures;
  static constexpr int kWeightMaps = Up::kWeightMaps;
  static constexpr int kThreads = Up::kThreads;
  static constexpr int kGroupWarps = Up::kGroupWarps;
  static constexpr int kStrip = LayerOperation::kStrip;
  static_assert(Down::kBoxFeatures == kBoxFeatures && Down::kWeightMaps == kWeightMaps);
  static_assert(Up::kMovesRegisters && MmaGroups == 2 && kStrip == kBoxFeatures);
  static_assert(SM12X_LAYER_ROUTES < 1 << 16, "as GroupWalker counts them");

  using Schedule = typename Up::Schedule;
  using Stages = typename Up::Stages;
  using Ring = typename Up::Ring;
  using State = typename Up::State;
  static constexpr int kMostStages = Up::kMostStages;

  /// A piece of GEMM1 (phase 0) or of GEMM2 (phase 1).
  struct alignas(16) Work {
    PackedWork piece;
    int phase;
  };
  using Queue = WorkQueue<Work, 4>;
  using Rows = epilogue::ListedRows<kTokens>;
  using Feed = QuantisedRows<typename Up::Tile, kTokens, kTileK, Up::kTokensWarps>;
  using Scales =
      epilogue::TileScales<true, Up::kAtomsM, Up::kAtomsN, Up::kStepM, Up::kStepN, true, Rows>;
  // Pieces whose rows are listed: those in the ring, of one k-tile each if need be, and behind them one of each
  // group, whose epilogue may still read its list.
  static constexpr int kLists = kMostStages + 4;

  // Words of the launch's state.
  static constexpr int kShares = 0;                  // claimed: of GEMM1, of GEMM2
  static constexpr int kArrivals = 2;                // strips of GEMM1 that are done
  static constexpr int kLeft = 3;                    // warps that need the words no more
  static constexpr int kStrips = SM12X_LAYER_STATE;  // rows that each strip of y has got

  // -----------------------------------------------------------------------------------------------
  // Shared memory
  // -----------------------------------------------------------------------------------------------

  struct Front {
    typename Queue::Storage queue;
    typename Ring::Storage ring;
    typename Ring::EmptyBarrier turn[MmaGroups];
    typename Up::FittingStages fitting;
    RouteCounter routes;
    Rows rows[kLists];
    int16_t expert[SM12X_LAYER_ROUTES];  // local one of each route, or -1
    int16_t found[Up::kTokensWarps][kTokens];
    float token_scale[kTokens];  // of few tokens
    uint32_t last[MmaGroups];    // strips of the piece in work that got their last rows: a bit each
    uint32_t tiles;              // of tokens, of all experts
  };
  static constexpr int kFrontBytes = (int(sizeof(Front)) + 1023) / 1024 * 1024;
  static constexpr int kSharedBytes = Up::kSharedBytes;
  static constexpr int kStages =
      (kSharedBytes - kFrontBytes) / (Up::kBoxes * Up::kBoxBytes + Up::kTokenBytes);
  static_assert(kStages >= 2);

  struct SharedMemory {
    Front front;
    alignas(1024) char stages[1];  // of each stage: weights, then tokens
  };
  static_assert(offsetof(SharedMemory, stages) == kFrontBytes);

  // -----------------------------------------------------------------------------------------------
  // Roles
  // -----------------------------------------------------------------------------------------------

  __device__ static sm12x_packed_params const& gemm_of(Params const& params, int phase) {
    return phase == 0 ? params.up.gemm : params.down;
  }
  __device__ static uint32_t* state_of(Params const& params) {
    return reinterpret_cast<uint32_t*>(params.state);
  }

  // All stages of a CTA are as long as the largest piece of either GEMM.
  __device__ static Stages set_stages(SharedMemory& shared, Ring& ring, PackedWork const& piece) {
    return Up::set_stages(shared.stages, ring, piece, shared.front.fitting);
  }

  // The next share, in lane 0.
  __device__ static uint32_t claim(uint32_t* word) {
    return threadIdx.x % 32 == 0 ? atomicAdd(word, 1) : 0;
  }
  __device__ static uint32_t from_first_lane(uint32_t value) {
    return __shfl_sync(0xffffffffu, value, 0);
  }

  // A warp that will not look at the state again.
  __device__ static void leave(Params const& params) {
    if (threadIdx.x % 32 == 0) {
      uint32_t* const state = state_of(params);
      uint32_t const warps = gridDim.x * (1 + Up::kTokensWarps);
      if (arch::add_acquire_release(state + kLeft, 1) + 1 == warps) {
        for (int word = 0; word < SM12X_LAYER_STATE; ++word) {
          state[word] = 0;
        }
      }
    }
  }

  // Warp 0. As PackedGemm::start and load_all_weights, but for shares that it claims.
  __device__ static void find_work(Params const& params, SharedMemory& shared, Ring& ring) {
    Front& front = shared.front;
    uint32_t* const state = state_of(params);
    uint32_t share = claim(state + kShares);
    RouteCounter::Ids const asked = RouteCounter::request(params.up, 0);
    Cuts cuts;
    cuts.prepare();
    front.routes.count(params.up, params.down.num_groups, asked,
                       [&](int route, int expert) { front.expert[route] = int16_t(expert); });
    share = from_first_lane(share);
    Queue queue(front.queue);
    typename Queue::State at = Queue::Ring::producer_start();
    State loaded = Ring::producer_start();
    uint32_t boxes = 0;
#pragma unroll 1
    for (int phase = 0; phase < 2; ++phase) {
      sm12x_packed_params const& gemm = gemm_of(params, phase);
      Schedule schedule(gemm, cuts);
      schedule.read_counts(front.routes.counts);
      if (phase == 0) {
        front.tiles = schedule.tiles();
        // Half the lanes for either GEMM.
        int const n = threadIdx.x % 2 == 0 ? params.up.gemm.n : params.down.n;
        boxes = schedule.largest_piece_of_all((n + kStrip - 1) / kStrip);
        boxes = max(boxes, __shfl_xor_sync(0xffffffffu, boxes, 1));
      } else {
        share = from_first_lane(claim(state + kShares + 1));
      }
      schedule.set_largest_piece(boxes);
#pragma unroll 1
      while (share < gridDim.x) {
        schedule.take(share);
        // As in PackedGemm::load_all_weights.
        Work work = {};
        bool has_work = false;
        bool is_first = true;
#pragma unroll 1
        for (bool goes_on = true; goes_on;) {
          work.piece.largest_piece = boxes;
          Stages const stages = set_stages(shared, ring, work.piece);
          int const middle = min(int(ring.stages()), work.piece.k_end);
          if (has_work) {
            load_weights(gemm, phase, ring, stages, work.piece, 0, middle, loaded, [&] {
              if (is_first) {
                queue.put(at, work);
              }
            });
            if (is_first) {
              queue.advance(at);
              is_first = false;
            }
          }
          Work following;
          following.phase = phase;
          schedule.next(following.piece);
          goes_on = __any_sync(0xffffffffu, following.piece.group >= 0);
          if (has_work && goes_on) {
            queue.hand_on(at, following);
          }
          if (has_work) {
            load_weights(gemm, phase, ring, stages, work.piece, middle, work.piece.k_end, loaded,
                         [] {});
          }
          work = following;
          has_work = true;
        }
        share = from_first_lane(claim(state + kShares + phase));
      }
    }
    Work none = {};
    none.piece.group = -1;
    none.piece.largest_piece = 1;
    queue.hand_on(at, none);
    leave(params);
  }

  template <class AfterFirst>
  __device__ static void load_weights(sm12x_packed_params const& gemm, int phase, Ring& ring,
                                      Stages const& stages, PackedWork const& piece, int k_begin,
                                      int k_end, State& loaded, AfterFirst const& after_first) {
    if (Gated && phase == 0) {
      Up::load_weights(gemm, ring, stages, piece, k_begin, k_end, loaded, after_first);
    } else {
      Down::load_weights(gemm, ring, stages, piece, k_begin, k_end, loaded, after_first);
    }
  }

  // The routes whose rows a piece has: lane i that of row i, -1 where there is none. Routes of an expert have its
  // rows in their order.
  __device__ static int find_routes(Params const& params, Front& front, PackedWork const& piece,
                                    int warp) {
    int const lane = threadIdx.x % 32;
    int16_t (&found)[kTokens] = front.found[warp];
    int seen = -piece.row;  // less than 0: in front of the piece
#pragma unroll 1
    for (int first = 0; first < params.up.routes; first += 32) {
      bool const mine =
          first + lane < params.up.routes && front.expert[first + lane] == piece.group;
      uint32_t const all = __ballot_sync(0xffffffffu, mine);
      int const row = seen + __popc(all & ((1u << lane) - 1));
      if (mine && row >= 0 && row < piece.rows) {
        found[row] = int16_t(first + lane);
      }
      seen += __popc(all);
    }
    __syncwarp();
    int const route = lane < piece.rows ? found[lane] : -1;
    __syncwarp();
    return route;
  }

  // Warps 1 and 2.
  __device__ static void feed_rows(Params const& params, SharedMemory& shared, Ring& ring,
                                   int warp) {
    if (params.type == SM12X_OUT_BFLOAT16) {
      feed_rows_as<__nv_bfloat16>(params, shared, ring, warp);
    } else {
      feed_rows_as<__half>(params, shared, ring, warp);
    }
  }

  template <class Element>
  __device__ static void feed_rows_as(Params const& params, SharedMemory& shared, Ring& ring,
                                      int warp) {
    Front& front = shared.front;
    int const lane = threadIdx.x % 32;
    Queue queue(front.queue);
    typename Queue::State at;
    State filled = Ring::producer_start();
    Feed const feed(warp);
    auto const* const weights = reinterpret_cast<float const*>(params.topk_weights);
    find_token_scales<Element>(params, front, feed);
    // Of the piece before: its rows, in lane i that of row i, and what is known of them.
    int group = -1;
    int first_row = 0;
    int phase = 0;
    int route = -1;
    float weight = 1.0f;
    float scale[Feed::kPasses];
    Element const* from[Feed::kPasses];
    typename Feed::Held held;
#pragma unroll 1
    for (int turn = 0;; turn = turn + 1 < kLists ? turn + 1 : 0) {
      Work const work = queue.take(at);
      PackedWork const& piece = work.piece;
      if (__any_sync(0xffffffffu, piece.group < 0)) {
        break;
      }
      Stages const stages = set_stages(shared, ring, piece);
      sm12x_packed_params const& gemm = gemm_of(params, work.phase);
      bool const holds = gemm.k <= Feed::kHeldTiles * kTileK;
      bool const needs_h = __any_sync(0xffffffffu, work.phase != phase);
      if (needs_h || __any_sync(0xffffffffu, piece.group != group || piece.row != first_row)) {
        group = piece.group;
        first_row = piece.row;
        phase = work.phase;
        route = find_routes(params, front, piece, warp);
        weight = phase == 1 && route >= 0 && weights != nullptr ? weights[route] : 1.0f;
        bool const knows_scales = phase == 0 && has_token_scales(params);
        int const row = phase == 0 ? max(route, 0) / params.top_k : max(route, 0);
#pragma unroll
        for (int pass = 0; pass < Feed::kPasses; ++pass) {
          int const of_pass = __shfl_sync(0xffffffffu, row, feed.row_of(pass));
          from[pass] = reinterpret_cast<Element const*>(gemm.a) + of_pass * gemm.stride_a;
          if (knows_scales) {
            scale[pass] = front.token_scale[of_pass];
          }
        }
        if (needs_h) {
          wait_for_up(params, front.tiles);
        }
        if (holds) {
          feed.template hold<Element>(piece.rows, from, gemm.k, held, scale);
        } else if (!knows_scales) {
          feed.template scales<Element>(piece.rows, from, gemm.k, scale);
        }
      }
      Rows& rows = front.rows[turn];
      if (warp == 0 && lane < kTokens) {
        rows.row[lane] = max(route, 0);
        rows.weight[lane] = weight;
      }
      if (lane % Feed::kLanes == 0) {
#pragma unroll
        for (int pass = 0; pass < Feed::kPasses; ++pass) {
          rows.scale[feed.row_of(pass)] = scale[pass];
        }
      }
      auto const to = [&](State const& state) { return stages.tokens(state); };
      if (holds) {
        feed.load_held(ring, piece, filled, to, held);
      } else {
        feed.load(ring, piece, filled, to, from, [&](int pass) { return scale[pass]; }, gemm.k);
      }
    }
    leave(params);
  }

  __device__ static bool has_token_scales(Params const& params) {
    return params.tokens <= kTokens && params.up.gemm.k > Feed::kHeldTiles * kTileK;
  }

  // Few tokens' scales, while nobody knows yet which of them are wanted.
  template <class Element>
  __device__ static void find_token_scales(Params const& params, Front& front, Feed const& feed) {
    if (!has_token_scales(params)) {
      return;
    }
    sm12x_packed_params const& gemm = params.up.gemm;
    Element const* from[Feed::kPasses];
    float scale[Feed::kPasses];
#pragma unroll
    for (int pass = 0; pass < Feed::kPasses; ++pass) {
      from[pass] = reinterpret_cast<Element const*>(gemm.a) +
                   min(feed.row_of(pass), params.tokens - 1) * gemm.stride_a;
    }
    feed.template scales<Element>(params.tokens, from, gemm.k, scale);
    if (threadIdx.x % Feed::kLanes == 0) {
#pragma unroll
      for (int pass = 0; pass < Feed::kPasses; ++pass) {
        front.token_scale[feed.row_of(pass)] = scale[pass];
      }
    }
    cutlass::arch::NamedBarrier::sync(32 * Up::kTokensWarps, MmaGroups);
  }

  // Until all of h is there, which running CTAs are at.
  __device__ static void wait_for_up(Params const& params, uint32_t tiles) {
    if (threadIdx.x % 32 == 0) {
      uint32_t const strips = uint32_t(params.up.gemm.n + kStrip - 1) / kStrip;
      uint32_t const all = tiles * strips;
      uint32_t const* const arrivals = state_of(params) + kArrivals;
      while (arch::load_relaxed(arrivals) < all) {
      }
      arch::acquire_all();
    }
    __syncwarp();
  }

  // MMA warps.
  __device__ static void multiply(Params const& params, SharedMemory& shared, Ring& ring,
                                  int mma_warp) {
    Front& front = shared.front;
    int const group = mma_warp / kGroupWarps;
    Queue queue(front.queue);
    typename Queue::State at;
    State state;
    int list = 0;
#pragma unroll 1
    for (int turn = 0;; ++turn, list = list + 1 < kLists ? list + 1 : 0) {
      Work const work = queue.take(at);
      PackedWork const& piece = work.piece;
      if (__any_sync(0xffffffffu, piece.group < 0)) {
        break;
      }
      Stages const stages = set_stages(shared, ring, piece);
      if (turn % MmaGroups != group) {
        ring.advance(state, piece.k_end);
        continue;
      }
      sm12x_packed_params const& gemm = gemm_of(params, work.phase);
      LayerChannels const channels = {{params.up.pair_stride, params.up.half_stride},
                                      Gated && work.phase == 0};
      Scales const scales(gemm, piece, Up::first_n(mma_warp), Up::first_m(mma_warp), channels,
                          front.rows[list]);
      typename Up::Accumulators accumulators = {};
      uint32_t const phase = turn / MmaGroups + (turn % MmaGroups == 0 ? 1 : 0);
      Up::accumulate(gemm.k, front.turn, ring, stages, piece, mma_warp, phase % 2, state,
                     accumulators);
      if (work.phase == 0) {
        typename Up::Store(scales, params.up).store(accumulators);
        cutlass::arch::NamedBarrier::sync(32 * kGroupWarps, group);
        if (threadIdx.x % (32 * kGroupWarps) == 0) {
          uint32_t const strips = uint32_t(piece.feature_end - piece.feature + kStrip - 1) / kStrip;
          arch::add_release(state_of(params) + kArrivals, strips);
        }
      } else {
        typename Down::Store(scales).store(accumulators);
        combine(params, front, piece, group);
      }
    }
    if (front.tiles == 0) {
      write_zeros(params, mma_warp);
    }
  }

  // Counts the piece's strips of y, and adds up those that are complete, for all tokens. All warps of a group.
  __device__ static void combine(Params const& params, Front& front, PackedWork const& piece,
                                 int group) {
    constexpr int kGroupThreads = 32 * kGroupWarps;
    static_assert(Up::kFeatures / kStrip <= 32, "a lane counts a strip");
    int const thread = threadIdx.x % kGroupThreads;
    int const first = piece.feature / kStrip;
    int const strips = (piece.feature_end - piece.feature + kStrip - 1) / kStrip;
    cutlass::arch::NamedBarrier::sync(kGroupThreads, group);
    if (thread < 32) {
      bool is_last = false;
      if (thread < strips) {
        uint32_t* const counter = state_of(params) + kStrips + first + thread;
        is_last = arch::add_acquire_release(counter, 1) + 1 == front.tiles;
        if (is_last) {
          *counter = 0;
        }
      }
      uint32_t const all = __ballot_sync(0xffffffffu, is_last);
      if (thread == 0) {
        front.last[group] = all;
      }
    }
    cutlass::arch::NamedBarrier::sync(kGroupThreads, group);
    uint32_t left = front.last[group];
    if (left == 0) {
      return;
    }
    if (params.type == SM12X_OUT_BFLOAT16) {
      combine_as<__nv_bfloat16>(params, front, first, left, thread, kGroupThreads);
    } else {
      combine_as<__half>(params, front, first, left, thread, kGroupThreads);
    }
  }

  // A thread takes 8 features of a token at a time.
  template <class Element>
  __device__ static void combine_as(Params const& params, Front const& front, int first,
                                    uint32_t strips, int thread, int threads) {
    int const chunks = 2 * __popc(strips);
#pragma unroll 1
    for (int at = thread; at < chunks * params.tokens; at += threads) {
      int const token = at / chunks;
      int const chunk = at % chunks;
      uint32_t rest = strips;
      for (int i = chunk / 2; i > 0; --i) {
        rest &= rest - 1;
      }
      int const feature = (first + __ffs(rest) - 1) * kStrip + chunk % 2 * 8;
      if (feature < params.down.n) {
        int const route = token * params.top_k;
        auto* const out = reinterpret_cast<Element*>(params.out) + token * params.stride_out;
        *reinterpret_cast<uint4*>(out + feature) = epilogue::combined_chunk(
            reinterpret_cast<Element const*>(params.down.d) + feature, params.down.stride_d,
            params.top_k, [&](int j) { return front.expert[route + j] >= 0 ? route + j : -1; });
      }
    }
  }

  // No route has a local expert.
  __device__ static void write_zeros(Params const& params, int mma_warp) {
    int const chunks = params.down.n / 8;
    int const threads = gridDim.x * Up::kMmaWarps * 32;
    for (int at = (blockIdx.x * Up::kMmaWarps + mma_warp) * 32 + threadIdx.x % 32;
         at < chunks * params.tokens; at += threads) {
      auto* const out = reinterpret_cast<uint16_t*>(params.out) + at / chunks * params.stride_out;
      *reinterpret_cast<uint4*>(out + at % chunks * 8) = {};
    }
  }

  // -----------------------------------------------------------------------------------------------
  // Body
  // -----------------------------------------------------------------------------------------------

  __device__ static void body(Params const& params, SharedMemory& shared) {
    int const warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    int const mma_warp = warp - Up::kProducerWarps;
    uint32_t bytes = arch::dynamic_shared_bytes();  // by all warps, as in PackedGemm
    arch::keep(bytes);
    Ring ring(shared.front.ring);
    if (warp == Up::kTokensWarp && cute::elect_one_sync()) {
#pragma unroll
      for (int map = 0; map < kWeightMaps; ++map) {
        arch::prefetch_tensor_map(&params.up.gemm.map_b[map]);
        arch::prefetch_tensor_map(&params.down.map_b[map]);
      }
      Up::init_barriers(shared.front.turn, ring, Queue(shared.front.queue), Up::kTokensWarps);
    }
    if (warp == Up::kTokensWarp + 1) {
      Up::find_fitting(bytes - kFrontBytes, shared.front.fitting);
    }
    if (warp == Up::kWeightsWarp) {
      shared.front.routes.clear(params.down.num_groups);
    }
    __syncthreads();
    if (Pdl) {
      arch::wait_on_prerequisite_grids();
      arch::launch_dependent_grids();
    }
    if (mma_warp >= 0) {
      cutlass::arch::warpgroup_reg_alloc<Up::kMmaRegisters>();
      multiply(params, shared, ring, mma_warp);
    } else {
      cutlass::arch::warpgroup_reg_dealloc<Up::kProducerRegisters>();
      if (warp == Up::kWeightsWarp) {
        find_work(params, shared, ring);
      } else if (warp < Up::kTokensWarp + Up::kTokensWarps) {
        feed_rows(params, shared, ring, warp - Up::kTokensWarp);
      }
    }
  }
};

}  // namespace sm12x::kernel
