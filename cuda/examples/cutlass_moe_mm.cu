// vLLM's cutlass_moe_mm for SM120 in one C++ file: FP8 experts with per-token or per-tensor
// activation scales and per-channel or per-expert weight scales, through GemmUniversalAdapter and
// the host API alone.
//
//   out[i, :] = cast(a_scale * b_scale * (a[i, :] . b[e, :, :]^T))   for every row i of expert e
//
// Rows of an expert lie together; how many each expert has is known on the device only, and nothing
// here waits for it. Two kernels:
//
//   rows per expert   tile          MMA's M side   MMA's N side   D
//   more than 64      128x128x128   tokens         features       row-major
//   up to 64          128x64x128    features       tokens         column-major (swapped operands)
//
// Swapped, every weight is read once, and a tile computes only as many tokens as there are.
//
// main() runs 64 random problems and compares them with the host. argv[1]: the seed.

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <sm12x/cutlass.hpp>

// -------------------------------------------------------------------------------------------------
// Kernel types
// -------------------------------------------------------------------------------------------------

namespace moe {

using namespace cute;

using ElementAb = cutlass::float_e4m3_t;
using ElementD = cutlass::bfloat16_t;
using ProblemShape = cutlass::gemm::GroupProblemShape<Shape<int, int, int>>;
using ClusterShape = Shape<_1, _1, _1>;

template <bool kSwapped_, class TileShape, class MainloopSchedule>
struct Tile {
  static constexpr bool kSwapped = kSwapped_;
  using LayoutD =
      cute::conditional_t<kSwapped, cutlass::layout::ColumnMajor*, cutlass::layout::RowMajor*>;
  static constexpr int kBiasSide = kSwapped ? sm12x::epilogue::kAlongM : sm12x::epilogue::kAlongN;

  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm120, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, LayoutD, 8, ElementD,
      LayoutD, 8, cutlass::epilogue::collective::EpilogueScheduleAuto,
      sm12x::epilogue::GroupScaledAcc<ElementD, kBiasSide>>::CollectiveOp;

  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm120, cutlass::arch::OpClassTensorOp, ElementAb, cutlass::layout::RowMajor*,
      16, ElementAb, cutlass::layout::ColumnMajor*, 16, float, TileShape, ClusterShape,
      cutlass::gemm::collective::StageCountAutoCarveout<sizeof(
          typename CollectiveEpilogue::SharedStorage)>,
      MainloopSchedule>::CollectiveOp;

  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<ProblemShape, CollectiveMainloop, CollectiveEpilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  static_assert(sm12x::fits_v<Kernel>);
};

using PlainTile = Tile<false, Shape<_128, _128, _128>, sm12x::KernelPtrArrayCooperative<>>;
// The last argument: skip the columns (tokens) past the group's end.
using SwappedTile = Tile<true, Shape<_128, _64, _128>,
                         sm12x::KernelPtrArrayCooperative<2, sm12x::MmaKind::kUnitScale, true>>;
constexpr int kSwappedTileTokens = 64;

// -------------------------------------------------------------------------------------------------
// What the GEMM reads per group, filled on the device
// -------------------------------------------------------------------------------------------------

/// Everything about a call that the device needs to know.
struct Call {
  ElementD* out;
  ElementAb const* a;
  ElementAb const* b;
  float const* a_scales;
  float const* b_scales;
  int64_t const* expert_offsets;
  int32_t const* problem_sizes;
  int64_t const* a_strides;
  int64_t const* b_strides;
  int64_t const* c_strides;
  bool per_act_token;
  bool per_out_ch;
  int num_experts;
  int n;
};

/// Arrays of one entry per expert, one after the other in the workspace.
template <class Tile>
struct GroupArrays {
  using Kernel = typename Tile::Kernel;

  Shape<int, int, int>* shapes;
  ElementAb const** ptr_a;
  ElementAb const** ptr_b;
  ElementD** ptr_d;
  typename Kernel::InternalStrideA* stride_a;
  typename Kernel::InternalStrideB* stride_b;
  typename Kernel::InternalStrideD* stride_d;
  float const** m_scale;
  float const** n_scale;
  int32_t* m_scale_stride;
  int32_t* n_scale_stride;
  size_t bytes = 0;

