  // Threadgroups as in topk_scores. Keys that a head keeps are read further: the other dimensions, and the values.
  threadgroup float slots[SIMDGROUPS / 2 * HT * DH];
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
  const int n = length - first;
  const int part = int(lane) / LK;
  const int begin = int(lane) % LK * EL;
  const int chunks = means_shape[2];
  const int last = (length + CHUNK - 1) / CHUNK;
  T query[HT][EL];
  float acc[HT][EL];
  float total[HT];
  float border[HT];
  float largest[HT];
  for (int g = 0; g < HT; ++g) {
    total[g] = border[g] = 0.0f;
    largest[g] = -INFINITY;
    for (int i = 0; i < EL; ++i) {
      acc[g][i] = 0.0f;
      const bool inside = g < here && begin + i < DH - R;
      query[g][i] =
          inside ? q[sequence * q_strides[0] + (head + g) * q_strides[1] + (R + begin + i) * q_strides[2]] : T(0);
    }
  }
  // Each simdgroup merges what the chunks left, in the same order, so that all get the same bits.
  for (int g = 0; g < here; ++g) {
    const long slot = (long(sequence) * (KV_HEADS * QUERIES) + head + g) * chunks;
    float sum = 0.0f;
    for (int c = first / CHUNK + int(lane); c < last; c += 32) {
      const float has = float(min(length, (c + 1) * CHUNK) - max(first, c * CHUNK));
      sum += means[slot + c] * has;
      largest[g] = max(largest[g], largests[slot + c]);
    }
    const float mean = simd_sum(sum) / float(n);
    largest[g] = simd_max(largest[g]);
    float square = 0.0f;
    for (int c = first / CHUNK + int(lane); c < last; c += 32) {
      const float has = float(min(length, (c + 1) * CHUNK) - max(first, c * CHUNK));
      const float apart = means[slot + c] - mean;
      square += squares[slot + c] + apart * apart * has;
    }
    border[g] = mean + quantiles[n] * sqrt(simd_sum(square) / float(n));
  }
  for (int keys_at = chunk * CHUNK + sg * 32; keys_at < end; keys_at += SIMDGROUPS * 32) {
    if (keys_at + 32 <= start) continue;
    const int own = keys_at + int(lane);
    const bool seen = own >= start && own < end;
    float weight[HT];
    bool some = false;
    for (int g = 0; g < here; ++g) {
      const long slot = (long(sequence) * (KV_HEADS * QUERIES) + head + g) * longest;
      const float s = seen ? scores[slot + own] : -INFINITY;
      const bool kept = seen && (s > border[g] || s == largest[g] || n <= kept_keys);
      weight[g] = kept ? exp(s - largest[g]) : 0.0f;
      total[g] += simd_sum(weight[g]);
      some = some || kept;
    }
    // Bits of the keys that any head keeps; parts of the simdgroup take them in turn.
    uint bits = simd_or(some ? 1u << lane : 0u);
    const int own_page = page_of<PAGED, PAGE>(table, sequence, table_shape[1], own, seen);
    while (bits != 0) {
      int from = -1;
      for (int p = 0; p < 32 / LK; ++p) {
        if (p == part && bits != 0) from = int(ctz(bits));
        bits &= bits - 1u;
      }
      const bool live = from >= 0;
      const ushort source = ushort(live ? from : 0);
      const int key = keys_at + from;
      const int page = PAGED ? simd_shuffle(own_page, source) : own_page;
      float dims[EL];
      read_key<EL, DH - R, PAGED, PAGE>(
          keys + kv * keys_strides[2] + R * keys_strides[3], keys_strides, page, key, live, begin, dims);
      float factor[HT];
      for (int g = 0; g < here; ++g) {
        float dot = 0.0f;
        for (int i = 0; i < EL; ++i) dot += float(query[g][i]) * dims[i];
        dot = sum_of_key<LK>(dot) * scale;
        const float softplus = max(dot, 0.0f) + log(1.0f + exp(-fabs(dot)));
        const float mine = simd_shuffle(weight[g], source);
        factor[g] = live ? mine * softplus : 0.0f;
      }
      read_key<EL, DH, PAGED, PAGE>(
          values + kv * values_strides[2], values_strides, page, key, live, begin, dims);
      for (int g = 0; g < here; ++g) {
        for (int i = 0; i < EL; ++i) acc[g][i] += factor[g] * dims[i];
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
        if (lane == 0) totals[slot] = total[g];
        for (int i = 0; i < EL; ++i) {
          if (part == 0 && begin + i < DH) slots[slot * DH + begin + i] = acc[g][i];
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (sg < half_of) {
      for (int g = 0; g < HT; ++g) {
        const int slot = sg * HT + g;
        total[g] += totals[slot];
        for (int i = 0; i < EL; ++i) acc[g][i] += begin + i < DH ? slots[slot * DH + begin + i] : 0.0f;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (sg != 0) return;
  for (int g = 0; g < here; ++g) {
    const long slot = (long(sequence) * (KV_HEADS * QUERIES) + head + g) * chunks + chunk;
    for (int i = 0; i < EL; ++i) {
      if (part == 0 && begin + i < DH) parts[slot * DH + begin + i] = acc[g][i];
    }
    if (lane == 0) sums[slot] = total[g];
  }
