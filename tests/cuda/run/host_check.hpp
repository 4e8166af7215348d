// What a grouped GEMM is checked with, on the host and without CUDA: number formats, random groups
// in buffers of NaN, a reference in double, and the comparison.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace run {

using Random = std::mt19937_64;

inline int64_t random_int(Random& random, int64_t first, int64_t last) {
  return std::uniform_int_distribution<int64_t>(first, last)(random);
}
inline double random_real(Random& random, double first, double last) {
  return std::uniform_real_distribution<double>(first, last)(random);
}
inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

//
// Number formats
//

enum class Format {
  kFloat32,
  kFloat16,
  kBfloat16,
  kE4m3,
  kE5m2
};

struct FormatFacts {
  int bytes;
  int exponent_bits;
  int mantissa_bits;
  double largest;   // finite
  bool saturates;   // a conversion from FP32 ends at `largest` instead of at infinity
  bool infinities;  // the largest exponent means infinity and NaN (e4m3 has one NaN, no infinity)
};

inline FormatFacts facts(Format format) {
  switch (format) {
    case Format::kFloat32:
      return {4, 8, 23, std::numeric_limits<float>::max(), false, true};
    case Format::kFloat16:
      return {2, 5, 10, 65504.0, false, true};
    case Format::kBfloat16:
      return {2, 8, 7, 0x1.fep127, false, true};
    case Format::kE4m3:
      return {1, 4, 3, 448.0, true, false};
    case Format::kE5m2:
      return {1, 5, 2, 57344.0, true, true};
  }
  return {};
}

inline double decode(Format format, uint32_t bits) {
  FormatFacts const f = facts(format);
  int const bias = (1 << (f.exponent_bits - 1)) - 1;
  uint32_t const mantissa = bits & ((1u << f.mantissa_bits) - 1);
  int const top = (1 << f.exponent_bits) - 1;
  int const exponent = int(bits >> f.mantissa_bits) & top;
  double const sign = (bits >> (f.exponent_bits + f.mantissa_bits)) & 1 ? -1.0 : 1.0;
  if (exponent == top) {
    if (f.infinities) {
      return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN()
                           : sign * std::numeric_limits<double>::infinity();
    }
    if (mantissa == (1u << f.mantissa_bits) - 1) {
      return std::numeric_limits<double>::quiet_NaN();
    }
  }
  if (exponent == 0) {
    return sign * std::ldexp(double(mantissa), 1 - bias - f.mantissa_bits);
  }
  return sign *
         std::ldexp(double(mantissa | (1u << f.mantissa_bits)), exponent - bias - f.mantissa_bits);
}

/// Distance to the next number of the format at `value`, away from zero.
inline double ulp(Format format, double value) {
  FormatFacts const f = facts(format);
  int const smallest_exponent = 2 - (1 << (f.exponent_bits - 1));
  int exponent = smallest_exponent;
  if (value != 0.0) {
    exponent = std::max(exponent, std::ilogb(value));
  }
  return std::ldexp(1.0, exponent - f.mantissa_bits);
}

inline uint32_t load_bits(uint8_t const* address, int bytes) {
  uint32_t bits = 0;
  std::memcpy(&bits, address, size_t(bytes));  // the machine is little endian, as CUDA's is
  return bits;
}

/// A finite number: one in sixteen zero, else an exponent within `spread` below the one of `top`.
inline uint32_t random_bits(Random& random, Format format, int top, int spread) {
  FormatFacts const f = facts(format);
  uint64_t const word = random();
  uint32_t const sign = uint32_t(word & 1) << (f.exponent_bits + f.mantissa_bits);
  if ((word >> 1) % 16 == 0) {
    return sign;
  }
  int const bias = (1 << (f.exponent_bits - 1)) - 1;
  int const exponent = std::max(0, top + bias - int((word >> 5) % 1024 % uint64_t(spread)));
  uint32_t const mantissa = uint32_t(word >> 32) & ((1u << f.mantissa_bits) - 1);
  return sign | (uint32_t(exponent) << f.mantissa_bits) | mantissa;
}

