// Upstream Pingpong tag, explicit ptr-array epilogue schedule, column-major D with the bias along M
// (swap_ab), fp32.
#include "grouped_program.hpp"

template struct outside::GroupedGemm<
    cutlass::float_e5m2_t, cutlass::float_e4m3_t, float, cutlass::layout::ColumnMajor,
    cute::Shape<cute::_64, cute::_64, cute::_128>, cutlass::epilogue::collective::EpilogueTileAuto,
    cutlass::epilogue::PtrArrayTmaWarpSpecializedPingpong,
    sm12x::epilogue::GroupScaledAcc<float, sm12x::epilogue::kAlongM>,
    cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpongSm120<3>>;
