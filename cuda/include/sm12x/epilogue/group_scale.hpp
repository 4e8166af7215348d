/// The scale fusions of a grouped GEMM: D = act(m_scale * n_scale * acc (+ bias)), per group.
///
/// Each scale is one value or a vector, decided at run time group by group; it multiplies
/// (dequantises). m_scale runs along the kernel's M side, n_scale along N; the bias runs along the
/// output features, which are N, or M where the operands are swapped. Everything is FP32 up to one
/// rounding to D's type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/dispatch_policy.hpp>
#include <cutlass/epilogue/fusion/callbacks.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_compute_tma_warpspecialized.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_load_tma_warpspecialized.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>

#include "sm12x/abi.h"

namespace sm12x::epilogue {

/// Which side of the output a vector runs along.
inline constexpr int kAlongM = 0;
inline constexpr int kAlongN = 1;

/// Reads a group's scale. Both arrays are on the device, one entry per group. A null array means 1
/// for all groups.
struct ScaleSource {
  struct Arguments {
    float const* const* values = nullptr;  ///< the group's scale: one value or a vector
    int32_t const* strides = nullptr;      ///< 0: one value, 1: a vector. Null: vectors throughout
  };

  static constexpr float kDefault = 1.0f;
  float const* values_ = nullptr;
  int32_t stride_ = 0;

  CUTLASS_DEVICE ScaleSource(Arguments const& args, int group) {
    if (args.values != nullptr) {
      values_ = args.values[group];
      stride_ = args.strides != nullptr ? args.strides[group] : 1;
    }
  }
  CUTLASS_DEVICE bool empty() const { return values_ == nullptr; }
  CUTLASS_DEVICE float operator()(int64_t index) const { return values_[index * stride_]; }
};

/// Reads a group's bias in any of the three types. A null array, or a null entry, means 0.
struct BiasSource {
  struct Arguments {
    void const* const* values = nullptr;
    int32_t type = SM12X_BIAS_FLOAT32;
  };

  static constexpr float kDefault = 0.0f;
  void const* values_ = nullptr;
  int32_t type_;

  CUTLASS_DEVICE BiasSource(Arguments const& args, int group) : type_(args.type) {
    if (args.values != nullptr) {
      values_ = args.values[group];
    }
  }
  CUTLASS_DEVICE bool empty() const { return values_ == nullptr; }
  CUTLASS_DEVICE float operator()(int64_t index) const {
    if (type_ == SM12X_BIAS_FLOAT32) {
      return static_cast<float const*>(values_)[index];
    }
    if (type_ == SM12X_BIAS_BFLOAT16) {
      return __bfloat162float(static_cast<__nv_bfloat16 const*>(values_)[index]);
    }
    return __half2float(static_cast<__half const*>(values_)[index]);
  }
};

/// Epilogue visitor leaf: a vector along one side of the output, or one value, broadcast over the
/// other side. Values are read once per tile into registers, only those inside the group's output.
template <int Side, class Source>
struct GroupBroadcast {
  static_assert(Side == kAlongM || Side == kAlongN);

  struct SharedStorage {};
  using Arguments = typename Source::Arguments;
  using Params = Arguments;

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(ProblemShape const&, Arguments const& args,
                                                  void*) {
    return args;
  }
  template <class ProblemShape>
  static bool can_implement(ProblemShape const&, Arguments const&) {
    return true;
  }
  template <class ProblemShape>
  static size_t get_workspace_size(ProblemShape const&, Arguments const&) {
    return 0;
  }
  template <class ProblemShape>
  static cutlass::Status initialize_workspace(ProblemShape const&, Arguments const&, void*,
                                              cudaStream_t, cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE GroupBroadcast() {}
  CUTLASS_HOST_DEVICE GroupBroadcast(Params const& params_, SharedStorage const&)
      : params(params_) {}

  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_zero() const { return false; }

  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(
      cutlass::epilogue::fusion::detail::ProducerLoadArgs<Args...> const&) {
    return cutlass::epilogue::fusion::detail::EmptyProducerLoadCallbacks{};
  }

  template <class RTensor, class CTensor, class Residue>
  struct ConsumerStoreCallbacks : cutlass::epilogue::fusion::detail::EmptyConsumerStoreCallbacks {
    CUTLASS_DEVICE ConsumerStoreCallbacks(RTensor values_, CTensor coords_, Residue residue_,
                                          int32_t extent_, int32_t group_, Params const& params_)
        : values(values_),
          coords(coords_),
          residue(residue_),
          extent(extent_),
          group(group_),
          params(params_) {}

    RTensor values;   // (CPY,CPY_M,CPY_N,EPI_M,EPI_N), stride 0 along the other side
    CTensor coords;   // likewise, relative to the thread's first element
    Residue residue;  // the group's extents minus the coordinates of the thread's first element
    int32_t extent;   // of the group's output along Side
    int32_t group;
    Params const& params;

    CUTLASS_DEVICE void begin() {
      using namespace cute;
      Source const source(params, group);
      constexpr float kDefault = Source::kDefault;  // a copy: fill() binds a reference
      fill(values, kDefault);
      if (source.empty()) {
        return;
      }
      // Modes of stride 0 hold copies of one register: visit each register once.
      Tensor values_flat = filter_zeros(values);
      Tensor coords_flat = filter_zeros(coords, values.stride());
      int64_t const first = extent - get<Side>(residue);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < size(values_flat); ++i) {
        auto coord = coords_flat(i);
        if (elem_less(get<Side>(coord), get<Side>(residue))) {
          values_flat(i) = source(first + get<Side>(coord));
        }
      }
    }

    template <class ElementAccumulator, int FragmentSize>
    CUTLASS_DEVICE cutlass::Array<float, FragmentSize> visit(
        cutlass::Array<ElementAccumulator, FragmentSize> const&, int epi_v, int epi_m, int epi_n) {
      cutlass::Array<float, FragmentSize> fragment;
      auto values_mn = values(cute::_, cute::_, cute::_, epi_m, epi_n);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < FragmentSize; ++i) {
        fragment[i] = values_mn(epi_v * FragmentSize + i);
      }
      return fragment;
    }
  };

