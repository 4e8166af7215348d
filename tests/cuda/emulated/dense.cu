// CUTLASS's own dense SM120 kernels: kind::f8f6f4 with operands of different widths, which brings
// tensor maps and ldmatrix forms that unpack 4 and 6 bits, and block-scaled kinds with every
// scale type.

#include "gemm_program.hpp"

using namespace cute;
using namespace emulated;

/// ElementA and ElementB as the builders take them: float_e4m3_t, or mx_float8_t<float_e4m3_t>.
template <class Class_, class ElementA_, int kAlignmentA_, class ElementB_, int kAlignmentB_,
          class TileShape_, class Schedule_, class ElementC_, class ElementD_>
struct Case {
  using ElementA = ElementA_;
  using ElementB = ElementB_;
  using ElementC = ElementC_;
  using ElementD = ElementD_;
  static constexpr int kAlignment = 16 / int(sizeof(ElementD));
  static constexpr bool kScaled =
      cute::is_same_v<Class_, cutlass::arch::OpClassBlockScaledTensorOp>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm120, Class_, TileShape_, Shape<_1, _1, _1>,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, ElementC,
      cutlass::layout::RowMajor, kAlignment, ElementD, cutlass::layout::RowMajor, kAlignment,
      cutlass::epilogue::collective::EpilogueScheduleAuto>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm120, Class_, ElementA, cutlass::layout::RowMajor, kAlignmentA_, ElementB,
      cutlass::layout::ColumnMajor, kAlignmentB_, float, TileShape_, Shape<_1, _1, _1>,
      cutlass::gemm::collective::StageCountAutoCarveout<int(
          sizeof(typename Epilogue::SharedStorage))>,
      Schedule_>::CollectiveOp;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;
};

template <class Case>
bool run(char const* name, int M, int N, int K, uint64_t seed) {
  using Kernel = typename Case::Kernel;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using Mainloop = typename Case::Mainloop;
  using ElementA = typename Gemm::ElementA;
  using ElementB = typename Gemm::ElementB;
  using ElementC = typename Case::ElementC;
  using ElementD = typename Case::ElementD;
  constexpr bool kScaled = Case::kScaled;
  constexpr bool kHasC = !cute::is_void_v<ElementC>;

  Random random(seed);
  Operand const a = random_operand(random, format_of<ElementA>, M, K, 6);
  Operand const b = random_operand(random, format_of<ElementB>, N, K, 6);
  float const alpha = 0.375f, beta = kHasC ? -1.25f : 0.0f;
  using Loaded = cute::conditional_t<kHasC, ElementC, ElementD>;
  std::vector<Loaded> c(size_t(M) * N);
  for (Loaded& element : c) {
    element = Loaded(float(int(random() % 512) - 256) / 16.0f);
  }
  ElementD* const d_device = device_array<ElementD>(size_t(M) * N);

  using StrideA = typename Kernel::StrideA;
  using StrideB = typename Kernel::StrideB;
  using StrideC = typename Kernel::StrideC;
  using StrideD = typename Kernel::StrideD;
  typename Gemm::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = {M, N, K, 1};
  auto& mainloop = arguments.mainloop;
  mainloop.ptr_A = reinterpret_cast<decltype(mainloop.ptr_A)>(upload(a.packed));
  mainloop.ptr_B = reinterpret_cast<decltype(mainloop.ptr_B)>(upload(b.packed));
  mainloop.dA = cutlass::make_cute_packed_stride(StrideA{}, {M, K, 1});
  mainloop.dB = cutlass::make_cute_packed_stride(StrideB{}, {N, K, 1});
  Scales sfa{K, {}, {}, 1}, sfb{K, {}, {}, 1};
  if constexpr (kScaled) {
    using Config = typename Mainloop::Sm1xxBlkScaledConfig;
    using ElementSF = typename Mainloop::ElementSF;
    mainloop.layout_SFA = Config::tile_atom_to_shape_SFA(make_shape(M, N, K, 1));
    mainloop.layout_SFB = Config::tile_atom_to_shape_SFB(make_shape(M, N, K, 1));
    sfa = random_scales<ElementSF>(random, mainloop.layout_SFA, M, K, Config::SFVecSize);
    sfb = random_scales<ElementSF>(random, mainloop.layout_SFB, N, K, Config::SFVecSize);
    mainloop.ptr_SFA = reinterpret_cast<ElementSF const*>(upload(sfa.bytes));
    mainloop.ptr_SFB = reinterpret_cast<ElementSF const*>(upload(sfb.bytes));
  } else {
    sfa.values.assign(size_t(M), 1.0);
    sfb.values.assign(size_t(N), 1.0);
  }
  auto& epilogue = arguments.epilogue;
  epilogue.thread.alpha = alpha;
  epilogue.thread.beta = beta;
  if constexpr (kHasC) {
    epilogue.ptr_C = upload(c);
  }
  epilogue.dC = cutlass::make_cute_packed_stride(StrideC{}, {M, N, 1});
  epilogue.ptr_D = d_device;
  epilogue.dD = cutlass::make_cute_packed_stride(StrideD{}, {M, N, 1});
  arguments.hw_info.sm_count = cutlass::KernelHardwareInfo::query_device_multiprocessor_count(0);

  Gemm gemm;
  check(gemm.can_implement(arguments), "can_implement");
  check(gemm.initialize(arguments, device_array<uint8_t>(Gemm::get_workspace_size(arguments))),
        "initialize");
  check(gemm.run(), "run");
  check(cudaDeviceSynchronize(), "the kernel");
  std::vector<ElementD> d(size_t(M) * N);
  check(cudaMemcpy(d.data(), d_device, d.size() * sizeof(ElementD), cudaMemcpyDeviceToHost),
        "cudaMemcpy to the host");

  Verdict verdict;
  compare(
      verdict, M, N, K, alpha, beta, cutlass::sizeof_bits<ElementD>::value == 32 ? 23 : 7,
      [&](int m, int n, int k) { return a.at(m, k) * sfa.at(m, k) * b.at(n, k) * sfb.at(n, k); },
      [&](int m, int n) { return double(float(d[size_t(m) * N + n])); },
      [&](int m, int n) { return kHasC ? double(float(c[size_t(m) * N + n])) : 0.0; });
  return report(name, verdict, Mainloop::DispatchPolicy::Stages);
}

