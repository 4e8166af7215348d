// Runs a grouped GemmUniversal kernel as a CUTLASS program outside this project would, on random
// ragged groups, and checks every byte it wrote. tests/gpu/build_headers writes a main() for each
// entry of cases.toml around it.
#pragma once

#include <cuda_runtime.h>

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <type_traits>
#include <vector>

#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <sm12x/cutlass.hpp>

#include "host_check.hpp"

namespace run {

/// The fusions of matrix.toml. What they compute stands with traits_of(), how they are told stands
/// with DeviceProblem::fusion().
enum class Fusion {
  kLinearCombination,
  kLinearCombinationSilu,
  kColumnBias,
  kGroupScaled,
  kGroupScaledSilu,
  kSiluResidual
};

/// What a kernel type does not say of itself.
struct Options {
  char const* name;
  int alignment_c;  // elements, as the epilogue was built with
  int alignment_d;
  bool bias_along_m;
};

inline void check_cuda(cudaError_t status, char const* what) {
  if (status != cudaSuccess) {
    std::printf("FAILED: %s: %s\n", what, cudaGetErrorString(status));
    std::exit(1);
  }
}

inline void check_cutlass(cutlass::Status status, char const* what) {
  if (status != cutlass::Status::kSuccess) {
    std::printf("FAILED: %s: %s (%s)\n", what, cutlassGetStatusString(status),
                cudaGetErrorString(cudaPeekAtLastError()));
    std::exit(1);
  }
}

/// Memory on the device, filled from the host.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) {
    bytes_ = (count > 0 ? count : 1) * sizeof(T);
    check_cuda(cudaMalloc(&address_, bytes_), "cudaMalloc");
  }
  explicit DeviceArray(std::vector<T> const& host) : DeviceArray(host.size()) {
    check_cuda(cudaMemcpy(address_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice),
               "cudaMemcpy to the device");
  }
  DeviceArray(DeviceArray const&) = delete;
  DeviceArray& operator=(DeviceArray const&) = delete;
  ~DeviceArray() { cudaFree(address_); }

  T* get() const { return static_cast<T*>(address_); }
  size_t bytes() const { return bytes_; }

 private:
  void* address_ = nullptr;
  size_t bytes_ = 0;
};

template <class Element>
constexpr Format format_of() {
  if constexpr (std::is_same_v<Element, float> || std::is_void_v<Element>) {
    return Format::kFloat32;
  } else if constexpr (std::is_same_v<Element, cutlass::half_t>) {
    return Format::kFloat16;
  } else if constexpr (std::is_same_v<Element, cutlass::bfloat16_t>) {
    return Format::kBfloat16;
  } else if constexpr (std::is_same_v<Element, cutlass::float_e4m3_t>) {
    return Format::kE4m3;
  } else {
    static_assert(std::is_same_v<Element, cutlass::float_e5m2_t>);
    return Format::kE5m2;
  }
}

// A stride of a group: one side static 1, the other the leading dimension.
template <class Stride>
Stride stride_of(int64_t leading) {
  Stride stride{};
  if constexpr (cute::is_static_v<cute::remove_cvref_t<decltype(cute::get<0>(stride))>>) {
    cute::get<1>(stride) = leading;
  } else {
    cute::get<0>(stride) = leading;
  }
  return stride;
}

template <class Stride>
constexpr bool is_by_columns() {
  return cutlass::detail::is_major<0>(Stride{});
}

/// Pointers, strides and shapes of all groups on the device.
template <class Kernel, Fusion kFusion>
class DeviceProblem {
 public:
  using ElementA = typename Kernel::ElementA;
  using ElementB = typename Kernel::ElementB;
  using ElementC = typename Kernel::ElementC;
  using ElementD = typename Kernel::ElementD;
  using Extents3 = typename Kernel::ProblemShape::UnderlyingProblemShape;
  using FusionArguments = decltype(Kernel::CollectiveEpilogue::Arguments::thread);

