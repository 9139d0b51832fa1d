// SPDX-License-Identifier: MIT
// Host emulation of csrc/cuda/device_hopper.cuh: barriers that count bytes, TMA boxes with the 128-byte swizzle, wgmma
// with its operand descriptors (PTX ISA), barriers of some threads.
//   * A box lands when a thread waits for its barrier (EMU_ORDER = 0) or at once (other orders). Products are computed
//     when their group is awaited. So a missing wait leaves NaN, and a stage that is released too early changes before
//     it is read.
//   * If nothing can wake the waiting threads, that is a deadlock, and throws.
//   * The hardware compares the parity of a phase; here a wait names the phase's number. It throws if the barrier is
//     neither in that phase nor just past it: there the parity would mislead.
#pragma once
#include "cuda_emu.h"

#define CONVMIXER_HOPPER 1

namespace convmixer {

using Barrier = uint64_t;
struct TensorMap {
  const char* data;
  int64_t size[3], stride[2];
  int rows;
};

struct EmuBarrier {
  uint16_t arrivals;
  uint8_t pending, phase;
  int32_t bytes;
};
static_assert(sizeof(EmuBarrier) == sizeof(Barrier), "in place of a barrier");

struct EmuBox {
  char* to;
  TensorMap map;
  Barrier* barrier;
  int64_t at[3];
};
struct EmuProduct {
  float* d;
  uint64_t a, b;
  bool transposed;
  float (*value)(uint16_t);
};
// The copies and products that a block of threads has in flight.
struct EmuBlock {
  int64_t launch = -1, block = -1;
  std::vector<EmuBox> boxes;
  std::map<int, std::pair<int, int>> named;  // arrived, generation
  std::map<const void*, uint32_t> ended;     // phases of a barrier
  std::vector<std::vector<std::vector<EmuProduct>>> groups;
  std::vector<std::vector<EmuProduct>> open;
};
inline EmuBlock emu_block_state;
inline EmuBlock& emu_block() {
  EmuBlock& s = emu_block_state;
  const int64_t block = emu::G.bid.x;
  if (s.launch != emu::launches || s.block != block) {
    s = EmuBlock();
    s.launch = emu::launches, s.block = block;
    s.groups.resize(emu::G.f.size());
    s.open.resize(emu::G.f.size());
  }
  return s;
}
inline size_t emu_thread() { return emu::G.cur - emu::G.f.data(); }

// shared memory begins at an address that is no multiple of 1024
constexpr uint32_t kEmuShared = 128;
inline uint32_t smem_u32(const void* p) { return uint32_t(static_cast<const char*>(p) - emu::G.dyn) + kEmuShared; }
inline char* emu_swizzled(uint32_t address) { return emu::G.dyn + (address ^ ((address >> 7 & 7) << 4)) - kEmuShared; }

inline EmuBarrier* emu_barrier(Barrier* b) { return reinterpret_cast<EmuBarrier*>(b); }
inline void emu_turn(EmuBarrier* b) {
  if (b->pending == 0 && b->bytes == 0) {
    b->phase ^= 1, b->pending = uint8_t(b->arrivals);
    ++emu_block().ended[b];
  }
  ++emu::G.progress;
}
inline void barrier_init(Barrier* b, int arrivals) { *emu_barrier(b) = {uint16_t(arrivals), uint8_t(arrivals), 0, 0}; }
inline void barrier_init_fence() {}
inline void barrier_arrive_expect(Barrier* at, int bytes) {
  EmuBarrier* b = emu_barrier(at);
  if (b->arrivals > 255) emu::fail("barrier is not initialised");
  if (b->pending == 0) emu::fail("barrier has more arrivals than it expects");
  b->bytes += bytes;
  --b->pending;
  emu_turn(b);
}
inline void barrier_arrive(Barrier* at) { barrier_arrive_expect(at, 0); }
inline void emu_land(const EmuBox& x) {
  const TensorMap& m = x.map;
  for (int r = 0; r < m.rows; ++r)
    for (int c = 0; c < 64; ++c) {
      const int64_t i = x.at[0] + c, j = x.at[1] + r, k = x.at[2];
      const bool inside = i >= 0 && i < m.size[0] && j >= 0 && j < m.size[1] && k >= 0 && k < m.size[2];
      char* to = emu_swizzled(smem_u32(x.to) + r * 128 + c * 2);
      if (inside)
        std::memcpy(to, m.data + i * 2 + j * m.stride[0] + k * m.stride[1], 2);
      else
        std::memset(to, 0, 2);
    }
  EmuBarrier* b = emu_barrier(x.barrier);
  b->bytes -= m.rows * 128;
  emu_turn(b);
}
inline void barrier_wait(Barrier* at, uint32_t phase) {
  EmuBarrier* b = emu_barrier(at);
  if (b->arrivals > 255) emu::fail("barrier is not initialised");
  for (;;) {
    auto& boxes = emu_block().boxes;
    for (size_t i = 0; i < boxes.size();)
      if (boxes[i].barrier == at) {
        const EmuBox box = boxes[i];
        boxes.erase(boxes.begin() + i);
        emu_land(box);
      } else
        ++i;
    const uint32_t ahead = emu_block().ended[b] - phase;
    if (ahead > 1) emu::fail("barrier_wait: parity cannot tell this phase from another");
    if (ahead == 1) break;
    emu::spin();
  }
  ++emu::G.progress;
}
inline void named_barrier(int number, int threads) {
  auto& [arrived, generation] = emu_block().named[number];
  const int mine = generation;
  ++emu::G.progress;
  if (++arrived == threads) {
    arrived = 0;
    ++generation;
    return;
  }
  while (emu_block().named[number].second == mine) emu::spin();
  ++emu::G.progress;
}
template <int N>
inline void more_registers() {}
template <int N>
inline void fewer_registers() {}

inline void tma_load(void* to, const TensorMap& map, Barrier* b, int c0, int c1, int c2) {
  if (smem_u32(to) % 1024) emu::fail("the box's swizzle needs 1024-byte alignment");
  const EmuBox box{static_cast<char*>(to), map, b, {c0, c1, c2}};
  const char* order = std::getenv("EMU_ORDER");
  if (order && std::atoi(order))
    emu_land(box);
  else
    emu_block().boxes.push_back(box);
}

inline void wgmma_fence() {}
inline void wgmma_results(float (&)[16][4]) {}
inline void wgmma_commit() {
  auto& s = emu_block();
  s.groups[emu_thread()].push_back(std::move(s.open[emu_thread()]));
  s.open[emu_thread()].clear();
}
// d += a b for a warp's 16 rows; the lanes of a warp agree on everything but d
inline void emu_product(EmuProduct** of, int warp) {
  const EmuProduct& x = *of[0];
  const auto field = [](uint64_t d, int bit) { return uint32_t(d >> bit & 0x3fff) << 4; };
  if (x.a >> 62 != 1 || x.b >> 62 != 1) emu::fail("wgmma operand without the 128-byte swizzle");
  const auto load = [&](uint32_t address) {
    uint16_t v;
    std::memcpy(&v, emu_swizzled(address), 2);
    return x.value(v);
  };
  static float a[16][16], b[128][16];
  for (int k = 0; k < 16; ++k) {
    for (int r = 0; r < 16; ++r) {
      const int row = 16 * warp + r;
      a[r][k] = load(field(x.a, 0) + row / 8 * field(x.a, 32) + row % 8 * 128 + k * 2);
    }
    for (int n = 0; n < 128; ++n)
      b[n][k] = x.transposed
                    ? load(field(x.b, 0) + n / 64 * field(x.b, 16) + k / 8 * field(x.b, 32) + k % 8 * 128 + n % 64 * 2)
                    : load(field(x.b, 0) + n / 8 * field(x.b, 32) + n % 8 * 128 + k * 2);
  }
  for (int l = 0; l < 32; ++l)
    for (int j = 0; j < 16; ++j)
      for (int e = 0; e < 4; ++e) {
        float s = 0;
        for (int k = 0; k < 16; ++k) s += a[l / 4 + 8 * (e / 2)][k] * b[8 * j + 2 * (l % 4) + e % 2][k];
        of[l]->d[4 * j + e] += s;
      }
}
template <int N>
inline void wgmma_wait(int site = __builtin_LINE()) {
  auto& groups = emu_block().groups[emu_thread()];
  while (groups.size() > N) {
    emu::collective(site, 0xffffffffu, groups.front(), [](std::vector<EmuProduct>** all) {
      for (size_t i = 0; i < all[0]->size(); ++i) {
        EmuProduct* of[32];
        for (int l = 0; l < 32; ++l) of[l] = &(*all[l])[i];
        emu_product(of, emu::G.cur->warp % 4);
      }
    });
    groups.erase(groups.begin());
  }
}
template <bool TRANSPOSED_B, class T>
inline void wgmma(float (&d)[16][4], uint64_t a, uint64_t b, T) {
  const auto value = [](uint16_t v) {
    T t;
    std::memcpy(&t, &v, 2);
    return float(t);
  };
  emu_block().open[emu_thread()].push_back({&d[0][0], a, b, TRANSPOSED_B, value});
}

template <class K>
inline bool has_hopper_code(K) {
  return true;
}
inline cudaError_t make_tensor_map(TensorMap& map, bool, const void* data, const int64_t (&size)[3],
                                   const int64_t (&stride)[2], int rows) {
  if (reinterpret_cast<uintptr_t>(data) % 16 || stride[0] % 16 || stride[1] % 16) return cudaErrorInvalidValue;
  map = {static_cast<const char*>(data), {size[0], size[1], size[2]}, {stride[0], stride[1]}, rows};
  return cudaSuccess;
}

}  // namespace convmixer
