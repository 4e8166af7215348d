/// Epilogue without shared memory: every thread reads C and writes D where its accumulators belong.
///
/// For outputs that TMA cannot describe: rows of any length, leading dimensions of any alignment,
/// and tiles that need all shared memory for their stages. A store covers at most two elements, so
/// wide outputs are better served by the TMA epilogue.
#pragma once

#include <cute/algorithm/functional.hpp>
#include <cute/tensor.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/detail.hpp>
#include <cutlass/epilogue/dispatch_policy.hpp>
#include <cutlass/epilogue/fusion/callbacks.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>
#include <cutlass/numeric_conversion.h>
#include <cutlass/pipeline/pipeline.hpp>

namespace sm12x::epilogue {

namespace detail {

// Nodes that move tiles of their own through shared memory, or reduce over the output, do part of
// their work in callbacks that belong to the TMA epilogue.
template <class Node, class = void>
inline constexpr bool stores_aux_v = false;
template <class Node>
inline constexpr bool stores_aux_v<
    Node, cute::void_t<decltype(cute::declval<typename Node::Params>().tma_store_aux)>> = true;
template <class Node, class = void>
inline constexpr bool loads_aux_v = false;
template <class Node>
inline constexpr bool
    loads_aux_v<Node, cute::void_t<decltype(cute::declval<typename Node::Params>().tma_load_aux)>> =
        true;
template <class Node, class = void>
inline constexpr bool reduces_v = false;
template <class Node>
inline constexpr bool reduces_v<
    Node, cute::void_t<decltype(cute::declval<typename Node::Params>().reduction_identity)>> = true;

template <class Node>
struct NeedsTmaEpilogue {
  static constexpr bool value = stores_aux_v<Node> || loads_aux_v<Node> || reduces_v<Node>;
};
template <class Node, class... Children>
struct NeedsTmaEpilogue<cutlass::epilogue::fusion::Sm90TreeVisitor<Node, Children...>> {
  static constexpr bool value =
      NeedsTmaEpilogue<Node>::value || (false || ... || NeedsTmaEpilogue<Children>::value);
};

template <class... Trees>
struct NeedsTmaEpilogue<cutlass::epilogue::fusion::Sm90SplitTreeVisitor<Trees...>> {
  static constexpr bool value = (false || ... || NeedsTmaEpilogue<Trees>::value);
};
template <class ElementCompute, class Edges, class... Nodes>
struct NeedsTmaEpilogue<
    cutlass::epilogue::fusion::Sm90TopologicalVisitor<ElementCompute, Edges, Nodes...>> {
  static constexpr bool value = (false || ... || NeedsTmaEpilogue<Nodes>::value);
};

template <class Operation,
          bool = cute::is_base_of_v<cutlass::epilogue::fusion::FusionOperation, Operation>>
struct OperationNeedsTmaEpilogue : NeedsTmaEpilogue<Operation> {};
template <class Operation>
struct OperationNeedsTmaEpilogue<Operation, true> {
  static constexpr bool value = Operation::IsAuxOutSupported || Operation::IsAuxInSupported ||
                                Operation::IsAbsMaxSupported || Operation::IsBlockScaleSupported;
};

}  // namespace detail

/// The collective. Built by CollectiveBuilder for the schedules PtrArrayDirect and, below CUTLASS
/// 4.6, cutlass::epilogue::PtrArrayNoSmemWarpSpecialized.
///
/// Arrays on the device with one entry per group; C may be void. Alignment: what the caller
/// promises of every pointer and leading dimension, in elements; 1 promises nothing.
template <class CtaTileMNK_, class EpilogueTile_, class ElementC_, class StrideC_, int AlignmentC_,
          class ElementD_, class StrideD_, int AlignmentD_, class FusionCallbacks_>
class DirectStore {
 public:
  //
  // Types that the kernel shells and the adapter use
  //