  explicit DeviceProblem(Problem const& problem, bool plain, int bias_type)
      : problem_(problem),
        a_(problem.a.bytes),
        b_(problem.b.bytes),
        c_(problem.c.bytes),
        d_(problem.d.bytes),
        shapes_host_(shapes(problem)),
        shapes_(shapes_host_),
        ptr_a_(pointers<ElementA const*>(a_, problem.a)),
        ptr_b_(pointers<ElementB const*>(b_, problem.b)),
        ptr_c_(pointers<ElementC const*>(c_, problem.c)),
        ptr_d_(pointers<ElementD*>(d_, problem.d)),
        stride_a_(strides<typename Kernel::InternalStrideA>(problem.a)),
        stride_b_(strides<typename Kernel::InternalStrideB>(problem.b)),
        stride_c_(strides<typename Kernel::InternalStrideC>(problem.c)),
        stride_d_(strides<typename Kernel::InternalStrideD>(problem.d)),
        plain_(plain),
        bias_type_(bias_type),
        alpha_(problem.alpha),
        beta_(problem.beta),
        alpha_pointers_(one_each(alpha_, problem.groups())),
        beta_pointers_(one_each(beta_, problem.groups())),
        m_scale_(problem.m_scale.values),
        n_scale_(problem.n_scale.values),
        bias_(bias_bytes(problem.bias)),
        m_scale_pointers_(vectors(m_scale_, problem.m_scale)),
        n_scale_pointers_(vectors(n_scale_, problem.n_scale)),
        bias_pointers_(biases(problem.bias)),
        m_strides_(problem.m_scale.strides),
        n_strides_(problem.n_scale.strides),
        beta_strides_(std::vector<int32_t>(problem.groups(), 0)) {}

  typename Kernel::Arguments arguments(bool show_shapes, int sm_count) {
    cutlass::KernelHardwareInfo hw_info;
    check_cuda(cudaGetDevice(&hw_info.device_id), "cudaGetDevice");
    hw_info.sm_count = sm_count;
    return {cutlass::gemm::GemmUniversalMode::kGrouped,
            {int(problem_.groups()), shapes_.get(), show_shapes ? shapes_host_.data() : nullptr},
            {ptr_a_.get(), stride_a_.get(), ptr_b_.get(), stride_b_.get()},
            {fusion(), problem_.has_c ? ptr_c_.get() : nullptr,
             problem_.has_c ? stride_c_.get() : nullptr, ptr_d_.get(), stride_d_.get()},
            hw_info};
  }

  void poison_d(cudaStream_t stream) {
    check_cuda(cudaMemsetAsync(d_.get(), kPoison, problem_.d.bytes.size(), stream),
               "cudaMemsetAsync");
  }

  std::vector<uint8_t> download_d() const {
    std::vector<uint8_t> bytes(problem_.d.bytes.size());
    check_cuda(cudaMemcpy(bytes.data(), d_.get(), bytes.size(), cudaMemcpyDeviceToHost),
               "cudaMemcpy to the host");
    return bytes;
  }

  /// Whether the kernel left its inputs alone.
  bool inputs_intact() const {
    return same(a_, problem_.a.bytes) && same(b_, problem_.b.bytes) && same(c_, problem_.c.bytes);
  }

 private:
  static std::vector<Extents3> shapes(Problem const& problem) {
    std::vector<Extents3> list;
    for (Extents const& group : problem.extents) {
      list.push_back(cute::make_shape(group.m, group.n, group.k));
    }
    return list;
  }

  // A group without output has no matrices: whoever follows its pointers fails.
  template <class Pointer>
  std::vector<Pointer> pointers(DeviceArray<uint8_t> const& buffer,
                                Matrices const& matrices) const {
    std::vector<Pointer> list;
    for (size_t group = 0; group < matrices.list.size(); ++group) {
      Extents const& extents = problem_.extents[group];
      list.push_back(extents.m > 0 && extents.n > 0
                         ? reinterpret_cast<Pointer>(buffer.get() + matrices.list[group].offset)
                         : nullptr);
    }
    return list;
  }

  template <class Stride>
  static std::vector<Stride> strides(Matrices const& matrices) {
    std::vector<Stride> list;
    for (Matrix const& matrix : matrices.list) {
      list.push_back(stride_of<Stride>(matrix.leading));
    }
    return list;
  }

  static std::vector<float const*> one_each(DeviceArray<float> const& buffer, size_t groups) {
    std::vector<float const*> list;
    for (size_t group = 0; group < groups; ++group) {
      list.push_back(buffer.get() + group);
    }
    return list;
  }

