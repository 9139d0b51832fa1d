// SPDX-License-Identifier: MIT
// A whole mixer layer of narrow networks in evaluation, 16-bit, contiguous, kernels up to 9 x 9, C and C_out <= 256:
//   z = norm(act(depthwise(x) + bias)) (+ x), rounded;   y = norm(act(weight z + bias))
// A block of 16 warps owns 16 x 16 pixels of an image. First it computes z of all channels in shared memory: a warp
// takes a channel at a time, whose 24 x 24 patch of x is copied asynchronously while the channel before is computed.
// Then it computes y for 128 output channels at a time: a warp takes 32 of them x 4 rows; the weight comes in three
// stages of 32 values of K.
// z takes the products of depthwise_mma.cuh, but m is 8 rows, every other one, of two tiles of 8 columns: so kernel row
// i + 1 shares its fragments with kernel row i of the rows below, and 40 matrices are read instead of the 72 that 16
// rows of 8 columns would read.
// Bound: shared memory for z (81 cycles a channel, 38 instructions a value), the tensor core for y's products, issue
// slots for the epilogue (19 an output). 163 KB at C = 256, one block a multiprocessor.
#pragma once
#include "depthwise_mma.cuh"
#include "pointwise_mma.cuh"

namespace convmixer::mixer {

constexpr int kTile = 16;  // rows and columns of pixels
constexpr int kPixels = kTile * kTile;
constexpr int kWarps = 16, kThreads = 32 * kWarps;
constexpr int kMostChannels = 256;
constexpr int kTaps = 9, kHalo = kTaps / 2;    // zeros surround smaller kernels
constexpr int kPatchRows = kTile + kTaps - 1;  // even rows first, then odd ones: every other row without bank conflicts
constexpr int kPatchPitch = 2 * (kTile + 8);
constexpr int kPatchBytes = kPatchRows * kPatchPitch;
constexpr int kPieces = kPatchRows * (kTile + 8) / 4;  // of 4 values
constexpr int kTableRow = 48;                          // values: mma::load_toeplitz's two tables of one kernel row
constexpr int kWarpBytes = kPatchBytes + 2 * kTaps * kTableRow;
constexpr int kRows = 128;  // output channels at a time
constexpr int kStages = 3, kDepth = 32, kStageBytes = kRows * 2 * kDepth;
constexpr int kWorkBytes = kWarps * kWarpBytes;  // patches and tables, later the weight's stages
constexpr int kRowBytes = 2 * kPixels;           // of z's [channel][pixel]
static_assert(kStages * kStageBytes <= kWorkBytes, "the weight's stages take the patches' place");
static_assert(kWarpBytes % 16 == 0, "ldmatrix reads aligned rows");
static_assert(kThreads == kRows * (kDepth / 8), "a thread copies one piece of a stage");

struct Constants {
  float bias, scale, shift;
};

struct Args {
  mma::Args depthwise;        // of its plan: n, c, h, w, kh, kw, top, left, granule (of x)
  pointwise::Args pointwise;  // without partials and tiles
  int tiles, tiles_across;    // of an image
  int depth;                  // C rounded up to whole stages
  int y_granule;
};

inline int shared_bytes(int depth) {
  return depth * kRowBytes + kWorkBytes + kMostChannels * static_cast<int>(sizeof(Constants));
}

// Piece 16 h + 8 s + g of a row of z, before the swizzle, is row 2 g + s of the tile, columns 8 h to 8 h + 7.
struct Position {
  int row, column;
};
__device__ __forceinline__ Position position_of(int piece) { return {2 * (piece % 8) + piece / 8 % 2, piece / 16 * 8}; }

// Recomputes by the definition the values of z that Toeplitz matrices or the fast activation made NaN, like
// mma::settle_nan.
template <class T>
__device__ __noinline__ void settle_nan(const Args& p, unsigned char* z, int n, int y0, int x0) {
  const mma::Plan& q = p.depthwise.plan;
  for (int i = threadIdx.x; i < q.c * kPixels; i += kThreads) {
    const int c = i / kPixels, piece = i % kPixels / 8, e = i % 8;
    const Position at = position_of(piece);
    const int y = y0 + at.row, x = x0 + at.column + e;
    if (y >= q.h || x >= q.w) continue;
    T* const value = reinterpret_cast<T*>(z + c * kRowBytes + (piece ^ c % 8) * 16) + e;
    if (to_float(*value) == to_float(*value)) continue;
    const mma::Affine k = mma::load_affine<T, false>(p.depthwise, c);
    *value = from_float<T>(mma::recompute<T, false, false>(p.depthwise, k, n, c, y, x));
  }
}

// A lane's part of the patches and tables of a warp's channels, one channel after the other.
template <class T>
struct Patch {
  static constexpr int kEach = (kPieces + 31) / 32, kTapsEach = (kTaps * kTaps + 31) / 32;
  const Args& p;
  unsigned char* memory;  // the warp's patch, then its table
  int y0, x0, lane;
  uint32_t offset[kEach], inside;  // of a piece in its plane; bit i: piece i is in the image
  int place[kTapsEach];            // of a tap in the table, -1: none
  float taps[kTapsEach];
  const T* plane;             // of the next channel
  const char* weight;         // this lane's first tap of the next channel
  int64_t next, next_weight;  // values and bytes to the channel after it

