// SPDX-License-Identifier: MIT
// Picks the instruction set at run time, and owns the threads' scratch memory.
#include <cstdlib>
#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace convmixer {
namespace cpu {
namespace {

#if defined(__x86_64__) || defined(__i386__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
}
// Every CPU with AVX2 has F16C. Older compilers have no name for it here.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
constexpr bool kX86 = true;
#else
bool has_avx512() { return false; }
bool has_avx2() { return false; }
constexpr bool kX86 = false;
#endif

// One block per slot and thread. It only grows, so that most calls need no fresh pages for their scratch memory.
struct Arena {
  void* block[2] = {nullptr, nullptr};
  size_t size[2] = {0, 0};
  ~Arena() {
    std::free(block[0]);
    std::free(block[1]);
  }
};
thread_local Arena arena;

}  // namespace

void advise_output(void* p, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Only pages that lie wholly inside. This is a hint: failure is no error.
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(p) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(p) + bytes) / kHuge * kHuge;
  if (first < last) static_cast<void>(madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE));
#else
  static_cast<void>(p);
  static_cast<void>(bytes);
#endif
}

void* scratch(int slot, size_t bytes) {
  if (bytes > arena.size[slot]) {
    std::free(arena.block[slot]);
    arena.size[slot] = (bytes + 4095) / 4096 * 4096;
    arena.block[slot] = std::aligned_alloc(64, arena.size[slot]);
    if (arena.block[slot] == nullptr) arena.size[slot] = 0;
  }
  return arena.block[slot];
}

const char* supported_isas() {
  if (has_avx512() && has_avx2()) return "avx512, avx2, baseline";
  return has_avx2() ? "avx2, baseline" : "baseline";
}

const Kernels* select_kernels(const char** error) {
  const char* wanted = std::getenv("CONVMIXER_CPU_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
#if defined(__x86_64__) || defined(__i386__)
  if ((any || std::strcmp(wanted, "avx512") == 0) && has_avx512()) return &kAvx512;
  if ((any || std::strcmp(wanted, "avx2") == 0) && has_avx2()) return &kAvx2;
#endif
  if (any || std::strcmp(wanted, "baseline") == 0) return &kBaseline;
  const bool known = std::strcmp(wanted, "avx512") == 0 || std::strcmp(wanted, "avx2") == 0;
  *error = !known ? "is not a known instruction set; the known ones are avx512, avx2 and baseline"
           : kX86 ? "is not supported by this CPU"
                  : "is an x86 instruction set, and this is another architecture";
  return nullptr;
}

}  // namespace cpu
}  // namespace convmixer
