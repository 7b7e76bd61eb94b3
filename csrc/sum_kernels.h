// Sums over channels, once for each level. No include guard: see level.h.

namespace patchpack::LEVEL {

// `v` with zeros past the first n lanes.
inline Floats first_lanes_of(Floats v, All) { return v; }
inline Floats first_lanes_of(Floats v, int n) {
  for (int i = n; i < kLanes; ++i) v[i] = 0.0f;
  return v;
}

// Adds to each of `totals` the sum over `size` elements of what `add(i, n, sums)` adds to its own
// of `sums`. The order is fixed by `size`: four vectors side by side sum a stretch of elements, and
// stretches are summed in turn, so that rounding errors stay few.
template <typename Add, typename... Total>
inline void add_sums(int64_t size, const Add& add, Total&... totals) {
  constexpr int kSums = sizeof...(totals), kSides = 4, kWide = kSides * kLanes;
  Floats whole[kSums] = {};
  for (int64_t begin = 0; begin < size; begin += 8 * kWide) {
    const int64_t end = std::min<int64_t>(size, begin + 8 * kWide);
    Floats sums[kSides][kSums] = {};
    int64_t i = begin;
    for (; i + kWide <= end; i += kWide)
      for (int side = 0; side < kSides; ++side) add(i + side * kLanes, All{}, sums[side]);
    for_lanes(end - i, [&](int64_t j, auto n) { add(i + j, n, sums[0]); });
    for (int s = 0; s < kSums; ++s)
      whole[s] += (sums[0][s] + sums[1][s]) + (sums[2][s] + sums[3][s]);
  }
  int s = 0;
  ((totals += sum(whole[s++])), ...);
}

}  // namespace patchpack::LEVEL