  __device__ __forceinline__ Patch(const Args& args, unsigned char* warp_memory, int n, int c, int y0, int x0)
      : p(args), memory(warp_memory), y0(y0), x0(x0), lane(threadIdx.x % 32), inside(0) {
    const mma::Plan& q = p.depthwise.plan;
    const int64_t bytes = p.depthwise.weight.dtype == kFloat32 ? 4 : 2;
    plane = static_cast<const T*>(p.depthwise.x) + (static_cast<int64_t>(n) * q.c + c) * p.pointwise.plane;
    weight = static_cast<const char*>(p.depthwise.weight.data) + bytes * (c * q.kh * q.kw + lane);
    next = kWarps * p.pointwise.plane, next_weight = bytes * kWarps * q.kh * q.kw;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int source = source_of(lane + 32 * i);
      offset[i] = max(source, 0);
      inside |= source >= 0 ? 1u << i : 0u;
    }
#pragma unroll
    for (int i = 0; i < kTapsEach; ++i) {
      const int tap = lane + 32 * i, row = tap / q.kw, column = tap % q.kw;
      place[i] = tap < q.kh * q.kw ? (row + kHalo - q.top) * kTableRow + column + 7 + kHalo - q.left : -1;
    }
    for (int i = lane; i < kWarpBytes / 16; i += 32) store16(memory + 16 * i, make_uint4(0, 0, 0, 0));
    __syncwarp();
  }

  __device__ __forceinline__ int source_of(int piece) const {
    const int slot = piece / 6, row = slot < kPatchRows / 2 ? 2 * slot : 2 * slot - (kPatchRows - 1);
    const int y = y0 - kHalo + row, column = x0 - kHalo + piece % 6 * 4;
    const int w = p.depthwise.plan.w;
    return piece < kPieces && y >= 0 && y < p.depthwise.plan.h && column >= 0 && column < w ? y * w + column : -1;
  }
  // Copies the values and loads the taps of the next channel.
  __device__ __forceinline__ void copy() {
    unsigned char* const to = memory + 8 * lane;
    if (p.depthwise.plan.granule >= 4) {
      // pieces beside the image become zero again
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        if (32 * i + 31 < kPieces || lane + 32 * i < kPieces)
          cp_async<8>(to + 256 * i, plane + offset[i], inside >> i & 1 ? 8 : 0);
    } else {
      const int w = p.depthwise.plan.w;
#pragma unroll 1
      for (int i = 0; i < kEach; ++i) {
        // computed again: an index at run time would move `offset` from registers to memory
        const int source = source_of(lane + 32 * i);
        if (source < 0) continue;
        const int left = w - source % w;
        uint32_t words[2] = {0, 0};
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (e < left) words[e / 2] |= uint32_t(bit_cast<uint16_t>(plane[source + e])) << 16 * (e % 2);
        *reinterpret_cast<uint2*>(to + 256 * i) = make_uint2(words[0], words[1]);
      }
    }
    cp_async_commit();
    plane += next;
    // float32 or of x's dtype
    if (p.depthwise.weight.dtype == kFloat32) {
#pragma unroll
      for (int i = 0; i < kTapsEach; ++i)
        if (place[i] >= 0) taps[i] = reinterpret_cast<const float*>(weight)[32 * i];
    } else {
#pragma unroll
      for (int i = 0; i < kTapsEach; ++i)
        if (place[i] >= 0) taps[i] = to_float(reinterpret_cast<const T*>(weight)[32 * i]);
    }
    weight += next_weight;
  }
  __device__ __forceinline__ void store_taps() const {
    T* const table = reinterpret_cast<T*>(memory + kPatchBytes);
#pragma unroll
    for (int i = 0; i < kTapsEach; ++i)
      if (place[i] >= 0) table[place[i]] = table[place[i] + kTableRow / 2 - 1] = from_float<T>(taps[i]);
  }
};

