/// The one include for CUTLASS programs: -I cuda/include and #include <sm12x/cutlass.hpp>.
///
/// It brings the ptr-array (grouped) FP8 collective for SM120 and its builder, the epilogue schedules
/// of our own, and the per-group scale fusions. cuda/README.md says how to adopt it.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "sm12x/collective/dispatch_policy.hpp"
#include "sm12x/collective/ptr_array_builder.hpp"
#include "sm12x/collective/ptr_array_mma.hpp"
#include "sm12x/epilogue/epilogue_builder.hpp"
#include "sm12x/epilogue/group_scale.hpp"
