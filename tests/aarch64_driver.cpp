// SPDX-License-Identifier: MIT
// Runs every CPU kernel over a few shapes, dtypes, layouts and activations, and prints a digest of each result. The
// same source runs as x86-64 with AVX2 and, under QEMU, as aarch64 with NEON. Both have fused multiply-adds, and no sum
// depends on the width of vectors, so that the lines must be the same (tests/test_aarch64.py).
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../csrc/cpu/kernels.h"

using namespace convmixer;
using namespace convmixer::cpu;

#ifdef __x86_64__
namespace convmixer {
namespace cpu {
// the other sets that isa.cpp can choose
const Kernels kAvx512 = {}, kBaseline = {};
}  // namespace cpu
}  // namespace convmixer
const Kernels& kernels = kAvx2;
#else
const Kernels& kernels = kBaseline;
#endif

// About normal and the same on every machine: sums of four uniform numbers from a xorshift generator.
float normal() {
  static uint64_t state = 88172645463325252u;
  float sum = 0;
  for (int i = 0; i < 4; i++) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    sum += static_cast<float>(state >> 40) / (1 << 24) - 0.5f;
  }
  return sum * 1.7f;
}

uint16_t to_half(float value, int dtype) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (dtype == kBFloat16) return static_cast<uint16_t>(bits >> 16);
  const int exponent = static_cast<int>(bits >> 23 & 255) - 112;
  const uint32_t sign = bits >> 16 & 0x8000;
  return static_cast<uint16_t>(exponent <= 0 ? sign : sign | exponent << 10 | (bits & 0x7fffff) >> 13);
}

// A tensor of `count` elements; results start as NaN.
struct Tensor {
  std::vector<char> bytes;
  int dtype;

  Tensor(int64_t count, int type) : bytes(count * (type == kFloat32 ? 4 : 2), '\xff'), dtype(type) {}
  static Tensor random(int64_t count, int type, bool positive = false) {
    Tensor t(count, type);
    for (int64_t i = 0; i < count; i++) {
      const float v = normal(), value = positive ? std::fabs(v) + 0.5f : v;
      const uint16_t half = to_half(value, type);
      if (type == kFloat32) {
        std::memcpy(&t.bytes[4 * i], &value, 4);
      } else {
        std::memcpy(&t.bytes[2 * i], &half, 2);
      }
    }
    return t;
  }
  void* data() { return bytes.data(); }
  float* floats() { return reinterpret_cast<float*>(bytes.data()); }
  Param in() { return {bytes.data(), dtype}; }
  MutableParam out() { return {bytes.data(), dtype}; }
};

struct Case {
  int n, c, h, w, kh, kw;
};

bool failed = false;

// Whether dw = sum dy * shifted x is right: at most twice the error of sums in float32, term by term, plus one
// rounding.
bool is_right(const Case& s, const float* x, const float* dy, const float* dw) {
  double wrong = 0, naive = 0, norm = 0;
  for (int c = 0; c < s.c; c++)
    for (int i = 0; i < s.kh; i++)
      for (int j = 0; j < s.kw; j++) {
        double exact = 0;
        float sum = 0;
        for (int n = 0; n < s.n; n++)
          for (int row = 0; row < s.h; row++)
            for (int column = 0; column < s.w; column++) {
              const int y = row + i - (s.kh - 1) / 2, z = column + j - (s.kw - 1) / 2;
              if (y < 0 || y >= s.h || z < 0 || z >= s.w) continue;
              const int64_t plane = (int64_t{n} * s.c + c) * s.h * s.w;
              const float a = dy[plane + row * s.w + column], b = x[plane + y * s.w + z];
              exact += static_cast<double>(a) * b;
              sum += a * b;
            }
        const double got = dw[(c * s.kh + i) * s.kw + j] - exact;
        wrong += got * got, naive += (sum - exact) * (sum - exact), norm += exact * exact;
      }
  return std::sqrt(wrong) <= 2 * std::sqrt(naive) + std::sqrt(norm) / (1 << 24);
}

