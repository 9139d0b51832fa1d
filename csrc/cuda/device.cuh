// SPDX-License-Identifier: MIT
// Device primitives. Only this file knows whether nvcc or the host emulation (tests/emulation/cuda_emu.h) compiles it,
// and inline PTX is here and in device_hopper.cuh only. Kernels use these wrappers and plain CUDA C++: they launch by
// LAUNCH, declare shared memory by SHARED_ARRAY and DYN_SHARED, and have no implicit warp-synchronous code.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SHARED_ARRAY(type, name, n) __shared__ type name[n]
#define LAUNCH(kernel, grid, block, smem, stream, ...) (kernel)<<<(grid), (block), (smem), (stream)>>>(__VA_ARGS__)
#define DYN_SHARED(type, name)                                     \
  extern __shared__ __align__(128) unsigned char dyn_shared_raw[]; \
  type* name = reinterpret_cast<type*>(dyn_shared_raw)

namespace convmixer {

// Matrix loads. Lane 8 m + i holds the address of row i (16 bytes, aligned) of the 8x8 matrix m; element (i, j) goes to
// lane 4 i + j / 2, half j % 2 of r[m]. .trans exchanges i and j.
__device__ __forceinline__ uint32_t smem_u32(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_u32(p))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(smem_u32(p))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x1(uint32_t (&r)[1], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];\n" : "=r"(r[0]) : "r"(smem_u32(p)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_u32(p))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(smem_u32(p))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x1_trans(uint32_t (&r)[1], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];\n"
               : "=r"(r[0])
               : "r"(smem_u32(p))
               : "memory");
}
// Transposes the 8x8 16-bit matrix that the warp holds in fragment layout.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t a) {
  uint32_t d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(d) : "r"(a));
  return d;
}

// d += a b on tensor cores, with float32 accumulation. With g = lane / 4 and t = lane % 4:
//   m16n8k16  a[i] = A[g + 8 (i & 1)][2 t + 8 (i >> 1) + {0, 1}],  b[i] = B[2 t + 8 i + {0, 1}][g],
//             d[i] = D[g + 8 (i >> 1)][2 t + (i & 1)]
//   m16n8k8   takes a[0], a[1] and b[0] of that
#define CONVMIXER_MMA16816(type, name)                                                                                \
  __device__ __forceinline__ void mma16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],             \
                                           const float (&c)[4], type) {                                               \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                               \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};\n"                                   \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), \
                   "f"(c[3]));                                                                                        \
  }                                                                                                                   \
  __device__ __forceinline__ void mma1688(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b, const float (&c)[4],   \
                                          type) {                                                                     \
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." name "." name                                                \
                 ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};\n"                                               \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                     \
                 : "r"(a0), "r"(a1), "r"(b), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));                             \
  }
CONVMIXER_MMA16816(__nv_bfloat16, "bf16")
CONVMIXER_MMA16816(__half, "f16")
#undef CONVMIXER_MMA16816
template <class T>
__device__ __forceinline__ void mma16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T tag) {
  mma16816(d, a, b, d, tag);
}
template <class T>
__device__ __forceinline__ void mma1688(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b, T tag) {
  mma1688(d, a0, a1, b, d, tag);
}

// Copies B (4, 8 or 16) bytes asynchronously: the first `bytes` of them from memory, the rest as zeros.
template <int B>
__device__ __forceinline__ void cp_async(void* dst, const void* src, int bytes = B) {
  static_assert(B == 4 || B == 8 || B == 16, "cp.async copies 4, 8 or 16 bytes");
  if constexpr (B == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(smem_u32(dst)), "l"(src), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(smem_u32(dst)), "l"(src), "n"(B), "r"(bytes)
                 : "memory");
  }
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

// Stores 16 bytes to an aligned address in one access: the compiler splits plain uint4 stores that follow each other.
__device__ __forceinline__ void store16_global(void* p, uint4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};\n" ::"l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ __forceinline__ void store16_shared(void* p, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};\n" ::"r"(smem_u32(p)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// Brings the 32 bytes at p into the L2 cache.
__device__ __forceinline__ void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(__cvta_generic_to_global(p)));
}

