// SPDX-License-Identifier: MIT
// dx = correlate(da, flipped weight) (+ dy), with da from dy, a and the statistics' gradients (kernels.h), in one
// launch: on tensor cores for 16-bit tensors (depthwise_mma.cuh), on FMA units for float32 and if that does not fit
// (depthwise_fma.cu).
#include "depthwise_mma_launch.cuh"

namespace convmixer {

int depthwise_input_grad(const DepthwiseInputGrad& p, void* stream) {
  mma::Args args = {};
  mma::Variant variant;
  if (!mma::make_plan(p.shape, p.kh, p.kw, true, p.a != nullptr, args.plan, variant))
    return depthwise_input_grad_fma(p, stream);
  args.x = p.dy;
  args.a = p.a;
  args.y = p.dx;
  args.weight = p.weight;
  args.norm = p.norm;
  args.sums = p.sums;
  args.activation = p.activation;
  args.residual = p.residual;
  const auto queue = static_cast<cudaStream_t>(stream);
  return p.shape.dtype == kFloat16 ? mma::launch<__half, true>(args, variant, p.shape.channels_last, queue)
                                   : mma::launch<__nv_bfloat16, true>(args, variant, p.shape.channels_last, queue);
}

}  // namespace convmixer
