// SPDX-License-Identifier: MIT
// Host emulation of a subset of CUDA C++: g++ or clang compiles a .cu file as C++ and runs its kernels with CUDA's
// semantics, one fiber per CUDA thread. It tests indexing, fragment layouts and synchronisation.
//   * A thread runs until it meets a barrier or a warp collective. EMU_ORDER sets the order of threads: 0 forward,
//     1 reverse, n >= 2 shuffled with seed n. A missing barrier gives a wrong result in at least one order.
//   * NaN patterns fill shared memory at the start of each block; a guard behind it is checked at the end.
//   * cp.async copies only at the matching wait: a missing wait leaves NaN.
//   * Divergent barriers, collectives with absent lanes, and misaligned ldmatrix or cp.async throw.
// clang-format off: many small stand-ins take one line each
#pragma once
#define CUDART_VERSION 0  // no toolkit
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// Language.
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static            // not poisoned between blocks: prefer SHARED_ARRAY / DYN_SHARED
#define __forceinline__ inline
#define __grid_constant__
#define __noinline__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __CUDA_EMU__ 1
#define warpSize 32

// Vector types.
#define EMU_VEC(T, n, al2, al4)                                                                        \
  struct alignas(al2) n##2 { T x, y; };                                                                \
  struct n##3 { T x, y, z; };                                                                          \
  struct alignas(al4) n##4 { T x, y, z, w; };                                                          \
  static inline n##2 make_##n##2(T x, T y) { return {x, y}; }                                          \
  static inline n##3 make_##n##3(T x, T y, T z) { return {x, y, z}; }                                  \
  static inline n##4 make_##n##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VEC(float, float, 8, 16) EMU_VEC(int, int, 8, 16) EMU_VEC(unsigned, uint, 8, 16)
EMU_VEC(short, short, 4, 8) EMU_VEC(unsigned short, ushort, 4, 8) EMU_VEC(signed char, char, 2, 4)
EMU_VEC(unsigned char, uchar, 2, 4)
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
typedef void* cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorNotSupported = 801 };
namespace emu { inline std::vector<uintptr_t> ends; }       // EMU_ENDS: of tensors; no cp.async reads across one
namespace emu { inline cudaError_t last_error = cudaSuccess; }
static inline cudaError_t cudaGetLastError() { auto e = emu::last_error; emu::last_error = cudaSuccess; return e; }
static inline const char* cudaGetErrorString(cudaError_t e) { return e ? "invalid configuration (emulated)" : "no error"; }
static inline cudaError_t cudaGetDeviceCount(int* n) { *n = 1; return cudaSuccess; }

