// CUTLASS's own block-scaled grouped SM120 kernels: pointers, strides, shapes and scale layouts of
// every group in device memory, tensor maps edited by the kernel (see programs.toml about that).

#include "gemm_program.hpp"

#include <cutlass/gemm/group_array_problem_shape.hpp>

using namespace cute;
using namespace emulated;

using ProblemShape = cutlass::gemm::GroupProblemShape<Shape<int, int, int>>;
using TileShape = Shape<_128, _128, _128>;
using Scaled = cutlass::arch::OpClassBlockScaledTensorOp;
using ElementD = cutlass::bfloat16_t;

template <class Element, int kAlignment, class Schedule>
struct Case {
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm120, Scaled, TileShape, Shape<_1, _1, _1>,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void,
      cutlass::layout::RowMajor*, 8, ElementD, cutlass::layout::RowMajor*, 8,
      cutlass::epilogue::collective::EpilogueScheduleAuto>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm120, Scaled, Element, cutlass::layout::RowMajor*, kAlignment, Element,
      cutlass::layout::ColumnMajor*, kAlignment, float, TileShape, Shape<_1, _1, _1>,
      cutlass::gemm::collective::StageCountAutoCarveout<int(
          sizeof(typename Epilogue::SharedStorage))>,
      Schedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<ProblemShape, Mainloop, Epilogue>;
};

struct Group {
  int m, n, k;
  Operand a, b;
  Scales sfa, sfb;
  float alpha;
};

