/// From FP32 to e4m3: the scale of a row, exact quotients, codes.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

namespace sm12x::epilogue {

constexpr float kLargestE4m3 = 448.0f;
/// Maxima below this count as this: vLLM's floor of a scale, 1 / (448 * 512), times 448.
constexpr float kLeastMaximum = 1.0f / 512.0f;

/// The scale of values whose largest magnitude is `maximum`.
__device__ inline float scale_of_maximum(float maximum) {
  return __fdiv_rn(fmaxf(maximum, kLeastMaximum), kLargestE4m3);
}

/// Two codes, the first in the low byte. Beyond the largest magnitude they saturate, NaN stays.
__device__ inline uint32_t e4m3_pair(float first, float second) {
  return __nv_cvt_float2_to_fp8x2({first, second}, __NV_SATFINITE, __NV_E4M3);
}

/// Divides by a scale from scale_of_maximum(): in three instructions, as exactly as a division.
///
/// Markstein's sequence (IBM J. Res. Dev. 34, 1990): from a correctly rounded reciprocal, a quotient and its
/// exact remainder. The scale is 2^-18 at least, so nothing that e4m3 tells from zero is subnormal on the
/// way. An infinite scale makes zeros of finite values and NaN of others, as a division does.
class Quotient {
 public:
  __device__ explicit Quotient(float scale)
      : divisor_(isinf(scale) ? 0.0f : -scale), reciprocal_(__frcp_rn(scale)) {}

  __device__ float of(float value) const {
    float const near = value * reciprocal_;
    float const remainder = fmaf(divisor_, near, value);
    return fmaf(remainder, reciprocal_, near);
  }

 private:
  float divisor_;  ///< minus the scale
  float reciprocal_;
};

/// Two neighbouring elements of a row of 2-byte floating-point numbers.
template <class Element>
struct Pair;

template <>
struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  __device__ static float2 unpack(uint32_t bits) {
    return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
  }
  __device__ static uint32_t pack(float low, float high) {
    __nv_bfloat162 const pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<uint32_t const&>(pair);
  }
};

template <>
struct Pair<__half> {
  using Type = __half2;
  __device__ static float2 unpack(uint32_t bits) {
    return __half22float2(reinterpret_cast<__half2 const&>(bits));
  }
  __device__ static uint32_t pack(float low, float high) {
    __half2 const pair = __floats2half2_rn(low, high);
    return reinterpret_cast<uint32_t const&>(pair);
  }
};

/// Raises magnitudes to those of a chunk of four such pairs; NaN does not count.
template <class Element>
__device__ inline void raise(typename Pair<Element>::Type (&largest)[4], uint4 const& chunk) {
  uint32_t const words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    largest[i] = __hmax2(largest[i],
                         __habs2(reinterpret_cast<typename Pair<Element>::Type const&>(words[i])));
  }
}

/// The largest of what raise() has left.
template <class Element>
__device__ inline float largest_of(typename Pair<Element>::Type const (&largest)[4]) {
  auto const both = __hmax2(__hmax2(largest[0], largest[1]), __hmax2(largest[2], largest[3]));
  float2 const two = Pair<Element>::unpack(reinterpret_cast<uint32_t const&>(both));
  return fmaxf(two.x, two.y);
}

/// Codes of four such pairs: 8 elements, 16 bytes, become 8 bytes.
template <class Element>
__device__ inline uint2 quantised_chunk(uint4 const& chunk, Quotient const& quotient) {
  auto const half_word = [&](uint32_t bits) {
    float2 const values = Pair<Element>::unpack(bits);
    return e4m3_pair(quotient.of(values.x), quotient.of(values.y));
  };
  return {half_word(chunk.x) | half_word(chunk.y) << 16, half_word(chunk.z) | half_word(chunk.w)
                                                                                  << 16};
}

}  // namespace sm12x::epilogue
