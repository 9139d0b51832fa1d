// SPDX-License-Identifier: MIT
// A run of mixer layers in evaluation. Each image goes through all layers before the next image:
//   z = norm(act(depthwise(x))) + x,  x = norm(act(W z)),  and so on.
// An image's activations stay in a core's L2 as planes [block of channels][position][V]. They are converted from the
// tensor's layout once a run, and back once; between, the depthwise convolution and the product read and write planes.
// Each thread takes whole images. A single image is shared by all threads, which synchronise after every block of the
// layers. FMAs bound it. The result has the bits of one call for each block.

// Most bytes of an image's planes. L2 holds two sets of them, and the weights stream through it.
constexpr int64_t kMixerBytes = 1024 * 1024;

// c: the most channels that an image has between layers.
bool mixer_fits(const Shape& s, int threads) {
  return (s.n >= threads || s.n == 1) && s.c * s.h * s.w * 4 <= kMixerBytes;
}

// The tables of one layer, which begin at `memory`. Both blocks have the shape of one image.
struct MixerStage {
  DepthwiseForward depthwise;
  PointwiseForward pointwise;
  Plan plan;
  DepthwiseTables lower;
  PointwiseTables upper;

  static DepthwiseForward of_one_image(DepthwiseForward p) {
    p.shape.n = 1;
    return p;
  }
  // Planes have channels in their lanes, as channels_last has.
  static PointwiseForward of_planes(PointwiseForward p) {
    p.shape.n = 1;
    p.shape.channels_last = true;
    return p;
  }
  static int64_t bytes(const MixerForward& p) {
    return DepthwiseTables::bytes(p.depthwise) + PointwiseTables::bytes(of_planes(p.pointwise));
  }
  MixerStage(const MixerForward& p, char*& memory)
      : depthwise(of_one_image(p.depthwise)),
        pointwise(of_planes(p.pointwise)),
        plan(depthwise.shape, taps_of(depthwise), false),
        lower(depthwise, memory),
        upper(pointwise, memory) {}
};

// Computes z of item i (of plan.blocks * plan.row_tiles) from x. `plane` is one padded plane whose margins are 0. The
// planes of neighbouring blocks are `stride` floats apart.
template <typename T>
inline void mixer_depthwise(const MixerStage& stage, int64_t i, const float* x, int64_t stride, float* plane,
                            float* z) {
  const Plan& plan = stage.plan;
  const DepthwiseForward& p = stage.depthwise;
  const Shape& s = p.shape;
  const int64_t row = s.w * V;
  const Item item(plan, s, i % plan.row_tiles * plan.blocks + i / plan.row_tiles, 1);
  const float* from = x + item.c0 / V * stride;
  float* to = z + item.c0 / V * stride;
  const Window window(plan, s, item.y0, item.y1);
  for (int64_t y = window.first; y < window.last; y++) {
    __builtin_memcpy(window.row(plan, s, plane, y).p, from + y * row, static_cast<size_t>(row) * 4);
  }
  const Affine affine = affine_at(stage.lower.table, stage.lower.stride, item.c0);
  const Vec bias = load(stage.lower.biases + item.c0);
  with_activation(p.activation, [&](auto act) {
    constexpr int A = decltype(act)::value;
    for (int64_t r0 = item.y0; r0 < item.y1; r0 += plan.strip_rows) {
      const int64_t r1 = smaller(r0 + plan.strip_rows, item.y1);
      for (int64_t r = r0; r < r1; r++) {
        convolve_row(plan, s, window, plane, r, stage.lower.weights + item.c0 * stage.lower.taps, bias, to + r * row);
      }
      const Vec* residual = reinterpret_cast<const Vec*>(from + r0 * row);
      Vec* v = reinterpret_cast<Vec*>(to + r0 * row);
      for (int64_t j = 0; j < (r1 - r0) * s.w; j++) {
        const Vec h = normalized<A>(v[j], affine, p.norm.present);
        v[j] = rounded(p.residual ? h + residual[j] : h, T{});
      }
    }
  });
}

// Tile i of y is column panel i / rows and row panel i % rows.
inline int64_t mixer_tiles(const MixerStage& stage) {
  const Shape& s = stage.pointwise.shape;
  return RowPanels(s.h * s.w).panels * column_panels(s.c);
}
template <typename T>
inline void mixer_pointwise(const MixerStage& stage, int64_t i, const float* z, int64_t stride, float* y) {
  const PointwiseForward& p = stage.pointwise;
  const PointwiseTables& tables = stage.upper;
  const RowPanels rows(p.shape.h * p.shape.w);
  const int64_t n = i / rows.panels * kGemmColumns, panel = i % rows.panels;
  const int vectors = vectors_of(p.shape.c - n), height = rows.height(panel);
  const MultiplyPlanes kernel = multiply_planes_for(height, vectors);
  float* to = y + n / V * stride + rows.start(panel) * V;
  for (int64_t k = 0; k < tables.depth; k += kGemmDepth) {
    kernel(z + k / V * stride + rows.start(panel) * V, stride, tables.packed + n * tables.depth + k * vectors * V,
           smaller(kGemmDepth, tables.depth - k), to, k > 0);
  }
  with_activation(p.activation, [&](auto act) {
    constexpr int A = decltype(act)::value;
    for (int v = 0; v < vectors; v++, to += stride) {
      const Affine affine = affine_at(tables.table, tables.stride, n + v * V);
      const Vec bias = load(tables.biases + n + v * V);
      Vec* h = reinterpret_cast<Vec*>(to);
      for (int r = 0; r < height; r++) h[r] = rounded(normalized<A>(h[r] + bias, affine, p.norm.present), T{});
    }
  });
}

