/// The kernel layer of the families fp8_packed, fp8_up and fp8_down: grouped FP8 GEMM over stacked weights,
/// one launch a call. What tells them apart is in packed_operations.hpp.
///
/// Weights come through one tensor map, rows through another or, where a row index says which,
/// through 16-byte copies into the same swizzled layout. Nothing is rewritten, prepared or padded.
///
/// Roles, one warp each but for the MMA warps:
///   warp 0    finds the CTA's work (packed_scheduler.hpp), hands it to the others (work_queue.hpp) and
///             loads the weights: TMA
///   warp 1    tokens: TMA, or cp.async by all lanes, or quantised from 2-byte rows (packed_operations.hpp),
///             which an idle warp helps with where there is one
///   others    MMA and epilogue; with two MMA groups (pingpong) they take the CTA's tiles in turns, and
///             one group's epilogue hides behind the other's main loop
/// Registers: a multiprocessor has 65,536, and warps lie on four quarters of it.
///   one atom a warp  10 warps, at most three in a quarter         168 each at most
///   more             12 warps: 4 producers (2 idle) and 8 MMA      120 and 192 each (setmaxnreg), or as
///                                               an operation says: an activation takes some, and
///                                               so do codes that are held
///
/// A stage is complete when its bytes have landed and both producers have arrived; it is empty when
/// every MMA warp of the group that reads it has released it.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cute/numeric/integral_constant.hpp>
#include <cutlass/arch/reg_reconfig.h>
#include <sm12x/abi_packed.h>
#include <sm12x/arch/copy.hpp>
#include <sm12x/arch/grid.hpp>
#include <sm12x/collective/limits.hpp>
#include <sm12x/collective/warp_tile.hpp>
#include <sm12x/kernel/packed_operations.hpp>
#include <sm12x/kernel/packed_scheduler.hpp>
#include <sm12x/kernel/quantised_rows.hpp>
#include <sm12x/kernel/split_k.hpp>
#include <sm12x/kernel/stage_ring.hpp>
#include <sm12x/kernel/work_queue.hpp>

namespace sm12x::kernel {

/// What a variant chooses. Tile M, N on the kernel's own sides: under swap_ab M is features. Warps M, N:
/// how one MMA group's warps divide the tile.
template <class Operation_, class Mma_, int TileM_, int TileN_, int TileK_, bool SwapAb_,
          int WarpsM_, int WarpsN_, int MmaGroups_, bool Pdl_>
struct PackedConfig {
  using Operation = Operation_;
  using Mma = Mma_;
  static constexpr int kTileM = TileM_;
  static constexpr int kTileN = TileN_;
  static constexpr int kTileK = TileK_;
  static constexpr bool kSwapAb = SwapAb_;
  static constexpr int kWarpsM = WarpsM_;
  static constexpr int kWarpsN = WarpsN_;
  static constexpr int kMmaGroups = MmaGroups_;
  static constexpr bool kPdl = Pdl_;
};

/// Where the stages of a CTA lie: they are as long as its largest piece.
struct StagePlaces {
  uint32_t first;         ///< shared address
  uint32_t weight_bytes;  ///< of a stage, before its tokens
  uint32_t bytes;         ///< of a stage

  template <class State>
  __device__ uint32_t weights(State const& state) const {
    return first + state.index * bytes;
  }
  template <class State>
  __device__ uint32_t tokens(State const& state) const {
    return weights(state) + weight_bytes;
  }
};

template <class Config>
class PackedGemm {
 public:
  // -----------------------------------------------------------------------------------------------
  // Compile-time checks and types
  // -----------------------------------------------------------------------------------------------

