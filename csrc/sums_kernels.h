// Kernels of sums.cpp for one level of the CPU: see level.h.

namespace patchpack::LEVEL {

// Blocks of channels `[begin, end)`, counted label by label. Few rows are added in float, then in
// double: the order is that of the rows, and long sums are as accurate as short ones.
inline void sum_rows(const LabelledRows& r, int64_t begin, int64_t end) {
  constexpr int64_t kFew = 16;
  with_scalar(r.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    float few[kSumChannels];
    double all[kSumChannels];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t label = item / r.num_blocks, channel = item % r.num_blocks * kSumChannels;
      const int64_t size = std::min(kSumChannels, r.x.num_channels - channel);
      std::fill(all, all + size, 0.0);
      for (int64_t i = r.begins[label]; i < r.begins[label + 1];) {
        const int64_t stop = std::min(i + kFew, r.begins[label + 1]);
        std::fill(few, few + size, 0.0f);
        for (; i < stop; ++i) {
          const scalar_t* x = (const scalar_t*)r.x.at(r.rows[i]) + channel;
          for_lanes(size, [&](int64_t c, auto n) {
            store(few + c, load(few + c, n) + load(x + c, n), n);
          });
        }
        for (int64_t c = 0; c < size; ++c) all[c] += few[c];
      }
      for (int64_t c = 0; c < size; ++c) few[c] = (float)all[c];
      scalar_t* out = (scalar_t*)r.out + label * r.x.num_channels + channel;
      for_lanes(size, [&](int64_t c, auto n) { store(out + c, load(few + c, n), n); });
    }
  });
}

}  // namespace patchpack::LEVEL
