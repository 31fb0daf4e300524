// Keys and values of one sequence, read where they lie, and sums over the lanes that share a key.
//
// A simdgroup goes over 32 keys. LK lanes share a key, each with EL neighbouring dimensions; lane l has the score of
// key l. In step t, lanes of part u = l / LK read key u * LK + t: so the score of a key is found by the lanes it
// belongs to.

// The EL dimensions of a lane from `begin` on; 0 where there are none.
template <int EL, int DIMS, typename P>
inline void read_dims(P at, long stride, int begin, thread float (&dims)[EL]) {
  for (int i = 0; i < EL; ++i) {
    dims[i] = DIMS % EL == 0 || begin + i < DIMS ? float(at[(begin + i) * stride]) : 0.0f;
  }
}

// The sum over the LK lanes of a key, in all of them.
template <int LK>
inline float sum_of_key(float x) {
  for (int m = LK / 2; m > 0; m /= 2) x += simd_shuffle_xor(x, ushort(m));
  return x;
}

// The sum over lanes with the same dimensions, in all of them.
template <int LK>
inline float sum_of_parts(float x) {
  for (int m = 16; m >= LK; m /= 2) x += simd_shuffle_xor(x, ushort(m));
  return x;
}

// Which of HT query heads from `head` on a list names, as bits; a unit is PER_UNIT heads.
template <int HT, int PER_UNIT, typename P>
inline uint listed_heads(P list, int count, int head, uint lane) {
  uint bits = 0;
  for (int i = int(lane); i < count; i += 32) {
    const int first = list[i] * PER_UNIT - head;
    for (int g = 0; g < HT; ++g) {
      if (g >= first && g < first + PER_UNIT) bits |= 1u << g;
    }
  }
  return simd_or(bits);
}