// 16-bit floats.
namespace emu {
template <class To, class From> inline To bits(const From& f) {
  static_assert(sizeof(To) == sizeof(From)); To t; std::memcpy(&t, &f, sizeof t); return t;
}
inline uint16_t f2bf(float f) {                       // round to nearest even
  uint32_t u = bits<uint32_t>(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
inline float bf2f(uint16_t h) { return bits<float>(uint32_t(h) << 16); }
inline uint16_t f2h(float f) {
  uint32_t u = bits<uint32_t>(f), s = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return 0x7fff;
  if (a >= 0x477ff000u) return uint16_t(s | 0x7c00u);                     // >= 65520 rounds to inf
  if (a < 0x38800000u) {                                                  // subnormal half: multiple of 2^-24
    return uint16_t(s | uint32_t(std::lrintf(bits<float>(a) * 16777216.f)));
  }
  return uint16_t(s | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1)) >> 13));
}
inline float h2f(uint16_t h) {
  uint32_t s = uint32_t(h & 0x8000u) << 16, e = (h >> 10) & 31, m = h & 1023;
  if (e == 0) return bits<float>(s | bits<uint32_t>(float(m) * 5.9604644775390625e-8f));
  return bits<float>(s | (e == 31 ? 0x7f800000u : (e + 112) << 23) | m << 13);
}
}  // namespace emu
struct __nv_bfloat16 {
  uint16_t v;
  __nv_bfloat16() = default;
  __nv_bfloat16(float f) : v(emu::f2bf(f)) {}
  operator float() const { return emu::bf2f(v); }
};
struct __half {
  uint16_t v;
  __half() = default;
  __half(float f) : v(emu::f2h(f)) {}
  operator float() const { return emu::h2f(v); }
};
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
struct alignas(4) __half2 { __half x, y; };
typedef __half half; typedef __half2 half2; typedef __nv_bfloat16 nv_bfloat16; typedef __nv_bfloat162 nv_bfloat162;
static inline float __bfloat162float(__nv_bfloat16 a) { return a; }
static inline float __half2float(__half a) { return a; }
static inline __nv_bfloat16 __float2bfloat16(float a) { return a; }
static inline __nv_bfloat16 __float2bfloat16_rn(float a) { return a; }
static inline __half __float2half(float a) { return a; }
static inline __half __float2half_rn(float a) { return a; }
static inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {a, b}; }
static inline __half2 __floats2half2_rn(float a, float b) { return {a, b}; }
static inline float2 __bfloat1622float2(__nv_bfloat162 a) { return {a.x, a.y}; }
static inline float2 __half22float2(__half2 a) { return {a.x, a.y}; }
#define EMU_H2(T)                                                                                       \
  static inline T __hadd2(T a, T b) { return {float(a.x) + float(b.x), float(a.y) + float(b.y)}; }      \
  static inline T __hmul2(T a, T b) { return {float(a.x) * float(b.x), float(a.y) * float(b.y)}; }      \
  static inline T __hfma2(T a, T b, T c) {                                                              \
    return {float(double(a.x) * double(b.x) + double(c.x)), float(double(a.y) * double(b.y) + double(c.y))}; }
EMU_H2(__half2) EMU_H2(__nv_bfloat162)

// Fibers.
namespace emu {
enum State { RUN, AT_BLOCK, AT_WARP, SPINS, DONE };
struct Copy { void* dst; const void* src; int n, bytes; };
struct Fiber {
  uint3 tid; int lane, warp;
  State st; int site; uint32_t mask; void* arg;            // what it waits at
  bool started;
  ucontext_t first;
  std::unique_ptr<char[]> stack;
  std::vector<std::vector<Copy>> groups;                   // committed cp.async groups, oldest first
  std::vector<Copy> open;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
#endif
};
constexpr size_t STACK = 64 << 10, GUARD = 256;
struct Grid {                                              // one launch at a time, one OS thread
  uint3 bid; dim3 grid, block;
  std::vector<Fiber> f;
  Fiber* cur = nullptr;
  ucontext_t usched;
  void (*body)(void*) = nullptr; void* body_arg = nullptr;
  std::unique_ptr<char[]> dyn_store; char* dyn = nullptr; size_t dyn_bytes = 0;
  std::map<std::pair<const void*, int>, std::pair<std::unique_ptr<char[]>, size_t>> stat;   // SHARED_ARRAY by site
  std::string error;
  int vote = 0;                                            // of __syncthreads_or
  uint64_t barriers = 0, collectives = 0, mmas = 0, progress = 0;   // progress: whatever may wake a thread that spins
#if defined(__SANITIZE_ADDRESS__)
  void* sched_fake = nullptr; const void* sched_bottom = nullptr; size_t sched_size = 0;
#endif
};
inline Grid G;

inline void yield() {
  Fiber* me = G.cur;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(me->st == DONE ? nullptr : &me->fake, G.sched_bottom, G.sched_size);
#endif
  swapcontext(&me->first, &G.usched);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(me->fake, &G.sched_bottom, &G.sched_size);
#endif
}
inline void fail(const std::string& what) {                // record and park this thread; launch() throws
  if (G.error.empty()) {
    auto& t = G.cur->tid;
    G.error = what + " [block " + std::to_string(G.bid.x) + "," + std::to_string(G.bid.y) + "," + std::to_string(G.bid.z) +
              " thread " + std::to_string(t.x) + "," + std::to_string(t.y) + "," + std::to_string(t.z) + "]";
  }
  G.cur->st = DONE;
  for (;;) yield();
}
inline void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &G.sched_bottom, &G.sched_size);
#endif
  G.body(G.body_arg);
  G.cur->st = DONE;
  for (;;) yield();
}
inline void resume(Fiber& x) {
  G.cur = &x;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&G.sched_fake, x.stack.get(), STACK);
