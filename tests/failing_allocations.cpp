// SPDX-License-Identifier: MIT
// Linked into the sanitized _cpu (sanitize.py) with --wrap: every allocation of the module asks this file, and the one
// that convmixer_fail_at chose fails as it would without memory.
#include <atomic>
#include <cstddef>
#include <new>

#include "../csrc/cpu/kernels.h"

// The sanitizers do not see AVX-512's masked loads: its kernels are left out, and CONVMIXER_CPU_ISA names another set.
const convmixer::cpu::Kernels convmixer::cpu::kAvx512 = {};

namespace {
// Allocations until the one that fails; below 1: none fails.
std::atomic<long> left{0};
bool fails() { return left.load() > 0 && left.fetch_sub(1) == 1; }
}  // namespace

extern "C" {
__attribute__((visibility("default"))) void convmixer_fail_at(long n) { left = n; }
// Whether the chosen allocation was reached.
__attribute__((visibility("default"))) bool convmixer_failed() { return left.load() <= 0; }

// convmixer::cpu::scratch: an impossible size, so that it frees its block, as it does if a larger one fails
void* __real__ZN9convmixer3cpu7scratchEim(int slot, size_t bytes);
void* __wrap__ZN9convmixer3cpu7scratchEim(int slot, size_t bytes) {
  return __real__ZN9convmixer3cpu7scratchEim(slot, fails() ? size_t{1} << 60 : bytes);
}

// operator new
void* __real__Znwm(size_t bytes);
void* __wrap__Znwm(size_t bytes) {
  if (fails()) throw std::bad_alloc();
  return __real__Znwm(bytes);
}
}
