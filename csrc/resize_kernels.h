// Resizing rows of pixels, once for each level. No include guard: see level.h.
//
// Sums run over whole vectors of bytes: along a row where the height is resized, and, where the
// width is, down the columns of a block of rows that is transposed before and after.

namespace patchpack::LEVEL {

constexpr int kBytes = 4 * kLanes;  // in a vector, and rows in a block

typedef uint8_t Bytes __attribute__((vector_size(4 * LEVEL_LANES)));
typedef int16_t Words __attribute__((vector_size(4 * LEVEL_LANES)));

// lanes of 16 bytes, interleaved in place: the lower halves of each, and the upper

template <int bytes, typename Vector, int... i>
inline Vector interleaved(Vector a, Vector b, int half, std::integer_sequence<int, i...>) {
  constexpr int n = sizeof(Vector) / sizeof(a[0]), lane = 16 / sizeof(a[0]);
  if (half == 0)
    return __builtin_shufflevector(a, b, (i / lane * lane + i % lane / 2 + i % 2 * n)...);
  return __builtin_shufflevector(a, b, (i / lane * lane + (i % lane + lane) / 2 + i % 2 * n)...);
}
template <typename Vector>
inline Vector lower(Vector a, Vector b) {
  constexpr int n = sizeof(Vector) / sizeof(a[0]);
  return interleaved<0>(a, b, 0, std::make_integer_sequence<int, n>{});
}
template <typename Vector>
inline Vector upper(Vector a, Vector b) {
  constexpr int n = sizeof(Vector) / sizeof(a[0]);
  return interleaved<0>(a, b, 1, std::make_integer_sequence<int, n>{});
}

// Sums of the products of two neighbours.
inline Ints dot(Words a, Words b) {
#if defined(LEVEL_HAS_AVX512)
  return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(LEVEL_HAS_AVX2)
  return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return ((Ints)a << 16 >> 16) * ((Ints)b << 16 >> 16) + ((Ints)a >> 16) * ((Ints)b >> 16);
#endif
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

// Weights of 24 bits as two of 12, each of them beside that of the next tap.
constexpr int kTapsAtOnce = 2, kLowBits = 12;

inline void split_weights(Axis& axis) {
  axis.split.clear();
  for (size_t i = 0; i < axis.weights.size(); i += 2) {
    int32_t high[2], low[2];
    for (int k = 0; k < 2; ++k) {
      const int32_t weight = axis.weights[i + k];
      high[k] = (weight + (1 << (kLowBits - 1))) >> kLowBits;
      low[k] = weight - (high[k] << kLowBits);
    }
    axis.split.push_back((uint32_t)(high[0] & 0xFFFF) | (uint32_t)high[1] << 16);
    axis.split.push_back((uint32_t)(low[0] & 0xFFFF) | (uint32_t)low[1] << 16);
  }
}

// The sums over taps of `kBytes` bytes that lie `stride` apart.
inline Bytes weighted_sum(const Axis& axis, int64_t output, const uint8_t* x, int64_t stride) {
  const uint32_t* weights = &axis.split[output * axis.num_taps];
  Ints high[4] = {}, low[4] = {};
  for (int64_t k = 0; k < axis.num_taps; k += 2, x += 2 * stride) {
    Bytes a, b;
    std::memcpy(&a, x, sizeof a);
    std::memcpy(&b, x + stride, sizeof b);
    const Bytes pairs[] = {lower(a, b), upper(a, b)};
    const Words high_weights = (Words)(Uints{} + weights[k]);
    const Words low_weights = (Words)(Uints{} + weights[k + 1]);
    for (int i = 0; i < 4; ++i) {
      const Bytes pair = pairs[i / 2];
      const Words pixels = (Words)(i % 2 ? upper(pair, Bytes{}) : lower(pair, Bytes{}));
      high[i] += dot(pixels, high_weights);
      low[i] += dot(pixels, low_weights);
    }
  }
  for (int i = 0; i < 4; ++i)
    high[i] = ((high[i] << kLowBits) + low[i] + (1 << (kWeightBits - 1))) >> kWeightBits;
  return to_bytes(high[0], high[1], high[2], high[3]);
}

typedef uint8_t Lane __attribute__((vector_size(16)));

// 16 x 16 bytes: row `i` of `x`, which has `rows` of them, becomes column `i` of `out`.
inline void transpose(const uint8_t* x, int64_t stride, int64_t rows, uint8_t* out,
                      int64_t stride_out, int64_t rows_out) {
  typedef uint16_t Lane16 __attribute__((vector_size(16)));
  typedef uint32_t Lane32 __attribute__((vector_size(16)));
  typedef uint64_t Lane64 __attribute__((vector_size(16)));
  Lane a[16], b[16];
  for (int64_t i = 0; i < 16; ++i)
    std::memcpy(&a[i], x + std::min(i, rows - 1) * stride, sizeof(Lane));
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = lower(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = upper(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = (Lane)lower((Lane16)b[i + j], (Lane16)b[i + 2 + j]);
      a[i + 2 * j + 1] = (Lane)upper((Lane16)b[i + j], (Lane16)b[i + 2 + j]);
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      b[i + 2 * j] = (Lane)lower((Lane32)a[i + j], (Lane32)a[i + 4 + j]);
      b[i + 2 * j + 1] = (Lane)upper((Lane32)a[i + j], (Lane32)a[i + 4 + j]);
    }
  for (int j = 0; j < 8; ++j) {
    a[2 * j] = (Lane)lower((Lane64)b[j], (Lane64)b[8 + j]);
    a[2 * j + 1] = (Lane)upper((Lane64)b[j], (Lane64)b[8 + j]);
  }
  for (int64_t i = 0; i < std::min<int64_t>(16, rows_out); ++i)
    std::memcpy(out + i * stride_out, &a[i], sizeof(Lane));
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
  // Begin with `frame` of another image, or with it again from its top.
  void start(const Resize& resize, int64_t frame) {
    resize_ = &resize;
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

  // Write rows `[begin, end)`, `pitch` bytes apart.
  void rows(int64_t begin, int64_t end, uint8_t* out) {
    const Axis& axis = resize_->rows;
    const int64_t pitch = resize_->pitch();
    if (!resize_->height_first) {
      for (int64_t y = begin; y < end; ++y, out += pitch) sum_rows(axis, y, end, out);
      return;
    }
    for (int64_t y = begin; y < end; y += kBytes) {
      const int64_t count = std::min<int64_t>(kBytes, end - y);
      uint8_t* block = at_least(block_, (count + 1) * halfway_.stride_y);
      for (int64_t i = 0; i < count; ++i)
        sum_rows(axis, y + i, end, block + i * halfway_.stride_y);
      PixelRows rows = halfway_;
      rows.x = block;
      resize_width(rows, count, out + (y - begin) * pitch);
    }
  }

 private:
  static int64_t padded(int64_t size) { return (size + kBytes - 1) / kBytes * kBytes; }

  // Row `y` of what comes out, or halfway, from rows that are made as they are needed.
  void sum_rows(const Axis& axis, int64_t y, int64_t last_y, uint8_t* out) {
    const int64_t stride = halfway_.stride_y, first = axis.first[y];
    uint8_t* window = at_least(window_, (2 * axis.num_taps + kBytes) * stride);
    const int64_t need = std::min(axis.num_in, first + axis.num_taps);
    if (end_ < need) {
      const int64_t kept = std::max<int64_t>(0, end_ - first);
      std::memmove(window, window + (end_ - kept - begin_) * stride, kept * stride);
      begin_ = first;
      end_ = first + kept;
      const int64_t limit = std::min(axis.num_in, axis.first[last_y - 1] + axis.num_taps);
      while (end_ < need) {
        const int64_t count = std::min<int64_t>(kBytes, limit - end_);
        PixelRows rows = source_;
        rows.x += end_ * rows.stride_y;
        if (resize_->height_first)
          copy_rows(rows, count, window + (end_ - begin_) * stride);
        else
          resize_width(rows, count, window + (end_ - begin_) * stride);
        end_ += count;
      }
    }
    const uint8_t* x = window + (first - begin_) * stride;
    for (int64_t i = 0; i < stride; i += kBytes) {
      const Bytes bytes = weighted_sum(axis, y, x + i, stride);
      std::memcpy(out + i, &bytes, sizeof bytes);
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
  void resize_width(const PixelRows& rows, int64_t count, uint8_t* out) {
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
        }
      for (int64_t j = 0; j < width * channels; j += 16) {
        const int64_t to = resize_->interleaved
                               ? begin * channels + j
                               : j / width * resize_->stride_c() + begin + j % width;
        for (int64_t y = 0; y < count; y += 16)
          transpose(sums + j * kBytes + y, kBytes, 16, out + y * pitch + to, pitch, count - y);
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
    const int64_t past = resize_->cols.num_taps * channels;  // read, and times zero
    uint8_t* columns = at_least(columns_, (planes * width + past) * kBytes);
    for (int64_t plane = 0; plane < planes; ++plane)
      for (int64_t j = 0; j < width; j += 16) {
        const int64_t from = std::min(j, width - 16);
        for (int64_t y = 0; y < count; y += 16)
          transpose(rows.x + plane * rows.stride_c + y * rows.stride_y + from, rows.stride_y,
                    count - y, columns + (plane * width + from) * kBytes + y, kBytes, 16);
      }
    if (planes == 1) return {columns, 1, channels * kBytes, kBytes};
    return {columns, 1, kBytes, width * kBytes};
  }

  static constexpr int64_t kTile = 64;  // outputs whose columns stay in the first cache

  const Resize* resize_;
  PixelRows source_, halfway_;
  int64_t begin_, end_;  // the rows in the window
  std::vector<uint8_t> window_, block_, gathered_, columns_, sums_;
};

}  // namespace patchpack::LEVEL
