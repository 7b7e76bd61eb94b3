// Images to one packed sequence of patches; the maths is in patchpack.reference.patchify.
#include "images.h"

#define KERNELS "patchify.h"
#include "foreach_level.h"

namespace patchpack {

Tensor patchify(Tensor geometry_tensor, std::vector<Tensor> images, int64_t num_tokens,
                int64_t merge, int64_t patch_size, std::vector<double> mean,
                std::vector<double> std, int64_t temporal, std::string layout, ScalarType dtype,
                bool pin_memory) {
  const Geometry geometry{geometry_tensor.const_data_ptr<int64_t>(), (int64_t)images.size()};
  const ScalarType pixel = images.empty() ? ScalarType::Byte : images[0].scalar_type();
  const Patch patch =
      patch_of(pixel, dtype, patch_size, temporal, merge, mean, std, layout == "ppc", num_tokens);
  const std::vector<Pixels> sources = pixels(images);
  for (int64_t i = 0; i < geometry.num_grids; ++i)
    check_grid(geometry, i, (sources[i].frames + temporal - 1) / temporal,
               sources[i].height / patch_size, sources[i].width / patch_size);
  const Tensor out = empty({num_tokens, patch.num_columns()}, dtype, pin_memory);
  parallel_over_strips(geometry, patch, patch.num_columns(), [&](int64_t begin, int64_t end) {
    AT_LEVEL(patchify(sources, geometry, patch, out.mutable_data_ptr(), begin, end));
  });
  return out;
}

Tensor patchify_backward(Tensor grad, Tensor geometry_tensor, std::vector<int64_t> sizes,
                         int64_t merge, int64_t patch_size, std::vector<double> mean,
                         std::vector<double> std, int64_t temporal, std::string layout,
                         ScalarType dtype) {
  const Geometry geometry{geometry_tensor.const_data_ptr<int64_t>(), (int64_t)sizes.size() / 3};
  const Patch patch =
      patch_of(dtype, grad.scalar_type(), patch_size, temporal, merge, mean, std, layout == "ppc");
  grad = last_contiguous(grad);
  int64_t rows = 0, num_pixels = 0;
  for (int64_t i = 0; i < geometry.num_grids; ++i) {
    const int64_t frames = sizes[3 * i], height = sizes[3 * i + 1], width = sizes[3 * i + 2];
    check_grid(geometry, i, (frames + temporal - 1) / temporal, height / patch_size,
               width / patch_size);
    rows += frames * patch.channels * height;
    num_pixels += frames * patch.channels * height * width;
  }
  const Tensor out = empty({num_pixels}, dtype);
  parallel_for(rows, num_pixels / std::max<int64_t>(1, rows), [&](int64_t begin, int64_t end) {
    AT_LEVEL(patchify_backward(grad, geometry, patch, sizes, out.mutable_data_ptr(), begin, end));
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(patchpack, CPU, library) {
  library.impl("patchify.native", TORCH_BOX(&patchify));
  library.impl("patchify_backward.native", TORCH_BOX(&patchify_backward));
}

}  // namespace patchpack