#endif
  if (!x.started) {
    x.started = true;
    getcontext(&x.first);
    x.first.uc_stack.ss_sp = x.stack.get();
    x.first.uc_stack.ss_size = STACK;
    x.first.uc_link = nullptr;
    makecontext(&x.first, entry, 0);
  }
  swapcontext(&G.usched, &x.first);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(G.sched_fake, nullptr, nullptr);
#endif
}
inline void sync_block(int site) {
  G.cur->st = AT_BLOCK; G.cur->site = site;
  yield();
}
inline void spin() { G.cur->st = SPINS; yield(); }          // waits until something has changed
// All lanes of `mask` meet at `site`; the last one to arrive runs fn(args of all lanes) for the whole warp.
template <class A, class F> inline void collective(int site, uint32_t mask, A& mine, F fn) {
  Fiber* me = G.cur;
  if (!(mask >> me->lane & 1)) fail("warp collective: calling lane is not in its mask");
  me->site = site; me->mask = mask; me->arg = &mine; me->st = AT_WARP;
  Fiber* w = &G.f[me->warp * 32];
  int n = std::min<int>(32, int(G.f.size()) - me->warp * 32);
  A* all[32] = {};
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    if (l >= n || w[l].st == DONE) fail("warp collective at line " + std::to_string(site) + ": lane " + std::to_string(l) + " has exited");
    if (w[l].st != AT_WARP) { yield(); return; }           // not all there yet
    if (w[l].site != site || w[l].mask != mask)
      fail("warp collective at line " + std::to_string(site) + ": lane " + std::to_string(l) + " waits at line " + std::to_string(w[l].site));
    all[l] = static_cast<A*>(w[l].arg);
  }
  fn(all);
  ++G.collectives;
  for (int l = 0; l < 32; ++l) if (mask >> l & 1) w[l].st = RUN;
}
inline void run_block(const std::vector<int>& warps, const std::vector<int>& lanes) {
  for (auto& x : G.f) { x.st = RUN; x.started = false; x.groups.clear(); x.open.clear(); }
  for (;;) {
    const uint64_t before = G.progress;
    for (int w : warps)                                    // each warp until all its lanes are at a block barrier or done
      for (bool progress = true; progress;) {
        progress = false;
        for (int l : lanes) {
          size_t i = size_t(w) * 32 + l;
          if (i >= G.f.size() || G.f[i].st != RUN) continue;
          resume(G.f[i]);
          progress = true;
          if (!G.error.empty()) return;
        }
      }
    int at = 0, site = -1, spinning = 0;
    for (auto& x : G.f) if (x.st == SPINS) { x.st = RUN; ++spinning; }
    if (spinning && before == G.progress) { G.error = "deadlock: " + std::to_string(spinning) + " threads wait for a barrier"; return; }
    if (spinning) continue;
    for (auto& x : G.f) {
      if (x.st == DONE) continue;
      if (x.st == AT_WARP) { G.cur = &x; G.error = "deadlock: lane waits in a warp collective at line " + std::to_string(x.site); return; }
      else {
        ++at;
        if (site >= 0 && site != x.site) { G.error = "divergent __syncthreads: lines " + std::to_string(site) + " and " + std::to_string(x.site); return; }
        site = x.site;
      }
    }
    if (!at) return;
    ++G.barriers;
    for (auto& x : G.f) if (x.st == AT_BLOCK) x.st = RUN;
  }
}
inline size_t asked = 0;                                   // of ask_for_dynamic_shared for the next launch
inline int64_t launches = 0;                               // of kernels so far, for tests that count them
template <class F> void launch(dim3 grid, dim3 block, size_t smem, F&& body) {
  size_t n = size_t(block.x) * block.y * block.z;
  if (!n || n > 1024 || !grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || smem > 232448) {
    last_error = cudaErrorInvalidConfiguration; return;
  }
  if (const char* log = std::getenv("EMU_LAUNCHES"))       // for benchmarks/static: threads, dynamic shared memory
    if (FILE* f = std::fopen(log, "a")) { std::fprintf(f, "%zu %zu\n", n, smem); std::fclose(f); }
  const size_t most_shared = smem <= asked ? 232448 : 48 << 10;
  asked = 0;
  ends.clear();
  for (const char* s = std::getenv("EMU_ENDS"); s && *s; s += *s == ',') { char* e; ends.push_back(std::strtoull(s, &e, 10)); s = e; }
  G.grid = grid; G.block = block; G.error.clear(); G.stat.clear();
  if (G.f.size() != n) G.f = std::vector<Fiber>(n);
  for (size_t i = 0; i < n; ++i) {
    Fiber& x = G.f[i];
    x.tid = {unsigned(i % block.x), unsigned(i / block.x % block.y), unsigned(i / block.x / block.y)};
    x.lane = i & 31; x.warp = int(i >> 5);
    if (!x.stack) x.stack.reset(new char[STACK]);
  }
  G.dyn_store.reset(new char[smem + GUARD + 128]);
  G.dyn = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(G.dyn_store.get()) + 127) & ~uintptr_t(127));
  G.dyn_bytes = smem;
  G.body = [](void* p) { (*static_cast<std::remove_reference_t<F>*>(p))(); };
  G.body_arg = &body;
  ++launches;
  std::vector<int> warps((n + 31) / 32), lanes(32);
  for (size_t i = 0; i < warps.size(); ++i) warps[i] = int(i);
  for (int i = 0; i < 32; ++i) lanes[i] = i;
  const char* o = std::getenv("EMU_ORDER");
  int mode = o ? std::atoi(o) : 0;
  std::mt19937 rng(mode);
  if (mode == 1) { std::reverse(warps.begin(), warps.end()); std::reverse(lanes.begin(), lanes.end()); }
  for (unsigned z = 0; z < grid.z; ++z) for (unsigned y = 0; y < grid.y; ++y) for (unsigned x = 0; x < grid.x; ++x) {
    G.bid = {x, y, z};
    std::memset(G.dyn, 0xff, smem + GUARD);
    for (auto& s : G.stat) std::memset(s.second.first.get(), 0xff, s.second.second);
    if (mode >= 2) { std::shuffle(warps.begin(), warps.end(), rng); std::shuffle(lanes.begin(), lanes.end(), rng); }
    run_block(warps, lanes);
    for (size_t i = 0; i < GUARD && G.error.empty(); ++i)
      if (uint8_t(G.dyn[smem + i]) != 0xff) { G.error = "write past dynamic shared memory, +" + std::to_string(i) + " bytes"; }
    size_t shared = smem;
    for (auto& s : G.stat) shared += s.second.second - 128;
    if (shared > most_shared && G.error.empty()) G.error = "no leave for " + std::to_string(shared) + " bytes of shared memory, static arrays included";
    if (!G.error.empty()) throw std::runtime_error("cuda_emu: " + G.error);
  }
}
template <class T> T* static_shared(const void* file, int line, size_t n) {
  auto& s = G.stat[{file, line}];
  if (!s.first) { s.first.reset(new char[n * sizeof(T) + 128]); s.second = n * sizeof(T) + 128; std::memset(s.first.get(), 0xff, s.second); }
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(s.first.get()) + 127) & ~uintptr_t(127));
}
inline void do_copy(const Copy& c) {
  std::memcpy(c.dst, c.src, c.n);
  std::memset(static_cast<char*>(c.dst) + c.n, 0, c.bytes - c.n);
}
template <class T> inline T shfl(int site, uint32_t mask, T v, int width, int (*src)(int lane, int arg, int width), int arg) {
  struct A { T v, r; int lane, src; } a{v, v, G.cur->lane, 0};
  a.src = src(a.lane, arg, width);
  collective(site, mask, a, [](A** all) {
    for (int l = 0; l < 32; ++l)
      if (all[l] && all[l]->src >= 0) {
        if (!all[all[l]->src]) fail("shuffle reads a lane outside the mask");
        all[l]->r = all[all[l]->src]->v;
      }
  });
  return a.r;
}
}  // namespace emu

