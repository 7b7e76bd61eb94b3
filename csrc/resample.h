// Weights of resized maps: the maths is in patchpack.reference.interpolate_tokens.
//
// All modes are one formula. An axis has integers `slope`, `offset` and `unit` such that output `o`
// looks at the coordinate `(slope * o + offset) / unit` of the input. Input `i` is then
// `i * unit - (slope * o + offset)` away from it, and its weight is a function of this distance that
// is zero from some reach on. Coordinates and distances are exact.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace patchpack {

enum class ResampleMode { bilinear, bicubic, area, max, nearest };

struct Filter {
  ResampleMode mode;
  bool align_corners, antialias;

  // Whether weights are divided by their sum.
  HOST_DEVICE bool normalised() const { return antialias || mode == ResampleMode::area; }

  // Inputs on an axis that every output reads, or 0 where their number depends on the sizes.
  HOST_DEVICE constexpr int64_t num_taps() const {
    if (antialias) return 0;
    if (mode == ResampleMode::nearest) return 1;
    if (mode == ResampleMode::bilinear) return 2;
    return mode == ResampleMode::bicubic ? 4 : 0;
  }
};

// An axis of `num_in` inputs and `num_out` outputs; `size` is the distance that counts as 1.
struct ResampledAxis {
  int64_t num_in, num_out, slope, offset, unit, size;
};

HOST_DEVICE ResampledAxis resampled_axis(Filter filter, int64_t num_in, int64_t num_out) {
  ResampledAxis a{num_in, num_out, 2 * num_in, num_in - num_out, 2 * num_out, 0};
  if (filter.align_corners) {
    const bool single = num_out == 1;
    a.slope = single ? 0 : a.slope - 2;
    a.unit = single ? 2 : a.unit - 2;
    if (!filter.antialias)  // torch looks half a step ahead even so
      a.offset = 0;
    else if (single)
      a.offset = -1;
  }
  a.size = a.unit;
  if (filter.antialias)
    a.size = a.slope > a.unit ? a.slope : a.unit;
  else if (filter.mode == ResampleMode::area || filter.mode == ResampleMode::max)
    a.size = (a.slope + a.unit) / 2;  // cells overlap
  return a;
}

// The input that output `o` copies, rounded as torch rounds it, in float.
HOST_DEVICE int64_t nearest_input(const ResampledAxis& a, int64_t o) {
  const float scale = (float)a.num_in / (float)a.num_out;
  const int64_t i = (int64_t)((float)o * scale);
  return i < a.num_in ? i : a.num_in - 1;
}

// Inputs `[first, first + count)`, the first of them at `distance`. Those past a border are it.
struct Taps {
  int64_t first, count, distance;
};

HOST_DEVICE Taps find_taps(Filter filter, const ResampledAxis& a, int64_t o) {
  const bool nearest = filter.mode == ResampleMode::nearest;
  const int64_t center = nearest ? nearest_input(a, o) * a.unit : a.slope * o + a.offset;
  Taps taps{0, filter.num_taps(), 0};
  if (taps.count > 0) {
    taps.first = (center + a.unit) / a.unit - (taps.count + 1) / 2;
  } else {
    const int64_t reach = filter.mode == ResampleMode::bicubic ? 2 * a.size : a.size;
    const int64_t begin = center - reach + a.unit, end = (center + reach - 1) / a.unit + 1;
    taps.first = begin > 0 ? begin / a.unit : 0;
    taps.count = (end < a.num_in ? end : a.num_in) - taps.first;
  }
  taps.distance = taps.first * a.unit - center;
  return taps;
}

// Weight at a distance; up to a factor where weights are normalised.
HOST_DEVICE float weight_at(Filter filter, const ResampledAxis& a, int64_t distance) {
  const float z = (float)(distance < 0 ? -distance : distance) / (float)a.size;
  if (filter.mode == ResampleMode::bilinear) {
    const int64_t rest = a.size - (distance < 0 ? -distance : distance);
    return rest > 0 ? (float)rest / (float)a.size : 0.0f;
  }
  if (filter.mode == ResampleMode::bicubic) {
    const float A = filter.antialias ? -0.5f : -0.75f;
    if (z < 1.0f) return 1.0f - z * z * ((A + 3.0f) - (A + 2.0f) * z);
    return z < 2.0f ? A * (z - 1.0f) * (z - 2.0f) * (z - 2.0f) : 0.0f;
  }
  return z < 1.0f ? 1.0f : 0.0f;
}

}  // namespace patchpack