// a[s + i] is A of kernel row i for the rows s, s + 2, ... of the tile: columns 0 to 15 of the left tile, then of the
// right one. The block of columns 8 to 15 is read twice, which takes fewer instructions than copying it in registers.
struct Fragments {
  uint32_t a[kTaps + 1][4];

  __device__ __forceinline__ explicit Fragments(const unsigned char* patch) {
    const int lane = threadIdx.x % 32, block = lane / 16 + lane / 8 % 2;
    const unsigned char* const at = patch + lane % 8 * kPatchPitch + block * 16;
#pragma unroll
    for (int r = 0; r <= kTaps; ++r) ldmatrix_x4(a[r], at + (r % 2 * (kPatchRows / 2) + r / 2) * kPatchPitch);
  }
};

// Computes z of the tile for all channels. The returned trace is NaN if a value was not finite.
template <class T>
__device__ __forceinline__ uint32_t compute_z(const Args& p, unsigned char* z, unsigned char* memory,
                                              const Constants* constants, int n, int y0, int x0) {
  const int channels = p.depthwise.plan.c, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int c = threadIdx.x / 32;
  Patch<T> patch(p, memory, n, c, y0, x0);
  // column q of a product with this matrix is the input's column q + kHalo: it adds the residual
  const uint32_t low = bit_cast<uint16_t>(from_float<T>(1.f)), high = low << 16;
  const uint32_t identity[2] = {2 * t == g + 4 ? low : (2 * t + 1 == g + 4 ? high : 0u),
                                2 * t + 4 == g ? low : (2 * t + 5 == g ? high : 0u)};
  uint32_t trace = 0;
  if (c < channels) patch.copy();
#pragma unroll 1
  for (; c < channels; c += kWarps) {
    patch.store_taps();
    cp_async_wait<0>();
    __syncwarp();
    uint32_t toeplitz[kTaps][2];
#pragma unroll
    for (int i = 0; i < kTaps; ++i)
      mma::load_toeplitz<T, 1>(toeplitz[i], reinterpret_cast<const T*>(memory + kPatchBytes), i, lane);
    const Fragments inputs(memory);
    // after this all lanes have read the patch and the table
    __syncwarp();
    if (c + kWarps < channels) patch.copy();
    const Constants k = constants[c];
    const float start[4] = {k.bias, k.bias, k.bias, k.bias};
    float acc[2][4];
#pragma unroll
    for (int i = 0; i < kTaps; ++i)
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        i == 0 ? mma16816(acc[s], inputs.a[s], toeplitz[i], start, T())
               : mma16816(acc[s], inputs.a[s + i], toeplitz[i], T());
      }
    mma::apply_block(acc, {k.bias, k.scale, k.shift, 0.f}, p.depthwise.activation);
    unsigned char* const row = z + c * kRowBytes + (g ^ c % 8) * 16 + 4 * t;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      if (p.depthwise.residual) mma16816(acc[s], inputs.a[s + kHalo], identity, T());
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t word = pack2<T>(acc[s][2 * h], acc[s][2 * h + 1]);
        trace = trace_finite<T>(trace, word);
        *reinterpret_cast<uint32_t*>(row + 256 * h + 128 * s) = word;
      }
    }
  }
  return trace;
}