  using Operation = typename Config::Operation;
  using Params = sm12x_packed_params;
  using Extra = typename Operation::Extra;
  static constexpr int log2(int power) { return power == 1 ? 0 : 1 + log2(power / 2); }
  static constexpr int kTokens = Config::kSwapAb ? Config::kTileN : Config::kTileM;
  static constexpr int kFeatures = Config::kSwapAb ? Config::kTileM : Config::kTileN;
  static constexpr int kTileK = Config::kTileK;
  static constexpr int kAtomsM = Config::kTileM / Config::kWarpsM / 16;
  static constexpr int kAtomsN = Config::kTileN / Config::kWarpsN / 8;
  static_assert(kAtomsM * Config::kWarpsM * 16 == Config::kTileM);
  static_assert(kAtomsN * Config::kWarpsN * 8 == Config::kTileN);
  static_assert(kTokens <= 256 && kFeatures <= 256, "a side of a TMA box is at most 256");

  static constexpr int kWeightsWarp = 0;
  static constexpr int kTokensWarp = 1;
  static constexpr int kGroupWarps = Config::kWarpsM * Config::kWarpsN;
  static constexpr int kMmaWarps = kGroupWarps * Config::kMmaGroups;
  // Large tiles have no registers left to hold scales through the main loop.
  static constexpr bool kHoldsScales = kAtomsM * kAtomsN < 8;
  // They, and two atoms with their scales, need more registers in the MMA warps than an equal share: the
  // producers are a warp group then, half of it idle, that gives its own away.
  static constexpr bool kMovesRegisters =
      kMmaWarps == 8 && (!kHoldsScales || kAtomsM * kAtomsN >= 2);
  static constexpr int kProducerWarps = kMovesRegisters ? 4 : 2;
  // Quantising takes more instructions than copying: one of the idle warps helps.
  static constexpr bool kQuantisesRows = Operation::kQuantisesRows;
  static constexpr int kTokensWarps =
      kQuantisesRows && kMovesRegisters && kTokens * kTileK >= 1024 ? 2 : 1;
  static constexpr int kThreads = 32 * (kProducerWarps + kMmaWarps);
  static constexpr int kMmaRegisters = Operation::mma_registers(Config::kSwapAb, kTokens);
  static constexpr int kProducerRegisters = 3 * 168 - 2 * kMmaRegisters;
  static_assert(kMmaRegisters % 8 == 0 && kProducerRegisters % 8 == 0, "what setmaxnreg takes");

  using Schedule = PackedSchedule<Config::kSwapAb, kTokens, kFeatures, kTileK, Operation::kStrip,
                                  Operation::kBounds>;
  // Under swap_ab a piece has any number of strips of features. It comes in boxes of 1, 2, 4, 8 and 16
  // strips, because TMA takes some 40 ns for a box however small (measured on an H200).
  static constexpr int kBoxFeatures = Config::kSwapAb ? Schedule::kStrip : kFeatures;
  static constexpr int kBoxes = kFeatures / kBoxFeatures;
  static constexpr int kWeightMaps = log2(kBoxes) + 1;
  static_assert(kWeightMaps <= SM12X_WEIGHT_MAPS);
  static constexpr int kBoxBytes = kBoxFeatures * kTileK;
  static constexpr int kTokenBytes = kTokens * kTileK;
  static constexpr int kSwizzleAtom = 8 * kTileK;  // bytes after which TMA's swizzle repeats
  static_assert(kBoxBytes % kSwizzleAtom == 0 && kTokenBytes % kSwizzleAtom == 0);
  static_assert(kBoxes <= 32, "a lane issues a box");

  static constexpr int kMostStages = 32;
  using Ring = StageRing<kMostStages>;
  using State = typename Ring::State;
  using Queue = WorkQueue<PackedWork, 4>;
  // Barriers and work lie in front of the stages. A launch may bring more shared memory than this, which a device
  // with more of it then fills with stages.
  struct FittingStages {
    uint32_t of_boxes[kBoxes];  // how many stages of i + 1 boxes fit behind the front
  };
  struct Front {
    typename Queue::Storage queue;
    typename Ring::Storage ring;
    typename Ring::EmptyBarrier turn[Config::kMmaGroups];  // of a group's main loop
    FittingStages fitting;
    typename Operation::Shared of_operation;
  };
  static constexpr int kFrontBytes = (int(sizeof(Front)) + 1023) / 1024 * 1024;
  static constexpr int kSharedBytes = detail::kSharedMemoryBytes;
  static constexpr int kStages = (kSharedBytes - kFrontBytes) / (kBoxes * kBoxBytes + kTokenBytes);
  static_assert(kStages >= 2, "two stages of this tile need more shared memory than SM12x has");

