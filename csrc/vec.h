// Vectors of LEVEL_LANES floats, compiled once for each level: no include guard, see level.h.
//
// Memory holds float, bfloat16 or half; arithmetic is float. Operators are those of the compiler's
// vector extension. A tail has a count of lanes: `load(x, n)` gives zeros past it.

namespace patchpack::LEVEL {

inline constexpr int kLanes = LEVEL_LANES;

typedef float Floats __attribute__((vector_size(4 * LEVEL_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LEVEL_LANES)));
typedef uint32_t Uints __attribute__((vector_size(4 * LEVEL_LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * LEVEL_LANES)));

using All = std::integral_constant<int, kLanes>;

inline Floats splat(float x) { return x - Floats{}; }

inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(LEVEL_HAS_AVX512)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(LEVEL_HAS_AVX2)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

inline Floats max(Floats a, Floats b) { return a > b ? a : b; }

// float from and to what memory holds, all lanes

inline Floats load(const float* x, All = {}) {
  Floats v;
  std::memcpy(&v, x, sizeof v);
  return v;
}

// GCC splits this conversion of vectors in two, hence the intrinsics
inline Uints widen(Shorts x) {
#if defined(LEVEL_HAS_AVX512)
  return (Uints)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(LEVEL_HAS_AVX2)
  return (Uints)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, Uints);
#endif
}

inline Floats from_bfloat16(Shorts bits) { return (Floats)(widen(bits) << 16); }

inline Floats load(const BFloat16* x, All = {}) {
  Shorts bits;
  std::memcpy(&bits, x, sizeof bits);
  return from_bfloat16(bits);
}

inline Floats load(const Half* x, All = {}) {
#if defined(LEVEL_HAS_AVX512)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x));
#elif defined(LEVEL_HAS_AVX2)
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x));
#else
  Floats v;
  for (int i = 0; i < kLanes; ++i) v[i] = x[i];
  return v;
#endif
}

// The upper halves are bfloat16: to nearest, ties to even. NaN stays NaN: arithmetic makes none
// whose upper half is an infinity.
inline Uints round_to_bfloat16(Floats v) {
#if defined(LEVEL_HAS_AVX512)
  const __m512i bits = (__m512i)v;
  const __mmask16 is_odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __mmask16 is_number = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_ORD_Q);
  const __m512i half = _mm512_mask_blend_epi32(is_odd, _mm512_set1_epi32(0x7FFF),
                                               _mm512_set1_epi32(0x8000));
  return (Uints)_mm512_mask_add_epi32(bits, is_number, bits, half);
#else
  const Uints bits = (Uints)v;
  return v != v ? Uints{} + 0x7FC00000u : bits + 0x7FFFu + ((bits >> 16) & 1u);
#endif
}

inline Shorts to_bfloat16(Floats v) {
  const Uints rounded = round_to_bfloat16(v);
#if defined(LEVEL_HAS_AVX512)
  const __m512i upper_halves = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                                31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7,
                                                5, 3, 1);
  return (Shorts)_mm512_castsi512_si256(
      _mm512_permutexvar_epi16(upper_halves, (__m512i)rounded));
#else
  return __builtin_convertvector(rounded >> 16, Shorts);
#endif
}

inline Shorts to_half(Floats v) {
#if defined(LEVEL_HAS_AVX512)
  return (Shorts)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(LEVEL_HAS_AVX2)
  return (Shorts)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  Shorts bits;
  for (int i = 0; i < kLanes; ++i) bits[i] = Half(v[i]).x;
  return bits;
#endif
}

template <typename scalar_t>
inline auto to_memory(Floats v) {
  if constexpr (std::is_same_v<scalar_t, BFloat16>)
    return to_bfloat16(v);
  else if constexpr (std::is_same_v<scalar_t, Half>)
    return to_half(v);
  else
    return v;
}

template <typename scalar_t>
inline void store(scalar_t* out, Floats v, All = {}) {
  const auto bits = to_memory<scalar_t>(v);
  std::memcpy((void*)out, &bits, sizeof bits);
}

// Past the caches: see past_caches.h. `out` is a multiple of its vector's size.
template <typename scalar_t>
inline void stream(scalar_t* out, Floats v) {
  const auto bits = to_memory<scalar_t>(v);
#if defined(LEVEL_HAS_AVX512)
  if constexpr (sizeof bits == 64)
    _mm512_stream_si512((__m512i*)out, (__m512i)bits);
  else
    _mm256_stream_si256((__m256i*)out, (__m256i)bits);
#elif defined(LEVEL_HAS_AVX2)
  if constexpr (sizeof bits == 32)
    _mm256_stream_si256((__m256i*)out, (__m256i)bits);
  else
    _mm_stream_si128((__m128i*)out, (__m128i)bits);
#else
  std::memcpy((void*)out, &bits, sizeof bits);
#endif
}

template <typename scalar_t>
inline void store(scalar_t* out, Floats v, All, bool past_caches) {
  if (past_caches)
    stream(out, v);
  else
    store(out, v);
}

