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

// The page of a lane's own key; keys that are not seen have none that may be looked up.
template <bool PAGED, int PAGE, typename P>
inline int page_of(P table, int sequence, int pages, int key, bool seen) {
  return PAGED ? (seen ? table[long(sequence) * pages + key / PAGE] : 0) : sequence;
}

// The dimensions of a lane from `begin` on, of a key on a page; 0 where the key is not `live`. `strides` are of pages,
// positions, heads and dimensions; `at` is where the head begins.
template <int EL, int DIMS, bool PAGED, int PAGE, typename P>
inline void read_key(
    P at, const constant int64_t* strides, int page, int key, bool live, int begin, thread float (&dims)[EL]) {
  for (int i = 0; i < EL; ++i) dims[i] = 0.0f;
  if (live && begin < DIMS) {
    const int inside = PAGED ? key % PAGE : key;
    read_dims<EL, DIMS>(at + page * strides[0] + inside * strides[1], strides[3], begin, dims);
  }
}

// Products of HT queries, those whose bits are set in `run`, with the keys from `keys_at` on that lie in [start, end):
// lane l gets those of key keys_at + l.
template <int LK, int DIMS, bool PAGED, int PAGE, int HT, int EL, typename P, typename T>
inline void products_of_32(
    P keys, const constant int64_t* strides, int own_page, int keys_at, int start, int end, uint run, uint lane,
    thread const T (&query)[HT][EL], thread float (&score)[HT]) {
  for (int t = 0; t < LK; ++t) {
    const int from = int(lane) / LK * LK + t;
    const int key = keys_at + from;
    const int page = PAGED ? simd_shuffle(own_page, ushort(from)) : own_page;
    float dims[EL];
    read_key<EL, DIMS, PAGED, PAGE>(
        keys, strides, page, key, key >= start && key < end, int(lane) % LK * EL, dims);
    for (int g = 0; g < HT; ++g) {
      if ((run >> g & 1u) == 0) continue;
      float dot = 0.0f;
      for (int i = 0; i < EL; ++i) dot += float(query[g][i]) * dims[i];
      dot = sum_of_key<LK>(dot);
      if (int(lane) % LK == t) score[g] = dot;
    }
  }
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