using TileShape = Shape<_128, _128, _128>;
using Auto = cutlass::gemm::collective::KernelScheduleAuto;
using Pingpong = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
using Class = cutlass::arch::OpClassTensorOp;
using Scaled = cutlass::arch::OpClassBlockScaledTensorOp;
using e4m3 = cutlass::float_e4m3_t;
using e5m2 = cutlass::float_e5m2_t;
using e2m3 = cutlass::float_e2m3_t;
using e3m2 = cutlass::float_e3m2_t;
using e2m1 = cutlass::float_e2m1_t;
using bf16 = cutlass::bfloat16_t;

int main(int argc, char** argv) {
  uint64_t const seed = seed_of(argc, argv);
  bool good = true;
#if PART == 0
  good &= run<Case<Class, e4m3, 16, e2m1, 128, TileShape, Auto, void, float>>("e4m3 x e2m1", 136,
                                                                              260, 384, seed);
  good &= run<Case<Class, e3m2, 128, e5m2, 16, TileShape, Pingpong, bf16, bf16>>(
      "e3m2 x e5m2, pingpong", 200, 136, 256, seed + 1);
#elif PART == 1
  good &= run<Case<Scaled, cutlass::mx_float8_t<e4m3>, 16, cutlass::mx_float4_t<e2m1>, 128,
                   TileShape, Auto, void, float>>("mx e4m3 x mx e2m1", 136, 132, 384, seed);
  good &= run<Case<Scaled, cutlass::mx_float6_t<e2m3>, 128, cutlass::mx_float8_t<e5m2>, 16,
                   TileShape, cutlass::gemm::KernelTmaWarpSpecializedPingpong, bf16, bf16>>(
      "mx e2m3 x mx e5m2, pingpong", 200, 136, 256, seed + 1);
#else
  good &= run<Case<Scaled, cutlass::nv_float4_t<e2m1>, 32, cutlass::nv_float4_t<e2m1>, 32,
                   TileShape, Auto, bf16, bf16>>("nvfp4", 200, 264, 416, seed);
  good &= run<Case<Scaled, cutlass::mx_float4_t<e2m1>, 32, cutlass::mx_float4_t<e2m1>, 32,
                   TileShape, Pingpong, void, float>>("mxfp4, pingpong", 136, 132, 320, seed + 1);
#endif
  return good ? 0 : 1;
}
