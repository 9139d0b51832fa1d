// SPDX-License-Identifier: MIT
// The micro-kernels of the depthwise convolution: a tile of T output columns of V channels, as the sum of kh rows of kw
// taps plus bias. T accumulators and up to kMaxTaps weights stay in registers: 24 loads feed 144 FMAs (k = 9). The input
// comes from a zero-padded float plane [row][column][V], or straight from a channels_last tensor, whose columns outside
// the image read as 0. Both add the same products in the same order: the bits are the same.

// Reads every step-th column of a plane (a kernel that is not dilated: each), or the columns of a channels_last tensor.
template <bool Dilated>
struct PlaneColumns {
  const Vec* p;
  int64_t step;
  VEC_INLINE Vec next() {
    const Vec v = *p;
    if constexpr (Dilated) {
      p += step;
      // as in TensorColumns
      asm("" : "+r"(p));
    } else {
      p++;
    }
    return v;
  }
};
enum Part { kInside, kEdge, kFewChannels };  // all columns inside the image; not all; fewer than V channels
template <typename T, int P>
struct TensorColumns {
  const T* p;  // at the channels of this block
  int64_t pixel;
  int column, step, width, channels;
  VEC_INLINE Vec next() {
    alignas(64) static const T kZeros[V] = {};
    const T* from = P == kInside || static_cast<unsigned>(column) < static_cast<unsigned>(width) ? p : kZeros;
    p += pixel;
    column += step;
    // or the compiler computes the addresses of all columns first, which takes as long as the products
    asm("" : "+r"(p));
    if (P != kInside) asm("" : "+r"(column));
    return P == kFewChannels ? load_n(from, channels) : load(from);
  }
};

// T columns, `step` apart, of the sum of kh rows of (chunks * KX + rest) taps, plus bias. columns(ky, k) reads on from
// the first column's tap k in row ky; the weights' rows are w_row floats apart. Sums of more than kSumTaps products are added in parts, which keeps the rounding error of
// large kernels small. The upper half of the bias is added last: a large bias at the start would round each product at
// the bias's scale. The lower half starts the sum: added last, it would round alike for all sums of a binade and shift
// the channel's mean.
constexpr int kSumTaps = 100;
template <int KX, int T, typename Columns, typename Write>
VEC_INLINE void convolve_columns(Columns columns, const float* weight, int64_t w_row, int kh, int chunks, int rest,
                                 Vec bias, float* to, int64_t step, Write write) {
  // a whole row's taps, also if some lie outside the image: the sums of all columns are cut alike
  const int part = 1 + kSumTaps / static_cast<int>(w_row / V);
  int next_sum = part;
  const Vec upper = (Vec)((IVec)bias & static_cast<int>(0xffff0000));
  const Vec lower = upper == bias ? splat(0.f) : bias - upper;
  Vec acc[T];
#pragma GCC unroll 16
  for (int o = 0; o < T; o++) acc[o] = lower;
  for (int ky = 0; ky < kh; ky++) {
    const float* w = weight + ky * w_row;
    if (ky == next_sum) {
      next_sum += part;
#pragma GCC unroll 16
      for (int o = 0; o < T; o++) {
        Vec* sum = reinterpret_cast<Vec*>(to) + o * step;
        *sum = ky == part ? acc[o] : *sum + acc[o];
        acc[o] = splat(0.f);
      }
    }
    for (int chunk = 0; chunk < chunks; chunk++) {
      const Vec* taps = reinterpret_cast<const Vec*>(w);
      Vec weights[KX];
#pragma GCC unroll 16
      for (int k = 0; k < KX; k++) weights[k] = taps[k];
      auto from = columns(ky, chunk * KX);
#pragma GCC unroll 32
      for (int i = 0; i < T + KX - 1; i++) {
        const Vec v = from.next();
#pragma GCC unroll 16
        for (int o = 0; o < T; o++) {
          if (i - o >= 0 && i - o < KX) acc[o] = fma(v, weights[i - o], acc[o]);
        }
      }
      w += KX * V;
    }
    for (int k = 0; k < rest; k++) {
      const Vec weight = *reinterpret_cast<const Vec*>(w);
      auto from = columns(ky, chunks * KX + k);
#pragma GCC unroll 16
      for (int o = 0; o < T; o++) acc[o] = fma(from.next(), weight, acc[o]);
      w += V;
    }
  }
#pragma GCC unroll 16
  for (int o = 0; o < T; o++) {
    const Vec sum = kh > part ? reinterpret_cast<Vec*>(to)[o * step] + acc[o] : acc[o];
    write(o, sum + upper);
  }
}

