/// Quantises rows to e4m3, a CTA a row: the scale from the row's own largest magnitude, or from one that is
/// known.
#pragma once

#include <cstdint>

#include <sm12x/abi_moe.h>
#include <sm12x/epilogue/quantise.hpp>

namespace sm12x::kernel {

/// The largest of a value of every thread of the CTA, in all of them; NaN does not count. `scratch` is free
/// again after the CTA's next barrier.
template <int Threads>
__device__ float largest_of_cta(float value, float (&scratch)[Threads / 32]) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, apart));
  }
  if (threadIdx.x % 32 == 0) {
    scratch[threadIdx.x / 32] = value;
  }
  __syncthreads();
  float largest = 0.0f;
#pragma unroll
  for (int warp = 0; warp < Threads / 32; ++warp) {
    largest = fmaxf(largest, scratch[warp]);
  }
  return largest;
}

/// 8 neighbouring elements of a row, as floats.
template <class Element>
struct Eight {
  static constexpr int kBytes = 8 * int(sizeof(Element));
  uint4 words[kBytes / 16];

  __device__ void load(void const* from) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      words[i] = static_cast<uint4 const*>(from)[i];
    }
  }
  __device__ float2 pair(int i) const {
    if constexpr (sizeof(Element) == 4) {
      uint4 const& four = words[i / 2];
      return i % 2 == 0 ? float2{__uint_as_float(four.x), __uint_as_float(four.y)}
                        : float2{__uint_as_float(four.z), __uint_as_float(four.w)};
    } else {
      uint4 const& eight = words[0];
      return epilogue::Pair<Element>::unpack(i == 0   ? eight.x
                                             : i == 1 ? eight.y
                                             : i == 2 ? eight.z
                                                      : eight.w);
    }
  }
};

/// The values of a row as the launch wants them quantised: weighted, where there are weights.
template <class Element>
class WeightedRow {
 public:
  __device__ WeightedRow(sm12x_quantize_params const& params, int64_t row)
      : from_(reinterpret_cast<Element const*>(params.x) + row * params.stride_x),
        weighted_(params.weight != 0),
        weight_(weighted_ ? rounded(reinterpret_cast<float const*>(params.weight)[row]) : 1.0f) {}

  /// Pairs 0 to 3 of chunk `chunk` of 8 elements.
  __device__ void load(int chunk, float2 (&pairs)[4]) const {
    Eight<Element> eight;
    eight.load(from_ + chunk * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pairs[i] = eight.pair(i);
      if (weighted_) {
        pairs[i] = {rounded(pairs[i].x * weight_), rounded(pairs[i].y * weight_)};
      }
    }
  }

 private:
  __device__ static float rounded(float value) { return float(Element(value)); }

  Element const* from_;
  bool weighted_;
  float weight_;
};

/// Threads: of the CTA.
template <int Threads>
class RowQuantiser {
 public:
  struct SharedMemory {
    float of_warps[Threads / 32];
  };

  /// All threads of the CTA, for one row.
  __device__ static void quantise(sm12x_quantize_params const& params, int64_t row,
                                  SharedMemory& shared) {
    if (params.row_count != 0 && row >= *reinterpret_cast<int32_t const*>(params.row_count)) {
      pad(params, row);
      return;
    }
    if (params.x_type == SM12X_OUT_BFLOAT16) {
      quantise_as<__nv_bfloat16>(params, row, shared);
    } else if (params.x_type == SM12X_OUT_FLOAT16) {
      quantise_as<__half>(params, row, shared);
    } else {
      quantise_as<float>(params, row, shared);
    }
  }

 private:
  __device__ static void pad(sm12x_quantize_params const& params, int64_t row) {
    if (row < *reinterpret_cast<int32_t const*>(params.row_count) + params.padding) {
      auto* const to = reinterpret_cast<uint2*>(params.q + row * params.stride_q);
      for (int chunk = threadIdx.x; chunk < params.k / 8; chunk += Threads) {
        to[chunk] = {};
      }
    }
  }

