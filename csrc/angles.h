// Exact rotary angles. An angle is a 64-bit fixed-point fraction of a turn: positions are integers,
// so the product with a frequency wraps around exactly where the angle does, and no range reduction
// is needed. Sine and cosine are as accurate at position 4 million as at 4.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "host_device.h"

namespace patchpack {

// The frequency of a pair of channels, `2**64` times its turns a position.
struct Frequency {
  int32_t axis;
  uint32_t high, low;
};

// `base ** -exponent` radians a position.
inline Frequency frequency(int32_t axis, double base, long double numerator, long double denominator) {
  const long double two_pi = 6.28318530717958647692528676655900577L;
  const long double radians = std::exp2(-std::log2((long double)base) * numerator / denominator);
  long double turns = std::fmod(radians / two_pi, 1.0L) * 4294967296.0L;
  const uint32_t high = (uint32_t)turns;
  turns = (turns - (long double)high) * 4294967296.0L;
  return {axis, high, (uint32_t)turns};
}

// Frequencies of the latest `key` asked for on this thread, from `make`: a model repeats its own.
template <typename Key, typename Make>
const std::vector<Frequency>& remembered(const Key& key, const Make& make) {
  thread_local std::optional<std::pair<Key, std::vector<Frequency>>> latest;
  if (!latest || latest->first != key) latest.emplace(key, make());
  return latest->second;
}

// Of each pair of a head of rope_2d; axis 0 is the row, 1 the column.
inline const std::vector<Frequency>& frequencies_2d(int64_t num_pairs, double base,
                                                    const std::string& axes) {
  return remembered(std::tuple(num_pairs, base, axes), [&] {
    std::vector<Frequency> pairs;
    const int64_t half = num_pairs / 2;
    for (int64_t j = 0; j < num_pairs; ++j) {
      const bool paired = axes == "paired";
      const int32_t axis = paired ? 1 - j % 2 : j / half;
      const int64_t exponent = 2 * (paired ? j / 2 : j % half) + (axes == "even_odd" ? axis : 0);
      pairs.push_back(frequency(axis, base, exponent, num_pairs));
    }
    return pairs;
  });
}

// Of each pair of a head of mrope that turns; axes are time, height and width.
inline const std::vector<Frequency>& frequencies_3d(const std::vector<int64_t>& sections,
                                                    bool interleaved, double base) {
  return remembered(std::tuple(sections, interleaved, base), [&] {
    const int64_t num_pairs = sections[0] + sections[1] + sections[2];
    std::vector<Frequency> pairs;
    for (int64_t j = 0; j < num_pairs; ++j) {
      int32_t axis = j < sections[0] ? 0 : j < sections[0] + sections[1] ? 1 : 2;
      if (interleaved) axis = j < 3 * sections[j % 3] ? j % 3 : 0;
      pairs.push_back(frequency(axis, base, j, num_pairs));
    }
    return pairs;
  });
}

// `position_ids` of mrope, `[3, T]`, int32 or int64.
struct Positions {
  const void* values;
  bool is_long;
  int64_t stride_axis, stride_token;

  HOST_DEVICE int32_t at(int64_t axis, int64_t token) const {
    const int64_t i = axis * stride_axis + token * stride_token;
    return is_long ? (int32_t)((const int64_t*)values)[i] : ((const int32_t*)values)[i];
  }
};

HOST_DEVICE void cos_sin(int32_t position, uint32_t high, uint32_t low, float& cos, float& sin) {
  const uint32_t distance = position < 0 ? 0u - (uint32_t)position : (uint32_t)position;
  const uint32_t turns = distance * high + (uint32_t)(((uint64_t)distance * low) >> 32);

  // the nearest quarter turn, and what is left of it: an eighth of a turn at most, signed
  const uint32_t quarter = (turns + 0x20000000u) >> 30;
  const int32_t rest = (int32_t)(turns - (quarter << 30));
  // times 2 pi / 2**32, rounded once: 30 bits and a constant of 48
  const int32_t few = rest & 0xFF;
  const float many = (float)(rest - few);
  const float x = std::fma(many, 1.462918120e-09f,
                           std::fma(many, -4.070940268e-17f, (float)few * 1.462918120e-09f));
  const float z = x * x;
  const float s = x + x * z * (-0.1666665493668579f +
                               z * (0.008332177686051519f - z * 0.0001951723464803119f));
  const float c = 1.0f + z * (-0.5f + z * (0.041666646854584335f +
                                           z * (-0.0013887366909231464f + z * 2.44383793988e-05f)));

  const bool odd = quarter & 1;
  const float turned_c = odd ? s : c, turned_s = odd ? c : s;
  cos = (quarter + 1) & 2 ? -turned_c : turned_c;
  sin = ((quarter & 2) != 0) != (position < 0) ? -turned_s : turned_s;
}

}  // namespace patchpack