  // Unrolled over the ring, a loop with many MMAs has fewer other instructions; short ones would only grow.
  // On the sm_90a twin, whose fragments take more registers, it would spill.
  __device__ static constexpr int lap_stages() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1200
    return 0;
#else
    return Config::kSwapAb ? 0 : kStages;
#endif
  }

  // Atoms of a warp lie as far apart as the warps of the group reach together, so that a short piece
  // keeps all warps busy; 8-row atoms go in pairs.
  static constexpr int kStepM = 16 * Config::kWarpsM;
  static constexpr int kStepN = 16 * Config::kWarpsN;
  using Tile = collective::WarpTile<typename Config::Mma, kAtomsM, kAtomsN, kTileK, kStepM, kStepN,
                                    Config::kSwapAb>;
  using Accumulators = typename Tile::Accumulators;
  static constexpr int kValues = kAtomsM * kAtomsN * 4;
  using Split = SplitK<kValues, kGroupWarps>;
  using Store =
      typename Operation::template Store<Config::kSwapAb, kAtomsM, kAtomsN, kStepM, kStepN>;

  // -----------------------------------------------------------------------------------------------
  // Shared memory
  // -----------------------------------------------------------------------------------------------

  struct SharedMemory {
    Front front;
    alignas(1024) char stages[1];  // of each stage: weights, then tokens
  };
  static_assert(offsetof(SharedMemory, stages) == kFrontBytes);

  using Stages = StagePlaces;

  // -----------------------------------------------------------------------------------------------
  // Roles: what a warp does with one piece of work
  // -----------------------------------------------------------------------------------------------

  // K-tiles [k_begin, k_end) of a piece. One thread goes through them by itself: electing it for each costs
  // more than the loads. `after_first` is called by it once the first is on the way.
  template <class AfterFirst>
  __device__ static void load_weights(Params const& params, Ring& ring, Stages const& stages,
                                      PackedWork const& work, int k_begin, int k_end, State& state,
                                      AfterFirst const& after_first) {
    int const boxes = (work.feature_end - work.feature + kBoxFeatures - 1) / kBoxFeatures;
    // Weights that nobody reads again leave L2 first, so that bounds, rows and scales stay.
    arch::CachePolicy const policy =
        work.reads_once ? arch::CachePolicy::kEvictFirst : arch::CachePolicy::kEvictNormal;
    if (cute::elect_one_sync()) {
      State at = state;
#pragma unroll 1
      for (int k = k_begin; k < k_end; ++k) {
        ring.wait_empty(at);
        ring.arrive_and_expect(at, boxes * kBoxBytes);
        uint32_t to = stages.weights(at);
        int feature = work.feature;
#pragma unroll
        for (int map = kWeightMaps - 1; map >= 0; --map) {
          if (boxes >> map & 1) {
            Operation::load_weights(&params.map_b[map], ring.full_barrier(at), to, k * kTileK,
                                    feature, work.group, policy);
            to += kBoxBytes << map;
            feature += kBoxFeatures << map;
          }
        }
        if (k == k_begin) {
          after_first();
        }
        ring.advance(at);
      }
    }
    __syncwarp();
    ring.advance(state, k_end - k_begin);
  }