  using DispatchPolicy = cutlass::epilogue::PtrArrayNoSmemWarpSpecialized;
  using CtaTileMNK = CtaTileMNK_;
  using EpilogueTile = EpilogueTile_;
  using FusionCallbacks = FusionCallbacks_;
  using ElementC = ElementC_;
  using StrideC = StrideC_;
  using InternalStrideC = cute::remove_pointer_t<StrideC>;
  using ElementD = ElementD_;
  using StrideD = StrideD_;
  using InternalStrideD = cute::remove_pointer_t<StrideD>;
  using ThreadEpilogueOp =
      typename cutlass::epilogue::fusion::FusionCallbacksTraits<FusionCallbacks>::Operation;
  using GmemTiledCopyC = void;
  using GmemTiledCopyD = void;

  using LoadPipeline = cutlass::PipelineTransactionAsync<0>;
  using LoadPipelineState = cutlass::PipelineState<0>;
  using StorePipeline = cutlass::PipelineTmaStore<0>;
  using StorePipelineState = cutlass::PipelineState<0>;
  static constexpr uint32_t TmaTransactionBytes = 0;
  static constexpr bool RequiresTransactionBytes = false;
  static constexpr int NumEpilogueWarpGroups = 2;

  static_assert(!cute::is_void_v<ElementD>, "sm12x: the direct-store epilogue needs an output D");
  static_assert(!cute::is_same_v<StrideD, InternalStrideD> &&
                    !cute::is_same_v<StrideC, InternalStrideC>,
                "sm12x: a grouped GEMM takes its layouts as pointers (RowMajor*, ColumnMajor*)");
  static_assert(cute::sizeof_bits_v<ElementD> >= 8,
                "sm12x: the direct-store epilogue writes whole bytes: D must have 8 bits or more");

  //
  // Shared memory: only what fusion nodes ask for
  //

  struct TensorStorage {
    typename FusionCallbacks::SharedStorage thread;
  };
  struct TensorMapStorage {};
  using PipelineStorage = typename LoadPipeline::SharedStorage;
  struct SharedStorage {
    TensorStorage tensors;
    PipelineStorage pipeline;
  };

  //
  // Arguments and parameters
  //

  struct Arguments {
    typename FusionCallbacks::Arguments thread{};
    ElementC const** ptr_C = nullptr;
    StrideC dC{};
    ElementD** ptr_D = nullptr;
    StrideD dD{};
  };

  struct Params {
    typename FusionCallbacks::Params thread{};
    ElementC const** ptr_C = nullptr;
    StrideC dC{};
    ElementD** ptr_D = nullptr;
    StrideD dD{};
  };

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(ProblemShape const& problem_shape,
                                                  Arguments const& args, void* workspace) {
    return {FusionCallbacks::to_underlying_arguments(problem_shape, args.thread, workspace),
            args.ptr_C, args.dC, args.ptr_D, args.dD};
  }

  template <class ProblemShape>
  static size_t get_workspace_size(ProblemShape const& problem_shape, Arguments const& args, int) {
    return FusionCallbacks::get_workspace_size(problem_shape, args.thread);
  }

  template <class ProblemShape>
  static cutlass::Status initialize_workspace(ProblemShape const& problem_shape,
                                              Arguments const& args, void* workspace,
                                              cudaStream_t stream,
                                              cutlass::CudaHostAdapter* adapter = nullptr) {
    return FusionCallbacks::initialize_workspace(problem_shape, args.thread, workspace, stream,
                                                 adapter);
  }

  template <class ProblemShape>
  static bool can_implement(ProblemShape problem_shape, Arguments const& args) {
    bool implementable = true;
    if (problem_shape.is_host_problem_shape_available()) {
      for (int i = 0; i < problem_shape.groups(); ++i) {
        auto shape = cute::append<4>(problem_shape.get_host_problem_shape(i), 1);
        implementable = implementable && FusionCallbacks::can_implement(shape, args.thread);
      }
    }
    if (cute::is_void_v<ElementC> || args.ptr_C == nullptr) {
      // As CUTLASS's epilogues: a beta without a C to multiply.
      namespace upstream = cutlass::epilogue::collective::detail;
      if constexpr (upstream::has_beta<Arguments>::value) {
        implementable = implementable && args.thread.beta == 0;
      }
      if constexpr (upstream::has_beta_ptr<Arguments>::value) {
        implementable = implementable && args.thread.beta_ptr == nullptr;
      }
      if constexpr (upstream::has_beta_ptr_array<Arguments>::value) {
        implementable = implementable && args.thread.beta_ptr_array == nullptr;
      }
    }
    if (!implementable) {
      CUTLASS_TRACE_HOST(
          "  CAN IMPLEMENT: the fusion refuses these arguments, or beta has no C.\n");
    }
    return implementable;
  }