// Approximations with a relative error of 2^-22 (ex2) and 1 ulp (rcp). Subnormals are flushed.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// max(x, y) that keeps NaN.
__device__ __forceinline__ float max_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

template <class K>
inline cudaError_t ask_for_dynamic_shared(K kernel, size_t bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}
// Multiprocessors of the current device, and the most shared memory that one of its blocks may use.
inline int multiprocessor_count() {
  int device = 0, n = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  return cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? n : 1;
}
inline int64_t most_shared_of_block() {
  int device = 0, n = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 48 * 1024;
  return cudaDeviceGetAttribute(&n, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess ? n : 48 * 1024;
}
// The number of blocks from which on a plan gives a block several items. The emulation may lower it.
inline int64_t enough_blocks(int64_t blocks) { return blocks; }
// Shared memory of a multiprocessor of the current device, for all its blocks.
inline int64_t shared_of_multiprocessor() {
  int device = 0, n = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 100 * 1024;
  return cudaDeviceGetAttribute(&n, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device) == cudaSuccess ? n
                                                                                                        : 100 * 1024;
}

}  // namespace convmixer
#else
#include "cuda_emu.h"
#endif

#include "kernels.h"

namespace convmixer {

// More than the static shared arrays of any kernel that has dynamic shared memory too. Both count towards a block's
// limit.
constexpr int kStaticShared = 1024;
inline int64_t max_dynamic_shared() { return most_shared_of_block() - kStaticShared; }
// Allows `kernel` to use `bytes` of dynamic shared memory. Up to 48 KB with the static arrays are always allowed.
template <class K>
inline cudaError_t set_dynamic_shared(K kernel, size_t bytes) {
  return bytes + kStaticShared <= 48 * 1024 ? cudaSuccess : ask_for_dynamic_shared(kernel, bytes);
}

// Conversions round to nearest even.
__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

template <class To, class From>
__device__ __forceinline__ To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// Two 16-bit values in a register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack2(float lo, float hi);
template <>
__device__ __forceinline__ uint32_t pack2<__half>(float lo, float hi) {
  return bit_cast<uint32_t>(__floats2half2_rn(lo, hi));
}
template <>
__device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float lo, float hi) {
  return bit_cast<uint32_t>(__floats2bfloat162_rn(lo, hi));
}
template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t v);
template <>
__device__ __forceinline__ float2 unpack2<__half>(uint32_t v) {
  return __half22float2(bit_cast<__half2>(v));
}
template <>
__device__ __forceinline__ float2 unpack2<__nv_bfloat16>(uint32_t v) {
  return make_float2(bit_cast<float>(v << 16), bit_cast<float>(v & 0xffff0000u));
}
// trace + 0 * v: a half of the pair becomes NaN, and stays NaN, once a value is not finite.
template <class T>
__device__ __forceinline__ uint32_t trace_finite(uint32_t trace, uint32_t v);
template <>
__device__ __forceinline__ uint32_t trace_finite<__half>(uint32_t trace, uint32_t v) {
  return bit_cast<uint32_t>(__hfma2(bit_cast<__half2>(v), bit_cast<__half2>(0u), bit_cast<__half2>(trace)));
}
template <>
__device__ __forceinline__ uint32_t trace_finite<__nv_bfloat16>(uint32_t trace, uint32_t v) {
  return bit_cast<uint32_t>(
      __hfma2(bit_cast<__nv_bfloat162>(v), bit_cast<__nv_bfloat162>(0u), bit_cast<__nv_bfloat162>(trace)));
}
template <class T>
__device__ __forceinline__ bool was_finite(uint32_t trace) {
  const float2 v = unpack2<T>(trace);
  return v.x == v.x && v.y == v.y;
}

template <class T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr int value = kFloat32;
};
template <>
struct DtypeOf<__half> {
  static constexpr int value = kFloat16;
};
template <>
struct DtypeOf<__nv_bfloat16> {
  static constexpr int value = kBFloat16;
};

