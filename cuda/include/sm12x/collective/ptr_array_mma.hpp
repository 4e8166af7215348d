/// The ptr-array main loop for SM120: TMA loads of A and B, per-group tensor-map update on the
/// device, warp-level FP8 MMA. It plugs into CUTLASS's ptr-array kernel shells (one producer warp,
/// one or two consumer warp groups).
///
/// Tensor maps. Every CTA owns a ring of Stages + 1 pairs of maps in global memory. A group's maps
/// are prepared in shared memory, published into the next slot of the ring with a release, and
/// acquired before the first load that uses them. A slot comes round again only after Stages + 1
/// updates. Between two updates lies at least one k-tile (a tile without k-tiles drains the
/// pipeline instead), and the load of k-tile j is issued only after k-tile j - Stages was consumed;
/// so when a slot is rewritten, every load that read it has completed. That is the drain that a
/// rewrite needs, at no cost: the producer never waits for its own loads.
#pragma once

#include <cute/algorithm/gemm.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/atom/copy_traits_sm90_tma.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/detail/layout.hpp>
#include <cutlass/gemm/collective/collective_mma_decl.hpp>
#include <cutlass/gemm/gemm.h>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/pipeline/pipeline.hpp>

#include "sm12x/collective/dispatch_policy.hpp"
#include "sm12x/collective/pipeline.hpp"

namespace sm12x::detail {
template <class ProblemShape>
inline constexpr bool is_array_problem_v = false;
template <class Shape>
inline constexpr bool is_array_problem_v<cutlass::gemm::ArrayProblemShape<Shape>> = true;
}  // namespace sm12x::detail

