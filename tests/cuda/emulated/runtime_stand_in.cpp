// The part of the CUDA runtime that CUTLASS programs call, without a GPU: whatever needs a device is
// passed on to functions that whoever loads the program has set (sm12x_build/emulated_program.py).
//
// It is linked into a program in place of libcudart (nvcc -cudart none -shared). A function that is
// not here is an undefined symbol when the program is loaded. Everything is done when a function
// returns, so that streams and events order nothing.

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

/// What the loader implements. Statuses are cudaError_t, 0 for success; addresses are the device's.
struct Sm12xDevice {
  uint64_t (*allocate)(uint64_t bytes);  // 0 where there is no memory left
  int (*release)(uint64_t address);
  int (*write)(uint64_t to, void const* from, uint64_t bytes);
  int (*read)(void* to, uint64_t from, uint64_t bytes);
  int (*fill)(uint64_t to, int value, uint64_t bytes);
  int (*launch)(char const* kernel, uint32_t const* sizes, void** arguments);
  int (*encode_tiled)(void* map, int type, uint32_t rank, uint64_t address, uint64_t const* dims,
                      uint64_t const* strides, uint32_t const* box, uint32_t const* steps,
                      int const* modes);
  uint64_t first_address;  // host addresses lie below, the device's at it and beyond
  int sm_count;
  int shared_bytes;  // that a block may have
};

namespace {

struct Configuration {
  dim3 grid, block;
  size_t shared = 0;
  cudaStream_t stream = nullptr;
};

Sm12xDevice device{};
cudaError_t last_error = cudaSuccess;
std::vector<Configuration> configurations;  // of <<<...>>>, pushed and popped

// Made when the program's own constructors register its kernels.
std::map<void const*, std::string>& kernels() {
  static std::map<void const*, std::string> names;
  return names;
}

cudaError_t ended(int status) {
  if (status != cudaSuccess) {
    last_error = cudaError_t(status);
  }
  return cudaError_t(status);
}

cudaError_t refused(char const* what) {
  std::fprintf(stderr, "the stand-in for the CUDA runtime does not do this: %s\n", what);
  return ended(cudaErrorNotSupported);
}

bool on_device(void const* address) { return uint64_t(address) >= device.first_address; }

cudaError_t launch(void const* function, dim3 grid, dim3 block, size_t shared, void** arguments) {
  auto const found = kernels().find(function);
  if (found == kernels().end()) {
    std::fprintf(stderr, "a launch of a function that is no kernel of this program\n");
    return ended(cudaErrorInvalidDeviceFunction);
  }
  uint32_t const sizes[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z, uint32_t(shared)};
  return ended(device.launch(found->second.c_str(), sizes, arguments));
}

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                      cuuint64_t const* dims, cuuint64_t const* strides, cuuint32_t const* box,
                      cuuint32_t const* steps, CUtensorMapInterleave interleave,
                      CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                      CUtensorMapFloatOOBfill fill) {
  static_assert(sizeof(cuuint64_t) == sizeof(uint64_t) && sizeof(cuuint32_t) == sizeof(uint32_t));
  int const modes[] = {interleave, swizzle, promotion, fill};
  bool const good = device.encode_tiled(
                        map, type, rank, uint64_t(address), reinterpret_cast<uint64_t const*>(dims),
                        reinterpret_cast<uint64_t const*>(strides), box, steps, modes) == 0;
  return good ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult driver_version(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

int attribute(cudaDeviceAttr which) {
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor:
      return 12;
    case cudaDevAttrComputeCapabilityMinor:
      return 0;
    case cudaDevAttrMultiProcessorCount:
      return device.sm_count;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return device.shared_bytes;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return 48 * 1024;
    case cudaDevAttrWarpSize:
      return 32;
    case cudaDevAttrMaxThreadsPerBlock:
      return 1024;
    default:
      return -1;
  }
}

}  // namespace

extern "C" {

/// The loader's first call, before main().
void sm12x_set_device(Sm12xDevice const* made) { device = *made; }

// What nvcc's host code calls. The loader reads the PTX itself: no image is looked at.

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }

void __cudaRegisterFunction(void**, char const* function, char*, char const* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  kernels()[function] = name;
}

void __cudaRegisterVar(void**, char*, char*, char const*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (configurations.empty()) {
    return ended(cudaErrorMissingConfiguration);
  }
  Configuration const top = configurations.back();
  configurations.pop_back();
  *grid = top.grid;
  *block = top.block;
  *shared = top.shared;
  *static_cast<cudaStream_t*>(stream) = top.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, void const* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared, cudaStream_t) {
  return launch(kernel, grid, block, shared, arguments);
}

// Launches

cudaError_t cudaLaunchKernel(void const* function, dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t) {
  return launch(function, grid, block, shared, arguments);
}

