// SPDX-License-Identifier: MIT
// The flat arguments of the native functions, for both module.cpp files; convmixer_kernels/backends/_native.py makes
// them. NAME declares the parameters of a C++ function, NAME_VALUE makes the struct of kernels.h from them. With flat
// arguments a call costs about a microsecond.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

using Address = uintptr_t;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// The address (0: None) and the dtype code of a weight or a vector.
#define PARAM(name) Address name, int name##_dtype
#define PARAM_VALUE(name) {at(name), name##_dtype}

// Whether there is a norm, its four (C) vectors, and eps.
#define NORM bool norm, PARAM(mean), PARAM(var), PARAM(norm_weight), PARAM(norm_bias), double eps
#define NORM_VALUE                                                                         \
  Norm {                                                                                   \
    PARAM_VALUE(mean), PARAM_VALUE(var), PARAM_VALUE(norm_weight), PARAM_VALUE(norm_bias), \
        static_cast<decltype(Norm::eps)>(eps), norm                                        \
  }

// norm_backward's sums, float32 (C) each, or 0, 0.
#define SUMS Address sum_dy, Address sum_dy_hhat
#define SUMS_VALUE \
  Sums { at<const float>(sum_dy), at<const float>(sum_dy_hhat) }
