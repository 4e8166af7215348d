// What NVIDIA/cutlass#3263 asks for, written out, and nothing else: a grouped (ptr-array) FP8 GEMM
// for SM120 by CUTLASS's own names. CUTLASS 4.2 to 4.5 alone refuse the main loop's builder; with
// <sm12x/cutlass.hpp> the program compiles and runs.
//
// It runs a few groups and compares them with the host; the exit status is 0 where they agree.

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include <sm12x/cutlass.hpp>

using namespace cute;

using ElementA = cutlass::float_e4m3_t;
using ElementB = cutlass::float_e4m3_t;
using ElementD = cutlass::bfloat16_t;
using ProblemShape = cutlass::gemm::GroupProblemShape<Shape<int, int, int>>;
using TileShape = Shape<_128, _128, _128>;
using ClusterShape = Shape<_1, _1, _1>;

using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm120, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, cutlass::layout::RowMajor*,
    8, ElementD, cutlass::layout::RowMajor*, 8,
    cutlass::epilogue::collective::EpilogueScheduleAuto>::CollectiveOp;

using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm120, cutlass::arch::OpClassTensorOp, ElementA, cutlass::layout::RowMajor*, 16,
    ElementB, cutlass::layout::ColumnMajor*, 16, float, TileShape, ClusterShape,
    cutlass::gemm::collective::StageCountAutoCarveout<sizeof(typename Epilogue::SharedStorage)>,
    cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperativeSm120<2>>::CollectiveOp;

using Kernel = cutlass::gemm::kernel::GemmUniversal<ProblemShape, Mainloop, Epilogue>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
static_assert(sm12x::fits_v<Kernel>);

void check(cudaError_t status, char const* what) {
  if (status != cudaSuccess) {
    std::fprintf(stderr, "issue_3263: %s: %s\n", what, cudaGetErrorString(status));
    std::exit(1);
  }
}

void check(cutlass::Status status, char const* what) {
  if (status != cutlass::Status::kSuccess) {
    std::fprintf(stderr, "issue_3263: %s: %s\n", what, cutlassGetStatusString(status));
    std::exit(1);
  }
}

template <class T>
T* upload(std::vector<T> const& host) {
  T* device = nullptr;
  check(cudaMalloc(&device, host.size() * sizeof(T)), "cudaMalloc");
  check(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice),
        "cudaMemcpy");
  return device;
}

std::vector<ElementA> random_matrix(std::mt19937& random, int rows, int columns) {
  std::normal_distribution<float> normal;
  std::vector<ElementA> matrix(size_t(rows) * columns + 1);  // an empty one has an address too
  for (ElementA& element : matrix) {
    element = ElementA(normal(random));
  }
  return matrix;
}

// The largest error of a group's D, as a part of what FP32 accumulation and one rounding allow.
double worst_error(std::vector<ElementA> const& a, std::vector<ElementB> const& b,
                   std::vector<ElementD> const& d, int M, int N, int K, float alpha) {
  double worst = 0.0;
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      double sum = 0.0, magnitude = 0.0;
      for (int k = 0; k < K; ++k) {
        double const product = double(float(a[size_t(m) * K + k])) * float(b[size_t(n) * K + k]);
        sum += product;
        magnitude += std::abs(product);
      }
      double const expected = alpha * sum;
      double const ulp = std::ldexp(1.0, std::ilogb(std::abs(expected) + 0x1p-100) - 7);
      double const bound = ulp + 0x1p-20 * (K / 32.0) * alpha * magnitude;
      double const error = std::abs(double(float(d[size_t(m) * N + n])) - expected) / bound;
      worst = std::isnan(error) ? INFINITY : std::max(worst, error);
    }
  }
  return worst;
}

int main() {
  // Ragged rows, an empty group, N and K that are no multiple of the tile.
  std::vector<Shape<int, int, int>> const shapes = {
      {1, 256, 512}, {0, 256, 512}, {130, 384, 400}, {64, 128, 128}, {257, 136, 1040}};
  int const groups = int(shapes.size());
  float const alpha = 0.5f;

  std::mt19937 random(3263);
  std::vector<std::vector<ElementA>> a, b;
  std::vector<ElementA const*> ptr_a;
  std::vector<ElementB const*> ptr_b;
  std::vector<ElementD*> ptr_d;
  std::vector<typename Kernel::InternalStrideA> stride_a;
  std::vector<typename Kernel::InternalStrideB> stride_b;
  std::vector<typename Kernel::InternalStrideD> stride_d;
  for (auto [M, N, K] : shapes) {
    a.push_back(random_matrix(random, M, K));
    b.push_back(random_matrix(random, N, K));
    ptr_a.push_back(upload(a.back()));
    ptr_b.push_back(upload(b.back()));
    ptr_d.push_back(upload(std::vector<ElementD>(size_t(M) * N + 1)));
    stride_a.push_back({K, _1{}, _0{}});
    stride_b.push_back({K, _1{}, _0{}});
    stride_d.push_back({N, _1{}, _0{}});
  }

  cutlass::KernelHardwareInfo hw_info;
  check(cudaGetDevice(&hw_info.device_id), "cudaGetDevice");
  hw_info.sm_count =
      cutlass::KernelHardwareInfo::query_device_multiprocessor_count(hw_info.device_id);

  typename Gemm::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGrouped,
      {groups, upload(shapes), shapes.data()},
      {upload(ptr_a), upload(stride_a), upload(ptr_b), upload(stride_b)},
      {{}, nullptr, nullptr, upload(ptr_d), upload(stride_d)},
      hw_info};
  arguments.epilogue.thread.alpha = alpha;
  arguments.epilogue.thread.beta = 0.0f;

  void* workspace = nullptr;
  check(cudaMalloc(&workspace, Gemm::get_workspace_size(arguments)), "cudaMalloc");
  Gemm gemm;
  check(gemm.can_implement(arguments), "can_implement");
  check(gemm.initialize(arguments, workspace), "initialize");
  check(gemm.run(), "run");
  check(cudaDeviceSynchronize(), "the kernel");

  double worst = 0.0;
  for (int group = 0; group < groups; ++group) {
    auto [M, N, K] = shapes[size_t(group)];
    std::vector<ElementD> d(size_t(M) * N);
    check(cudaMemcpy(d.data(), ptr_d[size_t(group)], d.size() * sizeof(ElementD),
                     cudaMemcpyDeviceToHost),
          "cudaMemcpy");
    worst = std::max(worst, worst_error(a[size_t(group)], b[size_t(group)], d, M, N, K, alpha));
  }
  bool const good = worst <= 1.0;
  std::printf("issue_3263: %s, %d groups, worst error %.3f of its bound, %d stages\n",
              good ? "passed" : "FAILED", groups, worst, Mainloop::DispatchPolicy::Stages);
  return good ? 0 : 1;
}