  // Chunks of a thread that stay in its registers between the maximum and the codes. Others are read again.
  static constexpr int kHeld = 2;

  template <class Element>
  __device__ static void quantise_as(sm12x_quantize_params const& params, int64_t row,
                                     SharedMemory& shared) {
    WeightedRow<Element> const from(params, row);
    // Without rows the one CTA that there is still has to give the scale.
    int const chunks = row < params.rows ? params.k / 8 : 0;
    float2 held[kHeld][4];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      int const chunk = threadIdx.x + i * Threads;
      if (chunk < chunks) {
        from.load(chunk, held[i]);
      } else {
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          held[i][pair] = {0.0f, 0.0f};
        }
      }
    }
    float maximum = 0.0f;
    if (params.mode == SM12X_QUANTIZE_ROWS) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        maximum = raised(maximum, held[i]);
      }
      for (int chunk = threadIdx.x + kHeld * Threads; chunk < chunks; chunk += Threads) {
        float2 pairs[4];
        from.load(chunk, pairs);
        maximum = raised(maximum, pairs);
      }
      maximum = largest_of_cta<Threads>(maximum, shared.of_warps);
    } else if (params.mode == SM12X_QUANTIZE_MAXIMA) {
      maximum = reinterpret_cast<float const*>(params.source)[row];
    } else if (params.mode == SM12X_QUANTIZE_TENSOR) {
      for (int i = threadIdx.x; i < params.count; i += Threads) {
        maximum = fmaxf(maximum, reinterpret_cast<float const*>(params.source)[i]);
      }
      maximum = largest_of_cta<Threads>(maximum, shared.of_warps);
    }
    bool const is_static = params.mode == SM12X_QUANTIZE_STATIC;
    float const scale = !is_static           ? epilogue::scale_of_maximum(maximum)
                        : params.source != 0 ? *reinterpret_cast<float const*>(params.source)
                                             : params.static_scale;
    bool const is_of_row =
        params.mode == SM12X_QUANTIZE_ROWS || params.mode == SM12X_QUANTIZE_MAXIMA;
    if (params.scale != 0 && threadIdx.x == 0 && (is_of_row || row == 0)) {
      reinterpret_cast<float*>(params.scale)[is_of_row ? row : 0] = scale;
    }
    if (is_static) {  // any number
      write(params, row, from, chunks, held, [&](float value) { return __fdiv_rn(value, scale); });
    } else {
      epilogue::Quotient const quotient(scale);
      write(params, row, from, chunks, held, [&](float value) { return quotient.of(value); });
    }
  }

  __device__ static float raised(float maximum, float2 const (&pairs)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      maximum = fmaxf(maximum, fmaxf(fabsf(pairs[i].x), fabsf(pairs[i].y)));
    }
    return maximum;
  }

  template <class From, class Divide>
  __device__ static void write(sm12x_quantize_params const& params, int64_t row, From const& from,
                               int chunks, float2 const (&held)[kHeld][4], Divide const& divide) {
    auto* const to = reinterpret_cast<uint2*>(params.q + row * params.stride_q);
    auto const codes = [&](float2 const(&pairs)[4]) {
      uint32_t halves[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        halves[i] = epilogue::e4m3_pair(divide(pairs[i].x), divide(pairs[i].y));
      }
      return uint2{halves[0] | halves[1] << 16, halves[2] | halves[3] << 16};
    };
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      int const chunk = threadIdx.x + i * Threads;
      if (chunk < chunks) {
        to[chunk] = codes(held[i]);
      }
    }
    for (int chunk = threadIdx.x + kHeld * Threads; chunk < chunks; chunk += Threads) {
      float2 pairs[4];
      from.load(chunk, pairs);
      to[chunk] = codes(pairs);
    }
  }
};

}  // namespace sm12x::kernel