  GroupArrays(void* workspace, int num_experts) {
    auto take = [&](auto*& array) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(
          static_cast<char*>(workspace) + bytes);
      // The GEMM's own workspace follows and holds tensor maps: 128 bytes.
      bytes = (bytes + sizeof(*array) * size_t(num_experts) + 127) / 128 * 128;
    };
    take(shapes);
    take(ptr_a);
    take(ptr_b);
    take(ptr_d);
    take(stride_a);
    take(stride_b);
    take(stride_d);
    take(m_scale);
    take(n_scale);
    take(m_scale_stride);
    take(n_scale_stride);
  }

  typename Tile::Gemm::Arguments arguments(int num_experts,
                                           cutlass::KernelHardwareInfo const& hw_info) const {
    typename Tile::Gemm::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGrouped,
                                             {num_experts, shapes, nullptr},
                                             {ptr_a, stride_a, ptr_b, stride_b},
                                             {{}, nullptr, nullptr, ptr_d, stride_d},
                                             hw_info};
    arguments.epilogue.thread.m_scale = {m_scale, m_scale_stride};
    arguments.epilogue.thread.n_scale = {n_scale, n_scale_stride};
    return arguments;
  }
};

template <class Tile>
__global__ void fill_group_arrays(GroupArrays<Tile> groups, Call call) {
  int const expert = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (expert >= call.num_experts) {
    return;
  }
  int64_t const first_row = call.expert_offsets[expert];
  int const rows = call.problem_sizes[3 * expert];
  int const n = call.problem_sizes[3 * expert + 1];
  int const k = call.problem_sizes[3 * expert + 2];
  int64_t const a_stride = call.a_strides[expert];
  int64_t const b_stride = call.b_strides[expert];
  int64_t const c_stride = call.c_strides[expert];

  ElementAb const* const tokens = call.a + first_row * a_stride;
  ElementAb const* const weights = call.b + int64_t(expert) * call.n * b_stride;
  float const* const token_scale = call.a_scales + (call.per_act_token ? first_row : 0);
  float const* const weight_scale =
      call.b_scales + int64_t(expert) * (call.per_out_ch ? call.n : 1);
  groups.ptr_d[expert] = call.out + first_row * c_stride;
  if constexpr (Tile::kSwapped) {
    groups.shapes[expert] = make_shape(n, rows, k);
    groups.ptr_a[expert] = weights;
    groups.ptr_b[expert] = tokens;
    groups.stride_a[expert] = make_stride(b_stride, _1{}, _0{});
    groups.stride_b[expert] = make_stride(a_stride, _1{}, _0{});
    groups.stride_d[expert] = make_stride(_1{}, c_stride, _0{});
    groups.m_scale[expert] = weight_scale;
    groups.n_scale[expert] = token_scale;
    groups.m_scale_stride[expert] = call.per_out_ch;
    groups.n_scale_stride[expert] = call.per_act_token;
  } else {
    groups.shapes[expert] = make_shape(rows, n, k);
    groups.ptr_a[expert] = tokens;
    groups.ptr_b[expert] = weights;
    groups.stride_a[expert] = make_stride(a_stride, _1{}, _0{});
    groups.stride_b[expert] = make_stride(b_stride, _1{}, _0{});
    groups.stride_d[expert] = make_stride(c_stride, _1{}, _0{});
    groups.m_scale[expert] = token_scale;
    groups.n_scale[expert] = weight_scale;
    groups.m_scale_stride[expert] = call.per_act_token;
    groups.n_scale_stride[expert] = call.per_out_ch;
  }
}

// -------------------------------------------------------------------------------------------------
// The call
// -------------------------------------------------------------------------------------------------

inline cutlass::Status query_hardware(cutlass::KernelHardwareInfo& hw_info) {
  if (cudaGetDevice(&hw_info.device_id) != cudaSuccess) {
    return cutlass::Status::kErrorInternal;
  }
  hw_info.sm_count =
      cutlass::KernelHardwareInfo::query_device_multiprocessor_count(hw_info.device_id);
  return hw_info.sm_count > 0 ? cutlass::Status::kSuccess : cutlass::Status::kErrorInternal;
}

