// SPDX-License-Identifier: MIT
// The Python binding of kernels.h: one function per launcher, flat arguments (addresses, sizes, dtype codes, the
// stream), so that a call costs about a microsecond. Compiled by the host compiler only; the caller keeps every tensor
// alive and owns all memory. With CONVMIXER_EMULATED it binds the same kernels compiled for the CPU (tests/emulation);
// the GIL, held throughout, then also guards the emulator's global state.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "kernels.h"

#if defined(CONVMIXER_EMULATED)
#include "cuda_emu.h"
#define CONVMIXER_MODULE _cuda_emulated
#define CONVMIXER_DIGEST "emulated"
#else
#define CONVMIXER_MODULE _cuda
#endif

namespace py = pybind11;
namespace cm = convmixer;

namespace {

using Address = uintptr_t;

void* pointer(Address a) { return reinterpret_cast<void*>(a); }

void check(const char* launcher, int error) {
  if (error == 0) return;
  throw std::runtime_error(std::string(launcher) + ": CUDA error " + std::to_string(error) + ": " +
                           cm::error_string(error));
}

// (N, C, H, W), dtype code, whether channels_last
#define SHAPE int64_t n, int64_t c, int h, int w, int dtype, bool channels_last
#define SHAPE_VALUE \
  cm::Shape { n, c, h, w, dtype, channels_last }

// four (C,) vectors: address (0: None) and dtype code
#define NORM                                                                                                       \
  bool norm, Address mean, int mean_dtype, Address var, int var_dtype, Address norm_weight, int norm_weight_dtype, \
      Address norm_bias, int norm_bias_dtype, float eps
#define NORM_VALUE                                                                                     \
  cm::Norm {                                                                                           \
    {pointer(mean), mean_dtype}, {pointer(var), var_dtype}, {pointer(norm_weight), norm_weight_dtype}, \
        {pointer(norm_bias), norm_bias_dtype}, eps, norm                                               \
  }

// norm_backward's sums, (C,) float32 each, or 0, 0
#define SUMS Address sum_dy, Address sum_dy_hhat
#define SUMS_VALUE \
  cm::Sums { static_cast<const float*>(pointer(sum_dy)), static_cast<const float*>(pointer(sum_dy_hhat)) }

void depthwise_forward(SHAPE, int kh, int kw, Address x, Address weight, int weight_dtype, Address bias, int bias_dtype,
                       int activation, NORM, bool residual, Address y, Address partials, Address stream) {
  const cm::DepthwiseForward p{
      SHAPE_VALUE, kh,         kw,       pointer(x), {pointer(weight), weight_dtype},       {pointer(bias), bias_dtype},
      activation,  NORM_VALUE, residual, pointer(y), static_cast<float*>(pointer(partials))};
  check("depthwise_forward", cm::depthwise_forward(p, pointer(stream)));
}

void depthwise_input_grad(SHAPE, int kh, int kw, Address dy, Address a, Address weight, int weight_dtype,
                          int activation, NORM, SUMS, bool residual, Address dx, Address stream) {
  const cm::DepthwiseInputGrad p{
      SHAPE_VALUE, kh,         kw,         pointer(dy), pointer(a), {pointer(weight), weight_dtype},
      activation,  NORM_VALUE, SUMS_VALUE, residual,    pointer(dx)};
  check("depthwise_input_grad", cm::depthwise_input_grad(p, pointer(stream)));
}

void depthwise_weight_grad(SHAPE, int kh, int kw, Address dy, Address a, Address x, int activation, NORM, SUMS,
                           Address dw, int dw_dtype, Address db, int db_dtype, Address workspace, Address stream) {
  const cm::DepthwiseWeightGrad p{SHAPE_VALUE, kh,          kw,         pointer(dy),       pointer(a),
                                  pointer(x),  activation,  NORM_VALUE, SUMS_VALUE,        pointer(dw),
                                  dw_dtype,    pointer(db), db_dtype,   pointer(workspace)};
  check("depthwise_weight_grad", cm::depthwise_weight_grad(p, pointer(stream)));
}

void merge_statistics(int64_t c, int64_t partials_per_channel, int64_t count, Address partials, Address mean,
                      Address var, Address stream) {
  const cm::MergeStatistics p{c,
                              partials_per_channel,
                              count,
                              static_cast<const float*>(pointer(partials)),
                              static_cast<float*>(pointer(mean)),
                              static_cast<float*>(pointer(var))};
  check("merge_statistics", cm::merge_statistics(p, pointer(stream)));
}

// C, N * H * W, the batch's mean and var, the running ones (0: none) with their dtypes, momentum
using UpdateOf = std::tuple<int64_t, int64_t, Address, Address, Address, int, Address, int, double>;

void normalize(SHAPE, Address a, int activation, NORM, Address residual, Address y, const py::tuple& updates,
               Address stream) {
  cm::Normalize p{SHAPE_VALUE, pointer(a), activation, NORM_VALUE, pointer(residual), pointer(y), {}};
  if (updates.size() > cm::kMostUpdates) throw std::invalid_argument("normalize: too many updates");
  for (size_t i = 0; i < updates.size(); ++i) {
    const auto [channels, count, mean, var, running_mean, mean_dtype, running_var, var_dtype, momentum] =
        updates[i].cast<UpdateOf>();
    p.updates[i] = {channels,
                    count,
                    static_cast<const float*>(pointer(mean)),
                    static_cast<const float*>(pointer(var)),
                    pointer(running_mean),
                    mean_dtype,
                    pointer(running_var),
                    var_dtype,
                    momentum};
  }
  check("normalize", cm::normalize(p, pointer(stream)));
}

void norm_backward(SHAPE, Address dy, Address a, int activation, NORM, SUMS, Address workspace, Address stream) {
  const cm::NormBackward p{SHAPE_VALUE,
                           pointer(dy),
                           pointer(a),
                           activation,
                           NORM_VALUE,
                           static_cast<float*>(pointer(sum_dy)),
                           static_cast<float*>(pointer(sum_dy_hhat)),
                           pointer(workspace)};
  check("norm_backward", cm::norm_backward(p, pointer(stream)));
}

void pointwise_forward(SHAPE, int64_t c_out, Address x, Address weight, Address bias, int bias_dtype, int activation,
                       NORM, Address y, Address partials, bool hopper, Address stream) {
  const cm::PointwiseForward p{SHAPE_VALUE,
                               c_out,
                               pointer(x),
                               pointer(weight),
                               {pointer(bias), bias_dtype},
                               activation,
                               NORM_VALUE,
                               pointer(y),
                               static_cast<float*>(pointer(partials)),
                               hopper};
  check("pointwise_forward", cm::pointwise_forward(p, pointer(stream)));
}

// A block: weight, bias, norm, in the order of the primitive's arguments.
using Vector = std::tuple<Address, int>;
using NormOf = std::tuple<bool, Address, int, Address, int, Address, int, Address, int, float>;

cm::Norm norm_of(const NormOf& n) {
  const auto& [present, mean, mean_dtype, var, var_dtype, weight, weight_dtype, bias, bias_dtype, eps] = n;
  return {{pointer(mean), mean_dtype},
          {pointer(var), var_dtype},
          {pointer(weight), weight_dtype},
          {pointer(bias), bias_dtype},
          eps,
          present};
}
cm::Param param_of(const Vector& v) { return {pointer(std::get<0>(v)), std::get<1>(v)}; }

void mixer_forward(SHAPE, int64_t c_out, int kh, int kw, Address x, Vector depthwise_weight, Vector depthwise_bias,
                   NormOf depthwise_norm, Address weight, Vector bias, NormOf norm, int activation, bool residual,
                   Address y, Address stream) {
  const cm::MixerForward p{SHAPE_VALUE,
                           c_out,
                           kh,
                           kw,
                           pointer(x),
                           param_of(depthwise_weight),
                           param_of(depthwise_bias),
                           norm_of(depthwise_norm),
                           pointer(weight),
                           param_of(bias),
                           norm_of(norm),
                           activation,
                           residual,
                           pointer(y)};
  check("mixer_forward", cm::mixer_forward(p, pointer(stream)));
}

void pointwise_epilogue(SHAPE, Address a, Address bias, int bias_dtype, int activation, NORM, Address partials,
                        Address stream) {
  const cm::PointwiseEpilogue p{SHAPE_VALUE, pointer(a), {pointer(bias), bias_dtype},
                                activation,  NORM_VALUE, static_cast<float*>(pointer(partials))};
  check("pointwise_epilogue", cm::pointwise_epilogue(p, pointer(stream)));
}

void pointwise_grad_prologue(SHAPE, Address dy, Address a, int activation, NORM, SUMS, Address da, Address db,
                             int db_dtype, Address workspace, Address stream) {
  const cm::PointwiseGradPrologue p{SHAPE_VALUE, pointer(dy), pointer(a),  activation, NORM_VALUE,
                                    SUMS_VALUE,  pointer(da), pointer(db), db_dtype,   pointer(workspace)};
  check("pointwise_grad_prologue", cm::pointwise_grad_prologue(p, pointer(stream)));
}

void pointwise_weight_grad(SHAPE, int64_t c_out, Address da, Address x, Address dw, int dw_dtype, Address workspace,
                           Address stream) {
  const cm::PointwiseWeightGrad p{SHAPE_VALUE, c_out,    pointer(da),       pointer(x),
                                  pointer(dw), dw_dtype, pointer(workspace)};
  check("pointwise_weight_grad", cm::pointwise_weight_grad(p, pointer(stream)));
}

// (GPUs, error text or "")
py::tuple device_count() {
  int count = 0;
  const int error = cm::device_count(&count);
  return py::make_tuple(error == 0 ? count : 0, error == 0 ? "" : cm::error_string(error));
}

}  // namespace