// From a plane; `row` is the distance of two rows of taps in floats, `dilation` that of two taps of a row, and of two
// outputs, in columns.
template <int KX, int T, bool Dilated>
void convolve(const float* plane, int64_t row, int64_t dilation, const float* w, int64_t w_row, int kh, int chunks,
              int rest, Vec bias, float* to) {
  const int64_t step = Dilated ? dilation : 1;
  const auto columns = [=](int ky, int k) {
    return PlaneColumns<Dilated>{reinterpret_cast<const Vec*>(plane + ky * row) + k * step, step};
  };
  const auto write = [=](int o, Vec sum) { reinterpret_cast<Vec*>(to)[o * step] = sum; };
  convolve_columns<KX, T>(columns, w, w_row, kh, chunks, rest, bias, to, step, write);
}
using Convolve = void (*)(const float*, int64_t, int64_t, const float*, int64_t, int, int, int, Vec, float*);

// From a channels_last tensor. x is at the first column and row of taps, at this block's channels; the column is `left`
// and may lie outside the image. Taps are dh rows and dw columns apart, outputs dw columns. The sums go to the strip, or
// to a tensor of x's shape if y is not null.
template <int KX, typename T, int P>
void convolve_tensor(const Shape& s, const T* x, int channels, int left, const float* w, int kh, int kw, int64_t dh,
                     int dw, Vec bias, float* strip, T* y) {
  const int64_t row = s.w * s.c * dh, pixel = s.c * dw;
  const int width = static_cast<int>(s.w);
  const auto columns = [=](int ky, int k) {
    return TensorColumns<T, P>{x + ky * row + k * pixel, pixel, left + k * dw, dw, width, channels};
  };
  const auto write = [=](int o, Vec sum) {
    if (y == nullptr) {
      reinterpret_cast<Vec*>(strip)[o] = sum;
    } else if (P == kFewChannels) {
      store_n(y + o * pixel, sum, channels);
    } else {
      store(y + o * pixel, sum);
    }
  };
  convolve_columns<KX, kMaxTile>(columns, w, int64_t{kw} * V, kh, kw / KX, kw % KX, bias, strip, 1, write);
}
template <typename T>
using ConvolveTensor = void (*)(const Shape&, const T*, int, int, const float*, int, int, int64_t, int, Vec, float*,
                                T*);
template <typename T, int P>
ConvolveTensor<T> convolve_tensor_for(int kw) {
  switch (kw) {
    case 5:
      return convolve_tensor<5, T, P>;
    case 7:
      return convolve_tensor<smaller_int(7, kMaxTaps), T, P>;
    case 9:
      return convolve_tensor<smaller_int(9, kMaxTaps), T, P>;
    default:
      return convolve_tensor<3, T, P>;
  }
}

template <int T, bool Dilated>
Convolve convolve_for(int kx) {
  switch (kx) {
    case 1:
      return convolve<1, T, Dilated>;
    case 2:
      return convolve<2, T, Dilated>;
    case 3:
      return convolve<3, T, Dilated>;
    case 4:
      return convolve<4, T, Dilated>;
    case 5:
      return convolve<5, T, Dilated>;
    case 6:
      return convolve<6, T, Dilated>;
    case 7:
      return convolve<smaller_int(7, kMaxTaps), T, Dilated>;
    case 8:
      return convolve<smaller_int(8, kMaxTaps), T, Dilated>;
    default:
      return convolve<smaller_int(9, kMaxTaps), T, Dilated>;
  }
}

template <int I = 0>
Convolve convolve_tile(int tile, int kx, bool dilated) {
  if constexpr (I < static_cast<int>(sizeof kTiles / sizeof kTiles[0])) {
    if (kTiles[I] != tile) return convolve_tile<I + 1>(tile, kx, dilated);
    return dilated ? convolve_for<kTiles[I], true>(kx) : convolve_for<kTiles[I], false>(kx);
  } else {
    return nullptr;
  }
}
