// What rope, rope_2d and mrope share on the torch side: where heads are.
#pragma once

#include "angles.h"
#include "tensor.h"

namespace patchpack {

// The heads `[T, H, D]` of one tensor, and where they go: contiguous.
struct Heads {
  const void* x;
  void* out;
  int64_t stride_t, stride_h, num_heads;
};

struct Rotation {
  ScalarType dtype;
  int64_t head_dim, num_pairs;
  bool interleaved, inverse;
  Heads heads[2];  // of q and k
};

// Of `position_ids`; of four rows the first is that of text, which has no say.
inline Positions positions_of(const Tensor& ids) {
  const bool is_long = ids.scalar_type() == ScalarType::Long;
  const int64_t skipped = (ids.size(0) - 3) * ids.stride(0) * (is_long ? 8 : 4);
  return {(const char*)ids.const_data_ptr() + skipped, is_long, ids.stride(0), ids.stride(1)};
}

// Allocates the rotated `q` and `k` and calls `body(rotation, begin, end)` over parts of the tokens.
template <typename Body>
std::tuple<Tensor, Tensor> rotate_both(const Tensor& q, const Tensor& k, int64_t num_pairs,
                                       bool interleaved, bool inverse, const Body& body) {
  const Tensor inputs[] = {last_contiguous(q), last_contiguous(k)};
  const Tensor outputs[] = {empty_of(q), empty_of(k)};
  Rotation r{q.scalar_type(), q.size(2), num_pairs, interleaved, inverse, {}};
  for (int i = 0; i < 2; ++i) {
    const Tensor& x = inputs[i];
    r.heads[i] = {x.const_data_ptr(), outputs[i].mutable_data_ptr(), x.stride(0), x.stride(1),
                  x.size(1)};
  }
  parallel_for(q.size(0), (q.size(1) + k.size(1)) * q.size(2),
               [&](int64_t begin, int64_t end) { body(r, begin, end); });
  return {outputs[0], outputs[1]};
}

}  // namespace patchpack
