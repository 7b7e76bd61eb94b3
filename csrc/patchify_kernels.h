// Normalising and cutting a strip of patches, once for each level. No include guard: see level.h.

namespace patchpack::LEVEL {

inline Floats load(const uint8_t* x, All = {}) {
#if defined(LEVEL_HAS_AVX512)
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)x)));
#elif defined(LEVEL_HAS_AVX2)
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)x)));
#else
  Floats v;
  for (int i = 0; i < kLanes; ++i) v[i] = x[i];
  return v;
#endif
}

inline Floats load(const uint8_t* x, int n) {
#if defined(LEVEL_HAS_AVX512)
  return (Floats)_mm512_cvtepi32_ps(
      _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), x)));
#else
  uint8_t lanes[kLanes] = {};
  std::memcpy(lanes, x, n);
  return load(lanes);
#endif
}

// `a / b` rounded to nearest; `inverse` is that of `b`.
inline Floats divide(Floats a, Floats b, Floats inverse) {
#if defined(LEVEL_HAS_AVX2)
  const Floats quotient = a * inverse;
  return fma(fma(-quotient, b, a), inverse, quotient);
#else
  return a / b;
#endif
}

struct Moments {
  Floats mean, std, inverse_std;
};

inline Floats normalise(uint8_t, Floats x, const Moments& m) {
  return divide(divide(x, splat(255.0f), splat(1.0f / 255.0f)) - m.mean, m.std, m.inverse_std);
}

// Floating pixels may be infinite.
template <typename pixel_t>
inline Floats normalise(pixel_t, Floats x, const Moments& m) {
  return (x - m.mean) / m.std;
}

// The rows of pixels of a strip, of each of its frames: the last one stands for those that lack.
// `x + channel * stride_c + y * stride_y` are those of one channel, or of all if interleaved.
template <typename pixel_t>
struct Rows {
  const pixel_t* const* frames;
  int64_t num_frames, stride_c, stride_y;
};

// Cuts a strip, patch by patch.
template <typename pixel_t>
class Cutter {
 public:
  explicit Cutter(const Patch& patch)
      : patch_(patch), buffer_(patch.past_caches ? patch.num_columns() : 0) {}

  // The next strip, of `num_cols * merge` patches from `out` on.
  void start(const Rows<pixel_t>& rows, int64_t num_cols, void* out) {
    rows_ = rows;
    num_cols_ = num_cols;
    out_ = out;
    token_ = 0;
  }

  // One more patch, if one is left.
  void cut() {
    if (is_cut()) return;
    with_scalar(patch_.dtype, [&](auto scalar) { cut_to((decltype(scalar)*)out_); });
    ++token_;
  }

  void finish() {
    while (!is_cut()) cut();
  }

 private:
  bool is_cut() const { return token_ == num_cols_ * patch_.merge; }

  template <typename scalar_t>
  void cut_to(scalar_t* out) {
    const int64_t size = patch_.size, run = patch_.run();
    scalar_t* columns = patch_.past_caches ? (scalar_t*)buffer_.data() : out;
    const Cell cell = token_to_cell(token_, num_cols_, patch_.merge);
    const int64_t corner = cell.row * size * rows_.stride_y + cell.col * run;
    for (int64_t channel = 0; channel < patch_.num_runs(); ++channel)
      for (int64_t frame = 0; frame < rows_.num_frames; ++frame) {
        const pixel_t* x = rows_.frames[frame] + corner + channel * rows_.stride_c;
        scalar_t* first = columns + (channel * patch_.temporal + frame) * size * run;
        const int64_t copies = frame + 1 < rows_.num_frames ? 1 : patch_.temporal - frame;
        for_lanes_again(run, [&](int64_t i, auto n) {
          const int64_t column = channel * run + i;
          const Moments moments{load(&patch_.mean[column], n), load(&patch_.std[column], n),
                                load(&patch_.inverse_std[column], n)};
          for (int64_t y = 0; y < size; ++y) {
            const Floats value =
                normalise(pixel_t{}, load(x + y * rows_.stride_y + i, n), moments);
            for (int64_t copy = 0; copy < copies; ++copy)
              store(first + (copy * size + y) * run + i, value, n);
          }
        });
      }
    if (patch_.past_caches)
      copy_bytes(out, columns, patch_.num_columns() * sizeof(scalar_t), true);
    out_ = out + patch_.num_columns();
  }

  const Patch& patch_;
  Rows<pixel_t> rows_{};
  int64_t num_cols_ = 0, token_ = 0;
  void* out_ = nullptr;  // where the next patch goes
  std::vector<float> buffer_;  // a patch on its way past the caches
};

}  // namespace patchpack::LEVEL
