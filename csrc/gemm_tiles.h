// Products of small matrices, once for each level. No include guard: see level.h.
//
// C `[m, n]` is float32; A `[m, k]` and B `[k, n]` hold units of 32 bits along k: a float, or two
// bfloat16 where the CPU multiplies pairs of them. All are row-major, of a buffer whose rows hold
// whole vectors, so that only `pack` meets the tails of tensors.

namespace patchpack::LEVEL {
namespace {

// Units of one value.
struct Singles {
  static constexpr int kPack = 1;

  static Floats broadcast(const float* unit) { return splat(*unit); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return fma(a, b, c); }

  // A vector of units of a row that has `left` more values.
  template <typename scalar_t>
  static Floats along(const scalar_t* x, int64_t left) {
    return left >= kLanes ? load(x) : load(x, (int)left);
  }
  // A vector of units of `kPack` rows, of which there are `rows` more, with `left` more values.
  template <typename scalar_t>
  static Floats across(const scalar_t* x, int64_t /*stride*/, int64_t /*rows*/, int64_t left) {
    return along(x, left);
  }
  // Vector `i` of a row becomes operand A; of `kPack` rows, operand B.
  static void store_along(float* row, int64_t i, Floats x) { store(row + i * kLanes, x); }
  static void store_across(float* row, int64_t i, const Floats* x) { store_along(row, i, x[0]); }
};

#if defined(LEVEL_HAS_BF16)
// Units of two values.
struct Pairs {
  static constexpr int kPack = 2;

  static Floats broadcast(const float* unit) {
    int32_t bits;
    std::memcpy(&bits, unit, sizeof bits);
    return (Floats)_mm512_set1_epi32(bits);
  }
  static Floats multiply_add(Floats a, Floats b, Floats c) {
    return (Floats)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }

  static Floats along(const BFloat16* x, int64_t left) {
    const __mmask32 mask = left >= 2 * kLanes ? ~0u : _bzhi_u32(~0u, (unsigned)left);
    return (Floats)_mm512_maskz_loadu_epi16(mask, x);
  }
  static Floats across(const BFloat16* x, int64_t stride, int64_t rows, int64_t left) {
    const __mmask16 mask = first_lanes((int)std::min<int64_t>(left, kLanes));
    const __m256i even = _mm256_maskz_loadu_epi16(mask, x);
    const __m256i odd = rows > 1 ? _mm256_maskz_loadu_epi16(mask, x + stride) : __m256i{};
    return (Floats)_mm512_or_si512(_mm512_cvtepu16_epi32(even),
                                   _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
  }
  static void store_along(float* row, int64_t i, Floats x) {
    const __m256bh bits = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(row + i * (kLanes / 2), &bits, sizeof bits);
  }
  static void store_across(float* row, int64_t i, const Floats* x) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9,
                                           24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1,
                                           16, 0);
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);
    store(row + i * kLanes, (Floats)_mm512_permutexvar_epi16(order, (__m512i)both));
  }
};

template <typename scalar_t>
using OperandOf = std::conditional_t<std::is_same_v<scalar_t, BFloat16>, Pairs, Singles>;
#else
template <typename scalar_t>
using OperandOf = Singles;
#endif

// Rows of a head lie on different pages, where hardware does not look ahead.
inline constexpr int64_t kRowsAhead = 24;

// Rows in memory as units along a row, `(r, c)` being unit `c` of row `r`.
template <typename scalar_t>
struct Along {
  using Operand = OperandOf<scalar_t>;
  const scalar_t* x;
  int64_t stride, rows, cols;

  int64_t unit_rows() const { return rows; }
  int64_t unit_cols() const { return (cols + Operand::kPack - 1) / Operand::kPack; }
  Floats at(int64_t r, int64_t c) const {
    c *= Operand::kPack;
    __builtin_prefetch(x + (r + kRowsAhead) * stride + c);
    return Operand::along(x + r * stride + c, cols - c);
  }
};

// Rows in memory as units across `kPack` rows.
template <typename scalar_t>
struct Across {
  using Operand = OperandOf<scalar_t>;
  const scalar_t* x;
  int64_t stride, rows, cols;

  int64_t unit_rows() const { return (rows + Operand::kPack - 1) / Operand::kPack; }
  int64_t unit_cols() const { return cols; }
  Floats at(int64_t r, int64_t c) const {
    r *= Operand::kPack;
    for (int i = 0; i < Operand::kPack; ++i)
      __builtin_prefetch(x + (r + i + kRowsAhead) * stride + c);
    return Operand::across(x + r * stride + c, stride, rows - r, cols - c);
  }
};

// The units as they are; a row of `out` has room for whole vectors, past the last unit zeros.
template <typename Units>
inline void pack(const Units& units, float* out, int64_t stride) {
  for (int64_t r = 0; r < units.unit_rows(); ++r)
    for (int64_t c = 0; c < units.unit_cols(); c += kLanes)
      store(out + r * stride + c, units.at(r, c));
}

