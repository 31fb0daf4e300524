// Scores as keys that sort as unsigned numbers do.

// Both zeros are equal, and NaN is below all.
inline uint sortable(float x) {
  const uint bits = as_type<uint>(x == 0.0f ? 0.0f : x);
  const uint key = (bits & 0x80000000u) != 0u ? ~bits : bits | 0x80000000u;
  return x == x ? key : 0u;
}

// The largest key of the scores of a unit.
template <int GROUP, typename P>
inline uint key_of(P scores, int unit) {
  uint key = 0;
  for (int g = 0; g < GROUP; ++g) key = max(key, sortable(float(scores[unit * GROUP + g])));
  return key;
}
