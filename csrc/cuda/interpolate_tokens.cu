// Feature maps of packed images, resized; the maths is in patchpack.reference.interpolate_tokens.
#include "../grid.h"
#include "../resample.h"
#include "threads.cuh"

namespace patchpack {

using Mode = ResampleMode;

// A token of a map, that map's size and the other's, and the first token of its frame there.
struct Spot {
  int32_t row, col, height, width, other_height, other_width, in_frame;
  int64_t start;
};

// Maps whose tokens threads make, and the others, whose tokens they read.
struct Maps {
  Geometry made, other;
  int32_t merge, other_merge;

  HOST_DEVICE Spot find(int64_t token) const {
    const int64_t grid = made.find(token);
    const int32_t height = made.height(grid), width = made.width(grid);
    const int32_t other_height = other.height(grid), other_width = other.width(grid);
    const int32_t in_grid = token - made.first(grid), frame = in_grid / (height * width);
    const int32_t in_frame = in_grid - frame * (height * width);
    const Cell cell = token_to_cell(in_frame, width, merge);
    const int64_t start = other.first(grid) + (int64_t)frame * (other_height * other_width);
    return {(int32_t)cell.row, (int32_t)cell.col, height,   width,
            other_height,      other_width,       in_frame, start};
  }
};

// Vectors of a token that a thread makes: they share its coordinates and weights.
constexpr int kVectors = 4;

// What a kernel is compiled for.
template <typename V, Mode kMode, bool kAntialias>
struct Variant {
  using Vector = V;
  static constexpr Mode mode = kMode;
  static constexpr int kLanes = V::kLanes;
  static constexpr bool kNormalised = kAntialias || kMode == Mode::area;
  // inputs on an axis that every output reads, or 0 where their number depends on the sizes
  static constexpr int kTaps = Filter{kMode, false, kAntialias}.num_taps();

  HOST_DEVICE static Filter filter(bool align_corners) {
    return {kMode, align_corners, kAntialias};
  }
};

struct Arguments {
  const void* x;
  void* out;
  void* saved;  // [T', C] where the maximum is, or [T'] what normalises
  Maps maps;
  int64_t stride, num_vectors, num_threads;  // of a token, in vectors
  bool align_corners;

  HOST_DEVICE bool exists(int64_t first, int v) const {
    return first + v * num_threads < num_vectors;
  }
};

// A thread makes vectors of a token of `out`.
template <typename Variant>
struct Resize : Arguments {
  using V = typename Variant::Vector;
  using Ints = Vector<int32_t, V::kLanes>;
  static constexpr int kLanes = Variant::kLanes, kTaps = Variant::kTaps;
  static constexpr bool kMax = Variant::mode == Mode::max;

  HOST_DEVICE void operator()(int64_t thread) const {
    const int64_t token = thread / num_threads, first = thread - token * num_threads;
    const Spot spot = maps.find(token);
    const int32_t height = spot.other_height, width = spot.other_width;
    const Filter filter = Variant::filter(align_corners);
    const ResampledAxis y_axis = resampled_axis(filter, height, spot.height);
    const ResampledAxis x_axis = resampled_axis(filter, width, spot.width);
    const Taps ys = find_taps(filter, y_axis, spot.row), xs = find_taps(filter, x_axis, spot.col);
    const V* frame = (const V*)x + spot.start * stride + first;

    float sums[kVectors][kLanes], total = 0.0f;
    Ints argmax[kVectors];
    const int32_t first_tap = cell_to_token((int32_t)ys.first, xs.first, width, maps.other_merge);
    for (int v = 0; v < kVectors; ++v)
      for (int i = 0; i < kLanes; ++i) {
        sums[v][i] = kMax ? -INFINITY : 0.0f;
        argmax[v].lanes[i] = first_tap;
      }
    for (int32_t ky = 0; ky < (kTaps ? kTaps : ys.count); ++ky) {
      const int32_t row = inside(ys.first + ky, height);
      const float y_weight = weight_at(filter, y_axis, ys.distance + ky * y_axis.unit);
      // many taps: row by row, so that float sums few numbers at a time
      float row_sums[kVectors][kLanes] = {}, row_total = 0.0f;
      for (int32_t kx = 0; kx < (kTaps ? kTaps : xs.count); ++kx) {
        const int32_t col = inside(xs.first + kx, width);
        const float x_weight = weight_at(filter, x_axis, xs.distance + kx * x_axis.unit);
        const float weight = y_weight * x_weight;
        const int32_t tap = cell_to_token(row, col, width, maps.other_merge);
        const V* source = frame + tap * stride;
        row_total += x_weight;
        float values[kVectors][kLanes];
        for (int v = 0; v < kVectors; ++v)
          load_if(weight != 0.0f && exists(first, v), source + v * num_threads, values[v]);
        for (int v = 0; v < kVectors; ++v)
          for (int i = 0; i < kLanes; ++i) {
            const float value = values[v][i];
            if constexpr (kMax) {
              if (value > sums[v][i] || value != value) {  // the first wins, and NaN over numbers
                sums[v][i] = value;
                argmax[v].lanes[i] = tap;
              }
            } else if constexpr (Variant::kNormalised) {
              row_sums[v][i] += x_weight * value;
            } else {
              sums[v][i] += weight * value;
            }
          }
      }
      if constexpr (Variant::kNormalised) {
        total += y_weight * row_total;
        for (int v = 0; v < kVectors; ++v)
          for (int i = 0; i < kLanes; ++i) sums[v][i] += y_weight * row_sums[v][i];
      }
    }

    const float scale = Variant::kNormalised ? 1.0f / total : 1.0f;
    if (Variant::kNormalised && first == 0) ((float*)saved)[token] = scale;
    for (int v = 0; v < kVectors; ++v)
      if (exists(first, v)) {
        const int64_t place = token * num_vectors + first + v * num_threads;
        if constexpr (kMax) ((Ints*)saved)[place] = argmax[v];
        for (int i = 0; i < kLanes; ++i) sums[v][i] *= scale;
        store((V*)out + place, sums[v]);
      }
  }

