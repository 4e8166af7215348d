/// Epilogue schedules of our own for SM120 ptr-array kernels, and their CollectiveBuilder.
///
///   schedule                                                   stores D        C
///   cutlass::epilogue::collective::EpilogueScheduleAuto,
///   cutlass::epilogue::PtrArrayTmaWarpSpecialized
///       {Cooperative,Pingpong}   (CUTLASS's builder)           TMA             TMA, see PtrArrayTma
///   sm12x::epilogue::PtrArrayTma                               TMA             TMA
///   sm12x::epilogue::PtrArrayDirect                            registers       registers
///   cutlass::epilogue::PtrArrayNoSmemWarpSpecialized,
///       below CUTLASS 4.6                                      as PtrArrayDirect
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/dispatch_policy.hpp>

#include "sm12x/collective/limits.hpp"
#include "sm12x/epilogue/direct_store.hpp"

namespace sm12x::epilogue {

/// Schedule: CUTLASS's TMA epilogue, with every load of C drained before the tensor map of C may
/// change. CUTLASS's own ptr-array epilogue rewrites that map for the next group while loads of the
/// last tile may still be reading it. Without C the two are the same.
struct PtrArrayTma {};

/// Schedule: no shared memory and no TMA, see direct_store.hpp. C and D of any alignment.
struct PtrArrayDirect {};

namespace detail {
// As plain integers: g++ takes no CuTe integer where an alias template needs a number.
template <class Shape, int Mode>
inline constexpr int extent_v = decltype(cute::size<Mode>(cute::declval<Shape>()))::value;
template <class TileShape>
inline constexpr bool is_narrow_v = extent_v<TileShape, 1> < 32;
}  // namespace detail

/// Epilogue tile for tiles narrower than the 64x32 that EpilogueTileAuto stands for: the MMA warps
/// of such a tile lie along M, up to 128 rows.
template <class TileShape>
using NarrowTile = cute::Shape<cute::Int<cute::min(detail::extent_v<TileShape, 0>, 128)>,
                               cute::Int<detail::extent_v<TileShape, 1>>>;

namespace detail {

// EpilogueTileAuto as these schedules understand it.
template <class EpilogueTile, class TileShape>
using ResolvedTile = cute::conditional_t<
    cute::is_same_v<EpilogueTile, cutlass::epilogue::collective::EpilogueTileAuto>,
    cute::conditional_t<is_narrow_v<TileShape>, NarrowTile<TileShape>,
                        cute::Shape<cute::_64, cute::_32>>,
    EpilogueTile>;

/// A TMA epilogue whose loads of C have landed when load() returns.
template <class Base>
class DrainedSource : public Base {
 public:
  using LoadPipeline = typename Base::LoadPipeline;
  using LoadPipelineState = typename Base::LoadPipelineState;
  using Base::Base;

  template <class... Args>
  CUTLASS_DEVICE LoadPipelineState load(LoadPipeline pipeline, LoadPipelineState state,
                                        Args&&... args) {
    LoadPipelineState const next = Base::load(pipeline, state, args...);
    // The last use of every stage: earlier ones have been waited for by the consumers that released
    // the stage.
    constexpr uint32_t kStages = LoadPipelineState::Stages;
    uint32_t const issued = next.count() - state.count();
    if (issued > kStages) {
      state.advance(issued - kStages);
    }
    while (state.count() != next.count()) {
      // A producer's state begins in the other phase than a consumer's. Waiting for the producer's
      // would wait for the load after this one, which only this warp could issue. The barrier itself:
      // without NDEBUG the pipeline's own wait traps in a producer warp.
      cutlass::arch::ClusterBarrier::wait(pipeline.producer_get_barrier(state), state.phase() ^ 1);
      ++state;
    }
    return next;
  }
};

template <class Schedule>
inline constexpr bool is_direct_v =
    cute::is_same_v<Schedule, PtrArrayDirect> ||
    (SM12X_BUILDS_UPSTREAM_TAGS &&
     cute::is_same_v<Schedule, cutlass::epilogue::PtrArrayNoSmemWarpSpecialized>);

}  // namespace detail
}  // namespace sm12x::epilogue