//
// Matrices between NaNs
//

// All bits set is a NaN in every format here, and no conversion yields it.
inline constexpr uint8_t kPoison = 0xff;

struct Matrix {
  int64_t major = 0;    // rows of a row-major matrix, columns of a column-major one
  int64_t minor = 0;    // elements of each
  int64_t leading = 0;  // elements from one to the next
  int64_t offset = 0;   // bytes from the buffer's begin
};

/// Several matrices in one buffer, with NaNs before, between and after them, and in the padding of
/// each row. The device's copy starts at a multiple of 256 bytes.
struct Matrices {
  Format format = Format::kFloat32;
  std::vector<Matrix> list;
  std::vector<uint8_t> bytes;

  int element_bytes() const { return facts(format).bytes; }
  int64_t address(size_t group, int64_t major, int64_t minor) const {
    Matrix const& matrix = list[group];
    return matrix.offset + (major * matrix.leading + minor) * element_bytes();
  }
  double at(size_t group, int64_t major, int64_t minor) const {
    return decode(format, load_bits(&bytes[size_t(address(group, major, minor))], element_bytes()));
  }

  /// Appends a matrix whose address and leading dimension are multiples of `alignment` elements,
  /// and of no more than that where it can be helped.
  void add(Random& random, int64_t major, int64_t minor, int64_t alignment, bool padded) {
    int64_t const step = alignment * element_bytes();
    Matrix matrix;
    matrix.major = major;
    matrix.minor = minor;
    matrix.leading = round_up(std::max<int64_t>(minor, 1), alignment) +
                     (padded ? alignment * random_int(random, 0, 2) : 0);
    matrix.offset = round_up(size_ + kGuardBytes, step);
    if (matrix.offset / step % 2 == 0) {
      matrix.offset += step;
    }
    size_ = matrix.offset + major * matrix.leading * element_bytes();
    list.push_back(matrix);
  }

  /// Ends the list: takes the memory and fills it with NaN.
  void poison() { bytes.assign(size_t(round_up(size_ + kGuardBytes, 256)), kPoison); }

  void randomise(Random& random, int top, int spread) {
    for (size_t group = 0; group < list.size(); ++group) {
      for (int64_t i = 0; i < list[group].major; ++i) {
        for (int64_t j = 0; j < list[group].minor; ++j) {
          uint32_t const bits = random_bits(random, format, top, spread);
          std::memcpy(&bytes[size_t(address(group, i, j))], &bits, size_t(element_bytes()));
        }
      }
    }
  }

  /// Whether every byte of `written` outside the matrices is still poison; else the first that is
  /// not.
  bool surroundings_intact(std::vector<uint8_t> written, std::string& why) const {
    for (size_t group = 0; group < list.size(); ++group) {
      for (int64_t i = 0; i < list[group].major; ++i) {
        std::memset(written.data() + address(group, i, 0), kPoison,
                    size_t(list[group].minor * element_bytes()));
      }
    }
    for (size_t i = 0; i < written.size(); ++i) {
      if (written[i] != kPoison) {
        size_t nearest = 0;
        while (nearest + 1 < list.size() && list[nearest + 1].offset <= int64_t(i)) {
          ++nearest;
        }
        char text[160];
        std::snprintf(text, sizeof text,
                      "byte %zu outside every output was written, %lld behind the "
                      "begin of group %zu's",
                      i, (long long)(int64_t(i) - list[nearest].offset), nearest);
        why = text;
        return false;
      }
    }
    return true;
  }

 private:
  static constexpr int64_t kGuardBytes = 272;
  int64_t size_ = 0;
};

//
// The problem
//

struct Extents {
  int m, n, k;
};

enum class Activation {
  kNone,
  kRelu,
  kSilu,
  kGelu
};

inline double activate(Activation activation, double x) {
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return std::max(x, 0.0);
    case Activation::kSilu:
      return x / (1.0 + std::exp(-x));
    case Activation::kGelu:
      return 0.5 * x * std::erfc(-x * std::sqrt(0.5));
  }
  return x;
}