  // What lies past a border is the border.
  HOST_DEVICE static int32_t inside(int32_t i, int32_t count) {
    return i < 0 ? 0 : i < count ? i : count - 1;
  }
};

// Outputs `[first, first + count)` that may read an input, the first of them at `distance`.
struct Readers {
  int32_t first, count;
  int64_t distance;
};

HOST_DEVICE Readers find_readers(Filter filter, const ResampledAxis& a, int32_t i) {
  const int64_t step = a.slope > 1 ? a.slope : 1;
  int64_t reach = a.size;
  if (filter.mode == Mode::bicubic) reach = 2 * a.size;
  if (filter.mode == Mode::nearest) reach = a.size + step;  // float may round to the neighbour
  const int64_t center = i * a.unit - a.offset;
  const int64_t begin = center - reach + step, end = center + reach - 1;
  const int64_t first = begin > 0 ? begin / step : 0, last = end > 0 ? end / step : 0;
  const int64_t count = (last < a.num_out ? last + 1 : a.num_out) - first;
  return {(int32_t)first, (int32_t)count, center - first * a.slope};
}

// The weight of input `i` in output `o`, `distance` from it, up to what normalises the output.
template <int kTaps>
HOST_DEVICE float weight_in(Filter filter, const ResampledAxis& a, int32_t o, int32_t i,
                            int64_t distance) {
  if (filter.mode == Mode::nearest) return nearest_input(a, o) == i ? 1.0f : 0.0f;
  float weight = weight_at(filter, a, distance);
  for (int k = 1; k <= kTaps / 2; ++k) {  // what lies past a border counts for it
    if (i == 0) weight += weight_at(filter, a, distance - k * a.unit);
    if (i == a.num_in - 1) weight += weight_at(filter, a, distance + k * a.unit);
  }
  return weight;
}

// A thread gathers vectors of the gradient of a token of `x`: here `x` is the gradient of the
// output, and `out` that of the input.
template <typename Variant>
struct ResizeBackward : Arguments {
  using V = typename Variant::Vector;
  using Ints = Vector<int32_t, V::kLanes>;
  static constexpr int kLanes = Variant::kLanes, kTaps = Variant::kTaps;

