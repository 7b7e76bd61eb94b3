// Kernels of patchpack.ops.varlen_attention for one level of the CPU: see level.h.
//
// Scores are held transposed, keys by queries: what belongs to a query is a lane, so that maxima,
// sums and factors are vectors, and probabilities are operands of the next product as they are.
#include "gemm_tiles.h"

namespace patchpack::LEVEL {
namespace {

// `2**x`, accurate to an ulp: 0 at -inf, and where it would be subnormal without AVX-512.
inline Floats exp2(Floats x) {
  // 2**x = 2**r * 2**(x - r), 0 <= r <= 1
#if defined(LEVEL_HAS_AVX512)
  const Floats r = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);  // 0 at -inf
#else
  const auto zero = x < -126.0f;
  x = zero ? splat(-126.0f) : x > 127.0f ? splat(127.0f) : x;
  const Floats magic = splat(12582912.0f), shifted = (x - 0.5f) + magic, r = x - (shifted - magic);
#endif
  Floats y = fma(r, splat(2.161291486e-4f), splat(1.246784697e-3f));
  y = fma(y, r, splat(9.675451554e-3f));
  y = fma(y, r, splat(5.548528209e-2f));
  y = fma(y, r, splat(2.402293086e-1f));
  y = fma(y, r, splat(6.931470633e-1f));
  y = fma(y, r, splat(1.0f));
#if defined(LEVEL_HAS_AVX512)
  return (Floats)_mm512_scalef_ps((__m512)y, (__m512)x);
#else
  const Floats power = (Floats)(((Ints)shifted << 23) + (127 << 23));
  return zero ? Floats{} : y * power;
#endif
}

// What both passes need of a pair of blocks, and where it is.
template <typename scalar_t>
struct Blocks {
  using Operand = OperandOf<scalar_t>;
  static constexpr int64_t kPack = Operand::kPack;
  static constexpr float kLowest = -3.0e38f;          // finite: infinities are not subtracted
  static constexpr int64_t kUnits = 64;               // of a block of keys
  static constexpr int64_t kBlockK = kUnits * kPack;  // keys

  const Attention& a;
  const int64_t head_dim = a.head_dim;
  const int64_t units = (head_dim + kPack - 1) / kPack;  // of a row
  const int64_t stride_units = round_up(units, kLanes);

  static const scalar_t* rows_of(const Heads& heads, int64_t head, int64_t token) {
    return (const scalar_t*)heads.x + token * heads.stride_t + head * heads.stride_h;
  }
  Along<scalar_t> along(const Heads& heads, int64_t head, int64_t token, int64_t rows) const {
    return {rows_of(heads, head, token), heads.stride_t, rows, head_dim};
  }
  Across<scalar_t> across(const Heads& heads, int64_t head, int64_t token, int64_t rows) const {
    return {rows_of(heads, head, token), heads.stride_t, rows, head_dim};
  }

  // Keys or values as rows, `[len_k, stride_units]`.
  void pack_rows(const Segment& s, const Heads& heads, int64_t head, float* out) const {
    pack(along(heads, head, s.begin_k, s.len_k), out, stride_units);
  }
  // The same by channels, `[head_dim, kUnits]` for each block.
  void pack_channels(const Segment& s, const Heads& heads, int64_t head, float* out) const {
    for (int64_t key = 0; key < s.len_k; key += kBlockK)
      pack_transposed(across(heads, head, s.begin_k + key, std::min(kBlockK, s.len_k - key)),
                      channels_of(out, key), kUnits);
  }
  float* channels_of(float* out, int64_t key) const { return out + key / kBlockK * head_dim * kUnits; }
  int64_t size_of_channels() const { return round_up(a.longest_k, kBlockK) / kPack * head_dim; }

  // `c[key, query]` from `rows[key] . columns[query]`
  template <typename Epilogue>
  void multiply_heads(const float* rows, const float* columns, float* c, int64_t num_keys,
                      int64_t vectors, Epilogue epilogue) const {
    multiply<Operand>({rows, columns, c, stride_units, kBlockQ, kBlockQ, num_keys, vectors, units},
                      epilogue);
  }