  static std::vector<float const*> vectors(DeviceArray<float> const& buffer,
                                           Vectors const& vectors) {
    std::vector<float const*> list;
    for (int64_t offset : vectors.offsets) {
      list.push_back(buffer.get() + offset);
    }
    return list;
  }

  int bias_element_bytes() const { return bias_type_ == SM12X_BIAS_FLOAT32 ? 4 : 2; }

  std::vector<uint8_t> bias_bytes(Vectors const& bias) const {
    std::vector<uint8_t> bytes(bias.values.size() * size_t(bias_element_bytes()));
    for (size_t i = 0; i < bias.values.size(); ++i) {
      float const value = bias.values[i];
      uint8_t* const address = &bytes[i * size_t(bias_element_bytes())];
      if (bias_type_ == SM12X_BIAS_FLOAT32) {
        std::memcpy(address, &value, sizeof value);
      } else if (bias_type_ == SM12X_BIAS_BFLOAT16) {
        cutlass::bfloat16_t const narrow(value);
        std::memcpy(address, &narrow, sizeof narrow);
      } else {
        cutlass::half_t const narrow(value);
        std::memcpy(address, &narrow, sizeof narrow);
      }
    }
    return bytes;
  }

  std::vector<void const*> biases(Vectors const& bias) const {
    std::vector<void const*> list;
    for (size_t group = 0; group < bias.offsets.size(); ++group) {
      list.push_back(bias.strides[group] != 0
                         ? bias_.get() + bias.offsets[group] * bias_element_bytes()
                         : nullptr);
    }
    return list;
  }

  static bool same(DeviceArray<uint8_t> const& buffer, std::vector<uint8_t> const& expected) {
    std::vector<uint8_t> bytes(expected.size());
    check_cuda(cudaMemcpy(bytes.data(), buffer.get(), bytes.size(), cudaMemcpyDeviceToHost),
               "cudaMemcpy to the host");
    return bytes == expected;
  }

  // A scalar of CUTLASS's visitor nodes: one value, or one for each group.
  template <class Scalar>
  void set(Scalar& scalar, std::vector<float> const& values,
           DeviceArray<float const*> const& pointers) const {
    scalar.scalars[0] = plain_ ? values[0] : 0.0f;
    scalar.scalar_ptr_arrays[0] = plain_ ? nullptr : pointers.get();
  }

  FusionArguments fusion() const {
    FusionArguments fusion{};
    sm12x::epilogue::ScaleSource::Arguments m_scale{}, n_scale{};
    sm12x::epilogue::BiasSource::Arguments bias{};
    if (!plain_) {
      m_scale = {m_scale_pointers_.get(), m_strides_.get()};
      n_scale = {n_scale_pointers_.get(), n_strides_.get()};
      bias = {bias_pointers_.get(), bias_type_};
    }
    if constexpr (kFusion == Fusion::kLinearCombination ||
                  kFusion == Fusion::kLinearCombinationSilu) {
      fusion.alpha = plain_ ? problem_.alpha[0] : 0.0f;
      fusion.beta = plain_ ? problem_.beta[0] : 0.0f;
      if (!plain_) {
        fusion.alpha_ptr_array = alpha_pointers_.get();
        fusion.beta_ptr_array = problem_.has_c ? beta_pointers_.get() : nullptr;
      }
    } else if constexpr (kFusion == Fusion::kColumnBias) {
      set(fusion.op_0, problem_.alpha, alpha_pointers_);
      if (!plain_) {
        fusion.op_2.ptr_row =
            reinterpret_cast<cutlass::bfloat16_t const* const*>(bias_pointers_.get());
      }
    } else if constexpr (kFusion == Fusion::kSiluResidual) {
      fusion.op_0 = {beta_pointers_.get(), beta_strides_.get()};
      auto& scaled = fusion.op_2.op_0;
      scaled.op_0 = {m_scale, n_scale, {}};
      scaled.op_2 = bias;
    } else {
      fusion.m_scale = m_scale;
      fusion.n_scale = n_scale;
      fusion.bias = bias;
    }
    return fusion;
  }

