// Whether the checker of the run cases sees errors: it is given outputs that a correct kernel could
// have written, and the same with one mistake. Needs no GPU and no CUDA.
#include <cinttypes>

#include "host_check.hpp"

using namespace run;

namespace {

// To the nearest, ties to even.
uint32_t encode(Format format, double value) {
  FormatFacts const f = facts(format);
  uint32_t const sign = std::signbit(value) ? 1u << (f.exponent_bits + f.mantissa_bits) : 0u;
  double const step = ulp(format, value);
  double const rounded = std::nearbyint(std::abs(value) / step) * step;
  if (rounded > f.largest) {
    uint32_t const infinity = ((1u << f.exponent_bits) - 1) << f.mantissa_bits;
    uint32_t const last =
        f.infinities ? infinity - 1 : (1u << (f.exponent_bits + f.mantissa_bits)) - 2;
    return sign | (f.saturates ? last : infinity);
  }
  int const bias = (1 << (f.exponent_bits - 1)) - 1;
  double const smallest_normal = std::ldexp(1.0, 1 - bias);
  if (rounded < smallest_normal) {
    return sign | uint32_t(std::ldexp(rounded, bias - 1 + f.mantissa_bits));
  }
  int const exponent = std::ilogb(rounded);
  uint32_t const mantissa =
      uint32_t(std::ldexp(rounded, f.mantissa_bits - exponent)) & ((1u << f.mantissa_bits) - 1);
  return sign | uint32_t(exponent + bias) << f.mantissa_bits | mantissa;
}

void store(Matrices const& d, std::vector<uint8_t>& written, int64_t address, double value) {
  uint32_t const bits = encode(d.format, value);
  std::memcpy(&written[size_t(address)], &bits, size_t(d.element_bytes()));
}

int64_t address_of(Problem const& problem, size_t group, int64_t m, int64_t n) {
  return problem.d_by_columns ? problem.d.address(group, n, m) : problem.d.address(group, m, n);
}

// What a kernel without rounding errors of its own writes for `how`, which may differ from the
// problem that the reference is asked about.
std::vector<uint8_t> written_by(Problem const& how, Sums const& sums) {
  std::vector<uint8_t> written = how.d.bytes;
  std::vector<RowOfGroup> const rows = rows_of(how);
  for (size_t i = 0; i < rows.size(); ++i) {
    for (int64_t n = 0; n < how.extents[rows[i].group].n; ++n) {
      Expected const expected = expect(how, rows[i].group, rows[i].m, n, sums.sums[i][size_t(n)],
                                       sums.magnitudes[i][size_t(n)]);
      store(how.d, written, address_of(how, rows[i].group, rows[i].m, n), expected.value);
    }
  }
  return written;
}

int failures = 0;
int last_places = 0;

void require(bool condition, char const* what, Traits const& traits, Family family) {
  if (!condition) {
    std::printf("FAILED: %s (D format %d, by columns %d, C %d, scales %d, %s)\n", what,
                int(traits.d), traits.d_by_columns, traits.has_c, traits.has_scales,
                name_of(family));
    ++failures;
  }
}

// The first group that has more than one row, column and k-step, if any.
size_t large_group(Problem const& problem) {
  for (size_t group = 0; group < problem.groups(); ++group) {
    if (problem.extents[group].m > 1 && problem.extents[group].n > 1 &&
        problem.extents[group].k > 16) {
      return group;
    }
  }
  return 0;
}

void check_formats() {
  for (Format format : {Format::kFloat16, Format::kBfloat16, Format::kE4m3, Format::kE5m2}) {
    FormatFacts const f = facts(format);
    uint32_t const count = 1u << (8 * f.bytes);
    double largest = 0.0;
    for (uint32_t bits = 0; bits < count; ++bits) {
      double const value = decode(format, bits);
      if (!std::isfinite(value)) {
        continue;
      }
      largest = std::max(largest, value);
      if (encode(format, value) != bits) {
        std::printf("FAILED: format %d: %#x is %g, which encodes to %#x\n", int(format), bits,
                    value, encode(format, value));
        ++failures;
        break;
      }
      // The next number away from zero lies one ulp further.
      double const next = decode(format, bits + 1);
      if (std::isfinite(next) && (bits + 1) % (count / 2) != 0 &&
          std::abs(next - value) != ulp(format, value)) {
        std::printf("FAILED: format %d: ulp of %g is not %g\n", int(format), value,
                    std::abs(next - value));
        ++failures;
        break;
      }
    }
    if (largest != f.largest) {
      std::printf("FAILED: format %d ends at %g\n", int(format), largest);
      ++failures;
    }
  }
  if (decode(Format::kFloat32, 0x3fc00000u) != 1.5 || ulp(Format::kFloat32, 1.5) != 0x1p-23) {
    std::printf("FAILED: FP32 is misread\n");
    ++failures;
  }
}

void check_problem(Random& random, Traits const& traits, Family family, bool plain) {
  Problem const problem = random_problem(random, traits, family, plain);
  Sums const sums = reference_sums(problem);
  std::vector<uint8_t> const good = written_by(problem, sums);
  std::string why;
  Verdict const verdict = check(problem, sums, good);
  require(verdict.wrong == 0 && verdict.elements > 0, "a correct output is refused", traits,
          family);
  require(problem.d.surroundings_intact(good, why), "a correct output is said to overrun", traits,
          family);

  // Sums must be those of plain loops.
  size_t const group = large_group(problem);
  auto const [M, N, K] = problem.extents[group];
  int64_t const m = random_int(random, 0, M - 1), n = random_int(random, 0, N - 1);
  double sum = 0.0;
  for (int k = 0; k < K; ++k) {
    sum += problem.a.at(group, m, k) * problem.b.at(group, n, k);
  }
  std::vector<RowOfGroup> const rows = rows_of(problem);
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].group == group && rows[i].m == m) {
      require(
          std::abs(sums.sums[i][size_t(n)] - sum) <= 1e-12 * (1.0 + sums.magnitudes[i][size_t(n)]),
          "the reference is wrong", traits, family);
    }
  }

  auto refused = [&](std::vector<uint8_t> const& bad) {
    return check(problem, sums, bad).wrong > 0;
  };
  int64_t const address = address_of(problem, group, m, n);
  Format const format = problem.d.format;

  std::vector<uint8_t> bad = good;
  std::memset(&bad[size_t(address)], kPoison, size_t(problem.d.element_bytes()));
  require(refused(bad), "an element that was not written is accepted", traits, family);

  bad = good;
  double const value = decode(format, load_bits(&good[size_t(address)], problem.d.element_bytes()));
  size_t const row =
      size_t(std::find_if(rows.begin(), rows.end(),
                          [&](RowOfGroup const& r) { return r.group == group && r.m == m; }) -
             rows.begin());
  double const bound =
      expect(problem, group, m, n, sums.sums[row][size_t(n)], sums.magnitudes[row][size_t(n)])
          .bound;
  double const away = value > 0.0 ? -1.0 : 1.0;  // not into saturation
  store(problem.d, bad, address, value + away * (2.0 * bound + 2.0 * ulp(format, value)));
  require(refused(bad), "an element off by twice its bound is accepted", traits, family);

  // Where FP32 accumulation matters less than the last bit of D, three of those are too many.
  double const scale =
      problem.alpha[group] * problem.m_scale.at(group, m) * problem.n_scale.at(group, n);
  double const accumulation =
      0x1p-20 * (K / 32.0) * std::abs(scale) * sums.magnitudes[row][size_t(n)];
  if (traits.activation == Activation::kNone && accumulation < 0.5 * ulp(format, value)) {
    bad = good;
    store(problem.d, bad, address, value + away * 3.0 * ulp(format, value));
    require(refused(bad), "an element off by three units in the last place is accepted", traits,
            family);
    ++last_places;
  }

  bad = good;
  bad[size_t(problem.d.list[group].offset) - 1] = 0;
  require(!problem.d.surroundings_intact(bad, why), "a byte before an output is not watched",
          traits, family);
  bad = good;
  bad.back() = 0;
  require(!problem.d.surroundings_intact(bad, why), "the last byte is not watched", traits, family);
  Matrix const& matrix = problem.d.list[group];
  if (matrix.leading > matrix.minor) {
    bad = good;
    bad[size_t(matrix.offset + matrix.minor * problem.d.element_bytes())] = 0;
    require(!problem.d.surroundings_intact(bad, why), "padding of a row is not watched", traits,
            family);
  }

  // A k-step left out, a neighbour's sum, scales and C of the wrong kind.
  Sums shifted = sums;
  for (std::vector<double>& line : shifted.sums) {
    std::rotate(line.begin(), line.begin() + std::ptrdiff_t(line.size() > 1), line.end());
  }
  require(refused(written_by(problem, shifted)), "columns off by one are accepted", traits, family);
  if (!plain) {
    Problem other = problem;
    if (traits.has_scales) {
      for (int& stride : other.m_scale.strides) {
        stride = 1 - stride;
      }
      // Where a single value is now read as a vector, the reads stay inside the buffer.
      other.m_scale.values.resize(other.m_scale.values.size() + 1000, 1.0f);
      require(refused(written_by(other, sums)), "a scale read with the wrong stride is accepted",
              traits, family);
      other = problem;
      other.bias = constant_vectors(problem.groups(), 0.0f);
      bool const biased = problem.bias.strides[group] != 0;
      require(refused(written_by(other, sums)) || !biased, "a missing bias is accepted", traits,
              family);
    }
    if (traits.has_alpha) {
      other = problem;
      std::rotate(other.alpha.begin(), other.alpha.begin() + 1, other.alpha.end());
      require(refused(written_by(other, sums)) || problem.groups() == 1,
              "another group's alpha is accepted", traits, family);
    }
    if (traits.has_c) {
      other = problem;
      std::fill(other.beta.begin(), other.beta.end(), 0.0f);
      bool const beta_matters = problem.beta[group] != 0.0f;
      require(refused(written_by(other, sums)) || !beta_matters, "a C left out is accepted", traits,
              family);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t const seed = argc > 1 ? std::strtoull(argv[1], nullptr, 0) : std::random_device{}();
  Random random(seed);
  check_formats();
  int problems = 0;
  for (Format d :
       {Format::kFloat32, Format::kFloat16, Format::kBfloat16, Format::kE4m3, Format::kE5m2}) {
    for (int variant = 0; variant < 4; ++variant) {
      Traits traits;
      traits.a = variant % 2 == 0 ? Format::kE4m3 : Format::kE5m2;
      traits.b = variant < 2 ? Format::kE4m3 : Format::kE5m2;
      traits.c = variant % 2 == 0 ? Format::kBfloat16 : Format::kFloat32;
      traits.d = d;
      traits.d_by_columns = variant >= 2;
      traits.c_by_columns = variant == 2;
      traits.has_scales = variant == 1 || variant == 3;
      traits.has_bias = traits.has_scales;
      traits.has_alpha = !traits.has_scales;
      traits.has_c = variant != 1;
      traits.c_after_activation = variant == 3;
      traits.bias_along_m = variant == 3;
      traits.activation = variant == 3 ? Activation::kSilu : Activation::kNone;
      traits.alignment_c = variant == 0 ? 1 : 8;
      traits.alignment_d = variant == 0 ? 1 : 16 / facts(d).bytes;
      traits.tile_m = 32;
      traits.tile_n = variant == 2 ? 8 : 32;
      traits.tile_k = 64;
      for (Family family : {Family::kRagged, Family::kMany, Family::kOne, Family::kAligned}) {
        for (bool plain : {false, true}) {
          check_problem(random, traits, family, plain);
          ++problems;
        }
      }
    }
  }
  if (last_places == 0) {
    std::printf("FAILED: no element was moved by units in the last place\n");
    ++failures;
  }
  std::printf("host_check_test: %s, %d problems, seed %" PRIu64 "\n",
              failures == 0 ? "passed" : "FAILED", problems, seed);
  return failures == 0 ? 0 : 1;
}