  template <class TileShape>
  CUTLASS_HOST_DEVICE static constexpr int get_load_pipe_increment(TileShape) {
    return 1;
  }
  template <class TileShape>
  CUTLASS_HOST_DEVICE static constexpr int get_store_pipe_increment(TileShape) {
    return 1;
  }

  CUTLASS_HOST_DEVICE DirectStore(Params const& params, TensorStorage& shared_tensors)
      : params_(params), fusion_callbacks_(params.thread, shared_tensors.thread) {}

  //
  // What the shells call and this epilogue has no use for: loads of its own, tensor maps
  //

  CUTLASS_DEVICE static constexpr bool is_producer_load_needed() { return false; }

  CUTLASS_DEVICE auto load_init(Params const&, TensorMapStorage&, int32_t, int32_t) {
    return cute::make_tuple(static_cast<cute::TmaDescriptor*>(nullptr));
  }
  template <class... Args>
  CUTLASS_DEVICE LoadPipelineState load(LoadPipeline, LoadPipelineState state, Args const&...) {
    return state;
  }
  CUTLASS_DEVICE LoadPipelineState load_tail(LoadPipeline, LoadPipelineState state) {
    return state;
  }
  CUTLASS_DEVICE auto store_init(Params const&, TensorMapStorage&, int32_t, int32_t, int32_t) {
    return cute::make_tuple(static_cast<cute::TmaDescriptor*>(nullptr));
  }
  CUTLASS_DEVICE auto store_tail(LoadPipeline, LoadPipelineState load_state, StorePipeline,
                                 StorePipelineState store_state) {
    return cute::make_tuple(load_state, store_state);
  }
  template <bool IsLoad, class ProblemShape>
  CUTLASS_DEVICE void tensormaps_perform_update(TensorMapStorage&, Params const&,
                                                cute::TmaDescriptor const*, ProblemShape, int32_t,
                                                int32_t) {}
  template <bool IsLoad>
  CUTLASS_DEVICE void tensormaps_cp_fence_release(TensorMapStorage&, cute::TmaDescriptor const*,
                                                  int32_t) {}
  template <bool IsLoad>
  CUTLASS_DEVICE void tensormaps_fence_acquire(cute::TmaDescriptor const*) {}

  //
  // The MMA warps
  //