  // Scores of keys that queries do not see become -inf.
  static void mask(const Segment& s, const QueryBlock& block, int64_t key, int64_t num_keys,
                   int64_t vectors, float* scores) {
    if (key >= block.full_begin && key + num_keys <= block.full_end) return;
    Ints lanes;
    for (int i = 0; i < kLanes; ++i) lanes[i] = i;
    for (int64_t r = 0; r < num_keys; ++r) {
      const int first = (int)std::clamp<int64_t>(s.first_query(key + r) - block.first, 0, kBlockQ);
      const int end = (int)std::clamp<int64_t>(s.end_query(key + r) - block.first, 0, kBlockQ);
      for (int64_t v = 0; v < vectors; ++v) {
        float* x = scores + r * kBlockQ + v * kLanes;
        const Ints query = lanes + (int)(v * kLanes);
        store(x, (query >= first) & (query < end) ? load(x) : splat(-INFINITY));
      }
    }
  }

  // `body(r, n)` for every `n = kPack` of rows from `r` on, and for the one that is left.
  template <typename Body>
  static void for_packs(int64_t num_rows, const Body& body) {
    int64_t r = 0;
    for (; r + kPack <= num_rows; r += kPack) body(r, std::integral_constant<int, kPack>{});
    if (r < num_rows) body(r, std::integral_constant<int, 1>{});
  }

  // The largest of `start` and a column of scores.
  static Floats largest(Floats start, const float* scores, int64_t num_keys) {
    Floats even = start, odd = start;
    int64_t r = 0;
    for (; r + 2 <= num_keys; r += 2) {
      even = max(even, load(scores + r * kBlockQ));
      odd = max(odd, load(scores + (r + 1) * kBlockQ));
    }
    return max(r < num_keys ? max(even, load(scores + r * kBlockQ)) : even, odd);
  }

  // Channels by queries `[head_dim, kBlockQ]` into rows of `out`; `factor(i)` is that of queries i on.
  template <typename Factor>
  void store_rows(const float* x, int64_t num_queries, scalar_t* out, int64_t stride,
                  const Factor& factor) const {
    for (int64_t i = 0; i < num_queries; i += kLanes) {
      const Floats by = factor(i);
      for (int64_t d = 0; d < head_dim; d += kLanes) {
        const int n = (int)std::min<int64_t>(kLanes, head_dim - d);
        Floats y[kLanes];
        for (int l = 0; l < kLanes; ++l) y[l] = l < n ? load(x + (d + l) * kBlockQ + i) * by : Floats{};
        transpose(y);
        for (int64_t l = 0; l < std::min<int64_t>(kLanes, num_queries - i); ++l)
          store(out + (i + l) * stride + d, y[l], n);
      }
    }
  }
};

template <typename scalar_t>
struct Forward : Blocks<scalar_t> {
  using Base = Blocks<scalar_t>;
  using typename Base::Operand;
  using Base::a, Base::head_dim, Base::kBlockK, Base::kLowest, Base::kPack, Base::kUnits, Base::stride_units;

  Buffer keys{a.longest_k * stride_units}, values{Base::size_of_channels()};
  Buffer queries{head_dim * kBlockQ}, scores{kBlockK * kBlockQ}, p{kUnits * kBlockQ};
  Buffer acc{head_dim * kBlockQ};
  Buffer top{kBlockQ}, total{kBlockQ};
  const Segment* packed_segment = nullptr;
  int64_t packed_head = 0;

