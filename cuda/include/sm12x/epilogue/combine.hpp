/// The output of an expert layer, from the rows that its experts made of each token.
#pragma once

#include <cstdint>

#include <sm12x/epilogue/quantise.hpp>

namespace sm12x::epilogue {

/// 8 features of one token: the sum of its rows in the order of its routes, in FP32, rounded once. All rows are
/// read before the first is added, a few at a time. rows: where the features are in row 0; row_of(j): the row
/// of route j, -1 where it has none.
template <class Element, class RowOf>
__device__ inline uint4 combined_chunk(Element const* rows, int64_t stride, int top_k,
                                       RowOf const& row_of) {
  constexpr int kAtOnce = 8;  // rows whose loads are in flight together
  float2 sum[4] = {};
#pragma unroll 1
  for (int first = 0; first < top_k; first += kAtOnce) {
    int row[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      row[i] = first + i < top_k ? row_of(first + i) : -1;
    }
    uint4 values[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      values[i] = {};
      if (row[i] >= 0) {
        values[i] = __ldcg(reinterpret_cast<uint4 const*>(rows + row[i] * stride));
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (row[i] >= 0) {
        uint32_t const words[4] = {values[i].x, values[i].y, values[i].z, values[i].w};
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          float2 const two = Pair<Element>::unpack(words[pair]);
          sum[pair].x += two.x;
          sum[pair].y += two.y;
        }
      }
    }
  }
  return {Pair<Element>::pack(sum[0].x, sum[0].y), Pair<Element>::pack(sum[1].x, sum[1].y),
          Pair<Element>::pack(sum[2].x, sum[2].y), Pair<Element>::pack(sum[3].x, sum[3].y)};
}

}  // namespace sm12x::epilogue