#define threadIdx (emu::G.cur->tid)
#define blockIdx (emu::G.bid)
#define blockDim (emu::G.block)
#define gridDim (emu::G.grid)
#define LAUNCH(kernel, grid, block, smem, stream, ...) \
  ((void)(stream), emu::launch(grid, block, smem, [&] { (kernel)(__VA_ARGS__); }))
#define DYN_SHARED(type, name) type* name = reinterpret_cast<type*>(emu::G.dyn)
#define SHARED_ARRAY(type, name, n) type* name = emu::static_shared<type>(__FILE__, __LINE__, n)
static inline void __syncthreads(int site = __builtin_LINE()) { emu::sync_block(site); }
static inline int __syncthreads_or(int p, int site = __builtin_LINE()) {
  if (!p) { emu::sync_block(site); } else { emu::G.vote = 1; emu::sync_block(site); }
  const int any = emu::G.vote;
  emu::sync_block(-site);
  emu::G.vote = 0;
  emu::sync_block(-site);
  return any;
}
static inline void __syncwarp(uint32_t mask = 0xffffffffu, int site = __builtin_LINE()) {
  int z = 0; emu::collective(site, mask, z, [](int**) {});
}
#define EMU_SHFL(name, arg, expr)                                                                              \
  template <class T> inline T name(uint32_t m, T v, arg a, int width = 32, int site = __builtin_LINE()) {      \
    return emu::shfl(site, m, v, width, [](int l, int a, int w) { int base = l & ~(w - 1), in = l & (w - 1); (void)base; (void)in; return expr; }, int(a)); \
  }