  // Probabilities `2**(scale * scores - top)` of a block as an operand, and what they change.
  void softmax(int64_t num_keys, int64_t vectors, bool first) {
    for (int64_t v = 0; v < vectors; ++v) {
      const float* x = scores.data + v * kLanes;
      const Floats old_top = load(top.data + v * kLanes);
      const Floats largest = Base::largest(splat(-INFINITY), x, num_keys);
      const Floats new_top = max(old_top, largest * a.score_scale);
      store(top.data + v * kLanes, new_top);

      Floats sum = {};
      const Floats scale = splat(a.score_scale);
      Base::for_packs(num_keys, [&](int64_t r, auto n) {
        Floats probabilities[kPack] = {};
        for (int i = 0; i < n; ++i) {
          probabilities[i] = exp2(fma(load(x + (r + i) * kBlockQ), scale, -new_top));
          sum += probabilities[i];
        }
        Operand::store_across(p.data + r / kPack * kBlockQ, v, probabilities);
      });

      float* sums = total.data + v * kLanes;
      if (!first && std::memcmp(&old_top, &new_top, sizeof new_top)) {
        const Floats shrink = exp2(old_top - new_top);
        store(sums, load(sums) * shrink);
        for (int64_t d = 0; d < head_dim; ++d) {
          float* y = acc.data + d * kBlockQ + v * kLanes;
          store(y, load(y) * shrink);
        }
      }
      store(sums, load(sums) + sum);
    }
  }

  void attend(const Segment& s, int64_t head, int64_t first_query) {
    const int64_t head_k = head / a.group;
    if (packed_segment != &s || packed_head != head_k) {
      Base::pack_rows(s, a.k, head_k, keys.data);
      Base::pack_channels(s, a.v, head_k, values.data);
      packed_segment = &s, packed_head = head_k;
    }
    const QueryBlock block(s, first_query);
    const int64_t vectors = (block.size + kLanes - 1) / kLanes;
    const int64_t token = s.begin_q + first_query;
    pack_transposed(Base::along(a.q, head, token, block.size), queries.data, kBlockQ);
    std::fill_n(top.data, kBlockQ, kLowest);
    std::fill_n(total.data, kBlockQ, 0.0f);

    const int64_t begin = block.begin / kBlockK * kBlockK;
    for (int64_t key = begin; key < block.end; key += kBlockK) {
      const int64_t num_keys = std::min(kBlockK, block.end - key);
      Base::multiply_heads(keys.data + key * stride_units, queries.data, scores.data, num_keys,
                           vectors, Assign{});
      Base::mask(s, block, key, num_keys, vectors, scores.data);
      softmax(num_keys, vectors, key == begin);
      const Product product{Base::channels_of(values.data, key), p.data, acc.data, kUnits, kBlockQ,
                            kBlockQ, head_dim, vectors, (num_keys + kPack - 1) / kPack};
      if (key == begin)
        multiply<Operand>(product, Assign{});
      else
        multiply<Operand>(product, Add{});
    }

    for (int64_t i = 0; i < block.size; ++i)
      a.lse[head * a.num_q_tokens + token + i] = (float)(top.data[i] * kLog2 + std::log(total.data[i]));
    const int64_t stride = a.num_heads * head_dim;
    Base::store_rows(acc.data, block.size, (scalar_t*)a.out + token * stride + head * head_dim, stride,
                     [&](int64_t i) { return 1.0f / load(total.data + i); });
  }
};

// Blocks of queries whose costs begin in `[begin, end)`.
inline void attend(const Attention& a, int64_t begin, int64_t end) {
  with_scalar(a.dtype, [&](auto scalar) {
    Forward<decltype(scalar)> forward{{a}};
    for_blocks(a, begin, end, [&](const Segment& s, int64_t head, int64_t first_query) {
      forward.attend(s, head, first_query);
    });
  });
}

template <typename scalar_t>
struct Backward : Blocks<scalar_t> {
  using Base = Blocks<scalar_t>;
  using typename Base::Operand;
  using Base::a, Base::head_dim, Base::kBlockK, Base::kLowest, Base::kPack, Base::kUnits, Base::stride_units;

  const Gradients& g;
  const int64_t stride_d = round_up(head_dim, kLanes);
  const int64_t stride_p = kBlockQ / kPack;
  // of a head of keys
  Buffer keys{a.longest_k * stride_units}, key_channels{Base::size_of_channels()};
  Buffer values{a.longest_k * stride_units};
  Buffer grad_k{a.longest_k * stride_d}, grad_v{a.longest_k * stride_d};
  // of a block of queries
  Buffer queries{head_dim * kBlockQ}, grads{head_dim * kBlockQ};
  Buffer query_rows{kBlockQ * stride_d}, grad_rows{kBlockQ * stride_d};
  Buffer p{a.longest_k * kBlockQ}, grad_p{a.longest_k * kBlockQ};
  Buffer grad_q{head_dim * kBlockQ};
  Buffer top{kBlockQ}, grad_lse{kBlockQ}, norm{kBlockQ}, delta{kBlockQ};
  // of it and a block of keys: operands, which floats are as they are
  Buffer p_along{kPack == 1 ? 0 : kBlockK * stride_p}, grad_s_along{kPack == 1 ? 0 : kBlockK * stride_p};
  Buffer grad_s_across{kPack == 1 ? 0 : kUnits * kBlockQ};