  template <bool ReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      cutlass::epilogue::fusion::detail::ConsumerStoreArgs<Args...> const& args) {
    using namespace cute;
    int32_t const M = get<0>(args.problem_shape_mnkl);
    int32_t const N = get<1>(args.problem_shape_mnkl);
    int32_t const group = get<3>(args.tile_coord_mnkl);
    // A tensor of the output's shape that is constant along the other side; only its layout is
    // used.
    auto layout = [&] {
      if constexpr (Side == kAlongM) {
        return make_layout(make_shape(M, N, Int<1>{}), Stride<_1, _0, _0>{});
      } else {
        return make_layout(make_shape(M, N, Int<1>{}), Stride<_0, _1, _0>{});
      }
    }();
    Tensor broadcast = make_tensor(make_gmem_ptr(static_cast<float const*>(nullptr)), layout);
    Tensor partitioned = cutlass::epilogue::fusion::sm90_partition_for_epilogue<ReferenceSrc>(
        broadcast, args.tile_shape_mnk, args.tile_coord_mnkl, args.epi_tile, args.tiled_copy,
        args.thread_idx);
    Tensor values = make_tensor_like<float>(partitioned);  // (CPY,CPY_M,CPY_N,EPI_M,EPI_N)
    return ConsumerStoreCallbacks<decltype(values), decltype(args.tCcD),
                                  decltype(args.residue_tCcD)>(
        values, args.tCcD, args.residue_tCcD, Side == kAlongM ? M : N, group, params);
  }

  Params params;
};

/// Fusion operation: D = m_scale * n_scale * acc + bias, each per group; BiasSide says along which
/// side the output features run (kAlongN, or kAlongM where the operands are swapped).
template <class ElementOutput_, int BiasSide_ = kAlongN,
          cutlass::FloatRoundStyle RoundStyle_ = cutlass::FloatRoundStyle::round_to_nearest>
struct GroupScaledAcc : cutlass::epilogue::fusion::FusionOperation {
  using ElementOutput = ElementOutput_;
  using ElementCompute = float;
  static constexpr int BiasSide = BiasSide_;
  static constexpr auto RoundStyle = RoundStyle_;
};

/// Fusion operation: D = activation(m_scale * n_scale * acc + bias), with an activation of
/// cutlass::epilogue::thread such as SiLu, GELU or ReLu, computed in FP32.
template <template <class> class ActivationFn_, class ElementOutput_, int BiasSide_ = kAlongN,
          cutlass::FloatRoundStyle RoundStyle_ = cutlass::FloatRoundStyle::round_to_nearest>
struct GroupScaledAccEltAct : GroupScaledAcc<ElementOutput_, BiasSide_, RoundStyle_> {
  using ActivationFn = ActivationFn_<float>;
  static constexpr bool IsEltActSupported = true;
};

/// GroupScaledAcc as a visitor tree, to build on.
template <class ElementOutput, int BiasSide, cutlass::FloatRoundStyle RoundStyle>
using GroupScaledAccTree = cutlass::epilogue::fusion::Sm90EVT<
    cutlass::epilogue::fusion::Sm90Compute<cutlass::homogeneous_multiply_add, ElementOutput, float,
                                           RoundStyle>,
    cutlass::epilogue::fusion::Sm90EVT<
        cutlass::epilogue::fusion::Sm90Compute<cutlass::multiplies, float, float, RoundStyle>,
        GroupBroadcast<kAlongM, ScaleSource>, GroupBroadcast<kAlongN, ScaleSource>>,
    cutlass::epilogue::fusion::Sm90AccFetch, GroupBroadcast<BiasSide, BiasSource>>;

