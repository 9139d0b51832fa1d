// SPDX-License-Identifier: MIT
// The pointwise block for 16-bit tensors on tensor cores (mma.sync m16n8k16, float32 accumulation); pointwise_tile.cuh
// has the formulas. contiguous: rows = weight's channels, columns = pixels, x is [K][columns] and ldmatrix transposes
// it; channels_last: rows = pixels, columns = channels, both operands are [.][K]. A block of 2 x 2 warps owns a tile of
// 32 MT x 16 NT results, a warp 16 MT x 8 NT of them in registers; three stages of 32 values of K by cp.async.
// Bound: the tensor core. By the SASS for sm_80 and sm_90a a warp of 128 x 128 tiles issues 142 to 149 instructions for
// 32 values of K, of them 64 HMMA, 16 LDSM.x4 and 8 LDGSTS.128; shared memory moves 48 KB a block meanwhile, 384 cycles
// against 512 of HMMA on sm_80. 14 instructions an output in the eval epilogue (GELU 10), about 20 in training. 253 to
// 255 registers, two blocks a multiprocessor: the epilogue of one overlaps the products of the other. No spills.
#pragma once
#include "pointwise_tile.cuh"

namespace convmixer::pointwise {

constexpr int kMmaThreads = 128;
constexpr int kStages = 3;
constexpr int kDepth = 32;  // values of K in a stage

// ---- from memory to a stage: 16-byte pieces, swizzled so that the eight rows of an ldmatrix fall on all banks
// --------

// Eight 16-bit values of which the first `count` exist, consecutive in memory, but for a jump where a plane ends.
template <class T>
__device__ __forceinline__ uint4 gather(const T* at, int count, int64_t position, int64_t plane, int64_t jump) {
  T v[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    v[e] = e < count ? *at : from_float<T>(0.f);
    ++at;
    if (++position == plane) position = 0, at += jump;
  }
  uint4 r;
  memcpy(&r, v, sizeof r);
  return r;
}

__device__ __forceinline__ int clamp_count(int64_t n, int most) {
  return n <= 0 ? 0 : n < most ? static_cast<int>(n) : most;
}

// (rows, K) with K contiguous: 64 bytes a row, piece (row, c) at c ^ (row / 2 % 4); a thread owns one piece of every
// 32nd row. Each call copies the next kDepth values of K; what does not exist becomes zero without an access.
template <class T, int ROWS, bool ALIGNED>
struct RowsCopy {
  static constexpr int kBytes = ROWS * 2 * kDepth;
  const T* source;
  int64_t step;
  int passes, left, offset;

  __device__ __forceinline__ RowsCopy(const void* matrix, int64_t rows, int64_t row, int c_in) {
    const int mine = threadIdx.x / 4, piece = threadIdx.x % 4;
    source = static_cast<const T*>(matrix) + (row + mine) * c_in + 8 * piece;
    step = int64_t(32) * c_in;
    passes = clamp_count((rows - row - mine + 31) / 32, ROWS / 32);
    left = c_in - 8 * piece;
    offset = mine * 64 + (piece ^ (mine / 2 % 4)) * 16;
  }

  __device__ __forceinline__ void operator()(unsigned char* stage) {
    const T* row = source;
#pragma unroll
    for (int i = 0; i < ROWS / 32; ++i, row += step) {
      unsigned char* target = stage + offset + i * 32 * 64;
      if constexpr (ALIGNED) {
        cp_async<16>(target, row, i < passes && left > 0 ? 16 : 0);
      } else {
        store16(target, gather(row, i < passes ? left : 0, 0, -1, 0));
      }
    }
    source += kDepth;
    left -= kDepth;
  }
};

// (K, columns) with columns contiguous: 2 COLUMNS bytes a row, piece (row, c) at c ^ (row % 8); a thread owns one
// column of pieces. Calls as above.
template <class T, int COLUMNS, bool ALIGNED>
struct PlanesCopy {
  static constexpr int kBytes = COLUMNS * 2 * kDepth;
  static constexpr int kPieces = COLUMNS / 8, kStep = kMmaThreads / kPieces;
  const T* source;
  int64_t step, plane, position, jump;
  int count, left, offset;

  __device__ __forceinline__ PlanesCopy(const Args& p, int64_t column) {
    const int piece = threadIdx.x % kPieces, k = threadIdx.x / kPieces;
    plane = p.plane;
    step = kStep * plane;
    const Pixel pixel = locate_pixel(column + 8 * piece, p.c_in, plane);
    source = static_cast<const T*>(p.x) + pixel.offset + k * plane;
    position = pixel.position;
    jump = (p.c_in - 1) * plane;
    count = clamp_count(p.pixels - column - 8 * piece, 8);
    left = count > 0 ? p.c_in - k : 0;
    offset = k * 2 * COLUMNS + (piece ^ (k % 8)) * 16;
  }

