// Attention of packed segments; the maths is in patchpack.reference.varlen_attention.
#include <cmath>

#include "tensor.h"

namespace patchpack {
namespace {

constexpr int64_t kBlockQ = 128;  // queries
constexpr double kLog2 = 0.693147180559945309;

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Memory of floats on a cache line of its own.
struct Buffer {
  std::vector<float> memory;
  float* data;

  explicit Buffer(int64_t size) : memory(size + 15) {
    const auto address = (uintptr_t)memory.data();
    data = memory.data() + (round_up((int64_t)address, 64) - (int64_t)address) / sizeof(float);
  }
};

// The heads `[T, H, D]` of a tensor.
struct Heads {
  const void* x;
  int64_t stride_t, stride_h;
};

// Keys of a segment and the queries that see any of them. Query `i` stands at key `i + shift` and
// sees `left` keys before and `right` after it.
struct Segment {
  int64_t begin_q, len_q, begin_k, len_k;
  int64_t shift, left, right;
  int64_t cost;  // of a head

  int64_t first_key(int64_t query) const { return std::max<int64_t>(0, query + shift - left); }
  int64_t end_key(int64_t query) const { return std::min(len_k, query + shift + right + 1); }
  int64_t first_query(int64_t key) const { return key - shift - right; }
  int64_t end_query(int64_t key) const { return key - shift + left + 1; }
};

// Queries of a block, the keys that any of them sees, and those that all see.
struct QueryBlock {
  int64_t first, size, begin, end, full_begin, full_end;

  QueryBlock(const Segment& s, int64_t first_query)
      : first(first_query), size(std::min(kBlockQ, s.len_q - first_query)),
        begin(s.first_key(first)), end(s.end_key(first + size - 1)),
        full_begin(s.first_key(first + size - 1)), full_end(s.end_key(first)) {}

  int64_t vectors(int64_t lanes) const { return (size + lanes - 1) / lanes; }
  int64_t cost() const { return 16 + end - begin; }
};

struct Range {
  int64_t begin, end;
};

struct Attention {
  ScalarType dtype;
  Heads q, k, v;
  void* out;   // [Tq, H, D]; the backward pass reads it
  float* lse;  // [H, Tq]; likewise
  int64_t num_q_tokens, num_heads, group, head_dim;
  float softmax_scale, score_scale;  // the latter with powers of 2
  std::vector<Segment> segments;     // but for those in which no query sees a key
  std::vector<Range> blind, unseen;  // queries and keys that these leave out
  int64_t longest_k, cost;
};

struct Gradients {
  Heads out;
  const float* lse;  // [H, Tq], or null
  int64_t lse_stride_h, lse_stride_t;
  void *q, *k, *v;

  float of_lse(int64_t head, int64_t token) const {
    return lse ? lse[head * lse_stride_h + token * lse_stride_t] : 0.0f;
  }
};

// `body(segment, head, first_query)` for the blocks of queries whose costs begin in `[begin, end)`.
template <typename Body>
void for_blocks(const Attention& a, int64_t begin, int64_t end, const Body& body) {
  int64_t cost = 0;
  for (const Segment& s : a.segments)
    for (int64_t head = 0; head < a.num_heads; ++head) {
      if (cost >= end) return;
      if (cost + s.cost <= begin) {
        cost += s.cost;
        continue;
      }
      for (int64_t first = 0; first < s.len_q; first += kBlockQ) {
        if (begin <= cost && cost < end) body(s, head, first);
        cost += QueryBlock(s, first).cost();
      }
    }
}

// `body(segment, head_k)` for the heads of keys whose costs begin in `[begin, end)`.
template <typename Body>
void for_heads(const Attention& a, int64_t begin, int64_t end, const Body& body) {
  int64_t cost = 0;
  for (const Segment& s : a.segments)
    for (int64_t head = 0; head < a.num_heads; head += a.group, cost += s.cost * a.group)
      if (begin <= cost && cost < end) body(s, head / a.group);
}

}  // namespace
}  // namespace patchpack

#define KERNELS_USE_BF16
#define KERNELS "varlen_attention.h"
#include "foreach_level.h"

namespace patchpack {
namespace {

// Where segments begin and end: within the tokens and in order, whatever `cu_seqlens` holds.
std::vector<int64_t> bounds_of(const Tensor& cu_seqlens, int64_t num_tokens) {
  const int32_t* values = cu_seqlens.const_data_ptr<int32_t>();
  std::vector<int64_t> bounds{0};
  for (int64_t i = 1; i < cu_seqlens.size(0); ++i) {
    const int64_t bound = values[i * cu_seqlens.stride(0)];
    bounds.push_back(std::clamp(bound, bounds.back(), num_tokens));
  }
  return bounds;
}

Heads heads_of(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1)}; }

