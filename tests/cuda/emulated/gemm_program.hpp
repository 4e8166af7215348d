// What the programs of this folder share: random operands of every narrow format as packed bits,
// their values, block scales, a reference in double, and the comparison.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

// First: CUTLASS 4.2's fp4_shift_A and fp4_shift_B find cute::transform of a tensor only if it is
// declared before them.
#include <cute/algorithm/tensor_algorithms.hpp>

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>

namespace emulated {

using Random = std::mt19937_64;

inline void check(cudaError_t status, char const* what) {
  if (status != cudaSuccess) {
    std::printf("FAILED: %s: %s\n", what, cudaGetErrorString(status));
    std::exit(1);
  }
}

inline void check(cutlass::Status status, char const* what) {
  if (status != cutlass::Status::kSuccess) {
    std::printf("FAILED: %s: %s\n", what, cutlassGetStatusString(status));
    std::exit(1);
  }
}

//
// Number formats
//

/// Exponent and mantissa bits, bias, whether there is a sign, and the largest code that is a finite
/// number (without the sign).
struct Format {
  int exponent_bits, mantissa_bits, bias;
  bool is_signed;
  uint32_t largest;

  int bits() const { return exponent_bits + mantissa_bits + int(is_signed); }

  double value(uint32_t code) const {
    int const magnitude_bits = exponent_bits + mantissa_bits;
    uint32_t const magnitude = code & ((1u << magnitude_bits) - 1);
    double const sign = is_signed && (code >> magnitude_bits) != 0 ? -1.0 : 1.0;
    int const exponent = int(magnitude >> mantissa_bits);
    double const fraction = double(magnitude & ((1u << mantissa_bits) - 1));
    if (exponent == 0 && mantissa_bits > 0) {
      return sign * std::ldexp(fraction, 1 - bias - mantissa_bits);
    }
    return sign *
           std::ldexp(fraction + double(1u << mantissa_bits), exponent - bias - mantissa_bits);
  }
};

template <class Element>
struct FormatOf;
template <>
struct FormatOf<cutlass::float_e4m3_t> {
  static constexpr Format value{4, 3, 7, true, 0x7e};
};
template <>
struct FormatOf<cutlass::float_e5m2_t> {
  static constexpr Format value{5, 2, 15, true, 0x7b};
};
template <>
struct FormatOf<cutlass::float_e2m3_t> {
  static constexpr Format value{2, 3, 1, true, 0x1f};
};
template <>
struct FormatOf<cutlass::float_e3m2_t> {
  static constexpr Format value{3, 2, 3, true, 0x1f};
};
template <>
struct FormatOf<cutlass::float_e2m1_t> {
  static constexpr Format value{2, 1, 1, true, 0x07};
};
template <>
struct FormatOf<cutlass::float_ue8m0_t> {
  static constexpr Format value{8, 0, 127, false, 0xfe};
};
template <>
struct FormatOf<cutlass::float_ue4m3_t> {
  static constexpr Format value{4, 3, 7, false, 0x7e};
};

template <class Element>
inline constexpr Format format_of = FormatOf<Element>::value;

//
// Device memory
//

/// `count` objects on the device, followed by nothing: what lies behind belongs to nobody.
template <class T>
T* device_array(size_t count) {
  void* address = nullptr;
  check(cudaMalloc(&address, std::max<size_t>(count, 1) * sizeof(T)), "cudaMalloc");
  return static_cast<T*>(address);
}

template <class T>
T* upload(std::vector<T> const& host) {
  T* const device = device_array<T>(host.size());
  check(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice),
        "cudaMemcpy to the device");
  return device;
}

//
// Operands
//

/// A matrix of rows along K: codes, and their values.
struct Operand {
  int rows, k;
  std::vector<double> values;
  std::vector<uint8_t> packed;

  double at(int row, int column) const { return values[size_t(row) * k + column]; }
};

/// Any finite number of the format, its exponent at most `spread` below the largest: so every bit of
/// every code matters, and no product is lost beside another.
inline Operand random_operand(Random& random, Format const& format, int rows, int k, int spread) {
  Operand made{rows, k, {}, {}};
  int const bits = format.bits();
  size_t const count = size_t(rows) * k;
  made.values.reserve(count);
  made.packed.assign((count * bits + 7) / 8, 0);
  int const top = int(format.largest >> format.mantissa_bits);
  for (size_t i = 0; i < count; ++i) {
    uint64_t const word = random();
    int const exponent = std::max(0, top - int((word >> 8) % uint64_t(spread)));
    uint32_t code = uint32_t(exponent) << format.mantissa_bits |
                    (uint32_t(word >> 32) & ((1u << format.mantissa_bits) - 1));
    code = word % 16 == 0 ? 0 : std::min(code, format.largest);
    code |= uint32_t(word >> 63) << (bits - 1);
    made.values.push_back(format.value(code));
    for (int bit = 0; bit < bits; ++bit) {
      made.packed[(i * bits + bit) / 8] |= uint8_t((code >> bit & 1) << ((i * bits + bit) % 8));
    }
  }
  return made;
}

