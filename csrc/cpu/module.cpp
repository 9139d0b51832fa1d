// SPDX-License-Identifier: MIT
// The Python binding of kernels.h, convmixer_kernels._cpu, without torch. Functions release the GIL. The caller keeps
// the tensors alive.
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "../binding.h"
#include "kernels.h"

namespace py = pybind11;
using namespace convmixer;
using namespace convmixer::cpu;

namespace {

const Kernels& kernels() {
  static const char* error = nullptr;
  static const Kernels* selected = select_kernels(&error);
  if (selected == nullptr) {
    throw std::runtime_error(std::string("convmixer_kernels: the value of CONVMIXER_CPU_ISA ") + error +
                             "; here it may be one of " + supported_isas());
  }
  return *selected;
}

void check(int failed) {
  if (failed != 0) throw std::bad_alloc();
}

// (N, C, H, W), dtype code, whether channels_last
#define SHAPE int64_t n, int64_t c, int64_t h, int64_t w, int dtype, bool channels_last
#define SHAPE_VALUE \
  Shape { n, c, h, w, dtype, channels_last }

// An output tensor of n * c * h * w elements.
void* output(Address address, int64_t elements, int dtype) {
  advise_output(at(address), static_cast<size_t>(elements) * (dtype == kFloat32 ? 4 : 2));
  return at(address);
}

void depthwise_forward(Address x, Address y, SHAPE, int kh, int kw, PARAM(weight), PARAM(bias), int activation, NORM,
                       bool residual, int threads, int dilation_h, int dilation_w) {
  check(kernels().depthwise_forward({SHAPE_VALUE,
                                     kh,
                                     kw,
                                     at(x),
                                     PARAM_VALUE(weight),
                                     PARAM_VALUE(bias),
                                     activation,
                                     NORM_VALUE,
                                     residual,
                                     {},
                                     output(y, n * c * h * w, dtype),
                                     threads,
                                     dilation_h,
                                     dilation_w}));
}

void depthwise_train(Address x, Address a, SHAPE, int kh, int kw, PARAM(weight), PARAM(bias), int activation,
                     Address mean, Address var, int threads) {
  check(kernels().depthwise_forward({SHAPE_VALUE,
                                     kh,
                                     kw,
                                     at(x),
                                     PARAM_VALUE(weight),
                                     PARAM_VALUE(bias),
                                     activation,
                                     {},
                                     false,
                                     {at<float>(mean), at<float>(var)},
                                     output(a, n * c * h * w, dtype),
                                     threads}));
}

void depthwise_input_grad(Address dy, Address a, Address dx, SHAPE, int kh, int kw, PARAM(weight), int activation, NORM,
                          SUMS, bool residual, int threads, int dilation_h, int dilation_w) {
  check(kernels().depthwise_input_grad({SHAPE_VALUE, kh, kw, at(dy), at(a), PARAM_VALUE(weight), activation, NORM_VALUE,
                                        SUMS_VALUE, residual, output(dx, n * c * h * w, dtype), threads, dilation_h,
                                        dilation_w}));
}

void depthwise_weight_grad(Address dy, Address a, Address x, SHAPE, int kh, int kw, int activation, NORM, SUMS,
                           PARAM(dw), PARAM(db), int threads, int dilation_h, int dilation_w) {
  check(kernels().depthwise_weight_grad({SHAPE_VALUE, kh, kw, at(dy), at(a), at(x), activation, NORM_VALUE, SUMS_VALUE,
                                         PARAM_VALUE(dw), PARAM_VALUE(db), threads, dilation_h, dilation_w}));
}

void normalize(Address a, Address residual, Address y, SHAPE, int activation, NORM, int threads) {
  check(kernels().normalize(
      {SHAPE_VALUE, at(a), activation, NORM_VALUE, at(residual), output(y, n * c * h * w, dtype), threads}));
}

// Each update is: mean, var, C, count, running_mean, running_var, momentum. Nothing can fail between them.
void update_running_statistics(const py::list& updates) {
  std::vector<UpdateRunningStatistics> runs;
  for (const py::handle& item : updates) {
    const py::tuple t = py::reinterpret_borrow<py::tuple>(item);
    const auto param = [&t](size_t i) { return MutableParam{at(t[i].cast<Address>()), t[i + 1].cast<int>()}; };
    runs.push_back({at<float>(t[0].cast<Address>()), at<float>(t[1].cast<Address>()), t[2].cast<int64_t>(),
                    t[3].cast<int64_t>(), param(4), param(6), t[8].cast<double>()});
  }
  const Kernels& chosen = kernels();
  for (const UpdateRunningStatistics& run : runs) chosen.update_running_statistics(run);
}

void norm_backward(Address dy, Address a, SHAPE, int activation, PARAM(mean), PARAM(var), double eps, Address sum_dy,
                   Address sum_dy_hhat, int threads) {
  check(kernels().norm_backward({SHAPE_VALUE,
                                 at(dy),
                                 at(a),
                                 activation,
                                 {PARAM_VALUE(mean), PARAM_VALUE(var), {}, {}, eps, true},
                                 at<float>(sum_dy),
                                 at<float>(sum_dy_hhat),
                                 threads}));
}

void pointwise_forward(Address x, Address y, SHAPE, int64_t c_in, PARAM(weight), PARAM(bias), int activation, NORM,
                       int threads) {
  check(kernels().pointwise_forward({SHAPE_VALUE,
                                     c_in,
                                     at(x),
                                     PARAM_VALUE(weight),
                                     PARAM_VALUE(bias),
                                     activation,
                                     NORM_VALUE,
                                     {},
                                     output(y, n * c * h * w, dtype),
                                     threads}));
}

bool pointwise_is_narrow(int64_t c, int64_t c_in) { return kernels().pointwise_is_narrow(c, c_in); }

int64_t packed_floats(bool channels_last, int64_t c, int64_t c_in) {
  return kernels().packed_floats(channels_last, c, c_in);
}

void pack_weight(PARAM(weight), int64_t c, int64_t c_in, bool channels_last, Address packed, int threads) {
  kernels().pack_weight({PARAM_VALUE(weight), c, c_in, channels_last, at<float>(packed), threads});
}

bool mixer_fits(SHAPE, int threads) { return kernels().mixer_fits(SHAPE_VALUE, threads); }

// One block's weight, bias and norm.
struct EvalBlock {
  Param weight, bias;
  Norm norm;
};
EvalBlock eval_block(const py::tuple& t) {
  const auto param = [&t](size_t i) { return Param{at(t[i].cast<Address>()), t[i + 1].cast<int>()}; };
  return {param(0), param(2), {param(5), param(7), param(9), param(11), t[13].cast<double>(), t[4].cast<bool>()}};
}

// Each layer is: activation, C_out, kH, kW, its depthwise and its pointwise block.
void mixer_forward(Address x, Address y, SHAPE, const py::list& layers, bool residual, int threads) {
  std::vector<MixerForward> runs;
  for (const py::handle& item : layers) {
    const py::tuple layer = py::reinterpret_borrow<py::tuple>(item);
    const int activation = layer[0].cast<int>();
    const int64_t c_out = layer[1].cast<int64_t>();
    const EvalBlock depthwise = eval_block(layer[4].cast<py::tuple>()),
                    pointwise = eval_block(layer[5].cast<py::tuple>());
    runs.push_back({{SHAPE_VALUE,
                     layer[2].cast<int>(),
                     layer[3].cast<int>(),
                     at(x),
                     depthwise.weight,
                     depthwise.bias,
                     activation,
                     depthwise.norm,
                     residual,
                     {},
                     nullptr,
                     threads},
                    {{n, c_out, h, w, dtype, channels_last},
                     c,
                     nullptr,
                     pointwise.weight,
                     pointwise.bias,
                     activation,
                     pointwise.norm,
                     {},
                     nullptr,
                     threads}});
    c = c_out;
  }
  const py::gil_scoped_release release;
  runs.back().pointwise.y = output(y, n * c * h * w, dtype);
  check(kernels().mixer_forward(runs.data(), static_cast<int64_t>(runs.size())));
}

void pointwise_train(Address x, Address a, SHAPE, int64_t c_in, PARAM(weight), PARAM(bias), int activation,
                     Address mean, Address var, int threads) {
  check(kernels().pointwise_forward({SHAPE_VALUE,
                                     c_in,
                                     at(x),
                                     PARAM_VALUE(weight),
                                     PARAM_VALUE(bias),
                                     activation,
                                     {},
                                     {at<float>(mean), at<float>(var)},
                                     output(a, n * c * h * w, dtype),
                                     threads}));
}

void pointwise_backward(Address dy, Address a, Address x, SHAPE, int64_t c_in, PARAM(weight), int activation, NORM,
                        SUMS, Address da, Address dx, PARAM(dw), PARAM(db), int threads) {
  check(kernels().pointwise_backward({SHAPE_VALUE, c_in, at(dy), at(a), at(x), PARAM_VALUE(weight), activation,
                                      NORM_VALUE, SUMS_VALUE,
                                      da == 0 ? nullptr : static_cast<float*>(output(da, n * c * h * w, kFloat32)),
                                      output(dx, n * c_in * h * w, dtype), PARAM_VALUE(dw), PARAM_VALUE(db), threads}));
}

void activation(Address x, Address y, int64_t count, int code, bool gradient) {
  kernels().activation(at<const float>(x), at<float>(y), count, code, gradient);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Native CPU kernels of convmixer_kernels; see csrc/cpu/kernels.h.";
  const auto define = [&m](const char* name, auto f) { m.def(name, f, py::call_guard<py::gil_scoped_release>()); };
  define("depthwise_forward", depthwise_forward);
  define("depthwise_train", depthwise_train);
  define("depthwise_input_grad", depthwise_input_grad);
  define("depthwise_weight_grad", depthwise_weight_grad);
  define("normalize", normalize);
  m.def("update_running_statistics", update_running_statistics);
  define("norm_backward", norm_backward);
  define("pointwise_forward", pointwise_forward);
  define("pointwise_train", pointwise_train);
  define("pointwise_backward", pointwise_backward);
  define("pointwise_is_narrow", pointwise_is_narrow);
  define("packed_floats", packed_floats);
  define("pack_weight", pack_weight);
  define("mixer_fits", mixer_fits);
  m.def("mixer_forward", mixer_forward);
  define("activation", activation);
  m.def("isa", [] { return kernels().isa; });
  m.def("supported_isas", [] { return supported_isas(); });
#ifdef __VERSION__
  m.attr("compiler") = __VERSION__;
  m.attr("digest") = CONVMIXER_DIGEST;
#endif
}
