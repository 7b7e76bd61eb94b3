// Pillow's resampling of 8-bit images, as patchpack/_resampling.py has it.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "images.h"

namespace patchpack {

constexpr int kWeightBits = 22;  // of a weight's fraction: 2**22 is 1

// What the outputs of an axis sum: `weights[o][k] * x[first[o] + k]`, for `k` below `count[o]`.
struct Axis {
  int64_t num_in, num_out;
  int64_t num_taps;  // the largest count
  std::vector<int64_t> first, count;
  std::vector<int32_t> weights;  // [num_out, num_taps]
  std::vector<uint32_t> split;   // the same, as the kernels of a level multiply by them
};

// A product and a sum that were one operation would round otherwise than Pillow.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif

inline double bilinear_filter(double x) { return x < 1 ? 1 - x : 0; }

inline double bicubic_filter(double x) {
  const double a = -0.5;
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

inline Axis resampling_axis(int64_t num_in, int64_t num_out, bool bicubic) {
  const double scale = (double)num_in / (double)num_out, widened = std::max(scale, 1.0);
  const double support = (bicubic ? 2 : 1) * widened, inverse = 1 / widened;
  if (num_out == 0) return {num_in, 0, 0, {}, {}, {}, {}};
  const int64_t most = 2 * (int64_t)std::ceil(support) + 1;
  Axis axis{num_in, num_out, 1, {}, {}, std::vector<int32_t>(num_out * most), {}};
  std::vector<double> values(most);
  for (int64_t o = 0; o < num_out; ++o) {
    const double center = ((double)o + 0.5) * scale;
    const int64_t first = (int64_t)std::max(center - support + 0.5, 0.0);
    const int64_t count = std::min((int64_t)(center + support + 0.5), num_in) - first;
    double total = 0;
    for (int64_t k = 0; k < count; ++k) {
      const double x = std::abs(((double)(first + k) - center + 0.5) * inverse);
      values[k] = bicubic ? bicubic_filter(x) : bilinear_filter(x);
      total += values[k];
    }
    axis.first.push_back(first);
    axis.count.push_back(1);
    for (int64_t k = 0; k < count; ++k) {
      const double fixed = values[k] / total * (1 << kWeightBits);
      const int32_t weight = (int32_t)(fixed + std::copysign(0.5, fixed));
      axis.weights[o * most + k] = weight;
      if (weight != 0) axis.count.back() = k + 1;
    }
    axis.num_taps = std::max(axis.num_taps, axis.count.back());
  }
  for (int64_t o = 0; o < num_out; ++o)  // to rows of `num_taps`
    std::copy_n(&axis.weights[o * most], axis.num_taps, &axis.weights[o * axis.num_taps]);
  return axis;
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif

// One image and how it is resized.
struct Resize {
  Pixels image;
  Axis rows, cols;
  bool height_first;  // as Pillow 13 does where that loses more than twice as many rows
  bool interleaved;   // channels of what comes out

  int64_t height() const { return rows.num_out; }
  int64_t width() const { return cols.num_out; }
  // Where a row has its channels and pixels; it is longer than they are.
  int64_t stride_c() const { return interleaved ? 1 : (width() + 15) / 16 * 16; }
  int64_t stride_x() const { return interleaved ? image.channels : 1; }
  int64_t pitch() const { return (image.channels * ((width() + 15) / 16 * 16) + 63) / 64 * 64; }
};

inline Resize resize_of(const Pixels& image, int64_t height, int64_t width, bool bicubic,
                        bool interleaved = false) {
  const int64_t fewer_rows = image.height - height, fewer_cols = image.width - width;
  return {image, resampling_axis(image.height, height, bicubic),
          resampling_axis(image.width, width, bicubic),
          fewer_rows > std::max<int64_t>(2 * fewer_cols, 0), interleaved};
}

}  // namespace patchpack