// The kernel that a plane's margins were cleared for.
struct Cleared {
  int h, w;
};

// Runs an image through all layers, by one thread, or by a team of which every thread calls this. The team shares `x`
// and `z`; each thread has its own `plane`, null if there was no memory.
template <typename T>
void mixer_image(const MixerForward* layers, int64_t count, char* tables, int64_t n, int64_t stride, bool team,
                 float* x, float* z, float* plane, int64_t plane_floats, Cleared& cleared, int& failed) {
  const Shape& s = layers[0].depthwise.shape;
  const Shape out = layers[count - 1].pointwise.shape;
  // Calls f(i) for i in [0, items); the team shares the calls.
  const auto share = [&](int64_t items, auto f) {
    if (!team) {
      for (int64_t i = 0; i < items; i++) f(i);
      return;
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < items; i++) f(i);
  };
  share(blocks_of(s.c), [&](int64_t b) {
    gather(s, static_cast<const T*>(layers[0].depthwise.x), n, b * V, channels_of(s, b * V), 0, s.h * s.w,
           dense(x + b * stride));
  });
  for (int64_t i = 0; i < count; i++) {
    const MixerStage stage(layers[i], tables);
    const Plan& plan = stage.plan;
    if (plane != nullptr && (cleared.h != plan.kh || cleared.w != plan.kw)) zero(plane, plane_floats);
    cleared = {plan.kh, plan.kw};
    share(plan.blocks * plan.row_tiles, [&](int64_t item) {
      if (plane != nullptr) {
        mixer_depthwise<T>(stage, item, x, stride, plane, z);
      } else {
#pragma omp atomic write
        failed = 1;
      }
    });
    share(mixer_tiles(stage), [&](int64_t tile) { mixer_pointwise<T>(stage, tile, z, stride, x); });
  }
  share(blocks_of(out.c), [&](int64_t b) {
    scatter(out, x + b * stride, static_cast<const T*>(nullptr), static_cast<T*>(layers[count - 1].pointwise.y), n,
            b * V, channels_of(out, b * V), 0, s.h * s.w);
  });
}

// The output of layer i is the input of layer i + 1: only the addresses of the first x and the last y are used.
int mixer_forward(const MixerForward* layers, int64_t count) {
  const Shape& s = layers[0].depthwise.shape;
  int64_t bytes = 0, most_blocks = blocks_of(s.c), plane_floats = 0, work = 0;
  for (int64_t i = 0; i < count; i++) {
    const DepthwiseForward p = MixerStage::of_one_image(layers[i].depthwise);
    bytes += MixerStage::bytes(layers[i]);
    most_blocks = larger(most_blocks, blocks_of(layers[i].pointwise.shape.c));
    plane_floats = larger(plane_floats, Plan(p.shape, taps_of(p), false).plane_floats());
    work += p.kh * p.kw + layers[i].pointwise.shape.c;
  }
  // A tile may overrun a block's end. And blocks must not be a multiple of 4 KB apart: they would share L1's sets.
  const int64_t stride = (s.h * s.w + kMaxTile) * V, image_floats = most_blocks * stride;
  const int threads = useful_threads(s, static_cast<int>(work), layers[0].depthwise.threads);
  const bool team = s.n < threads;
  char* const tables = static_cast<char*>(scratch(0, static_cast<size_t>(bytes + (team ? 8 * image_floats : 0))));
  if (tables == nullptr) return 1;
  int failed = 0;

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* plane =
        static_cast<float*>(scratch(1, static_cast<size_t>(plane_floats + (team ? 0 : 2 * image_floats)) * 4));
    float* x = team ? reinterpret_cast<float*>(tables + bytes) : plane + plane_floats;
    float* z = x + image_floats;
    char* memory = tables;
    for (int64_t i = 0; i < count; i++) {
      const MixerStage stage(layers[i], memory);
#pragma omp for schedule(static) nowait
      for (int64_t b = 0; b < stage.plan.blocks; b++) stage.lower.fill(stage.depthwise, stage.plan, b);
#pragma omp for schedule(static) nowait
      for (int64_t c = 0; c < stage.upper.stride; c++) stage.upper.fill_channel(stage.pointwise, c);
#pragma omp for schedule(static) nowait
      for (int64_t j = 0; j < stage.upper.panels; j++) stage.upper.fill_panel(stage.pointwise, j);
    }
    Cleared cleared = {0, 0};
#pragma omp barrier
    with_dtype(s.dtype, [&](auto tag) {
      const auto image = [&](int64_t n) {
        mixer_image<decltype(tag)>(layers, count, tables, n, stride, team, x, z, plane, plane_floats, cleared, failed);
      };
      if (team) {
        for (int64_t n = 0; n < s.n; n++) image(n);
        return;
      }
#pragma omp for schedule(dynamic)
      for (int64_t n = 0; n < s.n; n++) {
        if (plane != nullptr) {
          image(n);
        } else {
#pragma omp atomic write
          failed = 1;
        }
      }
    });
  }
  return failed;
}
