// SPDX-License-Identifier: MIT
// Launcher of the kernel that computes a narrow network's mixer layer (mixer.cuh), and the conditions for it.
#include "mixer.cuh"

namespace convmixer {
namespace {

int depth_of(int64_t channels) { return static_cast<int>(ceil_div(channels, mixer::kDepth)) * mixer::kDepth; }

// The number of values in the widest aligned access to rows of w values.
int granule_of(const void* data, int w) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(data) | 2 * static_cast<uintptr_t>(w);
  return bits % 16 == 0 ? 8 : bits % 8 == 0 ? 4 : 1;
}

template <class T, bool ALIGNED>
int launch(const mixer::Args& p, void* stream) {
  constexpr auto kernel = mixer::mixer_kernel<T, ALIGNED>;
  const int64_t blocks = static_cast<int64_t>(p.depthwise.plan.n) * p.tiles;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  const int shared = mixer::shared_bytes(p.depth);
  const cudaError_t error = set_dynamic_shared(kernel, shared);
  if (error != cudaSuccess) return error;
  LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(mixer::kThreads), shared, static_cast<cudaStream_t>(stream),
         p);
  return cudaGetLastError();
}

template <class T>
int launch_as(const mixer::Args& p, void* stream) {
  const bool aligned = reinterpret_cast<uintptr_t>(p.pointwise.weight) % 16 == 0 && p.pointwise.c_in % 8 == 0;
  return aligned ? launch<T, true>(p, stream) : launch<T, false>(p, stream);
}

}  // namespace

bool mixer_fits(const Shape& s, int64_t c_out, int kh, int kw) {
  // a place in a plane has 32 bits; the kernel has no static arrays, so that it may use all of a block's shared memory
  return s.dtype != kFloat32 && !s.channels_last && std::max(kh, kw) <= mixer::kTaps &&
         std::max(s.c, c_out) <= mixer::kMostChannels && static_cast<int64_t>(s.h) * s.w < 1 << 30 && s.n < 1 << 30 &&
         mixer::shared_bytes(depth_of(s.c)) <= most_shared_of_block();
}

int64_t mixer_tiles(const Shape& s) { return s.n * ceil_div(s.h, mixer::kTile) * ceil_div(s.w, mixer::kTile); }

int mixer_forward(const MixerForward& p, void* stream) {
  const Shape& s = p.shape;
  if (!mixer_fits(s, p.c_out, p.kh, p.kw)) return cudaErrorInvalidValue;
  mixer::Args args = {};
  mma::Args& lower = args.depthwise;
  mma::Plan& plan = lower.plan;
  plan.n = static_cast<int>(s.n), plan.c = static_cast<int>(s.c), plan.h = s.h, plan.w = s.w;
  plan.kh = p.kh, plan.kw = p.kw, plan.top = (p.kh - 1) / 2, plan.left = (p.kw - 1) / 2;
  plan.granule = granule_of(p.x, s.w);
  lower.x = p.x;
  lower.weight = p.depthwise_weight;
  lower.bias = p.depthwise_bias;
  lower.norm = p.depthwise_norm;
  lower.activation = p.activation;
  lower.residual = p.residual;
  pointwise::Args& upper = args.pointwise;
  upper.weight = p.weight;
  upper.y = p.y;
  upper.bias = p.bias;
  upper.norm = p.norm;
  upper.c_out = p.c_out;
  upper.plane = static_cast<int64_t>(s.h) * s.w;
  upper.c_in = plan.c;
  upper.activation = p.activation;
  args.tiles_across = static_cast<int>(ceil_div(s.w, mixer::kTile));
  args.tiles = static_cast<int>(ceil_div(s.h, mixer::kTile)) * args.tiles_across;
  args.depth = depth_of(s.c);
  args.y_granule = granule_of(p.y, s.w);
  return s.dtype == kFloat16 ? launch_as<__half>(args, stream) : launch_as<__nv_bfloat16>(args, stream);
}

}  // namespace convmixer
