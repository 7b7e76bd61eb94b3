// Kernels of patchpack.ops.scatter_tokens for one level of the CPU: see level.h.

namespace patchpack::LEVEL {

// Rows `[begin, end)` of the result.
inline void scatter(const Sources& sources, const Rows& embeds, const Rows& tokens,
                    const Rows& vectors, char* out, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t source = sources.of[row];
    const char* from = source < 0                     ? embeds.at(row)
                       : source < sources.num_vectors ? vectors.at(source)
                                                      : tokens.at(source - sources.num_vectors);
    copy_bytes(out + row * sources.num_bytes, from, sources.num_bytes, sources.past_caches);
  }
  fence();
}

// A row of a gradient, or zeros.
inline void copy_grad(const Sources& to, const char* grad, char* out) {
  if (grad)
    copy_bytes(out, grad, to.num_bytes, to.past_caches);
  else
    std::memset(out, 0, to.num_bytes);
}

// Rows `[begin, end)` of the gradient of the embeddings.
inline void embeds_backward(const Sources& to, const Rows& grad, char* out, int64_t begin,
                            int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    copy_grad(to, to.of[row] < 0 ? grad.at(row) : nullptr, out + row * to.num_bytes);
  fence();
}

// Tokens `[begin, end)` of theirs; those that another one replaced have none.
inline void tokens_backward(const Sources& to, const Rows& grad, const Integers& rows, char* out,
                            int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = rows[i];
    const bool won = row >= 0 && row < to.num_rows && to.of[row] == to.num_vectors + i;
    copy_grad(to, won ? grad.at(row) : nullptr, out + i * to.num_bytes);
  }
  fence();
}

}  // namespace patchpack::LEVEL