/// Block scales in CUTLASS's layout of them: a random one for every row and every `vector` columns,
/// and NaN for the rows that pad the last 128.
struct Scales {
  int vector;
  std::vector<double> values;  // (row, block of columns)
  std::vector<uint8_t> bytes;
  int blocks;

  double at(int row, int column) const { return values[size_t(row) * blocks + column / vector]; }
};

template <class ElementSF, class Layout>
Scales random_scales(Random& random, Layout const& layout, int rows, int k, int vector) {
  constexpr Format format = format_of<ElementSF>;
  constexpr uint8_t kNaN = format.mantissa_bits == 0 ? 0xff : 0x7f;
  Scales made{vector, {}, {}, (k + vector - 1) / vector};
  made.bytes.assign(size_t(cute::cosize(cute::filter_zeros(layout))), kNaN);
  int const padded_rows = (rows + 127) / 128 * 128, padded_blocks = (made.blocks + 3) / 4 * 4;
  made.values.resize(size_t(rows) * made.blocks);
  for (int row = 0; row < padded_rows; ++row) {
    for (int block = 0; block < padded_blocks; ++block) {
      // ue8m0: 2^-5 to 2^5; ue4m3: all but the NaN, subnormals and zero among them. The columns
      // behind K meet the zeros that a tensor copy fills in, and so have to be finite.
      uint8_t const code =
          format.mantissa_bits == 0 ? uint8_t(122 + random() % 11) : uint8_t(random() % 0x7f);
      size_t const at = size_t(layout(row, block * vector, 0));
      made.bytes[at] = row < rows ? code : kNaN;
      if (row < rows && block < made.blocks) {
        made.values[size_t(row) * made.blocks + block] = format.value(code);
      }
    }
  }
  return made;
}

//
// The comparison
//

struct Verdict {
  int64_t elements = 0, wrong = 0;
  double worst = 0.0;
};

/// D = alpha * (A SFA)(B SFB)^T + beta * C against its values in double. `term(m, n, k)` is a
/// product, `read(m, n)` what the kernel wrote, `c(m, n)` the value of C. The bound is half a unit in
/// the last place of D (`mantissa_bits` of them), and one rounding of FP32 for every 32 columns and
/// for each step of the epilogue.
template <class Term, class Read, class ReadC>
void compare(Verdict& verdict, int m_count, int n_count, int k_count, double alpha, double beta,
             int mantissa_bits, Term term, Read read, ReadC c) {
  for (int m = 0; m < m_count; ++m) {
    for (int n = 0; n < n_count; ++n) {
      double sum = 0.0, magnitude = 0.0;
      for (int k = 0; k < k_count; ++k) {
        double const product = term(m, n, k);
        sum += product;
        magnitude += std::abs(product);
      }
      double const expected = alpha * sum + beta * c(m, n);
      double const whole = std::abs(alpha) * magnitude + std::abs(beta * c(m, n));
      double const size = std::max(std::abs(expected), 0x1p-120);
      double const bound = std::ldexp(1.0, std::ilogb(size) - mantissa_bits) * 0.5 * (1 + 0x1p-10) +
                           0x1p-24 * (k_count / 32 + 4) * whole;
      double const error = std::abs(read(m, n) - expected) / bound;
      ++verdict.elements;
      verdict.wrong += !(error <= 1.0);
      verdict.worst = std::isnan(error) ? INFINITY : std::max(verdict.worst, error);
    }
  }
}

/// One line, and whether all is well.
inline bool report(char const* name, Verdict const& verdict, int stages) {
  bool const good = verdict.wrong == 0 && verdict.elements > 0;
  std::printf("%s: %s, %lld elements, worst error %.3f of its bound, %d stages\n", name,
              good ? "ok" : "FAILED", (long long)verdict.elements, verdict.worst, stages);
  if (!good) {
    std::printf("  %lld elements are wrong\n", (long long)verdict.wrong);
  }
  return good;
}

inline uint64_t seed_of(int argc, char** argv) {
  return argc > 1 ? std::strtoull(argv[1], nullptr, 0) : 0;
}

}  // namespace emulated