  template <class ProblemShapeMNKL, class TileShapeMNK, class TileCoordMNKL, class AccEngine,
            class AccLayout, class TiledMma>
  CUTLASS_DEVICE auto store(LoadPipeline, LoadPipelineState load_state, StorePipeline,
                            StorePipelineState store_state, ProblemShapeMNKL problem_shape_mnkl,
                            TileShapeMNK, TileCoordMNKL tile_coord_mnkl,
                            cute::Tensor<AccEngine, AccLayout> accumulators, TiledMma tiled_mma,
                            int thread_idx, TensorStorage&, cute::TmaDescriptor const*,
                            [[maybe_unused]] int subtile_idx = -1) {
    using namespace cute;
    using ElementAccumulator = typename AccEngine::value_type;
    static_assert(is_rmem<AccEngine>::value, "sm12x: accumulators live in registers");
    static_assert(rank(AccLayout{}) == 3, "sm12x: accumulators must be (MMA,MMA_M,MMA_N)");

    auto const [M, N, K, L] = problem_shape_mnkl;
    auto const [m_coord, n_coord, k_coord, group] = tile_coord_mnkl;
    auto const tile_coord = make_coord(m_coord, n_coord);

    // Threads own what the MMA gave them, cut into epilogue tiles so that few registers hold C.
    auto atom_copy =
        make_tiled_copy_C_atom(Copy_Atom<SM90_U32x2_STSM_N, cutlass::half_t>{}, tiled_mma);
    auto tiled_copy = make_tiled_copy_S(
        Copy_Atom<AutoVectorizingCopyWithAssumedAlignment<8>, ElementD>{}, atom_copy);
    auto thread_copy = tiled_copy.get_slice(thread_idx);
    Tensor tRrAcc = thread_copy.retile_S(accumulators);  // ((CPY,CPY_V),MMA_M,MMA_N)

    auto partition = [&](auto const& tile) {
      return thread_copy.partition_S(flat_divide(tile, EpilogueTile{}));
    };
    Tensor gD = local_tile(make_tensor(make_gmem_ptr(params_.ptr_D[group]), make_shape(M, N),
                                       take<0, 2>(params_.dD[group])),
                           take<0, 2>(CtaTileMNK{}), tile_coord);
    Tensor tRgD = partition(gD);  // (CPY,CPY_M,CPY_N,EPI_M,EPI_N)

    // Coordinates: absolute for the residue, relative (static) for everything else.
    Tensor cD_mn =
        local_tile(make_identity_tensor(make_shape(M, N)), take<0, 2>(CtaTileMNK{}), tile_coord);
    Tensor tRcD_mn = partition(cD_mn);
    Tensor cD = make_coord_tensor(cD_mn.layout());
    Tensor tRcD = make_coord_tensor(tRcD_mn.layout());  // (CPY,CPY_M,CPY_N,EPI_M,EPI_N)
    auto const residue_cD = make_coord(M, N) - cD_mn(_0{});
    auto const residue = make_coord(M, N) - tRcD_mn(_0{});

    Layout subtile_layout =
        make_layout(take<0, 3>(shape(partition(make_identity_tensor(take<0, 2>(CtaTileMNK{}))))));
    using Source = cute::conditional_t<kHasC, NonVoidC, ElementD>;
    Tensor tRrC = make_tensor<Source>(subtile_layout);  // (CPY,CPY_M,CPY_N)
    clear(tRrC);

    auto store_args = cutlass::epilogue::fusion::detail::ConsumerStoreArgs{problem_shape_mnkl,
                                                                           CtaTileMNK{},
                                                                           tile_coord_mnkl,
                                                                           tiled_mma,
                                                                           EpilogueTile{},
                                                                           tiled_copy,
                                                                           cD,
                                                                           residue_cD,
                                                                           tRcD,
                                                                           residue,
                                                                           tRrC,
                                                                           thread_idx};
    auto callbacks = fusion_callbacks_.template get_consumer_store_callbacks<true>(store_args);

    // Nodes that share values through shared memory: nobody may still read those of the last tile.
    bool const shares_memory = callbacks.begin_sync_needed();
    auto synchronize = [&] {
      cutlass::arch::NamedBarrier::sync(size(TiledMma{}),
                                        cutlass::arch::ReservedNamedBarriers::EpilogueBarrier);
    };
    if (shares_memory) {
      synchronize();
    }
    callbacks.begin();
    if (shares_memory) {
      synchronize();
    }

    bool const reads_c = kHasC && fusion_callbacks_.is_C_load_needed();
    Tensor tRrAcc_frg = recast<cutlass::Array<ElementAccumulator, kFragment>>(tRrAcc);
    constexpr int kMmaTileM = size<0>(CtaTileMNK{}) / decltype(size<1>(tRrAcc))::value;
    constexpr int kMmaTileN = size<1>(CtaTileMNK{}) / decltype(size<2>(tRrAcc))::value;
    constexpr int kMmaM = size<0>(EpilogueTile{}) / kMmaTileM;  // MMA tiles in an epilogue tile
    constexpr int kMmaN = size<1>(EpilogueTile{}) / kMmaTileN;
    static_assert(kMmaM * kMmaTileM == size<0>(EpilogueTile{}) &&
                      kMmaN * kMmaTileN == size<1>(EpilogueTile{}),
                  "sm12x: the epilogue tile must hold whole MMA tiles; take EpilogueTileAuto");
    static_assert(decltype(size<0>(tRrAcc))::value == kFragment);

    CUTLASS_PRAGMA_UNROLL
    for (int epi_n = 0; epi_n < size<4>(tRgD); ++epi_n) {
      CUTLASS_PRAGMA_UNROLL
      for (int epi_m = 0; epi_m < size<3>(tRgD); ++epi_m) {
        Tensor coords = tRcD(_, _, _, epi_m, epi_n);
        callbacks.begin_loop(epi_m, epi_n);
        if constexpr (kHasC) {
          if (reads_c) {
            Tensor gC = local_tile(make_tensor(make_gmem_ptr(params_.ptr_C[group]),
                                               make_shape(M, N), take<0, 2>(params_.dC[group])),
                                   take<0, 2>(CtaTileMNK{}), tile_coord);
            Tensor tRgC = partition(gC);
            for_each_pair<AlignmentC_, kRowMajorC>(
                coords, residue,
                [&](int i) {
                  recast_pair<NonVoidC>(&tRrC(i)) =
                      recast_pair<NonVoidC const>(&tRgC(_, _, _, epi_m, epi_n)(i));
                },
                [&](int i) { tRrC(i) = tRgC(_, _, _, epi_m, epi_n)(i); });
          }
        }
        callbacks.previsit(epi_m, epi_n, 0, false);

        Tensor tRrD = make_tensor<ElementD>(subtile_layout);  // (CPY,CPY_M,CPY_N)
        Tensor tRrD_frg = recast<cutlass::Array<ElementD, kFragment>>(tRrD);
        CUTLASS_PRAGMA_UNROLL
        for (int n = 0; n < kMmaN; ++n) {
          CUTLASS_PRAGMA_UNROLL
          for (int m = 0; m < kMmaM; ++m) {
            int const v = n * kMmaM + m;
            auto computed = callbacks.visit(tRrAcc_frg(_, epi_m * kMmaM + m, epi_n * kMmaN + n)(0),
                                            v, epi_m, epi_n);
            using Computed = typename decltype(computed)::Element;
            tRrD_frg(v) = cutlass::NumericArrayConverter<ElementD, Computed, kFragment>{}(computed);
          }
        }

        Tensor tRgD_tile = tRgD(_, _, _, epi_m, epi_n);
        for_each_pair<AlignmentD_, kRowMajorD>(
            coords, residue,
            [&](int i) { recast_pair<ElementD>(&tRgD_tile(i)) = recast_pair<ElementD>(&tRrD(i)); },
            [&](int i) { tRgD_tile(i) = tRrD(i); });
        callbacks.end_loop(epi_m, epi_n);
      }
    }
    callbacks.end();
    return cute::make_tuple(load_state, store_state);
  }