PYBIND11_MODULE(CONVMIXER_MODULE, m) {
  m.doc() = "Launchers of the CUDA kernels; see csrc/cuda/kernels.h.";
  m.attr("compiler") = __VERSION__;
  m.attr("digest") = CONVMIXER_DIGEST;
  m.def("device_count", &device_count);
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
  m.def("mixer_fits", [](SHAPE, int64_t c_out, int kh, int kw) { return cm::mixer_fits(SHAPE_VALUE, c_out, kh, kw); });
  m.def("mixer_tiles", [](SHAPE) { return cm::mixer_tiles(SHAPE_VALUE); });
  m.def("pointwise_epilogue", &pointwise_epilogue);
  m.def("pointwise_grad_prologue", &pointwise_grad_prologue);
  m.def("pointwise_weight_grad", &pointwise_weight_grad);

  // sizes of scratch memory: partials a channel, or bytes
  m.def("depthwise_forward_partials",
        [](SHAPE, int kh, int kw) { return cm::depthwise_forward_partials(SHAPE_VALUE, kh, kw); });
  m.def("depthwise_weight_grad_workspace",
        [](SHAPE, int kh, int kw) { return cm::depthwise_weight_grad_workspace(SHAPE_VALUE, kh, kw); });
  m.def("norm_backward_workspace", [](SHAPE) { return cm::norm_backward_workspace(SHAPE_VALUE); });
  m.def("pointwise_forward_partials", [](SHAPE, int64_t c_out, Address x, Address weight, bool hopper) {
    return cm::pointwise_forward_partials(SHAPE_VALUE, c_out, pointer(x), pointer(weight), hopper);
  });
  m.def("pointwise_runs_hopper", [](SHAPE, int64_t c_out, Address x, Address weight) {
    return cm::pointwise_runs_hopper(SHAPE_VALUE, c_out, pointer(x), pointer(weight));
  });
  m.def("pointwise_epilogue_partials", [](SHAPE) { return cm::pointwise_epilogue_partials(SHAPE_VALUE); });
  m.def("pointwise_grad_prologue_workspace", [](SHAPE) { return cm::pointwise_grad_prologue_workspace(SHAPE_VALUE); });
  m.def("pointwise_weight_grad_workspace",
        [](SHAPE, int64_t c_out) { return cm::pointwise_weight_grad_workspace(SHAPE_VALUE, c_out); });
}