  // `p = 2**(scores - top)` in place, and the sums over keys of it and of `p * grad_p`.
  void recompute(int64_t key, int64_t num_keys, int64_t vectors) {
    for (int64_t v = 0; v < vectors; ++v) {
      const Floats of_query = load(top.data + v * kLanes);
      Floats sum = load(norm.data + v * kLanes), dot = load(delta.data + v * kLanes);
      for (int64_t begin = key, end; begin < key + num_keys; begin = end) {
        end = std::min(begin + 16, key + num_keys);
        Floats part_of_sum = {}, part_of_dot = {};  // short sums err less
        for (int64_t at = begin * kBlockQ + v * kLanes; at < end * kBlockQ; at += kBlockQ) {
          const Floats y = exp2(load(p.data + at) - of_query);
          store(p.data + at, y);
          part_of_sum += y;
          part_of_dot = fma(y, load(grad_p.data + at), part_of_dot);
        }
        sum += part_of_sum;
        dot += part_of_dot;
      }
      store(norm.data + v * kLanes, sum);
      store(delta.data + v * kLanes, dot);
    }
  }

  // Products of a block of keys and one of queries.
  void accumulate(int64_t key, int64_t num_keys, const QueryBlock& block, bool first) {
    const int64_t vectors = (block.size + kLanes - 1) / kLanes;
    float *p_block = p.data + key * kBlockQ, *grad_block = grad_p.data + key * kBlockQ;
    float* p_rows = kPack == 1 ? p_block : p_along.data;
    float* s_rows = kPack == 1 ? grad_block : grad_s_along.data;
    float* s_columns = kPack == 1 ? grad_block : grad_s_across.data;
    for (int64_t v = 0; v < vectors; ++v) {
      const Floats by = load(norm.data + v * kLanes), mean = load(delta.data + v * kLanes);
      Base::for_packs(num_keys, [&](int64_t r, auto n) {
        Floats grad_s[kPack] = {};
        for (int i = 0; i < n; ++i) {
          const int64_t at = (r + i) * kBlockQ + v * kLanes;
          const Floats y = load(p_block + at) * by;
          grad_s[i] = y * (load(grad_block + at) - mean);
          Operand::store_along(p_rows + (r + i) * stride_p, v, y);
          Operand::store_along(s_rows + (r + i) * stride_p, v, grad_s[i]);
        }
        Operand::store_across(s_columns + r / kPack * kBlockQ, v, grad_s);
      });
    }

    const int64_t of_queries = (block.size + kPack - 1) / kPack;
    const int64_t of_keys = (num_keys + kPack - 1) / kPack;
    multiply<Operand>({p_rows, grad_rows.data, grad_v.data + key * stride_d, stride_p, stride_d,
                       stride_d, num_keys, stride_d / kLanes, of_queries},
                      Add{});
    multiply<Operand>({s_rows, query_rows.data, grad_k.data + key * stride_d, stride_p, stride_d,
                       stride_d, num_keys, stride_d / kLanes, of_queries},
                      Add{});
    const Product product{Base::channels_of(key_channels.data, key), s_columns, grad_q.data, kUnits,
                          kBlockQ, kBlockQ, head_dim, vectors, of_keys};
    if (first)
      multiply<Operand>(product, Assign{});
    else
      multiply<Operand>(product, Add{});
  }