template <class Case>
bool run(char const* name, std::vector<Shape<int, int, int>> const& shapes, uint64_t seed) {
  using Kernel = typename Case::Kernel;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using Mainloop = typename Case::Mainloop;
  using Config = typename Mainloop::Sm1xxBlkScaledConfig;
  using ElementA = typename Gemm::ElementA;
  using ElementSF = typename Mainloop::ElementSF;
  using StrideA = typename Kernel::InternalStrideA;
  using StrideB = typename Kernel::InternalStrideB;
  using StrideC = typename Kernel::InternalStrideC;
  using StrideD = typename Kernel::InternalStrideD;
  using LayoutSFA = typename Mainloop::InternalLayoutSFA;
  using LayoutSFB = typename Mainloop::InternalLayoutSFB;

  Random random(seed);
  std::vector<Group> groups;
  std::vector<StrideA> stride_a;
  std::vector<StrideB> stride_b;
  std::vector<StrideC> stride_c;
  std::vector<StrideD> stride_d;
  std::vector<LayoutSFA> layout_sfa;
  std::vector<LayoutSFB> layout_sfb;
  std::vector<void const*> ptr_a, ptr_b;
  std::vector<ElementSF const*> ptr_sfa, ptr_sfb;
  std::vector<ElementD*> ptr_d;
  std::vector<float> alpha;
  for (auto [m, n, k] : shapes) {
    layout_sfa.push_back(Config::tile_atom_to_shape_SFA(make_shape(m, n, k, 1)));
    layout_sfb.push_back(Config::tile_atom_to_shape_SFB(make_shape(m, n, k, 1)));
    Group group{m,
                n,
                k,
                random_operand(random, format_of<ElementA>, m, k, 6),
                random_operand(random, format_of<ElementA>, n, k, 6),
                random_scales<ElementSF>(random, layout_sfa.back(), m, k, Config::SFVecSize),
                random_scales<ElementSF>(random, layout_sfb.back(), n, k, Config::SFVecSize),
                float(1 + random() % 7) / 4.0f};
    stride_a.push_back(cutlass::make_cute_packed_stride(StrideA{}, {m, k, 1}));
    stride_b.push_back(cutlass::make_cute_packed_stride(StrideB{}, {n, k, 1}));
    stride_c.push_back(cutlass::make_cute_packed_stride(StrideC{}, {m, n, 1}));
    stride_d.push_back(cutlass::make_cute_packed_stride(StrideD{}, {m, n, 1}));
    ptr_a.push_back(upload(group.a.packed));
    ptr_b.push_back(upload(group.b.packed));
    ptr_sfa.push_back(reinterpret_cast<ElementSF const*>(upload(group.sfa.bytes)));
    ptr_sfb.push_back(reinterpret_cast<ElementSF const*>(upload(group.sfb.bytes)));
    ptr_d.push_back(device_array<ElementD>(size_t(m) * n));
    alpha.push_back(group.alpha);
    groups.push_back(std::move(group));
  }
  float* const alpha_device = upload(alpha);
  std::vector<float const*> alpha_pointers;
  for (size_t i = 0; i < groups.size(); ++i) {
    alpha_pointers.push_back(alpha_device + i);
  }

  typename Gemm::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
  arguments.problem_shape = {int(groups.size()), upload(shapes), nullptr};
  auto& mainloop = arguments.mainloop;
  mainloop.ptr_A = reinterpret_cast<decltype(mainloop.ptr_A)>(upload(ptr_a));
  mainloop.ptr_B = reinterpret_cast<decltype(mainloop.ptr_B)>(upload(ptr_b));
  mainloop.ptr_SFA = upload(ptr_sfa);
  mainloop.ptr_SFB = upload(ptr_sfb);
  mainloop.dA = upload(stride_a);
  mainloop.dB = upload(stride_b);
  mainloop.layout_SFA = upload(layout_sfa);
  mainloop.layout_SFB = upload(layout_sfb);
  auto& epilogue = arguments.epilogue;
  epilogue.thread.alpha_ptr_array = upload(alpha_pointers);
  epilogue.thread.dAlpha = {_0{}, _0{}, 1};
  epilogue.ptr_D = upload(ptr_d);
  epilogue.dC = upload(stride_c);
  epilogue.dD = upload(stride_d);
  arguments.hw_info.sm_count = cutlass::KernelHardwareInfo::query_device_multiprocessor_count(0);

  Gemm gemm;
  check(gemm.can_implement(arguments), "can_implement");
  check(gemm.initialize(arguments, device_array<uint8_t>(Gemm::get_workspace_size(arguments))),
        "initialize");
  check(gemm.run(), "run");
  check(cudaDeviceSynchronize(), "the kernel");

  Verdict verdict;
  for (size_t i = 0; i < groups.size(); ++i) {
    Group const& group = groups[i];
    std::vector<ElementD> d(size_t(group.m) * group.n);
    check(cudaMemcpy(d.data(), ptr_d[i], d.size() * sizeof(ElementD), cudaMemcpyDeviceToHost),
          "cudaMemcpy to the host");
    compare(
        verdict, group.m, group.n, group.k, group.alpha, 0.0, 7,
        [&](int m, int n, int k) {
          return group.a.at(m, k) * group.sfa.at(m, k) * group.b.at(n, k) * group.sfb.at(n, k);
        },
        [&](int m, int n) { return double(float(d[size_t(m) * group.n + n])); },
        [](int, int) { return 0.0; });
  }
  return report(name, verdict, Mainloop::DispatchPolicy::Stages);
}

int main(int argc, char** argv) {
  using e4m3 = cutlass::float_e4m3_t;
  using e2m1 = cutlass::float_e2m1_t;
  uint64_t const seed = seed_of(argc, argv);
  using Pingpong = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpong;
  using Auto = cutlass::gemm::collective::KernelScheduleAuto;
  // More tiles than SMs, edges on all sides.
  bool good = run<Case<cutlass::nv_float4_t<e2m1>, 32, Pingpong>>(
      "grouped nvfp4, pingpong", {{136, 128, 256}, {1, 264, 416}, {256, 136, 64}}, seed);
  good &= run<Case<cutlass::mx_float8_t<e4m3>, 16, Auto>>(
      "grouped mxfp8", {{64, 136, 160}, {200, 128, 384}, {5, 8, 128}}, seed + 1);
  return good ? 0 : 1;
}