namespace cutlass::gemm::collective {

template <int Stages, class ClusterShape, class KernelSchedule, bool SkipEmptyColumns,
          class TileShape_, class ElementA_, class StrideA_, class ElementB_, class StrideB_,
          class TiledMma_, class GmemTiledCopyA_, class SmemLayoutAtomA_, class SmemCopyAtomA_,
          class TransformA_, class GmemTiledCopyB_, class SmemLayoutAtomB_, class SmemCopyAtomB_,
          class TransformB_>
struct CollectiveMma<::sm12x::MainloopPtrArrayTmaWarpSpecialized<Stages, ClusterShape,
                                                                 KernelSchedule, SkipEmptyColumns>,
                     TileShape_, ElementA_, StrideA_, ElementB_, StrideB_, TiledMma_,
                     GmemTiledCopyA_, SmemLayoutAtomA_, SmemCopyAtomA_, TransformA_,
                     GmemTiledCopyB_, SmemLayoutAtomB_, SmemCopyAtomB_, TransformB_> {
  //
  // Types
  //

  using DispatchPolicy =
      ::sm12x::MainloopPtrArrayTmaWarpSpecialized<Stages, ClusterShape, KernelSchedule,
                                                  SkipEmptyColumns>;
  using TileShape = TileShape_;
  using ElementA = ElementA_;
  using StrideA = StrideA_;
  using InternalStrideA = cute::remove_pointer_t<StrideA>;
  using ElementB = ElementB_;
  using StrideB = StrideB_;
  using InternalStrideB = cute::remove_pointer_t<StrideB>;
  using TiledMma = TiledMma_;
  using CtaShape_MNK = TileShape;
  using ElementAccumulator = typename TiledMma::ValTypeC;
  using GmemTiledCopyA = GmemTiledCopyA_;
  using GmemTiledCopyB = GmemTiledCopyB_;
  using SmemLayoutAtomA = SmemLayoutAtomA_;
  using SmemLayoutAtomB = SmemLayoutAtomB_;
  using SmemCopyAtomA = SmemCopyAtomA_;
  using SmemCopyAtomB = SmemCopyAtomB_;
  using TransformA = TransformA_;
  using TransformB = TransformB_;
  using ArchTag = typename DispatchPolicy::ArchTag;
  using RuntimeDataTypeA = void*;
  using RuntimeDataTypeB = void*;

  using MainloopPipeline = ::sm12x::collective::PipelineTmaWarpRelease<Stages>;
  using PipelineParams = typename MainloopPipeline::Params;
  using PipelineState = typename MainloopPipeline::PipelineState;

  static constexpr int NumProducerThreadEvents = 1;
  static constexpr int ThreadCount = cute::size(TiledMma{});
  static constexpr bool IsGroupedGemmKernel = !cute::is_same_v<InternalStrideA, StrideA>;

  /// Slots of the tensor-map ring; see the head of this file.
  static constexpr int TensorMapSlots = Stages + 1;

  static_assert(Stages >= 2, "sm12x: the ptr-array main loop needs at least 2 stages");
  static_assert(cute::size(ClusterShape{}) == 1, "sm12x: SM12x has no clusters larger than 1x1x1");
  static_assert(cute::sizeof_bits_v<ElementA> == 8 && cute::sizeof_bits_v<ElementB> == 8,
                "sm12x: the ptr-array main loop takes 8-bit elements (e4m3, e5m2)");
  static_assert(cute::size<0>(TileShape{}) % cute::size<0>(SmemLayoutAtomA{}) == 0 &&
                    cute::size<2>(TileShape{}) % cute::size<1>(SmemLayoutAtomA{}) == 0,
                "sm12x: the shared-memory layout atom of A must divide the tile");
  static_assert(cute::size<1>(TileShape{}) % cute::size<0>(SmemLayoutAtomB{}) == 0 &&
                    cute::size<2>(TileShape{}) % cute::size<1>(SmemLayoutAtomB{}) == 0,
                "sm12x: the shared-memory layout atom of B must divide the tile");

  // The bytes are moved as they are, so TMA sees unsigned integers.
  using SmemElement = uint8_t;

  using SmemLayoutA = decltype(cute::tile_to_shape(
      SmemLayoutAtomA{}, cute::make_shape(cute::shape<0>(TileShape{}), cute::shape<2>(TileShape{}),
                                          cute::Int<Stages>{})));
  using SmemLayoutB = decltype(cute::tile_to_shape(
      SmemLayoutAtomB{}, cute::make_shape(cute::shape<1>(TileShape{}), cute::shape<2>(TileShape{}),
                                          cute::Int<Stages>{})));

  static constexpr uint32_t TmaTransactionBytes =
      cute::size(cute::take<0, 2>(SmemLayoutA{})) + cute::size(cute::take<0, 2>(SmemLayoutB{}));

  //
  // Shared memory
  //

  struct SharedStorage {
    struct TensorStorage : cute::aligned_struct<128, cute::_0> {
      alignas(1024) cute::array_aligned<SmemElement, cute::cosize_v<SmemLayoutA>> smem_A;
      alignas(1024) cute::array_aligned<SmemElement, cute::cosize_v<SmemLayoutB>> smem_B;
    } tensors;

    struct TensorMapStorage : cute::aligned_struct<128, cute::_0> {
      cute::TmaDescriptor smem_tensormap_A;
      cute::TmaDescriptor smem_tensormap_B;
    } tensormaps;

    using PipelineStorage = typename MainloopPipeline::SharedStorage;
    alignas(16) PipelineStorage pipeline_storage;
  };
  using TensorStorage = typename SharedStorage::TensorStorage;
  using TensorMapStorage = typename SharedStorage::TensorMapStorage;
  using PipelineStorage = typename SharedStorage::PipelineStorage;

  //
  // Arguments and parameters
  //

  /// Host-side arguments. Grouped: arrays on the device with one entry per group.
  struct Arguments {
    ElementA const** ptr_A{nullptr};
    StrideA dA{};
    ElementB const** ptr_B{nullptr};
    StrideB dB{};
  };

  struct Params {
    using TMA_A = decltype(cute::make_tma_copy(
        GmemTiledCopyA{},
        cute::make_tensor(cute::recast_ptr<SmemElement>(nullptr),
                          cute::repeat_like(InternalStrideA{}, int32_t(0)), InternalStrideA{}),
        SmemLayoutA{}(cute::_, cute::_, cute::Int<0>{}),
        cute::make_shape(cute::shape<0>(TileShape{}), cute::shape<2>(TileShape{})), cute::_1{}));
    using TMA_B = decltype(cute::make_tma_copy(
        GmemTiledCopyB{},
        cute::make_tensor(cute::recast_ptr<SmemElement>(nullptr),
                          cute::repeat_like(InternalStrideB{}, int32_t(0)), InternalStrideB{}),
        SmemLayoutB{}(cute::_, cute::_, cute::Int<0>{}),
        cute::make_shape(cute::shape<1>(TileShape{}), cute::shape<2>(TileShape{})), cute::_1{}));

    TMA_A tma_load_a{};
    TMA_B tma_load_b{};
    uint32_t tma_transaction_bytes = TmaTransactionBytes;
    cute::TmaDescriptor* tensormaps = nullptr;
    ElementA const** ptr_A = nullptr;
    StrideA dA{};
    ElementB const** ptr_B = nullptr;
    StrideB dB{};
  };

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(ProblemShape const& problem_shapes,
                                                  Arguments const& args, void* workspace) {
    check_problem_shape<ProblemShape>();
    // Address, shape and strides are replaced group by group; what must be right here is box,
    // swizzle and type.
    constexpr int kPlaceholderExtent = 128;
    // Drivers before CUDA 12.6 refuse a null address.
    auto placeholder = [&](auto const* address, auto stride) {
      return cute::make_tensor(
          reinterpret_cast<SmemElement*>(reinterpret_cast<uint64_t>(address) & ~uint64_t(15)),
          cute::make_layout(cute::make_shape(kPlaceholderExtent, kPlaceholderExtent, 1), stride));
    };
    Params params;
    params.tma_load_a = cute::make_tma_copy(
        GmemTiledCopyA{}, placeholder(args.ptr_A, InternalStrideA{}),
        SmemLayoutA{}(cute::_, cute::_, cute::Int<0>{}),
        cute::make_shape(cute::shape<0>(TileShape{}), cute::shape<2>(TileShape{})), cute::_1{});
    params.tma_load_b = cute::make_tma_copy(
        GmemTiledCopyB{}, placeholder(args.ptr_B, InternalStrideB{}),
        SmemLayoutB{}(cute::_, cute::_, cute::Int<0>{}),
        cute::make_shape(cute::shape<1>(TileShape{}), cute::shape<2>(TileShape{})), cute::_1{});
    params.tensormaps = reinterpret_cast<cute::TmaDescriptor*>(workspace);
    params.ptr_A = args.ptr_A;
    params.dA = args.dA;
    params.ptr_B = args.ptr_B;
    params.dB = args.dB;
    return params;
  }

  /// Bytes of global memory for the tensor-map rings of `sm_count` CTAs.
  template <class ProblemShape>
  static size_t get_workspace_size(ProblemShape const&, Arguments const&, int sm_count) {
    check_problem_shape<ProblemShape>();
    return workspace_bytes(sm_count);
  }

  CUTLASS_HOST_DEVICE static constexpr size_t workspace_bytes(int ctas) {
    return size_t(ctas) * TensorMapSlots * 2 * sizeof(cute::TmaDescriptor);
  }

  template <class ProblemShape>
  static cutlass::Status initialize_workspace(ProblemShape const&, Arguments const&, void*,
                                              cudaStream_t, CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  /// Rows must start at multiples of 16 bytes. Checked here where the shapes are known on the host.
  template <class ProblemShape>
  static bool can_implement(ProblemShape const& problem_shapes,
                            [[maybe_unused]] Arguments const& args) {
    constexpr int kAlignment = 16;
    bool implementable = true;
    if (problem_shapes.is_host_problem_shape_available()) {
      for (int i = 0; i < problem_shapes.groups(); ++i) {
        auto [M, N, K, L] = cute::append<4>(problem_shapes.get_host_problem_shape(i), 1);
        implementable = implementable &&
                        cutlass::detail::check_alignment<kAlignment>(cute::make_shape(M, K, L),
                                                                     InternalStrideA{}) &&
                        cutlass::detail::check_alignment<kAlignment>(cute::make_shape(N, K, L),
                                                                     InternalStrideB{});
      }
    }
    if (!implementable) {
      CUTLASS_TRACE_HOST("  CAN IMPLEMENT: K must be a multiple of 16 elements for TMA.\n");
    }
    return implementable;
  }

  //
  // Producer: one warp
  //

  template <class ProblemShape_MNKL>
  CUTLASS_DEVICE auto load_init(ProblemShape_MNKL const& problem_shape_MNKL,
                                Params const& params) const {
    using namespace cute;
    using X = Underscore;
    auto [M, N, K, L] = problem_shape_MNKL;
    // The tensor map of a group describes that group alone, so the L extent is always 1.
    int32_t const mock_L = 1;
    Tensor mA_mkl = params.tma_load_a.get_tma_tensor(make_shape(M, K, mock_L));  // (m,k,l)
    Tensor mB_nkl = params.tma_load_b.get_tma_tensor(make_shape(N, K, mock_L));  // (n,k,l)
    Tensor gA_mkl = local_tile(mA_mkl, TileShape{}, make_coord(_, _, _),
                               Step<_1, X, _1>{});  // (BLK_M,BLK_K,m,k,l)
    Tensor gB_nkl = local_tile(mB_nkl, TileShape{}, make_coord(_, _, _),
                               Step<X, _1, _1>{});  // (BLK_N,BLK_K,n,k,l)
    return make_tuple(gA_mkl, gB_nkl);
  }

  template <class InputTensors, class ProblemShape_MNKL>
  CUTLASS_DEVICE InputTensors tensors_perform_update(InputTensors const&, Params const& params,
                                                     ProblemShape_MNKL problem_shape_MNKL,
                                                     int32_t) {
    return load_init(problem_shape_MNKL, params);
  }

  template <class TensorA, class TensorB, class TensorMapA, class TensorMapB, class KTileIterator,
            class BlockCoord>
  CUTLASS_DEVICE void load(Params const& params, MainloopPipeline pipeline,
                           PipelineState smem_pipe_write,
                           cute::tuple<TensorA, TensorB> const& load_inputs,
                           cute::tuple<TensorMapA, TensorMapB> const& tensormap_rings,
                           BlockCoord const& blk_coord, KTileIterator k_tile_iter, int k_tile_count,
                           int, uint32_t, TensorStorage& shared_tensors) {
    using namespace cute;
    if (!elect_one_sync()) {
      return;
    }
    if (k_tile_count <= 0) {
      // No load stands between this update of the tensor maps and the next: drain, see the head of
      // this file.
      pipeline.producer_tail(smem_pipe_write);
      return;
    }

    Tensor sA = make_tensor(make_smem_ptr(shared_tensors.smem_A.data()),
                            SmemLayoutA{});  // (BLK_M,BLK_K,PIPE)
    Tensor sB = make_tensor(make_smem_ptr(shared_tensors.smem_B.data()),
                            SmemLayoutB{});  // (BLK_N,BLK_K,PIPE)
    auto [m_coord, n_coord, k_coord, l_coord] = blk_coord;
    Tensor gA = get<0>(load_inputs)(_, _, m_coord, _, l_coord);  // (BLK_M,BLK_K,k)
    Tensor gB = get<1>(load_inputs)(_, _, n_coord, _, l_coord);  // (BLK_N,BLK_K,k)
    auto block_tma_a = params.tma_load_a.get_slice(Int<0>{});
    auto block_tma_b = params.tma_load_b.get_slice(Int<0>{});
    Tensor tAgA = block_tma_a.partition_S(gA);  // (TMA,TMA_M,TMA_K,k)
    Tensor tAsA = block_tma_a.partition_D(sA);  // (TMA,TMA_M,TMA_K,PIPE)
    Tensor tBgB = block_tma_b.partition_S(gB);
    Tensor tBsB = block_tma_b.partition_D(sB);
    auto* map_a = get<0>(tensormap_rings) + 2 * tensormap_slot_;
    auto* map_b = get<1>(tensormap_rings) + 2 * tensormap_slot_;

    CUTLASS_PRAGMA_NO_UNROLL
    for (; k_tile_count > 0; --k_tile_count) {
      if constexpr (SkipEmptyColumns) {
        pipeline.producer_acquire(smem_pipe_write, columns_ - int32_t(n_coord) * TileN);
      } else {
        pipeline.producer_acquire(smem_pipe_write);
      }
      auto* barrier = pipeline.producer_get_barrier(smem_pipe_write);
      int const stage = smem_pipe_write.index();
      copy(params.tma_load_a.with(map_a, *barrier, uint16_t(0)), tAgA(_, _, _, *k_tile_iter),
           tAsA(_, _, _, stage));
      copy(params.tma_load_b.with(map_b, *barrier, uint16_t(0)), tBgB(_, _, _, *k_tile_iter),
           tBsB(_, _, _, stage));
      ++k_tile_iter;
      ++smem_pipe_write;
    }
  }

  /// Keeps the producer, and with it the CTA, alive until its last stage was consumed.
  CUTLASS_DEVICE void load_tail(MainloopPipeline pipeline, PipelineState smem_pipe_write) {
    if (cute::elect_one_sync()) {
      pipeline.producer_tail(smem_pipe_write);
    }
  }

  //
  // Tensor maps: all functions are called by the whole producer warp
  //

  /// Brings the prototypes into shared memory. Returns this CTA's two rings (A and B interleaved).
  CUTLASS_DEVICE auto tensormaps_init(Params const& params, TensorMapStorage& shared_tensormaps,
                                      int32_t, int32_t sm_idx) {
    using namespace cute;
    tensormap_slot_ = TensorMapSlots - 1;  // the first update takes slot 0
    TmaDescriptor* ring = params.tensormaps + size_t(sm_idx) * (2 * TensorMapSlots);
    if (elect_one_sync()) {
      Tensor pA = make_tensor(params.tma_load_a.get_tma_descriptor(), Int<1>{}, Int<1>{});
      Tensor sA =
          make_tensor(make_smem_ptr(&shared_tensormaps.smem_tensormap_A), Int<1>{}, Int<1>{});
      Tensor pB = make_tensor(params.tma_load_b.get_tma_descriptor(), Int<1>{}, Int<1>{});
      Tensor sB =
          make_tensor(make_smem_ptr(&shared_tensormaps.smem_tensormap_B), Int<1>{}, Int<1>{});
      copy(recast<uint128_t>(pA), recast<uint128_t>(sA));
      copy(recast<uint128_t>(pB), recast<uint128_t>(sB));
    }
    __syncwarp();
    return cute::make_tuple(ring, ring + 1);
  }

  /// Writes address, shape and strides of group `next_group` into the maps in shared memory.
  template <class TensorMapA, class TensorMapB, class ProblemShape_MNKL>
  CUTLASS_DEVICE void tensormaps_perform_update(TensorMapStorage& shared_tensormaps,
                                                Params const& params,
                                                cute::tuple<TensorMapA, TensorMapB> const&,
                                                ProblemShape_MNKL problem_shape_mnkl,
                                                int32_t next_group) {
    using namespace cute;
    auto [M, N, K, L] = problem_shape_mnkl;
    columns_ = int32_t(N);
    if (elect_one_sync()) {
      uint32_t const extent_k = K > 0 ? K : 1;  // a map without extent would not be valid
      update_tensormap(shared_tensormaps.smem_tensormap_A, params.tma_load_a,
                       params.ptr_A[next_group], make_shape(uint32_t(M), extent_k, Int<1>{}),
                       params.dA[next_group]);
      update_tensormap(shared_tensormaps.smem_tensormap_B, params.tma_load_b,
                       params.ptr_B[next_group], make_shape(uint32_t(N), extent_k, Int<1>{}),
                       params.dB[next_group]);
    }
  }

  /// Publishes both maps into the next slot of the ring.
  template <class TensorMapA, class TensorMapB>
  CUTLASS_DEVICE void tensormaps_cp_fence_release(
      TensorMapStorage& shared_tensormaps,
      cute::tuple<TensorMapA, TensorMapB> const& tensormap_rings) {
    tensormap_slot_ = tensormap_slot_ + 1 == TensorMapSlots ? 0 : tensormap_slot_ + 1;
    cute::tma_descriptor_cp_fence_release(cute::get<0>(tensormap_rings) + 2 * tensormap_slot_,
                                          shared_tensormaps.smem_tensormap_A);
    cute::tma_descriptor_cp_fence_release(cute::get<1>(tensormap_rings) + 2 * tensormap_slot_,
                                          shared_tensormaps.smem_tensormap_B);
  }

  /// Makes the published maps visible to the loads that follow.
  template <class TensorMapA, class TensorMapB>
  CUTLASS_DEVICE void tensormaps_fence_acquire(
      cute::tuple<TensorMapA, TensorMapB> const& tensormap_rings) {
    cute::tma_descriptor_fence_acquire(cute::get<0>(tensormap_rings) + 2 * tensormap_slot_);
    cute::tma_descriptor_fence_acquire(cute::get<1>(tensormap_rings) + 2 * tensormap_slot_);
  }

  //
  // Consumers: the MMA warps
  //

  /// The shells of CUTLASS 4.5 pass the tile's coordinate as well.
  template <class FrgTensorC, class... BlockCoord>
  CUTLASS_DEVICE void mma(MainloopPipeline pipeline, PipelineState smem_pipe_read,
                          FrgTensorC& accum, int k_tile_count, int thread_idx,
                          TensorStorage& shared_tensors, Params const&, BlockCoord const&...) {
    using namespace cute;
    static_assert(is_rmem<FrgTensorC>::value, "sm12x: accumulators live in registers");
    clear(accum);
    if (k_tile_count <= 0) {
      return;
    }

    Tensor sA = make_tensor(make_smem_ptr(shared_tensors.smem_A.data()),
                            SmemLayoutA{});  // (BLK_M,BLK_K,PIPE)
    Tensor sB = make_tensor(make_smem_ptr(shared_tensors.smem_B.data()),
                            SmemLayoutB{});  // (BLK_N,BLK_K,PIPE)
    TiledMma tiled_mma;
    auto thread_mma = tiled_mma.get_thread_slice(thread_idx);
    Tensor tCrA = thread_mma.partition_fragment_A(sA(_, _, Int<0>{}));  // (MMA,MMA_M,MMA_K)
    Tensor tCrB = thread_mma.partition_fragment_B(sB(_, _, Int<0>{}));  // (MMA,MMA_N,MMA_K)

    auto smem_tiled_copy_A = make_tiled_copy_A(SmemCopyAtomA{}, tiled_mma);
    auto smem_thr_copy_A = smem_tiled_copy_A.get_thread_slice(thread_idx);
    Tensor tCsA = smem_thr_copy_A.partition_S(
        as_position_independent_swizzle_tensor(sA));    // (CPY,CPY_M,CPY_K,PIPE)
    Tensor tCrA_copy = smem_thr_copy_A.retile_D(tCrA);  // (CPY,CPY_M,CPY_K)
    auto smem_tiled_copy_B = make_tiled_copy_B(SmemCopyAtomB{}, tiled_mma);
    auto smem_thr_copy_B = smem_tiled_copy_B.get_thread_slice(thread_idx);
    Tensor tCsB = smem_thr_copy_B.partition_S(
        as_position_independent_swizzle_tensor(sB));    // (CPY,CPY_N,CPY_K,PIPE)
    Tensor tCrB_copy = smem_thr_copy_B.retile_D(tCrB);  // (CPY,CPY_N,CPY_K)

    CUTE_STATIC_ASSERT_V(size<1>(tCrA) == size<1>(accum));
    CUTE_STATIC_ASSERT_V(size<1>(tCrB) == size<2>(accum));
    CUTE_STATIC_ASSERT_V(size<2>(tCsA) == size<2>(tCsB));

    pipeline.consumer_wait(smem_pipe_read);
    // Computes the first `atoms` of the warp's MMA atoms along N, which hold the tile's first columns.
    constexpr int kAtomsN = decltype(size<1>(tCrB))::value;
    constexpr int kCopiesN = decltype(size<1>(tCsB))::value;
    auto run = [&](auto atoms) {
      constexpr int kAtoms = decltype(atoms)::value;
      constexpr int kCopies = (kAtoms * kCopiesN + kAtomsN - 1) / kAtomsN;
      auto accum_part = leading<2, kAtoms>(accum);
      auto tCrB_part = leading<1, kAtoms>(tCrB);
      auto load_fragments = [&](int stage, auto k_block, auto slot) {
        copy(smem_tiled_copy_A, tCsA(_, _, k_block, stage), tCrA_copy(_, _, slot));
        CUTLASS_PRAGMA_UNROLL
        for (int n = 0; n < kCopies; ++n) {
          copy(smem_tiled_copy_B, tCsB(_, n, k_block, stage), tCrB_copy(_, n, slot));
        }
      };
      auto multiply = [&](auto slot) {
        cute::gemm(tiled_mma, tCrA(_, _, slot), tCrB_part(_, _, slot), accum_part);
      };
      // Something of every load of a slot: the first of the four registers that an ldmatrix fills.
      auto first_of_four = [](auto const& fragment) {
        auto words = recast<uint32_t>(fragment);
        uint32_t all = 0;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < size(words); i += 4) {
          all ^= words(i);
        }
        return all;
      };
      auto loaded = [&](auto slot) {
        uint32_t all = first_of_four(tCrA_copy(_, _, slot));
        CUTLASS_PRAGMA_UNROLL
        for (int n = 0; n < kCopies; ++n) {
          all ^= first_of_four(tCrB_copy(_, n, slot));
        }
        return all;
      };
      constexpr int kBlocks = decltype(size<2>(tCrA))::value;
      if constexpr (kBlocks > 1 && prefetch_fragments<FrgTensorC>()) {
        // Large tiles have no register left to collect what has been loaded.
        constexpr bool kCollects = decltype(size(accum))::value < 64;
        k_loop_prefetching<kBlocks, kCollects>(pipeline, smem_pipe_read, k_tile_count,
                                               load_fragments, multiply, loaded);
      } else {
        k_loop<kBlocks>(pipeline, smem_pipe_read, k_tile_count, load_fragments, multiply, loaded);
      }
    };
    if constexpr (SkipEmptyColumns) {
      static_assert(TileN % kAtomsN == 0);
      constexpr int kColumnsPerAtom = TileN / kAtomsN;
      int const columns = pipeline.consumer_word(smem_pipe_read);
      bool done = false;
      for_each(make_int_sequence<kAtomsN>{}, [&](auto i) {
        constexpr int kAtoms = decltype(i)::value + 1;
        if (!done && (columns <= kAtoms * kColumnsPerAtom || kAtoms == kAtomsN)) {
          run(Int<kAtoms>{});
          done = true;
        }
      });
    } else {
      run(Int<kAtomsN>{});
    }
  }

  /// Nothing to do: mma() releases every stage itself.
  CUTLASS_DEVICE void mma_tail(MainloopPipeline, PipelineState, int) {}

 private:
  static constexpr int TileN = cute::size<1>(TileShape{});

  // CUTLASS 4.2's default scheduler for SM120 leaves the consumers of its array shell waiting for
  // tiles that nobody produces.
  template <class ProblemShape>
  static constexpr void check_problem_shape() {
    static_assert(IsGroupedGemmKernel && !::sm12x::detail::is_array_problem_v<ProblemShape>,
                  "sm12x: only grouped problems (GroupProblemShape, layouts as pointers) are "
                  "supported, batched ones (ArrayProblemShape) are not");
  }

  // The first `Count` entries of a fragment along one mode, in place.
  template <int Mode, int Count, class Engine, class Layout>
  CUTLASS_DEVICE static auto leading(cute::Tensor<Engine, Layout>& fragment) {
    auto layout = fragment.layout();
    return cute::make_tensor(
        fragment.data(), cute::make_layout(cute::replace<Mode>(layout.shape(), cute::Int<Count>{}),
                                           layout.stride()));
  }

  // Both loops start when the first stage has arrived. A stage is released as soon as its last
  // fragments have arrived.

  // Fragments of the next k-block are loaded while the MMAs of this one issue, across k-tiles too. Without
  // Collects they are loaded from an address that depends on this block's: the last ones are then there after
  // all others.
  template <int kBlocks, bool Collects, class LoadFragments, class Multiply, class Loaded>
  CUTLASS_DEVICE static void k_loop_prefetching(MainloopPipeline& pipeline, PipelineState& state,
                                                int k_tile_count,
                                                LoadFragments const& load_fragments,
                                                Multiply const& multiply, Loaded const& loaded) {
    using namespace cute;
    load_fragments(state.index(), Int<0>{}, Int<0>{});
    auto k_tile = [&](auto is_last_tile) {
      uint32_t all_loaded = 0;
      for_each(make_int_sequence<kBlocks>{}, [&](auto k_block) {
        constexpr int kNext = (decltype(k_block)::value + 1) % kBlocks;
        uint32_t known = 0;
        if constexpr (kNext == 0 || Collects) {
          all_loaded ^= loaded(k_block);
        } else {
          known = ::sm12x::arch::zero_once_known(loaded(k_block));
        }
        if constexpr (kNext == 0) {
          pipeline.consumer_release(state, all_loaded);
          if constexpr (!decltype(is_last_tile)::value) {
            ++state;
            pipeline.consumer_wait(state);
          }
        }
        if constexpr (kNext != 0 || !decltype(is_last_tile)::value) {
          load_fragments(state.index() + known, Int<kNext>{}, Int<kNext>{});
        }
        multiply(k_block);
      });
    };
    CUTLASS_PRAGMA_NO_UNROLL
    for (; k_tile_count > 1; --k_tile_count) {
      k_tile(false_type{});
    }
    k_tile(true_type{});
  }

  template <int kBlocks, class LoadFragments, class Multiply, class Loaded>
  CUTLASS_DEVICE static void k_loop(MainloopPipeline& pipeline, PipelineState& state,
                                    int k_tile_count, LoadFragments const& load_fragments,
                                    Multiply const& multiply, Loaded const& loaded) {
    using namespace cute;
    while (true) {
      uint32_t all_loaded = 0;
      CUTLASS_PRAGMA_NO_UNROLL
      for (int k_block = 0; k_block < kBlocks; ++k_block) {
        load_fragments(state.index(), k_block, Int<0>{});
        all_loaded ^= loaded(Int<0>{});
        multiply(Int<0>{});
      }
      pipeline.consumer_release(state, all_loaded);
      if (--k_tile_count == 0) {
        break;
      }
      ++state;
      pipeline.consumer_wait(state);
    }
  }

  template <class TmaCopy, class Element, class Shape, class Stride>
  CUTLASS_DEVICE static void update_tensormap(cute::TmaDescriptor& shared_map,
                                              TmaCopy const& tma_copy, Element const* address,
                                              Shape const& shape, Stride const& stride) {
    using namespace cute;
    constexpr int kMaxTensorRank = 5;
    cute::array<uint32_t, kMaxTensorRank> extents = {1, 1, 1, 1, 1};
    cute::array<uint64_t, kMaxTensorRank> strides = {0, 0, 0, 0, 0};
    Tensor tensor =
        make_tensor(static_cast<SmemElement const*>(nullptr), make_layout(shape, stride));
    // Elements are one byte, so strides in elements are strides in bytes.
    static_assert(sizeof(SmemElement) == 1);
    cute::detail::fill_tma_gmem_shape_stride(tma_copy, tensor, extents, strides);
    tma_descriptor_replace_addr_in_shared_mem(shared_map, address);
    tma_descriptor_replace_dims_strides_in_shared_mem(shared_map, extents, strides);
  }

  /// Whether the main loop holds two k-blocks of fragments. On the sm_90a twin every fragment is
  /// widened to FP16 in registers, which beside 64 accumulators would spill.
  template <class FrgTensorC>
  CUTLASS_DEVICE static constexpr bool prefetch_fragments() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1200
    return decltype(cute::size(FrgTensorC{}))::value < 64;
#else
    return true;
#endif
  }

  // Of the producer warp only:
  int32_t columns_ = 0;     // N of the current group
  int tensormap_slot_ = 0;  // the slot that holds the current group's maps
};

}  // namespace cutlass::gemm::collective