/// How far the activation's result may move when x moves by `error`, and what its own FP32
/// evaluation may add: exp and erf are approximations with errors that grow with their argument.
inline double activation_error(Activation activation, double x, double error) {
  switch (activation) {
    case Activation::kNone:
    case Activation::kRelu:
      return error;
    case Activation::kSilu:
    case Activation::kGelu:
      return 1.13 * error + 0x1p-20 + 0x1p-21 * std::abs(x);
  }
  return error;
}

/// Vectors of one kind, one per group, in one buffer of NaN.
struct Vectors {
  std::vector<float> values;
  std::vector<int64_t> offsets;
  std::vector<int> strides;  // 0: one value for the whole group

  double at(size_t group, int64_t index) const {
    return values[size_t(offsets[group] + index * strides[group])];
  }
};

/// D = act(alpha * m_scale * n_scale * acc + bias + beta * C), or with beta * C added outside the
/// activation. Whatever the kernel does not have is 1, or 0.
struct Problem {
  std::vector<Extents> extents;
  Matrices a, b, c, d;  // a (M,K) and b (N,K) along K; c and d by rows or columns
  bool c_by_columns = false;
  bool d_by_columns = false;
  bool has_c = false;
  bool c_after_activation = false;
  Activation activation = Activation::kNone;
  std::vector<float> alpha, beta;  // per group
  Vectors m_scale, n_scale, bias;
  bool bias_along_m = false;

  size_t groups() const { return extents.size(); }
};

struct Verdict {
  int64_t elements = 0;
  int64_t wrong = 0;
  double worst = 0.0;  // error as a part of its bound
  std::string first;   // the first wrong element, in words

  void merge(Verdict const& other) {
    elements += other.elements;
    wrong += other.wrong;
    worst = std::max(worst, other.worst);
    if (first.empty()) {
      first = other.first;
    }
  }
};

/// What D must be within: `|D - value| <= bound`.
struct Expected {
  double value;
  double bound;
};

inline Expected expect(Problem const& problem, size_t group, int64_t m, int64_t n, double sum,
                       double magnitude) {
  double const scale =
      problem.alpha[group] * problem.m_scale.at(group, m) * problem.n_scale.at(group, n);
  double const bias = problem.bias.at(group, problem.bias_along_m ? m : n);
  double source = 0.0;
  if (problem.has_c) {
    source = problem.beta[group] *
             (problem.c_by_columns ? problem.c.at(group, n, m) : problem.c.at(group, m, n));
  }
  double const inside = problem.c_after_activation ? bias : bias + source;
  double const x = scale * sum + inside;
  // The MMA keeps 21 to 22 bits of its sums and truncates; the epilogue rounds a few times in FP32.
  double error = 0x1p-20 * (problem.extents[group].k / 32.0) * std::abs(scale) * magnitude +
                 0x1p-22 * (std::abs(bias) + std::abs(source));
  error = activation_error(problem.activation, x, error);
  double value = activate(problem.activation, x) + (problem.c_after_activation ? source : 0.0);
  FormatFacts const f = facts(problem.d.format);
  if (f.saturates) {
    value = std::clamp(value, -f.largest, f.largest);
  }
  return {value, ulp(problem.d.format, value) + error};
}

