// SPDX-License-Identifier: MIT
// The depthwise weight gradient of 16-bit tensors on tensor cores (float32: depthwise_fma_weight_grad.cu):
//   dw[c,0,i,j] = sum_{n,y,x} da[n,c,y,x] * xpad[n,c,y+i-top,x+j-left],  db[c] = sum da
// with da from dy and a, by the backward of activation and batch norm.
//   contiguous, kernels up to 9x9   warp_kernel: a warp owns a part of one channel's units (whole images, or tiles)
//   all others                      block_kernel: a block owns 1 to 8 channels and a part of their units
// Both leave float32 parts of dw and db in the workspace, which reduce_parts adds in order. x, dy and a are read once.
// Bound: HBM, 459 cycles a 32x32 plane on an H100 (bf16, k = 9). warp_kernel issues about 1700 instructions a warp and
// plane, 430 cycles of an SM: for an element 22 for da with GELU, 12 for products (72 mma, 54 ldmatrix.x4 a plane), 10
// for copies, 9 for the rest. Shared memory is busy for 310 cycles, the tensor cores for about 150.
#include <algorithm>
#include <initializer_list>

#include "depthwise_weight_grad_block.cuh"
#include "depthwise_weight_grad_warp.cuh"

namespace convmixer {
namespace weight_grad {

constexpr int kMostShared = 96 << 10;  // every supported GPU has it
// Most products that a float32 accumulator adds up; beyond, the double sum of the parts adds. Tensor cores truncate
// instead of rounding, an error that grows with the number of products.
constexpr int kLongestChain = 1024;

int div_up(int a, int b) { return (a + b - 1) / b; }

// A row pitch of an odd number of 16 bytes: the 8 rows of an ldmatrix matrix then lie in different banks.
int odd_pitch(int columns) { return (columns / 8 | 1) * 8; }

int log2_up(int v) {
  int log = 0;
  while (1 << log < v) ++log;
  return log;
}

// A unit is whole images if they fit (as many as give the fewest padding rows in the K steps), else a tile of rows.
template <class Bytes>
void choose_rows(Plan& p, int64_t budget, const Bytes& bytes) {
  p.pack = 1;
  if (p.h <= 48 && bytes(1, p.h, p.h) <= budget) {
    p.tile_rows = p.h;
    int most = 1;
    while (most < p.n && most * p.h < 512 && bytes(most + 1, p.h, p.h) <= budget) ++most;
    const auto waste = [&](int images) { return double(round_up(images * p.h, 16)) / (images * p.h); };
    p.pack = most;
    for (int images = most; images > most / 2; --images) {
      if (waste(images) < waste(p.pack)) p.pack = images;
    }
    p.row_magic = p.pack > 1 ? (1u << 20) / p.h + 1 : 0;
    p.x_rows = p.d_rows = p.pack * p.h;
  } else {
    int rows = 64;
    while (rows > 16 && (rows >= p.h + 16 || bytes(1, rows, rows + p.kh - 1) > budget)) rows -= 16;
    p.tile_rows = rows;
    p.x_rows = std::min(p.h, rows + p.kh - 1);
    p.d_rows = rows;
  }
  p.d_rows = round_up(p.d_rows, 16);
  p.row_tiles = FastDiv(div_up(p.h, p.tile_rows));
  p.units = int(ceil_div(p.n, p.pack) * p.row_tiles.divisor * p.col_tiles.divisor);
}

void choose_columns(Plan& p, int widest) {
  p.tile_cols = p.w <= widest ? p.w : round_up(div_up(p.w, div_up(p.w, widest)), 8);
  p.col_tiles = FastDiv(div_up(p.w, p.tile_cols));
  const int tiles = div_up(p.tile_cols, 8);
  p.x_pitch = odd_pitch(8 * (tiles + 2 * p.blocks - 1));
  // with tiles = odd * 2^k, k <= 3, 2^(3 - k) rows fill the banks, and the next ones exchange blocks
  p.d_pitch = 8 * tiles;
  p.d_swizzle_mask = std::min(8, tiles & -tiles) - 1;
  p.d_swizzle_shift = 3 - log2_up(p.d_swizzle_mask + 1);
}

// The number of parts of a channel's units, such that no accumulator adds up too many products; a unit has `steps`.
int64_t parts_for(const Plan& p, int64_t wanted, int64_t steps) {
  return std::min<int64_t>({p.units, 65535, std::max(wanted, ceil_div(p.units * steps, kLongestChain))});
}

// together: the most neighbouring channels that one aligned access reads; 0: asynchronous copies.
void plan_block_kernel(Plan& p, int together) {
  p.kernel = Kernel::kBlock;
  p.channels = 1;
  if (p.channels_last) {
    while (p.channels < kMaxChannels && p.channels < p.c && 2 * p.channels * p.groups <= max_warps(p.blocks))
      p.channels *= 2;
  }
  const bool octets = together == kMaxChannels && p.channels == kMaxChannels && p.blocks == 1;
  p.channels_together = octets ? kMaxChannels : std::min(together, 2);
  choose_columns(p, p.channels_last ? 64 : 128);
  // octets: a lies beside dy until da is computed; two blocks on a multiprocessor with 164 KB
  // asynchronous copies: two stages of that, or of spans beside it
  const bool async = together == 0, spans = async && p.w % 8 != 0, whole = p.col_tiles.divisor == 1;
  const auto span_pitches = [&](int rows, int x_rows) {
    p.x_span = 8 * span_pieces(whole ? x_rows * p.w : std::min(p.w, p.x_pitch));
    p.d_span = 8 * span_pieces(whole ? rows * p.w : p.tile_cols);
  };
  choose_rows(p,
              async    ? 76 << 10
              : octets ? 56 << 10
                       : 40 << 10,
              [&](int images, int rows, int x_rows) {
                const int d_tiles = octets || async ? 2 : 1, stages = async && !spans ? 2 : 1;
                const int tiles = 2 * stages * p.channels *
                                  (images * x_rows * p.x_pitch + d_tiles * round_up(images * rows, 16) * p.d_pitch);
                if (!spans) return tiles;
                span_pitches(rows, x_rows);
                return tiles + 4 * images * ((whole ? 1 : x_rows) * p.x_span + 2 * (whole ? 1 : rows) * p.d_span);
              });
  if (spans) {
    // of one image if the unit has several
    span_pitches(p.tile_rows, p.x_rows / p.pack);
    p.x_raw = (whole ? p.pack : p.x_rows) * p.x_span;
    p.d_raw = p.pack * (whole ? 1 : p.tile_rows) * p.d_span;
    p.x_pieces = FastDiv(p.x_span / 8);
    p.d_pieces = FastDiv(p.d_span / 8);
  }
  // an odd number of 16 bytes, so that the channels that a warp writes together lie in different banks
  p.x_plane = odd_pitch(p.x_rows * p.x_pitch);
  p.d_plane = odd_pitch(p.d_rows * p.d_pitch);
  p.x_pairs = FastDiv(p.x_pitch / 2);
  p.d_pairs = FastDiv(p.d_pitch / 2);
  p.x_quads = FastDiv(p.x_pitch / 4);
  p.x_octets = FastDiv(p.x_pitch / 8);
  p.d_octets = FastDiv(p.d_pitch / 8);
  const int items = p.d_rows / 16 * div_up(div_up(p.tile_cols, 8), kColumnTiles);
  p.slices = std::max(1, std::min(items, 8 / (p.groups * p.channels)));
  const int64_t blocks = ceil_div(p.c, p.channels);
  const int64_t steps = ceil_div(int64_t(p.d_rows / 16) * div_up(p.tile_cols, 8), p.slices);
  p.parts = int(parts_for(p, ceil_div(int64_t(16) * multiprocessor_count(), blocks), steps));
}

void plan_warp_kernel(Plan& p, bool direct, bool wide) {
  p.kernel = direct ? Kernel::kWarpDirect : Kernel::kWarpSpan;
  // four blocks on a multiprocessor with 227 KB, one on those with 100 KB
  const int64_t budget = 27 << 9;
  const auto span = [&](int rows) { return round_up(rows * p.w + 7, 8); };
  choose_columns(p, direct ? 64 : 128);
  choose_rows(p, budget, [&](int images, int rows, int x_rows) {
    const int64_t tiles = images * x_rows * p.x_pitch + 2 * round_up(images * rows, 16) * p.d_pitch;
    return direct ? 4 * tiles : 2 * tiles + 4 * images * (span(x_rows) + 2 * span(rows));
  });
  const int tiles = p.x_rows * p.x_pitch + 2 * p.d_rows * p.d_pitch;
  if (direct) {
    const bool whole = p.col_tiles.divisor == 1;
    p.x_first = whole ? p.shift : 0;
    p.x_chunks = whole ? p.w / kQuad : 2 * (p.tile_cols / 8 + 1);
    p.d_wide = wide;
    p.d_chunks = (whole ? p.w : p.tile_cols) / (wide ? 2 * kQuad : kQuad);
    p.x_lanes_log2 = log2_up(p.x_chunks);
    p.d_lanes_log2 = log2_up(p.d_chunks);
    p.warp_elements = 2 * tiles;
  } else {
    p.x_span = span(p.pack > 1 ? p.h : p.x_rows);
    p.d_span = span(p.tile_rows);
    p.x_lanes_log2 = log2_up(div_up(p.w, kQuad));
    p.span_lanes_log2 = std::min(5, log2_up(p.d_span / 8));
    // a lane reads up to three words beyond the start of a row's last quad
    p.warp_elements = tiles + 2 * p.pack * (p.x_span + 2 * p.d_span) + 8;
  }
  // warps of a channel: all of them together fill the GPU 2.6 times
  const int64_t steps = int64_t(p.d_rows / 16) * div_up(p.tile_cols, 8);
  const int64_t warps = parts_for(p, ceil_div(int64_t(42) * multiprocessor_count(), p.c), steps);
  p.slices = warps >= 4 ? 4 : warps >= 2 ? 2 : 1;
  p.parts = int(ceil_div(warps, p.slices));
  p.channels = kWarpKernelWarps / p.slices;
}

int shared_bytes(const Plan& p) {
  const int taps = p.kh * p.kw;
  if (p.kernel == Kernel::kBlock) {
    const int warps = p.groups * p.channels * p.slices;
    const bool async = p.channels_together == 0;
    const int d_tiles = p.channels_together == kMaxChannels || async ? 2 : 1, stages = async && p.x_raw == 0 ? 2 : 1;
    const int raw = 2 * (p.x_raw + 2 * p.d_raw);
    const int loop = 2 * (p.x_pitch + stages * p.channels * (p.x_plane + d_tiles * p.d_plane) + raw + 16);
    return std::max(loop, 4 * (warps * p.blocks * 128 + p.slices * p.channels * taps));
  }
  const int loop = 2 * (p.x_pitch + kWarpKernelWarps * p.warp_elements + 16);
  return std::max(loop, 4 * kWarpKernelWarps * (128 + taps));
}

bool aligned(int bytes, std::initializer_list<const void*> tensors) {
  for (const void* t : tensors) {
    if (reinterpret_cast<uintptr_t>(t) % bytes != 0) return false;
  }
  return true;
}

// alignment: of the tensors' addresses, in bytes. It changes nothing but the order of sums.
Plan make_plan(const Shape& shape, int kh, int kw, int alignment) {
  Plan p = {};
  p.n = shape.n, p.c = shape.c, p.h = shape.h, p.w = shape.w, p.kh = kh, p.kw = kw;
  p.top = (kh - 1) / 2;
  p.channels_last = shape.channels_last;
  const int64_t plane = int64_t(p.h) * p.w;
  p.strides = p.channels_last ? Strides{p.c * plane, 1, p.c * p.w, p.c} : Strides{p.c * plane, plane, p.w, 1};
  p.blocks = window_blocks(kw);
  p.shift = left_columns(p.blocks);
  p.skew = p.shift - (kw - 1) / 2;
  p.groups = div_up(kh, warp_kernel_rows(p.blocks));
  const bool direct = p.w % kQuad == 0 && alignment >= 2 * kQuad;
  if (!p.channels_last && p.blocks == 1 && p.groups == 1 && (direct || p.w <= 128)) {
    Plan warps = p;
    plan_warp_kernel(warps, direct, p.w % (2 * kQuad) == 0 && alignment >= 4 * kQuad);
    if (shared_bytes(warps) <= kMostShared) return warps;
  }
  const bool octets = p.c % kMaxChannels == 0 && alignment >= 16, pairs = p.c % 2 == 0 && alignment >= 4;
  plan_block_kernel(p, p.channels_last ? (octets ? kMaxChannels : pairs ? 2 : 1) : alignment >= 16 ? 0 : 1);
  return p;
}

// Adds up the parts of dw and db in order, one thread for each tap.
__global__ void __launch_bounds__(256) reduce_parts(const float* __restrict__ partials, int parts, int64_t channels,
                                                    int taps, void* dw, int dw_dtype, void* db, int db_dtype) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= channels * (taps + 1)) return;
  const int64_t channel = i / (taps + 1);
  const int tap = int(i - channel * (taps + 1));
  double sum = 0.;
  for (int k = 0; k < parts; ++k) sum += partials[k * channels * (taps + 1) + i];
  void* target = tap < taps ? dw : db;
  const int dtype = tap < taps ? dw_dtype : db_dtype;
  const int64_t at = tap < taps ? channel * taps + tap : channel;
  if (target == nullptr) return;
  store_param(target, dtype, at, static_cast<float>(sum));
}