void run(const Case& s, int dtype, bool channels_last, int act) {
  const int outputs = s.c + 3, threads = 2;
  const int64_t pixels = int64_t{s.n} * s.h * s.w;
  const Shape shape{s.n, s.c, s.h, s.w, dtype, channels_last}, wide{s.n, outputs, s.h, s.w, dtype, channels_last};
  const auto show = [&](const char* name, const Tensor& t) {
    uint64_t digest = 14695981039346656037u;  // FNV-1a
    for (const char byte : t.bytes) digest = (digest ^ static_cast<unsigned char>(byte)) * 1099511628211u;
    std::printf("%s %d,%d,%d,%d k%dx%d dtype %d channels_last %d activation %d: %016llx\n", name, s.n, s.c, s.h, s.w,
                s.kh, s.kw, dtype, channels_last, act, static_cast<unsigned long long>(digest));
  };
  const auto check = [&](int status) { failed = failed || status != 0; };
  const auto vector = [&](int c, bool positive = false) { return Tensor::random(c, kFloat32, positive); };

  Tensor x = Tensor::random(pixels * s.c, dtype), dy = Tensor::random(pixels * s.c, dtype);
  Tensor weight = Tensor::random(s.c * s.kh * s.kw, dtype), bias = Tensor::random(s.c, dtype);
  Tensor gamma = vector(s.c), beta = vector(s.c), mean = vector(s.c), var = vector(s.c, true);
  const Norm norm{mean.in(), var.in(), gamma.in(), beta.in(), 1e-5, true};
  Tensor y(pixels * s.c, dtype), a(pixels * s.c, dtype), dx(pixels * s.c, dtype);
  check(kernels.depthwise_forward(
      {shape, s.kh, s.kw, x.data(), weight.in(), bias.in(), act, norm, true, Statistics{}, y.data(), threads}));
  show("depthwise eval", y);

  Tensor batch_mean(s.c, kFloat32), batch_var(s.c, kFloat32), running_mean = vector(s.c),
                                                              running_var = vector(s.c, true);
  const Statistics statistics{batch_mean.floats(), batch_var.floats()};
  check(kernels.depthwise_forward(
      {shape, s.kh, s.kw, x.data(), weight.in(), bias.in(), act, Norm{}, false, statistics, a.data(), threads}));
  show("depthwise train", a), show("mean", batch_mean), show("variance", batch_var);
  kernels.update_running_statistics({batch_mean.floats(), batch_var.floats(), s.c, s.n * int64_t{s.h} * s.w,
                                     running_mean.out(), running_var.out(), 0.1});
  show("running mean", running_mean), show("running variance", running_var);
  const Norm batch{batch_mean.in(), batch_var.in(), gamma.in(), beta.in(), 1e-5, true};
  check(kernels.normalize({shape, a.data(), act, batch, x.data(), y.data(), threads}));
  show("normalize", y);

  Tensor sum_dy(s.c, kFloat32), sum_dy_hhat(s.c, kFloat32), dw(s.c * s.kh * s.kw, dtype), db(s.c, dtype);
  check(
      kernels.norm_backward({shape, dy.data(), a.data(), act, batch, sum_dy.floats(), sum_dy_hhat.floats(), threads}));
  show("sum dy", sum_dy), show("sum dy hhat", sum_dy_hhat);
  const Sums sums{sum_dy.floats(), sum_dy_hhat.floats()};
  check(kernels.depthwise_input_grad(
      {shape, s.kh, s.kw, dy.data(), a.data(), weight.in(), act, batch, sums, true, dx.data(), threads}));
  check(kernels.depthwise_weight_grad(
      {shape, s.kh, s.kw, dy.data(), a.data(), x.data(), act, batch, sums, dw.out(), db.out(), threads}));
  show("depthwise dx", dx), show("depthwise db", db);
  if (s.kh != 3 || s.kw != 3 || channels_last) {
    show("depthwise dw", dw);
  } else if (dtype == kFloat32) {
    check(kernels.depthwise_weight_grad({shape, s.kh, s.kw, dy.data(), nullptr, x.data(), kIdentity, Norm{}, Sums{},
                                         dw.out(), MutableParam{}, threads}));
    failed = failed || !is_right(s, x.floats(), dy.floats(), dw.floats());
  }

  Tensor matrix = Tensor::random(int64_t{outputs} * s.c, dtype), wide_bias = Tensor::random(outputs, dtype);
  Tensor wide_gamma = vector(outputs), wide_beta = vector(outputs), wide_mean = vector(outputs);
  Tensor wide_var = vector(outputs, true), z(pixels * outputs, dtype);
  const Norm wide_norm{wide_mean.in(), wide_var.in(), wide_gamma.in(), wide_beta.in(), 1e-5, true};
  check(kernels.pointwise_forward(
      {wide, s.c, x.data(), matrix.in(), wide_bias.in(), act, wide_norm, Statistics{}, z.data(), threads}));
  show("pointwise eval", z);
  Tensor dz = Tensor::random(pixels * outputs, dtype), az = Tensor::random(pixels * outputs, dtype);
  Tensor da(pixels * outputs, kFloat32), dmatrix(int64_t{outputs} * s.c, dtype), dwide_bias(outputs, dtype);
  check(kernels.pointwise_backward({wide, s.c, dz.data(), az.data(), x.data(), matrix.in(), act, wide_norm, Sums{},
                                    da.floats(), dx.data(), dmatrix.out(), dwide_bias.out(), threads}));
  show("pointwise dx", dx), show("pointwise dw", dmatrix), show("pointwise db", dwide_bias);

  Tensor square = Tensor::random(int64_t{s.c} * s.c, dtype);
  MixerForward layers[2];
  for (MixerForward& layer : layers) {
    layer.depthwise = {shape, s.kh, s.kw, x.data(),     weight.in(), bias.in(),
                       act,   norm, true, Statistics{}, nullptr,     threads};
    layer.pointwise = {shape, s.c, nullptr, square.in(), bias.in(), act, norm, Statistics{}, y.data(), threads};
  }
  check(kernels.mixer_forward(layers, 2));
  show("two layers", y);
}

int main() {
  for (const Case& s : {Case{2, 5, 7, 9, 3, 3}, Case{3, 4, 6, 37, 3, 3}, Case{1, 33, 16, 16, 9, 9},
                        Case{3, 16, 5, 17, 4, 6}, Case{1, 8, 12, 10, 31, 31}, Case{2, 64, 8, 8, 5, 5}})
    for (const int dtype : {kFloat32, kFloat16, kBFloat16})
      for (const bool channels_last : {false, true})
        for (const int act : {kIdentity, kRelu, kGelu, kGeluTanh}) run(s, dtype, channels_last, act);
  return failed ? 1 : 0;
}
