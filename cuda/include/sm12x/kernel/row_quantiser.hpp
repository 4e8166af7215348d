/// Quantises rows to e4m3, a CTA a row: the scale from the row's own largest magnitude, or from one that is
/// known.
#pragma once

#include <cstdint>

#include <sm12x/abi_moe.h>
#include <sm12x/epilogue/quantise.hpp>

namespace sm12x::kernel {

/// The largest of a magnitude (not negative, no NaN) of every thread of the CTA, in all of them. `scratch` is
/// free again after the CTA's next barrier.
template <int Threads>
__device__ float largest_of_cta(float value, float (&scratch)[Threads / 32]) {
  // Bits of numbers that are not negative have the order of the numbers.
  uint32_t const of_warp = __reduce_max_sync(0xffffffffu, __float_as_uint(value));
  if (threadIdx.x % 32 == 0) {
    scratch[threadIdx.x / 32] = __uint_as_float(of_warp);
  }
  __syncthreads();
  float largest = 0.0f;
#pragma unroll
  for (int warp = 0; warp < Threads / 32; ++warp) {
    largest = fmaxf(largest, scratch[warp]);
  }
  return largest;
}

/// A row of elements of a type that the launch chooses, times the row's weight where it has one, in chunks
/// of 8. What its elements mean is decided at each chunk, so that a kernel holds the code behind it once: in
/// a chain of short kernels, fetching instructions is what takes their time.
class Row {
 public:
  /// A chunk as it lies in memory: 16 bytes, or 32 of floats.
  struct Chunk {
    uint4 low;
    uint4 high;
  };

  /// x: of sm12x_out_type `type`. weight: float, of this row, or null.
  __device__ Row(uint64_t x, int type, int64_t stride, int64_t row, float const* weight)
      : type_(type),
        from_(reinterpret_cast<uint4 const*>(x + ((row * stride) << shift()))),
        weighted_(weight != nullptr) {
    weight_ = weighted_ ? rounded({*weight, 0.0f}).x : 1.0f;
  }

  __device__ Chunk load(int chunk) const {
    bool const wide = type_ == SM12X_OUT_FLOAT32;
    uint4 const* const at = from_ + (wide ? 2 * chunk : chunk);
    return {at[0], wide ? at[1] : uint4{}};
  }

  __device__ void values(Chunk const& chunk, float2 (&pairs)[4]) const {
    uint32_t const words[4] = {chunk.low.x, chunk.low.y, chunk.low.z, chunk.low.w};
    if (type_ == SM12X_OUT_FLOAT32) {
      pairs[0] = {__uint_as_float(words[0]), __uint_as_float(words[1])};
      pairs[1] = {__uint_as_float(words[2]), __uint_as_float(words[3])};
      pairs[2] = {__uint_as_float(chunk.high.x), __uint_as_float(chunk.high.y)};
      pairs[3] = {__uint_as_float(chunk.high.z), __uint_as_float(chunk.high.w)};
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pairs[i] = type_ == SM12X_OUT_BFLOAT16 ? epilogue::Pair<__nv_bfloat16>::unpack(words[i])
                                               : epilogue::Pair<__half>::unpack(words[i]);
      }
    }
    if (weighted_) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pairs[i] = rounded({pairs[i].x * weight_, pairs[i].y * weight_});
      }
    }
  }

 private:
  __device__ int shift() const { return type_ == SM12X_OUT_FLOAT32 ? 2 : 1; }

  __device__ float2 rounded(float2 pair) const {
    if (type_ == SM12X_OUT_FLOAT32) {
      return pair;
    }
    using Bfloat16 = epilogue::Pair<__nv_bfloat16>;
    using Float16 = epilogue::Pair<__half>;
    return type_ == SM12X_OUT_BFLOAT16 ? Bfloat16::unpack(Bfloat16::pack(pair.x, pair.y))
                                       : Float16::unpack(Float16::pack(pair.x, pair.y));
  }

  int type_;
  uint4 const* from_;
  bool weighted_;
  float weight_;
};

/// `maximum`, or the largest magnitude of a chunk's values where that is larger.
__device__ inline float raised(float maximum, float2 const (&pairs)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    maximum = fmaxf(maximum, fmaxf(fabsf(pairs[i].x), fabsf(pairs[i].y)));
  }
  return maximum;
}

/// Threads: of the CTA.
template <int Threads>
class RowQuantiser {
 public:
  struct SharedMemory {
    alignas(16) float of_warps[Threads / 32];
  };

