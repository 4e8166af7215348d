// Family fp8_ptr_array: fills the group arrays of a packed call from device-side offsets. One CTA.
//
// Offsets are not trusted: each is clamped to [0, rows] and to the running maximum of those before
// it, so that groups are disjoint and inside their tensors whatever the caller wrote. What was
// wrong is left in the status word.

#include <sm12x/kernel/group_arrays.hpp>

// -------------------------------------------------------------------------------------------------
// Compile-time checks and types
// -------------------------------------------------------------------------------------------------

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

using Launch = sm12x_prepare_packed_params;

struct SharedMemory {
  long long warp_maximum[kWarps];
  long long
      start[kThreads + 1];  // clamped offsets of this pass, start[0] carried over from the last one
  int status;
};

}  // namespace

// -------------------------------------------------------------------------------------------------
// Facts for the manifest (read from the PTX by cuda/tools)
// -------------------------------------------------------------------------------------------------

extern "C" {
extern __device__ const unsigned sm12x_variant_info[5];
__device__ const unsigned sm12x_variant_info[5] = {kThreads, 0u, 0u, 0u, 0u};
}

// -------------------------------------------------------------------------------------------------
// Body
// -------------------------------------------------------------------------------------------------

namespace {

__device__ long long load_offset(Launch const& launch, int index) {
  return launch.offsets_are_64_bit ? reinterpret_cast<long long const*>(launch.offsets)[index]
                                   : reinterpret_cast<int const*>(launch.offsets)[index];
}

// Running maximum over the CTA, in thread order.
__device__ long long running_maximum(long long value, SharedMemory& shared) {
  int const lane = threadIdx.x % 32;
  int const warp = threadIdx.x / 32;
  for (int distance = 1; distance < 32; distance *= 2) {
    long long const other = __shfl_up_sync(0xffffffffu, value, distance);
    if (lane >= distance && other > value) {
      value = other;
    }
  }
  if (lane == 31) {
    shared.warp_maximum[warp] = value;
  }
  __syncthreads();
  for (int before = 0; before < warp; ++before) {
    value = shared.warp_maximum[before] > value ? shared.warp_maximum[before] : value;
  }
  return value;
}

// The scale of group e as the GEMM kernel reads it: where it starts and whether it is a vector. A
// scale that came by value is stored in `slot`.
struct Scale {
  uint64_t address;
  int32_t stride;
};

__device__ Scale place_scale(int32_t mode, uint64_t base, float value, int64_t vector_start,
                             int group, float* slot) {
  switch (mode) {
    case SM12X_SCALE_VECTOR:
      return {base + sizeof(float) * vector_start, 1};
    case SM12X_SCALE_GROUP:
      return {base + sizeof(float) * group, 0};
    case SM12X_SCALE_ONE:
      return {base, 0};
    default:
      *slot = value;
      return {reinterpret_cast<uint64_t>(slot), 0};
  }
}

__device__ void write_group(Launch const& launch, int group, int64_t first_row, int rows) {
  sm12x::kernel::GroupArrays const arrays(launch.group_arrays, launch.num_groups);
  bool const swap = launch.swap_ab != 0;
  uint64_t const a = launch.a + uint64_t(first_row) * launch.stride_a;
  uint64_t const b = launch.b + uint64_t(group) * launch.stride_b_group;
  uint64_t const d = launch.d + uint64_t(first_row) * launch.stride_d * launch.d_element_bytes;
  uint64_t const bias = launch.bias == 0 ? 0
                                         : launch.bias + uint64_t(group) * launch.stride_bias *
                                                             launch.bias_element_bytes;

  // Tokens and features, named by the kernel's sides: tokens are m unless the operands are swapped.
  int const tokens_ptr = swap ? SM12X_OFFSET_PTR_B : SM12X_OFFSET_PTR_A;
  int const weights_ptr = swap ? SM12X_OFFSET_PTR_A : SM12X_OFFSET_PTR_B;
  int const tokens_stride = swap ? SM12X_OFFSET_STRIDE_B : SM12X_OFFSET_STRIDE_A;
  int const weights_stride = swap ? SM12X_OFFSET_STRIDE_A : SM12X_OFFSET_STRIDE_B;
  int const tokens_scale = swap ? SM12X_OFFSET_N_SCALE : SM12X_OFFSET_M_SCALE;
  int const weights_scale = swap ? SM12X_OFFSET_M_SCALE : SM12X_OFFSET_N_SCALE;
  int const tokens_scale_stride = swap ? SM12X_OFFSET_N_SCALE_STRIDE : SM12X_OFFSET_M_SCALE_STRIDE;
  int const weights_scale_stride = swap ? SM12X_OFFSET_M_SCALE_STRIDE : SM12X_OFFSET_N_SCALE_STRIDE;
  int const tokens_value = swap ? SM12X_OFFSET_N_VALUE : SM12X_OFFSET_M_VALUE;
  int const weights_value = swap ? SM12X_OFFSET_M_VALUE : SM12X_OFFSET_N_VALUE;

  Scale const a_scale = place_scale(launch.a_scale_mode, launch.a_scale, launch.a_scale_value,
                                    first_row, group, arrays.at<float>(tokens_value) + group);
  Scale const b_scale =
      place_scale(launch.b_scale_mode, launch.b_scale, launch.b_scale_value,
                  group * launch.stride_b_scale, group, arrays.at<float>(weights_value) + group);

  arrays.at<uint64_t>(tokens_ptr)[group] = a;
  arrays.at<uint64_t>(weights_ptr)[group] = b;
  arrays.at<uint64_t>(SM12X_OFFSET_PTR_D)[group] = d;
  arrays.at<int64_t>(tokens_stride)[group] = launch.stride_a;
  arrays.at<int64_t>(weights_stride)[group] = launch.stride_b;
  arrays.at<int64_t>(SM12X_OFFSET_STRIDE_D)[group] = launch.stride_d;
  arrays.at<uint64_t>(tokens_scale)[group] = a_scale.address;
  arrays.at<uint64_t>(weights_scale)[group] = b_scale.address;
  arrays.at<int32_t>(tokens_scale_stride)[group] = a_scale.stride;
  arrays.at<int32_t>(weights_scale_stride)[group] = b_scale.stride;
  arrays.at<uint64_t>(SM12X_OFFSET_BIAS)[group] = bias;
  int32_t* shape = arrays.at<int32_t>(SM12X_OFFSET_SHAPE) + 3 * group;
  shape[0] = swap ? launch.n : rows;
  shape[1] = swap ? rows : launch.n;
  shape[2] = launch.k;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    SM12X_SYMBOL(__grid_constant__ sm12x_prepare_packed_params const launch) {
  __shared__ SharedMemory shared;
  int const thread = threadIdx.x;
  int const groups = launch.num_groups;

  if (thread == 0) {
    long long const first = load_offset(launch, 0);
    bool const outside = first < 0 || first > launch.rows;
    shared.status = outside ? SM12X_STATUS_OFFSETS_RANGE : SM12X_STATUS_OK;
    shared.start[kThreads] = first < 0 ? 0 : (first > launch.rows ? launch.rows : first);
  }

  // Each pass takes kThreads groups: thread t reads the end of group first_group + t.
  for (int first_group = 0; first_group < groups; first_group += kThreads) {
    __syncthreads();
    long long const carried = shared.start[kThreads];
    int const group = first_group + thread;
    bool const active = group < groups;
    long long end = carried;
    int status = SM12X_STATUS_OK;
    if (active) {
      long long const raw = load_offset(launch, group + 1);
      status |= raw < load_offset(launch, group) ? SM12X_STATUS_OFFSETS_DECREASE : 0;
      status |= raw < 0 || raw > launch.rows ? SM12X_STATUS_OFFSETS_RANGE : 0;
      end = raw < carried ? carried : (raw > launch.rows ? launch.rows : raw);
    }
    if (status != SM12X_STATUS_OK) {
      atomicOr(&shared.status, status);
    }
    end = running_maximum(end, shared);
    // All threads have read start[kThreads] before the barrier in running_maximum().
    shared.start[thread + 1] = end;
    if (thread == 0) {
      shared.start[0] = carried;
    }
    __syncthreads();
    if (active) {
      write_group(launch, group, shared.start[thread],
                  static_cast<int>(end - shared.start[thread]));
    }
  }

  __syncthreads();
  if (thread == 0) {
    sm12x::kernel::GroupArrays const arrays(launch.group_arrays, groups);
    *arrays.at<int32_t>(SM12X_OFFSET_STATUS) = shared.status;
  }
}
