// Images resized and cut into patches at once: patchpack.patchify with `resample`.
#include "resize.h"

#define KERNELS "resize_patchify.h"
#define KERNELS_USE_BF16
#include "foreach_level.h"

namespace patchpack {

Tensor resize_patchify(Tensor geometry_tensor, std::vector<Tensor> images, int64_t num_tokens,
                       int64_t merge, int64_t patch_size, std::vector<double> mean,
                       std::vector<double> std, int64_t temporal, std::string layout,
                       ScalarType dtype, bool pin_memory, std::string resample) {
  const Geometry geometry{geometry_tensor.const_data_ptr<int64_t>(), (int64_t)images.size()};
  const Patch patch = patch_of(ScalarType::Byte, dtype, patch_size, temporal, merge, mean, std,
                               layout == "ppc", num_tokens);
  const std::vector<Pixels> sources = pixels(images);
  for (int64_t i = 0; i < geometry.num_grids; ++i)
    check_grid(geometry, i, (sources[i].frames + temporal - 1) / temporal, geometry.height(i),
               geometry.width(i));
  std::vector<Resize> resizes(images.size());
  parallel_for((int64_t)images.size(), 32768, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      resizes[i] = resize_of(sources[i], geometry.height(i) * patch_size,
                             geometry.width(i) * patch_size, resample == "bicubic",
                             patch.interleaved);
      AT_LEVEL(split_weights(resizes[i].rows));
      AT_LEVEL(split_weights(resizes[i].cols));
    }
  });
  const Tensor out = empty({num_tokens, patch.num_columns()}, dtype, pin_memory);
  parallel_over_strips(geometry, patch, 2 * patch.num_columns(), [&](int64_t begin, int64_t end) {
    AT_LEVEL(resize_patchify(resizes, geometry, patch, out.mutable_data_ptr(), begin, end));
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(patchpack, CPU, library) {
  library.impl("resize_patchify.native", TORCH_BOX(&resize_patchify));
}

}  // namespace patchpack
