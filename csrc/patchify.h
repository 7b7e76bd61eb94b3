// Kernels of patchpack.ops.patchify for one level of the CPU: see level.h.
#include "patchify_kernels.h"

namespace patchpack::LEVEL {

// `count` pixels of `channels`, interleaved, to one row a channel, or the other way round.
template <int channels, typename pixel_t>
inline void deinterleave(const pixel_t* __restrict x, int64_t count, int64_t stride_out,
                         pixel_t* __restrict out) {
  for (int64_t i = 0; i < count; ++i)
    for (int c = 0; c < channels; ++c) out[c * stride_out + i] = x[channels * i + c];
}

// One row of `count` pixels of all channels, to where it has the strides of `Rows`.
template <typename pixel_t>
inline void gather_row(const pixel_t* x, const Pixels& image, const Patch& patch, int64_t count,
                       pixel_t* out) {
  const bool packed = image.stride_c == 1 && image.stride_x == image.channels;
  if (packed && !patch.interleaved && image.channels == 3)
    return deinterleave<3>(x, count, count, out);
  if (packed && !patch.interleaved && image.channels == 4)
    return deinterleave<4>(x, count, count, out);
  const int64_t to_c = patch.interleaved ? 1 : count;
  const int64_t to_x = patch.interleaved ? image.channels : 1;
  for (int64_t c = 0; c < image.channels; ++c)
    for (int64_t i = 0; i < count; ++i)
      out[c * to_c + i * to_x] = x[c * image.stride_c + i * image.stride_x];
}

// Strips `[begin, end)` of all images.
template <typename pixel_t>
inline void patchify_pixels(const std::vector<Pixels>& images, const Geometry& geometry,
                            const Patch& patch, void* out, int64_t begin, int64_t end) {
  std::vector<pixel_t> gathered;
  std::vector<const pixel_t*> frames(patch.temporal);
  Cutter<pixel_t> cutter(patch);
  for_strips(geometry, patch, begin, end, [&](const Strip& strip) {
    const Pixels& image = images[strip.grid];
    const int64_t cols = geometry.width(strip.grid), height = patch.size * patch.merge;
    const bool in_place = patch.interleaved
                              ? image.stride_c == 1 && image.stride_x == image.channels
                              : image.stride_x == 1;
    const int64_t first = strip.frame * patch.temporal;
    Rows<pixel_t> rows{frames.data(), std::min(patch.temporal, image.frames - first),
                       image.stride_c, image.stride_y};
    const int64_t pitch = patch.channels * cols * patch.size;  // of gathered rows
    if (!in_place) {
      gathered.resize(std::max<size_t>(gathered.size(), rows.num_frames * height * pitch));
      rows.stride_c = cols * patch.size;
      rows.stride_y = pitch;
    }
    for (int64_t f = 0; f < rows.num_frames; ++f) {
      const pixel_t* x = (const pixel_t*)image.data + (first + f) * image.stride_f +
                         strip.row * height * image.stride_y;
      frames[f] = in_place ? x : &gathered[f * height * pitch];
      for (int64_t y = 0; y < height && !in_place; ++y)
        gather_row(x + y * image.stride_y, image, patch, cols * patch.size,
                   &gathered[(f * height + y) * pitch]);
    }
    cutter.start(rows, cols, patch.row_of(out, strip.token));
    cutter.finish();
  });
  fence();
}

inline void patchify(const std::vector<Pixels>& images, const Geometry& geometry,
                     const Patch& patch, void* out, int64_t begin, int64_t end) {
  if (patch.pixel == ScalarType::Byte)
    return patchify_pixels<uint8_t>(images, geometry, patch, out, begin, end);
  with_scalar(patch.pixel, [&](auto pixel) {
    patchify_pixels<decltype(pixel)>(images, geometry, patch, out, begin, end);
  });
}

// Row `y` of a channel of a frame of the gradient of an image: what its copies sum up to.
template <typename scalar_t, typename pixel_t>
inline void gather_grad(const scalar_t* grad, int64_t stride_t, const Patch& patch,
                        int64_t num_frames, int64_t frame, int64_t channel, int64_t y,
                        int64_t num_rows, int64_t num_cols, int64_t width, pixel_t* out) {
  const int64_t size = patch.size, row = y / size, covered = row < num_rows ? num_cols * size : 0;
  std::fill(out + covered, out + width, pixel_t(0.0f));
  if (covered == 0) return;
  const int64_t time = frame % patch.temporal;
  const int64_t copies = frame + 1 < num_frames ? 1 : patch.temporal - time;
  grad += frame / patch.temporal * num_rows * num_cols * stride_t;
  for (int64_t col = 0; col < num_cols; ++col, out += size) {
    const scalar_t* x = grad + cell_to_token(row, col, num_cols, patch.merge) * stride_t;
    if (patch.interleaved) {
      x += y % size * patch.run() + channel;
      for (int64_t i = 0; i < size; ++i)
        out[i] = (float)x[i * patch.channels] / patch.std[channel];
      continue;
    }
    x += ((channel * patch.temporal + time) * size + y % size) * size;
    for_lanes_again(size, [&](int64_t i, auto n) {
      Floats sum{};
      for (int64_t copy = 0; copy < copies; ++copy) sum += load(x + copy * size * size + i, n);
      store(out + i, sum / splat(patch.std[channel * size]), n);
    });
  }
}

// Rows `[begin, end)` of all channels and frames of all images, whose `[F, H, W]` are `sizes`.
inline void patchify_backward(const Tensor& grad, const Geometry& geometry, const Patch& patch,
                              const std::vector<int64_t>& sizes, void* out, int64_t begin,
                              int64_t end) {
  with_scalar(grad.scalar_type(), [&](auto scalar) {
    with_scalar(patch.pixel, [&](auto pixel) {
      const auto* first = (const decltype(scalar)*)grad.const_data_ptr();
      auto* to = (decltype(pixel)*)out;
      int64_t rows = 0;  // of the images so far
      for (int64_t grid = 0; grid < geometry.num_grids && rows < end; ++grid) {
        const int64_t *size = &sizes[3 * grid], width = size[2];
        const int64_t last = rows + size[0] * patch.channels * size[1];
        for (int64_t i = std::max(begin, rows); i < std::min(end, last); ++i) {
          const int64_t y = (i - rows) % size[1], plane = (i - rows) / size[1];
          gather_grad(first + geometry.first(grid) * grad.stride(0), grad.stride(0), patch, size[0],
                      plane / patch.channels, plane % patch.channels, y, geometry.height(grid),
                      geometry.width(grid), width, to + (i - rows) * width);
        }
        to += (last - rows) * width;
        rows = last;
      }
    });
  });
}

}  // namespace patchpack::LEVEL