  Problem const& problem_;
  DeviceArray<uint8_t> a_, b_, c_, d_;
  std::vector<Extents3> shapes_host_;
  DeviceArray<Extents3> shapes_;
  DeviceArray<ElementA const*> ptr_a_;
  DeviceArray<ElementB const*> ptr_b_;
  DeviceArray<ElementC const*> ptr_c_;
  DeviceArray<ElementD*> ptr_d_;
  DeviceArray<typename Kernel::InternalStrideA> stride_a_;
  DeviceArray<typename Kernel::InternalStrideB> stride_b_;
  DeviceArray<typename Kernel::InternalStrideC> stride_c_;
  DeviceArray<typename Kernel::InternalStrideD> stride_d_;
  bool plain_;
  int bias_type_;
  DeviceArray<float> alpha_, beta_;
  DeviceArray<float const*> alpha_pointers_, beta_pointers_;
  DeviceArray<float> m_scale_, n_scale_;
  DeviceArray<uint8_t> bias_;
  DeviceArray<float const*> m_scale_pointers_, n_scale_pointers_;
  DeviceArray<void const*> bias_pointers_;
  DeviceArray<int32_t> m_strides_, n_strides_, beta_strides_;
};

template <class Kernel, Fusion kFusion>
Traits traits_of(Options const& options) {
  Traits traits;
  traits.a = format_of<typename Kernel::ElementA>();
  traits.b = format_of<typename Kernel::ElementB>();
  traits.c = format_of<typename Kernel::ElementC>();
  traits.d = format_of<typename Kernel::ElementD>();
  traits.has_c = !std::is_void_v<typename Kernel::ElementC>;
  traits.c_by_columns = is_by_columns<typename Kernel::InternalStrideC>();
  traits.d_by_columns = is_by_columns<typename Kernel::InternalStrideD>();
  traits.alignment_c = options.alignment_c;
  traits.alignment_d = options.alignment_d;
  traits.bias_along_m = options.bias_along_m;
  traits.tile_m = cute::size<0>(typename Kernel::TileShape{});
  traits.tile_n = cute::size<1>(typename Kernel::TileShape{});
  traits.tile_k = cute::size<2>(typename Kernel::TileShape{});
  // TMA stores the 16 bytes that hold the end of a row whole (seen on an H200: the guard bytes behind
  // it changed), which is why CUTLASS's can_implement asks for extents of whole 16 bytes.
  if constexpr (!std::is_same_v<typename Kernel::CollectiveEpilogue::DispatchPolicy,
                                cutlass::epilogue::PtrArrayNoSmemWarpSpecialized>) {
    (traits.d_by_columns ? traits.step_m : traits.step_n) = options.alignment_d;
    if (traits.has_c) {
      int& step = traits.c_by_columns ? traits.step_m : traits.step_n;
      step = std::max(step, options.alignment_c);
    }
  }
  switch (kFusion) {
    case Fusion::kLinearCombination:
      traits.has_alpha = true;
      break;
    case Fusion::kLinearCombinationSilu:
      traits.has_alpha = true;
      traits.activation = Activation::kSilu;
      break;
    case Fusion::kColumnBias:
      traits.has_alpha = traits.has_bias = traits.bias_in_every_group = true;
      break;
    case Fusion::kGroupScaled:
      traits.has_scales = traits.has_bias = true;
      break;
    case Fusion::kGroupScaledSilu:
      traits.has_scales = traits.has_bias = true;
      traits.activation = Activation::kSilu;
      break;
    case Fusion::kSiluResidual:
      traits.has_scales = traits.has_bias = traits.c_after_activation = true;
      traits.activation = Activation::kSilu;
      break;
  }
  return traits;
}

