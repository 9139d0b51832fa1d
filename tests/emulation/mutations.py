# SPDX-License-Identifier: MIT
"""The bugs that test_mutations.py plants, by file: to cover a new kernel, add one."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """`old` becomes `new` in `file`; `unit`.cu is compiled and must then fail `check` of check_kernels.py."""

    name: str
    file: str
    unit: str
    check: str
    old: str
    new: str


MUTATIONS = [
    # elementwise.cuh and the kernels that use it
    Mutation(
        "planes: barrier before the warps' partials", "elementwise.cuh", "batch_norm", "norm_backward",
        "if (lane == 0) shared[warp] = partial;\n    __syncthreads();", "if (lane == 0) shared[warp] = partial;",
    ),
    Mutation(
        "rows: barrier before the rows' partials", "elementwise.cuh", "batch_norm", "norm_backward",
        "__syncthreads();\n    for (int i = threadIdx.x; i < stride", "for (int i = threadIdx.x; i < stride",
    ),
    Mutation(
        "planes: store whole windows at edges", "elementwise.cuh", "batch_norm", "normalize",
        "if (vectors && at.first == 0 && at.last == kSize) {\n    store16", "if (vectors) {\n    store16",
    ),
    Mutation(
        "planes: next image not counted", "elementwise.cuh", "batch_norm", "norm_backward",
        "window -= static_cast<int>(g.windows);\n      ++image;", "window -= static_cast<int>(g.windows);",
    ),
    Mutation(
        "planes: parts overlap", "elementwise.cuh", "batch_norm", "norm_backward",
        "const int64_t begin = part * g.items_per_part;", "const int64_t begin = part * (g.items_per_part - 1);",
    ),
    Mutation(
        "planes: one window lost at the end", "elementwise.cuh", "batch_norm", "normalize",
        "item < end + kAhead * kThreads", "item < end + (kAhead - 1) * kThreads",
    ),
    Mutation(
        "rows: a row of the block not added", "elementwise.cuh", "batch_norm", "norm_backward",
        "for (int r = 0; r < rows; ++r)\n#pragma unroll", "for (int r = 1; r < rows; ++r)\n#pragma unroll",
    ),
    Mutation(
        "rows: channels of a vector exchanged", "elementwise.cuh", "batch_norm", "norm_backward",
        "* stride + j * g.lanes + lane] = mine.v[s]", "* stride + (j ^ 1) * g.lanes + lane] = mine.v[s]",
    ),
    Mutation(
        "float32 totals counted twice", "elementwise.cuh", "batch_norm", "norm_backward",
        "wide[s] += total[s], total[s] = 0.f", "wide[s] += total[s]",
    ),
    Mutation(
        "shuffle misses half the warp", "elementwise.cuh", "batch_norm", "norm_backward",
        "for (int offset = 16; offset > 0; offset /= 2) {\n      const Partial",
        "for (int offset = 8; offset > 0; offset /= 2) {\n      const Partial",
    ),
    Mutation(
        "norm backward: mean not subtracted", "batch_norm.cu", "batch_norm", "norm_backward",
        "(elementwise::activate<ACT, T>(a) - k.mean)", "elementwise::activate<ACT, T>(a)",
    ),
    Mutation("normalize: residual lost", "batch_norm.cu", "batch_norm", "normalize", "k.shift) + residual", "k.shift)"),
    Mutation(
        "merge: a lane's parts read twice", "batch_norm.cu", "batch_norm", "statistics",
        "for (int64_t i = lane; i < p.partials_per_channel; i += 32) {\n    const double count = partial[i * 3];",
        "for (int64_t i = lane; i < p.partials_per_channel; i += 31) {\n    const double count = partial[i * 3];",
    ),
    Mutation(
        "merge: empty parts counted", "batch_norm.cu", "batch_norm", "statistics",
        "if (count > 0.0) m2 +=", "m2 +=",
    ),
    Mutation(
        "normalize: biased running variance", "batch_norm.cu", "batch_norm", "normalize",
        "count > 1.0 ? count - 1.0 : 1.0", "count",
    ),
    Mutation(
        "normalize: running statistics of the first block alone", "batch_norm.cu", "batch_norm", "normalize",
        "i < kMostUpdates; ++i", "i < 1; ++i",
    ),
    Mutation(
        "normalize: threads for the first block's channels", "batch_norm.cu", "batch_norm", "normalize",
        "return std::max(updates[0].c, updates[1].c);", "return updates[0].c;",
    ),
    Mutation(
        "normalize: running statistics beyond the last channel", "batch_norm.cu", "batch_norm", "normalize",
        "if (c >= p.c) return;", "if (c > p.c) return;",
    ),
    Mutation(
        "statistics: window's moments with another mean", "elementwise.cuh", "pointwise", "pointwise_statistics",
        "value[0][j] - window.mean : 0.f", "value[0][j] : 0.f",
    ),
    Mutation(
        "statistics: count of the rows", "elementwise.cuh", "pointwise", "pointwise_statistics",
        "count += 1.f;", "count += 2.f;",
    ),
    Mutation(
        "prologue: derivative without the scale's slope", "pointwise.cu", "pointwise", "pointwise_grad",
        "if (sums.dy != nullptr) dh = fmaf(k.slope, h.value - k.mean, dh);", "",
    ),
    Mutation(
        "prologue: a channel's parts", "pointwise.cu", "pointwise", "pointwise_grad",
        "add_parts(partials + c * parts, parts)", "add_parts(partials + c, parts)",
    ),
    # depthwise on tensor cores
    Mutation(
        "contiguous: copies not awaited", "depthwise_mma_contiguous.cuh", "depthwise_forward", "forward_bfloat16",
        "cp_async_wait<kStages - 2>();", "",
    ),
    Mutation(
        "contiguous: barrier after the copies", "depthwise_mma_contiguous.cuh", "depthwise_forward", "forward_bfloat16",
        "__syncthreads();\n      copy_ahead(kStages - 1,", "copy_ahead(kStages - 1,",
    ),
    Mutation(
        "contiguous: next item's address", "depthwise_mma_contiguous.cuh", "depthwise_forward", "forward_bfloat16",
        "static_cast<const unsigned char*>(p.x) + first_plane(c, item)",
        "static_cast<const unsigned char*>(p.x) + first_plane(c, 0)",
    ),
    Mutation(
        "contiguous: the next channel's copies from this one", "depthwise_mma_contiguous.cuh", "depthwise_forward",
        "forward_bfloat16", "item -= plan.items, ++channel;", "item -= plan.items;",
    ),
    Mutation(
        "contiguous: the table of the channel before", "depthwise_mma_contiguous.cuh", "depthwise_forward",
        "forward_bfloat16", "build_table<T, GRAD, S>(table, p, c,", "build_table<T, GRAD, S>(table, p, 0,",
    ),
    Mutation(
        "contiguous: a block's place in a channel", "depthwise_mma_contiguous.cuh", "depthwise_forward",
        "forward_bfloat16", "blockIdx.x - before / plan.run", "blockIdx.x % plan.splits",
    ),
    Mutation(
        "contiguous: places left over not cleared", "depthwise_mma_contiguous.cuh", "depthwise_forward",
        "forward_bfloat16", "current == plan.items ? plan.splits : place + 1", "place + 1",
    ),
    Mutation(
        "contiguous: a run's last items", "depthwise_mma_contiguous.cuh", "depthwise_forward",
        "forward_bfloat16", "if (current + ahead < stop) {", "if (current + ahead + 1 < stop) {",
    ),
    Mutation(
        "contiguous: the warps' moments not merged", "depthwise_mma_contiguous.cuh", "depthwise_forward",
        "forward_bfloat16", "moments = merge(moments, of_warps[i]);", ";",
    ),
    Mutation(
        "contiguous, input gradient: copies not awaited", "depthwise_mma_contiguous.cuh", "depthwise_input_grad",
        "input_grad_bfloat16", "cp_async_wait<kStages - 2>();", "",
    ),
    Mutation(
        "contiguous, input gradient: da beside the image", "depthwise_mma_contiguous.cuh", "depthwise_input_grad",
        "input_grad_bfloat16", "da = keep_first(da, count);", "",
    ),
    Mutation(
        "spans: read before the other threads' copies", "depthwise_mma_contiguous.cuh", "depthwise_forward",
        "forward_bfloat16", "and every warp is done with the tiles\n        __syncthreads();", "",
    ),
    Mutation(
        "spans: the stage of the copies", "depthwise_mma_contiguous.cuh", "depthwise_input_grad", "input_grad_bfloat16",
        "spans ? stage : stage == 0", "spans ? stage ^ 1 : stage == 0",
    ),
    Mutation(
        "spans: the tile's columns", "depthwise_mma_contiguous.cuh", "depthwise_forward", "forward_bfloat16",
        ": x - max(0, item.column - 8 * S));", ": x - item.column + 8 * S);",
    ),
    Mutation(
        "spans: what lies behind a row", "spans.cuh", "depthwise_forward", "forward_bfloat16",
        "return keep_first(make_uint4(w[0], w[1], w[2], w[3]), count);", "return make_uint4(w[0], w[1], w[2], w[3]);",
    ),
    Mutation(
        "spans: odd starts", "spans.cuh", "depthwise_input_grad", "input_grad_bfloat16",
        "element & 1 ? 0x5432u : 0x3210u", "0x3210u",
    ),
    Mutation(
        "spans: a copy across the tensor's end", "spans.cuh", "depthwise_forward", "forward_bfloat16",
        "if (end - from >= 8) {", "if (end - from > 0) {",
    ),
    Mutation(
        "channels_last, input gradient: da beside the image", "depthwise_mma_channels_last.cuh", "depthwise_input_grad",
        "input_grad_bfloat16_channels_last", "keep_range(value, o.from, o.to)", "value",
    ),
    Mutation(
        "channels_last, input gradient: a not transposed", "depthwise_mma_channels_last.cuh", "depthwise_input_grad",
        "input_grad_bfloat16_channels_last", "          transpose8(v);", "",
    ),
    Mutation(
        "channels_last: copies not awaited", "depthwise_mma_channels_last.cuh", "depthwise_forward",
        "forward_bfloat16_channels_last", "cp_async_wait<0>();", "",
    ),
    Mutation(
        "channels_last: inputs not transposed", "depthwise_mma_channels_last.cuh", "depthwise_forward",
        "forward_bfloat16_channels_last", "  transpose8(v);\n}", "}",
    ),
    Mutation(
        "weight gradient: the last copy not awaited", "depthwise_weight_grad_warp.cuh", "depthwise_weight_grad",
        "weight_grad_bfloat16", "cp_async_wait<1>();", "cp_async_wait<2>();",
    ),
    Mutation(
        "weight gradient: stages not exchanged", "depthwise_weight_grad_warp.cuh", "depthwise_weight_grad",
        "weight_grad_bfloat16", "    stage ^= 1;\n", "",
    ),
    Mutation(
        "weight gradient: the next unit's copy", "depthwise_weight_grad_warp.cuh", "depthwise_weight_grad",
        "weight_grad_bfloat16", "const int next = index + 2 * step;", "const int next = index + step;",
    ),
    Mutation(
        "weight gradient: db of one lane", "depthwise_weight_grad_warp.cuh", "depthwise_weight_grad",
        "weight_grad_bfloat16", "db = warp_sum(db);", "",
    ),
    Mutation(
        "weight gradient, octets: barrier before da", "depthwise_weight_grad_block.cuh", "depthwise_weight_grad",
        "weight_grad_bfloat16_channels_last", "      __syncthreads();\n      finish_da(", "      finish_da(",
    ),
    Mutation(
        "weight gradient, octets: not transposed", "depthwise_weight_grad_block.cuh", "depthwise_weight_grad",
        "weight_grad_bfloat16_channels_last", "  transpose8(v);", "",
    ),
    Mutation(
        "weight gradient, octets: da beside the image", "depthwise_weight_grad_block.cuh", "depthwise_weight_grad",
        "weight_grad_bfloat16_channels_last", "j < columns ? k.offset : 0.f", "k.offset",
    ),
    Mutation(
        "weight gradient, large kernels: copies not awaited", "depthwise_weight_grad_block.cuh", "depthwise_weight_grad",
        "weight_grad_bfloat16", "      cp_async_wait<1>();\n", "",
    ),
    Mutation(
        "weight gradient, large kernels: stages not exchanged", "depthwise_weight_grad_block.cuh",
        "depthwise_weight_grad", "weight_grad_bfloat16", "      stage ^= 1;\n", "",
    ),
    Mutation(
        "weight gradient, large kernels: barrier before the next copies", "depthwise_weight_grad_block.cuh",
        "depthwise_weight_grad", "weight_grad_bfloat16", "    __syncthreads();\n    if constexpr (CHANNELS == 0) {",
        "    if constexpr (CHANNELS == 0) {",
    ),
    Mutation(
        "weight gradient, spans: read before the other threads' copies", "depthwise_weight_grad_block.cuh",
        "depthwise_weight_grad", "weight_grad_bfloat16", "// the other threads' pieces\n        __syncthreads();", "",
    ),
    Mutation(
        "weight gradient, spans: rows of another image", "depthwise_weight_grad_block.cuh", "depthwise_weight_grad",
        "weight_grad_bfloat16", "(row - image * s.rows) * p.w : 0", "row * p.w : 0",
    ),
    Mutation(
        "weight gradient, spans: a copy across the tensor's end", "spans.cuh", "depthwise_weight_grad",
        "weight_grad_bfloat16", "if (end - from >= 8) {", "if (end - from > 0) {",
    ),
    Mutation(
        "shared memory: static arrays not counted", "device.cuh", "depthwise_weight_grad", "weight_grad_bfloat16",
        "bytes + kStaticShared <= 48 * 1024", "bytes <= 48 * 1024",
    ),
    Mutation(
        "input gradient: NaN not settled", "depthwise_mma.cuh", "depthwise_input_grad", "nan_input_grad_bfloat16",
        "if (value != value) *out", "if (false) *out",
    ),
    Mutation(
        "input gradient: act(a) of constant statistics", "depthwise_mma.cuh", "depthwise_input_grad",
        "nan_input_grad_bfloat16_channels_last", "p.sums.dy == nullptr ? 0.f : fmaf", "fmaf",
    ),
    # depthwise on FMA units
    Mutation(
        "fma: copies not awaited", "depthwise_fma.cu", "depthwise_fma", "forward_float32",
        "cp_async_wait<0>();\n  __syncthreads();", "__syncthreads();",
    ),
    Mutation(
        "fma: barrier after the copies", "depthwise_fma.cu", "depthwise_fma", "forward_float32_channels_last",
        "cp_async_wait<0>();\n  __syncthreads();", "cp_async_wait<0>();",
    ),
    Mutation(
        "fma: da without its offset", "depthwise_fma.cuh", "depthwise_fma", "input_grad_float32",
        "fmaf(k.w, d.v[j], k.x)", "k.w * d.v[j]",
    ),
    Mutation(
        "fma: a patch's last row not counted", "depthwise_fma.cu", "depthwise_fma", "forward_float32",
        "(rows[0] + rows[1]) + (rows[2] + rows[3])", "(rows[0] + rows[1]) + rows[2]",
    ),
    Mutation(
        "fma: NaN beside the filter in the forward", "depthwise_fma.cu", "depthwise_fma", "nan_forward_float32",
        "trace != trace && has_zeros<L>(t)) settle_forward<T, L>(p, t, weights);\n    return;", "false) return;\n    return;",
    ),
    Mutation(
        "fma: NaN beside the filter in the input gradient", "depthwise_fma.cu", "depthwise_fma",
        "nan_input_grad_float32", "if (trace != trace && has_zeros<L>(t)) settle_input_grad", "if (false) settle_input_grad",
    ),
    Mutation(
        "fma weight gradient: copies not awaited", "depthwise_fma_weight_grad.cu", "depthwise_fma_weight_grad",
        "weight_grad_float32", "cp_async_wait<0>();", "",
    ),
    # pointwise on tensor cores
    Mutation(
        "gemm: stages not awaited", "pointwise_mma.cuh", "pointwise_gemm", "pointwise_forward_bfloat16",
        "cp_async_wait<kStages - 2>();\n        __syncthreads();", "__syncthreads();",
    ),
    Mutation(
        "gemm: a stage read before the other threads' copies", "pointwise_mma.cuh", "pointwise_gemm",
        "pointwise_forward_bfloat16", "cp_async_wait<kStages - 2>();\n        __syncthreads();",
        "cp_async_wait<kStages - 2>();",
    ),
    Mutation(
        "gemm: the last stage awaited too late", "pointwise_mma.cuh", "pointwise_gemm", "pointwise_forward_bfloat16",
        "cp_async_wait<kStages - 2>();\n        __syncthreads();", "cp_async_wait<kStages - 1>();\n        __syncthreads();",
    ),
    Mutation(
        "gemm: a stage overwritten while it is read", "pointwise_mma.cuh", "pointwise_gemm",
        "pointwise_forward_bfloat16", "copy(free);", "copy(current);",
    ),
    Mutation(
        "gemm: K beyond C_in not zero", "pointwise_mma.cuh", "pointwise_gemm", "pointwise_forward_bfloat16",
        "cp_async<16>(target, source, left > i * kStep ? 16 : 0);", "cp_async<16>(target, source, count > 0 ? 16 : 0);",
    ),
    Mutation(
        "gemm: the swizzle of one side", "pointwise_mma.cuh", "pointwise_gemm", "pointwise_forward_bfloat16",
        "b_stage + k * 32 * NT + (piece ^ (k % 8)) * 16", "b_stage + k * 32 * NT + (piece ^ (k % 4)) * 16",
    ),
    Mutation(
        "gemm: an image's end not noticed", "pointwise_mma.cuh", "pointwise_gemm", "pointwise_forward_bfloat16",
        "if (++position == plane) position = 0, at += jump;", "++position;",
    ),
    Mutation(
        "gemm: bias of another row", "pointwise_epilogue.cuh", "pointwise_gemm", "pointwise_forward_bfloat16",
        "row + W::kStep * i + g + 8 * (e / 2);\n  }", "row + W::kStep * i + g + 8 * (e % 2);\n  }",
    ),
    Mutation(
        "gemm: staged results not awaited", "pointwise_epilogue.cuh", "pointwise_gemm", "pointwise_forward_bfloat16",
        "    __syncwarp();\n  }", "  }",
    ),
    Mutation(
        "gemm: results past the tensor", "pointwise_epilogue.cuh", "pointwise_gemm", "pointwise_forward_bfloat16_channels_last",
        "const int count = clamp_count(rows - row, W::kStep * W::MT);", "const int count = W::kStep * W::MT;",
    ),
    Mutation(
        "gemm: statistics of pixels that do not exist", "pointwise_epilogue.cuh", "pointwise_gemm",
        "pointwise_forward_bfloat16_channels_last", "if (pixels == W::kPixels) {", "if (pixels > 0) {",
    ),
    Mutation(
        "gemm: the other warp's moments", "pointwise_epilogue.cuh", "pointwise_gemm", "pointwise_forward_bfloat16",
        "m = merge(m, shared.moments[i][thread]);", ";",
    ),
    Mutation(
        "gemm: moments read before they are written", "pointwise_epilogue.cuh", "pointwise_gemm",
        "pointwise_forward_bfloat16_channels_last", "sync();\n  if (thread < W::kChannels &&", "if (thread < W::kChannels &&",
    ),
    Mutation(
        "gemm: a lane's channels after the merge", "pointwise_tile.cuh", "pointwise_gemm", "pointwise_forward_bfloat16",
        "return (upper ? kKeep : 0) +", "return",
    ),
    Mutation(
        "gemm: tiles of the last group of channels", "pointwise_tile.cuh", "pointwise_gemm", "pointwise_forward_bfloat16",
        "left < GROUP ? left : GROUP", "GROUP",
    ),
    # pointwise with wgmma
    Mutation(
        "wgmma: copies not awaited", "pointwise_wgmma.cuh", "pointwise_gemm", "pointwise_wgmma",
        "barrier_wait(&shared.full[stage], n / STAGES);", "",
    ),
    Mutation(
        "wgmma: phases of a free stage", "pointwise_wgmma.cuh", "pointwise_gemm", "pointwise_wgmma",
        "n / STAGES - 1", "n / STAGES",
    ),
    Mutation(
        "wgmma: a stage released before it is read", "pointwise_wgmma.cuh", "pointwise_gemm", "pointwise_wgmma",
        "wgmma_wait<1>();", "wgmma_wait<2>();",
    ),
    Mutation(
        "wgmma: results read before the products", "pointwise_wgmma.cuh", "pointwise_gemm", "pointwise_wgmma",
        "wgmma_wait<0>();", "",
    ),
    Mutation(
        "wgmma: the last stage not released", "pointwise_wgmma.cuh", "pointwise_gemm", "pointwise_wgmma",
        "wgmma_wait<0>();\n  if (signals)", "wgmma_wait<0>();\n  if (false)",
    ),
    Mutation(
        "wgmma: both boxes of one image", "pointwise_wgmma.cuh", "pointwise_gemm", "pointwise_wgmma",
        "k, static_cast<int>(images[h]));", "k, static_cast<int>(images[0]));",
    ),
    Mutation(
        "wgmma: step of K in a transposed operand", "pointwise_wgmma.cuh", "pointwise_gemm", "pointwise_wgmma",
        "k * (TRANSPOSED_B ? 16 * 128 : 32)", "k * 32",
    ),
    Mutation(
        "wgmma: columns 64 to 127", "pointwise_wgmma.cuh", "pointwise_gemm", "pointwise_wgmma",
        "TRANSPOSED_B ? kOperandBytes / 2 : 16, 1024", "1024, 1024",
    ),
    Mutation(
        "wgmma: groups out of turn", "pointwise_wgmma.cuh", "pointwise_gemm", "pointwise_wgmma_channels_last",
        "++round) {", "round += 2) {",
    ),
    Mutation(
        "wgmma: no turns", "pointwise_wgmma.cuh", "pointwise_gemm", "pointwise_wgmma_channels_last",
        "barrier_wait(&shared.turn[group], group == 0 ? round - 1 : round);", "",
    ),
    Mutation(
        "wgmma: a turn taken twice", "pointwise_wgmma.cuh", "pointwise_gemm", "pointwise_wgmma_channels_last",
        "group == 0 ? round - 1 : round", "round - 1",
    ),
    Mutation(
        "wgmma: one barrier for both groups", "pointwise_wgmma.cuh", "pointwise_gemm", "pointwise_wgmma_channels_last",
        "named_barrier(1 + group, 128)", "named_barrier(1, 128)",
    ),
    # the weight gradient with wgmma
    Mutation(
        "wgmma dw: slots of a tile left over", "pointwise_weight_grad.cu", "pointwise_weight_grad", "pointwise_weight_grad",
        "p.whole ? 1 : p.chunks;", "p.whole ? 1 : p.chunks - 1;",
    ),
    Mutation(
        "wgmma dw: the next part's slot", "pointwise_weight_grad.cu", "pointwise_weight_grad", "pointwise_weight_grad",
        "slot + k * p.rest * kSlot", "slot + k * kSlot",
    ),
    Mutation(
        "wgmma dw: the tile of a part", "pointwise_weight_grad.cu", "pointwise_weight_grad", "pointwise_weight_grad",
        "i - chunk * p.rest);", "i - chunk);",
    ),
    Mutation(
        "wgmma dw: where a part begins", "pointwise_weight_grad.cu", "pointwise_weight_grad", "pointwise_weight_grad",
        "chunk * p.steps / p.chunks", "chunk * (p.steps / p.chunks)",
    ),
    Mutation(
        "wgmma dw: K begins anew in each part", "pointwise_weight_grad.cu", "pointwise_weight_grad", "pointwise_weight_grad",
        "step = first_step(chunk), image", "step = 0, image",
    ),
    Mutation(
        "wgmma dw: an image's end not noticed", "pointwise_weight_grad.cu", "pointwise_weight_grad", "pointwise_weight_grad",
        "if (position == plane) position = 0, ++image;", "",
    ),
    Mutation(
        "wgmma dw: the same image again", "pointwise_weight_grad.cu", "pointwise_weight_grad", "pointwise_weight_grad",
        "position = 0, ++image;", "position = 0;",
    ),
    Mutation(
        "wgmma dw: a part begins at its image's first pixel", "pointwise_weight_grad.cu", "pointwise_weight_grad", "pointwise_weight_grad",
        "(step - image * per_image) * kHopperDepth, image", "0, image",
    ),
    Mutation(
        "wgmma dw: a part begins in the first image", "pointwise_weight_grad.cu", "pointwise_weight_grad", "pointwise_weight_grad",
        "image = step / per_image;", "image = 0;",
    ),
    Mutation(
        "wgmma dw: rows 64 to 127", "pointwise_weight_grad.cu", "pointwise_weight_grad", "pointwise_weight_grad",
        "(64 * m + 4 * e)", "(16 * m + 4 * e)",
    ),
    Mutation(
        "wgmma dw: channels of x from those of da", "pointwise_weight_grad.cu", "pointwise_weight_grad", "pointwise_weight_grad",
        "position, column, image);", "position, row, image);",
    ),
    Mutation(
        "wgmma dw: another order of tiles in the sum", "pointwise_weight_grad.cu", "pointwise_weight_grad", "pointwise_weight_grad",
        "locate_tile<kGradGroup>(p.out_tiles, p.in_tiles, index)", "locate_tile<kGroup>(p.out_tiles, p.in_tiles, index)",
    ),
    Mutation(
        "wgmma dw: results past a row's end", "pointwise_weight_grad.cu", "pointwise_weight_grad", "pointwise_weight_grad",
        "if (column + e < p.c_in) target", "target",
    ),
    Mutation(
        "wgmma dw: stages of the other group's item", "pointwise_wgmma.cuh", "pointwise_weight_grad", "pointwise_weight_grad",
        "n += steps + steps_of(i + gridDim.x);", "n += 2 * steps;",
    ),
    Mutation(
        "wgmma dw: the second group begins with the first", "pointwise_wgmma.cuh", "pointwise_weight_grad", "pointwise_weight_grad",
        "group == 0 ? 0 : steps_of(blockIdx.x);", "0;",
    ),
    Mutation(
        "wgmma dw: no turns", "pointwise_wgmma.cuh", "pointwise_weight_grad", "pointwise_weight_grad",
        "barrier_wait(&shared.turn[group], group == 0 ? round - 1 : round);", "",
    ),
    Mutation(
        "wgmma dw: the next turn is one's own", "pointwise_wgmma.cuh", "pointwise_weight_grad", "pointwise_weight_grad",
        "shared.turn[(group + 1) % kHopperGroups]", "shared.turn[group]",
    ),
    # pointwise on FMA units
    Mutation(
        "gemm, fma: stages not awaited", "pointwise_fma.cuh", "pointwise_gemm", "pointwise_forward_float32",
        "cp_async_wait<kFmaStages - 2>();", "",
    ),
    Mutation(
        "gemm, fma: a stage overwritten while it is read", "pointwise_fma.cuh", "pointwise_gemm",
        "pointwise_forward_float32", "__syncthreads();\n    copy(free", "copy(free",
    ),
    Mutation(
        "gemm, fma: columns of a thread", "pointwise_fma.cuh", "pointwise_gemm",
        "pointwise_forward_float32_channels_last", "return j / 4 * 64 + 4 * tx + j % 4;", "return j / 4 * 64 + tx + j % 4;",
    ),
    # a layer in one kernel
    Mutation(
        "mixer: patches not awaited", "mixer.cuh", "mixer", "mixer",
        "cp_async_wait<0>();\n    __syncwarp();", "__syncwarp();",
    ),
    Mutation(
        "mixer: a patch read before the other lanes' copies", "mixer.cuh", "mixer", "mixer",
        "cp_async_wait<0>();\n    __syncwarp();", "cp_async_wait<0>();",
    ),
    Mutation(
        "mixer: fragments of the next row", "mixer.cuh", "mixer", "mixer",
        "(r % 2 * (kPatchRows / 2) + r / 2)", "(r % 2 * (kPatchRows / 2) + (r + 1) / 2)",
    ),
    Mutation(
        "mixer: the right tile's columns", "mixer.cuh", "mixer", "mixer",
        "block = lane / 16 + lane / 8 % 2;", "block = lane / 16;",
    ),
    Mutation(
        "mixer: the next channel's address", "mixer.cuh", "mixer", "mixer",
        "plane += next;", "",
    ),
    Mutation(
        "mixer: even kernels beside the middle", "mixer.cuh", "mixer", "mixer",
        "column + 7 + kHalo - q.left", "column + 7 + kHalo - q.kw / 2",
    ),
    Mutation(
        "mixer: the residual of another row", "mixer.cuh", "mixer", "mixer",
        "inputs.a[s + kHalo], identity", "inputs.a[s + kHalo + 1], identity",
    ),
    Mutation(
        "mixer: a row's end not noticed", "mixer.cuh", "mixer", "mixer",
        "const int left = w - source % w;", "const int left = 4;",
    ),
    Mutation(
        "mixer: z's channels beyond C not zero", "mixer.cuh", "mixer", "mixer",
        "store16(z + i, make_uint4(0, 0, 0, 0));", ";",
    ),
    Mutation(
        "mixer: the swizzle of one side", "mixer.cuh", "mixer", "mixer",
        "((b_piece + j / 2) ^ lane % 8) * 16", "((b_piece + j / 2) ^ lane % 4) * 16",
    ),
    Mutation(
        "mixer: the weight's stages not awaited", "mixer.cuh", "mixer", "mixer",
        "cp_async_wait<kStages - 2>();", "",
    ),
    Mutation(
        "mixer: a stage overwritten while it is read", "mixer.cuh", "mixer", "mixer",
        "copy(stage == 0 ? kStages - 1 : stage - 1);", "copy(stage);",
    ),
    Mutation(
        "mixer: z read before the other warps' part", "mixer.cuh", "mixer", "mixer",
        "const bool settles = __syncthreads_or(!was_finite<T>(trace));", "const bool settles = !was_finite<T>(trace);",
    ),
    Mutation(
        "mixer: results of another lane", "mixer.cuh", "mixer", "mixer",
        "transpose_quad(words[1]);", "",
    ),
]  # fmt: skip
