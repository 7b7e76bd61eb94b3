// Kernels of resize_patchify for one level of the CPU: see level.h.
#include "patchify_kernels.h"
#include "resize_kernels.h"

namespace patchpack::LEVEL {

// Strips `[begin, end)` of all images: resized into a buffer that stays in the cache, then cut while
// the next one is resized, because memory takes as long to take patches as it takes to resize.
inline void resize_patchify(const std::vector<Resize>& resizes, const Geometry& geometry,
                            const Patch& patch, void* out, int64_t begin, int64_t end) {
  const int64_t height = patch.size * patch.merge;
  std::vector<Resizer> resizers(patch.temporal);
  std::vector<std::vector<uint8_t>> strips(2 * patch.temporal);  // this one's and the last one's
  std::vector<const uint8_t*> frames(2 * patch.temporal);
  Cutter<uint8_t> cutter(patch);
  int64_t started_grid = -1, started_frame = -1, half = 0;
  for_strips(geometry, patch, begin, end, [&](const Strip& strip) {
    const Resize& r = resizes[strip.grid];
    const int64_t first = strip.frame * patch.temporal, top = strip.row * height;
    const int64_t num_frames = std::min(patch.temporal, r.image.frames - first);
    const bool starts = strip.grid != started_grid || strip.frame != started_frame;
    half = patch.temporal - half;
    for (int64_t f = 0; f < num_frames; ++f) {
      if (starts)
        resizers[f].start(r, first + f, std::min(r.height(), top + strip.left * height));
      uint8_t* rows = at_least(strips[half + f], height * r.pitch());
      resizers[f].rows(top, top + height, rows, [&] { cutter.cut(); });
      frames[half + f] = rows;
    }
    started_grid = strip.grid;
    started_frame = strip.frame;
    cutter.finish();
    cutter.start({&frames[half], num_frames, r.stride_c(), r.pitch()}, geometry.width(strip.grid),
                 patch.row_of(out, strip.token));
  });
  cutter.finish();
  fence();
}

}  // namespace patchpack::LEVEL