// Copies a stage of the weight: 32 values of K of 128 rows, 64 bytes a row, piece (row, i) at i ^ (row / 2 % 4), zeros
// beyond the matrix. Calls follow the order of the products: K first, then rows.
template <class T, bool ALIGNED>
struct WeightCopy {
  const Args& p;
  unsigned char* to;
  int row, column, left;  // stages

  __device__ __forceinline__ WeightCopy(const Args& args, unsigned char* stages, int count)
      : p(args), row(threadIdx.x / 4), column(8 * (threadIdx.x % 4)), left(count) {
    to = stages + row * 64 + (threadIdx.x % 4 ^ row / 2 % 4) * 16;
  }
  __device__ __forceinline__ void operator()(int stage) {
    if (left-- > 0) {
      const bool exists = row < p.pointwise.c_out && column < p.pointwise.c_in;
      const T* const weight = static_cast<const T*>(p.pointwise.weight);
      const T* const from = exists ? weight + static_cast<int64_t>(row) * p.pointwise.c_in + column : weight;
      if constexpr (ALIGNED) {
        cp_async<16>(to + stage * kStageBytes, from, exists ? 16 : 0);
      } else {
        store16(to + stage * kStageBytes, pointwise::gather(from, exists ? p.pointwise.c_in - column : 0, 0, -1, 0));
      }
      column += kDepth;
      if (column >= p.depth) column -= p.depth, row += kRows;
    }
    cp_async_commit();
  }
};

// Of four lanes, lane t gives w[j] to lane j; it gets w[t] of lane s in place s.
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4]) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = (threadIdx.x & bit) != 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & bit) continue;
      const uint32_t other = __shfl_xor_sync(0xffffffffu, upper ? w[j] : w[j + bit], bit);
      upper ? w[j] = other : w[j + bit] = other;
    }
  }
}

// Stores the first `count` of 8 values.
template <class T>
__device__ __forceinline__ void store_pixels(T* y, const uint32_t (&w)[4], int count, int granule) {
  if (granule == 8) {
    if (count > 0) store16(y, make_uint4(w[0], w[1], w[2], w[3]));
  } else if (granule == 4) {
    if (count > 0) *reinterpret_cast<uint2*>(y) = make_uint2(w[0], w[1]);
    if (count > 4) *reinterpret_cast<uint2*>(y + 4) = make_uint2(w[2], w[3]);
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (e < count) y[e] = bit_cast<T>(static_cast<uint16_t>(w[e / 2] >> 16 * (e % 2)));
  }
}

// acc[i][j][e]: channel row + 16 i + g + 8 (e / 2); tile row 4 (warp % 4) + j / 2, column 8 (j % 2) + 2 t + e % 2.
template <class T>
__device__ __forceinline__ void store_y(const Args& p, float (&acc)[2][8][4], const Constants* constants, int row,
                                        int n, int y0, int x0) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, w = p.depthwise.plan.w;
  const int y = y0 + threadIdx.x / 32 % 4 * 4 + t / 2, x = x0 + t % 2 * 8, rows = p.depthwise.plan.h - y;
  const int64_t plane = p.pointwise.plane, left = p.pointwise.c_out - row - g;
  T* const first =
      static_cast<T*>(p.pointwise.y) + (n * p.pointwise.c_out + row + g) * plane + static_cast<int64_t>(y) * w + x;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const Constants constant = constants[row + 8 * k + g];
    float v[8][2];
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) v[j][e] = acc[k / 2][j][k % 2 * 2 + e] + constant.bias;
    dispatch_activation(p.pointwise.activation, [&](auto code) {
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          v[j][e] = fmaf(elementwise::activate<decltype(code)::value, T>(v[j][e]), constant.scale, constant.shift);
    });
    uint32_t words[2][4];
#pragma unroll
    for (int j = 0; j < 8; ++j) words[j / 4][j % 4] = pack2<T>(v[j][0], v[j][1]);
    transpose_quad(words[0]);
    transpose_quad(words[1]);
    T* const to = first + 8 * k * plane;
    // the pixels of the other four tiles are two rows further
    if (8 * k < left && 0 < rows) store_pixels(to, words[0], min(w - x, 8), p.y_granule);
    if (8 * k < left && 2 < rows) store_pixels(to + 2 * w, words[1], min(w - x, 8), p.y_granule);
    __syncwarp();
  }
}