  /// All threads of the CTA, for one row.
  __device__ static void quantise(sm12x_quantize_params const& params, int64_t row,
                                  SharedMemory& shared) {
    if (params.row_count != 0 && row >= *reinterpret_cast<int32_t const*>(params.row_count)) {
      pad(params, row);
      return;
    }
    auto const* const weights = reinterpret_cast<float const*>(params.weight);
    Row const from(params.x, params.x_type, params.stride_x, row,
                   weights != nullptr ? weights + row : nullptr);
    // Without rows the one CTA that there is still has to give the scale.
    int const chunks = row < params.rows ? params.k / 8 : 0;
    int const own = (chunks + Threads - 1 - int(threadIdx.x)) / Threads;  // chunks of this thread

    // A thread reads its chunks from the last to the first, so that the first ones are there when codes are
    // made of them. Those behind are read again, and not at all where nobody asks for their maximum.
    float2 held[kHeld][4];
    float maximum = 0.0f;
    int i = params.mode == SM12X_QUANTIZE_ROWS ? own : min(own, kHeld);
    Row::Chunk next;
    if (i > 0) {
      next = from.load(at(i - 1));
    }
#pragma unroll 1
    while (--i >= 0) {
      Row::Chunk const chunk = next;
      if (i > 0) {
        next = from.load(at(i - 1));
      }
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        held[1][pair] = held[0][pair];
      }
      from.values(chunk, held[0]);
      maximum = raised(maximum, held[0]);
    }

    float const scale = scale_of(params, row, maximum, shared);
    bool const is_of_row =
        params.mode == SM12X_QUANTIZE_ROWS || params.mode == SM12X_QUANTIZE_MAXIMA;
    if (params.scale != 0 && threadIdx.x == 0 && (is_of_row || row == 0)) {
      reinterpret_cast<float*>(params.scale)[is_of_row ? row : 0] = scale;
    }

    auto* const to = reinterpret_cast<uint2*>(params.q + row * params.stride_q);
    bool const is_any = params.mode == SM12X_QUANTIZE_STATIC;  // any number, zero too
    epilogue::Quotient const quotient(scale);
#pragma unroll 1
    for (i = 0; i < own; ++i) {
      bool const more = i + kHeld < own;
      if (more) {
        next = from.load(at(i + kHeld));
      }
      to[at(i)] = is_any ? codes_of_divisions(held[0], scale) : codes(held[0], quotient);
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        held[0][pair] = held[1][pair];
      }
      if (more) {
        from.values(next, held[1]);
      }
    }
  }

 private:
  // Chunks of a thread that stay in its registers between the maximum and the codes.
  static constexpr int kHeld = 2;

  /// Chunk `i` of this thread.
  __device__ static int at(int i) { return int(threadIdx.x) + i * Threads; }

  __device__ static void pad(sm12x_quantize_params const& params, int64_t row) {
    if (row < *reinterpret_cast<int32_t const*>(params.row_count) + params.padding) {
      auto* const to = reinterpret_cast<uint2*>(params.q + row * params.stride_q);
#pragma unroll 1
      for (int chunk = threadIdx.x; chunk < params.k / 8; chunk += Threads) {
        to[chunk] = {};
      }
    }
  }

  /// maximum: the largest magnitude that this thread has seen of the row.
  __device__ static float scale_of(sm12x_quantize_params const& params, int64_t row, float maximum,
                                   SharedMemory& shared) {
    auto const* const source = reinterpret_cast<float const*>(params.source);
    if (params.mode == SM12X_QUANTIZE_STATIC) {
      return source != nullptr ? *source : params.static_scale;
    }
    if (params.mode == SM12X_QUANTIZE_MAXIMA) {
      maximum = source[row];
    } else {
      if (params.mode == SM12X_QUANTIZE_TENSOR) {
        maximum = 0.0f;
#pragma unroll 1
        for (int i = threadIdx.x; i < params.count; i += Threads) {
          maximum = fmaxf(maximum, source[i]);
        }
      }
      maximum = largest_of_cta<Threads>(maximum, shared.of_warps);
    }
    return epilogue::scale_of_maximum(maximum);
  }

  __device__ static uint2 codes(float2 const (&pairs)[4], epilogue::Quotient const& quotient) {
    uint32_t halves[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      halves[i] = epilogue::e4m3_pair(quotient.of(pairs[i].x), quotient.of(pairs[i].y));
    }
    return {halves[0] | halves[1] << 16, halves[2] | halves[3] << 16};
  }

  /// By any number. A division is many instructions, so that this is a loop: it leaves the pairs shifted.
  __device__ static uint2 codes_of_divisions(float2 (&pairs)[4], float scale) {
    uint2 codes = {};
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
      uint32_t const half =
          epilogue::e4m3_pair(__fdiv_rn(pairs[0].x, scale), __fdiv_rn(pairs[0].y, scale));
      codes = {__funnelshift_r(codes.x, codes.y, 16), __funnelshift_r(codes.y, half, 16)};
#pragma unroll
      for (int pair = 0; pair < 3; ++pair) {
        pairs[pair] = pairs[pair + 1];
      }
    }
    return codes;
  }
};

}  // namespace sm12x::kernel
