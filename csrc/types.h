// SPDX-License-Identifier: MIT
// The types that the structs of both native modules (cpu/kernels.h, cuda/kernels.h) share.
#pragma once

namespace convmixer {

// The same codes as in convmixer_kernels/backends/_native.py.
enum Dtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
enum Activation : int { kIdentity = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3 };

// A per-channel vector (C) or a weight, in float32 or the activations' dtype; data is null for None.
struct Param {
  const void* data;
  int dtype;
};

// The sums of norm_backward, float32 (C) each; null in eval (see primitives.py).
struct Sums {
  const float* dy;
  const float* dy_hhat;
};

}  // namespace convmixer