EMU_SHFL(__shfl_sync, int, base | (a & (w - 1)))
EMU_SHFL(__shfl_xor_sync, int, (l ^ a) < base + w ? (l ^ a) : -1)
EMU_SHFL(__shfl_down_sync, unsigned, in + a < w ? l + a : -1)
EMU_SHFL(__shfl_up_sync, unsigned, in - a >= 0 ? l - a : -1)
template <class T, class U> inline T atomicAdd(T* p, U v) { T o = *p; *p = T(o + T(v)); return o; }
template <class T, class U> inline T atomicMax(T* p, U v) { T o = *p; *p = std::max<T>(o, T(v)); return o; }
template <class T> inline T __ldg(const T* p) { return *p; }
#define __expf(x) std::exp(float(x))   // glibc declares a function of this name
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
// 2 ulp from the exact value, as far as CUDA's may be
static inline float rsqrtf(float x) { return float((1. / std::sqrt(double(x))) * (1. + 2.4e-7)); }
static inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
  uint64_t v = uint64_t(y) << 32 | x; unsigned r = 0;
  for (int i = 0; i < 4; ++i) {
    unsigned sel = s >> (4 * i) & 15, b = unsigned(v >> (8 * (sel & 7))) & 0xffu;
    if (sel & 8) b = b & 0x80u ? 0xffu : 0u;
    r |= b << (8 * i);
  }
  return r;
}
template <class T> inline T __ldcs(const T* p) { if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) emu::fail("misaligned load"); return *p; }
template <class T> inline void __stcs(T* p, T v) { if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) emu::fail("misaligned store"); *p = v; }
static inline void prefetch_l2(const void*) {}
static inline void store16_global(void* p, uint4 v) { __stcs(static_cast<uint4*>(p), v); }
static inline void store16_shared(void* p, uint4 v) { __stcs(static_cast<uint4*>(p), v); }
static inline float __frcp_rn(float a) { return 1.f / a; }
static inline float __int_as_float(int v) { return emu::bits<float>(v); }
static inline int __float_as_int(float v) { return emu::bits<int>(v); }
static inline unsigned __float_as_uint(float v) { return emu::bits<unsigned>(v); }
static inline float __uint_as_float(unsigned v) { return emu::bits<float>(v); }
static inline unsigned __ballot_sync(uint32_t m, int p, int site = __builtin_LINE()) {
  struct A { int p; unsigned r; } a{p, 0};
  emu::collective(site, m, a, [](A** all) {
    unsigned r = 0;
    for (int l = 0; l < 32; ++l) if (all[l] && all[l]->p) r |= 1u << l;
    for (int l = 0; l < 32; ++l) if (all[l]) all[l]->r = r;
  });
  return a.r;
}
static inline int __any_sync(uint32_t m, int p, int site = __builtin_LINE()) { return __ballot_sync(m, p, site) != 0; }
static inline int __all_sync(uint32_t m, int p, int site = __builtin_LINE()) { return __ballot_sync(m, !p, site) == 0; }
template <class K> inline cudaError_t ask_for_dynamic_shared(K, size_t bytes) { emu::asked = bytes; return bytes <= 232448 ? cudaSuccess : cudaErrorInvalidValue; }
inline int multiprocessor_count() {                        // EMU_PROCESSORS
  const char* n = std::getenv("EMU_PROCESSORS"); return n ? std::atoi(n) : 2;
}
inline int64_t most_shared_of_block() {                    // EMU_BLOCK_SHARED_KB: of another GPU than an H100
  const char* kb = std::getenv("EMU_BLOCK_SHARED_KB"); return (kb ? std::atoi(kb) : 227) * 1024;
}
inline int64_t shared_of_multiprocessor() {                // EMU_SHARED_KB: of another GPU than an H100
  const char* kb = std::getenv("EMU_SHARED_KB"); return (kb ? std::atoi(kb) : 228) * 1024;
}
inline int64_t enough_blocks(int64_t blocks) {             // EMU_BLOCKS: so few that small tensors too give a block several items
  const char* n = std::getenv("EMU_BLOCKS"); return n ? std::atoi(n) : blocks;
}
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
using std::max; using std::min;

