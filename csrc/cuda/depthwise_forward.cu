// SPDX-License-Identifier: MIT
// y = norm(act(conv(x) + bias)) (+ x), or a = conv(x) + bias with the statistics of act(a) (kernels.h), in one launch:
// on tensor cores for 16-bit tensors (depthwise_mma.cuh), on FMA units for float32 and if that does not fit
// (depthwise_fma.cu).
#include "depthwise_mma_launch.cuh"

namespace convmixer {

int64_t depthwise_forward_partials(const Shape& shape, int kh, int kw) {
  mma::Plan plan;
  mma::Variant variant;
  if (!mma::make_plan(shape, kh, kw, false, false, plan, variant)) return depthwise_forward_fma_partials(shape, kh, kw);
  return plan.splits;
}

int depthwise_forward(const DepthwiseForward& p, void* stream) {
  mma::Args args = {};
  mma::Variant variant;
  if (!mma::make_plan(p.shape, p.kh, p.kw, false, false, args.plan, variant)) return depthwise_forward_fma(p, stream);
  args.x = p.x;
  args.y = p.y;
  args.weight = p.weight;
  args.bias = p.bias;
  args.norm = p.norm;
  args.activation = p.activation;
  args.residual = p.residual;
  args.partials = p.partials;
  const auto queue = static_cast<cudaStream_t>(stream);
  return p.shape.dtype == kFloat16 ? mma::launch<__half, false>(args, variant, p.shape.channels_last, queue)
                                   : mma::launch<__nv_bfloat16, false>(args, variant, p.shape.channels_last, queue);
}

}  // namespace convmixer