/// One problem: a launch over all SMs, the same again, and one over three CTAs, each of which then
/// walks many tiles of many groups. Returns what is wrong, in words; empty if nothing.
template <class Kernel, Fusion kFusion>
std::string run_problem(Problem const& problem, bool plain, bool show_shapes, int bias_type,
                        int all_sms, cudaStream_t stream, Verdict& total) {
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  constexpr size_t kGuardBytes = 4096;
  DeviceProblem<Kernel, kFusion> device(problem, plain, bias_type);
  Sums const sums = reference_sums(problem);
  std::vector<uint8_t> first;
  for (int sm_count : {all_sms, all_sms, std::min(3, all_sms)}) {
    typename Gemm::Arguments const arguments = device.arguments(show_shapes, sm_count);
    check_cutlass(Gemm::can_implement(arguments), "can_implement");
    size_t const workspace_bytes = Gemm::get_workspace_size(arguments);
    std::vector<uint8_t> const guarded(workspace_bytes + kGuardBytes, kPoison);
    DeviceArray<uint8_t> workspace(guarded);
    Gemm gemm;
    device.poison_d(stream);
    check_cutlass(gemm.initialize(arguments, workspace.get(), stream), "initialize");
    check_cutlass(gemm.run(stream), "run");
    check_cuda(cudaStreamSynchronize(stream), "the kernel");

    std::vector<uint8_t> const written = device.download_d();
    std::string why;
    if (first.empty()) {
      first = written;
      Verdict const verdict = check(problem, sums, written);
      total.merge(verdict);
      if (verdict.wrong > 0) {
        return std::to_string(verdict.wrong) + " of " + std::to_string(verdict.elements) +
               " elements are wrong; " + verdict.first;
      }
    } else if (written != first) {
      size_t const at =
          size_t(std::mismatch(first.begin(), first.end(), written.begin()).first - first.begin());
      return "a launch over " + std::to_string(sm_count) +
             " SMs differs from the first one at byte " + std::to_string(at);
    }
    if (!problem.d.surroundings_intact(written, why)) {
      return why;
    }
    std::vector<uint8_t> tail(kGuardBytes);
    check_cuda(cudaMemcpy(tail.data(), workspace.get() + workspace_bytes, kGuardBytes,
                          cudaMemcpyDeviceToHost),
               "cudaMemcpy to the host");
    if (std::count(tail.begin(), tail.end(), kPoison) != std::ptrdiff_t(kGuardBytes)) {
      return "bytes behind the workspace were written";
    }
  }
  return device.inputs_intact() ? "" : "an input was written";
}

/// All problems of a case. Prints one line; returns the exit status. argv[1]: the seed.
template <class Kernel, Fusion kFusion>
int run_program(Options const& options, int argc, char** argv) {
  uint64_t const seed = argc > 1 ? std::strtoull(argv[1], nullptr, 0) : std::random_device{}();
  int device = 0, all_sms = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&all_sms, cudaDevAttrMultiProcessorCount, device),
             "cudaDeviceGetAttribute");
  cudaStream_t stream = nullptr;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");

  constexpr int kRounds = 4;
  Random random(seed);
  Verdict total;
  std::string failure;
  int problems = 0;
  for (int round = 0; round < kRounds; ++round) {
    for (Family family : {Family::kRagged, Family::kMany, Family::kOne, Family::kAligned}) {
      for (bool plain : {false, true}) {
        Problem const problem =
            random_problem(random, traits_of<Kernel, kFusion>(options), family, plain);
        int const bias_types[] = {SM12X_BIAS_FLOAT32, SM12X_BIAS_BFLOAT16, SM12X_BIAS_FLOAT16};
        int const bias_type = kFusion == Fusion::kColumnBias ? int(SM12X_BIAS_BFLOAT16)
                                                             : bias_types[problems / 2 % 3];
        std::string const why = run_problem<Kernel, kFusion>(
            problem, plain, family == Family::kAligned, bias_type, all_sms, stream, total);
        ++problems;
        if (!why.empty() && failure.empty()) {
          failure = std::string(name_of(family)) + (plain ? ", plain: " : ": ") + why;
        }
      }
    }
  }
  check_cuda(cudaStreamDestroy(stream), "cudaStreamDestroy");
  if (total.elements == 0) {
    failure = "no element was checked";
  }
  std::printf("%s: %s, %d problems, %" PRId64
              " elements, worst error %.3f of its bound, %d stages, %d bytes shared, seed %" PRIu64
              "%s%s\n",
              options.name, failure.empty() ? "ok" : "FAILED", problems, total.elements,
              total.worst, int(Kernel::CollectiveMainloop::DispatchPolicy::Stages),
              int(Kernel::SharedStorageSize), seed, failure.empty() ? "" : "; ", failure.c_str());
  return failure.empty() ? 0 : 1;
}

}  // namespace run
