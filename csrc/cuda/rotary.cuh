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
// Strides and sizes are counted in vectors.
template <typename V, bool kInterleaved, typename Places>
struct Rotate {
  Places places;
  Heads heads[2];  // of q and k
  int32_t num_turning, num_groups, num_items, first_item;
  float sign;
  Frequency frequencies[kMostPairs];  // from `first_item` on

  static constexpr int kLanes = V::kLanes;

  HOST_DEVICE void operator()(int64_t thread) const {
    const int64_t token = thread / (num_groups * num_items);
    const int32_t in_token = thread - token * (num_groups * num_items);
    const int32_t group = in_token / num_items, in_launch = in_token % num_items;
    const int32_t item = first_item + in_launch;

    float cos[kLanes], sin[kLanes];
    if (item < num_turning) {
      const Place place = places(token);
      for (int p = 0; p < kLanes; ++p) {
        const Frequency f = frequencies[in_launch * kLanes + p];
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
      const V* x = (const V*)h.x + token * h.stride_t + in_tensor * h.stride_h;
      V* out = (V*)h.out + token * h.out_stride_t + in_tensor * h.out_stride_h;
      if (item < num_turning)
        turn(x, out, item, cos, sin);
      else
        out[num_turning + item] = x[num_turning + item];
    }
  }

  HOST_DEVICE void turn(const V* x, V* out, int32_t item, const float* cos,
                        const float* sin) const {
    const int32_t one = kInterleaved ? 2 * item : item;
    const int32_t other = kInterleaved ? 2 * item + 1 : num_turning + item;
    float lanes[2 * kLanes];
    load(x + one, lanes);
    load(x + other, lanes + kLanes);
    for (int p = 0; p < kLanes; ++p) {
      float& a = lanes[kInterleaved ? 2 * p : p];
      float& b = lanes[kInterleaved ? 2 * p + 1 : kLanes + p];
      const float turned = a * cos[p] - b * sin[p];
      b = b * cos[p] + a * sin[p];
      a = turned;
    }
    store(out + one, lanes);
    store(out + other, lanes + kLanes);
  }
};

template <bool kInterleaved, typename Places>
void rotate(const Turned& q_turned, const Turned& k_turned, const Places& places,
            const std::vector<Frequency>& frequencies, bool inverse) {
  const Turned turned[] = {q_turned, k_turned};
  const Tensor &q = q_turned.x, &k = k_turned.x;
  const int64_t num_tokens = q.size(0), head_dim = q.size(2), num_pairs = frequencies.size();
  const auto fits = [&](int lanes) {
    return head_dim % lanes == 0 && num_pairs % lanes == 0 &&
           std::all_of(turned, turned + 2, [&](const Turned& t) {
             return aligned(t.x, lanes, {t.x.stride(0), t.x.stride(1)}) &&
                    aligned(t.out, lanes, {t.out.stride(0), t.out.stride(1)});
           });
  };
  with_vector<true>(q.scalar_type(), fits, [&](auto vector) {
    using V = decltype(vector);
    constexpr int32_t kMostItems = kMostPairs / V::kLanes;
    const int32_t num_items = (head_dim - num_pairs) / V::kLanes;
    // a small batch has a thread a head; a large one fills a GPU with fewer
    constexpr int64_t kManyThreads = 1 << 18;
    const int64_t num_groups = std::max<int64_t>(
        1, std::min(q.size(1) + k.size(1), kManyThreads / std::max<int64_t>(1, num_tokens * num_items)));
    Rotate<V, kInterleaved, Places> body{places};
    for (int i = 0; i < 2; ++i) {
      Heads& heads = body.heads[i] = turned[i].heads();
      for (int64_t* stride :
           {&heads.stride_t, &heads.stride_h, &heads.out_stride_t, &heads.out_stride_h})
        *stride /= V::kLanes;
    }
    body.num_turning = num_pairs / V::kLanes;
    body.num_groups = num_groups;
    body.sign = inverse ? -1.0f : 1.0f;
    for (body.first_item = 0; body.first_item < num_items; body.first_item += kMostItems) {
      body.num_items = std::min(num_items - body.first_item, kMostItems);
      const int64_t begin = std::min<int64_t>(body.first_item * V::kLanes, num_pairs);
      const int64_t count = std::min<int64_t>(num_pairs - begin, kMostPairs);
      std::copy_n(frequencies.begin() + begin, count, body.frequencies);
      for_each(num_tokens * num_groups * body.num_items, q, body);
    }
  });
}

}  // namespace patchpack
