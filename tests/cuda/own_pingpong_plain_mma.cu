// Our own tags, the plain MMA as the policy's option, mixed FP8 types, fp16 out, and the per-group
// scale fusion.
#include "grouped_program.hpp"

template struct outside::GroupedGemm<
    cutlass::float_e4m3_t, cutlass::float_e5m2_t, cutlass::half_t, cutlass::layout::RowMajor,
    cute::Shape<cute::_64, cute::_128, cute::_128>, cutlass::epilogue::collective::EpilogueTileAuto,
    cutlass::epilogue::collective::EpilogueScheduleAuto,
    sm12x::epilogue::GroupScaledAcc<cutlass::half_t>,
    sm12x::KernelPtrArrayPingpong<2, sm12x::MmaKind::kPlain>>;
