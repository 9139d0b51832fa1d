// SPDX-License-Identifier: MIT
// The Python binding of kernels.h: one function per launcher, compiled by the host compiler only. The caller keeps
// every tensor alive and owns all memory. With CONVMIXER_EMULATED it binds the same kernels compiled for the CPU
// (tests/emulation). Functions hold the GIL, which then also guards the emulator's global state.
#include <stdexcept>
#include <string>
#include <tuple>

#include "../binding.h"
#include "kernels.h"

#if defined(CONVMIXER_EMULATED)
#include "cuda_emu.h"
#define CONVMIXER_MODULE _cuda_emulated
#define CONVMIXER_DIGEST "emulated"
#else
#define CONVMIXER_MODULE _cuda
#endif

namespace py = pybind11;

namespace convmixer {
namespace binding {
namespace {

void check(const char* launcher, int error) {
  if (error == 0) return;
  throw std::runtime_error(std::string(launcher) + ": CUDA error " + std::to_string(error) + ": " +
                           error_string(error));
}

// (N, C, H, W), dtype code, whether channels_last
#define SHAPE int64_t n, int64_t c, int h, int w, int dtype, bool channels_last
#define SHAPE_VALUE \
  Shape { n, c, h, w, dtype, channels_last }

void depthwise_forward(SHAPE, int kh, int kw, Address x, PARAM(weight), PARAM(bias), int activation, NORM,
                       bool residual, Address y, Address partials, Address stream) {
  const DepthwiseForward p{SHAPE_VALUE, kh,         kw,       at(x), PARAM_VALUE(weight), PARAM_VALUE(bias),
                           activation,  NORM_VALUE, residual, at(y), at<float>(partials)};
  check("depthwise_forward", convmixer::depthwise_forward(p, at(stream)));
}

void depthwise_input_grad(SHAPE, int kh, int kw, Address dy, Address a, PARAM(weight), int activation, NORM, SUMS,
                          bool residual, Address dx, Address stream) {
  const DepthwiseInputGrad p{SHAPE_VALUE, kh,         kw,         at(dy),   at(a), PARAM_VALUE(weight),
                             activation,  NORM_VALUE, SUMS_VALUE, residual, at(dx)};
  check("depthwise_input_grad", convmixer::depthwise_input_grad(p, at(stream)));
}

void depthwise_weight_grad(SHAPE, int kh, int kw, Address dy, Address a, Address x, int activation, NORM, SUMS,
                           PARAM(dw), PARAM(db), Address workspace, Address stream) {
  const DepthwiseWeightGrad p{SHAPE_VALUE, kh,         kw,     at(dy),   at(a),  at(x),    activation,
                              NORM_VALUE,  SUMS_VALUE, at(dw), dw_dtype, at(db), db_dtype, at(workspace)};
  check("depthwise_weight_grad", convmixer::depthwise_weight_grad(p, at(stream)));
}

void merge_statistics(int64_t c, int64_t partials_per_channel, int64_t count, Address partials, Address mean,
                      Address var, Address stream) {
  const MergeStatistics p{c, partials_per_channel, count, at<const float>(partials), at<float>(mean), at<float>(var)};
  check("merge_statistics", convmixer::merge_statistics(p, at(stream)));
}

// C, N * H * W, the batch's mean and var, running mean and var (0: none) with their dtypes, momentum
using UpdateOf = std::tuple<int64_t, int64_t, Address, Address, Address, int, Address, int, double>;

void normalize(SHAPE, Address a, int activation, NORM, Address residual, Address y, const py::tuple& updates,
               Address stream) {
  Normalize p{SHAPE_VALUE, at(a), activation, NORM_VALUE, at(residual), at(y), {}};
  if (updates.size() > convmixer::kMostUpdates) throw std::invalid_argument("normalize: too many updates");
  for (size_t i = 0; i < updates.size(); ++i) {
    const auto [channels, count, mean, var, running_mean, mean_dtype, running_var, var_dtype, momentum] =
        updates[i].cast<UpdateOf>();
    p.updates[i] = {channels,         count,      at<const float>(mean), at<const float>(var),
                    at(running_mean), mean_dtype, at(running_var),       var_dtype,
                    momentum};
  }
  check("normalize", convmixer::normalize(p, at(stream)));
}

void norm_backward(SHAPE, Address dy, Address a, int activation, NORM, SUMS, Address workspace, Address stream) {
  const NormBackward p{SHAPE_VALUE,  at(dy), at(a), activation, NORM_VALUE, at<float>(sum_dy), at<float>(sum_dy_hhat),
                       at(workspace)};
  check("norm_backward", convmixer::norm_backward(p, at(stream)));
}

void pointwise_forward(SHAPE, int64_t c_out, Address x, Address weight, PARAM(bias), int activation, NORM, Address y,
                       Address partials, bool hopper, Address stream) {
  const PointwiseForward p{SHAPE_VALUE, c_out,      at(x), at(weight),          PARAM_VALUE(bias),
                           activation,  NORM_VALUE, at(y), at<float>(partials), hopper};
  check("pointwise_forward", convmixer::pointwise_forward(p, at(stream)));
}

// A block: weight, bias, norm, in the order of the primitive's arguments.
using Vector = std::tuple<Address, int>;
using NormOf = std::tuple<bool, Address, int, Address, int, Address, int, Address, int, float>;

Norm norm_of(const NormOf& n) {
  const auto& [present, mean, mean_dtype, var, var_dtype, weight, weight_dtype, bias, bias_dtype, eps] = n;
  return {PARAM_VALUE(mean), PARAM_VALUE(var), PARAM_VALUE(weight), PARAM_VALUE(bias), eps, present};
}
Param param_of(const Vector& v) { return {at(std::get<0>(v)), std::get<1>(v)}; }

void mixer_forward(SHAPE, int64_t c_out, int kh, int kw, Address x, Vector depthwise_weight, Vector depthwise_bias,
                   NormOf depthwise_norm, Address weight, Vector bias, NormOf norm, int activation, bool residual,
                   Address y, Address stream) {
  const MixerForward p{SHAPE_VALUE,
                       c_out,
                       kh,
                       kw,
                       at(x),
                       param_of(depthwise_weight),
                       param_of(depthwise_bias),
                       norm_of(depthwise_norm),
                       at(weight),
                       param_of(bias),
                       norm_of(norm),
                       activation,
                       residual,
                       at(y)};
  check("mixer_forward", convmixer::mixer_forward(p, at(stream)));
}

void pointwise_statistics(SHAPE, Address a, int activation, Address partials, Address stream) {
  const PointwiseStatistics p{SHAPE_VALUE, at(a), activation, at<float>(partials)};
  check("pointwise_statistics", convmixer::pointwise_statistics(p, at(stream)));
}

void pointwise_grad_prologue(SHAPE, Address dy, Address a, int activation, NORM, SUMS, Address da, PARAM(db),
                             Address workspace, Address stream) {
  const PointwiseGradPrologue p{SHAPE_VALUE, at(dy), at(a),  activation, NORM_VALUE,
                                SUMS_VALUE,  at(da), at(db), db_dtype,   at(workspace)};
  check("pointwise_grad_prologue", convmixer::pointwise_grad_prologue(p, at(stream)));
}

void pointwise_weight_grad(SHAPE, int64_t c_out, Address da, Address x, PARAM(dw), Address workspace, Address stream) {
  const PointwiseWeightGrad p{SHAPE_VALUE, c_out, at(da), at(x), at(dw), dw_dtype, at(workspace)};
  check("pointwise_weight_grad", convmixer::pointwise_weight_grad(p, at(stream)));
}

// (GPUs, error text or "")
py::tuple device_count() {
  int count = 0;
  const int error = convmixer::device_count(&count);
  return py::make_tuple(error == 0 ? count : 0, error == 0 ? "" : convmixer::error_string(error));
}

void define(py::module_& m) {
  m.doc() = "Launchers of the CUDA kernels; see csrc/cuda/kernels.h.";
  m.attr("compiler") = __VERSION__;
  m.attr("digest") = CONVMIXER_DIGEST;
  m.def("device_count", &device_count);
  m.attr("toolkit") = convmixer::toolkit_version();
#if defined(CONVMIXER_EMULATED)
  m.def("launches", [] { return emu::launches; });
#endif

  m.def("depthwise_forward", &depthwise_forward);
  m.def("depthwise_input_grad", &depthwise_input_grad);
  m.def("depthwise_weight_grad", &depthwise_weight_grad);
  m.def("merge_statistics", &merge_statistics);
  m.def("normalize", &normalize);
  m.def("norm_backward", &norm_backward);
  m.def("pointwise_forward", &pointwise_forward);
  m.def("mixer_forward", &mixer_forward);
  m.def("mixer_fits",
        [](SHAPE, int64_t c_out, int kh, int kw) { return convmixer::mixer_fits(SHAPE_VALUE, c_out, kh, kw); });
  m.def("mixer_tiles", [](SHAPE) { return convmixer::mixer_tiles(SHAPE_VALUE); });
  m.def("pointwise_statistics", &pointwise_statistics);
  m.def("pointwise_grad_prologue", &pointwise_grad_prologue);
  m.def("pointwise_weight_grad", &pointwise_weight_grad);

  // sizes of scratch memory: the number of partials a channel, or bytes
  m.def("depthwise_forward_partials",
        [](SHAPE, int kh, int kw) { return convmixer::depthwise_forward_partials(SHAPE_VALUE, kh, kw); });
  m.def("depthwise_weight_grad_workspace",
        [](SHAPE, int kh, int kw) { return convmixer::depthwise_weight_grad_workspace(SHAPE_VALUE, kh, kw); });
  m.def("norm_backward_workspace", [](SHAPE) { return convmixer::norm_backward_workspace(SHAPE_VALUE); });
  m.def("pointwise_forward_partials", [](SHAPE, int64_t c_out, Address x, Address weight, bool hopper) {
    return convmixer::pointwise_forward_partials(SHAPE_VALUE, c_out, at(x), at(weight), hopper);
  });
  m.def("pointwise_runs_hopper", [](SHAPE, int64_t c_out, Address x, Address weight) {
    return convmixer::pointwise_runs_hopper(SHAPE_VALUE, c_out, at(x), at(weight));
  });
  m.def("pointwise_statistics_partials", [](SHAPE) { return convmixer::pointwise_statistics_partials(SHAPE_VALUE); });
  m.def("pointwise_grad_prologue_workspace",
        [](SHAPE) { return convmixer::pointwise_grad_prologue_workspace(SHAPE_VALUE); });
  m.def("pointwise_weight_grad_workspace",
        [](SHAPE, int64_t c_out) { return convmixer::pointwise_weight_grad_workspace(SHAPE_VALUE, c_out); });
}

}  // namespace
}  // namespace binding
}  // namespace convmixer

PYBIND11_MODULE(CONVMIXER_MODULE, m) { convmixer::binding::define(m); }
