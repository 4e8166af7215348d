/// What a kernel of the packed layer computes: a product as it is, or one of an expert layer's two.
///
/// An expert layer's kernels find their work and load weights before the grid in front of them has ended, as
/// programmatic dependent launch allows for what that one does not write. Their bounds come from further ahead,
/// or from the routes.
///
/// An operation says what its launch has beyond sm12x_packed_params (Extra), how the weights come and in what
/// units of features they are shared out, where the rows come from, and which epilogue stores.
#pragma once

#include <cstdint>

#include <sm12x/abi_moe.h>
#include <sm12x/abi_packed.h>
#include <sm12x/arch/copy.hpp>
#include <sm12x/arch/grid.hpp>
#include <sm12x/epilogue/activation_store.hpp>
#include <sm12x/epilogue/quantise.hpp>
#include <sm12x/epilogue/row_store.hpp>
#include <sm12x/kernel/packed_scheduler.hpp>
#include <sm12x/kernel/route_counter.hpp>

namespace sm12x::kernel {

/// What operations have that say nothing else: bounds that are there, no codes that are held, weights as they lie.
struct PlainOperation {
  struct Shared {};
  template <class>
  struct HeldRows {};

  // What the warp that finds the work asks for first of all, and then tells the schedule. A whole warp.
  struct Asked {};
  template <class Extra>
  __device__ static Asked ask(Extra const&) {
    return {};
  }
  template <class Extra, class Schedule>
  __device__ static void read_bounds(sm12x_packed_params const& params, Extra const&, Shared&,
                                     Asked const&, Schedule& schedule) {
    schedule.read_bounds(reinterpret_cast<void const*>(params.bounds), params.bounds_are_64_bit);
  }

  __device__ static void load_weights(void const* map, uint32_t barrier, uint32_t to, int k,
                                      int feature, int group, arch::CachePolicy policy) {
    arch::load_box(map, barrier, to, k, feature, group, policy);
  }
};

/// The weights of GEMM1. Gated: w1 has gates and ups.
template <bool Gated>
struct FirstWeights {
  __device__ static void load_weights(void const* map, uint32_t barrier, uint32_t to, int k,
                                      int feature, int group, arch::CachePolicy policy) {
    if constexpr (Gated) {
      arch::load_paired_box(map, barrier, to, k, feature / 16, group, policy);
    } else {
      arch::load_box(map, barrier, to, k, feature, group, policy);
    }
  }
};

/// D = rows x weights (family fp8_packed).
struct Product : PlainOperation {
  struct Extra {};
  static constexpr int kStrip = 8;  // features that stay together
  static constexpr bool kQuantisesRows = false;
  // Of MMA warps, where registers move to them from the producers.
  static constexpr int mma_registers(bool, int) { return 192; }
  static constexpr bool kLoadsWeightsEarly = false;
  static constexpr Bounds kBounds = Bounds::kGiven;

  template <bool SwapAb, int AtomsM, int AtomsN, int StepM, int StepN>
  struct Store : epilogue::RowStore<SwapAb, AtomsM, AtomsN, StepM, StepN> {
    using Base = epilogue::RowStore<SwapAb, AtomsM, AtomsN, StepM, StepN>;
    __device__ Store(sm12x_packed_params const& params, Extra const&, PackedWork const& work,
                     int token, int feature)
        : Base(params, work, token, feature, epilogue::OwnChannels{}) {}
  };
};

/// GEMM1 with its activation (family fp8_up).
template <bool Gated>
struct Up : PlainOperation, FirstWeights<Gated> {
  using Extra = sm12x_up_params;
  static constexpr int kStrip = Gated ? 16 : 8;  // 8 gates and their ups
  static constexpr bool kQuantisesRows = false;
  // An activation takes some, whichever way; with these no target spills.
  static constexpr int mma_registers(bool swap_ab, int) { return swap_ab ? 184 : 200; }
  static constexpr bool kLoadsWeightsEarly = true;
  static constexpr Bounds kBounds = Bounds::kGivenOrCounted;
  using Shared = RouteCounter;
  using FirstWeights<Gated>::load_weights;

  using Asked = RouteCounter::Ids;
  __device__ static Asked ask(Extra const& up) { return RouteCounter::request(up, 0); }
  template <class Schedule>
  __device__ static void read_bounds(sm12x_packed_params const& params, Extra const& up,
                                     Shared& shared, Asked const& asked, Schedule& schedule) {
    if (up.topk_ids == 0) {
      arch::wait_on_prerequisite_grids();
      schedule.read_bounds(reinterpret_cast<void const*>(params.bounds), params.bounds_are_64_bit);
      return;
    }
    shared.clear(params.num_groups);
    shared.count(up, params.num_groups, asked, [](int, int) {});
    schedule.read_counts(shared.counts);
  }