namespace detail {

// One row of D: sums in double over the exact products, and the sums of their magnitudes.
inline void row_sums(Problem const& problem, size_t group, int64_t m, float const* b_by_k,
                     std::vector<double>& sums, std::vector<double>& magnitudes) {
  auto const [M, N, K] = problem.extents[group];
  sums.assign(size_t(N), 0.0);
  magnitudes.assign(size_t(N), 0.0);
  for (int k = 0; k < K; ++k) {
    double const a = problem.a.at(group, m, k);
    double const a_magnitude = std::abs(a);
    float const* b = b_by_k + size_t(k) * N;
    for (int n = 0; n < N; ++n) {
      sums[size_t(n)] += a * double(b[n]);
      magnitudes[size_t(n)] += a_magnitude * double(std::abs(b[n]));
    }
  }
}

inline void check_row(Problem const& problem, size_t group, int64_t m,
                      std::vector<double> const& sums, std::vector<double> const& magnitudes,
                      std::vector<uint8_t> const& written, Verdict& verdict) {
  Matrices const& d = problem.d;
  for (int64_t n = 0; n < problem.extents[group].n; ++n) {
    Expected const expected = expect(problem, group, m, n, sums[size_t(n)], magnitudes[size_t(n)]);
    int64_t const address = problem.d_by_columns ? d.address(group, n, m) : d.address(group, m, n);
    double const found = decode(d.format, load_bits(&written[size_t(address)], d.element_bytes()));
    double const part = std::abs(found - expected.value) / expected.bound;
    ++verdict.elements;
    if (part <= 1.0) {
      verdict.worst = std::max(verdict.worst, part);
      continue;
    }
    if (verdict.wrong++ == 0) {
      auto const [M, N, K] = problem.extents[group];
      char text[256];
      std::snprintf(
          text, sizeof text,
          "group %zu (M %d, N %d, K %d), D[%lld, %lld] is %.9g, expected %.9g within %.3g", group,
          M, N, K, (long long)m, (long long)n, found, expected.value, expected.bound);
      verdict.first = text;
    }
  }
}

}  // namespace detail

/// Sums of every group's D, row by row: the expensive part, made once per problem.
struct Sums {
  std::vector<std::vector<double>> sums, magnitudes;  // per row of all groups
};