  HOST_DEVICE void operator()(int64_t thread) const {
    const int64_t token = thread / num_threads, first = thread - token * num_threads;
    const Spot spot = maps.find(token);
    const Filter filter = Variant::filter(align_corners);
    const ResampledAxis y_axis = resampled_axis(filter, spot.height, spot.other_height);
    const ResampledAxis x_axis = resampled_axis(filter, spot.width, spot.other_width);
    const Readers ys = find_readers(filter, y_axis, spot.row);
    const Readers xs = find_readers(filter, x_axis, spot.col);

    // grad_x[i, j] = sum_{o, p} Wh[o, i] Ww[p, j] grad[o, p]
    float sums[kVectors][kLanes] = {};
    for (int32_t ky = 0; ky < ys.count; ++ky) {
      const int32_t row = ys.first + ky;
      const float y_weight = weight_in<kTaps>(filter, y_axis, row, spot.row,
                                              ys.distance - ky * y_axis.slope);
      if (y_weight == 0.0f) continue;
      for (int32_t kx = 0; kx < xs.count; ++kx) {
        const int32_t col = xs.first + kx;
        float weight = y_weight * weight_in<kTaps>(filter, x_axis, col, spot.col,
                                                   xs.distance - kx * x_axis.slope);
        if (weight == 0.0f) continue;
        const int64_t reader =
            spot.start + cell_to_token(row, col, spot.other_width, maps.other_merge);
        if constexpr (Variant::kNormalised) weight *= ((const float*)saved)[reader];
        const V* source = (const V*)x + reader * stride + first;
        const Ints* argmax = (const Ints*)saved + reader * num_vectors + first;
        float grads[kVectors][kLanes];
        for (int v = 0; v < kVectors; ++v) {
          load_if(exists(first, v), source + v * num_threads, grads[v]);
          if constexpr (Variant::mode == Mode::max)
            if (exists(first, v)) {
              const Ints from = argmax[v * num_threads];
              for (int i = 0; i < kLanes; ++i)
                if (from.lanes[i] != spot.in_frame) grads[v][i] = 0.0f;
            }
        }
        for (int v = 0; v < kVectors; ++v)
          for (int i = 0; i < kLanes; ++i) sums[v][i] += weight * grads[v][i];
      }
    }
    for (int v = 0; v < kVectors; ++v)
      if (exists(first, v)) store((V*)out + token * num_vectors + first + v * num_threads, sums[v]);
  }
};

// Runs the kernel for the dtype, alignment and mode.
template <template <typename> typename Kernel>
void launch(const Tensor& x, Arguments arguments, int64_t num_tokens,
            const std::string& mode, bool antialias) {
  const auto fits = [&](int lanes) {
    return x.size(1) % lanes == 0 && aligned(x, lanes, {x.stride(0)});
  };
  with_vector<false>(x.scalar_type(), fits, [&](auto vector) {
    using V = decltype(vector);
    arguments.stride = x.stride(0) / V::kLanes;
    arguments.num_vectors = x.size(1) / V::kLanes;
    arguments.num_threads = (arguments.num_vectors + kVectors - 1) / kVectors;
    const auto run = [&](auto variant) {
      for_each(num_tokens * arguments.num_threads, x, Kernel<decltype(variant)>{arguments});
    };
    if (mode == "area") return run(Variant<V, Mode::area, false>{});
    if (mode == "max") return run(Variant<V, Mode::max, false>{});
    if (mode == "nearest") return run(Variant<V, Mode::nearest, false>{});
    const bool bilinear = mode == "bilinear";
    if (antialias && bilinear) return run(Variant<V, Mode::bilinear, true>{});
    if (antialias) return run(Variant<V, Mode::bicubic, true>{});
    if (bilinear) return run(Variant<V, Mode::bilinear, false>{});
    run(Variant<V, Mode::bicubic, false>{});
  });
}

Geometry geometry_of(const Tensor& rows) {
  return {rows.const_data_ptr<int64_t>(), rows.size(0) - 1};
}

std::tuple<Tensor, Tensor> interpolate_tokens(Tensor x, Tensor geometry, Tensor target_geometry,
                                              int64_t num_tokens, int64_t merge,
                                              int64_t target_merge, std::string mode,
                                              bool align_corners, bool antialias) {
  x = last_contiguous(x);
  const int64_t num_channels = x.size(1);
  const Tensor out = new_empty(x, {num_tokens, num_channels}, x.scalar_type());
  const bool normalised = antialias || mode == "area";
  const Tensor saved = mode == "max"
                           ? new_empty(x, {num_tokens, num_channels}, ScalarType::Int)
                           : new_empty(x, {normalised ? num_tokens : 0}, ScalarType::Float);
  const Maps maps{geometry_of(target_geometry), geometry_of(geometry), (int32_t)target_merge,
                  (int32_t)merge};
  launch<Resize>(x,
                 {x.const_data_ptr(), out.mutable_data_ptr(), saved.mutable_data_ptr(), maps, 0, 0, 0,
                  align_corners},
                 num_tokens, mode, antialias);
  return {out, saved};
}

Tensor interpolate_tokens_backward(Tensor grad, Tensor saved, Tensor geometry,
                                   Tensor target_geometry, int64_t num_tokens, int64_t merge,
                                   int64_t target_merge, std::string mode, bool align_corners,
                                   bool antialias) {
  grad = last_contiguous(grad);
  const int64_t num_channels = grad.size(1);
  const Tensor grad_x = new_empty(grad, {num_tokens, num_channels}, grad.scalar_type());
  const Maps maps{geometry_of(geometry), geometry_of(target_geometry), (int32_t)merge,
                  (int32_t)target_merge};
  launch<ResizeBackward>(grad,
                         {grad.const_data_ptr(), grad_x.mutable_data_ptr(),
                          saved.mutable_data_ptr(), maps, 0, 0, 0, align_corners},
                         num_tokens, mode, antialias);
  return grad_x;
}

STABLE_TORCH_LIBRARY_IMPL(patchpack, PATCHPACK_DEVICE, library) {
  library.impl("interpolate_tokens.cuda", TORCH_BOX(&interpolate_tokens));
  library.impl("interpolate_tokens_backward.cuda", TORCH_BOX(&interpolate_tokens_backward));
}

}  // namespace patchpack