/// GroupScaledAccEltAct as a visitor tree.
template <template <class> class ActivationFn, class ElementOutput, int BiasSide,
          cutlass::FloatRoundStyle RoundStyle>
using GroupScaledAccEltActTree = cutlass::epilogue::fusion::Sm90EVT<
    cutlass::epilogue::fusion::Sm90Compute<ActivationFn, ElementOutput, float, RoundStyle>,
    GroupScaledAccTree<float, BiasSide, RoundStyle>>;

}  // namespace sm12x::epilogue

namespace cutlass::epilogue::fusion {

template <int StagesC, int StagesD, int FragmentSize, bool ReuseSmemC, bool DelayTmaStore,
          int NumEpilogueWarpGroups, class ElementOutput, int BiasSide, FloatRoundStyle RoundStyle,
          class CtaTileShapeMNK, class EpilogueTile>
struct FusionCallbacks<
    epilogue::Sm120PtrArrayTmaWarpSpecialized<StagesC, StagesD, FragmentSize, ReuseSmemC,
                                              DelayTmaStore, NumEpilogueWarpGroups>,
    ::sm12x::epilogue::GroupScaledAcc<ElementOutput, BiasSide, RoundStyle>, CtaTileShapeMNK,
    EpilogueTile> : ::sm12x::epilogue::GroupScaledAccTree<ElementOutput, BiasSide, RoundStyle> {
  using Impl = ::sm12x::epilogue::GroupScaledAccTree<ElementOutput, BiasSide, RoundStyle>;
  using Operation = ::sm12x::epilogue::GroupScaledAcc<ElementOutput, BiasSide, RoundStyle>;

  /// Arrays on the device with one entry per group; null: scales of 1, no bias.
  struct Arguments {
    ::sm12x::epilogue::ScaleSource::Arguments m_scale{};
    ::sm12x::epilogue::ScaleSource::Arguments n_scale{};
    ::sm12x::epilogue::BiasSource::Arguments bias{};

    CUTLASS_HOST_DEVICE constexpr operator typename Impl::Arguments() const {
      return {
          {m_scale, n_scale, {}},  // m_scale * n_scale
          {},                      // acc
          bias,                    // bias
          {}                       // multiply-add
      };
    }
  };

  using Impl::Impl;
};

template <int StagesC, int StagesD, int FragmentSize, bool ReuseSmemC, bool DelayTmaStore,
          int NumEpilogueWarpGroups, template <class> class ActivationFn, class ElementOutput,
          int BiasSide, FloatRoundStyle RoundStyle, class CtaTileShapeMNK, class EpilogueTile>
struct FusionCallbacks<
    epilogue::Sm120PtrArrayTmaWarpSpecialized<StagesC, StagesD, FragmentSize, ReuseSmemC,
                                              DelayTmaStore, NumEpilogueWarpGroups>,
    ::sm12x::epilogue::GroupScaledAccEltAct<ActivationFn, ElementOutput, BiasSide, RoundStyle>,
    CtaTileShapeMNK, EpilogueTile>
    : ::sm12x::epilogue::GroupScaledAccEltActTree<ActivationFn, ElementOutput, BiasSide,
                                                  RoundStyle> {
  using Impl = ::sm12x::epilogue::GroupScaledAccEltActTree<ActivationFn, ElementOutput, BiasSide,
                                                           RoundStyle>;
  using Operation =
      ::sm12x::epilogue::GroupScaledAccEltAct<ActivationFn, ElementOutput, BiasSide, RoundStyle>;

  /// As GroupScaledAcc's, and the activation's own arguments where it has any.
  struct Arguments {
    ::sm12x::epilogue::ScaleSource::Arguments m_scale{};
    ::sm12x::epilogue::ScaleSource::Arguments n_scale{};
    ::sm12x::epilogue::BiasSource::Arguments bias{};
    using ActivationArguments =
        typename Sm90Compute<ActivationFn, ElementOutput, float, RoundStyle>::Arguments;
    ActivationArguments activation{};

    CUTLASS_HOST_DEVICE constexpr operator typename Impl::Arguments() const {
      return {
          {
              {m_scale, n_scale, {}},  // m_scale * n_scale
              {},                      // acc
              bias,                    // bias
              {}                       // multiply-add
          },
          activation  // activation
      };
    }
  };

  using Impl::Impl;
};

}  // namespace cutlass::epilogue::fusion
