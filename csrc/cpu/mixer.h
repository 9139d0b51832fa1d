// SPDX-License-Identifier: MIT
// A whole mixer layer in evaluation, image by image: z = depthwise block of one image, into the thread's own scratch,
// and y = pointwise block of z while z is in L2. z is never written to memory, which two calls would write, read and
// allocate; the bits are those of the two calls. Worth it where z fits in L2 and each thread has images of its own.

// Bytes of z that stay in L2 beside the item's packed panels.
constexpr int64_t kMixerBytes = 512 * 1024;

bool mixer_fits(const Shape& s, int threads) {
  return s.n >= threads && s.c * s.h * s.w * (s.dtype == kFloat32 ? 4 : 2) <= kMixerBytes;
}

// p.depthwise.y and p.pointwise.x are ignored.
int mixer_forward(const MixerForward& p) {
  const Shape& s = p.depthwise.shape;
  DepthwiseForward depthwise = p.depthwise;  // of one image
  PointwiseForward pointwise = p.pointwise;
  depthwise.shape.n = pointwise.shape.n = 1;
  const Plan plan(depthwise.shape, depthwise.kh, depthwise.kw, false);
  const Items items(pointwise.shape, pointwise.c_in);
  char* memory = static_cast<char*>(
      scratch(0, static_cast<size_t>(DepthwiseTables::bytes(depthwise) + PointwiseTables::bytes(pointwise))));
  if (memory == nullptr) return 1;
  const DepthwiseTables lower(depthwise, memory);
  const PointwiseTables upper(pointwise, memory);
  const int64_t plane_floats = plan.plane_floats();
  const int64_t together = blocks_together(plan, depthwise.shape, plane_floats * 4, 1);
  const int64_t planes_floats = ceil_div(together * (plane_floats + plan.strip_floats(s.w)), 16) * 16;
  const int64_t panels_floats = ceil_div(panel_floats(items, s.c), 16) * 16;
  const int64_t element = s.dtype == kFloat32 ? 4 : 2, image_bytes = s.c * s.h * s.w * element;
  const int64_t output_bytes = pointwise.shape.c * s.h * s.w * element;
  const int threads = useful_threads(s, lower.taps + pointwise.shape.c, p.depthwise.threads);
  int failed = 0;

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* planes =
        static_cast<float*>(scratch(1, static_cast<size_t>((planes_floats + panels_floats) * 4 + image_bytes)));
    if (planes != nullptr) zero(planes, together * plane_floats);
    float* panels = planes + planes_floats;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < plan.blocks; b++) lower.fill(depthwise, b);
#pragma omp for schedule(static)
    for (int64_t c = 0; c < upper.stride; c++) upper.fill_channel(pointwise, c);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < upper.panels; i++) upper.fill_panel(pointwise, i);
#pragma omp for schedule(dynamic)
    for (int64_t n = 0; n < s.n; n++) {
      if (planes == nullptr) {
#pragma omp atomic write
        failed = 1;
        continue;
      }
      DepthwiseForward below = depthwise;
      PointwiseForward above = pointwise;
      below.x = static_cast<const char*>(p.depthwise.x) + n * image_bytes;
      below.y = panels + panels_floats;
      above.x = below.y;
      above.y = static_cast<char*>(p.pointwise.y) + n * output_bytes;
      with_dtype(s.dtype, [&](auto tag) {
        using T = decltype(tag);
        for (int64_t i = 0; i < plan.row_tiles * ceil_div(plan.blocks, together); i++) {
          depthwise_item<T>(below, plan, lower, Item(plan, below.shape, i, together), together, planes, nullptr);
        }
        for (int64_t i = 0; i < items.count(); i++) pointwise_item<T>(above, items, i, upper, panels, nullptr);
      });
    }
  }
  return failed;
}