cudaError_t cudaLaunchKernelExC(cudaLaunchConfig_t const* config, void const* function,
                                void** arguments) {
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    cudaLaunchAttribute const& one = config->attrs[i];
    // Grids run one after the other, so that a programmatic dependent launch is any other launch.
    bool const idle = one.id == cudaLaunchAttributeIgnore ||
                      one.id == cudaLaunchAttributeProgrammaticStreamSerialization;
    bool const one_block = one.id == cudaLaunchAttributeClusterDimension &&
                           one.val.clusterDim.x * one.val.clusterDim.y * one.val.clusterDim.z == 1;
    if (!idle && !one_block) {
      return refused("a launch attribute, or a cluster of more than one block");
    }
  }
  return launch(function, config->gridDim, config->blockDim, config->dynamicSmemBytes, arguments);
}

cudaError_t cudaFuncSetAttribute(void const*, cudaFuncAttribute which, int value) {
  if (which != cudaFuncAttributeMaxDynamicSharedMemorySize) {
    return refused("cudaFuncSetAttribute of anything but dynamic shared memory");
  }
  return ended(value <= device.shared_bytes ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, void const*, int,
                                                                   size_t, unsigned) {
  *blocks = 1;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void const*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void const*, cudaLaunchConfig_t const*) {
  *clusters = device.sm_count;
  return cudaSuccess;
}

// Memory

cudaError_t cudaMalloc(void** address, size_t bytes) {
  *address = nullptr;
  if (bytes == 0) {
    return cudaSuccess;
  }
  *address = reinterpret_cast<void*>(device.allocate(bytes));
  return ended(*address != nullptr ? cudaSuccess : cudaErrorMemoryAllocation);
}

cudaError_t cudaFree(void* address) {
  return address == nullptr ? cudaSuccess : ended(device.release(uint64_t(address)));
}

cudaError_t cudaMemcpy(void* to, void const* from, size_t bytes, cudaMemcpyKind) {
  if (bytes == 0) {
    return cudaSuccess;
  }
  if (!on_device(to)) {
    return on_device(from) ? ended(device.read(to, uint64_t(from), bytes))
                           : (std::memcpy(to, from, bytes), cudaSuccess);
  }
  std::vector<uint8_t> between;
  if (on_device(from)) {
    between.resize(bytes);
    if (int const status = device.read(between.data(), uint64_t(from), bytes)) {
      return ended(status);
    }
    from = between.data();
  }
  return ended(device.write(uint64_t(to), from, bytes));
}

cudaError_t cudaMemcpyAsync(void* to, void const* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}

cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  return bytes == 0 ? cudaSuccess : ended(device.fill(uint64_t(to), value & 255, bytes));
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(to, value, bytes);
}

// The device

cudaError_t cudaGetDevice(int* ordinal) {
  *ordinal = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int ordinal) {
  return ended(ordinal == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = attribute(which);
  return *value >= 0 ? cudaSuccess : refused("cudaDeviceGetAttribute of this attribute");
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strcpy(properties->name, "sm12x emulator");
  properties->major = 12;
  properties->minor = 0;
  properties->multiProcessorCount = device.sm_count;
  properties->sharedMemPerBlockOptin = size_t(device.shared_bytes);
  properties->sharedMemPerMultiprocessor = size_t(device.shared_bytes);
  properties->sharedMemPerBlock = 48 * 1024;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() { return last_error; }

cudaError_t cudaGetDriverEntryPointByVersion(char const* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  std::string const wanted = name;
  *function = wanted == "cuTensorMapEncodeTiled" ? reinterpret_cast<void*>(&encode_tiled)
              : wanted == "cuDriverGetVersion"   ? reinterpret_cast<void*>(&driver_version)
                                                 : nullptr;
  auto const status =
      *function != nullptr ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  if (result != nullptr) {
    *result = status;
  }
  return *function != nullptr ? cudaSuccess : refused(name);
}

// Errors, streams, events

cudaError_t cudaGetLastError() {
  cudaError_t const found = last_error;
  last_error = cudaSuccess;
  return found;
}

cudaError_t cudaPeekAtLastError() { return last_error; }

char const* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaSuccess:
      return "no error";
    case cudaErrorLaunchFailure:
      return "the kernel broke a rule";
    case cudaErrorNotSupported:
      return "not done by the stand-in for the CUDA runtime";
    default:
      return "an error of the stand-in for the CUDA runtime";
  }
}

char const* cudaGetErrorName(cudaError_t status) { return cudaGetErrorString(status); }

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = nullptr;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return cudaStreamCreate(stream);
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return last_error; }

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = nullptr;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 0.0f;  // there is no time
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return last_error; }

}  // extern "C"