template <class K, class T>
int launch_kernel(K kernel, const Plan& p, const Arguments<T>& g, cudaStream_t stream) {
  const int warps = p.kernel == Kernel::kBlock ? p.groups * p.channels * p.slices : kWarpKernelWarps;
  const dim3 grid(unsigned(ceil_div(p.c, p.channels)), p.parts);
  const int bytes = shared_bytes(p);
  const cudaError_t error = set_dynamic_shared(kernel, bytes);
  if (error != cudaSuccess) return int(error);
  LAUNCH(kernel, grid, dim3(32 * warps), bytes, stream, p, g);
  return int(cudaGetLastError());
}

template <int CHANNELS, class T>
int launch_block_kernel(const Plan& p, const Arguments<T>& g, cudaStream_t stream) {
  if (p.blocks == 1) return launch_kernel(block_kernel<T, 1, CHANNELS>, p, g, stream);
  if (p.blocks == 2) return launch_kernel(block_kernel<T, 2, CHANNELS>, p, g, stream);
  return launch_kernel(block_kernel<T, 3, CHANNELS>, p, g, stream);
}

template <bool DIRECT, class T>
int launch_warp_kernel(const Plan& p, const Arguments<T>& g, cudaStream_t stream) {
  if (p.kh <= 7) return launch_kernel(warp_kernel<T, DIRECT, 7>, p, g, stream);
  return launch_kernel(warp_kernel<T, DIRECT, 9>, p, g, stream);
}