template <class Tile>
size_t workspace_size(int num_experts, cutlass::KernelHardwareInfo const& hw_info) {
  GroupArrays<Tile> const groups(nullptr, num_experts);
  return groups.bytes + Tile::Gemm::get_workspace_size(groups.arguments(num_experts, hw_info));
}

template <class Tile>
cutlass::Status run(Call const& call, void* workspace, size_t workspace_bytes,
                    cutlass::KernelHardwareInfo const& hw_info, cudaStream_t stream) {
  if (workspace == nullptr || workspace_bytes < workspace_size<Tile>(call.num_experts, hw_info)) {
    return cutlass::Status::kErrorWorkspaceNull;
  }
  GroupArrays<Tile> const groups(workspace, call.num_experts);
  constexpr int kThreads = 128;
  fill_group_arrays<Tile>
      <<<(call.num_experts + kThreads - 1) / kThreads, kThreads, 0, stream>>>(groups, call);
  if (cudaGetLastError() != cudaSuccess) {
    return cutlass::Status::kErrorInternal;
  }

  typename Tile::Gemm gemm;
  auto const arguments = groups.arguments(call.num_experts, hw_info);
  cutlass::Status status = gemm.can_implement(arguments);
  if (status == cutlass::Status::kSuccess) {
    status = gemm.initialize(arguments, static_cast<char*>(workspace) + groups.bytes, stream);
  }
  if (status == cutlass::Status::kSuccess) {
    status = gemm.run(stream);
  }
  return status;
}

/// Whether a call swaps its operands. All that the host knows of the experts' rows is their sum.
inline bool swaps_operands(int64_t total_rows, int num_experts) {
  return total_rows <= int64_t(kSwappedTileTokens) * num_experts;
}

/// Bytes of workspace, aligned to 128, for any call with this many experts on the current device.
inline cutlass::Status cutlass_moe_mm_workspace_size(int num_experts, size_t& bytes) {
  cutlass::KernelHardwareInfo hw_info;
  cutlass::Status const status = query_hardware(hw_info);
  bytes = std::max(workspace_size<PlainTile>(num_experts, hw_info),
                   workspace_size<SwappedTile>(num_experts, hw_info));
  return status;
}

/// All arrays are on the device. Strides are in elements, a_strides and b_strides multiples of 16,
/// c_strides multiples of 8; a, b and out are aligned to 16 bytes. Nothing waits for the host, so
/// that a call can be captured in a graph.
///
///   out             (total_rows, n): rows of c_strides[e] elements. Rows of no expert stay as they are
///   a               (total_rows, k), the rows of an expert together
///   b               (num_experts, n, k), rows of b_strides[e] elements, the same for all experts
///   a_scales        (total_rows) with per_act_token, else (1)
///   b_scales        (num_experts, n) with per_out_ch, else (num_experts)
///   expert_offsets  (num_experts): the first row of each expert
///   problem_sizes   (num_experts, 3): rows of the expert, n, k, in this order also where the operands
///                   are swapped
inline cutlass::Status cutlass_moe_mm(ElementD* out, ElementAb const* a, ElementAb const* b,
                                      float const* a_scales, float const* b_scales,
                                      int64_t const* expert_offsets, int32_t const* problem_sizes,
                                      int64_t const* a_strides, int64_t const* b_strides,
                                      int64_t const* c_strides, bool per_act_token, bool per_out_ch,
                                      int64_t total_rows, int num_experts, int n, int k,
                                      void* workspace, size_t workspace_bytes,
                                      cudaStream_t stream) {
  if (total_rows < 0 || num_experts < 0 || n < 0 || k < 0) {
    return cutlass::Status::kErrorInvalidProblem;
  }
  if (k % 16 != 0 || n % 8 != 0) {
    return cutlass::Status::kErrorMisalignedOperand;
  }
  if (total_rows == 0 || num_experts == 0 || n == 0) {
    return cutlass::Status::kSuccess;
  }
  cutlass::KernelHardwareInfo hw_info;
  cutlass::Status const status = query_hardware(hw_info);
  if (status != cutlass::Status::kSuccess) {
    return status;
  }
  Call const call{out,           a,         b,         a_scales,  b_scales,      expert_offsets,
                  problem_sizes, a_strides, b_strides, c_strides, per_act_token, per_out_ch,
                  num_experts,   n};
  return swaps_operands(total_rows, num_experts)
             ? run<SwappedTile>(call, workspace, workspace_bytes, hw_info, stream)
             : run<PlainTile>(call, workspace, workspace_bytes, hw_info, stream);
}

}  // namespace moe