  // Goes through the CTA's work, loads the weights and hands every piece on: the first one once its first load is
  // on the way, because the MMA warps cannot use it before that has arrived; all others while the loads of the
  // one in front are, because with a row index the tokens warp has to look up its rows.
  __device__ static void load_all_weights(Params const& params, SharedMemory& shared, Ring& ring,
                                          Schedule& schedule) {
    Queue queue(shared.front.queue);
    typename Queue::State at = Queue::Ring::producer_start();
    State state = Ring::producer_start();
    PackedWork work;
    schedule.next(work);
    bool is_first = true;
    // A vote, so that the compiler sees that no warp diverges here.
    while (__any_sync(0xffffffffu, work.group >= 0)) {
      Stages const stages = set_stages(shared.stages, ring, work, shared.front.fitting);
      int const middle = min(work.k_begin + int(ring.stages()), work.k_end);
      load_weights(params, ring, stages, work, work.k_begin, middle, state, [&] {
        if (is_first) {
          queue.put(at, work);
        }
      });
      if (is_first) {
        queue.advance(at);
        is_first = false;
      }
      PackedWork following;
      schedule.next(following);
      queue.hand_on(at, following);
      load_weights(params, ring, stages, work, middle, work.k_end, state, [] {});
      work = following;
    }
    if (is_first) {
      queue.hand_on(at, work);
    }
  }

  // A stage is as long as the CTA's largest piece: short pieces have more of them.
  __device__ static Stages set_stages(char const* first, Ring& ring, PackedWork const& work,
                                      FittingStages const& fitting) {
    uint32_t const boxes = Config::kSwapAb ? work.largest_piece : 1;
    Stages stages;
    stages.first = arch::shared_address(first);
    stages.weight_bytes = boxes * kBoxBytes;
    stages.bytes = stages.weight_bytes + kTokenBytes;
    ring.set_stages(Config::kSwapAb ? fitting.of_boxes[boxes - 1] : kStages);
    return stages;
  }

  // A whole warp, before the CTA's first barrier: no division once the work is known. Bytes: behind the front.
  __device__ static void find_fitting(uint32_t bytes, FittingStages& fitting) {
    uint32_t const lane = threadIdx.x % 32;
    if (lane < kBoxes) {
      fitting.of_boxes[lane] =
          min(bytes / ((lane + 1) * kBoxBytes + kTokenBytes), uint32_t(kMostStages));
    }
  }

  // One thread, before the CTA's first barrier. Fillers: arrivals at a stage besides the weights'.
  template <class Queue>
  __device__ static void init_barriers(typename Ring::EmptyBarrier (&turns)[Config::kMmaGroups],
                                       Ring& ring, Queue queue, uint32_t fillers) {
#pragma unroll
    for (int group = 0; Config::kMmaGroups > 1 && group < Config::kMmaGroups; ++group) {
      turns[group].init(kGroupWarps);
    }
    ring.init(1 + fillers, kGroupWarps);
    queue.init(kTokensWarps + kMmaWarps);
  }

  __device__ static void load_tokens(Params const& params, Ring& ring, Stages const& stages,
                                     PackedWork const& work, State& state) {
    int const group = params.row_layout == SM12X_ROWS_MASKED ? work.group : 0;
    if (cute::elect_one_sync()) {
      State at = state;
#pragma unroll 1
      for (int k = work.k_begin; k < work.k_end; ++k) {
        ring.wait_empty(at);
        ring.arrive_and_expect(at, kTokenBytes);
        arch::load_box(&params.map_a, ring.full_barrier(at), stages.tokens(at), k * kTileK,
                       work.row, group, arch::CachePolicy::kEvictLast);
        ring.advance(at);
      }
    }
    __syncwarp();
    ring.advance(state, work.k_end - work.k_begin);
  }