  template <bool SwapAb, int AtomsM, int AtomsN, int StepM, int StepN>
  using Store = epilogue::ActivationStore<Gated, SwapAb, AtomsM, AtomsN, StepM, StepN>;
};

/// GEMM2 on rows that it quantises itself (family fp8_down).
struct Down : PlainOperation {
  using Extra = sm12x_down_params;
  static constexpr int kStrip = 8;
  static constexpr bool kQuantisesRows = true;
  // The codes of 16 rows are held, in as many registers as the producers get then.
  static constexpr int mma_registers(bool, int tokens) { return tokens == 16 ? 168 : 192; }
  static constexpr bool kLoadsWeightsEarly = true;
  static constexpr Bounds kBounds = Bounds::kGiven;

  // The codes of the rows that a warp had last: pieces of the same rows follow each other.
  template <class Rows>
  struct HeldRows {
    int group = -1;
    int row;
    typename Rows::Held codes;
  };

  // One warp's share of the rows of a piece, as `rows` (QuantisedRows) divides them.
  template <class Rows, class Ring, class State, class To>
  __device__ static void load_rows(Rows const& rows, Extra const& down, Ring& ring,
                                   PackedWork const& work, State& state, HeldRows<Rows>& held,
                                   To const& to) {
    if (down.a_type == SM12X_OUT_BFLOAT16) {
      load_rows_as<__nv_bfloat16>(rows, down, ring, work, state, held, to);
    } else {
      load_rows_as<__half>(rows, down, ring, work, state, held, to);
    }
  }

  template <bool SwapAb, int AtomsM, int AtomsN, int StepM, int StepN>
  struct Store : epilogue::RowStore<SwapAb, AtomsM, AtomsN, StepM, StepN> {
    using Base = epilogue::RowStore<SwapAb, AtomsM, AtomsN, StepM, StepN>;
    __device__ Store(sm12x_packed_params const& params, Extra const& down, PackedWork const& work,
                     int token, int feature)
        : Base(params, work, token, feature, epilogue::OwnChannels{},
               reinterpret_cast<float const*>(down.row_maxima)) {}
    __device__ void store(typename Base::Accumulators& accumulators) const {
      Base::store(accumulators, [](float maximum) { return epilogue::scale_of_maximum(maximum); });
    }
  };

 private:
  template <class Element, class Rows, class Ring, class State, class To>
  __device__ static void load_rows_as(Rows const& rows, Extra const& down, Ring& ring,
                                      PackedWork const& work, State& state, HeldRows<Rows>& held,
                                      To const& to) {
    sm12x_packed_params const& gemm = down.gemm;
    // Few rows are quantised anew for every piece without anybody waiting for it; holding them delays a run's
    // first piece by half a microsecond.
    constexpr bool kHolds = Rows::kHolds && Rows::kPasses > 2;
    // With split-K a piece may be a part of the k-tiles.
    bool const holds = kHolds && gemm.k <= Rows::kHeldTiles * Rows::kTileK && gemm.least_units == 0;
    bool const has_them =
        holds && __all_sync(0xffffffffu, work.group == held.group && work.row == held.row);
    Element const* from[Rows::kPasses];
    float maximum[Rows::kPasses];
#pragma unroll
    for (int pass = 0; !has_them && pass < Rows::kPasses; ++pass) {
      int const row = work.row + min(rows.row_of(pass), work.rows - 1);
      from[pass] = reinterpret_cast<Element const*>(gemm.a) + int64_t(row) * gemm.stride_a;
      maximum[pass] = __ldcg(reinterpret_cast<float const*>(down.row_maxima) + row);
    }
    auto const scale_of = [&](int pass) { return epilogue::scale_of_maximum(maximum[pass]); };
    if constexpr (kHolds) {
      if (holds && !has_them) {
        rows.hold(work.rows, from, gemm.k, held.codes, scale_of);
        held.group = work.group;
        held.row = work.row;
      }
      if (holds) {
        rows.load_held(ring, work, state, to, held.codes);
        return;
      }
    }
    rows.load(ring, work, state, to, from, scale_of, gemm.k);
  }
};

}  // namespace sm12x::kernel