// Rows and columns of `kLanes` vectors swapped.
inline void transpose(Floats* x) {
  for (int step = 1; step < kLanes; step *= 2) {
    Floats y[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      y[2 * i] = interleaved_lower(x[i], x[i + kLanes / 2], Lanes{});
      y[2 * i + 1] = interleaved_upper(x[i], x[i + kLanes / 2], Lanes{});
    }
    for (int i = 0; i < kLanes; ++i) x[i] = y[i];
  }
}

// The units transposed; a row of `out` has room for whole vectors, past the last unit zeros.
template <typename Units>
inline void pack_transposed(const Units& units, float* out, int64_t stride) {
  const int64_t rows = units.unit_rows(), cols = units.unit_cols();
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t c = 0; c < cols; c += kLanes) {
      Floats x[kLanes];
      for (int i = 0; i < kLanes; ++i) x[i] = r + i < rows ? units.at(r + i, c) : Floats{};
      transpose(x);
      for (int i = 0; i < std::min<int64_t>(kLanes, cols - c); ++i)
        store(out + (c + i) * stride + r, x[i]);
    }
}

// What a tile of C becomes. It is added last: short sums err less.
struct Assign {};  // A B
struct Add {};     // C + A B
struct Scale {     // factor A B
  float factor;
};

inline Floats result(Assign, const float*, Floats product) { return product; }
inline Floats result(Add, const float* c, Floats product) { return load(c) + product; }
inline Floats result(Scale scale, const float*, Floats product) { return product * scale.factor; }

struct Product {
  const float* a;
  const float* b;
  float* c;
  int64_t stride_a, stride_b, stride_c;
  int64_t m, n, k;  // rows, vectors, units
};

// `kRows` rows and `kVectors` vectors of C, in registers.
template <typename Operand, int kRows, int kVectors, typename Epilogue>
inline void multiply_tile(const Product& p, int64_t row, int64_t vector, Epilogue epilogue) {
  const float *a = p.a + row * p.stride_a, *b = p.b + vector * kLanes;
  float* c = p.c + row * p.stride_c + vector * kLanes;
  const int64_t stride_a = p.stride_a, stride_b = p.stride_b, stride_c = p.stride_c;
  Floats sums[kRows][kVectors] = {};
  for (int64_t k = 0; k < p.k; ++k, ++a, b += stride_b) {
    Floats columns[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) columns[j] = load(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Floats x = Operand::broadcast(a + i * stride_a);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j)
        sums[i][j] = Operand::multiply_add(x, columns[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      float* x = c + i * stride_c + j * kLanes;
      store(x, result(epilogue, x, sums[i][j]));
    }
}

// Tiles that the registers hold: 32 with AVX-512, otherwise 16.
#if defined(LEVEL_HAS_AVX512)
inline constexpr int kMaxVectors = 5;
inline constexpr int kMaxRows[] = {0, 8, 8, 8, 6, 5};  // by vectors
#else
inline constexpr int kMaxVectors = 2;
inline constexpr int kMaxRows[] = {0, 8, 6};
#endif

// Tiles of `kRows` rows, or of the next smaller number that is asked for.
template <typename Operand, int kVectors, int kRows = kMaxRows[kVectors], typename Epilogue>
inline void multiply_rows(const Product& p, int rows, int64_t row, int64_t vector,
                          Epilogue epilogue) {
  if (rows == kRows) return multiply_tile<Operand, kRows, kVectors>(p, row, vector, epilogue);
  if constexpr (kRows > 1)
    multiply_rows<Operand, kVectors, kRows - 1>(p, rows, row, vector, epilogue);
}

// All rows of `kVectors` vectors of C, or of the next smaller number that is asked for.
template <typename Operand, int kVectors = kMaxVectors, typename Epilogue>
inline void multiply_columns(const Product& p, int vectors, int64_t vector, Epilogue epilogue) {
  if (vectors == kVectors) {
    const int64_t tiles = (p.m + kMaxRows[kVectors] - 1) / kMaxRows[kVectors];
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t row = p.m * i / tiles, end = p.m * (i + 1) / tiles;
      multiply_rows<Operand, kVectors>(p, (int)(end - row), row, vector, epilogue);
    }
  } else if constexpr (kVectors > 1) {
    multiply_columns<Operand, kVectors - 1>(p, vectors, vector, epilogue);
  }
}

template <typename Operand, typename Epilogue>
inline void multiply(const Product& p, Epilogue epilogue) {
  const int64_t panels = (p.n + kMaxVectors - 1) / kMaxVectors;
  for (int64_t i = 0; i < panels; ++i) {
    const int64_t vector = p.n * i / panels, end = p.n * (i + 1) / panels;
    multiply_columns<Operand>(p, (int)(end - vector), vector, epilogue);
  }
}

}  // namespace
}  // namespace patchpack::LEVEL
