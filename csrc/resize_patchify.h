// Kernels of resize_patchify for one level of the CPU: see level.h.
#include "patchify_kernels.h"
#include "resize_kernels.h"

namespace patchpack::LEVEL {

// Strips `[begin, end)` of all images: resized into a buffer that stays in the cache, then cut.
inline void resize_patchify(const std::vector<Resize>& resizes, const Geometry& geometry,
                            const Patch& patch, void* out, int64_t begin, int64_t end) {
  const int64_t height = patch.size * patch.merge;
  std::vector<Resizer> resizers(patch.temporal);
  std::vector<std::vector<uint8_t>> strips(patch.temporal);
  std::vector<const uint8_t*> frames(patch.temporal);
  int64_t started_grid = -1, started_frame = -1;
  for_strips(geometry, patch, begin, end, [&](const Strip& strip) {
    const Resize& r = resizes[strip.grid];
    const int64_t first = strip.frame * patch.temporal, top = strip.row * height;
    const Rows<uint8_t> rows{frames.data(), std::min(patch.temporal, r.image.frames - first),
                             r.stride_c(), r.pitch()};
    const bool starts = strip.grid != started_grid || strip.frame != started_frame;
    for (int64_t f = 0; f < rows.num_frames; ++f) {
      if (starts)
        resizers[f].start(r, first + f, std::min(r.height(), top + strip.left * height));
      frames[f] = at_least(strips[f], height * r.pitch());
      resizers[f].rows(top, top + height, strips[f].data());
    }
    started_grid = strip.grid;
    started_frame = strip.frame;
    with_scalar(patch.dtype, [&](auto scalar) {
      cut_strip(rows, patch, geometry.width(strip.grid),
                (decltype(scalar)*)out + strip.token * patch.num_columns());
    });
  });
}

}  // namespace patchpack::LEVEL
