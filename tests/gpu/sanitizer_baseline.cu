// The same CUTLASS ptr-array shells with nothing of ours in them: what racecheck and synccheck
// report of this program is what they report of the shell. Built by hand for the GPU run
// (tests/gpu/README.md), run under compute-sanitizer.
//
//   SM12X_BASELINE_PINGPONG  1: Pingpong shell, 0: Cooperative
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

using namespace cute;

namespace {

#if SM12X_BASELINE_PINGPONG
using Schedule = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpongFP8FastAccum;
using EpilogueSchedule = cutlass::epilogue::PtrArrayTmaWarpSpecializedPingpong;
using TileShape = Shape<_64, _128, _128>;
#else
using Schedule = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperativeFP8FastAccum;
using EpilogueSchedule = cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative;
using TileShape = Shape<_128, _128, _128>;
#endif
using Element = cutlass::float_e4m3_t;
using ElementD = cutlass::bfloat16_t;
using ClusterShape = Shape<_1, _1, _1>;
using Extents = Shape<int, int, int>;
using ProblemShape = cutlass::gemm::GroupProblemShape<Extents>;

using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, cutlass::layout::RowMajor*,
    8, ElementD, cutlass::layout::RowMajor*, 8, EpilogueSchedule,
    cutlass::epilogue::fusion::LinearCombination<ElementD, float>>::CollectiveOp;
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor*, 16,
    Element, cutlass::layout::ColumnMajor*, 16, float, TileShape, ClusterShape,
    cutlass::gemm::collective::StageCount<3>, Schedule>::CollectiveOp;
using Kernel = cutlass::gemm::kernel::GemmUniversal<ProblemShape, Mainloop, Epilogue>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

void check(cudaError_t status) {
  if (status != cudaSuccess) {
    std::fprintf(stderr, "%s\n", cudaGetErrorString(status));
    std::exit(1);
  }
}

template <class T>
T* upload(std::vector<T> const& host) {
  T* device = nullptr;
  check(cudaMalloc(&device, host.size() * sizeof(T)));
  check(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return device;
}

template <class T>
T* filled(size_t count) {
  T* device = nullptr;
  check(cudaMalloc(&device, count * sizeof(T)));
  check(cudaMemset(device, 0x38, count * sizeof(T)));
  return device;
}

}  // namespace

int main() {
  std::vector<int> const rows = {5, 0, 130, 64, 1, 0, 33};
  int const n = 256, k = 272;
  std::vector<Extents> shapes;
  std::vector<Element const*> a, b;
  std::vector<ElementD*> d;
  std::vector<typename Kernel::InternalStrideA> stride_a;
  std::vector<typename Kernel::InternalStrideB> stride_b;
  std::vector<typename Kernel::InternalStrideD> stride_d;
  for (int m : rows) {
    shapes.push_back(make_shape(m, n, k));
    a.push_back(filled<Element>(size_t(m + 1) * k));
    b.push_back(filled<Element>(size_t(n) * k));
    d.push_back(filled<ElementD>(size_t(m + 1) * n));
    stride_a.push_back({k, _1{}, _0{}});
    stride_b.push_back({k, _1{}, _0{}});
    stride_d.push_back({n, _1{}, _0{}});
  }
  cutlass::KernelHardwareInfo hw_info;
  hw_info.device_id = 0;
  hw_info.sm_count = 8;  // few CTAs, so that each takes several tiles of several groups

  typename Gemm::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGrouped,
                                     {int(rows.size()), upload(shapes), nullptr},
                                     {upload(a), upload(stride_a), upload(b), upload(stride_b)},
                                     {{}, nullptr, nullptr, upload(d), upload(stride_d)},
                                     hw_info};
  arguments.epilogue.thread.alpha = 1.0f;
  arguments.epilogue.thread.beta = 0.0f;

  void* workspace = filled<char>(Gemm::get_workspace_size(arguments) + 1);
  Gemm gemm;
  if (gemm.can_implement(arguments) != cutlass::Status::kSuccess ||
      gemm.initialize(arguments, workspace) != cutlass::Status::kSuccess ||
      gemm.run() != cutlass::Status::kSuccess) {
    std::fprintf(stderr, "the CUTLASS baseline did not launch\n");
    return 1;
  }
  check(cudaDeviceSynchronize());
  std::puts("baseline ran");
  return 0;
}
