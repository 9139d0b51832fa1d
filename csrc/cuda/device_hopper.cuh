// SPDX-License-Identifier: MIT
// Primitives of sm_90a: barriers in shared memory that count bytes, the tensor memory accelerator (TMA), and products
// of a warp group (wgmma) from shared memory. Inline PTX is here and in device.cuh only.
// kTmaSwizzle: a box row is 128 bytes; its 16-byte piece c of row r lies at c ^ (r % 8), with r counted from a multiple
// of 1024 bytes. wgmma reads that layout.
#pragma once
#include "device.cuh"

#if defined(__CUDACC__)
#include <cuda.h>

#include <atomic>

namespace convmixer {

using Barrier = uint64_t;  // in shared memory
using TensorMap = CUtensorMap;

// sm_90a's instructions exist in this pass of the compiler.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CONVMIXER_HOPPER 1
#else
#define CONVMIXER_HOPPER 0
#endif

#if CONVMIXER_HOPPER
__device__ __forceinline__ void barrier_init(Barrier* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(smem_u32(b)), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to TMA: call it after the initialisation of all, before a __syncthreads.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;\n" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(Barrier* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(smem_u32(b)) : "memory");
}
// Arrives and adds `bytes` to the asynchronous copies that this phase waits for.
__device__ __forceinline__ void barrier_arrive_expect(Barrier* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(smem_u32(b)), "r"(bytes) : "memory");
}
// Returns when phase number `phase` of the barrier has ended. The first is 0; phase -1 has always ended. The hardware
// sees only the parity: the caller must know that the phase before has ended, and that no later one has.
__device__ __forceinline__ void barrier_wait(Barrier* b, uint32_t phase) {
  uint32_t done;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
                 : "=r"(done)
                 : "r"(smem_u32(b)), "r"(phase & 1)
                 : "memory");
  } while (done == 0);
}
// __syncthreads for `threads` threads, on the hardware barrier of a number from 1 to 15.
__device__ __forceinline__ void named_barrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(number), "r"(threads) : "memory");
}
template <int N>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(N));
}

// Copies a box of a tensor to shared memory, with zeros outside the tensor, and counts its bytes on the barrier.
__device__ __forceinline__ void tma_load(void* dst, const TensorMap& map, Barrier* b, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];\n" ::"r"(smem_u32(dst)),
      "l"(&map), "r"(smem_u32(b)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

// wgmma: d[64 x 128] += a[64 x 16] b[16 x 128] by 4 warps. Warp w holds rows 16 w to 16 w + 15, as mma.sync's results.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory");
}
// Call it after wgmma_wait: it keeps the compiler from moving a read or copy of d above that (PTX ISA: a register of a
// product under way must not be accessed).
__device__ __forceinline__ void wgmma_results(float (&d)[16][4]) {
#pragma unroll
  for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(d[i / 4][i % 4])::"memory");
}

#define CONVMIXER_D4(v, j) "+f"(v[j][0]), "+f"(v[j][1]), "+f"(v[j][2]), "+f"(v[j][3])
#define CONVMIXER_D16(v, j) CONVMIXER_D4(v, j), CONVMIXER_D4(v, j + 1), CONVMIXER_D4(v, j + 2), CONVMIXER_D4(v, j + 3)
#define CONVMIXER_WGMMA(type, name)                                                                                  \
  template <bool TRANSPOSED_B>                                                                                       \
  __device__ __forceinline__ void wgmma(float (&d)[16][4], uint64_t a, uint64_t b, type) {                           \
    asm volatile(                                                                                                    \
        "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"                                                                   \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name                                                 \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22," \
        " %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43,"  \
        " %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63},"      \
        " %64, %65, p, 1, 1, 0, %66;\n}\n"                                                                           \
        : CONVMIXER_D16(d, 0), CONVMIXER_D16(d, 4), CONVMIXER_D16(d, 8), CONVMIXER_D16(d, 12)                        \
        : "l"(a), "l"(b), "n"(TRANSPOSED_B ? 1 : 0));                                                                \
  }
CONVMIXER_WGMMA(__nv_bfloat16, "bf16")
CONVMIXER_WGMMA(__half, "f16")
#undef CONVMIXER_WGMMA
#undef CONVMIXER_D16
#undef CONVMIXER_D4
#endif

// On the host: whether the current device runs sm_90a code and this build has it for `kernel`. The answer is cached for
// each device and type of kernel: all are built for the same architectures.
template <class K>
inline bool has_hopper_code(K kernel) {
  constexpr int kDevices = 64;
  static std::atomic<signed char> known[kDevices];  // 0: not asked
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
  if (known[device] == 0) {
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    cudaFuncAttributes code{};
    // code that was compiled for sm_80 or sm_90, without the a, is a trap, which takes few registers
    const bool found = major == 9 && minor == 0 && cudaFuncGetAttributes(&code, kernel) == cudaSuccess &&
                       code.ptxVersion >= 90 && code.numRegs >= 128;
    known[device] = found ? 1 : -1;
  }
  return known[device] > 0;
}

// Describes a tensor of 16-bit values in boxes of 64 x rows, by its extents (innermost first) and its strides (in
// bytes, of dimensions 1 and 2).
inline cudaError_t make_tensor_map(TensorMap& map, bool bfloat16, const void* data, const int64_t (&size)[3],
                                   const int64_t (&stride)[2], int rows) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(entry) : nullptr;
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t extents[3] = {cuuint64_t(size[0]), cuuint64_t(size[1]), cuuint64_t(size[2])};
  const cuuint64_t strides[2] = {cuuint64_t(stride[0]), cuuint64_t(stride[1])};
  const cuuint32_t box[3] = {64, static_cast<cuuint32_t>(rows), 1}, steps[3] = {1, 1, 1};
  const CUresult result =
      encode(&map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
             const_cast<void*>(data), extents, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace convmixer
#else
#include "cuda_emu_hopper.h"
#endif

namespace convmixer {

// wgmma's descriptor of an operand in shared memory with 128-byte swizzle (PTX ISA 9.7.15.5.1.2, "matrix descriptor"):
// bits 0-13 address, 16-29 leading and 32-45 stride byte offset, each in 16 bytes, 49-51 base offset, 62-63 swizzle =
// 1.
//   K contiguous        ((8, m), (8, 2)) : ((64, SBO), (1, 8)). `stride` = 1024 bytes from 8 rows to the next 8. `lead`
//                       is unused, 1 by convention. 16 values of K further is 32 bytes further.
//   columns contiguous  ((8, 8, m), (8, k)) : ((1, 8, LBO), (64, SBO)). `lead` = bytes from 64 columns to the next 64,
//                       `stride` = bytes from 8 values of K to the next 8.
// The base offset is 0 because every pattern of 1024 bytes begins at a multiple of 1024.
__device__ __forceinline__ uint64_t wgmma_operand(const void* p, int lead, int stride) {
  return (uint64_t(1) << 62) | uint64_t(stride >> 4) << 32 | uint64_t(lead >> 4) << 16 | (smem_u32(p) & 0x3ffff) >> 4;
}

}  // namespace convmixer