  __device__ __forceinline__ void operator()(unsigned char* stage) {
#pragma unroll
    for (int i = 0; i < kDepth / kStep; ++i, source += step) {
      unsigned char* target = stage + offset + i * kStep * 2 * COLUMNS;
      if constexpr (ALIGNED) {
        cp_async<16>(target, source, left > i * kStep ? 16 : 0);
      } else {
        store16(target, gather(source, left > i * kStep ? count : 0, position, plane, jump));
      }
    }
    left -= kDepth;
  }
};

// ---- from a stage to registers
// -----------------------------------------------------------------------------------------

// Fragments of the 16 values of K number `half` of a stage.
template <int MT, int NT, bool LAST>
__device__ __forceinline__ void load_fragments(const unsigned char* a_stage, const unsigned char* b_stage, int half,
                                               int row, int column, uint32_t (&a)[MT][4], uint32_t (&b)[NT][2]) {
  const int lane = threadIdx.x % 32;
  {
    const int r = row + lane % 16, piece = 2 * half + lane / 16;
    const unsigned char* at = a_stage + r * 64 + (piece ^ (r / 2 % 4)) * 16;
#pragma unroll
    for (int i = 0; i < MT; ++i) ldmatrix_x4(a[i], at + i * 16 * 64);
  }
#pragma unroll
  for (int j = 0; j < NT; j += 2) {
    uint32_t both[4];
    if constexpr (LAST) {
      const int r = column + lane % 8 + lane / 16 * 8, piece = 2 * half + lane / 8 % 2;
      ldmatrix_x4(both, b_stage + (r + 8 * j) * 64 + (piece ^ (r / 2 % 4)) * 16);
    } else {
      const int k = 16 * half + lane % 16, piece = column / 8 + j + lane / 16;
      ldmatrix_x4_trans(both, b_stage + k * 32 * NT + (piece ^ (k % 8)) * 16);
    }
    b[j][0] = both[0], b[j][1] = both[1], b[j + 1][0] = both[2], b[j + 1][1] = both[3];
  }
}

// ---- epilogue
// --------------------------------------------------------------------------------------------------------

// A tile's constants and sums by channel of the tile, and each warp's results on their way to memory.
template <int MT, int NT, bool LAST>
struct Epilogue {
  static constexpr int kRows = 32 * MT, kColumns = 16 * NT;
  static constexpr int kChannels = LAST ? kColumns : kRows;
  static constexpr int kPitch = 16 * NT + 16;  // bytes: rows of a fragment fall on different banks
  unsigned char results[4][16 * MT * kPitch];
  float bias[kChannels], scale[kChannels], shift[kChannels];
  Moments moments[2][kChannels];  // by the warps that share the tile's pixels
};

template <int MT, int NT, bool LAST>
struct WarpTile {
  float v[MT][NT][4];
  int row, column, g, t;  // in the block's tile; v[i][j][e]: row + 16 i + g + 8 (e / 2), column + 8 j + 2 t + e % 2

