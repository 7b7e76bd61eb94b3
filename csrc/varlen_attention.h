// Kernels of patchpack.ops.varlen_attention for one level of the CPU: see level.h.
//
// Scores are held transposed, keys by queries: what belongs to a query is a lane, so that maxima,
// sums and factors are vectors, and probabilities are operands of the next product as they are.
#include "gemm_tiles.h"

namespace patchpack::LEVEL {
namespace {

// `2**x`, accurate to an ulp, and 0 at -inf; `2**x = 2**r * 2**(x - r)` with `0 <= r <= 1`.
inline Floats exp2(Floats x) {
#if defined(LEVEL_HAS_AVX512)
  const Floats r = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
#else
  const auto zero = x < -126.0f;
  x = zero ? splat(-126.0f) : x > 127.0f ? splat(127.0f) : x;
  const Floats magic = splat(12582912.0f);  // its last bit is worth 1
  const Floats shifted = (x - 0.5f) + magic, r = x - (shifted - magic);
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
  static constexpr int64_t kShortSum = 16;            // terms: their sum errs less
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
  float* channels_of(float* channels, int64_t key) const {
    return channels + key / kBlockK * head_dim * kUnits;
  }
  int64_t size_of_channels() const { return round_up(a.longest_k, kBlockK) / kPack * head_dim; }

  // `c[key, query]` from `rows[key] . columns[query]`
  template <typename Epilogue>
  void multiply_heads(const float* rows, const float* columns, float* c, int64_t num_keys,
                      int64_t vectors, Epilogue epilogue) const {
    multiply<Operand>({rows, columns, c, stride_units, kBlockQ, kBlockQ, num_keys, vectors, units},
                      epilogue);
  }

  // `c[channel, query]`, to which every block of keys adds `channels[channel, key] . p[key, query]`
  void multiply_channels(float* channels, const float* p, float* c, const QueryBlock& block,
                         int64_t key, int64_t num_keys) const {
    const Product product{channels_of(channels, key), p, c, kUnits, kBlockQ, kBlockQ, head_dim,
                          block.vectors(kLanes), (num_keys + kPack - 1) / kPack};
    if (key == first_key(block))
      multiply<Operand>(product, Assign{});
    else
      multiply<Operand>(product, Add{});
  }
  static int64_t first_key(const QueryBlock& block) { return block.begin / kBlockK * kBlockK; }

  // Scores of keys that queries do not see become -inf.
  static void mask(const Segment& s, const QueryBlock& block, int64_t key, int64_t num_keys,
                   float* scores) {
    if (key >= block.full_begin && key + num_keys <= block.full_end) return;
    Ints lanes;
    for (int i = 0; i < kLanes; ++i) lanes[i] = i;
    for (int64_t r = 0; r < num_keys; ++r) {
      const int first = (int)std::clamp<int64_t>(s.first_query(key + r) - block.first, 0, kBlockQ);
      const int end = (int)std::clamp<int64_t>(s.end_query(key + r) - block.first, 0, kBlockQ);
      for (int64_t v = 0; v < block.vectors(kLanes); ++v) {
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

  // The head's place in a contiguous tensor of q's shape.
  scalar_t* row_of(const void* x, int64_t head, int64_t token) const {
    return (scalar_t*)x + (token * a.num_heads + head) * head_dim;
  }
  // Channels by queries `[head_dim, kBlockQ]`, times `factor` of a vector of queries, into `out`.
  template <typename Factor>
  void store_queries(const float* x, scalar_t* out, int64_t num_queries,
                     const Factor& factor) const {
    for (int64_t i = 0; i < num_queries; i += kLanes) {
      const Floats by = factor(i);
      for (int64_t d = 0; d < head_dim; d += kLanes) {
        const int n = (int)std::min<int64_t>(kLanes, head_dim - d);
        Floats y[kLanes] = {};
        for (int l = 0; l < n; ++l) y[l] = load(x + (d + l) * kBlockQ + i) * by;
        transpose(y);
        for (int64_t l = 0; l < std::min<int64_t>(kLanes, num_queries - i); ++l)
          store(out + (i + l) * a.num_heads * head_dim + d, y[l], n);
      }
    }
  }
};

template <typename scalar_t>
struct Forward : Blocks<scalar_t> {
  using Base = Blocks<scalar_t>;
  using typename Base::Operand;
  using Base::a, Base::head_dim, Base::stride_units;
  using Base::kBlockK, Base::kLowest, Base::kPack, Base::kShortSum, Base::kUnits;

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

      const Floats scale = splat(a.score_scale);
      Floats sum = {};
      for (int64_t begin = 0; begin < num_keys; begin += kShortSum) {
        Floats part = {};
        Base::for_packs(std::min(kShortSum, num_keys - begin), [&](int64_t i, auto n) {
          Floats probabilities[kPack] = {};
          for (int l = 0; l < n; ++l) {
            const Floats score = load(x + (begin + i + l) * kBlockQ);
            probabilities[l] = exp2(fma(score, scale, -new_top));
            part += probabilities[l];
          }
          Operand::store_across(p.data + (begin + i) / kPack * kBlockQ, v, probabilities);
        });
        sum += part;
      }

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
    const int64_t vectors = block.vectors(kLanes), token = s.begin_q + first_query;
    pack_transposed(Base::along(a.q, head, token, block.size), queries.data, kBlockQ);
    std::fill_n(top.data, kBlockQ, kLowest);
    std::fill_n(total.data, kBlockQ, 0.0f);

    const int64_t begin = Base::first_key(block);
    for (int64_t key = begin; key < block.end; key += kBlockK) {
      const int64_t num_keys = std::min(kBlockK, block.end - key);
      Base::multiply_heads(keys.data + key * stride_units, queries.data, scores.data, num_keys,
                           vectors, Assign{});
      Base::mask(s, block, key, num_keys, scores.data);
      softmax(num_keys, vectors, key == begin);
      Base::multiply_channels(values.data, p.data, acc.data, block, key, num_keys);
    }

    float* lse = a.lse + head * a.num_q_tokens + token;
    for (int64_t i = 0; i < block.size; ++i)
      lse[i] = (float)(top.data[i] * kLog2 + std::log(total.data[i]));
    Base::store_queries(acc.data, Base::row_of(a.out, head, token), block.size,
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
  using Base::a, Base::head_dim, Base::stride_units;
  using Base::kBlockK, Base::kLowest, Base::kPack, Base::kShortSum, Base::kUnits;

  // Float32 sees that lse and the output were rounded: what they stand for is then made anew, and
  // for that the scores of all keys are kept.
  static constexpr bool kAnew = kPack == 1;

  const Gradients& g;
  const int64_t stride_d = round_up(head_dim, kLanes);
  const int64_t stride_p = kBlockQ / kPack;
  const int64_t num_kept = kAnew ? a.longest_k : kBlockK;
  // of a head of keys
  Buffer keys{a.longest_k * stride_units}, key_channels{Base::size_of_channels()};
  Buffer values{a.longest_k * stride_units};
  Buffer grad_k{a.longest_k * stride_d}, grad_v{a.longest_k * stride_d};
  // of a block of queries
  Buffer queries{head_dim * kBlockQ}, grads{head_dim * kBlockQ};
  Buffer query_rows{kBlockQ * stride_d}, grad_rows{kBlockQ * stride_d};
  Buffer scores{num_kept * kBlockQ}, grad_p{num_kept * kBlockQ};
  Buffer grad_q{head_dim * kBlockQ};
  Buffer top{kBlockQ}, norm{kBlockQ}, delta{kBlockQ};
  // of it and a block of keys: operands, where they are not the scores and `grad_p` themselves
  Buffer p_along{kAnew ? 0 : kBlockK * stride_p}, grad_s_along{kAnew ? 0 : kBlockK * stride_p};
  Buffer grad_s_across{kAnew ? 0 : kUnits * kBlockQ};

  float* of_keys(const Buffer& kept, int64_t key) const {
    return kept.data + (kAnew ? key * kBlockQ : 0);
  }

  // Scores, as powers of 2, and `grad_p` of a block of keys.
  void multiply_keys(const Segment& s, const QueryBlock& block, int64_t key, int64_t num_keys) {
    const int64_t vectors = block.vectors(kLanes);
    Base::multiply_heads(keys.data + key * stride_units, queries.data, of_keys(scores, key),
                         num_keys, vectors, Scale{a.score_scale});
    Base::mask(s, block, key, num_keys, of_keys(scores, key));
    Base::multiply_heads(values.data + key * stride_units, grads.data, of_keys(grad_p, key),
                         num_keys, vectors, Assign{});
  }

  // `top`, with which `p = 2**(scores - top)`, and `delta`: the mean of `grad_p`, less that of lse.
  void recall(int64_t head, int64_t token, int64_t num_queries) {
    const int64_t stride = a.num_heads * head_dim;
    const scalar_t* out = Base::row_of(a.out, head, token);
    const scalar_t* grad = Base::rows_of(g.out, head, token);
    for (int64_t i = 0; i < num_queries; i += kLanes) {
      Floats dots[kLanes] = {};
      for (int64_t l = i; l < std::min(i + kLanes, num_queries); ++l) {
        __builtin_prefetch(out + (l + kRowsAhead) * stride);
        for_lanes(head_dim, [&](int64_t d, auto n) {
          dots[l - i] += load(grad + l * g.out.stride_t + d, n) * load(out + l * stride + d, n);
        });
      }
      transpose(dots);
      for (int l = 1; l < kLanes; ++l) dots[0] += dots[l];
      store(delta.data + i, dots[0]);
    }
    for (int64_t i = 0; i < num_queries; ++i) {
      top.data[i] = (float)(a.lse[head * a.num_q_tokens + token + i] / kLog2);
      delta.data[i] -= g.of_lse(head, token + i);
    }
  }

  // Scores become `p` but for `norm`, and `delta` is theirs.
  void make_anew(const Segment& s, const QueryBlock& block, int64_t head, int64_t token) {
    const auto for_keys = [&](const auto& body) {
      for (int64_t key = Base::first_key(block); key < block.end; key += kBlockK)
        body(key, std::min(kBlockK, block.end - key));
    };
    std::fill_n(top.data, kBlockQ, kLowest);
    for_keys([&](int64_t key, int64_t num_keys) {
      multiply_keys(s, block, key, num_keys);
      for (int64_t i = 0; i < block.size; i += kLanes)
        store(top.data + i, Base::largest(load(top.data + i), of_keys(scores, key) + i, num_keys));
    });
    for (int64_t i = 0; i < block.size; i += kLanes) {
      Floats total = {}, dot = {};
      for_keys([&](int64_t key, int64_t num_keys) {
        for (int64_t begin = 0, end; begin < num_keys; begin = end) {
          end = std::min(begin + kShortSum, num_keys);
          Floats part_of_total = {}, part_of_dot = {};
          for (int64_t r = begin; r < end; ++r) {
            float* x = of_keys(scores, key) + r * kBlockQ + i;
            const Floats p = exp2(load(x) - load(top.data + i));
            store(x, p);
            part_of_total += p;
            part_of_dot = fma(p, load(of_keys(grad_p, key) + r * kBlockQ + i), part_of_dot);
          }
          total += part_of_total;
          dot += part_of_dot;
        }
      });
      store(norm.data + i, 1.0f / total);
      store(delta.data + i, dot / total);
    }
    for (int64_t i = 0; i < block.size; ++i) delta.data[i] -= g.of_lse(head, token + i);
  }
  // Products of a block of keys and one of queries.
  void accumulate(const QueryBlock& block, int64_t key, int64_t num_keys) {
    const float *p_block = of_keys(scores, key), *grad_block = of_keys(grad_p, key);
    float* p_rows = kAnew ? of_keys(scores, key) : p_along.data;
    float* s_rows = kAnew ? of_keys(grad_p, key) : grad_s_along.data;
    float* s_columns = kAnew ? of_keys(grad_p, key) : grad_s_across.data;
    const int64_t vectors = block.vectors(kLanes), stride = stride_p;
    Base::for_packs(num_keys, [&](int64_t r, auto n) {
      for (int64_t v = 0; v < vectors; ++v) {
        const Floats of_p = load((kAnew ? norm : top).data + v * kLanes);
        const Floats mean = load(delta.data + v * kLanes);
        Floats grad_s[kPack] = {};
        for (int i = 0; i < n; ++i) {
          const int64_t at = (r + i) * kBlockQ + v * kLanes;
          const Floats p = kAnew ? load(p_block + at) * of_p : exp2(load(p_block + at) - of_p);
          grad_s[i] = p * (load(grad_block + at) - mean);
          Operand::store_along(p_rows + (r + i) * stride, v, p);
          Operand::store_along(s_rows + (r + i) * stride, v, grad_s[i]);
        }
        Operand::store_across(s_columns + r / kPack * kBlockQ, v, grad_s);
      }
    });

    const int64_t of_queries = (block.size + kPack - 1) / kPack;
    for (int64_t i = 0; i < of_queries; i += kUnits) {  // shorter sums of float32, which err less
      const auto add = [&](const float* rows, const Buffer& columns, const Buffer& grad) {
        multiply<Operand>({rows + i, columns.data + i * stride_d, grad.data + key * stride_d,
                           stride_p, stride_d, stride_d, num_keys, stride_d / kLanes,
                           std::min(kUnits, of_queries - i)},
                          Add{});
      };
      add(p_rows, grad_rows, grad_v);
      add(s_rows, query_rows, grad_k);
    }
    Base::multiply_channels(key_channels.data, s_columns, grad_q.data, block, key, num_keys);
  }

  void differentiate_queries(const Segment& s, int64_t head, int64_t first_query) {
    const QueryBlock block(s, first_query);
    const int64_t token = s.begin_q + first_query;
    pack_transposed(Base::along(a.q, head, token, block.size), queries.data, kBlockQ);
    pack_transposed(Base::along(g.out, head, token, block.size), grads.data, kBlockQ);
    pack(Base::across(a.q, head, token, block.size), query_rows.data, stride_d);
    pack(Base::across(g.out, head, token, block.size), grad_rows.data, stride_d);
    if (kAnew)
      make_anew(s, block, head, token);
    else
      recall(head, token, block.size);
    for (int64_t key = Base::first_key(block); key < block.end; key += kBlockK) {
      const int64_t num_keys = std::min(kBlockK, block.end - key);
      if (!kAnew) multiply_keys(s, block, key, num_keys);
      accumulate(block, key, num_keys);
    }
    Base::store_queries(grad_q.data, Base::row_of(g.q, head, token), block.size,
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
        differentiate_queries(s, head, first_query);
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