// -------------------------------------------------------------------------------------------------
// Check against the host
// -------------------------------------------------------------------------------------------------

namespace {

using Random = std::mt19937_64;

int random_int(Random& random, int first, int last) {
  return std::uniform_int_distribution<int>(first, last)(random);
}

/// NaN as e4m3 and as bf16: what surrounds the operands, and what out holds before the call.
constexpr uint8_t kPoison = 0xff;
constexpr int kGuardRows = 3;

/// One call and its operands on the host. Matrices have guard rows of NaN before and after.
struct Problem {
  int experts = 0, n = 0, k = 0;
  int64_t total_rows = 0;  // rows of a and out, the last of which may belong to no expert
  int64_t a_stride = 0, b_stride = 0, c_stride = 0;
  bool per_act_token = false, per_out_ch = false;
  std::vector<int> rows;
  std::vector<int64_t> offsets;
  std::vector<uint8_t> a, b;
  std::vector<float> a_scales, b_scales;

  uint8_t const* a_row(int64_t row) const { return a.data() + (row + kGuardRows) * a_stride; }
  uint8_t const* b_row(int64_t expert, int64_t channel) const {
    return b.data() + (expert * n + channel + kGuardRows) * b_stride;
  }
  int64_t out_elements() const { return (total_rows + 2 * kGuardRows) * c_stride; }
};

/// An e4m3 number between 1/64 and 3.75 with either sign, or zero.
uint8_t random_e4m3(Random& random) {
  uint64_t const word = random();
  uint64_t const exponent = 1 + (word >> 4) % 8;  // of 1/64 to 2
  return word % 16 == 0 ? 0 : uint8_t((word >> 40 & 1) << 7 | exponent << 3 | (word >> 32 & 7));
}

void fill_rows(Random& random, std::vector<uint8_t>& matrix, int64_t rows, int64_t stride,
               int columns) {
  matrix.assign(size_t((rows + 2 * kGuardRows) * stride), kPoison);
  for (int64_t row = kGuardRows; row < rows + kGuardRows; ++row) {
    for (int column = 0; column < columns; ++column) {
      matrix[size_t(row * stride + column)] = random_e4m3(random);
    }
  }
}

std::vector<float> random_scales(Random& random, int64_t count) {
  std::vector<float> scales(static_cast<size_t>(count));
  for (float& scale : scales) {
    scale = std::exp2(std::uniform_real_distribution<float>(-8.0f, 1.0f)(random));
  }
  return scales;
}

/// How rows are spread over experts. Eight kinds, so that 64 problems have each of them eight times.
enum Kind {
  kOneGroup,    // one expert, several tiles of rows
  kManyGroups,  // more experts than one window of 32, most of them empty or with few rows
  kDecode,      // up to four rows each
  kPrefill,     // a tile of rows or more each
  kSkewed,      // one busy expert among idle ones
  kSmallK,      // K below the tile's
  kAnything,
  kNoRows,  // every second time; else like kAnything
  kKinds
};

Problem random_problem(Random& random, int index) {
  constexpr int64_t kMacs = 60'000'000;
  constexpr int64_t kWeightBytes = 6'000'000;
  Problem problem;
  Kind kind = Kind(index % kKinds);
  bool const no_rows = kind == kNoRows && index / kKinds % 2 == 0;
  problem.n = 8 * random_int(random, 1, 96);
  problem.k = 16 * random_int(random, 1, 72);
  auto spread = [&](int experts, int low, int high) {
    problem.rows.resize(size_t(experts));
    for (int& rows : problem.rows) {
      rows = random_int(random, low, high);
    }
  };
  switch (kind) {
    case kOneGroup:
      spread(1, 100, 400);
      break;
    case kManyGroups:
      spread(random_int(random, 33, 100), -4, 6);
      break;
    case kDecode:
      spread(random_int(random, 8, 64), 0, 4);
      break;
    case kPrefill:
      spread(random_int(random, 2, 6), 65, 300);
      break;
    case kSkewed:
      spread(random_int(random, 8, 40), -1, 1);
      problem.rows[size_t(random_int(random, 0, int(problem.rows.size()) - 1))] =
          random_int(random, 65, 300);
      break;
    case kSmallK:
      problem.k = 16 * random_int(random, 1, 7);
      spread(random_int(random, 1, 20), 0, 200);
      break;
    default:
      spread(random_int(random, 1, 48), -30, 150);
      break;
  }
  problem.experts = int(problem.rows.size());
  for (int& rows : problem.rows) {
    rows = no_rows ? 0 : std::max(rows, 0);
  }
  int64_t const total = std::accumulate(problem.rows.begin(), problem.rows.end(), int64_t(0));
  // Rows stay as they are: it is N and K that give way.
  while (problem.n > 8 && (total * problem.n * problem.k > kMacs ||
                           int64_t(problem.experts) * problem.n * problem.k > kWeightBytes)) {
    problem.n = std::max(8, problem.n / 16 * 8);
    problem.k = std::max(16, kind == kSmallK ? problem.k : problem.k / 4 * 3 / 16 * 16);
  }

  for (int rows : problem.rows) {
    problem.offsets.push_back(problem.total_rows);
    problem.total_rows += rows;
  }
  if (!no_rows && random() % 2 == 0) {
    problem.total_rows += random_int(random, 1, 5);
  }
  problem.a_stride = problem.k + 16 * random_int(random, 0, 2);
  problem.b_stride = problem.k + 16 * random_int(random, 0, 2);
  problem.c_stride = problem.n + 8 * random_int(random, 0, 2);
  problem.per_act_token = random() % 2 == 0;
  problem.per_out_ch = random() % 2 == 0;
  fill_rows(random, problem.a, problem.total_rows, problem.a_stride, problem.k);
  fill_rows(random, problem.b, int64_t(problem.experts) * problem.n, problem.b_stride, problem.k);
  problem.a_scales = random_scales(random, problem.per_act_token ? problem.total_rows : 1);
  problem.b_scales =
      random_scales(random, int64_t(problem.experts) * (problem.per_out_ch ? problem.n : 1));
  return problem;
}

struct Verdict {
  int64_t elements = 0;
  double worst = 0.0;  // error as a part of its bound
  std::string wrong;   // empty: nothing
};

double from_bf16(uint16_t bits) {
  uint32_t const word = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

double ulp_bf16(double value) {
  return std::ldexp(1.0, std::max(value == 0.0 ? -126 : std::ilogb(value), -126) - 7);
}

/// Rows of one expert against sums in double.
void check_row(Problem const& problem, int expert, int64_t row, float const (&decoded)[256],
               std::vector<uint16_t> const& out, Verdict& verdict) {
  std::vector<double> a(size_t(problem.k)), magnitudes(size_t(problem.k));
  for (int k = 0; k < problem.k; ++k) {
    a[size_t(k)] = decoded[problem.a_row(row)[k]];
  }
  for (int channel = 0; channel < problem.n; ++channel) {
    uint8_t const* const b = problem.b_row(expert, channel);
    // Four sums of their own, so that additions need not wait for each other.
    double sums[4] = {}, magnitude[4] = {};
    for (int k = 0; k < problem.k; k += 4) {
      for (int i = 0; i < 4; ++i) {
        double const product = a[size_t(k + i)] * decoded[b[k + i]];
        sums[i] += product;
        magnitude[i] += std::abs(product);
      }
    }
    double const scale =
        double(problem.a_scales[problem.per_act_token ? size_t(row) : 0]) *
        problem
            .b_scales[problem.per_out_ch ? size_t(expert) * problem.n + channel : size_t(expert)];
    double const expected = scale * (sums[0] + sums[1] + sums[2] + sums[3]);
    double const bound =
        ulp_bf16(expected) + 0x1p-20 * (problem.k / 32.0) * scale *
                                 (magnitude[0] + magnitude[1] + magnitude[2] + magnitude[3]);
    double const found = from_bf16(out[size_t((row + kGuardRows) * problem.c_stride + channel)]);
    double const part = std::abs(found - expected) / bound;
    ++verdict.elements;
    if (part <= 1.0) {
      verdict.worst = std::max(verdict.worst, part);
    } else if (verdict.wrong.empty()) {
      char text[200];
      std::snprintf(text, sizeof text,
                    "expert %d, out[%lld, %d] is %.9g, expected %.9g within %.3g", expert,
                    (long long)row, channel, found, expected, bound);
      verdict.wrong = text;
    }
  }
}

/// Every element of out: those of experts' rows against the reference, all others still poison.
Verdict check(Problem const& problem, std::vector<uint16_t> const& out) {
  float decoded[256];
  for (int bits = 0; bits < 256; ++bits) {
    decoded[bits] = float(cutlass::float_e4m3_t::bitcast(uint8_t(bits)));
  }
  std::vector<int> expert_of(size_t(problem.total_rows), -1);
  for (int expert = 0; expert < problem.experts; ++expert) {
    std::fill_n(expert_of.begin() + problem.offsets[size_t(expert)], problem.rows[size_t(expert)],
                expert);
  }
  std::atomic<int64_t> next{0};
  std::vector<Verdict> verdicts(std::max(1u, std::thread::hardware_concurrency()));
  std::vector<std::thread> threads;
  for (Verdict& verdict : verdicts) {
    threads.emplace_back([&] {
      for (int64_t row = next++; row < problem.total_rows; row = next++) {
        if (expert_of[size_t(row)] >= 0) {
          check_row(problem, expert_of[size_t(row)], row, decoded, out, verdict);
        }
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  Verdict total;
  for (Verdict const& verdict : verdicts) {
    total.elements += verdict.elements;
    total.worst = std::max(total.worst, verdict.worst);
    if (total.wrong.empty()) {
      total.wrong = verdict.wrong;
    }
  }

  constexpr uint16_t kPoisonElement = kPoison << 8 | kPoison;
  for (int64_t row = -kGuardRows; row < problem.total_rows + kGuardRows; ++row) {
    bool const written = row >= 0 && row < problem.total_rows && expert_of[size_t(row)] >= 0;
    for (int64_t column = written ? problem.n : 0; column < problem.c_stride; ++column) {
      if (out[size_t((row + kGuardRows) * problem.c_stride + column)] != kPoisonElement &&
          total.wrong.empty()) {
        total.wrong = "out[" + std::to_string(row) + ", " + std::to_string(column) +
                      "] is no expert's and was written";
      }
    }
  }
  return total;
}

void require(cudaError_t status, char const* what) {
  if (status != cudaSuccess) {
    std::printf("cutlass_moe_mm: FAILED: %s: %s\n", what, cudaGetErrorString(status));
    std::exit(1);
  }
}

void require(cutlass::Status status, char const* what) {
  if (status != cutlass::Status::kSuccess) {
    std::printf("cutlass_moe_mm: FAILED: %s: %s (%s)\n", what, cutlassGetStatusString(status),
                cudaGetErrorString(cudaGetLastError()));
    std::exit(1);
  }
}

/// Memory on the device.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    require(cudaMalloc(&address_, std::max<size_t>(count, 1) * sizeof(T)), "cudaMalloc");
  }
  explicit DeviceArray(std::vector<T> const& host) : DeviceArray(host.size()) {
    require(cudaMemcpy(address_, host.data(), count_ * sizeof(T), cudaMemcpyHostToDevice),
            "cudaMemcpy to the device");
  }
  DeviceArray(DeviceArray const&) = delete;
  DeviceArray& operator=(DeviceArray const&) = delete;
  ~DeviceArray() { cudaFree(address_); }

  T* get() const { return static_cast<T*>(address_); }
  void poison() { require(cudaMemset(address_, kPoison, count_ * sizeof(T)), "cudaMemset"); }
  std::vector<T> download() const {
    std::vector<T> host(count_);
    require(cudaMemcpy(host.data(), address_, count_ * sizeof(T), cudaMemcpyDeviceToHost),
            "cudaMemcpy to the host");
    return host;
  }

 private:
  void* address_ = nullptr;
  size_t count_ = 0;
};

/// Runs a problem twice and returns what the first run wrote, with in `same` whether the second
/// wrote the same bits.
std::vector<uint16_t> run_twice(Problem const& problem, cudaStream_t stream, bool& same) {
  std::vector<int32_t> sizes;
  for (int rows : problem.rows) {
    sizes.insert(sizes.end(), {rows, problem.n, problem.k});
  }
  auto strides = [&](int64_t stride) {
    return std::vector<int64_t>(size_t(problem.experts), stride);
  };
  DeviceArray<uint8_t> a(problem.a), b(problem.b);
  DeviceArray<float> a_scales(problem.a_scales), b_scales(problem.b_scales);
  DeviceArray<int64_t> offsets(problem.offsets);
  DeviceArray<int32_t> problem_sizes(sizes);
  DeviceArray<int64_t> a_strides(strides(problem.a_stride)), b_strides(strides(problem.b_stride)),
      c_strides(strides(problem.c_stride));
  DeviceArray<uint16_t> out(size_t(problem.out_elements()));
  size_t workspace_bytes = 0;
  require(moe::cutlass_moe_mm_workspace_size(problem.experts, workspace_bytes),
          "cutlass_moe_mm_workspace_size");
  DeviceArray<uint8_t> workspace(workspace_bytes);
  workspace.poison();

  std::vector<uint16_t> first;
  for (int repeat = 0; repeat < 2; ++repeat) {
    out.poison();
    // The poison is written on the default stream, which this one does not wait for.
    require(cudaDeviceSynchronize(), "cudaMemset");
    require(moe::cutlass_moe_mm(
                reinterpret_cast<moe::ElementD*>(out.get() + kGuardRows * problem.c_stride),
                reinterpret_cast<moe::ElementAb const*>(a.get() + kGuardRows * problem.a_stride),
                reinterpret_cast<moe::ElementAb const*>(b.get() + kGuardRows * problem.b_stride),
                a_scales.get(), b_scales.get(), offsets.get(), problem_sizes.get(), a_strides.get(),
                b_strides.get(), c_strides.get(), problem.per_act_token, problem.per_out_ch,
                problem.total_rows, problem.experts, problem.n, problem.k, workspace.get(),
                workspace_bytes, stream),
            "cutlass_moe_mm");
    require(cudaStreamSynchronize(stream), "the kernel");
    std::vector<uint16_t> const written = out.download();
    if (repeat == 0) {
      first = written;
    }
    same = written == first;
  }
  return first;
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t const seed = argc > 1 ? std::strtoull(argv[1], nullptr, 0) : std::random_device{}();
  Random random(seed);
  cudaStream_t stream = nullptr;
  require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");

  constexpr int kProblems = 64;
  int wrong = 0, swapped = 0, empty = 0;
  Verdict total;
  for (int index = 0; index < kProblems; ++index) {
    Problem const problem = random_problem(random, index);
    bool same = false;
    std::vector<uint16_t> const out = run_twice(problem, stream, same);
    Verdict verdict = check(problem, out);
    if (verdict.wrong.empty() && !same) {
      verdict.wrong = "a second call wrote other bits";
    }
    empty += problem.total_rows == 0;
    swapped += problem.total_rows > 0 && moe::swaps_operands(problem.total_rows, problem.experts);
    total.elements += verdict.elements;
    total.worst = std::max(total.worst, verdict.worst);
    if (!verdict.wrong.empty()) {
      ++wrong;
      std::printf(
          "problem %d (%lld rows, %d experts, N %d, K %d, per_act_token %d, per_out_ch %d): %s\n",
          index, (long long)problem.total_rows, problem.experts, problem.n, problem.k,
          problem.per_act_token, problem.per_out_ch, verdict.wrong.c_str());
    }
  }
  require(cudaStreamDestroy(stream), "cudaStreamDestroy");
  bool const good = wrong == 0 && total.elements > 0;
  std::printf(
      "cutlass_moe_mm: %s, %d of %d problems right (%d swapped, %d without rows), %lld elements, "
      "worst error %.3f of its bound, seed %llu\n",
      good ? "passed" : "FAILED", kProblems - wrong, kProblems, swapped, empty,
      (long long)total.elements, total.worst, (unsigned long long)seed);
  return good ? 0 : 1;
}