template <class T, bool ALIGNED>
__device__ __forceinline__ void compute_y(const Args& p, const unsigned char* z, unsigned char* stages,
                                          const Constants* constants, int n, int y0, int x0) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int steps = p.depth / kDepth, total = static_cast<int>(ceil_div(p.pointwise.c_out, kRows)) * steps;
  WeightCopy<T, ALIGNED> copy(p, stages, total);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) copy(s);

  const int a_row = warp / 4 * 32 + lane % 16;
  const unsigned char* const a_first = stages + a_row * 64;
  // rows 4 (warp % 4) + 0, 1 and + 2, 3 of the tile; one ldmatrix reads the pieces of both columns
  const unsigned char* const b_first = z + lane % 16 * kRowBytes + lane / 16 * 256;
  const int b_piece = warp % 4 * 2;
  int stage = 0;
#pragma unroll 1
  for (int row = warp / 4 * 32, left = total; left > 0; left -= steps, row += kRows) {
    float acc[2][8][4];
#pragma unroll
    for (int i = 0; i < 64; ++i) acc[i / 32][i / 4 % 8][i % 4] = 0.f;
    const unsigned char* from = b_first;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      cp_async_wait<kStages - 2>();
      // this barrier also tells that all warps have read the stage that the next copy fills
      __syncthreads();
      copy(stage == 0 ? kStages - 1 : stage - 1);
      const unsigned char* const weight = a_first + stage * kStageBytes;
      stage = stage == kStages - 1 ? 0 : stage + 1;
      // this warp's rows lie beyond the matrix
      if (row >= p.pointwise.c_out) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half, from += 16 * kRowBytes) {
        uint32_t a[2][4], b[8][2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
          ldmatrix_x4(a[i], weight + i * 16 * 64 + ((2 * half + lane / 16) ^ a_row / 2 % 4) * 16);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          uint32_t both[4];
          ldmatrix_x4_trans(both, from + ((b_piece + j / 2) ^ lane % 8) * 16 + j % 2 * 128);
          b[2 * j][0] = both[0], b[2 * j][1] = both[1], b[2 * j + 1][0] = both[2], b[2 * j + 1][1] = both[3];
        }
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int j = 0; j < 8; ++j) mma16816(acc[i][j], a[i], b[j], T());
      }
    }
    if (row < p.pointwise.c_out) store_y<T>(p, acc, constants, row, n, y0, x0);
  }
}

template <class T, bool ALIGNED>
__global__ void __launch_bounds__(kThreads, 1) mixer_kernel(const __grid_constant__ Args p) {
  DYN_SHARED(unsigned char, shared);
  unsigned char* const z = shared;
  unsigned char* const work = z + p.depth * kRowBytes;
  Constants* const constants = reinterpret_cast<Constants*>(work + kWorkBytes);
  const int channels = p.depthwise.plan.c, thread = threadIdx.x;
  const int n = blockIdx.x / p.tiles, tile = blockIdx.x % p.tiles;
  const int y0 = tile / p.tiles_across * kTile, x0 = tile % p.tiles_across * kTile;

  if (thread < channels) {
    const mma::Affine k = mma::load_affine<T, false>(p.depthwise, thread);
    constants[thread] = {k.bias, k.scale, k.shift};
  }
  for (int i = channels * kRowBytes + 16 * thread; i < p.depth * kRowBytes; i += 16 * kThreads)
    store16(z + i, make_uint4(0, 0, 0, 0));
  __syncthreads();
  const uint32_t trace = compute_z<T>(p, z, work + thread / 32 * kWarpBytes, constants, n, y0, x0);

  const pointwise::Channel k = pointwise::load_channel(p.pointwise, thread);
  // after this no warp reads its patch or the constants, and z is complete
  const bool settles = __syncthreads_or(!was_finite<T>(trace));
  if (thread < kMostChannels)
    constants[thread] = {k.bias, k.norm.scale, fmaf(-k.norm.mean, k.norm.scale, k.norm.shift)};
  if (settles) settle_nan<T>(p, z, n, y0, x0);
  // starts the first copies, then synchronises
  compute_y<T, ALIGNED>(p, z, work, constants, n, y0, x0);
}

}  // namespace convmixer::mixer
