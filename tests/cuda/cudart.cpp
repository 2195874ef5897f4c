// The part of the CUDA runtime that launchers use, for a machine that has none: a launch goes to
// `on_launch`, which runs the kernel in ptxvm. Linked to a launcher in place of libcudart.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstring>
#include <map>
#include <string>

#include "../ptxvm/src/tensormap.h"

namespace {

struct Kernel {
  std::string name;
  int max_dynamic_smem = 48 << 10;  // until cudaFuncSetAttribute() raises it
};

struct Launch {
  const char* kernel;
  unsigned grid[3], block[3];
  size_t smem;
  int max_dynamic_smem;
  void** args;
};

// What the launcher is told about the GPU.
struct Device {
  int num_sms, major, minor, max_smem_per_block;
};

// By the address of its host function. Launchers register theirs before this file's own objects are
// constructed.
std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> map;
  return map;
}

Device device;
cudaError_t (*on_launch)(const Launch*);
struct {
  dim3 grid, block;
  size_t smem;
} configuration;
cudaError_t last_error = cudaSuccess;

cudaError_t fail(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                      const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                      CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const bool two_bytes = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ||
                         type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 ||
                         type == CU_TENSOR_MAP_DATA_TYPE_UINT16;
  if (!two_bytes || rank < 1 || rank > 5 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
  const unsigned widest[] = {256 * 2, 32, 64, 128};  // bytes of a box's row, by swizzle
  if (box[0] * 2 % 16 != 0 || box[0] * 2 > widest[swizzle]) return CUDA_ERROR_INVALID_VALUE;
  ptxvm::TensorMap out = {};
  out.magic = ptxvm::kTensorMagic;
  out.elem = 2;
  out.rank = static_cast<uint8_t>(rank);
  out.swizzle = static_cast<uint8_t>(swizzle);
  out.base = reinterpret_cast<uint64_t>(address);
  for (unsigned i = 0; i < 5; ++i) {
    const bool used = i < rank;
    if (used && (box[i] < 1 || box[i] > 256 || sizes[i] < 1)) return CUDA_ERROR_INVALID_VALUE;
    out.dim[i] = used ? static_cast<uint32_t>(sizes[i]) : 1;
    out.box[i] = used ? static_cast<uint16_t>(box[i]) : 1;
    out.estride[i] = used ? static_cast<uint8_t>(element_strides[i]) : 1;
    if (i + 1 < rank) {
      if (strides[i] % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
      out.stride[i] = strides[i];
    }
  }
  static_assert(sizeof out == sizeof *map, "a CUtensorMap is 128 opaque bytes");
  std::memcpy(map, &out, sizeof out);
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

void fake_cuda(const Device* properties, cudaError_t (*launch)(const Launch*)) {
  device = *properties;
  on_launch = launch;
}

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }

void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  kernels()[host].name = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t smem, CUstream_st*) {
  configuration = {grid, block, smem};
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* smem, void*) {
  *grid = configuration.grid;
  *block = configuration.block;
  *smem = configuration.smem;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(&kernels().at(host));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t handle, dim3 grid, dim3 block, void** args, size_t smem,
                               cudaStream_t) {
  const Kernel& kernel = *reinterpret_cast<const Kernel*>(handle);
  const Launch launch = {kernel.name.c_str(),         {grid.x, grid.y, grid.z},
                         {block.x, block.y, block.z}, smem,
                         kernel.max_dynamic_smem,     args};
  return fail(on_launch(&launch));
}

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return fail(cudaErrorInvalidValue);
  if (value > device.max_smem_per_block) return fail(cudaErrorInvalidValue);
  kernels().at(host).max_dynamic_smem = value;
  return cudaSuccess;
}

// The PTX that runs is that of the device's own architecture.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->ptxVersion = attributes->binaryVersion = device.major * 10 + device.minor;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* ordinal) {
  *ordinal = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = device.num_sms;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = device.major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device.minor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device.max_smem_per_block;
      return cudaSuccess;
    default:
      return fail(cudaErrorInvalidValue);
  }
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&encode_tiled) : nullptr;
  if (result) {
    *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  }
  return cudaSuccess;
}

}  // extern "C"