/// Calls `body(row)` for all rows, on all cores.
template <class Body>
void parallel_for(size_t count, Body const& body) {
  std::atomic<size_t> next{0};
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < std::max(1u, std::thread::hardware_concurrency()); ++i) {
    threads.emplace_back([&] {
      for (size_t item = next++; item < count; item = next++) {
        body(item);
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}

struct RowOfGroup {
  size_t group;
  int64_t m;
};

inline std::vector<RowOfGroup> rows_of(Problem const& problem) {
  std::vector<RowOfGroup> rows;
  for (size_t group = 0; group < problem.groups(); ++group) {
    for (int m = 0; m < problem.extents[group].m; ++m) {
      rows.push_back({group, m});
    }
  }
  return rows;
}

inline Sums reference_sums(Problem const& problem) {
  std::vector<std::vector<float>> b_by_k(problem.groups());
  parallel_for(problem.groups(), [&](size_t group) {
    auto const [M, N, K] = problem.extents[group];
    b_by_k[group].resize(size_t(N) * size_t(K));
    for (int n = 0; n < N && M > 0; ++n) {
      for (int k = 0; k < K; ++k) {
        b_by_k[group][size_t(k) * N + n] = float(problem.b.at(group, n, k));
      }
    }
  });
  std::vector<RowOfGroup> const rows = rows_of(problem);
  Sums result;
  result.sums.resize(rows.size());
  result.magnitudes.resize(rows.size());
  parallel_for(rows.size(), [&](size_t i) {
    detail::row_sums(problem, rows[i].group, rows[i].m, b_by_k[rows[i].group].data(),
                     result.sums[i], result.magnitudes[i]);
  });
  return result;
}

/// Compares D as the device wrote it with the reference.
inline Verdict check(Problem const& problem, Sums const& sums,
                     std::vector<uint8_t> const& written) {
  std::vector<RowOfGroup> const rows = rows_of(problem);
  std::vector<Verdict> verdicts(rows.size());
  parallel_for(rows.size(), [&](size_t i) {
    detail::check_row(problem, rows[i].group, rows[i].m, sums.sums[i], sums.magnitudes[i], written,
                      verdicts[i]);
  });
  Verdict verdict;
  for (Verdict const& row : verdicts) {
    verdict.merge(row);
  }
  return verdict;
}

//
// Random problems
//

/// What the kernel asks of its problems.
struct Traits {
  Format a, b, c, d;
  bool has_c = false;
  bool c_by_columns = false;
  bool d_by_columns = false;
  int alignment_c = 1;  // elements
  int alignment_d = 1;
  bool has_alpha = false;
  bool has_scales = false;
  bool has_bias = false;
  bool bias_in_every_group = false;
  bool bias_along_m = false;
  bool c_after_activation = false;
  Activation activation = Activation::kNone;
  int tile_m = 128, tile_n = 128, tile_k = 128;
  int step_m = 1, step_n = 1;  // M and N of every group are multiples of these
};

enum class Family {
  kRagged,   // tile edges on all sides, empty groups, K of 0
  kMany,     // more groups than one window of 32, 40 empty ones in a row
  kOne,      // one group, several tiles on each side
  kAligned,  // the extents themselves keep the alignment: shapes may be shown to the host
};

inline char const* name_of(Family family) {
  switch (family) {
    case Family::kRagged:
      return "ragged";
    case Family::kMany:
      return "many";
    case Family::kOne:
      return "one";
    case Family::kAligned:
      return "aligned";
  }
  return "";
}

namespace detail {

inline int edge(Random& random, int tile) {
  int const choices[] = {1,        tile - 1,     tile,
                         tile + 1, 2 * tile + 3, int(random_int(random, 1, 2 * tile))};
  return choices[random_int(random, 0, 5)];
}

inline int random_k(Random& random, int tile) {
  int const choices[] = {16,        tile - 16,     tile,
                         tile + 16, 5 * tile + 48, int(16 * random_int(random, 1, 40))};
  return choices[random_int(random, 0, 5)];
}

}  // namespace detail

inline std::vector<Extents> random_extents(Random& random, Traits const& traits, Family family) {
  std::vector<Extents> list;
  int const tm = traits.tile_m, tn = traits.tile_n, tk = traits.tile_k;
  switch (family) {
    case Family::kRagged:
      list = {{0, tn, tk}, {1, 1, 16},          {tm + 1, tn + 1, tk + 16},
              {tm, 0, tk}, {tm + 3, tn - 1, 0}, {1, 2 * tn, 640}};
      for (int i = 0; i < 6; ++i) {
        list.push_back(
            {detail::edge(random, tm), detail::edge(random, tn), detail::random_k(random, tk)});
      }
      std::shuffle(list.begin(), list.end(), random);
      break;
    case Family::kMany:
      for (int i = 0; i < 100; ++i) {
        bool const empty = (i >= 30 && i < 70) || random() % 4 == 0;
        list.push_back({empty ? 0 : int(random_int(random, 1, tm / 2)),
                        int(random_int(random, 1, tn)), int(16 * random_int(random, 1, 12))});
      }
      break;
    case Family::kOne:
      list = {{2 * tm + 5, 3 * tn + 8, 3 * tk + 16}};
      break;
    case Family::kAligned: {
      // 16 elements are 16 bytes or more in every format.
      for (int i = 0; i < 5; ++i) {
        list.push_back({int(round_up(detail::edge(random, tm), 16)),
                        int(round_up(detail::edge(random, tn), 16)), detail::random_k(random, tk)});
      }
      list.push_back({0, 16, tk});
      break;
    }
  }
  for (Extents& group : list) {
    group.m = int(round_up(group.m, traits.step_m));
    group.n = int(round_up(group.n, traits.step_n));
  }
  return list;
}

inline Vectors random_vectors(Random& random, std::vector<Extents> const& extents, bool along_m,
                              double low, double high, bool never_one_value = false) {
  constexpr int64_t kGuard = 5;
  Vectors vectors;
  for (Extents const& group : extents) {
    int const stride = int(never_one_value || random() % 3 != 0);
    int64_t const count = stride == 0 ? 1 : std::max(1, along_m ? group.m : group.n);
    vectors.values.insert(vectors.values.end(), kGuard, std::numeric_limits<float>::quiet_NaN());
    vectors.offsets.push_back(int64_t(vectors.values.size()));
    vectors.strides.push_back(stride);
    for (int64_t i = 0; i < count; ++i) {
      double const sign = random() % 2 == 0 ? 1.0 : -1.0;
      vectors.values.push_back(float(sign * random_real(random, low, high)));
    }
  }
  vectors.values.insert(vectors.values.end(), kGuard, std::numeric_limits<float>::quiet_NaN());
  return vectors;
}

/// A vector for every group or for most, nothing (a zero, stride 0) for the others. Values are exact
/// in all three types that a bias may have.
inline Vectors random_bias(Random& random, std::vector<Extents> const& extents, bool along_m,
                           bool in_every_group) {
  Vectors vectors = random_vectors(random, extents, along_m, 0.0, 0.0, in_every_group);
  for (size_t group = 0; group < extents.size(); ++group) {
    int64_t const count = vectors.strides[group] == 0
                              ? 0
                              : std::max(1, along_m ? extents[group].m : extents[group].n);
    for (int64_t i = 0; i < count; ++i) {
      vectors.values[size_t(vectors.offsets[group] + i)] =
          float(random_int(random, -255, 255)) / 8.0f;
    }
  }
  return vectors;
}

/// One vector for all groups of one value, as a kernel sees that was given no vectors.
inline Vectors constant_vectors(size_t groups, float value) {
  return {{value}, std::vector<int64_t>(groups, 0), std::vector<int>(groups, 0)};
}

/// A problem of the family. `plain`: no scales, no bias, one alpha and beta for all groups.
inline Problem random_problem(Random& random, Traits const& traits, Family family, bool plain) {
  Problem problem;
  problem.extents = random_extents(random, traits, family);
  problem.a.format = traits.a;
  problem.b.format = traits.b;
  problem.c.format = traits.c;
  problem.d.format = traits.d;
  problem.has_c = traits.has_c;
  problem.c_by_columns = traits.c_by_columns;
  problem.d_by_columns = traits.d_by_columns;
  problem.bias_along_m = traits.bias_along_m;
  problem.c_after_activation = traits.c_after_activation;
  problem.activation = traits.activation;
  constexpr int kOperandAlignment = 16;
  bool const padded = family != Family::kAligned;
  for (Extents const& group : problem.extents) {
    auto const [m, n, k] = group;
    problem.a.add(random, m, k, kOperandAlignment, padded);
    problem.b.add(random, n, k, kOperandAlignment, padded);
    if (traits.has_c) {
      problem.c.add(random, traits.c_by_columns ? n : m, traits.c_by_columns ? m : n,
                    traits.alignment_c, padded);
    }
    problem.d.add(random, traits.d_by_columns ? n : m, traits.d_by_columns ? m : n,
                  traits.alignment_d, padded);
  }
  for (Matrices* matrices : {&problem.a, &problem.b, &problem.c, &problem.d}) {
    matrices->poison();
  }
  problem.a.randomise(random, 1, 6);
  problem.b.randomise(random, 1, 6);
  problem.c.randomise(random, 3, 6);

  // Products are about 1 in size, sums of some hundred of them about 20: most of D lies between
  // 0.1 and 100, and the largest of it beyond e4m3's 448.
  size_t const groups = problem.groups();
  problem.alpha.assign(groups, traits.has_alpha ? 0.75f : 1.0f);
  problem.beta.assign(groups, traits.has_c ? -1.25f : 0.0f);
  problem.m_scale = constant_vectors(groups, 1.0f);
  problem.n_scale = constant_vectors(groups, 1.0f);
  problem.bias = constant_vectors(groups, 0.0f);
  if (plain) {
    return problem;
  }
  for (size_t group = 0; group < groups; ++group) {
    if (traits.has_alpha) {
      problem.alpha[group] = float(random_real(random, 0.01, 6.0));
    }
    if (traits.has_c) {
      problem.beta[group] = random() % 3 == 0 ? 0.0f : float(random_real(random, 0.5, 2.0));
    }
  }
  if (traits.has_scales) {
    problem.m_scale = random_vectors(random, problem.extents, true, 0.05, 3.0);
    problem.n_scale = random_vectors(random, problem.extents, false, 0.05, 3.0);
  }
  if (traits.has_bias) {
    problem.bias =
        random_bias(random, problem.extents, traits.bias_along_m, traits.bias_in_every_group);
  }
  return problem;
}

}  // namespace run
