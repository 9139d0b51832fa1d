// SPDX-License-Identifier: MIT
// The kernels for any CPU, in the compiler's vector extensions. Everything is in an anonymous namespace: if objects for
// different instruction sets shared inline code, the linker would keep one copy of it for every CPU.
#ifdef __ARM_NEON
#include <arm_neon.h>
#endif

#include "kernels.h"

namespace convmixer {
namespace cpu {
namespace {
#include "scalar.h"
// clang-format off: the order matters
#include "vec_baseline.h"
#include "activation.h"
#include "layout.h"
#include "batch_norm.h"
#include "gemm.h"
#include "pointwise.h"
#include "pointwise_backward.h"
#include "convolve.h"
#include "depthwise.h"
#include "depthwise_weight_grad.h"
#include "mixer.h"
// clang-format on
}  // namespace

const Kernels kBaseline = {"baseline",         depthwise_forward,   depthwise_input_grad, depthwise_weight_grad,
                           normalize,          norm_backward,       pointwise_forward,    update_running_statistics,
                           pointwise_backward, pointwise_is_narrow, packed_floats,        pack_weight,
                           mixer_forward,      mixer_fits,          activation_only};

}  // namespace cpu
}  // namespace convmixer