// Twice kLanes elements: the first and the last of them, or of bfloat16 the even and the odd ones,
// which are halves of the lanes of one vector.
struct Pair {
  Floats v[2];
};

template <typename scalar_t>
inline Pair load_pair(const scalar_t* x) {
  if constexpr (std::is_same_v<scalar_t, BFloat16>) {
    Uints bits;
    std::memcpy(&bits, x, sizeof bits);
    return {(Floats)(bits << 16), (Floats)(bits & 0xFFFF0000u)};
  } else {
    return {load(x), load(x + kLanes)};
  }
}

template <typename scalar_t>
inline void store_pair(scalar_t* out, Pair pair, bool past_caches) {
  if constexpr (std::is_same_v<scalar_t, BFloat16>) {
    const Uints even = round_to_bfloat16(pair.v[0]), odd = round_to_bfloat16(pair.v[1]);
    store((float*)out, (Floats)(even >> 16 | (odd & 0xFFFF0000u)), All{}, past_caches);
  } else {
    store(out, pair.v[0], All{}, past_caches);
    store(out + kLanes, pair.v[1], All{}, past_caches);
  }
}

// Copies bytes, aligned or not.
inline void copy_bytes(void* out, const void* x, int64_t bytes, bool past_caches) {
  if (!past_caches) {
    std::memcpy(out, x, bytes);
    return;
  }
  constexpr int64_t kStep = sizeof(Floats);
  char* to = (char*)out;
  const char* from = (const char*)x;
  int64_t i = std::min<int64_t>(bytes, -(uintptr_t)out % kStep);
  std::memcpy(to, from, i);
  for (; i + kStep <= bytes; i += kStep) stream((float*)(to + i), load((const float*)(from + i)));
  std::memcpy(to + i, from + i, bytes - i);
}

// the first n lanes

#if defined(LEVEL_HAS_AVX512)
inline __mmask16 first_lanes(int n) { return (__mmask16)_bzhi_u32(0xFFFF, n); }

inline Floats load(const float* x, int n) {
  return (Floats)_mm512_maskz_loadu_ps(first_lanes(n), x);
}
inline Floats load(const BFloat16* x, int n) {
  return from_bfloat16((Shorts)_mm256_maskz_loadu_epi16(first_lanes(n), x));
}
inline Floats load(const Half* x, int n) {
  return (Floats)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), x));
}
template <typename scalar_t>
inline void store(scalar_t* out, Floats v, int n) {
  const auto bits = to_memory<scalar_t>(v);
  if constexpr (sizeof bits == 64)
    _mm512_mask_storeu_ps(out, first_lanes(n), (__m512)bits);
  else
    _mm256_mask_storeu_epi16(out, first_lanes(n), (__m256i)bits);
}
#else
template <typename scalar_t>
inline Floats load(const scalar_t* x, int n) {
  scalar_t lanes[kLanes] = {};
  std::memcpy((void*)lanes, x, n * sizeof(scalar_t));
  return load(lanes);
}
template <typename scalar_t>
inline void store(scalar_t* out, Floats v, int n) {
  scalar_t lanes[kLanes];
  store(lanes, v);
  std::memcpy((void*)out, lanes, n * sizeof(scalar_t));
}
#endif

template <typename scalar_t>
inline void store(scalar_t* out, Floats v, int n, bool) {
  store(out, v, n);
}

// across lanes, in a fixed order

inline float sum(Floats v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

inline float max(Floats v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = std::max(lanes[i], lanes[i + width]);
  return lanes[0];
}

template <int... i>
inline Floats even_lanes(Floats lo, Floats hi, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(lo, hi, (2 * i)...);
}
template <int... i>
inline Floats odd_lanes(Floats lo, Floats hi, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(lo, hi, (2 * i + 1)...);
}
// a0 b0 a1 b1 ...: the lower half of it, and the upper.
template <int... i>
inline Floats interleaved_lower(Floats a, Floats b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (i / 2 + i % 2 * kLanes)...);
}
template <int... i>
inline Floats interleaved_upper(Floats a, Floats b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, ((i + kLanes) / 2 + i % 2 * kLanes)...);
}
using Lanes = std::make_integer_sequence<int, kLanes>;

// `body(i, n)` for every `kLanes` of `size` elements from `i` on, and for the `n` that are left.
template <typename Body>
inline void for_lanes(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, All{});
  if (i < size) body(i, (int)(size - i));
}

// The same for a body that may meet an element twice, as one that writes where it does not read:
// the tail is the last `kLanes` elements, which no mask slows down.
template <typename Body>
inline void for_lanes_again(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, All{});
  if (i == size) return;
  if (size >= kLanes)
    body(size - kLanes, All{});
  else
    body(0, (int)size);
}

// `body(scalar)` with a value of the C++ type of a floating `dtype`.
template <typename Body>
inline auto with_scalar(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return body(BFloat16{});
    case ScalarType::Half:
      return body(Half{});
    default:
      return body(float{});
  }
}

}  // namespace patchpack::LEVEL