// Tensor-core and copy primitives (PTX ISA 9.7.14 has the fragment layouts).
template <int N> inline void emu_ldmatrix(uint32_t (&r)[N], const void* p, bool trans, int site) {
  struct A { const void* p; uint32_t r[N]; bool tr; } a{p, {}, trans};
  emu::collective(site, 0xffffffffu, a, [](A** all) {
    for (int m = 0; m < N; ++m)
      for (int i = 0; i < 8; ++i) {                     // lane 8m+i holds the address of row i of matrix m
        auto* row = static_cast<const uint16_t*>(all[8 * m + i]->p);
        if (reinterpret_cast<uintptr_t>(row) % 16) emu::fail("ldmatrix row address not 16-byte aligned");
        for (int j = 0; j < 8; ++j) {                   // element (i, j) -> lane 4*row + col/2, half col%2
          int rr = all[0]->tr ? j : i, cc = all[0]->tr ? i : j;
          uint32_t& d = all[4 * rr + cc / 2]->r[m];
          d = cc & 1 ? (d & 0xffffu) | uint32_t(row[j]) << 16 : (d & 0xffff0000u) | row[j];
        }
      }
  });
  std::memcpy(r, a.r, sizeof r);
}
static inline void ldmatrix_x4(uint32_t (&r)[4], const void* p, int site = __builtin_LINE()) { emu_ldmatrix<4>(r, p, false, site); }
static inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* p, int site = __builtin_LINE()) { emu_ldmatrix<4>(r, p, true, site); }
static inline void ldmatrix_x2(uint32_t (&r)[2], const void* p, int site = __builtin_LINE()) { emu_ldmatrix<2>(r, p, false, site); }
static inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* p, int site = __builtin_LINE()) { emu_ldmatrix<2>(r, p, true, site); }
static inline void ldmatrix_x1(uint32_t (&r)[1], const void* p, int site = __builtin_LINE()) { emu_ldmatrix<1>(r, p, false, site); }
static inline void ldmatrix_x1_trans(uint32_t (&r)[1], const void* p, int site = __builtin_LINE()) { emu_ldmatrix<1>(r, p, true, site); }
// D = A B + C for m16n8kK, K = 16 or 8
template <int K, class T>
inline void emu_mma(float* d, const uint32_t* a, const uint32_t* b, const float* c, int site) {
  struct A { float* d; const uint32_t *a, *b; const float* c; } x{d, a, b, c};
  emu::collective(site, 0xffffffffu, x, [](A** all) {
    float fa[16][K], fb[8][K], out[32][4];
    auto get = [](uint32_t v, int hi) { T t; uint16_t h = uint16_t(hi ? v >> 16 : v); std::memcpy(&t, &h, 2); return float(t); };
    for (int l = 0; l < 32; ++l) {
      int g = l / 4, t = l % 4;
      for (int e = 0; e < 2; ++e) {
        for (int i = 0; i < K / 4; ++i) fa[g + 8 * (i & 1)][2 * t + e + 8 * (i >> 1)] = get(all[l]->a[i], e);
        for (int i = 0; i < K / 8; ++i) fb[g][2 * t + e + 8 * i] = get(all[l]->b[i], e);
      }
    }
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        int r = l / 4 + 8 * (i >> 1), n = 2 * (l % 4) + (i & 1);
        float s = 0;
        for (int k = 0; k < K; ++k) s += fa[r][k] * fb[n][k];
        out[l][i] = all[l]->c[i] + s;
      }
    for (int l = 0; l < 32; ++l) std::memcpy(all[l]->d, out[l], sizeof out[l]);
    ++emu::G.mmas;
  });
}
template <class T> inline void mma16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4], T, int site = __builtin_LINE()) {
  emu_mma<16, T>(d, a, b, c, site);
}
template <class T> inline void mma16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T, int site = __builtin_LINE()) {
  emu_mma<16, T>(d, a, b, d, site);
}
template <class T> inline void mma1688(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b, const float (&c)[4], T, int site = __builtin_LINE()) {
  const uint32_t a[2] = {a0, a1};
  emu_mma<8, T>(d, a, &b, c, site);
}
template <class T> inline void mma1688(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b, T, int site = __builtin_LINE()) {
  const uint32_t a[2] = {a0, a1};
  emu_mma<8, T>(d, a, &b, d, site);
}
static inline uint32_t movmatrix_trans(uint32_t v, int site = __builtin_LINE()) {
  struct A { uint32_t v, r; } a{v, 0};
  emu::collective(site, 0xffffffffu, a, [](A** all) {
    for (int l = 0; l < 32; ++l)
      for (int e = 0; e < 2; ++e) {
        int i = l / 4, j = 2 * (l % 4) + e;                // this lane's element of the result is (j, i) of the source
        uint32_t s = all[4 * j + i / 2]->v >> (16 * (i & 1)) & 0xffffu;
        all[l]->r |= s << (16 * e);
      }
  });
  return a.r;
}
template <int B> inline void cp_async(void* dst, const void* src, int bytes = B) {
  static_assert(B == 4 || B == 8 || B == 16, "cp.async size");
  if (reinterpret_cast<uintptr_t>(dst) % B || reinterpret_cast<uintptr_t>(src) % B) emu::fail("cp.async address not aligned to its size");
  for (uintptr_t end : emu::ends)                          // hardware touches all B bytes, however few it copies
    if (bytes > 0 && reinterpret_cast<uintptr_t>(src) < end && reinterpret_cast<uintptr_t>(src) + B > end) emu::fail("cp.async reads behind a tensor");
  emu::G.cur->open.push_back({dst, src, bytes, B});
}
static inline void cp_async_commit() {
  auto* f = emu::G.cur;
  f->groups.push_back(std::move(f->open)); f->open.clear();
}
template <int N> inline void cp_async_wait() {
  auto& g = emu::G.cur->groups;
  while (g.size() > N) { for (auto& c : g.front()) emu::do_copy(c); g.erase(g.begin()); }
}