 private:
  static constexpr bool kHasC = !cute::is_void_v<ElementC>;
  using NonVoidC = cute::conditional_t<kHasC, ElementC, ElementD>;
  static constexpr int kFragment = 4;  // accumulators of one thread in one MMA atom
  static constexpr bool kRowMajorC = cutlass::detail::is_major<1>(InternalStrideC{});
  static constexpr bool kRowMajorD = cutlass::detail::is_major<1>(InternalStrideD{});

  template <class Element>
  using Pair = cute::conditional_t<sizeof(Element) == 1, uint16_t,
                                   cute::conditional_t<sizeof(Element) == 2, uint32_t, uint64_t>>;

  template <class Element>
  CUTLASS_DEVICE static auto& recast_pair(Element* address) {
    using Word = Pair<cute::remove_const_t<Element>>;
    static_assert(sizeof(Word) == 2 * sizeof(Element));
    if constexpr (cute::is_const_v<Element>) {
      return *reinterpret_cast<Word const*>(address);
    } else {
      return *reinterpret_cast<Word*>(address);
    }
  }

  // Visits the elements inside the output: two neighbours of a row at once where the alignment
  // allows it, else one by one.
  template <int Alignment, bool RowMajor, class Coords, class Residue, class Two, class One>
  CUTLASS_DEVICE static void for_each_pair(Coords const& coords, Residue const& residue,
                                           Two const& two, One const& one) {
    using namespace cute;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(coords); i += 2) {
      // A thread's accumulators come in pairs along N, at an even column.
      bool const first = elem_less(coords(i), residue);
      bool const second = elem_less(coords(i + 1), residue);
      if constexpr (RowMajor && Alignment % 2 == 0) {
        if (second) {
          two(i);
        } else if (first) {
          one(i);
        }
      } else {
        if (first) {
          one(i);
        }
        if (second) {
          one(i + 1);
        }
      }
    }
  }

  Params const& params_;
  FusionCallbacks fusion_callbacks_;
};

}  // namespace sm12x::epilogue
