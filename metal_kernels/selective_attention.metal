  // Threadgroups: (chunks of CHUNK keys, KV heads in TILES of HT query heads, sequences). The simdgroups take turns at
  // 32 keys; what they found is merged pairwise in threadgroup memory.
  threadgroup float slots[SIMDGROUPS / 2 * HT * DH];
  threadgroup float highs[SIMDGROUPS / 2 * HT];
  threadgroup float totals[SIMDGROUPS / 2 * HT];
  const uint lane = thread_index_in_simdgroup;
  const int sg = int(simdgroup_index_in_threadgroup);
  const int chunk = int(threadgroup_position_in_grid.x);
  const int kv = int(threadgroup_position_in_grid.y) / TILES;
  const int tile = int(threadgroup_position_in_grid.y) % TILES;
  const int sequence = int(threadgroup_position_in_grid.z);
  const int here = min(HT, QUERIES - tile * HT);
  const int head = kv * QUERIES + tile * HT;
  const int length = lengths[sequence];
  const int first = window > 0 ? max(length - window, 0) : 0;
  const int start = max(chunk * CHUNK, first);
  const int end = min(length, (chunk + 1) * CHUNK);
  if (start >= end) return;
  uint run = (1u << here) - 1u;
  if (LISTED) {
    const int units = heads_shape[1];
    run &= listed_heads<HT, PER_UNIT>(heads + sequence * units, min(counts[sequence], units), head, lane);
  }
  if (run == 0) return;
  const int part = int(lane) / LK;
  const int begin = int(lane) % LK * EL;
  T query[HT][EL];
  float acc[HT][EL];
  float high[HT];
  float total[HT];
  for (int g = 0; g < HT; ++g) {
    high[g] = -INFINITY;
    total[g] = 0.0f;
    for (int i = 0; i < EL; ++i) {
      acc[g][i] = 0.0f;
      const bool inside = (run >> g & 1u) != 0 && begin + i < DH;
      query[g][i] =
          inside ? q[sequence * q_strides[0] + (head + g) * q_strides[1] + (begin + i) * q_strides[2]] : T(0);
    }
  }
  for (int keys_at = chunk * CHUNK + sg * 32; keys_at < end; keys_at += SIMDGROUPS * 32) {
    if (keys_at + 32 <= start) continue;
    const int own = keys_at + int(lane);
    const bool seen = own >= start && own < end;
    const int own_page = page_of<PAGED, PAGE>(table, sequence, table_shape[1], own, seen);
    float score[HT];
    for (int g = 0; g < HT; ++g) score[g] = 0.0f;
    products_of_32<LK, DH, PAGED, PAGE>(
        keys + kv * keys_strides[2], keys_strides, own_page, keys_at, start, end, run, lane, query, score);
    for (int g = 0; g < HT; ++g) {
      if ((run >> g & 1u) == 0) continue;
      float s = score[g] * scale;
      if (CAPPED) s = softcap * precise::tanh(s / softcap);
      // Exponents of 2; of the 32 keys at least one is seen, so that the largest is finite from here on.
      s = seen ? s * M_LOG2E_F : -INFINITY;
      const float now = max(high[g], simd_max(s));
      const float shrink = exp2(high[g] - now);
      score[g] = exp2(s - now);
      total[g] = total[g] * shrink + simd_sum(score[g]);
      high[g] = now;
      for (int i = 0; i < EL; ++i) acc[g][i] *= shrink;
    }
    for (int t = 0; t < LK; ++t) {
      const int from = part * LK + t;
      const int page = PAGED ? simd_shuffle(own_page, ushort(from)) : own_page;
      const bool live = keys_at + from >= start && keys_at + from < end;
      float dims[EL];
      read_key<EL, DH, PAGED, PAGE>(
          values + kv * values_strides[2], values_strides, page, keys_at + from, live, begin, dims);
      for (int g = 0; g < HT; ++g) {
        if ((run >> g & 1u) == 0) continue;
        const float weight = simd_shuffle(score[g], ushort(from));
        for (int i = 0; i < EL; ++i) acc[g][i] += weight * dims[i];
      }
    }
  }
  for (int g = 0; g < HT; ++g) {
    for (int i = 0; i < EL; ++i) acc[g][i] = sum_of_parts<LK>(acc[g][i]);
  }
  for (int half_of = SIMDGROUPS / 2; half_of > 0; half_of /= 2) {
    if (sg >= half_of && sg < 2 * half_of) {
      for (int g = 0; g < HT; ++g) {
        const int slot = (sg - half_of) * HT + g;
        if (lane == 0) {
          highs[slot] = high[g];
          totals[slot] = total[g];
        }
        for (int i = 0; i < EL; ++i) {
          if (part == 0 && begin + i < DH) slots[slot * DH + begin + i] = acc[g][i];
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (sg < half_of) {
      for (int g = 0; g < HT; ++g) {
        const int slot = sg * HT + g;
        const float now = max(high[g], highs[slot]);
        // A simdgroup that had no keys weighs nothing.
        const float mine = high[g] > -INFINITY ? exp2(high[g] - now) : 0.0f;
        const float theirs = highs[slot] > -INFINITY ? exp2(highs[slot] - now) : 0.0f;
        total[g] = total[g] * mine + totals[slot] * theirs;
        high[g] = now;
        for (int i = 0; i < EL; ++i) {
          const float other = begin + i < DH ? slots[slot * DH + begin + i] : 0.0f;
          acc[g][i] = acc[g][i] * mine + other * theirs;
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (sg != 0) return;
  for (int g = 0; g < HT; ++g) {
    if ((run >> g & 1u) == 0) continue;
    const long slot = (long(sequence) * (KV_HEADS * QUERIES) + head + g) * chunks + chunk;
    for (int i = 0; i < EL; ++i) {
      if (part == 0 && begin + i < DH) parts[slot * DH + begin + i] = acc[g][i];
    }
    if (lane == 0) {
      largests[slot] = high[g];
      sums[slot] = total[g];
    }
  }