Attention attention_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                       const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                       double softmax_scale, int64_t left, int64_t right) {
  Attention a{};
  a.dtype = q.scalar_type();
  a.q = heads_of(q), a.k = heads_of(k), a.v = heads_of(v);
  a.out = out.mutable_data_ptr(), a.lse = lse.mutable_data_ptr<float>();
  a.num_q_tokens = q.size(0), a.num_heads = q.size(1), a.head_dim = q.size(2);
  a.group = q.size(1) / k.size(1);
  a.softmax_scale = (float)softmax_scale, a.score_scale = (float)(softmax_scale / kLog2);

  const int64_t unlimited = int64_t{1} << 40;
  left = left < 0 ? unlimited : std::min(left, unlimited);
  right = right < 0 ? unlimited : std::min(right, unlimited);
  const std::vector<int64_t> bounds_q = bounds_of(cu_seqlens_q, q.size(0));
  const std::vector<int64_t> bounds_k = bounds_of(cu_seqlens_k, k.size(0));
  for (size_t i = 0; i + 1 < bounds_q.size(); ++i) {
    const int64_t begin_q = bounds_q[i], end_q = bounds_q[i + 1], len_q = end_q - begin_q;
    const int64_t begin_k = bounds_k[i], end_k = bounds_k[i + 1], len_k = end_k - begin_k;
    const int64_t shift = len_k - len_q;
    const int64_t first = len_k ? std::clamp<int64_t>(-shift - right, 0, len_q) : len_q;
    const int64_t end = std::clamp(len_k - shift + left, first, len_q);
    a.blind.push_back({begin_q, begin_q + first});
    a.blind.push_back({begin_q + end, end_q});
    Segment s{begin_q + first, end - first, begin_k, len_k, shift + first, left, right, 0};
    for (int64_t query = 0; query < s.len_q; query += kBlockQ)
      s.cost += QueryBlock(s, query).cost();
    if (s.cost * a.num_heads == 0) {
      a.unseen.push_back({begin_k, end_k});
      continue;
    }
    a.segments.push_back(s);
    a.longest_k = std::max(a.longest_k, len_k);
    a.cost += s.cost * a.num_heads;
  }
  a.blind.push_back({bounds_q.back(), q.size(0)});
  a.unseen.push_back({bounds_k.back(), k.size(0)});
  return a;
}

// Zeros rows of a contiguous tensor `[T, H, D]`.
void zero(const Tensor& x, const std::vector<Range>& rows) {
  const int64_t size = x.size(1) * x.size(2) * (x.scalar_type() == ScalarType::Float ? 4 : 2);
  for (const Range& range : rows)
    if (range.begin < range.end)
      std::memset((char*)x.mutable_data_ptr() + range.begin * size, 0,
                  (range.end - range.begin) * size);
}

}  // namespace

std::tuple<Tensor, Tensor> varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q,
                                            Tensor cu_seqlens_k, double softmax_scale, int64_t left,
                                            int64_t right) {
  q = last_contiguous(q), k = last_contiguous(k), v = last_contiguous(v);
  const Tensor out = empty_of(q), lse = empty({q.size(1), q.size(0)}, ScalarType::Float);
  const Attention a = attention_of(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, softmax_scale,
                                   left, right);
  zero(out, a.blind);
  for (int64_t head = 0; head < a.num_heads; ++head)
    for (const Range& range : a.blind)
      std::fill(a.lse + head * a.num_q_tokens + range.begin,
                a.lse + head * a.num_q_tokens + range.end, -INFINITY);
  parallel_for(a.cost, a.head_dim,
               [&](int64_t begin, int64_t end) { AT_LEVEL(attend(a, begin, end)); });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> varlen_attention_backward(
    Tensor grad_out, std::optional<Tensor> grad_lse, Tensor q, Tensor k, Tensor v, Tensor out,
    Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, double softmax_scale, int64_t left,
    int64_t right) {
  q = last_contiguous(q), k = last_contiguous(k), v = last_contiguous(v);
  grad_out = last_contiguous(grad_out);
  const Attention a = attention_of(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, softmax_scale,
                                   left, right);
  const Tensor grad_q = empty_of(q), grad_k = empty_of(k), grad_v = empty_of(v);
  Gradients g{heads_of(grad_out), nullptr, 0, 0, grad_q.mutable_data_ptr(),
              grad_k.mutable_data_ptr(), grad_v.mutable_data_ptr()};
  if (grad_lse) {
    g.lse = grad_lse->const_data_ptr<float>();
    g.lse_stride_h = grad_lse->stride(0), g.lse_stride_t = grad_lse->stride(1);
  }
  zero(grad_q, a.blind);
  zero(grad_k, a.unseen);
  zero(grad_v, a.unseen);
  parallel_for(a.cost, a.head_dim,
               [&](int64_t begin, int64_t end) { AT_LEVEL(attend_backward(a, g, begin, end)); });
  return {grad_q, grad_k, grad_v};
}

STABLE_TORCH_LIBRARY_IMPL(patchpack, CPU, library) {
  library.impl("varlen_attention.native", TORCH_BOX(&varlen_attention));
  library.impl("varlen_attention_backward.native", TORCH_BOX(&varlen_attention_backward));
}

}  // namespace patchpack
