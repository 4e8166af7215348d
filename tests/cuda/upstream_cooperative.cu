// NVIDIA/cutlass#3263 to the letter: upstream tags, automatic epilogue, CUTLASS's own linear
// combination. With this header it builds for SM120 on CUTLASS below 4.6; without it the builder
// refuses.
#include "grouped_program.hpp"

template struct outside::GroupedGemm<
    cutlass::float_e4m3_t, cutlass::float_e4m3_t, float, cutlass::layout::RowMajor,
    cute::Shape<cute::_128, cute::_128, cute::_128>,
    cutlass::epilogue::collective::EpilogueTileAuto,
    cutlass::epilogue::collective::EpilogueScheduleAuto,
    cutlass::epilogue::fusion::LinearCombination<float, float>,
    cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperativeSm120<2>>;
