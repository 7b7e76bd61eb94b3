// Kernels of patchpack.ops.resize_images for one level of the CPU: see level.h.
#include "resize_kernels.h"

namespace patchpack::LEVEL {

// Strips `[begin, end)` of all frames of all images, each of `kStripRows` rows or fewer.
inline void resize_images(const std::vector<Resize>& resizes, uint8_t* out, int64_t begin,
                          int64_t end) {
  Resizer resizer;
  std::vector<uint8_t> strip;
  int64_t first = 0;  // strip of an image
  for (const Resize& r : resizes) {
    const int64_t height = r.height(), width = r.width(), channels = r.image.channels;
    const int64_t strips = num_strips(r), last = first + r.image.frames * strips;
    for (int64_t i = std::max(begin, first); i < std::min(end, last); ++i) {
      const int64_t frame = (i - first) / strips, top = (i - first) % strips * kStripRows;
      const int64_t bottom = std::min(height, top + kStripRows);
      if (i == std::max(begin, first) || top == 0)
        resizer.start(r, frame, std::min(height, top + (end - i) * kStripRows));
      uint8_t* rows = at_least(strip, kStripRows * r.pitch());
      resizer.rows(top, bottom, rows, [] {});
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t y = top; y < bottom; ++y)
          std::memcpy(out + ((frame * channels + c) * height + y) * width,
                      rows + (y - top) * r.pitch() + c * r.stride_c(), width);
    }
    out += r.image.frames * channels * height * width;
    first = last;
  }
}

}  // namespace patchpack::LEVEL
