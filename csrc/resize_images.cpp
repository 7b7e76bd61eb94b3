// Images resized to the bytes of Pillow; the maths is in patchpack.reference.resize_images.
#include "resize.h"

namespace patchpack {
namespace {

constexpr int64_t kStripRows = 64;

int64_t num_strips(const Resize& r) { return (r.height() + kStripRows - 1) / kStripRows; }

}  // namespace
}  // namespace patchpack

#define KERNELS "resize_images.h"
#define KERNELS_USE_BF16
#include "foreach_level.h"

namespace patchpack {

Tensor resize_images(std::vector<Tensor> images, std::vector<int64_t> sizes, std::string mode) {
  std::vector<Resize> resizes(images.size());
  parallel_for((int64_t)images.size(), 32768, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      resizes[i] = resize_of(pixels(images[i]), sizes[2 * i], sizes[2 * i + 1], mode == "bicubic");
      AT_LEVEL(split_weights(resizes[i].rows));
      AT_LEVEL(split_weights(resizes[i].cols));
    }
  });
  int64_t strips = 0, bytes = 0;
  for (const Resize& r : resizes) {
    strips += r.image.frames * num_strips(r);
    bytes += r.image.frames * r.image.channels * r.height() * r.width();
  }
  const Tensor out = empty({bytes}, ScalarType::Byte);
  parallel_for(strips, bytes / std::max<int64_t>(1, strips), [&](int64_t begin, int64_t end) {
    AT_LEVEL(resize_images(resizes, out.mutable_data_ptr<uint8_t>(), begin, end));
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(patchpack, CPU, library) {
  library.impl("resize_images.native", TORCH_BOX(&resize_images));
}

}  // namespace patchpack