  __device__ __forceinline__ int channel(int i, int j, int e) const {
    return LAST ? column + 8 * j + 2 * t + e % 2 : row + 16 * i + g + 8 * (e / 2);
  }
  template <class F>
  __device__ __forceinline__ void each(F&& f) {
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
      for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) v[i][j][e] = f(v[i][j][e], channel(i, j, e));
  }
  template <class T>
  __device__ __forceinline__ void activate(int activation) {
    dispatch_activation(activation, [&](auto code) {
      each([](float a, int) { return elementwise::activate<decltype(code)::value, T>(a); });
    });
  }
  // Results to the warp's own staging, rounded; `keep`: back into v as rounded.
  template <class T, bool KEEP>
  __device__ __forceinline__ void stage(unsigned char* results) {
    constexpr int kPitch = Epilogue<MT, NT, LAST>::kPitch;
    unsigned char* at = results + g * kPitch + 4 * t;
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
      for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          const uint32_t pair = pack2<T>(v[i][j][e], v[i][j][e + 1]);
          *reinterpret_cast<uint32_t*>(at + (16 * i + 4 * e) * kPitch + 16 * j) = pair;
          if constexpr (KEEP) {
            const float2 rounded = unpack2<T>(pair);
            v[i][j][e] = rounded.x, v[i][j][e + 1] = rounded.y;
          }
        }
    __syncwarp();
  }

  // Moments of the warp's channels over its pixels. FULL: all of them exist, else the first `pixels` of the block's
  // tile.
  template <bool FULL>
  __device__ __forceinline__ void statistics(Epilogue<MT, NT, LAST>& shared, int pixels) const {
    constexpr int R = LAST ? 2 * NT : 2 * MT, kValues = LAST ? 2 * MT : 2 * NT;  // channels, values a channel
    constexpr int kFirst = LAST ? 4 : 1, kEnd = LAST ? 32 : 4;
    const auto value = [&](int r, int k) {
      return LAST ? v[k / 2][r / 2][r % 2 + 2 * (k % 2)] : v[r / 2][k / 2][k % 2 + 2 * (r % 2)];
    };
    const auto exists = [&](int k) {
      return FULL || (LAST ? row + k / 2 * 16 + g + 8 * (k % 2) : column + k / 2 * 8 + 2 * t + k % 2) < pixels;
    };
    float count = kValues, mean[R], m2[R];
    if constexpr (!FULL) {
      count = 0.f;
#pragma unroll
      for (int k = 0; k < kValues; ++k) count += exists(k) ? 1.f : 0.f;
    }
    const float inverse = FULL ? 1.f / kValues : count > 0.f ? 1.f / count : 0.f;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float sum = 0.f;
#pragma unroll
      for (int k = 0; k < kValues; ++k) sum += exists(k) ? value(r, k) : 0.f;
      mean[r] = sum * inverse;
      m2[r] = 0.f;
#pragma unroll
      for (int k = 0; k < kValues; ++k) {
        const float d = exists(k) ? value(r, k) - mean[r] : 0.f;
        m2[r] = fmaf(d, d, m2[r]);
      }
    }
    const int first = merge_lanes<R, kFirst, kEnd>(mean, m2, count);
    constexpr int kLeft = R * kFirst / kEnd;
    const int part = LAST ? row / (16 * MT) : column / (8 * NT);
#pragma unroll
    for (int r = 0; r < kLeft; ++r) {
      const int k = first + r;
      const int c = LAST ? column + 8 * (k / 2) + 2 * t + k % 2 : row + 16 * (k / 2) + g + 8 * (k % 2);
      shared.moments[part][c] = {count, mean[r], m2[r]};
    }
  }
};

// A warp's staged results to y: 16 bytes a lane, or element by element, two columns a lane.
template <class T, int MT, int NT, bool LAST>
__device__ __forceinline__ void store_results(const Args& p, const unsigned char* results, int64_t row,
                                              int64_t column) {
  constexpr int kPitch = Epilogue<MT, NT, LAST>::kPitch;
  const int lane = threadIdx.x % 32;
  const int64_t rows = LAST ? p.pixels : p.c_out, columns = LAST ? p.c_out : p.pixels;
  const int64_t stride = LAST ? p.c_out : p.plane;
  const auto at = [&](int64_t n) { return LAST ? n : locate_pixel(n, p.c_out, p.plane).offset; };
  T* y = static_cast<T*>(p.y) + row * stride;
  const int count = clamp_count(rows - row, 16 * MT);
  if (p.vectors_out) {
    const int64_t n = column + lane % NT * 8;
    if (n >= columns) return;
    T* target = y + at(n);
#pragma unroll 4
    for (int r = lane / NT; r < count; r += 32 / NT)
      store16(target + r * stride, load16(results + r * kPitch + lane % NT * 16));
    return;
  }
  for (int j = lane; j < 8 * NT && column + j < columns; j += 32) {
    T* target = y + at(column + j);
    for (int r = 0; r < count; ++r) target[r * stride] = reinterpret_cast<const T*>(results + r * kPitch)[j];
  }
}

// ---- kernel
// -------------------------------------------------------------------------------------------------------------

template <int MT, int NT>
constexpr int mma_shared_bytes() {
  const int stages = kStages * 2 * kDepth * (32 * MT + 16 * NT);
  const int epilogue = static_cast<int>(sizeof(Epilogue<MT, NT, true>) > sizeof(Epilogue<MT, NT, false>)
                                            ? sizeof(Epilogue<MT, NT, true>)
                                            : sizeof(Epilogue<MT, NT, false>));
  return stages > epilogue ? stages : epilogue;
}