  // The same into the same places, row by row. Lanes lie along k first: 16 bytes each.
  __device__ static void gather_tokens(Params const& params, Ring& ring, Stages const& stages,
                                       PackedWork const& work, State& state) {
    constexpr int kChunks = kTileK / 16;
    constexpr int kRowsAtOnce = 32 / kChunks;
    constexpr int kCopies = kTokens / kRowsAtOnce;  // of one lane, for one k-tile
    static_assert(kCopies * kRowsAtOnce == kTokens);
    int const lane = threadIdx.x % 32;
    int const chunk = lane % kChunks;
    int const first_row = lane / kChunks;
    auto const* const a = reinterpret_cast<char const*>(params.a);
    // Lane l holds rows l, l + 32, ... of a; -1 where there is none.
    constexpr int kHeld = (kTokens + 31) / 32;
    int held[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      int const row = lane + 32 * i;
      held[i] = row < work.rows ? int(indexed_row(params, work.row + row)) : -1;
    }
#pragma unroll 1
    for (int k = work.k_begin; k < work.k_end; ++k) {
      ring.wait_empty(state);
      uint32_t const to = stages.tokens(state);
      int const at = k * kTileK + chunk * 16;
      bool const inside = at < params.k;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        int const row = first_row + i * kRowsAtOnce;
        int const from = __shfl_sync(0xffffffffu, held[i * kRowsAtOnce / 32], row % 32);
        bool const valid = inside && from >= 0;
        arch::copy_16_bytes(to + Tile::swizzled(row, chunk),
                            valid ? a + from * params.stride_a + at : a, valid);
      }
      arch::arrive_on_copies(ring.full_barrier(state));
      ring.advance(state);
    }
  }

  // The main loop of a piece, of `k` values altogether. Pingpong: a group waits for its turn, or it could take a
  // stage of the ring's last round, which it did not see, for its own.
  __device__ static void accumulate(int k, typename Ring::EmptyBarrier* turns, Ring& ring,
                                    Stages const& stages, PackedWork const& work, int mma_warp,
                                    uint32_t turn_phase, State& state, Accumulators& accumulators) {
    int const mma_group = mma_warp / kGroupWarps;
    int const warp_m = mma_warp % kGroupWarps % Config::kWarpsM;
    uint32_t const tokens = stages.first + stages.weight_bytes;
    typename Tile::Stages const operands = {Config::kSwapAb ? stages.first : tokens,
                                            Config::kSwapAb ? tokens : stages.first, stages.bytes};
    Tile const tile(first_m(mma_warp), first_n(mma_warp), work.feature_end - work.feature);
    int const count = work.k_end - work.k_begin;
    int const k_left = k - (work.k_end - 1) * kTileK;  // of the last k-tile and behind it
    int const last_blocks =
        k_left < kTileK ? (k_left + Tile::kBlockK - 1) / Tile::kBlockK : Tile::kBlocks;
    auto run = [&](auto active_m, auto active_n) {
      tile.template run<decltype(active_m)::value, decltype(active_n)::value, lap_stages()>(
          ring, state, operands, count, last_blocks, accumulators);
    };
    if constexpr (Config::kMmaGroups > 1) {
      turns[mma_group].wait(turn_phase);
    }
    dispatch(work, warp_m, run);
    if constexpr (Config::kMmaGroups > 1) {
      if (cute::elect_one_sync()) {
        turns[(mma_group + 1) % Config::kMmaGroups].arrive();
      }
    }
  }

  // Where an MMA warp's part of a tile begins, on the kernel's own sides.
  __device__ static int first_m(int mma_warp) {
    return mma_warp % kGroupWarps % Config::kWarpsM * 16;
  }
  __device__ static int first_n(int mma_warp) {
    return mma_warp % kGroupWarps / Config::kWarpsM * 16;
  }

  __device__ static void multiply(Params const& params, Extra const& extra, SharedMemory& shared,
                                  Ring& ring, Stages const& stages, PackedWork const& work,
                                  int mma_warp, uint32_t turn_phase, State& state) {
    auto request_scales = [&] {
      int const at_m = first_m(mma_warp);
      int const at_n = first_n(mma_warp);
      return Store(params, extra, work, Config::kSwapAb ? at_n : at_m,
                   Config::kSwapAb ? at_m : at_n);
    };
    auto const early = [&] {
      if constexpr (kHoldsScales) {
        return request_scales();
      } else {
        return 0;
      }
    }();
    Accumulators accumulators = {};
    accumulate(params.k, shared.front.turn, ring, stages, work, mma_warp, turn_phase, state,
               accumulators);
    int const k_tiles = (params.k + kTileK - 1) / kTileK;
    if (work.k_end - work.k_begin < k_tiles) {
      Split const split(params, mma_warp % kGroupWarps);
      if (!split.finishes(work.run_of(work.first_unit), work.run_of(work.first_unit + k_tiles - 1),
                          blockIdx.x, reinterpret_cast<float (&)[kValues]>(accumulators))) {
        return;
      }
    }
    if constexpr (kHoldsScales) {
      early.store(accumulators);
    } else {
      request_scales().store(accumulators);
    }
  }

  // -----------------------------------------------------------------------------------------------
  // Body
  // -----------------------------------------------------------------------------------------------

  __device__ static void body(Params const& params, Extra const& extra, SharedMemory& shared) {
    int const warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    int const mma_warp = warp - kProducerWarps;
    bool const gathers = !kQuantisesRows && params.row_index != 0;
    constexpr bool kFindsEarly = Operation::kLoadsWeightsEarly;
    typename Operation::Asked asked;
    if (kFindsEarly && warp == kWeightsWarp) {
      asked = Operation::ask(extra);
    }
    Ring ring(shared.front.ring);
    if (warp == kTokensWarp) {
      make_barriers(params, shared, ring, gathers);
    }
    Cuts cuts;
    if (warp == kWeightsWarp) {
      cuts.prepare();
    }
    Schedule schedule(params, cuts);
    if (kFindsEarly && warp == kWeightsWarp) {
      // Bounds are on their way while another warp makes the barriers. Where they may come from the grid in front,
      // that one's end hides the barriers anyhow.
      start(params, extra, shared, schedule, asked);
    }
    // By all warps: those that release stages need it too (arch::zero_once_known), and would look it up each time.
    uint32_t bytes = arch::dynamic_shared_bytes();
    arch::keep(bytes);
    if (warp == kTokensWarp) {
      find_fitting(bytes - kFrontBytes, shared.front.fitting);
    }
    __syncthreads();
    auto work_on = [&](auto roles) {
      work<decltype(roles)::value>(params, extra, shared, ring, schedule, warp);
    };
    if constexpr (!kMovesRegisters) {
      work_on(cute::Int<kAllRoles>{});
    } else if (mma_warp < 0) {
      cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
      work_on(cute::Int<kProducers>{});
    } else {
      cutlass::arch::warpgroup_reg_alloc<kMmaRegisters>();
      work_on(cute::Int<kMma>{});
    }
  }

 private:
  // The weights warp finds out what the CTA's work is.
  __device__ static void start(Params const& params, Extra const& extra, SharedMemory& shared,
                               Schedule& schedule, typename Operation::Asked const& asked) {
    Operation::read_bounds(params, extra, shared.front.of_operation, asked, schedule);
    schedule.take(blockIdx.x);
  }

  // One warp, of which one thread does it: uniform instructions make mbarriers and fetch maps, and a warp's lanes would
  // take turns at them, for two microseconds (measured on an H200).
  __device__ static void make_barriers(Params const& params, SharedMemory& shared, Ring& ring,
                                       bool gathers) {
    if (cute::elect_one_sync()) {
#pragma unroll
      for (int map = 0; map < kWeightMaps; ++map) {
        arch::prefetch_tensor_map(&params.map_b[map]);
      }
      if (!gathers && !kQuantisesRows) {
        arch::prefetch_tensor_map(&params.map_a);
      }
      init_barriers(shared.front.turn, ring, Queue(shared.front.queue),
                    gathers ? 32 : kTokensWarps);
    }
  }

  // Which roles a copy of the loop over the CTA's work serves: all, or those of one warp group, whose
  // registers then are its own.
  static constexpr int kAllRoles = 0;
  static constexpr int kProducers = 1;
  static constexpr int kMma = 2;

  template <int Roles>
  __device__ static void work(Params const& params, Extra const& extra, SharedMemory& shared,
                              Ring& ring, Schedule& schedule, int warp) {
    // Masked where it cannot be negative: knowing that spares large tiles a register.
    static_assert(!kMovesRegisters || kMmaWarps == 8);
    int const mma_warp = (warp - kProducerWarps) & (Roles == kMma ? 7 : -1);
    if (Roles == kProducers && warp >= kTokensWarp + kTokensWarps) {
      return;
    }
    bool const is_early = (Operation::kLoadsWeightsEarly || params.flags & SM12X_EARLY_WEIGHTS) &&
                          warp == kWeightsWarp;
    if (Config::kPdl && !is_early) {
      arch::wait_on_prerequisite_grids();
      arch::launch_dependent_grids();
    }
    if (Roles != kMma && warp == kWeightsWarp) {
      if constexpr (!Operation::kLoadsWeightsEarly) {
        start(params, extra, shared, schedule, Operation::ask(extra));
      }
      load_all_weights(params, shared, ring, schedule);
      return;
    }
    using Rows = QuantisedRows<Tile, kTokens, kTileK, kTokensWarps>;
    typename Operation::template HeldRows<Rows> held;
    Queue queue(shared.front.queue);
    typename Queue::State at;
    State state = Roles != kMma && mma_warp < 0 ? Ring::producer_start() : State{};
    for (int turn = 0;; ++turn) {
      PackedWork const work = queue.take(at);
      if (__any_sync(0xffffffffu, work.group < 0)) {
        break;
      }
      Stages const stages = set_stages(shared.stages, ring, work, shared.front.fitting);
      if (Roles != kMma && mma_warp < 0) {
        if constexpr (kQuantisesRows) {
          Operation::load_rows(Rows(warp - kTokensWarp), extra, ring, work, state, held,
                               [&](State const& at) { return stages.tokens(at); });
        } else if (params.row_index != 0) {
          gather_tokens(params, ring, stages, work, state);
        } else {
          load_tokens(params, ring, stages, work, state);
        }
      } else if (Roles != kProducers) {
        if (Config::kMmaGroups == 1 || turn % Config::kMmaGroups == mma_warp / kGroupWarps) {
          // The first group's first turn is there from the start.
          uint32_t const phase =
              turn / Config::kMmaGroups + (turn % Config::kMmaGroups == 0 ? 1 : 0);
          multiply(params, extra, shared, ring, stages, work, mma_warp, phase % 2, state);
        } else {
          ring.advance(state, work.k_end - work.k_begin);
        }
      }
    }
  }

  // Calls `run` with the atoms that hold something of the piece. Under swap_ab: of the m side those with
  // features, none perhaps (the warp then only hands the stages on); of a wide n side those with
  // tokens, in steps of two.
  template <class Run>
  __device__ static void dispatch(PackedWork const& work, int warp_m, Run const& run) {
    if constexpr (!Config::kSwapAb) {
      run(cute::Int<kAtomsM>{}, cute::Int<kAtomsN>{});
    } else {
      int const atoms = (work.feature_end - work.feature + 15) / 16;
      int const active = (atoms - warp_m + Config::kWarpsM - 1) / Config::kWarpsM;
      dispatch_m<kAtomsM>(active, work.rows, run);
    }
  }

  template <int ActiveM, class Run>
  __device__ static void dispatch_m(int active, int rows, Run const& run) {
    if constexpr (ActiveM == 0) {
      run(cute::Int<0>{}, cute::Int<0>{});
    } else if (active >= ActiveM) {
      dispatch_n<ActiveM, (kAtomsN < 8 ? kAtomsN : 2)>(rows, run);
    } else {
      dispatch_m<ActiveM - 1>(active, rows, run);
    }
  }

  template <int ActiveM, int ActiveN, class Run>
  __device__ static void dispatch_n(int rows, Run const& run) {
    if constexpr (ActiveN >= kAtomsN) {
      run(cute::Int<ActiveM>{}, cute::Int<kAtomsN>{});
    } else if (rows <= ActiveN * 8) {
      run(cute::Int<ActiveM>{}, cute::Int<ActiveN>{});
    } else {
      dispatch_n<ActiveM, ActiveN + 2>(rows, run);
    }
  }
};

}  // namespace sm12x::kernel
