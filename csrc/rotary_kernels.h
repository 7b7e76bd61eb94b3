// The rotation itself, once for each level. No include guard: see level.h.

namespace patchpack::LEVEL {

// Turn every head of a token by the same angles, cosines and sines `[num_pairs]`.
template <typename scalar_t, bool kInterleaved>
inline void rotate_token(const Heads& heads, int64_t head_dim, int64_t num_pairs, int64_t token,
                         const float* cos, const float* sin) {
  const scalar_t* x = (const scalar_t*)heads.x + token * heads.stride_t;
  scalar_t* out = (scalar_t*)heads.out + token * heads.out_stride_t;
  const bool in_place = out == x;
  // views of one buffer leave gaps between tokens, which stop the CPU from looking ahead
  const bool has_gaps = heads.stride_t != heads.num_heads * head_dim;
  for (int64_t head = 0; head < heads.num_heads; ++head, x += heads.stride_h, out += heads.out_stride_h) {
    if (has_gaps)
      for (int64_t byte = 0; byte < head_dim * (int64_t)sizeof(scalar_t); byte += 64)
        __builtin_prefetch((const char*)(x + 2 * heads.stride_t) + byte, 0, 2);
    const auto turn = [&](int64_t i, auto n) {
      const Floats c = load(cos + i, n), s = load(sin + i, n);
      if constexpr (kInterleaved) {
        const int first = std::min<int>(2 * n, kLanes), second = 2 * n - first;
        const Floats lo = load(x + 2 * i, first), hi = load(x + 2 * i + first, second);
        const Floats a = even_lanes(lo, hi, Lanes{}), b = odd_lanes(lo, hi, Lanes{});
        const Floats a_out = a * c - b * s, b_out = b * c + a * s;
        store(out + 2 * i, interleaved_lower(a_out, b_out, Lanes{}), first);
        store(out + 2 * i + first, interleaved_upper(a_out, b_out, Lanes{}), second);
      } else {
        const Floats a = load(x + i, n), b = load(x + num_pairs + i, n);
        store(out + i, a * c - b * s, n);
        store(out + num_pairs + i, b * c + a * s, n);
      }
    };
    if (in_place) {  // a pair that is met twice would turn twice
      for_lanes(num_pairs, turn);
      continue;
    }
    for_lanes_again(num_pairs, turn);
    if (const int64_t passed = head_dim - 2 * num_pairs)
      std::memcpy((void*)(out + 2 * num_pairs), x + 2 * num_pairs, passed * sizeof(scalar_t));
  }
}

// Tokens `[begin, end)`; `angles(token, cos, sin)` gives the cosines and sines of a token.
template <typename Angles>
inline void rotate_tokens(const Rotation& r, int64_t begin, int64_t end, const Angles& angles) {
  std::vector<float> buffer(2 * r.num_pairs);
  float *cos = buffer.data(), *sin = cos + r.num_pairs;
  with_scalar(r.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    const auto rotate = r.interleaved ? rotate_token<scalar_t, true> : rotate_token<scalar_t, false>;
    for (int64_t token = begin; token < end; ++token) {
      angles(token, cos, sin);
      if (r.inverse)
        for (int64_t i = 0; i < r.num_pairs; ++i) sin[i] = -sin[i];
      for (const Heads& heads : r.heads)
        rotate(heads, r.head_dim, r.num_pairs, token, cos, sin);
    }
  });
}

}  // namespace patchpack::LEVEL