template <class T>
int launch(const DepthwiseWeightGrad& arguments, cudaStream_t stream) {
  const Shape& shape = arguments.shape;
  const auto aligned_to = [&](int bytes) { return aligned(bytes, {arguments.x, arguments.dy, arguments.a}); };
  int alignment = 16;
  while (alignment > 2 && !aligned_to(alignment)) alignment /= 2;
  const Plan p = make_plan(shape, arguments.kh, arguments.kw, alignment);
  Arguments<T> g = {};
  g.x = static_cast<const T*>(arguments.x);
  g.dy = static_cast<const T*>(arguments.dy);
  g.a = static_cast<const T*>(arguments.a);
  g.grad.activation = arguments.activation;
  g.grad.has_a = arguments.a != nullptr;
  g.grad.has_sums = arguments.sums.dy != nullptr;
  g.grad.inverse_count = float(1.0 / (double(shape.n) * shape.h * shape.w));
  g.grad.norm = arguments.norm;
  g.grad.sums = arguments.sums;
  g.partials = static_cast<float*>(arguments.workspace);
  const int error = p.kernel == Kernel::kWarpDirect ? launch_warp_kernel<true>(p, g, stream)
                    : p.kernel == Kernel::kWarpSpan ? launch_warp_kernel<false>(p, g, stream)
                    : p.channels_together == kMaxChannels
                        ? launch_kernel(block_kernel<T, 1, kMaxChannels>, p, g, stream)
                    : p.channels_together == 2 ? launch_block_kernel<2>(p, g, stream)
                    : p.channels_together == 0 ? launch_block_kernel<0>(p, g, stream)
                                               : launch_block_kernel<1>(p, g, stream);
  if (error != 0) return error;
  const int taps = p.kh * p.kw;
  LAUNCH(reduce_parts, dim3(unsigned(ceil_div(p.c * (taps + 1), 256))), dim3(256), 0, stream, g.partials, p.parts, p.c,
         taps, arguments.dw, arguments.dw_dtype, arguments.db, arguments.db_dtype);
  return int(cudaGetLastError());
}

}  // namespace weight_grad

int64_t depthwise_weight_grad_workspace(const Shape& shape, int kh, int kw) {
  if (shape.dtype == kFloat32) return depthwise_weight_grad_fma_workspace(shape, kh, kw);
  int parts = 0;
  for (const int alignment : {2, 8, 16})
    parts = std::max(parts, weight_grad::make_plan(shape, kh, kw, alignment).parts);
  return int64_t(parts) * shape.c * (kh * kw + 1) * int64_t(sizeof(float));
}

int depthwise_weight_grad(const DepthwiseWeightGrad& p, void* stream) {
  if (p.shape.dtype == kFloat32) return depthwise_weight_grad_fma(p, stream);
  cudaStream_t s = static_cast<cudaStream_t>(stream);
  return p.shape.dtype == kFloat16 ? weight_grad::launch<__half>(p, s) : weight_grad::launch<__nv_bfloat16>(p, s);
}

}  // namespace convmixer