  void differentiate(const Segment& s, int64_t head, int64_t first_query) {
    const QueryBlock block(s, first_query);
    const int64_t vectors = (block.size + kLanes - 1) / kLanes;
    const int64_t token = s.begin_q + first_query;
    pack_transposed(Base::along(a.q, head, token, block.size), queries.data, kBlockQ);
    pack_transposed(Base::along(g.out, head, token, block.size), grads.data, kBlockQ);
    pack(Base::across(a.q, head, token, block.size), query_rows.data, stride_d);
    pack(Base::across(g.out, head, token, block.size), grad_rows.data, stride_d);
    for (float* x : {grad_lse.data, norm.data, delta.data}) std::fill_n(x, kBlockQ, 0.0f);
    std::fill_n(top.data, kBlockQ, kLowest);
    for (int64_t i = 0; g.lse && i < block.size; ++i)
      grad_lse.data[i] = g.lse[head * g.lse_stride_h + (token + i) * g.lse_stride_t];

    const int64_t begin = block.begin / kBlockK * kBlockK;
    for (int64_t key = begin; key < block.end; key += kBlockK) {
      const int64_t num_keys = std::min(kBlockK, block.end - key);
      float* scores = p.data + key * kBlockQ;
      Base::multiply_heads(keys.data + key * stride_units, queries.data, scores, num_keys, vectors,
                           Scale{a.score_scale});
      Base::mask(s, block, key, num_keys, vectors, scores);
      for (int64_t v = 0; v < vectors; ++v) {
        float* x = top.data + v * kLanes;
        store(x, Base::largest(load(x), scores + v * kLanes, num_keys));
      }
    }
    for (int64_t key = begin; key < block.end; key += kBlockK) {
      const int64_t num_keys = std::min(kBlockK, block.end - key);
      Base::multiply_heads(values.data + key * stride_units, grads.data,
                           grad_p.data + key * kBlockQ, num_keys, vectors, Assign{});
      recompute(key, num_keys, vectors);
    }
    for (int64_t i = 0; i < kBlockQ; ++i) {
      norm.data[i] = norm.data[i] == 0.0f ? 0.0f : 1.0f / norm.data[i];
      delta.data[i] = delta.data[i] * norm.data[i] - grad_lse.data[i];
    }
    for (int64_t key = begin; key < block.end; key += kBlockK)
      accumulate(key, std::min(kBlockK, block.end - key), block, key == begin);

    const int64_t stride = a.num_heads * head_dim;
    Base::store_rows(grad_q.data, block.size, (scalar_t*)g.q + token * stride + head * head_dim, stride,
                     [&](int64_t) { return splat(a.softmax_scale); });
  }

  // Gradients of the keys and values of a head, and of the queries that look at them.
  void differentiate(const Segment& s, int64_t head_k) {
    Base::pack_rows(s, a.k, head_k, keys.data);
    Base::pack_channels(s, a.k, head_k, key_channels.data);
    Base::pack_rows(s, a.v, head_k, values.data);
    for (float* x : {grad_k.data, grad_v.data}) std::fill_n(x, s.len_k * stride_d, 0.0f);
    for (int64_t head = head_k * a.group; head < (head_k + 1) * a.group; ++head)
      for (int64_t first_query = 0; first_query < s.len_q; first_query += kBlockQ)
        differentiate(s, head, first_query);
    const int64_t num_k_heads = a.num_heads / a.group;
    for (int64_t key = 0; key < s.len_k; ++key) {
      const int64_t at = ((s.begin_k + key) * num_k_heads + head_k) * head_dim;
      for_lanes(head_dim, [&](int64_t d, auto n) {
        const int64_t from = key * stride_d + d;
        store((scalar_t*)g.k + at + d, load(grad_k.data + from) * a.softmax_scale, n);
        store((scalar_t*)g.v + at + d, load(grad_v.data + from), n);
      });
    }
  }
};

// Heads of keys whose costs begin in `[begin, end)`.
inline void attend_backward(const Attention& a, const Gradients& g, int64_t begin, int64_t end) {
  with_scalar(a.dtype, [&](auto scalar) {
    Backward<decltype(scalar)> backward{{a}, g};
    for_heads(a, begin, end,
              [&](const Segment& s, int64_t head_k) { backward.differentiate(s, head_k); });
  });
}

}  // namespace
}  // namespace patchpack::LEVEL