template <class T, int MT, int NT, bool LAST, bool ALIGNED>
__global__ void __launch_bounds__(kMmaThreads, MT* NT > 16 ? 2
                                               : ALIGNED   ? 4
                                                           : 3) mma_kernel(Args p) {
  constexpr int kRows = 32 * MT, kColumns = 16 * NT;
  using A = RowsCopy<T, kRows, ALIGNED>;
  using B = std::conditional_t<LAST, RowsCopy<T, kColumns, ALIGNED>, PlanesCopy<T, kColumns, ALIGNED>>;
  constexpr int kStageBytes = A::kBytes + B::kBytes;
  static_assert(kStages * kStageBytes <= mma_shared_bytes<MT, NT>(), "stages and epilogue share the memory");
  DYN_SHARED(unsigned char, shared);

  const Tile tile = locate_tile(p);
  const int64_t row = (LAST ? tile.pixel : tile.channel) * kRows,
                column = (LAST ? tile.channel : tile.pixel) * kColumns;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  WarpTile<MT, NT, LAST> acc;
  acc.row = warp / 2 * 16 * MT, acc.column = warp % 2 * 8 * NT, acc.g = lane / 4, acc.t = lane % 4;
#pragma unroll
  for (int i = 0; i < MT; ++i)
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc.v[i][j][e] = 0.f;

  A copy_a(LAST ? p.x : p.weight, LAST ? p.pixels : p.c_out, row, p.c_in);
  B copy_b = [&] {
    if constexpr (LAST) {
      return B(p.weight, p.c_out, column, p.c_in);
    } else {
      return B(p, column);
    }
  }();
  const int steps = (p.c_in + kDepth - 1) / kDepth;
  // past the last step it writes zeros
  const auto copy = [&](int stage) {
    unsigned char* at = shared + stage * kStageBytes;
    copy_a(at);
    copy_b(at + A::kBytes);
    cp_async_commit();
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) copy(s);

  // the fragments of one half of a stage are loaded while the other's products run
  uint32_t a[2][MT][4], b[2][NT][2];
  int current = 0, free = kStages - 1;
  cp_async_wait<kStages - 2>();
  __syncthreads();
  load_fragments<MT, NT, LAST>(shared, shared + A::kBytes, 0, acc.row, acc.column, a[0], b[0]);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == 0) {
        // every warp read the last of this stage before the barrier that precedes
        copy(free);
      } else {
        free = current;
        current = current + 1 == kStages ? 0 : current + 1;
        cp_async_wait<kStages - 2>();
        __syncthreads();
      }
      const unsigned char* stage = shared + current * kStageBytes;
      load_fragments<MT, NT, LAST>(stage, stage + A::kBytes, half ^ 1, acc.row, acc.column, a[half ^ 1], b[half ^ 1]);
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int j = 0; j < NT; ++j) mma16816(acc.v[i][j], a[half][i], b[half][j], T());
    }
  }

  // the stages' memory becomes the epilogue's; copies and loads past the last step may be under way
  using E = Epilogue<MT, NT, LAST>;
  E& epilogue = *reinterpret_cast<E*>(shared);
  cp_async_wait<0>();
  __syncthreads();
  if (threadIdx.x < E::kChannels) {
    const Channel k = load_channel(p, (LAST ? column : row) + threadIdx.x);
    epilogue.bias[threadIdx.x] = k.bias;
    epilogue.scale[threadIdx.x] = k.norm.scale;
    epilogue.shift[threadIdx.x] = fmaf(-k.norm.mean, k.norm.scale, k.norm.shift);
  }
  __syncthreads();
  acc.each([&](float v, int c) { return v + epilogue.bias[c]; });
  unsigned char* results = epilogue.results[warp];
  if (p.partials == nullptr) {
    acc.template activate<T>(p.activation);
    acc.each([&](float h, int c) { return fmaf(h, epilogue.scale[c], epilogue.shift[c]); });
    acc.template stage<T, false>(results);
    store_results<T, MT, NT, LAST>(p, results, row + acc.row, column + acc.column);
    return;
  }
  acc.template stage<T, true>(results);
  store_results<T, MT, NT, LAST>(p, results, row + acc.row, column + acc.column);
  acc.template activate<T>(p.activation);
  const int pixels = clamp_count(p.pixels - (LAST ? row : column), LAST ? kRows : kColumns);
  if (pixels == (LAST ? kRows : kColumns)) {
    acc.template statistics<true>(epilogue, pixels);
  } else {
    acc.template statistics<false>(epilogue, pixels);
  }
  __syncthreads();
  const int64_t channel = (LAST ? column : row) + threadIdx.x;
  if (threadIdx.x < E::kChannels && channel < p.c_out)
    store_partial(p, channel, tile.pixel, merge(epilogue.moments[0][threadIdx.x], epilogue.moments[1][threadIdx.x]));
}

}  // namespace convmixer::pointwise
