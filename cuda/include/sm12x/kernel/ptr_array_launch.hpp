/// Runs a CUTLASS ptr-array kernel shell from the flat launch struct of abi.h.
///
/// CUTLASS builds its parameters on the host. A cubin has no host code, so they are built here, on
/// the device and in registers: every pointer follows from the launch struct, every other field is
/// a constant of the kernel type.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/gemm/gemm.h>

#include "sm12x/abi.h"
#include "sm12x/kernel/group_arrays.hpp"

namespace sm12x::kernel {

static_assert(sizeof(sm12x_tensor_map) == sizeof(cute::TmaDescriptor));

template <class GemmKernel>
struct PtrArrayLaunch {
  using Params = typename GemmKernel::Params;
  using Mainloop = typename GemmKernel::CollectiveMainloop;
  using Epilogue = typename GemmKernel::CollectiveEpilogue;
  using ProblemShape = typename GemmKernel::ProblemShape;

  /// Tensor maps of one CTA: the main loop's ring, then one map of D per epilogue warp group.
  static constexpr int kMainloopBytesPerCta = static_cast<int>(Mainloop::workspace_bytes(1));
  static constexpr int kEpilogueBytesPerCta =
      static_cast<int>(Epilogue::NumEpilogueWarpGroups * sizeof(cute::TmaDescriptor));

  CUTLASS_DEVICE static Params params(sm12x_ptr_array_params const& launch) {
    GroupArrays const arrays(launch.group_arrays, launch.num_groups);
    auto* maps = reinterpret_cast<uint8_t*>(launch.tensor_maps);

    Params params;
    params.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
    params.problem_shape.num_groups = launch.num_groups;
    params.problem_shape.problem_shapes =
        arrays.at<typename ProblemShape::UnderlyingProblemShape>(SM12X_OFFSET_SHAPE);
    params.hw_info.sm_count = launch.ctas;

    using A = typename Mainloop::ElementA;
    using B = typename Mainloop::ElementB;
    params.mainloop.tma_load_a.tma_desc_ = descriptor(launch.map_a);
    params.mainloop.tma_load_b.tma_desc_ = descriptor(launch.map_b);
    params.mainloop.tensormaps = reinterpret_cast<cute::TmaDescriptor*>(maps);
    params.mainloop.ptr_A = arrays.at<A const*>(SM12X_OFFSET_PTR_A);
    params.mainloop.dA = arrays.at<typename Mainloop::InternalStrideA>(SM12X_OFFSET_STRIDE_A);
    params.mainloop.ptr_B = arrays.at<B const*>(SM12X_OFFSET_PTR_B);
    params.mainloop.dB = arrays.at<typename Mainloop::InternalStrideB>(SM12X_OFFSET_STRIDE_B);

    using D = typename Epilogue::ElementD;
    // The visitor tree of GroupScaledAcc: ((m_scale, n_scale), accumulator, bias).
    auto& fusion = params.epilogue.thread;
    fusion.op_0.op_0 = {arrays.at<float const*>(SM12X_OFFSET_M_SCALE),
                        arrays.at<int32_t>(SM12X_OFFSET_M_SCALE_STRIDE)};
    fusion.op_0.op_1 = {arrays.at<float const*>(SM12X_OFFSET_N_SCALE),
                        arrays.at<int32_t>(SM12X_OFFSET_N_SCALE_STRIDE)};
    fusion.op_2 = {arrays.at<void const*>(SM12X_OFFSET_BIAS), launch.bias_type};
    params.epilogue.tma_store_d.tma_desc_ = descriptor(launch.map_d);
    params.epilogue.tensormaps =
        reinterpret_cast<cute::TmaDescriptor*>(maps + int64_t(launch.ctas) * kMainloopBytesPerCta);
    params.epilogue.ptr_C = nullptr;
    params.epilogue.ptr_D = arrays.at<D*>(SM12X_OFFSET_PTR_D);
    params.epilogue.dD = arrays.at<typename Epilogue::InternalStrideD>(SM12X_OFFSET_STRIDE_D);

    params.scheduler.problem_shapes = params.problem_shape;
    return params;
  }

 private:
  CUTLASS_DEVICE static cute::TmaDescriptor const& descriptor(sm12x_tensor_map const& map) {
    return reinterpret_cast<cute::TmaDescriptor const&>(map);
  }
};

}  // namespace sm12x::kernel
