// Resizing rows of pixels, once for each level. No include guard: see level.h.
//
// Sums run over whole vectors of bytes: along a row where the height is resized, and, where the
// width is, down the columns of a block of rows that is transposed before and after.

namespace patchpack::LEVEL {

constexpr int kBytes = 4 * kLanes;  // in a vector, and rows in a block

typedef uint8_t Bytes __attribute__((vector_size(4 * LEVEL_LANES)));
typedef int16_t Words __attribute__((vector_size(4 * LEVEL_LANES)));

// lanes of 16 bytes, interleaved in place: the lower halves of each, and the upper

template <int half, typename Vector, int... i>
inline Vector interleaved(Vector a, Vector b, std::integer_sequence<int, i...>) {
  constexpr int n = sizeof...(i), lane = 16 * n / sizeof(Vector);
  return __builtin_shufflevector(
      a, b, (i / lane * lane + (i % lane + half * lane) / 2 + i % 2 * n)...);
}
template <typename Vector>
inline Vector lower(Vector a, Vector b) {
  return interleaved<0>(a, b, std::make_integer_sequence<int, sizeof(a) / sizeof(a[0])>{});
}
template <typename Vector>
inline Vector upper(Vector a, Vector b) {
  return interleaved<1>(a, b, std::make_integer_sequence<int, sizeof(a) / sizeof(a[0])>{});
}

// Four vectors, interleaved in lanes as `lower` and `upper` do, to bytes: 0..255 at most.
inline Bytes to_bytes(Ints a, Ints b, Ints c, Ints d) {
#if defined(LEVEL_HAS_AVX512)
  return (Bytes)_mm512_packus_epi16(_mm512_packs_epi32((__m512i)a, (__m512i)b),
                                    _mm512_packs_epi32((__m512i)c, (__m512i)d));
#elif defined(LEVEL_HAS_AVX2)
  return (Bytes)_mm256_packus_epi16(_mm256_packs_epi32((__m256i)a, (__m256i)b),
                                    _mm256_packs_epi32((__m256i)c, (__m256i)d));
#elif defined(__SSE2__)
  return (Bytes)_mm_packus_epi16(_mm_packs_epi32((__m128i)a, (__m128i)b),
                                 _mm_packs_epi32((__m128i)c, (__m128i)d));
#else
  const Ints parts[] = {a, b, c, d};
  Bytes bytes;
  for (int i = 0; i < 16; ++i) bytes[i] = (uint8_t)std::clamp(parts[i / 4][i % 4], 0, 255);
  return bytes;
#endif
}

// A weight of 24 bits is a sum of `kParts` numbers of `kPartBits`, which are signed. Products are of
// 32 bits, each with the same part of the weights of `kTapsAtOnce` taps.
#if defined(LEVEL_HAS_VNNI)
constexpr int kParts = 3, kPartBits = 8, kTapsAtOnce = 4;
#else
constexpr int kParts = 2, kPartBits = 12, kTapsAtOnce = 2;
#endif

constexpr int32_t kHalf = 1 << (kWeightBits - 1);  // of a pixel's value

inline int64_t num_steps(int64_t num_taps) { return (num_taps + kTapsAtOnce - 1) / kTapsAtOnce; }

// `[num_out, num_steps, kParts]`, the lowest part first.
inline void split_weights(Axis& axis) {
  constexpr int bits = 32 / kTapsAtOnce;
  axis.split.assign(axis.num_out * num_steps(axis.num_taps) * kParts, 0);
  uint32_t* parts = axis.split.data();
  for (int64_t o = 0; o < axis.num_out; ++o)
    for (int64_t k = 0; k < axis.num_taps; k += kTapsAtOnce, parts += kParts)
      for (int64_t i = 0; i < std::min<int64_t>(kTapsAtOnce, axis.num_taps - k); ++i) {
        int32_t weight = axis.weights[o * axis.num_taps + k + i];
        for (int part = 0; part < kParts; ++part) {
          const int32_t higher = (weight + (1 << (kPartBits - 1))) >> kPartBits;
          const uint32_t value = weight - (part + 1 < kParts ? higher << kPartBits : 0);
          parts[part] |= (value & (0xFFFFFFFFu >> (32 - bits))) << (bits * i);
          weight = higher;
        }
      }
}

// `sum` and the products of the pixels of `kTapsAtOnce` taps, side by side.
inline Ints add_products(Ints sum, Bytes pixels, Uints weights) {
#if defined(LEVEL_HAS_VNNI)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)pixels, (__m512i)weights);
#elif defined(LEVEL_HAS_AVX512)
  return sum + (Ints)_mm512_madd_epi16((__m512i)pixels, (__m512i)weights);
#elif defined(LEVEL_HAS_AVX2)
  return sum + (Ints)_mm256_madd_epi16((__m256i)pixels, (__m256i)weights);
#elif defined(__SSE2__)
  return sum + (Ints)_mm_madd_epi16((__m128i)pixels, (__m128i)weights);
#else
  const Ints x = (Ints)pixels, w = (Ints)weights;
  return sum + (x & 0xFFFF) * (w << 16 >> 16) + (x >> 16) * (w >> 16);
#endif
}

struct Sum {
  Ints parts[kParts];

