// Sums over channels, once for each level. No include guard: see level.h.

namespace patchpack::LEVEL {

// `v` with zeros past the first n lanes.
inline Floats first(Floats v, All) { return v; }
inline Floats first(Floats v, int n) {
  for (int i = n; i < kLanes; ++i) v[i] = 0.0f;
  return v;
}

// Adds to each of `totals` the sum over `size` elements of what `add(i, n, sums)` adds to its own
// of `sums`. The order is fixed by `size`; four vectors are summed side by side.
template <typename Add, typename... Total>
inline void add_sums(int64_t size, const Add& add, Total&... totals) {
  constexpr int kSides = 4;
  Floats sums[kSides][sizeof...(totals)] = {};
  int64_t i = 0;
  for (; i + kSides * kLanes <= size; i += kSides * kLanes)
    for (int side = 0; side < kSides; ++side) add(i + side * kLanes, All{}, sums[side]);
  for_lanes(size - i, [&](int64_t j, auto n) { add(i + j, n, sums[0]); });
  int t = 0;
  ((totals += sum((sums[0][t] + sums[1][t]) + (sums[2][t] + sums[3][t])), ++t), ...);
}

}  // namespace patchpack::LEVEL
