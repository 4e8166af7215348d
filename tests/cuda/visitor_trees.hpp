// Epilogues that a user builds as visitor trees, out of CUTLASS's nodes and sm12x's.
#pragma once

#include <cutlass/epilogue/thread/activation.h>

#include <sm12x/cutlass.hpp>

namespace outside {

inline constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

/// D = alpha * acc + bias along N, of CUTLASS's nodes alone: the bias is an array of pointers with
/// one entry per group. CUTLASS has no such fusion operation for ptr-array kernels.
template <class TileShape, class ElementD>
using ColumnBias = cutlass::epilogue::fusion::Sm90EVT<
    cutlass::epilogue::fusion::Sm90Compute<cutlass::homogeneous_multiply_add, ElementD, float,
                                           kRound>,
    cutlass::epilogue::fusion::Sm90ScalarBroadcastPtrArray<
        float, cute::Stride<cute::_0, cute::_0, int64_t>>,
    cutlass::epilogue::fusion::Sm90AccFetch,
    cutlass::epilogue::fusion::Sm90RowBroadcast<0, TileShape, cutlass::bfloat16_t*, float>>;

/// D = silu(m_scale * n_scale * acc + bias) + beta * C, with the bias along N.
///
/// beta is a GroupBroadcast too (stride 0: one value a group). With Sm90ScalarBroadcastPtrArray there
/// CUTLASS decides tile by tile, in each warp for itself, whether C is loaded at all; where the tree
/// under it loads nothing, a group whose beta is 0 then leaves loading and storing warps waiting for
/// each other (seen on an H200).
template <class ElementD, class ElementC>
using SiluResidual = cutlass::epilogue::fusion::Sm90EVT<
    cutlass::epilogue::fusion::Sm90Compute<cutlass::homogeneous_multiply_add, ElementD, float,
                                           kRound>,
    sm12x::epilogue::GroupBroadcast<sm12x::epilogue::kAlongM, sm12x::epilogue::ScaleSource>,
    cutlass::epilogue::fusion::Sm90SrcFetch<ElementC>,
    cutlass::epilogue::fusion::Sm90EVT<
        cutlass::epilogue::fusion::Sm90Compute<cutlass::epilogue::thread::SiLu, float, float,
                                               kRound>,
        cutlass::epilogue::fusion::Sm90EVT<
            cutlass::epilogue::fusion::Sm90Compute<cutlass::homogeneous_multiply_add, float, float,
                                                   kRound>,
            cutlass::epilogue::fusion::Sm90EVT<
                cutlass::epilogue::fusion::Sm90Compute<cutlass::multiplies, float, float, kRound>,
                sm12x::epilogue::GroupBroadcast<sm12x::epilogue::kAlongM,
                                                sm12x::epilogue::ScaleSource>,
                sm12x::epilogue::GroupBroadcast<sm12x::epilogue::kAlongN,
                                                sm12x::epilogue::ScaleSource>>,
            cutlass::epilogue::fusion::Sm90AccFetch,
            sm12x::epilogue::GroupBroadcast<sm12x::epilogue::kAlongN,
                                            sm12x::epilogue::BiasSource>>>>;

}  // namespace outside
