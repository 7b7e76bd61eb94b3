// What rope, rope_2d and mrope share on the torch side: where heads are.
#pragma once

#include "angles.h"
#include "tensor.h"

namespace patchpack {

// The heads `[T, H, D]` of one tensor, and where they go: elsewhere, or where they are.
struct Heads {
  const void* x;
  void* out;
  int64_t stride_t, stride_h, out_stride_t, out_stride_h, num_heads;
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

// A tensor and where it goes.
struct Turned {
  Tensor x, out;

  Heads heads() const {
    return {x.const_data_ptr(), out.mutable_data_ptr(), x.stride(0), x.stride(1),
            out.stride(0),      out.stride(1),          x.size(1)};
  }
};

inline Turned to_elsewhere(const Tensor& x) {
  return {last_contiguous(x), torch::stable::new_empty(x, x.sizes(), x.scalar_type())};
}
inline Turned in_place(const Tensor& x) { return {x, x}; }

// Calls `body(rotation, begin, end)` over parts of the tokens.
template <typename Body>
void rotate_both(const Turned& q, const Turned& k, int64_t num_pairs, bool interleaved,
                 bool inverse, const Body& body) {
  const Rotation r{q.x.scalar_type(), q.x.size(2), num_pairs,
                   interleaved,       inverse,     {q.heads(), k.heads()}};
  parallel_for(q.x.size(0), (q.x.size(1) + k.x.size(1)) * q.x.size(2),
               [&](int64_t begin, int64_t end) { body(r, begin, end); });
}

}  // namespace patchpack