// Element `i` of a per-channel vector or weight; `otherwise` if the tensor is None.
__device__ __forceinline__ float load_param(const Param& p, int64_t i, float otherwise = 0.f) {
  if (p.data == nullptr) return otherwise;
  if (p.dtype == kFloat32) return static_cast<const float*>(p.data)[i];
  if (p.dtype == kFloat16) return to_float(static_cast<const __half*>(p.data)[i]);
  return to_float(static_cast<const __nv_bfloat16*>(p.data)[i]);
}
// Like load_param, rounded to the activations' dtype, as the convolution uses it.
template <class T>
__device__ __forceinline__ float load_param_as(const Param& p, int64_t i, float otherwise = 0.f) {
  return to_float(from_float<T>(load_param(p, i, otherwise)));
}
__device__ __forceinline__ void store_param(void* data, int dtype, int64_t i, float v) {
  if (dtype == kFloat32) {
    static_cast<float*>(data)[i] = v;
  } else if (dtype == kFloat16) {
    static_cast<__half*>(data)[i] = from_float<__half>(v);
  } else {
    static_cast<__nv_bfloat16*>(data)[i] = from_float<__nv_bfloat16>(v);
  }
}

// 16 bytes at an address that is a multiple of 16. The "stream" form is for data that is used once.
__device__ __forceinline__ uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
__device__ __forceinline__ void store16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }
__device__ __forceinline__ uint4 load16_stream(const void* p) { return __ldcs(static_cast<const uint4*>(p)); }
__device__ __forceinline__ void store16_stream(void* p, uint4 v) { __stcs(static_cast<uint4*>(p), v); }

// The V values of 16 bytes as float32.
template <class T>
struct Vec16 {
  static constexpr int size = 16 / sizeof(T);
  float v[size];
  __device__ __forceinline__ void unpack(uint4 u) {
    const uint32_t w[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        v[i] = bit_cast<float>(w[i]);
      } else {
        const float2 f = unpack2<T>(w[i]);
        v[2 * i] = f.x;
        v[2 * i + 1] = f.y;
      }
    }
  }
  __device__ __forceinline__ uint4 pack() const {
    uint32_t w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        w[i] = bit_cast<uint32_t>(v[i]);
      } else {
        w[i] = pack2<T>(v[2 * i], v[2 * i + 1]);
      }
    }
    return make_uint4(w[0], w[1], w[2], w[3]);
  }
};

// Rows become columns: r[p] holds row p of an 8x8 matrix of 16-bit values.
__device__ __forceinline__ void transpose8(uint4 (&r)[8]) {
  uint32_t in[8][4];
#pragma unroll
  for (int p = 0; p < 8; ++p) {
    in[p][0] = r[p].x;
    in[p][1] = r[p].y;
    in[p][2] = r[p].z;
    in[p][3] = r[p].w;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const unsigned pick = j & 1 ? 0x7632u : 0x5410u;
    r[j] = make_uint4(__byte_perm(in[0][j / 2], in[1][j / 2], pick), __byte_perm(in[2][j / 2], in[3][j / 2], pick),
                      __byte_perm(in[4][j / 2], in[5][j / 2], pick), __byte_perm(in[6][j / 2], in[7][j / 2], pick));
  }
}

inline __host__ __device__ int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Quotient and remainder by a run-time constant, for 0 <= n < 2^31 (Granlund and Montgomery, PLDI 1994, figure 4.1).
struct FastDiv {
  uint32_t divisor, multiplier, shift;
  FastDiv() = default;
  explicit FastDiv(uint32_t d) : divisor(d), multiplier(0), shift(0) {
    while ((uint64_t(1) << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - d)) / d + 1);
  }
  __device__ __forceinline__ uint32_t div(uint32_t n) const { return (__umulhi(n, multiplier) + n) >> shift; }
  __device__ __forceinline__ uint32_t divmod(uint32_t n, uint32_t& remainder) const {
    const uint32_t q = div(n);
    remainder = n - q * divisor;
    return q;
  }
};

// The sum over a warp, in a fixed order; every lane gets it.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}

}  // namespace convmixer