  void add(Bytes pixels, const uint32_t* weights) {
    for (int part = 0; part < kParts; ++part)
      parts[part] = add_products(parts[part], pixels, Uints{} + weights[part]);
  }
  Ints rounded() const {
    Ints total = parts[kParts - 1];
    for (int part = kParts - 2; part >= 0; --part) total = (total << kPartBits) + parts[part];
    return (total + kHalf) >> kWeightBits;
  }
};

inline Bytes load_bytes(const uint8_t* x) {
  Bytes bytes;
  std::memcpy(&bytes, x, sizeof bytes);
  return bytes;
}

// The pixels of `kTapsAtOnce` taps side by side, each of their `kBytes` bytes, in four vectors.
struct Taps {
  Bytes pixels[4];

  Taps(const uint8_t* x, int64_t stride) {
    const Bytes a = load_bytes(x), b = load_bytes(x + stride);
    const Bytes lo = lower(a, b), hi = upper(a, b);
#if defined(LEVEL_HAS_VNNI)
    const Bytes c = load_bytes(x + 2 * stride), d = load_bytes(x + 3 * stride);
    const Words lo_next = (Words)lower(c, d), hi_next = (Words)upper(c, d);
    pixels[0] = (Bytes)lower((Words)lo, lo_next);
    pixels[1] = (Bytes)upper((Words)lo, lo_next);
    pixels[2] = (Bytes)lower((Words)hi, hi_next);
    pixels[3] = (Bytes)upper((Words)hi, hi_next);
#else
    pixels[0] = lower(lo, Bytes{});
    pixels[1] = upper(lo, Bytes{});
    pixels[2] = lower(hi, Bytes{});
    pixels[3] = upper(hi, Bytes{});
#endif
  }
};

// Few steps, of which all pixels are at hand: the sum with a higher part of the weights is shifted to
// be what that with a lower part begins with.
template <int steps>
inline Bytes weighted_sum(const uint32_t* weights, const uint8_t* x, int64_t stride) {
  const Taps taps[] = {{x, stride}, {x + (steps - 1) * kTapsAtOnce * stride, stride}};
  Ints sums[4];
  for (int i = 0; i < 4; ++i) {
    sums[i] = Ints{} + (kHalf >> ((kParts - 1) * kPartBits));
    for (int part = kParts - 1; part >= 0; --part) {
      if (part + 1 < kParts) sums[i] <<= kPartBits;
      for (int step = 0; step < steps; ++step)
        sums[i] = add_products(sums[i], taps[step].pixels[i],
                               Uints{} + weights[step * kParts + part]);
    }
    sums[i] >>= kWeightBits;
  }
  return to_bytes(sums[0], sums[1], sums[2], sums[3]);
}

// The sums over taps of `kBytes` bytes that lie `stride` apart. A few more are read, and times zero.
inline Bytes weighted_sum(const Axis& axis, int64_t output, const uint8_t* x, int64_t stride) {
  const int64_t steps = num_steps(axis.count[output]);
  const uint32_t* weights = &axis.split[output * num_steps(axis.num_taps) * kParts];
  if (steps == 1) return weighted_sum<1>(weights, x, stride);
  if (steps == 2) return weighted_sum<2>(weights, x, stride);
  Sum sums[4] = {};
  for (int64_t step = 0; step < steps; ++step, x += kTapsAtOnce * stride, weights += kParts) {
    const Taps taps(x, stride);
    for (int i = 0; i < 4; ++i) sums[i].add(taps.pixels[i], weights);
  }
  return to_bytes(sums[0].rounded(), sums[1].rounded(), sums[2].rounded(), sums[3].rounded());
}

typedef uint8_t Lane __attribute__((vector_size(16)));
constexpr int kLanes16 = kBytes / 16;  // lanes of 16 bytes in a vector

inline Bytes of_lanes(const uint8_t* const (&x)[kLanes16]) {
  Lane lanes[kLanes16];
  for (int i = 0; i < kLanes16; ++i) std::memcpy(&lanes[i], x[i], sizeof(Lane));
#if defined(LEVEL_HAS_AVX512)
  __m512i v = _mm512_castsi128_si512((__m128i)lanes[0]);
  v = _mm512_inserti32x4(v, (__m128i)lanes[1], 1);
  v = _mm512_inserti32x4(v, (__m128i)lanes[2], 2);
  return (Bytes)_mm512_inserti32x4(v, (__m128i)lanes[3], 3);
#elif defined(LEVEL_HAS_AVX2)
  return (Bytes)_mm256_setr_m128i((__m128i)lanes[0], (__m128i)lanes[1]);
#else
  return lanes[0];
#endif
}

// In each lane, byte `j` of vector `i` becomes byte `i` of vector `j`.
inline void transpose(Bytes (&a)[16]) {
  typedef uint16_t Pairs __attribute__((vector_size(4 * LEVEL_LANES)));
  typedef uint32_t Fours __attribute__((vector_size(4 * LEVEL_LANES)));
  typedef uint64_t Eights __attribute__((vector_size(4 * LEVEL_LANES)));
  Bytes b[16];
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = lower(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = upper(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = (Bytes)lower((Pairs)b[i + j], (Pairs)b[i + 2 + j]);
      a[i + 2 * j + 1] = (Bytes)upper((Pairs)b[i + j], (Pairs)b[i + 2 + j]);
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      b[i + 2 * j] = (Bytes)lower((Fours)a[i + j], (Fours)a[i + 4 + j]);
      b[i + 2 * j + 1] = (Bytes)upper((Fours)a[i + j], (Fours)a[i + 4 + j]);
    }
  for (int j = 0; j < 8; ++j) {
    a[2 * j] = (Bytes)lower((Eights)b[j], (Eights)b[8 + j]);
    a[2 * j + 1] = (Bytes)upper((Eights)b[j], (Eights)b[8 + j]);
  }
}

// 16 bytes of each of `kBytes` rows, the last of `rows` for those that lack, to 16 columns.
inline void to_columns(const uint8_t* x, int64_t stride, int64_t rows, uint8_t* out) {
  Bytes a[16];
  for (int i = 0; i < 16; ++i) {
    const uint8_t* of_lane[kLanes16];
    for (int lane = 0; lane < kLanes16; ++lane)
      of_lane[lane] = x + std::min<int64_t>(16 * lane + i, rows - 1) * stride;
    a[i] = of_lanes(of_lane);
  }
  transpose(a);
  std::memcpy(out, a, sizeof a);
}

// 16 columns of `kBytes` rows to the first `rows` of these.
inline void to_rows(const uint8_t* x, uint8_t* out, int64_t stride, int64_t rows) {
  Bytes a[16];
  std::memcpy(a, x, sizeof a);
  transpose(a);
  for (int i = 0; i < 16; ++i) {
    Lane lanes[kLanes16];
    std::memcpy(lanes, &a[i], sizeof lanes);
    for (int lane = 0; lane < kLanes16; ++lane)
      if (const int row = 16 * lane + i; row < rows)
        std::memcpy(out + row * stride, &lanes[lane], sizeof(Lane));
  }
}

// Rows of pixels: `x + y * stride_y + i * stride_x + c * stride_c`.
struct PixelRows {
  const uint8_t* x;
  int64_t stride_y, stride_x, stride_c;
};

// Memory that grows where it is too small, and is never given back.
inline uint8_t* at_least(std::vector<uint8_t>& buffer, int64_t size) {
  if ((int64_t)buffer.size() < size) buffer.resize(size);
  return buffer.data();
}

// One frame of an image, resized from top to bottom.
class Resizer {
 public:
  // Another frame, or image, of which rows before `bottom` are wanted, from any one on.
  void start(const Resize& resize, int64_t frame, int64_t bottom) {
    resize_ = &resize;
    limit_ = std::min(resize.rows.num_in, resize.rows.first[bottom - 1] + resize.rows.num_taps);
    const Pixels& image = resize.image;
    source_ = {(const uint8_t*)image.data + frame * image.stride_f, image.stride_y,
               image.stride_x, image.stride_c};
    begin_ = end_ = 0;
    const bool packed = image.stride_c == 1 && image.stride_x == image.channels;
    halfway_ = {nullptr, 0, packed ? image.channels : 1, packed ? 1 : padded(image.width)};
    halfway_.stride_y = resize.height_first ? padded(image.width * image.channels + 15)
                                            : resize.pitch();
    if (resize.height_first && !packed)
      halfway_.stride_y = image.channels * padded(image.width);
  }

  // Write rows `[begin, end)`, `pitch` bytes apart, and call `meanwhile()` again and again.
  template <typename Meanwhile>
  void rows(int64_t begin, int64_t end, uint8_t* out, const Meanwhile& meanwhile) {
    const Axis& axis = resize_->rows;
    const int64_t pitch = resize_->pitch();
    if (!resize_->height_first) {
      for (int64_t y = begin; y < end; ++y, out += pitch) sum_rows(axis, y, out, meanwhile);
      return;
    }
    for (int64_t y = begin; y < end; y += kBytes) {
      const int64_t count = std::min<int64_t>(kBytes, end - y);
      uint8_t* block = at_least(block_, (count + 1) * halfway_.stride_y);
      for (int64_t i = 0; i < count; ++i)
        sum_rows(axis, y + i, block + i * halfway_.stride_y, meanwhile);
      PixelRows rows = halfway_;
      rows.x = block;
      resize_width(rows, count, out + (y - begin) * pitch, meanwhile);
    }
  }

 private:
  static int64_t padded(int64_t size) { return (size + kBytes - 1) / kBytes * kBytes; }

  // Row `y` of what comes out, or halfway, from rows that are made as they are needed.
  template <typename Meanwhile>
  void sum_rows(const Axis& axis, int64_t y, uint8_t* out, const Meanwhile& meanwhile) {
    const int64_t stride = halfway_.stride_y, first = axis.first[y];
    uint8_t* window = at_least(window_, (2 * axis.num_taps + kTapsAtOnce + kBytes) * stride);
    const int64_t need = std::min(axis.num_in, first + axis.num_taps);
    if (end_ < need) {
      const int64_t kept = std::max<int64_t>(0, end_ - first);
      std::memmove(window, window + (end_ - kept - begin_) * stride, kept * stride);
      begin_ = first;
      end_ = first + kept;
      while (end_ < need) {
        const int64_t count = std::min<int64_t>(kBytes, limit_ - end_);
        PixelRows rows = source_;
        rows.x += end_ * rows.stride_y;
        if (resize_->height_first)
          copy_rows(rows, count, window + (end_ - begin_) * stride);
        else
          resize_width(rows, count, window + (end_ - begin_) * stride, meanwhile);
        end_ += count;
      }
    }
    const uint8_t* x = window + (first - begin_) * stride;
    for (int64_t i = 0; i < stride; i += kBytes) {
      const Bytes bytes = weighted_sum(axis, y, x + i, stride);
      std::memcpy(out + i, &bytes, sizeof bytes);
      if (i / kBytes % kSumsBetween == 0) meanwhile();
    }
  }

  // The pixels of `count` rows, as they lie halfway.
  void copy_rows(const PixelRows& rows, int64_t count, uint8_t* out) {
    const Pixels& image = resize_->image;
    for (int64_t y = 0; y < count; ++y, out += halfway_.stride_y) {
      const uint8_t* x = rows.x + y * rows.stride_y;
      if (halfway_.stride_c == 1 && halfway_.stride_x == image.channels) {
        std::memcpy(out, x, image.width * image.channels);
        continue;
      }
      for (int64_t c = 0; c < image.channels; ++c)
        for (int64_t i = 0; i < image.width; ++i)
          out[c * halfway_.stride_c + i] = x[c * rows.stride_c + i * rows.stride_x];
    }
  }

  // `count` rows, at most a block of them, resized in their width.
  template <typename Meanwhile>
  void resize_width(const PixelRows& rows, int64_t count, uint8_t* out,
                    const Meanwhile& meanwhile) {
    const Axis& axis = resize_->cols;
    const int64_t channels = resize_->image.channels, pitch = resize_->pitch();
    for (int64_t begin = 0; begin < axis.num_out; begin += kTile) {
      const int64_t end = std::min(axis.num_out, begin + kTile);
      const int64_t first = axis.first[begin];
      const int64_t num_in = std::min(axis.num_in, axis.first[end - 1] + axis.num_taps) - first;
      const PixelRows columns = transpose_rows(rows, count, first, num_in);
      const int64_t width = (end - begin + 15) / 16 * 16;  // of the tile, a channel
      uint8_t* sums = at_least(sums_, width * channels * kBytes);
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t o = begin; o < end; ++o) {
          const int64_t column = resize_->interleaved ? (o - begin) * channels + c
                                                      : c * width + o - begin;
          const uint8_t* x = columns.x + (axis.first[o] - first) * columns.stride_x +
                             c * columns.stride_c;
          const Bytes bytes = weighted_sum(axis, o, x, columns.stride_x);
          std::memcpy(sums + column * kBytes, &bytes, sizeof bytes);
          if (o % kSumsBetween == 0) meanwhile();
        }
      for (int64_t j = 0; j < width * channels; j += 16) {
        const int64_t to = resize_->interleaved
                               ? begin * channels + j
                               : j / width * resize_->stride_c() + begin + j % width;
        to_rows(sums + j * kBytes, out + to, pitch, count);
      }
    }
  }

  // The columns of `num_in` pixels from `first` on: `kBytes` rows of each, `count` of which matter.
  PixelRows transpose_rows(PixelRows rows, int64_t count, int64_t first, int64_t num_in) {
    const int64_t channels = resize_->image.channels;
    int64_t planes = 1, width = num_in * channels;  // contiguous bytes
    rows.x += first * rows.stride_x;
    const bool packed = rows.stride_c == 1 && rows.stride_x == channels;
    if (!packed || width < 16) {
      planes = channels;
      width = num_in;
      if (rows.stride_x != 1 || width < 16) {
        width = std::max<int64_t>(16, width);
        uint8_t* gathered = at_least(gathered_, count * channels * width);
        for (int64_t y = 0; y < count; ++y)
          for (int64_t c = 0; c < channels; ++c)
            for (int64_t i = 0; i < num_in; ++i)
              gathered[(y * channels + c) * width + i] =
                  rows.x[y * rows.stride_y + c * rows.stride_c + i * rows.stride_x];
        rows = {gathered, channels * width, 1, width};
      }
    }
    const int64_t past = (resize_->cols.num_taps + kTapsAtOnce) * channels;  // read, and times zero
    uint8_t* columns = at_least(columns_, (planes * width + past) * kBytes);
    for (int64_t plane = 0; plane < planes; ++plane)
      for (int64_t j = 0; j < width; j += 16) {
        const int64_t from = std::min(j, width - 16);
        to_columns(rows.x + plane * rows.stride_c + from, rows.stride_y, count,
                   columns + (plane * width + from) * kBytes);
      }
    if (planes == 1) return {columns, 1, channels * kBytes, kBytes};
    return {columns, 1, kBytes, width * kBytes};
  }

  static constexpr int64_t kTile = 32;  // outputs whose columns stay in the first cache
  static constexpr int64_t kSumsBetween = 8;  // calls of `meanwhile`: sums of a vector each

  const Resize* resize_;
  PixelRows source_, halfway_;
  int64_t begin_, end_, limit_;  // the rows in the window, and where they will end
  std::vector<uint8_t> window_, block_, gathered_, columns_, sums_;
};

}  // namespace patchpack::LEVEL
