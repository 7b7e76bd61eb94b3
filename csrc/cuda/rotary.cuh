// What rope_2d and mrope share: a thread turns a few pairs of some heads of a token, all of them by
// the same angles.
#pragma once

#include "../angles.h"
#include "../rotary.h"
#include "threads.cuh"

namespace patchpack {

// Positions of a token on up to three axes.
struct Place {
  int32_t first, second, third;

  HOST_DEVICE int32_t at(int32_t axis) const {
    return axis == 0 ? first : axis == 1 ? second : third;
  }
};

inline constexpr int kMostPairs = 128;  // of a head of 256 channels; beyond, one more launch

// `Places` tells where a token is. A head has items: vectors of pairs, then what passes through.
template <typename V, bool kInterleaved, typename Places>
struct Rotate {
  Places places;
  Heads heads[2];  // of q and k
  int32_t head_dim, num_pairs, num_groups, num_items, first_item;
  float sign;
  Frequency frequencies[kMostPairs];  // from `first_item` on

  using scalar_t = typename V::Scalar;
  static constexpr int kLanes = V::kLanes;

  HOST_DEVICE void operator()(int64_t thread) const {
    const int64_t token = thread / (num_groups * num_items);
    const int32_t in_token = thread - token * (num_groups * num_items);
    const int32_t group = in_token / num_items, item = in_token % num_items;
    const int32_t pair = (first_item + item) * kLanes;

    float cos[kLanes], sin[kLanes];
    if (pair < num_pairs) {
      const Place place = places(token);
      for (int p = 0; p < kLanes; ++p) {
        const Frequency f = frequencies[item * kLanes + p];
        cos_sin(place.at(f.axis), f.high, f.low, cos[p], sin[p]);
        sin[p] *= sign;
      }
    }
    // groups take turns, so that neighbouring threads are at neighbouring heads
    const int64_t num_heads = heads[0].num_heads + heads[1].num_heads;
    for (int64_t head = group; head < num_heads; head += num_groups) {
      const bool is_k = head >= heads[0].num_heads;
      const Heads& h = heads[is_k];
      const int64_t in_tensor = head - (is_k ? heads[0].num_heads : 0);
      const scalar_t* x = (const scalar_t*)h.x + token * h.stride_t + in_tensor * h.stride_h;
      scalar_t* out = (scalar_t*)h.out + (token * h.num_heads + in_tensor) * head_dim;
      if (pair < num_pairs)
        turn(x, out, pair, cos, sin);
      else
        *(V*)(out + num_pairs + pair) = *(const V*)(x + num_pairs + pair);
    }
  }

  HOST_DEVICE void turn(const scalar_t* x, scalar_t* out, int32_t pair, const float* cos,
                        const float* sin) const {
    const int32_t one = kInterleaved ? 2 * pair : pair;
    const int32_t other = kInterleaved ? 2 * pair + kLanes : num_pairs + pair;
    float lanes[2 * kLanes];
    load<V>(x + one, lanes);
    load<V>(x + other, lanes + kLanes);
    for (int p = 0; p < kLanes; ++p) {
      float& a = lanes[kInterleaved ? 2 * p : p];
      float& b = lanes[kInterleaved ? 2 * p + 1 : kLanes + p];
      const float turned = a * cos[p] - b * sin[p];
      b = b * cos[p] + a * sin[p];
      a = turned;
    }
    store<V>(out + one, lanes);
    store<V>(out + other, lanes + kLanes);
  }
};

// Allocates the rotated `q` and `k` and turns them.
template <bool kInterleaved, typename Places>
std::tuple<Tensor, Tensor> rotate(const Tensor& q, const Tensor& k, const Places& places,
                                  const std::vector<Frequency>& frequencies, bool inverse) {
  const Tensor inputs[] = {last_contiguous(q), last_contiguous(k)};
  Tensor outputs[] = {q, k};
  Heads heads[2];
  for (int i = 0; i < 2; ++i) {
    const Tensor& x = inputs[i];
    outputs[i] = new_empty(x, {x.size(0), x.size(1), x.size(2)}, x.scalar_type());
    heads[i] = {x.const_data_ptr(), outputs[i].mutable_data_ptr(), x.stride(0), x.stride(1),
                x.size(1)};
  }
  const int32_t head_dim = q.size(2), num_pairs = frequencies.size();
  const auto fits = [&](int lanes) {
    return head_dim % lanes == 0 && num_pairs % lanes == 0 &&
           std::all_of(inputs, inputs + 2, [&](const Tensor& x) {
             return aligned(x, lanes, {x.stride(0), x.stride(1)});
           });
  };
  with_vector(q.scalar_type(), fits, [&](auto vector) {
    using V = decltype(vector);
    const int32_t num_items = (head_dim - num_pairs) / V::kLanes;
    // a small batch has a thread a head; a large one has enough threads with several
    constexpr int64_t kFullGpu = 1 << 18;
    const int64_t threads = std::max<int64_t>(1, q.size(0) * num_items);
    const int64_t num_groups =
        std::max<int64_t>(1, std::min(q.size(1) + k.size(1), kFullGpu / threads));
    for (int32_t first = 0; first < num_items; first += kMostPairs / V::kLanes) {
      const int32_t count = std::min(num_items - first, kMostPairs / V::kLanes);
      Rotate<V, kInterleaved, Places> body{
          places, {heads[0], heads[1]}, head_dim, num_pairs, (int32_t)num_groups, count, first,
          inverse ? -1.0f : 1.0f, {}};
      const int32_t begin = std::min(first * V::kLanes, num_pairs);
      std::copy(frequencies.begin() + begin,
                frequencies.begin() + std::min(begin + kMostPairs, num_pairs), body.frequencies);
      for_each(q.size(0) * num_groups * count, q, body);
    }
  });
  return {outputs[0], outputs[1]};
}

}  // namespace patchpack