namespace cutlass::epilogue::collective {

template <class OpClass, class TileShape_MNK, class ClusterShape_MNK, class EpilogueTileType,
          class ElementAccumulator, class ElementCompute, class ElementC, class GmemLayoutTagC,
          int AlignmentC, class ElementD, class GmemLayoutTagD, int AlignmentD,
          class FusionOperation>
struct CollectiveBuilder<arch::Sm120, OpClass, TileShape_MNK, ClusterShape_MNK, EpilogueTileType,
                         ElementAccumulator, ElementCompute, ElementC, GmemLayoutTagC, AlignmentC,
                         ElementD, GmemLayoutTagD, AlignmentD, ::sm12x::epilogue::PtrArrayTma,
                         FusionOperation, void> {
  // What CUTLASS takes for a tile that is not narrow stays CUTLASS's choice.
  using EpilogueTile =
      cute::conditional_t<::sm12x::epilogue::detail::is_narrow_v<TileShape_MNK>,
                          ::sm12x::epilogue::detail::ResolvedTile<EpilogueTileType, TileShape_MNK>,
                          EpilogueTileType>;
  using StrideD = cute::remove_pointer_t<cutlass::detail::TagToStrideC_t<GmemLayoutTagD>>;
  using StoredTile = ::sm12x::epilogue::detail::ResolvedTile<EpilogueTileType, TileShape_MNK>;
  static_assert(::sm12x::epilogue::detail::is_narrow_v<TileShape_MNK> ||
                    (::sm12x::epilogue::detail::extent_v<StoredTile, 0> % 64 == 0 &&
                     ::sm12x::epilogue::detail::extent_v<StoredTile, 1> % 32 == 0),
                "sm12x: an epilogue tile must be a multiple of 64x32, to hold whole MMA tiles");
  static_assert(
      cute::size<cutlass::detail::is_major<0>(StrideD{}) ? 0 : 1>(StoredTile{}) *
              cute::sizeof_bits_v<ElementD> >=
          128,
      "sm12x: a TMA epilogue stores at least 16 bytes of a row; take PtrArrayDirect for a "
      "narrower tile");
  using Upstream =
      typename CollectiveBuilder<arch::Sm120, OpClass, TileShape_MNK, ClusterShape_MNK,
                                 EpilogueTile, ElementAccumulator, ElementCompute, ElementC,
                                 GmemLayoutTagC, AlignmentC, ElementD, GmemLayoutTagD, AlignmentD,
                                 EpilogueScheduleAuto, FusionOperation>::CollectiveOp;
  using CollectiveOp = cute::conditional_t<cute::is_void_v<ElementC>, Upstream,
                                           ::sm12x::epilogue::detail::DrainedSource<Upstream>>;
};

template <class OpClass, class TileShape_MNK, class ClusterShape_MNK, class EpilogueTileType,
          class ElementAccumulator, class ElementCompute, class ElementC, class GmemLayoutTagC_,
          int AlignmentC, class ElementD, class GmemLayoutTagD, int AlignmentD, class Schedule,
          class FusionOperation>
struct CollectiveBuilder<arch::Sm120, OpClass, TileShape_MNK, ClusterShape_MNK, EpilogueTileType,
                         ElementAccumulator, ElementCompute, ElementC, GmemLayoutTagC_, AlignmentC,
                         ElementD, GmemLayoutTagD, AlignmentD, Schedule, FusionOperation,
                         cute::enable_if_t<::sm12x::epilogue::detail::is_direct_v<Schedule>>> {
  static_assert(cute::size(ClusterShape_MNK{}) == 1,
                "sm12x: SM12x has no clusters larger than 1x1x1");
  static_assert(
      !::sm12x::epilogue::detail::OperationNeedsTmaEpilogue<FusionOperation>::value,
      "sm12x: the direct-store epilogue runs no fusion node that stores or loads a tensor beside C "
      "and D, or reduces over the output; take a TMA epilogue schedule");

  using GmemLayoutTagC =
      cute::conditional_t<cute::is_void_v<ElementC>, GmemLayoutTagD, GmemLayoutTagC_>;
  using EpilogueTile = ::sm12x::epilogue::detail::ResolvedTile<EpilogueTileType, TileShape_MNK>;
  static_assert(cute::size<0>(TileShape_MNK{}) % cute::size<0>(EpilogueTile{}) == 0 &&
                    cute::size<1>(TileShape_MNK{}) % cute::size<1>(EpilogueTile{}) == 0,
                "sm12x: the epilogue tile must divide the tile");
  // Fusions are looked up under CUTLASS's ptr-array policy; of it they use the fragment size alone.
  using FusionCallbacks =
      typename detail::CallbacksBuilder<Sm120PtrArrayTmaWarpSpecialized<1, 1, 4, false, false, 2>,
                                        FusionOperation, TileShape_MNK, EpilogueTile,
                                        ElementAccumulator>::Callbacks;

  using CollectiveOp =
      ::sm12x::epilogue::DirectStore<TileShape_MNK, EpilogueTile, ElementC,
                                     cutlass::detail::TagToStrideC_t<GmemLayoutTagC>, AlignmentC,
                                     ElementD, cutlass::detail::TagToStrideC_t<GmemLayoutTagD>,
                                     AlignmentD, FusionCallbacks>;
};

}  // namespace cutlass::epilogue::collective
